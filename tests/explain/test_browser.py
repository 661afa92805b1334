"""The page in headless Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_loads_and_nothing_leaves(report: Path, chromium: str, width: int, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page_address = (report / "explain.html").as_uri()
    messages: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_address)
        page.wait_for_load_state("load")
        sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.click("nav a >> text=Interventions")
        reached = page.evaluate("document.querySelector('#interventions').getBoundingClientRect().top")
        browser.close()
    assert len(sizes) == 14
    assert min(sizes) > 0
    assert messages == []
    assert [address for address in requests if not address.startswith("data:")] == [page_address]
    assert overflow <= 0
    assert -5 < reached < 200
    assert (tmp_path / "page.png").stat().st_size > 50_000
