"""The embedded text encoder: a fixed random vector a word, so that small data sets need no downloaded encoder."""

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=65536)
def word_vector(word: str, width: int) -> np.ndarray:
    """A vector [width] of zero mean and unit variance a channel, seeded by a hash of the word's UTF-8 bytes.

    The numbers come from the hash itself (SHAKE-256), not from a generator whose stream a new release may change.
    """
    raw = hashlib.shake_256(word.encode("utf-8")).digest(4 * width)
    uniform = (np.frombuffer(raw, "<u4").astype(np.float64) + 0.5) / 2**32
    vector = (np.sqrt(12.0) * (uniform - 0.5)).astype(np.float32)
    vector.flags.writeable = False
    return vector


def positions(num_tokens: int, width: int) -> np.ndarray:
    """Sinusoidal positions [num_tokens, width]; Flux's own text ids carry none."""
    frequencies = 1e4 ** (-np.arange(width // 2) / (width // 2))
    phases = np.arange(num_tokens)[:, None] * frequencies[None]
    return np.concatenate([np.cos(phases), np.sin(phases)], axis=-1).astype(np.float32)


def count_words(caption: str) -> int:
    """The number of tokens a caption needs."""
    return len(caption.split())


@functools.lru_cache(maxsize=4096)
def encode_words(caption: str, num_tokens: int, text_width: int, pooled_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a caption: word vectors plus positions, zero-padded and cut to `num_tokens`; pooled by the mean.

    Returns:
      txt [num_tokens, text_width] and vec [pooled_width], float32, read-only. The empty caption has positions only,
      and a zero vec.
    """
    words = caption.split()[:num_tokens]
    txt = positions(num_tokens, text_width)
    vec = np.zeros(pooled_width, np.float32)
    for i, word in enumerate(words):
        txt[i] += word_vector(word, text_width)
        vec += word_vector(word, pooled_width) / len(words)
    txt.flags.writeable = vec.flags.writeable = False
    return txt, vec
