"""An exclusive claim on a folder: two runs that write into one at the same time would harm both.

The claim is a small file, `claim.json`, that says who holds the folder: host, process, session, since when, and a count
of renewals. It is created so that only one process can (O_EXCL, which NFS keeps too), renewed in place by a thread
every few seconds, and removed at the end. With several processes process 0 holds it for all of them.

Whoever finds a claim watches it. Clocks are never compared, for those of hosts differ: what counts is whether the file
changes while it is watched.

- It changes: its holder lives, and the newcomer is refused at once, which is at most one interval after it came. That
  is a second run started by mistake.
- It changes, but says that its holder was asked to stop (SIGTERM, Ctrl-C) and is saving: the newcomer, such as the same
  job requeued, waits for it, for `Times.patience` at most; then it is refused with exit code 75: try again.
- It does not change for `Times.stale`: the holder is dead, or cut off from the disk, and the claim is taken over. So a
  requeued job whose predecessor was killed on another host starts after that time.
- Its process is known to be dead, as it ran on this very machine since the same boot: it is taken over at once.

A holder that comes back after its claim was taken over, such as a process that was suspended, ends itself before it
writes anything more than it is in the middle of. Readers of a folder ask for no claim.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shortcut_jax.cluster import failures, key_value
from shortcut_jax.cluster.logs import LOGGER
from shortcut_jax.errors import ClaimError, FolderError

CLAIM = "claim.json"


@dataclass(frozen=True)
class Times:
    """Seconds of a claim.

    Attributes:
      interval: between two renewals.
      stale: without a renewal after which a claim is taken over: NFS keeps what it knows of a file for up to 60.
      patience: that a holder has to save and end, once it was asked to.
      poll: between two looks at the claim of another.
    """

    interval: float = 5.0
    stale: float = 75.0
    patience: float = 600.0
    poll: float = 0.25


class Member(NamedTuple):
    """One of several processes that share a folder without having joined, each by a claim file of its own.

    Attributes:
      path: its file.
      leader: the file of the first of them, which has to be absent or of the same group.
      group: what all of them, and nobody else, have in common.
    """

    path: Path
    leader: Path
    group: str


class Claim:
    """The claim on a folder. A context manager: entering it refuses a folder that is in use, but writes nothing yet.

    Attributes:
      path: the file.
    """

    def __init__(self, folder: Path, flag: str = "--workdir", member: Member | None = None, times: Times | None = None):
        """Claims nothing yet.

        Args:
          folder: what is claimed.
          flag: that names it on the command line.
          member: by default `folder/claim.json` is for all processes that joined.
          times: see `Times`.
        """
        self._folder, self._flag, self._member, self._times = folder, flag, member, times or Times()
        self.path = member.path if member else folder / CLAIM
        self._session, self._since = secrets.token_hex(8), _now()
        self._renewals, self._ending = 0, False
        self._held, self._over, self._lock = False, threading.Event(), threading.Lock()

    def __enter__(self) -> "Claim":
        self._by_one(self._await_free)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _await_free(self) -> None:
        if self._member and self._member.leader != self.path:
            self._await(self._member.leader, self._member.group)
        self._await(self.path)

    def _await(self, path: Path, group: str | None = None) -> None:
        """Returns once nobody, or somebody of the group, holds a claim; see above for how long that may take.

        Raises:
          ClaimError: somebody does.
        """
        t, begin, told = self._times, time.monotonic(), False
        seen, looked, silent = _read(path), begin, 0.0
        while seen is not None:
            holder, now = _parse(seen), time.monotonic()
            # A disk that stalls stops the holder's renewals as well as this process, which may be the first to go on.
            silent, looked = silent + min(now - looked, 2 * t.poll), now
            if group is not None and holder.get("group") == group:
                return
            if _is_dead(holder) or silent > t.stale:
                _tell(f"taking over {self._folder} from {_describe(holder)}, which gives no sign of life")
                _remove(path, seen)
            elif now - begin > t.patience:
                line = f"{self._in_use(holder)}: it was asked to stop, but has not ended within {t.patience:g} s"
                raise ClaimError(line, failures.LOST)
            elif not told and (holder.get("ending") or now - begin > 2 * t.interval):
                why = (t.patience, "is ending") if holder.get("ending") else (t.stale, "gives no sign of life")
                _tell(f"waiting up to {why[0]:g} s for {self._folder}: {_describe(holder)} {why[1]}")
                told = True
            time.sleep(t.poll)
            found = _read(path)
            if found not in (seen, None):
                silent, holder = 0.0, _parse(found)
                if holder and not (holder.get("ending") or (group is not None and holder.get("group") == group)):
                    remedy = f"wait until it has ended, stop it, or give another {self._flag}"
                    raise ClaimError(f"{self._in_use(holder)}: {remedy}")
            seen = found

    def take(self) -> None:
        """Takes the claim and keeps it until the end.

        Raises:
          ClaimError: another process was faster.
          FolderError: the folder cannot be written to.
        """
        self._by_one(self._take)

    def ending(self) -> None:
        """Lets those who wait know, with the next renewal, that this process was asked to stop."""
        self._ending = True

    def release(self) -> None:
        """Gives the claim up, if this process has it."""
        self._over.set()
        with self._lock:
            if self._held:
                self._held = False
                failures.forget(self.release)
                with contextlib.suppress(OSError):
                    if _parse(_read(self.path)).get("session") == self._session:
                        self.path.unlink()

    def _by_one(self, act: Callable[[], None]) -> None:
        """Has process 0 do something for all processes, which fail together."""
        if self._member or key_value.num_processes() == 1:
            self._attempt(act)
            return
        outcome = ""
        if key_value.process_id() == 0:
            try:
                self._attempt(act)
            except FolderError as error:
                outcome = json.dumps([str(error), getattr(error, "exit_code", 1)])
        patience = key_value.SKEW + self._times.patience + self._times.stale
        if outcome := key_value.gather("claim the folder", outcome, patience)[0]:
            raise ClaimError(*json.loads(outcome))

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(f"cannot claim {self._folder}: {error.strerror}; give another {self._flag}") from None

    def _take(self) -> None:
        while not self._create():
            self._await(self.path)
        self._held = True
        failures.at_end(self.release)
        threading.Thread(target=self._keep, name="claim", daemon=True).start()

    def _create(self) -> bool:
        try:
            file = self.path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                self._write(file)
        except OSError:  # an empty claim would keep the next process waiting
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _keep(self) -> None:
        told = False
        while not self._over.wait(self._times.interval):
            try:
                with self._lock:
                    if self._over.is_set() or self.renew():
                        continue
            except OSError as error:
                if not told:
                    LOGGER.warning("the claim %s cannot be renewed, but the run continues: %s", self.path, error)
                told = True
                continue
            self._over.set()
            self.lost()
            return

    def renew(self) -> bool:
        """Writes a sign of life; whether the claim still is this process's."""
        try:
            with self.path.open("r+") as file:  # the file itself, not its name: it may be another's by then
                if _parse(file.read()).get("session", self._session) != self._session:
                    return False
                file.seek(0)
                self._write(file)
        except FileNotFoundError:  # somebody cleaned up
            return self._create()
        return True

    def lost(self) -> None:
        """Ends this process, since another one has the folder now."""
        line = (
            f"{self._folder} was taken over by {_describe(_parse(_read(self.path)))}, as this process gave no sign of "
            f"life: it stops here, so that only one writes there"
        )
        failures.fail(line, 1, 1)
        print(f"error: {line}", file=sys.stderr, flush=True)
        failures.end(1)

    def _write(self, file: Any) -> None:
        self._renewals += 1
        fields = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "session": self._session,
            "group": self._member and self._member.group,
            "since": self._since,
            "renewed": _now(),
            "renewals": self._renewals,
            "ending": self._ending,
            "machine": _machine(),
            "started": _start_time(os.getpid()),
        }
        file.write(json.dumps(fields) + "\n")
        file.flush()
        file.truncate()
        os.fsync(file.fileno())

    def _in_use(self, holder: dict[str, Any]) -> str:
        return f"{self._folder} is in use by {_describe(holder)}"


def _describe(holder: dict[str, Any]) -> str:
    told = {name: holder.get(name, "unknown") for name in ("pid", "host", "since", "renewed")}
    return "process {pid} on {host} (since {since}, last sign of life {renewed})".format(**told)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # on NFS: removed by another host meanwhile
            return None
        raise FolderError(f"cannot read the claim {path}: {error.strerror}") from None


def _parse(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "")
    except (ValueError, RecursionError):  # being written just now, or somebody's own file
        return {}
    return fields if isinstance(fields, dict) else {}


def _remove(path: Path, seen: str) -> None:
    """Removes a claim, but not the one with which somebody else was faster."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != seen:
            with contextlib.suppress(OSError):  # there is a newer one, or the file system has no links
                os.link(aside, path)
        aside.unlink()


def _machine() -> str:
    """Where process ids mean the same: this host since its boot, and this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to be dead; another process may have its id by now."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return False
    start = _start_time(pid)
    return start is None or (start != "" and start != holder.get("started"))


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since the boot, or "" where that cannot be known; None where it is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass  # somebody else's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
