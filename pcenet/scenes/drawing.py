"""Drawing one picture of the generated data set ``scenes``.

A scene stands on flat ground before a pinhole camera: pavements and a road, buildings, trees and people. Pillow draws
what stands on the ground, the farthest first, into a picture whose pixels are numbers of parts (a wall, a jacket, a
crown). Class, object, colour and surface of every pixel are then looked up by its part's number.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from pcenet.scenes import SceneObject
from pcenet.scenes.pavements import FARTHEST, PATTERNS, Array, pavement_tone

Bytes = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]  # red, green, blue, from 0 to 1
Point = tuple[float, float]
Box = tuple[float, float, float, float]

CLASSES = ("sky", "building", "road", "pavement", "tree", "person")

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
BLUR = 0.4  # pixels: the lens


class Scene(NamedTuple):
    """A picture and all that is known about it.

    Attributes:
        image: ``[H, W, 3]``, red, green and blue.
        mask: ``[H, W]``, class numbers.
        instances: ``[H, W]``, numbers of objects, 0 where there is none.
        objects: those that can be seen, numbered from 1 on.
    """

    image: Bytes
    mask: Bytes
    instances: Bytes
    objects: tuple[SceneObject, ...]


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


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """One scene.

    The category of every object is drawn by itself, uniformly, from those of its attribute.

    Args:
        rng: draws everything that differs from scene to scene.
        size: height and width in pixels.
    """
    height, width = size
    camera = Camera(
        centre=width * rng.uniform(0.35, 0.65),
        horizon=height * rng.uniform(0.34, 0.46),
        focal=0.9 * width,
        height=rng.uniform(3.0, 4.5),
    )
    ground, parts, ground_tone, depth = _draw_ground(rng, camera, size)
    canvas = Canvas(ground, parts, camera)
    nearest = camera.focal * camera.height / (height - camera.horizon)
    people = [(depth, _draw_person) for depth in rng.uniform(nearest * 1.02, nearest + 6, rng.integers(3, 7))]
    trees = [(depth, _draw_tree) for depth in rng.uniform(nearest + 2, 18, rng.integers(1, 4))]
    buildings = [(depth, _draw_building) for depth in rng.uniform(13, 30, rng.integers(2, 5))]
    for distance, draw in sorted([*people, *trees, *buildings], key=lambda thing: -thing[0]):
        draw(canvas, rng, float(distance), width)
    numbers = np.asarray(canvas.picture)
    image = _light(rng, canvas, numbers, ground_tone, depth)
    # Far away no pattern can be seen, so that such ground shows none, whichever it has.
    too_far = (numbers > ROAD) & (numbers <= ROAD + 2) & (depth**2 > FARTHEST * camera.focal * camera.height)
    return Scene(image, *_describe(canvas.parts, numbers, too_far))


def _describe(
    parts: Sequence[Part], numbers: Bytes, too_far: npt.NDArray[np.bool_]
) -> tuple[Bytes, Bytes, tuple[SceneObject, ...]]:
    """Mask, numbers of objects, and the objects that can be seen."""
    seen = np.bincount(numbers[~too_far], minlength=len(parts))
    number_of = np.zeros(len(parts), dtype=np.uint8)
    objects: list[SceneObject] = []
    for number, part in enumerate(parts):
        if part.thing and seen[number]:
            objects.append(SceneObject(len(objects) + 1, part.class_name, *part.thing))
            number_of[number] = len(objects)
    class_of = np.array([CLASSES.index(part.class_name) for part in parts], dtype=np.uint8)
    return class_of[numbers], np.where(too_far, 0, number_of[numbers]).astype(np.uint8), tuple(objects)


SKY, ROAD = 0, 1  # numbers of parts; pavements follow


def _draw_ground(
    rng: np.random.Generator, camera: Camera, size: tuple[int, int]
) -> tuple[Bytes, list[Part], Array, Array]:
    """The picture of parts without things, its parts, and for each pixel the tone of the ground and its depth."""
    height, width = size
    parts = [
        Part("sky", (0, 0, 0), math.inf),
        Part("road", _hsv(rng, (0, 360), (0.0, 0.08), (0.22, 0.5)), 0, grain=rng.uniform(0.02, 0.09), blotch=0.06),
    ]
    for _ in range(2):
        colour = _hsv(rng, (0, 60), (0.0, 0.3), (0.42, 0.85))
        grain, pattern = rng.uniform(0.02, 0.09), _category(rng, "pattern")
        parts.append(Part("pavement", colour, 0, grain, 0.06, thing=("pattern", pattern)))
    numbers = np.zeros(size, dtype=np.uint8)
    tone, depth = np.ones(size, np.float32), np.full(size, np.inf, np.float32)
    first = math.ceil(camera.horizon + 0.5)
    rows = np.arange(first, height, dtype=np.float32)[:, None] + 0.5 - camera.horizon
    v = np.broadcast_to(camera.focal * camera.height / rows, (height - first, width))
    u = (np.arange(width, dtype=np.float32) + 0.5 - camera.centre) * v / camera.focal
    depth[first:] = v
    from_road, along = _place_road(rng, u, v)
    numbers[first:] = np.where(from_road < 0, ROAD, np.where(along[0] > 0, ROAD + 1, ROAD + 2))
    below = tone[first:]
    below += 0.2 * ((from_road >= 0) & (from_road < 0.2))  # the kerb
    markings = (np.abs(along[0]) < 0.1) & (along[1] % 3 < 1.6) & (from_road < 0)
    below += rng.uniform(0.3, 1.0) * markings * np.exp(-v / 12)
    for number in (ROAD + 1, ROAD + 2):
        where = numbers[first:] == number
        turn, scale = np.radians(rng.uniform(-6, 6)), rng.uniform(0.9, 1.15)
        contrast = rng.uniform(0.09, 0.15)
        thing = parts[number].thing
        assert thing is not None
        x, y, far = u[where], v[where], v[where]
        below[where] += contrast * pavement_tone(
            thing[1],
            np.cos(turn) * x - np.sin(turn) * y,
            np.sin(turn) * x + np.cos(turn) * y,
            far / camera.focal,
            far**2 / (camera.focal * camera.height),
            rng.spawn(1)[0],  # however much a pattern draws, the rest of the scene stays the same
            scale=scale,
        )
    return numbers, parts, tone, depth


def _place_road(rng: np.random.Generator, u: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
    """Metres from the edge of the road, negative on it; and metres across, from its middle, and along it."""
    angle = rng.uniform(-0.5, 0.5) * np.pi
    across = np.cos(angle) * u + np.sin(angle) * (v - 9) - rng.uniform(-3.5, 3.5)
    along = np.cos(angle) * v - np.sin(angle) * u
    half_width = rng.uniform(1.2, 2.6)
    if rng.random() < 0.2:  # a square without a road
        across, half_width = across + 1000, 0.0
    return np.abs(across) - half_width, (across, along)


def _draw_building(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
    """A house with its front to the camera: roof, windows, a door, and the side that can be seen."""
    camera = canvas.camera
    centre = (rng.uniform(0, width) - camera.centre) / camera.scale(depth)
    half, storeys = rng.uniform(2.5, 5.5), int(rng.integers(1, 5))
    top = 3.0 * storeys + rng.uniform(0.3, 1.0)
    colour = _hsv(rng, (0, 360) if rng.random() < 0.3 else (5, 50), (0.03, 0.45), (0.4, 0.9))
    roughness = _category(rng, "roughness")
    wall = canvas.add(Part("building", colour, depth, WALLS[roughness], 0.04, thing=("roughness", roughness)))
    side = canvas.add(Part("building", _darker(colour, 0.65), depth))
    roof = canvas.add(Part("building", _hsv(rng, (0, 40), (0.1, 0.5), (0.2, 0.5)), depth, 0.06))
    pane = canvas.add(Part("building", _hsv(rng, (190, 230), (0.1, 0.4), (0.12, 0.5)), depth, 0.05, 0.15))
    lit = canvas.add(Part("building", _hsv(rng, (35, 60), (0.1, 0.5), (0.6, 1.0)), depth))
    door = canvas.add(Part("building", _hsv(rng, (0, 360), (0.2, 0.7), (0.2, 0.5)), depth))
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


def _draw_tree(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
    """A trunk and a crown of many round tufts."""
    camera, scale = canvas.camera, canvas.camera.scale(depth)
    x = (rng.uniform(0.02, 0.98) * width - camera.centre) / scale
    radius, trunk = rng.uniform(1.0, 2.0), rng.uniform(1.4, 2.6)
    middle = trunk + 0.8 * radius
    canvas.shade(x, depth, radius, radius * 0.7, 110)
    bark = canvas.add(Part("tree", _hsv(rng, (15, 40), (0.2, 0.5), (0.15, 0.45)), depth, 0.1))
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
    category = _category(rng, "leaves")
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


def _draw_person(canvas: Canvas, rng: np.random.Generator, depth: float, width: int) -> None:
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
    category = _category(rng, "clothes")
    legs = canvas.add(Part("person", _hsv(rng, (0, 360), (0.0, 0.3), (0.1, 0.6)), depth, 0.03, body=body))
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
    skin = canvas.add(Part("person", _hsv(rng, (15, 30), (0.25, 0.6), (0.3, 0.95)), depth, body=body))
    hair = canvas.add(Part("person", _hsv(rng, (0, 50), (0.0, 0.6), (0.05, 0.6)), depth, 0.05, body=body))

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


def _light(rng: np.random.Generator, canvas: Canvas, numbers: Bytes, tone: Array, depth: Array) -> Bytes:
    """The picture of parts as a camera sees it: surfaces, sun, shadows, haze, lens and sensor."""
    parts, (height, width) = canvas.parts, numbers.shape
    colour_of = np.array([part.colour for part in parts], np.float32)
    grain_of, blotch_of = (np.array([getattr(p, name) for p in parts], np.float32) for name in ("grain", "blotch"))
    sun = rng.choice((-1, 1)) * rng.uniform(0.1, 0.3)
    tone = np.where(numbers > ROAD + 2, 1, tone)
    tone += grain_of[numbers] * rng.standard_normal(numbers.shape, dtype=np.float32)
    tone += blotch_of[numbers] * _coarse(rng, height, width, 12)
    to_right, down, start = _round(parts, sun)
    tone += to_right[numbers] * (np.arange(width, dtype=np.float32) + 0.5)
    tone += down[numbers] * (np.arange(height, dtype=np.float32)[:, None] + 0.5)
    tone += start[numbers]
    shadows = np.asarray(canvas.shadows.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    on_ground = (numbers >= ROAD) & (numbers <= ROAD + 2)
    tone *= 1 - rng.uniform(0.6, 1.0) * shadows * on_ground
    colours = colour_of[numbers] * np.maximum(tone, 0.05)[..., None]
    sky, haze = _sky(rng, canvas.camera, height, width)
    depths = np.where(on_ground, depth, np.array([part.depth for part in parts], np.float32)[numbers])
    clear = np.exp(-depths / rng.uniform(60, 250))[..., None]
    colours = np.where((numbers == SKY)[..., None], sky, colours * clear + haze * (1 - clear))
    gain = rng.uniform(0.65, 1.2) * rng.uniform(0.93, 1.07, 3)
    seen = Image.fromarray(_bytes(colours * gain.astype(np.float32))).filter(ImageFilter.GaussianBlur(BLUR))
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(0.005, 0.02))
    return _bytes(np.asarray(seen, np.float32) / 255 + noise)


def _round(parts: Sequence[Part], sun: float) -> Array:
    """``[3, parts]``: how much a round body's brightness grows per pixel to the right and down, and where from."""
    found = np.zeros((3, len(parts)), np.float32)
    for number, part in enumerate(parts):
        if part.body:
            left, top, right, bottom = part.body
            across, down = 2 * sun / (right - left), -0.3 / (bottom - top)
            found[:, number] = across, down, -across * (left + right) / 2 - down * (top + bottom) / 2
    return found


