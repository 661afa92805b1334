"""The real server over HTTP: what it refuses, many visitors at once, bad uploads, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from pcenet.app.config import AppConfig
from pcenet.app.guard import HEADERS
from pcenet.cli import main

httpx = pytest.importorskip("httpx", reason="the tests ask the server with httpx")
slow = pytest.mark.slow
LOOK = -1  # a click that shows a patch, and sends it nowhere
FOLDED = re.compile(r"<[^>]+>")


class Visitor:
    """What a browser does with the page: wishes go into a queue, answers come as a stream of events."""

    def __init__(self, url: str, name: str) -> None:
        self.web = httpx.Client(base_url=url, timeout=120)
        self.name = name
        config = self.web.get("/config").json()
        self.names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.wishes = {
            (self.names.get(target), event): wish
            for wish in config["dependencies"]
            for target, event in wish["targets"]
        }

    def ask(self, part: str | None, event: str, *data: Any, event_data: Any = None) -> dict[str, Any]:
        """The new contents by the names of their parts; "error" alone where there was one."""
        wish = self.wishes[part, event]
        body = {"data": data, "fn_index": wish["id"], "session_hash": self.name, "event_data": event_data}
        self.web.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self.web.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    break
        if not message["success"]:
            return {"error": message["output"]}
        contents = (value_of(content) for content in message["output"]["data"])
        return {str(self.names[part]): content for part, content in zip(wish["outputs"], contents, strict=True)}

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Drop a file on the page."""
        (path,) = self.web.post("/gradio_api/upload", files={"files": (name, data)}).raise_for_status().json()
        return self.take(path, name)

    def take(self, path: str, name: str) -> dict[str, Any]:
        """Ask for a file to be taken as if it had been uploaded."""
        described = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return self.ask("upload", "upload", described)


def value_of(content: Any) -> Any:
    """What a part of the page now holds, where the answer is an update of several of its properties."""
    return content.get("value") if isinstance(content, dict) and content.get("__type__") == "update" else content


def words_of(html: Any) -> str:
    return " ".join(FOLDED.sub(" ", html or "").split())


def raw(server: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request whose path no client has tidied up."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


@slow
@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/nowhere", "/gradio_api/file=/etc/passwd"])
def test_every_answer_has_the_policy(server, path):
    _, headers, _ = raw(server, path)
    assert {name: headers.get(name) for name in HEADERS} == HEADERS


@slow
def test_the_page_names_nothing_of_elsewhere_that_a_browser_would_load(server):
    page = raw(server, "/")[2].decode()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]+", page)
    assert "fonts.googleapis" not in page + raw(server, "/theme.css")[2].decode()


@slow
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../../../etc/passwd", "/file=/etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file%3D/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=TEMPORARY/../../../../etc/passwd", "/gradio_api/file=TEMPORARY/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=MODEL/config.json", "/gradio_api/file=http://127.0.0.1:1/x", "/gradio_api/proxy=http://x/",
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/assets/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2f..%2fetc/passwd",
        "/static//etc/passwd", "/assets//etc/passwd", "//etc/passwd", "/gradio_api/upload/../../etc/passwd",
    ],
)  # fmt: skip
def test_no_file_outside_its_own_is_served(server, classifier, path):
    (own,) = server.temporary.glob("pcenet-app-*")
    path = path.replace("TEMPORARY", str(own)).replace("MODEL", str(classifier))
    status, _, body = raw(server, path)
    assert status in (400, 403, 404)
    assert b"root:" not in body
    assert b"pretrained_cfg" not in body


@slow
def test_an_unknown_name_of_this_machine_is_not_answered(server):
    assert raw(server, "/", host="evil.example")[0] == 421
    assert raw(server, "/", host="localhost:1")[0] == 200


