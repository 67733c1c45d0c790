import dataclasses
import json

import jax
import pytest

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.derive import (
    global_batch,
    mesh_shape,
    model_config,
    objective_settings,
    sampling_spacing,
    step_settings,
)
from shortcut_jax.config.load import load_config
from shortcut_jax.config.resume import compare, flatten
from shortcut_jax.config.schema import Settings, ValidationSettings, default_config, to_dict
from shortcut_jax.config.stored import FORMER_MODES, complete
from shortcut_jax.core.batch_split import RowGroup
from shortcut_jax.errors import ConfigError
from shortcut_jax.run.assembly import Assembly
from tests.helpers import tiny_assembly, tiny_config
from tests.readme_commands import ROOT


def test_a_config_survives_json():
    settings = from_config(tiny_config(student_weights=(1.0, 2.0, 1.0)))
    assert from_config(json.loads(json.dumps(to_dict(settings)))) == settings


def test_the_default_config_has_every_field_and_is_locked():
    config = default_config()
    assert set(flatten(config.to_dict())) == set(flatten(to_dict(Settings())))
    with pytest.raises(AttributeError):
        config.stepz = 3
    with pytest.raises(ConfigError, match="exactly one of batch_size and batch_per_device"):
        from_config(config)


def test_unknown_and_missing_keys_are_named():
    values = to_dict(from_config(tiny_config()))
    with pytest.raises(ConfigError, match=r"unknown config key 'optimizer\.lr'"):
        from_config({**values, "optimizer": {**values["optimizer"], "lr": 1.0}})
    with pytest.raises(ConfigError, match=r"'ema\.slow' is missing"):
        from_config({**values, "ema": {k: v for k, v in values["ema"].items() if k != "slow"}})
    with pytest.raises(ConfigError, match=r"steps is 3\.5, but must be int"):
        from_config({**values, "steps": 3.5})
    with pytest.raises(ConfigError, match="steps is True"):
        from_config({**values, "steps": True})


def test_the_free_mesh_axis_takes_what_remains():
    shape = mesh_shape(from_config(tiny_config(mesh__data=2, mesh__fsdp=-1, mesh__tensor=2)), 16)
    assert (shape.data, shape.fsdp, shape.tensor) == (2, 4, 2)
    with pytest.raises(ConfigError, match="needs a multiple of 6 devices, but there are 8"):
        mesh_shape(from_config(tiny_config(mesh__data=3, mesh__fsdp=-1, mesh__tensor=2)), 8)
    with pytest.raises(ConfigError, match="only one axis may be -1"):
        mesh_shape(from_config(tiny_config(mesh__data=-1, mesh__fsdp=-1)), 8)


def test_the_tensor_axis_has_to_divide_the_heads():
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 4, but it splits the model's 2 heads"):
        tiny_assembly(4, mesh__tensor=4)


def test_the_batch_may_follow_the_devices():
    settings = from_config(tiny_config(batch_size=None, batch_per_device=8, mesh__fsdp=-1, mesh__tensor=2))
    assert global_batch(settings, mesh_shape(settings, 16)) == 64


