"""What a checkpoint has to hold, before anything of it is used.

`fault_in` looks at values in themselves, `fault_for` at how they fit the network and the run. What passes both can be
restored: nobody behind them needs to look again.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcenet.models.hub import MisfitError, check_tensors
from pcenet.nn import routers_of
from pcenet.runs.schemas import (
    ANYTHING,
    COUNT,
    FIGURE,
    NUMBER,
    TEXT,
    Each,
    Maybe,
    Rule,
    misfit,
    or_none,
)

MODEL = "model."  # how the names of the network's tensors begin in a checkpoint
WEIGHTS = ("state_dict", "current_model_state")  # averaged weights, and those of now


def is_plain(value: Any) -> bool:
    """Whether a value is an ordinary tensor of real numbers on the processor, with memory for all of them."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


FINITE = Rule("a tensor of finite numbers", lambda value: is_plain(value) and bool(value.isfinite().all()))
SCALAR = Rule("a single number in a tensor", lambda value: is_plain(value) and value.ndim == 0)
COUNTS = Rule(
    "a tensor of counts",
    lambda value: is_plain(value) and value.dtype == torch.int64 and value.ndim < 2 and bool((value >= 0).all()),
)
VERSION = Rule(
    "a version from 2.0 on",
    lambda value: (
        isinstance(value, str)
        and re.fullmatch(r"[2-9]\.\d+(\.\d+)?((a|b|rc|\.dev|\.post)\d+)*(\+[a-z\d.]+)?", value) is not None
    ),
)
SPLIT = Rule(
    "a number of images and a digest",
    lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and COUNT.holds(value[0]) and TEXT.holds(value[1])
    ),
)
NOTHING = Rule("empty", lambda value: value is None or value == {})

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
COUNTERS = {"ready": COUNT, "completed": COUNT, "started": Maybe(COUNT), "processed": Maybe(COUNT)}
PROGRESS = {"total": COUNTERS, "current": COUNTERS}
STEPS = {"optimizer": {"step": PROGRESS, "zero_grad": PROGRESS}}
SO_FAR = {
    "means": {"sums": Each(SCALAR), "images": COUNT},
    "routing": Each({"load": or_none(COUNTS), "kept": or_none(COUNTS)}),
}
CONTENT = {
    "global_step": COUNT,
    "pytorch-lightning_version": VERSION,
    "state_dict": Each(FINITE),
    "current_model_state": Each(FINITE),
    "averaging_state": {"n_averaged": COUNTS},
    "optimizer_states": [{"state": Each(Each(FINITE), keys=COUNT), "param_groups": [Each(ANYTHING)]}],
    "lr_schedulers": [
        {"last_epoch": COUNT, "_step_count": COUNT, "base_lrs": [NUMBER], "_last_lr": [NUMBER], "lr_lambdas": [NOTHING]}
    ],
    "loops": {
        "fit_loop": {
            "epoch_progress": PROGRESS,
            "epoch_loop.batch_progress": PROGRESS,
            "epoch_loop.scheduler_progress": PROGRESS,
            "epoch_loop.automatic_optimization.optim_progress": STEPS,
        }
    },
    "epoch_so_far": {**SO_FAR, "others": Maybe([SO_FAR])},
    "run": {
        "config": Each(ANYTHING),
        "classes": [TEXT],
        "data": Each(SPLIT),
        "batches": COUNT,
        "stopped": Maybe(or_none(TEXT)),
    },
    "callbacks": Each(Each(ANYTHING)),
}
CALLBACKS = {  # what is behind a brace in the name of one is left out
    "History": {"rows": [Each(FIGURE)]},
    "Throughput": {"images": COUNT, "seconds": NUMBER},
    "Checkpoints": {"best": NUMBER, "best_step": NUMBER},
    "FiniteSteps": Maybe({"skipped": COUNT, "left_out": or_none(COUNT)}),
    "Averaging": Maybe({"latest_update_step": COUNT}),
    "NoProgress": Maybe({"wait_count": COUNT, "stopped_epoch": COUNT, "best_score": SCALAR, "patience": COUNT}),
    "TimeLimit": Maybe({"time_elapsed": Each(NUMBER)}),
}


def fault_in(content: Any) -> str | None:
    """What is wrong with what a checkpoint holds, as far as that can be told from itself; None where nothing is."""
    if fault := misfit(content, CONTENT, ""):
        return fault
    callbacks = {name.partition("{")[0]: state for name, state in content["callbacks"].items()}
    return misfit(callbacks, CALLBACKS, "callbacks") or next(disagreements(content), None)


