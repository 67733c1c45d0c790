"""The web page: controls of a request, and tabs that sample, compare step counts and edit an image."""

import html
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from shortcut_jax.cluster.distributed import say
from shortcut_jax.core.flow import METHODS
from shortcut_jax.core.text import count_label
from shortcut_jax.errors import UserError
from shortcut_jax.inference.request import ModelLimits, SampleRequest
from shortcut_jax.webapp.files import fitted, read_upload, save
from shortcut_jax.webapp.request import (
    EDIT_FIELDS,
    FIELDS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_LORA_SCALE,
    MAX_PROMPT,
    MAX_SEED,
    MAX_SHIFT,
    MAX_STEPS,
    SIZE_UNIT,
    fields_of,
    least_guidance,
    make_edit,
    make_request,
)
from shortcut_jax.webapp.studio import COMPARED, REPEATS, SHORT, Answer, Studio

QUEUE = 16
"""Clicks that wait; further ones get a message at once."""

KEPT = (60, 1200)
"""Seconds between looks at old images, and the age at which their files are deleted."""

EMBEDDED_GUIDANCE = "fed to the model's guidance embedding"
CLASSIFIER_FREE = "classifier-free: above 1 each step costs two evaluations"
"""What the guidance scale does."""

RANDOM_SEED = f"() => Math.floor(Math.random() * {MAX_SEED + 1})"

Controls = dict[str, Any]
"""The component of each field of a request."""


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """The page of a studio, ready to be launched with `THEME` and `CSS` of `app_style`.

    Args:
      studio: that answers.
      folder: gradio's own (GRADIO_TEMP_DIR), for what is uploaded and downloaded.
    """
    limits = studio.limits
    with gr.Blocks(title=f"{limits.title} · shortcut_jax", analytics_enabled=False, delete_cache=KEPT) as page:
        facts = " · ".join(map(html.escape, limits.facts))
        gr.Markdown(f"# {html.escape(limits.title)}\n{facts}", elem_id="heading")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=300, elem_id="work"):
                prompt = _prompt_box(limits)
                tabs = gr.Tabs()
            with gr.Column(scale=2, min_width=300, elem_id="settings"):
                controls = {"prompt": prompt, **_settings(limits)}
        with tabs:
            with gr.Tab("Sample", id="sample"):
                _sample_tab(studio, folder, controls)
            with gr.Tab("Compare", id="compare"):
                _compare_tab(studio, folder, controls)
            with gr.Tab("Edit", id="edit"):
                _edit_tab(studio, folder, controls)
        if limits.examples:
            with gr.Row():
                gr.Examples([[text] for text in limits.examples], prompt, label="Try one of these", elem_id="examples")
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def _prompt_box(limits: ModelLimits) -> gr.Textbox:
    return gr.Textbox(
        value=limits.examples[0] if limits.examples else "",
        label="Prompt",
        placeholder="What should the image show?",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        elem_id="prompt",
    )


def _settings(limits: ModelLimits) -> Controls:
    """What all tabs share, each field that the model leaves open."""
    controls: Controls = {}
    scale, means = limits.guidance.value, CLASSIFIER_FREE if limits.guidance.embedded is None else EMBEDDED_GUIDANCE
    bounds = least_guidance(limits), min(MAX_GUIDANCE, max(10.0, scale))
    controls["guidance"] = gr.Slider(*bounds, value=scale, step=0.1, label="Guidance", info=means)
    with gr.Row(elem_id="seed-row"):
        controls["seed"] = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=MAX_SEED, scale=3)
        button = gr.Button("Random", scale=1, min_width=90, elem_id="random")
        button.click(None, None, controls["seed"], js=RANDOM_SEED, api_visibility="private")
    if limits.views:
        controls["view"] = gr.Radio(
            list(limits.views), value=limits.views[0], label="View", info="the weights, or their fast or slow EMA"
        )
    if limits.adapters:
        bounds = -MAX_LORA_SCALE, MAX_LORA_SCALE
        controls["lora_scale"] = gr.Slider(*bounds, value=1.0, step=0.05, label="LoRA scale", info="0 is the base")
    if limits.any_size:
        for name, most in (("width", limits.width), ("height", limits.height)):
            label = f"{name.capitalize()} in pixels"
            controls[name] = gr.Slider(SIZE_UNIT, most, value=most, step=SIZE_UNIT, label=label)
    else:
        gr.Markdown(f"Size: {limits.width} x {limits.height} pixels, that of the run.", elem_id="size")
    controls["method"] = gr.Radio(
        list(METHODS), value="euler", label="Method", info="Heun's evaluates the model twice a step"
    )
    controls["shift"] = gr.Slider(
        0, MAX_SHIFT, value=0, step=0.1, label="Timestep shift", info="0 is the model's own; more: finer steps in noise"
    )
    return controls


