"""Reading compiled programs: their collectives and their memory."""

import collections
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(r"=\s+(?P<shape>\([^=]*?\)|\S+)\s+(?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\(")
COMMENT = re.compile(r"/\*.*?\*/")  # XLA numbers every fifth element of a tuple
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\]")


Arrays = tuple[tuple[str, tuple[int, ...]], ...]
"""(dtype, dimensions) of each array of an instruction."""


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      arrays: (dtype, dimensions) of each array in its result.
      line: the instruction's text.
    """

    kind: str
    arrays: Arrays
    line: str


def arrays_in(shape: str) -> Arrays:
    """The arrays of a shape's text, of one array or a tuple of them."""
    return tuple((m["dtype"], tuple(int(d) for d in m["dims"].split(",") if d)) for m in _ARRAY.finditer(shape))


def collectives(hlo: str) -> list[Collective]:
    """The collectives of an HLO module's text; an asynchronous pair counts once."""
    found = []
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(COMMENT.sub("", line))
        if match:
            found.append(Collective(match["kind"], arrays_in(match["shape"]), line.strip()))
    return found


def count_kinds(hlo: str) -> dict[str, int]:
    """How many collectives of each kind a module has; one in a loop body counts once."""
    counts = collections.Counter(c.kind for c in collectives(hlo))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def compile_and_partition(lowered: Any) -> tuple[Any, str | None]:
    """Compiles once, and keeps the module right after the SPMD partitioner.

    There collectives still are what the shardings ask for. XLA:CPU later rewrites them (it has no reduce-scatter and
    widens bfloat16), so its final program misleads.

    Returns:
      The compiled program, and the text of that module; None where XLA wrote none, because nothing was partitioned or
      the program came from a compilation cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile(compiler_options=options)
        texts = [p.read_text() for p in Path(folder).glob("*after_spmd-partitioning*")]
    return compiled, max(texts, key=len, default=None)
