from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pcenet.data as data
from pcenet.models import load_model
from pcenet.models.preprocessing import image_side
from pcenet.nn import PCELayer, record_routing
from pcenet.nn.expert_bias_update import CENTRING
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder, saved_config
from pcenet.runtime.device import resolve_device, resolve_workers
from pcenet.training.checkpoints import read_checkpoint, write_checkpoint
from pcenet.training.loop import Trainer
from pcenet.training.network import naming_model_args
from pcenet.training.preparation import Run, bias_images, prepare, resolve
from pcenet.training.run import train
from pcenet.writing import write_atomically

Start = Callable[..., TrainConfig]

RANDOM = {"drop": 0.2, "drop_path": 0.2}  # so that the state of the random numbers matters


def contents(folder: Path) -> dict[str, str]:
    """Every file's digest: where two folders differ, pytest would take minutes to show megabytes of weights."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: RunFolder) -> list[dict[str, float]]:
    with open(folder.logs / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an epoch: `step` counts from 0, an epoch has three."""
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        if self.state.step == step:
            raise KeyboardInterrupt
        return original(self, batch, number)

    monkeypatch.setattr(Trainer, "batch_loss", batch_loss)


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "finished"
    return train(
        TrainConfig(data=str(pictures), out=str(out), epochs=2, batch_size=8, precision="fp32", device="cpu", workers=0)
    )


@pytest.fixture(scope="module")
def interrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two epochs that was stopped in the second; to be copied, not changed."""
    config = TrainConfig(
        data=str(pictures),
        out=str(tmp_path_factory.mktemp("runs") / "interrupted"),
        epochs=2,
        batch_size=8,
        precision="fp32",
        device="cpu",
        workers=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    return RunFolder(config.folder)


def test_run_folder_is_complete(finished: RunFolder, pictures: Path) -> None:
    names = {path.name for path in finished.path.iterdir()}
    visible = {"config.yaml", "environment.json", "logs", "checkpoints", "metrics.json", "model"}  # pictures/ aside
    assert names == visible | {".lock"}
    assert {path.name for path in finished.checkpoints.iterdir()} == {"step-00000003", "step-00000006"}
    assert list(finished.logs.glob("tensorboard/events*"))
    assert not list(finished.path.rglob("*.tmp"))
    config = yaml.safe_load(finished.config.read_text())
    assert TrainConfig(**config).input_size == 32
    metrics = json.loads(finished.metrics.read_text())
    assert metrics["epochs"] == 2
    assert metrics["val"]["images"] == 12
    assert metrics["val"]["top5"] is None  # three classes
    assert 0 <= metrics["val"]["top1"] <= metrics["best"]["top1"] <= 1
    assert metrics["images_per_second"] > 0
    layers = {"stages.1.1.body", "stages.2.1.body"}
    assert set(metrics["val_router"]) == set(metrics["train_router"]) == layers
    assert metrics["complexity"]["active_parameters"] < metrics["complexity"]["parameters"]
    environment = json.loads(finished.environment.read_text())
    assert (environment["precision"], environment["workers"]) == ("fp32", 0)
    model = load_model(finished.model)
    assert model.class_names == ["blue", "green", "red"]
    for path in finished.model.iterdir():
        assert str(finished.path).encode() not in path.read_bytes(), path
        assert str(pictures).encode() not in path.read_bytes(), path


def test_losses_are_logged_apart_and_add_up(finished: RunFolder) -> None:
    logged = rows(finished)
    assert [row["epoch"] for row in logged] == [1, 2]
    assert [row["step"] for row in logged] == [3, 6]
    for row in logged:
        parts = row["train/task_loss"] + 0.01 * row["train/balance_loss"] + 0.001 * row["train/z_loss"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert row["train/balance_loss"] > 0.9 * 2  # two layers, 1 each where the router is uniform
        assert row["train/z_loss"] > 0
        for layer in ("stages.1.1.body", "stages.2.1.body"):
            assert sum(row[f"val_router/{layer}/load_{expert}"] for expert in range(4)) == pytest.approx(1)


def test_a_dense_network_has_no_auxiliary_loss_and_no_router(start: Start) -> None:
    folder = train(start(model="dense_nano", epochs=1))
    (row,) = rows(folder)
    assert row["train/balance_loss"] == row["train/z_loss"] == 0
    assert row["train/loss"] == row["train/task_loss"]
    assert not [name for name in row if "router" in name]
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["val_router"] == metrics["train_router"] == {}


def test_learning_rate_of_the_last_step_of_each_epoch(finished: RunFolder) -> None:
    # Three steps of warm-up to 0.003; then a cosine over three steps, whose last begins at 2/3 of the way.
    assert [row["train/lr"] for row in rows(finished)] == pytest.approx([0.003, 0.003 * 0.25])


def test_two_runs_and_any_number_of_workers_leave_the_same_model(start: Start) -> None:
    first = train(start("a", **RANDOM))
    for name, workers in (("b", 0), ("c", 2)):
        other = train(start(name, workers=workers, **RANDOM))
        assert contents(other.model) == contents(first.model)
        assert [row["train/loss"] for row in rows(other)] == [row["train/loss"] for row in rows(first)]
    assert contents(train(start("d", seed=1, **RANDOM)).model) != contents(first.model)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(start: Start, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    whole = train(start("whole", epochs=3, **RANDOM))
    config = start("broken", epochs=3, workers=workers, **RANDOM)
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = RunFolder(config.folder)
    assert not folder.metrics.exists()
    assert [row["epoch"] for row in rows(folder)] == [1]
    moved = folder.path.with_name("moved")
    shutil.move(folder.path, moved)
    resumed = train(start("moved", epochs=3, workers=workers, resume="auto", **RANDOM))
    assert contents(resumed.model) == contents(whole.model)
    times = ("train/epoch_seconds", "train/images_per_second")
    for ours, theirs in zip(rows(resumed), rows(whole), strict=True):
        assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in theirs.items() if k not in times}


def test_resume_auto_starts_afresh_without_a_checkpoint(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(start("whole", resume="auto"))
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(start("early"))
    assert contents(train(start("early", resume="auto")).model) == contents(whole.model)


def test_resume_auto_on_a_finished_run_does_nothing(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.path)
    train(TrainConfig(**yaml.safe_load(finished.config.read_text()) | {"resume": "auto"}))
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert contents(finished.path) == before


def test_a_finished_run_is_not_handed_out_for_other_data(
    start: Start, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who adds pictures and runs the cell again must not get the network of before."""
    own = tmp_path / "own"
    shutil.copytree(pictures, own)
    config = start("grown", data=str(own), epochs=1, resume="auto")
    folder = train(config)
    before = contents(folder.path)
    image = own / "train" / "red" / "0.png"
    shutil.copy(image, image.with_name("00.png"))
    with pytest.raises(
        ValueError, match=r"grown have changed: .*own: train had 24 images and has 25; put them back, or"
    ):
        train(config)
    image.with_name("00.png").unlink()
    image.rename(image.with_name("9.png"))
    with pytest.raises(ValueError, match="train has as many images, but not the same file names or labels"):
        train(config)
    shutil.rmtree(own)
    train(config)
    assert "is finished; nothing to do" in capsys.readouterr().out, "of data that are gone nothing can be told"
    assert contents(folder.path) == before


