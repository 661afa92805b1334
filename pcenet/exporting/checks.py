"""Comparing an exported file with its network before it is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.exporting.files import Runner
from pcenet.nn import Routing, record_routing, routers_of

TOLERANCE = 1e-4  # of logits, by their largest magnitude where that is above 1
SMALL_MARGIN = 1e-4  # of a patch's best logit over the next: rounding may send it to another expert
MOST_SMALL = 1e-2  # share of the patches that may have such a margin: of a network that was trained a little some have
BOOST = 100.0  # what is added to one expert's logit to leave the others empty
SHOWN = 20


@dataclass
class CheckReport:
    """What the comparison found.

    Attributes:
        samples: images that were compared.
        largest_difference: of a logit, over all images that count.
        patches: how many were routed in them, over all layers.
        small_margins: how many of those have a margin under `SMALL_MARGIN`.
        unsure: the images with such patches, as "CASE, image NUMBER".
        excused: those of them that differ.
        failures: what went wrong with other images.
    """

    samples: int = 0
    largest_difference: float = 0.0
    patches: int = 0
    small_margins: int = 0
    unsure: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str | None:
        """Why the file is not good enough; None where it is."""
        if self.failures:
            more = f", and {len(self.failures) - 1} more" if len(self.failures) > 1 else ""
            return f"its output is not the network's: {self.failures[0]}{more}"
        if self.small_margins > MOST_SMALL * self.patches:
            return (
                f"the router is unsure: {self.small_margins} of {self.patches} patches have a margin under "
                f"{SMALL_MARGIN}, more than {MOST_SMALL:.1%}, so that rounding would decide which expert serves them; "
                "train it longer"
            )
        return None

    def compare(self, case: str, expected: Tensor, found: Tensor, margins: Tensor) -> None:
        """Take in one batch.

        Args:
            case: how the batch is called.
            expected: the network's logits ``[B, classes, ...]``.
            found: the file's.
            margins: ``[B, patches]``, of all patches that were routed.
        """
        self.patches += margins.numel()
        self.small_margins += int((margins < SMALL_MARGIN).sum())
        for number, (ours, theirs, own) in enumerate(zip(expected, found, margins, strict=True)):
            name = f"{case}, image {number}"
            self.samples += 1
            unsure = bool((own < SMALL_MARGIN).any())
            if unsure:
                self.unsure.append(name)
            difference = (ours - theirs).abs().max().item()
            allowed = TOLERANCE * max(1.0, ours.abs().max().item())
            chosen = ours.gather(0, theirs.argmax(0, keepdim=True))[0]
            # Classes whose logits are equal within rounding may change places.
            same_class = bool((ours.amax(0) - chosen <= allowed).all())
            if difference <= allowed and same_class:
                self.largest_difference = max(self.largest_difference, difference)
            elif unsure:
                self.excused.append(name)
            else:
                self.failures.append(f"{name}: a logit differs by {difference:.2g}, more than {allowed:.2g}")


def check_runner(
    report: CheckReport,
    model: nn.Module,
    run: Runner,
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    case: str,
) -> None:
    """Compare a network with what runs in its place, on made-up images.

    Args:
        report: what is added to.
        model: the network, in evaluation mode.
        run: images ``[B, 3, H, W]`` to a list whose first entry is the logits.
        batches: sizes of batches.
        sizes: heights and widths of images.
        case: how this is called in the report.
    """
    for images in made_up_images(batches, sizes):
        with torch.no_grad(), record_routing(model) as records:
            expected = model(images)
        margins = [margin_of(each).view(len(images), -1) for records_of in records.values() for each in records_of]
        height, width = images.shape[2:]
        report.compare(
            f"{case} batch of {len(images)} at {height}x{width}",
            expected,
            run(images)[0],
            torch.cat(margins, dim=1) if margins else torch.zeros(len(images), 0),
        )


def margin_of(routing: Routing) -> Tensor:
    """``[N]``: by how much the last expert that is chosen leads over the first that is not; infinite where all are."""
    best = routing.logits.sort(dim=1, descending=True).values
    if routing.top_k == routing.num_experts:
        return best.new_full((len(best),), torch.inf)
    return best[:, routing.top_k - 1] - best[:, routing.top_k]


def made_up_images(batches: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Images of coarse shapes under noise, of about the mean and spread of normalised ones; always the same."""
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for batch in batches:
            coarse = F.interpolate(torch.randn(batch, 3, 5, 5, generator=generator), size=size, mode="bilinear")
            yield coarse + 0.3 * torch.randn(batch, 3, *size, generator=generator)


def sent_to_one(model: nn.Module, expert: int) -> nn.Module:
    """A copy of a network whose routers send all patches to one expert (``-1``: the last), the others staying empty."""
    forced = copy.deepcopy(model)
    with torch.no_grad():
        for _, router in routers_of(forced):
            # Not a part of what is centred, where there is such a bias.
            bias = router.logits.bias if router.expert_bias is None else router.expert_bias
            bias[expert] += BOOST
    return forced


def list_names(names: Sequence[str]) -> str:
    """Names in one line, the first of many."""
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