def _sky(rng: np.random.Generator, camera: Camera, height: int, width: int) -> tuple[Array, Array]:
    """The sky ``[H, W, 3]`` and the colour of the haze ``[3]``."""
    above = np.array(_hsv(rng, (200, 230), (0.05, 0.65), (0.5, 0.95)), np.float32)
    haze = np.array(_hsv(rng, (20, 220), (0.0, 0.2), (0.7, 1.0)), np.float32)
    up = np.clip(1 - (np.arange(height, dtype=np.float32) + 0.5) / camera.horizon, 0, 1)[:, None, None]
    sky = haze + up**0.7 * (above - haze)
    clouds = _coarse(rng, height, width, 24) + 0.5 * _coarse(rng, height, width, 9)
    clouds = np.clip(clouds + rng.uniform(-1.5, 0.8), 0, 1)
    return sky + 0.8 * clouds[..., None] * (rng.uniform(0.8, 1.0) - sky), haze


def _coarse(rng: np.random.Generator, height: int, width: int, cell: int) -> Array:
    """Noise of about unit variance that changes over ``cell`` pixels."""
    knots = rng.standard_normal((height // cell + 2, width // cell + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC))


def _category(rng: np.random.Generator, attribute: str) -> str:
    categories = ATTRIBUTES[attribute]
    return categories[int(rng.integers(len(categories)))]


def _coloured(rng: np.random.Generator, hue: float, saturation: Point, value: Point) -> Colour:
    """A colour near a hue in degrees."""
    return _hsv(rng, (hue - HUE_SPREAD, hue + HUE_SPREAD), saturation, value)


def _hsv(rng: np.random.Generator, hue: Point, saturation: Point, value: Point) -> Colour:
    """A colour between bounds; hue in degrees."""
    degrees = rng.uniform(*hue)
    return colorsys.hsv_to_rgb(degrees / 360 % 1, rng.uniform(*saturation), rng.uniform(*value))


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return red * factor, green * factor, blue * factor


def _bytes(values: Array) -> Bytes:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
