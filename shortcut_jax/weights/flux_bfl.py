"""The table of Black Forest Labs' own Flux checkpoints, as ComfyUI uses them too."""

from shortcut_jax.weights.rules import Rule, linear
from shortcut_jax.weights.transforms import split_input, split_output, split_vector, vector


def _embedder(source: str, target: str) -> list[Rule]:
    return linear(f"{source}.in_layer", f"{target}/in_layer") + linear(f"{source}.out_layer", f"{target}/out_layer")


def _norms(source: str, target: str) -> list[Rule]:
    return [
        Rule((f"{source}.query_norm.scale",), (f"{target}/q_norm/scale",), vector()),
        Rule((f"{source}.key_norm.scale",), (f"{target}/k_norm/scale",), vector()),
    ]


def _stream(name: str) -> list[Rule]:
    """One of the two streams of a double block."""
    source, target = f"double_blocks.{{i}}.{name}", f"double_blocks/{name}"
    return (
        linear(f"{source}_mod.lin", f"{target}_modulation/linear")
        + linear(f"{source}_attn.qkv", f"{target}_attn/qkv")
        + _norms(f"{source}_attn.norm", f"{target}_attn")
        + linear(f"{source}_attn.proj", f"{target}_attn_out", in_dims=2)
        + linear(f"{source}_mlp.0", f"{target}_mlp_in")
        + linear(f"{source}_mlp.2", f"{target}_mlp_out")
    )


_S = "single_blocks.{i}"

RULES: tuple[Rule, ...] = tuple(
    linear("img_in", "img_in")
    + linear("txt_in", "txt_in")
    + _embedder("time_in", "time_in")
    + _embedder("guidance_in", "guidance_in")
    + _embedder("vector_in", "pooled_in")
    + _stream("img")
    + _stream("txt")
    # Single blocks: `linear1` gives q, k, v and the MLP's input; `linear2` reads attention's output and the MLP's.
    + linear(f"{_S}.modulation.lin", "single_blocks/modulation/linear")
    + _norms(f"{_S}.norm", "single_blocks/attn")
    + [
        Rule(
            (f"{_S}.linear1.weight",), ("single_blocks/attn/qkv/kernel", "single_blocks/mlp_in/kernel"), split_output()
        ),
        Rule((f"{_S}.linear1.bias",), ("single_blocks/attn/qkv/bias", "single_blocks/mlp_in/bias"), split_vector()),
        Rule(
            (f"{_S}.linear2.weight",), ("single_blocks/attn_out/kernel", "single_blocks/mlp_out/kernel"), split_input()
        ),
        Rule((f"{_S}.linear2.bias",), ("single_blocks/mlp_out/bias",), vector()),
    ]
    # The end: (shift, scale), as here.
    + linear("final_layer.adaLN_modulation.1", "final_modulation/linear")
    + linear("final_layer.linear", "final_linear")
)
