"""PEFT's configs: what they say is used, refused or named, and only for the adapter they belong to."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.safetensors import LazyTensors
from shortcut_jax.sources import models
from shortcut_jax.sources.models import open_lora
from shortcut_jax.weights import flux_diffusers
from shortcut_jax.weights.lora_files import METADATA_KEY, to_peft
from tests.helpers import to_torch
from tests.weights.lora_cases import CFG, random_modules


@pytest.fixture(autouse=True)
def known_shapes(shapes, monkeypatch):
    """Those of the base, which take a second to trace."""
    monkeypatch.setattr(models, "param_shapes", lambda kind, config: shapes)


def _folder(folder, shapes, config, name="adapter_model.safetensors", metadata=None, **tensors):
    folder.mkdir(exist_ok=True)
    own, _ = to_peft(random_modules(shapes, rank=4, keep=lambda n: n == "proj_out"))
    own = {k.replace("transformer.", "base_model.model.", 1): np.ascontiguousarray(v) for k, v in own.items()}
    save_file(own | tensors, folder / name, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "init_lora_weights": "gaussian", "bias": "none"}


def _read(path):
    modules, notes = open_lora(path, CFG)
    return modules["proj_out"].scale, notes


def test_a_config_is_that_of_its_own_adapter_only_and_the_output_says_where_alpha_comes_from(shapes, tmp_path):
    folder = _folder(tmp_path / "peft", shapes, PLAIN)
    applied = (8.0, ("alpha: from adapter_config.json",))
    assert _read(folder) == _read(folder / "adapter_model.safetensors") == applied
    # Another LoRA in the same folder is not the one that the config tells of.
    _folder(folder, shapes, None, "style.safetensors")
    assert _read(folder / "style.safetensors") == (
        1.0,
        (
            "adapter_config.json beside style.safetensors is not used: it belongs to adapter_model.safetensors",
            "alpha: the rank of each module, for the file does not say",
        ),
    )
    left = "style.safetensors is left out: the adapter of a PEFT folder is adapter_model.safetensors"
    assert _read(folder) == (8.0, (left, "alpha: from adapter_config.json"))
    header = {METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in PLAIN.items()})}
    _folder(tmp_path / "header", shapes, None, "lora.safetensors", header)
    told = (f"alpha: from {METADATA_KEY} in the file's header",)
    assert _read(tmp_path / "header" / "lora.safetensors") == (8.0, told)
    alpha = {"base_model.model.proj_out.alpha": np.full((), 2.0, "f")}
    assert _read(_folder(tmp_path / "tensors", shapes, PLAIN, **alpha)) == (
        0.5,
        ("alpha: from the file's alpha tensors",),
    )
    two, _ = to_peft(random_modules(shapes, keep=lambda n: n in ("proj_out", "x_embedder")))
    two["transformer.proj_out.alpha"] = np.full(1, 6.0, "f")
    save_file({k: np.ascontiguousarray(v) for k, v in two.items()}, tmp_path / "two.safetensors")
    rest = "alpha: from the file's alpha tensors; of 1 modules without one: the rank of each module, for the file does"
    scale, (note,) = _read(tmp_path / "two.safetensors")
    assert scale == 2.0 and note.startswith(rest)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"peft_type": "LOKR"}, "adapter_config.json says peft_type 'LOKR', which is not supported"),
        ({"use_dora": True}, "this adapter is DoRA"),
        ({"lora_bias": True}, r"LoRA with biases \(lora_bias\)"),
        ({"bias": "lora_only"}, "trained the base's biases too .*bias 'lora_only'"),
        ({"modules_to_save": ["proj_out"]}, "whole layers that were trained"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"init_lora_weights": "pissa"}, "started from PiSSA .*path_initial_model_for_weight_conversion=START"),
        ({"init_lora_weights": "pissa_niter_16"}, "started from PiSSA"),
        ({"init_lora_weights": "olora"}, "started from OLoRA"),
        ({"init_lora_weights": "corda"}, "started from CorDA"),
        ({"init_lora_weights": "lora_ga"}, "started from LoRA-GA"),
        ({"init_lora_weights": "loftq"}, "started from LoftQ .*quantises the base"),
        ({"r": 8}, "says that proj_out has rank 8, but its factors have 4: it is the config of another adapter"),
        ({"r": 0}, "says that proj_out has rank 0"),
        ({"r": -4}, "says that proj_out has rank -4"),
        ({"rank_pattern": {"proj_out": 2}}, "says that proj_out has rank 2"),
        ({"lora_alpha": 0}, "the alpha of proj_out is 0, so that its adapter would do nothing"),
        ({"lora_alpha": float("nan")}, "says lora_alpha nan, which is not a number"),
        ({"alpha_pattern": {"proj_out": float("inf")}}, "says proj_out inf, which is not a number"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_what_a_config_asks_for_and_is_not_done_is_refused(entry, message, place, shapes, tmp_path):
    config = PLAIN | entry
    header = {METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    where = (config, "adapter_model.safetensors", None) if place == "beside" else (None, "lora.safetensors", header)
    with pytest.raises(
        ConversionError, match=message.replace("adapter_config.json", "" if place == "header" else ".*")
    ):
        open_lora(_folder(tmp_path, shapes, *where), CFG)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_other_starts_leave_the_base_as_it_is(start, shapes, tmp_path):
    assert _read(_folder(tmp_path, shapes, PLAIN | {"init_lora_weights": start}))[0] == 8.0


def test_entries_that_change_nothing_are_named(shapes, tmp_path):
    config = PLAIN | {"fan_in_fan_out": True, "init_lora_weights": "newest", "rank_pattern": {"proj_out": 4}, "r": 16}
    scale, notes = _read(_folder(tmp_path, shapes, config))
    assert scale == 8.0 and "fan_in_fan_out of adapter_config.json is not used: Flux has linear layers only" in notes
    assert any("init_lora_weights 'newest' of adapter_config.json is not known" in note for note in notes)


def test_an_adapter_of_pissa_converted_as_the_message_says_fits_the_base(params, shapes, tmp_path):
    """By PEFT itself: the trained weights are the base's and the converted adapter, not those and the trained one."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    name = "transformer_blocks.1.attn.to_q"
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=[name])
    base = to_torch(params, flux_diffusers.RULES)[f"{name}.weight"]
    module = torch.nn.Linear(*base.shape[::-1], bias=False)
    module.weight.data = torch.from_numpy(np.array(base))
    for part in reversed(name.split(".")):
        module = torch.nn.ModuleDict({part: module})
    model = get_peft_model(module, config)
    layer = model.base_model.model.get_submodule(name)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for half in (layer.lora_A, layer.lora_B):
            half["default"].weight.add_(0.1 * torch.randn_like(half["default"].weight))
    trained = (layer.base_layer.weight + layer.get_delta_weight("default")).detach().numpy()
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(ConversionError, match="started from PiSSA"):
        open_lora(tmp_path / "trained", CFG)
    (f,) = open_lora(tmp_path / "plain", CFG)[0].values()
    np.testing.assert_allclose(base + f.scale * f.up @ f.down, trained, atol=1e-5)
    stored = LazyTensors([tmp_path / "trained" / "adapter_model.safetensors"])
    down, up = (stored[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    assert np.abs(base + 2.0 * up @ down - trained).max() > 0.1
