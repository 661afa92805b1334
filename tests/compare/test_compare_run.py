"""Comparisons of runs that take a second: what is trained, what is left alone, and by whom."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcenet.cli import main
from pcenet.comparison.config import CompareConfig
from pcenet.comparison.run import compare, status
from pcenet.runs.config import TrainConfig
from pcenet.training.loop import Trainer
from pcenet.training.run import train

LABELS = ["dense_nano", "quick"]
VARIANTS = {"quick": {"model": "dense_nano", "lr": 0.01, "drop": 0.5}}


@dataclass(frozen=True)
class Done:
    """A finished comparison; to be copied, not changed.

    Attributes:
        batches: digest of the images of each training batch, in order, by run folder.
    """

    config: CompareConfig
    batches: dict[str, list[str]]


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def done(recipe: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Done:
    config = CompareConfig(LABELS, 2, VARIANTS, out=str(tmp_path_factory.mktemp("compare") / "all"), recipe=recipe)
    batches: dict[str, list[str]] = {}
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        content = hashlib.sha256(batch[0].contiguous().numpy().tobytes()).hexdigest()
        batches.setdefault(self.config.folder.name, []).append(content)
        return original(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "batch_loss", batch_loss)
        compare(config)
    return Done(config, batches)


@pytest.fixture
def copy(done: Done, tmp_path: Path) -> CompareConfig:
    """The finished comparison in a folder of its own."""
    shutil.copytree(done.config.folder, tmp_path / "copy")
    return replace(done.config, out=str(tmp_path / "copy"))


def unfinish(config: CompareConfig, name: str) -> None:
    """Remove a run."""
    shutil.rmtree(config.folder / name)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained from now on."""
    names: list[str] = []

    def note(config: TrainConfig) -> object:
        names.append(config.folder.name)
        return train(config)

    monkeypatch.setattr("pcenet.comparison.run.train", note)
    return names


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a file until its standard input ends."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_runs_are_trained_seed_by_seed_in_ordinary_run_folders(done: Done) -> None:
    names = ["dense_nano-0", "quick-0", "dense_nano-1", "quick-1"]
    assert list(done.batches) == names
    folder = done.config.folder
    reports = {"comparison.json", "comparison.md", "curves.png", ".lock"}
    assert {path.name for path in folder.iterdir()} == {*names, *reports}
    assert {path.name for path in (folder / "quick-1").iterdir()} >= {"config.yaml", "checkpoints", "model", "logs"}
    saved = yaml.safe_load((folder / "quick-1" / "config.yaml").read_text())
    assert (saved["model"], saved["lr"], saved["drop"], saved["seed"]) == ("dense_nano", 0.01, 0.5, 1)


def test_runs_of_a_seed_see_the_same_images_in_the_same_order(done: Done) -> None:
    assert len(done.batches["quick-0"]) == len(set(done.batches["quick-0"])) == 6
    assert done.batches["quick-0"] == done.batches["dense_nano-0"]
    assert done.batches["quick-1"] == done.batches["dense_nano-1"]
    assert not set(done.batches["quick-0"]) & set(done.batches["quick-1"])


def test_data_that_changed_between_runs_are_refused(copy: CompareConfig, pictures: Path, trained: list[str]) -> None:
    """Before anything is trained: pairs of runs that saw different images say nothing."""
    other = copy.folder.parent / pictures.name
    shutil.copytree(pictures, other)
    image = other / "train" / "red" / "0.png"
    shutil.copy(image, image.with_name("00.png"))
    unfinish(copy, "quick-1")
    grown = replace(copy, recipe=replace(copy.recipe, data=str(other)))
    for run in copy.runs[:3]:
        path = run.config.folder / "config.yaml"
        path.write_text(path.read_text().replace(f"data: {pictures}", f"data: {other}"))
    message = "has changed since dense_nano-0 was trained: train had 24 images and has 25; put them back, or"
    with pytest.raises(ValueError, match=message):
        compare(grown)
    assert trained == []
    status(grown)  # which looks at no image


