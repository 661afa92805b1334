"""The page: its parts, and what follows what. Everything that is worked out is worked out in `pcenet.app.session`."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from pcenet.app import pictures, words
from pcenet.app.session import Explorer, Truth, View, Visit
from pcenet.data import DataError
from pcenet.data.images import decode_image
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.texts import say

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others of Pillow's start programs, or are rarely tested
SAMPLES = 12  # how many are offered
LOOK = -1  # in place of an expert: a click shows a patch and sends it nowhere
PATCH = re.compile(r"\s*(\d{1,6})[\s,]+(\d{1,6})\s*")  # a row and a column
SHOWN_NAME = 80  # characters of a file's name in a message
WAITING = 200  # visitors' wishes that may wait
FORGET = 3600  # seconds without a wish, after which a visitor's image is forgotten
TIDY, KEEP = 60, 600  # seconds between looks for old files, of uploads and pictures, and how old they become
SESSIONS = 200  # visitors whose images are kept; the oldest goes first

Answer = dict[Any, Any]
"""Component to its new content."""


@dataclass(frozen=True)
class Sample:
    """An image that the page offers.

    Attributes:
        title: its name for those who cannot see it.
        thumbnail: the image, small.
        load: reads it, with what is known of it.
    """

    title: str
    thumbnail: Image.Image
    load: Callable[[], tuple[Image.Image, Truth | None]]


@dataclass(frozen=True)
class Limits:
    """What an image that somebody drops on the page may be.

    Attributes:
        pixels: at most.
        size: of its file in bytes, at most.
    """

    pixels: int
    size: int


class Page:
    """All parts of the page.

    Args:
        explorer: the network.
        samples: images to offer.
        limits: of images that are dropped on the page.
        title: what the page is of.
    """

    def __init__(self, explorer: Explorer, samples: Sequence[Sample], limits: Limits, title: str) -> None:
        self.explorer = explorer
        self.samples = samples
        self.limits = limits
        self.segment = explorer.model.task == "segment"
        with gr.Blocks(title=f"PCE: {title}", analytics_enabled=False, delete_cache=(TIDY, KEEP)) as self.blocks:
            self.visit = gr.State(None, time_to_live=FORGET)
            text(f"<h1>The experts of {words.escape(title)}</h1>", "title")
            self.notice = text(words.notice(), "notice")
            self._lay_out()
            self._connect()
        self.blocks.state_session_capacity = SESSIONS
        # One wish at a time: each builds on what the one before it has made of the visit.
        self.blocks.queue(default_concurrency_limit=1, max_size=WAITING)

    def _lay_out(self) -> None:
        with gr.Row(equal_height=True, elem_id="strip"):
            self._lay_out_choice()
        with gr.Row(equal_height=False, elem_id="board"):
            with gr.Column(min_width=320):
                self._lay_out_experts()
            with gr.Column(min_width=320):
                self._lay_out_prediction()
        text(words.hints(FORMATS, self.limits.size // 2**20, self.limits.pixels / 1e6), "hints")

    def _lay_out_choice(self) -> None:
        self.gallery = gr.Gallery(
            [(sample.thumbnail, sample.title) for sample in self.samples],
            label="Samples",
            show_label=False,
            columns=SAMPLES,
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=bool(self.samples),
            elem_id="samples",
        )
        self.file = gr.File(label="An image of your own", show_label=False, height="100%", elem_id="upload")
        take_uploads_alone(self.file, self.blocks)

    def _lay_out_experts(self) -> None:
        with gr.Column(elem_classes="pce-head"):
            with gr.Row(elem_id="where"):
                self.layer = choice("Layer", "layer")
                self.typed = gr.Textbox(
                    label="Row and column instead of a click",
                    placeholder="row, col",
                    container=False,
                    max_length=20,
                    min_width=100,
                    elem_id="typed",
                )
            self.legend = text("", "legend")
        with gr.Column(elem_id="patches"):
            self.experts = picture("The image with the expert of each patch", "experts")
            with gr.Column(min_width=0, elem_id="panel"):
                self.answer = text("", "answer")
                self.expert = gr.Radio([], label="Send it to", container=False, elem_id="expert")
        with gr.Row(elem_id="tools"):
            self.brush = choice("What a click on a patch does", "brush")
            self.whole = gr.Checkbox(label="Move the whole expert", container=False, min_width=0, elem_id="whole")
            self.undo = gr.Button("Undo", size="md", min_width=70, elem_id="undo")
            self.reset = gr.Button("Reset all", size="md", min_width=90, elem_id="reset")

    def _lay_out_prediction(self) -> None:
        with gr.Column(elem_classes="pce-head"):
            self.headline = text("", "headline")
            self.report = text("", "report")
        self.prediction = picture(words.VIEWS["image"], "prediction")
        self.view = gr.Radio([], label="Show", container=False, visible=self.segment, elem_id="view")
        self.classes = text("", "classes")

    def _connect(self) -> None:
        patch = [self.visit, self.answer, self.expert]
        layer = [*patch, self.experts, self.legend]
        outcome = [*layer, self.headline, self.report, self.prediction, self.view, self.classes]
        everything = [*outcome, self.layer, self.brush, self.gallery]

        def on(listen: Callable[..., Any], wish: Callable[..., Answer], outputs: list[Any], *inputs: Any) -> None:
            listen(
                self._guarded(wish),
                list(inputs),
                [self.notice, *outputs],
                api_visibility="private",
                show_progress="hidden",
                trigger_mode="multiple",
                concurrency_id="wishes",
            )

        on(self.blocks.load, self.first_sample, everything)
        on(self.gallery.select, self.choose_sample, everything)
        on(self.file.upload, self.take_file, [*everything, self.file], self.file)
        on(self.layer.input, self.choose_layer, [*layer, self.brush], self.visit, self.layer)
        on(self.experts.select, self.click, outcome, self.visit, self.brush, self.whole)
        on(self.typed.submit, self.type_patch, outcome, self.visit, self.brush, self.whole, self.typed)
        on(self.expert.input, self.send_patch, outcome, self.visit, self.expert, self.whole)
        on(self.undo.click, self.undo_move, outcome, self.visit)
        on(self.reset.click, self.reset_all, outcome, self.visit)
        on(self.view.input, self.choose_view, [self.visit, self.prediction], self.visit, self.view)

    def _guarded(self, wish: Callable[..., Answer]) -> Callable[..., Answer]:
        """A wish that is answered by a message where it cannot be fulfilled. Our faults are told on the terminal."""
        freed: Answer = {self.file: None} if wish == self.take_file else {}

        def fulfil(*inputs: Any) -> Answer:
            try:
                return {self.notice: words.notice(), **freed, **wish(*inputs)}
            except ValueError as error:
                message = str(error)
            except Exception as error:
                message = "Memory ran out. Try a smaller image, or later."
                if not ran_out_of_memory(error):
                    say(*traceback.format_exc().splitlines(), to=sys.stderr)
                    message = "That went wrong, and it was not you. Try again."
            return {self.notice: words.notice(message), **freed}

        return with_event_data(fulfil) if wish in (self.choose_sample, self.click) else fulfil

    def first_sample(self) -> Answer:
        """When the page opens."""
        return self._begin_sample(0) if self.samples else {}

    def choose_sample(self, event: gr.SelectData) -> Answer:
        """A click on a sample."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.samples):
            raise ValueError(f"sample {event.index!r} is not one of {len(self.samples)}")
        return self._begin_sample(event.index)

    def take_file(self, path: str | None) -> Answer:
        """A file that was dropped; the field is then free for the next."""
        if path is None:
            return {}
        check_uploaded(path, self.blocks)
        file = Path(path)
        data = file.read_bytes()
        if len(data) > self.limits.size:
            raise ValueError(f"{file.name[:SHOWN_NAME]}: the file has more than {self.limits.size} bytes. Shrink it.")
        image = decode_image(
            data,
            file.name[:SHOWN_NAME],
            grey_range=self.explorer.model.grey_range,
            max_pixels=self.limits.pixels,
            formats=FORMATS,
        )
        return self._show_all(self.explorer.begin(image), None)

    def choose_layer(self, visit: Visit | None, layer: str) -> Answer:
        """Another layer."""
        return self._show_layer(self.explorer.show_layer(an_image(visit), layer))

    def click(self, visit: Visit | None, brush: int | None, whole: bool, event: gr.SelectData) -> Answer:
        """A click on the picture of the experts; a second one on a patch points at it no longer."""
        visit = an_image(visit)
        x, y = event.index
        patch = visit.routing.patch_at(float(x), float(y), visit.image.picture.size)
        return self._touch(visit, None if patch == visit.patch else patch, brush, whole)

    def type_patch(self, visit: Visit | None, brush: int | None, whole: bool, typed: str | None) -> Answer:
        """Row and column instead of a click."""
        found = PATCH.fullmatch(typed or "")
        if not found:
            raise ValueError("row and column must be two whole numbers from 0 on, such as 1, 2")
        return self._touch(an_image(visit), (int(found[1]), int(found[2])), brush, whole)

    def _touch(self, visit: Visit, patch: tuple[int, int] | None, brush: int | None, whole: bool) -> Answer:
        """Point at a patch, or send it to the expert that a click paints."""
        visit = self.explorer.point_at(visit, *patch) if patch else replace(visit, patch=None)
        if brush is None or brush == LOOK or not patch:
            return self._show_patch(visit)
        return self._show_outcome(replace(self.explorer.send(visit, int(brush), whole=bool(whole)), patch=None))

    def send_patch(self, visit: Visit | None, expert: int | None, whole: bool) -> Answer:
        """The patch that is pointed at, to another expert."""
        if expert is None:
            raise ValueError("no expert is chosen; choose one first")
        return self._show_outcome(self.explorer.send(an_image(visit), int(expert), whole=bool(whole)))

    def undo_move(self, visit: Visit | None) -> Answer:
        """The last change of who serves what, taken back."""
        return self._show_outcome(self.explorer.undo(an_image(visit)))

    def reset_all(self, visit: Visit | None) -> Answer:
        """All patches back to the router's choice."""
        return self._show_outcome(self.explorer.reset(an_image(visit)))

    def choose_view(self, visit: Visit | None, view: View) -> Answer:
        """What to show of the prediction."""
        if view not in words.VIEWS:
            raise ValueError(f"view {view!r} is not one of {', '.join(words.VIEWS)}")
        return self._show_prediction(replace(an_image(visit), view=view))

    def _begin_sample(self, number: int) -> Answer:
        try:
            sample = self.samples[number].load()
        except DataError as error:  # its message has a path of this machine, which is not for visitors
            say(str(error), to=sys.stderr)
            raise ValueError("This sample cannot be read. Choose another one.") from error
        return self._show_all(self.explorer.begin(*sample), number)

    def _show_all(self, visit: Visit, sample: int | None) -> Answer:
        masked = isinstance(visit.image.truth, np.ndarray)
        views = [(title, view) for view, title in words.VIEWS.items() if view != "truth" or masked]
        return {
            self.gallery: gr.Gallery(selected_index=sample),
            self.layer: gr.Dropdown(
                [(words.layer_title(name, visit.after.layers), name) for name in visit.after.layers], value=visit.layer
            ),
            **self._show_layer(visit),
            **self._show_outcome(visit),
            self.view: gr.Radio(views, value=visit.view),
        }

    def _show_layer(self, visit: Visit) -> Answer:
        paints = [(f"A click sends to expert {expert}", expert) for expert in range(visit.routing.num_experts)]
        return {
            self.brush: gr.Dropdown([("A click asks where to", LOOK), *paints], value=LOOK),
            **self._show_routing(visit),
        }

    def _show_outcome(self, visit: Visit) -> Answer:
        return {
            self.headline: words.headline(visit, self.explorer.classes),
            self.report: words.change_report(visit, self.explorer.classes),
            self.classes: words.class_list(visit, self.explorer.classes),
            self.view: gr.Radio(value=visit.view),
            **self._show_prediction(visit),
            **self._show_routing(visit),
        }

    def _show_prediction(self, visit: Visit) -> Answer:
        shown = words.VIEWS[visit.view if self.segment else "image"]
        return {
            self.visit: visit,
            self.prediction: gr.Image(pictures.prediction_picture(visit), alt_text=shown.capitalize()),
        }

    def _show_routing(self, visit: Visit) -> Answer:
        return {
            self.experts: pictures.expert_picture(visit),
            self.legend: words.expert_legend(visit.routing),
            **self._show_patch(visit),
        }

    def _show_patch(self, visit: Visit) -> Answer:
        served = int(visit.routing.serving[visit.patch]) if visit.patch else None
        return {
            self.visit: visit,
            self.answer: words.patch_answer(visit),
            self.expert: gr.Radio(words.expert_choices(visit), value=served),
        }


