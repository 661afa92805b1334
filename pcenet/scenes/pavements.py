"""How the pavements of the generated data set ``scenes`` are laid: the tone of a point of the ground.

Everything is measured in metres on the ground, so that perspective is the camera's business. A pattern is averaged over
the stretch of ground that a pixel covers, and fades where its rows are too narrow to be seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

PATTERNS = ("plain", "slabs", "bricks", "herringbone", "cobbles")
STONE = 1.2  # metres: side of a slab, length of a brick; a brick is half as wide, a cobble about as large as that
FARTHEST = 0.22  # metres of ground in a pixel's height, up to which every pattern is told to be seen
JOINT = 0.09  # metres: width of the gap between two stones
ROWS = {"slabs": 1.0, "bricks": 0.5, "herringbone": 0.7, "cobbles": 0.6}  # widths of the rows, in stones
STONE_CONTRAST = 0.45  # the tones of stones lie so far to both sides of their mean, relative to the depth of a joint
TONES = 32  # the tones of stones repeat after so many of them


def pavement_tone(
    pattern: str, u: Array, v: Array, pixel_u: Array, pixel_v: Array, rng: np.random.Generator, *, scale: float = 1.0
) -> Array:
    """How much lighter or darker than its pavement each point is.

    Every pattern but the plain one has mean 0 and variance 1 where it is near: neither brightness nor contrast tells
    the others apart.

    Args:
        pattern: one of `PATTERNS`.
        u: ``[n]``, metres to the right.
        v: ``[n]``, metres away.
        pixel_u: ``[n]``, metres that a pixel covers in the direction of u.
        pixel_v: ``[n]``, the same for v.
        rng: draws the tones, and where cobbles lie.
        scale: the stones are so many times as large as usual.

    Returns:
        ``[n]``; all zero for ``"plain"``.
    """
    if pattern == "plain":
        return np.zeros_like(u)
    u, v, pixel_u, pixel_v = (values / (STONE * scale) for values in (u, v, pixel_u, pixel_v))
    # From four pixels per row of stones on they are drawn in full, from two on not at all.
    seen = np.clip(2 - 4 * pixel_v / ROWS[pattern], 0, 1)
    mean, spread = _moments(pattern)
    return seen * (_stones(pattern, u, v, pixel_u, pixel_v, rng) - mean) / spread


def _stones(
    pattern: str, u: Array, v: Array, pixel_u: Array, pixel_v: Array, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """The tones of stones, of about zero mean, and 1 less in a joint. Lengths are in stones."""
    if pattern == "slabs":
        joint, stone_u, stone_v = _bond(u, v, pixel_u, pixel_v, height=1.0, shift=0.0)
    elif pattern == "bricks":
        joint, stone_u, stone_v = _bond(u, v, pixel_u, pixel_v, height=0.5, shift=0.5)
    elif pattern == "herringbone":
        joint, stone_u, stone_v = _herringbone(u, v, pixel_u, pixel_v)
    else:
        joint, stone_u, stone_v = _cobbles(u, v, pixel_u, pixel_v, rng)
    tones = rng.uniform(-STONE_CONTRAST, STONE_CONTRAST, (TONES, TONES)).astype(np.float32)
    return tones[stone_u % TONES, stone_v % TONES] - joint


@cache
def _moments(pattern: str) -> tuple[float, float]:
    """Mean and standard deviation of `_stones` over a wide stretch of ground, seen from near."""
    u, v = (axis.ravel() for axis in np.meshgrid(*[np.arange(0, 16, 0.08, dtype=np.float32)] * 2))
    pixel = np.full_like(u, 0.08)
    stones = _stones(pattern, u, v, pixel, pixel, np.random.default_rng(0))
    return float(stones.mean()), float(stones.std())


Stones = tuple[Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Share of each pixel that a joint takes, and the two numbers of its stone. Lengths are in stones."""


def _bond(u: Array, v: Array, pixel_u: Array, pixel_v: Array, *, height: float, shift: float) -> Stones:
    """Rows of stones 1 long and ``height`` wide, each shifted against the one before it."""
    row = np.floor(v / height)
    along = u + shift * row
    joint = np.maximum(_line(_to_whole(along), pixel_u), _line(height * _to_whole(v / height), pixel_v))
    return joint, _whole(along), row.astype(np.int64)


def _herringbone(u: Array, v: Array, pixel_u: Array, pixel_v: Array) -> Stones:
    """Stones 1 long and 1/2 wide at right angles to each other, at 45 degrees to u and v.

    In units of 1/2 the plane is cut into cells. Of four cells in a diagonal row two are the left and the right half of
    a stone along x, and two the upper and the lower half of one along y.
    """
    turn = np.float32(np.sqrt(2))
    x, y = turn * (u + v), turn * (v - u)
    pixel: Array = turn * np.hypot(pixel_u, pixel_v)
    column, row = _whole(x), _whole(y)
    part = (column - row) % 4  # left, right, upper, lower
    in_x, in_y = x - column, y - row
    far = np.float32(1)  # from a joint: where a cell goes on into the other half
    distance = np.minimum.reduce(
        [
            np.where(part == 1, far, in_x),
            np.where(part == 0, far, 1 - in_x),
            np.where(part == 2, far, in_y),
            np.where(part == 3, far, 1 - in_y),
        ]
    )
    return _line(distance * np.float32(0.5), pixel * np.float32(0.5)), column - (part == 1), row - (part == 2)


def _cobbles(u: Array, v: Array, pixel_u: Array, pixel_v: Array, rng: np.random.Generator) -> Stones:
    """Stones about 0.6 across: each point belongs to the nearest of centres scattered around a grid."""
    u, v = u / 0.6, v / 0.6
    scatter = rng.uniform(0.1, 0.9, (2, TONES, TONES)).astype(np.float32)
    column, row = _whole(u), _whole(v)
    nearest = np.full_like(u, np.inf)
    second = np.full_like(u, np.inf)
    stone = np.zeros((2, len(u)), dtype=np.int64)
    for step_u in (-1, 0, 1):
        for step_v in (-1, 0, 1):
            other = column + step_u, row + step_v
            centre = scatter[:, other[0] % TONES, other[1] % TONES]
            distance = np.hypot(other[0] + centre[0] - u, other[1] + centre[1] - v).astype(np.float32)
            nearer = distance < nearest
            second = np.where(nearer, nearest, np.minimum(second, distance))
            nearest = np.where(nearer, distance, nearest)
            stone = np.where(nearer, other, stone)
    pixel = np.sqrt(pixel_u * pixel_v).astype(np.float32)
    return _line(np.float32(0.3) * (second - nearest), pixel), stone[0], stone[1]


def _line(distance: Array, pixel: Array) -> Array:
    """Share of a pixel that a joint takes which passes its centre at a distance."""
    half = np.float32(JOINT / STONE / 2)
    return np.maximum(np.minimum(distance + pixel / 2, half) - np.maximum(distance - pixel / 2, -half), 0) / pixel


def _to_whole(x: Array) -> Array:
    return np.abs(x - np.rint(x))


def _whole(x: Array) -> npt.NDArray[np.int64]:
    return np.floor(x).astype(np.int64)
