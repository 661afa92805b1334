"""Linear probes: what a network's features still know of the objects in an image, beyond their class.

A network is frozen. The features of patches that lie inside an object (one mean vector for each patch) are all that a
linear classifier gets to tell the object's attribute from: the colour of the clothes, the pattern of the pavement. It
learns on the objects of one split and is measured on those of another. scikit-learn is imported when one is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.data import ObjectSource, cover_transform
from pcenet.data.transforms import Transform
from pcenet.models.preprocessing import image_size, preprocessing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BATCH = 16  # images that go through the network together
PER_OBJECT = 4
MOST_STEPS = 2000  # of the solver


class Place(NamedTuple):
    """A patch inside an object: its row and column in the grid of patches, and the object's number."""

    row: int
    column: int
    number: int


@dataclass(frozen=True)
class Patches:
    """The patches of one attribute in one split, n of them.

    Attributes:
        features: module name to the features of each patch, ``[n, C]``.
        category: ``[n]``, the number of each patch's category in the source's list.
        image: ``[n]``, the index of its image.
        object: ``[n]``, which object it lies in; no two objects of a split have one number.
    """

    features: Mapping[str, Floats]
    category: Ints
    image: Ints
    object: Ints


@dataclass(frozen=True)
class AttributeProbe:
    """How well one attribute can be read from the features.

    Attributes:
        accuracy: share of the patches of the second split whose category was found.
        balanced: the same, but the mean over the categories, so that each counts the same.
        chance: accuracy of always naming the category that most training patches have.
        categories: how many there are in the source's list.
        train_patches, train_objects: what the classifier learned from.
        patches, objects: what it was measured on.
        right: ``[patches]`` bool, which were found.
        image: ``[patches]``, the index of the image of each.
    """

    accuracy: float
    balanced: float
    chance: float
    categories: int
    train_patches: int
    train_objects: int
    patches: int
    objects: int
    right: npt.NDArray[np.bool_] = field(repr=False)
    image: Ints = field(repr=False)


@dataclass(frozen=True)
class ProbeResult:
    """How well the attributes can be read from one module's output.

    Attributes:
        module: its name in the network.
        patch: side of the patches, in pixels of the image that the network sees.
        attributes: what was found for each attribute; one without patches in either split is left out.
    """

    module: str
    patch: int
    attributes: Mapping[str, AttributeProbe]

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the attributes, each of which counts the same."""
        return _mean([probe.accuracy for probe in self.attributes.values()])

    @property
    def balanced(self) -> float:
        """Mean balanced accuracy of the attributes, each of which counts the same."""
        return _mean([probe.balanced for probe in self.attributes.values()])

    @property
    def chance(self) -> float:
        """Mean chance of the attributes, each of which counts the same."""
        return _mean([probe.chance for probe in self.attributes.values()])


class Difference(NamedTuple):
    """How much better a first probe is than a second one.

    Attributes:
        value: accuracy of the first minus that of the second, on the same patches.
        error: its standard error, the images being drawn by chance; patches of one image are not independent. It says
            nothing of how much training a network anew would change.
        images: how many there are.
    """

    value: float
    error: float
    images: int


def probe(
    model: nn.Module,
    source_train: ObjectSource,
    source_val: ObjectSource,
    *,
    module: str,
    patch: int,
    per_object: int = PER_OBJECT,
    transform: Transform | None = None,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Read the attributes of objects from the output of one module; see `probe_modules`, which reads several."""
    return probe_modules(
        model,
        source_train,
        source_val,
        modules=[module],
        patch=patch,
        per_object=per_object,
        transform=transform,
        device=device,
    )[module]


def probe_modules(
    model: nn.Module,
    source_train: ObjectSource,
    source_val: ObjectSource,
    *,
    modules: Sequence[str],
    patch: int,
    per_object: int = PER_OBJECT,
    transform: Transform | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, ProbeResult]:
    """Read the attributes of objects from the outputs of modules, all from the same patches.

    For each module and attribute a multinomial logistic regression (L2 penalty, C = 1, standardised features) is fitted
    on the patches of ``source_train`` and measured on those of ``source_val``.

    Args:
        model: any network that takes images ``[B, 3, H, W]``. It is put on ``device``; its weights do not change, and
            its mode is put back.
        source_train: the objects to learn from.
        source_val: those to be measured on, with the same attributes.
        modules: names as in ``model.named_modules()``, ``""`` for the network itself. Each gives a map
            ``[B, C, h, w]``, in which a cell covers as many pixels of the image as are in a patch, or a divisor of
            these.
        patch: side of the patches in pixels of the image that the network sees. They form a grid that starts at the top
            left; what it leaves over is not looked at. A patch is taken where more than half of its pixels are of one
            object, and its features are the mean of the map in it.
        per_object: take so many patches of an object at most, evenly spaced over those that it has, row by row.
        transform: PIL image -> tensor; None: what the network's ``pretrained_cfg`` asks for, see `cover_transform`.
        device: where to compute.

    Returns:
        By module name.

    Raises:
        ValueError: a module does not exist, did not run or gives no such map, its cells and the patches do not fit, no
            patch lies in an object, or the sources know different attributes.
        ModuleNotFoundError: without scikit-learn; ``pip install scikit-learn``.
    """
    if {k: tuple(v) for k, v in source_train.attributes.items()} != {
        k: tuple(v) for k, v in source_val.attributes.items()
    }:
        raise ValueError(
            f"source_train and source_val have different attributes: {source_train.attributes} and"
            f" {source_val.attributes}; give two splits of one data set"
        )
    classifier = _make_classifier()
    learn, measure = (
        collect(model, source, modules=modules, patch=patch, per_object=per_object, transform=transform, device=device)
        for source in (source_train, source_val)
    )
    common = [name for name in source_train.attributes if name in learn and name in measure]
    counts = {name: len(source_train.attributes[name]) for name in common}
    return {
        module: ProbeResult(
            module,
            patch,
            {name: _fit(classifier, module, learn[name], measure[name], count) for name, count in counts.items()},
        )
        for module in modules
    }


