"""The options: frozen dataclasses from which the command line and the YAML files are made.

This module imports neither torch nor Lightning, so that ``pcenet train --help`` is fast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pcenet.choices import Augment, Part, TaskName
from pcenet.runs.options import (
    ClassesOption,
    DeviceOption,
    GreyRangeOption,
    IgnoreIndexOption,
    Option,
    PrecisionOption,
    RunOption,
    TaskOption,
    ThreadsOption,
    TtaOption,
    WorkersOption,
    check,
    check_file,
    check_path,
)
from pcenet.runs.rules import check_input_size, check_together

ClassWeights = Literal["none", "median"]
Schedule = Literal["cosine", "poly", "constant"]
Log = Literal["tensorboard", "wandb", "trackio"]
Find = Literal["none", "batch-size", "lr"]
Strategy = Literal["auto", "ddp", "fsdp"]

DEFAULT_MODEL: dict[TaskName, str] = {"classify": "pce_nano", "segment": "pce_unet_nano"}
DEFAULT_BATCH_SIZE: dict[TaskName, int] = {"classify": 128, "segment": 8}

# How help shows the options of a training run: in groups, the common ones first.
GROUPS: dict[str, tuple[str, ...]] = {
    "data": ("data", "task", "classes", "ignore_index", "grey_range", "max_images", "overfit"),
    "network": (
        *("model", "model_args", "input_size", "pretrained", "init", "upcycle", "upcycle_args", "drop", "drop_path"),
    ),
    "optimiser": (
        *("epochs", "batch_size", "accumulate", "lr", "schedule", "warmup_epochs", "weight_decay", "difference_decay"),
        *("label_smoothing", "class_weights", "clip_grad", "ema_decay", "early_stopping", "max_time"),
    ),
    "router": (
        *("balance", "balance_start", "balance_epochs", "z", "temperature", "temperature_epochs"),
        *("router_noise", "router_noise_epochs"),
    ),
    "augmentation": (
        *("augment", "horizontal_flip", "min_scale", "max_scale", "jitter", "random_erasing", "mixup", "cutmix"),
    ),
    "hardware": (
        *("device", "devices", "precision", "compile", "workers", "threads", "strategy", "sync_batch_norm"),
        "process_timeout",
    ),
    "run": ("out", "resume", "seed", "log", "checkpoint_minutes", "skip_nonfinite", "dry_run", "find"),
}
COMMON = frozenset(
    {"data", "model", "model_args", "input_size", "pretrained", "init", "epochs", "batch_size", "lr", "early_stopping"}
    | {"augment", "device", "devices", "precision", "workers", "threads", "out", "resume", "seed", "dry_run"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    The defaults suit CIFAR-10 (15 epochs on two processor cores) and scikit-learn's digits. Creating one
    checks every value and raises a ``ValueError`` that names the field and the rule.
    """

    task: TaskOption = "classify"
    model: Annotated[
        str | None,
        Option(
            "Name of the network; `pcenet models` lists them. To classify also timm:NAME, any classifier of timm, to "
            "segment DECODER:ENCODER, such as unet:pce_nano_s2. Default: pce_nano, or pce_unet_nano to segment."
        ),
    ] = None
    model_args: Annotated[
        dict[str, Any],
        Option('Arguments of the network as a mapping, such as {"num_experts": 8, "border": "exchange"}.'),
    ] = field(default_factory=dict)
    pretrained: Annotated[
        bool,
        Option(
            "Start from trained weights: those that come with the package, or of timm:NAME those that timm downloads."
        ),
    ] = False
    init: Annotated[
        str | None,
        Option(
            "Start from the weights of another run: its folder, a model folder, or bundled weights such as "
            "cifar10/pce_nano. The network must be the same; a classifier of other classes starts afresh."
        ),
    ] = None
    upcycle: Annotated[
        bool,
        Option(
            "Of timm:NAME: 3x3 convolutions become PCE convolutions whose experts start as copies of them, so that "
            "training starts from the same network; mostly with --pretrained or --init."
        ),
    ] = False
    upcycle_args: Annotated[
        dict[str, Any],
        Option(
            "Arguments of pcenet.upcycle as a mapping, such as "
            '{"layers": 0.75, "num_experts": 8, "patch_size": 4, "freeze": "dense"}.'
        ),
    ] = field(default_factory=dict)
    data: Annotated[
        str,
        Option(
            "Images: digits, fashion-mnist, cifar10, cifar100, to segment scenes, or your own: a folder or .zip with a "
            "folder per class or, to segment, images/ and masks/; a .csv with columns image and label or mask, and "
            "perhaps split; a folder that save_to_disk of the library datasets has left."
        ),
    ] = "digits"
    classes: ClassesOption = None
    ignore_index: IgnoreIndexOption = None
    grey_range: GreyRangeOption = None
    out: Annotated[str | None, Option("Run folder to create. Default: runs/MODEL-DATA-SEED.")] = None
    resume: Annotated[
        str | None,
        Option(
            "auto: continue the run folder, or start afresh where it has no checkpoint; or the path of a checkpoint, "
            "to continue a run of the same options in a new --out."
        ),
    ] = None
    checkpoint_minutes: Annotated[
        float | None,
        Option(
            "Minutes between checkpoints within an epoch, from which a run goes on exactly; 0: after every step; null: "
            "at the ends of epochs alone.",
            at_least=0,
        ),
    ] = 10.0
    skip_nonfinite: Annotated[
        int,
        Option(
            "Leave out steps whose input, router logits, loss or gradient is NaN or infinite, up to this many in a "
            "row; 0: the first one ends the run.",
            at_least=0,
        ),
    ] = 0
    epochs: Annotated[int, Option("Passes over the training images.", at_least=1)] = 15
    batch_size: Annotated[
        int | None,
        Option(
            "Images per batch, and of each process where --devices has several. Default: 128, or 8 to segment.",
            at_least=1,
        ),
    ] = None
    accumulate: Annotated[
        int,
        Option(
            "Batches whose gradients are averaged for one step of the optimiser. What the last batches of an epoch "
            "leave over makes a step of its own, divided by as many all the same.",
            at_least=1,
        ),
    ] = 1
    lr: Annotated[float, Option("Peak learning rate of AdamW.", above=0)] = 3e-3
    schedule: Annotated[
        Schedule,
        Option(
            "What the learning rate does after its rise: cosine and poly (power 0.9, usual in segmentation) take it "
            "down to zero over the epochs, constant keeps it."
        ),
    ] = "cosine"
    warmup_epochs: Annotated[float, Option("Epochs over which the learning rate rises to its peak.", at_least=0)] = 1.0
    weight_decay: Annotated[float, Option("AdamW's weight decay; norms and biases have none.", at_least=0)] = 0.05
    difference_decay: Annotated[
        float | None,
        Option(
            "AdamW's weight decay of what tells the experts of a layer apart, their differences from the kernels that "
            "they share. Default: that of --weight-decay.",
            at_least=0,
        ),
    ] = None
    label_smoothing: Annotated[
        float, Option("Share of the target that is spread over all classes.", at_least=0, below=1)
    ] = 0.1
    clip_grad: Annotated[float, Option("Largest norm of the gradient; 0 does not clip.", at_least=0)] = 1.0
    ema_decay: Annotated[
        float,
        Option("Decay of the weights' moving average, which is what a run keeps; 0: none.", at_least=0, below=1),
    ] = 0.998
    balance: Annotated[float, Option("Weight of the load-balance loss.", at_least=0)] = 0.01
    balance_start: Annotated[
        float | None,
        Option(
            "Weight of the load-balance loss at the start, from where it goes to --balance. Default: the latter.",
            at_least=0,
        ),
    ] = None
    balance_epochs: Annotated[
        float | None, Option("Epochs that it takes from --balance-start. Default: half of the run.", at_least=0)
    ] = None
    z: Annotated[float, Option("Weight of the z-loss, which keeps the routers' logits small.", at_least=0)] = 0.001
    temperature: Annotated[
        float,
        Option(
            "The routers divide their logits by it before the softmax; above 1, experts are told apart less at the "
            "start. It falls to 1. Validation and the finished network are at 1.",
            above=0,
        ),
    ] = 1.0
    temperature_epochs: Annotated[
        float | None, Option("Epochs in which --temperature falls to 1. Default: half of the run.", at_least=0)
    ] = None
    router_noise: Annotated[
        float,
        Option(
            "Standard deviation of Gaussian noise on the routers' logits in training, so that patches try other "
            "experts; it falls to 0.",
            at_least=0,
        ),
    ] = 0.0
    router_noise_epochs: Annotated[
        float | None, Option("Epochs in which --router-noise falls to 0. Default: half of the run.", at_least=0)
    ] = None
    augment: Annotated[
        Augment,
        Option(
            "Augmentation of the training images: crop shifts them, resized_crop enlarges a part, auto takes the "
            "former for small images, randaugment adds RandAugment; to segment: auto or none, auto scales, cuts out "
            "and changes colours. Half of the images are mirrored, too, see horizontal_flip."
        ),
    ] = "auto"
    horizontal_flip: Annotated[
        bool | None,
        Option(
            "Mirror half of the training images, left to right: not for what that changes, such as digits, texts or "
            "arrows. Default: yes, but for the digits that come with the program."
        ),
    ] = None
    min_scale: Annotated[float, Option("Segmentation: smallest random enlargement of an image.", above=0)] = 0.5
    max_scale: Annotated[float, Option("Segmentation: largest random enlargement of an image.", above=0)] = 2.0
    jitter: Annotated[
        float, Option("Segmentation: largest relative change of brightness, contrast and saturation.", at_least=0)
    ] = 0.4
    class_weights: Annotated[
        ClassWeights,
        Option(
            "Segmentation: weight of each class in the loss. median: the median of all classes' shares of the pixels "
            "over the class's own."
        ),
    ] = "none"
    random_erasing: Annotated[
        float,
        Option("Share of the training images in which a rectangle is erased (classification).", at_least=0, at_most=1),
    ] = 0.0
    mixup: Annotated[
        float,
        Option("Mix pairs of images and their labels by a share from Beta(a, a); 0: no (classification).", at_least=0),
    ] = 0.0
    cutmix: Annotated[
        float,
        Option(
            "Paste a rectangle of one image into another at the same place, its area from Beta(a, a), with its pixels' "
            "classes, or labels by area; 0: no. With --mixup each batch gets one of the two.",
            at_least=0,
        ),
    ] = 0.0
    drop: Annotated[float, Option("Dropout rate before the classifier.", at_least=0, below=1)] = 0.0
    drop_path: Annotated[
        float, Option("Stochastic depth: rate at which the last block is skipped.", at_least=0, below=1)
    ] = 0.0
    input_size: Annotated[
        int | str | None,
        Option("Side of the images in pixels, or HEIGHTxWIDTH to segment. Default: the network's.", at_least=1),
    ] = None
    seed: Annotated[
        int, Option("Decides initial weights, order of the images and augmentation.", at_least=0, below=2**32)
    ] = 0
    early_stopping: Annotated[
        int | None,
        Option(
            "Stop after this many epochs without a better validation score, and keep the weights of the best epoch. "
            "Default: never, and the last epoch's weights are kept.",
            at_least=1,
        ),
    ] = None
    max_time: Annotated[
        str | None,
        Option(
            "Stop after this time of training, as DD:HH:MM:SS or in minutes, and finish the run with what it has. "
            "Schedules do not know of it."
        ),
    ] = None
    max_images: Annotated[
        int | None,
        Option(
            "Train on this many of the training images, drawn by the seed, and validate on all of val: for trials. "
            "Default: all.",
            at_least=1,
        ),
    ] = None
    overfit: Annotated[
        int | None,
        Option(
            "Train and validate on the first N training images, without augmentation: whether the network can "
            "learn them at all.",
            at_least=1,
        ),
    ] = None
    dry_run: Annotated[
        bool, Option("Do everything with two batches, in a folder that is removed: whether a run would work.")
    ] = False
    find: Annotated[
        Find,
        Option("Print a suggestion for the batch size (GPU only) or the peak learning rate, and train nothing."),
    ] = "none"
    log: Annotated[
        Log,
        Option(
            "wandb, trackio: figures and pictures go to Weights & Biases or to trackio too, beside TensorBoard's files "
            "and metrics.csv."
        ),
    ] = "tensorboard"
    precision: PrecisionOption = "auto"
    compile: Annotated[
        bool,
        Option(
            "Train through torch.compile: a step is faster, after a minute or more for compiling. Validation is not "
            "compiled."
        ),
    ] = False
    device: DeviceOption = "auto"
    devices: Annotated[
        int,
        Option(
            "Processes that train together on this machine, each on a GPU of its own, or all on the processor. Each "
            "takes --batch-size images in a step. Under torchrun: as many as that has started, on all machines.",
            at_least=1,
        ),
    ] = 1
    strategy: Annotated[
        Strategy,
        Option(
            "What each of several processes keeps: ddp: everything; fsdp: a part of weights, gradients, averages and "
            "the optimiser's state; auto: ddp."
        ),
    ] = "auto"
    sync_batch_norm: Annotated[
        bool,
        Option(
            "Batch normalisation takes its statistics over the batches of all processes, in the experts, too. The "
            "routers always balance over all of them."
        ),
    ] = False
    process_timeout: Annotated[
        float, Option("Minutes after which a process that does not answer the others is given up.", above=0)
    ] = 10.0
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)
        check_input_size(self.input_size, self.task)
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale:g} is above max_scale {self.max_scale:g}")
        if self.task == "segment" and self.augment not in ("auto", "none"):
            raise ValueError(f"augment {self.augment!r} is for classification; to segment give auto or none")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "precision 'fp16' with strategy 'fsdp': nobody sees that a divided gradient overflows; use bf16"
            )
        if self.strategy == "fsdp" and self.compile:
            raise ValueError("compile with strategy 'fsdp' was never tried; leave one of them out")
        check_together(self)
        check_path("data", self.data)
        check_path("out", str(self.folder))

    @property
    def model_name(self) -> str:
        """``model``, or the task's default."""
        return self.model or DEFAULT_MODEL[self.task]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images, where ``input_size`` says so."""
        if self.input_size is None:
            return None
        height, _, width = str(self.input_size).partition("x")
        return int(height), int(width or height)

    @property
    def folder(self) -> Path:
        """``out``, or ``runs/<model>-<data>-<seed>``."""
        model = self.model_name.replace(":", "-")
        return Path(self.out or f"runs/{model}-{Path(os.path.realpath(self.data)).stem}-{self.seed}")


@dataclass(frozen=True)
class EvalConfig:
    """What ``pcenet eval`` needs to know. Creating one checks every value, as for `TrainConfig`."""

    run: RunOption
    data: Annotated[str | None, Option("Images, as in `pcenet train`. Default: those of the run.")] = None
    split: Annotated[Part, Option("Which part of the images; all: whatever the split.")] = "val"
    classes: ClassesOption = None
    ignore_index: IgnoreIndexOption = None
    grey_range: GreyRangeOption = None
    out: Annotated[
        str | None, Option("Folder for eval-DATA-SPLIT.json. Default: the run folder, else the current one.")
    ] = None
    tta: TtaOption = False
    batch_size: Annotated[
        int | None, Option("Images per step. Default: 256, or 8 to segment, fewer where they are large.", at_least=1)
    ] = None
    precision: PrecisionOption = "auto"
    device: DeviceOption = "auto"
    workers: WorkersOption = None
    threads: ThreadsOption = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CheckDataConfig:
    """What ``pcenet check-data`` needs to know. Creating one checks every value, as for `TrainConfig`."""

    data: Annotated[
        str,
        Option(
            "A folder or .zip of images with a folder per class or, to segment, images/ and masks/; a .csv that lists "
            "images; or a folder that save_to_disk of the library datasets has left.",
            positional=True,
        ),
    ]
    task: TaskOption = "classify"
    classes: ClassesOption = None
    ignore_index: IgnoreIndexOption = None
    grey_range: GreyRangeOption = None
    out: Annotated[str | None, Option("Folder for samples.png, a sheet of training images. Default: none.")] = None
    json: Annotated[str | None, Option("File for the whole report as JSON. Default: none.")] = None

    def __post_init__(self) -> None:
        check(self)
        check_path("data", self.data)
        check_file("json", self.json)
