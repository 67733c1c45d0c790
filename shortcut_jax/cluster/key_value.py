"""Small texts that the processes of a run leave for each other, in the key-value store of JAX's coordination service.

No devices and no compilation are needed, so this works before both. JAX offers the store under a private name only.
"""

import itertools
import time
from typing import Any

from jax._src import distributed

from shortcut_jax.cluster.rendezvous import names
from shortcut_jax.errors import JoinError

PREFIX = "shortcut_jax"

SKEW = 300.0
"""Seconds that processes may come apart at start: they started together, but their disks differ."""

_gathered = itertools.count()


def process_id() -> int:
    """The id of this process, without asking for devices."""
    return distributed.global_state.process_id


def address() -> str:
    """host:port of process 0, which holds the store."""
    return str(distributed.global_state.coordinator_address)


def num_processes() -> int:
    """How many processes joined, without asking for devices."""
    return distributed.global_state.num_processes if joined() else 1


def joined() -> bool:
    """Whether this process has joined others, and not yet left them."""
    return distributed.global_state.client is not None


def _client() -> Any:
    return distributed.global_state.client


def put(topic: str, text: str) -> None:
    """Leaves this process's text on a topic; an earlier one is replaced."""
    _client().key_value_set(f"{PREFIX}/{topic}/{process_id()}", text, allow_overwrite=True)


def texts(topic: str) -> dict[int, str]:
    """What the processes have left on a topic so far, by their ids."""
    found = _client().key_value_dir_get(f"{PREFIX}/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


def gather(topic: str, text: str, timeout: float = SKEW) -> dict[int, str]:
    """Leaves a text, and returns those of all processes. They all have to gather the same topics in the same order.

    Raises:
      JoinError: after `timeout` seconds some had left none; they are named.
    """
    key = f"{next(_gathered)} {topic}"  # the same topic may come up again
    put(key, text)
    until, pause = time.monotonic() + timeout, 0.02
    while True:
        found = texts(key)
        if len(found) == num_processes():
            return found
        if time.monotonic() > until:
            missing = set(range(num_processes())) - found.keys()
            raise JoinError(f"after {timeout:g} s {names(missing)} had not come to: {topic}")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