def test_marks_tell_identity_schedule_and_free_changes_apart():
    old = to_dict(from_config(tiny_config()))
    new = to_dict(
        from_config(
            tiny_config(
                steps=9,
                max_skipped=2,
                optimizer__warmup_steps=3,
                mesh__data=4,
                model__remat="full",
                log_every=7,
                data__dir="/else",
                objective="flow",
                model__preset="digits",
                data__text_tokens=9,
                optimizer__b1=0.8,
                optimizer__schedule="cosine",
                batch_size=64,
                student_steps=(1, 2),
            )
        )
    )
    differences = compare(old, new)
    names = {mark: {line.split(":")[0] for line in lines} for mark, lines in differences.items()}
    assert names["schedule"] == {"steps", "max_skipped", "optimizer.warmup_steps"}
    assert names["free"] == {"mesh.data", "model.remat", "log_every", "data.dir"}
    assert names["identity"] == {
        "objective",
        "model.preset",
        "data.text_tokens",
        "optimizer.b1",
        "optimizer.schedule",
        "batch_size",
        "student_steps",
    }
    assert "steps: 4 -> 9" in differences["schedule"]
    assert not any(compare(old, json.loads(json.dumps(old))).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__learning_rate": 0.0}, r"optimizer\.learning_rate is 0\.0, but must be positive"),
        (
            {"model__matmul_dtype": "fp8"},
            r"model\.matmul_dtype is 'fp8', but must be float8, or None for model\.compute_",
        ),
        ({"model__matmul_dtype": "float8", "objective": "meanflow"}, r"float8 has no forward-mode .*=meanflow needs"),
        ({"optimizer__b1": 1.0}, r"optimizer\.b1 is 1\.0, but must be in \[0, 1\)"),
        ({"optimizer__b2": -0.1}, r"optimizer\.b2 is -0\.1"),
        ({"optimizer__eps": 0.0}, r"optimizer\.eps is 0\.0, but must be positive"),
        ({"optimizer__decay_paths": "*kernel"}, r"decay_paths is '\*kernel', which is not a regular expression"),
        ({"eval__shift": -1.0}, r"eval\.shift is -1\.0, but must be positive"),
        ({"eval__seeds": (0, -2)}, r"eval\.seeds is \(0, -2\), but seeds must not be negative"),
        ({"shift__dynamic": 1.5}, r"shift\.dynamic is 1\.5, but must be in \[0, 1\]"),
        ({"guidance": (3.0, 1.0)}, r"guidance is \(3\.0, 1\.0\), but must be \(low, high\) with low <= high"),
        ({"data__caption_dropout": -0.5}, r"caption_dropout is -0\.5"),
        ({"ema__slow": 1.0}, r"ema\.slow is 1\.0"),
        ({"data__text_encoder": "stored"}, "'pixels' has no stored text states: set data.text_encoder=words"),
        ({"alpha__last": 0.0}, r"alpha falls from 1\.0 to 0\.0 until 0\.5 of the run, but need 0 < last"),
        ({"alpha__first": 0.05}, r"alpha falls from 0\.05 to 0\.1"),
        ({"alpha__until": 0.0}, r"until 0\.0 of the run"),
        ({"rows__rolled_rows": 1, "objective": "shortcut"}, r"rolled_rows is 1, .*set it to 0, or objective=scfm"),
        ({"rolled_steps": 0}, r"rolled_steps is 0, but must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config(tiny_config(**changes))


FLOATS = [n for n, v in flatten(to_dict(Settings())).items() if isinstance(v, float)]
WHOLE = [n for n, v in flatten(to_dict(Settings())).items() if isinstance(v, int) and not isinstance(v, bool)]


@pytest.mark.parametrize("name", [*FLOATS, "student_weights", "guidance", "data.weights"])
def test_no_number_of_a_config_may_be_infinite_or_nan(name):
    for value in (float("inf"), float("-inf"), float("nan")):
        given = value if name in FLOATS else (1.0, value)
        with pytest.raises(ConfigError, match=rf"^{name} is .*{value}\)?, but must be finite$"):
            from_config(tiny_config(**{name.replace(".", "__"): given}))


@pytest.mark.parametrize("name", [*WHOLE, "student_steps", "eval.seeds", "batch_size", "model.width"])
def test_no_whole_number_of_a_config_may_be_huge(name):
    for value in (2**63, 10**50):
        given = (1, value) if name in ("student_steps", "eval.seeds") else value
        with pytest.raises(ConfigError, match=rf"^{name} is .*, but must be less than 2\^(31|32|63) = \d+$") as refused:
            from_config(tiny_config(**{name.replace(".", "__"): given}))
        assert len(str(refused.value)) < 200


def test_seeds_have_32_bits_and_steps_31():
    assert from_config(tiny_config(seed=2**32 - 1)).seed == 2**32 - 1
    assert from_config(tiny_config(steps=2**31 - 1)).steps == 2**31 - 1
    with pytest.raises(ConfigError, match=r"seed is 4294967296, but must be less than 2\^32"):
        from_config(tiny_config(seed=2**32))
    with pytest.raises(ConfigError, match=r"steps is 2147483648, but must be less than 2\^31"):
        from_config(tiny_config(steps=2**31))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__name": "a\0b"}, r"data\.name is 'a\\x00b', which has a NUL character"),
        ({"eval__captions": ("a", "\0")}, r"eval\.captions is '\\x00', which has a NUL"),
        ({"init_from": "a\0"}, "init_from=.*character that no name may have"),
        ({"data__name": "n" * 300}, r"data\.name=n+\.\.\. has a name of 300 bytes"),
        ({"data__mix": ("gs://x/y",)}, r"data\.mix=gs://x/y is not a path"),
        ({"data__mix": ("",)}, r"data\.mix is empty"),
        ({"data__dir": "s3://x/y"}, r"data\.dir=s3://x/y is not a path"),
        ({"validation__name": "v" * 300}, r"validation\.name=v+\.\.\. has a name of 300 bytes"),
    ],
)
def test_texts_that_no_file_can_have_are_named(changes, line):
    with pytest.raises(ValueError, match=line):
        from_config(tiny_config(**changes))


