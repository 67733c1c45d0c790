"""A whole Flux pipeline in miniature, as diffusers writes it: random weights, tokenizers made on the spot."""

import json

from shortcut_jax.formats.inference_checkpoint import Stored, complete_or_absent, write_params, write_record
from shortcut_jax.formats.tokenizers import LAYOUTS, copy_tokenizer
from shortcut_jax.sources import models
from shortcut_jax.weights.params import Cast

CLIP_TOKENS = 16
"""Positions of the small CLIP: a prompt of a few words is cut, as one beyond 77 tokens is by the released one."""

TEXT = "a cat dog red blue green small large photo of the on with seven two handwritten digit in and holding"
WORDS = TEXT.split()


def make_pipeline(folder, guidance=True):
    """Saves a FluxPipeline: FLUX.1 dev in kind with `guidance`, else FLUX.1 schnell.

    16 latent channels (64 packed) and an autoencoder of two levels, so that a latent spans 2 pixels each way.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0 if guidance else 1)
    shift = dict(shift=3.0, use_dynamic_shifting=True) if guidance else dict(shift=1.0)
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=_randomize(_vae()),
        text_encoder=_randomize(_clip(len(clip_tokenizer))),
        tokenizer=clip_tokenizer,
        text_encoder_2=_randomize(_t5(len(t5_tokenizer) + 4)),  # the released table is longer than its vocabulary too
        tokenizer_2=t5_tokenizer,
        transformer=_randomize(_transformer(guidance)),
    )
    pipeline.save_pretrained(folder)
    _as_released(folder / "tokenizer")
    return folder


def convert_pipeline(source, target, dtype=None):
    """Writes a pipeline as a converted folder, in the dtype it has by default."""
    opened = models.open_models(source)
    with complete_or_absent(target, overwrite=False) as partial:
        for model in opened:
            params = model.params if dtype is None else Cast(model.params, dtype)
            write_params(partial / model.kind, params.items())
        for name in LAYOUTS:
            copy_tokenizer(source / name, partial / name)
        stored = [Stored(m.kind, m.config, m.origin, partial / m.kind) for m in opened]
        write_record(partial, stored, models.sampling_of(source, opened))
    return target


def _randomize(model):
    """Visible values in every weight, norms around one; sums over inputs keep their size."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
            else:
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                p.copy_(around + 0.1 * torch.randn_like(p))
    return model.eval()


def _transformer(guidance):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5(vocab):
    from transformers import T5Config, T5EncoderModel

    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=vocab)
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def _clip(vocab):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocab)
    # As released: the config's end token is 2, so the end is the largest id of a row.
    config = CLIPTextConfig(**sizes, max_position_embeddings=CLIP_TOKENS, bos_token_id=0, eos_token_id=2)
    return CLIPTextModel(config)


def _clip_tokenizer():
    """Byte-level BPE that has learned to join `WORDS`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab, merges = [*letters, *(f"{c}</w>" for c in letters)], []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocab.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=CLIP_TOKENS)


def _t5_tokenizer():
    """Unigram over `WORDS` and ASCII letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(c, -8.0) for c in ("▁", *map(chr, range(33, 127)))]
    words = [(f"▁{word}", -3.0) for word in WORDS if len(word) > 1]
    return T5Tokenizer([*special, *letters, *words], extra_ids=4, model_max_length=512)


def _as_released(folder):
    """CLIP's tokenizer in the two files it is released in, instead of the one that the library writes now."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()
