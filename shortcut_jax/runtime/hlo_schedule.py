"""Reading a compiled, scheduled program (HLO text): its collectives, how often each runs, and what runs beside it."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shortcut_jax.runtime.hlo import COMMENT, KINDS, Arrays, arrays_in

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_TRIPS = re.compile(r"known_trip_count\"?:\{\"n\":\"(\d+)\"")
_BITS = {
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "s4": 4,
    "u4": 4,
    "token": 0,
}
_FUSED_ASYNC = "async_collective_fusion"  # how XLA:TPU names computations that a collective runs in beside other work
_SCATTER = "all-reduce-scatter"  # and those of an all-reduce and a slice of it, which it runs as a reduce-scatter
MATMULS = ("dot", "convolution")
"""Opcodes of matrix products that XLA compiles itself."""
_ATTENTION = ("fmha", "tpu_custom_call")


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
      name: unique in the program.
      op: the opcode.
      arrays: (dtype, dimensions) of each array in its result.
      operands: names of the instructions it reads.
      text: the whole line.
    """

    name: str
    op: str
    arrays: Arrays
    operands: tuple[str, ...]
    text: str

    @property
    def op_name(self) -> str:
        """The path of the JAX operation it was made from; empty where XLA kept none."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls; empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def attends(self) -> bool:
        """Whether it is a kernel of attention."""
        return any(word in self.target for word in _ATTENTION)

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product: XLA's own, or of a library."""
        return self.op in MATMULS or "gemm" in self.target or "matmul" in self.target

    def called(self, role: str = "calls") -> str:
        """The computation that it calls in a role, or an empty string."""
        found = re.search(rf"\b{role}=%?([\w.-]+)", self.text)
        return found[1] if found else ""


