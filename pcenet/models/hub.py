"""A network as a folder: `model.safetensors` and `config.json`, in timm's own format, never a pickle.

`timm.create_model("local-dir:FOLDER")` reads such a folder as well.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import timm
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pcenet.catalogue import CONFIG, bundled_folder, or_bundled
from pcenet.choices import GreyRange, Precision, TaskName, check_grey_range, without_removed
from pcenet.models.card import model_card
from pcenet.models.limits import (
    ENDS,
    LARGEST_COUNT,
    LARGEST_TEXT,
    MOST_PATCH_PIXELS,
    PREPROCESSING,
    check_class_names,
    check_mask_values,
    check_num_classes,
    check_values,
    excerpt,
    read_json,
)
from pcenet.models.pretrained import WEIGHTS, preprocessing_of
from pcenet.reading import check_regular
from pcenet.writing import write_bytes, write_text

if TYPE_CHECKING:
    from pcenet.inference.predictions import Predictions

# Where and how a network is made, and what is loaded into it, is for whoever makes it to say, not for a file.
_NOT_IN_A_FILE = {*inspect.signature(timm.create_model).parameters, "device", "dtype"} - {"kwargs"}
# What safetensors calls the types of numbers that a network of this package may be saved in.
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class SavableModel(nn.Module, ModelHubMixin):
    """A network of this package: huggingface_hub's ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Attributes:
        task: what the network is for: ``"classify"`` images or ``"segment"`` them.
        model_args: the arguments that make the network again, the number of classes aside.
        num_classes: classes of the classifier.
        class_names: their names, once known.
        grey_range: of grey images of more than 8 bits, the values that were black and white in training; None: all
            that their files can hold. See ``pcenet.data.images.decode_image``.
        mask_values: of a segmentation network, the value of each class in the masks that it was trained on, once known.
        ignored_values: likewise, the values of pixels that do not count; there may be none.
        pretrained_cfg: timm's record of architecture and preprocessing.
        pruned: whether parts were cut off, so that the arguments no longer make this network.
    """

    task: TaskName = "classify"
    model_args: dict[str, Any]
    num_classes: int
    class_names: list[str] | None = None
    grey_range: GreyRange | None = None
    mask_values: list[int] | None = None
    ignored_values: list[int] | None = None
    pretrained_cfg: dict[str, Any]
    pruned: bool = False
    _config_before: bytes | None = None

    def config(self) -> dict[str, Any]:
        """Everything but the weights: architecture, arguments, classes, preprocessing. No time and no path in it."""
        config: dict[str, Any] = {
            "architecture": self.pretrained_cfg["architecture"],
            "task": self.task,
            "num_classes": self.num_classes,
            "pretrained_cfg": {
                key: self.pretrained_cfg[key] for key in (*PREPROCESSING, *ENDS) if key in self.pretrained_cfg
            },
            "model_args": self.model_args,
        }
        if self.class_names is not None:
            config["label_names"] = list(self.class_names)
        if self.grey_range is not None:
            config["grey_range"] = list(self.grey_range)
        if self.mask_values is not None:
            config["mask_values"] = list(self.mask_values)
            config["ignored_values"] = list(self.ignored_values or ())
        return config

    def predict(
        self,
        inputs: Any,
        *,
        top: int = 5,
        tta: bool = False,
        sliding_window: bool = False,
        overlap: float = 0.25,
        batch_size: int | None = None,
        precision: Precision | None = None,
    ) -> Predictions:
        """Apply the network, on the device where it is, to images.

        Args:
            inputs: an image file, a folder (with all that is below it) or a .zip archive; a PIL image; an array
                ``[H, W]``, ``[H, W, 3]`` or ``[B, H, W, 3]``, or a tensor ``[3, H, W]`` or ``[B, 3, H, W]``, of uint8
                or of float from 0 to 1; or a list of them. Images are resized and normalised as the network needs them.
            top: to classify, how many classes to list for each image.
            tta: test-time augmentation: the mean of the probabilities of an image and of its mirror image (left to
                right), in twice the time; ``experts`` are those of the image itself.
            sliding_window: to segment, predict images that are larger than the network's input in windows of its size,
                at their own resolution; else they are made smaller. For networks that were trained on parts of such
                images.
            overlap: the share of its side that a window has in common with the next, from 0 on and below 1.
            batch_size: images, or windows, per step; None: 256, or 8 to segment, fewer where they are large.
            precision: ``"fp32"``, ``"bf16"`` or ``"auto"``, which is None: bfloat16 where the device has it.

        Returns:
            A list of `pcenet.inference.Prediction` or, to segment, `Segmentation`, with ``to_csv``, ``plot`` and
            ``left_out``, the files that could not be read.

        Raises:
            ValueError: for a path that does not exist or holds no image, an array that is none, an option that breaks
                its rule, or a network whose outputs are not finite.
            TypeError: for anything else that is no image.
        """
        from pcenet.inference.predictions import predict_images

        return predict_images(
            self,
            inputs,
            top=top,
            tta=tta,
            sliding_window=sliding_window,
            overlap=overlap,
            batch_size=batch_size,
            precision=precision,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and a model card into a folder.

        Args:
            save_directory: the folder; it is made where it is missing.
            kwargs: as in huggingface_hub's ``ModelHubMixin.save_pretrained``, such as ``push_to_hub``.

        Raises:
            ValueError: for a network that its arguments would not make again; nothing is written then.
        """
        if not getattr(self, "pretrained_cfg", {}).get("architecture"):
            raise ValueError("the network has no registered name to load it by: make it with timm.create_model")
        if self.pruned:
            raise ValueError(
                "the network was pruned and cannot be made again from its arguments: save it before pruning"
            )
        self._check_as_loading_will()
        path = Path(save_directory) / CONFIG
        self._config_before = path.read_bytes() if path.is_file() else None  # the mixin removes it
        return super().save_pretrained(save_directory, **kwargs)

    def _check_as_loading_will(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        try:
            skeleton = skeleton_of(check_config(read_json(json.dumps(self.config()))), len(shapes))
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the network cannot be saved: {error}") from error
        misfit = "the network cannot be saved, for its arguments no longer make it"
        way_out = "call reset_classifier for other classes, undo pruning and the like, or save its state_dict() instead"
        check_shapes(shapes, skeleton, misfit, way_out)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a network from a folder, from the weights that come with the package, or from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: looked for in that order. The weights that come with the package have names
                such as ``"cifar10/pce_nano"``, see `bundled`; they hide a repository of the same name.
            kwargs: as in huggingface_hub's ``ModelHubMixin.from_pretrained``, and those of `load_model`.

        Raises:
            ValueError: as `load_model`, and if the network is of another class, or there is nothing of that name.
        """
        name = pretrained_model_name_or_path
        hint = or_bundled(name)
        try:
            return super().from_pretrained(bundled_folder(name) or name, **kwargs)
        except RecursionError as error:  # the mixin reads the configuration, too
            raise ValueError(f"{name}: {CONFIG} is nested too deeply") from error
        except OSError as error:
            if not hint:
                raise
            raise ValueError(f"there is no folder {name}{hint}; nor could it be had from the Hub: {error}") from error

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that ``save_pretrained`` writes where there is none: what the network is, and how to load it.
        ``pcenet push`` writes one that also says how it was trained and what it scores.

        Args:
            args: those of ``pcenet.models.card.model_card`` behind its first.
            kwargs: likewise.
        """
        return model_card(self.config(), *args, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / CONFIG
        try:
            # On the processor, a copy of each, so that tensors that share memory are saved, too.
            weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
            weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
            content = save(weights, metadata={"format": "pt"})
            write_text(path, json.dumps(self.config(), indent=2) + "\n")
            # Not save_file, which makes a file that only its owner may read.
            write_bytes(save_directory / WEIGHTS, content)
        except BaseException:  # the weights are those of before, whole
            if self._config_before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(self._config_before)
            raise

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[WEIGHTS, CONFIG],
                )
            )
        # The mixin passes the configuration's own entries along with the caller's.
        saved = config or {}
        overrides = {key: value for key, value in model_kwargs.items() if key not in saved or saved[key] != value}
        model = load_model(folder, **overrides)
        if not isinstance(model, cls):
            raise ValueError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def load_model(folder: str | Path, **overrides: Any) -> SavableModel:
    """Load a network that ``save_pretrained`` wrote, in evaluation mode.

    Args:
        folder: holds ``model.safetensors`` and ``config.json``, or is the run folder around it; or, where there is no
            such path, the name of weights that come with the package, such as ``"cifar10/pce_nano"``, see `bundled`.
        overrides: arguments of the network that replace the saved ones, such as ``border="zero"``; ``device`` and
            ``dtype`` say where the network is to be, and in what type of numbers: by default on the processor, in
            float32.

    Raises:
        ValueError: if a file is missing or broken, or the weights do not fit the configuration; names both.
    """
    place = {name: overrides.pop(name) for name in ("device", "dtype") if name in overrides}
    given = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
    hint = or_bundled(folder)
    folder = bundled_folder(folder) or Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        folder = folder / "model"
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}; give a folder written by save_pretrained{hint}")
    shapes = _shapes_of(weights_path)
    try:
        config = read_config(config_path)
        skeleton = skeleton_of(config, len(shapes), **overrides)  # nothing is allocated before it is known to fit
        misfit, way_out = f"{weights_path} does not fit {config_path.with_name(CONFIG)}", "save them together anew"
        if overrides:
            misfit += f" with {given}"
            way_out = "load it without them; for other classes call reset_classifier then"
        check_shapes(shapes, skeleton, misfit, way_out)
        model = made_of(config, **overrides)
    except MisfitError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        with_these = f" with {given}" if overrides else ""
        raise ValueError(f"{config_path} is no configuration of a PCE network{with_these}: {reason}") from error
    model.load_state_dict(load_file(weights_path))
    model.class_names, model.grey_range = config.get("label_names"), config.get("grey_range")
    model.mask_values, model.ignored_values = config.get("mask_values"), config.get("ignored_values")
    return model.to(**place).eval()


