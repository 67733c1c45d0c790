"""Sampling times: `python -m shortcut_jax.bench --config=A --sample [--batches=1,64] [--counts=1,4,32] [--turns=7]`.

From captions to images, on random weights. All step counts of a batch size run one compiled program; they are timed
in turn, so that their ratios hold where a lone time would not.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.errors import ConfigError
from shortcut_jax.inference.generator import Generator
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.compilation_cache import CompileClock
from shortcut_jax.steps.networks import bind_adapters

_STRETCH = 0.2
"""Seconds that one turn of a step count lasts, at least."""


class Timed(NamedTuple):
    """One batch size.

    Attributes:
      batch: images sampled at once.
      compiling: seconds.
      seconds: of a batch: step count -> one each turn.
      fixed: seconds of what no step count changes: captions, placing, noise, decoding; one each turn.
    """

    batch: int
    compiling: float
    seconds: dict[int, list[float]]
    fixed: list[float]


def bench_sampling(settings: Settings, batches: Sequence[int], counts: Sequence[int], turns: int) -> str:
    """Times every batch size at every step count; returns tables.

    Raises:
      ConfigError: a run on latents, or with stored text states.
    """
    if settings.data.text_encoder != "words" or settings.data.store != "pixels":
        raise ConfigError("--sample times runs that read words and make pixels; data.text_encoder or data.store differ")
    assembly = Assembly(settings, training=False)
    state = assembly.init_state()
    params = bind_adapters(state.params, state.frozen)
    device = jax.devices()[0]
    head = f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    timed = [_time(assembly, params, batch, counts, turns) for batch in batches]
    return f"{head}\n\n{table(timed)}"


def _time(assembly: Assembly, params: object, batch: int, counts: Sequence[int], turns: int) -> Timed:
    generator = Generator(assembly.settings, assembly.model, assembly.mesh, batch, max(counts))
    size = generator.batch_size
    captions = [f"a handwritten digit {i}" for i in range(size)]
    say(f"compiling the sampler of {size} at once")
    with CompileClock() as clock:
        generator(params, captions, 1)
    work: dict[int, Callable[[], object]] = {n: lambda n=n: generator(params, captions, n) for n in counts}  # type: ignore[misc]
    work[0] = lambda: generator.without_steps(params, captions)
    calls = {n: max(int(_STRETCH / _seconds(act, 1)), 1) for n, act in work.items()}
    seconds: dict[int, list[float]] = {n: [] for n in work}
    for _ in range(turns):
        for n, act in work.items():
            seconds[n].append(_seconds(act, calls[n]))
    return Timed(size, clock.seconds, {n: seconds[n] for n in counts}, seconds[0])


def _seconds(act: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        act()
    return (time.perf_counter() - begin) / calls


def table(timed: Sequence[Timed]) -> str:
    """A row a batch size: milliseconds of a batch and images a second at each step count, and its cost by step.

    The last column is, for every count but the largest, the median over the turns of (time - fixed) over the same share
    of the time of the largest, where 1 is n times a step of many and the fixed part.
    """
    counts = sorted(timed[0].seconds)
    most = counts[-1]
    rows = [
        ["at once", "compiling", "fixed", *map(count_label, counts), f"(time - fixed) / share of {count_label(most)}"]
    ]
    for t in timed:
        cells = [f"{1e3 * (s := statistics.median(t.seconds[n])):.3g} ms, {t.batch / s:.3g}/s" for n in counts]
        ratios = [f"{n}: {share(t, n, most):.2f} x" for n in counts[:-1]]
        fixed = f"{1e3 * statistics.median(t.fixed):.2g} ms"
        rows.append([str(t.batch), f"{t.compiling:.1f} s", fixed, *cells, ", ".join(ratios)])
    return markdown(rows)


def share(t: Timed, count: int, most: int) -> float:
    """What `count` steps cost beside the fixed part, over `count / most` of what `most` steps cost."""
    turns = zip(t.seconds[count], t.seconds[most], t.fixed, strict=True)
    return statistics.median((few - fixed) / (count / most * many) for few, many, fixed in turns)
