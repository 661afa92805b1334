"""Image files -> batches, prepared as ``pcenet eval`` prepares them; what cannot be read comes along as a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcenet.data import DataError, Transform
from pcenet.data.loaders import outlive_signals
from pcenet.inference.inputs import InputFile, LeftOut

Sample = tuple[int, Tensor | str]


@dataclass(frozen=True)
class Batch:
    """Some files in their order: neighbours that were read and whose images have one size, or that were not read.

    Attributes:
        files: what was read: each an `InputFile`, or what stands in its place.
        images: ``[len(files), 3, H, W]`` float32, normalised; ``[len(files), 0]`` of what is to be cut into windows.
        left_out: what was not; then there are no files.
    """

    files: Sequence[Any]
    images: Tensor
    left_out: Sequence[LeftOut] = ()


class FileDataset(Dataset[Sample]):
    """Prepared images by the number of their file; the reason, as a text, for one that cannot be read."""

    def __init__(self, files: Sequence[InputFile], transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        try:
            return index, self.transform(file.image())
        except DataError as error:
            # The error has trimmed its text, and so the name that it begins with.
            return index, str(error).removeprefix(str(DataError(f"{file.file}:"))).strip()


def read_batches(files: Sequence[InputFile], transform: Transform, *, batch_size: int, workers: int) -> Iterator[Batch]:
    """All files in their order, ``batch_size`` at a time; only a few batches are in memory at once.

    Args:
        files: the files.
        transform: PIL image -> tensor.
        batch_size: files that are read together; a broken one or a change of size cuts a batch short.
        workers: processes that load; 0 loads in this one.
    """
    loader = DataLoader(
        FileDataset(files, transform),
        batch_size=batch_size,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # for the workers' base seed, else drawn from the default generator
    )
    for samples in loader:
        yield from batches_of((files[index], content) for index, content in samples)


def batches_of(samples: Iterable[tuple[Any, Tensor | str]]) -> Iterator[Batch]:
    """Batches of neighbours of one size, and of what was not read, of files with their images or the reason."""
    for _, run in groupby(samples, key=lambda sample: getattr(sample[1], "shape", None)):
        files, contents = zip(*run, strict=True)
        if isinstance(contents[0], str):
            left_out = [LeftOut(file.file, reason) for file, reason in zip(files, contents, strict=True)]
            yield Batch([], torch.empty(0), left_out)
        else:
            yield Batch(files, torch.stack(contents))
