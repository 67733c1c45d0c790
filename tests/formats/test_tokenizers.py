import shutil

import numpy as np
import pytest

from shortcut_jax.errors import ConvertedError
from shortcut_jax.formats.tokenizers import LAYOUTS, Tokenizer, copy_tokenizer
from tests.flux_pipeline import CLIP_TOKENS

PROMPTS = ["", "a red cat", "A photo of   two dogs, holding 7 zebras!", "small " * 70]


@pytest.mark.parametrize(("name", "length"), [("tokenizer", CLIP_TOKENS), ("tokenizer_2", 12), ("tokenizer_2", 64)])
def test_ids_and_cuts_equal_those_of_the_reference_pipeline(name, length, pipeline_folder, monkeypatch):
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux import pipeline_flux

    models = dict(text_encoder=None, text_encoder_2=None, transformer=None, vae=None)
    reference = FluxPipeline.from_pretrained(pipeline_folder, **models)
    # diffusers cuts what it reports at CLIP's length for T5 too.
    reference.tokenizer_max_length = length
    seen, warned = _watch(reference, name), []
    monkeypatch.setattr(pipeline_flux.logger, "warning", warned.append)
    for prompt in PROMPTS:
        tokens = Tokenizer(pipeline_folder / name)([prompt], length)
        warned.clear()
        with pytest.raises(_SeenError):
            embed = reference._get_clip_prompt_embeds if name == "tokenizer" else reference._get_t5_prompt_embeds
            embed(prompt, **({} if name == "tokenizer" else {"max_sequence_length": length}), device="cpu")
        np.testing.assert_array_equal(tokens.ids_BM, seen.pop())
        assert bool(tokens.cuts[0]) == bool(warned)
        if warned:
            assert warned[0].endswith(f"tokens: {[tokens.cuts[0]]}")
    assert tokens.cuts[0]  # the last one is long


class _SeenError(Exception):
    pass


def _watch(reference, name):
    """What the pipeline hands to its text encoder."""
    import torch

    seen = []

    class Encoder(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, ids, **kwargs):
            seen.append(ids.numpy())
            raise _SeenError

    # Registered for both, for the dtype is always asked of the first.
    reference.text_encoder = reference.text_encoder_2 = Encoder()
    return seen


def test_a_batch_is_padded_row_by_row(pipeline_folder):
    tokenizer = Tokenizer(pipeline_folder / "tokenizer_2")
    tokens = tokenizer(PROMPTS, 20)
    assert tokens.ids_BM.shape == (4, 20) and tokens.ids_BM.dtype == np.int32
    for row, prompt in zip(tokens.ids_BM, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, tokenizer([prompt], 20).ids_BM[0])
    assert list(tokens.ids_BM[0]) == [1] + 19 * [0] and tokens.ids_BM[3, -1] == 1
    assert tokens.cuts[:2] == ("", "") and tokens.cuts[3].split() == ["small"] * 51


def test_a_copy_has_the_tokenizer_only_and_equals_the_source(pipeline_folder, tmp_path):
    for name in LAYOUTS:
        source = tmp_path / "published" / name
        shutil.copytree(pipeline_folder / name, source)
        (source / "model.safetensors").write_bytes(b"weights")
        copy_tokenizer(source, tmp_path / name)
        assert not (tmp_path / name / "model.safetensors").exists()
        copied, own = Tokenizer(tmp_path / name), Tokenizer(pipeline_folder / name)
        np.testing.assert_array_equal(copied(PROMPTS, 16).ids_BM, own(PROMPTS, 16).ids_BM)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_no_tokenizer_is_one_line_with_advice(name, pipeline_folder, tmp_path):
    folder = tmp_path / name
    other = next(n for n in LAYOUTS if n != name)

    def fails(text):
        for attempt in (lambda: Tokenizer(folder), lambda: copy_tokenizer(folder, tmp_path / "copy" / name)):
            with pytest.raises(ConvertedError, match=f"{text}.*: convert again with --tokenizer and --tokenizer_2$"):
                attempt()
        assert not (tmp_path / "copy").exists()

    fails("there is no tokenizer of (CLIP|T5) in ")
    folder.mkdir()
    fails("which needs tokenizer.json, or ")
    shutil.copytree(pipeline_folder / other, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").touch()
    fails("is a (T5|CLIP)Tokenizer, not the tokenizer of (CLIP|T5)")
    (folder / "tokenizer_config.json").write_text("{")
    fails("is not JSON")
    (folder / "tokenizer_config.json").write_text("[]")
    fails("is not a JSON object")
    (folder / "tokenizer_config.json").write_text("[" * 10**5)
    fails("is not JSON")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConvertedError, match=r"cannot be read \(.*\): convert again"):
        Tokenizer(folder)


def test_merges_that_were_cut_off_at_a_line_are_told(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder / "tokenizer", tmp_path / "given")
    lines = (folder / "merges.txt").read_text().splitlines()
    Tokenizer(folder, "tokenizer")
    (folder / "merges.txt").write_text("\n".join(lines[:-3]))
    with pytest.raises(ConvertedError, match=r"given/merges\.txt lacks 3 merges of vocab\.json, so it was cut off"):
        Tokenizer(folder, "tokenizer")


def test_a_spiece_model_that_cannot_be_read_is_told_without_a_wrong_package(tmp_path, capfd):
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConvertedError, match=r"spiece\.model is damaged, or needs the package sentencepiece"):
        Tokenizer(tmp_path / "tokenizer_2")
    assert capfd.readouterr().err == ""
