import subprocess
import sys
import time

from shortcut_jax.cluster.watchdog import Watchdog, WatchdogSettings

HANG = """
import pathlib, sys, threading, time
from shortcut_jax.cluster.watchdog import Watchdog, WatchdogSettings

def other_work():
    time.sleep(60)

threading.Thread(target=other_work, daemon=True).start()
told = lambda line: print("told:", line, file=sys.stderr, flush=True)
with Watchdog(WatchdogSettings(0.5, 5.0, 0.5), pathlib.Path(sys.argv[1]), told) as watchdog:
    with watchdog.slow("the start"):
        time.sleep(0.8)
    watchdog.beat("step 7")
    def a_step_that_hangs():
        time.sleep(60)
    a_step_that_hangs()
"""


def test_a_hang_dumps_all_threads_and_exits_with_75(tmp_path):
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and time.monotonic() - begin < 40
    for text in (done.stderr, (tmp_path / "hang-0.txt").read_text()):
        assert "watchdog: process 0 hangs in step 7 for more than 0.5 s (watchdog.seconds)" in text
        assert "a_step_that_hangs" in text and "other_work" in text
    assert "told: it hangs in step 7" in done.stderr


def test_work_that_beats_in_time_and_slow_work_are_left_alone(tmp_path):
    with Watchdog(WatchdogSettings(0.4, 5.0, 0.0), tmp_path) as watchdog:
        for step in range(4):
            watchdog.beat(f"step {step}")
            time.sleep(0.15)
        with watchdog.slow("a checkpoint"):
            time.sleep(0.8)
        time.sleep(0.15)
    time.sleep(0.6)  # it has stopped
    assert not list(tmp_path.iterdir())


def test_zero_seconds_turn_it_off(tmp_path):
    with Watchdog(WatchdogSettings(0.0, 0.0, 0.0), tmp_path) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.2)
    assert not list(tmp_path.iterdir())
