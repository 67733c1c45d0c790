"""The web page: controls for what a model offers, a tab that samples and one that compares step counts."""

import html
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from shortcut_jax.app_request import (
    MAX_GUIDANCE,
    MAX_LORA_SCALE,
    MAX_PICTURES,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    SIZE_UNIT,
    Offer,
    Request,
    RequestError,
    make_request,
)
from shortcut_jax.app_studio import COMPARED, REPEATS, SHORT, Answer, Studio
from shortcut_jax.command import EXPECTED_ERRORS
from shortcut_jax.pictures_out import to_image
from shortcut_jax.report import count_label
from shortcut_jax.runtime.distributed import say

QUEUE = 16
"""Clicks that wait; further ones get a message at once."""

KEPT = (60, 1200)
"""Seconds between looks at old pictures, and the age at which their files are deleted."""

DISPLAYED = 256
"""Pixels that a smaller picture is enlarged to, by a whole factor."""

THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # fonts of the visitor's own machine: the page loads nothing from elsewhere
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_padding="0",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_border_width="1px",
    block_shadow="none",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_500",
)

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#heading h1 {font-size: 1.5rem; margin: 0}
#heading p {color: var(--body-text-color-subdued); margin: .15rem 0 0}
#examples .gallery {gap: 6px}
#examples .gallery-item {padding: 4px 8px; font-size: .74rem}
#examples .gallery-item .gallery {padding: 0}
#seed-row {align-items: end}
#random {margin-bottom: 12px}
#size {color: var(--body-text-color-subdued); font-size: .85rem; margin: 0 .4rem}
#gallery img, .compared img {image-rendering: pixelated}
#gallery .grid-wrap {min-height: 230px; max-height: none}
#gallery .thumbnail-item {aspect-ratio: auto; border: none; box-shadow: none; background: none; overflow: visible}
#gallery .thumbnail-item img {height: auto; border-radius: var(--radius-md)}
#gallery .caption-label {position: static; background: none; border: none; box-shadow: none; padding: 4px 0 0;
  max-width: none; text-align: center; font-size: .92rem; color: var(--body-text-color-subdued)}
.compared img {border-radius: var(--radius-md)}
.status {min-height: 2.6rem; font-size: .92rem; color: var(--body-text-color-subdued)}
.status [data-testid="status-tracker"]:has(.error) {display: none}
.status b, .time b {color: var(--body-text-color)}
.time {text-align: center; font-size: .92rem; color: var(--body-text-color-subdued)}
.track {height: 6px; border-radius: 3px; margin-top: 6px; background: var(--border-color-primary)}
.bar {height: 6px; border-radius: 3px; background: var(--primary-500)}
"""

RANDOM_SEED = f"() => Math.floor(Math.random() * {MAX_SEED + 1})"

TOLD: tuple[type[Exception], ...] = (RequestError, *EXPECTED_ERRORS)
"""Errors whose text is for the visitor."""

Controls = dict[str, Any]
"""The component of each field of a request."""


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio, ready to be launched with `THEME` and `CSS`."""
    offer = studio.offer
    with gr.Blocks(title=f"{offer.title} · shortcut_jax", analytics_enabled=False, delete_cache=KEPT) as page:
        facts = " · ".join(map(html.escape, offer.facts))
        gr.Markdown(f"# {html.escape(offer.title)}\n{facts}", elem_id="heading")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls = _common_controls(offer)
            with gr.Column(scale=5, min_width=480), gr.Tabs():
                with gr.Tab("Sample", id="sample"):
                    _sample_tab(studio, controls)
                with gr.Tab("Compare", id="compare"):
                    _compare_tab(studio, controls)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def _common_controls(offer: Offer) -> Controls:
    """What both tabs need, each field that the model leaves open."""
    prompt = gr.Textbox(
        value=offer.examples[0] if offer.examples else "",
        label="Prompt",
        placeholder="What shall the picture show?",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        elem_id="prompt",
    )
    if offer.examples:
        gr.Examples([[text] for text in offer.examples], prompt, label="Try one of these", elem_id="examples")
    controls: Controls = {"prompt": prompt}
    most = min(MAX_GUIDANCE, max(10.0, offer.guidance))
    controls["guidance"] = gr.Slider(
        offer.min_guidance, most, value=offer.guidance, step=0.1, label="Guidance", info=offer.guidance_means
    )
    with gr.Row(elem_id="seed-row"):
        controls["seed"] = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=MAX_SEED, scale=3)
        button = gr.Button("Random", scale=1, min_width=90, elem_id="random")
        button.click(None, None, controls["seed"], js=RANDOM_SEED, api_visibility="private")
    if offer.views:
        controls["view"] = gr.Radio(
            list(offer.views), value=offer.views[0], label="View", info="the weights, or their fast or slow average"
        )
    if offer.adapters:
        bounds = -MAX_LORA_SCALE, MAX_LORA_SCALE
        controls["lora_scale"] = gr.Slider(*bounds, value=1.0, step=0.05, label="LoRA scale", info="0 is the base")
    if offer.max_size:
        bounds = SIZE_UNIT, offer.max_size
        for name in ("width", "height"):
            value = getattr(offer, name)
            controls[name] = gr.Slider(*bounds, value=value, step=SIZE_UNIT, label=f"{name.capitalize()} in pixels")
    else:
        gr.Markdown(f"Size: {offer.width} x {offer.height} pixels, that of the run.", elem_id="size")
    return controls