def test_the_objective_decides_on_the_step_size_input():
    assert tiny_assembly(objective="shortcut").model.step_size
    assembly = tiny_assembly()
    assert not assembly.model.step_size
    step = step_settings(assembly.settings, assembly.model)
    assert step.objective.student.counts == (1, 2, 4) and step.objective.student.jumps == 2


@pytest.mark.parametrize(
    ("changes", "start"),
    [({}, 0.99), ({"objective": "shortcut"}, 1.0), ({"objective": "flow"}, 1.0), ({"rows__self_rows": 0}, 1.0)],
)
def test_sampling_begins_earlier_where_rows_were_trained_so(changes, start):
    settings = from_config(tiny_config(**changes, multistep_start=0.99))
    assert sampling_spacing(settings).start == objective_settings(settings).student.start == start


def test_forward_mode_takes_attention_that_has_it():
    settings = from_config(tiny_config(objective="meanflow", model__compute_dtype="bfloat16", model__attention="auto"))
    assert model_config(settings, "gpu").attention == "xla"
    named = dataclasses.replace(settings, model=dataclasses.replace(settings.model, attention="cudnn"))
    with pytest.raises(ConfigError, match=r"'cudnn', which has no forward-mode .*set model\.attention=xla"):
        model_config(named, "gpu")


def test_flops_of_a_step_count_the_jumps_of_self_rows():
    flow, scfm = tiny_assembly(objective="flow"), tiny_assembly()
    assert scfm.flops() / flow.flops() == pytest.approx(3.5 / 3)
    told = tiny_assembly(objective="shortcut").flops() / 3.5
    assert tiny_assembly(objective="alpha").flops() / told == pytest.approx(3.25)
    assert tiny_assembly(objective="meanflow").flops() / told == pytest.approx(3.5)
    rolled = tiny_assembly(rows__rolled_rows=1, rows__flow_rows=2, rolled_steps=6)
    assert rolled.flops() / flow.flops() == pytest.approx((3 + 0.25 * 2 + 0.25 * (2 + 6)) / 3)
    rows = RowGroup(self_rows=3, flow_rows=1)
    taught = Assembly(dataclasses.replace(scfm.settings, rows=rows, jumps=4), jax.devices()[:1])
    assert taught.flops() / flow.flops() == pytest.approx((3 + 0.75 * 4) / 3)


def test_flops_of_post_training_are_those_of_a_frozen_base_and_of_every_evaluation():
    rows = {"rows__self_rows": 1, "rows__flow_rows": 0, "init_from": "x"}
    forwards = lambda **changes: (
        tiny_assembly(**{**rows, **changes}).flops() / (tiny_assembly(objective="flow").flops() / 3)
    )
    lora = {"train": "lora", "teacher_share": 0.4}
    assert forwards(train="lora", objective="flow") == pytest.approx(2)
    assert forwards(**lora) == pytest.approx(4)
    assert forwards(teacher_share=0.4) == pytest.approx(3 + 2 + 1)
    assert forwards(**lora, guidance_mode="cfg", guidance=(1.0, 4.0)) == pytest.approx(2 * 4)
    embedded = {**lora, "guidance": (1.0, 4.0), "model__guidance": True}
    plain = forwards(**lora, model__guidance=True)
    assert forwards(**embedded, guidance_mode="distill") == pytest.approx(plain * 5 / 4)
    assert forwards(**embedded, guidance_mode="cfg_targets") == pytest.approx(plain * 6 / 4)


