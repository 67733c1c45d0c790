"""Times of training and sampling beside other projects' on the machine at hand, with the same geometry and work.

    pip install ".[test]" && python -m benchmarks.peers --work=train,sample --turns=7

Each project computes in a process of its own, which waits while another one works; all take turns. Training is
forward, backward and AdamW of the flow-matching error (no EMA: the others have none); sampling is Euler steps without
guidance.
Weights are random and in float32. diffusers computes eagerly, as it comes; `diffusers-compiled` by `torch.compile`.
"""

import argparse
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Work = Callable[[], Any]


@dataclass(frozen=True)
class Shapes:
    """What is computed.

    Attributes:
      double: double blocks.
      single: single blocks.
      heads: of 64 channels each.
      side: image tokens along a side.
      text: text tokens.
      rows: images of a step of training; one is sampled.
      steps: of sampling.
    """

    double: int = 2
    single: int = 4
    heads: int = 8
    side: int = 16
    text: int = 128
    rows: int = 4
    steps: int = 4


AXES, HEAD, CHANNELS, TEXT_WIDTH, POOLED_WIDTH = (8, 28, 28), 64, 64, 512, 256
RATE = 1e-4
TINY = Shapes(1, 1, 2, 4, 8, 2, 2)


def ours(shapes: Shapes, work: str) -> Work:
    """shortcut_jax, one compiled program; what training keeps of freed memory is kept."""
    from shortcut_jax.runtime.host_memory import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import optax

    from shortcut_jax.core.latents import image_ids, text_ids
    from shortcut_jax.core.types import Condition
    from shortcut_jax.models.flux import Flux, FluxConfig
    from shortcut_jax.models.init import init_params
    from shortcut_jax.steps.sampling import make_sampler

    width, size = shapes.heads * HEAD, (2 * shapes.side, 2 * shapes.side)
    cfg = FluxConfig(shapes.double, shapes.single, width, shapes.heads, AXES, CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
    params = jax.jit(partial(init_params, cfg))(jax.random.key(0))
    x, target, t, txt, vec = map(jnp.asarray, _inputs(shapes, work))
    if work == "sample":
        sample = jax.jit(make_sampler(cfg, size, shapes.steps))
        return lambda: jax.block_until_ready(sample(params, x, Condition(txt, vec), shapes.steps))
    ids, optimizer = (image_ids(*size), text_ids(shapes.text)), optax.adamw(RATE)

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(Flux(cfg).apply({"params": params}, x, t, txt, vec, *ids) - target))

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> Any:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    kept = [(params, optimizer.init(params))]

    def run() -> float:
        kept[0], value = step(kept[0])
        return float(value)

    return run


def diffusers(shapes: Shapes, work: str, compiled: bool = False) -> Work:
    """FluxTransformer2DModel of diffusers, in PyTorch."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=shapes.double,
        num_single_layers=shapes.single,
        attention_head_dim=HEAD,
        num_attention_heads=shapes.heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )
    x, target, t, txt, vec = map(torch.from_numpy, _inputs(shapes, work))
    rows, columns = np.indices((shapes.side, shapes.side)).reshape(2, -1)
    img_ids = torch.from_numpy(np.stack([np.zeros_like(rows), rows, columns], axis=1).astype(np.float32))
    txt_ids = torch.zeros(shapes.text, 3)
    network = torch.compile(model) if compiled else model

    def velocity(x: Any, t: Any) -> Any:
        places = {"img_ids": img_ids, "txt_ids": txt_ids}
        return network(x, encoder_hidden_states=txt, pooled_projections=vec, timestep=t, **places, return_dict=False)[0]

    if work == "sample":
        times = torch.linspace(1.0, 0.0, shapes.steps + 1)

        @torch.no_grad()
        def run() -> Any:
            y = x
            for begin, end in itertools.pairwise(times):
                y = y + (end - begin) * velocity(y, begin.expand(len(y)))
            return y

        return run
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def train() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = (velocity(x, t) - target).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return train


PEERS: dict[str, Callable[[Shapes, str], Work]] = {
    "shortcut_jax": ours,
    "diffusers": diffusers,
    "diffusers-compiled": partial(diffusers, compiled=True),
}


def _inputs(shapes: Shapes, work: str) -> list[np.ndarray]:
    """Noisy latents, target, times, text states and pooled vectors."""
    rng, rows = np.random.default_rng(0), 1 if work == "sample" else shapes.rows
    draw = lambda *size: rng.standard_normal((rows, *size), np.float32)
    tokens = shapes.side**2
    texts = draw(shapes.text, TEXT_WIDTH), draw(POOLED_WIDTH)
    return [draw(tokens, CHANNELS), draw(tokens, CHANNELS), rng.random(rows, np.float32), *texts]


def work_on_request(peer: str, work: str, shapes: Shapes) -> None:
    """What the process of a peer does: once to compile, then once for each line that comes, told in seconds."""
    run = PEERS[peer](shapes, work)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        print(time.perf_counter() - begin, flush=True)


def in_turn(commands: dict[str, Sequence[str]], turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of several processes that take turns, by name."""
    started = {}
    try:
        for name, command in commands.items():
            started[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            _answer(name, started[name])  # one after the other, compiling too
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(turns):
            for name, process in started.items():
                assert process.stdin is not None
                print("go", file=process.stdin, flush=True)
                taken[name].append(float(_answer(name, process)))
        return taken
    finally:
        for process in started.values():
            process.kill()


def _answer(name: str, process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{name} ended with exit code {process.wait()}: see above")
    return line


def table(work: str, taken: dict[str, list[float]]) -> Iterator[str]:
    """Rows of Markdown: the median of each, and of its ratio to the first in the same turn, with quartiles."""
    first, *_ = taken
    for name, seconds in taken.items():
        ratios = [b / a for a, b in zip(taken[first], seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        yield f"| {work} | {name} | {statistics.median(seconds):.3f} | {middle:.2f}x ({low:.2f} to {high:.2f}) |"


def main(argv: Sequence[str]) -> int:
    """Times them and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="diffusers", help=f"of {', '.join(list(PEERS)[1:])}, with commas")
    parser.add_argument("--work", default="train,sample", help="train, sample or both")
    parser.add_argument("--turns", type=int, default=7, help="of each")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv[1:])
    peers, works = options.peers.split(","), options.work.split(",")
    for name, known in (*((peer, PEERS) for peer in peers), *((work, ("train", "sample")) for work in works)):
        if name not in known:
            parser.error(f"there is no {name!r}: choose of {', '.join(known)}")
    if options.turns < 1:
        parser.error(f"--turns={options.turns}, but must be at least 1")
    shapes = TINY if options.tiny else Shapes()
    if options.worker:
        work_on_request(options.worker, works[0], shapes)
        return 0
    if importlib.util.find_spec("diffusers") is None:
        parser.error("diffusers is not installed: pip install '.[test]'")
    print("| work | project | seconds | times the first |\n| --- | --- | --- | --- |", flush=True)
    for work in works:
        command = [sys.executable, "-m", "benchmarks.peers", f"--work={work}", *(["--tiny"] if options.tiny else [])]
        taken = in_turn({name: [*command, f"--worker={name}"] for name in ("shortcut_jax", *peers)}, options.turns)
        print("\n".join(table(work, taken)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
