import hashlib
import math
import struct

import numpy as np
import pytest

from shortcut_jax.data.words import count_words, encode_words, positions, word_vector


def _encode(caption, num_tokens=4, text_width=8, pooled_width=6):
    return encode_words(caption, num_tokens, text_width, pooled_width)


def test_word_vectors_have_the_values_they_always_had():
    np.testing.assert_allclose(word_vector("cat", 4), [-0.70378717, 1.20076227, 1.42878979, 0.88347907], rtol=1e-6)
    np.testing.assert_allclose(word_vector("Ж", 4), [-0.7915989, -0.89014146, 1.72484889, -0.11796926], rtol=1e-6)
    checksum = hashlib.sha256(word_vector("cat", 64).astype("<f4").tobytes()).hexdigest()
    assert checksum == "6963726f0c85e60af422a5848ba3100b512563c24be64609e8488aa7ddd5b79d"


@pytest.mark.parametrize("word", ["seven", "naïve", "日本"])
def test_word_vectors_are_the_uniform_numbers_in_the_hash_of_the_word(word):
    numbers = struct.unpack("<16I", hashlib.shake_256(word.encode("utf-8")).digest(64))
    expected = [math.sqrt(12) * ((n + 0.5) / 2**32 - 0.5) for n in numbers]
    vector = word_vector(word, 16)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected, rtol=1e-6, atol=1e-7)


def test_word_vectors_have_zero_mean_and_unit_variance_and_little_in_common():
    vectors = np.stack([word_vector(f"word{i}", 256) for i in range(64)])
    assert abs(vectors.mean()) < 0.03 and abs(vectors.var() - 1.0) < 0.03
    assert np.abs(vectors).max() <= math.sqrt(3) + 1e-6
    cosines = vectors @ vectors.T / 256
    assert np.abs(cosines - np.diag(np.diag(cosines))).max() < 0.35


def test_letter_case_and_accents_make_different_words():
    vectors = [word_vector(w, 8) for w in ("cafe", "café", "Café")]
    assert len({v.tobytes() for v in vectors}) == 3


def test_positions_start_at_ones_and_zeros_and_are_all_different():
    p = positions(16, 8)
    assert p.shape == (16, 8) and p.dtype == np.float32
    np.testing.assert_array_equal(p[0], [1.0] * 4 + [0.0] * 4)
    np.testing.assert_allclose(p[:, :4] ** 2 + p[:, 4:] ** 2, 1.0, atol=1e-6)
    np.testing.assert_allclose(p[:, 4], np.sin(np.arange(16)), atol=1e-6)
    assert len({row.tobytes() for row in p}) == 16


def test_a_caption_is_its_words_at_their_positions_and_pooled_their_mean():
    txt, vec = _encode("a red cat")
    assert txt.shape == (4, 8) and vec.shape == (6,) and txt.dtype == vec.dtype == np.float32
    words = np.stack([word_vector(w, 8) for w in ("a", "red", "cat")])
    np.testing.assert_allclose(txt[:3], words + positions(4, 8)[:3], atol=1e-6)
    np.testing.assert_array_equal(txt[3], positions(4, 8)[3])
    np.testing.assert_allclose(vec, np.mean([word_vector(w, 6) for w in ("a", "red", "cat")], axis=0), atol=1e-6)


def test_words_beyond_the_limit_change_nothing():
    for got, expected in zip(_encode("a b c d e f"), _encode("a b c d"), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(_encode("a b c d")[0], _encode("a b c e")[0])


@pytest.mark.parametrize("caption", ["", "  \n "])
def test_the_empty_caption_has_positions_only_and_a_zero_vector(caption):
    txt, vec = _encode(caption)
    np.testing.assert_array_equal(txt, positions(4, 8))
    np.testing.assert_array_equal(vec, np.zeros(6))


def test_word_order_shows_in_the_text_but_not_in_the_pooled_vector():
    (txt, vec), (other_txt, other_vec) = _encode("red blue"), _encode("blue red")
    np.testing.assert_allclose(vec, other_vec, atol=1e-7)
    assert np.abs(np.sort(txt, axis=0) - np.sort(other_txt, axis=0)).max() > 0.1


def test_encoded_captions_are_read_only_as_they_are_shared():
    first, again = _encode("a red cat"), _encode("a red cat")
    for array in (*first, *again):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_words_are_counted_between_any_white_space():
    assert [count_words(c) for c in ("", "one", " a  red\tcat\n")] == [0, 1, 3]
