import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.data.format import TextInfo, pack_text, unpack_text
from tests.helpers import relative

STATES = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)


@pytest.mark.parametrize("states, length", [("full", 10), ("trimmed", 4), ("trimmed", 10)])
def test_bfloat16_is_exact_and_trimmed_states_end_in_zeros(states, length):
    exact_MT = STATES.astype(ml_dtypes.bfloat16)
    info = TextInfo(states, "bfloat16", 10, 64, 8)
    fields, error, square = pack_text(exact_MT.astype(np.float32), info, length)
    unpacked_MT = unpack_text(fields, info)
    np.testing.assert_array_equal(unpacked_MT[:length], exact_MT[:length])
    assert fields["txt"].shape == (length, 64) and not unpacked_MT[length:].any() and error == 0 < square


def test_float8_errs_as_e4m3_does_at_any_scale_and_its_scale_is_undone_exactly():
    info = TextInfo("full", "float8", 10, 64, 8)
    for scale in (2.0**-40, 1e-3, 1.0, 3e4):
        fields, error, square = pack_text(STATES * np.float32(scale), info, 10)
        stored_MT = fields["txt"].astype(np.float32)
        assert 224 <= np.abs(stored_MT).max() <= 448
        unpacked_MT = unpack_text(fields, info).astype(np.float64)
        np.testing.assert_array_equal(unpacked_MT, stored_MT.astype(np.float64) * 2.0 ** fields["txt_exponent"])
        assert 0.02 < relative(unpacked_MT / scale, STATES) < 0.028
        assert np.sqrt(error / square) == pytest.approx(relative(unpacked_MT / scale, STATES), rel=1e-3)
    fields, error, _ = pack_text(np.zeros_like(STATES), info, 10)
    assert not unpack_text(fields, info).any() and error == 0
    powers_MT = np.float32(2.0) ** np.arange(-8, 6, dtype=np.float32)[None].repeat(10, 0)
    small = TextInfo("full", "float8", 10, 14, 8)
    np.testing.assert_array_equal(unpack_text(pack_text(powers_MT, small, 10)[0], small).astype(np.float32), powers_MT)
