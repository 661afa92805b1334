"""What was converted, what was left alone and why: for people to read, and to do it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from pcenet.choices import without_removed


@dataclass(frozen=True)
class Converted:
    """One convolution that became a `pcenet.nn.PCEConv2d`.

    Attributes:
        name: of the module in the network.
        patch_size: patch side in pixels of its map.
        leader: name of the layer whose routing it uses; None: it has a router of its own.
        map_size: height and width of its map in the trial pass.
    """

    name: str
    patch_size: int
    leader: str | None
    map_size: tuple[int, int]


@dataclass(frozen=True)
class Upcycling:
    """What `upcycle` did to a network, in all calls together; ``str()`` of it is a readable summary.

    Attributes:
        converted: the convolutions, in the order in which they run.
        left: 3x3 convolutions that were left alone, by name, and why.
        options: arguments of every `pcenet.nn.PCEConv2d`, ``patch_size`` aside.
        chosen_by: in words, how the layers were chosen.
    """

    converted: tuple[Converted, ...]
    left: Mapping[str, str]
    options: Mapping[str, Any]
    chosen_by: str

    def and_then(self, later: Self, order: Sequence[str]) -> Self:
        """The record of two calls, of networks whose convolutions run in this order."""
        if not later.converted:
            return self
        converted = sorted(self.converted + later.converted, key=lambda layer: order.index(layer.name))
        names = {layer.name for layer in converted}
        left = {name: reason for name, reason in later.left.items() if name not in names}
        chosen_by = f"{self.chosen_by}; then {later.chosen_by}"
        return replace(self, converted=tuple(converted), left=left, chosen_by=chosen_by)

    def to_dict(self) -> dict[str, Any]:
        """What `rebuild` needs, of types that JSON knows."""
        layers = [asdict(layer) | {"map_size": list(layer.map_size)} for layer in self.converted]
        return {"converted": layers, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; what was left alone is not known any more.

        Raises:
            ValueError: for anything that `to_dict` does not write, and options that were removed since.
        """
        try:
            layers = [Converted(**{**layer, "map_size": tuple(layer["map_size"])}) for layer in values["converted"]]
            return cls(tuple(layers), {}, without_removed(values["options"], "upcycling"), "as it was saved")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"upcycling {values!r} is no record of converted layers: {error!r}") from error

    def __str__(self) -> str:
        experts = self.options["num_experts"]
        lines = [f"converted {len(self.converted)} convolutions to {experts} experts each, {self.chosen_by}:"]
        width = max((len(layer.name) for layer in self.converted), default=0)
        for layer in self.converted:
            router = "own router" if layer.leader is None else f"router of {layer.leader}"
            height, columns = layer.map_size
            side = layer.patch_size
            lines.append(f"  {layer.name:{width}}  map {height} x {columns}, patches {side} x {side}, {router}")
        if self.converted:
            lines.append("The routers are untrained: which expert a patch gets is chance until they are.")
        if self.left:
            lines.append("left alone:")
        lines += [f"  {', '.join(names)}: {reason}" for reason, names in self._by_reason().items()]
        return "\n".join(lines)

    def why_left(self) -> str:
        """Why layers were left alone, in one line."""
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in self._by_reason().items())

    def _by_reason(self) -> dict[str, list[str]]:
        names = defaultdict(list)
        for name, reason in self.left.items():
            names[reason].append(name)
        return dict(names)
