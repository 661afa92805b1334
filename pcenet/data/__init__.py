"""Labelled images: sources by name or path, transforms, and loaders. It knows nothing of models.

A loader in three steps::

    source = open_source("digits", "train")
    transform = train_transform(32, horizontal_flip=source.horizontal_flip)
    loader = build_loader(source, transform, batch_size=64, train=True)
"""

from pcenet.choices import Augment, Split
from pcenet.data.base import DataError, ImageSource
from pcenet.data.loaders import EpochSampler, ImageDataset, build_loader
from pcenet.data.sources import SOURCE_NAMES, default_root, open_source
from pcenet.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    eval_transform,
    train_transform,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOURCE_NAMES",
    "Augment",
    "DataError",
    "EpochSampler",
    "ImageDataset",
    "ImageSource",
    "Split",
    "Transform",
    "build_loader",
    "default_root",
    "eval_transform",
    "open_source",
    "train_transform",
]
