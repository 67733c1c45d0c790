"""Schedulers of diffusers: the table of their arguments, the times they give, and what is refused."""

import inspect
import json
import re

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from shortcut_jax.convert import start_note
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.inference_checkpoint import Sampling, read_record, write_record
from shortcut_jax.sources import models
from shortcut_jax.weights import schedulers

TOKENS = 1024


def test_the_table_is_the_signature_of_the_reference():
    arguments = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    assert {n: p.default for n, p in arguments.items() if n != "self"} == schedulers.DEFAULTS


SUPPORTED = [
    {},
    dict(shift=3.0),
    dict(use_dynamic_shifting=True),
    dict(use_dynamic_shifting=True, base_shift=0.9, max_shift=2.5, base_image_seq_len=100, max_image_seq_len=2000),
    dict(use_dynamic_shifting=True, time_shift_type="linear"),
    dict(shift=3.0, shift_terminal=0.1),
    dict(shift=3.0, use_karras_sigmas=True),
    dict(use_dynamic_shifting=True, use_exponential_sigmas=True),
    dict(use_dynamic_shifting=True, use_karras_sigmas=True, shift_terminal=0.02, time_shift_type="linear"),
]


@pytest.mark.parametrize("options", SUPPORTED, ids=str)
def test_times_are_the_sigmas_of_the_reference(options, tmp_path):
    reference = FlowMatchEulerDiscreteScheduler(**options)
    reference.save_pretrained(tmp_path / "scheduler")
    sampling = models.sampling_of(tmp_path, [])
    c = reference.config
    mu = calculate_shift(TOKENS, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    for steps in (1, 2, 5, 28):
        if steps == 1 and c.shift_terminal:  # 0 / 0 there
            continue
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        times = np.asarray(sampling_grid(steps, 32, sampling.shift.at(TOKENS), sampling.spacing))
        np.testing.assert_allclose(times[: steps + 1], reference.sigmas, atol=1e-6)
        assert not times[steps:].any()
    # They stay with the converted folder, and go back into a pipeline.
    write_record(tmp_path, [], sampling)
    assert read_record(tmp_path)[1] == sampling
    written = schedulers.write(sampling.shift, sampling.spacing)
    again = FlowMatchEulerDiscreteScheduler.from_config(written)
    assert {n: again.config[n] for n in schedulers.DEFAULTS} == {n: c[n] for n in schedulers.DEFAULTS}


def test_a_single_step_begins_at_noise_whatever_the_spacing():
    for spacing in (schedulers.Spacing(kind, 0.1) for kind in ("uniform", "karras", "exponential")):
        np.testing.assert_array_equal(sampling_grid(1, 3, 3.0, spacing), [1.0, 0.0, 0.0, 0.0])


def test_records_written_before_spacings_are_read(tmp_path):
    write_record(tmp_path, [], Sampling())
    record = json.loads((tmp_path / "models.json").read_text())
    del record["sampling"]["spacing"], record["sampling"]["shift"]["linear"], record["sampling"]["text_states"]
    (tmp_path / "models.json").write_text(json.dumps(record))
    assert read_record(tmp_path)[1] == Sampling()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dict(use_beta_sigmas=True), "use_beta_sigmas True, which is not supported"),
        (dict(stochastic_sampling=True), "fresh noise is added at each step"),
        (dict(invert_sigmas=True), "invert_sigmas True, which is not supported"),
        (dict(num_train_timesteps=500), "num_train_timesteps 500, which is not supported"),
        (dict(use_flow_sigmas=True), "use_flow_sigmas True, which is not supported"),
        (dict(sigma_min=0.1), "sigma_min 0.1, which is not supported"),
        (dict(use_karras_sigmas=True, use_exponential_sigmas=True), "choose one"),
        (dict(use_karras_sigmas="yes"), "use_karras_sigmas 'yes', which is not true or false"),
        (dict(time_shift_type="cubic"), "time_shift_type 'cubic', but it must be"),
        (dict(shift_terminal=1.0), "the terminal time is 1, but must be"),
        (dict(shift=0.0), "the shift is 0, but must be positive"),
        (dict(use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=256), "they must differ"),
        (dict(_class_name="FlowMatchHeunDiscreteScheduler"), "remove the folder scheduler"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_with_a_way_out(config, reason, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=reason) as error:
        models.sampling_of(tmp_path, [])
    assert "scheduler_config.json" in str(error.value)


def test_the_flow_shift_of_another_solver_is_kept_by_the_way_out(tmp_path):
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    solver.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConversionError, match="DPMSolverMultistepScheduler") as error:
        models.sampling_of(tmp_path, [])
    assert str(error.value).endswith('write {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0} into it')


def test_the_class_that_the_index_names_counts_and_unknown_entries_are_named(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_x": 1, "shift": 2, "snr_gamma": 5}))
    (note,) = models.scheduler_notes(tmp_path)
    assert "snr_gamma has no meaning" in note and models.sampling_of(tmp_path, []).shift.shift == 2
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    with pytest.raises(ConversionError, match=r"model_index\.json names the scheduler EulerDiscreteScheduler"):
        models.sampling_of(tmp_path, [])


@pytest.mark.parametrize("spacing", [Spacing(start=0.98), Spacing(start=0.98, scaled=True)], ids=["first", "all"])
def test_the_sigmas_that_convert_names_are_the_times_of_an_earlier_start(spacing, tmp_path):
    reference = FlowMatchEulerDiscreteScheduler()
    (text,) = re.findall(r"for four steps give diffusers sigmas=\[([\d., ]+)\]", start_note(spacing))
    reference.set_timesteps(sigmas=[float(part) for part in text.split(",")])
    np.testing.assert_allclose(sampling_grid(4, 4, 1.0, spacing), reference.sigmas, atol=1e-6)
    write_record(tmp_path, [], sampling := Sampling(spacing=spacing))
    assert read_record(tmp_path)[1] == sampling
    with pytest.raises(ValueError, match=r"sampling starts at 1\.5, but must be above 0 and at most 1"):
        Spacing(start=1.5)
