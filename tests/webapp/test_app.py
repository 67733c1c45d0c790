"""The web page without its page: models, times, and the command."""

import dataclasses
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from shortcut_jax import TextToImage, app, sample
from shortcut_jax.errors import RequestError, UserError
from shortcut_jax.formats import export
from shortcut_jax.inference.image_files import read_records
from shortcut_jax.inference.request import Guidance, ModelLimits, SampleRequest
from shortcut_jax.inference.run_pipeline import FEW, Pipeline
from shortcut_jax.inference.run_prompts import example_prompts
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.webapp import studio as studios
from shortcut_jax.webapp.request import MAX_STEPS, make_edit, make_request
from shortcut_jax.webapp.studio import COMPARED, Studio
from shortcut_jax.weights.lora_files import to_peft
from tests.weights.lora_cases import random_modules

SEVEN = "a handwritten digit seven"
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def reads(monkeypatch):
    """What is read of checkpoints."""
    items, restore = [], Checkpoints.restore

    def counted(self, step, wanted):
        items.extend(wanted)
        return restore(self, step, wanted)

    monkeypatch.setattr(Checkpoints, "restore", counted)
    return items


def _close(actual, expected):
    return np.abs(actual.astype(int) - expected).max() <= 1


def _reference(workdir, batch_size=FEW, **options):
    """What is compiled for it is what the page's models compile too."""
    return Pipeline(workdir, max_steps=MAX_STEPS, batch_size=batch_size, **options)


def _studio(workdir, views=("slow", "online", "fast")):
    return app.open_studio(SimpleNamespace(checkpoint=None, workdir=workdir, views=views, base=None, encoders=None))


def _served(folder, loras=(), max_size=1024):
    options = SimpleNamespace(checkpoint=folder, loras=loras, max_size=max_size, matmul_dtype=None)
    return app.open_studio(options)


def _programs(studio):
    """The compiled samplers of all its generators, which share them."""
    run = studio._model
    return sum(f._cache_size() for f in {g._sample for g in (run.generate, *run._generators.values())})


@pytest.mark.slow
@pytest.mark.usefixtures("own_programs")
def test_views_are_read_once_and_share_the_compiled_samplers(trained, reads):
    studio = _studio(trained)
    assert reads == ["slow"] and studio.limits.views == ("slow", "online", "fast") and studio.limits.height == 8
    asked = lambda **values: make_request(studio.limits, {"prompt": SEVEN, "steps": 2, "num": 3, "seed": 5, **values})
    images = {}
    for view in ("slow", "online", "fast", "online", "slow"):
        for num in (3, 1):
            answer = studio.sample(asked(view=view, num=num))
            assert (answer.loading > 0) == (view != "slow" and view not in images)
            drawn = answer.images
            assert len(drawn) == num and _close(drawn, images.setdefault(view, drawn)[:num])
    assert reads == ["slow", "params", "fast"] and _programs(studio) == 2  # for one image and for a few
    expected = _reference(trained)
    for view, drawn in images.items():
        weights = Pipeline(trained, view=view).params
        assert _close(drawn, expected.generate(weights, [SEVEN] * 3, 2, 5)), view
    guided = studio.sample(asked(guidance=4.0)).images
    assert _close(guided, expected(SEVEN, steps=2, num=3, seed=5, guidance=4.0))
    assert not _close(guided, images["slow"])
    assert studio.program(asked()) != studio.program(asked(guidance=4.0)) != studio.program(asked(num=1))


@pytest.mark.slow
@pytest.mark.usefixtures("own_programs")
def test_the_strength_of_a_run_s_adapters_is_a_number_of_one_program(distilled, reads):
    references = {scale: _reference(distilled, lora_scale=scale) for scale in (1.0, 0.0, 1.5)}
    studio = _studio(distilled, views=["slow"])
    before = len(reads)
    for scale, reference in references.items():
        request = make_request(studio.limits, {"prompt": SEVEN, "num": 2, "lora_scale": scale})
        expected = references[1.0].generate(reference.params, [SEVEN] * 2, 4)
        answer = studio.sample(request)
        assert _close(answer.images, expected) and not answer.loading, scale
    assert len(reads) == before and _programs(studio) == 1
    assert studio.limits.adapters and studio.limits.views == ("slow",)


