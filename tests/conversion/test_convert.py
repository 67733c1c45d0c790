import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from shortcut_jax import cli, convert
from shortcut_jax.errors import ConversionError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import OrbaxParams, read_record
from shortcut_jax.formats.safetensors import LazyTensors
from shortcut_jax.sources.models import open_lora, open_models
from shortcut_jax.weights import flux_bfl, flux_diffusers
from shortcut_jax.weights.lora import Merged
from shortcut_jax.weights.lora_files import to_kohya, to_peft
from tests.helpers import BOTH_BLOCKS, relative, to_torch
from tests.weights.lora_cases import CFG, apply_flux, random_modules


@pytest.fixture(scope="module")
def params():
    from shortcut_jax.core.tree import flat_paths
    from shortcut_jax.sources.models import abstract_params

    rng = np.random.default_rng(0)
    shapes = flat_paths(abstract_params("flux", CFG))
    return {k: 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


@pytest.fixture(scope="module")
def shapes(params):
    return {k: v.shape for k, v in params.items()}


@pytest.fixture(scope="module")
def bfl(tmp_path_factory, params):
    """A file as Black Forest Labs', in bfloat16, with a config beside it that tells the small rotary axes."""
    folder = tmp_path_factory.mktemp("bfl")
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": CFG.axes}))
    tensors = to_torch({k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}, flux_bfl.RULES)
    export.write_tensors(folder / "flux.safetensors", tensors, {"format": "pt"})
    return folder / "flux.safetensors"


def _convert(*argv):
    return convert.main(["convert", *map(str, argv)])


def _fails(capfd, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(convert.main, ["convert", *map(str, argv)])
    assert stop.value.code == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def _same(one, other):
    one, other = LazyTensors([Path(one)]), LazyTensors([Path(other)])
    assert set(one) == set(other)
    for name in one:
        assert one.spec(name) == other.spec(name)
        assert one[name].tobytes() == other[name].tobytes(), name


def _with_axes(target):
    """What a Flux of head size 64 or 128 does not need: the rotary axes of this small one."""
    (Path(target).parent / "config.json").write_text(json.dumps({"axes_dims_rope": CFG.axes}))
    return target


def test_there_and_back_through_every_format_is_the_identity(bfl, tmp_path, capfd):
    assert _convert(f"--from={bfl}", f"--to={tmp_path}/orbax") == 0
    err = capfd.readouterr().err
    assert "found: Flux transformer with guidance, 2 + 2 blocks of width 32 in the layout of bfl; bfloat16" in err
    assert "100%" in err and f"wrote {tmp_path}/orbax" in err
    assert _convert(f"--from={tmp_path}/orbax", f"--to={tmp_path}/transformer", "--format=diffusers") == 0
    comfy = _with_axes(tmp_path / "comfy" / "all.safetensors") if (tmp_path / "comfy").mkdir() is None else None
    assert _convert(f"--from={tmp_path}/transformer", f"--to={comfy}", "--format=comfy") == 0
    assert all(name.startswith("model.diffusion_model.") for name in LazyTensors([comfy]))
    assert _convert(f"--from={comfy}", f"--to={tmp_path}/orbax2") == 0
    assert _convert(f"--from={tmp_path}/orbax2", f"--to={tmp_path}/back.safetensors", "--format=bfl") == 0
    _same(bfl, tmp_path / "back.safetensors")
    one, two = (OrbaxParams(tmp_path / name / "flux") for name in ("orbax", "orbax2"))
    assert set(one) == set(two)
    assert all(np.array_equal(one[k].view("u2"), two[k].view("u2")) for k in one)


def test_diffusers_loads_what_we_write_with_the_same_output(
    bfl, params, tmp_path, monkeypatch, highest_precision, exact_frequencies
):
    import torch
    from diffusers import FluxTransformer2DModel

    from tests.weights.test_lora_files import _run_reference

    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    folder = tmp_path / "transformer"
    assert _convert(f"--from={bfl}", f"--to={folder}", "--format=diffusers", "--dtype=float32") == 0
    assert len(list(folder.glob("*.safetensors"))) > 2 and list(folder.glob("*.index.json"))
    model, told = FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    rounded = {k: v.astype(ml_dtypes.bfloat16).astype("f") for k, v in params.items()}
    assert relative(apply_flux(CFG, rounded), _run_reference(model.eval())) <= 1e-5
    assert _convert(f"--from={folder}", f"--to={tmp_path}/orbax") == 0
    read = OrbaxParams(tmp_path / "orbax" / "flux")
    assert all(np.array_equal(read[k], v) for k, v in rounded.items())


@pytest.mark.slow
def test_diffusers_reads_our_single_file_at_the_released_width(tmp_path):
    """One block of each kind: diffusers' reader has Flux's width in its source."""
    import dataclasses

    import torch
    from diffusers import FluxTransformer2DModel

    from shortcut_jax.core.tree import flat_paths
    from shortcut_jax.models.presets import preset
    from shortcut_jax.sources.models import abstract_params

    cfg = dataclasses.replace(preset("flux-dev"), double_blocks=1, single_blocks=1)
    bits = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16)  # finite and small as bfloat16
    shapes = {k: v.shape for k, v in flat_paths(abstract_params("flux", cfg)).items()}
    made = {}
    for i, (k, shape) in enumerate(shapes.items()):
        made[k] = np.resize(np.roll(bits, i * 977), shape).view(ml_dtypes.bfloat16)
    folder = tmp_path / "diffusers"
    export.write_component(folder / "transformer", "flux", cfg, made, lambda n: None)
    source = folder / "transformer"
    assert _convert(f"--from={source}", f"--to={tmp_path}/flux1.safetensors", "--format=bfl") == 0
    del made
    args = dict(config=str(folder), subfolder="transformer", torch_dtype=torch.bfloat16)
    model = FluxTransformer2DModel.from_single_file(str(tmp_path / "flux1.safetensors"), **args)
    expected = LazyTensors([source / "diffusion_pytorch_model.safetensors"])
    state = model.state_dict()
    assert state.keys() == set(expected)
    for name, value in state.items():
        assert np.array_equal(value.view(torch.int16).numpy(), expected[name].view(np.int16)), name


def test_every_view_of_a_workdir_converts_in_its_own_numbers(trained, tmp_path, capfd):
    read = {}
    for view in ("online", "fast", "slow"):
        flag = [] if view == "slow" else [f"--view={view}"]  # the default
        assert _convert(f"--from={trained}", f"--to={tmp_path}/{view}", *flag) == 0
        err = capfd.readouterr().err
        assert f"found: {view} weights of step 4 in {trained}: Flux transformer without guidance" in err
        read[view] = dict(OrbaxParams(tmp_path / view / "flux"))
    assert all(v.dtype == np.float32 for v in read["slow"].values())
    assert not any(np.array_equal(read["slow"][k], read["online"][k]) for k in ("img_in/kernel", "final_linear/kernel"))
    (model,) = open_models(tmp_path / "slow")
    assert model.kind == "flux" and model.config.width == 32
    assert _convert(f"--from={trained}", f"--to={tmp_path}/d", "--format=diffusers", "--dtype=bfloat16") == 0
    from diffusers import FluxTransformer2DModel

    _, told = FluxTransformer2DModel.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


@pytest.mark.slow
def test_a_pipeline_goes_to_every_format_and_back(pipeline_folder, converted_folder, tmp_path, capfd):
    import torch
    from diffusers import FluxPipeline

    assert _convert(f"--from={pipeline_folder}", f"--to={tmp_path}/orbax") == 0
    assert read_record(tmp_path / "orbax")[1] == read_record(converted_folder)[1]
    assert _convert(f"--from={tmp_path}/orbax", f"--to={tmp_path}/diffusers", "--format=diffusers") == 0
    old, new = (FluxPipeline.from_pretrained(folder) for folder in (pipeline_folder, tmp_path / "diffusers"))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        one, two = (getattr(p, name).state_dict() for p in (old, new))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    options = dict(height=16, width=24, num_inference_steps=2, output_type="latent", max_sequence_length=16)
    for p in (old, new):
        p.set_progress_bar_config(disable=True)
    images = [p("a red cat", generator=torch.manual_seed(0), **options).images for p in (old, new)]
    assert torch.equal(*images)

    (tmp_path / "comfy").mkdir()
    comfy = tmp_path / "comfy" / "all.safetensors"
    config = {"axes_dims_rope": [4, 6, 6], "norm_num_groups": 8, "num_attention_heads": 4}
    (tmp_path / "comfy" / "config.json").write_text(json.dumps(config))  # what small models cannot tell by shape
    assert _convert(f"--from={tmp_path}/orbax", f"--to={comfy}", "--format=comfy") == 0
    folders = [f"--{name}={pipeline_folder}/{name}" for name in ("tokenizer", "tokenizer_2")]
    assert _convert(f"--from={comfy}", f"--to={tmp_path}/again", *folders) == 0
    for kind in ("flux", "vae", "t5", "clip"):
        one, two = (OrbaxParams(folder / kind) for folder in (converted_folder, tmp_path / "again"))
        assert set(one) == set(two) and all(np.array_equal(one[k], two[k]) for k in one), kind
    capfd.readouterr()
    assert _convert(f"--from={tmp_path}/orbax", f"--to={tmp_path}/bfl", "--format=bfl", folders[0]) == 0
    err = capfd.readouterr().err
    assert "are not part of Black Forest Labs' format and are left out" in err
    assert "note: unused with --format=bfl, without tokenizers: --tokenizer" in err
    assert sorted(p.name for p in (tmp_path / "bfl").iterdir()) == ["ae.safetensors", "flux1.safetensors"]


@pytest.mark.slow
def test_single_files_make_a_pipeline(pipeline_folder, converted_folder, tmp_path, capfd):
    sources = [f"--from={pipeline_folder}/{n}" for n in ("vae", "text_encoder", "transformer", "text_encoder_2")]
    tokenizers = [f"--{n}={pipeline_folder}/{n}" for n in ("tokenizer", "tokenizer_2")]
    assert _convert(*sources, *tokenizers, f"--to={tmp_path}/all") == 0
    from shortcut_jax import TextToImage

    small = dict(height=16, width=24, steps=2, text_tokens=16)
    one, two = (TextToImage(folder)("a red cat", **small) for folder in (tmp_path / "all", converted_folder))
    np.testing.assert_array_equal(one, two)
    (tmp_path / "empty").mkdir()
    error = _fails(capfd, *sources, f"--tokenizer={tmp_path}/empty", f"--to={tmp_path}/x")
    assert "is no tokenizer of CLIP" in error


def _lora_file(path, tensors, metadata):
    export.write_tensors(path, tensors, metadata)
    return path


def test_loras_convert_between_all_their_formats_bit_for_bit(bfl, shapes, tmp_path, capfd):
    modules = random_modules(shapes, rank=lambda n: 2 + len(n) % 3, alpha=5.0, dtype=ml_dtypes.bfloat16)
    peft = _lora_file(tmp_path / "peft.safetensors", *to_peft(modules))
    base = f"--base={bfl}"
    assert _convert(f"--from={peft}", f"--to={tmp_path}/orbax", base) == 0
    assert f"found: LoRA of {len(modules)} modules, rank 2, 3, 4" in capfd.readouterr().err
    (stored,), _ = read_record(tmp_path / "orbax")
    assert stored.kind == "lora" and stored.config.base == CFG
    assert _convert(f"--from={tmp_path}/orbax", f"--to={tmp_path}/again.safetensors", "--format=diffusers") == 0
    _same(peft, tmp_path / "again.safetensors")
    assert LazyTensors([peft]).metadata == LazyTensors([tmp_path / "again.safetensors"]).metadata

    plain = random_modules(shapes)
    kohya = _lora_file(tmp_path / "kohya.safetensors", *to_kohya(plain, shapes))
    assert _convert(f"--from={kohya}", f"--to={tmp_path}/p.safetensors", "--format=diffusers", base) == 0
    assert _convert(f"--from={tmp_path}/p.safetensors", f"--to={tmp_path}/k.safetensors", "--format=comfy", base) == 0
    _same(kohya, tmp_path / "k.safetensors")


def test_a_peft_folder_has_its_alpha_in_its_config(bfl, shapes, tmp_path):
    modules = random_modules(shapes, rank=4)
    tensors = {k.replace("transformer.", "base_model.model.", 1): v for k, v in to_peft(modules)[0].items()}
    export.write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    read, _ = open_lora(tmp_path, CFG)
    assert {f.scale for f in read.values()} == {2.0}
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"adapter_config\.json is not JSON"):
        open_lora(tmp_path, CFG)


