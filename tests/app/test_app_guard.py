"""What a request must be before gradio sees it."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import pytest

from pcenet.app.guard import HEADERS, Guard, host_name

LIMIT = 1000


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"picture")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.txt")
    return folder


async def page(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain"), (b"Referrer-Policy", b"unsafe-url")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"page"})


def ask(guard: Guard, path: str, method: str = "GET", kind: str = "http", **headers: str) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    names = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    scope = {"type": kind, "method": method, "path": path, "headers": list(names.items())}
    asyncio.run(guard(scope, None, send))
    return sent


def status(*arguments: Any, **headers: str) -> int:
    return int(ask(*arguments, **headers)[0]["status"])


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/theme.css", "/assets/index-1.js", "/static/js/a.js", "/gradio_api/queue/data",
     "/gradio_api/heartbeat/a1b2", "/gradio_api/upload_progress"],
)  # fmt: skip
def test_what_the_page_needs_is_there(files, path):
    assert status(Guard(page, files=files, max_bytes=LIMIT), path) == 200


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://example.org/", "/proxy=x", "/gradio_api/file/etc/passwd", "/file=/etc/passwd",
     "/monitoring", "/gradio_api/runs", "/gradio_api/vibe-code", "/gradio_api/vibe-edit/", "/login", "/docs",
     "/gradio_api/dev/reload", "/gradio_api/openapi.json", "/gradio_api/mcp/", "/gradio_api/run/predict",
     "/gradio_api/call/predict", "/gradio_api/deep_link", "/gradio_api/heartbeat/../upload", "/pwa_icon", "/svelte/x",
     "/gradio_api/custom_component/1/client/component/index.js", "/assets/../../etc/passwd", "/static/../config",
     "//etc/passwd", "", "/gradio_api/queue/join/x", "/gradio_api/uploads", "/gradio_api/info/x"],
)  # fmt: skip
def test_nothing_else_is(files, path):
    assert status(Guard(page, files=files, max_bytes=LIMIT), path) == 404


@pytest.mark.parametrize("path", ["/\0", "/gradio_api/file=\0", "/assets/\x1b[31m", "/assets/" + "ä" * 128])
def test_names_that_no_file_can_have_are_not_there(files, path):
    guard = Guard(page, files=files, max_bytes=LIMIT)
    assert status(guard, path) == 404
    assert status(guard, f"/gradio_api/file={files}{path}") == 404


def test_files_of_one_folder_alone(files):
    guard = Guard(page, files=files, max_bytes=LIMIT)
    assert status(guard, f"/gradio_api/file={files}/a.png") == 200
    for path in (
        "/etc/passwd",
        "etc/passwd",
        "../secret.txt",
        f"{files}/../secret.txt",
        f"{files}/link.png",
        f"{files}-other/a.png",
        f"{files.parent}",
        "http://example.org/a.png",
        "file:///etc/passwd",
    ):
        assert status(guard, f"/gradio_api/file={path}") == 404, path


def test_bodies_have_a_limit(files):
    guard = Guard(page, files=files, max_bytes=LIMIT)
    upload = (guard, "/gradio_api/upload", "POST")
    assert status(*upload, content_length=str(LIMIT + 2**20)) == 200
    assert status(*upload, content_length=str(LIMIT + 2**20 + 1)) == 413
    assert status(*upload) == 411
    assert status(*upload, content_length="-1") == 411
    assert status(guard, "/", "DELETE") == 405
    wish = (guard, "/gradio_api/cancel", "POST")  # what is no file is never long
    assert status(*wish, content_length=str(2**20)) == 200
    assert status(*wish, content_length=str(2**20 + 1)) == 413


def test_other_names_of_this_machine_are_not_answered(files):
    guard = Guard(page, files=files, max_bytes=LIMIT, hosts={"127.0.0.1", "localhost", "::1"})
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        assert status(guard, "/", host=host) == 200
    for host in ("evil.example:7860", "", "127.0.0.1.evil.example", "localhost:80@evil.example"):
        assert status(guard, "/", host=host) == 421
    assert status(Guard(page, files=files, max_bytes=LIMIT), "/", host="evil.example") == 200
    assert host_name("[2001:db8::1]:80") == "2001:db8::1"


OWN = "127.0.0.1:7860"
CROSS_SITE = {"sec_fetch_site": "cross-site"}


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),  # no browser
        ({"origin": f"http://{OWN}"}, False),
        ({"origin": f"https://{OWN.upper()}"}, False),
        ({"sec_fetch_site": "same-origin"}, False),
        ({"sec_fetch_site": "none"}, False),  # typed, or from a bookmark
        ({"sec_fetch_site": "same-origin", "origin": "https://before.a.proxy"}, False),
        (CROSS_SITE, True),
        ({"sec_fetch_site": "same-site"}, True),  # another port of this machine
        ({"sec_fetch_site": ""}, True),
        ({"sec_fetch_site": "cross-site", "origin": f"http://{OWN}"}, True),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "http://127.0.0.1:8000"}, True),
        ({"origin": "http://127.0.0.1"}, True),
        ({"origin": "null"}, True),
        ({"origin": ""}, True),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/cancel"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/config"),
    ],
)
def test_pages_of_elsewhere_may_ask_for_nothing(files, headers, foreign, method, path):
    guard = Guard(page, files=files, max_bytes=LIMIT)
    assert status(guard, path, method, host=OWN, content_length="5", **headers) == (403 if foreign else 200)
    assert status(guard, "/", host=OWN, **headers) == 200  # but link to the page


@pytest.mark.parametrize("name", ["host", "origin", "sec-fetch-site", "content-length", "content-type"])
def test_headers_that_come_twice_are_refused(files, name):
    guard = Guard(page, files=files, max_bytes=LIMIT, hosts={"127.0.0.1"})
    headers = [(b"host", b"127.0.0.1"), (name.encode(), b"127.0.0.1"), (name.encode(), b"evil.example")]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "http", "method": "GET", "path": "/", "headers": headers}, None, send))
    assert sent[0]["status"] == 400


def said_to(guard: Guard, path: str, body: bytes) -> list[Any]:
    """What comes back for a body that is sent in two parts."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body[3:]}, {"type": "http.request", "body": body[:3], "more_body": True}]

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return parts.pop()

    headers = [(b"content-length", str(len(body)).encode())]
    asyncio.run(guard({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send))
    return sent


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 200),
        *(({"fn_index": number}, 400) for number in (99, -1, None, "0", 0.0, True, 10**30)),
        *(({"session_hash": name}, 400) for name in ("", None, 5, "a/b", "ä", "a" * 65)),
        *(({"data": data}, 400) for data in (None, 5, {})),
    ],
)
def test_wishes_that_the_page_does_not_know_are_refused(files, changes, expected):
    seen = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        await page(scope, receive, send)

    wish = json.dumps({"data": [], "fn_index": 0, "session_hash": "abc123"} | changes).encode()
    guard = Guard(note, files=files, max_bytes=LIMIT, wishes=range(9))
    assert said_to(guard, "/gradio_api/queue/join", wish)[0]["status"] == expected
    assert seen == ([wish] if expected == 200 else [])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff"])
