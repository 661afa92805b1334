"""The page's answers to what a visitor does, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")

from pcenet.app.page import LOOK, Limits, Page, Sample
from pcenet.app.session import Place

LIMITS = Limits(pixels=100, size=2000)


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield


@pytest.fixture(scope="module")
def page(explorer, corner) -> Page:
    dark = Image.new("RGB", (8, 8))
    samples = [Sample("dark", dark, lambda: (dark, "zero")), Sample("corner", corner, lambda: (corner, None))]
    return build(explorer("classify"), samples)


def build(*arguments: Any) -> Page:
    """A page, made inside an event loop: outside gradio makes one for it and leaves it open."""

    async def make() -> Page:
        return Page(*arguments, LIMITS, "hand_made")

    return asyncio.run(make())


@pytest.fixture
def upload(tmp_path, page):
    def put(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        page.blocks.upload_file_set.add(str(path))
        return str(path)

    return put


def click(index: Any) -> Any:
    return SimpleNamespace(index=index)


def ask(page: Page, wish: Any, *inputs: Any) -> dict[Any, Any]:
    return page._guarded(wish)(*inputs)


def test_the_first_sample_is_there_at_once(page):
    answer = ask(page, page.first_sample)
    assert answer[page.visit].before.layers["first"].serving.tolist() == [[0, 0], [0, 0]]
    assert answer[page.notice] == ""
    assert "true class: zero" in answer[page.headline]
    assert answer[page.gallery].selected_index == 0


def test_clicks_of_a_visitor(page):
    visit = page.choose_sample(click(1))[page.visit]
    assert visit.before.layers["first"].serving.tolist() == [[1, 0], [0, 0]]
    visit = page.choose_layer(visit, "second")[page.visit]
    pointed = page.click(visit, LOOK, False, click([500, 100]))  # of 640 x 640 pixels
    assert pointed[page.visit].patch == (0, 1)
    assert pointed[page.expert].value == 0
    assert page.click(pointed[page.visit], LOOK, False, click([400, 10]))[page.visit].patch is None  # once more
    for typed in ("1, 0", "1 0", " 1,0 "):
        assert page.type_patch(visit, LOOK, False, typed)[page.visit].patch == (1, 0)
    sent = page.send_patch(pointed[page.visit], 1, False)
    assert "to expert 1" in sent[page.report]
    assert page.undo_move(sent[page.visit])[page.visit].moves == {}
    assert page.reset_all(sent[page.visit])[page.visit].moves == {}


def test_painting(page):
    visit = page.choose_layer(page.choose_sample(click(1))[page.visit], "second")[page.visit]
    for place in ([500, 100], [100, 500]):
        visit = page.click(visit, 1, False, click(place))[page.visit]
        assert visit.patch is None  # no panel in the way of the next
    assert visit.moves == {Place("second", 0, 1): 1, Place("second", 1, 0): 1}
    visit = page.type_patch(visit, 0, True, "0, 0")[page.visit]  # and with it all that expert 1 serves
    assert visit.routing.serving.tolist() == [[0, 0], [0, 0]]
    assert visit.moves == {Place("second", 0, 0): 0}


def test_the_views_of_a_prediction_are_for_segmentation(explorer, corner):
    mask = Image.new("L", corner.size, 2)
    page = build(explorer("segment"), [Sample("corner", corner, lambda: (corner, mask))])
    answer = ask(page, page.first_sample)
    assert [view for _, view in answer[page.view].choices] == ["after", "before", "change", "truth", "image"]
    visit = answer[page.visit]
    found = page.choose_view(visit, "truth")
    assert set(found) == {page.visit, page.prediction}
    assert found[page.prediction].alt_text == "True mask"
    pointed = page.explorer.point_at(found[page.visit], 1, 1)
    assert page.send_patch(pointed, 1, False)[page.view].value == "after"  # where a move is seen
    compared = page.choose_view(pointed, "change")[page.visit]
    assert page.send_patch(compared, 1, False)[page.view].value == "change"
    begun = page._show_all(page.explorer.begin(corner), None)
    assert "truth" not in dict(begun[page.view].choices).values()


def test_a_page_without_samples(explorer):
    page = build(explorer("segment"), [])
    assert ask(page, page.first_sample) == {page.notice: ""}


def test_a_wish_names_no_part_that_it_leaves_as_it_is(page):
    """What a wish lists as its outputs is what it answers; a click may also paint."""
    visit = page.explorer.begin(page.samples[1].load()[0])
    pointed = page.explorer.point_at(visit, 0, 1)
    answers = {
        (page.layer, "input"): page.choose_layer(visit, "second"),
        (page.experts, "select"): page.click(visit, 1, False, click([1, 1])),
        (page.typed, "submit"): page.type_patch(visit, 1, False, "0 0"),
        (page.expert, "input"): page.send_patch(pointed, 1, False),
        (page.undo, "click"): page.undo_move(visit),
        (page.reset, "click"): page.reset_all(visit),
        (page.view, "input"): page.choose_view(visit, "image"),
        (page.blocks, "load"): page.first_sample(),
        (page.gallery, "select"): page.choose_sample(click(1)),
        (page.file, "upload"): {**page.first_sample(), page.file: None},
    }
    functions = {function.targets[0]: function for function in page.blocks.fns.values()}
    assert len(functions) == len(answers)
    for (part, event), answer in answers.items():
        function = functions[part._id, event]
        assert set(function.outputs) == {page.notice, *answer}, event
        assert function.show_progress == "hidden"
    pointing = page.click(visit, LOOK, False, click([1, 1]))
    assert set(pointing) == {page.visit, page.answer, page.expert}  # and draws no picture


def test_an_upload_is_taken(page, upload, encode, corner):
    answer = ask(page, page.take_file, upload("corner.png", encode(corner)))
    assert answer[page.visit].before.layers["first"].serving.tolist() == [[1, 0], [0, 0]]
    assert answer[page.file] is None
    assert page.blocks.delete_cache == (60, 600)


def test_a_file_that_was_not_uploaded(page, tmp_path, encode, corner):
    path = tmp_path / "private.png"
    path.write_bytes(encode(corner))
    assert "that is no uploaded file" in ask(page, page.take_file, str(path))[page.notice]
    for name in (str(path), "http://example.org/a.png"):
        with pytest.raises(ValueError, match="that is no uploaded file"):
            asyncio.run(page.file.async_move_resource_to_block_cache(name))
    page.blocks.upload_file_set.add(str(path))
    moved = asyncio.run(page.file.async_move_resource_to_block_cache(str(path)))
    assert Path(moved).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("page.jpg", b"<!doctype html><p>hello", "page.jpg: the file cannot be read as an image (it is a web page)"),
        ("note.png", b"hello", "note.png: the file cannot be read as an image (it is text)"),
        ("empty.png", b"", "empty.png: the file cannot be read as an image (it is empty)"),
        ("big.png", b"x" * 2001, "big.png: the file has more than 2000 bytes. Shrink it."),
        ("wide.png", (11, 10), "wide.png: the image has more than 100 pixels. Shrink or remove it."),
        ("bomb.png", (30000, 30000), "bomb.png: the image has more than 100 pixels. Shrink or remove it."),
        ("long.png", (33, 1), "long.png: the image has 33 x 1 pixels; its longer side may be 32 times the shorter one"),
        ("a.ppm", b"P6 1 1 255 abc", "a.ppm: the file cannot be read as an image"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "a.eps: the file cannot be read as an image"),
    ],
)  # fmt: skip
def test_bad_uploads_are_answered(page, upload, encode, header_of, name, data, message):
    if isinstance(data, tuple):
        data = header_of(*data) if data[0] > 1000 else encode(Image.new("RGB", data))
    answer = ask(page, page.take_file, upload(name, data))
    assert set(answer) == {page.notice, page.file}  # what was there before stays
    assert message in answer[page.notice]
    assert answer[page.file] is None


def test_a_truncated_upload(page, upload, encode):
    data = encode(Image.effect_noise((10, 10), 80), "JPEG", quality=95)
    answer = ask(page, page.take_file, upload("half.jpg", data[: len(data) - 60]))
    assert "half.jpg: the file cannot be read as an image" in answer[page.notice]


@pytest.mark.parametrize(
    ("wish", "inputs", "message"),
    [
        ("choose_layer", (None, "first"), "there is no image yet"),
        ("click", (None, LOOK, False, click([1, 1])), "there is no image yet"),
        ("send_patch", (None, 1, False), "there is no image yet"),
        ("send_patch", (None, None, False), "no expert is chosen"),
        ("undo_move", (None,), "there is no image yet"),
        ("reset_all", (None,), "there is no image yet"),
        ("choose_view", (None, "after"), "there is no image yet"),
        ("choose_view", (None, "elsewhere"), "view 'elsewhere' is not one of after, before"),
        ("type_patch", (None, LOOK, False, "1, 2"), "there is no image yet"),
        ("type_patch", (None, LOOK, False, None), "row and column must be two whole numbers"),
        ("type_patch", (None, LOOK, False, "-1, 2"), "row and column must be two whole numbers"),
    ],
)
def test_wishes_without_what_they_need(page, wish, inputs, message):
    handler = getattr(page, wish)
    with pytest.raises(ValueError, match=message):
        handler(*inputs)


@pytest.mark.parametrize("index", [2, -1, "0", None, [0, 1]])
def test_a_sample_that_there_is_not(page, index):
    with pytest.raises(ValueError, match="is not one of 2"):
        page.choose_sample(click(index))


def test_our_own_faults_are_told_on_the_terminal_alone(page, capsys):
    def fault() -> dict[Any, Any]:
        raise RuntimeError("secret path")

    answer = ask(page, fault)
    assert "secret" not in answer[page.notice]
    assert "That went wrong" in answer[page.notice]
    assert "RuntimeError: secret path" in capsys.readouterr().err


def test_nothing_is_open_to_programs_and_nothing_is_told_to_gradio(page):
    assert not page.blocks.analytics_enabled
    assert all(function.api_visibility == "private" for function in page.blocks.fns.values())
