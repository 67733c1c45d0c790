"""How many captions of a run's sets are longer than the tokens that it reads: they are cut, which is said once."""

import numpy as np

from shortcut_jax.data.pipeline import read_many
from shortcut_jax.data.training import OpenSet, TrainingData
from shortcut_jax.data.words import count_words

MOST_READ = 1000
"""Captions that are looked at in a set that is not in memory, evenly spaced over it: reading all could take hours."""

_AT_ONCE = 32
"""Records that are held at once: they come with their images."""


def report_cuts(data: TrainingData) -> list[str]:
    """A line for each set some captions of which are cut, or were when it was prepared."""
    lines = [_stored(one) if data.settings.text_encoder == "stored" else _words(data, one) for one in data.sets]
    return [line for line in lines if line]


def _words(data: TrainingData, one: OpenSet) -> str:
    tokens, num = data.settings.text_tokens, len(one.buckets)
    lengths = [count_words(caption) for caption in _captions(data, one)]
    cut = sum(length > tokens for length in lengths)
    if not cut:
        return ""
    whole = len(lengths) == num
    looked_at = f"{num:,} captions" if whole else f"{len(lengths):,} captions sampled of the {num:,}"
    return (
        f"{cut / len(lengths):.1%} of the {looked_at} of {one.name} have more than data.text_tokens={tokens} words and "
        f"are cut; the longest{'' if whole else ' of them'} has {max(lengths)}"
    )


def _captions(data: TrainingData, one: OpenSet) -> list[str]:
    records, num = one.records, len(one.buckets)
    indices = list(range(num))
    if not isinstance(records, list):
        indices = np.linspace(0, num - 1, min(num, MOST_READ)).astype(int).tolist()
        if one.prepared:
            records = one.prepared.records(data.settings.split, decode=False)
    chunks = (indices[first : first + _AT_ONCE] for first in range(0, len(indices), _AT_ONCE))
    return [record["caption"].decode("utf-8", "replace") for some in chunks for record in read_many(records, some)]


def _stored(one: OpenSet) -> str:
    text = one.info and one.info.text
    if not one.info or not text or text.cut == 0:
        return ""
    if text.cut is None:
        return f"{one.name} stores {text.tokens} tokens a caption: longer ones were cut when it was prepared"
    return (
        f"{text.cut / one.info.total:.1%} of the captions of {one.name} had more than the {text.tokens} tokens that it "
        f"stores and were cut when it was prepared"
    )
