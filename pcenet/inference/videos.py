"""Video files -> batches of their frames, in order, of which only a few are in memory. PyAV decodes; it is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor

from pcenet.data import DataError, Transform
from pcenet.data.limits import shape_fault
from pcenet.inference.batches import Batch, batches_of
from pcenet.inference.inputs import InputFile
from pcenet.reading import check_regular

# FFmpeg goes by what is in a file, not by its name: a playlist would lead it to other files, or to a network.
CONTAINERS = "avi,matroska,mov,mpeg,mpegts"
MOST_AT_ONCE = 16  # frames in memory; of 1920 x 1080 pixels 100 MB


@dataclass(frozen=True)
class Frame:
    """A frame of a video; stands where an `InputFile` may.

    Attributes:
        file: the path of the video, as in `InputFile`.
        name: the video's name within what the user gave, and the frame's number in it, from 0 on.
        origin: as in `InputFile`.
        time: when it is shown, in seconds; None where the video does not say.
        picture: the frame, upright.
    """

    file: str
    name: str
    origin: str
    time: float | None
    picture: Image.Image

    def image(self) -> Image.Image:
        """The frame."""
        return self.picture


def read_frames(video: InputFile, transform: Transform, *, batch_size: int) -> Iterator[Batch]:
    """The frames of a video in their order; where it is damaged, the frames before that, and then the reason.

    Args:
        video: the file.
        transform: PIL image -> tensor.
        batch_size: frames that are read together, `MOST_AT_ONCE` at most.
    """
    samples = samples_of(video, transform)
    while some := list(islice(samples, min(batch_size, MOST_AT_ONCE))):
        yield from batches_of(some)


def samples_of(video: InputFile, transform: Transform) -> Iterator[tuple[Frame | InputFile, Tensor | str]]:
    """Each frame, prepared; at last the reason why there are no more, unless the video has ended."""
    frames, number = frames_of(video), 0
    while True:
        try:
            frame = next(frames, None)
        except DataError as error:
            yield video, f"{error}; predicted are the {number} frames before that" if number else str(error)
            return
        if frame is None:
            return
        yield frame, transform(frame.picture)
        number += 1


def frames_of(video: InputFile) -> Iterator[Frame]:
    """The frames of a video. Raises ``DataError`` where it cannot be read on."""
    number = 0
    with opened(video) as (container, stream):
        for number, decoded in enumerate(container.decode(stream), 1):
            check_size(decoded.width, decoded.height)  # of each: it may change on the way
            picture = decoded.to_image().rotate(decoded.rotation, expand=True)
            yield Frame(video.file, f"{video.name}/{number - 1:06}", video.origin, decoded.time, picture)
    if not number:
        raise DataError("it has no frame that can be decoded")


def count_frames(video: InputFile) -> int:
    """How many frames a video says that it has, to show progress; 0 where it does not say, or cannot be read."""
    try:
        with opened(video) as (container, stream):
            seconds = (container.duration or 0) / 1e6
            return stream.frames or round(seconds * float(stream.average_rate or 0))
    except DataError:
        return 0


@contextmanager
def opened(video: InputFile) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream.

    Raises:
        DataError: whatever is wrong with the file, also while it is read.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise DataError("videos need PyAV: pip install 'pcenet[video]'") from error
    try:
        check_regular(video.file)
        with (
            open(video.file, "rb") as content,
            av.open(
                content,
                # A frame that is made up for one that is damaged would be predicted like any other.
                options={"err_detect": "explode"},
                container_options={"format_whitelist": CONTAINERS},
                metadata_errors="replace",
            ) as container,
        ):
            if not container.streams.video:
                raise DataError("it has no video stream, or is cut off")
            stream = container.streams.video[0]
            check_size(stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"the video cannot be read, or is damaged ({error.strerror})") from error
    except ValueError as error:  # of what is no regular file
        raise DataError(str(error).removeprefix(f"{video.file}: ")) from error


def check_size(width: int, height: int) -> None:
    """Raise a ``DataError`` for frames of a size that no image may have."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"its frames have {width} x {height} pixels, more than {limit}")
    if fault := shape_fault(max(width, 1), max(height, 1)):
        raise DataError(fault)
