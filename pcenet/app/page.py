"""The page: its parts, and what follows what. Everything that is worked out is worked out in `pcenet.app.session`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from pcenet.app import pictures, words
from pcenet.app.session import Explorer, Visit
from pcenet.data.images import decode_image
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.texts import say

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others of Pillow's start programs, or are rarely tested
SAMPLES = 12  # how many are offered
SHOWN_NAME = 80  # characters of a file's name in a message
AT_ONCE, WAITING = 4, 200  # visitors' wishes that are fulfilled at once, and that may wait
FORGET = 3600  # seconds without a wish, after which a visitor's image is forgotten
TIDY, KEEP = 60, 600  # seconds between looks for old files, of uploads and pictures, and how old they become
SESSIONS = 200  # visitors whose images are kept; the oldest goes first

Answer = dict[Any, Any]
"""Component to its new content."""


@dataclass(frozen=True)
class Sample:
    """An image that the page offers.

    Attributes:
        title: what to write beneath it, if anything.
        thumbnail: the image, small.
        load: reads it.
    """

    title: str | None
    thumbnail: Image.Image
    load: Callable[[], Image.Image]


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
            text(f"<h1>What each expert does: {words.escape(title)}</h1>", "title")
            self.notice = text(words.notice(), "notice")
            self._lay_out()
            self._connect()
        self.blocks.state_session_capacity = SESSIONS
        self.blocks.queue(default_concurrency_limit=AT_ONCE, max_size=WAITING)

    def _lay_out(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self._lay_out_choice()
            with gr.Column(scale=3, min_width=320):
                self._lay_out_prediction()
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                self._lay_out_layer()
            with gr.Column(scale=2, min_width=320):
                self._lay_out_patch()
        step("5. What changed")
        self.report = text("", "report")
        with gr.Row(visible=False) as self.comparison:
            with gr.Column(min_width=320):
                self.router_picture = picture("The classes as the router chose the experts", "router-picture")
            with gr.Column(min_width=320):
                self.changed = picture("The pixels whose class changed, drawn larger", "changed")

    def _lay_out_choice(self) -> None:
        step("1. Choose an image")
        self.gallery = gr.Gallery(
            [(sample.thumbnail, sample.title) for sample in self.samples],
            label="Samples",
            columns=4,
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=bool(self.samples),
            elem_id="samples",
        )
        self.file = gr.File(
            label="Or drop an image of your own",
            height=140,
            elem_id="upload",
        )
        size, pixels = self.limits.size // 2**20, self.limits.pixels / 1e6
        text(f'<p class="pce-hint">{", ".join(FORMATS)}; at most {size} MB and {pixels:g} million pixels.</p>')
        take_uploads_alone(self.file, self.blocks)

    def _lay_out_prediction(self) -> None:
        step("2. What the network makes of it")
        self.headline = text("", "headline")
        with gr.Column() if self.segment else gr.Row():  # a small picture leaves room beside it
            with gr.Column(min_width=280):
                seen = (
                    "The classes of the pixels over the image" if self.segment else "The image as the network sees it"
                )
                self.prediction = picture(seen, "prediction")
            with gr.Column(min_width=280):
                self.table = text("", "classes")

    def _lay_out_layer(self) -> None:
        step("3. Which expert serves which patch")
        self.layer = gr.Radio([], label="Layer, from the image to the prediction", elem_id="layer")
        self.experts = picture("The image with the expert of each patch; click on a patch to point at it", "experts")
        self.legend = text("", "legend")
        text(words.HOW_TO_READ, "how-to-read")

    def _lay_out_patch(self) -> None:
        step("4. One patch")
        with gr.Row():
            self.row = gr.Number(0, label="Row", precision=0, minimum=0, min_width=80, elem_id="row")
            self.column = gr.Number(0, label="Column", precision=0, minimum=0, min_width=80, elem_id="column")
            self.point = gr.Button("Look", min_width=80, elem_id="point")
        self.answer = text("", "answer")
        self.expert = gr.Radio([], label="Send this patch to", elem_id="expert")
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
            self.reset = gr.Button("Reset all", min_width=80, elem_id="reset")

    def _connect(self) -> None:
        everything = [
            self.visit, self.notice, self.file, self.headline, self.prediction, self.table, self.layer, self.experts,
            self.legend, self.row, self.column, self.answer, self.expert, self.report, self.comparison,
            self.router_picture, self.changed,
        ]  # fmt: skip

        def on(listen: Callable[..., Any], wish: Callable[..., Answer], *inputs: Any) -> None:
            guarded = self._guarded(wish)
            listen(guarded, list(inputs), everything, api_visibility="private", show_progress="minimal")

        on(self.blocks.load, self.first_sample)
        on(self.gallery.select, self.choose_sample)
        on(self.file.upload, self.take_file, self.file)
        on(self.layer.input, self.choose_layer, self.visit, self.layer)
        on(self.experts.select, self.click, self.visit)
        on(self.point.click, self.look_at, self.visit, self.row, self.column)
        on(self.send.click, self.send_patch, self.visit, self.expert)
        on(self.reset.click, self.reset_all, self.visit)

    def _guarded(self, wish: Callable[..., Answer]) -> Callable[..., Answer]:
        """A wish that is answered by a message where it cannot be fulfilled. Our faults are told on the terminal."""

        def fulfil(*inputs: Any) -> Answer:
            try:
                return {self.notice: words.notice(), **wish(*inputs)}
            except ValueError as error:
                return {self.notice: words.notice(str(error)), self.file: None}
            except Exception as error:
                if ran_out_of_memory(error):
                    return {
                        self.notice: words.notice("Memory ran out. Try a smaller image, or later."),
                        self.file: None,
                    }
                say(*traceback.format_exc().splitlines(), to=sys.stderr)
                return {self.notice: words.notice("That went wrong, and it was not you. Try again."), self.file: None}

        return with_event_data(fulfil) if wish in (self.choose_sample, self.click) else fulfil

    def first_sample(self) -> Answer:
        """When the page opens."""
        return self._begin(self.samples[0].load()) if self.samples else {self.answer: "", self.report: ""}

    def choose_sample(self, event: gr.SelectData) -> Answer:
        """A click on a sample."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.samples):
            raise ValueError(f"sample {event.index!r} is not one of {len(self.samples)}")
        return self._begin(self.samples[event.index].load())

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
        return {**self._begin(image), self.file: None}

    def choose_layer(self, visit: Visit | None, layer: str) -> Answer:
        """Another layer."""
        return self._show_routing(self.explorer.show_layer(an_image(visit), layer))

    def click(self, visit: Visit | None, event: gr.SelectData) -> Answer:
        """A click on the picture of the experts."""
        visit = an_image(visit)
        x, y = event.index
        return self._show_routing(
            self.explorer.point_at(visit, *visit.routing.patch_at(float(x), float(y), visit.image.picture.size))
        )

    def look_at(self, visit: Visit | None, row: float | None, column: float | None) -> Answer:
        """Row and column instead of a click."""
        if row is None or column is None:
            raise ValueError("row and column must be whole numbers from 0 on")
        return self._show_routing(self.explorer.point_at(an_image(visit), int(row), int(column)))

    def send_patch(self, visit: Visit | None, expert: int | None) -> Answer:
        """The patch that is pointed at, to another expert."""
        if expert is None:
            raise ValueError("no expert is chosen; choose one first")
        return self._show_all(self.explorer.send(an_image(visit), int(expert)))

    def reset_all(self, visit: Visit | None) -> Answer:
        """All patches back to the router's choice."""
        return self._show_all(self.explorer.reset(an_image(visit)))

    def _begin(self, image: Image.Image) -> Answer:
        return self._show_all(self.explorer.begin(image))

    def _show_all(self, visit: Visit) -> Answer:
        seen, classes = visit.image.picture, self.explorer.classes
        before, after = visit.before.mask, visit.after.mask
        answer: Answer = {
            self.headline: words.headline(visit, classes),
            self.table: words.class_table(visit, classes),
            self.prediction: seen if after is None else pictures.class_picture(seen, after),
            self.report: words.change_report(visit, classes),
            self.comparison: gr.Row(visible=self.segment and bool(visit.moves)),
        }
        if visit.moves and before is not None and after is not None:
            answer[self.router_picture] = pictures.class_picture(seen, before)
            answer[self.changed] = pictures.changed_picture(seen, before != after)
        return answer | self._show_routing(visit)

    def _show_routing(self, visit: Visit) -> Answer:
        titles = [(words.layer_title(name, visit.after.layers), name) for name in visit.after.layers]
        row, column = visit.patch or (0, 0)
        served = None if visit.patch is None else int(visit.routing.serving[row, column])
        return {
            self.visit: visit,
            self.layer: gr.Radio(titles, value=visit.layer),
            self.experts: pictures.expert_picture(visit),
            self.legend: words.expert_legend(visit.routing),
            self.row: row,
            self.column: column,
            self.answer: words.patch_answer(visit),
            self.expert: gr.Radio(
                [(f"expert {number}", number) for number in range(visit.routing.num_experts)],
                value=served,
                interactive=served is not None,
            ),
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


def step(title: str) -> None:
    """The heading of a part of the page."""
    text(f"<h2>{title}</h2>")


def text(content: str, name: str | None = None) -> gr.Markdown:
    """HTML on the page, whose foreign parts are escaped. (gradio's part for HTML evaluates strings as programs.)"""
    return gr.Markdown(content, sanitize_html=False, latex_delimiters=[], elem_id=name)


def picture(label: str, name: str) -> gr.Image:
    """A picture that the page shows, under its caption: gradio's own would cover a part of it."""
    text(f"<p>{label}</p>")
    return gr.Image(
        label=label, alt_text=label, show_label=False, format="png", interactive=False, buttons=[], elem_id=name
    )


def theme() -> gr.themes.Base:
    """gradio's plain theme with the visitor's own fonts: others would be fetched from elsewhere."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
