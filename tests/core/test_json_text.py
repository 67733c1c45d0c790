import json

import pytest

from shortcut_jax.core.json_text import to_json


def test_what_json_has_no_numbers_for_is_null():
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [1.5, inf, (-inf, "NaN")], "c": {"d": {"e": nan}}, "f": None, "g": True}
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)
    assert strict(to_json(value, indent=2)) == {
        "a": None,
        "b": [1.5, None, [None, "NaN"]],
        "c": {"d": {"e": None}},
        "f": None,
        "g": True,
    }
