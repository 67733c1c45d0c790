from collections import Counter

import numpy as np
import pytest

from shortcut_jax.data.schedule import BatchSchedule

SIZES, G = (50, 7, 100, 43), 8


def _entries(num, sizes=SIZES, seed=0):
    schedule = BatchSchedule(sizes, G, seed)
    return [schedule.entry(step) for step in range(num)]


def test_one_bucket_is_read_in_a_row():
    assert [(e.bucket, e.first) for e in _entries(20, (50,))] == [(0, G * k) for k in range(20)]


def test_every_batch_follows_the_one_before_it_in_its_bucket():
    entries = _entries(400)
    for bucket in range(len(SIZES)):
        firsts = [e.first for e in entries if e.bucket == bucket]
        assert firsts == [G * k for k in range(len(firsts))]


def test_an_epoch_has_the_full_batches_of_each_bucket_and_its_remainder_carries_over():
    schedule, entries = BatchSchedule(SIZES, G, 0), _entries(400)
    for epoch in range(8):
        counts = Counter(e.bucket for e in entries if e.epoch == epoch)
        assert [counts[b] for b in range(4)] == [(epoch + 1) * n // G - epoch * n // G for n in SIZES]
        assert list(schedule.leftover(epoch)) == [epoch * n - G * (epoch * n // G) for n in SIZES]
    assert {e.epoch for e in entries} >= set(range(8))
    assert [e.epoch for e in entries] == sorted(e.epoch for e in entries)


def test_no_image_is_lost_over_epochs():
    sizes = (5, 11)  # the first never fills a batch in one epoch
    entries = _entries(2 * 16, sizes)
    taken = Counter()
    for e in entries:
        taken.update((e.bucket, (e.first + r) % sizes[e.bucket]) for r in range(G))
    for bucket, n in enumerate(sizes):
        times = [taken[bucket, i] for i in range(n)]
        assert min(times) > 0 and max(times) - min(times) <= 1


def test_any_step_is_known_without_history():
    entries = _entries(300)
    for step in (299, 0, 17, 123, 40):
        assert BatchSchedule(SIZES, G, 0).entry(step) == entries[step]
    far = BatchSchedule(SIZES, G, 0).entry(10**9)
    assert abs(far.epoch - 10**9 * G / sum(SIZES)) < 2


def test_the_order_of_buckets_is_shuffled_anew_each_epoch_and_follows_the_seed():
    per_epoch = [tuple(e.bucket for e in _entries(200) if e.epoch == epoch) for epoch in range(4)]
    assert len(set(per_epoch)) == 4
    assert [e.bucket for e in _entries(50)] != [e.bucket for e in _entries(50, seed=1)]
    assert any(np.diff(per_epoch[0]) < 0)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="without samples"):
        BatchSchedule((0, 0), G, 0)
