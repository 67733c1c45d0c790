import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax import cli, convert, train
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConfigError, ConversionError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import write_params
from shortcut_jax.formats.to_devices import place
from shortcut_jax.models.presets import preset
from shortcut_jax.run.start_from import open_initial, start
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.runtime.sharding import MeshShape, make_mesh
from shortcut_jax.sources.models import abstract_params
from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.lora_files import to_peft
from tests.helpers import BOTH_BLOCKS, LET_GO, POST_TRAINING, Watched, tiny_assembly, to_torch
from tests.weights.lora_cases import random_modules


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same tiny transformer as a PyTorch file and as a converted folder, and its parameters."""
    folder = tmp_path_factory.mktemp("sources")
    shapes = flat_paths(abstract_params("flux", preset("tiny")))
    rng = np.random.default_rng(0)
    params = {k: 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}
    params = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": preset("tiny").axes}))
    export.write_tensors(folder / "flux.safetensors", to_torch(params, flux_bfl.RULES), {})
    argv = ["convert", f"--from={folder}/flux.safetensors", f"--to={folder}/orbax"]
    assert convert.main(argv) == 0
    return folder, params


@pytest.mark.parametrize("name", ["flux.safetensors", "orbax"])
def test_weights_arrive_on_a_mesh_shard_by_shard_in_the_dtype_of_the_run(sources, name):
    folder, params = sources
    assembly = tiny_assembly(8, **BOTH_BLOCKS, init_from=str(folder / name), mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    state = start(assembly, open_initial(assembly))[0]
    for tree in (state.params, state.ema.fast, state.ema.slow):
        for path, value in flat_paths(tree).items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, params[path].astype("f"), err_msg=path)
    shapes = flat_paths(assembly.state_shapes.params)
    qkv = flat_paths(state.params)["double_blocks/img_attn/qkv/kernel"]
    assert qkv.sharding == shapes["double_blocks/img_attn/qkv/kernel"].sharding
    assert qkv.addressable_shards[0].data.size == qkv.size // 8
    assert int(state.step) == 0


def test_placing_holds_one_tensor_on_the_host_at_a_time():
    mesh = make_mesh(MeshShape(1, 8, 1))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    watched = Watched([f"p{i}" for i in range(20)], lambda name: np.ones((64, 64), np.float32))
    placed = place(watched, {k: jax.ShapeDtypeStruct((64, 64), np.float32, sharding=sharding) for k in watched})
    assert len(placed) == 20 and watched.most <= LET_GO
    assert placed["p3"].addressable_shards[0].data.shape == (8, 64)


def test_a_shortcut_model_starts_from_flux_with_a_fresh_step_embedding(sources):
    folder, params = sources
    assembly = tiny_assembly(**BOTH_BLOCKS, init_from=str(folder / "orbax"), objective="shortcut")
    loaded = flat_paths(start(assembly, open_initial(assembly))[0].params)
    assert {k for k in loaded if k not in params} == {k for k in loaded if k.startswith("step_in/")}
    assert not np.any(loaded["step_in/out_layer/kernel"]) and np.any(loaded["step_in/in_layer/kernel"])
    assert loaded.keys() == flat_paths(assembly.state_shapes.params).keys()


@pytest.mark.parametrize("trained_part", ["all", "lora"])
def test_weights_that_are_not_finite_are_named_before_the_first_step(sources, tmp_path, trained_part):
    folder, params = sources
    broken = params | {"img_in/kernel": np.full_like(params["img_in/kernel"], np.inf)}
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": preset("tiny").axes}))
    file = tmp_path / "bad.safetensors"
    export.write_tensors(file, to_torch(broken, flux_bfl.RULES), {})
    shared = {"objective": "flow"} if trained_part == "all" else POST_TRAINING
    assembly = tiny_assembly(**{**BOTH_BLOCKS, **shared, "init_from": str(file)})
    with pytest.raises(ConversionError, match=f"^flux of {file}: img_in.weight has .* that are NaN or infinite"):
        start(assembly, open_initial(assembly))
    write_params(tmp_path / "orbax" / "flux", broken.items())
    shutil.copy(folder / "orbax" / "models.json", tmp_path / "orbax")
    assembly = tiny_assembly(**{**BOTH_BLOCKS, **shared, "init_from": str(tmp_path / "orbax")})
    with pytest.raises(ConversionError, match=f"^flux of {tmp_path}/orbax: img_in/kernel has values that are NaN or"):
        start(assembly, open_initial(assembly))


@pytest.mark.parametrize("name", ["init_from", "teacher_lora"])
def test_adapters_that_are_not_finite_are_named_with_their_file(sources, tmp_path, name):
    folder, params = sources
    tensors, notes = to_peft(random_modules({k: v.shape for k, v in params.items()}))
    bad = next(iter(tensors))
    file = tmp_path / "lora.safetensors"
    export.write_tensors(file, tensors | {bad: tensors[bad] * np.nan}, notes)
    given = {"init_from": None, "base": str(folder / "orbax"), name: str(file)}
    assembly = tiny_assembly(**{**BOTH_BLOCKS, **POST_TRAINING, **given})
    with pytest.raises(ConversionError, match=f"^{name}={file}: {bad} has .* values that are NaN or infinite"):
        open_initial(assembly)


@pytest.mark.slow
def test_training_starts_from_a_workdir_and_resumes_without_it(
    trained, tmp_path, arguments, no_end, capfd, monkeypatch
):
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: device)
    quiet = {"eval__views": "()", "eval__images": "()", "objective": "flow", "init_from": str(trained)}
    small = {**quiet, **BOTH_BLOCKS, "optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0, "steps": 2}
    assert train.main(arguments(tmp_path / "run", "--stop_at=1", **small)) == 0
    assert f"starting from: slow weights of step 4 in {trained}" in capfd.readouterr().err
    shapes = tiny_assembly(student_steps=(1, 2, 4), **BOTH_BLOCKS).state_shapes.params
    old = Checkpoints(trained / "checkpoints", read_only=True).restore(4, {"slow": shapes})["slow"]
    new = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).restore(1, {"params": shapes})["params"]
    for path, value in flat_paths(old).items():
        np.testing.assert_array_equal(flat_paths(new)[path], value, err_msg=path)
    assert train.main(arguments(tmp_path / "run", **small)) == 0
    assert "starting from" not in capfd.readouterr().err


TRIMMED = dict(data__store="latents", data__text_encoder="stored", data__text_states="trimmed", data__stride=2)


def test_what_cannot_start_a_run_is_one_clear_line_before_anything_is_written(sources, tmp_path, arguments, capfd):
    folder, _ = sources
    shapes = {k: v.shape for k, v in flat_paths(abstract_params("flux", preset("tiny"))).items()}
    export.write_tensors(tmp_path / "lora.safetensors", *to_peft(random_modules(shapes)))
    cases = (
        ({"init_from": str(tmp_path / "nowhere")}, "is not found"),
        ({"init_from": str(tmp_path / "lora.safetensors")}, "is a LoRA, but train=all: set train=lora"),
        (
            {"init_from": str(folder / "orbax"), "model__double_blocks": 1},
            "checkpoint -> config: double_blocks: 2 -> 1",
        ),
        (
            {"init_from": str(folder / "orbax"), **TRIMMED},
            "trained on full text states, but data.text_states=trimmed: prepare the set with --text_states=full",
        ),
    )
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            open_initial(tiny_assembly(**{**BOTH_BLOCKS, **changes}))
    (tmp_path / "flux.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(SystemExit):
        cli.run(train.main, arguments(tmp_path / "run", init_from=str(tmp_path / "flux.safetensors"), mesh__data=8))
    assert "cut off or not a safetensors file" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
