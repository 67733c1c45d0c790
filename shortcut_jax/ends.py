"""The ends of a network while it trains: captions that are known beforehand, and latents as pictures."""

from typing import Any

from shortcut_jax.assemble import Assembly
from shortcut_jax.data.format import VAE
from shortcut_jax.data.training import TrainingData
from shortcut_jax.generate import Ends, pixel_ends
from shortcut_jax.settings import ConfigError


def training_ends(assembly: Assembly, data: TrainingData) -> Ends:
    """Captions and pictures of a run on `data`: of stored text states, those of the set's prompts only.

    The decoder of a set of latents is read from the set itself.
    """
    ends = pixel_ends(assembly)
    if assembly.settings.data.text_encoder == "stored":
        ends = ends._replace(encode=stored_captions(data))
    prepared = data.sets[0].prepared
    if prepared and prepared.info.latents:
        from shortcut_jax.encoders import load_decoder

        ends = ends._replace(decode=load_decoder(prepared.folder / VAE))
    return ends


def stored_captions(data: TrainingData) -> Any:
    """Caption -> its stored text states; a caption that has none is a ConfigError."""

    def encode(caption: str) -> Any:
        if caption not in data.prompts:
            raise ConfigError(
                f"the set {data.settings.name!r} has no text states of {caption!r}: choose among its "
                f"{len(data.prompts) - 1} prompts, or prepare it with --eval_prompts"
            )
        return data.prompts[caption]

    return encode
