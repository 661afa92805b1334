"""What visitors upload: how much of it arrives at once and is kept."""

from __future__ import annotations

from collections.abc import Iterator, MutableSet
from contextlib import contextmanager, suppress
from pathlib import Path

KEPT = 50  # uploaded files that are kept; the page looks at one once, when it comes
FULL = 10  # files of the largest size that are kept, or may arrive, together


class Uploads:
    """The files that were uploaded, in a folder where gradio puts them and other files; the oldest are removed first.

    Args:
        folder: where gradio puts them, each in a folder of its own; while one arrives it lies in ``folder`` itself.
        files: their paths, as gradio keeps them.
        max_bytes: of one file.
        room: bytes of a request beside its file.
    """

    def __init__(self, folder: Path, files: MutableSet[str], max_bytes: int, room: int) -> None:
        self.folder = folder
        self.files = files
        self.size = FULL * max_bytes
        self.most = FULL * (max_bytes + room)
        self.arriving = 0

    def fits(self, length: int) -> bool:
        """Whether a request of so many bytes may come now, beside those that are on their way."""
        return self.arriving + length <= self.most

    @contextmanager
    def arrival(self, length: int) -> Iterator[None]:
        """A request of so many bytes is on its way; afterwards what is too much, or was left by others, is removed."""
        self.arriving += length
        try:
            yield
        finally:
            self.arriving -= length
            self.tidy()

    def tidy(self) -> None:
        """Remove the oldest files beyond what is kept, and those whose request broke off."""
        if not self.arriving:
            for leftover in self.folder.iterdir():
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
        size = 0
        for number, (path, bytes_of_it) in enumerate(self._newest_first()):
            size += bytes_of_it
            if number >= KEPT or size > self.size:
                self.files.discard(str(path))
                path.unlink(missing_ok=True)
                with suppress(OSError):  # the same file may have come under two names
                    path.parent.rmdir()

    def _newest_first(self) -> list[tuple[Path, int]]:
        found = []
        for name in list(self.files):
            path = Path(name)
            try:
                about = path.stat()
            except FileNotFoundError:
                if not self.arriving:  # gradio has removed it, for its age; else it may still be on its way there
                    self.files.discard(name)
            else:
                found.append((about.st_ctime_ns, path, about.st_size))
        return [(path, size) for _, path, size in sorted(found, reverse=True)]
