"""What a batch holds depends on (seed, epoch, index) alone."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pcenet.data import (
    DataError,
    EpochSampler,
    ImageDataset,
    ImageSource,
    build_loader,
    eval_transform,
    naming_dead_workers,
    open_source,
    train_transform,
)
from pcenet.data.arrays import ArraySource

Tree = Callable[[str, Mapping[str, int]], Path]
Pack = Callable[[Path], Path]
Batches = list[tuple[Tensor, Tensor]]


# From Python 3.12 on, a fork beside PyTorch's threads warns; a worker only reads and decodes.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def plain(count: int) -> ImageSource:
    """Image ``index`` has the grey level ``index``, and so has its label."""
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    return ArraySource("plain", "train", [str(index) for index in range(count)], images, range(count), range(count))


def epochs(loader: DataLoader, count: int) -> list[Batches]:
    result = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        result.append([(images.clone(), labels.clone()) for images, labels in loader])
    return result


def equal(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(left, right, strict=True)
    )


def test_workers_change_nothing_and_see_the_new_epoch(make_tree: Tree, pack: Pack) -> None:
    source = open_source(pack(make_tree("pets", {"cat": 15, "dog": 15})), "train")
    transform = train_transform(12, augment="randaugment")
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = build_loader(source, transform, batch_size=5, seed=7, train=True, workers=workers)
        runs.append(epochs(loader, 3))
    assert all(equal(left, right) for left, right in zip(*runs, strict=True))
    assert not equal(runs[0][0], runs[0][1])
    assert not equal(runs[1][1], runs[1][2])


def test_another_seed_is_another_order_and_another_look(make_tree: Tree) -> None:
    source = open_source(make_tree("pets", {"cat": 15, "dog": 15}), "train")
    transform = train_transform(12)
    assert list(EpochSampler(24, seed=1)) != list(EpochSampler(24, seed=2))
    samples = [ImageDataset(source, transform, seed)[0, 3][0] for seed in (1, 2, 1)]
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[1])


def test_a_sample_depends_on_its_key_and_not_on_what_came_before(make_tree: Tree) -> None:
    dataset = ImageDataset(open_source(make_tree("pets", {"cat": 15, "dog": 15}), "train"), train_transform(12))
    forwards = {key: dataset[key][0] for key in [(epoch, index) for epoch in range(4) for index in range(10)]}
    torch.manual_seed(99)
    for key in reversed(forwards):
        assert torch.equal(dataset[key][0], forwards[key])
    looks = {forwards[epoch, 0].numpy().tobytes() for epoch in range(4)}
    assert len(looks) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_streams_of_training_alone(workers: int) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = (torch.rand(3).tolist(), random.random(), np.random.random())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    loader = build_loader(
        plain(12), train_transform(8, augment="randaugment"), batch_size=4, train=True, workers=workers
    )
    epochs(loader, 2)
    assert (torch.rand(3).tolist(), random.random(), np.random.random()) == expected


def test_the_random_stream_is_put_back_after_an_error() -> None:
    def fail(image: Image.Image) -> Tensor:
        raise ValueError(str(torch.rand(())))

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="tensor"):
        ImageDataset(plain(3), fail)[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_the_sampler_yields_every_index_once_in_an_order_of_its_epoch() -> None:
    sampler = EpochSampler(50, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        assert sorted(index for _, index in keys) == list(range(50))
        orders.append([index for _, index in keys])
    assert orders[0] == orders[2] != orders[1]
    assert len(sampler) == 50
    assert orders[0] != list(range(50))


def test_the_sampler_of_evaluation_knows_no_epoch() -> None:
    sampler = EpochSampler(3, shuffle=False)
    sampler.set_epoch(7)
    assert list(sampler) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [(10, 4, [4, 4]), (8, 4, [4, 4]), (5, 4, [4]), (4, 4, [4]), (3, 4, [3])],
)
def test_an_incomplete_training_batch_is_dropped_unless_it_is_the_only_one(
    images: int, batch_size: int, sizes: list[int]
) -> None:
    loader = build_loader(plain(images), train_transform(8), batch_size=batch_size, train=True)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_complete(workers: int) -> None:
    transform = eval_transform(8, mean=(0, 0, 0), std=(1, 1, 1))
    loader = build_loader(plain(10), transform, batch_size=4, train=False, workers=workers)
    loader.sampler.set_epoch(7)
    batches = list(loader)
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for images, labels in batches:
        assert labels.dtype == torch.int64
        assert images.dtype == torch.float32
        assert images.shape == (len(labels), 3, 8, 8)
        assert torch.allclose(images * 255, labels.view(-1, 1, 1, 1).float().expand_as(images))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_loader_with_one_line_that_names_it(make_tree: Tree, pack: Pack, workers: int) -> None:
    folder = make_tree("pets", {"train/cat": 8, "train/dog": 8, "val/cat": 1, "val/dog": 1})
    broken = folder / "train/dog/003.jpg"
    Image.new("RGB", (64, 64)).save(broken)
    broken.write_bytes(broken.read_bytes()[:400])
    archive = pack(folder)
    loader = build_loader(open_source(archive, "train"), eval_transform(8), batch_size=4, train=False, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)
    del loader  # the last reference: its workers end now, not when the traceback's cycle is collected
    message = str(caught.value)
    assert message.startswith(f"{archive}: 'train/dog/003.jpg': the file cannot be read as an image")
    assert message.endswith("Replace or remove the file.")
    assert "\n" not in message


def test_a_dataset_can_be_sent_to_a_spawned_worker(make_tree: Tree, pack: Pack) -> None:
    source = open_source(pack(make_tree("pets", {"cat": 5, "dog": 5})), "train")
    dataset = ImageDataset(source, train_transform(12), seed=4)
    expected = dataset[2, 1][0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2, 1][0], expected)


def reset_connection() -> None:
    near, far = multiprocessing.Pipe()
    near.send("a request that nobody reads")
    far.close()
    near.recv()


def ended_connection() -> None:
    near, far = multiprocessing.Pipe()
    far.close()
    near.recv()


@pytest.mark.parametrize(
    ("connect", "reason"),
    [
        (reset_connection, r"\[Errno \d+\] Connection reset by peer"),
        (ended_connection, "EOFError"),
        (lambda: Client("/nowhere/socket"), r"\[Errno \d+\] No such file or directory"),
    ],
)
def test_a_connection_that_breaks_while_a_batch_comes_over_is_a_dead_worker(
    connect: Callable[[], None], reason: str
) -> None:
    message = rf"^workers: .* has died \({reason}\), .* try fewer --workers$"
    with pytest.raises(ValueError, match=message), naming_dead_workers():
        connect()


@pytest.mark.parametrize("error", [ConnectionResetError("of another kind"), EOFError("a short file")])
def test_errors_of_other_origin_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, naming_dead_workers():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("workers", -1)])
def test_wrong_arguments(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*, not {value}\."):
        build_loader(plain(4), eval_transform(8), train=False, **{"batch_size": 4, option: value})