def _sample_tab(studio: Studio, controls: Controls) -> None:
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=4, step=1, label="Steps")
        num = gr.Slider(1, MAX_PICTURES, value=4, step=1, label="Pictures")
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    gallery = gr.Gallery(
        show_label=False,
        columns=4,
        height="auto",
        format="png",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="gallery",
    )
    status = gr.HTML(elem_id="sample-status", elem_classes="status", padding=False)
    both = {**controls, "steps": steps, "num": num}
    fields = [name for name in studio.offer.fields if name in both]

    def sample(*values: Any) -> tuple[Any, str]:
        with told():
            request = make_request(studio.offer, dict(zip(fields, values, strict=True)))
            answer = studio.sample(request)
            captions = [duration(answer.seconds / len(answer.pictures))] * len(answer.pictures)
            shown = [displayed(x, request, answer.steps, i) for i, x in enumerate(answer.pictures)]
            columns = min(4, max(2, len(shown)))
            lines = [summary(answer), *map(html.escape, studio.notes(request))]
            pictures = list(zip(shown, captions, strict=True))
            return gr.Gallery(pictures, columns=columns), "<br>".join(lines)

    _on_click(sample, button, controls["prompt"], [both[name] for name in fields], [gallery, status], "sample")


def _compare_tab(studio: Studio, controls: Controls) -> None:
    steps = ", ".join(map(str, COMPARED[:-1])) + f" and {COMPARED[-1]}"
    gr.Markdown(f"One picture in {steps} steps, from the same noise.")
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    pictures, times = [], []
    with gr.Row():
        for n in COMPARED:
            with gr.Column(min_width=120):
                pictures.append(
                    gr.Image(
                        show_label=False,
                        format="png",
                        height=220,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_classes="compared",
                    )
                )
                times.append(gr.HTML(elem_id=f"time-{n}", elem_classes="time", padding=False))
    status = gr.HTML(elem_id="compare-status", elem_classes="status", padding=False)
    fields = [name for name in studio.offer.fields if name in controls]
    timing = f"From prompt to pixels; where that is less than {duration(SHORT)}, the best of {REPEATS} times."

    def compare(*values: Any) -> Iterator[list[Any]]:
        with told():
            request = make_request(studio.offer, dict(zip(fields, values, strict=True)))
            answers: list[Answer] = []
            for answer in studio.compare(request):
                answers.append(answer)
                # Pictures that are there stay; those of an earlier comparison go with the first new one.
                before, missing = len(answers) - 1, len(COMPARED) - len(answers)
                later = [gr.skip() if before else None] * missing
                shown = [*[gr.skip()] * before, displayed(answer.pictures[0], request, answer.steps, 0), *later]
                lines = [timing, *costs(answers), *map(html.escape, studio.notes(request))]
                yield [*shown, *bars(answers), *[""] * missing, "<br>".join(lines)]

    outputs = [*pictures, *times, status]
    _on_click(compare, button, None, [controls[name] for name in fields], outputs, "compare")


def _on_click(
    answer: Callable[..., Any], button: Any, also: Any, inputs: list[Any], outputs: list[Any], name: str
) -> None:
    """Both tabs share one queue, for there is one model. Values come as they were sent: `make_request` checks them."""
    triggers = [button.click] + ([also.submit] if also is not None else [])
    shared: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, api_name=name, preprocess=False)
    gr.on(triggers, answer, inputs, outputs, show_progress_on=outputs[-1], **shared)


@contextmanager
def told() -> Iterator[None]:
    """Errors as a message on the page, none of which ends the app.

    Raises:
      gr.Error: instead of any other.
    """
    try:
        yield
    except TOLD as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
    except Exception as error:
        say(traceback.format_exc())
        if "RESOURCE_EXHAUSTED" in str(error):
            reason = "the device has too little memory for this: ask for fewer or smaller pictures"
        else:
            reason = f"sampling failed ({type(error).__name__}); the server's output has the details"
        raise gr.Error(reason, print_exception=False) from error


def displayed(pixels_hwc: np.ndarray, request: Request, steps: int, index: int) -> Image.Image:
    """A picture as it is shown and downloaded: enlarged where it is small, with what it was made by in its metadata."""
    picture = to_image(pixels_hwc)
    factor = max(DISPLAYED // max(picture.size), 1)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    made_by = {"prompt": request.prompt, "steps": steps, "seed": request.seed, "index": index}
    made_by |= {"guidance": request.guidance, "view": request.view, "lora_scale": request.lora_scale}
    # The time also keeps files apart: gradio names them by their content, and would write one that is being read.
    made_by["time"] = datetime.now(UTC).isoformat()
    picture.info["shortcut_jax"] = json.dumps(made_by)
    return picture


def duration(seconds: float) -> str:
    """Seconds for people: 8.3 ms, 120 ms, 4.56 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def summary(answer: Answer) -> str:
    """What an answer is and what it cost."""
    num = len(answer.pictures)
    each = f", {duration(answer.seconds / num)} each" if num > 1 else ""
    line = f"<b>{count_label(num, 'picture')} in {count_label(answer.steps)}: {duration(answer.seconds)}</b>{each}"
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
