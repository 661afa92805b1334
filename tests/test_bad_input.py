"""What bad input gets: one line that names the thing, the rule and the way out, exit 2, nothing on disk harmed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pcenet.cli import main
from pcenet.training.checkpoints import write_checkpoint

QUICK = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--threads", "1"]
TRAIN = ["train", "--epochs", "1", "--batch-size", "4", "--out", "new", *QUICK]
CHECKPOINT = "run/checkpoints/step-00000001"
SMALL = '{"widths":[8,8,8],"num_experts":2}'


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good input: ``pics`` to classify, ``street`` to segment, and ``run``, trained on the former."""
    root = tmp_path_factory.mktemp("good")
    for number, name in enumerate(f"{split}/{kind}" for split in ("train", "val") for kind in ("cat", "dog")):
        for index in range(3):
            save_pixels(root / "pics" / name / f"{index}.png", (number, index), (12, 12, 3), 256)
    for split in ("train", "val"):
        for index in range(3):
            save_pixels(root / "street" / split / "images" / f"{index}.png", (9, index), (24, 32, 3), 256)
            save_pixels(root / "street" / split / "masks" / f"{index}.png", (8, index), (24, 32), 2)
    (root / "notes.txt").write_text("not an image, not an archive\n")
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main([*TRAIN, "--data", "pics", "--model-args", SMALL, "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return root


def save_pixels(path: Path, seed: tuple[int, int], shape: tuple[int, ...], top: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good input, which becomes the current folder; its files are links, to be replaced, not changed."""
    shutil.copytree(good, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def digest(root: Path) -> dict[str, str]:
    """Each file below a folder and the hash of its content."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


Spoil = Callable[[], object]


def write(name: str, content: bytes | str) -> Spoil:
    """Put a file where there may be another."""

    def do() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def cut(name: str, share: float = 0.5) -> Spoil:
    """Keep a part of a file."""

    def do() -> None:
        content = Path(name).read_bytes()
        write(name, content[: int(len(content) * share)])()

    return do


def remove(name: str) -> Spoil:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def archive(name: str, *members: str) -> Spoil:
    """Make an archive of folders or files."""

    def do() -> None:
        with zipfile.ZipFile(name, "w") as target:
            for path in (path for member in members for path in (Path(member), *Path(member).rglob("*"))):
                target.write(path)

    return do


def both(*steps: Spoil) -> Spoil:
    return lambda: [step() for step in steps]


def mask(values: list[int] | None = None, shape: tuple[int, ...] = (24, 32)) -> Spoil:
    """Replace one mask: of zeros, but for its first values."""

    def do() -> None:
        pixels = np.zeros(shape, dtype=np.uint8)
        pixels.flat[: len(values or [])] = values or []
        name = "street/train/masks/1.png"
        remove(name)()
        Image.fromarray(pixels).save(name)

    return do


def change_json(name: str, **changes: Any) -> Spoil:
    return lambda: write(name, json.dumps(json.loads(Path(name).read_text()) | changes))()


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def do() -> None:
        tensors = load_file("run/model/model.safetensors")
        change(tensors)
        remove("run/model/model.safetensors")()
        save_file(tensors, "run/model/model.safetensors")

    return do


def change_checkpoint(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the checkpoint of a run that is not finished."""

    def do() -> None:
        checkpoint = torch.load(f"{CHECKPOINT}/state.ckpt", weights_only=True)
        change(checkpoint)
        for name in ("run/metrics.json", "run/model", CHECKPOINT):
            remove(name)()
        write_checkpoint(Path(CHECKPOINT), checkpoint)

    return do


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.fc.weight"] = torch.zeros(2, 9)


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        name: what is wrong.
        line: the command line.
        spoil: what makes it wrong.
        message: what the line must contain: the thing, the rule, the way out.
        leaves: a new folder that may stay, where the fault shows only after training has begun.
    """

    name: str
    line: list[str]
    message: list[str]
    spoil: Spoil = lambda: None
    leaves: str = ""


CLASSIFY = [*TRAIN, "--model-args", SMALL, "--data"]
SEGMENT = [*TRAIN, "--task", "segment", "--input-size", "24x32", "--data"]
RESUME = [*TRAIN, "--model-args", SMALL, "--data", "pics", "--out", "run", "--resume", "auto"]
EVAL = ["eval", "run", *QUICK]
PREDICT = ["predict", "run", "pics", "--out", "new", *QUICK]
WEIGHTS, CONFIG = "run/model/model.safetensors", "run/model/config.json"

CASES = [
    # Options.
    Case(
        "unknown option", ["predict", "run", "pics", "--tpo", "3"], ["unknown option '--tpo'", "did you mean '--top'?"]
    ),
    Case("value of another kind", [*PREDICT, "--top", "many"], ["top must be a whole number, got 'many'"]),
    Case("value out of bounds", [*PREDICT, "--overlay-opacity", "2"], ["overlay_opacity must be at most 1, got 2"]),
    Case("unknown choice", [*PREDICT, "--device", "cuba"], ["device 'cuba' is not one of", "did you mean 'cuda'?"]),
    Case("no GPU", [*PREDICT, "--device", "cuda"], ["torch sees no CUDA GPU", "use --device cpu"]),
    Case("option of doctor", ["doctor", "--jsn"], ["unknown option '--jsn'", "did you mean '--json'?"]),
    # Data.
    Case(
        "missing data", [*CLASSIFY, "pcis"], ["'pcis' does not exist", "folder, .zip or .csv", "did you mean 'pics'?"]
    ),
    Case(
        "data of the other task",
        [*CLASSIFY, "scenes", "--task", "classify"],
        ["'scenes' has a class for each pixel", "the task segment"],
    ),
    Case(
        "images and masks to classify",
        [*CLASSIFY, "street", "--task", "classify"],
        ["street: ", "'images' and 'masks' are images and their masks", "the task is segment (--task segment)"],
    ),
    Case(
        "images and masks, but no pair of them",
        [*CLASSIFY, "street/train"],
        ["street/train: ", "'images' and 'masks' are images and their masks", "the task is segment (--task segment)"],
        both(
            *(lambda n=n: Path(f"street/train/masks/{n}.png").rename(f"street/train/masks/m{n}.png") for n in range(3))
        ),
    ),
    Case(
        "class folder instead of the folder around it",
        [*CLASSIFY, "pics/train/cat"],
        ["pics/train/cat: it holds images", "but no class folders", "Did you mean the folder around it, 'pics/train'?"],
    ),
    Case(
        "splits of other names",
        [*CLASSIFY, "pics"],
        ["pics: the folders 'A', 'B' hold the same folders, 'cat', 'dog'", "call the folders around them train, val"],
        both(lambda: Path("pics/train").rename("pics/A"), lambda: Path("pics/val").rename("pics/B")),
    ),
    Case(
        "two classes of one look",
        [*CLASSIFY, "pics"],
        ["look alike", "differ in Unicode form only"],
        both(
            lambda: shutil.copytree("pics/train/cat", "pics/train/caf\u00e9"),
            lambda: shutil.copytree("pics/train/cat", "pics/train/cafe\u0301"),
        ),
    ),
    Case(
        "class name that is no text",
        [*CLASSIFY, "pics"],
        ["pics: the name 'train/h", "f6rse' is no valid Unicode (UTF-8)", "Rename it"],
        lambda: shutil.copytree("pics/train/cat", b"pics/train/h\xf6rse".decode(errors="surrogateescape")),
    ),
    Case("pipe as data", [*CLASSIFY, "a.zip"], ["a.zip", "it is no regular file"], lambda: os.mkfifo("a.zip")),
    Case("data that is a text", [*CLASSIFY, "notes.txt"], ["'notes.txt' is none of folder, .zip and .csv"]),
    Case("empty archive", [*CLASSIFY, "a.zip"], ["a.zip: cannot be read as a zip archive", "anew"], write("a.zip", "")),
    Case(
        "archive cut short",
        [*CLASSIFY, "a.zip"],
        ["a.zip: cannot be read as a zip archive", "Make or download it anew"],
        both(archive("a.zip", "pics"), cut("a.zip")),
    ),
    Case(
        "unsafe name in an archive",
        [*CLASSIFY, "a.zip"],
        ["a.zip: unsafe name '../up.png'", "must be relative", "anew"],
        lambda: zipfile.ZipFile("a.zip", "w").writestr("../up.png", ""),
    ),
    Case("empty folder", [*CLASSIFY, "bare"], ["bare: no images found", "Expected"], lambda: Path("bare").mkdir()),
    Case(
        "a zip inside a zip",
        [*CLASSIFY, "outer.zip"],
        ["outer.zip: ", "'pics/train/cat/more.zip' is an archive inside", "Unpack it"],
        both(archive("pics/train/cat/more.zip", "notes.txt"), archive("outer.zip", "pics")),
    ),
    Case(
        "class that a split lacks",
        [*CLASSIFY, "pics"],
        ["pics: split 'val' has no folder for class 'dog'", "Every split needs every class", "add images or remove"],
        remove("pics/val/dog"),
    ),
    Case(
        "class folder without images",
        [*CLASSIFY, "pics"],
        ["class folder 'val/dog' holds no image", "Fill it or remove it"],
        both(remove("pics/val/dog"), lambda: Path("pics/val/dog").mkdir()),
    ),
    Case(
        "empty split",
        [*CLASSIFY, "pics"],
        ["split 'val' has no folder for class 'cat'", "add images"],
        both(remove("pics/val"), lambda: Path("pics/val").mkdir()),
    ),
    Case(
        "only one class",
        [*CLASSIFY, "pics"],
        ["only one class, 'cat'", "needs two or more"],
        both(remove("pics/val/dog"), remove("pics/train/dog")),
    ),
    Case(
        "too few images to hold some out",
        [*CLASSIFY, "pics/train"],
        ["class 'cat' has 2 image(s), too few to give train, val, test one each", "Add images"],
        remove("pics/train/cat/2.png"),
    ),
    Case(
        "split that is not there",
        ["eval", "run", "--split", "test", *QUICK],
        ["pics: ", "no split 'test'", "Choose one of these"],
        remove("pics/train"),
    ),
    Case(
        "image that is none",
        [*CLASSIFY, "pics"],
        ["'train/cat/1.png': the file cannot be read as an image (it is a web page)", "Replace or remove"],
        write("pics/train/cat/1.png", "<!DOCTYPE html>"),
        leaves="new",
    ),
    Case(
        "image cut short",
        [*CLASSIFY, "pics"],
        ["'val/dog/2.png': the file cannot be read as an image", "Replace or remove"],
        cut("pics/val/dog/2.png"),
        leaves="new",
    ),
    Case(
        "image in a format that is not read",
        [*CLASSIFY, "pics"],
        ["'train/cat/9.HEIC' looks like an image, but .heic files are not read", "Convert it, or move it elsewhere"],
        write("pics/train/cat/9.HEIC", ""),
    ),
    # Masks.
    Case(
        "image without mask",
        [*SEGMENT, "street"],
        ["street: ", "'train/images/1.png'", "mask"],
        remove("street/train/masks/1.png"),
    ),
    Case(
        "mask of an unknown value",
        [*SEGMENT, "street", "--classes", '["sky","road"]'],
        ["'train/masks/1.png'", "5"],
        mask([5]),
        leaves="new",
    ),
    Case(
        "mask of another size",
        [*SEGMENT, "street", "--classes", '["sky","road"]'],
        ["'train/masks/1.png'", "size"],
        mask(shape=(20, 32)),
        leaves="new",
    ),
    Case(
        "mask in colour",
        [*SEGMENT, "street", "--classes", '["sky","road"]'],
        ["'train/masks/1.png'", "its mode is RGB; a mask has one channel", "save it as a grey or palette PNG"],
        mask(shape=(24, 32, 3)),
        leaves="new",
    ),
    Case(
        "mask that is empty",
        [*SEGMENT, "street", "--classes", '["sky","road"]'],
        ["'train/masks/1.png': the file cannot be read as an image (it is empty)", "Replace or remove"],
        write("street/train/masks/1.png", ""),
        leaves="new",
    ),
    Case(
        "classes from a missing file",
        [*SEGMENT, "street", "--classes", "names.txt"],
        ["names.txt: the file of class names cannot be read (No such file"],
    ),
    Case("folders of classes to segment", [*SEGMENT, "pics"], ["pics: ", "images", "masks"]),
    # Runs of another version or kind.
    Case(
        "options of another version",
        EVAL,
        ["run/config.yaml", "unknown option 'warp'", "another version"],
        write("run/config.yaml", "model: pce_nano\ndata: pics\nwarp: 9\n"),
    ),
    Case(
        "options of another version to go on with",
        RESUME,
        ["run/config.yaml", "unknown option 'warp'", "another version"],
        both(remove("run/metrics.json"), write("run/config.yaml", "model: pce_nano\nwarp: 9\n")),
    ),
    Case(
        "options of another version as --config",
        ["train", "--config", "run/config.yaml"],
        ["unknown option 'warp' in the --config file"],
        write("run/config.yaml", "model: pce_nano\nwarp: 9\n"),
    ),
    Case("options that are no mapping", EVAL, ["run/config.yaml is damaged"], write("run/config.yaml", "- 1\n")),
    Case("options that are binary", EVAL, ["run/config.yaml is damaged"], write("run/config.yaml", b"\xff\x00\x9f")),
    Case(
        "run of other options",
        [*RESUME, "--lr", "0.5"],
        ["run was started with other options (lr 0.003 -> 0.5)", "choose another folder with --out"],
    ),
    Case(
        "checkpoint that is none",
        [*CLASSIFY, "pics", "--resume", "notes.txt"],
        ["notes.txt is no checkpoint of pcenet train, which is a folder", "give the path of an intact checkpoint"],
    ),
    Case(
        "folder that is no checkpoint",
        [*CLASSIFY, "pics", "--resume", "pics"],
        ["pics is damaged: manifest.json is missing", "give the path of an intact checkpoint"],
    ),
    Case(
        "checkpoint cut short",
        [*CLASSIFY, "pics", "--resume", "cut"],
        ["cut is damaged: state.ckpt has", "give the path of an intact checkpoint"],
        both(lambda: shutil.copytree(CHECKPOINT, "cut"), cut("cut/state.ckpt")),
    ),
    Case(
        "checkpoint of another shape",
        RESUME,
        [CHECKPOINT, "tensor head.fc.weight has shape (2, 9), expected (2, 8)", "start afresh in another folder"],
        change_checkpoint(lambda content: widen(content["averaged"])),
    ),
    Case(
        "checkpoint that lacks a tensor",
        RESUME,
        [CHECKPOINT, "tensor head.fc.bias is missing", "start afresh in another folder"],
        change_checkpoint(lambda content: content["averaged"].pop("head.fc.bias")),
    ),
    # Models.
    Case("no model", ["predict", "pics", "pics"], ["run: pics is no run folder or model folder"]),
    Case("empty weights", PREDICT, [WEIGHTS, "no safetensors file, or a broken one"], write(WEIGHTS, "")),
    Case("weights cut short", PREDICT, [WEIGHTS, "no safetensors file, or a broken one"], cut(WEIGHTS)),
    Case("weights that are a text", EVAL, [WEIGHTS, "no safetensors file"], write(WEIGHTS, "weights, honestly")),
    Case("missing weights", EVAL, ["run/model holds no model.safetensors", "give a folder"], remove(WEIGHTS)),
    Case(
        "weights of another shape",
        PREDICT,
        [WEIGHTS, "does not fit", "tensor head.fc.weight has shape (2, 9), expected (2, 8)"],
        change_tensors(lambda tensors: tensors.update({"head.fc.weight": torch.zeros(2, 9)})),
    ),
    Case(
        "weights that lack a tensor",
        EVAL,
        [WEIGHTS, "does not fit", "tensor head.fc.bias is missing"],
        change_tensors(lambda tensors: tensors.pop("head.fc.bias")),
    ),
    Case(
        "weights with a foreign tensor",
        EVAL,
        [WEIGHTS, "does not fit", "tensor extra is not part of the network"],
        change_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
    ),
    Case(
        "weights that are not finite",
        PREDICT,
        ["run: ", "not finite", "train it anew"],
        change_tensors(lambda tensors: tensors["head.fc.bias"].fill_(torch.nan)),
    ),
    Case("configuration that is no JSON", PREDICT, [CONFIG, "no configuration of a PCE network"], write(CONFIG, "{")),
    Case(
        "network of another package",
        PREDICT,
        [CONFIG, "architecture 'resnet50' is not a network of this package"],
        change_json(CONFIG, architecture="resnet50"),
    ),
    Case(
        "argument of another version",
        EVAL,
        [CONFIG, "no configuration of a PCE network", "warp"],
        change_json(CONFIG, model_args={"warp": 9}),
    ),
    Case(
        "fewer names than classes",
        PREDICT,
        [CONFIG, "label_names must be 2 names, one per class, got ['cat']"],
        change_json(CONFIG, label_names=["cat"]),
    ),
    Case(
        "other classes",
        [*EVAL, "--data", "pics"],
        ["classes of pics are not those of run", "only in run: dog; only in pics: emu"],
        both(
            *(lambda split=split: Path(f"pics/{split}/dog").rename(f"pics/{split}/emu") for split in ("train", "val"))
        ),
    ),
    # Where results go.
    Case(
        "run folder that exists", [*CLASSIFY, "pics", "--out", "run"], ["run exists and is never overwritten", "--out"]
    ),
    Case("run folder that is a file", [*CLASSIFY, "pics", "--out", "notes.txt"], ["notes.txt exists", "with --out"]),
    Case(
        "run folder below a file", [*CLASSIFY, "pics", "--out", "notes.txt/run"], ["notes.txt", "choose another path"]
    ),
    Case("results in a file", [*EVAL, "--out", "notes.txt"], ["notes.txt", "exists", "choose another path"]),
    Case("results in a folder that is used", [*PREDICT[: -len(QUICK) - 1], "pics"], ["pics exists and is never"]),
    # Inputs of predict.
    Case("missing input", ["predict", "run", "pisc"], ["inputs: 'pisc' does not exist", "did you mean 'pics'?"]),
    Case(
        "input without images",
        ["predict", "run", "bare"],
        ["inputs: no image file in bare", "give files, or folders"],
        lambda: Path("bare").mkdir(),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_one_line_exit_2_and_harms_nothing(
    case: Case, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.spoil()
    before = digest(here)
    capsys.readouterr()
    assert main(case.line) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: ")
    assert error.count("\n") == 1
    for part in case.message:
        assert part in error
    after = digest(here)
    new = {name for name in after if name not in before}
    assert {name: after.get(name) for name in before} == before
    assert {name.partition("/")[0] for name in new} <= {case.leaves}


def test_the_good_input_is_good(here: Path) -> None:
    """The cases above fail for the reason that they give alone."""
    assert main([*CLASSIFY, "pics"]) == 0
    shutil.rmtree("new")
    assert main([*SEGMENT, "street", "--classes", '["sky","road"]']) == 0
    shutil.rmtree("new")
    assert main(RESUME) == main(EVAL) == main(PREDICT) == 0


WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]
MANY = """
import contextlib, io, json, sys
from pcenet.cli import main
from pcenet.training.checkpoints import write_checkpoint
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        code = main(line)
    print(json.dumps([code, error.getvalue()]))
"""


@pytest.fixture
def unprivileged() -> list[str]:
    """What to put before a command so that permissions hold for it: they do not for root, who can give this up."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not hold for root, and setpriv is missing")
    return WITHOUT_PRIVILEGES


@pytest.mark.slow
def test_files_that_may_not_be_read_or_written(here: Path, unprivileged: list[str]) -> None:
    shutil.copytree("run", "other")
    shutil.copytree("pics", "locked")
    shutil.copytree("pics", "open")
    for name in ("pics/train/cat/1.png", "notes.txt"):  # links to the good input's files, whose permissions must stay
        content = Path(name).read_bytes()
        write(name, content)()
    before = digest(here)
    state = "other/checkpoints/step-00000001/state.ckpt"
    no_entry = {"pics/train/cat/1.png": 0, "other/model/model.safetensors": 0, "other/config.yaml": 0, "notes.txt": 0}
    no_entry[state] = 0
    for name, mode in (no_entry | {"locked/val": 0, ".": 0o555}).items():
        Path(name).chmod(mode)
    lines = {
        "image": [*CLASSIFY, "pics", "--out", "run/image"],
        "folder": [*CLASSIFY, "locked", "--out", "run/new"],
        "weights": ["predict", "other/model", "notes.txt", "--out", "run/new", *QUICK],
        "options": ["eval", "other", *QUICK],
        "checkpoint": [*CLASSIFY, "open", "--out", "run/new", "--resume", "other/checkpoints/step-00000001"],
        "results": ["predict", "run", "pics/val", "--out", "new", *QUICK],
        "input": ["predict", "run", "notes.txt", "--out", "run/out", *QUICK],
    }
    command = [*unprivileged, sys.executable, "-c", MANY, json.dumps(list(lines.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for name in ("locked/val", ".", *no_entry):
        Path(name).chmod(0o755)
    assert done.returncode == 0, done.stderr
    found = dict(zip(lines, (json.loads(line) for line in done.stdout.splitlines()), strict=True))
    denied = "Permission denied"
    for name, code, parts in (
        ("image", 2, ["pics/train/cat/1.png: the file cannot be read", denied]),
        ("folder", 2, ["the folder 'val' cannot be read", denied]),
        ("weights", 2, ["other/model/model.safetensors", denied, "allow it to be read"]),
        ("options", 2, ["other/config.yaml", denied, "allow it to be read"]),
        ("checkpoint", 2, ["other/checkpoints/step-00000001", "state.ckpt cannot be read", denied]),
        ("results", 2, ["new", denied, "choose another path"]),
        ("input", 1, ["none of 1 files could be predicted"]),
    ):
        assert found[name][0] == code, (name, found[name])
        assert found[name][1].startswith("pcenet: error: ")
        assert found[name][1].count("\n") == 1
        for part in parts:
            assert part in found[name][1]
    assert denied in Path("run/out/predictions.json").read_text()
    after = digest(here)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.slow
def test_the_program_itself(here: Path) -> None:
    write(WEIGHTS, "weights, honestly")()
    done = subprocess.run([sys.executable, "-m", "pcenet", *PREDICT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pcenet: error: {WEIGHTS} is no safetensors file")
    assert done.stderr.count("\n") == 1
