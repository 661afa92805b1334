"""What an intervention costs: the score with it and without it, on the same images, with an interval.

A score is made of counts per image and class, so that images can be drawn again and again (bootstrap) without another
pass of the network: of classification the images that were right, of segmentation intersections and unions of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcenet.analysis.interventions import (
    Change,
    Redirect,
    fixed_expert,
    in_layer,
    knock_out,
    random_expert,
    redirect,
    removed_positions,
    second_choice,
    shuffled_positions,
)
from pcenet.choices import TaskName
from pcenet.data import IGNORE
from pcenet.nn import routers_of
from pcenet.tasks.pixels import upsample

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
AT_ONCE = 100  # draws whose images are weighted together, which bounds the memory

Values = npt.NDArray[np.float64]
Targets = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Intervention:
    """One change of a network's routing.

    Attributes:
        name: what to call it.
        change: within this context manager it is in force.
        layer: the layer that it is restricted to; None: all at once.
        expert: the expert that it is about, if it is about one.
    """

    name: str
    change: Change
    layer: str | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Tally:
    """Counts per image and class, ``[n, K]`` each.

    Attributes:
        hits: images of the class that were labelled right; or pixels in the intersection of class and prediction.
        out_of: images of the class; or pixels in the union.
    """

    hits: npt.NDArray[np.int64]
    out_of: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Effect:
    """What a change of a network does.

    Attributes:
        score: with it.
        difference: to the network without it; negative where it does harm.
        low: of the 95 % bootstrap interval of the difference, images being drawn with replacement.
        high: its other end.
        by_class: ``[K]``, the difference of each class's accuracy or IoU; NaN where a class has neither.
    """

    score: float
    difference: float
    low: float
    high: float
    by_class: Values


def standard_interventions(model: nn.Module, seed: int = 0) -> list[Intervention]:
    """Those of the report.

    Over all layers at once: a random expert, the router's second choice, each expert for all, positions shuffled and
    removed. In each layer alone: a random expert, and each expert knocked out.

    What a network does not allow is left out: experts that not all layers have, a second choice where every expert
    serves every patch, positions where no router sees any.
    """
    routers = list(routers_of(model))
    spare = all(router.top_k < router.num_experts for _, router in routers)
    common = min(router.num_experts for _, router in routers)

    def to(choose: Redirect) -> Change:
        return lambda network: redirect(network, choose)

    found = [Intervention("random expert", to(random_expert(seed)))]
    if spare:
        found.append(Intervention("second choice", to(second_choice)))
    found += [Intervention("one expert for all", to(fixed_expert(e)), expert=e) for e in range(common)]
    if any(router.num_bands for _, router in routers):
        found.append(Intervention("positions shuffled", shuffled_positions(seed)))
        found.append(Intervention("positions removed", removed_positions))
    for name, router in routers:
        found.append(Intervention("random expert", to(in_layer(name, random_expert(seed))), layer=name))
        if router.top_k < router.num_experts:
            for e in range(router.num_experts):
                found.append(Intervention("knocked out", to(in_layer(name, knock_out(e))), layer=name, expert=e))
    return found


@torch.inference_mode()
def tallies(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Targets]],
    interventions: Sequence[Intervention],
    num_classes: int,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> tuple[Tally, list[Tally]]:
    """Counts of the untouched network, and under each intervention, in one pass over the data.

    Args:
        model: the network; it is put into evaluation mode.
        batches: images ``[B, 3, H, W]`` with their classes ``[B]``, or with B masks ``[h, w]``.
        interventions: what to try.
        num_classes: K.
        run: network and images to logits; None: the network is called as it is.
    """
    model.eval()
    parts: list[list[Tally]] = [[] for _ in range(1 + len(interventions))]
    forward = run or (lambda network, images: network(images))
    for images, targets in batches:
        parts[0].append(tally(forward(model, images), targets, num_classes))
        for intervention, found in zip(interventions, parts[1:], strict=True):
            with intervention.change(model):
                found.append(tally(forward(model, images), targets, num_classes))
    base, *others = map(joined, parts)
    return base, others


def joined(parts: Sequence[Tally]) -> Tally:
    """The counts of all batches."""
    return Tally(np.concatenate([part.hits for part in parts]), np.concatenate([part.out_of for part in parts]))


def tally(logits: Tensor, targets: Targets, num_classes: int) -> Tally:
    """Counts of one batch.

    Args:
        logits: ``[B, K]`` with classes ``[B]``, or ``[B, K, h, w]`` with B masks, to whose sizes they are enlarged.
        targets: the classes, or the masks.
        num_classes: K.
    """
    if isinstance(targets, Tensor) and targets.ndim == 1:
        labels = targets.cpu()
        of_class = nn.functional.one_hot(labels, num_classes)
        right = (logits.argmax(1).cpu() == labels).long()
        return Tally((of_class * right[:, None]).numpy(), of_class.numpy())
    hits, unions = [], []
    for image, mask in zip(logits, targets, strict=True):
        mask = mask.to(image.device)
        counted = mask != IGNORE
        predicted = upsample(image, (mask.shape[0], mask.shape[1])).argmax(0)[counted]
        label = mask[counted]
        both = torch.bincount(label[predicted == label], minlength=num_classes)
        either = torch.bincount(label, minlength=num_classes) + torch.bincount(predicted, minlength=num_classes)
        hits.append(both.cpu())
        unions.append((either - both).cpu())
    return Tally(torch.stack(hits).numpy(), torch.stack(unions).numpy())


def score(task: TaskName, hits: npt.NDArray[np.generic], out_of: npt.NDArray[np.generic]) -> Values:
    """Top-1 accuracy, or the mean IoU of the classes that occur or are predicted, of summed counts ``[..., K]``."""
    if task == "classify":
        return np.asarray(hits.sum(-1) / out_of.sum(-1), np.float64)
    shares = _shares(hits, out_of)
    occurs = ~np.isnan(shares)
    return np.asarray(np.nansum(shares, -1) / np.maximum(occurs.sum(-1), 1), np.float64)


def effect(task: TaskName, base: Tally, changed: Tally, *, resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """What a change did, from the counts of the same images without it and with it.

    Args:
        task: decides what the score is.
        base: counts without the change.
        changed: counts with it.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    sums = [counts.sum(0) for counts in (base.hits, base.out_of, changed.hits, changed.out_of)]
    before, after = score(task, sums[0], sums[1]), score(task, sums[2], sums[3])
    differences = _resampled_differences(task, base, changed, resamples, seed)
    low, high = np.percentile(differences, INTERVAL)
    return Effect(
        score=float(after),
        difference=float(after - before),
        low=float(low),
        high=float(high),
        by_class=_shares(sums[2], sums[3]) - _shares(sums[0], sums[1]),
    )


def _resampled_differences(task: TaskName, base: Tally, changed: Tally, resamples: int, seed: int) -> Values:
    """``[resamples]``: the difference on as many images, drawn with replacement, the same for both networks."""
    rng = np.random.default_rng(seed)
    images = len(base.hits)
    found = []
    for start in range(0, resamples, AT_ONCE):
        draws = min(AT_ONCE, resamples - start)
        times = rng.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float64)
        before, after = (score(task, times @ each.hits, times @ each.out_of) for each in (base, changed))
        found.append(after - before)
    return np.concatenate(found)


def _shares(hits: npt.NDArray[np.generic], out_of: npt.NDArray[np.generic]) -> Values:
    """``hits / out_of``, NaN where a class has none."""
    nothing = np.full(hits.shape, np.nan)
    return np.divide(hits, out_of, out=nothing, where=np.asarray(out_of) > 0)
