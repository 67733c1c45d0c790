"""Adapters as input of the commands: those of another base or of none are refused, and what is left out is told."""

import dataclasses
import json

import numpy as np
import pytest

from shortcut_jax import command, convert, sample
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.runtime import exported
from shortcut_jax.sources import abstract_params, open_lora, open_models
from shortcut_jax.text_to_image import TextToImage
from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.lora_files import to_peft
from shortcut_jax.weights.rules import ConversionError, to_torch
from tests.weights.lora_cases import CFG, random_modules

OTHERS = {"lora_te1_text_model.lora_down.weight": np.ones((2, 3), "f")}


def _shapes(config):
    return {k: v.shape for k, v in flat_paths(abstract_params("flux", config)).items()}


def _fails(main, capfd, *argv):
    with pytest.raises(SystemExit) as stop:
        command.run(main, ["main", *map(str, argv)])
    assert stop.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def _base(folder, config):
    folder.mkdir()
    zeros = {k: np.zeros(v, np.float32) for k, v in _shapes(config).items()}
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": config.axes}))
    exported.write_tensors(folder / "flux.safetensors", to_torch(zeros, flux_bfl.RULES), {})
    return folder / "flux.safetensors"


def test_a_converted_lora_is_compared_with_the_base_that_is_given(tmp_path, capfd):
    base = _base(tmp_path / "base", CFG)
    other = _base(tmp_path / "other", dataclasses.replace(CFG, text_width=48))
    short = _base(tmp_path / "short", dataclasses.replace(CFG, single_blocks=1))
    exported.write_tensors(tmp_path / "lora.safetensors", *to_peft(random_modules(_shapes(CFG))))
    argv = ["convert", f"--from={tmp_path}/lora.safetensors", f"--to={tmp_path}/orbax", f"--base={base}"]
    assert convert.main(argv) == 0
    source, target = f"--from={tmp_path}/orbax", f"--to={tmp_path}/x.safetensors"
    for form in ("comfy", "diffusers"):
        fails = lambda given, form=form: _fails(convert.main, capfd, source, target, f"--format={form}", given)
        assert "the adapter of context_embedder maps 64 channels to 32, the base's layer 48" in fails(f"--base={other}")
        assert "single_transformer_blocks.1" in fails(f"--base={short}")
    assert not (tmp_path / "x.safetensors").exists()
    assert convert.main(["convert", source, target, "--format=comfy", f"--base={base}"]) == 0


def test_adapters_of_text_encoders_alone_are_refused(tmp_path, capfd):
    exported.write_tensors(tmp_path / "te.safetensors", OTHERS, {})
    with pytest.raises(ConversionError, match="adapts no layer of the transformer: 1 tensors of text encoder adapters"):
        open_lora(tmp_path / "te.safetensors", CFG)
    base = _base(tmp_path / "base", CFG)
    argv = (f"--from={base}", f"--lora={tmp_path}/te.safetensors", f"--to={tmp_path}/x")
    assert "adapts no layer of the transformer" in _fails(convert.main, capfd, *argv)
    assert not (tmp_path / "x").exists()


def test_sampling_tells_what_is_left_out_of_an_adapter(converted_folder, tmp_path, capfd, monkeypatch):
    (flux,) = [m for m in open_models(converted_folder) if m.kind == "flux"]
    tensors, _ = to_peft(random_modules({k: s.shape for k, s in flux.specs.items()}))
    exported.write_tensors(tmp_path / "lora.safetensors", tensors | OTHERS, {})
    argv = [f"--checkpoint={converted_folder}", "--prompt=a red cat", f"--lora={tmp_path}/lora.safetensors"]
    size = ["--height=16", "--width=24", "--steps=1", f"--out={tmp_path}/x.png"]
    for scale in ("nan", "inf"):
        assert "but must be finite" in _fails(sample.main, capfd, *argv, *size, f"--lora_scale={scale}")
        with pytest.raises(ValueError, match="must be finite"):
            TextToImage(converted_folder, loras=[(tmp_path / "lora.safetensors", float(scale))])
    assert sample.main(["sample", *argv, *size]) == 0
    assert "note: 1 tensors of text encoder adapters are left out" in capfd.readouterr().err
