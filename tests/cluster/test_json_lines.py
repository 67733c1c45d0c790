from shortcut_jax.cluster.json_lines import append_line, read_lines


def test_nan_is_null_in_a_line(tmp_path):
    append_line(tmp_path / "lines.jsonl", {"loss": float("nan"), "step": 3})
    assert (tmp_path / "lines.jsonl").read_text() == '{"loss": null, "step": 3}\n'


def test_lines_come_back_in_order_but_for_those_that_are_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    append_line(path, {"a": 2})
    path.write_bytes(path.read_bytes()[:-4])
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a":', '{"a": 3}']
