"""The page in a browser: what a visitor does with it, at the width of a desk and of a phone."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from pcenet.data import SceneSource

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven with playwright")
pytestmark = pytest.mark.slow
HEIGHTS = {1280: 800, 390: 844}  # by width: of a desk and of a phone
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
        page = browser.new_page(viewport={"width": width, "height": HEIGHTS[width]})
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
    box = picture.bounding_box()
    picture.click(position={"x": across * box["width"], "y": down * box["height"]})


def choose(page: Any, part: str, entry: str) -> None:
    """Choose an entry of a list."""
    page.locator(f"{part} input").click()
    page.get_by_role("option", name=entry).click()
    sync_api.expect(page.get_by_role("option")).to_have_count(0)  # it lies over the picture while it folds away
    sync_api.expect(page.locator(f"{part} input")).to_have_value(entry)


def chosen_expert(page: Any) -> int:
    """The router's choice for the patch that is pointed at."""
    return int(re.search(r"chose expert (\d)", page.locator("#answer").inner_text())[1])


def send_to(page: Any, expert: int) -> None:
    page.locator("#panel").get_by_label(f"expert {expert}:").check()


def edges(page: Any, part: str) -> tuple[float, float]:
    """Where a part of the page begins and ends from top to bottom, from the top of what is seen."""
    box = page.locator(part).bounding_box()
    return box["y"], box["y"] + box["height"]


def source_of(page: Any, part: str) -> str:
    return page.locator(f"{part} img").get_attribute("src")


def wait_for_another(page: Any, part: str, source: str) -> None:
    """Wait until a part shows another picture, and shows it whole."""
    page.wait_for_function(
        "([part, old]) => { const i = document.querySelector(part + ' img');"
        " return i && i.src !== old && i.complete && i.naturalWidth > 0; }",
        arg=[part, source],
    )


@pytest.mark.parametrize("width", HEIGHTS)
def test_a_visit(server, visit, width):
    page = visit(server.url, width)
    has(page, "#headline", "probability")
    before = source_of(page, "#experts")
    choose(page, "#layer", "Layer 1 of 2, early: 4 x 4 patches (stages.1.1)")  # it opens on the other one
    wait_for_another(page, "#experts", before)
    before = source_of(page, "#experts")
    choose(page, "#layer", "Layer 2 of 2, late: 8 x 8 patches (stages.2.1)")
    has(page, "#legend", re.compile("expert 0: .*expert 3: "))
    wait_for_another(page, "#experts", before)
    click_at(page, 0.3, 0.9)
    has(page, "#answer", re.compile(r"Row 7, column 2: the router chose expert \d, gate value 0\.\d{3}\."))
    chosen = chosen_expert(page)
    other = (chosen + 1) % 4
    before = source_of(page, "#experts")
    send_to(page, other)
    has(page, "#report", f"1 patch of stages.2.1 (row 7, column 2, to expert {other})")
    has(page, "#answer", f"you sent it to expert {other}, the router chose expert {chosen}")
    has(page, "#classes", "→")
    wait_for_another(page, "#experts", before)
    choose(page, "#brush", f"A click sends to expert {other}")
    click_at(page, 0.9, 0.9)  # one after the other, before the first is answered
    click_at(page, 0.7, 0.9)
    click_at(page, 0.1, 0.9)
    has(
        page, "#report", re.compile(r"You moved [234] patches of stages\.2\.1:")
    )  # but for those that went there anyway
    page.get_by_role("button", name="Reset all").click()
    has(page, "#report", "Click on a patch")
    page.get_by_role("button", name="Undo").click()
    has(page, "#report", "You moved")


