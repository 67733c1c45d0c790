"""Command lines and config files: what is given is used, or refused in one line."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import types
import typing

import pytest
from absl import flags

from shortcut_jax import __version__, app, bench, cli, compare, convert, evaluate, prepare, sample, train
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.fields import attribute_docs, field_types
from shortcut_jax.config.load import load_config, load_teacher_config
from shortcut_jax.config.schema import Settings, known_fields, parse_field, to_dict
from shortcut_jax.errors import ConfigError, ConversionError, PathError, UsageError
from shortcut_jax.formats.json_objects import parse_json
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.workdir import check_workdir, record_of
from tests.helpers import tiny_config

FIELDS = known_fields()
DEFAULTS = {name: functools.reduce(getattr, name.split("."), Settings()) for name in FIELDS}


def _config(folder, text, encoding="utf-8"):
    path = folder / "config.py"
    path.write_bytes(text.encode(encoding))
    return path


def _parse(argv, **options):
    values = cli.new_flags()
    flags.DEFINE_string("out", None, "Where.", flag_values=values)
    flags.DEFINE_list("steps", ["1"], "How many.", flag_values=values)
    flags.DEFINE_boolean("fast", False, "Whether.", flag_values=values)
    flags.DEFINE_multi_string("lora", None, "Several.", flag_values=values)
    cli.define_config(values, "config", "Config file.", argv)
    return cli.parse(values, argv, "usage: x", configs=["config"], **options)


DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--out=a", "--out=b"], "--out is given 2 times"),
        (["--steps=1", "--steps=2"], "--steps is given 2 times"),
        (["--fast", "--nofast"], "--fast is given 2 times"),
        ([DIGITS, DIGITS], "--config is given 2 times"),
        ([DIGITS, "--config.steps=3", "--config.steps=4"], r"--config\.steps is given 2 times \(3, 4\)"),
        ([DIGITS, "--config.ema.warmup", "--noconfig.ema.warmup"], r"--config\.ema\.warmup is given 2 times"),
    ],
)
def test_a_flag_of_one_value_that_is_given_twice_is_refused(argv, line):
    with pytest.raises(UsageError, match=line):
        _parse(["x", *argv])


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--join_timeout=nan", "--join_timeout is nan, but must be finite"),
        ("--device_memory_gb=inf", "--device_memory_gb is inf, but must be finite"),
        (f"--stop_at={2**31}", r"--stop_at is out of range: it must be less than 2\^31 = 2147483648$"),
        (f"--stop_at={'9' * 5000}", "flag --stop_at=9+"),
    ],
)
def test_numbers_that_no_flag_can_mean_are_refused(flag, line):
    with pytest.raises(UsageError, match=line) as refused:
        train.main(["train", DIGITS, flag])
    assert len(str(refused.value)) < 500


def test_a_flag_of_several_values_may_be_given_again():
    assert [path[-2:] for path in _parse(["x", "--lora=a", "--lora=b"]).lora] == ["/a", "/b"]


def test_what_is_given_is_known():
    options = _parse(["x", "--fast", DIGITS, "--config.steps=3", "--config.ema.warmup=false"])
    assert options.given == {"fast", "config"} and options.overridden == {"steps", "ema.warmup"}
    assert options.config.steps == 3 and options.config.ema.warmup is False


def test_a_boolean_key_needs_no_value():
    assert _parse(["x", DIGITS, "--config.ema.warmup"]).config.ema.warmup is True
    assert _parse(["x", DIGITS, "--noconfig.ema.warmup"]).config.ema.warmup is False


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_survives_the_command_line(name):
    value = DEFAULTS[name]
    assert parse_field(name, str(value)) == value
    assert parse_field(name, " None " if value is None else str(value)) == value
    if isinstance(value, tuple):
        assert parse_field(name, ",".join(map(str, value))) == value
        assert parse_field(name, str(list(value))) == value


@pytest.mark.parametrize("name", [n for n, hint in FIELDS.items() if type(None) in typing.get_args(hint)])
def test_every_optional_field_can_be_unset(name, tmp_path):
    for text in ("None", "none", ""):
        config = load_config(_config(tmp_path, _GIVEN), {name: text})
        for part in name.split("."):
            config = config[part]
        assert config is None


@pytest.mark.parametrize("name", [n for n, hint in FIELDS.items() if "tuple" in str(hint) and "None" not in str(hint)])
def test_every_tuple_can_be_emptied_and_takes_one_element(name):
    assert {parse_field(name, text) for text in ("", "()", "[]", "None")} == {()}
    (kind, _) = typing.get_args(FIELDS[name])
    assert parse_field(name, "1") == parse_field(name, "(1,)") == parse_field(name, "[1]") == (kind("1"),)
    assert parse_field(name, "1, 2") == (kind("1"), kind("2"))


@pytest.mark.parametrize("name", [n for n, hint in FIELDS.items() if "str" not in str(hint)])
def test_every_field_that_is_no_text_refuses_text(name):
    with pytest.raises(ConfigError, match=rf"^{name} is 'some text', but must be \w+"):
        parse_field(name, "some text")


_GIVEN = """
from shortcut_jax.settings import default_config

