"""``pcenet explain`` from its options to its files: the order in which everything happens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from pcenet.analysis import observe
from pcenet.analysis.agreement import VIEWS, Pixels
from pcenet.analysis.effects import Targets, standard_interventions, tallies
from pcenet.catalogue import bundled
from pcenet.choices import GreyRange
from pcenet.data import first_images
from pcenet.data.base import DataError
from pcenet.data.loaders import naming_dead_workers
from pcenet.explanation.config import ExplainConfig
from pcenet.explanation.drawing import Shown, draw
from pcenet.explanation.findings import points, row_label, summary
from pcenet.explanation.page import page
from pcenet.explanation.report import Report, intervention_report, twin_report, whole_report
from pcenet.explanation.study import study
from pcenet.inference.inputs import InputFile, find_inputs
from pcenet.inference.outputs import output_folder
from pcenet.models import SavableModel, twin_of
from pcenet.models.preprocessing import cost_of, preprocessing
from pcenet.nn import routers_of
from pcenet.reporting.numbers import in_prose, share_text
from pcenet.reporting.plots import Row, layers_of, new_figure
from pcenet.reporting.tables import console
from pcenet.runs.folder import RunFolder
from pcenet.runs.records import read_rows
from pcenet.runtime.device import (
    autocast,
    resolve_device,
    resolve_precision,
    resolve_workers,
    set_precision,
    set_threads,
)
from pcenet.tasks.evaluation import Trained, eval_batch_size, open_trained
from pcenet.tasks.pixels import upsample
from pcenet.texts import say
from pcenet.writing import filling, write_json, write_text

log = logging.getLogger(__name__)

PAGE, NUMBERS, FIGURES = "explain.html", "explain.json", "figures"


@naming_dead_workers()
def explain(config: ExplainConfig) -> Path:
    """Look at what a network's experts do; write the page, its figures and its numbers.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if the network is dense, its data is unknown or of other classes, or the folder is in use.
        ModuleNotFoundError: without matplotlib or jinja2.
    """
    set_threads(config.threads)
    new_figure(1, 1)  # where matplotlib is missing, that shows now and not after the work
    folder = output_folder(config.out, "explanation")
    work = Work(config, open_trained(config.of(config.run)))
    trained = work.trained
    if not any(routers_of(trained.model)):
        raise ValueError(
            f"run: {config.run} is a dense network ({trained.model.pretrained_cfg['architecture']}): nothing is routed "
            "in it, so there are no experts to explain; give a network with PCE layers, or measure it with pcenet eval"
        )
    given = _given(config.images, trained.model.grey_range, config.shown)
    found = study(
        trained.model,
        work.batches(trained, work.source, "counting"),
        len(work.classes),
        work.pixels,
        work.forward,
    )
    history = history_of(trained.run)
    about = {
        "run": config.run,
        "model": trained.model.pretrained_cfg["architecture"],
        "data": trained.source.name,
        "split": config.split,
        "seed": config.seed,
        "precision": work.precision,
        "views": [view.name for view in VIEWS],
        "cost": cost_of(trained.model),
        "history": history is not None,
        "twin": work.twin(found.tally),
        "interventions": work.interventions(list(found.layers)),
    }
    report = whole_report(
        about,
        found,
        task=trained.model.task,
        classes=work.classes,
        file_name=work.source.file_name,
        seed=config.seed,
    )
    shown = [work.of_file(file, image) for file, image in given] or list(work.of_data())
    pictures = draw(report, {name: layer.gallery for name, layer in found.layers.items()}, shown, history)
    with filling(folder) as place:
        (place / FIGURES).mkdir()
        for picture in pictures:
            (place / FIGURES / f"{picture.name}.png").write_bytes(picture.png)
        write_json(place / NUMBERS, report)
        write_text(place / PAGE, page(report, pictures, [(each.name, each.caption) for each in shown]))
    _show(report)
    say(f"wrote {folder / PAGE}")
    return folder / PAGE


class Work:
    """A network at work: what is asked of it, with the options of how.

    Args:
        config: the options.
        trained: the network and its data.

    Attributes:
        classes: class names, by class number.
        pixels: between the network's inputs and what they show.
        source: the images that are counted over.
    """

    def __init__(self, config: ExplainConfig, trained: Trained) -> None:
        self.config, self.trained = config, trained
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        set_precision(self.precision, self.device)
        values = preprocessing(trained.model)
        self.classes = list(trained.source.classes)
        self.pixels = Pixels(values["mean"], values["std"])
        self.source = self.some(config.max_images)
        self._place(trained.model)

    def some(self, count: int | None) -> Any:
        """So many of the images; None: all."""
        source = self.trained.source
        return source if count is None or count >= len(source) else first_images(source, count, self.config.seed)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images to logits, float32."""
        with autocast(self.precision, self.device):
            logits: Tensor = model(images.to(self.device, memory_format=torch.channels_last))
        return logits.float()

    def batches(self, trained: Trained, source: Any, doing: str) -> Iterator[tuple[Tensor, Targets]]:
        """Images with their classes or masks, prepared as the network wants them; a bar on a terminal."""
        config, task = self.config, trained.model.task
        loader: Iterable[Any] = trained.task.eval_loader(
            trained.model,
            source,
            batch_size=config.batch_size or eval_batch_size(trained.model),
            workers=resolve_workers(config.workers, self.device),
        )
        shown = track(loader, doing, transient=True, disable=not sys.stdout.isatty())
        for images, targets in shown if task == "classify" else chain.from_iterable(shown):
            yield images.to(self.device), targets

    def twin(self, network: Any) -> Report | None:
        """The twin on the same images, if there is one.

        Args:
            network: the counts of the network's score.
        """
        config = self.config
        name = config.twin or _bundled_twin(config.run)
        if name is None:
            return None
        twin = open_trained(replace(config.of(name), data=self.trained.data))
        if any(routers_of(twin.model)) or twin.model.task != self.trained.model.task:
            raise ValueError(
                f"twin: {name} ({twin.model.pretrained_cfg['architecture']}) is no dense network to "
                f"{self.trained.model.task}; give the dense twin's run"
            )
        self._place(twin.model)
        batches = self.batches(twin, self.source, "the dense twin")
        counts, _ = tallies(twin.model, batches, [], len(self.classes), self.forward)
        task = self.trained.model.task
        return twin_report(task, name, counts, network, cost_of(twin.model), self.config.seed)

    def interventions(self, layers: Sequence[str]) -> Report | None:
        """What the interventions do; None where none are wanted.

        Args:
            layers: names of the layers in the order in which they run.
        """
        config, trained = self.config, self.trained
        if not config.intervention_images:
            return None
        source = self.some(min(config.intervention_images, len(self.source)))
        tried = standard_interventions(trained.model, config.seed)
        batches = self.batches(trained, source, "interventions")
        base, changed = tallies(trained.model, batches, tried, len(self.classes), self.forward)
        return intervention_report(
            trained.model.task,
            base,
            list(zip(tried, changed, strict=True)),
            classes=self.classes,
            layers=layers,
            seed=config.seed,
        )

    def of_data(self) -> Iterator[Shown]:
        """Images of the data, spread evenly over it, with their truth."""
        source, count = self.trained.source, min(self.config.shown, len(self.trained.source))
        for number in range(count):
            index = (2 * number + 1) * len(source) // (2 * count)
            name = source.file_name(index)
            if self.trained.model.task == "classify":
                yield self._shown(source.image(index), name, truth=self.classes[source.labels[index]])
            else:
                image, mask = source.sample(index)
                yield self._shown(image, name, mask=mask)

    def of_file(self, file: InputFile, image: Image.Image) -> Shown:
        """An image of the user's."""
        return self._shown(image, file.file)

    @torch.inference_mode()
    def _shown(self, image: Image.Image, name: str, truth: str | None = None, mask: Image.Image | None = None) -> Shown:
        model = self.trained.model
        inputs = self.trained.task.image_transform(self.trained.model)(image)[None]
        with observe(model) as seen:
            logits = self.forward(model, inputs)[0]
        pixels = self.pixels.of(inputs)[0]
        known = [] if truth is None else [f"It is {truth}."]
        if model.task == "classify":
            probability, best = logits.softmax(0).max(0)
            answer = f"The network says {self.classes[int(best)]} ({share_text(float(probability))})."
            return Shown(name, " ".join([*known, answer]), pixels, dict(seen))
        masks = {} if mask is None else {"truth": torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8)}
        masks = {kind: values.view(image.height, image.width) for kind, values in masks.items()}
        masks["prediction"] = upsample(logits, (pixels.shape[1], pixels.shape[2])).argmax(0)
        return Shown(name, "", pixels, dict(seen), masks)

    def _place(self, model: SavableModel) -> None:
        model.to(self.device).to(memory_format=torch.channels_last).eval()


