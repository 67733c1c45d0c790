"""What is not supported, by names of tensors: relatives of Flux and CLIP, and adapters that are no plain LoRA."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from shortcut_jax.errors import ConversionError

_OTHER_MODEL = "use FLUX.1 dev or schnell, and adapters of these"
_MERGE = "merge it into its base with the program that trained it, and convert the merged model"


class Foreign(NamedTuple):
    """A kind of model or adapter.

    Attributes:
      sign: a regular expression that is found in a name of it.
      what: it is.
      advice: what to do.
      adapter: whether the sign is found in adapters only.
    """

    sign: str
    what: str
    advice: str
    adapter: bool = True


MODELS = (
    Foreign(r"distilled_guidance_layer", "Chroma, another model than FLUX.1", _OTHER_MODEL, False),
    Foreign(r"(double|single)_stream_modulation", "FLUX.2", _OTHER_MODEL, False),
    Foreign(
        r"\.(qweight|wscales|wzeros|smooth|smooth_factor(_orig)?|lora_down|lora_up)$",
        "SVDQuant (nunchaku), which is quantised to 4 bits",
        "take the bfloat16 or float8 release of the model, or the LoRA before it was converted to nunchaku's format",
        False,
    ),
    Foreign(
        r"transformer\.resblocks\.",
        "CLIP by OpenAI's (open_clip's) names",
        "take it by Hugging Face's names: openai/clip-vit-large-patch14, or ComfyUI's clip_l.safetensors",
        False,
    ),
)
"""Models, and their adapters; signs that are in neither Flux, its text encoders, autoencoder nor in their adapters."""

ADAPTERS = (
    Foreign(
        r"(query|key)_norm\.scale$|\.norm(_added)?_[qk]\.weight$",
        "a control LoRA of Black Forest Labs (FLUX.1 Canny or Depth), which changes norms and widens the image input",
        _OTHER_MODEL,
        False,
    ),
    Foreign(r"[._]ip_adapter_", "XLabs' IP-Adapter", "it has no LoRA to read", True),
    Foreign(r"[._]lokr_", "a LoKr (LyCORIS)", _MERGE),
    Foreign(r"[._]hada_", "a LoHa (LyCORIS)", _MERGE),
    Foreign(r"[._]ia3_l|\.on_input$", "(IA)^3", _MERGE),
    Foreign(r"[._]b?oft_", "OFT or BOFT", _MERGE),
    Foreign(r"\.[ab][12]\.weight$", "a GLoRA (LyCORIS)", _MERGE),
    Foreign(r"dora_scale$|lora_magnitude_vector|\.magnitude$", "DoRA", _MERGE),
    Foreign(r"\.lora_mid\.", "a LoRA with Tucker factors (LyCORIS LoCon)", _MERGE),
    Foreign(r"\.lora_(E|ranknum)\b", "an AdaLoRA", _MERGE),
    Foreign(r"\.lora_diag\b", "KaSA", _MERGE),
    Foreign(r"\.vera_lambda", "VeRA", _MERGE),
    Foreign(r"\.lora(_B|_up)?(\.\w+)?\.bias$", "biases beside the factors (PEFT's lora_bias)", _MERGE),
    Foreign(r"\.diff(_b)?$", "differences of whole weights or biases", _MERGE),
    Foreign(r"\.(set|reshape)_weight$", "a control LoRA in ComfyUI's layout", _OTHER_MODEL),
)
"""Adapters of Flux that are no plain LoRA, the most telling sign first."""


def is_foreign_adapter(names: Iterable[str]) -> bool:
    """Whether some of the names are known from adapters of a kind that is not supported."""
    signs = re.compile("|".join(kind.sign for kind in ADAPTERS if kind.adapter))
    return any(signs.search(name) for name in names)


def refuse_models(names: Iterable[str]) -> None:
    """Raises ConversionError where a name is that of one of `MODELS`."""
    for kind, name in _found(MODELS, list(names)):
        raise ConversionError(f"this is {kind.what}, which is not supported (it holds {name}): {kind.advice}")


def refuse_adapters(names: Iterable[str]) -> None:
    """Raises ConversionError where a name is that of one of `MODELS` or `ADAPTERS`."""
    names = list(names)
    refuse_models(names)
    for kind, name in _found(ADAPTERS, names):
        raise ConversionError(
            f"{name} is not part of a plain LoRA (A, B and alpha), the only kind that is supported: it belongs to "
            f"{kind.what}; {kind.advice}"
        )


def _found(kinds: tuple[Foreign, ...], names: list[str]) -> Iterable[tuple[Foreign, str]]:
    return ((kind, name) for kind in kinds for name in names if re.search(kind.sign, name))
