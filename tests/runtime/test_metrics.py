from types import SimpleNamespace

import pytest

from shortcut_jax.cluster import timing
from shortcut_jax.cluster.timing import Stopwatch
from shortcut_jax.runtime.device_table import peak_flops
from shortcut_jax.runtime.metrics import Meter, MetricLog, read_metrics, save_curves
from tests.helpers import read_events


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.time)
    return now


def _rates(meter, step):
    """The rates alone, without the seconds of a step."""
    return {name: value for name, value in meter.rates(step).items() if not name.startswith("time/")}


def test_rates_are_those_since_the_last_call_and_leave_the_first_step_out(clock):
    meter = Meter(rows=64, flops=6_000, peak=120_000.0, watch=Stopwatch("host"))
    assert meter.rates(1) == {}
    clock.time += 1000.0  # the compilation
    assert meter.seen(1) and not meter.seen(2)
    assert meter.rates(1) == {}
    clock.time += 2.0
    assert _rates(meter, 5) == {"images_per_second": 128.0, "model_flops_per_second": 12_000.0, "mfu": 0.1}
    clock.time += 1.0
    assert _rates(meter, 6)["images_per_second"] == 64.0


def test_without_a_known_peak_there_is_no_utilisation(clock):
    meter = Meter(rows=64, flops=6_000, peak=None, watch=Stopwatch("host"))
    meter.seen(3)
    clock.time += 2.0
    assert set(_rates(meter, 4)) == {"images_per_second", "model_flops_per_second"}


def test_the_seconds_of_a_step_have_three_parts_and_leave_out_what_is_no_training(clock):
    watch = Stopwatch("host")
    meter = Meter(rows=64, flops=6_000, peak=None, watch=watch)
    meter.seen(3)
    for kind, seconds in {
        "data": 2,
        "device": 8,
        "saving": 4,
        "compiling": 50,
        "sampling": 50,
        "validating": 50,
    }.items():
        with watch(kind):
            clock.time += seconds
    clock.time += 2.0
    rates = meter.rates(5)
    assert {k: v for k, v in rates.items() if k.startswith("time/")} == {
        "time/data": 1.0,
        "time/host": 3.0,  # saving among it
        "time/device": 4.0,
    }
    assert rates["images_per_second"] == 8.0


def test_a_line_of_metrics_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricLog(tmp_path).scalars(1, {"loss": 3.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # the machine went down
    MetricLog(tmp_path).scalars(2, {"loss": 2.0})
    assert {step: row["loss"] for step, row in read_metrics(path).items()} == {1: 3.0, 2: 2.0}


def test_a_loss_that_is_not_finite_leaves_a_curve_of_the_others(tmp_path):
    log = MetricLog(tmp_path)
    for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0)):
        log.scalars(step, {"loss": loss})
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[2]["loss"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    save_curves(tmp_path / "loss.png", records, ["loss", "absent"])
    save_curves(tmp_path / "none.png", {}, ["loss"])
    assert (tmp_path / "loss.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 100


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)],
)
def test_peaks_are_known_by_the_kind_of_device(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_a_writer_that_storage_failed_is_left_alone_for_it_would_block(tmp_path, monkeypatch, capfd):
    log = MetricLog(tmp_path)
    log.scalars(1, {"loss": 1.0})
    monkeypatch.setattr(log._writer.file_writer.event_writer._worker, "is_alive", lambda: False)
    for step in range(2, 40):
        log.scalars(step, {"loss": float(step)})
    log.close()
    assert capfd.readouterr().err.count("TensorBoard gets no more of this run") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 39


def test_the_config_of_a_run_is_in_its_log(trained):
    (path,) = (trained / "tensorboard").iterdir()
    scalars, rest = read_events(path)
    assert set(scalars["loss"]) == {1, 2, 3, 4}
    text = rest["config/text_summary"]
    for line in (
        "| objective | scfm |",
        "| batch_size | 32 |",
        "| optimizer.learning_rate | 0.02 |",
        "| train | all |",
    ):
        assert line in text, line
    assert "optimizer.learning_rate" in rest["_hparams_/session_start_info"] and "loss" in rest["_hparams_/experiment"]
