"""What a visitor of the page does, as plain values: an image, the experts of its patches, patches sent elsewhere.

Nothing here knows of a page. One `Explorer` serves all visitors; what belongs to a visitor is a `Visit`, which never
changes: whatever the visitor does makes another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pcenet.analysis import redirect
from pcenet.analysis.interventions import Redirect
from pcenet.choices import Precision
from pcenet.data import IGNORE
from pcenet.models import SavableModel
from pcenet.models.preprocessing import as_pixels
from pcenet.nn import Routing, record_routing, routers_of
from pcenet.runtime.device import autocast
from pcenet.tasks import get_task
from pcenet.tasks.pixels import upsample

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

Truth = Image.Image | str
"""What is known of an image: its mask, in mode L, of class numbers and ``IGNORE``; or its class's name."""

View = Literal["after", "before", "change", "truth", "image"]
"""What is shown of a prediction: with the visitor's moves, without them, the pixels that differ; or the true mask, or
the image alone."""

SHOWN = 640  # longer side of pictures on the page, pixels
REMEMBERED = 20  # moves that can be undone


class Place(NamedTuple):
    """A patch: the name of its layer, its row and its column, from 0 on."""

    layer: str
    row: int
    column: int


Moves = Mapping[Place, int]
"""Patches that were sent elsewhere, and the expert that serves them instead."""


