"""Adapters as input of the commands: those of another base or of none are refused, and what is left out is told."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from shortcut_jax import app, cli, convert, evaluate, sample
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError
from shortcut_jax.evaluation.subjects import ConvertedSubject
from shortcut_jax.formats import export
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.models.presets import preset
from shortcut_jax.run.start_from import open_initial
from shortcut_jax.sources.models import abstract_params, open_lora, open_loras, open_models
from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.lora import Merged
from shortcut_jax.weights.lora_files import to_peft
from tests.helpers import BOTH_BLOCKS, POST_TRAINING, tiny_assembly, to_torch
from tests.weights.lora_cases import CFG, random_modules

OTHERS = {"lora_te1_text_model.lora_down.weight": np.ones((2, 3), "f")}


def _shapes(config):
    return {k: v.shape for k, v in flat_paths(abstract_params("flux", config)).items()}


def _fails(main, capfd, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["main", *map(str, argv)])
    assert stop.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def _base(folder, config):
    folder.mkdir()
    zeros = {k: np.zeros(v, np.float32) for k, v in _shapes(config).items()}
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": config.axes}))
    export.write_tensors(folder / "flux.safetensors", to_torch(zeros, flux_bfl.RULES), {})
    return folder / "flux.safetensors"


def test_a_converted_lora_is_compared_with_the_base_that_is_given(tmp_path, capfd):
    base = _base(tmp_path / "base", CFG)
    other = _base(tmp_path / "other", dataclasses.replace(CFG, text_width=48))
    short = _base(tmp_path / "short", dataclasses.replace(CFG, single_blocks=1))
    export.write_tensors(tmp_path / "lora.safetensors", *to_peft(random_modules(_shapes(CFG))))
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
    export.write_tensors(tmp_path / "te.safetensors", OTHERS, {})
    with pytest.raises(ConversionError, match="adapts no layer of the transformer: 1 tensors of text encoder adapters"):
        open_lora(tmp_path / "te.safetensors", CFG)
    base = _base(tmp_path / "base", CFG)
    argv = (f"--from={base}", f"--lora={tmp_path}/te.safetensors", f"--to={tmp_path}/x")
    assert "adapts no layer of the transformer" in _fails(convert.main, capfd, *argv)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def _served(folder, loras):
    """As the web page opens it."""
    return app.open_studio(SimpleNamespace(checkpoint=folder, loras=loras, max_size=1024, matmul_dtype=None))


@pytest.mark.slow
def test_sampling_tells_what_is_left_out_of_an_adapter(converted_folder, tmp_path, capfd, monkeypatch):
    (flux,) = [m for m in open_models(converted_folder) if m.kind == "flux"]
    tensors, _ = to_peft(random_modules({k: s.shape for k, s in flux.specs.items()}))
    export.write_tensors(tmp_path / "lora.safetensors", tensors | OTHERS, {})
    argv = [f"--checkpoint={converted_folder}", "--prompt=a red cat", f"--lora={tmp_path}/lora.safetensors"]
    size = ["--height=16", "--width=24", "--steps=1", f"--out={tmp_path}/x.png"]
    for scale in ("nan", "inf"):
        assert "but must be finite" in _fails(sample.main, capfd, *argv, *size, f"--lora_scale={scale}")
        with pytest.raises(ValueError, match="must be finite"):
            TextToImage(converted_folder, loras=[(tmp_path / "lora.safetensors", float(scale))])
    assert sample.main(["sample", *argv, *size]) == 0
    assert "note: 1 tensors of text encoder adapters are left out" in capfd.readouterr().err
    # So do judging and the page.
    for open_pipeline in (
        lambda loras: ConvertedSubject(converted_folder, ["a cat"], 8, {"height": 16, "width": 16}, loras),
        lambda loras: _served(converted_folder, loras),
    ):
        open_pipeline([(tmp_path / "lora.safetensors", 1.0)])
        err = capfd.readouterr().err
        assert "note: 1 tensors of text encoder adapters are left out" in err and "note: alpha: the rank of" in err


def test_every_command_refuses_an_adapter_that_is_not_finite_in_one_line(converted_folder, tmp_path, capfd):
    (flux,) = [m for m in open_models(converted_folder) if m.kind == "flux"]
    tensors, _ = to_peft(random_modules({k: s.shape for k, s in flux.specs.items()}, keep=lambda n: n == "proj_out"))
    name = "transformer.proj_out.lora_B.weight"
    lora = tmp_path / "lora.safetensors"
    export.write_tensors(lora, tensors | {name: tensors[name] * np.nan}, {})
    base, to = f"--from={converted_folder}", f"--to={tmp_path}/out"
    model, out = f"--checkpoint={converted_folder}", f"--out={tmp_path}/out"
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for main, *argv in (
        (convert.main, f"--from={lora}", to, f"--base={converted_folder}"),
        (convert.main, base, to, f"--lora={lora}"),
        (sample.main, model, f"--lora={lora}", "--prompt=a cat", out),
        (evaluate.main, model, f"--lora={lora}", f"--prompts={tmp_path}/prompts.txt", out),
    ):
        size, line = f"{tensors[name].size:,}", _fails(main, capfd, *argv)
        assert f"{name} has {size} of {size} values that are NaN or infinite" in line, argv
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["lora.safetensors", "prompts.txt"]
    with pytest.raises(ConversionError, match=f"^{name} has"):
        _served(converted_folder, [(lora, 1.0)])


@pytest.mark.parametrize("name", ["init_from", "teacher_lora"])
def test_training_refuses_an_adapter_that_is_not_finite(name, tmp_path):
    base = _base(tmp_path / "base", preset("tiny"))
    tensors, _ = to_peft(random_modules(_shapes(preset("tiny"))))
    tensors["transformer.proj_out.lora_A.weight"][0, 0] = np.inf
    export.write_tensors(tmp_path / "lora.safetensors", tensors, {})
    given = {"init_from": str(base), name: str(tmp_path / "lora.safetensors")}
    given |= {"base": str(base)} if name == "init_from" else {}
    assembly = tiny_assembly(**BOTH_BLOCKS, **POST_TRAINING | given)
    with pytest.raises(ConversionError, match=r"proj_out\.lora_A\.weight has 1 of 96 values that are NaN or infinite"):
        open_initial(assembly)


def test_several_adapters_are_sampled_as_one_sum_as_they_are_converted(converted_folder, tmp_path):
    (flux,) = [m for m in open_models(converted_folder) if m.kind == "flux"]
    shapes = {k: s.shape for k, s in flux.specs.items()}
    loras = []
    for i, scale in enumerate((0.5, -1.25)):
        modules = random_modules(shapes, rank=2 + i, seed=i, keep=lambda n, i=i: i == 0 or "to_" in n)
        export.write_tensors(tmp_path / f"{i}.safetensors", *to_peft(modules))
        loras.append((tmp_path / f"{i}.safetensors", scale))
    modules, _ = open_loras(loras, flux.config)
    merged, sampled = Merged(flux.params, modules, shapes), TextToImage(converted_folder, loras=loras).models["flux"]
    for path in ("double_blocks/img_attn/qkv/kernel", "single_blocks/mlp_out/kernel", "img_in/kernel"):
        assert np.array_equal(merged[path], sampled.params[path]) and not np.array_equal(
            merged[path], flux.params[path]
        )
