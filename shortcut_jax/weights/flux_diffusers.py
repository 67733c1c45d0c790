"""The table of diffusers' `FluxTransformer2DModel`."""

from shortcut_jax.weights.rules import Rule, linear
from shortcut_jax.weights.transforms import kernel, reordered, split_input, vector


def _qkv(block: str, names: tuple[str, str, str], norms: tuple[str, str], target: str) -> list[Rule]:
    layers = [f"{block}.attn.{n}" for n in names]
    return [
        Rule(tuple(f"{n}.weight" for n in layers), (f"{target}/qkv/kernel",), kernel(parts=3)),
        Rule(tuple(f"{n}.bias" for n in layers), (f"{target}/qkv/bias",), vector(parts=3)),
        Rule((f"{block}.attn.{norms[0]}.weight",), (f"{target}/q_norm/scale",), vector()),
        Rule((f"{block}.attn.{norms[1]}.weight",), (f"{target}/k_norm/scale",), vector()),
    ]


def _embedder(source: str, target: str) -> list[Rule]:
    source = f"time_text_embed.{source}"
    return linear(f"{source}.linear_1", f"{target}/in_layer") + linear(f"{source}.linear_2", f"{target}/out_layer")


_D, _S = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_QKV = ("to_q", "to_k", "to_v")

RULES: tuple[Rule, ...] = tuple(
    linear("x_embedder", "img_in")
    + linear("context_embedder", "txt_in")
    + _embedder("timestep_embedder", "time_in")
    + _embedder("guidance_embedder", "guidance_in")
    + _embedder("text_embedder", "pooled_in")
    # Double blocks: image stream, then text stream.
    + linear(f"{_D}.norm1.linear", "double_blocks/img_modulation/linear")
    + _qkv(_D, _QKV, ("norm_q", "norm_k"), "double_blocks/img_attn")
    + linear(f"{_D}.attn.to_out.0", "double_blocks/img_attn_out", in_dims=2)
    + linear(f"{_D}.ff.net.0.proj", "double_blocks/img_mlp_in")
    + linear(f"{_D}.ff.net.2", "double_blocks/img_mlp_out")
    + linear(f"{_D}.norm1_context.linear", "double_blocks/txt_modulation/linear")
    + _qkv(_D, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "double_blocks/txt_attn")
    + linear(f"{_D}.attn.to_add_out", "double_blocks/txt_attn_out", in_dims=2)
    + linear(f"{_D}.ff_context.net.0.proj", "double_blocks/txt_mlp_in")
    + linear(f"{_D}.ff_context.net.2", "double_blocks/txt_mlp_out")
    # Single blocks: `proj_out` reads the concatenation of attention and MLP.
    + linear(f"{_S}.norm.linear", "single_blocks/modulation/linear")
    + _qkv(_S, _QKV, ("norm_q", "norm_k"), "single_blocks/attn")
    + linear(f"{_S}.proj_mlp", "single_blocks/mlp_in")
    + [
        Rule(
            (f"{_S}.proj_out.weight",), ("single_blocks/attn_out/kernel", "single_blocks/mlp_out/kernel"), split_input()
        ),
        Rule((f"{_S}.proj_out.bias",), ("single_blocks/mlp_out/bias",), vector()),
        # The end: diffusers stores (scale, shift).
        Rule(("norm_out.linear.weight",), ("final_modulation/linear/kernel",), reordered(kernel(), axis=1)),
        Rule(("norm_out.linear.bias",), ("final_modulation/linear/bias",), reordered(vector(), axis=0)),
    ]
    + linear("proj_out", "final_linear")
)
