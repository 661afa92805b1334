"""``pcenet doctor``: works where packages are missing, and says what brings them."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import pcenet
from pcenet import doctor, ops
from pcenet.cli import main

REQUIRES = [
    "numpy>=2",
    "torch>=2.6",
    "lightning>=2.6.4; extra == 'train'",
    'matplotlib; python_version > "3" and extra == "plot"',
    "nowhere-to-be-found; extra == 'plot'",
    "pcenet[train]; extra == 'all'",
    "pytest; extra == 'dev'",
]


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: REQUIRES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHAPE", (1, 2, 4, 4))
    monkeypatch.setattr(doctor, "ROUNDS", 1)


def test_the_whole_report(declared: None, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pcenet"] == pcenet.__version__
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert list(report["packages"]) == ["numpy", "torch", "lightning", "matplotlib", "nowhere-to-be-found"]
    assert report["packages"]["numpy"] == np.__version__
    assert report["missing"] == {"nowhere-to-be-found": "pip install 'pcenet[plot]'"}
    assert report["broken"] == {}
    assert 1 <= report["cores"]["usable"] <= report["cores"]["machine"]
    assert report["compute"]["threads"] == torch.get_num_threads()
    kinds = [f"{number} {layout}" for number in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")]
    assert list(report["compute"]["convolution"]) == kinds
    assert all(speed > 0 for speed in report["compute"]["convolution"].values())


def test_what_a_working_installation_has_is_not_called_broken() -> None:
    """What pcenet cannot do without, under the names of its modules: the tests would not run without it."""
    names = [name for name, extra in doctor.requirements().items() if extra is None]
    assert {"pyyaml", "typing-extensions", "pillow"} <= set(names)
    assert dict(doctor.broken(names)) == {}


def test_text_to_paste_without_a_users_paths(
    declared: None, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-of-someone"))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"numpy: {np.__version__}\n" in text
    assert "nowhere-to-be-found: missing; pip install 'pcenet[plot]'\n" in text
    assert "3x3 convolution, bfloat16 channels_last: " in text
    assert f"operators: {ops.backend()}, " in text
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            {
                "backend": "cpu (avx2)",
                "library": "~/x.so",
                "why_reference": None,
                "not_used": {"avx512": "no"},
            },
            "cpu (avx2), ~/x.so; avx512: no",
        ),
        (
            {"backend": "reference", "library": None, "why_reference": "no compiler", "not_used": {}},
            "reference, about 1.5 times slower than kernels; no compiler",
        ),
        (
            {"backend": None, "library": None, "why_reference": "PCENET_OPS=x: there is auto", "not_used": {}},
            "none; PCENET_OPS=x: there is auto",
        ),
    ],
)
def test_what_computes_in_a_line(found: dict[str, object], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.library, "REFERENCE_COST", 1.5)
    assert doctor.describe(found) == line


def test_operators_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.operators()
    assert found["backend"] == ops.backend()
    assert found["why_reference"] == ops.why_reference()
    monkeypatch.setattr(ops.library, "_choice", None)
    monkeypatch.setenv("PCENET_OPS", "fast")
    found = doctor.operators()
    assert found["backend"] is None
    assert found["why_reference"].startswith("PCENET_OPS=fast: there is auto, ")


def test_the_speed_is_operations_by_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0] * 4 + [1.0, 2.0, 4.0, 8.0] + [3.0] * 4 + [3.0] * 4)  # a warm-up, then three rounds of four
    monkeypatch.setattr(doctor, "ROUNDS", 3)
    monkeypatch.setattr(doctor, "timed", lambda function, device: next(seconds))
    # 16 maps of 32 x 32, each value from 9 x 64 multiply-adds, 64 of them per pixel: 2 * 9 * 64 * 64 * 16384.
    operations = 1_207_959_552
    speeds = doctor.convolution_speed(torch.device("cpu"))
    assert list(speeds.values()) == pytest.approx([operations / 3e9] * 4)


def test_a_missing_torch_is_told_and_ends_nothing(
    declared: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch: missing; pip install pcenet\n" in text
    assert "convolution" not in text


def test_a_broken_package_is_told_with_the_reason(
    declared: None, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "import_error", lambda module: "OSError: no libx" if module == "numpy" else None)
    assert main(["doctor"]) == 0
    assert "numpy: broken; OSError: no libx\n" in capsys.readouterr().out


def test_requirements_of_this_very_package() -> None:
    found = doctor.requirements()
    assert found["torch"] is None
    assert found["lightning"] == "train"  # and that of the page, which is larger
    assert found["gradio"] == "app"
    assert doctor.installed("timm") == timm.__version__
    assert doctor.import_error("timm") is None
    assert doctor.import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