def collect(
    model: nn.Module,
    source: ObjectSource,
    *,
    modules: Sequence[str],
    patch: int,
    per_object: int = PER_OBJECT,
    transform: Transform | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Patches]:
    """The patches of each attribute of a source, with their features; arguments and errors as for `probe_modules`."""
    if patch < 1 or per_object < 1:
        raise ValueError(f"patch and per_object must be 1 or more, got {patch} and {per_object}")
    if transform is None:
        values = preprocessing(model)
        transform = cover_transform(image_size(model), mean=values["mean"], std=values["std"])
    found: dict[str, _Collected] = {}
    with torch.inference_mode(), _frozen(model.to(device)), _outputs(model, modules) as outputs:
        for indices, images in _batches(source, transform):
            outputs.clear()
            model(images.to(device))
            means = {name: _patch_means(_output(outputs, name), images, patch, name) for name in modules}
            for row, index in enumerate(indices):
                seen = _seen_instances(source, index, images)
                objects = {item.number: item for item in source.objects(index)}
                for place in object_patches(seen, patch, per_object):
                    item = objects[place.number]
                    category = source.attributes[item.attribute].index(item.category)
                    vectors = {name: maps[row, :, place.row, place.column] for name, maps in means.items()}
                    rows = found.setdefault(item.attribute, _Collected(modules))
                    rows.add(category, index, place.number, vectors)
    if not found:
        raise ValueError(
            f"patch {patch}: no patch of so many pixels lies in an object of {source.name} {source.split}; give a"
            " smaller one"
        )
    return {name: rows.stacked() for name, rows in found.items()}