def made_of(config: Mapping[str, Any], **overrides: Any) -> SavableModel:
    """The network of a configuration, with fresh weights."""
    from pcenet.models.registry import create_network  # the networks are made of what this module defines

    arguments = {**config["model_args"], "num_classes": config["num_classes"], **overrides}
    return create_network(config["architecture"], pretrained_cfg_overlay=preprocessing_of(config), **arguments)


def skeleton_of(config: Mapping[str, Any], tensors: int, **overrides: Any) -> SavableModel:
    """The network of a configuration without memory for its tensors, to see whether others fit.

    Raises:
        ValueError: if it would have far more tensors than so many, or its patches would fill the memory.
    """
    depths = {**config["model_args"], **overrides}.get("depths") or ()
    if sum(depths) > tensors:  # each block has tensors; making blocks takes time
        raise ValueError(f"depths {depths} make more blocks than there are tensors in {WEIGHTS}")
    with torch.device("meta"), at_most_parameters(tensors):
        skeleton = made_of(config, **overrides)
    check_patches(skeleton)
    return skeleton


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder, all of its entries within bounds, see `check_config`."""
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT} bytes")
    return check_config(read_json(path.read_bytes()))


def check_config(config: Any) -> dict[str, Any]:
    """A configuration, all of its entries within bounds, see `pcenet.models.limits`.

    Raises:
        ValueError: for the first entry that breaks its rule, without naming the file.
    """
    if not isinstance(config["architecture"], str) or not isinstance(config["model_args"], dict):
        raise ValueError("architecture must be a text and model_args a mapping")
    arguments = config["model_args"] = without_removed(config["model_args"], "model_args")
    if refused := sorted(_NOT_IN_A_FILE & arguments.keys()):
        raise ValueError(f"model_args: {', '.join(refused)} cannot be chosen by a file; leave it out")
    check_values(arguments, "model_args", LARGEST_COUNT)
    preprocessing_of(config)
    count = check_num_classes(config["num_classes"])
    check_class_names(config.get("label_names"), count, "label_names")
    check_mask_values(config.get("mask_values"), config.get("ignored_values"), count)
    check_grey_range(config.get("grey_range"))
    checked: dict[str, Any] = config
    return checked


@contextmanager
def at_most_parameters(tensors: int) -> Iterator[None]:
    """Within it networks are made, and the making ends with a ``ValueError`` where it cannot come to a network with so
    few tensors: whatever an argument is called that asks for a million blocks."""
    left = 1000 + 4 * tensors  # parts are made and replaced, too

    def count(_module: nn.Module, name: str, _parameter: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"model_args make a network of far more tensors than the {tensors} in {WEIGHTS}")

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_patches(model: nn.Module) -> None:
    """Raise a ``ValueError`` for patches so large that a map, padded to one of them, would fill the memory."""
    for name, module in model.named_modules():
        side = getattr(module, "patch_size", None)
        if isinstance(side, int) and side**2 > MOST_PATCH_PIXELS:
            raise ValueError(f"the patches of {name} have {side} x {side} pixels, more than {MOST_PATCH_PIXELS}")


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, from its header alone.

    Raises:
        ValueError: if it is broken, or a tensor is of numbers that no network is made of.
    """
    if path.exists():  # opening a pipe waits for what never comes
        check_regular(path)
    with path.open("rb"):  # safetensors reports a file that may not be read as one that does not exist
        pass
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: tensor {excerpt(name)} is of type {tensor.get_dtype()}; save it as F32")
                shapes[name] = tuple(tensor.get_shape())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a broken one: {error}") from error
    return shapes


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if it is broken.
    """
    _shapes_of(path)  # which says what is wrong
    return load_file(path)


# Buffers that a network saved before they existed lacks: their modules fill them in.
FILLED_IN = ("centring", "num_batches_tracked")


class MisfitError(ValueError):
    """Tensors and network do not fit."""


def check_tensors(found: Mapping[str, Tensor], model: nn.Module, misfit: str, way_out: str) -> None:
    """Raise a `MisfitError` that names the first tensor which does not fit a network, and its shapes; `FILLED_IN` may
    be missing.

    Args:
        found: tensors by name, as of ``model.state_dict()``.
        model: the network.
        misfit: how the error begins, such as "FILE does not fit".
        way_out: how it ends: what the user can do.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in found.items()}, model, misfit, way_out)


def check_shapes(found: Mapping[str, Sequence[int]], model: nn.Module, misfit: str, way_out: str) -> None:
    """`check_tensors` of the tensors' shapes alone."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            if name.rpartition(".")[2] in FILLED_IN:
                continue
            raise MisfitError(f"{misfit}: tensor {name} is missing; {way_out}")
        if name not in expected:
            raise MisfitError(f"{misfit}: tensor {name} is not part of the network; {way_out}")
        shape, wanted = tuple(found[name]), tuple(expected[name].shape)
        if shape != wanted:
            raise MisfitError(f"{misfit}: tensor {name} has shape {shape}, expected {wanted}; {way_out}")
