"""A wheel, tried as a user gets it: `python .ci/try_wheel.py WHEEL` installs it without extras into an empty virtual
environment, outside the checkout, and uses it there. Leaves nothing behind; what fails ends it with an error."""

from __future__ import annotations

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
OURS = re.compile(r"pcenet(/[\w.-]+)*/[\w-]+\.(py|typed|html|json|safetensors|md)|pcenet-[\w.]+\.dist-info/.*")
NEEDED = {"pcenet/py.typed", "pcenet/explain/page.html", "pcenet/weights/camvid/pce_unet_nano/model.safetensors"}

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
    check_content(wheel)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python, pcenet = (str(home / "venv" / "bin" / name) for name in ("python", "pcenet"))

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
            return subprocess.run(words, cwd=home, env=clean, capture_output=True, text=True, check=False)

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
        assert "pcenet" in succeed(pcenet, "doctor")
        succeed(python, "-W", "error", "-c", USE)
        extra_missing = run(pcenet, "train", "--data", "pictures")
        assert extra_missing.returncode == 2, extra_missing.stderr
        assert "pip install 'pcenet[train]'" in extra_missing.stderr
        of_help = cost(pcenet, "--help")
        of_import = cost(python, "-c", "import torch, timm, pcenet") - cost(python, "-c", "import torch, timm")
        print(f"pcenet --help: {of_help:.2f} s; import pcenet: {of_import:.2f} s more than torch and timm")
        assert of_help < LIMIT
        assert of_import < LIMIT
    print(f"{wheel.name} works")


def check_content(wheel: Path) -> None:
    """All that is needed is in it, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= NEEDED, NEEDED - names
    foreign = [name for name in names if not OURS.fullmatch(name)]
    assert not foreign, foreign


if __name__ == "__main__":
    main(Path(sys.argv[1]))
