"""NaN and infinity never reach the weights: the step is named, and nothing is lost; or it is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import Start, assert_same_run, at_step, pcenet, rows_of
from torch import Tensor
from torch.nn.utils import get_total_norm

from pcenet.comparison.config import CompareConfig
from pcenet.comparison.run import compare
from pcenet.data.loaders import EpochSampler
from pcenet.nn import Router
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.tasks.classification import ClassificationObjective
from pcenet.training.checkpoints import read_checkpoint
from pcenet.training.loop import Trainer
from pcenet.training.run import train

STEP = 5  # the second of the second epoch, which has four
POISON = {"nan": math.nan, "infinite": math.inf}


def poison_input(patch: pytest.MonkeyPatch, value: float, steps: tuple[int, ...] = (STEP,)) -> None:
    """One pixel of the fourth image of a batch."""
    original = Trainer.batch_loss

    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        images, labels = batch
        if self.state.step in steps:
            images = images.clone()
            images[3, 1, 7, 9] = value
        return original(self, (images, labels), number)

    patch.setattr(Trainer, "batch_loss", batch_loss)


def poison_logits(patch: pytest.MonkeyPatch, value: float) -> None:
    """One logit of the first of two routers, in the patches of the third image of six; -inf passes softmax unseen."""
    original = Router.forward
    calls = [0]

    def forward(self: Router, *arguments: Any, **options: Any) -> Any:
        routing = original(self, *arguments, **options)
        calls[0] += self.training
        if self.training and calls[0] == 2 * STEP + 1:
            routing.logits.data[2 * len(routing.logits) // 6, 0] = value
        return routing

    patch.setattr(Router, "forward", forward)


def poison_loss(patch: pytest.MonkeyPatch, value: float) -> None:
    original, step = ClassificationObjective.loss, Trainer.batch_loss

    def batch_loss(self: Trainer, *batch: Any) -> Any:
        self.objective.factor = value if self.state.step == STEP else 1.0
        return step(self, *batch)

    patch.setattr(Trainer, "batch_loss", batch_loss)
    patch.setattr(ClassificationObjective, "loss", lambda self, *both: original(self, *both) * self.factor)


def poison_gradient(patch: pytest.MonkeyPatch, value: float) -> None:
    original = Trainer.backward

    def backward(self: Trainer, *batches: Any) -> Any:
        seen, norm = original(self, *batches)
        if self.state.step == STEP:
            self.model.get_classifier().bias.grad[1] = value
            norm = get_total_norm([parameter.grad for parameter in self.parameters])
        return seen, norm

    patch.setattr(Trainer, "backward", backward)


CAUSES: dict[str, tuple[Callable[[pytest.MonkeyPatch, float], None], str, list[int]]] = {
    "input": (poison_input, "the input is not finite", [3]),
    "router logits": (poison_logits, r"the router logits of layer stages\.1\.\d\.body are not finite", [2]),
    "loss": (poison_loss, "the loss is not finite", [0, 1, 2, 3, 4, 5]),
    "gradient": (poison_gradient, r"the gradient is not finite \(head\.fc\.bias\)", [0, 1, 2, 3, 4, 5]),
}


def numbers(places: list[int]) -> str:
    """The numbers in the data set of images at some places of the poisoned batch, the second of its epoch."""
    order = EpochSampler(24, seed=0).order(1)
    return ", ".join(str(order[6 + place]) for place in places)


QUICK = [("nan", "input"), ("nan", "router logits")]
CASES = [
    pytest.param(
        cause,
        value,
        marks=[pytest.mark.faults(f"{kind} {cause}"), *([] if (kind, cause) in QUICK else [pytest.mark.slow])],
    )
    for cause in CAUSES
    for kind, value in POISON.items()
]


@pytest.mark.parametrize(("cause", "value"), CASES)
def test_training_stops_before_the_update_and_names_step_cause_and_images(
    start: Start, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, cause: str, value: float
) -> None:
    poison, message, places = CAUSES[cause]
    config = start()
    with monkeypatch.context() as patch:
        poison(patch, value)
        where = f"^step 6, epoch 2, batch 2: {message}, images {numbers(places)} \\("
        with pytest.raises(ValueError, match=where) as error:
            train(config)
    assert len(re.findall(r"train/\w+/\d\.png", str(error.value))) == min(5, len(places))
    folder = RunFolder(config.folder)
    assert folder.steps[-1].name == "step-00000005"  # no checkpoint has seen it
    assert_same_run(train(start(resume="auto")), whole)


@pytest.mark.faults("infinite router logits that softmax hides")
def test_minus_infinity_is_seen_though_the_loss_is_finite(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_logits(monkeypatch, -math.inf)
    with pytest.raises(ValueError, match=r"the router logits of layer stages\.1"):
        train(start())


@pytest.mark.faults("steps that are not finite, left out")
def test_steps_are_left_out_up_to_a_limit(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and running statistics are those of before; the figures are means over the other batches."""
    states: dict[int, dict[str, Tensor]] = {}
    original = Trainer.optimizer_step

    def keep(self: Trainer, *arguments: Any) -> int:
        images = original(self, *arguments)
        states[self.state.step] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return images

    monkeypatch.setattr(Trainer, "optimizer_step", keep)
    poison_input(monkeypatch, math.nan, steps=(1, 2))
    folder = train(start(epochs=1, skip_nonfinite=2))
    said = [text for text in caplog.messages if "left out" in text]
    assert [text[:16] for text in said] == ["step 2, epoch 1,", "step 3, epoch 1,"]
    assert [re.search(r"\((\d) of at most 2 in a row\)", text)[1] for text in said] == ["1", "2"]
    for step in (2, 3):
        assert all(torch.equal(value, states[1][name]) for name, value in states[step].items())
    assert not all(torch.equal(value, states[1][name]) for name, value in states[4].items())
    (row,) = rows_of(folder)
    assert all(math.isfinite(float(value)) for name, value in row.items() if not name.endswith("/max_min"))
    averaged = read_checkpoint(folder.steps[-1])["averaged"]
    for name, value in states[4].items():  # the average's second update: the first took step 1 over as it was
        expected = torch.lerp(states[1][name], value, 1 - 2 / 11) if value.is_floating_point() else value
        torch.testing.assert_close(averaged[name], expected)