def _bundled_twin(run: str) -> str | None:
    """The bundled weights of the twin of a bundled network."""
    data, _, network = run.partition("/")
    name = f"{data}/{twin_of(network)}"
    return name if run in bundled() and name in bundled() else None


def _given(
    paths: Sequence[str] | str | None, grey_range: GreyRange | None, most: int
) -> list[tuple[InputFile, Image.Image]]:
    """The first images that the user named, read with a range of grey values; what cannot be read is left out, and
    named.

    They are read before the work begins, which may take hours.

    Raises:
        ValueError: if there is none of that name, or none can be read.
    """
    if paths is None:
        return []
    files, left_out = find_inputs([paths] if isinstance(paths, str) else paths, grey_range)
    faults = [f"{each.file}: {each.reason}" for each in left_out]
    read: list[tuple[InputFile, Image.Image]] = []
    for file in files:
        if len(read) == most:
            break
        try:
            read.append((file, file.image()))
        except DataError as error:  # which names it
            faults.append(str(error))
    if not read:
        raise ValueError(f"images: none can be read, such as {faults[0]}")
    for fault in faults:
        log.warning("images: left out: %s", fault)
    return read


def history_of(run: RunFolder | None) -> list[Row] | None:
    """The figures of each epoch, where there are some that tell of the routers."""
    if run is None or not (path := run.logs / "metrics.csv").is_file():
        return None
    rows: list[Row] = [{name: value for name, value in row.items() if value is not None} for row in read_rows(path)]
    return rows if rows and layers_of(rows) else None


def _show(report: Report) -> None:
    """Print the summary, and the interventions as a table."""
    for finding in summary(report):
        say(f"{finding.sign}: {finding.text}")
    if report["interventions"] is None:
        return
    titles = {layer["name"]: layer["title"] for layer in report["layers"]} | {None: "all"}
    images = report["interventions"]["images"]
    name = f"{report['score']['name']}, {images} images"
    table = Table("layers", "what is changed", name, "difference, points", "95 % interval")
    table.add_row("", "nothing", in_prose(report["interventions"]["score"], images))
    for row in report["interventions"]["rows"]:
        interval = f"{points(row['low'], images)} to {points(row['high'], images)}"
        score, difference = in_prose(row["score"], images), points(row["difference"], images)
        table.add_row(titles[row["layer"]], row_label(row), score, difference, interval)
    console().print(table)
