"""What a request must be before gradio sees it, and what is said to the browser with every answer.

gradio serves far more than this page needs (proxies, recordings, its own history, files of several folders). Whatever
is not named here does not exist.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
FOLDERS = ("/assets/", "/static/")
API = re.compile(
    r"/gradio_api/(upload|upload_progress|queue/(join|data)|heartbeat/\w+|startup-events|info|app_id|cancel|reset/?)"
)
FILE = "/gradio_api/file="
ROOM = 2**20  # bytes of a request beside the file that it uploads

# Scripts and styles inside the page are gradio's, which cannot do without; all else comes from this server alone.
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self'",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "frame-src": "'none'",
    "frame-ancestors": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Guard:
    """Stands before the page, as ASGI asks.

    Args:
        page: gradio's application.
        files: the only folder from which files are served.
        max_bytes: of an uploaded file.
        hosts: names under which the server may be asked, without ports; empty: any. A page of elsewhere whose name was
            pointed at this machine asks under its own.
    """

    def __init__(self, page: Application, *, files: Path, max_bytes: int, hosts: Iterable[str] = ()) -> None:
        self.page = page
        self.files = Path(os.path.realpath(files))
        self.max_bytes = max_bytes
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.page(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self.refusal(scope["method"], scope["path"], dict(scope["headers"]))
            if refusal is None:
                await self.page(scope, receive, with_headers(send))
            else:
                await answer(with_headers(send), *refusal)
        else:
            await send({"type": "websocket.close"})

    def refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason for a request that is not passed on.

        Args:
            method: such as ``"GET"``.
            path: decoded, without what follows a question mark.
            headers: by their names in small letters.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts and host_name(host) not in self.hosts:
            return 421, "this server does not answer under that name"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "only GET, HEAD and POST are understood"
        if not self.known(path):
            return 404, "there is nothing here"
        if method == "POST":
            return self.too_much(headers.get(b"content-length", b""))
        return None

    def known(self, path: str) -> bool:
        """Whether the page needs what lies there."""
        if ".." in path.split("/"):
            return False
        if path.startswith(FILE):
            # Uploads can be given a name, not a place: gradio put what lies in this folder there.
            return Path(os.path.realpath(path.removeprefix(FILE))).is_relative_to(self.files)
        return path in PAGES or path.startswith(FOLDERS) or API.fullmatch(path) is not None

    def too_much(self, length: bytes) -> tuple[int, str] | None:
        """Status and reason where a request's body is too large, or does not say how large it is."""
        if not length.isdigit():
            return 411, "the request does not say how large it is"
        if int(length) > self.max_bytes + ROOM:
            return 413, f"the file is larger than {self.max_bytes // 2**20} MB"
        return None


def host_name(host: str) -> str:
    """The name in a ``Host`` header, without port and brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def with_headers(send: Send) -> Send:
    """Adds `HEADERS` to every answer, in place of the application's own of these names."""
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    names = {name for name, _ in added}

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*own, *added]}
        await send(message)

    return sending


async def answer(send: Send, status: int, text: str) -> None:
    """A whole answer in plain text."""
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
