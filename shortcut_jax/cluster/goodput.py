"""Goodput: the share of a run's wall time, over all its restarts, that went into training steps that were kept.

The record of it is `goodput.jsonl` in the workdir: a line when a session (one process from start to end) begins, at
each checkpoint and when it ends, with the seconds of each kind of work so far. What a session that was killed did after
its last checkpoint is taken from the heartbeat that it left behind.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from shortcut_jax.cluster.timing import OTHER_KINDS, STEP_KINDS

FINISHED = "finished"
"""The state of a session that left nothing to be done: what comes after it is no downtime."""

ENDS = (FINISHED, "stopped", "interrupted", "failed")
"""The last state of a session that was not killed."""


class Account(NamedTuple):
    """Where the wall time of a run went, in seconds. All but `steps` add up to `wall`.

    Attributes:
      sessions: processes that worked on the run, one after the other.
      wall: from the first session's start to the end of the last one, without idle time after a finished session.
      kept: training steps that count.
      skipped: steps that were not finite and changed nothing.
      lost: steps after the checkpoint that the next session went on from, which it repeated.
      down: between the end of a session and the start of the next.
      others: by kind, see `timing.OTHER_KINDS`.
      steps: all steps, kept or not, by kind: see `timing.STEP_KINDS`.
    """

    sessions: int
    wall: float
    kept: float
    skipped: float
    lost: float
    down: float
    others: dict[str, float]
    steps: dict[str, float]

    @property
    def goodput(self) -> float:
        """Time of steps that were kept over wall time; 0 where no time has passed."""
        return self.kept / self.wall if self.wall > 0 else 0.0


def account(records: Sequence[dict[str, Any]]) -> Account:
    """Adds up the records of a run, in the order in which they were written.

    Each has `session` (its start, Unix time), `step`, `state`, `seconds` by kind and `skipped`, the seconds of skipped
    steps among them. A session's first records have the step that it starts from.
    """
    sessions: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        sessions.setdefault(record["session"], []).append(record)
    runs = list(sessions.values())
    lasts = [run[-1] for run in runs]
    ends = [last["session"] + sum(last["seconds"].values()) for last in lasts]
    down = sum(
        max(after["session"] - end, 0.0)
        for before, end, after in zip(lasts, ends, lasts[1:], strict=False)
        if before["state"] != FINISHED
    )
    lost = 0.0
    for i, run in enumerate(runs[:-1]):
        resumed = min(record["step"] for later in runs[i + 1 :] for record in later)
        lost += _kept_seconds(run, run[-1]["step"]) - _kept_seconds(run, resumed)
    total = lambda kind: sum(last["seconds"].get(kind, 0.0) for last in lasts)
    others = {kind: total(kind) for kind in OTHER_KINDS}
    steps = {kind: total(kind) for kind in STEP_KINDS}
    skipped = sum(last["skipped"] for last in lasts)
    kept = sum(steps.values()) - skipped - lost
    wall = kept + skipped + lost + down + sum(others.values())
    return Account(len(runs), wall, kept, skipped, lost, down, others, steps)


def _kept_seconds(run: Sequence[dict[str, Any]], step: int) -> float:
    """Seconds of finite steps of a session up to a step, on a straight line between its records."""
    points = [(r["step"], sum(r["seconds"].get(kind, 0.0) for kind in STEP_KINDS) - r["skipped"]) for r in run]
    before = max((p for p in points if p[0] <= step), default=points[0])
    after = min((p for p in points if p[0] >= step), default=points[-1])
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


def goodput_line(a: Account) -> str:
    """`goodput 71.3%: 31.0 s of 43.5 s in training steps that were kept, 1 session`."""
    sessions = f"{a.sessions} session{'s' * (a.sessions > 1)}"
    return f"goodput {a.goodput:.1%}: {_time(a.kept)} of {_time(a.wall)} in training steps that were kept, {sessions}"


def goodput_table(a: Account) -> str:
    """The line, and a row for each thing that took time, the longest first, with its share."""
    rows = {
        "training steps that were kept": a.kept,
        "skipped steps (not finite)": a.skipped,
        "steps lost and repeated after a restart": a.lost,
        "between sessions": a.down,
        **{text: a.others[kind] for kind, text in OTHER_KINDS.items()},
    }
    lines = [goodput_line(a)]
    for name, seconds in sorted(rows.items(), key=lambda row: -row[1]):
        if seconds > 0.0005 * a.wall:
            lines.append(f"  {name:<42}{_time(seconds):>10}{seconds / a.wall:>8.1%}")
    data, host, device = (_time(a.steps[kind]) for kind in STEP_KINDS)
    lines.append(f"  all steps: {data} waiting for data, {host} on the host, {device} waiting for devices")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
