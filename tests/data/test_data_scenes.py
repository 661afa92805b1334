"""The generated scenes: the same every time, and what is said of an object is what the picture shows."""

from __future__ import annotations

import colorsys
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import pytest

from pcenet.data import (
    SEGMENTATION_SOURCE_NAMES,
    DataError,
    SceneObject,
    SceneSource,
    check_data,
    open_segmentation_source,
    open_source,
)
from pcenet.scenes.pavements import PATTERNS, STONE, pavement_tone

SPLITS = ("train", "val", "test")
ATTRIBUTE_OF = {"building": "roughness", "pavement": "pattern", "tree": "leaves", "person": "clothes"}
PICTURES = 300


class Seen(NamedTuple):
    """An object with its pixels."""

    picture: int
    item: SceneObject
    image: np.ndarray  # [H, W, 3], from 0 to 1
    where: np.ndarray  # [H, W] bool


@cache
def source() -> SceneSource:
    return SceneSource("train")


def seen(attribute: str, pixels: int = 1, pictures: int = PICTURES) -> Iterator[Seen]:
    """The objects of the first pictures that have an attribute, and at least so many pixels."""
    for index in range(pictures):
        image, numbers = np.asarray(source().image(index)) / 255, source().instances(index)
        for item in source().objects(index):
            where = numbers == item.number
            if item.attribute == attribute and where.sum() >= pixels:
                yield Seen(index, item, image, where)


def likely(count: int, of: int, share: float) -> bool:
    """Whether a count lies within four standard deviations of the binomial's mean (all but 1 case in 16,000)."""
    return abs(count - of * share) <= 4 * np.sqrt(of * share * (1 - share))


# --- a data set like others ---


def test_it_has_a_name_and_three_splits():
    assert SEGMENTATION_SOURCE_NAMES == ("scenes",)
    for split, count in (("train", 800), ("val", 200), ("test", 200)):
        opened = open_segmentation_source("scenes", split)
        assert isinstance(opened, SceneSource)
        assert (len(opened), opened.name, opened.split, opened.horizontal_flip) == (count, "scenes", split, True)
        assert opened.classes == ("sky", "building", "road", "pavement", "tree", "person")
        assert opened.file_name(3) == f"scenes {split}[3]"
        image, mask = opened.sample(count - 1)
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (128, 128), "L", (128, 128))
        with pytest.raises(IndexError, match=f"no image {count}"):
            opened.sample(count)


def contents(opened: SceneSource, index: int) -> tuple[object, ...]:
    image, mask = opened.sample(index)
    return image.tobytes(), mask.tobytes(), opened.instances(index).tobytes(), opened.objects(index)


def test_an_index_gives_the_same_picture_whatever_was_drawn_before():
    forwards, backwards = SceneSource("val"), SceneSource("val", count=20)
    first = [contents(forwards, index) for index in range(8)]
    assert [contents(backwards, index) for index in reversed(range(8))] == first[::-1]
    assert [contents(forwards, index) for index in range(8)] == first
    assert contents(pickle.loads(pickle.dumps(forwards)), 9) == contents(backwards, 9)


def test_no_picture_is_drawn_twice():
    sources = [SceneSource(split) for split in SPLITS]
    for part in (0, 1):  # image and mask
        assert len({contents(opened, index)[part] for opened in sources for index in range(40)}) == 120


def test_number_and_size_are_parameters():
    small = SceneSource("test", count=3, size=(48, 96))
    assert len(small) == 3
    assert small.image(0).size == small.mask(0).size == (96, 48)
    assert small.instances(0).shape == (48, 96)
    with pytest.raises(DataError, match=r"size must be height and width in pixels, each 32 or more, not .*31"):
        SceneSource("test", size=(64, 31))
    with pytest.raises(DataError, match="count must be 1 or more, not 0"):
        SceneSource("test", count=0)


@pytest.mark.parametrize("options", [{"classes": ["a", "b"]}, {"ignore_index": 2}])
def test_its_classes_are_its_own(options):
    with pytest.raises(DataError, match=r"'scenes' has classes of its own: sky, .*person\. Leave both out"):
        open_segmentation_source("scenes", "train", **options)


def test_a_name_of_the_other_task_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'scenes' has a class for each pixel: it is for the task segment"):
        open_source("scenes", "train")
    with pytest.raises(DataError, match="'digits' has a class for each image: it is for the task classify"):
        open_segmentation_source("digits", "train")
    (tmp_path / "scenes").mkdir()
    with pytest.raises(DataError, match="scenes: no images found"):  # the folder, which is empty
        open_source("scenes", "train")
    assert isinstance(open_segmentation_source("scenes", "train"), SceneSource)


