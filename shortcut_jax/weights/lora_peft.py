"""PEFT's config of an adapter (`adapter_config.json`, or an entry of a file's header): its alphas, what it asks for."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.entries import NUMBER, WHOLE, told

CHANGED_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
"""Initialisations, by the beginning of `init_lora_weights`, that take what they put into the factors off the base."""

SAME_BASE = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")
"""Those that leave the base as it is."""

VARIANTS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "lora_bias": "LoRA with biases (lora_bias)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with replicated layers (layer_replication)",
    "modules_to_save": "LoRA with whole layers that were trained (modules_to_save)",
    "target_parameters": "LoRA of single parameters (target_parameters)",
}
"""Entries that make another adapter of it where they are set."""

_MERGE = "merge it into its base with PEFT's merge_and_unload, and convert the merged model"

Alphas = Callable[[str, int], float]
"""(module, rank) -> alpha."""


def check(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What the reader should know of a config.

    Args:
      config: its entries.
      where: it is, for messages.

    Raises:
      ConversionError: an adapter of another kind, or of a base that its initialisation has changed.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConversionError(f"{where} says peft_type {kind!r}, which is not supported: only plain LoRA is; {_MERGE}")
    for name, variant in VARIANTS.items():
        if config.get(name):
            raise ConversionError(
                f"this adapter is {variant}, which is not supported: only plain LoRA is ({where} says {name} "
                f"{config[name]!r}); {_MERGE}"
            )
    if config.get("bias", "none") not in ("none", None):
        raise ConversionError(
            f"this adapter has trained the base's biases too ({where} says bias {config['bias']!r}), which is not "
            f"supported; {_MERGE}"
        )
    notes = _check_start(config.get("init_lora_weights"), where)
    if config.get("fan_in_fan_out"):
        notes += (f"fan_in_fan_out of {where} is not used: Flux has linear layers only",)
    return notes


def _check_start(start: Any, where: str) -> tuple[str, ...]:
    """Refuses what was trained beside changed weights. Returns notes."""
    text = str(start)
    name = next((name for sign, name in CHANGED_BASE.items() if text.lower().startswith(sign)), None)
    if name:
        raise ConversionError(
            f"this adapter started from {name} ({where} says init_lora_weights {text!r}), which changes the base's "
            f"weights, so it does not fit the base itself. Convert it to a plain LoRA in PEFT: save the adapter as it "
            f"starts, with model.save_pretrained(START), and the trained one with "
            f"model.save_pretrained(OUT, path_initial_model_for_weight_conversion=START)"
        )
    if text.lower() == "loftq":
        raise ConversionError(
            f"this adapter started from LoftQ ({where} says init_lora_weights {text!r}), which quantises the base, so "
            f"it does not fit the base itself; {_MERGE}"
        )
    if text not in SAME_BASE:
        return (f"init_lora_weights {text!r} of {where} is not known: taken to leave the base's weights as they are",)
    return ()


def alphas(config: Mapping[str, Any], where: str) -> Alphas:
    """The alpha of each module by a config; the rank itself where it does not say.

    Raises:
      ConversionError: an entry of another type. The function itself raises it where the config says another rank.
    """
    said = told(config, "lora_alpha", NUMBER, where=where)
    rank_said = told(config, "r", WHOLE, where=where)
    alpha_of_pattern = _patterns(config, "alpha_pattern", NUMBER, where)
    rank_of_pattern = _patterns(config, "rank_pattern", WHOLE, where)

    def alpha_of(module: str, rank: int) -> float:
        wanted = _first(rank_of_pattern, module, rank_said)
        if wanted not in (None, rank):
            raise ConversionError(
                f"{where} says that {module} has rank {wanted}, but its factors have {rank}: it is the config of "
                f"another adapter"
            )
        alpha = float(_first(alpha_of_pattern, module, rank if said is None else said))
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

    return alpha_of


def gives_alpha(config: Mapping[str, Any]) -> bool:
    """Whether a config says some alpha."""
    return bool(config.get("alpha_pattern")) or "lora_alpha" in config


def _patterns(config: Mapping[str, Any], name: str, kind: str, where: str) -> dict[re.Pattern[str], Any]:
    """Values by what matches the whole name of a module, or its end after a dot."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise ConversionError(f"{where} says {name} {patterns!r}, which is not a JSON object")
    result = {}
    for pattern in patterns:
        try:
            wanted = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ConversionError(f"{name} {pattern!r} is not a regular expression: {error}") from error
        result[wanted] = told(patterns, pattern, kind, where=f"{name} in {where}")
    return result


def _first(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    return next((value for wanted, value in patterns.items() if wanted.match(module)), default)
