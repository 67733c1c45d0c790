"""How fast prepared records become batches: `python -m benchmarks.measure_pipeline [--records=256] [--batch=16]`.

Records have the shape of MLPerf Training's Flux.1 benchmark: latents of 32 x 32 x 16 (mean and standard deviation), 256
T5 states of 4,096, one CLIP vector of 768. The pipeline, and array_record alone, read the same files from the page
cache, in turn. Then images of 64 x 64 pixels: decoded, mirrored and folded; and what the digits training step eats.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from shortcut_jax.data.format import (
    LatentInfo,
    SetInfo,
    Shard,
    TextInfo,
    pack_text,
    set_features,
    shard_name,
    write_set,
)
from shortcut_jax.data.images import encode_png
from shortcut_jax.data.pipeline import BatchReader, batches
from shortcut_jax.data.records import DataSettings
from shortcut_jax.data.training import TrainingData
from shortcut_jax.data.words import encode_words
from shortcut_jax.preparation.units import serializer
from tests.data.prepared import write_shard

SAMPLES_PER_GPU = 24
"""Rows a second that one H100 trains of the 12 B model at 256 pixels, at half of its peak."""


def write(folder: Path, store: str, num: int, text: TextInfo | None, size: int, shards: int = 4) -> float:
    """Writes a set of random records; returns the bytes of a record."""
    latents = LatentInfo(16, 8, 0.3611, 0.1159) if text else None
    serialize, rng, total = serializer(set_features(store, text, latents)), np.random.default_rng(0), 0
    folder.mkdir(parents=True)
    parts = []
    for n in range(shards):
        path = folder / shard_name("set", "train", n, shards)
        written = write_shard(path, _records(n, num // shards, text, size, rng), serialize)
        parts.append(Shard(path, np.zeros(num // shards, int), written))
        total += written
    info = SetInfo(store, ((size, size),), {"train": (num,)}, {}, text=text, latents=latents)
    prompts = None
    if text:
        zeros = np.zeros((1, text.tokens, text.width), np.float32).astype("bfloat16")
        prompts = {"txt": zeros, "vec": np.zeros((1, text.pooled_width), np.float32)}
    write_set(folder, "set", info, {"train": parts}, prompts)
    return total / num


def _records(shard: int, num: int, text: TextInfo | None, size: int, rng: np.random.Generator) -> Iterator[dict]:
    for i in range(num):
        fields = {"key": f"{shard}/{i}", "caption": "an emoji of a thing: red, round", "height": size, "width": size}
        if text:
            side = size // 8
            moments = rng.standard_normal((2, side, side, 16)).astype(np.float16)
            states = rng.standard_normal((text.tokens, text.width), np.float32)
            extra = {"mean": moments[0], "std": np.abs(moments[1]), **pack_text(states, text, 40)[0]}
            extra["vec"] = rng.standard_normal(text.pooled_width, np.float32)
        else:
            smooth = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
            extra = {"image": encode_png(smooth.repeat(8, 0).repeat(8, 1))}
        yield {**fields, **extra}


def pipeline_rate(data: TrainingData, batch: int, num: int, threads: int, workers: int) -> float:
    """Records a second of the training pipeline, on the host."""
    encode = partial(encode_words, num_tokens=20, text_width=256, pooled_width=256)
    reader = BatchReader(data, encode, np.arange(batch), batch, 0)
    steps = num // batch
    stream = batches(reader, 0, steps + 4, threads, workers)
    for _ in range(4):
        next(stream)
    begin = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return steps * batch / (time.perf_counter() - begin)


def raw_rate(folder: Path, batch: int, num: int) -> float:
    """Records a second of array_record alone, in the same batches of shuffled records."""
    source = ArrayRecordDataSource(sorted(str(p) for p in folder.glob("*.array_record*")))
    order = np.random.default_rng(0).permutation(num * 2) % len(source)
    begin = time.perf_counter()
    for first in range(0, num, batch):
        source.__getitems__([int(i) for i in order[first : first + batch]])
    return num / (time.perf_counter() - begin)


def digits_rate(steps: int = 8) -> float:
    """Images a second of the training step of configs/digits.py."""
    from configs import digits
    from shortcut_jax.bench import Contender
    from shortcut_jax.config.checks import from_config

    contender = Contender("digits", from_config(digits.get_config()))
    contender.run(1, count=False)
    contender.run(steps)
    return contender.assembly.batch_size / contender.seconds[0]


def main() -> None:
    """Writes, measures in turn, prints, removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--read", type=int, default=1024, help="records read in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dir", default=None, help="where the sets are written for the while")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    print(f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, batch {options.batch}, {options.turns} turns")
    try:
        for name, text in (
            ("latents, bfloat16 text", TextInfo("full", "bfloat16", 256, 4096, 768)),
            ("latents, float8 text", TextInfo("full", "float8", 256, 4096, 768)),
            ("pixels 64 x 64", None),
        ):
            _measure(folder / name.replace(" ", "_"), name, text, options)
    finally:
        shutil.rmtree(folder)
    print(f"the digits training step takes {digits_rate():,.0f} images/s on the same cores")


def _measure(folder: Path, name: str, text: TextInfo | None, options: argparse.Namespace) -> None:
    size = write(folder, "latents" if text else "pixels", options.records, text, 256 if text else 64)
    kind = dict(store="latents", text_encoder="stored", height=256, width=256) if text else dict(flip=0.5, stride=2)
    settings = DataSettings(name=str(folder), dir="/", text_tokens=256, **{"height": 64, "width": 64, **kind})
    data = TrainingData(settings)
    if not text:  # a large set is not kept decoded in memory
        data.sets[0] = data.sets[0]._replace(records=data.sets[0].prepared.records("train"))
    rates = []
    for _ in range(options.turns):
        ours = pipeline_rate(data, options.batch, options.read, options.threads, options.workers)
        rates.append((ours, raw_rate(folder, options.batch, options.read)))
    ours, raw = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    print(
        f"{name}: {size / 2**20:.2f} MiB a record; pipeline {ours:,.0f} records/s ({ours * size / 1e6:,.0f} MB/s), "
        f"array_record alone {raw:,.0f} records/s ({raw * size / 1e6:,.0f} MB/s): {ratio:.0%}"
        + (f"; feeds {ours / SAMPLES_PER_GPU:.0f} GPUs at {SAMPLES_PER_GPU} samples/s" if text else "")
    )


if __name__ == "__main__":
    main()