def test_a_merged_export_adds_in_float32(bfl, params, shapes, tmp_path, capfd):
    modules = random_modules(shapes)
    lora = _lora_file(tmp_path / "lora.safetensors", *to_peft(modules))
    to = tmp_path / "merged.safetensors"
    assert _convert(f"--from={bfl}", f"--lora={lora}", f"--to={to}", "--format=bfl") == 0
    assert f"merging a LoRA of {len(modules)} modules" in capfd.readouterr().err
    small = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
    expected = to_torch(dict(Merged(small, modules, shapes)), flux_bfl.RULES)
    merged = LazyTensors([to])
    assert all(np.array_equal(merged[k].view("u2"), v.view("u2")) for k, v in expected.items())
    # By hand for one layer: an addition in bfloat16 would round otherwise at many places.
    f, name = modules["transformer_blocks.1.attn.to_out.0"], "double_blocks.1.img_attn.proj.weight"
    base, delta = LazyTensors([bfl])[name], f.scale * (f.up @ f.down)
    in_float32 = (base.astype("f") + delta).astype(ml_dtypes.bfloat16)
    in_bfloat16 = base + delta.astype(ml_dtypes.bfloat16)
    assert np.mean(merged[name] != in_float32) < 0.01 < 0.1 < np.mean(merged[name] != in_bfloat16)


