"""``pcenet predict`` from its options to its files: the order in which everything happens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from pcenet.data.loaders import naming_dead_workers
from pcenet.exporting.files import ExportedNet, is_exported
from pcenet.inference.batches import Batch, read_batches
from pcenet.inference.classify import Classifier
from pcenet.inference.config import PredictConfig
from pcenet.inference.inputs import InputFile, LeftOut, find_inputs
from pcenet.inference.network import Network
from pcenet.inference.outputs import ResultFiles, Row, output_folder
from pcenet.inference.segment import Segmenter, write_picture
from pcenet.inference.videos import Frame, count_frames, read_frames
from pcenet.inference.windows import SlidingWindow, image_transform
from pcenet.models import SavableModel, load_model
from pcenet.reporting.colours import legend
from pcenet.reporting.tables import console
from pcenet.runs.finding import find_model
from pcenet.runtime.device import resolve_device, resolve_precision, resolve_workers, set_precision, set_threads
from pcenet.tasks.evaluation import eval_batch_size
from pcenet.texts import one_line, say
from pcenet.writing import filling

SHOWN = 20  # rows of the table, and lines about files that were left out; the files hold all
STEPS = 10  # lines of progress where there is no terminal


@dataclass(frozen=True)
class Predicted:
    """What became of the files.

    Attributes:
        predicted: how many have a prediction.
        left_out: the others, with the reason.
        folder: where the results are.
    """

    predicted: int
    left_out: list[LeftOut]
    folder: Path


def predict(config: PredictConfig) -> Predicted:
    """Predict all images and videos that ``config.inputs`` names; write ``predictions.csv`` and ``predictions.json``.

    A segmentation network also leaves ``legend.png`` and, for each image and at its size, a mask and an overlay, the
    image under the classes' colours. A mask's pixels have the values of the masks that the network was trained on, or
    class numbers where these are unknown; ``mask_values`` in the JSON file has them by class.

    A file that cannot be read stops nothing: it is named at the end, on the terminal and in the JSON file. All results
    appear in the folder when they are complete; after an error none is there.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if an input does not exist or holds no images, or if the folder for the results is in use.
    """
    set_threads(config.threads)
    device = resolve_device("cpu" if is_exported(config.run) else config.device)
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    model = open_network(config).to(device).to(memory_format=torch.channels_last)
    found, left_out = find_inputs(config.inputs, config.grey_range or model.grey_range, videos=True)
    files, videos = ([file for file in found if file.is_video is kind] for kind in (False, True))
    folder = output_folder(config.out, "predictions")
    classes = list(model.class_names or map(str, range(model.num_classes)))
    values = list(range(model.num_classes)) if model.mask_values is None else model.mask_values
    network = Network(model, classes, config.routing, device, precision, config.tta)
    batch_size = config.batch_size or eval_batch_size(model)
    windows = SlidingWindow(network, config.overlap, batch_size) if config.sliding_window else None
    about = {
        "model": model.pretrained_cfg["architecture"],
        "run": config.run,
        "tta": config.tta,
        "sliding_window": config.sliding_window,
        "classes": classes,
    } | ({"mask_values": values} if model.task == "segment" else {})
    first: list[Row] = []
    predicted = 0
    with naming_dead_workers(), filling(folder) as place:
        predictor = make_predictor(network, config, place, values, windows)
        transform, workers = image_transform(model, windows), resolve_workers(config.workers, device)
        batches = chain(
            read_batches(files, transform, batch_size=batch_size, workers=workers) if files else (),
            *(read_frames(video, transform, batch_size=batch_size) for video in videos),
        )
        file, *others = predictor.columns
        with ResultFiles(place, about, [file, "time", *others] if videos else predictor.columns) as results:
            results.leave_out(left_out)
            for batch in progress(batches, len(files) + sum(map(count_frames, videos))):
                rows = predictor(batch) if batch.files else []
                if videos:
                    rows = [with_time(row, file) for row, file in zip(rows, batch.files, strict=True)]
                for row in rows:
                    results.add(row)
                results.leave_out(batch.left_out)
                left_out += batch.left_out
                predicted += len(rows)
                first += rows[: SHOWN - len(first)]
        if isinstance(predictor, Segmenter) and predicted:
            write_picture(legend(classes, values), place / "legend.png")
    report(predictor.headings, first, Predicted(predicted, left_out, folder))
    return Predicted(predicted, left_out, folder)


def with_time(row: Row, file: InputFile | Frame) -> Row:
    """A row with the time of its frame, in seconds, behind the name of the file; empty for that of an image."""
    if not isinstance(file, Frame):
        return replace(row, cells=[row.cells[0], "", *row.cells[1:]])
    when = "" if file.time is None else f" at {file.time:.2f} s"
    return Row(
        [row.cells[0], "" if file.time is None else file.time, *row.cells[1:]],
        {"file": file.file, "time": file.time, **row.record},
        [f"{row.shown[0]}{when}", *row.shown[1:]],
    )


def open_network(config: PredictConfig) -> SavableModel | ExportedNet:
    """What predicts: a trained network, or a file that `pcenet export` wrote.

    Raises:
        ValueError: if a file was asked for the routing, or to compute elsewhere than on the processor, or is a program
            that the user has not said to trust.
    """
    if not is_exported(config.run):
        model = load_model(find_model(config.run)[0])
        check_classifier(model, config.run)
        return model
    if config.routing:
        raise ValueError(f"routing: {config.run} is an exported file; give the run that it was made from")
    if config.device == "cuda":
        raise ValueError(f"device 'cuda': {config.run} is an exported file, which is run on the processor here")
    exported = ExportedNet(config.run, config.threads, trust_code=config.trust_code).eval()
    check_classifier(exported, config.run)
    return exported


def check_classifier(model: SavableModel | ExportedNet, name: str) -> None:
    """Raise a ``ValueError`` where a network has no classes."""
    if model.num_classes < 1:
        raise ValueError(f"run: {name} has no classifier (num_classes is 0), so there is no class to predict")


def make_predictor(
    network: Network, config: PredictConfig, folder: Path, values: Sequence[int], windows: SlidingWindow | None
) -> Classifier | Segmenter:
    """What predicts for the network's task; to segment it writes pictures into ``folder``."""
    if network.model.task == "classify":
        return Classifier(network, config.top)
    return Segmenter(network, folder, config.overlay_opacity, values, windows)


