"""What a network's layers saw in a forward pass: the routing, and what a `Routing` does not know, the map behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from pcenet.nn import Router, Routing, routers_of

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Seen:
    """One pass of one PCE layer.

    Attributes:
        routing: who went where.
        patch_size: S, in pixels of the map.
        map_size: height and width of the map that was cut into patches.
    """

    routing: Routing
    patch_size: int
    map_size: tuple[int, int]

    @property
    def divides(self) -> bool:
        """Whether the patches divide the map, none of them sticking out."""
        return not any(side % self.patch_size for side in self.map_size)

    def box(self, row: int, column: int, image_size: tuple[int, int]) -> Box:
        """Left, top, right and bottom of a patch in pixels of the image; what sticks out of the image is cut off.

        Args:
            row: of the patch.
            column: of the patch.
            image_size: height and width of the image that the network saw.
        """
        (top, bottom), (left, right) = (
            (cell * self.patch_size * image / side, min((cell + 1) * self.patch_size, side) * image / side)
            for cell, side, image in zip((row, column), self.map_size, image_size, strict=True)
        )
        return left, top, right, bottom


@contextmanager
def observe(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Note what every PCE layer of a network sees, through forward hooks on their routers.

    Yields:
        Layer name to what it saw in the last pass, in the order in which the layers ran; empty before the first pass.
    """
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        for name, router in routers_of(model):

            def collect(_module: nn.Module, args: Any, routing: Routing, name: str = name, of: Router = router) -> None:
                height, width = args[0].shape[2:]
                seen[name] = Seen(routing, of.patch_size, (height, width))

            stack.callback(router.register_forward_hook(collect).remove)
        yield seen