def test_a_misspelt_name_suggests_it():
    with pytest.raises(DataError, match=r"must be scenes, or the path of .*; did you mean 'scenes'\?"):
        open_segmentation_source("scene", "train")
    for task in ("classify", "segment"):
        with pytest.raises(DataError, match=r"'scenes' comes with the program .*'\./scenes'"):
            check_data("scenes", task)


# --- what is known of a picture ---


def test_masks_agree_with_objects():
    classes_seen = set()
    for index in range(60):
        mask, numbers, objects = np.asarray(source().mask(index)), source().instances(index), source().objects(index)
        assert [item.number for item in objects] == list(range(1, len(objects) + 1))
        assert set(np.unique(numbers)) - {0} == {item.number for item in objects}
        for item in objects:
            assert set(mask[numbers == item.number]) == {source().classes.index(item.class_name)}
            assert ATTRIBUTE_OF[item.class_name] == item.attribute
            assert item.category in source().attributes[item.attribute]
        # A pavement shows its pattern in all of its rows up to some distance, and in none farther up.
        pavement = mask == source().classes.index("pavement")
        nearest = np.flatnonzero((pavement & (numbers > 0)).any(axis=1)).min()
        assert (numbers[nearest:][pavement[nearest:]] > 0).all()
        assert pavement[:nearest].sum() > 0
        assert not numbers[(mask == 0) | (mask == 2)].any()
        classes_seen |= set(np.unique(mask))
    assert classes_seen == set(range(6))


def test_no_class_is_rare_or_everything():
    pixels = sum(np.bincount(np.asarray(source().mask(index)).ravel(), minlength=6) for index in range(100))
    shares = pixels / pixels.sum()
    assert shares.min() > 0.03
    assert shares.max() < 0.4


def test_hidden_objects_are_left_out():
    """People walk in front of walls: there are objects of a few pixels, and none of none."""
    fewest = min(
        int((source().instances(index) == item.number).sum())
        for index in range(PICTURES)
        for item in source().objects(index)
    )
    assert 1 <= fewest <= 3


# --- attributes are drawn by themselves ---


@pytest.mark.parametrize("attribute", ATTRIBUTE_OF.values())
def test_neither_place_nor_size_gives_a_category_away(attribute):
    categories = source().attributes[attribute]
    rows = [(item.category, *np.argwhere(where).mean(axis=0), where.sum()) for _, item, _, where in seen(attribute)]
    assert len(rows) > 400
    for column in (1, 2, 3):  # from the top, from the left, pixels
        median = np.median([row[column] for row in rows])
        for half in ([row for row in rows if row[column] <= median], [row for row in rows if row[column] > median]):
            counts = Counter(row[0] for row in half)
            assert set(counts) == set(categories)
            assert all(likely(count, len(half), 1 / len(categories)) for count in counts.values())


@pytest.mark.parametrize("attribute", ["clothes", "roughness", "leaves", "pattern"])
def test_no_object_gives_another_one_away(attribute):
    """The first and the second object of a picture are alike as often as chance has it."""
    by_picture = defaultdict(list)
    for picture, item, _, _ in seen(attribute):
        by_picture[picture].append(item.category)
    pairs = [categories[:2] for categories in by_picture.values() if len(categories) > 1]
    assert len(pairs) > 100
    assert likely(sum(first == second for first, second in pairs), len(pairs), 1 / len(source().attributes[attribute]))


# --- what is said is what is seen ---

# What the words mean: hues on the circle of 360 degrees.
HUES = {
    "leaves": {"green": 120, "gold": 50, "red": 0, "blossom": 315},
    "clothes": {"red": 0, "yellow": 55, "green": 125, "blue": 220, "violet": 285},
}


@pytest.mark.parametrize("attribute", HUES)
def test_the_mean_colour_of_an_object_is_nearest_to_its_category(attribute):
    right = Counter()
    total = Counter()
    for _, item, image, where in seen(attribute, pixels=25):
        hue = 360 * colorsys.rgb_to_hsv(*image[where].mean(axis=0))[0]
        away = {name: min((hue - at) % 360, (at - hue) % 360) for name, at in HUES[attribute].items()}
        right[item.category] += min(away, key=away.__getitem__) == item.category
        total[item.category] += 1
    for category in HUES[attribute]:  # haze and tinted light turn a hue now and then
        assert right[category] > 0.9 * total[category] > 27


