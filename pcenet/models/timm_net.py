"""Any classifier of timm, under the name "timm:NAME": as it is, or upcycled to PCE convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from huggingface_hub import logging as hub_logging
from torch import Tensor, nn

from pcenet.choices import did_you_mean
from pcenet.models.hub import SavableModel
from pcenet.models.pcenet import classifier_names
from pcenet.upcycling import Upcycling, rebuild, upcycle

PREFIX = "timm:"
SIMILAR = 0.9  # how like a network of timm's a name must be for a suggestion
# How images are prepared for all networks of this package.
_PREPARED = {"crop_pct": 1.0, "interpolation": "bilinear"}
# What `timm.create_model` does with a network, such as loading files into it, is no argument of the network.
_NOT_OF_THE_NETWORK = {*inspect.signature(timm.create_model).parameters, "features_only"} - {"kwargs"}


def is_timm(name: str) -> bool:
    """Whether a network's name is of the form "timm:NAME"."""
    return name.startswith(PREFIX)


def check_timm(name: str) -> str:
    """The name that timm has for "timm:NAME".

    Raises:
        ValueError: where timm has no such network, or it is one of this package; names the nearest.
    """
    inner = name.removeprefix(PREFIX)
    if inner.partition(".")[0] in classifier_names():
        raise ValueError(f"model {name!r} is a network of this package: give {inner}")
    if not timm.is_model(inner):
        raise ValueError(f"model {name!r}: timm has no network {inner!r}{did_you_mean(inner, timm.list_models())}")
    return inner


def like_timm(name: str) -> str:
    """``; did you mean 'timm:NAME'?`` for the name of a network of timm, or one that is nearly that; else nothing."""
    own = set(classifier_names())
    if timm.is_model(name):
        return f"; did you mean '{PREFIX}{name}'?"
    return did_you_mean(PREFIX + name, [PREFIX + other for other in timm.list_models() if other not in own], SIMILAR)


def timm_input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network is made for."""
    cfg = timm.get_pretrained_cfg(check_timm(name))
    return (3, 224, 224) if cfg is None else cfg.input_size


class TimmNet(SavableModel):
    """A classifier of timm that is trained, saved and loaded like those of this package.

    Args:
        name: "timm:NAME", such as ``"timm:resnet18"``, with or without the tag of pretrained weights.
        num_classes: classes of the classifier.
        pretrained: load timm's weights, which it downloads where they are not in its cache.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; only networks that have it take another value than 0.
        pretrained_cfg_overlay: replaces parts of timm's record of the preprocessing, such as ``input_size``.
        upcycling: what `pcenet.upcycling.Upcycling.to_dict` gave: which layers are PCE convolutions. None: none are.
        timm_options: further arguments of the network, as `timm.create_model` takes them.

    Attributes:
        network: timm's module.

    Raises:
        ValueError: for an unknown name, or pretrained weights that cannot be had.
        TypeError: for an option that the network does not have.
    """

    task = "classify"

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        *,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        upcycling: Mapping[str, Any] | None = None,
        **timm_options: Any,
    ) -> None:
        super().__init__()
        inner = check_timm(name)
        if wrong := sorted(_NOT_OF_THE_NETWORK & timm_options.keys()):
            raise ValueError(f"{', '.join(wrong)}: no argument of the network {inner}; leave it out")
        options = dict(timm_options)
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        overlay = {**_PREPARED, **(pretrained_cfg_overlay or {})}
        self.network = _create(inner, pretrained, num_classes, drop_rate, overlay, options)
        self.num_classes = num_classes
        cfg = self.network.pretrained_cfg
        assert isinstance(cfg, Mapping)
        self.pretrained_cfg = {**cfg, "architecture": name}
        self.model_args = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, **timm_options}
        if upcycling is not None:
            record = Upcycling.from_dict(upcycling)
            rebuild(self.network, record)
            self.model_args["upcycling"] = record.to_dict()

    def upcycle(self, **options: Any) -> Upcycling:
        """Turn convolutions into PCE convolutions, see `pcenet.upcycle`; whatever is frozen, the classifier trains.

        Args:
            options: of `pcenet.upcycle`.

        Returns:
            What was converted, and what was left alone.
        """
        if "upcycling" in self.model_args:
            raise ValueError(f"{self.pretrained_cfg['architecture']} is upcycled already")
        # timm's record keeps the size that the network was made for; this one that of the images at hand.
        size = self.pretrained_cfg["input_size"]
        reference = next(self.network.parameters())
        noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(reference.device, reference.dtype)
        upcycle(self.network, **({"example": noise} | options))
        for parameter in self.get_classifier().parameters():
            parameter.requires_grad_(True)
        record = self.upcycling
        assert record is not None
        self.model_args["upcycling"] = record.to_dict()
        return record

    @property
    def upcycling(self) -> Upcycling | None:
        """What was converted; None where nothing was."""
        record = getattr(self.network, "upcycling", None)
        return record if isinstance(record, Upcycling) else None

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.network.get_classifier()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What timm's network lists."""
        listed: Iterable[str] = getattr(self.network, "no_weight_decay", tuple)()
        return {f"network.{name}" for name in listed}

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        logits: Tensor = self.network(x)
        return logits


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without a network the Hub's client tells of every try; one error says it all in the end."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _create(
    name: str, pretrained: bool, num_classes: int, drop_rate: float, overlay: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    try:
        with quiet_hub():
            return timm.create_model(
                name,
                pretrained=pretrained,
                num_classes=num_classes,
                drop_rate=drop_rate,
                pretrained_cfg_overlay=overlay,
                **options,
            )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"pretrained: timm could not get the weights of {name}, which come from the Hugging Face Hub: {error}; "
            "check the network connection, or start from weights of your own"
        ) from error
