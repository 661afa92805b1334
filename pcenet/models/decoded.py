"""Segmentation networks "DECODER:ENCODER": a decoder of segmentation-models-pytorch on one of our classifiers' stages.

The encoder is made by its timm name and keeps the names of its weights, so that those of a trained classifier load into
``network.encoder``. The decoders are segmentation-models-pytorch's own, wired as its models wire them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.models.blocks import network_options, stacked_norm_names
from pcenet.models.hub import SavableModel
from pcenet.models.limits import check_pixel_classes
from pcenet.models.pcenet import PCENet, classifier_names
from pcenet.models.positions import position_map_names
from pcenet.models.unet import resize, segmentation_cfg

# A pooling has no place in a segmentation network.
_ENCODER_OPTIONS = tuple(name for name in network_options(PCENet) if name != "global_pool")


@dataclass(frozen=True)
class _Plan:
    """What a decoder is made from.

    Attributes:
        channels: of the maps at strides 1, 2, 4 ...; the image's where the encoder has no map at stride 1, and 0 for
            one that it lacks at stride 2, as segmentation-models-pytorch has it.
        widths: of the decoder.
    """

    channels: list[int]
    widths: list[int]

    @property
    def depth(self) -> int:
        """Halvings of the image."""
        return len(self.channels) - 1


def _mirrored(strides: Sequence[int], widths: Sequence[int]) -> list[int]:
    """For a decoder that climbs to the image's size: half the encoder's width at each level, in multiples of 8."""
    finer = [widths[0] >> step for step in range(1, strides[0].bit_length())]
    return [-(-width // 16) * 8 for width in (*widths[-2::-1], *finer)]


def _half_of_last(strides: Sequence[int], widths: Sequence[int]) -> list[int]:
    """For a decoder of one width: half the encoder's last, in multiples of 32, by which FPN's groups divide."""
    return [max(32, widths[-1] // 64 * 32)]


def _first(strides: Sequence[int], widths: Sequence[int]) -> list[int]:
    """For a decoder whose width is that of the image's size alone."""
    return [widths[0]]


def _by_level(plan: _Plan) -> dict[str, Any]:
    return {"encoder_channels": plan.channels, "decoder_channels": plan.widths, "n_blocks": plan.depth}


def _atrous(plan: _Plan) -> dict[str, Any]:
    # The rates and kinds of convolution that segmentation-models-pytorch takes by default.
    return {"out_channels": plan.widths[0], "atrous_rates": (12, 24, 36), "aspp_dropout": 0.0}


@dataclass(frozen=True)
class _Decoder:
    """How to make one of segmentation-models-pytorch's decoders, and what it asks of the encoder.

    Attributes:
        home: its module and class below ``segmentation_models_pytorch.decoders``.
        arguments: those of its class.
        default_widths: from the encoder's strides and widths; their number is the number that the decoder takes.
        head_kernel: side of the last convolution's kernel.
        min_depth: halvings of the image that it needs.
        last_strides: those of the encoder's last stage that it accepts; empty: all.
        width_multiple: what its widths are multiples of.
        min_side: cells that the coarsest map needs in height and width.
    """

    home: tuple[str, str]
    arguments: Callable[[_Plan], dict[str, Any]]
    default_widths: Callable[[Sequence[int], Sequence[int]], list[int]] = _half_of_last
    head_kernel: int = 1
    min_depth: int = 1
    last_strides: tuple[int, ...] = ()
    width_multiple: int = 1
    min_side: int = 1

    def fits(self, strides: Sequence[int]) -> bool:
        """Whether it works on an encoder of these strides."""
        deep_enough = strides[-1] >= 2**self.min_depth
        return deep_enough and (not self.last_strides or strides[-1] in self.last_strides)

    def make(self, plan: _Plan) -> nn.Module:
        """The decoder with fresh weights."""
        module, name = self.home
        home = importlib.import_module(f"segmentation_models_pytorch.decoders.{module}.decoder")
        decoder: nn.Module = getattr(home, name)(**self.arguments(plan))
        return decoder


