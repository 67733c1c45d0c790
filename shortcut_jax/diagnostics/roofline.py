"""The time of a step by its compiled program: a roofline of every kernel, on a compute and a communication stream.

A kernel takes as long as its FLOPs at the peak of its dtype or its bytes at the bandwidth of memory, if that is more.
A collective takes its bytes on the wire at the bandwidth of the links; collectives run one after the other, beside
compute, and a block of kernels waits for one where its schedule does. `ideal` is at the figures of data sheets,
`practical` at the shares of them that kernels reach (`Efficiencies`). Launch gaps, clocks and contention are not in it.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shortcut_jax.core.text import markdown
from shortcut_jax.errors import UsageError
from shortcut_jax.runtime.device_table import DeviceSpec
from shortcut_jax.runtime.hlo_costs import Block, Kernel, blocks, passes
from shortcut_jax.runtime.hlo_schedule import Program


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a data sheet's figure that kernels reach.

    Attributes:
      gemm: matrix products. Large cuBLAS products in bfloat16 reach 70 to 75% of an H100's peak (its clocks fall under
        load).
      attention_forward: FlashAttention-3 reports 55 to 75% for long sequences of head size 128 (arXiv 2407.08608);
        those of images are short.
      attention_backward: the same source, 45 to 60%.
      memory: streaming kernels, as vendors' bandwidth tests.
      network: NCCL's bus bandwidth of large messages.
    """

    gemm: float = 0.72
    attention_forward: float = 0.55
    attention_backward: float = 0.45
    memory: float = 0.85
    network: float = 0.80


SHOWN = 0.001
"""Share of a step's compute that a kind of kernel has at least, to have a row of its own."""

IDEAL = Efficiencies(1.0, 1.0, 1.0, 1.0, 1.0)


def parse_efficiencies(given: Iterable[str]) -> Efficiencies:
    """The efficiencies with some replaced, as `gemm=0.6`.

    Raises:
      UsageError: a name that is none, or a value that is not in (0, 1].
    """
    names = {field.name for field in dataclasses.fields(Efficiencies)}
    changed: dict[str, float] = {}
    for one in given:
        name, _, text = one.partition("=")
        if name not in names or not re.fullmatch(r"0?\.\d+|1(\.0*)?", text) or not float(text):
            raise UsageError(
                f"--efficiency={one}, but must be NAME=SHARE of {', '.join(sorted(names))}, such as gemm=0.6"
            )
        changed[name] = float(text)
    return dataclasses.replace(Efficiencies(), **changed)


class Work(NamedTuple):
    """Kernels of one kind in one pass.

    Attributes:
      launches: how often they run in a step.
      flops: of all of them.
      bytes: in memory.
      ideal: seconds.
      practical: seconds.
    """

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    ideal: float = 0.0
    practical: float = 0.0


def _sum(of: Iterable[Work]) -> Work:
    """Of all together."""
    return functools.reduce(lambda total, one: Work(*_plus(total, one)), of, Work())


class Time(NamedTuple):
    """A block of kernels, or a step.

    Attributes:
      seconds: all of it.
      waits: seconds that it waits for collectives, by the name of each.
    """

    seconds: float
    waits: Mapping[str, float]

    @property
    def waiting(self) -> float:
        """Seconds for all collectives together."""
        return sum(self.waits.values())


