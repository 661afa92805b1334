"""``pcenet app`` from its options to a page on a port."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from PIL import Image

from pcenet.app.config import AppConfig
from pcenet.app.guard import LOOPBACK, Guard, host_name
from pcenet.app.session import Explorer, Truth, fitted
from pcenet.catalogue import bundled_folder
from pcenet.data import DataError, ImageSource, SegmentationSource, Source
from pcenet.models import SavableModel, load_model
from pcenet.runs.config import EvalConfig
from pcenet.runs.finding import find_model
from pcenet.runs.folder import RunFolder
from pcenet.runtime.device import resolve_device, resolve_precision, set_precision, set_threads
from pcenet.tasks.evaluation import check_against_network, open_data
from pcenet.texts import say, shown

if TYPE_CHECKING:
    from pcenet.app.page import Page, Sample

logger = logging.getLogger(__name__)
THUMBNAIL = 160  # longer side of a sample in pixels
LAST_ANSWERS = 1  # seconds for open connections when the server ends
# A screen reader reads out what changes in a region that was marked before; gradio cannot mark its text.
LIVE = """<script>
new MutationObserver(() => document.querySelector("#report [data-testid=markdown]")?.setAttribute("role", "status"))
  .observe(document, {childList: true, subtree: true});
</script>"""


def serve(config: AppConfig) -> None:
    """Show a network on a web page until the process is interrupted.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ModuleNotFoundError: without gradio.
        ValueError: if the port is in use, or the network has no experts, or ``config.data`` cannot be opened.
    """
    set_threads(config.threads)
    device = resolve_device(config.device)
    folder, run = find_model(config.run)
    model = load_model(folder)
    model.grey_range = config.grey_range or model.grey_range
    classes = model.class_names or [str(number) for number in range(model.num_classes)]
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    explorer = Explorer(model, classes, device=device, precision=precision)
    source = open_samples(config, model, run)
    with listen(config.host, config.port) as listener, terminable(), private_files() as files:
        page = make_page(explorer, source, config)
        announce(config, listener.getsockname()[1])
        run_server(page, listener, files, config)


def open_samples(config: AppConfig, model: SavableModel, run: RunFolder | None) -> Source | None:
    """The images to offer; None where the run's own cannot be opened and no others were given. A warning says where
    their classes are not the network's: it can be looked at on any images.

    Raises:
        ValueError: if those that were given cannot be opened.
    """
    options = EvalConfig(config.run, split=config.split, classes=config.classes, ignore_index=config.ignore_index)
    name = config.data or (run.read_config().data if run else None)
    if name is None:
        return None
    try:
        source: Source = open_data(options, name, model, run)
    except DataError as error:
        if config.data is not None:
            raise
        logger.warning("no samples are offered: %s", error)
        return None
    try:
        check_against_network(model, source, config.run)
    except ValueError as error:
        logger.warning("samples of other classes: %s", error)
    return source


def samples_of(source: Source, count: int, classes: Sequence[str]) -> list[Sample]:
    """So many images of a source, evenly spread over it, with the class or the mask of each where it has one.

    One that cannot be read is left out, with a warning; so are the masks where their classes are not ``classes``.
    """
    from pcenet.app.page import Sample

    labels = [source.classes[label] for label in source.labels] if isinstance(source, ImageSource) else None

    def load(number: int) -> tuple[Image.Image, Truth | None]:
        if isinstance(source, SegmentationSource) and source.classes == tuple(classes):
            return source.sample(number)
        return source.image(number), labels[number] if labels else None

    count = min(count, len(source))
    numbers = [(2 * position + 1) * len(source) // (2 * count) for position in range(count)]
    samples = []
    for number in numbers:
        title = labels[number] if labels else PurePath(source.file_name(number)).name
        try:
            thumbnail = fitted(source.image(number), THUMBNAIL)
        except DataError as error:
            logger.warning("a sample is left out: %s", error)
        else:
            samples.append(Sample(shown(title), thumbnail, partial(load, number)))
    return samples


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        ValueError: if the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} on {host} is in use; give another with --port, or 0 for any free one"
            ) from error
        raise ValueError(f"host {host!r}, port {port}: cannot listen there ({error.strerror or error})") from error
    with listener:
        yield listener


@contextmanager
def terminable() -> Iterator[None]:
    """Within it the process tidies up when it is told to end (SIGTERM)."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def private_files() -> Iterator[Path]:
    """A folder of this process alone for what gradio writes; it is removed at the end.

    gradio reads where it is, and whether to tell its makers what is used, from the environment.
    """
    with tempfile.TemporaryDirectory(prefix="pcenet-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        yield Path(folder)


def make_page(explorer: Explorer, source: Source | None, config: AppConfig) -> Page:
    """The page of a network.

    Raises:
        ModuleNotFoundError: without gradio.
    """
    try:
        from pcenet.app.page import SAMPLES, Limits, Page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "gradio_client"):
            raise
        raise ModuleNotFoundError("the page needs gradio: pip install 'pcenet[app]'") from error
    samples = samples_of(source, SAMPLES, explorer.classes) if source else []
    # To whom a path on this machine means nothing should not learn it.
    folder = Path(config.run).resolve().name
    title = config.run if bundled_folder(config.run) else f"{explorer.model.pretrained_cfg['architecture']} ({folder})"
    return Page(explorer, samples, Limits(config.max_pixels, config.max_megabytes * 2**20), shown(title))


def announce(config: AppConfig, port: int) -> None:
    """Say where the page is, and who can see it."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    say(f"pcenet app: http://{host}:{port} (Ctrl-C ends it)")
    if config.host not in LOOPBACK:
        logger.warning("whoever reaches this machine at %s can use the page", config.host)


def run_server(page: Page, listener: socket.socket, files: Path, config: AppConfig) -> None:
    """Answer requests until the process is interrupted."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from pcenet.app.page import theme

    # Of what gradio adds to a page by itself nothing is on: no links, history, tools, second server, or installation.
    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.blocks,
        path="/",
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=page.limits.size,
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
        head=LIVE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
    )
    page.blocks.has_launched = True  # without it gradio does not check whether files that requests name were uploaded
    hosts = LOOPBACK | {host_name(config.host)} if config.host in LOOPBACK else ()
    guard = Guard(
        application,
        files=files,
        max_bytes=page.limits.size,
        hosts=hosts,
        wishes=page.blocks.fns,
        uploaded=page.blocks.upload_file_set,
    )
    settings = uvicorn.Config(
        guard, log_level="warning", server_header=False, timeout_graceful_shutdown=LAST_ANSWERS, lifespan="on"
    )
    uvicorn.Server(settings).run(sockets=[listener])
