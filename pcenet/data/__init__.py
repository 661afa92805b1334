"""Labelled images, images with masks: sources by name or path, transforms, loaders. It knows nothing of models.

A loader in three steps::

    source = open_source("digits", "train")
    transform = train_transform(32, horizontal_flip=source.horizontal_flip)
    loader = build_loader(source, transform, batch_size=64, train=True)

and for segmentation::

    source = open_segmentation_source("camvid.zip", "train", ignore_index=11)
    transform = segment_train_transform((192, 256))
    loader = build_segmentation_loader(source, transform, batch_size=8, train=True)
"""

from pcenet.choices import Augment, Split
from pcenet.data.base import IGNORE, DataError, ImageSource, ObjectSource, SegmentationSource, Source
from pcenet.data.check import check_data, quick_check
from pcenet.data.findings import CheckReport, Finding, Sample
from pcenet.data.loaders import (
    EpochSampler,
    ImageDataset,
    SegmentationDataset,
    build_loader,
    build_segmentation_loader,
    naming_dead_workers,
)
from pcenet.data.masks import MaskClasses, read_class_names
from pcenet.data.scenes import SceneSource
from pcenet.data.segment_transforms import (
    JointTransform,
    cover_transform,
    segment_eval_transform,
    segment_train_transform,
)
from pcenet.data.sources import (
    SEGMENTATION_SOURCE_NAMES,
    SOURCE_NAMES,
    default_root,
    open_segmentation_source,
    open_source,
    task_for,
)
from pcenet.data.subsets import first_images
from pcenet.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalize,
    Transform,
    eval_transform,
    train_transform,
)
from pcenet.scenes import SceneObject

__all__ = [
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SEGMENTATION_SOURCE_NAMES",
    "SOURCE_NAMES",
    "Augment",
    "CheckReport",
    "DataError",
    "EpochSampler",
    "Finding",
    "ImageDataset",
    "ImageSource",
    "JointTransform",
    "MaskClasses",
    "Normalize",
    "ObjectSource",
    "Sample",
    "SceneObject",
    "SceneSource",
    "SegmentationDataset",
    "SegmentationSource",
    "Source",
    "Split",
    "Transform",
    "build_loader",
    "build_segmentation_loader",
    "check_data",
    "cover_transform",
    "default_root",
    "eval_transform",
    "first_images",
    "naming_dead_workers",
    "open_segmentation_source",
    "open_source",
    "quick_check",
    "read_class_names",
    "segment_eval_transform",
    "segment_train_transform",
    "task_for",
    "train_transform",
]