DECODERS = {
    "unet": _Decoder(("unet", "UnetDecoder"), _by_level, _mirrored, head_kernel=3),
    "unetplusplus": _Decoder(("unetplusplus", "UnetPlusPlusDecoder"), _by_level, _mirrored, head_kernel=3),
    "manet": _Decoder(("manet", "MAnetDecoder"), _by_level, _mirrored, head_kernel=3),
    "linknet": _Decoder(
        ("linknet", "LinknetDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "n_blocks": plan.depth,
            "prefinal_channels": plan.widths[0],
        },
        _first,
    ),
    "fpn": _Decoder(
        ("fpn", "FPNDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "encoder_depth": plan.depth,
            "pyramid_channels": plan.widths[0],
            "segmentation_channels": plan.widths[0],
            "dropout": 0.0,
        },
        min_depth=3,
        width_multiple=32,
    ),
    "deeplabv3": _Decoder(
        ("deeplabv3", "DeepLabV3Decoder"),
        lambda plan: {"in_channels": plan.channels[-1], "aspp_separable": False, **_atrous(plan)},
    ),
    "deeplabv3plus": _Decoder(
        ("deeplabv3", "DeepLabV3PlusDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "encoder_depth": plan.depth,
            "output_stride": 2**plan.depth,
            "aspp_separable": True,
            **_atrous(plan),
        },
        last_strides=(8, 16),
    ),
    "pan": _Decoder(
        ("pan", "PANDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "encoder_depth": plan.depth,
            "decoder_channels": plan.widths[0],
        },
        head_kernel=3,
        min_depth=3,
        min_side=8,  # it is halved three times
    ),
    "pspnet": _Decoder(
        ("pspnet", "PSPDecoder"),
        lambda plan: {"encoder_channels": plan.channels, "out_channels": plan.widths[0], "dropout": 0.0},
        head_kernel=3,
    ),
    "segformer": _Decoder(
        ("segformer", "SegformerDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "encoder_depth": plan.depth,
            "segmentation_channels": plan.widths[0],
        },
        min_depth=3,
    ),
    "upernet": _Decoder(
        ("upernet", "UPerNetDecoder"),
        lambda plan: {
            "encoder_channels": plan.channels,
            "encoder_depth": plan.depth,
            "decoder_channels": plan.widths[0],
        },
        min_depth=3,
    ),
}
"""What can stand before the colon."""


def decoded_options() -> tuple[str, ...]:
    """Names of the arguments that shape a `DecodedNet`."""
    return ("decoder_widths", *_ENCODER_OPTIONS)


def split_name(name: str) -> tuple[str, str]:
    """Decoder and encoder of a name "DECODER:ENCODER".

    Raises:
        ValueError: where one of them does not exist; lists those that do.
    """
    decoder, _, encoder = name.partition(":")
    encoders = classifier_names()
    if encoder not in encoders:
        raise ValueError(f"{name!r}: encoder {encoder!r} is unknown; take one of {', '.join(encoders)}")
    if decoder not in DECODERS:
        raise ValueError(f"{name!r}: decoder {decoder!r} is unknown; take one of {', '.join(DECODERS)}")
    return decoder, encoder


