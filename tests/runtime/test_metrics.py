from types import SimpleNamespace

import pytest

from shortcut_jax.runtime import metrics
from shortcut_jax.runtime.metrics import Meter, peak_flops


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.time)
    return now


def test_rates_are_those_since_the_last_call_and_leave_the_first_step_out(clock):
    meter = Meter(rows=64, flops=6_000, peak=120_000.0)
    assert meter.rates(1) == {}
    clock.time += 1000.0  # the compilation
    assert meter.seen(1) and not meter.seen(2)
    assert meter.rates(1) == {}
    clock.time += 2.0
    assert meter.rates(5) == {"images_per_second": 128.0, "model_flops_per_second": 12_000.0, "mfu": 0.1}
    clock.time += 1.0
    assert meter.rates(6)["images_per_second"] == 64.0


def test_without_a_known_peak_there_is_no_utilisation(clock):
    meter = Meter(rows=64, flops=6_000, peak=None)
    meter.seen(3)
    clock.time += 2.0
    assert set(meter.rates(4)) == {"images_per_second", "model_flops_per_second"}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)],
)
def test_peaks_are_known_by_the_kind_of_device(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
