"""Times beside other projects': turns are taken in order, and every project computes what it should."""

import sys

import pytest

from benchmarks import peers


def _worker(code):
    return [sys.executable, "-c", f"import sys\nprint('ready', flush=True)\nfor _ in sys.stdin:\n    {code}"]


def test_all_take_turns_and_ratios_are_those_of_a_turn(tmp_path):
    note = "open({!r}, 'a').write({!r}); print({}, flush=True)"
    log = str(tmp_path / "log")
    commands = {name: _worker(note.format(log, name, seconds)) for name, seconds in (("a", 2.0), ("b", 3.0))}
    taken = peers.in_turn(commands, 3)
    assert taken == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert (tmp_path / "log").read_text() == "ababab"
    assert list(peers.table("train", {"a": [1.0, 2.0, 4.0], "b": [1.0, 3.0, 8.0]})) == [
        "| train | a | 2.000 | 1.00x (1.00 to 1.00) |",
        "| train | b | 3.000 | 1.50x (1.00 to 2.00) |",
    ]


def test_a_project_that_fails_is_named():
    with pytest.raises(RuntimeError, match="b ended with exit code 3"):
        peers.in_turn({"a": _worker("print(1.0, flush=True)"), "b": _worker("sys.exit(3)")}, 1)


@pytest.mark.parametrize("peer", ["shortcut_jax", "diffusers"])
def test_training_lowers_the_error_and_sampling_moves_the_noise(peer, monkeypatch):
    monkeypatch.setattr("shortcut_jax.runtime.host_memory.keep_freed_memory", lambda: None)  # it is for a whole process
    train = peers.PEERS[peer](peers.TINY, "train")
    first, *_, last = (train() for _ in range(5))
    assert 0.5 < last < first < 5.0
    assert peers.PEERS[peer](peers.TINY, "sample")() is not None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--peers=torchtitan"], "there is no 'torchtitan': choose of shortcut_jax, diffusers"),
        (["--work=fly"], "there is no 'fly': choose of train, sample"),
        (["--turns=0"], "--turns=0, but must be at least 1"),
    ],
)
def test_what_it_does_not_know_is_named(argv, line, capsys):
    with pytest.raises(SystemExit):
        peers.main(["peers", *argv])
    assert line in capsys.readouterr().err
