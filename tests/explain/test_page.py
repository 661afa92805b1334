"""The page as a reader's browser gets it: parsed, with nothing in it that would be fetched, and nothing of a user's
that would be run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

from PIL import Image

from pcenet.cli import main
from pcenet.explanation.page import millions, short_path

PREFIX = "data:image/png;base64,"


class Page(HTMLParser):
    """All tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def decoded(image: dict[str, str]) -> bytes:
    assert image["src"].startswith(PREFIX)
    return base64.b64decode(image["src"].removeprefix(PREFIX), validate=True)


def test_every_image_is_in_the_page_and_says_what_it_shows(report: Path) -> None:
    images = Page(report / "explain.html").of("img")
    # 2 images, 2 overlays, 2 galleries, 2 typical places, classes, knock-outs, places, load, and 2 of all layers.
    assert len(images) == 2 + 2 + 2 + 2 + 4 + 2
    for image in images:
        with Image.open(BytesIO(decoded(image))) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
        assert len(image["alt"]) > 20
    assert len({image["alt"] for image in images}) == len(images)


def test_names_are_seen_and_not_obeyed_and_exact_in_the_numbers(report: Path) -> None:
    page = Page(report / "explain.html")
    assert [letter for letter in page.source if not letter.isprintable() and letter != "\n"] == []
    assert '"><script>alert(2)<i>\\x1b]0;x\\x07\\u200b' in page.text
    assert "<img src=x onerror=alert(1)>\\x1b[31m\\u202e" in page.text
    numbers = json.loads((report / "explain.json").read_text())
    classes = ["$a_b$ & <b>c", "<img src=x onerror=alert(1)>\x1b[31m\u202e", "_plain"]
    assert numbers["classes"] == classes
    assert list(numbers["layers"][0]["by_class"]) == classes
    files = {each["image"] for gallery in numbers["layers"][0]["gallery"] for each in gallery}
    assert files <= {f'val/{name}/"><script>alert(2)<i>\x1b]0;x\x07\u200b{i}.png' for name in classes for i in range(4)}


def test_figures_are_those_of_the_page(report: Path) -> None:
    in_page = {decoded(image) for image in Page(report / "explain.html").of("img")}
    assert {path.read_bytes() for path in (report / "figures").iterdir()} == in_page


def test_nothing_is_fetched(report: Path) -> None:
    page = Page(report / "explain.html")
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "video", "audio"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), value[:80]
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert "url(" not in page.source
    assert "@import" not in page.source
    (policy,) = [tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_sections(report: Path) -> None:
    page = Page(report / "explain.html")
    links = {link["href"].removeprefix("#") for link in page.of("a")}
    assert links == {section["id"] for section in page.of("section")}


def test_names_of_users_are_text(report: Path, awkward: Path) -> None:
    page = Page(report / "explain.html")
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert "i" not in tags
    assert all(set(image) == {"src", "alt", "width", "height"} for image in page.of("img"))
    classes = sorted(folder.name for folder in (awkward / "data" / "val").iterdir())
    assert json.loads((report / "explain.json").read_text())["classes"] == classes
    shown = [image["alt"] for image in page.of("img") if "The network says" in image["alt"]]
    assert len(shown) == 2
    for alt in shown:
        assert '"><script>alert(2)<i>' in alt
        assert any(f"It is {name}." in alt for name in classes)
        assert alt.split(". ")[0] in page.text
    assert any("<img src=x onerror=alert(1)>" in alt for alt in (image["alt"] for image in page.of("img")))


def test_every_figure_has_words_beside_it(report: Path) -> None:
    """Pictures of one kind share the words above them; every other has its own."""
    source = (report / "explain.html").read_text()
    words = r'<p class="read"><b>How to read it\.</b> [^<]{60,}<b>A bad sign:</b> [^<]{30,}</p>'
    assert len(re.findall(words, source)) == source.count("How to read it")
    panels = re.findall(r"<figure[^>]*>(?:(?!</figure>).)*?</figure>", source, re.DOTALL)
    alone = [panel for panel in panels if "figcaption" not in panel]
    # Specialisation, interventions, and of the layer its classes, knock-outs, places and load.
    assert len(alone) == 6
    assert all(re.search(words, panel) for panel in alone)


def test_of_a_segmentation_network(street: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = [str(street / "routed"), "--data", str(street / "data"), "--intervention-images", "0", "--workers", "0"]
    assert main(["explain", *arguments, "--device", "cpu", "--precision", "fp32", "--out", str(out)]) == 0
    page = Page(out / "explain.html")
    alts = [image["alt"] for image in page.of("img")]
    assert sum(alt.endswith("classes: truth.") for alt in alts) == 2
    assert sum(alt.endswith("classes: prediction.") for alt in alts) == 2
    assert "not known: give --twin RUN" in " ".join(page.text.split())
    assert "Interventions" not in page.text
    numbers = json.loads((out / "explain.json").read_text())
    assert numbers["score"]["name"] == "mIoU"
    # Two images of 2 x 3 patches; the last pixels of each row have no class, which changes no majority: the upper ones
    # are sky, the lower ones road.
    (layer,) = numbers["layers"]
    assert {name: sum(counts) for name, counts in layer["by_class"].items()} == {"sky": 6, "road": 6}
    assert sum(map(sum, layer["by_place"])) == 12


def test_millions() -> None:
    assert [millions(value) for value in (35_645_120, 1_122_054, 249_126)] == ["35.6 M", "1.12 M", "0.249 M"]


def test_pictures_come_first_and_numbers_last(report: Path) -> None:
    """Each image is shown with its experts in every layer; findings come next, then the layers."""
    source = Page(report / "explain.html").source
    order = re.findall(r'<section id="([a-z]+)', source)
    assert order[:2] == ["images", "short"]
    assert order[-3:] == ["numbers", "card", "made"]
    strips = re.findall(r'<div class="strip">(.*?)</div>', source, re.DOTALL)
    assert len(strips) == 2
    for strip in strips:
        assert strip.count("<img") == 2
        assert "experts, layer 1 of 1" in strip


def test_of_a_path_of_this_machine_its_last_part_is_shown(report: Path) -> None:
    source = Page(report / "explain.html").source
    assert str(report.parent) not in source
    assert (short_path("/home/me/runs/digits"), short_path("runs/digits")) == ("digits", "runs/digits")
