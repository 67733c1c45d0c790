"""A converted folder that pictures can be made with: whole, and of models that belong together."""

from pathlib import Path
from typing import NamedTuple

from shortcut_jax.core.latents import PATCH
from shortcut_jax.runtime.converted import RECORD, ConvertedError, Sampling, read_record
from shortcut_jax.runtime.tokenizers import CLIP, T5, Tokenizer
from shortcut_jax.sources import KINDS, Model, open_models


class PipelineParts(NamedTuple):
    """What a pipeline consists of.

    Attributes:
      models: by kind: `flux`, `vae`, `t5` and `clip`.
      sampling: how it is sampled.
      clip_tokenizer: CLIP's.
      t5_tokenizer: T5's.
    """

    models: dict[str, Model]
    sampling: Sampling
    clip_tokenizer: Tokenizer
    t5_tokenizer: Tokenizer


def open_pipeline(folder: Path) -> PipelineParts:
    """Opens a converted folder; nothing but headers and tokenizers is read.

    Raises:
      ConvertedError: it is no converted folder, lacks a model or a tokenizer, or its parts do not go together.
    """
    if not folder.is_dir():
        raise ConvertedError(f"{folder} is not there")
    if not (folder / RECORD).is_file():
        raise ConvertedError(
            f"{folder} is no converted folder, for it has no {RECORD}: make one with python -m shortcut_jax.convert"
        )
    stored, sampling = read_record(folder)
    held = [m.kind for m in stored]
    missing = [kind for kind in KINDS if kind not in held]
    if missing:
        raise ConvertedError(
            f"{folder} holds {', '.join(held) or 'nothing'}, but pictures need {', '.join(missing)} too: "
            "convert again from a whole pipeline, or with one --from for each model"
        )
    models = {m.kind: m for m in open_models(folder)}
    parts = PipelineParts(models, sampling, Tokenizer(folder / CLIP), Tokenizer(folder / T5))
    _check(folder, parts)
    return parts


def _check(folder: Path, parts: PipelineParts) -> None:
    """Parts of different pipelines would give noise, or an error deep inside."""
    flux, vae, t5, clip = (parts.models[kind].config for kind in ("flux", "vae", "t5", "clip"))
    for name, wanted, whose, found in (
        ("text width", flux.text_width, "T5's", t5.width),
        ("pooled width", flux.pooled_width, "CLIP's", clip.width),
        ("packed channels", flux.channels, "the autoencoder's", PATCH**2 * vae.latent_channels),
    ):
        if wanted != found:
            raise ConvertedError(f"{folder}: the transformer's {name} is {wanted}, but {whose} is {found}")
    for tokenizer, model in ((parts.clip_tokenizer, clip), (parts.t5_tokenizer, t5)):
        if tokenizer.vocab > model.vocab:
            raise ConvertedError(
                f"{folder}: the tokenizer of {tokenizer.name} has {tokenizer.vocab} tokens, but the model knows "
                f"{model.vocab}: they belong to different models"
            )
