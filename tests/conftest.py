"""What all tests share."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from pcenet import ops
from pcenet.ops import library

settings.register_profile("pcenet", derandomize=True, deadline=None, max_examples=15, database=None)
settings.load_profile("pcenet")

# The tensors of most tests have a few pixels: a second thread would spend its time waiting for the first.
THREADS = 1


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    # Set for the session, because fixtures of wider scope than a test train networks: sums that are split over another
    # number of threads are rounded differently, and runs are compared bit for bit.
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def _autograd_begun() -> None:
    """Some tests fork. Autograd's engine, where it begins after fake tensors have been made, believes that there is a
    GPU, starts threads for it, and refuses to work in a forked process."""
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True, scope="session")
def _operators_decided() -> None:
    """Before a test takes the cache of kernels away. With ``PCENET_OPS=required`` no test runs without them."""
    ops.backend()


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def compiled_operators() -> Iterator[None]:
    """They compute in float32, where there are any."""
    before = library.choice()
    try:
        library.use("required")
    except ValueError as error:
        pytest.skip(f"NOT RUN, and not tested on this machine: no kernels ({error})")
    yield
    library.use(before.instructions or "reference")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts a network where the package looks for the weights that it brings, and registers it with timm.

    A call takes "DATA/NETWORK", class names and arguments of the network, and returns it. Its weights are random, and
    so are its statistics, which no fresh network has. Nothing else is bundled.
    """
    import timm

    import pcenet.models.pcenet as classifiers
    from pcenet.models import create_network

    root = tmp_path / "weights"

    def register() -> None:
        monkeypatch.setattr(classifiers, "default_cfgs", classifiers.make_default_cfgs())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Overwriting .* in registry")
            for name in classifiers.classifier_names():
                timm.models.register_model(timm.model_entrypoint(name))

    def put(name: str, class_names: list[str] | None = None, **arguments: Any) -> Any:
        torch.manual_seed(1)
        if class_names is not None:
            arguments["num_classes"] = len(class_names)
        model = create_network(name.partition("/")[2], **arguments).eval()
        model.class_names = class_names
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand_like(tensor)
        model.save_pretrained(root / name)
        register()
        return model

    monkeypatch.setattr("pcenet.catalogue.weights_root", lambda: root)
    register()
    yield put
    monkeypatch.undo()
    register()


@pytest.fixture(scope="session")
def save_classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """Saves `pce_nano` untrained for these classes, its head strong enough for predictions to differ between images."""

    def save(classes: list[str]) -> Path:
        import timm

        torch.manual_seed(5)
        model = timm.create_model("pce_nano", num_classes=len(classes))
        model.class_names = classes
        with torch.no_grad():
            model.get_classifier().weight.mul_(300)
        folder = tmp_path_factory.mktemp("trained") / "model"
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a browser of the system; skips where there is none, or no playwright."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium: install Debian's package of that name")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy 32 x 32 pictures, each brightest in one colour: 24 for training, 12 for validation."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    for split, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng((len(split), channel, index))
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 90
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root
