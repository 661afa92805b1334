"""The page in a browser: what a visitor does with it, at the width of a desk and of a phone."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven with playwright")
pytestmark = pytest.mark.slow
WIDTHS = (1280, 390)
PATIENCE = 60_000  # milliseconds
DROP = """([selector, name, data]) => {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type: "image/png"}));
    document.querySelector(selector).dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def segmenter(start, tmp_path_factory) -> Iterator[Any]:
    """The page of a network that comes with the package, without samples."""
    with start(tmp_path_factory.mktemp("segmenter"), "camvid/pce_unet_nano") as server:
        yield server


@pytest.fixture
def visit(browser) -> Iterator[Callable[[str, int], Any]]:
    """Opens the page at a width. In the end nothing may have been asked of elsewhere, and no error have been logged."""
    pages, faults = [], []

    def open_page(url: str, width: int) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: None if own(asked.url, url) else faults.append(asked.url))
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.close()
    assert not faults


def own(asked: str, url: str) -> bool:
    return asked.startswith((f"{url}/", "data:", f"blob:{url}/"))


def has(page: Any, part: str, text: str | re.Pattern[str]) -> None:
    """Wait until a part of the page has a text."""
    sync_api.expect(page.locator(part)).to_contain_text(text, timeout=PATIENCE)


def drop(page: Any, name: str, data: bytes) -> None:
    page.evaluate(DROP, ["#upload button", name, base64.b64encode(data).decode()])


def click_at(page: Any, across: float, down: float) -> None:
    """Click on the picture of the experts, at shares of its width and height."""
    picture = page.locator("#experts img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    picture.click(position={"x": across * box["width"], "y": down * box["height"]})


def source_of(page: Any, part: str) -> str:
    return page.locator(f"{part} img").get_attribute("src")


def wait_for_another(page: Any, part: str, source: str) -> None:
    """Wait until a part shows another picture, and shows it whole."""
    page.wait_for_function(
        "([part, old]) => { const i = document.querySelector(part + ' img');"
        " return i && i.src !== old && i.complete && i.naturalWidth > 0; }",
        arg=[part, source],
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visit(server, visit, width):
    page = visit(server.url, width)
    has(page, "#headline", "probability")
    before = source_of(page, "#experts")
    page.get_by_label("1 of 2, early: 4 x 4 patches (stages.1.1)").check()  # it opens on the other one
    wait_for_another(page, "#experts", before)
    before = source_of(page, "#experts")
    page.get_by_label("2 of 2, late: 8 x 8 patches (stages.2.1)").check()
    has(page, "#legend", re.compile("expert 0: .*expert 3: "))
    wait_for_another(page, "#experts", before)
    click_at(page, 0.3, 0.9)
    has(page, "#answer", "Patch in row 7, column 2 of stages.2.1.")
    has(page, "#answer", re.compile(r"The router chose expert \d, with gate value 0\.\d{3}\."))
    chosen = int(re.search(r"chose expert (\d)", page.locator("#answer").inner_text())[1])
    other = (chosen + 1) % 4
    page.get_by_label(f"expert {other}", exact=True).check()
    before = source_of(page, "#experts")
    page.get_by_role("button", name="Send").click()
    has(page, "#report", f"stages.2.1, row 7, column 2: to expert {other}")
    has(page, "#answer", f"You sent it to expert {other}. The router would have chosen expert {chosen}")
    has(page, "#classes", "points")
    wait_for_another(page, "#experts", before)
    page.get_by_role("button", name="Reset all").click()
    has(page, "#report", "Nothing is changed yet.")


def test_dropping_images_good_and_bad(server, visit, encode, header_of):
    page = visit(server.url, 1280)
    has(page, "#headline", "probability")
    before = source_of(page, "#prediction")
    drop(page, "green.png", encode(Image.new("RGB", (50, 40), (0, 255, 0))))
    wait_for_another(page, "#prediction", before)
    for name, data, message in (
        (
            "page.png",
            b"<html><script>alert(1)</script>",
            "page.png: the file cannot be read as an image (it is a web page)",
        ),
        ("bomb.png", header_of(40000, 40000), "bomb.png: the image has more than 1000000 pixels."),
    ):
        drop(page, name, data)
        has(page, "#notice", message)
        assert page.get_by_role("alert").is_visible()
    before = source_of(page, "#prediction")
    drop(page, "red.png", encode(Image.new("RGB", (50, 40), (255, 0, 0))))
    wait_for_another(page, "#prediction", before)
    sync_api.expect(page.locator("#notice")).not_to_contain_text("bomb.png", timeout=PATIENCE)


def test_without_a_pointer(server, visit):
    page = visit(server.url, 1280)
    has(page, "#headline", "probability")
    before = source_of(page, "#experts")
    page.get_by_role("button", name="Thumbnail 2").press("Enter")
    wait_for_another(page, "#experts", before)  # its arrival sets row and column back
    page.get_by_label("Row", exact=True).fill("1")
    page.get_by_label("Column", exact=True).fill("0")
    page.get_by_role("button", name="Look").press("Enter")
    has(page, "#answer", re.compile(r"Patch in row 1, column 0 of stages\.\d\.1\."))
    page.get_by_role("radio", name="expert 3", exact=True).press("Space")
    page.get_by_role("button", name="Send").press("Enter")
    has(page, "#answer", "expert 3 (")
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('input, button, img, select, textarea')].filter(e => !(e.ariaLabel"
        " || e.alt || e.title || e.innerText || e.labels?.length || e.querySelector('img[alt]:not([alt=\"\"])')))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize("width", WIDTHS)
def test_segmentation(segmenter, visit, encode, width):
    page = visit(segmenter.url, width)
    page.get_by_role("button", name="Click to upload").wait_for()
    drop(page, "noise.png", encode(Image.effect_noise((320, 200), 90).convert("RGB")))
    has(page, "#headline", "of the pixels.")
    has(page, "#classes", re.compile("sky|building|tree|road"))
    page.get_by_label("5 of 5, late: 3 x 5 patches (levels.1.blocks.0)").check()  # 192 x 307 pixels
    has(page, "#answer", "Click on a patch")
    click_at(page, 0.1, 0.1)
    has(page, "#answer", "Patch in row 0, column 0 of levels.1.blocks.0.")
    chosen = int(re.search(r"chose expert (\d)", page.locator("#answer").inner_text())[1])
    page.get_by_label(f"expert {(chosen + 1) % 4}", exact=True).check()
    page.get_by_role("button", name="Send").click()
    has(page, "#report", re.compile(r"[1-9]\d* of 256000 pixels"))  # 640 x 400
    wait_for_another(page, "#changed", "")
    wait_for_another(page, "#router-picture", "")