@pytest.mark.parametrize("resume", ["auto", "died/checkpoints/../checkpoints/step-00000006"])
def test_a_run_that_died_before_its_summary_is_completed(
    finished: RunFolder, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = start("died")
    shutil.copytree(finished.path, config.folder)
    (config.folder / "metrics.json").unlink()
    shutil.rmtree(config.folder / "model")
    folder = train(start("died", resume=resume))
    assert contents(folder.model) == contents(finished.model)
    ours, theirs = (json.loads(path.read_text()) for path in (folder.metrics, finished.metrics))
    assert ours == theirs


def test_resume_from_a_checkpoint_into_a_new_folder(interrupted: RunFolder, finished: RunFolder, start: Start) -> None:
    kept = contents(interrupted.path)
    (checkpoint,) = interrupted.steps
    assert contents(train(start("a", resume=str(checkpoint))).model) == contents(finished.model)
    assert contents(interrupted.path) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "dense_nano"}, "other options (model 'pce_nano' -> 'dense_nano')"),
        ({"model_args": {"num_experts": 2}}, "other options (model_args {} -> {'num_experts': 2})"),
        ({"batch_size": 4, "seed": 1}, "other options (batch_size 8 -> 4, seed 0 -> 1)"),
        ({"epochs": 5}, "other options (epochs 2 -> 5)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_leaves_no_folder(
    interrupted: RunFolder, start: Start, changes: dict[str, Any], message: str
) -> None:
    config = start("new", resume=str(interrupted.steps[-1]), **changes)
    with pytest.raises(ValueError, match=re.escape(f"resume: {interrupted.steps[-1]} was started with {message}")):
        train(config)
    assert not config.folder.exists()


