"""The window of steps that a run profiles, checked before anything is compiled."""

from shortcut_jax.config.schema import Settings
from shortcut_jax.errors import ConfigError
from shortcut_jax.runtime.profiling import parse_steps


def check_profile(s: Settings) -> None:
    """Raises ConfigError where `profile_steps` names no steps, or steps that the run does not have."""
    try:
        steps = parse_steps(s.profile_steps)
    except ValueError as error:
        raise ConfigError(f"profile_steps {error}") from None
    if steps and steps[-1] > s.steps:
        raise ConfigError(
            f"profile_steps is {s.profile_steps!r}, but the run has {s.steps} steps: END is at most {s.steps + 1}"
        )