def test_a_stored_config_older_than_a_field_has_its_default():
    config = to_dict(from_config(tiny_config()))
    older = {k: v for k, v in config.items() if k != "init_from"}
    older["ema"] = {**config["ema"], "slow": 0.5}
    assert complete(older) == {**config, "ema": {**config["ema"], "slow": 0.5}}
    assert not any(compare(complete(older | {"ema": config["ema"]}), config).values())
    before_teachers = {k: v for k, v in older.items() if k != "guidance_mode"} | {"guidance": [0.0, 7.5]}
    before_teachers["rows"] = {**config["rows"], "teacher_rows": 0}
    assert from_config(complete(before_teachers)).guidance == ()
    assert complete({**before_teachers, "model": {**config["model"], "preset": "flux-dev"}})["guidance"] == [0.0, 7.5]
    named = {k: v for k, v in older.items() if k != "guidance_mode"}
    for before, now in FORMER_MODES.items():  # the name and the values until 2026-11-27
        assert complete({**named, "guide": before})["guidance_mode"] == now
        assert load_config(ROOT / "configs/digits.py", {"guide": before}).guidance_mode == now
    with pytest.raises(ConfigError, match="guide is the former name of guidance_mode"):
        load_config(ROOT / "configs/digits.py", {"guide": "both", "guidance_mode": "cfg"})
    restarted = {**older, "ema": {**older["ema"], "restart_auto": True, "restart_ratio": 1.0}}  # a rule that has gone
    assert complete(restarted) == complete(older)
    with pytest.raises(ConfigError, match="unknown config key 'gone'"):
        from_config(complete({**older, "gone": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spikes__factor": 3.0}, "max_skipped is 0, so that the first spike would stop the run"),
        ({"spikes__factor": 0.5, "max_skipped": 1}, r"spikes\.factor is 0\.5, .* set 2 or more"),
        ({"spikes__after": -1}, r"spikes\.after is -1, but must not be negative"),
        ({"spikes__decay": 1.0}, r"spikes\.decay is 1\.0, but must be in \[0, 1\)"),
        ({"watchdog__grace_seconds": -1.0}, r"watchdog\.grace_seconds is -1\.0, but must not be negative"),
        ({"watchdog__seconds": 9000.0}, r"watchdog\.seconds is 9000, more than watchdog\.slow_seconds=7200"),
        ({"peer_timeout": 100.0}, r"peer_timeout is 100, but must be in \[2, 90\]"),
        (
            {"validation__every": 5, "validation__every_samples": 9},
            "give one of validation.every and",
        ),
        ({"validation__every_samples": -1}, r"validation\.every_samples is -1, but must not be negative"),
        ({"save_attempts": 0}, "save_attempts is 0, but must be at least 1"),
    ],
)
def test_settings_of_faults_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config(tiny_config(**changes))


def test_what_a_run_survives_may_change_when_it_is_resumed():
    old = to_dict(from_config(tiny_config()))
    new = tiny_config(watchdog__seconds=60.0, save_attempts=5, peer_timeout=20.0, spikes__factor=3.0, max_skipped=1)
    differences = compare(old, to_dict(from_config(new)))
    assert differences["identity"] == []
    assert len(differences["free"]) == 3 and len(differences["schedule"]) == 2


def test_validations_are_due_by_steps_or_by_samples():
    assert ValidationSettings(every=7).interval(batch_size=100) == 7
    assert ValidationSettings(every_samples=262_144).interval(batch_size=2_048) == 128
    assert ValidationSettings(every_samples=250).interval(batch_size=100) == 3
    assert ValidationSettings().interval(batch_size=100) == 0
