import os
import subprocess
import sys

from shortcut_jax.__main__ import COMMANDS
from tests import test_floors


def _run(*arguments, **options):
    line = [sys.executable, "-m", "shortcut_jax", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, **options)


def test_without_arguments_all_commands_are_printed():
    assert tuple(sorted(COMMANDS)) == test_floors.COMMANDS
    done = _run()
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_one_line():
    done = _run("dance")
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no command 'dance': choose one of train, sample")


def test_a_command_takes_its_arguments_and_configs_of_the_package_from_any_folder(tmp_path):
    path = os.pathsep.join([str(test_floors.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    argv = ["train", "--config=digits", "--config.nonsense=1"]
    done = _run(*argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1 and "error: unknown config key 'nonsense'" in done.stderr


def test_bash_completes_commands_and_their_flags():
    complete = "COMP_WORDS=({}); COMP_CWORD={}; _shortcut_jax; echo ${{COMPREPLY[@]}}"
    script = [f'shortcut-jax() {{ "{sys.executable}" -m shortcut_jax "$@"; }}', 'eval "$(shortcut-jax --completion)"']
    script += [complete.format("shortcut-jax co", 1), complete.format("shortcut-jax sample --se", 2)]
    done = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["convert compare", "--seed --seeds"], done.stderr


def test_help_of_sample_needs_no_library_that_reads_or_writes():
    heavy = ("orbax", "grain", "tensorflow", "pandas", "pyarrow", "gradio", "transformers", "torch", "sklearn")
    code = f"import sys, shortcut_jax.sample; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