@slow
def test_a_visit_over_http(server):
    visitor = Visitor(server.url, "visit")
    answer = visitor.ask(None, "load")
    known = r"Prediction: (red|green|blue) , probability \d+\.\d % \(true class: (red|green|blue)\)"
    assert re.fullmatch(known, words_of(answer["headline"]))
    assert answer["layer"] == "stages.2.1.body"  # which tells more of the image
    assert raw(server, urlsplit(answer["experts"]["url"]).path)[2].startswith(b"\xff\xd8")  # a JPEG
    assert visitor.ask("layer", "input", None, "stages.2.1.body")["answer"] == ""
    # The picture has 640 pixels, the layer 8 x 8 patches.
    answer = visitor.ask("experts", "select", None, LOOK, False, event_data={"index": [170, 639], "value": None})
    assert "Row 7, column 2: the router chose expert" in words_of(answer["answer"])
    other = (answer["expert"] + 1) % 4
    answer = visitor.ask("expert", "input", None, other, False)
    assert f"1 patch of stages.2.1 (row 7, column 2, to expert {other})" in words_of(answer["report"])
    assert "Click on a patch" in visitor.ask("undo", "click", None)["report"]


@slow
def test_twenty_visitors_at_once(server):
    together = threading.Barrier(20)

    def visit(number: int) -> tuple[int, str]:
        visitor = Visitor(server.url, f"visitor{number}")
        together.wait(timeout=120)
        visitor.ask(None, "load")
        visitor.ask("layer", "input", None, "stages.2.1.body")
        looked = visitor.ask("typed", "submit", None, LOOK, False, f"{number % 4}, {number // 4 % 4}")
        expert = (looked["expert"] + 1 + number % 3) % 4
        answer = visitor.ask("expert", "input", None, expert, False)
        assert not words_of(answer["notice"])
        return expert, words_of(answer["report"])

    with ThreadPoolExecutor(20) as pool:
        for number, (expert, report) in enumerate(pool.map(visit, range(20))):
            own = f"1 patch of stages.2.1 (row {number % 4}, column {number // 4 % 4}, to expert {expert})"
            assert report.startswith(f"You moved {own}:")  # one's own move, and no other's


