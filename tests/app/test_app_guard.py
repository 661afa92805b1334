"""What a request must be before gradio sees it."""

from __future__ import annotations

import asyncio
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


def test_other_names_of_this_machine_are_not_answered(files):
    guard = Guard(page, files=files, max_bytes=LIMIT, hosts={"127.0.0.1", "localhost", "::1"})
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        assert status(guard, "/", host=host) == 200
    for host in ("evil.example:7860", "", "127.0.0.1.evil.example", "localhost:80@evil.example"):
        assert status(guard, "/", host=host) == 421
    assert status(Guard(page, files=files, max_bytes=LIMIT), "/", host="evil.example") == 200
    assert host_name("[2001:db8::1]:80") == "2001:db8::1"


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
