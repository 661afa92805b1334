"""``pcenet push``: gathering what a run found, writing the card, uploading."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pcenet.analysis import routing_picture
from pcenet.analysis.agreement import Pixels
from pcenet.catalogue import CONFIG
from pcenet.data import SEGMENTATION_SOURCE_NAMES, SOURCE_NAMES, first_images
from pcenet.models import create_network, load_model, twin_of
from pcenet.models.card import model_card
from pcenet.models.preprocessing import cost_of, image_size, preprocessing
from pcenet.models.pretrained import WEIGHTS
from pcenet.nn import record_routing, routers_of
from pcenet.publish.card import (
    PICTURE,
    cost_section,
    data_of,
    results,
    routing_section,
    score_section,
    training_section,
)
from pcenet.publish.config import SHOWN, PushConfig
from pcenet.reporting.plots import as_label, new_figure, png_of
from pcenet.runs.config import EvalConfig
from pcenet.runs.folder import RunFolder
from pcenet.runs.health import recorded_health
from pcenet.runs.records import ENVIRONMENT, evaluation_of, metrics_of, read_record
from pcenet.runs.schemas import TEXT
from pcenet.tasks import get_task
from pcenet.tasks.evaluation import Trained, open_trained
from pcenet.texts import say
from pcenet.writing import filling

log = logging.getLogger(__name__)
CARD = "README.md"
# What the client raises where there is no answer: httpx's error, or httpx2's, by the version of huggingface-hub.
NoAnswerError: type[Exception] = HfHubHTTPError.__bases__[0]
NOT_UPLOADED = "nothing was uploaded; --dry-run FOLDER writes the files without uploading them"


def push(config: PushConfig) -> Path | str:
    """``pcenet push``: the folder that was written, or the address of the repository.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: for a run that is not finished, a repository or a folder that will not do, data that are not there
            any more, a missing token, or a Hub that refuses or does not answer. No file of the run is changed.
        ModuleNotFoundError: where a picture is wanted and matplotlib is missing.
    """
    assert config.repo is not None
    check_repo(config.repo)
    run = finished_run(config.run, "run")
    twin = None if config.twin is None else read_twin(config.twin, run)
    if config.dry_run is not None:
        folder = Path(config.dry_run)
        if not RunFolder(folder).free:
            raise ValueError(f"dry_run: {folder} exists and is never overwritten; choose a new or an empty folder")
        picture = draw(config, run)
        with filling(folder) as place:
            write(place, config, run, twin, picture, config.repo)
        say(f"wrote {folder}")
        return folder
    if get_token() is None:
        raise ValueError(
            "there is no token of the Hugging Face Hub: log in with `hf auth login`, or set HF_TOKEN; --dry-run FOLDER "
            "needs none"
        )
    picture = draw(config, run)
    with TemporaryDirectory() as temporary, hub_errors(config.repo):
        api = HfApi()
        repo: str = api.create_repo(config.repo, private=config.private or None, exist_ok=True).repo_id
        if config.private and not api.repo_info(repo).private:
            raise ValueError(
                f"private: {repo} exists and is public; nothing was uploaded: make it private on its page, or choose "
                "another --repo"
            )
        with filling(Path(temporary)) as place:
            write(place, config, run, twin, picture, repo)
        api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="pcenet push")
    address = f"{api.endpoint}/{repo}"
    say(f"pushed to {address}")
    return address


def check_repo(repo: str) -> None:
    """Raise a ``ValueError`` unless the Hub could have a repository of that name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"repo {repo!r} must be NAME or OWNER/NAME: {error}") from error


def finished_run(path: str, option: str) -> RunFolder:
    """The run folder of that path.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the run is not finished.
    """
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise FileNotFoundError(
            f"{option}: {path} is no run folder: there is no config.yaml; give what train --out made"
        )
    if not run.finished:
        raise ValueError(
            f"{option}: {path} is no finished run: it lacks metrics.json or model/; finish it with --resume"
        )
    return run


def read_metrics(run: RunFolder) -> Any:
    """``metrics.json`` of a finished run.

    Raises:
        ValueError: if it is damaged, or of a version that did not say task and data.
    """
    score = get_task(run.read_config().task).objective.score
    return read_record(run.metrics, metrics_of(score) | dict.fromkeys(("task", "data", "model"), TEXT))


def read_evaluations(run: RunFolder) -> list[Any]:
    """What ``pcenet eval`` wrote into a run folder; a file that only has such a name is left out, with a warning."""
    schema = evaluation_of(get_task(run.read_config().task).objective.score)
    found = []
    for path in sorted(run.path.glob("eval-*.json")):
        try:
            found.append(read_record(path, schema))
        except (OSError, ValueError) as error:
            log.warning("%s; the card leaves it out", error)
    return found