def test_runs_that_saw_other_images_are_not_compared(copy: CompareConfig) -> None:
    path = copy.folder / "quick-0" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["fingerprint"]["val"][0] += 1
    path.write_text(json.dumps(metrics))
    with pytest.raises(
        ValueError, match="quick-0 was not trained with the data of dense_nano-0: val had 12 images and"
    ):
        status(copy)
    del metrics["fingerprint"]
    path.write_text(json.dumps(metrics))
    status(copy)  # of a version that did not note it nothing can be told


def test_a_run_after_others_is_the_run_alone(done: Done, tmp_path: Path) -> None:
    last = done.config.runs[-1]
    alone = train(replace(last.config, out=str(tmp_path / "alone")))
    assert digest(alone.model) == digest(last.config.folder / "model")


def test_the_report_is_that_of_the_runs(done: Done) -> None:
    report = json.loads((done.config.folder / "comparison.json").read_text())
    for run in report["runs"]:
        metrics = json.loads((done.config.folder / run["name"] / "metrics.json").read_text())
        assert run["score"] == metrics["val"]["top1"]
        assert run["complexity"] == metrics["complexity"]
        assert [point["epoch"] for point in run["curve"]] == [1, 2]
        assert run["curve"][metrics["best"]["epoch"] - 1]["val_score"] == pytest.approx(metrics["best"]["top1"])
    scores = {(run["label"], run["seed"]): run["score"] for run in report["runs"]}
    assert report["baseline"] == "quick"  # a dense network has no twin, so it is the last
    differences = report["summary"][0]["difference"]["by_seed"]
    assert differences == {str(seed): scores["dense_nano", seed] - scores["quick", seed] for seed in (0, 1)}