class Wire(NamedTuple):
    """Collectives of one kind over the same mesh axes, in a step.

    Attributes:
      bytes: that a device sends.
      seconds: practical, of them alone.
      waited: of these seconds, those with nothing to compute beside.
    """

    bytes: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class Roofline(NamedTuple):
    """What a step takes by its program.

    Attributes:
      device: the figures it was read with.
      ideal: at these figures.
      practical: at the shares of them that kernels reach.
      work: of compute by pass and kind.
      wires: of collectives, by kind and mesh axes.
      rematerialised: FLOPs a step that XLA computes again by itself, to save memory.
      copied: bytes a step of copies in loops.
    """

    device: DeviceSpec
    ideal: Time
    practical: Time
    work: Mapping[tuple[str, str], Work]
    wires: Mapping[tuple[str, str], Wire]
    rematerialised: float
    copied: float

    @property
    def flops(self) -> float:
        """That the program executes in a step."""
        return sum(work.flops for work in self.work.values())

    def mfu(self, time: Time, model_flops: float) -> float:
        """Share of the peak in bfloat16 that the model FLOPs of one device and step are, in a time."""
        return model_flops / time.seconds / self.device.flops["bf16"]

    @property
    def update(self) -> Work:
        """Of optimizer, EMAs and norms, and of whatever else is of no pass of the network."""
        return _sum(work for (of_pass, _), work in self.work.items() if of_pass == "update")


def roofline(
    program: Program, mesh: Mapping[str, int], device: DeviceSpec, efficiencies: Efficiencies | None = None
) -> Roofline:
    """Reads a compiled, scheduled program, that of one device.

    Args:
      program: of a step.
      mesh: mesh axes and their sizes in the order of the devices.
      device: its figures.
      efficiencies: of `practical`.
    """
    practical = efficiencies or Efficiencies()
    found = blocks(program, mesh)
    ideal, likely = ([_once(block, device, e) for block in found] for e in (IDEAL, practical))
    work: dict[tuple[str, str], Work] = collections.defaultdict(Work)
    wires: dict[tuple[str, str], Wire] = collections.defaultdict(Wire)
    remade = copied = 0.0
    for block, once in zip(found, likely, strict=True):
        for kernel, of_pass in zip(block.kernels, passes(block), strict=True):
            if kernel.wire:
                one = kernel.wire, _on_wire(kernel, device, practical), once.waits.get(kernel.name, 0.0)
                at = kernel.kind, " x ".join(kernel.axes)
                wires[at] = Wire(*_plus(wires[at], one, block.times))
            elif kernel.kind != "wait":
                times = [seconds(kernel, device, e) for e in (IDEAL, practical)]
                kind = f"{kernel.kind} {kernel.dtype}" if kernel.kind == "gemm" else kernel.kind
                run = 1, kernel.flops, kernel.bytes, *times
                work[of_pass, kind] = Work(*_plus(work[of_pass, kind], run, block.times))
                remade += block.times * kernel.flops * (".remat" in kernel.name)
                copied += block.times * kernel.bytes * (kernel.kind == "copy" and block.looped)
    return Roofline(device, _all(found, ideal), _all(found, likely), dict(work), dict(wires), remade, copied)


def _plus(total: Iterable[Any], one: Iterable[Any], times: int = 1) -> list[Any]:
    """The sums of figures and `times` others, place by place."""
    return [a + times * b for a, b in zip(total, one, strict=True)]


def _all(found: Sequence[Block], once: Sequence[Time]) -> Time:
    """The step of blocks, each as often as it runs; names of collectives are unique in a program."""
    timed = list(zip(found, once, strict=True))
    waits = {name: block.times * x for block, time in timed for name, x in time.waits.items()}
    return Time(sum(block.times * time.seconds for block, time in timed), waits)


def seconds(kernel: Kernel, device: DeviceSpec, efficiencies: Efficiencies) -> float:
    """Of one run of a kernel that computes."""
    share = {
        "attention forward": efficiencies.attention_forward,
        "attention backward": efficiencies.attention_backward,
    }.get(kernel.kind, efficiencies.gemm)
    computed = kernel.flops / (device.peak(kernel.dtype or "f32") * share)
    return max(computed, kernel.bytes / (device.memory * efficiencies.memory))


def _on_wire(kernel: Kernel, device: DeviceSpec, efficiencies: Efficiencies) -> float:
    """Seconds of one run of a collective, whose devices are of one node or of several."""
    bandwidth = device.inside if device.across is None or kernel.span < device.node else device.across
    return kernel.wire / (bandwidth * efficiencies.network)


