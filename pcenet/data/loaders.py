"""Batches whose content depends on (seed, epoch, index) alone, whatever the number of workers."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pcenet.data.base import ImageSource, SegmentationSource, Source
from pcenet.data.segment_transforms import JointTransform
from pcenet.data.transforms import Transform

Key = tuple[int, int]
SizeGroup = tuple[Tensor, list[Tensor]]
S = TypeVar("S")


class SeededDataset(Dataset[S]):
    """Samples of a source, addressed by (epoch, index).

    The epoch is part of the key so that workers which outlive an epoch see the new one. PyTorch's default
    generator is seeded from (seed, epoch, index) for each sample and put back afterwards.
    """

    source: Source
    seed: int

    @abstractmethod
    def sample(self, index: int) -> S:
        """One transformed sample. Of all sources of chance it may use PyTorch's default generator alone."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> S:
        epoch, index = key
        with _seeded(_mix(self.seed, epoch, index)):
            return self.sample(index)


class ImageDataset(SeededDataset[tuple[Tensor, int]]):
    """Transformed images and their labels, addressed by (epoch, index).

    Args:
        source: the images.
        transform: PIL image -> tensor. What it draws, it draws from PyTorch's default generator.
        seed: the run's seed.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int = 0) -> None:
        self.source: ImageSource = source
        self.transform = transform
        self.seed = seed

    def sample(self, index: int) -> tuple[Tensor, int]:
        """A transformed image and its class number."""
        return self.transform(self.source.image(index)), self.source.labels[index]


class SegmentationDataset(SeededDataset[tuple[Tensor, Tensor]]):
    """Transformed images and masks, addressed by (epoch, index).

    Args:
        source: images and masks.
        transform: PIL image and mask -> two tensors. What it draws, it draws from PyTorch's default generator.
        seed: the run's seed.
    """

    def __init__(self, source: SegmentationSource, transform: JointTransform, seed: int = 0) -> None:
        self.source: SegmentationSource = source
        self.transform = transform
        self.seed = seed

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """A transformed image and its mask."""
        return self.transform(*self.source.sample(index))


class EpochSampler(Sampler[Key]):
    """The keys (epoch, index) of one epoch, or of a process's part of it.

    Args:
        length: number of images.
        seed: with the epoch, decides the order.
        shuffle: False gives (0, 0), (0, 1), ... in every epoch, for evaluation.
    """

    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._start = 0
        self._rank, self._processes, self._batch = 0, 1, 1

    def divide(self, rank: int, processes: int, batch_size: int) -> None:
        """Yield one process's part from now on.

        Shuffled, all parts together are the epoch in its order: the first batch of each process, one after the other,
        then the second of each, and so on, as far as all of them have whole batches. Not shuffled, a process gets every
        so many-th image and no image is left out, so that one of them may have one more than another.

        Args:
            rank: the process's number, from 0.
            processes: how many there are.
            batch_size: images of a batch of one process.

        Raises:
            ValueError: if there are too few images for all processes.
        """
        needed = processes * batch_size if self.shuffle else processes
        if processes > 1 and self.length < needed:
            batches = f"of {batch_size} images each" if self.shuffle else "of validation"
            raise ValueError(
                f"devices {processes}: {self.length} images are too few for a batch {batches} in every process; give"
                " fewer --devices, or a smaller --batch-size"
            )
        self._rank, self._processes, self._batch = rank, processes, batch_size

    def start_at(self, epoch: int, sample: int) -> None:
        """Let the next iteration, and that one alone, yield ``epoch`` from its ``sample``-th key on."""
        self.epoch = epoch
        self._start = sample

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch that are this process's, in their order."""
        if not self.shuffle:
            return list(range(self._rank, self.length, self._processes))
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        if self._processes > 1:
            batches = order[: len(self) * self._processes].view(-1, self._processes, self._batch)
            order = batches[:, self._rank].flatten()
        return order.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; whoever loops over epochs calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        if not self.shuffle:
            return len(range(self._rank, self.length, self._processes))
        if self._processes == 1:
            return self.length
        return self.length // (self._processes * self._batch) * self._batch

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch if self.shuffle else 0
        start, self._start = self._start, 0
        return ((epoch, index) for index in self.order(epoch)[start:])


