"""LoRA files of Flux: the names of PEFT and diffusers, of kohya's scripts, and of ComfyUI's dotted files.

PEFT's modules are ours. Black Forest Labs' names fuse q, k and v (and, in single blocks, the MLP's input): such a file
has one A for all parts, or, as kohya's scripts and we write it, one A a part below each other and a block-diagonal B.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.entries import NUMBER, told
from shortcut_jax.weights.lora import UNITS, Factors, Modules, Shapes, Unit, check, expand, layer, sizes
from shortcut_jax.weights.params import common_dtype
from shortcut_jax.weights.rules import ConversionError, refuse_names

METADATA_KEY = "lora_adapter_metadata"
"""The header entry in which diffusers keeps PEFT's config."""

_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.default)?\.weight"
)
_PREFIX = re.compile(
    r"(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_)?"
)
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.")

FUSED: dict[str, tuple[Unit, ...]] = {
    rule.sources[0].removesuffix(".weight"): tuple(
        u for u in UNITS if {f"{t}/kernel" for t in u.targets} <= set(rule.targets)
    )
    for rule in flux_bfl.RULES
    if rule.targets[0].endswith("/kernel")
}
"""The units that each module of Black Forest Labs holds, in the order of its output."""


def is_lora(names: Any) -> bool:
    """Whether tensors of these names are adapters."""
    return any(_FACTOR.fullmatch(name) for name in names)


def read(
    tensors: Mapping[str, np.ndarray], shapes: Shapes, config: Mapping[str, Any] | None = None
) -> tuple[Modules, tuple[str, ...]]:
    """The adapters of a file, whatever its names.

    Args:
      tensors: by name.
      shapes: of the base's parameters.
      config: PEFT's config (`adapter_config.json`), which has the alphas where no tensor gives them. Without either,
        alpha is the rank.

    Returns:
      The adapters, and what the reader should be told.

    Raises:
      ConversionError: a name that is not known, a factor without its other half, or an adapter of another base.
    """
    own = {n: v for n, v in tensors.items() if not n.startswith(_TEXT_ENCODERS)}
    left = len(tensors) - len(own)
    notes: tuple[str, ...] = (
        (f"{left} tensors of text encoder adapters are left out: only the transformer's are used",) if left else ()
    )
    double = [n for n, v in own.items() if v.dtype == np.float64 and not n.endswith(".alpha")]
    if double:
        own = {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in own.items()}
        notes += (f"{len(double)} float64 tensors are rounded to float32",)
    alpha_of = _alphas(config or {})
    fused, plain = _known(shapes)
    modules: Modules = {}
    for name, f in _pairs(own, {**fused, **plain}, alpha_of).items():
        parts = _unfuse(name, f, fused[name], shapes) if name in fused else {plain[name]: f}
        for module, factors in parts.items():
            if module in modules:
                raise ConversionError(f"the file has two adapters for {module}")
            modules[module] = factors
    check(modules, shapes)
    return modules, notes


def _known(shapes: Shapes) -> tuple[dict[str, list[tuple[str, Unit]]], dict[str, str]]:
    """Fused and plain module names, also with underscores, and what they stand for."""
    every = {(unit, i): name for name, unit, i in expand(shapes)}
    plain = {spelled: name for name in every.values() for spelled in (name, name.replace(".", "_"))}
    fused = {}
    for source, units in FUSED.items():
        for (unit, i), _ in every.items():
            if unit == units[0]:
                name = source.format(i=i)
                fused[name] = fused[name.replace(".", "_")] = [(every[u, i], u) for u in units]
    return fused, plain