def test_an_interrupt_leaves_nothing_and_the_next_run_starts_clean(bfl, tmp_path, monkeypatch, capfd):
    real = export.export

    def broken(params, rules):
        for i, item in enumerate(real(params, rules)):
            if i == 20:
                raise KeyboardInterrupt
            yield item

    for form, target in (("diffusers", "folder"), ("bfl", "file.safetensors")):
        with monkeypatch.context() as patch:
            patch.setattr(export, "export", broken)
            with pytest.raises(SystemExit) as stop:
                cli.run(convert.main, ["convert", f"--from={bfl}", f"--to={tmp_path / target}", f"--format={form}"])
            assert stop.value.code == 130
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".folder.partial").mkdir()  # left by a kill
    assert _convert(f"--from={bfl}", f"--to={tmp_path}/folder", "--format=diffusers") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_told_before_and_during_the_work(bfl, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        assert "GB free" in _fails(capfd, f"--from={bfl}", f"--to={tmp_path}/x")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(export.Writer, "write", lambda *args: (_ for _ in ()).throw(full))
    error = _fails(capfd, f"--from={bfl}", f"--to={tmp_path}/x.safetensors", "--format=bfl")
    assert "no space is left on the disk of" in error and list(tmp_path.iterdir()) == []


def _orbax(bfl, folder):
    """A converted folder without a LoRA."""
    assert _convert(f"--from={bfl}", f"--to={folder}/orbax") == 0
    return folder / "orbax"


def test_bad_input_is_one_clear_line_and_harms_nothing(bfl, shapes, tmp_path, capfd):
    target, source = f"--to={tmp_path}/x", f"--from={bfl}"
    (tmp_path / "taken").write_text("mine")
    assert "is there already" in _fails(capfd, source, f"--to={tmp_path}/taken")
    assert (tmp_path / "taken").read_text() == "mine"
    assert "overlap" in _fails(capfd, source, f"--to={bfl}", "--overwrite")
    (tmp_path / "link.safetensors").symlink_to(bfl)
    for other in (f"{bfl.parent}/../{bfl.parent.name}/{bfl.name}", tmp_path / "link.safetensors"):
        assert "overlap" in _fails(capfd, source, f"--to={other}", "--overwrite")
    assert "overlap" in _fails(capfd, source, f"--lora={tmp_path}/taken", f"--to={tmp_path}/taken", "--overwrite")
    assert "holds no LoRA" in _fails(capfd, source, target, f"--lora={_orbax(bfl, tmp_path)}")
    (tmp_path / "odd").mkdir()
    for index in ("[]", '{"weight_map": {"a": 1}}'):
        (tmp_path / "odd" / "m.safetensors.index.json").write_text(index)
        assert "is not an index of shards" in _fails(capfd, f"--from={tmp_path}/odd", target)
    assert "nowhere is not found" in _fails(capfd, f"--from={tmp_path}/nowhere", target)
    assert f"cannot write to --to={tmp_path}/taken/x" in _fails(capfd, source, f"--to={tmp_path}/taken/x")
    assert "--to is missing" in _fails(capfd, source)
    assert "but no --from is one" in _fails(capfd, source, target, "--view=fast")
    assert "two of the sources hold a flux model" in _fails(capfd, source, source, target)
    tensors = to_torch({k: np.zeros(v, np.float32) for k, v in shapes.items()}, flux_diffusers.RULES)
    renamed = {k.replace("x_embedder.bias", "x_embeder.bias"): v for k, v in tensors.items()}
    (tmp_path / "m").mkdir()
    export.write_tensors(_with_axes(tmp_path / "m" / "m.safetensors"), renamed, {})
    error = _fails(capfd, f"--from={tmp_path}/m", target)
    assert "missing from the checkpoint: x_embedder.bias (nearest known name for the first: x_embeder.bias)" in error
    whole = (tmp_path / "m" / "m.safetensors").read_bytes()
    (tmp_path / "m" / "m.safetensors").write_bytes(whole[:-9])
    assert "cut off or not a safetensors file" in _fails(capfd, f"--from={tmp_path}/m", target)
    lora = _lora_file(tmp_path / "lora.safetensors", *to_peft(random_modules(shapes)))
    error = _fails(capfd, f"--from={lora}", target)
    assert "the LoRA belongs to another base (taken for a LoRA of FLUX.1; name another base with --base)" in error
    assert "convert it alone" in _fails(capfd, f"--from={lora}", source, target)
    assert "--base goes with a LoRA" in _fails(capfd, source, target, f"--base={bfl}")
    assert "a LoRA is written as" in _fails(capfd, f"--from={lora}", target, "--format=bfl", f"--base={bfl}")
    narrow = tmp_path / "narrow.safetensors"
    _lora_file(
        narrow,
        {
            "transformer.x_embedder.lora_A.weight": np.ones((2, 5), "f"),
            "transformer.x_embedder.lora_B.weight": np.ones((32, 2), "f"),
        },
        {},
    )
    assert "maps 5 channels to 32, the base's layer 4 to 32" in _fails(capfd, source, target, f"--lora={narrow}")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_step_size_embedding_has_no_place_in_flux(tmp_path, arguments, no_end, capfd, monkeypatch):
    from shortcut_jax import train

    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: device)
    small = {"eval__views": "()", "eval__images": "()", "objective": "shortcut", "steps": 1, "ema__warmup": False}
    small |= BOTH_BLOCKS
    assert train.main(arguments(tmp_path / "run", **small)) == 0
    error = _fails(capfd, f"--from={tmp_path}/run", f"--to={tmp_path}/x", "--format=bfl")
    assert "has a step-size embedding" in error
    for view in ("fast", "slow"):  # without warm-up the EMAs differ from the first step on
        assert _convert(f"--from={tmp_path}/run", f"--to={tmp_path}/{view}", f"--view={view}") == 0
    fast, slow = (OrbaxParams(tmp_path / view / "flux") for view in ("fast", "slow"))
    assert "step_in/in_layer/kernel" in slow
    assert not np.array_equal(fast["final_linear/kernel"], slow["final_linear/kernel"])


