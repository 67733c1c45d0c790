"""Before JAX's coordination service starts, all processes call at its address, within a bounded time.

The service itself waits for everyone too, but it ends a process by an abort that names nobody. Here process 0 listens
first on the port that it will give to the service; the others call and say who they are; process 0 tells all of them
the outcome. So every process can say which ones are missing, and one that nobody answers says the address.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable

from shortcut_jax.errors import JoinError

ATTEMPT = 5.0
"""Seconds that one connection or one line may take: a caller that says nothing must not hold up the others."""


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes have called at `address` (host:port of process 0).

    Raises:
      JoinError: after `timeout` seconds somebody is missing, or nobody answers; the line is the same for all that
        process 0 can reach. At once: two processes have one id, or their numbers of processes differ.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    if process_id == 0:
        _receive(address, int(port), num_processes, timeout, until)
    else:
        _call(address, (host.strip("[]"), int(port)), num_processes, process_id, timeout, until)


def names(ids: Iterable[int], most: int = 16) -> str:
    """`process 3`, or `processes 1, 2, 5`; of many only the first, and how many more."""
    ids = sorted(ids)
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"process{'' if len(ids) == 1 else 'es'} {', '.join(map(str, ids[:most]))}{more}"


def _receive(address: str, port: int, num: int, timeout: float, until: float) -> None:
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(("", port), family=family, backlog=num, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise JoinError(f"process 0 cannot listen at {address}: {error.strerror}; choose another port") from None
    callers: dict[int, socket.socket] = {}
    told: list[socket.socket] = []
    problem = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(callers) < num - 1 and not problem:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                caller, (where, *_) = server.accept()
            except TimeoutError:
                missing = set(range(1, num)) - callers.keys()
                problem = (
                    f"after {timeout:g} s {names(missing)} of {num} had not called at {address}: see whether they "
                    f"started, and whether they reach this address (--join_timeout says how long to wait)"
                )
                break
            stack.enter_context(caller)
            said = _hear(caller)
            if said is not None:
                index, total = said
                problem = _misfit(index, total, num, callers, where)
                callers.setdefault(index, caller)
                told.append(caller)
        answer = json.dumps({"problem": problem}).encode() + b"\n"
        for caller in told:
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                caller.sendall(answer)
    if problem:
        raise JoinError(problem)


def _hear(caller: socket.socket) -> tuple[int, int] | None:
    """Id and number of processes that a caller gives; None for anybody else who knocks at this port."""
    caller.settimeout(ATTEMPT)
    try:
        said = json.loads(caller.makefile("rb").readline(1000))
        return int(said["process_id"]), int(said["num_processes"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _misfit(index: int, total: int, num: int, callers: dict[int, socket.socket], where: str) -> str:
    if total != num:
        return f"process {index} ({where}) expects {total} processes, but process 0 of {num}"
    if index in callers or index == 0:
        return f"two processes have the id {index}; one of them is at {where}: each needs its own --process_id"
    return "" if 0 < index < num else f"process {index} ({where}) is not one of {num}: ids are 0 to {num - 1}"


def _call(address: str, target: tuple[str, int], num: int, index: int, timeout: float, until: float) -> None:
    why: object = "no answer"
    while time.monotonic() < until:
        try:
            with socket.create_connection(target, timeout=ATTEMPT) as line:
                said = {"process_id": index, "num_processes": num}
                line.sendall(json.dumps(said).encode() + b"\n")
                line.settimeout(max(until - time.monotonic(), 0) + 2 * ATTEMPT)  # process 0 may have started later
                problem = json.loads(line.makefile("rb").readline())["problem"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = getattr(error, "strerror", None) or str(error)
            time.sleep(0.3)
            continue
        if problem:
            raise JoinError(problem)
        return
    raise JoinError(
        f"process {index} of {num}: the coordinator {address} did not answer within {timeout:g} s ({why}): see whether "
        f"process 0 runs there, and whether the port is open (--join_timeout says how long to wait)"
    )