def test_a_checkpoint_of_other_data_is_refused(
    interrupted: RunFolder, start: Start, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    config = start("new", resume=str(interrupted.steps[-1]), data=str(other))
    with pytest.raises(ValueError, match=re.escape(f"data {str(pictures)!r} -> {str(other)!r}")):
        train(config)
    for split in ("train", "val"):  # the same path, but as many other classes
        (other / split / "red").rename(other / split / "mauve")
    open_source = data.open_source
    monkeypatch.setattr(data, "open_source", lambda path, split, **_: open_source(other, split))
    with pytest.raises(ValueError, match=r"step-00000003: only in .*step-00000003: red; only in .*: mauve"):
        train(start("new", resume=str(interrupted.steps[-1])))
    assert not config.folder.exists()


def test_a_checkpoint_with_all_its_epochs_is_refused(finished: RunFolder, start: Start) -> None:
    config = start("new", resume=str(finished.steps[-1]))
    with pytest.raises(ValueError, match=r"step-00000006 has 2 of 2 epochs behind it.*--epochs above 2"):
        train(config)
    assert not config.folder.exists()


def test_a_checkpoint_of_another_version_is_named(interrupted: RunFolder, start: Start, tmp_path: Path) -> None:
    content = read_checkpoint(interrupted.steps[-1])
    for name, run, message in (
        ("a", content["run"] | {"config": {"speed": 3}}, "is of another version of pcenet: .*speed"),
        ("b", {}, "is damaged or no checkpoint of pcenet train: run.config is missing"),
    ):
        write_checkpoint(tmp_path / name, content | {"run": run})
        with pytest.raises(ValueError, match=message):
            train(start(resume=str(tmp_path / name)))


def test_options_of_layers_that_were_removed_since_a_run_was_made() -> None:
    old = {
        "model_args": {"dispatch": "static", "norm": "batch", "border": "zero"},
        "upcycle_args": {"priority": "gate"},
    }
    config = saved_config(old, "config.yaml")
    assert (config.model_args, config.upcycle_args) == ({"border": "zero"}, {})
    with pytest.raises(ValueError, match=r"^config\.yaml is .*model_args: norm='group' was removed, 'batch'"):
        saved_config({"model_args": {"norm": "group"}}, "config.yaml")


@pytest.mark.parametrize("name", ["step-00000001", "../../elsewhere"])
def test_a_run_goes_on_in_its_folder_from_its_newest_checkpoint_alone(
    interrupted: RunFolder, finished: RunFolder, start: Start, tmp_path: Path, name: str
) -> None:
    folder = RunFolder(start().folder)
    shutil.copytree(interrupted.path, folder.path)
    shutil.copytree(interrupted.steps[-1], folder.checkpoints / name)
    before = contents(folder.path)
    with pytest.raises(ValueError, match=r"continues in its folder from its newest checkpoint alone"):
        train(start(resume=str(folder.checkpoints / name)))
    assert contents(folder.path) == before
    train(start(resume=str(folder.checkpoints / "step-00000003")))
    assert contents(folder.model) == contents(finished.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is never overwritten; continue it with --resume auto"),
        ({"resume": "auto", "lr": 0.1, "seed": 5}, "other options (lr 0.003 -> 0.1, seed 0 -> 5)"),
        ({"resume": "missing.ckpt"}, "there is no checkpoint missing.ckpt"),
    ],
)
def test_a_run_is_never_overwritten(finished: RunFolder, start: Start, changes: dict[str, Any], message: str) -> None:
    before = contents(finished.path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(start(**{"out": str(finished.path)} | changes))
    assert message in str(error.value)
    assert contents(finished.path) == before


def test_a_finished_run_is_not_said_to_be_one_of_other_options(finished: RunFolder, start: Start) -> None:
    with pytest.raises(ValueError, match=r"other options \(lr 0\.003 -> 0\.1\)"):
        train(start(out=str(finished.path), resume=str(finished.steps[-1]), lr=0.1))


def test_a_folder_that_is_no_run_is_left_alone(start: Start) -> None:
    config = start("photos", resume="auto")
    config.folder.mkdir()
    (config.folder / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="is no run folder"):
        train(config)
    assert [(path.name, path.read_bytes()) for path in config.folder.iterdir()] == [("cat.jpg", b"cat")]


FOUND_ANEW = ("expert_bias", "centring")  # for the weights that are kept, see update_expert_bias


def test_model_holds_the_moving_average(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, torch.Tensor]] = []

    step = Trainer.optimizer_step

    def keep(self: Trainer, *args: Any) -> int:
        images = step(self, *args)
        steps.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return images

    monkeypatch.setattr(Trainer, "optimizer_step", keep)
    folder = train(start())
    saved = load_file(folder.model / "model.safetensors")
    assert len(steps) == 6
    differs = 0
    for name, value in saved.items():
        if not value.is_floating_point() or name.endswith(FOUND_ANEW):
            continue
        expected = steps[0][name].double()
        for n, step in enumerate(steps[1:], start=1):
            decay = (1 + n) / (10 + n)  # all below 0.998 here
            expected = decay * expected + (1 - decay) * step[name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        differs += not torch.equal(value, steps[-1][name])
    assert differs > 20


def test_without_averaging_model_holds_the_last_weights(start: Start) -> None:
    folder = train(start(ema_decay=0.0))
    current = read_checkpoint(folder.steps[-1])["model"]
    saved = load_file(folder.model / "model.safetensors")
    assert set(saved) == set(current)
    kept = {name: value for name, value in saved.items() if not name.endswith(FOUND_ANEW)}
    assert all(torch.equal(value, current[name]) for name, value in kept.items())


def test_biases_are_found_for_the_weights_that_are_kept(start: Start) -> None:
    """Of the images that they are found from each expert gets its share, after one epoch too."""
    folder = train(start(epochs=1))
    model = load_model(folder.model)
    with torch.no_grad(), record_routing(model) as records:
        for images in bias_images(prepare_only(start(epochs=1))):
            model(images)
    assert records
    for name, routings in records.items():
        load = sum(routing.expert_counts for routing in routings)
        assert load.min() > 0.7 * load.float().mean(), (name, load)
        assert model.get_submodule(name).router.centring.item() == pytest.approx(CENTRING)


def prepare_only(config: TrainConfig) -> Run:
    device = resolve_device("cpu")
    config = resolve(config, device)
    return prepare(config, RunFolder(config.folder), device)


def test_initial_weights_depend_on_the_seed_alone(start: Start) -> None:

    def weights(**changes: Any) -> dict[str, torch.Tensor]:
        torch.rand(7)
        return prepare_only(start(**changes)).model.state_dict()

    first = weights()
    same = weights(augment="none", batch_size=3, lr=1.0)
    other = weights(seed=1)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_arguments_of_the_network_reach_it_and_travel(start: Start) -> None:
    folder = train(start(epochs=1, model_args={"num_experts": 2, "border": "exchange"}))
    assert folder.read_config().model_args == {"num_experts": 2, "border": "exchange"}
    layers = [module for module in load_model(folder.model).modules() if isinstance(module, PCELayer)]
    assert [(layer.router.num_experts, layer.border) for layer in layers] == [(2, "exchange")] * 2


def test_an_argument_of_the_network_may_be_none(start: Start) -> None:
    model = prepare_only(start(model_args={"capacity_factor": None})).model
    layers = [module for module in model.modules() if isinstance(module, PCELayer)]
    assert [layer.router.capacity_factor for layer in layers] == [None] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features_only": True}, "unknown argument 'features_only'; a network takes global_pool, strides"),
        ({"device": "meta"}, "unknown argument 'device'"),
        ({"shortcut": False}, "unknown argument 'shortcut'"),
        ({"in_chans": 1}, "in_chans cannot be given there: images are read as RGB"),
        ({"num_classes": 2}, "num_classes cannot be given there: the data decide it"),
        ({"drop_rate": 0.1}, "drop_rate cannot be given there: give --drop"),
        ({"num_expert": 8}, "did you mean 'num_experts'?"),
        ({3: 4}, "unknown argument 3"),
        ({"widths": "abc"}, "model_args {'widths': 'abc'} make no network: "),
        ({"top_k": "1"}, "model_args {'top_k': '1'} make no network: "),
        ({"global_pool": "most"}, "model_args {'global_pool': 'most'} make no network: Invalid pool type"),
        ({"global_pool": ""}, "model_args {'global_pool': ''} make no network: "),
        ({"border": "halos"}, "make no network: border='halos' is not one of 'zero', 'halo', 'exchange'"),
    ],
)
def test_arguments_that_make_no_network_are_named_and_leave_no_folder(
    start: Start, arguments: dict[Any, Any], message: str
) -> None:
    config = start(model_args=arguments)
    with pytest.raises(ValueError, match=r"^model_args") as error:
        train(config)
    assert message in str(error.value)
    assert not config.folder.exists()


def test_without_arguments_a_network_s_fault_keeps_its_type() -> None:
    with pytest.raises(RuntimeError, match="inside"), naming_model_args({}):
        raise RuntimeError("inside")


@pytest.mark.parametrize(
    ("workers", "device", "count"),
    [(None, "cpu", 0), (3, "cpu", 3), (0, "cuda", 0), (3, "cuda", 3), (None, "cuda", min(8, os.cpu_count() or 1))],
)
def test_workers_are_started_beside_a_gpu_alone(workers: int | None, device: str, count: int) -> None:
    assert resolve_workers(workers, torch.device(device)) == count


def test_workers_asked_for_are_started(start: Start) -> None:
    run = prepare_only(start(workers=2))
    assert [run.workers, *(loader.num_workers for loader in run.loaders.values())] == [2, 2, 2]


def test_preprocessing_travels_with_the_model(start: Start) -> None:
    folder = train(start(epochs=1, input_size=24))
    cfg = json.loads((folder.model / "config.json").read_text())["pretrained_cfg"]
    assert cfg["input_size"] == [3, 24, 24]
    assert image_side(load_model(folder.model)) == 24


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    target.write_text("old")

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fails)
    assert target.read_text() == "old"
    write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new"
