"""Linear probes: which patches are taken, what their features are, and what can be read from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from probes import (
    AttributeProbe,
    Place,
    collect,
    object_patches,
    paired_difference,
    probe,
    probe_modules,
)
from torch import Tensor, nn

from pcenet.data import ObjectSource, SceneObject, SceneSource
from pcenet.models import create_network

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Squares(ObjectSource):
    """Grey pictures of 32 x 32 with two squares of 12 x 12 in a colour each, and a third one of unknown colour.

    Args:
        shares: how likely each colour is.
    """

    def __init__(self, seed: int, count: int = 30, shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)) -> None:
        super().__init__("squares", "train", ("ground", "person"))
        self.attributes = {"clothes": tuple(COLOURS), "unseen": ("a", "b")}
        rng = np.random.default_rng(seed)
        self.chosen = [[str(name) for name in rng.choice(list(COLOURS), 2, p=shares)] for _ in range(count)]
        self.corners = [
            [(int(rng.integers(0, 20)), int(rng.integers(0, 4))), (int(rng.integers(0, 20)), int(rng.integers(16, 20)))]
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.chosen)

    def pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, numbers = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), np.uint8)
        for number, (name, (top, left)) in enumerate(zip(self.chosen[index], self.corners[index], strict=True), 1):
            image[top : top + 12, left : left + 12] = COLOURS[name]
            numbers[top : top + 12, left : left + 12] = number
        return image, numbers

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels(index)[0])

    def sample(self, index: int) -> tuple[Image.Image, Image.Image]:
        return self.image(index), Image.fromarray((self.instances(index) > 0).astype(np.uint8))

    def objects(self, index: int) -> tuple[SceneObject, ...]:
        return tuple(
            SceneObject(number, "person", "clothes", name) for number, name in enumerate(self.chosen[index], 1)
        )

    def instances(self, index: int) -> np.ndarray:
        return self.pixels(index)[1]

    def file_name(self, index: int) -> str:
        return str(index)


class Network(nn.Module):
    """Modules that pass the colours through, halve the map, forget everything, or give no map."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Identity()
        self.halved = nn.AvgPool2d(2)
        self.nothing = nn.Identity()
        self.vector = nn.Identity()
        self.idle = nn.Identity()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.colours(x)
        self.halved(x)
        self.nothing(torch.ones_like(x))
        self.vector(x.mean(dim=(2, 3)))
        return self.norm(x)


# --- which patches ---


def test_patches_by_hand():
    # Patches of 2 x 2: more than half of the pixels is three or four. Row 5 and column 7 fill no patch.
    numbers = np.array(
        [
            [1, 1, 1, 1, 2, 2, 1],
            [1, 1, 1, 0, 2, 0, 1],
            [0, 1, 1, 1, 2, 2, 1],
            [3, 3, 0, 0, 2, 2, 1],
            [2, 2, 2, 2, 2, 2, 2],
        ]
    )
    # Object 1: both upper left ones (4 and 3 pixels), not those of 1 and 2. Object 2: the right ones (3 and 4).
    # Object 3 has two pixels of a patch: half of it is not more than half.
    expected = [Place(0, 0, 1), Place(0, 1, 1), Place(0, 2, 2), Place(1, 2, 2)]
    assert object_patches(numbers, 2) == expected
    assert object_patches(numbers, 2, per_object=1) == [expected[0], expected[2]]
    assert object_patches(numbers, 6) == []
    assert object_patches(np.zeros((4, 4), np.uint8), 2) == []


def test_patches_of_an_object_are_taken_evenly():
    row = np.ones((2, 20), np.uint8)  # ten patches; of these 0, 10/4, 20/4 and 30/4, rounded down
    assert [place.column for place in object_patches(row, 2, per_object=4)] == [0, 2, 5, 7]
    assert len(object_patches(row, 2, per_object=99)) == 10


# --- which features ---