def _pairs(tensors: Mapping[str, np.ndarray], known: Mapping[str, Any], alpha_of: Any) -> dict[str, Factors]:
    """Both factors and alpha of each module, by its name without prefix."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None and not name.endswith(".alpha"):
            raise ConversionError(
                f"{name} is not part of a plain LoRA (A, B and alpha), the only kind that is supported"
            )
        module = match["module"] if match else name.removesuffix(".alpha")
        kind = "alpha" if match is None else "down" if match["down"] else "up"
        halves.setdefault(module, {})[kind] = value
    pairs: dict[str, Factors] = {}
    for module, found in halves.items():
        name = module[_PREFIX.match(module).end() :]  # type: ignore[union-attr]  # it matches the empty string
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; nearest known name: {nearest[0]}" if nearest else ""
            raise ConversionError(f"the LoRA adapts {module}, which is not a layer of this base{hint}")
        if not {"down", "up"} <= found.keys():
            missing = "B (lora_up)" if "down" in found else "A (lora_down)"
            raise ConversionError(f"the LoRA has no {missing} for {module}")
        if name in pairs:
            raise ConversionError(f"the file has two adapters for {name}")
        shapes = {half: np.shape(found[half]) for half in ("down", "up")}
        if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
            raise ConversionError(
                f"the factors of {name} have shapes {shapes['down']} and {shapes['up']}, not matrices"
            )
        if any(found[half].dtype.kind in "iub" for half in ("down", "up")):
            raise ConversionError(f"the factors of {name} are whole numbers, which no LoRA is made of")
        if np.size(found.get("alpha", 1.0)) != 1:
            raise ConversionError(f"the alpha of {name} is not one number")
        rank = len(found["down"])
        alpha = float(np.reshape(found["alpha"], ())) if "alpha" in found else alpha_of(name, rank)
        pairs[name] = Factors(found["down"], found["up"], alpha)
    return pairs


def _alphas(config: Mapping[str, Any]) -> Any:
    """(module, rank) -> alpha, by PEFT's config; the rank itself without one."""
    if config.get("use_dora"):
        raise ConversionError("this adapter is DoRA, which is not supported: only plain LoRA is")

    said = told(config, "lora_alpha", NUMBER, where="PEFT's config")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ConversionError(f"PEFT's config says alpha_pattern {patterns!r}, which is not a JSON object")
    chosen = {}
    for pattern in patterns:
        try:
            wanted = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ConversionError(f"alpha_pattern {pattern!r} is not a regular expression: {error}") from error
        chosen[wanted] = told(patterns, pattern, NUMBER, where="alpha_pattern in PEFT's config")

    def alpha_of(module: str, rank: int) -> float:
        found = [alpha for wanted, alpha in chosen.items() if wanted.match(module)]
        alpha = float(found[0] if found else rank if said is None else said)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

    return alpha_of


def _unfuse(name: str, f: Factors, parts: list[tuple[str, Unit]], shapes: Shapes) -> Modules:
    """The adapters of the parts that a module of Black Forest Labs fuses."""
    if len(parts) == 1:
        ((module, unit),) = parts
        return {module: f._replace(up=_swapped(f.up, unit, shapes))}
    widths = [sizes(unit, shapes)[1] for _, unit in parts]
    if len(f.up) != sum(widths):
        raise ConversionError(
            f"the adapter of {name} maps {f.down.shape[1]} channels to {len(f.up)}, the base's layer "
            f"{sizes(parts[0][1], shapes)[0]} to {sum(widths)}: the LoRA belongs to another base"
        )
    rows = np.split(f.up, np.cumsum(widths)[:-1])
    count, (rank, rest) = len(parts), divmod(f.rank, len(parts))
    places = [slice(k * rank, (k + 1) * rank) for k in range(count)]
    diagonal = not rest and not any(rows[k][:, places[j]].any() for k in range(count) for j in range(count) if j != k)
    if not diagonal:
        return {module: Factors(f.down, row, f.alpha) for (module, _), row in zip(parts, rows, strict=True)}
    split = {
        m: Factors(f.down[s], row[:, s], f.alpha / count) for (m, _), row, s in zip(parts, rows, places, strict=True)
    }
    return {m: x for m, x in split.items() if x.down.any() or x.up.any()}  # zeros stand for a part without adapter


