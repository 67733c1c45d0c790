"""Fields that a run does not use are named; those that it uses are not."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.derive import objective_settings
from shortcut_jax.config.schema import known_fields
from shortcut_jax.config.unused import WHY_UNUSED, unused
from shortcut_jax.data.format import TextInfo
from shortcut_jax.data.training import OpenSet, TrainingData
from shortcut_jax.steps.objectives import OBJECTIVES, Rows, draw
from shortcut_jax.training.caption_lengths import MOST_READ, report_cuts
from shortcut_jax.training.summary import announce, announce_data
from tests.helpers import POST_TRAINING, tiny_assembly, tiny_config

FLOW, MEANFLOW, ALPHA = ({"objective": name} for name in ("flow", "meanflow", "alpha"))
TAUGHT = {**POST_TRAINING, "teacher_grid": 8, "student_weights": ()}
CASES = [
    ({}, {"lora__rank": 3, "lora__alpha": 2.0, "lora__rslora": True, "lora__paths": "x"}, POST_TRAINING, "train=all"),
    (POST_TRAINING, {"model__param_dtype": "bfloat16"}, {}, "train=lora"),
    ({}, {"init_view": "fast"}, {"init_from": "/a"}, "init_from=None"),
    ({}, {"teacher_grid": 8}, TAUGHT, "teacher_share=0"),
    (FLOW, {"rows__self_rows": 2, "rows__flow_rows": 2}, {}, "objective=flow"),
    (FLOW, {"student_steps": (1, 2), "student_weights": (1.0, 2.0)}, {}, "objective=flow"),
    ({"rows__self_rows": 0}, {"student_steps": (1, 2), "student_weights": (1.0, 2.0)}, {}, "rows.self_rows=0"),
    ({**TAUGHT, "teacher_share": 1.0}, {"student_steps": (1, 2), "student_weights": (1.0, 2.0)}, {}, "teacher_share=1"),
    (FLOW, {"one_step_share": 0.8}, {"student_weights": ()}, "objective=flow"),
    (FLOW, {"multistep_start": 0.99}, {}, "objective=flow"),
    (FLOW, {"multistep_start": 0.99, "multistep_times": "all"}, {}, "objective=flow"),
    ({}, {"multistep_times": "all"}, {"multistep_start": 0.99}, "multistep_start=1"),
    ({"rows__self_rows": 0}, {"multistep_start": 0.99}, {}, "rows.self_rows=0"),
    ({"objective": "shortcut"}, {"multistep_start": 0.99}, {}, "objective=shortcut"),
    (FLOW, {"jumps": 4, "shift__low": 0.5, "shift__high": 2.0, "shift__dynamic": 0.5}, {}, "objective=flow"),
    ({"rows__flow_rows": 0}, {"timestep": "logit_normal"}, FLOW, "rows.flow_rows=0"),
    ({**MEANFLOW, "rows__flow_rows": 0}, {"timestep_range": (0.0, 0.9)}, MEANFLOW, "rows.flow_rows=0"),
    (FLOW, {"timestep_range": (0.0, 0.9)}, {}, "objective=flow"),
    (MEANFLOW, {"student_steps": (1, 2), "jumps": 4}, {}, "objective=meanflow"),
    (FLOW, {"rows__rolled_rows": 1}, {"rows__flow_rows": 2}, "objective=flow"),
    ({}, {"rolled_steps": 2}, {"rows__rolled_rows": 1, "rows__flow_rows": 2}, "rows.rolled_rows=0"),
    ({}, {"alpha__first": 0.9, "alpha__last": 0.2, "alpha__until": 1.0}, ALPHA, "objective=scfm"),
    ({}, {"data__weights": (2.0,)}, None, "data.mix=()"),
    ({}, {"data__text_states": "trimmed"}, {"data__text_encoder": "stored"}, "data.text_encoder=words"),
    ({"optimizer__weight_decay": 0.0}, {"optimizer__decay_paths": ".*"}, {}, "optimizer.weight_decay=0"),
    ({"ema__dual": False}, {"ema__fast": 0.5, "ema__warmup_ratio": 2.0}, {"ema__warmup": True}, "ema.dual=False"),
    ({}, {"ema__warmup_ratio": 2.0}, {"ema__warmup": True}, "ema.warmup=False"),
    ({}, {"spikes__after": 5, "spikes__decay": 0.5}, {"spikes__factor": 3.0, "max_skipped": 1}, "spikes.factor=0"),
    (
        {"watchdog__seconds": 0.0},
        {"watchdog__slow_seconds": 9000.0, "watchdog__grace_seconds": 3.0},
        {},
        "watchdog.seconds=0",
    ),
    (
        {},
        {"eval__seeds": (3,), "eval__batch_size": 3},
        {"eval__views": ("slow",), "eval__images": (0,)},
        "eval.views=()",
    ),
    (
        {},
        {f"validation__{k}": v for k, v in dict(name="x", split="a", rule="midpoints", images=3, seed=4).items()}
        | {"validation__views": ("fast",)},
        {"validation__every": 3},
        "validation.every=0",
    ),
]


def _names(changes):
    return [name.replace("__", ".") for name in changes]


def _named(lines):
    return {name: reason for reason, names in _split(lines) for name in names.split(", ")}


def _split(lines):
    return [re.fullmatch(r"unused with (.*): (.*)", line).groups() for line in lines]


@pytest.mark.parametrize(("without", "changes", "used_with", "reason"), CASES, ids=lambda c: str(c)[:40])
def test_an_unused_field_that_is_set_is_named_and_a_used_one_is_not(without, changes, used_with, reason):
    if "data__text_encoder" in (used_with or {}):
        used_with = {**used_with, "data__store": "latents", "data__stride": 1}
    named = _named(unused(from_config(tiny_config(**{**without, **changes}))))
    assert {name: named.get(name) for name in _names(changes)} == dict.fromkeys(_names(changes), reason)
    if used_with is not None:
        named = _named(unused(from_config(tiny_config(**{**used_with, **changes}))))
        assert not set(_names(changes)) & set(named)


def test_a_field_at_its_default_is_not_named():
    assert unused(from_config(tiny_config(student_steps=tuple(from_config(tiny_config()).student_steps)))) == []
    assert "student_steps" in _named(unused(from_config(tiny_config(**FLOW))))  # tiny: (1, 2, 4)


def test_every_field_of_the_table_is_a_field_and_is_tried_above():
    tried = {name for _, changes, _, _ in CASES for name in _names(changes)}
    in_table = {n for n in known_fields() for pattern, _ in WHY_UNUSED if re.fullmatch(pattern, n)}
    assert tried == in_table
    assert all(any(re.fullmatch(pattern, name) for name in known_fields()) for pattern, _ in WHY_UNUSED)


def _examples(**changes):
    """The draws of a batch, and what its rows are asked (of configs without self rows)."""
    settings = objective_settings(from_config(tiny_config(**changes)))
    draws = draw(jax.random.key(0), 12, (4, 3), settings)
    rows = Rows(jax.random.normal(jax.random.key(1), (12, 4, 3)), None, draws)
    return draws, None if settings.teacher_share else OBJECTIVES[settings.name].examples(rows, None, settings)


@pytest.mark.parametrize(
    ("without", "changes", "used"),
    [
        (FLOW, dict(rows__self_rows=2, student_steps=(1, 2), jumps=4, shift__low=0.5), {"timestep": "logit_normal"}),
        ({"rows__self_rows": 0}, dict(student_steps=(1, 2), jumps=4, shift__low=0.5), {"timestep": "logit_normal"}),
        ({**TAUGHT, "teacher_share": 1.0}, {"student_steps": (1, 2)}, {"shift__low": 0.5}),
    ],
)
def test_what_is_unused_changes_nothing_that_rows_are_asked(without, changes, used):
    compared = lambda found: found[1] if found[1] is not None else (found[0].intervals.times_BJ, found[0].teacher_B)
    plain, same, other = (compared(_examples(**{**without, **more})) for more in ({}, changes, used))
    equal = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert equal(plain, same) and not equal(plain, other)


def test_a_run_says_what_it_does_not_use(capsys, tmp_path):
    announce(tiny_assembly(objective="flow", jumps=4), tmp_path, 0)
    assert "unused with objective=flow: student_steps, jumps\n" in capsys.readouterr().err
    announce(tiny_assembly(jumps=4), tmp_path, 0)
    assert "unused" not in capsys.readouterr().err


class _Set:
    """Captions that count how often they are read."""

    def __init__(self, captions):
        self.captions, self.read = captions, []

    def __getitem__(self, i):
        self.read.append(i)
        return {"caption": self.captions[i].encode()}

    def __len__(self):
        return len(self.captions)


def _data(settings, **sets):
    opened = [OpenSet(n, r, ((8, 8),), np.zeros(len(r), int), None) for n, r in sets.items()]
    return SimpleNamespace(settings=settings.data, sets=opened)


def test_captions_that_are_cut_are_counted_in_every_set_of_a_mix():
    settings = from_config(tiny_config(data__text_tokens=3))
    records = lambda captions: [{"caption": c.encode()} for c in captions]
    short, long = records(["one two three"] * 5), records(["one"] * 6 + ["a b c d", "a b c d e"])
    assert report_cuts(_data(settings, short=short)) == []
    assert report_cuts(_data(settings, short=short, long=long)) == [
        "25.0% of the 8 captions of long have more than data.text_tokens=3 words and are cut; the longest has 5"
    ]
    large = _Set(["one"] * 5000 + ["a b c d"] * 5000)
    (line,) = report_cuts(_data(settings, large=large))
    assert line.startswith("50.0% of the 1,000 captions sampled of the 10,000 of large have more than")
    assert line.endswith("the longest of them has 4") and len(large.read) == MOST_READ
    assert (min(large.read), max(large.read)) == (0, 9999)


@pytest.mark.parametrize(
    ("cut", "line"),
    [
        (None, "set stores 6 tokens a caption: longer ones were cut when it was prepared"),
        (5, "50.0% of the captions of set had more than the 6 tokens that it stores and were cut when it was prepared"),
        (0, None),
    ],
)
def test_a_set_of_stored_states_says_what_was_cut_when_it_was_prepared(cut, line):
    info = SimpleNamespace(text=TextInfo("full", "bfloat16", 6, 16, 12, cut=cut), total=10)
    one = OpenSet("set", [], ((8, 8),), np.zeros(0, int), SimpleNamespace(info=info))
    data = SimpleNamespace(settings=SimpleNamespace(text_encoder="stored"), sets=[one])
    assert report_cuts(data) == ([line] if line else [])


def test_the_captions_of_a_run_are_counted_before_its_first_step(data_dir, capsys):
    assembly = tiny_assembly(data__dir=data_dir, data__text_tokens=3)
    announce_data(assembly, TrainingData(assembly.settings.data))
    assert re.search(
        r"100\.0% of the 1,\d{3} captions of digits have more than data\.text_tokens=3 words and are cut; "
        r"the longest has 4\n",
        capsys.readouterr().err,
    )
    assembly = tiny_assembly(data__dir=data_dir)
    announce_data(assembly, TrainingData(assembly.settings.data))
    assert "cut" not in capsys.readouterr().err
