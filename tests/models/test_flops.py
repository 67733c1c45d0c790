import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from shortcut_jax.models.flops import forward_flops, step_flops
from shortcut_jax.models.flux import Flux
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import preset


@pytest.mark.parametrize(
    ("num_img", "num_txt", "flops"), [(256, 256, 6.81e12), (1024, 512, 21.5e12), (4096, 512, 74.4e12)]
)
def test_flux_schnell_costs_what_its_size_implies(num_img, num_txt, flops):
    assert forward_flops(preset("flux-schnell"), num_img, num_txt) == pytest.approx(flops, rel=0.005)


def _inner_jaxprs(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _dot_flops(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            continue
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += repeats * sum(_dot_flops(inner) for inner in _inner_jaxprs(eqn))
    return total


@pytest.mark.parametrize("optional", [False, True])
def test_the_formula_counts_every_matrix_product_of_the_traced_model(optional):
    cfg = dataclasses.replace(preset("digits"), single_blocks=3, guidance=optional, step_size=optional)
    params = weight_shapes(cfg)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    inputs = [shape(1, 6, cfg.channels), shape(1), shape(1, 5, cfg.text_width), shape(1, cfg.pooled_width)]
    inputs += [shape(6, 3), shape(5, 3), *([shape(1)] * 2 if optional else [None] * 2)]
    jaxpr = jax.make_jaxpr(lambda p, *args: Flux(cfg).apply({"params": p}, *args))(params, *inputs)
    assert _dot_flops(jaxpr.jaxpr) == forward_flops(cfg, 6, 5)


def test_a_training_step_is_three_forwards_a_row_and_one_for_rows_without_gradient():
    cfg = preset("tiny")
    forward = forward_flops(cfg, 16, 4)
    assert step_flops(cfg, 16, 4, 8, 0, frozen=False) == 24 * forward
    assert step_flops(cfg, 16, 4, 8, 5, frozen=False) == 29 * forward
    assert step_flops(cfg, 16, 4, 8, 5, frozen=True) == 21 * forward
