"""Adapters and a network that the tests of LoRA share."""

import dataclasses

import jax
import numpy as np

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.models.flux import Flux
from shortcut_jax.models.presets import preset
from shortcut_jax.weights.lora import Factors, expand, record_of, scales, sizes, stack
from shortcut_jax.weights.rules import nest

CFG = dataclasses.replace(preset("tiny"), guidance=True)


def random_modules(shapes, rank=3, alpha=None, keep=lambda name: True, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    modules = {}
    for name, unit, _ in expand(shapes):
        if keep(name):
            inputs, outputs = sizes(unit, shapes)
            r = rank(name) if callable(rank) else rank
            down, up = rng.standard_normal((r, inputs)), rng.standard_normal((outputs, r))
            modules[name] = Factors(down.astype(dtype), (0.2 * up).astype(dtype), float(alpha or r))
    return modules


def apply_flux(cfg, params, lora=None):
    """The network's output for fixed inputs, with adapters as collections if given."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    args = (draw(2, 8, cfg.channels), np.array([0.9, 0.2], "f"), draw(2, 3, cfg.text_width), draw(2, cfg.pooled_width))
    guidance = np.array([3.5, 1.0], "f") if cfg.guidance else None
    variables = {"params": nest(params), **(lora or {})}
    return jax.jit(Flux(cfg).apply)(variables, *args, image_ids(4, 8), text_ids(3), guidance)


def collections(modules, shapes):
    named = {f"{k}/scale": v for k, v in scales(record_of(modules), shapes).items()}
    return {"lora": nest(stack(modules, shapes)), "lora_scale": nest(named)}


RANKS = {
    "all": dict(),
    "some modules": dict(
        keep=lambda n: "to_q" in n or "norm1.linear" in n or n == "single_transformer_blocks.1.proj_out"
    ),
    "several ranks": dict(rank=lambda n: 2 + len(n) % 3, alpha=5.0),
    "bfloat16": dict(dtype="bfloat16"),
}
