import tracemalloc

import numpy as np

from shortcut_jax.core.stats import gaussian_of
from shortcut_jax.evaluation import accumulators as tallies
from shortcut_jax.evaluation.accumulators import add, load, merge, no_tally, save

SIZE = 16


def _features(indices):
    return np.stack([np.random.default_rng(int(i)).normal(3.0, 1.0, SIZE) for i in indices]).astype(np.float32)


def _seen(order, batch):
    tally = no_tally(SIZE, pixels=3)
    for first in range(0, len(order), batch):
        indices, done = order[first : first + batch], first + len(order[first : first + batch])
        features = _features(indices)
        tally = add(tally, indices, features, {"seconds": 1.0}, done, features[:, :3])
    return tally


def test_parts_merge_to_the_whole_in_any_split(monkeypatch):
    monkeypatch.setattr(tallies, "RESERVOIR", 20)
    order = np.arange(100)
    whole, parts = _seen(order, 100), [_seen(order[0::3], 7), _seen(order[1::3], 5), _seen(order[2::3], 40)]
    merged = merge(parts)
    np.testing.assert_allclose(
        gaussian_of(merged.moments).covariance, np.cov(_features(order), rowvar=False), rtol=1e-9
    )
    np.testing.assert_allclose(gaussian_of(merged.moments).mean, gaussian_of(whole.moments).mean, rtol=1e-12)
    np.testing.assert_allclose(gaussian_of(merged.pixels).mean, gaussian_of(whole.moments).mean[:3], rtol=1e-12)
    np.testing.assert_array_equal(merged.reservoir.index_S, whole.reservoir.index_S)
    np.testing.assert_array_equal(merged.reservoir.features_SF, whole.reservoir.features_SF)
    assert len(whole.reservoir.index_S) == 20 and merged.sums["seconds"] == 5 + 7 + 1


def test_a_file_is_of_one_key_and_whole_or_absent(tmp_path):
    path, tally = tmp_path / "cells" / "slow-4.npz", _seen(np.arange(30), 10)
    assert load(path, "a") is None
    save(path, tally, "a")
    again = load(path, "a")
    assert again is not None and again.done == 30 and again.sums == tally.sums
    held = lambda one: (*one.moments, *one.reservoir, *one.pixels)
    for one, other in zip(held(again), held(tally), strict=True):
        np.testing.assert_array_equal(one, other)
    assert load(path, "b") is None
    path.write_bytes(path.read_bytes()[:-100])
    assert load(path, "a") is None
    assert [p.name for p in path.parent.iterdir()] == ["slow-4.npz"]


def test_memory_does_not_grow_with_the_number_of_samples():
    def peak(count):
        tracemalloc.start()
        tally, rng = no_tally(64), np.random.default_rng(0)
        for first in range(0, count, 1000):
            tally = add(tally, first + np.arange(1000), rng.normal(size=(1000, 64)), {}, first + 1000)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tally.moments.count == count and len(tally.reservoir.rank_S) == tallies.RESERVOIR
        return most

    # The sample is full after 10,000 and the sums are of one size: what comes after needs room for a batch only.
    assert peak(50_000) < 1.2 * peak(10_000)
