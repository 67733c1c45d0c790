"""What a set leaves out of its source: listed beside it, looked at again, and refused where it is too much."""

import json
import os
from pathlib import Path

from shortcut_jax.core.text import write_text
from shortcut_jax.data.format import SKIPPED
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.job import Job
from shortcut_jax.preparation.progress import Tally, remedies, skipped_text
from shortcut_jax.preparation.units import Skip, as_json, done_units, has_changed, read_done, write_json

REFUSED = "refused.json"
"""Says that too much was left out, and how much was tolerated: units that are older are not the last word."""


def list_skipped(job: Job) -> Path:
    """Writes what was left out, of the units that are done."""
    path = job.partial / SKIPPED
    skips = (skip for index in sorted(done_units(job.work)) for skip in read_done(job.work, index).skipped)
    write_text(path, "".join(f"{as_json(_listed(skip))}\n" for skip in skips))
    return path


def _listed(skip: Skip) -> dict[str, str]:
    """A line of `skipped.jsonl`: the stamp of a file shows later that the file was corrected."""
    watched = dict(zip(("file", "stamp"), skip.watched, strict=True)) if skip.watched else {}
    return {"key": skip.key, "reason": skip.reason, "detail": skip.detail, **watched}


def check_left_out(out: Path) -> None:
    """Raises DataError where files that a complete set left out were corrected, or came, since."""
    try:
        with (out / SKIPPED).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        left = dict.fromkeys((row["file"], row["stamp"]) for row in rows if "file" in row)
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out / SKIPPED} is damaged ({error}): delete {out}, and prepare it again") from error
    # A file that could not be read has no stamp: it is another one when it can be read.
    changed = [name for name, was in left if has_changed(name, was) and (was or os.access(name, os.R_OK))]
    if changed:
        shown = ", ".join([*changed[:3], *(["..."] if len(changed) > 3 else [])])
        shown = shown.encode("utf-8", "backslashreplace").decode()
        raise DataError(
            f"{out} left out files that have changed since ({len(changed):,}: {shown}): give another --out, or delete "
            f"{out}, to prepare it with them"
        )


def check_skipped(job: Job, tally: Tally) -> None:
    """Stops where too much was left out, of at least 1,000 or of all there is: a few say nothing of the rest."""
    skipped, seen = sum(tally.skipped.values()), tally.seen
    finished = len(tally.done) == len(job.units)
    if skipped > job.max_skipped * (seen if finished else max(seen, min(1000, job.num_items or 1000))):
        path = list_skipped(job)
        mark_refused(job)
        raise DataError(
            f"{skipped:,} of {seen:,} ({skipped / seen:.1%}) were left out, more than "
            f"--max_skipped={job.max_skipped:g}: {skipped_text(tally.skipped)}; they are listed in {path} "
            f"({_first_skip(job)}){remedies(tally.skipped)}. What is done is kept: correct the source and run this "
            f"again, or run it with a larger --max_skipped"
        )


def _first_skip(job: Job) -> str:
    """The first of what was left out, as an example."""
    skip = next(skip for index in sorted(done_units(job.work)) for skip in read_done(job.work, index).skipped)
    told = f"{skip.key}: {skip.detail}" if skip.detail else skip.key
    return f"the first: {' '.join(told.split())[:200]}"


def mark_refused(job: Job) -> None:
    """Notes that too much was left out, and how much would have been tolerated."""
    write_json(job.work / REFUSED, job.max_skipped)
