"""``pcenet export`` from its options to the file: the order in which everything happens."""

from __future__ import annotations

import io
import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcenet
from pcenet.exporting.checks import CheckReport, check_runner, list_names, sent_to_one
from pcenet.exporting.config import ExportConfig
from pcenet.exporting.evaluation import evaluation_form, trace
from pcenet.exporting.files import EXTRA, METADATA, ExportedNet, Runner, output_names, require, run_with
from pcenet.exporting.multiply_adds import count_multiply_adds
from pcenet.exporting.quantising import quantise
from pcenet.models import SavableModel, complexity, load_model
from pcenet.models.preprocessing import image_size, preprocessing
from pcenet.nn import record_routing, routers_of
from pcenet.runs.finding import find_model
from pcenet.runtime.device import set_threads
from pcenet.texts import say
from pcenet.writing import filling

BATCHES = (1, 2, 7)
MULTIPLE_OF_DENSE = 32  # the stride of most networks' last maps


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the file.
        report: what the comparison with the network found.
        metadata: what the file carries.
    """

    path: Path
    report: CheckReport
    metadata: dict[str, Any]


def export(config: ExportConfig) -> Export:
    """Write a trained network to a file, compare both, and keep the file only if they are equal.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if the file exists, the network cannot be exported, or the file does not compute what it does.
        ModuleNotFoundError: for ONNX without the packages that it needs.
    """
    set_threads(config.threads)
    if config.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package)
    folder, _ = find_model(config.run)
    model = load_dropless(folder)
    path = Path(config.out or f"{model.pretrained_cfg['architecture'].replace(':', '-')}.{config.format}")
    if path.exists():
        raise ValueError(f"out: {path} exists and is never overwritten; choose another name with --out")
    if path.suffix != f".{config.format}":
        raise ValueError(f"out: {path} must end in .{config.format}")
    if config.format == "pt2" and "size" in config.open_axes and any(True for _ in routers_of(model)):
        raise ValueError(
            "dynamic: the size cannot be open in a program (pt2) with PCE layers, for torch.export then makes one that "
            "refuses a batch of one; give --format onnx, or --dynamic batch"
        )
    subject = Subject(model, config)
    with filling(path.parent) as place:
        file = place / path.name
        try:
            subject.write(file)
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"run: {subject.metadata['architecture']} cannot be exported: {reason}") from error
        report = subject.check(file)
        if report.verdict is not None:
            raise ValueError(f"{path} was written and deleted: {report.verdict}")
        show(path, report)
        if config.int8:
            assert config.data is not None
            int8 = quantise(file, config.run, config.data, config.split, config.threads)
            say(f"int8: {int8.score} {int8.before:.2%} before, {int8.after:.2%} after, on {int8.data}, {int8.split}")
    if config.format == "onnx" and not config.int8:
        show_cost(path, subject)
    say(f"wrote {path}")
    return Export(path, report, subject.metadata)


def load_dropless(folder: Path) -> SavableModel:
    """The network of a folder, which drops nothing at evaluation; it says so where the one that was saved did."""
    model = load_model(folder)
    factor = model.model_args.get("eval_capacity_factor")
    if factor is not None:
        say(f"eval_capacity_factor={factor} is left out: an exported network drops nothing")
        model = load_model(folder, eval_capacity_factor=None)
    return model


class Subject:
    """A network, and how it is exported.

    Args:
        model: in evaluation mode, in float32.
        config: the options.
    """

    def __init__(self, model: SavableModel, config: ExportConfig) -> None:
        self.model, self.config = model, config
        self.size = image_size(model)
        self.open_batch, self.open_size = "batch" in config.open_axes, "size" in config.open_axes
        batch = 2 if self.open_batch else 1
        self.example = torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(0))
        form = evaluation_form(model, self.example)
        routed = [name for name, _ in routers_of(model)] if config.routing else []
        self.form = WithRouting(form).eval() if routed else form
        self.multiple = size_multiple(model, self.size) if self.open_size else None
        values = preprocessing(model)
        self.metadata: dict[str, Any] = {
            "architecture": model.pretrained_cfg["architecture"],
            "task": model.task,
            "num_classes": model.num_classes,
            "class_names": model.class_names,
            "grey_range": None if model.grey_range is None else list(model.grey_range),
            "mask_values": model.mask_values,
            "input_size": list(values["input_size"]),
            "preprocessing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in values.items()
                if name in ("input_size", "interpolation", "crop_pct", "mean", "std")
            }
            | {"architecture": model.pretrained_cfg["architecture"]},
            "outputs": output_names(routed),
            "fixed_batch": not self.open_batch,
            "size_multiple": self.multiple,
            "versions": {"pcenet": pcenet.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def write(self, path: Path) -> None:
        """Write the file."""
        shapes: dict[int, Any] = {0: torch.export.Dim("batch")} if self.open_batch else {}
        example = self.example
        if self.multiple is not None:
            shapes |= {axis: self.multiple * torch.export.Dim(name) for axis, name in ((2, "rows"), (3, "columns"))}
            # What is 1 somewhere in the example would be taken for always 1.
            example = F.pad(example, (0, 2 * self.multiple, 0, self.multiple))
        if self.config.format == "onnx":
            # Imported here: it needs the extra.
            import onnx_ir

            from pcenet.exporting.onnx_writing import to_onnx

            self.metadata["versions"]["onnx"] = version("onnx")
            carried = {METADATA: json.dumps(self.metadata), "class_names": json.dumps(self.metadata["class_names"])}
            model = to_onnx(
                self.form,
                example,
                dynamic_shapes=shapes,
                output_names=self.metadata["outputs"],
                metadata=carried,
            )
            onnx_ir.save(model, path)
            return
        program = trace(self.form, example, shapes)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={EXTRA: json.dumps(self.metadata)})
        path.write_bytes(content.getvalue())

    def check(self, path: Path) -> CheckReport:
        """Compare the file with the network: as it routes, and with all patches sent to one expert."""
        report = CheckReport()
        ours = ExportedNet(path, self.config.threads, trust_code=True)  # it was written just now
        sizes = [self.size]
        if self.multiple is not None:
            sizes.append((self.size[0] + self.multiple, self.size[1] + 2 * self.multiple))
        check_runner(report, self.model, ours.outputs, BATCHES, sizes, "as routed,")
        if any(True for _ in routers_of(self.model)):
            batch = BATCHES[-1:] if self.open_batch else (1,)
            for expert, name in ((0, "first"), (-1, "last")):
                forced, run = sent_to_one(self.model, expert), self._sent_to_one(path, expert)
                check_runner(report, forced, run, batch, sizes[:1], f"all to the {name} expert,")
        return report

    def _sent_to_one(self, path: Path, expert: int) -> Runner:
        """The file, its routers changed as by `sent_to_one`."""
        own, forced = self.form.state_dict(), sent_to_one(self.form, expert).state_dict()
        raised = {name: tensor for name, tensor in forced.items() if not torch.equal(tensor, own[name])}
        return run_with(path, raised, trust_code=True)


class WithRouting(nn.Module):
    """A network in evaluation form that also gives its routing.

    Args:
        form: the network.
    """

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images ``[B, C, H, W]`` to logits, then for each layer experts and gate values ``[B, rows, columns]`` (with a
        further axis of k where there are several)."""
        with record_routing(self.form) as records:
            outputs: list[Tensor] = [self.form(x)]
        for name, _ in routers_of(self.form):
            for routing in records[name]:
                shape = (*routing.grid, *([] if routing.top_k == 1 else [routing.top_k]))
                outputs += [routing.expert_ids.view(shape), routing.gates.view(shape)]
        return tuple(outputs)