def test_wishes_that_are_none_are_refused(files, body):
    guard = Guard(page, files=files, max_bytes=LIMIT, wishes=range(9))
    assert said_to(guard, "/gradio_api/queue/join", body)[0]["status"] == 400


@pytest.mark.parametrize(
    ("path", "error", "expected", "warning"),
    [
        ("/gradio_api/upload", TypeError("no file"), 400, ""),
        ("/gradio_api/upload", OSError(errno.ENOSPC, "No space left on device"), 507, "is full; make room"),
        ("/gradio_api/cancel", OSError(errno.ENOSPC, "No space left on device"), 507, "is full; make room"),
        ("/gradio_api/cancel", KeyError("x"), 500, "a request failed: KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_what_fails_is_one_line_and_an_answer(files, caplog, path, error, expected, warning, begun):
    """As starlette does it: it answers with 500, and raises again."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise error

    start, body = said_to(Guard(failing, files=files, max_bytes=LIMIT), path, b"12345")
    assert start["status"] == expected
    assert body["body"] != b"Internal Server Error"
    assert len(caplog.messages) == bool(warning)
    assert warning in caplog.text


def test_an_answer_of_500_that_nobody_raised_passes(files):
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"sorry"})

    start, body = ask(Guard(failing, files=files, max_bytes=LIMIT), "/")
    assert (start["status"], body["body"]) == (500, b"sorry")


def test_every_answer_says_what_the_browser_may_load(files):
    guard = Guard(page, files=files, max_bytes=LIMIT)
    for path in ("/", "/nowhere"):
        start, body = ask(guard, path)
        headers = [(name.decode().lower(), value.decode()) for name, value in start["headers"]]
        for name, value in HEADERS.items():
            assert headers.count((name, value)) == 1
            assert [own for own, _ in headers].count(name) == 1
        assert body["body"]
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert "'unsafe-eval'" not in HEADERS["content-security-policy"]
    assert not any("http" in value or "*" in value for value in policy.values())


def test_no_sockets_but_the_start_and_end_of_the_page_pass(files):
    assert ask(Guard(page, files=files, max_bytes=LIMIT), "/", kind="websocket") == [{"type": "websocket.close"}]
    seen = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    ask(Guard(note, files=files, max_bytes=LIMIT), "/", kind="lifespan")
    assert seen == ["lifespan"]
