"""Two configs of one workdir: where they differ, and what may differ when a run is resumed."""

from typing import Any

from shortcut_jax.core.tree import first_match

MARKS = (
    (r"steps|optimizer\.warmup_steps|max_skipped|spikes\..*", "schedule"),
    (
        r"mesh\..*|eval\..*|validation\..*|data\.(dir|threads|workers)|base|teacher_lora|(log|sample|checkpoint)_every|"
        r"keep|save_attempts|peer_timeout|watchdog\..*|accumulate|batch_per_device|heartbeat_every|profile_steps",
        "free",
    ),
    (r"model\.(remat|attention|scan_unroll)", "free"),
    (r".*", "identity"),
)
"""What may change when a workdir is resumed: `identity` never, `schedule` with a log line, `free` silently."""


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists become tuples, so that JSON compares equal."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def compare(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, list[str]]:
    """Differences of two `to_dict` results by mark, each as `key: stored -> current`."""
    old, new = flatten(stored), flatten(current)
    differences: dict[str, list[str]] = {"identity": [], "schedule": [], "free": []}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            differences[first_match(MARKS, key)].append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return differences