class Box(NamedTuple):
    """A rectangle of pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class LayerRouting:
    """Who served which patch of one image in one layer.

    Attributes:
        probs: ``[rows, columns, E]``, the router's probabilities.
        expert_ids: ``[rows, columns, k]``, the experts that served the patch, best first; not the router's own choice
            where the patch was sent elsewhere.
        weight: ``[rows, columns, k]``, the factors of their outputs.
        dispatch_mask: ``[rows, columns, k]``, False where a choice was dropped.
        reach: height and width of all patches together as shares of the image's; above 1 where its map was padded.
    """

    probs: Floats
    expert_ids: Integers
    weight: Floats
    dispatch_mask: Flags
    reach: tuple[float, float]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns, _ = self.probs.shape
        return rows, columns

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs.shape[2]

    @property
    def preferred(self) -> Integers:
        """``[rows, columns]``: the expert that the router gives the highest probability."""
        return self.probs.argmax(axis=2)

    @property
    def gate(self) -> Floats:
        """``[rows, columns]``: the gate value, the router's highest probability."""
        best: Floats = self.probs.max(axis=2)
        return best

    @property
    def serving(self) -> Integers:
        """``[rows, columns]``: the first expert that served each patch, -1 where it was dropped."""
        return np.where(self.dispatch_mask[..., 0], self.expert_ids[..., 0], -1)

    @property
    def tells(self) -> float:
        """How much more than a patch's row decides who serves it: the entropy (nats) of a row's experts, on average,
        times the mean gate value."""
        rows = [np.unique(row, return_counts=True)[1] / len(row) for row in self.serving]
        return float(np.mean([-(shares * np.log(shares)).sum() for shares in rows]) * self.gate.mean())

    def box(self, row: int, column: int, size: tuple[int, int]) -> Box:
        """What a patch covers of a picture of the image, whose width and height are ``size``."""
        (rows, columns), (height, width) = self.grid, self.reach
        xs = (min(size[0], round(edge * width * size[0] / columns)) for edge in (column, column + 1))
        ys = (min(size[1], round(edge * height * size[1] / rows)) for edge in (row, row + 1))
        (left, right), (top, bottom) = xs, ys
        return Box(left, top, right, bottom)

    def patch_at(self, x: float, y: float, size: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the patch at a point of such a picture; of a point outside the nearest patch."""
        (rows, columns), (height, width) = self.grid, self.reach
        row, column = y / size[1] / height * rows, x / size[0] / width * columns
        return min(max(int(row), 0), rows - 1), min(max(int(column), 0), columns - 1)


@dataclass(frozen=True)
class Outcome:
    """What the network makes of one image.

    Attributes:
        shares: ``[K]``, the classes' probabilities; to segment, their shares of the picture's pixels.
        mask: to segment, ``[H, W]``, the class of each pixel of the picture.
        layers: the routing of each layer by its name, in the network's order.
    """

    shares: Floats
    mask: npt.NDArray[np.uint8] | None
    layers: Mapping[str, LayerRouting]


@dataclass(frozen=True)
class Prepared:
    """An image as the page shows it and as the network takes it.

    Attributes:
        picture: what of the image the network sees, enlarged or shrunk for the page.
        tensor: ``[1, 3, h, w]``, normalised.
        truth: what is known of it: a mask of the picture's size, ``[H, W]``, or a class's name.
    """

    picture: Image.Image
    tensor: Tensor
    truth: npt.NDArray[np.uint8] | str | None = None

    def right(self, outcome: Outcome) -> float | None:
        """The share of the pixels, of those that count, whose class is the true one; None where that is not known."""
        if outcome.mask is None or not isinstance(self.truth, np.ndarray):
            return None
        counts = self.truth != IGNORE
        return float((outcome.mask == self.truth)[counts].mean()) if counts.any() else None


@dataclass(frozen=True)
class Visit:
    """What one visitor sees.

    Attributes:
        image: the image.
        before: the outcome with the router's own choices.
        after: the outcome with ``moves``.
        layer: the layer that is looked at.
        patch: row and column of the patch that was pointed at, if any.
        moves: the patches that the visitor sent elsewhere.
        past: the moves as they were before each of the last changes, the latest at the end.
        view: what is shown of the prediction.
    """

    image: Prepared
    before: Outcome
    after: Outcome
    layer: str
    patch: tuple[int, int] | None = None
    moves: Moves = field(default_factory=dict)
    past: tuple[Moves, ...] = ()
    view: View = "after"

    @property
    def routing(self) -> LayerRouting:
        """The routing of the layer that is looked at, as it is now."""
        return self.after.layers[self.layer]

    @property
    def place(self) -> Place | None:
        """The patch that was pointed at."""
        return None if self.patch is None else Place(self.layer, *self.patch)


@dataclass(frozen=True)
class Change:
    """What became of a prediction when patches were sent elsewhere.

    Attributes:
        points: ``[K]``, by how much each class's share grew.
        pixels: to segment, ``[H, W]``, whether a pixel's class is another one.
        followers: by layer, how many patches that nobody sent anywhere are now served by another expert, because what
            the router sees of them has changed; layers without any are left out.
    """

    points: Floats
    pixels: Flags | None
    followers: Mapping[str, int]


class Explorer:
    """A trained network that any number of visitors may question at once.

    Args:
        model: with PCE layers; it is put into evaluation mode and changed by nothing else.
        classes: class names, by class number.
        device: where to compute.
        precision: a resolved one.

    Raises:
        ValueError: for a network without PCE layers, where there is nothing to see.
    """

    def __init__(
        self, model: SavableModel, classes: Sequence[str], *, device: torch.device, precision: Precision = "fp32"
    ) -> None:
        self.model = model.eval().to(device).to(memory_format=torch.channels_last)
        self.classes = tuple(classes)
        self.device = device
        self.precision: Precision = precision
        self._transform = get_task(model.task).image_transform(model)
        self._pass = Lock()  # hooks on the network are every thread's
        if not any(routers_of(model)):
            raise ValueError(
                f"run: {model.pretrained_cfg['architecture']} has no PCE layer, and so no experts to look at;"
                " give the run of a PCE network"
            )

    def prepare(self, image: Image.Image, truth: Truth | None = None) -> Prepared:
        """An RGB image of any size, ready to be looked at, and what is known of it."""
        tensor = self._transform(image)
        picture = fitted(image if self.model.task == "segment" else self._as_image(tensor), SHOWN)
        if isinstance(truth, Image.Image):
            return Prepared(picture, tensor[None], np.asarray(truth.resize(picture.size, Image.Resampling.NEAREST)))
        return Prepared(picture, tensor[None], truth)

    def _as_image(self, tensor: Tensor) -> Image.Image:
        pixels = (as_pixels(tensor, self.model) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    @torch.inference_mode()
    def look(self, image: Prepared, moves: Moves | None = None) -> Outcome:
        """What the network makes of an image when some of its patches go to other experts. Any thread may call it.

        Raises:
            ValueError: if the network's outputs are not finite.
        """
        tensor = image.tensor.to(self.device, memory_format=torch.channels_last)
        with (
            self._pass,
            redirect(self.model, sent_to(moves or {})),
            record_routing(self.model) as records,
            map_sizes(self.model) as sizes,
            autocast(self.precision, self.device),
        ):
            logits = self.model(tensor).float()[0]
        if not logits.isfinite().all():
            raise ValueError("run: the network's outputs are not finite numbers; its training diverged, train it anew")
        layers = {name: layer_routing(self.model, name, found[-1], sizes[name]) for name, found in records.items()}
        if self.model.task == "classify":
            return Outcome(logits.softmax(0).cpu().numpy(), None, layers)
        width, height = image.picture.size
        mask = upsample(logits, (height, width)).argmax(0).to(torch.uint8).cpu().numpy()
        counts = np.bincount(mask.ravel(), minlength=len(self.classes))
        return Outcome((counts / mask.size).astype(np.float32), mask, layers)

    def begin(self, image: Image.Image, truth: Truth | None = None) -> Visit:
        """A look at an image, at the PCE layer that tells most of it, the first of equal ones. Raises as `look`."""
        prepared = self.prepare(image, truth)
        outcome = self.look(prepared)
        return Visit(prepared, outcome, outcome, max(outcome.layers, key=lambda name: outcome.layers[name].tells))

    def show_layer(self, visit: Visit, layer: str) -> Visit:
        """Look at another layer; no patch of it is pointed at.

        Raises:
            ValueError: if there is no such layer.
        """
        if layer not in visit.before.layers:
            raise ValueError(f"layer {layer!r} is not one of {', '.join(visit.before.layers)}")
        return replace(visit, layer=layer, patch=None)

    def point_at(self, visit: Visit, row: int, column: int) -> Visit:
        """Point at a patch of the layer.

        Raises:
            ValueError: if there is no such patch.
        """
        for name, number, count in zip(("row", "column"), (row, column), visit.routing.grid, strict=True):
            if not 0 <= number < count:
                raise ValueError(f"{name} {number} must be a whole number from 0 to {count - 1}")
        return replace(visit, patch=(row, column))

    def send(self, visit: Visit, expert: int, *, whole: bool = False) -> Visit:
        """Send the patch that is pointed at to an expert; back to the router's choice, if it is that one.

        What was sent elsewhere before stays there.

        Args:
            visit: what the visitor sees.
            expert: the patch's new one.
            whole: send all patches of the layer that are served by the same expert as this one.

        Raises:
            ValueError: if no patch is pointed at, or there is no such expert.
        """
        place = visit.place
        if place is None:
            raise ValueError("no patch is pointed at; point at one first")
        if not 0 <= expert < visit.routing.num_experts:
            raise ValueError(f"expert {expert} must be a whole number from 0 to {visit.routing.num_experts - 1}")
        serving = visit.routing.serving
        alike = np.argwhere(serving == serving[place.row, place.column]).tolist()
        sent = [Place(visit.layer, row, column) for row, column in alike] if whole else [place]
        moves = {**visit.moves, **dict.fromkeys(sent, expert)}
        outcome = self.look(visit.image, moves)
        preferred = outcome.layers[visit.layer].preferred
        for back in sent:
            if preferred[back.row, back.column] == expert:
                del moves[back]
        return self._moved(visit, moves, outcome)

    def undo(self, visit: Visit) -> Visit:
        """Take back the last change of who serves what, if there was one. Raises as `look`."""
        if not visit.past:
            return visit
        *past, moves = visit.past
        return replace(self._moved(visit, moves, self.look(visit.image, moves)), past=tuple(past))

    def reset(self, visit: Visit) -> Visit:
        """Let the router choose for all patches again."""
        return self._moved(visit, {}, visit.before)

    def _moved(self, visit: Visit, moves: Moves, outcome: Outcome) -> Visit:
        return replace(
            visit,
            moves=moves,
            after=outcome if moves else visit.before,
            past=visit.past if moves == visit.moves else (*visit.past, visit.moves)[-REMEMBERED:],
            view="change" if visit.view == "change" else "after",  # what shows the effect
        )


def fitted(image: Image.Image, side: int) -> Image.Image:
    """An image of another size, whose longer side has ``side`` pixels; of a small one every pixel becomes a square."""
    factor = side / max(image.size)
    if factor >= 2:
        whole = math.floor(factor)
        return image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * factor)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def sent_to(moves: Moves) -> Redirect:
    """The experts of one image's patches where ``moves`` decide some; the router decides the others.

    Of several experts of a patch the first is exchanged; if the new one was among them, the two change places.
    """

    def choose(layer: str, routing: Routing) -> Tensor:
        choice = routing.expert_ids.clone()
        for place, expert in moves.items():
            if place.layer == layer:
                experts = choice[place.row * routing.grid.columns + place.column]
                experts[experts == expert] = experts[0].clone()
                experts[0] = expert
        return choice

    return choose


@contextmanager
def map_sizes(model: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """By name of each PCE layer, height and width of the map that it last saw."""
    sizes: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack:
        for name, router in routers_of(model):

            def note(_router: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                height, width = args[0].shape[2:]
                sizes[name] = (height, width)

            stack.callback(router.register_forward_pre_hook(note).remove)
        yield sizes


def layer_routing(model: nn.Module, name: str, routing: Routing, size: tuple[int, int]) -> LayerRouting:
    """The routing of one image as arrays.

    Args:
        model: the network.
        name: of the layer.
        routing: its `Routing`, of a batch of one image.
        size: height and width of its map.
    """
    side = dict(routers_of(model))[name].patch_size
    _, rows, columns = routing.grid

    def grid(values: Tensor) -> Any:
        return values.view(rows, columns, -1).cpu().numpy()

    return LayerRouting(
        probs=grid(routing.probs.float()),
        expert_ids=grid(routing.expert_ids),
        weight=grid(routing.gates.float()),
        dispatch_mask=grid(routing.dispatch_mask),
        reach=(rows * side / size[0], columns * side / size[1]),
    )


def change(visit: Visit) -> Change:
    """What the moves of a visit changed."""
    before, after = visit.before, visit.after
    others = {name: layer.serving != after.layers[name].serving for name, layer in before.layers.items()}
    for place in visit.moves:
        others[place.layer][place.row, place.column] = False
    followers = {name: int(moved.sum()) for name, moved in others.items() if moved.any()}
    pixels = None if before.mask is None or after.mask is None else before.mask != after.mask
    return Change(after.shares - before.shares, pixels, followers)
