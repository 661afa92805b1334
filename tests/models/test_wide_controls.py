"""The wide dense networks: as many parameters as the PCE networks, counted by hand."""

from __future__ import annotations

import pytest
import timm

from pcenet.models import complexity, create_network, twin_of

Widths = tuple[int, int, int]
NARROW, WIDE, WIDE_UNET = (24, 48, 96), (48, 88, 184), (48, 96, 184)
EXPERTS = 4


def blocks(widths: tuple[int, ...]) -> int:
    """Of one double convolution at each width: two kernels of 3x3, two normalisations of weight and bias."""
    return sum(2 * 9 * width**2 + 2 * 2 * width for width in widths)


def trunk(widths: Widths) -> int:
    """Stem of 3x3 on RGB, a convolution of 2x2 between the stages, all normalised; a block per stage."""
    a, b, c = widths
    return 27 * a + 2 * a + 4 * a * b + 2 * b + 4 * b * c + 2 * c + blocks(widths)


def way_up(widths: Widths) -> int:
    """A normalised 1x1 convolution to each of the two finer levels, and a block there."""
    a, b, c = widths
    return c * b + 2 * b + b * a + 2 * a + blocks((a, b, 0))


def routers(widths: tuple[int, ...]) -> int:
    """Perceptrons of a quarter of the map's width, 16 to 64: its channels and 8 functions for each of 4 bands."""
    hidden = [max(16, min(64, width // 4)) for width in widths]
    return sum((width + 32) * h + h + h * EXPERTS + EXPERTS for width, h in zip(widths, hidden, strict=True))


def classifier(widths: Widths) -> int:
    """With a last normalisation and 10 classes."""
    return trunk(widths) + 2 * widths[2] + 10 * widths[2] + 10


def unet(widths: Widths) -> int:
    """With a last normalisation and 11 classes."""
    return trunk(widths) + way_up(widths) + 2 * widths[0] + 11 * widths[0] + 11


def kernels(widths: tuple[int, ...]) -> int:
    """Of `blocks`, the kernels alone."""
    return sum(2 * 9 * width**2 for width in widths)


# What the networks can express. They are trained with a kernel more per convolution, which the experts share.
PCE = classifier(NARROW) + (EXPERTS - 1) * blocks(NARROW[1:]) + routers(NARROW[1:])
PCE_UNET = unet(NARROW) + (EXPERTS - 1) * (blocks(NARROW) + blocks((24, 48, 0))) + routers((*NARROW, 48, 24))
SHARED, SHARED_UNET = kernels(NARROW[1:]), kernels(NARROW) + kernels((24, 48, 0))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pce_nano", PCE + SHARED),
        ("dense_nano", classifier(NARROW)),
        ("dense_nano_wide", classifier(WIDE)),
        ("pce_unet_nano", PCE_UNET + SHARED_UNET),
        ("dense_unet_nano", unet(NARROW)),
        ("dense_unet_nano_wide", unet(WIDE_UNET)),
    ],
)
def test_parameters_by_hand(name: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in create_network(name).parameters()) == count


def test_a_wide_network_has_the_parameters_of_the_pce_network() -> None:
    assert classifier(WIDE) == pytest.approx(PCE, rel=0.03)
    assert unet(WIDE_UNET) == pytest.approx(PCE_UNET, rel=0.03)


@pytest.mark.parametrize(
    ("wide", "twin", "widths", "size"),
    [
        ("dense_nano_wide", "dense_nano", WIDE, (3, 32, 32)),
        ("dense_unet_nano_wide", "dense_unet_nano", WIDE_UNET, (3, 192, 256)),
    ],
)
def test_a_wide_network_is_the_twin_but_wider(wide: str, twin: str, widths: Widths, size: tuple[int, int, int]) -> None:
    model, narrow = create_network(wide), create_network(twin)
    assert model.model_args == {**narrow.model_args, "widths": list(widths)}
    assert all(width % 8 == 0 for width in widths)
    assert model.state_dict().keys() == narrow.state_dict().keys()
    ratio = complexity(model, size).multiply_adds / complexity(narrow, size).multiply_adds
    assert 3.5 < ratio < 4
    assert twin_of(wide) is None


def test_timm_knows_the_wide_classifier() -> None:
    assert timm.create_model("dense_nano_wide").pretrained_cfg["input_size"] == (3, 32, 32)
