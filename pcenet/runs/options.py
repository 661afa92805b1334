"""What an option is: a field's type, its help and its bounds; the options that several commands share; checking values.

This module imports nothing heavy, so that ``--help`` is fast.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pcenet.choices import NOTHING_IGNORED, Device, Precision, TaskName, check_grey_range, did_you_mean
from pcenet.reading import is_text


@dataclass(frozen=True)
class Option:
    """What a field's annotation says about it beside its type.

    Attributes:
        help: the explanation that ``--help`` gives.
        at_least, at_most, above, below: bounds of the values that are allowed.
        texts: what an option that may be a text and something else may say; empty: anything.
        positional: on the command line it is an argument, not an option; a list takes one or more words.
    """

    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    texts: tuple[str, ...] = ()
    positional: bool = False


# What several commands ask for.
TaskOption = Annotated[
    TaskName,
    Option(
        "classify: a label for an image; segment: one for each of its pixels, learnt from masks. Default: "
        "segment where the data are images with masks, else classify."
    ),
]
PrecisionOption = Annotated[
    Precision,
    Option(
        "bf16, fp16: autocast in 16 bits, in training with a loss scale for fp16; fp32; tf32: fp32 whose products an "
        "NVIDIA GPU rounds to 10 bits. auto: bf16 where the hardware has it, else fp32."
    ),
]
DeviceOption = Annotated[
    Device, Option("auto: a CUDA GPU where there is one, else cpu; mps: the GPU of a Mac, never tried.")
]
WorkersOption = Annotated[
    int | None,
    Option(
        "Processes that load images; the result does not depend on it. Default: none where the processor itself "
        "computes, up to 8 beside a GPU.",
        at_least=0,
    ),
]
ClassesOption = Annotated[
    list[str] | str | None,
    Option(
        "Segmentation: names of the mask values 0, 1, ... as a list, or a text file with one per line. Default: the "
        "data's classes.txt, else the values themselves."
    ),
]
IgnoreIndexOption = Annotated[
    int | str | None,
    Option(
        "Segmentation: one more mask value that does not count (255 never does); none: every value counts, 255 too. "
        "Default: what a trained network knows, else only 255.",
        at_least=0,
        texts=(NOTHING_IGNORED,),
    ),
]
GreyRangeOption = Annotated[
    list[int] | None,
    Option(
        "Grey images of more than 8 bits: the values that are black and white, such as '[0, 4095]' for 12 bits in "
        "files of 16. A network keeps them. Default: those that a trained network "
        "keeps, else all that files can hold; train --init does not take them over."
    ),
]
StepOption = Annotated[
    int | None,
    Option("Images per step. Default: 256, or 8 to segment, fewer where they are large.", at_least=1),
]
RunOption = Annotated[
    str,
    Option(
        "A run folder, a model folder (model.safetensors and config.json), or the name of weights that come with the "
        "package, such as cifar10/pce_nano; `pcenet models` shows which there are.",
        positional=True,
    ),
]
TtaOption = Annotated[
    bool,
    Option(
        "Test-time augmentation: the mean of the probabilities of an image and of its mirror image, in twice the time. "
        "Not for images in which left and right mean something, such as digits."
    ),
]
ThreadsOption = Annotated[int | None, Option("Threads of torch. Default: torch's own choice.", at_least=1)]


def options_of(config_class: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Type and `Option` of each field of a config class."""
    hints = get_type_hints(config_class, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a ``Literal`` type; empty for other types."""
    return get_args(kind) if get_origin(kind) is Literal else ()


# Types of options, in the words of an error.
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def alternatives_of(kind: Any) -> tuple[Any, ...]:
    """The plain types that an option may have: ``list[str] | None`` is list or NoneType."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_origin(each) or each for each in kinds)


def is_of(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value has one of some plain types. True and false are no numbers; a whole number stands for any."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def plain(value: Any) -> Any:
    """A value as a configuration file has it: NumPy's numbers as Python's, tuples as lists, paths as texts, and the
    home folder where a path begins with ``~/``; in lists and mappings, too."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def check(config: Any) -> None:
    """Make the values of a config `plain`, and raise a ``ValueError`` naming field, value and rule for the first that
    is not allowed."""
    for name, (kind, option) in options_of(type(config)).items():
        object.__setattr__(config, name, plain(getattr(config, name)))  # configs are frozen
        value, choices = getattr(config, name), choices_of(kind)
        if choices and value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}{hint}")
        kinds = alternatives_of(kind)
        if not choices and not is_of(value, kinds):
            raise ValueError(f"{name} must be {' or '.join(KINDS[each] for each in kinds)}, got {value!r}")
        if isinstance(value, str) and option.texts and value not in option.texts:
            others = " or ".join([*(KINDS[each] for each in kinds if each is not str), *option.texts])
            raise ValueError(f"{name} must be {others}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if not isinstance(value, int | float):
            continue
        for rule, bound, holds in (
            ("at least", option.at_least, lambda a, b: a >= b),
            ("at most", option.at_most, lambda a, b: a <= b),
            ("above", option.above, lambda a, b: a > b),
            ("below", option.below, lambda a, b: a < b),
        ):
            if bound is not None and not holds(value, bound):
                raise ValueError(f"{name} must be {rule} {bound:.12g}, got {value}")
    check_grey_range(getattr(config, "grey_range", None))


def check_file(name: str, path: str | None) -> None:
    """Raise a ``ValueError`` unless a file can be written to a path when the work is done."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"{name} {path!r} is a folder; give the name of a file")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{name} {path!r}: there is no folder {folder}; make it first")


def check_path(name: str, path: str) -> None:
    """Raise a ``ValueError`` unless a run can write a path down: neither YAML nor safetensors knows other names."""
    if not is_text(path):
        raise ValueError(f"{name} {path!r} is no valid Unicode (UTF-8): rename it, or give a link of another name")