def get_config():
    c = default_config()
    c.init_from = c.base = c.teacher_lora = c.validation.name = "given"
    c.batch_size = c.batch_per_device = c.model.width = c.data.stride = 4
    return c
"""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1e3", 1000),
        ("steps", "1_000", 1000),
        ("optimizer.learning_rate", "1", 1.0),
        ("ema.warmup", "True", True),
        ("ema.warmup", "f", False),
        ("student_weights", "1, 2.5", (1.0, 2.5)),
        ("model.axes", "(4,6,6)", (4, 6, 6)),
        ("init_from", "None/of/these", "None/of/these"),
        ("data.mix", "a,b", ("a", "b")),
        ("data.mix", "(a, b)", ("a", "b")),
        ("data.mix", "1,2", ("1", "2")),
        ("eval.captions", "a red one", ("a red one",)),
        ("eval.captions", "('a, b', 'c')", ("a, b", "c")),
        ("eval.captions", "'a, b'", ("a, b",)),
        ("optimizer.decay_paths", "None", "None"),
    ],
)
def test_values_are_read_by_the_type_of_their_field(name, text, value):
    read = parse_field(name, text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("steps", "1.5", r"steps is 1\.5, but must be int$"),
        ("steps", "many", r"steps is 'many', but must be int$"),
        ("steps", "inf", "steps is 'inf', but must be int$"),
        ("steps", "9" * 5000, r"steps is '9+\.\.\.', but must be int$"),
        ("steps", "None", "steps is 'None', but must be int$"),
        ("batch_size", "x", "batch_size is 'x', but must be int or None$"),
        ("ema.warmup", "2", r"ema\.warmup is 2, but must be bool$"),
        ("student_steps", "1,x", "student_steps is '1,x', but must be tuple of int$"),
        ("student_steps", "1,,2", "student_steps is '1,,2', but must be tuple of int: one of its elements is empty"),
        ("student_steps", "((1,2))", "must be tuple of int$"),
        ("eval.captions", "a cat, sitting", "must be tuple of str: quote each text"),
        ("stepz", "3", r"unknown config key 'stepz': did you mean steps or"),
        ("optimizer.learnig_rate", "3", r"'optimizer\.learnig_rate': did you mean optimizer\.learning_rate\?$"),
        ("warmup", "3", r"'warmup': did you mean ema\.warmup\?$"),
        ("optimizer.xyz", "3", r"unknown config key 'optimizer\.xyz'; known here: optimizer\.learning_rate, "),
        ("model", "3", r"'model' is a group of config keys: set one of model\.preset, "),
    ],
)
def test_what_is_no_value_of_a_field_is_named(name, text, line):
    with pytest.raises(ConfigError, match=line) as refused:
        parse_field(name, text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\ny = nothing\n", r"config\.py, line 2: NameError: name 'nothing' is not defined$"),
        ("def get_config():\n    return [][1]\n", r"line 2: IndexError: list index out of range$"),
        ("assert False\n", r"line 1: AssertionError$"),
        ("def get_config():\n    raise RuntimeError('a\\nb')\n", "line 2: RuntimeError: a b$"),
        ("import sys\nsys.exit(3)\n", "line 2: it calls sys.exit$"),
        ("def get_config(:\n", r"line 1: SyntaxError: "),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'$"),
        ("def get_config():\n    return get_config()\n", "line 2: RecursionError: "),
        ("def get_config(a):\n    return a\n", r"config\.py: TypeError: get_config\(\) missing 1 required"),
        ("x = 1\n", r"config\.py has no get_config\(\): define it"),
        ("get_config = 3\n", r"config\.py: TypeError: 'int' object is not callable"),
        ("def get_config():\n    return 3\n", r"get_config\(\) returns int, but must return a config"),
        ("def get_config():\n    pass\n", r"get_config\(\) returns NoneType, but must return"),
        ("from shortcut_jax.settings import default_config as d\ndef get_config():\n    d().stepz = 3\n",
         r"line 3: unknown config key 'stepz': did you mean steps"),
        ("from shortcut_jax.settings import default_config as d\ndef get_config():\n    d().steps = 'x'\n",
         r"line 3: TypeError: Could not override field 'steps'"),
        ("a = 1\0\n", r"config\.py.*: (SyntaxError|ValueError): "),
    ],
)  # fmt: skip
def test_a_config_file_that_fails_is_one_line_with_its_place(text, line, tmp_path):
    with pytest.raises(ConfigError, match=line) as refused:
        load_config(_config(tmp_path, text), {})
    assert "\n" not in str(refused.value)


def test_a_latin_1_config_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.py, line \d: SyntaxError: .*utf-8"):
        load_config(_config(tmp_path, "x = 'é'\n", "latin-1"), {})


def test_ctrl_c_in_a_config_file_ends_the_command(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_config(_config(tmp_path, "raise KeyboardInterrupt\n"), {})


def test_a_file_that_is_no_config_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^the config file .*/nowhere\.py is not found$"):
        load_config(tmp_path / "nowhere.py", {})
    with pytest.raises(ConfigError, match=r"is a folder, not a config file$"):
        load_config(tmp_path, {})
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    with pytest.raises(ConfigError, match=r"must be a Python file \(\.py\), or the config\.json of a workdir"):
        load_config(tmp_path / "c.yaml", {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--config=.*/config\.json repeats its run$"):
        load_config(tmp_path, {})


def test_a_config_json_repeats_a_run_with_overrides(tmp_path):
    settings = from_config(tiny_config(student_weights=(1.0, 2.0, 1.0), init_from="/a"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(settings)))
    assert from_config(load_config(path, {})) == settings
    changed = from_config(load_config(path, {"steps": "9", "init_from": "None", "student_steps": "1,2,4"}))
    assert changed == dataclasses.replace(settings, steps=9, init_from=None)
    assert load_teacher_config(path) is None
    with pytest.raises(UsageError, match="repeats a run: name its folder with --workdir"):
        train.main(["train", f"--config={path}"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", r"config\.json, line 1: not JSON: "),
        ("[" * 100_000 + "]" * 100_000, "is not the config.json of a workdir: RecursionError"),
        ("[]", "is not the config.json of a workdir"),
        ("{}", "is not the config.json of a workdir"),
        ('{"guide": "told", "model": 3}', "is not the config.json of a workdir"),
        ('{"guide": "told", "shift": []}', "is not the config.json of a workdir"),
    ],
)
def test_json_that_is_no_config_is_one_line(text, line, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=line):
        load_config(path, {})


def test_json_of_others_that_is_nested_too_deeply_is_one_line():
    with pytest.raises(ConversionError, match=r"^x is not JSON that can be read: it is nested too deeply$"):
        parse_json("[" * 100_000, "x")


def test_an_unknown_key_of_a_config_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**to_dict(from_config(tiny_config())), "stepz": 3}))
    with pytest.raises(ConfigError, match=r"unknown config key 'stepz': did you mean steps"):
        from_config(load_config(path, {}))


def test_overrides_reach_what_refers_to_them(tmp_path):
    text = "    c.log_every = c.get_ref('steps')\n    return c\n"
    path = _config(tmp_path, _GIVEN.replace("    return c\n", text))
    assert load_config(path, {"steps": "7"}).log_every == 7


@pytest.mark.parametrize("main", [train.main, bench.main], ids=["train", "bench"])
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--config=nowhere.py"], "is not found$"),
        (["--config=gs://bucket/c.py"], "gcsfuse"),
        ([DIGITS, "--config.stepz=3"], "unknown config key 'stepz'"),
        ([DIGITS, "--config.steps"], "Missing value for flag --config.steps"),
        (["--config.steps=3"], r"--config\.steps is given without --config|--config is missing"),
        ([DIGITS, "--out=\udce9"], r"the argument b'--out=\\xe9' is not UTF-8"),
    ],
)
def test_every_command_with_a_config_refuses_in_one_line(main, argv, line):
    with pytest.raises((UsageError, ConfigError, PathError), match=line):
        main(["x", *argv])


def test_the_second_config_of_bench_is_loaded_alike(tmp_path):
    bad = _config(tmp_path, "assert False\n")
    with pytest.raises(ConfigError, match="line 1: AssertionError"):
        bench.main(["bench", DIGITS, f"--vs={bad}"])
    with pytest.raises(UsageError, match=r"--vs\.steps is given without --vs"):
        bench.main(["bench", DIGITS, "--vs.steps=3"])


@pytest.mark.parametrize(
    ("main", "argv", "line"),
    [
        (bench.main, ["--turns=3"], "--turns can only go with --sample"),
        (
            bench.main,
            ["--sample", "--steps=3", "--vary=seed=0,1"],
            "--steps and --vary can only go with step times, not with",
        ),
        (train.main, ["--target=cpu:8"], "--target can only go with --dry_run"),
        (train.main, ["--explain"], "--explain can only go with --dry_run"),
        (train.main, ["--compare=jumps=2,4"], "--compare can only go with --dry_run"),
        (train.main, ["--dry_run", "--efficiency=gemm=2"], "--efficiency=gemm=2, but must be NAME=SHARE of"),
        (train.main, ["--dry_run", "--compare=remat=full"], "'remat' cannot be set to 'full'"),
        (train.main, ["--dry_run", "--compare=jumps"], "--compare=jumps names no value: jumps=A,B"),
        (train.main, ["--base=/a", "--config.base=/b"], "give --base or --config.base, not both"),
        (train.main, ["--stop_at=0"], "--stop_at is 0"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(main, argv, line):
    with pytest.raises(UsageError, match=line):
        main(["x", DIGITS, *argv])


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_the_help_of_training_has_every_field_with_its_default(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["train", flag])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--workdir" in text
    for name, hint in FIELDS.items():
        assert f"--config.{name}:" in text
        if not isinstance(hint, types.UnionType):
            assert f"({hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else 'tuple of '}" in text
    assert "--config.data.caption_dropout: probability of replacing a caption by the empty one. (float, 0.1)" in text
    assert (
        "--config.batch_size: global batch, rows a step; give this or `batch_per_device`. (int or None, None)" in text
    )


def test_every_field_is_documented():
    def undocumented(cls):
        docs = attribute_docs(cls)
        for name, hint in typing.get_type_hints(cls).items():
            yield from undocumented(hint) if dataclasses.is_dataclass(hint) else [] if docs.get(name) else [name]

    assert list(undocumented(Settings)) == []
    assert set(field_types(Settings)) == set(FIELDS)


COMMANDS = [train, sample, evaluate, app, prepare, convert, compare, bench]
every_command = pytest.mark.parametrize("module", COMMANDS, ids=lambda m: m.__name__.rpartition(".")[2])


@every_command
def test_the_version_of_every_command_is_printed(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["x", "--version"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert out.startswith(f"shortcut_jax {__version__}, jax ") and out.count("\n") == 1 and not err


@every_command
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_the_help_of_every_command_has_its_flags(module, flag, capsys, monkeypatch):
    defined, parse = [], cli.parse
    monkeypatch.setattr(cli, "parse", lambda values, *a, **more: (defined.extend(values), parse(values, *a, **more)))
    with pytest.raises(SystemExit) as stop:
        module.main(["x", flag])
    out, err = capsys.readouterr()
    name = module.__name__.rpartition(".")[2]
    assert stop.value.code == 0 and not err and out.startswith(f"usage: python -m shortcut_jax.{name} ")
    assert len(defined) > 4
    defined.remove("h")  # short for help
    assert [n for n in defined if not re.search(rf"^ +(-\w,)?--(\[no\])?{n}\b", out, re.MULTILINE)] == []


def test_whole_numbers_of_a_flag_are_decimal():
    assert cli.whole_numbers("steps", ["1", " 2"], 1) == [1, 2]
    for texts in (["²"], ["9" * 5000], ["-1"], ["1.5"], []):
        with pytest.raises(UsageError, match="but must be whole numbers") as refused:
            cli.whole_numbers("steps", texts, 1)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (["--inspect=a", "--out=b", "--store=pixels"], "--inspect: --store"),
        (["--from_teacher=a", "--template=x", "--store=pixels"], "--from_teacher: --template, --store"),
        (["--from_teacher=a", "--steps=3", "--lora=x", "--store=latents"], None),
        (["--source=a", "--steps=3", "--lora=x"], "--source, without --from_teacher: --steps, --lora"),
        (["--source=a", "--text_tokens=3"], "--store=pixels: --text_tokens"),
        (["--source=a", "--store=latents", "--text_tokens=3", "--where=a=b"], None),
    ],
)
def test_flags_that_a_set_is_not_made_by_are_named(argv, note, capsys):
    prepare.note_unused(cli.parse(prepare.define_flags(), ["prepare", *argv], "usage"))
    assert capsys.readouterr().err == (f"note: unused with {note}\n" if note else "")


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (["--checkpoint=a", "--prompts=b", "--base=c", "--height=64"], "--checkpoint: --base"),
        (["--checkpoint=a", "--prompts=b", "--base=c", "--teacher=d"], None),
        (["--workdir=a", "--base=c"], None),
        (["--workdir=a", "--resize=legacy"], "no --inception: --resize"),
        (["--save_reference=a", "--reference=b", "--features=random", "--steps=3"], "--save_reference: --steps"),
    ],
)
def test_flags_that_nothing_is_judged_by_are_named(argv, note, capsys):
    flag = f"--resize={evaluate.RESIZES[-1]}"
    argv = [flag if a.startswith("--resize") else a for a in argv]
    evaluate._check(cli.parse(evaluate._flags(), ["evaluate", *argv], "usage"))
    assert capsys.readouterr().err == (f"note: unused with {note}\n" if note else "")


def test_a_dry_run_names_the_flags_of_training(capsys, monkeypatch):
    monkeypatch.setattr("shortcut_jax.diagnostics.dry_run.run", lambda *args: 0)
    assert train.main(["train", DIGITS, "--dry_run", "--workdir=x", "--stop_at=3"]) == 0
    assert capsys.readouterr().err == "note: unused with --dry_run: --workdir, --stop_at\n"


def test_the_config_json_of_a_workdir_is_the_same_run(trained, one_device):
    settings = from_config(load_config(trained / "config.json", {}))
    check_workdir(trained, record_of(Assembly(settings)))
    with pytest.raises(ConfigError, match=r"holds a different run; .*seed: 0 -> 1"):
        check_workdir(trained, record_of(Assembly(dataclasses.replace(settings, seed=1))))


def test_a_reader_who_leaves_ends_a_command_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    script = "from shortcut_jax import cli; cli.run(lambda argv: print('x' * 100_000))"
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