@pytest.mark.parametrize("form", ["orbax", "diffusers", "bfl", "comfy"])
def test_weights_that_are_not_finite_are_refused_by_name_and_leave_nothing(form, params, tmp_path, capfd):
    tensors = to_torch(params, flux_bfl.RULES)
    name = "double_blocks.1.img_attn.qkv.weight"
    tensors[name] = np.copy(tensors[name])
    tensors[name][3, 2] = np.inf
    (tmp_path / "in").mkdir()
    export.write_tensors(_with_axes(tmp_path / "in" / "flux.safetensors"), tensors, {})
    error = _fails(capfd, f"--from={tmp_path}/in", f"--to={tmp_path}/out", f"--format={form}")
    assert f"{name} has 1 of {tensors[name].size:,} values that are NaN or infinite" in error
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("form", ["orbax", "bfl"])
def test_values_beyond_the_dtype_asked_for_are_refused_by_name(form, params, tmp_path, capfd):
    tensors = to_torch(params, flux_bfl.RULES)
    tensors["img_in.bias"] = np.full_like(tensors["img_in.bias"], 3.4e38)
    (tmp_path / "in").mkdir()
    export.write_tensors(_with_axes(tmp_path / "in" / "flux.safetensors"), tensors, {})
    error = _fails(capfd, f"--from={tmp_path}/in", f"--to={tmp_path}/out", f"--format={form}", "--dtype=bfloat16")
    assert "img_in/bias has values beyond the range of bfloat16: convert with --dtype=float32" in error
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_converted_folder_that_is_not_finite_is_not_converted_on(bfl, params, tmp_path, capfd):
    from shortcut_jax.formats.inference_checkpoint import write_params

    folder = _orbax(bfl, tmp_path)
    broken = {k: np.full_like(v, np.nan) if k == "img_in/bias" else v for k, v in params.items()}
    shutil.rmtree(folder / "flux")
    write_params(folder / "flux", broken.items())
    error = _fails(capfd, f"--from={folder}", f"--to={tmp_path}/x.safetensors", "--format=bfl")
    assert "img_in/bias has" in error and [p.name for p in tmp_path.iterdir()] == ["orbax"]


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("tokenizer", "vocab.json", b"{"),
        ("tokenizer", "merges.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ("tokenizer_2", "tokenizer.json", b"<html>"),
    ],
)
def test_a_broken_tokenizer_is_refused_before_anything_is_written(
    name, file, content, pipeline_folder, tmp_path, capfd, monkeypatch
):
    (tmp_path / "in").mkdir()
    for part in pipeline_folder.iterdir():
        (tmp_path / "in" / part.name).symlink_to(part)
    (tmp_path / "in" / name).unlink()
    folder = shutil.copytree(pipeline_folder / name, tmp_path / "in" / name)
    (folder / file).write_bytes(content)
    monkeypatch.setattr(convert, "write", lambda *args: pytest.fail("it was converted"))
    assert f"{folder} cannot be read (" in _fails(capfd, f"--from={tmp_path}/in", f"--to={tmp_path}/out")
    rest = [f"--from={pipeline_folder}", f"--to={tmp_path}/out"]
    assert f"{folder} cannot be read (" in _fails(capfd, *rest, f"--{name}={folder}")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_several_loras_are_added_up_each_with_its_scale(bfl, params, shapes, tmp_path, capfd):
    """Of other ranks, alphas and modules: the merged weights are the base plus the sum of scale * delta, in float32."""
    one = random_modules(shapes, rank=2, alpha=5.0, keep=lambda n: "to_q" in n or n == "proj_out")
    two = random_modules(shapes, rank=lambda n: 2 + len(n) % 3, seed=2, dtype=ml_dtypes.bfloat16)
    files = [_lora_file(tmp_path / f"{i}.safetensors", *to_peft(m)) for i, m in enumerate((one, two))]
    flags = [*(f"--lora={file}" for file in files), "--lora_scale=-0.5", "--lora_scale=1.25", "--dtype=float32"]
    assert _convert(f"--from={bfl}", *flags, f"--to={tmp_path}/merged", "--format=diffusers") == 0
    err = capfd.readouterr().err
    assert f"merging the sum of 2 LoRAs of {len(two)} modules: -0.5 x 0.safetensors + 1.25 x 1.safetensors" in err
    small = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
    base = to_torch(small, flux_diffusers.RULES)
    merged = LazyTensors([tmp_path / "merged" / "diffusion_pytorch_model.safetensors"])
    for name, value in base.items():
        module = name.removesuffix(".weight")
        delta = sum(
            scale * f.scale * (f.up.astype("f") @ f.down.astype("f"))
            for scale, f in ((-0.5, one.get(module)), (1.25, two.get(module)))
            if f is not None and name.endswith(".weight")
        )
        # The base is bfloat16, and the sum is rounded to it once.
        expected = (value.astype("f") + delta).astype(ml_dtypes.bfloat16).astype("f")
        np.testing.assert_allclose(merged[name], expected, rtol=2**-7, atol=1e-6, err_msg=name)
        assert np.mean(merged[name] != expected) < 0.01, name
    for flags, message in (
        (["--lora_scale=1"], "--lora is given 2 times, --lora_scale 1: give one for each"),
        (["--lora_scale=nan", "--lora_scale=1"], "--lora_scale is nan, 1.0, but must be finite"),
    ):
        target = tmp_path / "x"
        assert message in _fails(capfd, f"--from={bfl}", *(f"--lora={f}" for f in files), *flags, f"--to={target}")
        assert not target.exists()


