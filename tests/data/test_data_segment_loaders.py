"""Batches of images and masks depend on (seed, epoch, index) alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from pcenet.data import (
    SegmentationDataset,
    SegmentationSource,
    build_segmentation_loader,
    open_segmentation_source,
    segment_eval_transform,
    segment_train_transform,
)

Tree = Callable[[str, Mapping[str, int]], Path]
Pack = Callable[[Path], Path]


@pytest.fixture
def source(make_pairs: Tree, pack: Pack) -> SegmentationSource:
    return open_segmentation_source(pack(make_pairs("street", {"train": 10, "val": 2})), "train")


def test_workers_change_nothing_and_see_the_new_epoch(source: SegmentationSource) -> None:
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        transform = segment_train_transform((8, 8))
        loader = build_segmentation_loader(source, transform, batch_size=4, seed=7, train=True, workers=workers)
        batches = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches += [(images.clone(), masks.clone()) for images, masks in loader]
        runs.append(batches)
    for (images, masks), (others, other_masks) in zip(*runs, strict=True):
        assert images.shape == (4, 3, 8, 8)
        assert masks.shape == (4, 8, 8)
        assert torch.equal(images, others)
        assert torch.equal(masks, other_masks)
    assert len(runs[0]) == 4
    assert not torch.equal(runs[0][0][0], runs[0][2][0])


def test_a_dataset_can_be_sent_to_a_spawned_worker(source: SegmentationSource) -> None:
    dataset = SegmentationDataset(source, segment_train_transform((8, 8)), seed=4)
    for expected, found in zip(dataset[2, 1], pickle.loads(pickle.dumps(dataset))[2, 1], strict=True):
        assert torch.equal(expected, found)
    assert not torch.equal(dataset[2, 1][0], dataset[3, 1][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_with_neighbours_of_one_size_together(make_pairs: Tree, workers: int) -> None:
    folder = make_pairs("street", {"train": 1, "val": 7})
    sizes = [(8, 12), (16, 24), (8, 8), (8, 8), (8, 12), (8, 12), (8, 12)]  # height, width; 8 x 8 covers 4 x 4 alone
    for index, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (index, 0, 0)).save(folder / f"val/images/{index:03}.png")
        Image.new("L", (width, height), 1).save(folder / f"val/masks/{index:03}.png")
    source = open_segmentation_source(folder, "val")
    transform = segment_eval_transform((4, 4), mean=(0, 0, 0), std=(1, 1, 1))
    loader = build_segmentation_loader(source, transform, batch_size=6, train=False, workers=workers)
    batches = list(loader)
    assert [[tuple(images.shape) for images, _ in groups] for groups in batches] == [
        [(2, 3, 4, 6), (2, 3, 4, 4), (2, 3, 4, 6)],
        [(1, 3, 4, 6)],
    ]
    flat = [
        (image, mask)
        for groups in batches
        for images, masks in groups
        for image, mask in zip(images, masks, strict=True)
    ]
    assert [round(float(image[0].mean()) * 255) for image, _ in flat] == list(range(7))
    assert [tuple(mask.shape) for _, mask in flat] == sizes


def test_wrong_arguments(source: SegmentationSource) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more, not 0"):
        build_segmentation_loader(source, segment_eval_transform((8, 8)), batch_size=0, train=False)
