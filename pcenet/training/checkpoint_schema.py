"""What a checkpoint has to hold, before anything of it is used.

`fault_in` looks at values in themselves, `fault_for` at how they fit the network and the run. What passes both can be
restored: nobody behind them needs to look again.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from pcenet.models.hub import MisfitError, check_tensors
from pcenet.nn import routers_of
from pcenet.runs.schemas import (
    ANYTHING,
    COUNT,
    FIGURE,
    NUMBER,
    TEXT,
    Each,
    Rule,
    misfit,
    or_none,
)
from pcenet.training.state import FORMAT

WEIGHTS = ("model", "averaged")  # of now, and their average


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is an ordinary tensor of real numbers on the processor, with memory for all of them."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


FINITE = Rule("a tensor of finite numbers", lambda value: is_plain_tensor(value) and bool(value.isfinite().all()))
SCALAR = Rule("a single number in a tensor", lambda value: is_plain_tensor(value) and value.ndim == 0)
COUNTS = Rule(
    "a tensor of counts",
    lambda value: is_plain_tensor(value) and value.dtype == torch.int64 and value.ndim < 2 and bool((value >= 0).all()),
)
SPLIT = Rule(
    "a number of images and a digest",
    lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and COUNT.holds(value[0]) and TEXT.holds(value[1])
    ),
)

SCALER = Rule(
    "the state of a loss scale, or nothing",
    lambda value: (
        isinstance(value, dict)
        and (not value or value.keys() == GradScaler("cpu").state_dict().keys())
        and all(type(each) in (int, float) and 0 <= each < math.inf for each in value.values())
        and all(value.get(name, 1) > 0 for name in ("scale", "growth_factor", "backoff_factor", "growth_interval"))
    ),
)
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
FIGURES = {
    "means": {"sums": Each(SCALAR), "images": COUNT},
    "routing": Each({"load": or_none(COUNTS), "kept": or_none(COUNTS)}),
}
CONTENT = {
    "format": Rule(f"{FORMAT}", lambda value: value == FORMAT),
    "model": Each(FINITE),
    "averaged": Each(FINITE),
    "averages": COUNT,
    "optimizer": {"state": Each(Each(FINITE), keys=COUNT), "param_groups": [Each(ANYTHING)]},
    "scaler": SCALER,
    "figures": [FIGURES],
    "step": COUNT,
    "batch": COUNT,
    "skipped": COUNT,
    "images": COUNT,
    "seconds": NUMBER,
    "elapsed": NUMBER,
    "stopped": or_none(TEXT),
    "rows": [Each(FIGURE)],
    "run": {"config": Each(ANYTHING), "classes": [TEXT], "data": Each(SPLIT)},
}


def fault_in(content: Any) -> str | None:
    """What is wrong with what a checkpoint holds, as far as that can be told from itself; None where nothing is."""
    if fault := misfit(content, CONTENT, ""):
        return fault
    if [row.get("epoch") for row in content["rows"]] != list(range(1, len(content["rows"]) + 1)):
        return "the rows are not those of epochs from 1 on"
    return None


def row_of(score: str) -> dict[str, Rule]:
    """What is needed of the figures of an epoch when a run ends."""
    return dict.fromkeys(("step", f"val/{score}", "train/epoch_seconds", "train/images_per_second"), NUMBER)


def fault_for(
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batches: int,
    accumulate: int,
    score: str,
) -> str | None:
    """What in a checkpoint does not fit a network and its run; None where everything does.

    Args:
        content: what `fault_in` finds nothing wrong with.
        model: the network.
        optimizer: of its parameters, fresh.
        epochs: of the run.
        batches: of an epoch.
        accumulate: batches of a step.
        score: the figure of merit.
    """
    if fault := misfit(content["rows"], [row_of(score)], "rows"):
        return fault
    for key in WEIGHTS:
        try:
            check_tensors(content[key], model, f"{key} does not fit the network", "it is another one's")
        except MisfitError as error:
            return str(error)
    done, at, step = len(content["rows"]), content["batch"], content["step"]
    if done + (at > 0) > epochs or at > batches:  # with other numbers of processes, an epoch may have one less
        return f"{done} epochs and {at} batches are more than {epochs} epochs of {batches} batches"
    behind = (content["rows"][-1]["step"] if done else 0) + math.ceil(at / accumulate)
    if step != behind:
        return f"step is {step}, but {behind:g} steps lie behind"
    if content["skipped"] > step:
        return f"{content['skipped']} steps in a row were left out of {step}"
    experts = {name: router.num_experts for name, router in routers_of(model)}
    for state in content["figures"]:
        for name, counts in state["routing"].items():
            if name in experts and counts["load"] is not None and counts["load"].shape != (experts[name],):
                return f"the load of layer {name} is not of {experts[name]} experts"
    return fault_of_optimiser(content, optimizer)


def fault_of_optimiser(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """What in the state of the optimiser does not fit that of a fresh one; None where everything does."""
    saved, fresh = content["optimizer"], optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if [group.get("params") for group in groups] != [group["params"] for group in fresh]:
        return "the optimiser has other parameters"
    for group, own in zip(groups, fresh, strict=True):
        for name in group.keys() & own.keys() - {"lr"}:
            if group[name] != own[name]:
                return f"the optimiser's {name} is {reprlib.repr(group[name])}, not {own[name]!r}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        if not 0 <= index < len(parameters) or not state.keys() >= MOMENTS:
            return f"there is no parameter {index} of which the optimiser could have {', '.join(map(str, state))}"
        if any(state[name].shape != parameters[index].shape for name in ("exp_avg", "exp_avg_sq")):
            return f"the optimiser's moments of parameter {index} are not of its shape"
        if state["step"].ndim or state["step"] < 0 or (state["exp_avg_sq"] < 0).any():
            return f"the optimiser's steps or squares of parameter {index} are negative"
    return None
