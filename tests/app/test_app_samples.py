"""Which images the page offers, and what it says where they, or gradio, are not there."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pcenet.app.config import AppConfig
from pcenet.app.server import announce, listen, make_page, open_samples, samples_of
from pcenet.data import DataError, SceneSource, open_source


def test_samples_are_spread_over_the_source_with_their_classes(pictures):
    pytest.importorskip("gradio", reason="the page needs gradio")
    source = open_source(pictures, "val")  # 4 each of blue, green, red
    samples = samples_of(source, 5, source.classes)
    # The middles of five equal parts of 12: 1.2, 3.6, 6, 8.4, 10.8.
    assert [sample.title for sample in samples] == ["blue", "blue", "green", "red", "red"]
    assert samples[2].load()[1] == "green"
    assert [sample.load()[0].tobytes() for sample in samples_of(source, 99, ())] == [
        source.image(number).tobytes() for number in range(12)
    ]
    assert samples[0].thumbnail.size == (160, 160)  # five times 32
    scenes = SceneSource("val", count=1)
    (scene,) = samples_of(scenes, 5, scenes.classes)
    assert scene.title == "scenes val[0]"
    assert [image.tobytes() for image in scene.load()] == [image.tobytes() for image in scenes.sample(0)]
    (scene,) = samples_of(scenes, 5, scenes.classes[::-1])  # what the masks' numbers mean is another network's
    assert scene.load() == (scenes.image(0), None)


def test_a_sample_that_cannot_be_read_is_left_out(tmp_path, encode, caplog):
    pytest.importorskip("gradio", reason="the page needs gradio")
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(encode(Image.new("RGB", (4, 4))))
        (tmp_path / "val" / name / "0.png").write_bytes(encode(Image.new("RGB", (4, 4))))
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "pcenet"):
        assert [sample.title for sample in samples_of(open_source(tmp_path, "val"), 5, "ab")] == ["b"]
    assert "a sample is left out" in caplog.text
    assert "val/a/0.png" in caplog.text


NETWORK: Any = SimpleNamespace(task="classify", class_names=None, mask_values=None, grey_range=None)


def test_data_that_were_given_must_be_there(tmp_path):
    config = AppConfig("run", data=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="does not exist"):
        open_samples(config, NETWORK, None)


def test_data_of_the_run_need_not_be_there(tmp_path, pictures, caplog):
    trained = SimpleNamespace(data=str(tmp_path / "nowhere"), classes=None, ignore_index=None)
    run: Any = SimpleNamespace(read_config=lambda: trained)
    with caplog.at_level(logging.WARNING, "pcenet"):
        assert open_samples(AppConfig("run"), NETWORK, run) is None
    assert "no samples are offered: data source" in caplog.text
    trained.data = str(pictures)
    assert len(open_samples(AppConfig("run", split="train"), NETWORK, run)) == 24
    assert open_samples(AppConfig("run"), NETWORK, None) is None


def test_without_gradio(explorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pcenet.app.page", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"the page needs gradio: pip install 'pcenet\[app\]'"):
        make_page(explorer("classify"), None, AppConfig("run"))


def test_addresses_and_ports():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is in use"), listen("127.0.0.1", port):
            pass
    # An address that is reserved for documentation.
    with pytest.raises(ValueError, match=r"host '203.0.113.1', port 7860: cannot"), listen("203.0.113.1", 7860):
        pass


def test_where_the_page_is_and_who_sees_it(capsys, caplog):
    announce(AppConfig("run"), 7860)
    assert capsys.readouterr().out == "pcenet app: http://127.0.0.1:7860 (Ctrl-C ends it)\n"
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "pcenet"):
        announce(AppConfig("run", host="::"), 80)
    assert "http://[::]:80" in capsys.readouterr().out
    assert "whoever reaches this machine at :: can use the page" in caplog.text
