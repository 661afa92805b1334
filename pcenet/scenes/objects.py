"""What stands in a scene, drawn into a picture of parts: buildings, trees and people, and the camera that sees them."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pcenet.scenes.pavements import PATTERNS

Bytes = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]  # red, green, blue, from 0 to 1
Point = tuple[float, float]
Box = tuple[float, float, float, float]

# Hues in degrees; standard deviations of a wall's brightness, relative to it.
LEAVES: Mapping[str, float] = {"green": 115, "gold": 48, "red": 4, "blossom": 315}
CLOTHES: Mapping[str, float] = {"red": 0, "yellow": 52, "green": 130, "blue": 220, "violet": 285}
WALLS: Mapping[str, float] = {"smooth": 0.0, "fine": 0.05, "coarse": 0.1, "rough": 0.18}

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "roughness": tuple(WALLS),
    "pattern": PATTERNS,
    "leaves": tuple(LEAVES),
    "clothes": tuple(CLOTHES),
}
"""The categories of each attribute: of walls, pavements, trees and people."""

HUE_SPREAD = 7.0  # degrees to both sides of a category's hue


@dataclass(frozen=True)
class Part:
    """What one number in the picture of parts stands for.

    Attributes:
        class_name: its class.
        colour: in plain light.
        depth: metres from the camera, for the haze.
        grain: standard deviation of its brightness from pixel to pixel, relative to it.
        blotch: the same over some ten pixels.
        body: left, top, right and bottom of the round body whose shading it has; None: flat.
        thing: attribute and category of the object that it shows, if it does.
    """

    class_name: str
    colour: Colour
    depth: float
    grain: float = 0.02
    blotch: float = 0.05
    body: Box | None = None
    thing: tuple[str, str] | None = None


class Camera(NamedTuple):
    """A pinhole camera that looks straight ahead. Lengths are metres, places in the picture are pixels."""

    centre: float
    horizon: float
    focal: float
    height: float

    def scale(self, depth: float) -> float:
        """Pixels per metre at a depth."""
        return self.focal / depth

    def point(self, x: float, y: float, depth: float) -> Point:
        """Where a point appears that is ``x`` to the right and ``y`` above the ground."""
        scale = self.scale(depth)
        return self.centre + x * scale, self.horizon + (self.height - y) * scale


class Canvas:
    """The picture of parts while things are drawn into it, and the shadows that they cast.

    Args:
        ground: ``[H, W]``, the number of the part that is seen behind all things.
        parts: the parts that it shows.
        camera: who looks.
    """

    def __init__(self, ground: Bytes, parts: Sequence[Part], camera: Camera) -> None:
        self.parts = list(parts)
        self.camera = camera
        self.picture = Image.fromarray(ground)
        self.shadows = Image.new("L", self.picture.size)
        self.draw = ImageDraw.Draw(self.picture)
        self._shade = ImageDraw.Draw(self.shadows)

    def add(self, part: Part) -> int:
        """The number of a new part."""
        self.parts.append(part)
        return len(self.parts) - 1

    def shade(self, x: float, depth: float, half_width: float, half_depth: float, darkness: int) -> None:
        """A shadow on the ground, an ellipse."""
        left, far = self.camera.point(x - half_width, 0, depth + half_depth)
        right, near = self.camera.point(x + half_width, 0, max(depth - half_depth, 0.5))
        self._shade.ellipse((left, far, right, near), fill=darkness)


def draw_building(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
    """A house with its front to the camera: roof, windows, a door, and the side that can be seen."""
    camera = canvas.camera
    centre = (rng.uniform(0, width) - camera.centre) / camera.scale(depth)
    half, storeys = rng.uniform(2.5, 5.5), int(rng.integers(1, 5))
    top = 3.0 * storeys + rng.uniform(0.3, 1.0)
    colour = hsv(rng, (0, 360) if rng.random() < 0.3 else (5, 50), (0.03, 0.45), (0.4, 0.9))
    roughness = choose_category(rng, "roughness")
    wall = canvas.add(Part("building", colour, depth, WALLS[roughness], 0.04, thing=("roughness", roughness)))
    side = canvas.add(Part("building", _darker(colour, 0.65), depth))
    roof = canvas.add(Part("building", hsv(rng, (0, 40), (0.1, 0.5), (0.2, 0.5)), depth, 0.06))
    pane = canvas.add(Part("building", hsv(rng, (190, 230), (0.1, 0.4), (0.12, 0.5)), depth, 0.05, 0.15))
    lit = canvas.add(Part("building", hsv(rng, (35, 60), (0.1, 0.5), (0.6, 1.0)), depth))
    door = canvas.add(Part("building", hsv(rng, (0, 360), (0.2, 0.7), (0.2, 0.5)), depth))
    canvas.shade(centre, depth, half * 1.05, rng.uniform(0.5, 2.5), 90)

    def rectangle(left: float, bottom: float, right: float, upper: float, part: int) -> None:
        canvas.draw.rectangle((*camera.point(left, upper, depth), *camera.point(right, bottom, depth)), fill=part)

    back = depth + rng.uniform(4, 10)
    edge = centre - half if centre > half else centre + half if centre < -half else None
    if edge is not None:
        corners = [(0.0, depth), (top, depth), (top, back), (0.0, back)]
        canvas.draw.polygon([camera.point(edge, y, z) for y, z in corners], fill=side)
    if rng.random() < 0.6:
        eaves, ridge = half + 0.3, top + rng.uniform(0.8, 2.5)
        corners = [(centre - eaves, top), (centre + eaves, top), (centre + rng.uniform(-1, 1), ridge)]
        canvas.draw.polygon([camera.point(x, y, depth) for x, y in corners], fill=roof)
    rectangle(centre - half, 0, centre + half, top, wall)
    pitch, wide, tall = rng.uniform(2.6, 3.6), rng.uniform(0.7, 1.2), rng.uniform(1.0, 1.7)
    columns = int(2 * half // pitch)
    share_lit = rng.uniform(0, 0.4)
    for column in range(columns):
        x = centre + (column - (columns - 1) / 2) * pitch
        for storey in range(storeys):
            part = lit if rng.random() < share_lit else pane
            sill = 3 * storey + 0.9
            rectangle(x - wide / 2, sill, x + wide / 2, sill + tall, part)
    x = centre + rng.uniform(-0.6, 0.6) * half
    rectangle(x - 0.5, 0, x + 0.5, 2.1, door)


def draw_tree(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
    """A trunk and a crown of many round tufts."""
    camera, scale = canvas.camera, canvas.camera.scale(depth)
    x = (rng.uniform(0.02, 0.98) * width - camera.centre) / scale
    radius, trunk = rng.uniform(1.0, 2.0), rng.uniform(1.4, 2.6)
    middle = trunk + 0.8 * radius
    canvas.shade(x, depth, radius, radius * 0.7, 110)
    bark = canvas.add(Part("tree", hsv(rng, (15, 40), (0.2, 0.5), (0.15, 0.45)), depth, 0.1))
    thick = rng.uniform(0.1, 0.2)
    canvas.draw.polygon(
        [
            camera.point(x - thick, 0, depth),
            camera.point(x - thick / 2, middle, depth),
            camera.point(x + thick / 2, middle, depth),
            camera.point(x + thick, 0, depth),
        ],
        fill=bark,
    )
    category = choose_category(rng, "leaves")
    colour = _coloured(rng, LEAVES[category], (0.4, 0.75), (0.35, 0.75))
    centre_x, centre_y = camera.point(x, middle, depth)
    reach = radius * scale
    body = (centre_x - reach, centre_y - reach, centre_x + reach, centre_y + reach)
    leaves = canvas.add(Part("tree", colour, depth, rng.uniform(0.1, 0.2), 0.15, body, thing=("leaves", category)))
    tufts = int(rng.integers(14, 30))
    angles, away = rng.uniform(0, 2 * np.pi, tufts), np.sqrt(rng.uniform(0, 1, tufts))
    sizes = rng.uniform(0.2, 0.5, tufts) * reach
    for angle, distance, tuft in zip(angles, away, sizes, strict=True):
        left = centre_x + np.cos(angle) * distance * (reach - tuft)
        up = centre_y + np.sin(angle) * distance * (reach - tuft)
        canvas.draw.ellipse((left - tuft, up - tuft, left + tuft, up + tuft), fill=leaves)


def draw_person(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
    """Somebody on the way: trousers, jacket with sleeves, head and hair."""
    camera, scale = canvas.camera, canvas.camera.scale(depth)
    tall, broad = rng.uniform(1.55, 1.9), rng.uniform(0.26, 0.34)
    x = (rng.uniform(0.03, 0.97) * width - camera.centre) / scale
    stride, lean, swing = rng.uniform(0.02, 0.28), rng.uniform(-0.08, 0.08), rng.uniform(-0.15, 0.2)
    hips, neck = 0.47 * tall, 0.83 * tall
    canvas.shade(x, depth, 0.45, 0.3, 120)
    left, up = camera.point(x - broad, tall, depth)
    right, down = camera.point(x + broad, 0, depth)
    body = (left, up, right, down)
    category = choose_category(rng, "clothes")
    legs = canvas.add(Part("person", hsv(rng, (0, 360), (0.0, 0.3), (0.1, 0.6)), depth, 0.03, body=body))
    jacket = canvas.add(
        Part(
            "person",
            _coloured(rng, CLOTHES[category], (0.5, 0.85), (0.35, 0.85)),
            depth,
            0.04,
            body=body,
            thing=("clothes", category),
        )
    )
    skin = canvas.add(Part("person", hsv(rng, (15, 30), (0.25, 0.6), (0.3, 0.95)), depth, body=body))
    hair = canvas.add(Part("person", hsv(rng, (0, 50), (0.0, 0.6), (0.05, 0.6)), depth, 0.05, body=body))

    def limb(points: Sequence[Point], thick: float, part: int) -> None:
        at = [camera.point(x + across, y, depth) for across, y in points]
        canvas.draw.line(at, fill=part, width=max(1, round(thick * scale)), joint="curve")

    for direction in (-1, 1):
        limb([(direction * 0.45 * broad, hips + 0.05), (direction * (0.3 * broad + stride), 0.02)], 0.17, legs)
        hand = (lean + direction * (broad + swing * direction + 0.08), hips)
        limb([(lean + direction * 0.85 * broad, neck - 0.06), hand], 0.15, jacket)
        if scale > 14:  # nearer than that a hand has a pixel
            across, down = camera.point(x + hand[0], hand[1], depth)
            canvas.draw.ellipse((across - 0.06 * scale, down, across + 0.06 * scale, down + 0.12 * scale), fill=skin)
    corners = [
        (-0.8 * broad, hips - 0.08),
        (lean - broad, neck - 0.08),
        (lean - 0.5 * broad, neck),
        (lean + 0.5 * broad, neck),
        (lean + broad, neck - 0.08),
        (0.8 * broad, hips - 0.08),
    ]
    canvas.draw.polygon([camera.point(x + across, y, depth) for across, y in corners], fill=jacket)
    face = 0.085 * tall
    across, down = camera.point(x + lean, neck + face, depth)
    wide, high = 0.85 * face * scale, face * scale
    canvas.draw.ellipse((across - wide, down - high, across + wide, down + high), fill=skin)
    canvas.draw.pieslice((across - wide, down - high, across + wide, down + high), 170, 370, fill=hair)


def choose_category(rng: np.random.Generator, attribute: str) -> str:
    """A category of an attribute, each as likely as the others."""
    categories = ATTRIBUTES[attribute]
    return categories[int(rng.integers(len(categories)))]


def _coloured(rng: np.random.Generator, hue: float, saturation: Point, value: Point) -> Colour:
    """A colour near a hue in degrees."""
    return hsv(rng, (hue - HUE_SPREAD, hue + HUE_SPREAD), saturation, value)


def hsv(rng: np.random.Generator, hue: Point, saturation: Point, value: Point) -> Colour:
    """A colour between bounds; hue in degrees."""
    degrees = rng.uniform(*hue)
    return colorsys.hsv_to_rgb(degrees / 360 % 1, rng.uniform(*saturation), rng.uniform(*value))


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return red * factor, green * factor, blue * factor