class Transfer(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `hlo.KINDS`.
      arrays: (dtype, dimensions) of each array as it is when whole: gathered, reduced or before it is scattered.
      sources: for each array the op_names met on the way back to where its values were made, nearest first.
      axes: mesh axes it runs over; empty where its groups are none.
      times: how often it runs in one call of the program.
      asynchronous: whether other work is scheduled between its start and its end.
      matmuls: matrix products scheduled there.
      attentions: attention kernels scheduled there.
      others: other kernels scheduled there.
    """

    kind: str
    arrays: Arrays
    sources: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    times: int
    asynchronous: bool
    matmuls: int
    attentions: int
    others: int

    @property
    def bytes(self) -> int:
        """Bytes of all arrays, of one run."""
        return sum(num_bytes(dtype, dims) for dtype, dims in self.arrays)


def num_bytes(dtype: str, dims: Sequence[int]) -> int:
    """Bytes of an array of an HLO dtype."""
    return int(np.prod(dims, dtype=np.int64)) * _BITS.get(dtype, 8) // 8


class Program:
    """The computations of a module's text, in the order of its schedule."""

    def __init__(self, text: str):
        """Parses the text of a compiled module (`compiled.as_text()`)."""
        self._bodies: dict[str, list[Instruction]] = {}
        self._by_name: dict[str, Instruction] = {}
        self._entry = ""
        body: list[Instruction] | None = None
        for line in text.splitlines():
            start = _COMPUTATION.match(line)
            if start and not line.startswith(" "):
                body = self._bodies.setdefault(start["name"], [])
                self._entry = start["name"] if line.startswith("ENTRY") else self._entry
            elif body is not None and (match := _INSTRUCTION.match(COMMENT.sub("", line))):
                instruction = _parse(match, line.strip())
                body.append(instruction)
                self._by_name[instruction.name] = instruction
        self._callers = self._called_by()
        loops = {i.called("body") for i in self._by_name.values() if i.op == "while"}
        self._loop_bodies = {i.name: body for body in loops for i in self._bodies.get(body, []) if i.op == "parameter"}
        """Name of what a loop carries -> the loop's body."""

    @property
    def entry(self) -> str:
        """The computation that the program begins with."""
        return self._entry

    def body(self, computation: str) -> Sequence[Instruction]:
        """The instructions of a computation in the order of its schedule; none where it is not known."""
        return self._bodies.get(computation, [])

    def made_by(self, name: str) -> Instruction | None:
        """The instruction of a name."""
        return self._by_name.get(name)

    def trips(self, loop: Instruction) -> int:
        """How often the body of a loop runs: as XLA noted it, or the number that its condition compares with."""
        noted = _TRIPS.search(loop.text)
        if noted:
            return int(noted[1])
        bounds = [
            re.search(r" constant\((\d+)\)", i.text) for i in self.body(loop.called("condition")) if i.op == "constant"
        ]
        return max((int(bound[1]) for bound in bounds if bound), default=1)

    def attention_kernels(self) -> dict[str, int]:
        """How many calls there are of each custom kernel that attends, by its name."""
        counts: dict[str, int] = {}
        for instruction in self._by_name.values():
            if instruction.attends:
                counts[instruction.target] = counts.get(instruction.target, 0) + 1
        return counts

    def transfers(self, mesh: Mapping[str, int]) -> list[Transfer]:
        """All collectives, given the mesh axes and their sizes in the order of the devices; a pair counts once."""
        return [self._transfer(places, mesh) for places in self._collectives()]

    def _collectives(self) -> list[list[tuple[str, int]]]:
        """Computation and place of each collective. XLA:TPU writes one into every computation that it runs beside."""
        found: dict[str, list[tuple[str, int]]] = {}
        for name, body in self._bodies.items():
            for place, instruction in enumerate(body):
                if instruction.op.removesuffix("-start") in KINDS:
                    channel = re.search(r"channel_id=(\d+)", instruction.text)
                    found.setdefault(channel[1] if channel else instruction.name, []).append((name, place))
        return list(found.values())

    def _transfer(self, places: list[tuple[str, int]], mesh: Mapping[str, int]) -> Transfer:
        name, place = places[0]
        body = self._bodies[name]
        instruction = body[place]
        kind = instruction.op.removesuffix("-start")
        beside = _beside(body, place)
        for fused in (computation for computation, _ in places if computation.startswith(_FUSED_ASYNC)):
            beside += [i for i in self._bodies[fused] if i.op in ("fusion", "custom-call", *MATMULS)]
        matmuls, attentions, others = self._work(beside)
        arrays = whole_arrays(kind, instruction)
        reader = instruction
        if name.startswith(_SCATTER) and kind == "all-reduce":
            kind, reader = "reduce-scatter", self._call_of(name)
        sources = [self._sources(operand) for operand in reader.operands]
        if len(sources) == 1:
            sources = [(*sources[0], reader.op_name)]
        return Transfer(
            kind,
            arrays,
            tuple(sources),
            mesh_axes(instruction.text, mesh),
            max(self._times(computation) for computation, _ in places),
            bool(beside),
            matmuls,
            attentions,
            others,
        )

    def _called_by(self) -> dict[str, list[tuple[str, int]]]:
        """Computation -> the computations that call it, and how often in one run of theirs."""
        callers: dict[str, list[tuple[str, int]]] = {}
        for name, body in self._bodies.items():
            for instruction in body:
                times = self.trips(instruction) if instruction.op == "while" else 1
                roles = ("body",) if instruction.op == "while" else ("calls", "to_apply")
                for called in filter(None, map(instruction.called, roles)):
                    callers.setdefault(called, []).append((name, times))
                for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.text):
                    for called in branches.split(","):
                        callers.setdefault(called.strip().lstrip("%"), []).append((name, 1))
        return callers

    def _call_of(self, computation: str) -> Instruction:
        """The instruction that calls a computation that is called once."""
        ((name, _),) = self._callers[computation]
        return next(i for i in self._bodies[name] if i.called() == computation)

    @functools.cache  # noqa: B019  (a program lives as long as its report)
    def _times(self, computation: str) -> int:
        if computation == self._entry or computation not in self._callers:
            return 1
        return sum(times * self._times(name) for name, times in self._callers[computation])

    def _work(self, instructions: Sequence[Instruction]) -> tuple[int, int, int]:
        """How many matrix products, attention kernels and other kernels these instructions are."""
        matmuls = attentions = others = 0
        for i in instructions:
            if i.attends:
                attentions += 1
            elif i.multiplies or self._multiplies(i.called()):
                matmuls += 1
            elif i.op == "fusion":
                others += 1
        return matmuls, attentions, others

    @functools.cache  # noqa: B019
    def _multiplies(self, computation: str) -> bool:
        body = self._bodies.get(computation, [])
        return any(i.op in MATMULS or (i.op == "fusion" and self._multiplies(i.called())) for i in body)

    def _carried(self, instruction: Instruction) -> tuple[str, ...]:
        """Where an element of what a loop carries was made: in its body, an iteration before."""
        index = re.search(r"\bindex=(\d+)", instruction.text)
        if instruction.op != "get-tuple-element" or not index:
            return ()
        carrier = self._by_name.get(instruction.operands[0])
        if carrier and carrier.op == "while":
            body = carrier.called("body")
        elif carrier and carrier.op == "parameter":
            body = self._loop_bodies.get(carrier.name, "")
        else:
            return ()
        root = next((i for i in reversed(self._bodies.get(body, [])) if i.text.startswith("ROOT")), None)
        return root.operands[int(index[1]) : int(index[1]) + 1] if root and root.op == "tuple" else ()

    def _sources(self, name: str) -> tuple[str, ...]:
        """Names of JAX operations on the way back from an array, nearest first, 8 steps at most."""
        names, front = [], [name]
        for _ in range(8):
            back: list[str] = []
            for instruction in filter(None, map(self._by_name.get, front)):
                if instruction.op_name:
                    names.append(instruction.op_name)
                back += self._carried(instruction) or instruction.operands[:16]
            if not back or len(names) >= 6:
                break
            front = back
        return tuple(names)