def _sample_tab(studio: Studio, folder: Path, controls: Controls) -> None:
    with gr.Row(elem_classes="pair"):
        steps = gr.Slider(1, MAX_STEPS, value=4, step=1, label="Steps", min_width=140)
        num = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images", min_width=140)
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    gallery = gr.Gallery(
        label="Images",
        show_label=False,
        height="auto",
        format="png",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="gallery",
        elem_classes="made",
    )
    status = _status("sample-status")
    inputs = _in_order(studio.limits, {**controls, "steps": steps, "num": num})

    def sample(**values: Any) -> tuple[Any, str]:
        with told():
            request = make_request(studio.limits, values)
            answer = studio.sample(request)
            captions = [duration(answer.seconds / len(answer.images))] * len(answer.images)
            files = [save(folder, x, studio.record(request, answer.steps, i)) for i, x in enumerate(answer.images)]
            return list(zip(files, captions, strict=True)), "<br>".join([summary(answer), *_notes(studio, request)])

    _on_click(sample, button, controls["prompt"], inputs, [gallery, status], "Samples images of a prompt.")


def _compare_tab(studio: Studio, folder: Path, controls: Controls) -> None:
    steps = ", ".join(map(str, COMPARED[:-1])) + f" and {COMPARED[-1]}"
    gr.Markdown(f"One image in {steps} steps, from the same noise.")
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    images, times = [], []
    with gr.Row(elem_id="compared-row"):
        for n in COMPARED:
            with gr.Column(min_width=120):
                images.append(_made_image(count_label(n), height=220, elem_classes=["compared", "made"]))
                times.append(_text(f"Time of {count_label(n)}", elem_id=f"time-{n}", elem_classes="time"))
    status = _status("compare-status")
    timing = f"From prompt to pixels; where that is less than {duration(SHORT)}, the best of {REPEATS} times."

    def compare(**values: Any) -> Iterator[list[Any]]:
        with told():
            request = make_request(studio.limits, {**values, "num": 1})
            answers, files = list[Answer](), list[str | None]()
            for answer in studio.compare(request):
                answers.append(answer)
                files.append(save(folder, answer.images[0], studio.record(request, answer.steps, 0)))
                missing = len(COMPARED) - len(answers)
                lines = [timing, *costs(answers), *_notes(studio, request)]
                yield [*files, *[None] * missing, *bars(answers), *[""] * missing, "<br>".join(lines)]

    outputs = [*images, *times, status]
    about = f"Samples one image in {steps} steps each, from the same noise; answers after each of them."
    _on_click(compare, button, None, _in_order(studio.limits, controls), outputs, about)


def _edit_tab(studio: Studio, folder: Path, controls: Controls) -> None:
    gr.Markdown("An image is changed from what its own prompt says to what the prompt above says (FlowEdit).")
    with gr.Row(elem_classes="pair"):
        image = gr.Image(
            label="Source",
            type="filepath",
            sources=["upload", "clipboard"],
            height=280,
            elem_id="source",
            min_width=140,
        )
        result = _made_image(
            "Edited", show_label=True, height=280, elem_id="edited", elem_classes="made", min_width=140
        )
    source = gr.Textbox(
        label="What the image shows now", lines=1, max_lines=4, max_length=MAX_PROMPT, elem_id="source-prompt"
    )
    with gr.Row(elem_classes="pair"):
        steps = gr.Slider(1, MAX_STEPS, value=8, step=1, label="Steps", min_width=140)
        skip = gr.Slider(0, MAX_STEPS - 1, value=1, step=1, label="Steps skipped", min_width=140)
    button = gr.Button("Edit", variant="primary", elem_id="edit")
    status = _status("edit-status")
    own = {"image": image, "source_prompt": source, "steps": steps, "skip": skip}
    open_fields = (*EDIT_FIELDS, *(name for name in fields_of(studio.limits) if name not in ("num", "height", "width")))
    inputs = {name: {**controls, **own}[name] for name in open_fields}

    def edit(**values: Any) -> tuple[Any, str]:
        with told():
            upload = read_upload(folder, values.pop("image"))
            size = studio.image_size(upload.height, upload.width)
            request = make_edit(studio.limits, values, fitted(upload, size))
            answer = studio.sample(request)
            lines = [summary(answer), *_notes(studio, request)]
            if (upload.height, upload.width) != size[:2]:
                lines.append(f"Resized from {upload.width} x {upload.height} and cut to {size[1]} x {size[0]} pixels.")
            return save(folder, answer.images[0], studio.record(request, answer.steps, 0)), "<br>".join(lines)

    about = "Edits an image from what source_prompt says to what prompt says."
    _on_click(edit, button, None, inputs, [result, status], about, EDIT_FIELDS)