@pytest.mark.slow
@pytest.mark.faults("steps that are not finite, left out")
def test_beyond_the_limit_training_stops(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_input(monkeypatch, math.nan, steps=(1, 2, 3))
    with pytest.raises(ValueError, match=r"^step 4, .* and 2 steps in a row were left out"):
        train(start(skip_nonfinite=2))


@pytest.mark.slow
@pytest.mark.faults("steps that are not finite, left out")
def test_the_count_of_steps_left_out_survives(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(3, patch, interrupt)
        poison_input(patch, math.nan, steps=(1, 2))
        with pytest.raises(KeyboardInterrupt):
            train(start(skip_nonfinite=2))
    poison_input(monkeypatch, math.nan, steps=(3,))
    with pytest.raises(ValueError, match=r"^step 4, .* and 2 steps in a row were left out"):
        train(start(skip_nonfinite=2, resume="auto"))


@pytest.mark.slow
@pytest.mark.faults("nan loss")
def test_the_program_says_it_in_one_line_with_exit_2(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison_loss(monkeypatch, math.nan)
    assert pcenet(start(), tmp_path / "log") == 2
    error = (tmp_path / "log").read_text().splitlines()[-1]
    assert error.startswith("pcenet: error: step 6, epoch 2, batch 2: the loss is not finite, images ")
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.faults("a run of a comparison that is not finite")
def test_the_other_runs_of_a_comparison_go_on(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = start(model="dense_nano", epochs=1, out=None, router_noise=0.0, model_args={"widths": [8, 8, 16]})
    original, begin = ClassificationObjective.loss, ClassificationObjective.__init__

    def begin_with_factor(self: ClassificationObjective, config: TrainConfig, *others: Any) -> None:
        begin(self, config, *others)
        self.factor = math.nan if config.lr > 1 else 1.0

    monkeypatch.setattr(ClassificationObjective, "__init__", begin_with_factor)
    monkeypatch.setattr(ClassificationObjective, "loss", lambda self, *both: original(self, *both) * self.factor)
    variants = {"wild": {"model": "dense_nano", "lr": 5.0}}
    config = CompareConfig(["wild", "dense_nano"], [0], variants, out=str(tmp_path / "all"), recipe=recipe)
    with pytest.raises(ValueError, match=r"1 of 2 runs failed; wild-0: step 1, epoch 1, batch 1: the loss"):
        compare(config)
    report = json.loads((tmp_path / "all" / "comparison.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["dense_nano-0"]


@pytest.mark.faults("steps that are not finite, left out")
def test_an_epoch_of_which_nothing_is_left(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no figures of training, and the run goes on."""
    poison_input(monkeypatch, math.nan, steps=(0, 1, 2, 3))
    folder = train(start(skip_nonfinite=4))
    first, second = rows_of(folder)
    assert first["train/loss"] == ""
    assert math.isfinite(float(second["train/loss"]))
    assert math.isfinite(float(first["val/loss"]))