def test_rougher_walls_differ_more_from_pixel_to_pixel():
    steps = defaultdict(list)
    for _, item, image, where in seen("roughness", pixels=150):
        grey = image.mean(axis=2)
        both = where[:, 1:] & where[:, :-1]
        steps[item.category].append(np.abs(np.diff(grey, axis=1))[both].mean() / grey[where].mean())
    medians = [np.median(steps[name]) for name in ("smooth", "fine", "coarse", "rough")]
    assert all(later > 1.3 * earlier for earlier, later in pairwise(medians))


def laid(pattern: str, step: float = STONE / 20) -> np.ndarray:
    """``[240, 240]``: a pavement from above, a pixel every ``step`` metres; rows are v, columns u."""
    v, u = (axis.ravel() for axis in np.meshgrid(*[np.arange(240, dtype=np.float32) * step] * 2, indexing="ij"))
    pixel = np.full_like(u, step)
    return pavement_tone(pattern, u, v, pixel, pixel, np.random.default_rng(5)).reshape(240, 240)


def repeats(tone: np.ndarray, right: int, down: int) -> float:
    """Autocorrelation at a shift by pixels."""
    height, width = tone.shape
    return float(np.corrcoef(tone[: height - down, : width - right].ravel(), tone[down:, right:].ravel())[0, 1])


# The joints of a pattern repeat, the tones of its stones do not. A stone is 20 pixels long.
def test_slabs_repeat_after_a_slab():
    tone = laid("slabs")
    assert min(repeats(tone, 20, 0), repeats(tone, 0, 20), repeats(tone, 20, 20)) > 0.3
    # Half a slab to the right the joints that run to the right are still the same, and half a slab down the others.
    assert repeats(tone, 20, 0) - repeats(tone, 10, 0) > 0.1
    assert repeats(tone, 0, 20) - repeats(tone, 0, 10) > 0.1
    assert repeats(tone, 10, 10) < 0.2


def test_bricks_repeat_half_a_brick_further_in_the_next_row():
    tone = laid("bricks")
    assert min(repeats(tone, 20, 0), repeats(tone, 10, 10), repeats(tone, 0, 20)) > 0.3
    assert repeats(tone, 10, 10) - repeats(tone, 0, 10) > 0.15


def test_herringbone_repeats_along_its_zigzags():
    """A cell is half a stone, at 45 degrees: one cell on in both directions is sqrt(1/2) of a stone straight down.

    The same step to the right leads from a stone that lies to one that stands.
    """
    tone = laid("herringbone", step=STONE * np.sqrt(0.5) / 14)
    assert repeats(tone, 0, 14) > 0.3
    assert repeats(tone, 0, 14) - repeats(tone, 14, 0) > 0.15


def test_cobbles_do_not_repeat():
    tone = laid("cobbles")
    assert max(repeats(tone, *shift) for shift in product(range(0, 41, 4), repeat=2) if sum(shift) > 8) < 0.2


def test_plain_is_plain():
    assert not laid("plain").any()


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_patterns_are_equally_bright_and_strong_and_fade_far_away(pattern):
    tone = laid(pattern, step=0.1)
    assert abs(tone.mean()) < 0.15
    assert 0.8 < tone.std() < 1.2
    u = np.linspace(0, 30, 500, dtype=np.float32)
    far = np.full_like(u, 0.7)  # more than half of a row of slabs, the widest: 1.2 m
    assert not pavement_tone(pattern, u, u, far, far, np.random.default_rng(0)).any()


def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From windows of 24 x 24 pixels in near pavements: log spectra, mean colours, categories."""
    spectra, colours, categories = [], [], []
    taper = np.outer(np.hanning(24), np.hanning(24))
    for _, item, image, where in seen("pattern", pixels=600, pictures=400):
        grey = image.mean(axis=2)
        for left in range(0, 105, 26):
            if where[104:, left : left + 24].all():
                window = grey[104:, left : left + 24]
                power = np.abs(np.fft.rfft2(taper * (window / window.mean() - 1))) ** 2
                spectra.append(np.log(power[:, :12].ravel() + 1e-3))
                colours.append(image[104:, left : left + 24].mean(axis=(0, 1)))
                categories.append(item.category)
    return np.array(spectra), np.array(colours), np.array(categories)


def test_spectra_tell_pavements_apart_and_mean_colours_do_not():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    spectra, colours, categories = windows()
    half = len(categories) // 2
    assert half > 200
    scores = []
    for features in (spectra, colours):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        scores.append(classifier.fit(features[:half], categories[:half]).score(features[half:], categories[half:]))
    assert scores[0] > 0.6
    assert scores[1] < 0.3  # chance is 0.2