def progress(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """The batches, with a bar of images on a terminal and about ten plain lines where there is none."""
    screen = console()
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=screen, transient=True) if screen.is_terminal else None
    done = 0
    with bar or nullcontext():
        task = bar.add_task("", total=total) if bar else None
        for batch in batches:
            yield batch
            before, done = done, done + len(batch.files) + len(batch.left_out)
            if bar and task is not None:
                bar.update(task, completed=done)
            elif total and done * STEPS // total > before * STEPS // total:  # else no video says how long it is
                say(f"{done} of {total} images done")  # those left out, too


def report(headings: Sequence[str], rows: list[Row], result: Predicted) -> None:
    """Print the first predictions, the files that were left out, and where everything is."""
    if rows:
        table = Table(*(Column(heading, overflow="fold") for heading in headings))
        for row in rows:
            table.add_row(*row.shown)
        console().print(table)
        if result.predicted > len(rows):
            say(f"and {result.predicted - len(rows)} more")
    for file in result.left_out[:SHOWN]:
        say(f"left out: {file.file}: {one_line(file.reason)}")
    if len(result.left_out) > SHOWN:
        say(f"left out: {len(result.left_out) - SHOWN} more, all named in predictions.json")
    say(f"{result.predicted} predicted, {len(result.left_out)} left out", f"wrote {result.folder}")
