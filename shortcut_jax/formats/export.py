"""Writing models for PyTorch: diffusers folders, Black Forest Labs' files, ComfyUI's files."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.formats.inference_checkpoint import Sampling
from shortcut_jax.formats.safetensors import INDEX_SUFFIX, Writer
from shortcut_jax.models.clip import ClipConfig
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.weights import flux_bfl, flux_diffusers, schedulers, text, vae
from shortcut_jax.weights.params import Spec
from shortcut_jax.weights.rules import Rule, export, torch_specs

SHARD_BYTES = 10_000_000_000
"""The size from which on diffusers splits a model into several files."""

COMFY_PREFIXES = {
    "flux": "model.diffusion_model.",
    "vae": "vae.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
"""What stands before each model's names in one of ComfyUI's all-in-one files."""

Progress = Callable[[int], Any]
"""Told the bytes of each tensor that was written."""


class Component(NamedTuple):
    """One model's place in a diffusers pipeline."""

    folder: str
    file: str
    library: str
    class_name: str


COMPONENTS = {
    "flux": Component("transformer", "diffusion_pytorch_model", "diffusers", "FluxTransformer2DModel"),
    "vae": Component("vae", "diffusion_pytorch_model", "diffusers", "AutoencoderKL"),
    "clip": Component("text_encoder", "model", "transformers", "CLIPTextModel"),
    "t5": Component("text_encoder_2", "model", "transformers", "T5EncoderModel"),
}
TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
"""Folders of a pipeline's tokenizers, and the classes where the folder does not name one."""

_VERSION = "0.30.0"  # the first diffusers with Flux


def rules_for(kind: str, layout: str, config: Any) -> tuple[Rule, ...]:
    """The table of a model in a layout, `bfl` or `diffusers`; text encoders have but one."""
    if kind == "flux":
        return flux_bfl.RULES if layout == "bfl" else flux_diffusers.RULES
    if kind == "vae":
        make = vae.bfl_rules if layout == "bfl" else vae.diffusers_rules
        return make(len(config.widths), config.level_blocks)
    return text.T5_RULES if kind == "t5" else text.CLIP_RULES


class Part(NamedTuple):
    """A model to be written: its parameters by path, its table, and what stands before its names."""

    params: Mapping[str, np.ndarray]
    rules: Sequence[Rule]
    prefix: str = ""


def write_file(file: Path, parts: Sequence[Part], progress: Progress) -> None:
    """Writes models into one safetensors file, which appears when it is complete. Raises OSError without space."""
    specs = {f"{p.prefix}{name}": spec for p in parts for name, spec in torch_specs(p.params, p.rules).items()}
    with Writer(file, specs, {"format": "pt"}) as writer:
        for part in parts:
            for name, first, value in export(part.params, part.rules):
                writer.write(part.prefix + name, value, first)
                progress(value.nbytes)
                del value  # before the next one is made


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a file of tensors in memory."""
    with Writer(file, {k: Spec(v.dtype, v.shape) for k, v in tensors.items()}, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def write_component(folder: Path, kind: str, config: Any, params: Mapping[str, np.ndarray], progress: Progress) -> None:
    """Writes a model as diffusers and transformers do: `config.json`, and one file or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", torch_config(kind, config))
    stem, rules = COMPONENTS[kind].file, rules_for(kind, "diffusers", config)
    shards = _split(torch_specs(params, rules))
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", [Part(params, rules)], progress)
        return
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    home = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    with ExitStack() as stack:
        open_file = lambda file, shard: stack.enter_context(Writer(folder / file, shard, {"format": "pt"}))
        writers = {file: open_file(file, shard) for file, shard in zip(files, shards, strict=True)}
        for name, first, value in export(params, rules):
            writers[home[name]].write(name, value, first)
            progress(value.nbytes)
            del value  # before the next one is made
    total = sum(spec.nbytes for shard in shards for spec in shard.values())
    _write_json(folder / f"{stem}{INDEX_SUFFIX}", {"metadata": {"total_size": total}, "weight_map": home})


def _split(specs: Mapping[str, Spec]) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if size and size + spec.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def write_pipeline_index(folder: Path, kinds: Sequence[str], sampling: Sampling) -> None:
    """Writes `model_index.json` and the scheduler of a pipeline whose models and tokenizers are in place."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": _VERSION}
    index["scheduler"] = ["diffusers", schedulers.CLASS]
    for kind, c in COMPONENTS.items():
        index[c.folder] = [c.library, c.class_name] if kind in kinds else [None, None]
    for name, class_name in TOKENIZERS.items():
        file = folder / name / "tokenizer_config.json"
        chosen = json.loads(file.read_text()).get("tokenizer_class", class_name) if file.is_file() else class_name
        index[name] = ["transformers", chosen] if (folder / name).is_dir() else [None, None]
    _write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    config = {"_diffusers_version": _VERSION, **schedulers.write(sampling.shift, sampling.spacing)}
    _write_json(folder / "scheduler" / "scheduler_config.json", config)


def torch_config(kind: str, c: Any) -> dict[str, Any]:
    """The `config.json` that diffusers or transformers builds a model from."""
    makers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "flux": _flux_config,
        "vae": _vae_config,
        "t5": _t5_config,
        "clip": _clip_config,
    }
    own = makers[kind](c)
    name = COMPONENTS[kind].class_name
    if kind in ("flux", "vae"):
        return {"_class_name": name, "_diffusers_version": _VERSION, **own}
    return {"architectures": [name], "vocab_size": c.vocab, **own}


def _flux_config(c: FluxConfig) -> dict[str, Any]:
    return {
        "attention_head_dim": c.head_size,
        "axes_dims_rope": list(c.axes),
        "guidance_embeds": c.guidance,
        "in_channels": c.channels,
        "joint_attention_dim": c.text_width,
        "num_attention_heads": c.heads,
        "num_layers": c.double_blocks,
        "num_single_layers": c.single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": c.pooled_width,
    }


def _vae_config(c: VaeConfig) -> dict[str, Any]:
    levels = len(c.widths)
    return {
        "act_fn": "silu",
        "block_out_channels": list(c.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": c.channels,
        "out_channels": c.channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.level_blocks,
        "norm_num_groups": c.groups,
        "scaling_factor": c.scale,
        "shift_factor": c.shift,
        "force_upcast": True,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _t5_config(c: T5Config) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": c.width,
        "d_kv": c.head_size,
        "d_ff": c.hidden,
        "num_layers": c.blocks,
        "num_heads": c.heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }


def _clip_config(c: ClipConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_tokens,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": c.width,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2 if c.end_token is None else c.end_token,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
