import dataclasses
import multiprocessing
import time
from collections import Counter
from functools import partial
from itertools import count, islice

import jax
import numpy as np
import pytest

from shortcut_jax.data.format import TextInfo, unpack_text
from shortcut_jax.data.pipeline import BatchReader, ahead, batches, draw_latents
from shortcut_jax.data.records import DataSettings, fold, to_latents, unfold
from shortcut_jax.data.training import TrainingData
from shortcut_jax.data.words import encode_words
from shortcut_jax.runtime.sharding import MeshShape, batch_sharding, make_mesh, process_rows, to_global
from tests.data.prepared import LATENTS, SIZES, TEXT, write_small_set

ENCODE = partial(encode_words, num_tokens=8, text_width=16, pooled_width=16)
G = 48
COUNTS = (17, 40, 9, 34)


@pytest.fixture(scope="module")
def digits(data_dir):
    return TrainingData(DataSettings(dir=data_dir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of pixels and two of latents, in four buckets."""
    folder = tmp_path_factory.mktemp("sets")
    write_small_set(folder / "pixels", "pixels", COUNTS)
    write_small_set(folder / "others", "pixels", (0, 30, 30), seed=1)
    write_small_set(folder / "latents", "latents", COUNTS)
    return folder


def _settings(folder, name="latents", **changes):
    size = dict(height=16, width=16, text_tokens=TEXT.tokens)
    kind = dict(store="latents", stride=2, text_encoder="stored") if name == "latents" else dict(store="pixels")
    return DataSettings(name=name, dir=str(folder), **{**size, **kind, **changes})


def _reader(data, rows=None, seed=0, global_batch=G):
    return BatchReader(data, ENCODE, np.arange(global_batch) if rows is None else rows, global_batch, seed)


def _read(data, rows=None, start=0, stop=4, seed=0, **options):
    return list(batches(_reader(data, rows, seed), start, stop, **options))


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _with(data, **changes):
    return TrainingData(dataclasses.replace(data.settings, **changes))


def test_the_order_is_deterministic_and_follows_the_seed(digits):
    first, again, other = _read(digits), _read(digits), _read(digits, seed=1)
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(_equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].latents_BhwC.shape == (G, 8, 8, 1) and first[0].txt_BMT.shape == (G, 8, 16)


def test_resuming_needs_the_step_number_only(folder):
    data = TrainingData(_settings(folder))
    whole = _read(data, stop=9)
    assert all(_equal(a, b) for a, b in zip(whole[5:], _read(data, start=5, stop=9), strict=True))


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_processes_together_read_the_rows_of_one(folder, name):
    data = TrainingData(_settings(folder, name, caption_dropout=0.3))
    whole = _read(data, stop=8)
    even, odd = _read(data, np.arange(0, G, 2), stop=8), _read(data, np.arange(1, G, 2), stop=8)
    for step in range(8):
        for leaf in range(3):
            np.testing.assert_array_equal(whole[step][leaf][0::2], even[step][leaf])
            np.testing.assert_array_equal(whole[step][leaf][1::2], odd[step][leaf])


@pytest.mark.slow
def test_the_global_array_is_the_same_for_any_number_of_processes_threads_and_workers(folder):
    """What 1, 2 and 4 processes put on their devices, tensor = 2 across two of them, 0 and 2 workers.

    One of the processes has workers, whose start is what takes the time here.
    """
    steps = 20
    data = TrainingData(_settings(folder, caption_dropout=0.3))
    mesh = make_mesh(MeshShape(2, 2, 2))
    sharding = batch_sharding(mesh)
    whole = _read(data, stop=steps)
    assert len({b.latents_BhwC.shape for b in whole}) == 4
    for num, workers, threads in ((2, 2, 3), (4, 0, 2)):
        # Devices in another order than the mesh's: with 4 processes each pair along `tensor` spans two of them.
        owned = [mesh.devices.transpose(2, 0, 1).reshape(num, -1)[p].tolist() for p in range(num)]
        parts = []
        for devices in owned:
            rows, of_first = _rows_of(sharding, devices), 0 if parts else workers
            parts.append((devices, rows, _read(data, rows, stop=steps, threads=threads, workers=of_first)))
        for step in range(steps):
            shards = {}
            for devices, rows, read in parts:
                local = jax.tree.map(lambda x: x, read[step])
                for device, index in sharding.addressable_devices_indices_map((G,)).items():
                    if device in devices:
                        wanted = np.arange(G)[index[0]]
                        shards[device] = [leaf[np.searchsorted(rows, wanted)] for leaf in local]
            for leaf, expected in enumerate(whole[step]):
                arrays = [jax.device_put(shards[d][leaf], d) for d in mesh.devices.flat]
                made = jax.make_array_from_single_device_arrays(expected.shape, sharding, arrays)
                np.testing.assert_array_equal(np.asarray(made), expected)
                np.testing.assert_array_equal(
                    np.asarray(to_global(expected, np.arange(G), sharding, G)), np.asarray(made)
                )


def _rows_of(sharding, devices):
    class Part:
        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in sharding.addressable_devices_indices_map(shape).items() if d in devices}

    return process_rows(Part(), G)


def test_an_epoch_has_every_image_once_and_the_next_another_order(digits):
    plain = _reader(_with(digits, caption_dropout=0.0), np.arange(1), global_batch=1)
    num = digits.num_records
    epochs = [[plain.draws(e * num + i)[0].record for i in range(num)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(num))
    assert epochs[0] != epochs[1]


def test_captions_are_dropped_whole_at_the_asked_rate_anew_each_epoch(digits):
    empty_txt, empty_vec = ENCODE("")
    dropped = []
    for batch in _read(digits, stop=2 * 1797 // G):
        for txt, vec in zip(batch.txt_BMT, batch.vec_BV, strict=True):
            dropped.append(np.array_equal(vec, empty_vec))
            assert dropped[-1] == np.array_equal(txt, empty_txt)
    assert abs(np.mean(dropped) - 0.1) < 0.02
    assert dropped[:1700] != dropped[1797:3497]
    kept = _read(_with(digits, caption_dropout=0.0), stop=2)
    assert not any(np.array_equal(vec, empty_vec) for batch in kept for vec in batch.vec_BV)


def test_dropped_stored_captions_are_the_empty_caption_of_the_set_whole(folder):
    data = TrainingData(_settings(folder, caption_dropout=0.4))
    empty_txt, empty_vec = data.prompts[""]
    dropped = []
    for batch in _read(data, stop=30):
        for txt, vec in zip(batch.txt_BMT, batch.vec_BV, strict=True):
            dropped.append(np.array_equal(vec, empty_vec))
            assert dropped[-1] == np.array_equal(txt, empty_txt)
    assert abs(np.mean(dropped) - 0.4) < 0.05


def test_images_keep_their_captions(digits):
    records = digits.sets[0].records
    by_image = {to_latents(r["image"]).tobytes(): r["caption"].decode() for r in records}
    (batch,) = _read(_with(digits, caption_dropout=0.0), stop=1, seed=3)
    for latents, txt in zip(batch.latents_BhwC, batch.txt_BMT, strict=True):
        np.testing.assert_array_equal(txt, ENCODE(by_image[latents.tobytes()])[0])


def test_latents_keep_their_states_and_are_drawn_anew_each_epoch(folder):
    data = TrainingData(_settings(folder, caption_dropout=0.0))
    reader, records = _reader(data), data.sets[0].records
    seen = {}
    for step in range(9):
        for draw, latents, txt, vec in zip(reader.draws(step), *reader(step), strict=True):
            record = records[draw.record]
            np.testing.assert_array_equal(txt, unpack_text(record, TEXT))
            np.testing.assert_array_equal(vec, record["vec"])
            z = latents / LATENTS.scale + LATENTS.shift
            assert np.abs((z - record["mean"]) / (record["std"] + 1e-2)).max() < 6
            seen.setdefault(draw.record, []).append(latents)
    twice = [v for v in seen.values() if len(v) > 1]
    assert twice and not any(np.array_equal(a, b) for a, b, *_ in twice)


def test_latents_have_the_gaussian_of_the_autoencoder_scaled_as_flux_does():
    mean, std = np.full((32, 32, 16), 3, np.float16), np.full((32, 32, 16), 0.5, np.float16)
    z = draw_latents(mean, std, 5, LATENTS)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(), (3 - LATENTS.shift) * LATENTS.scale, atol=0.01)
    np.testing.assert_allclose(z.std(), 0.5 * LATENTS.scale, rtol=0.02)


def test_images_are_mirrored_at_the_asked_rate(folder):
    data = TrainingData(_settings(folder, "pixels", flip=0.5))
    reader, records = _reader(data), data.sets[0].records
    flips = []
    for step in range(12):
        for draw, latents in zip(reader.draws(step), reader(step).latents_BhwC, strict=True):
            image = records[draw.record]["image"]
            np.testing.assert_array_equal(latents, to_latents(image[:, ::-1] if draw.flip else image))
            flips.append(draw.flip)
    assert abs(np.mean(flips) - 0.5) < 0.08
    assert not any(d.flip for d in _reader(_with(data, flip=0.0)).draws(0))


def test_a_batch_is_of_one_bucket_and_every_image_comes_equally_often(folder):
    data = TrainingData(_settings(folder, "pixels"))
    reader, shapes, taken = _reader(data, global_batch=8), Counter(), Counter()
    for step in range(2 * sum(COUNTS)):
        draws = reader.draws(step)
        assert len({data.sets[0].buckets[d.record] for d in draws}) == 1
        shapes[data.sets[0].buckets[draws[0].record]] += 1
        taken.update(d.record for d in draws)
    assert [shapes[b] for b in range(4)] == [16 * n // 8 for n in COUNTS]
    assert min(taken.values()) >= 15 and max(taken.values()) <= 17


def test_sets_are_mixed_by_weight_and_each_goes_through_its_own_records(folder):
    data = TrainingData(_settings(folder, "pixels", mix=("others",), weights=(1.0, 3.0)))
    assert data.buckets == SIZES
    reader, taken = _reader(data, global_batch=8), Counter()
    steps = 8 * data.num_records // 8
    for step in range(steps):
        draws = reader.draws(step)
        sizes = {data.sets[d.set].sizes[data.sets[d.set].buckets[d.record]] for d in draws}
        assert len(sizes) == 1
        taken.update((d.set, d.record) for d in draws)
    share = sum(n for (which, _), n in taken.items() if which == 1) / sum(taken.values())
    assert abs(share - 0.75) < 0.02
    others = [n for (which, _), n in taken.items() if which == 1]
    assert len(others) == 60 and max(others) - min(others) <= 3


def test_without_weights_every_record_of_a_mixture_is_alike(folder):
    data = TrainingData(_settings(folder, "pixels", mix=("others",)))
    np.testing.assert_allclose(data.shares.sum(axis=0), [100 / 160, 60 / 160])
    assert data.epoch_sizes == (17, 70, 39, 34)


def test_mixed_sets_are_each_read_in_the_dtype_that_they_are_stored_in(folder, tmp_path):
    text = TextInfo("full", "float8", TEXT.tokens, TEXT.width, TEXT.pooled_width)
    write_small_set(tmp_path / "small", "latents", (40,), text=text)
    data = TrainingData(_settings(folder, caption_dropout=0.0, mix=(str(tmp_path / "small"),)))
    reader, seen = _reader(data, global_batch=8), set()
    for step in range(20):
        for draw, txt in zip(reader.draws(step), reader(step).txt_BMT, strict=True):
            record = data.sets[draw.set].records[draw.record]
            np.testing.assert_array_equal(txt, unpack_text(record, (TEXT, text)[draw.set]))
            seen.add(draw.set)
    assert seen == {0, 1}


def test_reading_that_is_given_up_leaves_no_process(folder):
    stream = batches(_reader(TrainingData(_settings(folder))), 0, 50, workers=1)
    next(stream)
    stream.close()
    until = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_a_limit_trains_on_the_first_records_only_and_repeats_them(digits):
    data = _with(digits, limit=10)
    draws = _reader(data).draws(0)
    counts = np.bincount([d.record for d in draws])
    assert len(counts) == 10 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("block", [1, 2, 4])
def test_folded_pixels_unfold_to_themselves(block):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.float32)
    folded = fold(image, block)
    assert folded.shape == (8 // block, 12 // block, 3 * block**2)
    np.testing.assert_array_equal(unfold(folded[None], block)[0], image)
    np.testing.assert_array_equal(np.sort(folded[0, 0]), np.sort(image[:block, :block].ravel()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_trimmed_and_float8_sets_are_read_too(tmp_path, dtype):
    text = TextInfo("trimmed", dtype, TEXT.tokens, TEXT.width, TEXT.pooled_width)
    write_small_set(tmp_path / "latents", "latents", (8,), text=text)
    data = TrainingData(_settings(tmp_path, text_states="trimmed", caption_dropout=0.0))
    reader = _reader(data, global_batch=8)
    for draw, txt in zip(reader.draws(0), reader(0).txt_BMT, strict=True):
        length = 2 + draw.record % (TEXT.tokens - 1)
        assert not np.any(txt[length:].astype(np.float32)) and np.any(txt[length - 1].astype(np.float32))


def test_reading_ahead_keeps_the_order_and_is_one_item_ahead():
    asked = []

    def items():
        for i in count():
            asked.append(i)
            yield i

    stream = ahead(items())
    assert next(stream) == 0 and asked == [0, 1]
    assert list(islice(stream, 3)) == [1, 2, 3] and asked[-1] == 4
    assert list(ahead(iter(range(3)), 5)) == [0, 1, 2]
