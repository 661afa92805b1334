"""Drawing one picture of the generated data set ``scenes``.

A scene stands on flat ground before a pinhole camera: pavements and a road, buildings, trees and people. Pillow draws
what stands on the ground, the farthest first, into a picture whose pixels are numbers of parts (a wall, a jacket, a
crown). Class, object, colour and surface of every pixel are then looked up by its part's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from pcenet.scenes import SceneObject
from pcenet.scenes.objects import Camera, Canvas, Part, choose_category, draw_building, draw_person, draw_tree, hsv
from pcenet.scenes.pavements import FARTHEST, Array, pavement_tone

Bytes = npt.NDArray[np.uint8]
CLASSES = ("sky", "building", "road", "pavement", "tree", "person")

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
    people = [(depth, draw_person) for depth in rng.uniform(nearest * 1.02, nearest + 6, rng.integers(3, 7))]
    trees = [(depth, draw_tree) for depth in rng.uniform(nearest + 2, 18, rng.integers(1, 4))]
    buildings = [(depth, draw_building) for depth in rng.uniform(13, 30, rng.integers(2, 5))]
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
        Part("road", hsv(rng, (0, 360), (0.0, 0.08), (0.22, 0.5)), 0, grain=rng.uniform(0.02, 0.09), blotch=0.06),
    ]
    for _ in range(2):
        colour = hsv(rng, (0, 60), (0.0, 0.3), (0.42, 0.85))
        grain, pattern = rng.uniform(0.02, 0.09), choose_category(rng, "pattern")
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
    above = np.array(hsv(rng, (200, 230), (0.05, 0.65), (0.5, 0.95)), np.float32)
    haze = np.array(hsv(rng, (20, 220), (0.0, 0.2), (0.7, 1.0)), np.float32)
    up = np.clip(1 - (np.arange(height, dtype=np.float32) + 0.5) / camera.horizon, 0, 1)[:, None, None]
    sky = haze + up**0.7 * (above - haze)
    clouds = _coarse(rng, height, width, 24) + 0.5 * _coarse(rng, height, width, 9)
    clouds = np.clip(clouds + rng.uniform(-1.5, 0.8), 0, 1)
    return sky + 0.8 * clouds[..., None] * (rng.uniform(0.8, 1.0) - sky), haze


def _coarse(rng: np.random.Generator, height: int, width: int, cell: int) -> Array:
    """Noise of about unit variance that changes over ``cell`` pixels."""
    knots = rng.standard_normal((height // cell + 2, width // cell + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC))


def _bytes(values: Array) -> Bytes:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