def check_uploaded(path: str, blocks: gr.Blocks) -> None:
    """Raise a ``ValueError`` unless a file was uploaded to the page."""
    if path not in blocks.upload_file_set:
        raise ValueError("that is no uploaded file; drop it on the page")


def take_uploads_alone(file: gr.File, blocks: gr.Blocks) -> None:
    """Let a component take files that were uploaded, and nothing else.

    By itself it would copy any file that a request names to where it is served, and fetch one from an address. (A
    subclass would be cleaner, but for each one gradio writes a ``.pyi`` file beside the module.)
    """
    move = file.async_move_resource_to_block_cache

    async def checked(url_or_file_path: str | Path | None) -> str | None:
        check_uploaded(str(url_or_file_path), blocks)
        return await move(url_or_file_path)

    file.async_move_resource_to_block_cache = checked  # type: ignore[method-assign] # no subclass, see above


def with_event_data(fulfil: Callable[..., Answer]) -> Callable[..., Answer]:
    """The same, and gradio gives it the event: it looks for that in the types of the arguments."""

    def first(event: gr.SelectData, *inputs: Any) -> Answer:
        return fulfil(*inputs, event)

    return first


def an_image(visit: Visit | None) -> Visit:
    """The visit. Raises a ``ValueError`` where there is none, or where it has been forgotten."""
    if visit is None:
        raise ValueError("there is no image yet, or it has been forgotten after an hour; choose one")
    return visit


def text(content: str, name: str | None = None) -> gr.Markdown:
    """HTML on the page, whose foreign parts are escaped. (gradio's part for HTML evaluates strings as programs.)"""
    return gr.Markdown(content, sanitize_html=False, latex_delimiters=[], elem_id=name)


def choice(label: str, name: str) -> gr.Dropdown:
    """A list to choose from whose entries say what they are of; the label is for screen readers."""
    return gr.Dropdown([], label=label, container=False, filterable=False, min_width=100, elem_id=name)


def picture(label: str, name: str) -> gr.Image:
    """A picture that the page shows. (To make a JPEG takes a sixtieth of a PNG's time.)"""
    return gr.Image(
        label=label,
        alt_text=label,
        show_label=False,
        format="jpeg",
        interactive=False,
        buttons=[],
        min_width=0,
        elem_id=name,
        elem_classes="pce-picture",
    )


def theme() -> gr.themes.Base:
    """gradio's plain theme with the visitor's own fonts: others would be fetched from elsewhere."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
