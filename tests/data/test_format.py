import json

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from shortcut_jax.data.format import PreparedSet, TextInfo, dataset_name, pack_text, unpack_text
from shortcut_jax.errors import DataError
from tests.data.prepared import SIZES, TEXT, write_small_set


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_small_set(tmp_path_factory.mktemp("sets") / "Small Latents", "latents", (5, 3, 0, 4))


def test_tfds_opens_a_set_by_its_folder(latents):
    source = tfds.builder_from_directory(latents).as_data_source(split="train")
    assert len(source) == 12
    record = source[0]
    assert record["mean"].dtype == record["std"].dtype == np.float16 and record["vec"].shape == (TEXT.pooled_width,)
    assert record["txt"].dtype == ml_dtypes.bfloat16 and record["txt"].shape == (TEXT.tokens, TEXT.width)


def test_a_set_tells_what_it_is_and_which_bucket_a_record_is_in(latents):
    prepared = PreparedSet(latents)
    assert prepared.info.text == TEXT and prepared.info.buckets == SIZES
    records, buckets = prepared.records("train"), prepared.buckets("train")
    assert list(np.bincount(buckets, minlength=4)) == list(prepared.info.counts["train"]) == [5, 3, 0, 4]
    for record, bucket in zip((records[i] for i in range(len(records))), buckets, strict=True):
        assert (record["height"], record["width"]) == SIZES[bucket]
        assert tuple(2 * side for side in record["mean"].shape[:2]) == SIZES[bucket]


def test_the_empty_caption_and_the_prompts_have_states(latents):
    prompts = PreparedSet(latents).prompts()
    assert list(prompts) == ["", "a small cat", "a dog"]
    txt, vec = prompts["a dog"]
    assert txt.shape == (TEXT.tokens, TEXT.width) and txt.dtype == ml_dtypes.bfloat16 and vec.dtype == np.float32


def _states(rng, tokens=32, width=64):
    """A few channels are much larger than the rest, as T5's are."""
    return rng.standard_normal((tokens, width), np.float32) * np.where(np.arange(width) % 16 == 3, 20.0, 0.2)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_float8_states_are_off_by_no_more_than_three_bits_of_mantissa_allow(scale):
    text = TextInfo("full", "float8", 32, 64, 8)
    txt = _states(np.random.default_rng(0)) * np.float32(scale)
    fields, wrong, total = pack_text(txt, text, 32)
    back = unpack_text(fields, text).astype(np.float32)
    error = np.linalg.norm(back - txt) / np.linalg.norm(txt)
    assert 0.015 < error < 0.04
    # The bfloat16 that training reads holds every scaled float8 number exactly.
    np.testing.assert_allclose(error, np.sqrt(wrong / total), rtol=1e-5)
    normal = np.abs(txt) > 2.0**-6 * 2.0 ** int(fields["txt_exponent"])
    assert np.all(np.abs(back - txt)[normal] <= np.abs(txt)[normal] * 2.0**-4 * 1.001)


def test_bfloat16_states_are_stored_as_they_are():
    text = TextInfo("full", "bfloat16", 32, 64, 8)
    txt = _states(np.random.default_rng(1)).astype(ml_dtypes.bfloat16)
    fields, wrong, _ = pack_text(txt.astype(np.float32), text, 32)
    assert wrong == 0.0
    np.testing.assert_array_equal(unpack_text(fields, text), txt)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_trimmed_states_are_zero_behind_the_caption(dtype):
    text = TextInfo("trimmed", dtype, 32, 64, 8)
    txt = _states(np.random.default_rng(2))
    fields, *_ = pack_text(txt, text, 5)
    assert fields["txt"].shape == (5, 64)
    back = unpack_text(fields, text)
    assert back.shape == (32, 64) and not np.any(back[5:].astype(np.float32)) and np.any(back[4].astype(np.float32))


def test_zero_states_survive_float8():
    text = TextInfo("full", "float8", 4, 8, 8)
    fields, *_ = pack_text(np.zeros((4, 8), np.float32), text, 4)
    assert not np.any(unpack_text(fields, text).astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "set.json").unlink(), "is no prepared set, for it has no set.json"),
        (lambda folder: (folder / "set.json").write_text("{"), "set.json cannot be read"),
        (lambda folder: _change(folder, format_version=99), "has format version 99, not 1"),
        (lambda folder: _change(folder, surprise=1), "set.json cannot be read"),
    ],
)
def test_what_is_no_set_is_told_in_one_line(tmp_path, damage, message):
    folder = write_small_set(tmp_path / "set", "pixels", (3,))
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        PreparedSet(folder)
    assert "\n" not in str(error.value)


def _change(folder, **values):
    stored = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps({**stored, **values}))


def test_a_split_that_is_not_there_names_those_that_are(latents):
    with pytest.raises(DataError, match=r"has no split 'test': it has train \(12 records\)"):
        PreparedSet(latents).records("test")


def test_names_are_legal_for_tfds(tmp_path):
    assert dataset_name(tmp_path / "CC12M 256-px") == "cc12m_256_px"
    assert dataset_name(tmp_path / "64px") == "set_64px"
