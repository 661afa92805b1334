"""Pictures of routing, on a routing made by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pcenet.analysis import expert_map, routing_picture
from pcenet.nn import Grid, Routing, route


@pytest.fixture
def routing() -> Routing:
    # Two images of 1 x 2 patches, two experts. Expert 0 is chosen three times and takes two: patch 2, with the lowest
    # gate value of the three, is dropped.
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    return route(probs.log(), Grid(2, 1, 2), capacity_factor=1.0)


def test_expert_map(routing):
    assert expert_map(routing).tolist() == [[[0, 1]], [[-1, 0]]]


def test_what_is_drawn(routing):
    images = torch.zeros(2, 3, 4, 8)
    images[1, 0] = 1
    figure = routing_picture(images, {"stages.0.0.body": [routing]}, ["leaf", "sky"])
    axes = figure.axes
    assert len(axes) == 4
    assert [axis.get_title() for axis in axes[:2]] == ["leaf", "sky"]
    assert axes[2].get_ylabel() == "stages.0.0"
    assert np.array_equal(axes[1].images[0].get_array()[0, 0], [1, 0, 0])
    blue, orange, grey = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x80, 0x80, 0x80)
    for axis, colours, gates in ((axes[2], (blue, orange), (0.9, 0.8)), (axes[3], (grey, blue), (0.6, 0.7))):
        overlay = axis.images[1].get_array()
        for patch in range(2):
            expected = [channel / 255 for channel in colours[patch]] + [0.25 + 0.45 * gates[patch]]
            assert overlay[0, patch].tolist() == pytest.approx(expected, abs=1e-6)
        assert axis.images[1].get_extent() == [-0.5, 7.5, 3.5, -0.5]
    assert [text.get_text() for text in axes[3].get_legend().get_texts()] == ["expert 0: 75%", "expert 1: 25%"]


def test_it_can_be_saved(routing, tmp_path):
    routing_picture(torch.rand(2, 3, 4, 8), {"a": [routing], "b": [routing]}).savefig(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_errors(routing, monkeypatch):
    with pytest.raises(ValueError, match="records is empty"):
        routing_picture(torch.zeros(2, 3, 4, 8), {})
    with pytest.raises(ValueError, match="'a' are of 2 images, but 3 were given"):
        routing_picture(torch.zeros(3, 3, 4, 8), {"a": [routing]})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pcenet\[plot\]'"):
        routing_picture(torch.zeros(2, 3, 4, 8), {"a": [routing]})


@pytest.mark.slow
def test_importing_it_does_not_load_matplotlib():
    code = "import sys, pcenet.analysis; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
