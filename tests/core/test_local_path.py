"""Paths as users give them."""

import re
from pathlib import Path

import pytest

import shortcut_jax
from shortcut_jax import cli
from shortcut_jax.core.local_path import download_hint, local_path
from shortcut_jax.errors import PathError


def test_it_is_absolute_and_keeps_what_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("runs/a", "--workdir") == tmp_path / "runs" / "a"
    assert local_path(tmp_path, "--workdir") == tmp_path
    for good in ("Screenshot 3.00.00\u202fPM.png", "a\u3000b", "\U0001f469\u200d\U0001f680.png"):
        assert local_path(good, "--edit") == tmp_path / good
    assert local_path("~/a", "--workdir") == Path.home() / "a"


@pytest.mark.parametrize(
    "given, reason",
    [
        ("gs://bucket/run", "gcsfuse"),
        ("s3://bucket/run", "mount-s3"),
        ("hf://owner/name", "hf download"),
        ("abfs://x", "mount it"),
        (Path("gs://bucket/run"), "gcsfuse"),  # which pathlib makes gs:/bucket/run
        ("file:///tmp/x", "without file://"),
        ("", "empty"),
        ("  ", "empty"),
        ("a\0b", "character that no name may have"),
        ("a\nb", "character that no name may have"),
        ("pipe:aws s3 cp s3://b/x.tar -", "give files"),
        ("a/" + 300 * "b", "name of 300 bytes"),
        ("ab/" * 2000, "4095"),
        ("~nobody-of-this-name/x", "nobody-of-this-name"),
    ],
)
def test_what_no_file_can_have_is_refused_in_one_line(given, reason):
    with pytest.raises(PathError, match=reason) as refused:
        local_path(given, "--out")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("--out")


NO_PATHS = {
    *(
        "coordinator",
        "target",
        "vary",
        "compare",
        "efficiency",
        "format",
        "view",
        "views",
        "dtype",
        "method",
        "matmul_dtype",
        "features",
        "resize",
        "extras",
    ),
    *("prompt", "source_prompt", "store", "buckets", "where", "caption_field", "template", "layout", "text_states"),
    *("text_dtype", "host", "allow_host", "steps", "seeds", "other_steps", "batches", "counts"),
}


def test_every_flag_of_text_is_known_to_be_a_path_or_not_to_be_one():
    defined = re.compile(r'\b(?:DEFINE_(?:multi_)?(?:string|enum|list)|string|text|several)\(\s*"(\w+)"')
    files = Path(shortcut_jax.__file__).parent.glob("*.py")
    names = {name for file in files for name in defined.findall(file.read_text())}
    assert {"workdir", "from", "out", "prompt", "lora"} <= names
    assert not set(cli.PATH_FLAGS) & NO_PATHS
    assert names <= {*cli.PATH_FLAGS, *NO_PATHS}


def test_what_looks_like_a_name_on_the_hub_is_told_with_how_to_download_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    hint = lambda given: download_hint(local_path(given, "--from"))
    flux = "black-forest-labs/FLUX.1-dev"
    assert f"run hf download {flux} --local-dir FLUX.1-dev and give FLUX.1-dev" in hint(flux)
    file = hint("some/lora/a/b.safetensors")
    assert "hf download some/lora a/b.safetensors --local-dir lora and give lora/a/b.safetensors" in file
    (tmp_path / "runs").mkdir()
    for other in ("runs/a", "flux", tmp_path.parent / "x" / "y", "~/x", "../a/b"):
        assert hint(other) == ""
    from shortcut_jax import convert, sample

    for main, argv in (
        (sample.main, [f"--checkpoint={flux}", "--prompt=x"]),
        (convert.main, [f"--from={flux}", "--to=out"]),
        (convert.main, ["--from=runs", f"--lora={flux}", "--to=out"]),
        (convert.main, ["--from=runs", f"--tokenizer={flux}", "--to=out"]),
    ):
        with pytest.raises(SystemExit):
            cli.run(main, ["x", *argv])
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{flux} is not found: nothing is downloaded; if it is a model" in line
