"""All pictures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pcenet.analysis import Gallery, Seen
from pcenet.explanation import figures, overlays
from pcenet.explanation.figures import Picture
from pcenet.explanation.report import Report
from pcenet.reporting.numbers import share_text
from pcenet.reporting.plots import Row, layers_of


@dataclass(frozen=True)
class Shown:
    """An image that the experts are laid over, and what the network makes of it.

    Attributes:
        name: of the image.
        caption: what it is, and what the network says.
        pixels: ``[3, H, W]``, from 0 to 1, as the network saw it.
        seen: by layer name, what the layers saw of it, as a batch of one.
        masks: to segment, by what they are ("truth", "prediction"): the class of each pixel; empty to classify.
    """

    name: str
    caption: str
    pixels: Tensor
    seen: Mapping[str, Seen]
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Exhibition:
    """The pictures of one expert; its gallery is None where it serves no patch."""

    gallery: Picture | None
    place: Picture


@dataclass(frozen=True)
class LayerPictures:
    """The pictures of one layer; None where there is nothing to draw them from."""

    overlays: Sequence[Picture]
    experts: Sequence[Exhibition]
    classes: Picture | None
    places: Picture
    load: Picture
    by_epoch: Picture | None
    knocked_out: Picture | None

    def __iter__(self) -> Iterator[Picture | None]:
        yield from self.overlays
        for expert in self.experts:
            yield from (expert.gallery, expert.place)
        yield from (self.classes, self.places, self.load, self.by_epoch, self.knocked_out)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a report.

    Attributes:
        images: for each image that is shown the picture itself and, by what they are, those of its masks.
        layers: by layer name.
        specialisation: mutual information; None where no patch has a class.
        interventions: None without any.
    """

    images: Sequence[Mapping[str, Picture]]
    layers: Mapping[str, LayerPictures]
    specialisation: Picture | None
    interventions: Picture | None

    def __iter__(self) -> Iterator[Picture]:
        for image in self.images:
            yield from image.values()
        for layer in self.layers.values():
            yield from (picture for picture in layer if picture is not None)
        yield from (picture for picture in (self.specialisation, self.interventions) if picture is not None)


def draw(
    report: Report, galleries: Mapping[str, Gallery], shown: Sequence[Shown], history: Sequence[Row] | None
) -> Pictures:
    """Draw everything.

    Args:
        report: the figures.
        galleries: by layer name.
        shown: the images that the experts are laid over.
        history: the figures of each epoch of training, where they are known.
    """
    interventions = report["interventions"]
    return Pictures(
        images=[_image(number, each) for number, each in enumerate(shown, 1)],
        layers={
            layer["name"]: _layer(layer, report, galleries[layer["name"]], shown, history) for layer in report["layers"]
        },
        specialisation=figures.specialisation_figure(report["layers"]),
        interventions=figures.interventions_figure(report) if interventions and interventions["rows"] else None,
    )


def _image(number: int, shown: Shown) -> dict[str, Picture]:
    pictures = {
        "image": figures.from_image(
            f"image-{number}", f"{shown.name}. {shown.caption}", overlays.picture_of(shown.pixels)
        )
    }
    for kind, mask in shown.masks.items():
        alt = f"{shown.name} under the colours of its pixels' classes: {kind}."
        pictures[kind] = figures.from_image(f"image-{number}-{kind}", alt, overlays.class_overlay(shown.pixels, mask))
    return pictures


def _layer(
    layer: Report, report: Report, gallery: Gallery, shown: Sequence[Shown], history: Sequence[Row] | None
) -> LayerPictures:
    recorded = history is not None and layer["name"] in layers_of(history)
    return LayerPictures(
        overlays=[_overlay(layer, number, each) for number, each in enumerate(shown, 1)],
        experts=[
            Exhibition(_gallery(layer, expert, gallery), figures.typical_place(layer, expert))
            for expert in range(layer["experts"])
        ],
        classes=figures.class_map(layer),
        places=figures.place_maps(layer),
        load=figures.load_now(layer),
        by_epoch=figures.load_history(layer, history) if recorded and history else None,
        knocked_out=figures.knock_out_map(layer, report) if report["interventions"] else None,
    )


def _overlay(layer: Report, number: int, shown: Shown) -> Picture:
    seen = shown.seen[layer["name"]]
    shares = (seen.routing.expert_counts / seen.routing.expert_ids.numel()).tolist()
    alt = f"Experts of {layer['title']} laid over {shown.name}: " + ", ".join(
        f"expert {expert} {share_text(share)} of the patches" for expert, share in enumerate(shares) if share
    )
    image = overlays.expert_overlay(shown.pixels, seen, 0)
    return figures.from_image(f"{figures.slug(layer['title'])}-image-{number}", f"{alt}.", image)


def _gallery(layer: Report, expert: int, gallery: Gallery) -> Picture | None:
    exhibits = gallery.of(expert)
    if not exhibits:
        return None
    alt = (
        f"The {len(exhibits)} patches of which expert {expert} of {layer['title']} is surest, each from another image, "
        f"gate values {exhibits[0].gate:.2f} to {exhibits[-1].gate:.2f}: "
        + ", ".join(f"{entry['image']}" for entry in layer["gallery"][expert])
    )
    name = f"{figures.slug(layer['title'])}-expert-{expert}-gallery"
    return figures.from_image(name, f"{alt}.", overlays.gallery_sheet(exhibits))