@pytest.mark.parametrize("width", HEIGHTS)
def test_a_click_changes_its_panel_alone(server, visit, width):
    """No picture is asked for again, and the frame and the panel are at the patch."""
    page = visit(server.url, width)
    has(page, "#headline", "probability")
    before = source_of(page, "#experts")
    choose(page, "#layer", "Layer 1 of 2, early: 4 x 4 patches (stages.1.1)")
    wait_for_another(page, "#experts", before)
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "file=" in request.url else None)
    assert not page.locator("#panel").is_visible()
    click_at(page, 0.3, 0.4)
    has(page, "#answer", "Row 1, column 1")
    assert asked == []
    picture = page.locator("#experts img").bounding_box()
    frame = page.evaluate(
        "(() => { const s = getComputedStyle(document.querySelector('#experts'), '::after');"
        " return ['left', 'top', 'width', 'height'].map(side => parseFloat(s[side])) })()"
    )
    side = picture["width"] / 4
    assert frame == pytest.approx([side] * 4, abs=2)
    top, _ = edges(page, "#panel")
    at_patch = picture["y"] + (2 * side if width > 700 else picture["height"])  # on a phone below the picture
    assert at_patch - 2 <= top <= at_patch + 12
    click_at(page, 0.3, 0.4)
    sync_api.expect(page.locator("#panel")).to_be_hidden()


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
    wait_for_another(page, "#experts", before)
    page.get_by_label("Row and column").fill("1, 0")
    page.get_by_label("Row and column").press("Enter")
    has(page, "#answer", "Row 1, column 0: the router chose expert")
    other = (chosen_expert(page) + 1) % 4
    page.get_by_role("radio", name=f"expert {other}:").press("Space")
    has(page, "#answer", f"you sent it to expert {other}")


def test_what_a_screen_reader_is_told(server, visit):
    page = visit(server.url, 1280)
    has(page, "#headline", "probability")
    page.get_by_role("button", name="Thumbnail 3").click()
    has(page, "#headline", "probability")
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('input, button, img, select, textarea')].filter(e => !(e.ariaLabel"
        " || e.alt || e.title || e.innerText || e.labels?.length || e.querySelector('img[alt]:not([alt=\"\"])')))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.locator("img[alt=''], img:not([alt])").count() == 0
    marked = page.evaluate("[...document.querySelectorAll('#samples button')].map(e => e.matches('.selected'))")
    assert [number for number, is_shown in enumerate(marked) if is_shown] == [2]
    region = page.locator(
        "#report [role=status]"
    ).element_handle()  # the same before and after: else its change is not read out
    click_at(page, 0.1, 0.1)
    has(page, "#answer", "the router chose")
    send_to(page, (chosen_expert(page) + 1) % 4)
    has(page, "#report", "You moved 1 patch")
    assert region.evaluate("e => e.isConnected && e.innerText.startsWith('You moved 1 patch')")


@pytest.mark.parametrize("width", HEIGHTS)
def test_cause_and_effect_are_on_one_screen(segmenter, visit, encode, width):
    page = visit(segmenter.url, width)
    page.get_by_role("button", name="Click to upload").wait_for()
    assert not page.locator("#tools").is_visible()  # before there is an image
    drop(page, "scene.png", encode(SceneSource("val", count=1).image(0).resize((320, 240))))
    has(page, "#headline", "of the pixels")
    opened_on = "Layer 5 of 5, late: 3 x 4 patches (levels.1.blocks.0)"
    sync_api.expect(page.locator("#layer input")).to_have_value(opened_on)
    has(page, "#classes", re.compile("sky|building|tree|road"))
    before = source_of(page, "#prediction")
    click_at(page, 0.1, 0.1)
    has(page, "#answer", "Row 0, column 0")
    send_to(page, (chosen_expert(page) + 1) % 4)
    has(page, "#report", re.compile(r"% of the pixels \([1-9]\d*\) changed"))
    wait_for_another(page, "#prediction", before)
    assert page.evaluate("window.scrollY") == 0
    parts = ["#experts img", "#panel", "#headline", "#report", "#prediction img"]
    if width > 700:
        parts += ["#view", "#classes", "#tools"]
        left, right = (page.locator(part).bounding_box() for part in ("#experts img", "#prediction img"))
        assert left["x"] + left["width"] < right["x"]
        assert abs(left["y"] - right["y"]) < 10
    for part in parts:
        top, bottom = edges(page, part)
        assert 0 <= top < bottom <= HEIGHTS[width], part
    for view, name in (("before", "Before"), ("what changed", "What changed"), ("image", "Image")):
        before = source_of(page, "#prediction")
        page.locator("#view").get_by_label(view, exact=True).check()
        wait_for_another(page, "#prediction", before)
        assert page.locator("#prediction img").get_attribute("alt") == name
    assert page.locator("#view").get_by_label("true mask").count() == 0  # nobody knows it
    before = source_of(page, "#experts")
    drop(page, "narrow.png", encode(Image.new("RGB", (40, 160))))
    wait_for_another(page, "#experts", before)
    picture, field = (page.locator(part).bounding_box() for part in ("#experts img", "#experts"))
    assert picture["width"] == pytest.approx(field["width"], abs=3)  # the frame of a patch is placed in the field
