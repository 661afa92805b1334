"""What a request must be before gradio sees it, and what is said to the browser with every answer.

gradio serves far more than this page needs (proxies, recordings, its own history, files of several folders). Whatever
is not named here does not exist.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Container, Iterable, MutableMapping, MutableSet
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pcenet.app.uploads import Uploads
from pcenet.runtime.memory import reason_of

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
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
ONCE = (b"host", b"origin", b"sec-fetch-site", b"content-length", b"content-type", b"transfer-encoding")
LONGEST_NAME = 255  # bytes of a file's name, on the systems that there are
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
logger = logging.getLogger(__name__)
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
        wishes: numbers of the page's functions; what asks for others is refused.
        uploaded: paths of the files that were uploaded, as gradio keeps them.
    """

    def __init__(
        self,
        page: Application,
        *,
        files: Path,
        max_bytes: int,
        hosts: Iterable[str] = (),
        wishes: Container[int] = (),
        uploaded: MutableSet[str] | None = None,
    ) -> None:
        self.page = page
        self.files = Path(os.path.realpath(files))
        self.max_bytes = max_bytes
        self.hosts = frozenset(hosts)
        self.wishes = wishes
        self.uploads = Uploads(self.files, set() if uploaded is None else uploaded, max_bytes, ROOM)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.page(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        reply = Reply(with_headers(send))
        names = [name for name, _ in scope["headers"]]
        if any(names.count(name) > 1 for name in ONCE):
            await reply.answer(400, "a header that may come once came twice")
            return
        headers = dict(scope["headers"])
        if refusal := self.refusal(scope["method"], scope["path"], headers):
            await reply.answer(*refusal)
            return
        if scope["method"] == "POST" and scope["path"] == JOIN:
            body = await body_of(receive)
            if not self.is_wish(body):
                await reply.answer(400, "that is no wish that this page knows")
                return
            receive = repeated(body, receive)
        arrival = self.uploads.arrival(length_of(headers)) if scope["path"] == UPLOAD else nullcontext()
        with arrival:
            await self.pass_on(scope, receive, reply)

    async def pass_on(self, scope: Message, receive: Receive, reply: Reply) -> None:
        """The page's answer; where it fails, one line on the terminal, and an answer that says whose fault it was."""
        try:
            await self.page(scope, receive, reply.send)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                logger.warning("the disk of %s is full; make room, or set TMPDIR to another folder", self.files)
                await reply.answer(507, "there is no room left on the server's disk")
            elif scope["path"] == UPLOAD:
                await reply.answer(400, "the upload cannot be read")
            else:
                logger.warning("a request failed: %s", reason_of(error))
                await reply.answer(500, "that went wrong")
        else:
            await reply.end()

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
        if is_foreign(headers) and (method == "POST" or path != "/"):  # a link to the page may be anywhere
            return 403, "only this page itself may ask for that; a proxy has to pass on the Host header"
        if method == "POST":
            return self.too_much(path, headers)
        return None

    def known(self, path: str) -> bool:
        """Whether the page needs what lies there."""
        parts = path.split("/")
        if ".." in parts or any(ord(character) < 32 for character in path):
            return False
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
            return False
        if path.startswith(FILE):
            # Uploads can be given a name, not a place: gradio put what lies in this folder there.
            return Path(os.path.realpath(path.removeprefix(FILE))).is_relative_to(self.files)
        return path in PAGES or path.startswith(FOLDERS) or API.fullmatch(path) is not None

    def too_much(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason where a request's body is too large, or does not say how large it is."""
        if not headers.get(b"content-length", b"").isdigit():
            return 411, "the request does not say how large it is"
        length = length_of(headers)
        if path != UPLOAD:
            return (413, "the request is too large") if length > ROOM else None
        if length > self.max_bytes + ROOM:
            return 413, f"the file is larger than {self.max_bytes // 2**20} MB"
        if not self.uploads.fits(length):
            return 503, "too many files are on their way; try again in a moment"
        return None

    def is_wish(self, body: bytes) -> bool:
        """Whether a request asks the queue for something that the page has, for a visitor."""
        try:
            wish = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(wish, dict) or not isinstance(wish.get("data"), list):
            return False
        number, visitor = wish.get("fn_index"), wish.get("session_hash")
        known = type(number) is int and number in self.wishes
        return known and isinstance(visitor, str) and re.fullmatch(r"\w{1,64}", visitor, re.ASCII) is not None


class Reply:
    """An answer on its way. That the page failed is held back until it is known why.

    Args:
        send: to the browser.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self._held: list[Message] = []

    async def send(self, message: Message) -> None:
        """Pass a part on."""
        if self._held or (message["type"] == "http.response.start" and message["status"] == 500):
            self._held.append(message)
            return
        self._begun = True
        await self._send(message)

    async def answer(self, status: int, text: str) -> None:
        """A whole answer in plain text, unless another one has begun."""
        if self._begun:
            return
        body = text.encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def end(self) -> None:
        """Pass on what was held back."""
        for message in self._held:
            await self._send(message)


async def body_of(receive: Receive) -> bytes:
    """The body of a request, whose length was looked at."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def repeated(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was received already, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return left.pop() if left else await receive()

    return receiving


def length_of(headers: dict[bytes, bytes]) -> int:
    """What a request says of the length of its body; 0 where it says nothing."""
    return int(headers.get(b"content-length", b"0"))


def is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that a page of elsewhere asks. What is no browser says nothing, and what is one does not
    let a page say it."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2].lower() != headers.get(b"host", b"").lower()


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
