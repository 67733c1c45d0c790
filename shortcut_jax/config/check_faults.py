"""Settings of what a run survives: spikes, hangs, lost processes."""

from shortcut_jax.config.schema import Settings
from shortcut_jax.errors import ConfigError


def check_faults(s: Settings) -> None:
    """Raises ConfigError for values that do not go together."""
    if 0 < s.spikes.factor <= 1:
        raise ConfigError(f"spikes.factor is {s.spikes.factor}, but many good steps are above the mean: set 2 or more")
    if s.spikes.factor and not s.max_skipped:
        raise ConfigError("max_skipped is 0, so that the first spike would stop the run: set max_skipped to 1 or more")
    if s.watchdog.seconds > s.watchdog.slow_seconds:
        raise ConfigError(
            f"watchdog.seconds is {s.watchdog.seconds:g}, more than watchdog.slow_seconds={s.watchdog.slow_seconds:g}"
        )
    if not 2 <= s.peer_timeout <= 90:
        raise ConfigError(
            f"peer_timeout is {s.peer_timeout:g}, but must be in [2, 90]: after 100 s JAX aborts the processes itself"
        )
