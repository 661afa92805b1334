"""How much of what visitors upload is kept."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from pcenet.app.guard import ROOM, Guard
from pcenet.app.uploads import FULL, KEPT, Uploads

LIMIT = 1000


def put(folder: Path, known: set[str], name: str, size: int) -> Path:
    """A file as gradio puts it, in a folder of its own."""
    path = folder / f"digest-{name}" / f"{name}.png"
    path.parent.mkdir()
    path.write_bytes(b"x" * size)
    known.add(str(path))
    return path


@pytest.mark.parametrize(
    ("size", "kept"),
    [(1, KEPT), (LIMIT, FULL), (LIMIT // 2, 2 * FULL), (0, KEPT)],  # by number, or all together as large as ten
)
def test_the_oldest_go_first(tmp_path, size, kept):
    known: set[str] = set()
    uploads = Uploads(tmp_path, known, LIMIT, ROOM)
    picture = tmp_path / "digest" / "picture.png"  # gradio's own, of the page
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    paths = []
    for number in range(KEPT + 15):
        with uploads.arrival(size):
            paths.append(put(tmp_path, known, str(number), size))
    assert [path for path in paths if path.exists()] == paths[-kept:]
    assert known == {str(path) for path in paths[-kept:]}
    assert {path.name for path in tmp_path.iterdir()} == {"digest", *(path.parent.name for path in paths[-kept:])}
    assert picture.exists()


def test_many_files_of_one_request(tmp_path):
    known: set[str] = set()
    with Uploads(tmp_path, known, LIMIT, ROOM).arrival(1):
        for number in range(KEPT + 30):
            put(tmp_path, known, str(number), 1)
    assert len(known) == len(list(tmp_path.iterdir())) == KEPT


def test_what_gradio_has_removed_for_its_age_is_forgotten(tmp_path):
    known: set[str] = set()
    os.remove(put(tmp_path, known, "old", 1))
    new = put(tmp_path, known, "new", 1)
    Uploads(tmp_path, known, LIMIT, ROOM).tidy()
    assert known == {str(new)}


def test_files_that_are_still_being_moved_are_not_forgotten(tmp_path):
    """gradio answers, and then moves a request's files to their places; meanwhile another request may end."""
    known: set[str] = set()
    uploads = Uploads(tmp_path, known, LIMIT, ROOM)
    with uploads.arrival(1):
        known |= {str(tmp_path / f"digest-{number}" / f"{number}.png") for number in range(KEPT + 5)}
        with uploads.arrival(1):
            pass
        for number in range(KEPT + 5):
            put(tmp_path, known, str(number), 1)
    assert len(list(tmp_path.iterdir())) == len(known) == KEPT


def test_what_broke_off_is_removed_when_nothing_arrives(tmp_path):
    uploads = Uploads(tmp_path, set(), LIMIT, ROOM)
    (tmp_path / "tmpabc").write_bytes(b"half a file")
    with uploads.arrival(1):
        with pytest.raises(ConnectionError), uploads.arrival(1):
            raise ConnectionError
        assert (tmp_path / "tmpabc").exists()  # it may be the other's
    assert list(tmp_path.iterdir()) == []


def test_so_many_bytes_may_be_on_their_way(tmp_path):
    """Ten of the largest requests; the eleventh is asked to come again."""
    statuses = []
    arrived = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await arrived.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def note(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    guard = Guard(slow, files=tmp_path, max_bytes=LIMIT)
    headers = [(b"content-length", str(LIMIT + ROOM).encode())]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}

    async def visit() -> None:
        waiting = [asyncio.create_task(guard(scope, None, note)) for _ in range(FULL + 1)]  # type: ignore[arg-type] # nothing is received
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert statuses == [503]
        arrived.set()
        await asyncio.gather(*waiting)
        await guard(scope, None, note)  # type: ignore[arg-type] # nothing is received

    asyncio.run(visit())
    assert statuses == [503, *[200] * (FULL + 1)]
