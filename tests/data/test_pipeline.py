from functools import partial

import numpy as np
import pytest

from shortcut_jax.data.pipeline import batches, make_samples
from shortcut_jax.data.records import DataSettings, open_source, to_latents
from shortcut_jax.data.words import encode_words

ENCODE = partial(encode_words, num_tokens=8, text_width=16, pooled_width=16)
G = 48


@pytest.fixture(scope="module")
def source(data_dir):
    return open_source(DataSettings(dir=data_dir))


def _read(source, rows=None, start=0, stop=4, seed=0, dropout=0.1):
    samples = make_samples(source, ENCODE, dropout, seed)
    return list(batches(samples, np.arange(G) if rows is None else rows, G, start, stop))


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_order_is_deterministic_and_follows_the_seed(source):
    first, again, other = _read(source), _read(source), _read(source, seed=1)
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(_equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].latents_BhwC.shape == (G, 8, 8, 1) and first[0].txt_BMT.shape == (G, 8, 16)


def test_resuming_needs_the_step_number_only(source):
    whole = _read(source, stop=5)
    assert all(_equal(a, b) for a, b in zip(whole[3:], _read(source, start=3, stop=5), strict=True))


def test_processes_together_read_the_rows_of_one(source):
    whole = _read(source)
    even, odd = _read(source, rows=np.arange(0, G, 2)), _read(source, rows=np.arange(1, G, 2))
    for step in range(4):
        for leaf in range(3):
            np.testing.assert_array_equal(whole[step][leaf][0::2], even[step][leaf])
            np.testing.assert_array_equal(whole[step][leaf][1::2], odd[step][leaf])


def test_an_epoch_has_every_image_once_and_the_next_another_order(source):
    samples = make_samples(source, ENCODE, 0.0, 0)
    epochs = [[samples[e * len(source) + i].latents_BhwC.tobytes() for i in range(len(source))] for e in range(2)]
    real = sorted(to_latents(r["image"]).tobytes() for r in source)
    assert sorted(epochs[0]) == sorted(epochs[1]) == real
    assert epochs[0] != epochs[1]


def test_captions_are_dropped_whole_at_the_asked_rate_anew_each_epoch(source):
    samples = make_samples(source, ENCODE, 0.1, 0)
    empty_txt, empty_vec = ENCODE("")
    dropped = []
    for i in range(2 * len(source)):
        row = samples[i]
        is_empty = np.array_equal(row.vec_BV, empty_vec)
        assert is_empty == np.array_equal(row.txt_BMT, empty_txt)
        dropped.append(is_empty)
    assert abs(np.mean(dropped) - 0.1) < 0.02
    assert dropped[: len(source)] != dropped[len(source) :]
    assert not any(
        np.array_equal(r.vec_BV, empty_vec) for r in (make_samples(source, ENCODE, 0.0, 0)[i] for i in range(99))
    )


def test_images_keep_their_captions(source):
    by_image = {to_latents(r["image"]).tobytes(): r["caption"].decode() for r in source}
    samples = make_samples(source, ENCODE, 0.0, 3)
    for i in range(64):
        row = samples[i]
        np.testing.assert_array_equal(row.txt_BMT, ENCODE(by_image[row.latents_BhwC.tobytes()])[0])


def test_a_limit_trains_on_the_first_records_only_and_repeats_them(source):
    samples = make_samples(source, ENCODE, 0.0, seed=0, limit=10)
    (batch,) = batches(samples, np.arange(G), G, 0, 1)
    known = [to_latents(source[i]["image"]) for i in range(10)]
    found = [next(i for i, image in enumerate(known) if np.array_equal(image, x)) for x in batch.latents_BhwC]
    assert sorted(set(found)) == list(range(10))
    counts = np.bincount(found)
    assert counts.max() - counts.min() <= 1