def build_loader(
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, int]]:
    """A loader of batches (images ``[B, 3, size, size]`` float32, labels ``[B]`` int64).

    Neither building nor iterating it draws from PyTorch's default generator: loading and training have
    random streams of their own.

    Args:
        source: the images.
        transform: see ``ImageDataset``.
        batch_size: images per batch.
        seed: the run's seed.
        train: shuffle, differently in each epoch (``loader.sampler.set_epoch``), and drop the last batch if
            it is incomplete and not the only one. Otherwise in order, with nothing dropped.
        workers: processes that load, of one thread each, kept between epochs; 0 loads in this one.
        pin_memory: put batches into page-locked memory, for copying to a GPU.

    Raises:
        ValueError: ``batch_size`` is below 1 or ``workers`` below 0.
    """
    dataset = ImageDataset(source, transform, seed)
    return _loader(dataset, batch_size, train=train, workers=workers, pin_memory=pin_memory)


def build_segmentation_loader(
    source: SegmentationSource,
    transform: JointTransform,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of images and masks; arguments, chance and errors as for ``build_loader``.

    For training it yields batches (images ``[B, 3, h, w]`` float32, masks ``[B, h, w]`` int64): the transform has to
    give all of them one size.

    For evaluation the images may differ in size. It yields a list for every ``batch_size`` samples, which holds them
    in order as groups (images ``[b, 3, h, w]``, masks: a list of b ``[H_i, W_i]``): neighbours of one transformed size
    are in one group. Where all images have one size, each list has one group. ::

        for groups in loader:
            for images, masks in groups:
                ...
    """
    dataset = SegmentationDataset(source, transform, seed)
    collate = None if train else group_by_size
    return _loader(dataset, batch_size, train=train, workers=workers, pin_memory=pin_memory, collate=collate)


def group_by_size(samples: Sequence[tuple[Tensor, Tensor]]) -> list[SizeGroup]:
    """Samples (image, mask) in order, neighbours whose images have one size together."""
    runs = [list(run) for _, run in groupby(samples, key=lambda sample: sample[0].shape)]
    return [(torch.stack([image for image, _ in run]), [mask for _, mask in run]) for run in runs]


def _loader(
    dataset: SeededDataset[S],
    batch_size: int,
    *,
    train: bool,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[S]], Any] | None = None,
) -> DataLoader[S]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}.")
    if workers < 0:
        raise ValueError(f"workers must be 0 (load in this process) or more, not {workers}.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), seed=dataset.seed, shuffle=train),
        drop_last=train and len(dataset) > batch_size,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # for the workers' base seed, else drawn from the default generator
    )


def outlive_signals(_worker: int) -> None:
    """Let a process that loads images work on when a signal reaches the whole group: ending is for the main process.

    Ctrl-C in a terminal does that, and so do ``timeout`` and most batch systems with SIGTERM. SIGTERM from the main
    process still ends it at once, and it ends by itself when that has died.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn the errors that follow the death of a process that loads images into a ``ValueError`` with the way out.

    PyTorch names the process. Where it died while it handed a batch over, its socket may be closed before the system
    reports it dead: then the error is Python's, about the connection. PyTorch's comes by a signal, at any moment, and
    what it interrupts may end in an error of its own, such as that of a file half written.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not _is_of_a_dead_worker(cause):
            cause = cause.__context__
        if cause is None:
            raise
        raise _dead_worker(cause) from error


def _is_of_a_dead_worker(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_a_connection = bool(frames) and frames[-1].f_globals["__name__"] == "multiprocessing.connection"
    return isinstance(error, OSError | EOFError) and in_a_connection


def _dead_worker(error: BaseException) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
    return ValueError(
        f"workers: a process that loads images has died ({reason}), for lack of memory perhaps; try fewer --workers"
    )


def _mix(*numbers: int) -> int:
    """A seed for PyTorch out of some integers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's default CPU generator at ``seed``, and afterwards as it was.

    ``torch.random.fork_rng`` with ``torch.manual_seed`` does the same in 160 microseconds instead of 3.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
