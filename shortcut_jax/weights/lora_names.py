"""Names of LoRA files: PEFT's and diffusers', kohya's, ComfyUI's and XLabs', and what wrappers and trainers put before.

What is left of a module's name is diffusers', Black Forest Labs', or one of them with underscores for dots.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from shortcut_jax.weights.foreign import is_foreign_adapter

_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.(?P<adapter>[^.]+))?\.weight"
)
_XLABS = re.compile(
    r"(?P<module>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?:(?P<down>down)|(?P<up>up))(?P<adapter>)\.weight"
)
_PREFIX = re.compile(
    r"(?:(?:base_model\.model|module|model|transformer|unet|diffusion_model)\.)*"
    r"(?:(?:lora_unet|lora_transformer|lycoris)[_.]+)?"
)
_WRAPPER = r"(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)"
"""What torch.compile, FSDP and activation checkpointing put into names, after an underscore."""

_TEXT_ENCODER = re.compile(
    r"lora_te|text_encoder|text_model|clip_[lg]\b|t5(xxl)?\.|te\d?\.|cond_stage_model|conditioner"
)
_EMBEDDING = re.compile(r"bundle_emb|emb_params|string_to_param|embeddings?\.")


class Part(NamedTuple):
    """What a tensor is.

    Attributes:
      module: that it adapts, without what stands before.
      kind: `down`, `up` or `alpha`.
      adapter: PEFT's name for it, mostly empty or `default`.
    """

    module: str
    kind: str
    adapter: str = ""


def parse(name: str) -> Part | None:
    """What a tensor of a LoRA is by its name; None where it is no part of one."""
    name = re.sub(rf"_{_WRAPPER}\.", "", name)
    match = _XLABS.fullmatch(name) or _FACTOR.fullmatch(name)
    if match:
        return Part(module_of(match["module"]), "down" if match["down"] else "up", match["adapter"] or "")
    return Part(module_of(name.removesuffix(".alpha")), "alpha") if name.endswith(".alpha") else None


def module_of(name: str) -> str:
    """A module's name without prefixes and wrappers."""
    name = re.sub(rf"_{_WRAPPER}\.", "", name)
    name = name[_PREFIX.match(name).end() :]  # type: ignore[union-attr]  # it matches the empty string
    name = re.sub(rf"^{_WRAPPER}_", "", re.sub(rf"__{_WRAPPER}_", "_", name))
    return name.strip("_")


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are adapters, of whatever kind."""
    names = list(names)
    factors = (part for part in map(parse, names) if part is not None and part.kind != "alpha")
    return any(factors) or is_foreign_adapter(names)


def is_of_text_encoder(name: str) -> bool:
    """Whether a tensor belongs to an adapter of a text encoder."""
    return bool(_TEXT_ENCODER.match(module_of(name)))


def is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding that was trained with a LoRA, a word for the text encoders."""
    return bool(_EMBEDDING.match(module_of(name)))
