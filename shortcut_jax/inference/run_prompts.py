"""The prompts that a training run can read: its words, their number, and examples of them."""

import contextlib
from collections.abc import Sequence
from functools import lru_cache

from shortcut_jax.config.schema import Settings
from shortcut_jax.data.datasets import EMBEDDED, captions
from shortcut_jax.data.format import PreparedSet
from shortcut_jax.data.records import DataSettings, data_folder, is_prepared
from shortcut_jax.data.words import count_words
from shortcut_jax.errors import DataError


@lru_cache(maxsize=16)
def known_words(data: DataSettings) -> tuple[str, ...]:
    """The words of the captions that a run was trained on; empty where they are not known, or not words."""
    names = (data.name, *data.mix)
    if data.text_encoder != "words" or not set(names) <= set(EMBEDDED):
        return ()
    return tuple(dict.fromkeys(word for name in names for caption in captions(name) for word in caption.split()))


def unknown_words(prompts: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words of prompts that the model never saw, each once; none where its words are not known."""
    words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
    return [word for word in words if known and word not in known]


def prompt_notes(data: DataSettings, prompts: Sequence[str]) -> list[str]:
    """What the user should know of prompts: what is cut off them, and words that the model never saw."""
    lines = []
    for prompt in dict.fromkeys(prompts) if data.text_encoder == "words" else ():
        if (count := count_words(prompt)) > data.text_tokens:
            kept = " ".join(prompt.split()[: data.text_tokens])
            lines.append(f"the prompt has {count} words, the model reads {data.text_tokens}: it is cut to {kept!r}")
    known = known_words(data)
    if unknown := ", ".join(map(repr, unknown_words(prompts, known))):
        words = ", ".join(known)
        lines.append(f"never seen in training, so of no meaning: {unknown}; the words it knows are {words}")
    return lines


def example_prompts(settings: Settings, most: int = 10) -> tuple[str, ...]:
    """Captions that a run knows: of its sample grids, of an embedded set, or those kept with its prepared set."""
    data = settings.data
    if settings.eval.captions:
        return tuple(dict.fromkeys(settings.eval.captions))[:most]
    if data.name in EMBEDDED:
        return captions(data.name)[:most]
    with contextlib.suppress(DataError):  # a model can be shown where its data is gone, or damaged
        if is_prepared(data_folder(data)):
            return PreparedSet(data_folder(data)).info.eval_prompts[:most]
    return ()
