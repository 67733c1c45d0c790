"""A converted folder that images can be made with, or prepared: whole, and of models that belong together."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.local_path import download_hint
from shortcut_jax.errors import ConvertedError
from shortcut_jax.formats.inference_checkpoint import RECORD, Sampling, read_record
from shortcut_jax.formats.tokenizers import CLIP, T5, Tokenizer, check_vocab
from shortcut_jax.sources.models import PIPELINE_KINDS, Model, open_models


class PipelineParts(NamedTuple):
    """What a pipeline consists of.

    Attributes:
      models: by kind: `flux`, `vae`, `t5` and `clip`, or those of them that were asked for.
      sampling: how it is sampled.
      tokenizers: of `t5` and `clip`, where they are among the models.
    """

    models: dict[str, Model]
    sampling: Sampling
    tokenizers: dict[str, Tokenizer]


def open_pipeline(folder: Path, kinds: Sequence[str] = PIPELINE_KINDS, purpose: str = "images need") -> PipelineParts:
    """Opens a converted folder; nothing but headers and tokenizers is read.

    Args:
      folder: made by `shortcut_jax.convert`.
      kinds: of the models that are needed.
      purpose: of them, as an error says it.

    Raises:
      ConvertedError: it is no converted folder, lacks a model or a tokenizer, or its parts do not go together.
    """
    if not folder.is_dir():
        raise ConvertedError(f"{folder} is not found{download_hint(folder)}")
    if not (folder / RECORD).is_file():
        raise ConvertedError(
            f"{folder} is no converted folder, for it has no {RECORD}: make one with python -m shortcut_jax.convert"
        )
    stored, sampling = read_record(folder)
    held = [m.kind for m in stored]
    missing = [kind for kind in kinds if kind not in held]
    if missing:
        raise ConvertedError(
            f"{folder} holds {', '.join(held) or 'nothing'}, but {purpose} {', '.join(missing)} too: "
            "convert again from a whole pipeline, or with one --from for each model"
        )
    models = {m.kind: m for m in open_models(folder) if m.kind in kinds}
    tokenizers = {kind: Tokenizer(folder / name) for kind, name in (("clip", CLIP), ("t5", T5)) if kind in models}
    parts = PipelineParts(models, sampling, tokenizers)
    _check(folder, parts)
    return parts


def _check(folder: Path, parts: PipelineParts) -> None:
    """Parts of different pipelines would give noise, or an error deep inside."""
    configs = {kind: model.config for kind, model in parts.models.items()}
    if configs.keys() == set(PIPELINE_KINDS):
        flux, vae, t5, clip = (configs[kind] for kind in ("flux", "vae", "t5", "clip"))
        for name, wanted, whose, found in (
            ("text width", flux.text_width, "T5's", t5.width),
            ("pooled width", flux.pooled_width, "CLIP's", clip.width),
            ("packed channels", flux.channels, "the autoencoder's", PATCH**2 * vae.latent_channels),
        ):
            if wanted != found:
                raise ConvertedError(f"{folder}: the transformer's {name} is {wanted}, but {whose} is {found}")
    for kind, tokenizer in parts.tokenizers.items():
        check_vocab(folder, tokenizer, configs[kind].vocab)