def disagreements(content: Mapping[str, Any]) -> Iterator[str]:
    """Where a checkpoint, whose values are each what they should be, contradicts itself."""
    rows, batches, step = content["callbacks"]["History"]["rows"], content["run"]["batches"], content["global_step"]
    loop = content["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]["ready"]
    optimiser = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
        yield "the rows of History are not those of epochs from 1 on"
    if epochs != len(rows) + (batches > 0):
        yield f"{epochs} epochs were begun, but there are figures of {len(rows)}"
    if batches and batches != (begun := loop["epoch_loop.batch_progress"]["current"]["ready"]):
        yield f"{batches} batches of an epoch are behind it, but {begun} were begun"
    if step != optimiser["total"]["completed"]:
        yield f"global_step is {step}, but the optimiser has made {optimiser['total']['completed']} steps"
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        counts = loop[name]["current"]
        if any(not counts["ready"] - 1 <= count <= counts["ready"] for count in counts.values()):
            yield f"{name} counts {counts}, which differ by more than one"


def row_of(score: str) -> dict[str, Rule]:
    """What is needed of the figures of an epoch when a run ends."""
    return dict.fromkeys(("step", f"val/{score}", "train/epoch_seconds", "train/images_per_second"), NUMBER)


def fault_for(
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batches: int,
    score: str,
) -> str | None:
    """What in a checkpoint does not fit a network and its run; None where everything does.

    Args:
        content: what `fault_in` finds nothing wrong with.
        model: the network.
        optimizer: of its parameters, with its schedule, fresh.
        epochs: of the run.
        batches: of an epoch.
        score: the figure of merit.
    """
    if fault := misfit(content["callbacks"]["History"]["rows"], [row_of(score)], "rows"):
        return fault
    for key in WEIGHTS:
        tensors = {name.removeprefix(MODEL): tensor for name, tensor in content[key].items()}
        try:
            check_tensors(tensors, model, f"{key} does not fit the network", "it is another one's")
        except MisfitError as error:
            return str(error)
    if content["averaging_state"]["n_averaged"].ndim:
        return "n_averaged is no single number"
    done, at = len(content["callbacks"]["History"]["rows"]), content["run"]["batches"]
    if done + (at > 0) > epochs or at > batches:  # with other numbers of processes, an epoch may have one less
        return f"{done} epochs and {at} batches are more than {epochs} epochs of {batches} batches"
    experts = {name: router.num_experts for name, router in routers_of(model)}
    for state in (content["epoch_so_far"], *content["epoch_so_far"].get("others", ())):
        for name, counts in state["routing"].items():
            if name in experts and counts["load"] is not None and counts["load"].shape != (experts[name],):
                return f"the load of layer {name} is not of {experts[name]} experts"
    return fault_of_optimiser(content, optimizer)


def fault_of_optimiser(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """What in the states of optimiser and schedule does not fit those of a fresh one; None where everything does."""
    if len(content["optimizer_states"]) != 1 or len(content["lr_schedulers"]) != 1:
        return "there must be one optimiser with one schedule"
    (saved,), (schedule,) = content["optimizer_states"], content["lr_schedulers"]
    groups, fresh = saved["param_groups"], optimizer.state_dict()["param_groups"]
    if [group.get("params") for group in groups] != [group["params"] for group in fresh]:
        return "the optimiser has other parameters"
    if schedule["base_lrs"] != [group["initial_lr"] for group in fresh] or any(
        len(schedule[name]) != len(fresh) for name in ("_last_lr", "lr_lambdas")
    ):
        return "the schedule is of other groups of parameters"
    for group, own in zip(groups, fresh, strict=True):
        for name in group.keys() & own.keys() - {"lr"}:
            if group[name] != own[name]:
                return f"the optimiser's {name} is {reprlib.repr(group[name])}, not {own[name]!r}"
        if not (NUMBER.holds(group.get("lr")) and 0 <= group["lr"] <= own["initial_lr"]):
            return f"the optimiser's learning rate is not between 0 and {own['initial_lr']}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        if not 0 <= index < len(parameters) or not state.keys() >= MOMENTS:
            return f"there is no parameter {index} of which the optimiser could have {', '.join(map(str, state))}"
        if any(state[name].shape != parameters[index].shape for name in ("exp_avg", "exp_avg_sq")):
            return f"the optimiser's moments of parameter {index} are not of its shape"
        if state["step"].ndim or state["step"] < 0 or (state["exp_avg_sq"] < 0).any():
            return f"the optimiser's steps or squares of parameter {index} are negative"
    return None