@pytest.mark.slow
@pytest.mark.usefixtures("own_programs")
def test_a_converted_pipeline_adds_its_adapters_as_if_they_were_merged(converted_folder, tmp_path):
    shapes = param_shapes("flux", TextToImage(converted_folder).models["flux"].config)
    some = random_modules(shapes, rank=2, alpha=1.5, keep=lambda name: "to_q" in name)
    files = tmp_path / "some.safetensors", tmp_path / "all.safetensors"
    for file, modules in zip(files, (some, random_modules(shapes, seed=2)), strict=True):
        export.write_tensors(file, *to_peft(modules))
    loras = [(files[0], 0.5), (files[1], 0.25)]
    studio = _served(converted_folder, loras, max_size=32)
    model, limits = studio._model, studio.limits
    assert limits.adapters and not limits.views and limits.guidance == (3.5, 1.0)
    drawn = {}
    for scale in (1.0, 0.0, -2.0):
        chosen = {"prompt": "a red cat", "steps": 2, "num": 1, "lora_scale": scale, "height": 16}
        request = make_request(limits, chosen)
        answer = studio.sample(request)
        drawn[scale] = answer.images
        assert (answer.loading > 0) == (scale == 1.0)
        assert drawn[scale].shape == (1, 16, 32, 3)
    assert model._sample._cache_size() == 1
    for scale, reference in ((1.0, loras), (0.0, ())):
        expected = TextToImage(converted_folder, loras=reference)("a red cat", 2, height=16, width=32)
        assert [_close(drawn[s], expected) for s in drawn] == [s == scale for s in drawn]
    assert any("is cut off" in line for line in studio.notes(dataclasses.replace(request, prompts=("a cat " * 20,))))
    edit = lambda scale: model.edit(drawn[1.0], "a red cat", "a dog", 2, lora_scale=scale)
    assert not _close(edit(1.0), edit(-2.0))
    with pytest.raises(ValueError, match="lora_scale is for adapters that are not merged"):
        TextToImage(converted_folder, loras=loras)("a red cat", 2, height=16, width=32, lora_scale=0.5)


def _edit(studio, rows, columns, **values):
    """The request for an edit of a fixed image, and its pixels."""
    size = studio.image_size(rows, columns)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    chosen = {"prompt": SEVEN, "source_prompt": "a handwritten digit one", "steps": 4, "skip": 1, "seed": 3}
    return make_edit(studio.limits, {**chosen, **values}, pixels), pixels[None]


@pytest.mark.slow
def test_method_shift_and_edits_are_those_of_the_command_line(trained):
    studio, reference = _studio(trained), _reference(trained)
    chosen = {"prompt": SEVEN, "steps": 3, "num": 2, "seed": 5, "method": "heun", "shift": 3}
    drawn = studio.sample(make_request(studio.limits, chosen)).images
    assert _close(drawn, reference(SEVEN, steps=3, num=2, seed=5, method="heun", shift=3.0))
    assert not _close(drawn, reference(SEVEN, steps=3, num=2, seed=5))
    # Four steps of training tell the prompts hardly apart: guidance shows that they are.
    edit, pixels = _edit(studio, 30, 20, guidance=30.0)
    assert pixels.shape == (1, 8, 8, 1) and studio.program(edit) != studio.program(dataclasses.replace(edit, edit=None))
    alone, draws = _reference(trained, batch_size=1), {"draws": [(3, 0)]}
    wanted = lambda **more: alone.edit(
        pixels, "a handwritten digit one", SEVEN, 4, 1, guidance=30.0, source_guidance=30.0, **draws, **more
    )
    edited = studio.sample(edit).images
    assert _close(edited, wanted()) and not _close(edited, pixels)
    shifted, _ = _edit(studio, 30, 20, guidance=30.0, shift=3.0)
    assert _close(studio.sample(shifted).images, wanted(shift=3.0)) and not _close(wanted(shift=3.0), edited)


