"""The parts of `benchmarks.device`: `python -m benchmarks.device_parts NAME [--tiny]` prints a JSON object a row."""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.load import load_config
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.text import count_label
from shortcut_jax.core.types import Condition
from shortcut_jax.data.records import latent_size
from shortcut_jax.diagnostics.compiled_step import compile_step, random_batch
from shortcut_jax.models.attention import attend
from shortcut_jax.models.init import init_params
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.step_memory import GB
from shortcut_jax.runtime.device_table import device_spec, usable_memory
from shortcut_jax.runtime.metrics import read_metrics
from shortcut_jax.steps.sampling import make_sampler

Row = dict[str, Any]

CONFIG = Path(__file__).parent.parent / "configs" / "flux_pretrain.py"
CLOSE = 0.02
"""Largest relative distance (of norms) of bfloat16 attention from float32's: bfloat16 has 8 bits, 2^-8 = 0.004."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is timed.

    Attributes:
      width: D, of heads of 128 (of 32 where it is small).
      double: blocks of the truncated stack.
      single: likewise.
      rows: a device, of 256 px.
      large: side in pixels that is sampled at.
      whole: whether the 12B is sampled too.
    """

    width: int = 3072
    double: int = 2
    single: int = 4
    rows: int = 16
    large: int = 1024
    whole: bool = True

    @property
    def head_size(self) -> int:
        """K."""
        return min(128, self.width // 2)

    def settings(self, **changes: Any) -> Settings:
        """flux_pretrain on one device, with this stack in place of its 57 blocks."""
        heads, k = self.width // self.head_size, self.head_size
        overrides = {
            "model.double_blocks": self.double,
            "model.single_blocks": self.single,
            "model.width": self.width,
            "model.heads": heads,
            "model.axes": str((k // 8, k // 16 * 7, k // 16 * 7)),
            "batch_per_device": self.rows,
            "mesh.data": 1,
            "mesh.fsdp": 1,
        }
        texts = {name: str(value) for name, value in {**overrides, **changes}.items()}
        return from_config(load_config(CONFIG, texts))


TINY = Shapes(width=64, double=1, single=1, rows=4, large=64, whole=False)


def device(_: Shapes, __: argparse.Namespace) -> Iterator[Row]:
    """What it is."""
    first = jax.devices()[0]
    versions = {name: __import__(name).__version__ for name in ("jax", "jaxlib", "flax", "optax")}
    memory = {"memory, GB": f"{usable / GB:.1f}"} if (usable := usable_memory(first)) else {}
    here = {"device": first.device_kind, "number": jax.device_count(), "python": sys.version.split()[0]}
    yield here | versions | memory


def attention(shapes: Shapes, _: argparse.Namespace) -> Iterator[Row]:
    """Each backend in bfloat16 against XLA's in float32: distance of outputs and gradients, and times.

    Raises:
      AssertionError: one is further off than bfloat16 explains.
    """
    heads, far = shapes.width // shapes.head_size, []
    for tokens, rows in ((512, shapes.rows), (shapes.large**2 // 256 + 512, 1)):
        size = rows, tokens, heads, shapes.head_size
        inputs = [jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i in range(4)]
        with jax.default_matmul_precision("highest"):
            want = jax.tree.leaves(_attention("xla")(*(x.astype(jnp.float32) for x in inputs)))
        for backend in ("xla", *(["cudnn"] if jax.default_backend() == "gpu" else [])):
            forward, both = jax.jit(partial(attend, backend=backend)), _attention(backend)
            away = [_distance(a, b) for a, b in zip(jax.tree.leaves(both(*inputs)), want, strict=True)]
            far += [f"{backend} at {tokens} tokens: {a:.3g}" for a in away if not a < CLOSE]
            ahead, back = _seconds(forward, *inputs[:3]), _seconds(both, *inputs)
            flops = 4 * rows * tokens**2 * shapes.width
            yield {
                "tokens": tokens,
                "rows": rows,
                "backend": backend,
                "off": f"{away[0]:.2g}",
                "gradients off": f"{max(away[1:]):.2g}",
                "forward, ms": _ms(ahead),
                "forward and backward, ms": _ms(back),
                **_share("forward", flops / ahead, "bf16"),
                **_share("backward", 2.5 * flops / max(back - ahead, 1e-9), "bf16"),
            }
    assert not far, f"attention is further than {CLOSE} from float32: {'; '.join(far)}"


def _attention(backend: str) -> Callable[..., Any]:
    """q, k, v, cotangent -> output and the three gradients."""

    def both(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(partial(attend, backend=backend), q, k, v)
        return out, pull(cotangent)

    return jax.jit(both)


def products(shapes: Shapes, _: argparse.Namespace) -> Iterator[Row]:
    """The matrix products of a block, in bfloat16 and float8: share of the data sheet's peak."""
    tokens, d = shapes.rows * 512, shapes.width
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.bfloat16))
    for inner, outer in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d), (5 * d, d)):
        x, w = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate(((tokens, inner), (inner, outer))))
        for name, dtype in (("bf16", jnp.bfloat16), ("f8", jnp.float8_e4m3fn)):
            seconds = _seconds(product, x.astype(dtype), w.astype(dtype))
            flops = 2 * tokens * inner * outer
            row = {"shape": f"{tokens} x {inner} x {outer}", "dtype": name, "ms": _ms(seconds)}
            yield row | _share("", flops / seconds, name)


def steps(objective: str, shapes: Shapes, _: argparse.Namespace) -> Iterator[Row]:
    """Train steps of the truncated stack in each remat policy, one of them in float8, beside the roofline."""
    for remat, matmul_dtype in (
        ("full", None),
        ("branch_mlp", None),
        ("branch_mlp", "float8"),
        ("branch", None),
        ("none", None),
    ):
        changes = {"model.remat": remat, "model.matmul_dtype": matmul_dtype}
        assembly = Assembly(shapes.settings(objective=objective, **changes))
        step = compile_step(assembly)
        batch, state = random_batch(assembly), assembly.init_state()
        times = []
        for _turn in range(12):
            begin = time.perf_counter()
            state, metrics = step.executable(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
        took = statistics.median(times[2:])
        row: Row = {"objective": objective, "remat": remat, "products": matmul_dtype or assembly.model.compute_dtype}
        row |= {"rows": assembly.batch_size, "ms": _ms(took)}
        if assembly.peak_flops:
            row["MFU"] = f"{assembly.flops() / took / assembly.peak_flops:.1%}"
        if step.time:
            predicted = step.time.practical.seconds
            row |= {"predicted, ms": _ms(predicted), "measured / predicted": f"{took / predicted:.2f}"}
        sizes = {"arguments": step.memory.argument_size_in_bytes, "temporaries": step.memory.temp_size_in_bytes}
        yield (
            row
            | {f"{name}, GB": f"{size / GB:.2f}" for name, size in sizes.items()}
            | {
                "rows/s": f"{assembly.batch_size / took:.1f}",
                "compiled, s": f"{step.compiling:.0f}",
                "loss": f"{float(metrics['loss']):.4f}",
            }
        )
        del state, batch, metrics


def sampling(shapes: Shapes, _: argparse.Namespace) -> Iterator[Row]:
    """1 and 4 steps of one image, of the truncated stack and of the 12B, with random weights in bfloat16."""
    size = {"data.height": shapes.large, "data.width": shapes.large, "data.text_tokens": 512}
    whole = {"model.double_blocks": 19, "model.single_blocks": 38}
    for name, blocks in (("truncated", {}), *([("whole", whole)] if shapes.whole else [])):
        settings = shapes.settings(**size, **blocks, **{"model.param_dtype": "bfloat16", "model.remat": "none"})
        assembly = Assembly(settings, training=False)
        cfg = assembly.model
        params = jax.jit(partial(init_params, cfg))(jax.random.key(0))
        rows, columns = latent_size(settings.data)
        tokens = rows // PATCH * (columns // PATCH)
        noise = jax.random.normal(jax.random.key(1), (1, tokens, cfg.channels))
        condition = Condition(jnp.zeros((1, 512, cfg.text_width)), jnp.zeros((1, cfg.pooled_width)))
        sample = jax.jit(make_sampler(cfg, (rows, columns), 64))
        with jax.set_mesh(assembly.mesh):
            begin = time.perf_counter()
            jax.block_until_ready(sample(params, noise, condition, 1))
            compiling = time.perf_counter() - begin
            for num in (1, 4):
                seconds = _seconds(sample, params, noise, condition, num)
                yield {
                    "network": name,
                    "blocks": f"{cfg.double_blocks} + {cfg.single_blocks}",
                    "pixels": f"{shapes.large} x {shapes.large}",
                    "steps": num,
                    "ms an image": _ms(seconds),
                    "compiled, s": f"{compiling:.0f}",
                }
        del params


def digits(shapes: Shapes, options: argparse.Namespace) -> Iterator[Row]:
    """The README's command: how long it takes, and the row of the slow EMA in its table."""
    few = ["--config.steps=8", "--config.eval.images=(64,64,64)", "--config.eval.steps=(1,2)"]
    small = ["--config.model.preset=tiny", "--config.batch_size=32"]
    workdir = options.out / "runs" / "digits"
    row = _train(workdir, ["--config=configs/digits.py", *((few + small) if shapes is TINY else [])])
    table = [line for line in (workdir / "report.md").read_text().splitlines() if line.startswith("| ")]
    names, *cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    slow = next(line for line in cells if line[0].startswith("slow"))
    yield row | dict(zip(names[1:], slow[1:], strict=True))


def emoji64(shapes: Shapes, options: argparse.Namespace) -> Iterator[Row]:
    """Every objective for equally many steps on 64 x 64 emoji: the Frechet distance of its samples."""
    if not options.emoji.is_dir():
        yield {"skipped": f"{options.emoji} is not there (--emoji)"}
        return
    made = options.out / "data" / "emoji64"
    prepare = [f"--source={options.emoji}", f"--out={made}", "--store=pixels", "--resolution=64"]
    _run("prepare", [*prepare, "--where=variant=base", "--caption=subgroup", "--validation=0"])
    few = ["--config.steps=2", "--config.batch_size=8", "--config.model.compute_dtype=float32"]
    small = ["--config.model.width=32", "--config.model.heads=2", "--config.model.axes=(4,6,6)"]
    size = [*few, *small] if shapes is TINY else ["--config.steps=1500"]
    judged = ["--features=random", "--images=16", "--steps=1,2"] if shapes is TINY else ["--features=network"]
    for objective in ("scfm", "shortcut", "flow"):
        workdir = options.out / "runs" / f"emoji64-{objective}"
        data = [f"--config.data.dir={made.parent}", "--config.validation.every=0", f"--config.objective={objective}"]
        row = _train(workdir, ["--config=configs/emoji64.py", *data, *size])
        out = workdir / "evaluation"
        _run("evaluate", [f"--workdir={workdir}", f"--out={out}", "--views=slow", "--extras=", *judged])
        cells = json.loads((out / "evaluation.json").read_text())["cells"]
        yield row | {count_label(cell["steps"]): f"{cell['frechet_distance']:.4g}" for cell in cells}


def _train(workdir: Path, argv: Sequence[str]) -> Row:
    """Trains; the seconds of it all, and images a second where a line of metrics says them."""
    begin = time.perf_counter()
    _run("train", [*argv, f"--workdir={workdir}"])
    row: Row = {"run": workdir.name, "seconds": f"{time.perf_counter() - begin:.0f}"}
    rates = [
        m["images_per_second"] for m in read_metrics(workdir / "metrics.jsonl").values() if "images_per_second" in m
    ]
    return row | ({"images/s": f"{statistics.median(rates):.0f}"} if rates else {})


def _run(command: str, argv: Sequence[str]) -> None:
    """A command of the package, whose output goes to standard error; where it fails, this part ends as it did."""
    code = subprocess.run([sys.executable, "-m", f"shortcut_jax.{command}", *argv], stdout=sys.stderr).returncode
    if code:
        sys.exit(code)


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    """Of one call, the median over turns of several calls each."""
    jax.block_until_ready(function(*args))
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    calls = max(1, int(0.05 / max(time.perf_counter() - begin, 1e-6)))
    turns = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        turns.append((time.perf_counter() - begin) / calls)
    return statistics.median(turns)


def _distance(got: Any, want: Any) -> float:
    """Relative, of norms."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _share(what: str, rate: float, dtype: str) -> Row:
    """FLOP/s, and the share of the data sheet's where there is one."""
    what = f"{what}, " if what else ""
    spec = device_spec(jax.devices()[0])
    row = {f"{what}TFLOP/s": f"{rate / 1e12:.3g}"}
    return row | ({f"{what}of peak": f"{rate / spec.peak(dtype):.0%}"} if spec else {})


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


PARTS: dict[str, Callable[[Shapes, argparse.Namespace], Iterator[Row]]] = {
    "device": device,
    "attention": attention,
    "products": products,
    "steps-scfm": partial(steps, "scfm"),
    "steps-flow": partial(steps, "flow"),
    "sampling": sampling,
    "digits": digits,
    "emoji64": emoji64,
}


def main(argv: Sequence[str]) -> int:
    """Prints the rows of one part as they come."""
    parser = argparse.ArgumentParser("python -m benchmarks.device_parts")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--emoji", type=Path, default=Path("shared/data/emoji64"))
    parser.add_argument("--out", type=Path, default=Path("runs/device"))
    options = parser.parse_args(list(argv[1:]))
    for row in PARTS[options.part](TINY if options.tiny else Shapes(), options):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
