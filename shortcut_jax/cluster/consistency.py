"""What all processes must have in common, checked before anything is compiled: a difference would be a hang later."""

import hashlib
import importlib.metadata
import json
import os
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.cluster import failures, key_value
from shortcut_jax.cluster.rendezvous import names
from shortcut_jax.errors import AgreementError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions change what is compiled or saved."""

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that change what is compiled: programs that differ wait for each other for ever."""


def code_facts() -> dict[str, str]:
    """A hash of this package's source files, and what else decides what is compiled, by name."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    facts = {"source of shortcut_jax": digest.hexdigest()[:12]}
    facts |= {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    for name in FLAG_VARIABLES:
        flags = os.environ.get(name, "").split()
        facts[name] = " ".join(sorted(flag for flag in flags if "xla_dump" not in flag))
    return facts


def check_same(facts: Mapping[str, Any]) -> None:
    """Compares facts (name -> value) between all processes; the text of a value is what counts.

    Raises:
      AgreementError: in every process, naming what differs, the values and who has which.
      JoinError: somebody did not come to be compared.
    """
    if key_value.num_processes() == 1:
        return
    text = json.dumps({name: str(value) for name, value in facts.items()}, sort_keys=True)
    hashes = key_value.gather("compare configs", hashlib.sha256(text.encode()).hexdigest())
    if len(set(hashes.values())) == 1:
        return
    everyone = key_value.gather("tell configs", text)
    raise AgreementError(f"the processes differ: {describe({i: json.loads(t) for i, t in everyone.items()})}")


def describe(facts: Mapping[int, Mapping[str, str]]) -> str:
    """`steps: 4 (process 0), 6 (processes 1, 2)` for each name whose values differ."""
    lines = []
    for name in sorted(set().union(*facts.values())):
        holders: dict[str, list[int]] = defaultdict(list)
        for process, values in sorted(facts.items()):
            holders[values.get(name, "absent")].append(process)
        if len(holders) > 1:
            lines.append(f"{name}: {', '.join(f'{value} ({names(who)})' for value, who in holders.items())}")
    return "; ".join(lines)


DEVICE_TIMEOUT = 100.0
"""Seconds for devices to come up in all processes; jaxlib gives up after two minutes, with a traceback."""


def check_devices(timeout: float = DEVICE_TIMEOUT) -> None:
    """Brings the devices up, and compares kind and number between the processes.

    Raises:
      AgreementError: in every process, where they differ.
    """
    if key_value.num_processes() == 1:
        return
    topic = "devices"

    def too_late() -> None:
        missing = set(range(key_value.num_processes())) - key_value.texts(topic).keys()
        failures.fail(
            f"after {timeout:g} s the devices of {names(missing)} were not up: all processes need the same kind of "
            f"device (set JAX_PLATFORMS to it, so that one without it says why)",
            failures.LOST,
            failures.LOST,
        )

    timer = threading.Timer(timeout, too_late)
    timer.daemon = True
    timer.start()
    devices = jax.devices()
    key_value.put(topic, "")
    timer.cancel()
    kinds: dict[int, list[str]] = {i: [] for i in range(jax.process_count())}
    for device in devices:
        kinds[device.process_index].append(device.device_kind)
    found = {i: {"devices": _count(of_process)} for i, of_process in kinds.items()}
    if difference := describe(found):
        raise AgreementError(f"the processes differ: {difference}; all need the same number of the same kind")


def _count(kinds: list[str]) -> str:
    return " + ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "none"