@pytest.mark.slow
def test_records_are_those_of_the_command_line(trained, converted_folder, tmp_path):
    for flag, studio, own in (
        (f"--workdir={trained}", _studio(trained), ["--num=4", "--batch=4"]),
        (f"--checkpoint={converted_folder}", _served(converted_folder, max_size=32), ["--height=32", "--width=32"]),
    ):
        sample.main(["sample", flag, f"--prompt={SEVEN}", "--seed=3", "--steps=1", f"--out={tmp_path}/sheet.png", *own])
        (expected, *_) = read_records(tmp_path / "sheet.png")
        request = make_request(studio.limits, {"prompt": SEVEN, "seed": 3, "steps": 1})
        assert studio.record(request, 1, 0) == expected
    edit, _ = _edit(studio, 100, 50)
    assert (edit.height, edit.width) == (32, 16)
    told = {"source_prompt": "a handwritten digit one", "skip": 1, "plain": 0, "average": 1}
    assert told.items() <= studio.record(edit, 4, 0).items()
    assert studio.sample(edit).images.shape == (1, 32, 16, 3)


def test_examples_are_captions_that_the_run_knows(trained):
    settings = Pipeline(trained).settings
    assert example_prompts(settings)[7] == SEVEN and len(example_prompts(settings)) == 10
    chosen = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, captions=("x", "x", "y")))
    assert example_prompts(chosen) == ("x", "y")
    elsewhere = dataclasses.replace(settings, data=dataclasses.replace(settings.data, name="gone"))
    assert example_prompts(elsewhere) == ()


def test_a_cut_prompt_is_told(trained):
    studio = _studio(trained)
    long = {"prompt": "a handwritten digit one two three four five six seven"}
    notes = studio.notes(make_request(studio.limits, long))
    kept = "a handwritten digit one two three four five"
    assert notes == [f"the prompt has 10 words, the model reads 8: it is cut to '{kept}'"]
    assert studio.notes(make_request(studio.limits, {"prompt": SEVEN})) == []


def test_words_that_the_run_never_saw_are_told_of_both_prompts_of_an_edit(trained):
    studio = _studio(trained)
    (note,) = studio.notes(make_request(studio.limits, {"prompt": "a cat"}))
    assert note.startswith("never seen in training, so of no meaning: 'cat'; the words it knows are a, handwritten,")
    request, _ = _edit(studio, 8, 8, source_prompt="a dog")
    assert "'dog'" in studio.notes(request)[0]


@pytest.mark.usefixtures("own_programs")
def test_images_side_by_side_start_from_the_same_noise(trained):
    studio = _studio(trained)
    request = make_request(studio.limits, {"prompt": SEVEN, "seed": 3, "steps": 4})
    answers = list(studio.compare(request))
    assert [a.steps for a in answers] == list(COMPARED) and all(len(a.images) == 1 for a in answers)
    assert answers[0].compiling > 0 and not any(a.compiling for a in answers[1:])
    assert all(0 < a.seconds < answers[0].compiling for a in answers)
    pipeline = _reference(trained, batch_size=1)
    for answer in answers:
        assert _close(answer.images, pipeline(SEVEN, steps=answer.steps, seed=3)), answer.steps
    first, second = studio.sample(request), studio.sample(request)
    assert first.compiling > 0 and second.compiling == 0 and _close(first.images[:1], answers[2].images)
    online = studio.sample(dataclasses.replace(request, view="online"))
    assert online.loading > 0 and online.compiling == 0 == first.loading


