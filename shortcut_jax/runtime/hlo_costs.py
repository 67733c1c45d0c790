"""What each kernel of a compiled, scheduled program costs: FLOPs, bytes of memory, bytes on the wire.

A program is a list of blocks: its entry, and the body of each loop with how often it runs. A kernel is a fusion, a
matrix product, a custom call, a copy or a collective. It reads its operands once and writes its result once; a slice
counts as what is taken of it, and an update in place as what is put in.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shortcut_jax.runtime.hlo import KINDS
from shortcut_jax.runtime.hlo_schedule import (
    MATMULS,
    Instruction,
    Program,
    group_size,
    mesh_axes,
    num_bytes,
    span,
    whole_arrays,
)

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota", "partition-id"}
_FREE |= {"replica-id", "opt-barrier", "domain", "add-dependency"}
_MOVES = _FREE | {"transpose", "copy", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"}
_MOVES |= {"pad", "broadcast"}
_INDEXING = {"add", "subtract", "multiply", "compare", "select", "clamp", "minimum", "maximum"}
_SLICES = ("slice", "dynamic-slice", "gather")
_CALLS = ("call", "conditional")


class Kernel(NamedTuple):
    """One kernel of a block.

    Attributes:
      name: of its instruction.
      kind: `gemm`, `attention forward`, `attention backward`, `elementwise`, `reduction`, `copy`, `convert`, `other`,
        or one of `hlo.KINDS`; `wait` is where a block waits for the asynchronous collective `waits_for`.
      dtype: of the operands of a matrix product (`tf32` where float32 is rounded to that), or of what is moved.
      flops: of one run.
      bytes: that it reads and writes in memory.
      wire: bytes that a device sends in a collective.
      axes: mesh axes that a collective runs over.
      span: how far apart its devices are at most, by their numbers.
      op_name: path of the JAX operation it was made from.
      asynchronous: whether a collective only begins here.
      waits_for: name of the collective that is waited for.
    """

    name: str
    kind: str
    dtype: str = ""
    flops: float = 0.0
    bytes: float = 0.0
    wire: float = 0.0
    axes: tuple[str, ...] = ()
    span: int = 0
    op_name: str = ""
    asynchronous: bool = False
    waits_for: str = ""


class Block(NamedTuple):
    """Kernels that run one after the other.

    Attributes:
      name: of the computation.
      times: how often it runs in one call of the program.
      kernels: in the order of the schedule.
      looped: whether it is the body of a loop.
    """

    name: str
    times: int
    kernels: list[Kernel]
    looped: bool


def blocks(program: Program, mesh: Mapping[str, int]) -> list[Block]:
    """The blocks of a program, given the mesh axes and their sizes in the order of the devices."""
    found: list[Block] = []
    _walk(program, mesh, program.entry, 1, False, found)
    return found


def _walk(program: Program, mesh: Mapping[str, int], name: str, times: int, looped: bool, found: list[Block]) -> None:
    kernels: list[Kernel] = []
    found.append(Block(name, times, kernels, looped))
    for instruction in _scheduled(program, name):
        if instruction.op == "while":
            runs = times * program.trips(instruction)
            _walk(program, mesh, instruction.called("body"), runs, True, found)
        elif kernel := _kernel(program, mesh, instruction):
            kernels.append(kernel)


def _scheduled(program: Program, name: str) -> Iterator[Instruction]:
    """The instructions of a computation, what it calls in its place; of a conditional the first branch."""
    for instruction in program.body(name):
        if instruction.op not in _CALLS:
            yield instruction
            continue
        branches = re.search(r"branch_computations=\{%?([\w.-]+)", instruction.text)
        called = (
            branches[1]
            if branches
            else next(filter(None, map(instruction.called, ("true_computation", "to_apply", "calls"))), "")
        )
        yield from _scheduled(program, called)


def _kernel(program: Program, mesh: Mapping[str, int], i: Instruction) -> Kernel | None:
    """What an instruction costs; None where it costs nothing."""
    base = i.op.removesuffix("-start")
    if i.op.endswith("-done"):
        return Kernel(i.name, "wait", waits_for=i.operands[0] if i.operands else "")
    if i.op in _FREE:
        return None
    if i.op == "async-start":
        wrapped = [kernel for j in program.body(i.called()) if (kernel := _kernel(program, mesh, j))]
        return wrapped[0]._replace(name=i.name, asynchronous=True) if wrapped else None
    if base in KINDS:
        return _collective(mesh, i, base)
    read = [a for name in i.operands if (made := program.made_by(name)) for a in made.arrays]
    scratch = _size([a for a in i.arrays if a[0] == "u8"]) if i.op == "custom-call" else 0.0
    moved = _size(read) + _size(i.arrays) - scratch
    if i.attends:
        return _attention(program, i, moved)
    if i.multiplies:
        flops, dtype = _product(program, i)
        return Kernel(i.name, "gemm", dtype, flops, moved, op_name=i.op_name)
    if i.op == "fusion":
        return _fusion(program, mesh, i)
    if i.op in _SLICES:
        return Kernel(i.name, "copy", bytes=2 * _size(i.arrays), op_name=i.op_name)
    if i.op == "dynamic-update-slice":
        update = program.made_by(i.operands[1])
        return Kernel(i.name, "copy", bytes=2 * _size(update.arrays if update else ()), op_name=i.op_name)
    kind = (
        "copy" if base in _MOVES else "convert" if i.op == "convert" else "reduction" if i.op == "reduce" else "other"
    )
    return Kernel(i.name, kind, bytes=moved, op_name=i.op_name)


def _collective(mesh: Mapping[str, int], i: Instruction, kind: str) -> Kernel:
    """A device sends (n - 1) / n of the whole array, in an all-reduce twice; a permutation sends what it has."""
    whole, n = whole_arrays(kind, i), group_size(i.text)
    share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
    return Kernel(
        i.name,
        kind,
        "+".join(sorted({dtype for dtype, _ in whole})),
        wire=_size(whole) * share,
        axes=mesh_axes(i.text, mesh),
        span=span(i.text),
        op_name=i.op_name,
        asynchronous=i.op.endswith("-start"),
    )


def _attention(program: Program, i: Instruction, moved: float) -> Kernel:
    of_backward = "transpose(jvp" in i.op_name and "rematted" not in i.op_name
    backward = "Backward" in i.target or ("fmha" not in i.target and of_backward)
    flops = (10.0 if backward else 4.0) * _attention_size(program, i)
    kind = f"attention {'backward' if backward else 'forward'}"
    return Kernel(i.name, kind, i.arrays[0][0], flops, moved, op_name=i.op_name)


def _attention_size(program: Program, i: Instruction) -> int:
    """B * heads * queries * keys * head size of an attention kernel, from what cuDNN notes of its scores or from q."""
    query = program.made_by(i.operands[0])
    dims = query.arrays[0][1] if query else ()
    noted = re.search(r'"intermediate_tensor_shape":\{[^}]*"dimensions":\["(\d+)","(\d+)","(\d+)","(\d+)"\]', i.text)
    if noted and dims:
        return math.prod(map(int, noted.groups())) * dims[-1]
    if len(dims) != 4:
        return 0
    return math.prod(dims) * max(dims[1:3])  # there are more tokens than heads


def _product(program: Program, i: Instruction) -> tuple[float, str]:
    """FLOPs of a matrix product or convolution, and what its operands are."""
    left, right = (program.made_by(name) for name in i.operands[:2])
    if not left or not right:
        return 0.0, ""
    (left_dtype, lhs), (right_dtype, rhs) = left.arrays[0], right.arrays[0]
    dtype = max(left_dtype, right_dtype, key=lambda d: num_bytes(d, ()) or 1)
    if dtype == "f32" and "tf32" in i.text.lower():
        dtype = "tf32"
    out = math.prod(i.arrays[0][1])
    if i.op == "convolution":
        return 2.0 * _convolved(i, lhs, rhs), dtype
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]"?([\d",]*)', i.text)
    inner = [lhs[int(d)] for d in re.findall(r"\d+", contracted[1])] if contracted else lhs[-1:]
    return 2.0 * out * math.prod(inner), dtype


def _convolved(i: Instruction, lhs: Sequence[int], rhs: Sequence[int]) -> int:
    """Products of values in a convolution, as which XLA:TPU writes matrix products.

    A position counts as often as the window holds a value there, neither padding nor between values: matrix products of
    several axes are written with windows that are nearly all padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if not labels:
        return 0
    shapes = zip(labels.groups(), (lhs, rhs, i.arrays[0][1]), strict=True)
    given, kernel, made = (dict(zip(axes, dims, strict=True)) for axes, dims in shapes)
    written = re.search(r"window=\{([^}]*)\}", i.text)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", written[1] if written else ""))
    along = lambda name, d, default: window[name].split("x")[d] if name in window else default
    count = made["b"] * made["f"] * kernel["i"]
    for d in range(len(lhs) - 2):
        stride, spread, reach = (int(along(name, d, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(along("pad", d, "0_0").split("_")[0])
        at = np.arange(made[str(d)])[:, None] * stride + np.arange(kernel[str(d)]) * reach - low
        count *= int(np.sum((at >= 0) & (at <= (given[str(d)] - 1) * spread) & (at % spread == 0)))
    return count


def _fusion(program: Program, mesh: Mapping[str, int], i: Instruction) -> Kernel:
    body = list(_fused(program, i.called()))
    collective = next((j for j in body if j.op.removesuffix("-start") in KINDS), None)
    moved = _read(program, i) + _written(program, i)
    products = [_product(program, j) for j in body if j.op in MATMULS]
    if products:
        flops, dtype = sum(f for f, _ in products), max(products)[1]
        return Kernel(i.name, "gemm", dtype, flops, moved, op_name=i.op_name)
    if collective:
        return _collective(mesh, collective, collective.op.removesuffix("-start"))._replace(name=i.name)
    return Kernel(i.name, _kind(body), bytes=moved, op_name=i.op_name)


def _fused(program: Program, computation: str) -> Iterator[Instruction]:
    for i in program.body(computation):
        yield i
        if i.op == "fusion":
            yield from _fused(program, i.called())


def _kind(body: Sequence[Instruction]) -> str:
    """What a fusion without a matrix product does."""
    whole = lambda i: all(dtype in ("s32", "u32", "s64", "pred") for dtype, _ in i.arrays)
    does = {i.op for i in body if i.op not in _MOVES and i.op != "fusion" and not (i.op in _INDEXING and whole(i))}
    if not does:
        return "copy"
    if does == {"convert"}:
        return "convert"
    return "reduction" if "reduce" in does else "elementwise"


def _read(program: Program, fusion: Instruction) -> float:
    """Bytes that a fusion reads of its operands."""
    total = 0.0
    for number, name in enumerate(fusion.operands):
        made = program.made_by(name)
        size = _size(made.arrays) if made else 0.0
        total += min(size, _read_of(program, fusion.called(), number, size))
    return total


def _read_of(program: Program, computation: str, number: int, size: float) -> float:
    """Bytes that a fused computation reads of one of its parameters, of `size` bytes in whole."""
    body = program.body(computation)
    parameter = next((i for i in body if i.op == "parameter" and f" parameter({number})" in i.text), None)
    if parameter is None:
        return size
    total, names = 0.0, {parameter.name}
    for i in body:
        if not names & set(i.operands):
            continue
        if i.op == "bitcast":
            names.add(i.name)
        elif i.op in _SLICES and i.operands[0] in names:
            total += _size(i.arrays)
        elif i.op == "dynamic-update-slice" and i.operands[0] in names:
            continue  # in place
        elif i.op == "fusion":
            total += sum(_read_of(program, i.called(), n, size) for n, name in enumerate(i.operands) if name in names)
        else:
            return size
    return total


def _written(program: Program, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an update in place, what is put in."""
    body = {i.name: i for i in program.body(fusion.called())}
    root = next((i for i in body.values() if i.text.startswith("ROOT")), None)
    if root is None:
        return _size(fusion.arrays)
    total = 0.0
    for name in root.operands if root.op == "tuple" else (root.name,):
        out = body.get(name)
        while out is not None and out.op == "bitcast":
            out = body.get(out.operands[0])
        update = program.made_by(out.operands[1]) if out and out.op == "dynamic-update-slice" else out
        total += _size(update.arrays) if update else 0.0
    return total


def _size(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> float:
    return float(sum(num_bytes(dtype, dims) for dtype, dims in arrays))


def passes(block: Block) -> list[str]:
    """Of each kernel the pass that it belongs to: `forward`, `backward`, `without gradient`, or `update` and the rest.

    In the body of a loop they are all of the pass that most of them are named after.
    """
    own = [_pass(kernel.op_name) for kernel in block.kernels]
    if not block.looped:
        return [name or "update" for name in own]
    votes = collections.Counter(filter(None, own))
    likeliest = "backward" if votes["backward"] else votes.most_common(1)[0][0] if votes else "update"
    return [likeliest] * len(own)


def _pass(op_name: str) -> str:
    """By the path of a JAX operation, in which the network is a module of Flax: its name begins with a capital."""
    if "transpose(jvp" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "without gradient" if re.search(r"/[A-Z]\w*/", op_name) else ""
