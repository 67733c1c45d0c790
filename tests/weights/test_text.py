import jax
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.clip import ClipConfig, ClipPair, ClipPairConfig, ClipText
from shortcut_jax.models.t5 import T5Config, T5Encoder
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.weights.rules import nest
from shortcut_jax.weights.text import CLIP_PAIR_RULES, CLIP_RULES, T5_RULES
from tests.helpers import relative, to_flax, to_torch

T5 = T5Config(vocab=60, width=32, blocks=3, heads=4, head_size=6, hidden=40)
CLIP = ClipConfig(vocab=80, width=32, blocks=2, heads=4, hidden=64, max_tokens=20)
PAIR = ClipPairConfig(
    joint=24,
    side=28,
    patch=7,
    image_width=48,
    image_blocks=3,
    image_heads=4,
    image_hidden=40,
    vocab=80,
    text_width=32,
    text_blocks=2,
    text_heads=4,
    text_hidden=64,
    max_tokens=20,
)


def _randomize(model):
    """Visible values in every weight, norms around one."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def _t5():
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    geometry = dict(vocab_size=T5.vocab, d_model=T5.width, d_kv=T5.head_size, d_ff=T5.hidden, num_layers=T5.blocks)
    return _randomize(T5EncoderModel(TheirConfig(**geometry, num_heads=T5.heads, feed_forward_proj="gated-gelu")))


def _clip(end_token):
    from transformers import CLIPTextConfig, CLIPTextModel

    geometry = dict(vocab_size=CLIP.vocab, hidden_size=CLIP.width, intermediate_size=CLIP.hidden)
    depth = dict(num_hidden_layers=CLIP.blocks, num_attention_heads=CLIP.heads, max_position_embeddings=CLIP.max_tokens)
    return _randomize(CLIPTextModel(CLIPTextConfig(**geometry, **depth, bos_token_id=0, eos_token_id=end_token)))


def clip_pair(cfg, end_token=2):
    """transformers' CLIPModel with random weights; the released one says 2 for its end token."""
    from transformers import CLIPConfig, CLIPModel

    words = dict(vocab_size=cfg.vocab, hidden_size=cfg.text_width, intermediate_size=cfg.text_hidden)
    words |= dict(num_hidden_layers=cfg.text_blocks, num_attention_heads=cfg.text_heads)
    words |= dict(max_position_embeddings=cfg.max_tokens, bos_token_id=0, eos_token_id=end_token)
    image = dict(hidden_size=cfg.image_width, intermediate_size=cfg.image_hidden, num_hidden_layers=cfg.image_blocks)
    image |= dict(num_attention_heads=cfg.image_heads, image_size=cfg.side, patch_size=cfg.patch)
    config = CLIPConfig(text_config=words, vision_config=image, projection_dim=cfg.joint)
    return _randomize(CLIPModel(config))


def _weights(model, prefix=""):
    weights = {f"{prefix}{k}": v.numpy() for k, v in model.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)  # T5's tied copy, which files do not hold
    return weights


def _shapes(model, length=5):
    init = lambda key: model.init(key, np.zeros((1, length), np.int32))
    return {k: v.shape for k, v in flat_paths(jax.eval_shape(init, jax.random.key(0))["params"]).items()}


@pytest.mark.parametrize("length", [7, 150])
def test_t5_states_equal_the_reference(length, highest_precision):
    import torch

    reference, model = _t5(), T5Encoder(T5)
    params = nest(to_flax(_weights(reference), T5_RULES, _shapes(model)))
    ids = np.random.default_rng(0).integers(0, T5.vocab, (2, length))
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    actual = model.apply({"params": params}, ids)
    assert relative(actual, expected) <= 1e-5
    # Positions matter: the same tokens in another order are other states, not the same ones moved.
    assert relative(model.apply({"params": params}, ids[:, ::-1])[:, ::-1], expected) > 1e-2


@pytest.mark.parametrize("end_token", [2, 9])
def test_clip_states_and_pooled_vector_equal_the_reference(end_token, highest_precision):
    import torch

    reference = _clip(end_token)
    # Releases whose config says 2 find the end as the largest id.
    model = ClipText(ClipConfig(**{**vars(CLIP), "end_token": None if end_token == 2 else end_token}))
    params = nest(to_flax(_weights(reference, "text_model."), CLIP_RULES, _shapes(model)))
    end = CLIP.vocab - 1 if end_token == 2 else end_token
    ids = np.random.default_rng(0).integers(10, CLIP.vocab - 1, (2, 12))
    ids[0, 5:], ids[1, 9:] = end, end
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(ids))
    actual = model.apply({"params": params}, ids)
    assert relative(actual.states_BMD, expected.last_hidden_state.numpy()) <= 1e-5
    assert relative(actual.pooled_BD, expected.pooler_output.numpy()) <= 1e-5
    np.testing.assert_array_equal(actual.pooled_BD, actual.states_BMD[[0, 1], [5, 9]])


def test_embeddings_of_both_clip_towers_equal_the_reference(highest_precision):
    import torch

    reference, shapes = clip_pair(PAIR), param_shapes("clip_score", PAIR)
    weights = _weights(reference)
    weights.pop("logit_scale")
    params = nest(to_flax(weights, CLIP_PAIR_RULES, shapes))
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, PAIR.side, PAIR.side, 3), np.float32)
    ids = rng.integers(3, PAIR.vocab - 1, (2, 12))
    ids[0, 5:], ids[1, 9:] = PAIR.vocab - 1, PAIR.vocab - 1
    with torch.no_grad():
        image = reference.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).pooler_output.numpy()
        words = reference.get_text_features(torch.from_numpy(ids)).pooler_output.numpy()
    images, texts = ClipPair(PAIR).apply({"params": params}, pixels, ids)
    assert images.shape == texts.shape == (2, PAIR.joint)
    assert relative(images, image) <= 1e-5 and relative(texts, words) <= 1e-5
    back = to_torch(to_flax(weights, CLIP_PAIR_RULES, shapes), CLIP_PAIR_RULES)
    assert back.keys() == weights.keys() and all(np.array_equal(back[k], weights[k]) for k in weights)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_there_and_back_is_the_identity(name):
    reference, model, rules = (
        (_t5(), T5Encoder(T5), T5_RULES) if name == "t5" else (_clip(2), ClipText(CLIP), CLIP_RULES)
    )
    weights = _weights(reference, "" if name == "t5" else "text_model.")
    back = to_torch(to_flax(weights, rules, _shapes(model)), rules)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[k], weights[k]) for k in weights)