def _once(block: Block, device: DeviceSpec, efficiencies: Efficiencies) -> Time:
    """One run of a block."""
    compute = functools.partial(seconds, device=device, efficiencies=efficiencies)
    send = functools.partial(_on_wire, device=device, efficiencies=efficiencies)
    return schedule(block.kernels, compute, send)


def schedule(kernels: Sequence[Kernel], compute: Callable[[Kernel], float], send: Callable[[Kernel], float]) -> Time:
    """One run of kernels in their order, on a stream that computes and one that communicates.

    Args:
      kernels: in order; a collective begins when both streams have come to it, and the next one after it.
      compute: kernel -> seconds.
      send: collective -> seconds.
    """
    now = line = 0.0
    ends: dict[str, float] = {}
    waits: dict[str, float] = {}
    for kernel in kernels:
        name = kernel.waits_for or kernel.name
        if kernel.kind == "wait":
            end = ends.pop(name, 0.0)
        elif kernel.wire:
            line = end = max(line, now) + send(kernel)
            if kernel.asynchronous:
                ends[name] = end
                continue
        else:
            now += compute(kernel)
            continue
        if end > now:
            waits[name] = end - now
            now = end
    return Time(max([now, *ends.values()]), waits)


def summary(found: Roofline, model_flops: float, rows: float) -> list[tuple[str, str]]:
    """(name, value) of what a step takes.

    Args:
      found: of one device.
      model_flops: of one device and step.
      rows: of one device and step.
    """
    told = lambda time: (
        f"{1e3 * time.seconds:.4g} ms, MFU {found.mfu(time, model_flops):.1%}, "
        f"{rows / time.seconds:.3g} samples/s a device"
    )
    lines = [
        ("step time", f"{told(found.practical)} (practical, {found.device.kind})"),
        ("  at data-sheet peaks", told(found.ideal)),
        ("  waiting", f"{1e3 * found.practical.waiting:.3g} ms for collectives"),
        ("  executed", f"{found.flops / model_flops:.3f} x the model FLOPs"),
    ]
    if found.rematerialised:
        lines.append(
            ("  rematerialised", f"{found.rematerialised / found.flops:.1%} of it by XLA itself, to save memory")
        )
    if found.copied:
        lines.append(("  copies in loops", f"{found.copied / 1e9:.3g} GB"))
    return lines


def tables(found: Roofline, parameters: float) -> str:
    """The compute by pass and kind, and the collectives, as text; `parameters` are those that a device updates."""
    rows = [["pass", "kind", "launches", "TFLOP", "GB", "ideal ms", "practical ms"]]
    of_all = _sum(found.work.values())
    ordered = sorted(found.work.items(), key=lambda item: -item[1].practical)
    ordered = [(at, w) for at, w in ordered if w.practical > SHOWN * of_all.practical]
    for (of_pass, kind), w in [*ordered, (("all", ""), of_all)]:
        of_kind = w.flops / 1e12, w.bytes / 1e9, 1e3 * w.ideal, 1e3 * w.practical
        rows.append([of_pass, kind, str(w.launches), *(f"{x:.4g}" for x in of_kind)])
    wires = [["collective", "over", "GB sent", "practical ms", "waited for, ms"]]
    for (kind, axes), wire in sorted(found.wires.items(), key=lambda item: -item[1].seconds):
        of_wire = wire.bytes / 1e9, 1e3 * wire.seconds, 1e3 * wire.waited
        wires.append([kind, axes, *(f"{x:.4g}" for x in of_wire)])
    update = f"the update reads and writes {found.update.bytes / parameters:.3g} bytes a parameter"
    return "\n\n".join([markdown(rows), update, *([markdown(wires)] if len(wires) > 1 else [])])
