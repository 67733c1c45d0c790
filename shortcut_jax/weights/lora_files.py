"""LoRA files of Flux: by PEFT's and diffusers' names, kohya's scripts', ComfyUI's dotted ones, and XLabs'.

PEFT's modules are ours. Black Forest Labs' names fuse q, k and v (and, in single blocks, the MLP's input): such a file
has one A for all parts, or, as kohya's scripts and we write it, one A a part below each other and a block-diagonal B.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights import flux_bfl, lora_peft
from shortcut_jax.weights.finite import check_finite
from shortcut_jax.weights.foreign import refuse_adapters
from shortcut_jax.weights.lora import UNITS, Factors, Modules, Shapes, Unit, check, expand, layer, sizes
from shortcut_jax.weights.lora_names import is_embedding, is_of_text_encoder, parse
from shortcut_jax.weights.params import common_dtype
from shortcut_jax.weights.rules import refuse_names

METADATA_KEY = "lora_adapter_metadata"
"""The header entry in which diffusers keeps PEFT's config."""

FUSED: dict[str, tuple[Unit, ...]] = {
    rule.sources[0].removesuffix(".weight"): tuple(
        u for u in UNITS if {f"{t}/kernel" for t in u.targets} <= set(rule.targets)
    )
    for rule in flux_bfl.RULES
    if rule.targets[0].endswith("/kernel")
}
"""The units that each module of Black Forest Labs holds, in the order of its output."""


_DOUBLE = "double_blocks.{i}.processor"
XLABS: dict[str, tuple[Unit, ...]] = {
    f"{_DOUBLE}.qkv_lora1": FUSED["double_blocks.{i}.img_attn.qkv"],
    f"{_DOUBLE}.qkv_lora2": FUSED["double_blocks.{i}.txt_attn.qkv"],
    f"{_DOUBLE}.proj_lora1": FUSED["double_blocks.{i}.img_attn.proj"],
    f"{_DOUBLE}.proj_lora2": FUSED["double_blocks.{i}.txt_attn.proj"],
    "single_blocks.{i}.processor.qkv_lora": FUSED["single_blocks.{i}.linear1"][:3],
    "single_blocks.{i}.processor.proj_lora": FUSED["single_blocks.{i}.linear2"],
}
"""The same of XLabs' names."""


def read(
    tensors: Mapping[str, np.ndarray],
    shapes: Shapes,
    config: Mapping[str, Any] | None = None,
    where: str = "PEFT's config",
) -> tuple[Modules, tuple[str, ...]]:
    """The adapters of a file, whatever its names.

    Args:
      tensors: by name.
      shapes: of the base's parameters.
      config: PEFT's config (`adapter_config.json`), which has the alphas where no tensor gives them. Without either,
        alpha is the rank.
      where: the config is, for messages.

    Returns:
      The adapters, and what the reader should know.

    Raises:
      ConversionError: a name that is not known, a factor without its other half, values that are not finite, an adapter
        of another kind or of another base.
    """
    notes = lora_peft.check(config or {}, where)
    own, more = _own(tensors)
    alpha_of = lora_peft.alphas(config or {}, where)
    fused, plain = _known(shapes)
    modules: Modules = {}
    for name, f in _pairs(own, {**fused, **plain}, alpha_of).items():
        parts = _unfuse(name, f, fused[name], shapes) if name in fused else {plain[name]: f}
        for module, factors in parts.items():
            if module in modules:
                raise ConversionError(f"the file has two adapters for {module}")
            modules[module] = factors
    _refuse_expanded(modules, shapes)
    check(modules, shapes)
    return modules, (*more, *notes)


