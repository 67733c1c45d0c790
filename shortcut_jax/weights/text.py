"""The tables of the text encoders in `transformers` checkpoints: T5's encoder and CLIP's text tower."""

from shortcut_jax.weights.rules import Rule, linear, norm
from shortcut_jax.weights.transforms import array, kernel, vector

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

_CLIP = "text_model.encoder.layers.{i}"


CLIP_RULES: tuple[Rule, ...] = (
    Rule(("text_model.embeddings.token_embedding.weight",), ("token_embedding",), array()),
    Rule(("text_model.embeddings.position_embedding.weight",), ("position_embedding",), array()),
    Rule(tuple(f"{_CLIP}.self_attn.{n}_proj.weight" for n in "qkv"), ("encoder_blocks/qkv/kernel",), kernel(parts=3)),
    Rule(tuple(f"{_CLIP}.self_attn.{n}_proj.bias" for n in "qkv"), ("encoder_blocks/qkv/bias",), vector(parts=3)),
    *norm(f"{_CLIP}.layer_norm1", "encoder_blocks/attn_norm"),
    *linear(f"{_CLIP}.self_attn.out_proj", "encoder_blocks/attn_out", in_dims=2),
    *norm(f"{_CLIP}.layer_norm2", "encoder_blocks/mlp_norm"),
    *linear(f"{_CLIP}.mlp.fc1", "encoder_blocks/mlp_in"),
    *linear(f"{_CLIP}.mlp.fc2", "encoder_blocks/mlp_out"),
    *norm("text_model.final_layer_norm", "final_norm"),
)
