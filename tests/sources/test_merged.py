"""Adapters of a workdir merged into their base: only into the one that they were trained on."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax import cli, convert
from shortcut_jax.core.fingerprint import fingerprint, fingerprint_of
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import UsageError
from shortcut_jax.formats import export
from shortcut_jax.models.presets import preset
from shortcut_jax.sources.frozen_base import Completed
from shortcut_jax.sources.models import abstract_params, network_of
from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.rules import nest
from tests.helpers import LET_GO, Watched, to_torch


def _merge_fails(capfd, workdir, target, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(convert.main, ["convert", f"--from={workdir}", "--merged", f"--to={target}", *argv])
    assert stop.value.code == 1 and not target.exists()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def _write(folder, config, seed=0):
    """A file in Black Forest Labs' layout with random values."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    shapes = {k: v.shape for k, v in flat_paths(abstract_params("flux", config)).items()}
    made = {k: 0.1 * rng.standard_normal(v, np.float32) for k, v in shapes.items()}
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": config.axes}))
    export.write_tensors(folder / "flux.safetensors", to_torch(made, flux_bfl.RULES), {})
    return folder / "flux.safetensors"


@pytest.mark.slow
def test_adapters_merge_only_into_the_base_they_were_trained_on(distilled, trained, tmp_path, capfd):
    network = network_of(distilled)
    fails = lambda *argv: _merge_fails(capfd, distilled, tmp_path / "x", *argv)
    other = _write(tmp_path / "other", network)
    assert "it has changed, or is another one: name the right one with --base" in fails(f"--base={other}")
    for name, changes, message in (
        ("deep", {"single_blocks": 3}, "single_blocks/attn/k_norm/scale is of shape (3, 16), not of shape (2, 16)"),
        ("guided", {"guidance": True}, "guidance_in/in_layer/bias is of shape (32,), not absent"),
        ("wide", {"text_width": 48}, "txt_in/kernel is of shape (48, 32), not of shape (64, 32)"),
    ):
        base = _write(tmp_path / name, dataclasses.replace(network, **changes))
        error = fails(f"--base={base}")
        assert f"the base {base} is another network than the one that {distilled} was trained on" in error
        assert message in error
    assert "cannot be the base of its own adapters" in fails(f"--base={distilled}")
    # The same weights in another format and dtype are the same base.
    argv = ["convert", f"--from={trained}", f"--to={tmp_path}/same", "--dtype=bfloat16"]
    assert convert.main(argv) == 0
    argv = ["convert", f"--from={distilled}", "--merged", f"--to={tmp_path}/merged", f"--base={tmp_path}/same"]
    assert convert.main(argv) == 0


def test_a_base_that_changed_at_its_place_is_refused(distilled, tmp_path, capfd):
    shutil.copytree(distilled, tmp_path / "run")
    file = tmp_path / "run/checkpoints/4/meta/metadata"
    meta = json.loads(file.read_text())
    meta["base"]["path"] = str(_write(tmp_path / "base", preset("tiny")))
    file.write_text(json.dumps(meta))
    assert "base/flux.safetensors has content" in _merge_fails(capfd, tmp_path / "run", tmp_path / "x")


def test_nothing_that_is_read_is_written_over_not_even_a_base_that_is_not_named(distilled, trained, tmp_path):
    source = f"--from={distilled}"
    for target in (trained, trained.parent, trained / "sub", distilled / "sub"):
        with pytest.raises(UsageError, match="which is read, overlap: write somewhere else"):
            convert.main(["convert", source, "--merged", f"--to={target}", "--overwrite"])
    (tmp_path / "given").mkdir()
    for option in ("base", "lora", "tokenizer"):
        argv = ["convert", source, f"--{option}={tmp_path}/given", f"--to={tmp_path}/given/x"]
        with pytest.raises(UsageError, match="which is read, overlap"):
            convert.main(argv)


def test_a_fresh_embedding_is_given_as_a_copy(distilled):
    network = dataclasses.replace(network_of(distilled), guidance=True)
    shapes = {k: v.shape for k, v in flat_paths(abstract_params("flux", network)).items()}
    base = {k: np.zeros(v, np.float32) for k, v in shapes.items() if not k.startswith("guidance_in/")}
    whole = Completed(base, shapes, network)
    name = "guidance_in/in_layer/kernel"
    before = whole[name]
    assert np.any(before) and whole.fresh == "guidance_in"
    np.asarray(whole[name])[:] = 0
    np.testing.assert_array_equal(whole[name], before)


def test_the_hash_of_lazy_parameters_is_that_of_the_tree_and_holds_one_at_a_time():
    names = ["b/" + "x" * i for i in range(1, 25)]
    lazy = Watched(names, lambda name: np.full((8, 8), len(name), ml_dtypes.bfloat16))
    found = fingerprint_of((name, lazy[name]) for name in lazy)
    assert lazy.most <= LET_GO
    assert found == fingerprint(nest(dict(lazy)))
