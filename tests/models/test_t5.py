import numpy as np

from shortcut_jax.models.t5 import relative_buckets


def test_relative_positions_fall_into_exact_then_logarithmic_classes_on_each_side():
    buckets = relative_buckets(300, 32, 128)
    row = buckets[150]
    np.testing.assert_array_equal(row[143:151], np.arange(7, -1, -1))  # keys up to 7 behind: their distance
    np.testing.assert_array_equal(row[151:158], 16 + np.arange(1, 8))  # keys before it: the other half
    assert row[150 - 8] == 8 and row[150 + 8] == 24
    assert row[22] == row[0] == 15 and row[278] == row[299] == 31  # from 128 on, one class
    assert np.all(np.diff(row[:151]) <= 0) and np.all(np.diff(row[151:]) >= 0)
    np.testing.assert_array_equal(buckets[10, 10:20], buckets[200, 200:210])  # only the difference counts