def test_features_are_the_means_of_the_map_in_a_patch():
    source = Squares(0, count=20)
    found = collect(Network(), source, modules=["colours", "halved"], patch=4, per_object=2, transform=to_tensor)
    assert set(found) == {"clothes"}
    patches = found["clothes"]
    number = 0
    for index in range(len(source)):
        image, numbers = source.pixels(index)
        for place in object_patches(numbers, 4, per_object=2):
            window = image[4 * place.row : 4 * place.row + 4, 4 * place.column : 4 * place.column + 4] / 255
            expected = window.reshape(16, 3).mean(axis=0)
            for module in ("colours", "halved"):  # the mean of the means of quarters is the mean
                assert patches.features[module][number] == pytest.approx(expected, abs=1e-6)
            assert list(COLOURS)[patches.category[number]] == source.chosen[index][place.number - 1]
            assert patches.image[number] == index
            number += 1
    assert number == len(patches.category) > 40
    assert len(set(patches.object)) == 40  # each square of 12 x 12 has whole patches of 4 x 4


def test_objects_are_looked_up_at_the_size_that_the_network_sees():
    """Pictures twice as large, in patches twice as large: the same patches with the same colours."""
    source = Squares(0, count=8)

    def enlarged(image: Image.Image) -> Tensor:
        return to_tensor(image.resize((64, 64), Image.Resampling.NEAREST))

    plain = collect(nn.Identity(), source, modules=[""], patch=4, transform=to_tensor)["clothes"]
    large = collect(nn.Identity(), source, modules=[""], patch=8, transform=enlarged)["clothes"]
    assert np.array_equal(plain.object, large.object)
    assert np.allclose(plain.features[""], large.features[""])


def test_images_of_several_sizes_stay_in_order():
    source = Squares(0, count=20)
    sizes = iter([32, 32, 64, 32, 32] * 8)

    def mixed(image: Image.Image) -> Tensor:
        side = next(sizes)
        return to_tensor(image.resize((side, side), Image.Resampling.NEAREST))

    patches = collect(nn.Identity(), source, modules=[""], patch=4, transform=mixed)["clothes"]
    assert list(patches.image) == sorted(patches.image)
    assert set(patches.image) == set(range(20))
    inside = np.abs(patches.features[""] - np.array(list(COLOURS.values()))[patches.category] / 255).max(axis=1) < 1e-6
    assert inside.mean() > 0.4  # the others lie across an edge
    assert np.array_equal(patches.features[""].argmax(axis=1), patches.category)


# --- what is read from them ---


def test_colours_that_pass_through_are_read_without_fail():
    result = probe(Network(), Squares(1), Squares(2), module="colours", patch=4, transform=to_tensor)
    clothes = result.attributes["clothes"]
    assert (clothes.accuracy, clothes.balanced, result.accuracy, result.balanced) == (1, 1, 1, 1)
    assert clothes.right.all()
    assert (clothes.train_objects, clothes.objects, clothes.categories) == (60, 60, 3)
    assert (result.module, result.patch, set(result.attributes)) == ("colours", 4, {"clothes"})


def test_a_constant_is_worth_chance():
    """Nothing can be told apart, so that the commonest category of training is named for every patch."""
    train, val = Squares(1, shares=(0.6, 0.2, 0.2)), Squares(2)
    result = probe(Network(), train, val, module="nothing", patch=4, per_object=1, transform=to_tensor)
    assert Counter(name for names in train.chosen for name in names).most_common(1)[0][0] == "red"
    reds = sum(name == "red" for names in val.chosen for name in names)  # a patch for each of the 60 objects
    clothes = result.attributes["clothes"]
    assert clothes.patches == 60
    assert clothes.accuracy == clothes.chance == result.chance == reds / 60
    assert clothes.balanced == pytest.approx(1 / 3)  # all of one colour, none of the two others


def test_one_category_alone_is_always_named():
    reds = Squares(1, count=4, shares=(1, 0, 0))
    result = probe(Network(), reds, Squares(2), module="colours", patch=4, transform=to_tensor)
    assert result.accuracy == result.chance < 0.6