@slow
def test_bad_uploads_are_answered_and_the_server_stays_up(server, encode, header_of):
    visitor = Visitor(server.url, "uploads")
    noise = encode(Image.effect_noise((64, 48), 80), "JPEG")
    for name, data, message in (
        (
            "page.jpg",
            b"<!doctype html><script>alert(1)</script>",
            "page.jpg: the file cannot be read as an image (it is a",
        ),
        ("bomb.png", header_of(40000, 40000), "bomb.png: the image has more than 1000000 pixels."),
        ("wide.png", encode(Image.new("L", (1001, 1000))), "wide.png: the image has more than 1000000 pixels."),
        ("half.jpg", noise[: len(noise) // 2], "half.jpg: the file cannot be read as an image"),
        ("empty.png", b"", "empty.png: the file cannot be read as an image (it is empty)"),
    ):
        answer = visitor.upload(name, data)
        assert message in words_of(answer["notice"])
    answer = visitor.upload("noise.jpg", noise)
    assert not words_of(answer["notice"])
    assert "probability" in words_of(answer["headline"])


@slow
def test_large_files_are_refused_before_they_are_read(server):
    files = {"files": ("large.png", b"x" * (2**20 + 1))}
    assert httpx.post(f"{server.url}/gradio_api/upload", files=files, timeout=60).status_code == 413
    assert raw(server, "/gradio_api/upload", "POST", content_length=str(10**12))[0] == 413
    assert raw(server, "/gradio_api/upload", "POST", transfer_encoding="chunked")[0] == 411


@slow
def test_files_of_the_machine_and_addresses_are_no_uploads(server):
    visitor = Visitor(server.url, "thief")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        (own,) = server.temporary.glob("pcenet-app-*")
        own_picture = next(own.rglob("*.webp"))
        for path in (
            "/etc/passwd",
            "../../etc/passwd",
            str(own_picture),
            f"http://127.0.0.1:{listener.getsockname()[1]}/a.png",
        ):
            answer = visitor.take(path, "a.png")
            assert set(answer) == {"error"}, (path, answer)
            assert "root:" not in json.dumps(answer)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert "probability" in words_of(visitor.ask(None, "load")["headline"])


@slow
def test_senseless_wishes_are_answered(server):
    visitor = Visitor(server.url, "senseless")
    assert "there is no image yet" in words_of(visitor.ask("reset", "click", None)["notice"])
    assert "is not one of" in words_of(visitor.ask("samples", "select", event_data={"index": 99, "value": 0})["notice"])
    visitor.ask(None, "load")
    assert "row 9 must be" in words_of(visitor.ask("typed", "submit", None, LOOK, False, "9, 0")["notice"])
    nowhere = visitor.ask("experts", "select", None, LOOK, False, event_data={"index": None, "value": 0})
    assert "went wrong" in words_of(nowhere["notice"])


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_how_it_ends(start, classifier, tmp_path, number, code):
    with start(tmp_path, str(classifier)) as server:
        visitor = Visitor(server.url, "last")
        with visitor.web.stream("GET", "/gradio_api/heartbeat/last") as beating:  # a browser's connection stays open
            next(beating.iter_lines())
            server.process.send_signal(number)
            said = server.process.communicate(timeout=60)[0]
        assert server.process.returncode == code
        assert said == ("pcenet: error: interrupted\n" if number == signal.SIGINT else "")
    assert not list(tmp_path.iterdir())


@slow
def test_a_port_in_use_is_one_line(server, classifier, capsys):
    port = urlsplit(server.url).port
    assert main(["app", str(classifier), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"pcenet: error: port {port} on 127.0.0.1 is in use; give another with --port, or 0 for any free one\n"
    )


def test_wrong_options_are_one_line_each(capsys, tmp_path):
    for arguments, message in (
        (["--port", "70000"], "port must be at most 65535, got 70000"),
        (["--max-pixels", "0"], "max_pixels must be at least 1, got 0"),
        ([], f"run: {tmp_path} is no run folder or model folder"),
    ):
        assert main(["app", str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"pcenet: error: {message}")
        assert error.count("\n") == 1


def test_loopback_is_the_default():
    config = AppConfig("run")
    assert (config.host, config.port) == ("127.0.0.1", 7860)


@slow
def test_a_page_of_elsewhere_can_upload_nothing(server):
    (own,) = server.temporary.glob("pcenet-app-*")
    before = sorted(own.rglob("*"))
    for headers in (
        {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "same-site"},
    ):
        files = {"files": ("a.png", b"x" * 1000)}
        answer = httpx.post(f"{server.url}/gradio_api/upload", files=files, headers=headers, timeout=60)
        assert answer.status_code == 403
    assert sorted(own.rglob("*")) == before
    headers = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert httpx.post(f"{server.url}/gradio_api/upload", files=files, headers=headers, timeout=60).status_code == 200


@slow
def test_uploads_without_end_leave_a_few(server):
    (own,) = server.temporary.glob("pcenet-app-*")
    visitor = Visitor(server.url, "after")
    for number in range(15):
        files = [("files", (f"{index}.png", b"%d %d" % (number, index))) for index in range(20)]
        assert httpx.post(f"{server.url}/gradio_api/upload", files=files, timeout=60).status_code == 200

    def kept() -> int:
        """Files of a few bytes: ours, and none of the pictures that gradio has made for other tests."""
        while True:
            try:
                return sum(path.stat().st_size < 10 for path in own.rglob("*.png"))
            except FileNotFoundError:  # removed while we looked
                pass

    deadline = time.monotonic() + 30  # tidying up follows the answer, later where the machine is busy
    while kept() != 50 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept() == 50
    assert "cannot be read" in words_of(visitor.upload("last.png", b"but the last is there")["notice"])


@slow
def test_senseless_requests_are_their_senders_fault(start, classifier, tmp_path):
    """4xx, and nothing on the terminal."""
    with start(tmp_path, str(classifier), "--max-megabytes", "1") as server:
        for path in ("/gradio_api/file=%00", "/assets/%00", "/assets/" + "a" * 300, "/gradio_api/file=" + "a" * 300):
            assert raw(server, path)[0] == 404
        join = f"{server.url}/gradio_api/queue/join"
        for changes in ({"fn_index": 99}, {"fn_index": -1}, {"session_hash": ""}, {"session_hash": None}):
            wish = {"data": [], "fn_index": 0, "session_hash": "abc"} | changes
            assert httpx.post(join, json=wish, timeout=60).status_code == 400
        for disposition in ('name="files"', 'name="files"; filename=".."'):
            body = f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\nx\r\n--b--\r\n".encode()
            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = httpx.post(f"{server.url}/gradio_api/upload", content=body, headers=headers, timeout=60)
            assert answer.status_code == 400
        with socket.create_connection(urlsplit(server.url).netloc.split(":"), timeout=60) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.communicate(timeout=60)[0] == ""