class _Slow:
    """A model that notices when two requests reach it at once."""

    limits = ModelLimits("slow", (), 8, 8)

    def __init__(self):
        self.inside, self.drawn = 0, []

    def weights(self, view):
        return None

    def guidance(self, scale):
        return Guidance(None, 1.0)

    def rounded(self, batch_size):
        return batch_size

    def images(self, rows, request, weights):
        self.inside += 1
        time.sleep(0.002)
        assert self.inside == 1
        self.inside -= 1
        self.drawn.append((request.seed, request.steps))
        return np.full((request.num, 8, 8, 1), request.seed % 256, np.uint8)


def test_one_request_at_a_time_reaches_the_device():
    studio, results = Studio(_Slow()), {}

    def ask(seed):
        results[seed] = studio.sample(make_request(studio.limits, {"prompt": "x", "seed": seed})).images

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.all(results[seed] == seed) for seed in range(20))


def test_after_its_end_nothing_reaches_the_device():
    model = _Slow()
    studio, begun, go_on = Studio(model), threading.Event(), threading.Event()
    request = make_request(studio.limits, {"prompt": "x"})
    answers = studio.compare(request)
    next(answers)
    model.guidance = lambda scale: Guidance(None, 1.0) if not begun.set() and go_on.wait(30) else None
    under_way = threading.Thread(target=studio.sample, args=(request,))
    under_way.start()
    assert begun.wait(30) and not studio.close(timeout=0.05)
    go_on.set()
    assert studio.close(timeout=30)
    under_way.join()
    drawn = len(model.drawn)
    for ask in (lambda: next(answers), lambda: studio.sample(request)):
        with pytest.raises(RequestError, match="about to end"):
            ask()
    assert len(model.drawn) == drawn


def test_compiled_programs_are_bounded(monkeypatch):
    cleared = []
    monkeypatch.setattr(studios.jax, "clear_caches", lambda: cleared.append(True))
    monkeypatch.setattr(studios, "MAX_PROGRAMS", 3)
    model = _Slow()
    studio = Studio(model)
    for seed in (0, 1, 2, 0, 3, 3, 0):  # a program for each height
        studio.sample(SampleRequest(("x",), steps=5, seed=seed, height=seed))
    assert [seed for seed, steps in model.drawn if steps == 1] == [0, 1, 2, 3, 0] and len(cleared) == 1


def _error(*argv):
    with pytest.raises(UserError) as caught:
        app.main(["app", *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_command_that_cannot_be_served_is_one_line(trained, tmp_path, monkeypatch):
    good = f"--workdir={trained}"
    assert "give one of --workdir and --checkpoint" in _error()
    assert "give one of --workdir and --checkpoint" in _error(good, "--checkpoint=x")
    assert "--lora goes with --checkpoint" in _error(good, "--lora=x")
    assert "--views goes with --workdir" in _error("--checkpoint=x", "--views=slow")
    assert "--views is middle, but must be some of online, fast, slow" in _error(good, "--views=middle")
    assert "each once" in _error(good, "--views=slow,slow")
    assert "--max_size is 100, but must be a positive multiple of 16" in _error("--checkpoint=x", "--max_size=100")
    assert "--lora is given 1 times, --lora_scale 2" in _error(
        "--checkpoint=x", "--lora=x", "--lora_scale=1", "--lora_scale=2"
    )
    assert "--lora_scale is nan, but must be finite" in _error("--checkpoint=x", "--lora=x", "--lora_scale=nan")
    assert "--port is 70000" in _error(good, "--port=70000")
    assert "cannot listen on 192.0.2.1:7860" in _error(good, "--host=192.0.2.1")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in _error(good, f"--port={port}")
    assert f"no checkpoint in {tmp_path}" in _error(f"--workdir={tmp_path}", "--port=0")
    assert "nowhere is not found" in _error("--checkpoint=nowhere", "--port=0")
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert 'the web page needs gradio: pip install ".[app]"' in _error(good)


def test_one_of_several_processes_serves_nothing(trained, monkeypatch):
    for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert "is served by one process, but this is one of several" in _error(f"--workdir={trained}")