def read_twin(path: str, run: RunFolder) -> Any:
    """``metrics.json`` of the twin's run.

    Raises:
        ValueError: if it is not the run of a dense network on the same data, for the same task.
    """
    ours, theirs = read_metrics(run), read_metrics(finished_run(path, "twin"))
    if recorded_health(theirs)[1]:
        raise ValueError(f"twin: {path} ({theirs['model']}) is no dense network; give the dense twin's run")
    about = [(metrics["task"], data_of(metrics), metrics["val"]["images"]) for metrics in (ours, theirs)]
    if about[0] != about[1]:
        (task, data, images), (their_task, their_data, their_images) = about
        raise ValueError(
            f"twin: {path} was validated on {their_images} images of {their_data} ({their_task}), the network on "
            f"{images} of {data} ({task}); give a run on the same data"
        )
    return theirs


def write(folder: Path, config: PushConfig, run: RunFolder, twin: Any, picture: bytes | None, repo: str) -> None:
    """Weights, configuration, picture and card into a folder, which exists.

    Args:
        folder: where to.
        config: the options.
        run: the finished run.
        twin: ``metrics.json`` of the twin, or None.
        picture: PNG, or None.
        repo: the repository's name, with its owner.
    """
    model, metrics = load_model(run.model), read_metrics(run)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(run.model / name, folder / name)
    if picture is not None:
        (folder / PICTURE).write_bytes(picture)
    evaluations = read_evaluations(run)
    twin_cost = (twin["model"], twin["complexity"]) if twin else twin_cost_of(run, model.num_classes)
    sections = [
        score_section(metrics, evaluations, twin),
        cost_section(metrics["model"], metrics["complexity"], twin_cost, image_size(model)),
        routing_section(metrics, evaluations, picture is not None),
        training_section(run.read_config(), metrics, read_record(run.environment, ENVIRONMENT)),
    ]
    sections = list(filter(None, sections))
    card = model_card(model.config(), repo, sections, license=config.license, results=results(model.task, metrics))
    card.save(folder / CARD)


def twin_cost_of(run: RunFolder, num_classes: int) -> tuple[str, dict[str, Any]] | None:
    """Name and cost of the dense twin of a run's network; None for a dense one, and where the network has arguments
    of its own, of which it is not known what they mean for the twin."""
    config = run.read_config()
    name = twin_of(config.model_name)
    if name is None or config.model_args or config.upcycle:
        return None
    size = read_record(run.model / CONFIG)["pretrained_cfg"]["input_size"]
    twin = create_network(name, num_classes=num_classes, pretrained_cfg_overlay={"input_size": tuple(size)})
    return name, cost_of(twin)


def draw(config: PushConfig, run: RunFolder) -> bytes | None:
    """The routing picture as PNG; None where none is wanted or nothing is routed.

    Raises:
        ValueError: if the run's data cannot be opened.
    """
    known = run.read_config().data in (*SOURCE_NAMES, *SEGMENTATION_SOURCE_NAMES)
    count = config.images if config.images is not None else SHOWN * known
    if not count or not any(routers_of(load_model(run.model))):
        return None
    new_figure(1, 1)  # where matplotlib is missing, that shows now
    try:
        trained = open_trained(EvalConfig(run=config.run))
    except (OSError, ValueError) as error:
        raise ValueError(f"images: {error}; --images 0 leaves the picture out") from error
    return drawn(trained, count, run.read_config().seed)


@torch.inference_mode()
def drawn(trained: Trained, count: int, seed: int) -> bytes:
    """So many images of the data with the experts of their patches, as PNG."""
    model, source = trained.model, first_images(trained.source, count, seed)
    loader = trained.task.eval_loader(model, source, batch_size=count, workers=0)
    batches = list(loader if model.task == "classify" else chain.from_iterable(loader))
    inputs = torch.cat([images for images, _ in batches])
    with record_routing(model) as records:
        logits = model(inputs)
    titles = None
    if model.task == "classify":
        names = [as_label(name) for name in source.classes]
        labels = torch.cat([torch.as_tensor(labels) for _, labels in batches])
        titles = [f"{names[p]} ({names[t]})" for p, t in zip(logits.argmax(1), labels, strict=True)]
    values = preprocessing(model)
    figure = routing_picture(Pixels(values["mean"], values["std"]).of(inputs), records, titles)
    return png_of(figure)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Errors of the Hub's client as a ``ValueError`` with a way out."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {
            401: "it does not know the token: log in again with `hf auth login`",
            403: f"the token may not write to {repo}: take one with write access to it, or another --repo",
        }.get(status, error.server_message or str(error))
        raise ValueError(f"the Hugging Face Hub refused ({status}): {reason}; {NOT_UPLOADED}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"HF_HUB_OFFLINE is set, so the Hub is not asked: unset it; {NOT_UPLOADED}") from error
    except (NoAnswerError, ConnectionError) as error:
        raise ValueError(
            f"the Hugging Face Hub cannot be reached ({type(error).__name__}: {error}): try again when there is a "
            f"network; {NOT_UPLOADED}"
        ) from error
