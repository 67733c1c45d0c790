import jax
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.clip import ClipConfig, ClipText
from shortcut_jax.models.t5 import T5Config, T5Encoder
from shortcut_jax.weights.rules import nest, to_flax, to_torch
from shortcut_jax.weights.text import CLIP_RULES, T5_RULES
from tests.helpers import relative

T5 = T5Config(vocab=60, width=32, blocks=3, heads=4, head_size=6, hidden=40)
CLIP = ClipConfig(vocab=80, width=32, blocks=2, heads=4, hidden=64, max_tokens=20)


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


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_there_and_back_is_the_identity(name):
    reference, model, rules = (
        (_t5(), T5Encoder(T5), T5_RULES) if name == "t5" else (_clip(2), ClipText(CLIP), CLIP_RULES)
    )
    weights = _weights(reference, "" if name == "t5" else "text_model.")
    back = to_torch(to_flax(weights, rules, _shapes(model)), rules)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[k], weights[k]) for k in weights)
