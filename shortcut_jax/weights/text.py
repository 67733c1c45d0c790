"""The tables of encoders in `transformers` checkpoints: T5's encoder, CLIP's text tower, and both towers of CLIP."""

from shortcut_jax.weights.rules import Rule, linear, norm
from shortcut_jax.weights.transforms import array, conv, kernel, vector

_T5 = "encoder.block.{i}.layer"
_ATTENTION = f"{_T5}.0.SelfAttention"
_MLP = f"{_T5}.1.DenseReluDense"

T5_RULES: tuple[Rule, ...] = (
    Rule(("shared.weight",), ("token_embedding",), array()),
    # The first block holds the position bias of all.
    Rule(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",), ("position_bias",), array()),
    Rule((f"{_T5}.0.layer_norm.weight",), ("encoder_blocks/attn_norm/scale",), vector()),
    Rule(tuple(f"{_ATTENTION}.{n}.weight" for n in "qkv"), ("encoder_blocks/qkv/kernel",), kernel(parts=3)),
    Rule((f"{_ATTENTION}.o.weight",), ("encoder_blocks/attn_out/kernel",), kernel(in_dims=2)),
    Rule((f"{_T5}.1.layer_norm.weight",), ("encoder_blocks/mlp_norm/scale",), vector()),
    Rule((f"{_MLP}.wi_0.weight",), ("encoder_blocks/mlp_gate/kernel",), kernel()),
    Rule((f"{_MLP}.wi_1.weight",), ("encoder_blocks/mlp_in/kernel",), kernel()),
    Rule((f"{_MLP}.wo.weight",), ("encoder_blocks/mlp_out/kernel",), kernel()),
    Rule(("encoder.final_layer_norm.weight",), ("final_norm/scale",), vector()),
)


def _clip_blocks(source: str, target: str = "") -> list[Rule]:
    """The rows of a tower's blocks."""
    layer, blocks = f"{source}.encoder.layers.{{i}}", f"{target}encoder_blocks"
    return [
        Rule(tuple(f"{layer}.self_attn.{n}_proj.weight" for n in "qkv"), (f"{blocks}/qkv/kernel",), kernel(parts=3)),
        Rule(tuple(f"{layer}.self_attn.{n}_proj.bias" for n in "qkv"), (f"{blocks}/qkv/bias",), vector(parts=3)),
        *norm(f"{layer}.layer_norm1", f"{blocks}/attn_norm"),
        *linear(f"{layer}.self_attn.out_proj", f"{blocks}/attn_out", in_dims=2),
        *norm(f"{layer}.layer_norm2", f"{blocks}/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{blocks}/mlp_in"),
        *linear(f"{layer}.mlp.fc2", f"{blocks}/mlp_out"),
    ]


def _clip_text(target: str = "") -> tuple[Rule, ...]:
    embeddings = "text_model.embeddings"
    return (
        Rule((f"{embeddings}.token_embedding.weight",), (f"{target}token_embedding",), array()),
        Rule((f"{embeddings}.position_embedding.weight",), (f"{target}position_embedding",), array()),
        *_clip_blocks("text_model", target),
        *norm("text_model.final_layer_norm", f"{target}final_norm"),
    )


CLIP_RULES: tuple[Rule, ...] = _clip_text()

CLIP_PAIR_RULES: tuple[Rule, ...] = (
    *_clip_text("text/"),
    Rule(("vision_model.embeddings.class_embedding",), ("image/class_embedding",), vector()),
    Rule(("vision_model.embeddings.patch_embedding.weight",), ("image/patch_embedding/kernel",), conv()),
    Rule(("vision_model.embeddings.position_embedding.weight",), ("image/position_embedding",), array()),
    *norm("vision_model.pre_layrnorm", "image/first_norm"),  # misspelt in the release
    *_clip_blocks("vision_model", "image/"),
    *norm("vision_model.post_layernorm", "image/final_norm"),
    Rule(("visual_projection.weight",), ("image_projection/kernel",), kernel()),
    Rule(("text_projection.weight",), ("text_projection/kernel",), kernel()),
)
