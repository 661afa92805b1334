"""The options: frozen dataclasses from which the command line and the YAML files are made.

This module imports neither torch nor Lightning, so that ``pcenet train --help`` is fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pcenet.choices import Augment, Split, did_you_mean

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Option:
    """What a field's annotation says about it beside its type.

    Attributes:
        help: the explanation that ``--help`` gives.
        at_least, above, below: bounds of the values that are allowed.
        positional: on the command line it is an argument, not an option.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    positional: bool = False


# What several commands ask for.
PrecisionOption = Annotated[
    Precision, Option("bf16: bfloat16 autocast; auto: that where the hardware has bfloat16, else fp32.")
]
DeviceOption = Annotated[Device, Option("auto: a CUDA GPU where there is one.")]
WorkersOption = Annotated[
    int | None,
    Option(
        "Processes that load images; the result does not depend on it. null: none where the processor itself "
        "computes, up to 8 beside a GPU.",
        at_least=0,
    ),
]
ThreadsOption = Annotated[int | None, Option("Threads of torch; null: torch's own choice.", at_least=1)]


def options_of(config_class: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Type and `Option` of each field of a config class."""
    hints = get_type_hints(config_class, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a ``Literal`` type; empty for other types."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def check(config: Any) -> None:
    """Raise a ``ValueError`` naming field, value and rule for the first value that is not allowed."""
    for name, (kind, option) in options_of(type(config)).items():
        value, choices = getattr(config, name), choices_of(kind)
        if choices and value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if not isinstance(value, int | float):
            continue
        for rule, bound, holds in (
            ("at least", option.at_least, lambda a, b: a >= b),
            ("above", option.above, lambda a, b: a > b),
            ("below", option.below, lambda a, b: a < b),
        ):
            if bound is not None and not holds(value, bound):
                raise ValueError(f"{name} must be {rule} {bound:.12g}, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    The defaults suit CIFAR-10 (15 epochs on two processor cores) and scikit-learn's digits. Creating one
    checks every value and raises a ``ValueError`` that names the field and the rule.
    """

    model: Annotated[str, Option("Name of the network; `pcenet models` lists them.")] = "pce_nano"
    model_args: Annotated[
        dict[str, Any],
        Option('Arguments of the network as a mapping, such as {"num_experts": 8, "border": "exchange"}.'),
    ] = field(default_factory=dict)
    data: Annotated[
        str, Option("Images: digits, fashion-mnist, cifar10, cifar100, or a folder or .zip of your own.")
    ] = "digits"
    out: Annotated[str | None, Option("Run folder to create; null: runs/MODEL-DATA-SEED.")] = None
    resume: Annotated[
        str | None,
        Option(
            "auto: continue the run folder, or start afresh where it has no checkpoint; or the path of a checkpoint, "
            "to continue a run of the same options in a new --out."
        ),
    ] = None
    epochs: Annotated[int, Option("Passes over the training images.", at_least=1)] = 15
    batch_size: Annotated[int, Option("Images per step.", at_least=1)] = 128
    lr: Annotated[float, Option("Peak learning rate of AdamW; a cosine takes it down to zero.", above=0)] = 3e-3
    warmup_epochs: Annotated[float, Option("Epochs over which the learning rate rises to its peak.", at_least=0)] = 1.0
    weight_decay: Annotated[float, Option("AdamW's weight decay; norms and biases have none.", at_least=0)] = 0.05
    label_smoothing: Annotated[
        float, Option("Share of the target that is spread over all classes.", at_least=0, below=1)
    ] = 0.1
    clip_grad: Annotated[float, Option("Largest norm of the gradient; 0 does not clip.", at_least=0)] = 1.0
    ema_decay: Annotated[
        float,
        Option("Decay of the weights' moving average, which is what a run keeps; 0: none.", at_least=0, below=1),
    ] = 0.998
    balance: Annotated[float, Option("Weight of the load-balance loss.", at_least=0)] = 0.01
    z: Annotated[float, Option("Weight of the z-loss, which keeps the routers' logits small.", at_least=0)] = 0.001
    augment: Annotated[
        Augment,
        Option(
            "Augmentation of the training images: crop shifts them, resized_crop enlarges a part, auto takes the "
            "former for small images, randaugment adds RandAugment. Mirrored where that keeps the label."
        ),
    ] = "auto"
    drop: Annotated[float, Option("Dropout rate before the classifier.", at_least=0, below=1)] = 0.0
    drop_path: Annotated[
        float, Option("Stochastic depth: rate at which the last block is skipped.", at_least=0, below=1)
    ] = 0.0
    input_size: Annotated[int | None, Option("Side of the images in pixels; null: the network's.", at_least=1)] = None
    seed: Annotated[
        int, Option("Decides initial weights, order of the images and augmentation.", at_least=0, below=2**32)
    ] = 0
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or ``runs/<model>-<data>-<seed>``."""
        return Path(self.out or f"runs/{self.model}-{Path(self.data).resolve().stem}-{self.seed}")


@dataclass(frozen=True)
class EvalConfig:
    """What ``pcenet eval`` needs to know. Creating one checks every value, as for `TrainConfig`."""

    run: Annotated[str, Option("A run folder, or a model folder (model.safetensors and config.json).", positional=True)]
    data: Annotated[str | None, Option("Images, as in `pcenet train`; null: those of the run.")] = None
    split: Annotated[Split, Option("Which part of the images.")] = "val"
    out: Annotated[
        str | None, Option("Folder for eval-DATA-SPLIT.json; null: the run folder, else the current one.")
    ] = None
    batch_size: Annotated[int, Option("Images per step.", at_least=1)] = 256
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