def test_the_mean_over_attributes_counts_each_the_same():
    def some(accuracy: float, patches: int) -> AttributeProbe:
        none = np.zeros(0, np.int64)
        return AttributeProbe(accuracy, accuracy / 2, 0.2, 3, 1, 1, patches, 1, none > 0, none)

    result = probe(Network(), Squares(1, 3), Squares(2, 3), module="colours", patch=4, transform=to_tensor)
    result = replace(result, attributes={"a": some(1.0, 1000), "b": some(0.5, 10)})
    assert (result.accuracy, result.balanced, result.chance) == (0.75, 0.375, pytest.approx(0.2))


def test_a_frozen_network_stays_as_it_was():
    network = create_network("pce_unet_nano", num_classes=6, num_experts=2).train()
    network.stages[0].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    sources = SceneSource("train", count=4), SceneSource("val", count=3)
    results = probe_modules(network, *sources, modules=["stages.2", "norm"], patch=8, transform=to_tensor)
    assert list(results) == ["stages.2", "norm"]
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(part._forward_hooks for part in network.modules())
    deepest, last = (results[name].attributes for name in results)
    for name in deepest:  # the same patches of both maps, at strides 8 and 2
        assert np.array_equal(deepest[name].image, last[name].image)


def test_probes_are_measured_in_evaluation_mode():
    """In training mode the features of a patch would depend on its batch."""
    network = Network().train()
    network.norm.running_mean.fill_(1.0)
    patches = collect(network, Squares(0, 3), modules=["norm"], patch=4, transform=to_tensor)["clothes"]
    assert patches.features["norm"].max() < 0  # (x - 1) / 1, and colours are below 1


# --- differences ---


def made(right: list[int], image: list[int]) -> AttributeProbe:
    hits = np.array(right, bool)
    return AttributeProbe(hits.mean(), 0, 0, 2, 1, 1, len(right), 1, hits, np.array(image))


def test_a_paired_difference_by_hand():
    # Image 0: +1, +1; image 3: -1, 0, 0. D = 1/5; residuals 2 - 2/5 = 1.6 and -1 - 3/5 = -1.6; m = 2:
    # sqrt(2 / 1 * (2.56 + 2.56)) / 5 = 3.2 / 5.
    first, second = made([1, 1, 0, 1, 0], [0, 0, 3, 3, 3]), made([0, 0, 1, 1, 0], [0, 0, 3, 3, 3])
    difference = paired_difference(first, second)
    assert difference == pytest.approx((0.2, 0.64, 2))
    assert paired_difference(second, first).value == pytest.approx(-0.2)
    assert paired_difference(first, first) == (0, 0, 2)
    assert paired_difference(made([1], [4]), made([0], [4])) == (1, 0, 1)


def test_differences_of_different_patches_are_refused():
    with pytest.raises(ValueError, match=r"different patches \(2 and 1\): probe both networks with one source"):
        paired_difference(made([1, 1], [0, 1]), made([1], [0]))


# --- wrong usage ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "color"}, "module 'color' does not exist in the network; its parts are '', 'colours', 'halved'"),
        ({"module": "idle"}, "module 'idle' did not run"),
        ({"module": "vector"}, r"module 'vector' gives no map \[B, C, h, w\] but \(16, 3\)"),
        ({"module": "halved", "patch": 3}, "map of 16 x 16 cells of images of 32 x 32 pixels, in which patches of 3"),
        ({"patch": 0}, "patch and per_object must be 1 or more, got 0 and 4"),
        ({"per_object": 0}, "patch and per_object must be 1 or more, got 4 and 0"),
        ({"patch": 32}, "no patch of so many pixels lies in an object of squares train; give a smaller one"),
    ],
)
def test_wrong_usage(options, message):
    options = {"module": "colours", "patch": 4, "transform": to_tensor} | options
    with pytest.raises(ValueError, match=message):
        probe(Network(), Squares(1), Squares(2), **options)


def test_sources_of_different_attributes():
    other = Squares(2)
    other.attributes = {"clothes": ("red", "green")}
    with pytest.raises(ValueError, match="source_train and source_val have different attributes"):
        probe(Network(), Squares(1), other, module="colours", patch=4, transform=to_tensor)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        probe(Network(), Squares(1), Squares(2), module="colours", patch=4, transform=to_tensor)
