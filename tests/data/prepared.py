"""Small prepared sets, written directly in the format."""

from functools import partial

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from shortcut_jax.data.format import (
    LatentInfo,
    SetInfo,
    Shard,
    TextInfo,
    dataset_name,
    pack_text,
    set_features,
    shard_name,
    write_set,
)
from shortcut_jax.data.images import encode_png
from shortcut_jax.preparation.units import WRITER_OPTIONS, serializer

TEXT = TextInfo("full", "bfloat16", tokens=6, width=16, pooled_width=12)
LATENTS = LatentInfo(channels=4, stride=2, scale=0.5, shift=0.1)
SIZES = ((16, 16), (8, 24), (24, 8), (16, 24))


def write_shard(path, records, serialize):
    """Records as one file; returns their bytes."""
    writer, size = ArrayRecordWriter(str(path), WRITER_OPTIONS), 0
    for record in records:
        data = serialize(record)
        writer.write(data)
        size += len(data)
    writer.close()
    return size


def pixel_record(i, size, rng):
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    pixels[0, 0] = i % 256, i // 256, 7  # the record can be told by its image
    return {"image": encode_png(pixels)}


def latent_record(i, size, rng, text=TEXT):
    h, w = (side // LATENTS.stride for side in size)
    mean = rng.standard_normal((h, w, LATENTS.channels)).astype(np.float16)
    std = (0.1 * rng.random(mean.shape)).astype(np.float16)
    states = rng.standard_normal((text.tokens, text.width), np.float32)
    fields, *_ = pack_text(states, text, length=2 + i % (text.tokens - 1))
    vec = rng.standard_normal(text.pooled_width, np.float32)
    return {"mean": mean, "std": std, "vec": vec, **fields}


def write_small_set(folder, store, counts, num_shards=3, seed=0, text=TEXT, splits=("train",)):
    """A set whose record i of bucket b has a caption of its own; `counts[b]` records a bucket, interleaved."""
    text, latents = (text, LATENTS) if store == "latents" else (None, None)
    serialize, rng = serializer(set_features(store, text, latents)), np.random.default_rng(seed)
    make = partial(pixel_record, rng=rng) if store == "pixels" else partial(latent_record, rng=rng, text=text)
    name, shards = dataset_name(folder), {}
    folder.mkdir(parents=True)
    for split in splits:
        buckets = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        shards[split] = []
        for n, part in enumerate(np.array_split(np.arange(len(buckets)), num_shards)):
            path, records = folder / shard_name(name, split, n, num_shards), []
            for i in part:
                height, width = SIZES[buckets[i]]
                caption = f"{split} image {i} of bucket {buckets[i]}"
                fields = {"key": f"{split}/{i}", "caption": caption, "height": height, "width": width}
                records.append(fields | make(i, SIZES[buckets[i]]))
            size = write_shard(path, records, serialize)
            shards[split].append(Shard(path, buckets[part], size))
    prompts, captions = None, ("a small cat", "a dog")
    if text:
        txt = rng.standard_normal((3, text.tokens, text.width)).astype(np.float32)
        vec = rng.standard_normal((3, text.pooled_width)).astype(np.float32)
        prompts = {"txt": txt.astype(ml_dtypes.bfloat16), "vec": vec}
    info = SetInfo(
        store,
        SIZES[: len(counts)],
        {split: tuple(counts) for split in splits},
        request={"source": "random"},
        text=text,
        latents=latents,
        eval_prompts=captions,
    )
    write_set(folder, name, info, shards, prompts)
    return folder