def _made_image(label: str, show_label: bool = False, **options: Any) -> gr.Image:
    """A place for an image that is made here."""
    options |= {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
    return gr.Image(label=label, show_label=show_label, **options)


def _text(label: str, **options: Any) -> gr.HTML:
    """A place for words about images; the label is for the description of the endpoint."""
    return gr.HTML(label=label, show_label=False, padding=False, **options)


def _status(elem_id: str) -> gr.HTML:
    return _text("Summary", elem_id=elem_id, elem_classes="status")


def _notes(studio: Studio, request: SampleRequest) -> list[str]:
    return [f'<span class="note">{html.escape(line)}</span>' for line in studio.notes(request)]


def _in_order(limits: ModelLimits, controls: Controls) -> Controls:
    """The controls of the fields that the model leaves open, in the order of `FIELDS`."""
    return {name: controls[name] for name in fields_of(limits) if name in controls}


def _on_click(
    answer: Callable[..., Any],
    button: Any,
    also: Any,
    inputs: Controls,
    outputs: list[Any],
    about: str,
    special: Mapping[str, str] | None = None,
) -> None:
    """All tabs share one queue, for there is one model. Values come as they were sent: `make_request` checks them.

    The function's name is that of its endpoint, and the fields' names are those of its parameters.
    """
    triggers = [button.click] + ([also.submit] if also is not None else [])
    texts = {**FIELDS, **(special or {})}
    described = "; ".join(f"{name}: {texts[name]}" for name in inputs)
    gr.on(
        triggers,
        answer,
        inputs_kwargs=inputs,
        outputs=outputs,
        show_progress_on=outputs[-1],
        concurrency_id="model",
        concurrency_limit=1,
        api_name=answer.__name__,
        api_description=f"{about} {described}.",
        preprocess=False,
    )


@contextmanager
def told() -> Iterator[None]:
    """Errors as a message on the page, none of which ends the app.

    Raises:
      gr.Error: instead of any other.
    """
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
    except Exception as error:
        say(traceback.format_exc())
        if "RESOURCE_EXHAUSTED" in str(error):
            reason = "the device has too little memory for this: ask for fewer or smaller images"
        else:
            reason = f"sampling failed ({type(error).__name__}); the server's output has the details"
        raise gr.Error(reason, print_exception=False) from error


def duration(seconds: float) -> str:
    """Seconds for people: 8.3 ms, 120 ms, 4.56 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def summary(answer: Answer) -> str:
    """What an answer is and what it cost."""
    num = len(answer.images)
    each = f", {duration(answer.seconds / num)} each" if num > 1 else ""
    line = f"<b>{count_label(num, 'image')} in {count_label(answer.steps)}: {duration(answer.seconds)}</b>{each}"
    return "<br>".join([line, *costs([answer])])


def costs(answers: Sequence[Answer]) -> list[str]:
    """What was spent once, beside sampling."""
    compiling, loading = (sum(getattr(a, name) for a in answers) for name in ("compiling", "loading"))
    lines = [f"Compiled once in {duration(compiling)}, which is not part of the times."] if compiling else []
    return lines + ([f"Weights read in {duration(loading)}, which is not part of the times."] if loading else [])


def bars(answers: Sequence[Answer]) -> list[str]:
    """The time of each answer, and a bar as long as it is beside the longest."""
    longest = max(a.seconds for a in answers)
    return [
        f"<b>{count_label(a.steps)}</b> · {duration(a.seconds)}"
        f'<div class="track"><div class="bar" style="width: {max(a.seconds / longest, 0.02):.0%}"></div></div>'
        for a in answers
    ]
