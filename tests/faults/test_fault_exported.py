"""Exported files from strangers: a program runs on the user's word alone, and a graph costs no more than its error."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.test_fault_hostile import Attack
from PIL import Image
from torch import Tensor, nn

from pcenet.cli import main
from pcenet.exporting.files import ExportedNet, run_with

METADATA: dict[str, Any] = {
    "architecture": "pce_nano",
    "task": "classify",
    "num_classes": 3,
    "class_names": ["a", "b", "c"],
    "input_size": [3, 8, 8],
    "preprocessing": {
        "input_size": [3, 8, 8],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "architecture": "pce_nano",
    },
    "outputs": ["logits"],
    "fixed_batch": False,
    "size_multiple": None,
    "versions": {},
}


class Means(nn.Module):
    """The mean of each channel, three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good .pt2 file."""
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    program = torch.export.export(
        Means(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    torch.export.save(program, str(path), extra_files={"metadata.json": json.dumps(METADATA)})
    return path


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((8, 8, 3), (10, 20, 200), dtype=np.uint8)).save(path)
    return str(path)


def with_attack(program: Path, member: str, sentinel: Path, out: Path) -> None:
    """The archive with a pickle in place of one of its members."""
    buffer = io.BytesIO()
    torch.save((Attack(sentinel),), buffer)
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        found = [name for name in old.namelist() if name.endswith(member)]
        assert len(found) == 1
        for name in old.namelist():
            new.writestr(name, buffer.getvalue() if name in found else old.read(name))


MEMBERS = ["data/sample_inputs/model.pt", "data/weights/weight_0", "models/model.json", "extra/metadata.json"]
REFUSED = r"is a program, and reading it runs the code in it: give --trust-code \(trust_code=True in Python\)"


@pytest.mark.faults("a .pt2 file that runs code")
@pytest.mark.parametrize("member", MEMBERS)
def test_a_program_is_not_read_unless_it_is_trusted(
    program: Path, tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str], member: str
) -> None:
    sentinel, evil = tmp_path / "was here", tmp_path / "evil.pt2"
    with_attack(program, member, sentinel, evil)
    assert main(["predict", str(evil), picture, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(REFUSED, error)
    assert error.count("\n") == 1
    for read in (lambda: ExportedNet(evil), lambda: run_with(evil, {})):
        with pytest.raises(ValueError, match=REFUSED):
            read()
    assert not sentinel.exists()


@pytest.mark.faults("a .pt2 file that runs code")
def test_a_program_that_is_trusted_runs(program: Path, tmp_path: Path, picture: str) -> None:
    """The good one predicts; of the evil one it shows that nothing but the refusal keeps it out."""
    out = tmp_path / "out"
    assert main(["predict", str(program), picture, "--out", str(out), "--trust-code"]) == 0
    assert json.loads((out / "predictions.json").read_text())["predictions"][0]["label"] == "c"
    with_attack(program, MEMBERS[0], tmp_path / "was here", tmp_path / "evil.pt2")
    main(["predict", str(tmp_path / "evil.pt2"), picture, "--out", str(tmp_path / "out-2"), "--trust-code"])
    assert (tmp_path / "was here").exists()


@pytest.mark.faults("a .pt2 file that runs code")
@pytest.mark.parametrize("command", ["eval", "export", "explain", "app", "push", "train --init"])
def test_other_commands_take_no_program(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    sentinel, evil = tmp_path / "was here", tmp_path / "evil.pt2"
    with_attack(program, MEMBERS[0], sentinel, evil)
    arguments = [*command.split(), str(evil), *(["--data", "digits"] if command in ("eval", "train --init") else [])]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not sentinel.exists()


# ONNX: a graph with metadata.


def graph(path: Path, metadata: Any = METADATA, rows: int = 1, classes: int = 3) -> Path:
    """The mean of each channel, to which the mean of ``rows`` x 1024 ones is added, of which so many are made."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    shape = helper.make_tensor("shape", kind.INT64, [2], [rows, 1024])
    one = helper.make_tensor("one", kind.FLOAT, [1], [1.0])
    kept = helper.make_tensor("kept", kind.INT64, [classes], list(range(classes)))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=one),
        helper.make_node("ReduceMean", ["ones"], ["mean"], keepdims=0),
        helper.make_node("ReduceMean", ["images"], ["channels"], axes=[2, 3], keepdims=0),
        helper.make_node("Gather", ["channels", "kept"], ["some"], axis=1),
        helper.make_node("Add", ["some", "mean"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", kind.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", kind.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [images], [logits], [shape, kept]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    helper.set_model_props(model, {"pcenet": text})
    onnx.save(model, str(path))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return METADATA | changes


def prepared(**changes: Any) -> dict[str, Any]:
    return METADATA | {"preprocessing": METADATA["preprocessing"] | changes}


WRONG: dict[str, tuple[Any, str]] = {
    "class names that are a number": (changed(class_names=5), "class_names must be 3 names, one per class, got 5"),
    "class names that are numbers": (changed(class_names=[1, 2, 3]), "class_names must be 3 names"),
    "fewer class names than classes": (changed(class_names=["a"]), "class_names must be 3 names"),
    "one name for two classes": (changed(class_names=["a", "b", "a"]), "'a' stands for the classes 0 and 2"),
    "a class name of 5 MB": (changed(class_names=["a", "b", "c" * 5_000_000]), "a text of 5000000 characters"),
    "no class at all": (changed(class_names=None, num_classes=0), "has no classifier (num_classes is 0)"),
    "a billion classes": (
        changed(class_names=None, num_classes=10**9),
        "num_classes 1000000000 must be a whole number",
    ),
    "no classes but a text": (changed(num_classes="3"), "num_classes '3' must be a whole number"),
    "another task": (changed(task="dream"), "task 'dream' is not one of classify, segment"),
    "a task that is a list": (changed(task=["classify"]), "task ['classify'] is not one of"),
    "multiples of 0": (changed(size_multiple=0), "size_multiple 0 must be a whole number"),
    "multiples of a text": (changed(size_multiple="a"), "size_multiple 'a' must be a whole number"),
    "images of 30,000 x 30,000 px": (prepared(input_size=[3, 30000, 30000]), "pixels at most"),
    "images of two numbers": (changed(input_size=[3, 8]), "input_size [3, 8] must be three whole numbers"),
    "images of a negative size": (changed(input_size=[3, -8, -8]), "must be three whole numbers"),
    "a deviation of 0": (prepared(std=[0.5, 0, 0.5]), "must be numbers above 0"),
    "a mean of two channels": (prepared(mean=[0.5, 0.5]), "mean of the network is for 2 channels"),
    "a mean of text": (prepared(mean="grey"), "mean 'grey' must be a list of numbers"),
    "outputs that are a number": (changed(outputs=5), "outputs 5 must be names"),
    "a batch that is a text": (changed(fixed_batch="yes"), "fixed_batch 'yes' must be true or false"),
    "a number that is none": ('{"num_classes": NaN}', "NaN is no number of JSON"),
    "an infinite number": ('{"num_classes": 1e999}', "num_classes inf must be a number up to"),
    "100,000 lists in each other": ("[" * 100_000, "nested deeper than 20 levels"),
    "30 lists in each other": ('{"outputs": ' + "[" * 30 + "]" * 30 + "}", "nested deeper than 20 levels"),
    "no mapping": ("[]", "it must be a mapping"),
    "no JSON": ("{", "it does not carry what pcenet export writes"),
    "nothing but a task": ('{"task": "classify"}', "'class_names' is missing"),
}


@pytest.mark.faults("ONNX: metadata that break their rules")
@pytest.mark.parametrize("case", WRONG)
def test_what_a_graph_says_of_itself_is_checked(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    metadata, message = WRONG[case]
    path = graph(tmp_path / "net.onnx", metadata)
    assert main(["predict", str(path), picture, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert not (tmp_path / "out" / "predictions.csv").exists()


GRAPHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "4 TB": (lambda path: graph(path, rows=10**9), "it cannot be computed: [ONNXRuntimeError]"),
    "other logits than promised": (lambda path: graph(path, classes=2), "(1, 2), not the logits (1, 3)"),
    "logits of an image where there should be a map's": (
        lambda path: graph(path, changed(task="segment")),
        "(1, 3), not the logits (1, 3, 8, 8)",
    ),
    "images of another size": (
        lambda path: graph(path, prepared(input_size=[3, 16, 16]) | {"input_size": [3, 16, 16]}),
        "it cannot be computed: [ONNXRuntimeError]",
    ),
}


@pytest.mark.faults("ONNX: a graph that computes something else, or too much")
@pytest.mark.parametrize("case", GRAPHS)
def test_what_a_graph_computes_is_checked(
    tmp_path: Path, picture: str, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    make, message = GRAPHS[case]
    path = make(tmp_path / "net.onnx")
    assert main(["predict", str(path), picture, "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.faults("ONNX: a graph that computes something else, or too much")
def test_a_good_graph_is_computed(tmp_path: Path, picture: str) -> None:
    path = graph(tmp_path / "net.onnx")
    assert main(["predict", str(path), picture, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"][0]["label"] == "c"