def _own(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The transformer's adapters, float64 rounded, and what was left out."""
    encoders = [n for n in tensors if is_of_text_encoder(n)]
    embeddings = [n for n in tensors if is_embedding(n)]
    own = {n: tensors[n] for n in tensors if n not in {*encoders, *embeddings}}
    zeros = [n for n, v in own.items() if n.endswith((".diff", ".diff_b")) and not np.any(v)]
    own = {n: v for n, v in own.items() if n not in zeros}
    refuse_adapters(own)
    double = [n for n, v in own.items() if v.dtype == np.float64 and not n.endswith(".alpha")]
    for name in double:
        check_finite(name, own[name])
        with np.errstate(over="ignore"):  # checked with the others
            own[name] = own[name].astype(np.float32)
    lines = (
        (encoders, "tensors of text encoder adapters are left out: only the transformer's are used"),
        (
            embeddings,
            f"tensors of embeddings ({embeddings[0] if embeddings else ''}, ...) are left out: they are words "
            f"for text encoders, which stay as they are",
        ),
        (zeros, "differences of whole weights are left out: they are zero"),
        (double, "float64 tensors are rounded to float32"),
    )
    return own, tuple(f"{len(names)} {line}" for names, line in lines if names)


def _refuse_expanded(modules: Modules, shapes: Shapes) -> None:
    """Names relatives of Flux whose image input is a multiple of its own."""
    relatives = {2: "a control LoRA of FLUX.1 Canny or Depth", 6: "a LoRA of FLUX.1 Fill"}
    name, unit, _ = next(expand(shapes))
    width = modules[name].down.shape[1] / sizes(unit, shapes)[0] if name in modules else 1
    if width in relatives:
        raise ConversionError(
            f"this is {relatives[int(width)]}, which is not supported: its image input ({name}) is {int(width)} times "
            f"as wide as the base's; use a LoRA of FLUX.1 dev or schnell"
        )


def alpha_origin(names: Iterable[str], config: Mapping[str, Any], where: str) -> str:
    """Where the alphas of a file come from, in words.

    Args:
      names: of its tensors.
      config: PEFT's config that is applied, empty without one.
      where: it is.
    """
    parts = [p for p in map(parse, (n for n in names if not is_of_text_encoder(n))) if p]
    given = {p.module for p in parts if p.kind == "alpha"}
    left = {p.module for p in parts if p.kind == "down"} - given
    rest = f"from {where}" if lora_peft.gives_alpha(config) else "the rank of each module, for the file does not say"
    if not given:
        return f"alpha: {rest}"
    return "alpha: from the file's alpha tensors" + (f"; of {len(left)} modules without one: {rest}" if left else "")


def header_notes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What the reader should know of the entries of a file's header that trainers write.

    Raises:
      ConversionError: an adapter of Chroma, whose names may be Flux's.
    """
    for name in ("modelspec.architecture", "ss_base_model_version"):
        if "chroma" in metadata.get(name, "").lower():
            raise ConversionError(
                f"this is an adapter of Chroma ({name} in the file's header), another model than FLUX.1, which is not "
                f"supported: use adapters of FLUX.1 dev or schnell"
            )
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return ()
    if not isinstance(arguments, dict) or str(arguments.get("split_qkv")).lower() != "true":
        return ()
    return (
        "trained by kohya's scripts with split_qkv (the file's header says so): by the file's alpha its q, k and v are "
        "a third as strong as in training (a quarter in single blocks, with the MLP's input); they are read as the "
        "file says, as ComfyUI, diffusers and kohya's scripts do",
    )


def _known(shapes: Shapes) -> tuple[dict[str, list[tuple[str, Unit]]], dict[str, str]]:
    """Fused and plain module names, also with underscores, and what they stand for."""
    every = {(unit, i): name for name, unit, i in expand(shapes)}
    plain = {spelled: name for name in every.values() for spelled in (name, name.replace(".", "_"))}
    fused = {}
    for source, units in (*FUSED.items(), *XLABS.items()):
        for (unit, i), _ in every.items():
            if unit == units[0]:
                name = source.format(i=i)
                fused[name] = [(every[u, i], u) for u in units]
                if source in FUSED:
                    fused[name.replace(".", "_")] = fused[name]
    return fused, plain


def _pairs(
    tensors: Mapping[str, np.ndarray], known: Mapping[str, Any], alpha_of: lora_peft.Alphas
) -> dict[str, Factors]:
    """Both factors and alpha of each module, by its name without prefix."""
    homes: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in tensors:
        part = parse(name)
        if part is None:
            raise ConversionError(
                f"{name} is not part of a plain LoRA (A, B and alpha), the only kind that is supported"
            )
        if part.kind != "alpha":
            adapters.add(part.adapter)
        if len(adapters) > 1:
            raise ConversionError(
                f"the file has several adapters, {' and '.join(sorted(map(repr, adapters)))}: save each to a file of "
                f"its own"
            )
        if part.module not in known:
            nearest = difflib.get_close_matches(part.module, list(known), n=1)
            hint = f"; nearest known name: {nearest[0]}" if nearest else ""
            raise ConversionError(f"the LoRA adapts {_given(name)}, which is not a layer of this base{hint}")
        if part.kind in homes.setdefault(part.module, {}):
            raise ConversionError(f"the file has two adapters for {part.module}")
        homes[part.module][part.kind] = name
    return {module: _pair(module, names, tensors, alpha_of) for module, names in homes.items()}


def _given(name: str) -> str:
    """The module of a tensor, as it is written."""
    return re.split(r"\.(?:lora_|lora\.|alpha$)", name)[0]


def _pair(
    name: str, names: Mapping[str, str], tensors: Mapping[str, np.ndarray], alpha_of: lora_peft.Alphas
) -> Factors:
    """The adapter of a module, from the names of its tensors."""
    if not {"down", "up"} <= names.keys():
        missing = "B (lora_up)" if "down" in names else "A (lora_down)"
        raise ConversionError(f"the LoRA has no {missing} for {_given(next(iter(names.values())))}")
    found = {kind: tensors[own] for kind, own in names.items()}
    shapes = {half: np.shape(found[half]) for half in ("down", "up")}
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise ConversionError(f"the factors of {name} have shapes {shapes['down']} and {shapes['up']}, not matrices")
    if any(found[half].dtype.kind in "iub" for half in ("down", "up")):
        raise ConversionError(f"the factors of {name} are whole numbers, which no LoRA is made of")
    if np.size(found.get("alpha", 1.0)) != 1:
        raise ConversionError(f"the alpha of {name} is not one number")
    for kind, value in found.items():
        check_finite(names[kind], value)
    rank = len(found["down"])
    alpha = float(np.reshape(found["alpha"], ())) if "alpha" in found else alpha_of(name, rank)
    if alpha == 0:
        raise ConversionError(f"the alpha of {name} is 0, so that its adapter would do nothing: the file is damaged")
    return Factors(found["down"], found["up"], alpha)


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


def kohya_notes(modules: Modules) -> tuple[str, ...]:
    """What the writer of a file with kohya's names should know of its readers."""
    outside = [name for name in modules if "blocks." not in name]
    if not outside:
        return ()
    return (
        f"diffusers drops {len(outside)} of these {len(modules)} adapters without a word, those outside the blocks "
        f"({', '.join(outside)}), when it converts kohya's names; ComfyUI reads all: for diffusers write "
        f"--format=diffusers",
    )


def _folded(f: Factors) -> Factors:
    """The same adapter with alpha = rank, for diffusers does not read kohya's alphas of the last layers."""
    if f.alpha == f.rank:
        return f
    wide = f.up.astype(np.float32) * np.float32(f.scale)
    narrow = wide.astype(f.up.dtype)
    return Factors(f.down, narrow if np.array_equal(narrow.astype(np.float32), wide) else wide, float(f.rank))
