"""Step times: `python -m shortcut_jax.bench --config=A [--vs=B | --vary=objective=flow,scfm] [--steps=20]`.

Two variants are timed in turn, A B A B ..., in one process, so that their ratio holds where a lone time would not. With
`--sample` it times sampling instead: see `bench_sampling`.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.schema import Settings
from shortcut_jax.config.vary import variants
from shortcut_jax.diagnostics.compiled_step import random_batch
from shortcut_jax.diagnostics.sampling_times import bench_sampling
from shortcut_jax.errors import UsageError
from shortcut_jax.run.check_training import assemble_training
from shortcut_jax.run.step_memory import choose_remat
from shortcut_jax.runtime.host_memory import keep_freed_memory

USAGE = (
    "usage: python -m shortcut_jax.bench --config=FILE [--vs=FILE | --vary=objective=flow,scfm | --sample] [--steps=20]"
)


class Contender:
    """One compiled config on random data of the right shapes."""

    def __init__(self, name: str, settings: Settings):
        self.name, self.assembly = name, choose_remat(assemble_training(settings))
        self.seconds: list[float] = []
        say(f"compiling {name}")
        begin = time.perf_counter()
        self.batch = random_batch(self.assembly)
        self.state = self.assembly.init_state()
        compiled = self.assembly.train_step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.step = compiled

    def run(self, steps: int, count: bool = True) -> None:
        """Times `steps` steps as one stretch."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        if count:
            self.seconds.append((time.perf_counter() - begin) / steps)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, times, and prints a table."""
    from absl import flags

    values = cli.new_flags()
    cli.define_config(values, "config", "Config file.", argv)
    cli.define_config(values, "vs", "A second config file to compare with.", argv)
    flags.DEFINE_string("vary", None, "A field and two or more values: objective=flow,scfm.", flag_values=values)
    flags.DEFINE_integer("steps", 20, "Timed steps of each.", flag_values=values)
    flags.DEFINE_integer("stretch", 4, "Steps in a row before the other's turn.", flag_values=values)
    flags.DEFINE_boolean("sample", False, "Time sampling instead of training steps.", flag_values=values)
    flags.DEFINE_list("batches", ["1", "64"], "With --sample: images sampled at once.", flag_values=values)
    flags.DEFINE_list("counts", ["1", "4", "32"], "With --sample: sampling step counts.", flag_values=values)
    flags.DEFINE_integer("turns", 7, "With --sample: turns.", flag_values=values)
    options = cli.parse(values, argv, USAGE, required=["config"], configs=["config", "vs"])
    cli.only_with(options, "--sample", options.sample, ("batches", "counts", "turns"))
    cli.only_with(options, "step times, not with --sample", not options.sample, ("steps", "stretch", "vs", "vary"))
    keep_freed_memory()
    if options.sample:
        batches, counts = (cli.whole_numbers(name, getattr(options, name), 1) for name in ("batches", "counts"))
        if options.turns < 1:
            raise UsageError(f"--turns is {options.turns}, but must be at least 1")
        print(bench_sampling(from_config(options.config), batches, counts, options.turns))
        return 0
    steps, stretch = options.steps, options.stretch
    if min(steps, stretch) < 1:
        raise UsageError(f"--steps and --stretch are {steps} and {stretch}, but must be at least 1")
    if options.vs is not None and options.vary is not None:
        raise UsageError("give --vs or --vary, not both")
    contenders = [Contender(*pair) for pair in _variants(options)]
    for c in contenders:
        c.run(1, count=False)
    for done in range(0, steps, stretch):
        for c in contenders:
            c.run(min(stretch, steps - done))
    print(table(contenders))
    return 0


def _variants(options: Any) -> list[tuple[str, Settings]]:
    """Names and settings of what is timed, all of them checked before any is compiled."""
    config, other, vary = options.config, options.vs, options.vary
    if other is not None:
        return [("config", from_config(config)), ("vs", from_config(other))]
    if vary is None:
        return [("config", from_config(config))]
    return variants(config, "vary", vary)


def table(contenders: Sequence[Contender]) -> str:
    """A line a contender: median step time, images and FLOPs a second, and the ratio to the first, turn by turn."""
    device = jax.devices()[0]
    lines = [f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"]
    first = contenders[0]
    for c in contenders:
        seconds = statistics.median(c.seconds)
        flops = c.assembly.flops() / seconds
        mfu = f", MFU {flops / c.assembly.peak_flops:.1%}" if c.assembly.peak_flops else ""
        ratio = statistics.median(a / b for a, b in zip(c.seconds, first.seconds, strict=True))
        versus = "" if c is first else f", {ratio:.3f} x the time of {first.name}"
        lines.append(
            f"{c.name}: {seconds * 1e3:.1f} ms a step, {c.assembly.batch_size / seconds:.1f} images/s, "
            f"{c.assembly.flops():.3g} FLOP a step, {flops / 1e12:.3g} TFLOP/s{mfu}, "
            f"compiled in {c.compile_seconds:.1f} s{versus}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
