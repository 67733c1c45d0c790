"""Training: `python -m shortcut_jax.train --config=configs/digits.py [--config.steps=200] [--workdir=...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from shortcut_jax import cli
from shortcut_jax.cluster import consistency, distributed
from shortcut_jax.cluster.consistency import check_devices
from shortcut_jax.cluster.logs import mark_stderr
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.resume import flatten
from shortcut_jax.config.schema import Settings, to_dict
from shortcut_jax.config.vary import variants
from shortcut_jax.core.local_path import local_path
from shortcut_jax.data.records import check_available
from shortcut_jax.errors import UsageError
from shortcut_jax.run.check_training import assemble_training
from shortcut_jax.run.workdir import keep_batch
from shortcut_jax.runtime.checkpoint import stored_config
from shortcut_jax.runtime.compilation_cache import keep_programs
from shortcut_jax.runtime.host_memory import keep_freed_memory
from shortcut_jax.training.session import train, train_teacher

USAGE = "usage: python -m shortcut_jax.train --config=configs/digits.py [--config.key=value ...] [--workdir=DIR]"


def main(argv: Sequence[str]) -> int:
    """Parses the command line and trains, or compiles only with `--dry_run`. Returns the exit code."""
    from absl import flags

    values = cli.new_flags()
    cli.define_config(values, "config", "Config file.", argv)
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/CONFIG-OBJECTIVE by default.", flag_values=values)
    flags.DEFINE_integer("stop_at", None, "Stop after this step, as if interrupted.", flag_values=values)
    flags.DEFINE_string("base", None, "Frozen base of the run, where it has moved.", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "Only compile the step and print what it needs.", flag_values=values)
    flags.DEFINE_string("target", None, "Devices of a dry run: cpu:8, gpu:h100:8x8, tpu:v5p:4x4x4.", flag_values=values)
    flags.DEFINE_boolean("explain", False, "Print collectives and times of a dry run in full.", flag_values=values)
    text = "NAME=SHARE of a device's figures that kernels reach in a dry run, as gemm=0.6; repeatable."
    flags.DEFINE_multi_string("efficiency", None, text, flag_values=values)
    text = "FIELD=A,B: programs of a dry run side by side, as model.remat=full,selective."
    flags.DEFINE_string("compare", None, text, flag_values=values)
    flags.DEFINE_float("device_memory_gb", None, "Memory limit of a dry run.", flag_values=values)
    cli.define_place(values)
    options = cli.parse(values, argv, USAGE, required=["config"], configs=["config"])
    _check_flags(options)
    if not options.dry_run:
        keep_freed_memory()
        distributed.initialize(options.coordinator, options.num_processes, options.process_id, options.join_timeout)
        mark_stderr()
    if options.base is not None:
        options.config.base = options.base
    settings = from_config(options.config)
    if options.dry_run:
        return _dry_run(options, settings)
    check_available(settings.data)
    config_file = options.config_path
    workdir = local_path(options.workdir or f"runs/{config_file.stem}-{settings.objective}", "--workdir")
    check_place(workdir, "--workdir")
    check_same(settings, workdir, options.stop_at)
    check_devices()
    keep_programs()
    assembly = assemble_training(keep_batch(settings, workdir, len(jax.devices())))
    started = distributed.agree(stored_config(workdir / "checkpoints") is not None)
    code = 0 if started else train_teacher(config_file, settings)
    return code or train(assembly, workdir, options.stop_at)


def _dry_run(options: Any, settings: Settings) -> int:
    """Compiles only: the settings, or each of those that are compared."""
    from shortcut_jax.diagnostics import dry_run, roofline

    shares = roofline.parse_efficiencies(options.efficiency) if options.efficiency else None
    if options.compare is None:
        return dry_run.run(settings, options.target, options.device_memory_gb, options.explain, shares)
    compared = variants(options.config, "compare", options.compare)
    return dry_run.compare(compared, options.target, options.device_memory_gb, shares)


def _check_flags(options: Any) -> None:
    """Raises UsageError for flags that do not go together: none is ignored."""
    cli.only_with(
        options, "--dry_run", options.dry_run, ("target", "explain", "device_memory_gb", "efficiency", "compare")
    )
    if options.dry_run:
        of_training = ("workdir", "stop_at", "coordinator", "num_processes", "process_id", "join_timeout")
        cli.note_unused(options, "--dry_run", of_training)
        if options.compare is not None:
            cli.note_unused(options, "--compare", ["explain"])
    if options.stop_at is not None and options.stop_at < 1:
        raise UsageError(f"--stop_at is {options.stop_at}, but must be at least 1")
    if options.base is not None and "base" in options.overridden:
        raise UsageError("give --base or --config.base, not both")
    if options.workdir is None and options.config_path.suffix == ".json" and not options.dry_run:
        raise UsageError(f"--config={options.config_path} repeats a run: name its folder with --workdir")


PER_HOST_KEYS = ("data.dir", "data.threads", "data.workers", "base")
"""Config keys that may differ between hosts: where it has its files, and how it reads them."""


def check_same(settings: Settings, workdir: Path, stop_at: int | None) -> None:
    """Raises AgreementError where the processes were started with different configs, code or flags of XLA."""
    config = {key: value for key, value in flatten(to_dict(settings)).items() if key not in PER_HOST_KEYS}
    consistency.check_same({**config, "--workdir": workdir.name, "--stop_at": stop_at, **consistency.code_facts()})


if __name__ == "__main__":
    cli.run(main)