def _loaded_by_diffusers(file, params):
    """The adapters that a pipeline of diffusers holds after it has read a file: updates of weights by module."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from tests.weights.test_lora_files import _reference

    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=_reference(params), **others)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    layers = {name: m for name, m in pipeline.transformer.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: m.get_delta_weight("default_0").detach().numpy() for name, m in layers.items()}


@pytest.mark.parametrize("form", ["comfy", "diffusers"])
def test_a_pipeline_of_diffusers_holds_the_adapters_that_are_not_said_to_be_dropped(
    form, bfl, params, shapes, tmp_path, capfd, monkeypatch
):
    from diffusers.loaders import lora_pipeline

    from tests.weights.test_lora_files import _kohya_conversion

    modules = random_modules(shapes, alpha=5.0)
    source, target = _lora_file(tmp_path / "lora.safetensors", *to_peft(modules)), tmp_path / "out.safetensors"
    assert _convert(f"--from={source}", f"--to={target}", f"--format={form}", f"--base={bfl}") == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "diffusers drops" in line]
    monkeypatch.setattr(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", _kohya_conversion())
    loaded = _loaded_by_diffusers(target, params)
    for name, delta in loaded.items():
        f = modules[name]
        np.testing.assert_allclose(delta, f.scale * f.up @ f.down, rtol=1e-4, atol=1e-5, err_msg=name)
    dropped = modules.keys() - loaded.keys()
    if form == "diffusers":
        assert not dropped and not lines
        return
    (line,) = lines
    assert f"note: diffusers drops {len(dropped)} of these {len(modules)} adapters" in line
    assert "write --format=diffusers" in line
    assert set(line.split("(")[1].split(")")[0].split(", ")) == dropped and "x_embedder" in dropped
