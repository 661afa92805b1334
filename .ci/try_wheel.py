"""A wheel, tried as a user gets it: `python .ci/try_wheel.py WHEEL` installs it without extras into an empty virtual
environment, outside the checkout and without a C++ compiler, and uses it there. Leaves nothing behind; what fails ends
it with an error."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LIMIT = 0.5  # seconds of a processor
RUNS = 5
OURS = re.compile(
    r"pcenet(/[\w.-]+)*/[\w-]+\.(css|py|typed|html|json|safetensors|md)"
    r"|pcenet/ops/cpu/\w+\.(cpp|inl|h)|pcenet-[\w.]+\.dist-info/.*"
)
NEEDED = {
    "pcenet/app/page.css",
    "pcenet/py.typed",
    "pcenet/explanation/page.html",
    "pcenet/networks.json",
    "pcenet/runs/config.py",
    "pcenet/ops/cpu/bind.cpp",
    "pcenet/weights/camvid/pce_unet_nano/model.safetensors",
}
LIBRARY = "pcenet/ops/libpcenet_cpu.so"

USE = """
import importlib.metadata, importlib.util
import pcenet, timm, torch
assert importlib.util.find_spec("lightning") is None, "an extra was installed"
torch.manual_seed(0)
model = pcenet.load_model("camvid/pce_unet_nano")
with torch.inference_mode():
    logits = model(torch.randn(2, 3, 192, 256))
assert logits.shape == (2, len(model.class_names), 192, 256) and logits.isfinite().all()
assert timm.create_model("pce_nano", num_classes=10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
layer = pcenet.PCELayer(8, 8, patch_size=4)
with pcenet.record_routing(layer) as records:
    loss = layer(torch.randn(2, 8, 16, 16)).square().mean()
(loss + pcenet.aux_loss(records)).backward()
assert importlib.metadata.version("pcenet") == pcenet.__version__
"""


def main(wheel: Path) -> None:
    """Try it."""
    compiled = check_content(wheel)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python, pcenet = (str(home / "venv" / "bin" / name) for name in ("python", "pcenet"))

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(words, cwd=home, env=environment(home), capture_output=True, text=True, check=False)

        def succeed(*words: str) -> str:
            done = run(*words)
            if done.returncode:
                sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
            return done.stdout

        def cost(*words: str) -> float:
            """The least time of a processor, of several runs."""
            times = []
            for _ in range(RUNS):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                succeed(*words)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            return min(times)

        succeed(python, "-m", "pip", "install", "--disable-pip-version-check", str(wheel.resolve()))
        succeed(python, "-m", "pip", "check")
        assert "check-data" in succeed(pcenet, "--help")
        assert "pce_unet_nano" in succeed(pcenet, "models")
        operators = json.loads(succeed(pcenet, "doctor", "--json"))["operators"]
        print(operators)
        if compiled:
            assert operators["backend"] != "reference"
            assert "of the package" in operators["library"]
        else:
            assert "C++ compiler" in operators["why_reference"]
        succeed(python, "-W", "error", "-c", USE)
        extra_missing = run(pcenet, "train", "--data", "scenes")
        assert extra_missing.returncode == 2, extra_missing.stderr
        assert "pip install 'pcenet[train]'" in extra_missing.stderr
        of_help = cost(pcenet, "--help")
        of_import = cost(python, "-c", "import torch, timm, pcenet") - cost(python, "-c", "import torch, timm")
        print(f"pcenet --help: {of_help:.2f} s; import pcenet: {of_import:.2f} s more than torch and timm")
        assert of_help < LIMIT
        assert of_import < LIMIT
    print(f"{wheel.name} works")


def environment(home: Path) -> dict[str, str]:
    """An environment with nothing of the caller's Python, nothing compiled earlier, and no compiler."""
    unwanted = ("CXX", "PCENET_OPS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name not in unwanted}
    return kept | {"PATH": str(home / "venv" / "bin"), "XDG_CACHE_HOME": str(home / "cache")}


def check_content(wheel: Path) -> bool:
    """All that is needed is in it, and nothing else. Whether it has compiled kernels, as its name says."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}  # auditwheel lists folders, too
    assert names >= NEEDED, NEEDED - names
    foreign = [name for name in names - {LIBRARY} if not OURS.fullmatch(name)]
    assert not foreign, foreign
    pure = wheel.name.endswith("-py3-none-any.whl")
    assert pure or re.search(r"-py3-none-(many)?linux_\w+\.whl$", wheel.name), wheel.name
    assert pure != (LIBRARY in names), wheel.name
    if os.environ.get("PCENET_OPS") == "required":
        assert not pure, "no kernels were compiled"
    return not pure


if __name__ == "__main__":
    main(Path(sys.argv[1]))