def object_patches(instances: npt.NDArray[np.integer[Any]], patch: int, per_object: int | None = None) -> list[Place]:
    """The patches of which more than half lies in one object.

    Args:
        instances: ``[H, W]``, the number of the object at each pixel, 0 for none.
        patch: side of a patch. The grid of patches starts at the top left; what it leaves over is not looked at.
        per_object: at most so many patches for each object, evenly spaced over those that it has; None: all.

    Returns:
        By object, and for each object row by row.
    """
    rows, columns = (side // patch for side in instances.shape)
    cells = instances[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch)
    places = []
    for number in np.unique(cells):
        if number == 0:
            continue
        inside = np.argwhere(2 * (cells == number).sum(axis=(1, 3)) > patch * patch)
        count = len(inside) if per_object is None else min(per_object, len(inside))
        chosen = [inside[index * len(inside) // count] for index in range(count)]
        places += [Place(int(row), int(column), int(number)) for row, column in chosen]
    return places


def paired_difference(first: AttributeProbe, second: AttributeProbe) -> Difference:
    """The difference of two networks' probes of one attribute, measured on the same patches.

    With d_i the first's hits minus the second's among the n_i patches of image i, the value is D = sum d_i / sum n_i,
    and its standard error ``sqrt(m / (m - 1) * sum (d_i - D n_i)^2) / sum n_i`` for m images (0 for a single one).

    Raises:
        ValueError: the probes are of different patches.
    """
    if not np.array_equal(first.image, second.image):
        raise ValueError(
            f"first and second are of different patches ({first.patches} and {second.patches}): probe both networks"
            " with one source, one patch size and images of one size"
        )
    difference = first.right.astype(np.float64) - second.right
    _, image = np.unique(first.image, return_inverse=True)
    sums, counts = np.bincount(image, difference), np.bincount(image)
    value, images = float(difference.mean()), len(counts)
    squares = float(((sums - value * counts) ** 2).sum())
    error = np.sqrt(images / (images - 1) * squares) / len(difference) if images > 1 else 0.0
    return Difference(value, float(error), images)


class _Collected:
    """The patches of one attribute, image after image."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.features: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.rows: list[tuple[int, int, int]] = []

    def add(self, category: int, image: int, number: int, vectors: Mapping[str, Tensor]) -> None:
        """One more patch."""
        self.rows.append((category, image, number))
        for name, vector in vectors.items():
            self.features[name].append(vector.clone())  # else it would keep the maps of its whole batch

    def stacked(self) -> Patches:
        """All of them."""
        category, image, number = np.array(self.rows, dtype=np.int64).T
        features = {name: torch.stack(vectors).numpy() for name, vectors in self.features.items()}
        # Numbers of objects begin anew in each image.
        return Patches(features, category, image, image * (int(number.max()) + 1) + number)


def _batches(source: ObjectSource, transform: Transform) -> Iterator[tuple[list[int], Tensor]]:
    """The images of a source in batches of one size each, with their indices, in order."""
    indices: list[int] = []
    images: list[Tensor] = []
    for index in range(len(source)):
        image = transform(source.image(index))
        if images and (len(images) == BATCH or image.shape != images[0].shape):
            yield indices, torch.stack(images)
            indices, images = [], []
        indices.append(index)
        images.append(image)
    yield indices, torch.stack(images)


def _seen_instances(source: ObjectSource, index: int, images: Tensor) -> Ints:
    """``[H, W]``: the object at the centre of each pixel of an image as the network sees it."""
    instances = torch.from_numpy(np.asarray(source.instances(index), dtype=np.float32))
    size = (images.shape[2], images.shape[3])
    return F.interpolate(instances[None, None], size=size, mode="nearest-exact")[0, 0].long().numpy()


def _patch_means(output: Tensor, images: Tensor, patch: int, name: str) -> Tensor:
    """``[B, C, rows, columns]`` on the CPU: the mean of a map over each whole patch of the images.

    Raises:
        ValueError: the map's cells do not cover whole pixels, or the patches not whole cells.
    """
    height, width = images.shape[2:]
    stride = -(-height // output.shape[2])
    fits = output.shape[2:] == (-(-height // stride), -(-width // stride))
    if not fits or patch % stride:
        raise ValueError(
            f"module {name!r} makes a map of {output.shape[2]} x {output.shape[3]} cells of images of {height} x"
            f" {width} pixels, in which patches of {patch} pixels are no whole cells: give a patch that is a multiple"
            " of its stride"
        )
    rows, columns = height // patch, width // patch
    side = patch // stride
    whole = output[:, :, : rows * side, : columns * side].float()
    return F.avg_pool2d(whole, side).cpu()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Every part of a network in evaluation mode, and afterwards in its own."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _outputs(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The latest output of each module, by its name."""
    outputs: dict[str, Any] = {}
    known = dict(model.named_modules())
    with ExitStack() as stack:
        for name in modules:
            if name not in known:
                raise ValueError(f"module {name!r} does not exist in the network; its parts are {_parts(model)}")

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                outputs[name] = output

            stack.callback(known[name].register_forward_hook(keep).remove)
        yield outputs


def _output(outputs: Mapping[str, Any], name: str) -> Tensor:
    """The map of a module. Raises ``ValueError`` where it made none."""
    if name not in outputs:
        raise ValueError(f"module {name!r} did not run; name one that the network's forward pass calls")
    output = outputs[name]
    if not isinstance(output, Tensor) or output.ndim != 4:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"module {name!r} gives no map [B, C, h, w] but {shape}; name one that does")
    return output


def _parts(model: nn.Module) -> str:
    """The parts of a network down to the second level."""
    return ", ".join(repr(name) for name, _ in model.named_modules() if name.count(".") < 2)


def _fit(classifier: Any, module: str, learn: Patches, measure: Patches, categories: int) -> AttributeProbe:
    """What a classifier makes of one attribute by the features of one module."""
    predicted = _predict(classifier, learn.features[module], learn.category, measure.features[module])
    right = predicted == measure.category
    counts = np.bincount(measure.category, minlength=categories)
    hits = np.bincount(measure.category, right, minlength=categories)
    commonest = int(np.bincount(learn.category, minlength=categories).argmax())
    occurring = counts > 0
    return AttributeProbe(
        accuracy=float(right.mean()),
        balanced=float((hits[occurring] / counts[occurring]).mean()),
        chance=float((measure.category == commonest).mean()),
        categories=categories,
        train_patches=len(learn.category),
        train_objects=len(np.unique(learn.object)),
        patches=len(measure.category),
        objects=len(np.unique(measure.object)),
        right=right,
        image=measure.image,
    )


def _predict(classifier: Any, features: Floats, category: Ints, others: Floats) -> Ints:
    """The category that a linear classifier learnt from some patches gives to others."""
    if len(np.unique(category)) == 1:  # there is nothing to tell apart, which scikit-learn refuses
        return np.full(len(others), category[0])
    predicted: Ints = classifier.fit(features.astype(np.float64), category).predict(others.astype(np.float64))
    return predicted


def _make_classifier() -> Any:
    """A logistic regression on standardised features, which can be fitted again and again."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("probes need scikit-learn: pip install scikit-learn") from error
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_STEPS))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