class DecodedNet(SavableModel):
    """A segmentation network: an encoder of this package, a decoder of segmentation-models-pytorch, a last convolution.

    In training, decoders that pool the whole map to one cell and normalise it (pan, upernet, deeplabv3, deeplabv3plus)
    need batches of two images or more.

    Args:
        name: "DECODER:ENCODER", such as ``"unet:pce_nano_s2"``; see ``DECODERS`` and `list_models`.
        in_chans: channels of the image.
        num_classes: classes of a pixel.
        decoder_widths: channels of the decoder: for unet, unetplusplus and manet one for each doubling of the map, the
            coarsest first; for the others one. None: from the encoder, about half of its own.
        drop_rate: dropout of whole channels before the last convolution, the decoders' own dropout being off.
        pretrained_cfg_overlay: replaces parts of timm's record of the preprocessing, such as ``input_size``.
        encoder_options: of the encoder, as in `PCENet`: ``drop_path_rate``, ``num_experts``, ``border`` ...

    Raises:
        ModuleNotFoundError: where segmentation-models-pytorch is not installed.
        TypeError: for an option that the encoder does not have.
        ValueError: for an unknown decoder or encoder, a decoder that does not go with the encoder, or options that
            break their rules.
    """

    task = "segment"

    def __init__(
        self,
        name: str,
        in_chans: int = 3,
        num_classes: int = 11,
        *,
        decoder_widths: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        decoder_name, encoder_name = split_name(name)
        _require_decoders()
        # Imported here: it is heavy, and an extra.
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head

        encoder, options = _make_encoder(encoder_name, in_chans, encoder_options)
        strides, encoder_widths = options["strides"], options["widths"]
        decoder = _decoder_for(name, decoder_name, strides)
        widths = decoder.default_widths(strides, encoder_widths)
        if decoder_widths is not None:
            widths = _checked_widths(decoder_name, list(decoder_widths), len(widths))
        self.model_args = {"in_chans": in_chans, "decoder_widths": widths, "drop_rate": drop_rate, **options}
        self.num_classes = check_pixel_classes(num_classes)
        self.pretrained_cfg = segmentation_cfg(name, pretrained_cfg_overlay)
        self.stride = strides[-1]
        self.min_side = decoder.min_side * self.stride
        self.finest = strides[0]
        self.encoder = encoder
        above: dict[int, list[int]] = {1: [], 2: [in_chans], 4: [in_chans, 0]}
        channels = above[self.finest] + encoder_widths
        self.decoder = decoder.make(_Plan(channels, widths))
        self.drop = nn.Dropout2d(drop_rate)
        self.head = SegmentationHead(widths[-1], num_classes, kernel_size=decoder.head_kernel)
        initialize_decoder(self.decoder)
        initialize_head(self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The stacked normalisations and the encoder's maps of positions, see ``stacked_norm_names``."""
        return stacked_norm_names(self) | position_map_names(self)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images ``[B, C, H, W]``, whose sides the encoder's last stride divides, to maps at strides 1, 2, 4 ...

        The first is the image where the encoder has no map at stride 1; a missing one at stride 2 has no channels.
        """
        features = self.encoder.forward_intermediates(x, intermediates_only=True)
        assert isinstance(features, list)
        if self.finest == 4:
            features = [x.new_empty(x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2), *features]
        return features if self.finest == 1 else [x, *features]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of any size to the logits of their pixels ``[B, num_classes, H, W]``.

        Inside, they are padded with zeros at the bottom and right to a multiple of the encoder's last stride.
        """
        height, width = x.shape[2:]
        padded = F.pad(x, (0, self._padding(width), 0, self._padding(height)))
        logits = self.head(self.drop(self.decoder(self.forward_pyramid(padded))))
        return resize(logits, padded)[:, :, :height, :width]

    def _padding(self, side: int) -> int:
        return max(side + -side % self.stride, self.min_side) - side


def _require_decoders() -> None:
    try:
        importlib.import_module("segmentation_models_pytorch")
    except ModuleNotFoundError as error:
        if error.name != "segmentation_models_pytorch":
            raise
        raise ModuleNotFoundError(
            "networks named DECODER:ENCODER need segmentation-models-pytorch: pip install 'pcenet[segment]'",
            name=error.name,
        ) from error


def _make_encoder(name: str, in_chans: int, given: dict[str, Any]) -> tuple[PCENet, dict[str, Any]]:
    """A classifier cut down to its stages, and all options that make it again."""
    takes = ("drop_path_rate", *_ENCODER_OPTIONS)
    unknown = sorted(given.keys() - set(takes))
    if unknown:
        raise TypeError(f"encoder {name} got unexpected arguments {unknown}; it takes {', '.join(takes)}")
    encoder = timm.model_entrypoint(name)(in_chans=in_chans, num_classes=0, **given)
    assert isinstance(encoder, PCENet)
    options = {option: encoder.model_args[option] for option in takes if option in encoder.model_args}
    encoder.prune_intermediate_layers([len(encoder.stages) - 1], prune_norm=True)
    return encoder, options


def _decoder_for(name: str, decoder_name: str, strides: Sequence[int]) -> _Decoder:
    first = strides[0]
    if first not in (1, 2, 4) or list(strides) != [first * 2**level for level in range(len(strides))]:
        raise ValueError(f"strides={tuple(strides)}: decoders need strides that double from 1, 2 or 4")
    fitting = [other for other, decoder in DECODERS.items() if decoder.fits(strides)]
    if decoder_name not in fitting:
        raise ValueError(
            f"{name!r}: decoder {decoder_name!r} does not go with strides {tuple(strides)}; take one of "
            f"{', '.join(fitting)}"
        )
    return DECODERS[decoder_name]


def _checked_widths(decoder_name: str, widths: list[int], count: int) -> list[int]:
    if len(widths) != count:
        raise ValueError(f"decoder_widths={widths}: {decoder_name} takes {count} on this encoder")
    multiple = DECODERS[decoder_name].width_multiple
    if any(width < 1 or width % multiple for width in widths):
        rule = "positive" if multiple == 1 else f"positive multiples of {multiple}"
        raise ValueError(f"decoder_widths={widths}: those of {decoder_name} must be {rule}")
    return widths
