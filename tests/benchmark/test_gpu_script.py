"""The script for the day on which there is a GPU, rehearsed on the processor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for this system")
def test_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--data", "digits", "--rehearse"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    ended = {step["step"]: step.get("status", step.get("skipped")) for step in summary["steps"]}
    assert ended.pop("networks-compiled") == "takes minutes on a processor"
    assert set(ended.values()) == {0}
    assert list(ended) == [
        *("kernels", "tests", "layers", "layers-reference", "networks", "images", "graph", "profile", "train"),
    ]
    parts = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    outputs = {"convolution", "normalisation", "evaluation"}
    assert {part["part"] for part in parts} == outputs | {"x", "weight", "scale", "shift", "gate"}
    assert all(0 < part["error"] <= part["allowed"] for part in parts)
    for name in ("layers", "networks"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["records"]
    assert (tmp_path / "train" / "pce_nano-0" / "metrics.json").is_file()


@pytest.mark.slow
def test_time_that_is_over_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--rehearse", "--minutes", "0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {step["skipped"] for step in summary["steps"]} == {"no time was left"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_step_that_is_stopped_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would compute on, on the GPU, while the next step is timed."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", script)
    spec.loader.exec_module(script)
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    options = script.Options(tmp_path, "digits", rehearse=False)
    done = script.run(script.Step("sleeps", 3, ["-c", child], triton=False), options, 60.0)
    assert done["status"] == script.STOPPED
    pid = int((tmp_path / "sleeps.log").read_text())
    for _ in range(50):  # the system takes a moment to remove a killed process
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "torch sees no GPU; --rehearse runs on the processor" in found.stderr
    assert not (tmp_path / "out").exists()
