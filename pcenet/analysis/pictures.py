"""Pictures of routing. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcenet.nn import Routing
from pcenet.reporting.colours import PALETTE
from pcenet.reporting.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def expert_map(routing: Routing) -> Tensor:
    """The first choice of every patch as a map, ``[images, rows, columns]`` int64, -1 where it was dropped."""
    first = torch.where(routing.dispatch_mask[:, 0], routing.expert_ids[:, 0], -1)
    return first.view(*routing.grid)


def routing_picture(
    images: Tensor, records: Mapping[str, Sequence[Routing]], titles: Sequence[str] | None = None
) -> Figure:
    """Images with the expert of each patch laid over them, one row per PCE layer.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1], the batch that the network saw, before normalisation.
        records: what `record_routing` collected for that batch; the last Routing of each layer is drawn.
        titles: a title per image.

    Returns:
        A matplotlib figure: the images on top, then each layer, the patch's hue being its best expert and its opacity
        that expert's probability, grey where this choice was dropped. Patches are drawn as if they divided the image
        evenly. Legend: each expert's share of the choices shown.

    Raises:
        ValueError: if there is nothing to draw, or the records are of another batch.
        ModuleNotFoundError: without matplotlib; ``pip install 'pcenet[plot]'``.
    """
    if not records:
        raise ValueError("records is empty: the network has no PCE layer, or did not run inside record_routing")
    latest = {name: routings[-1] for name, routings in records.items()}
    for name, routing in latest.items():
        if routing.grid.batch != len(images):
            raise ValueError(f"records of {name!r} are of {routing.grid.batch} images, but {len(images)} were given")
    rows, columns = len(latest) + 1, len(images)
    figure = new_figure(1.3 * columns + 2.2, 1.45 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    pixels = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    grey = pixels.mean(axis=3)
    for column in range(columns):
        axes[0, column].imshow(pixels[column])
        if titles is not None:
            axes[0, column].set_title(titles[column], fontsize=8)
    for row, (name, routing) in enumerate(latest.items(), start=1):
        overlay = _overlay(routing).numpy()
        extent = (-0.5, grey.shape[2] - 0.5, grey.shape[1] - 0.5, -0.5)
        for column in range(columns):
            axes[row, column].imshow(grey[column], cmap="gray", vmin=0, vmax=1)
            axes[row, column].imshow(overlay[column], extent=extent, interpolation="nearest")
        axes[row, 0].set_ylabel(name.removesuffix(".body"), fontsize=8)
        axes[row, -1].legend(
            handles=_legend(routing), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7, frameon=False
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def _overlay(routing: Routing) -> Tensor:
    """``[images, rows, columns, 4]``, colour and opacity of each patch."""
    experts = expert_map(routing).cpu()
    colours = torch.tensor([_rgb(PALETTE[e % len(PALETTE)]) for e in range(routing.num_experts)] + [_rgb("#808080")])
    opacity = routing.probs.detach().amax(dim=1).view(*routing.grid).float().cpu()
    return torch.cat((colours[experts], 0.25 + 0.45 * opacity.unsqueeze(-1)), dim=-1)


def _legend(routing: Routing) -> list[object]:
    from matplotlib.patches import Patch

    shares = (routing.expert_counts / routing.expert_ids.numel()).tolist()
    return [
        Patch(color=PALETTE[expert % len(PALETTE)], label=f"expert {expert}: {share:.0%}")
        for expert, share in enumerate(shares)
    ]


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
