"""The ends of a network while it trains: captions that are known beforehand, and latents as images."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from shortcut_jax.config.schema import Settings
from shortcut_jax.data.format import VAE
from shortcut_jax.data.records import data_folder, is_prepared
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import ConfigError
from shortcut_jax.inference.generator import Codec, pixel_codec
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.run.assembly import text_encoder


def training_codec(settings: Settings, cfg: FluxConfig, data: TrainingData) -> Codec:
    """Captions and images of a run on `data`: of stored text states, those of the set's prompts only.

    The decoder of a set of latents is read from the set itself.
    """
    codec = pixel_codec(settings, cfg)
    if settings.data.text_encoder == "stored":
        codec = codec._replace(encode=stored_captions(data))
    prepared = data.sets[0].prepared
    if prepared and prepared.info.latents:
        from shortcut_jax.inference.encoders import load_vae_codec

        vae_codec = load_vae_codec(prepared.folder / VAE)
        codec = codec._replace(decode=vae_codec.decode, latents=vae_codec.latents)
    return codec


def sampling_codec(settings: Settings, cfg: FluxConfig, encoders: str | Path | None) -> Codec:
    """Captions and images of a trained model: of a converted pipeline, or else of the set it was trained on.

    Raises:
      ConfigError: neither is at hand, or encoders are given for a run that has its own.
      ConvertedError: `encoders` is no whole pipeline.
    """
    data = settings.data
    if data.text_encoder == "words" and data.store != "latents":
        if encoders is not None:
            raise ConfigError("encoders are for runs on latents: this one reads words and makes pixels")
        return pixel_codec(settings, cfg)
    if encoders is not None:
        from shortcut_jax.inference.encoders import load_text_encoder, load_vae_codec

        folder = Path(encoders).expanduser()
        vae_codec = load_vae_codec(folder)
        codec = Codec(text_encoder(settings, cfg), vae_codec.decode, vae_codec.latents)
        if data.text_encoder == "words":
            return codec
        # A grid asks for the same captions at every step count.
        encode = functools.lru_cache(maxsize=256)(load_text_encoder(folder, data.text_tokens, data.text_states))
        return codec._replace(encode=encode)
    if not is_prepared(data_folder(data)):
        raise ConfigError(
            f"the run was trained on prepared text states, and its set {data_folder(data)} is not here: name the "
            f"pipeline that made them with --encoders=CONVERTED"
        )
    return training_codec(settings, cfg, TrainingData(dataclasses.replace(data, mix=(), weights=())))


def stored_captions(data: TrainingData) -> Any:
    """Caption -> its stored text states; a caption that has none is a ConfigError."""

    def encode(caption: str) -> Any:
        if caption not in data.prompts:
            raise ConfigError(
                f"the set {data.settings.name!r} has no text states of {caption!r}: choose among its "
                f"{len(data.prompts) - 1} prompts, prepare it with --eval_prompts, or sample with --encoders=CONVERTED"
            )
        return data.prompts[caption]

    return encode