def test_finished_runs_are_left_as_they_are(copy: CompareConfig, trained: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*-[01]/**/*") if path.is_file()}
    assert before
    compare(copy)
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_kept_of_a_run_is_enough(copy: CompareConfig, trained: list[str]) -> None:
    """As under experiments/results: no weights, no checkpoints, the figures of the epochs beside the others."""
    expected = json.loads((copy.folder / "comparison.json").read_text())
    for run in copy.runs:
        folder = run.config.folder
        shutil.move(folder / "logs" / "metrics.csv", folder / "metrics.csv")
        for name in ("logs", "model", "checkpoints"):
            shutil.rmtree(folder / name)
    compare(copy)
    assert trained == []
    assert json.loads((copy.folder / "comparison.json").read_text()) == expected


def test_an_interrupted_comparison_goes_on(
    copy: CompareConfig,
    done: Done,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("quick-0", "quick-1"):
        unfinish(copy, name)
    original = Trainer.batch_loss
    steps: list[int] = []

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        steps.append(self.state.step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, batch, number)

    recipe = {"variants": VARIANTS, "models": LABELS, "seeds": 2, "out": str(copy.folder)}
    recipe |= {name: getattr(copy.recipe, name) for name in ("data", "epochs", "batch_size", "precision", "workers")}
    file = copy.folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(Trainer, "batch_loss", batch_loss)
    assert main(["compare", "--config", str(file), "--device", "cpu"]) == 130
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err
    assert trained == ["quick-0"]
    assert main(["compare", "--config", str(file), "--device", "cpu", "--status"]) == 0
    assert "stopped after 1 of 2 epochs" in capsys.readouterr().out
    assert main(["compare", "--config", str(file), "--device", "cpu"]) == 0
    assert trained == ["quick-0", "quick-0", "quick-1"]
    # The interrupted run: epoch 1, two steps into epoch 2; then all of epoch 2, and the other run.
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    for name in ("quick-0", "quick-1"):
        assert digest(copy.folder / name / "model") == digest(done.config.folder / name / "model")


def test_a_run_of_another_process_is_left_to_it(
    copy: CompareConfig, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense_nano-0", "quick-0"):
        unfinish(copy, name)
    with another_process(copy.folder / "dense_nano-0.lock") as process:
        report = compare(copy)
        assert trained == ["quick-0"]
        assert len(report["runs"]) == 3
        assert "another process is in epoch 1 of 2" in capsys.readouterr().out
        assert (copy.folder / "dense_nano-0.lock").is_file()
        assert not (copy.folder / "quick-0.lock").exists()
        process.kill()
        process.wait()
        # A dead process holds nothing, though its file is still there.
        assert len(compare(copy)["runs"]) == 4
    assert trained == ["quick-0", "dense_nano-0"]
    assert [path.name for path in copy.folder.glob("*.lock")] == [".lock"]  # the report's


def test_a_run_that_another_process_has_finished_meanwhile_is_not_trained_again(
    copy: CompareConfig, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dense_nano-1", "quick-1"):
        unfinish(copy, name)
    trained: list[str] = []

    def meanwhile(config: TrainConfig) -> None:
        trained.append(config.folder.name)
        for name in ("dense_nano-1", "quick-1"):
            shutil.copytree(done.config.folder / name, copy.folder / name)

    monkeypatch.setattr("pcenet.comparison.run.train", meanwhile)
    assert len(compare(copy)["runs"]) == 4
    assert trained == ["dense_nano-1"]


@pytest.mark.parametrize("run", [compare, status])
def test_a_run_of_other_options_is_an_error_before_anything_is_trained(
    copy: CompareConfig, trained: list[str], run: Any
) -> None:
    unfinish(copy, "dense_nano-0")
    (copy.folder / "quick-1" / "metrics.json").unlink()
    before = digest(copy.folder)
    changed = replace(copy, variants={"quick": VARIANTS["quick"] | {"lr": 0.02}})
    message = f"{copy.folder / 'quick-0'} was started with other options (lr 0.01 -> 0.02); change the options back"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(changed)
    (copy.folder / "quick-0" / "config.yaml").unlink()  # that of a run that is not finished is read, too
    with pytest.raises(ValueError, match=re.escape(message.replace("quick-0", "quick-1"))):
        run(changed)
    assert trained == []
    assert digest(copy.folder) == {name: value for name, value in before.items() if name != "quick-0/config.yaml"}


def test_a_run_that_fails_does_not_stop_the_others(
    copy: CompareConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("dense_nano-0", "quick-1"):
        unfinish(copy, name)
    tried: list[str] = []

    def fail(config: TrainConfig) -> object:
        tried.append(config.folder.name)
        if "dense" in config.folder.name:
            raise ValueError("the loss is no number")
        return train(config)

    monkeypatch.setattr("pcenet.comparison.run.train", fail)
    with pytest.raises(ValueError, match=r"1 of 4 runs failed; dense_nano-0: the loss is no number"):
        compare(copy)
    assert tried == ["dense_nano-0", "quick-1"]
    assert caplog.messages[0] == "dense_nano-0 failed: the loss is no number"
    assert len(json.loads((copy.folder / "comparison.json").read_text())["runs"]) == 3


def test_one_network_and_one_seed_have_nothing_to_differ_from(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.config.folder / "dense_nano-1", tmp_path / "dense_nano-1")
    report = compare(CompareConfig(["dense_nano"], [1], out=str(tmp_path), recipe=done.config.recipe))
    assert report["baseline"] is None
    (row,) = report["summary"]
    assert (row["seeds"], row["deviation"], row["difference"]) == ([1], None, None)
    assert "Differences" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.slow
def test_two_processes_share_the_work(recipe: TrainConfig, tmp_path: Path) -> None:
    options = {name: getattr(recipe, name) for name in ("data", "epochs", "batch_size", "precision", "workers")}
    options |= {"models": ["dense_nano", "pce_nano"], "seeds": 3, "threads": 1, "device": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "pcenet", "compare", "--config", "recipe.yaml", "--out", "all"]
    processes = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shown = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    made = [re.findall(r"^(\S+-\d): run \d of 6$", text, re.MULTILINE) for text in shown]
    assert sorted(made[0] + made[1]) == sorted(f"{name}-{seed}" for name in options["models"] for seed in range(3))
    assert all(made)
    assert len(json.loads((tmp_path / "all" / "comparison.json").read_text())["runs"]) == 6