def _fuse(found: list[Factors | None], widths: list[tuple[int, int]]) -> Factors:
    """The inverse of `_unfuse` for several parts."""
    present = [f for f in found if f is not None]
    first, count = present[0], len(found)
    same = len(present) == count and all(f.scale == first.scale and np.array_equal(f.down, first.down) for f in present)
    if same and any(f.up.any() for f in present):
        return Factors(first.down, np.concatenate([f.up for f in present]), first.alpha)
    rank = max(f.rank for f in present)
    equal = all(f.scale == first.scale for f in present)
    # Scales that differ are multiplied in, which a 16-bit dtype would round.
    dtype = common_dtype({x.dtype for f in present for x in (f.down, f.up)}) if equal else np.dtype(np.float32)
    down = np.zeros((count * rank, widths[0][0]), dtype)
    up = np.zeros((sum(out for _, out in widths), count * rank), dtype)
    row = 0
    for k, (f, (_, out)) in enumerate(zip(found, widths, strict=True)):
        if f is not None:
            down[k * rank : k * rank + f.rank] = f.down
            value = f.up if equal else f.up.astype(np.float32) * f.scale
            up[row : row + out, k * rank : k * rank + f.rank] = value
        row += out
    whole = first.alpha if first.rank == rank else first.scale * rank
    return Factors(down, up, count * (whole if equal else rank))


def _swapped(up: np.ndarray, unit: Unit, shapes: Shapes) -> np.ndarray:
    if not unit.reverses:
        return up
    parts = layer(unit.targets[-1], shapes).outputs[0]
    return up.reshape(parts, -1, up.shape[1])[::-1].reshape(up.shape)


def to_peft(modules: Modules) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the header entries of a file that diffusers and PEFT read."""
    tensors = {}
    for name, f in modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = f.down
        tensors[f"transformer.{name}.lora_B.weight"] = f.up
    metadata = {"format": "pt"}
    if any(f.alpha != f.rank for f in modules.values()):  # otherwise readers assume alpha = rank
        ranks = [f.rank for f in modules.values()]
        alphas = [f.alpha for f in modules.values()]
        rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(modules),
            "rank_pattern": {f"^{n}": f.rank for n, f in modules.items() if f.rank != rank},
            "alpha_pattern": {f"^{n}": f.alpha for n, f in modules.items() if f.alpha != alpha},
        }
        metadata[METADATA_KEY] = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    return tensors, metadata


def to_kohya(modules: Modules, shapes: Shapes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the header entries of a file that kohya's scripts, ComfyUI and diffusers read.

    Raises:
      ConversionError: a module is not one of the base.
    """
    tensors = {}
    fused, _ = _known(shapes)
    homes = {name: parts for name, parts in fused.items() if "." not in name}
    refuse_names("adapters without a layer in this base", set(modules) - {m for p in homes.values() for m, _ in p})
    for name, parts in homes.items():
        found = [modules.get(module) for module, _ in parts]
        if not any(found):
            continue
        if len(parts) == 1:
            f = found[0]
            assert f is not None
            f = f._replace(up=_swapped(f.up, parts[0][1], shapes))
            f = _folded(f) if name.startswith("final_layer") else f
        else:
            f = _fuse(found, [sizes(unit, shapes) for _, unit in parts])
        tensors[f"lora_unet_{name}.lora_down.weight"] = f.down
        tensors[f"lora_unet_{name}.lora_up.weight"] = f.up
        tensors[f"lora_unet_{name}.alpha"] = np.asarray(f.alpha, np.float32)
    return tensors, {"format": "pt"}


def _folded(f: Factors) -> Factors:
    """The same adapter with alpha = rank, for diffusers does not read kohya's alphas of the last layers."""
    if f.alpha == f.rank:
        return f
    wide = f.up.astype(np.float32) * np.float32(f.scale)
    narrow = wide.astype(f.up.dtype)
    return Factors(f.down, narrow if np.array_equal(narrow.astype(np.float32), wide) else wide, float(f.rank))
