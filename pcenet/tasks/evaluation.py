"""``pcenet eval``: finding a trained network and measuring it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pcenet.data as data
from pcenet.choices import Part, TaskName
from pcenet.models import SavableModel, load_model
from pcenet.models.preprocessing import image_size
from pcenet.runs.config import EvalConfig
from pcenet.runs.finding import find_model
from pcenet.runs.fingerprint import difference, fingerprint
from pcenet.runs.folder import RunFolder
from pcenet.runs.health import complaint
from pcenet.runs.records import fingerprint_of, read_record
from pcenet.runs.schemas import ANYTHING
from pcenet.runtime.device import resolve_device, resolve_precision, resolve_workers, set_precision, set_threads
from pcenet.tasks import Task, get_task
from pcenet.tasks.classes import check_same_classes
from pcenet.texts import say
from pcenet.writing import write_json

log = logging.getLogger(__name__)

EVAL_BATCH_SIZE: dict[TaskName, int] = {"classify": 256, "segment": 8}
STEP_PIXELS = 2**24  # of all images of a step, unless the user says how many it has


def eval_batch_size(model: Any) -> int:
    """Images of a step: as usual for the task, and fewer where they are large."""
    height, width = image_size(model)
    return max(1, min(EVAL_BATCH_SIZE[model.task], STEP_PIXELS // (height * width)))


def evaluate(config: EvalConfig) -> Any:
    """``pcenet eval``: measure a trained model, print tables, write ``eval-<data>-<split>.json``.

    With ``config.tta`` the file is ``eval-<data>-<split>-tta.json``, so that it takes no other's place.

    Returns:
        The `Evaluation` or `PixelEvaluation`, by the model's task.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if no data set is known, or if its classes are not the model's.
    """
    set_threads(config.threads)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    trained = open_trained(config)
    model, task, source, run = trained.model, trained.task, trained.source, trained.run
    workers = resolve_workers(config.workers, device)
    batch_size = config.batch_size or eval_batch_size(model)
    batches = task.eval_loader(model, source, batch_size=batch_size, workers=workers)
    with data.naming_dead_workers():
        result = task.evaluate(model, batches, source.classes, device=device, precision=precision, tta=config.tta)
    out = Path(config.out) if config.out else run.path if run else Path()
    out.mkdir(parents=True, exist_ok=True)
    measured = f"{config.split}-tta" if config.tta else config.split
    # In a run's folder there are figures of that run alone, by whatever path it was named.
    own = run is not None and out.resolve() == run.path.resolve()
    images = fingerprint({config.split: source})
    of = {"source": trained.data, "fingerprint": images} | ({} if own else {"run": config.run})
    path = result_path(out, Path(source.name).stem, of, measured)
    about = {"model": model.pretrained_cfg["architecture"], "data": source.name, "split": config.split}
    write_json(path, about | of | {"tta": config.tta} | asdict(result))
    task.show(result, f"{config.run} on {source.name}, {in_words(config.split, config.tta)}")
    say(f"wrote {path}")
    if found := complaint(result.router):
        log.warning("%s", found)
    return result


def in_words(split: str, tta: bool) -> str:
    """What was measured of a data set."""
    return f"{split}, with test-time augmentation" if tta else split


@dataclass(frozen=True)
class Trained:
    """A trained network and the images that it is to be tried on.

    Attributes:
        model: the network, on the CPU.
        folder: its model folder.
        run: the run folder around it, if there is one.
        task: what it does.
        source: the images, whose classes are the network's.
        data: the name that they were opened by.
    """

    model: SavableModel
    folder: Path
    run: RunFolder | None
    task: Task
    source: Any
    data: str


def open_trained(config: EvalConfig) -> Trained:
    """The network that ``config.run`` names, with one split of the data that ``config`` names, or the run.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if no data set is known, or if its classes are not the model's.
    """
    model_folder, run = find_model(config.run)
    name = config.data or (run.read_config().data if run else None)
    if name is None:
        raise ValueError(f"data: {config.run} is a model folder, which names no data; give --data SOURCE")
    model = load_model(model_folder)
    if model.class_names is None:
        raise ValueError(f"{model_folder}: config.json names no classes (label_names)")
    model.grey_range = config.grey_range or model.grey_range
    task = get_task(model.task)
    source = open_data(config, name, model, run)
    if config.data is None and run is not None:
        tell_of_other_data(config, model, run, name, source)
    elif source.held_out:
        log.warning(
            "%s is not divided: its %s is a part held out of it, %d images; --split all takes all of them",
            name,
            config.split,
            len(source),
        )
    check_against_network(model, source, config.run)
    return Trained(model, model_folder, run, task, source, name)


def tell_of_other_data(config: EvalConfig, model: SavableModel, run: RunFolder, name: str, source: Any) -> None:
    """Warn where a run's data are not those that it was trained with: a relative path may lead elsewhere from here."""
    known = fingerprint_of(run.metrics)
    found = {config.split: source}
    if known and config.split not in known:
        found = {split: open_split(config, name, model, run, split) for split in get_args(data.Split) if split in known}
    if changed := difference(known, fingerprint(found)):
        log.warning(
            "%s is not what %s was trained with: %s; if that lies elsewhere, give --data", name, run.path, changed
        )


def open_data(config: EvalConfig, name: str, model: SavableModel, run: RunFolder | None) -> Any:
    """One split of a data set for a trained network, as `open_split` gives it; what is to be noted is logged."""
    source = open_split(config, name, model, run, config.split)
    for note in source.notes:
        log.warning("%s: %s", name, note.text)
    return source


def open_split(config: EvalConfig, name: str, model: SavableModel, run: RunFolder | None, split: Part) -> Any:
    """One split of the data set ``name`` for a trained network.

    Mask values have the names that ``config`` gives them, else those of the data's own file, else those that the
    network knows. A network that was saved before networks knew takes the options of its run. Deep grey images have the
    network's range.
    """
    config = replace(config, grey_range=model.grey_range)
    given = config.classes is not None or config.ignore_index is not None
    if model.task == "segment" and model.mask_values is None and run is not None and not given:
        trained = run.read_config()
        config = replace(config, classes=trained.classes, ignore_index=trained.ignore_index)
    return get_task(model.task).open(config, name, split, model)


def check_against_network(model: SavableModel, source: Any, name: str) -> None:
    """Raise a ``ValueError`` that names the difference unless a source has the classes that a network knows.

    Args:
        model: the network; one that knows no names takes any.
        source: the images.
        name: what the user called the network.
    """
    if model.class_names is None:
        return
    way_out = "name the class folders as the network does, or choose another network"
    if model.task == "segment":
        way_out = (
            "give the network's names with --classes, in the order of these masks' values from 0 on, and with "
            "--ignore-index the value that does not count"
        )
    try:
        check_same_classes(model.class_names, source.classes, name, source.name)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error


def result_path(folder: Path, data_name: str, of: Mapping[str, Any], measured: str) -> Path:
    """``eval-<data>-<measured>.json`` in ``folder``; numbered where the figures of another source, other images or
    another network have that name, of which ``of`` tells."""
    stems = (data_name if number == 1 else f"{data_name}-{number}" for number in count(1))
    paths = (folder / f"eval-{stem}-{measured}.json" for stem in stems)
    return next(path for path in paths if not path.exists() or is_written_for(path, of))


def is_written_for(path: Path, of: Mapping[str, Any]) -> bool:
    """Whether a file is one of `evaluate`, with figures of this source, these images and this network."""
    try:
        found = read_record(path, dict.fromkeys(of, ANYTHING))
    except (ValueError, OSError):
        return False
    return all(found[key] == value for key, value in of.items())