def size_multiple(model: nn.Module, size: tuple[int, int]) -> int:
    """What the sides of images have to be multiples of for every layer's patches to divide its map.

    Args:
        model: the network.
        size: an image's height and width that it takes.

    Raises:
        ValueError: if those are no such multiples themselves.
    """
    multiple = math.gcd(MULTIPLE_OF_DENSE, *size)
    with torch.no_grad(), record_routing(model) as records:
        model(torch.zeros(1, 3, *size))
    for name, _ in routers_of(model):
        multiple = math.lcm(multiple, -(-size[0] // records[name][0].grid.rows))
    if any(side % multiple for side in size):
        raise ValueError(
            f"dynamic size: patches do not divide the maps of images of {size[0]} x {size[1]} px, whose sides would "
            f"have to be multiples of {multiple}; leave size out"
        )
    return multiple


def show(path: Path, report: CheckReport) -> None:
    """Print what the comparison found."""
    say(
        f"passed: {path} computes what the network does; {report.samples} images, logits within"
        f" {report.largest_difference:.1e} (docs/export.md says what is compared)"
    )
    if report.excused:
        say(f"left out, since rounding may decide who serves a patch of them: {list_names(report.excused)}")


def show_cost(path: Path, subject: Subject) -> None:
    """Print the multiply-adds in the graph beside what they should be."""
    cost = complexity(subject.model, (3, *subject.size))
    counted = count_multiply_adds(path, subject.example[:1])
    experts = max((router.num_experts for _, router in routers_of(subject.model)), default=1)
    top_k = min((router.top_k for _, router in routers_of(subject.model)), default=1)
    everywhere = cost.multiply_adds + cost.routed_multiply_adds * (experts / top_k - 1)
    say(f"multiply-adds of one image, counted in the graph: {counted.total / 1e6:.1f} M")
    say(f"the network's, as direct convolutions: {cost.multiply_adds / 1e6:.1f} M")
    if experts > 1:
        say(f"if every expert ran on every patch: {everywhere / 1e6:.1f} M")