def _parse(match: re.Match[str], line: str) -> Instruction:
    depth, operands = 1, match["rest"]
    for end, letter in enumerate(match["rest"]):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            operands = match["rest"][:end]
            break
    return Instruction(
        match["name"], match["op"], arrays_in(match["shape"]), tuple(re.findall(r"%([\w.-]+)", operands)), line
    )


def whole_arrays(kind: str, instruction: Instruction) -> Arrays:
    """The arrays of a collective at their full size: its result when gathered, its input when scattered."""
    arrays, num = tuple(a for a in instruction.arrays if a[1] or a[0] != "u32"), len(instruction.operands)
    if instruction.op.endswith("-start"):  # (inputs, results), but of all-reduce
        if kind == "all-reduce":
            return arrays
        return arrays[:num] if kind in ("reduce-scatter", "collective-permute") else arrays[num : 2 * num]
    if kind != "reduce-scatter":
        return arrays
    factor = group_size(instruction.text)
    return tuple((dtype, (*dims[:-1], dims[-1] * factor) if dims else dims) for dtype, dims in arrays)


def _beside(body: Sequence[Instruction], place: int) -> list[Instruction]:
    """What is scheduled between an asynchronous start and its end."""
    start = body[place]
    if not start.op.endswith("-start"):
        return []
    done = start.op.removesuffix("-start") + "-done"
    beside: list[Instruction] = []
    for instruction in body[place + 1 :]:
        if instruction.op == done and start.name in instruction.operands:
            break
        beside.append(instruction)
    return beside


def _groups(text: str) -> Iterator[list[int]]:
    """Groups of devices that a collective's text names: a list, an iota with a transpose, or axes of a mesh."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", text)
    if listed:
        yield from ([int(d) for d in group.split(",")] for group in listed[1].split("},{"))
        return
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    numbers = lambda x: [int(n) for n in x.split(",")]
    if iota:
        ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
        ids = ids.transpose(numbers(iota[3])) if iota[3] else ids
        yield from ids.reshape(numbers(iota[1])).tolist()
        return
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? *\{([^}]*)\}", text
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", named[1])}
        chosen = re.findall(r"'([\w.]+)'", named[4])
        kept = [i for i, name in enumerate(sizes) if name not in chosen]
        moved = [list(sizes).index(name) for name in chosen]
        ids = np.arange(np.prod(list(sizes.values())))
        if named[2]:
            ids = ids.reshape(numbers(named[2])).transpose(numbers(named[3]))
        ids = ids.reshape(list(sizes.values())).transpose(kept + moved)
        yield from ids.reshape(-1, int(np.prod([sizes[name] for name in chosen]))).tolist()


def span(text: str) -> int:
    """How far apart the devices of a collective's groups are at most, by their numbers."""
    return max((max(group) - min(group) for group in _groups(text)), default=0)


def group_size(text: str) -> int:
    """Devices of a collective's group; 1 where it names none."""
    return max(len(next(_groups(text), [])), 1)


def mesh_axes(text: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    varying: set[int] = set()
    for group in _groups(text):
        places = np.stack(np.unravel_index(group, tuple(mesh.values())))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axis for i, axis in enumerate(mesh) if i in varying)
