"""A network as a folder: `model.safetensors` and `config.json`, in timm's own format, never a pickle.

`timm.create_model("local-dir:FOLDER")` reads such a folder as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pcenet.choices import Task
from pcenet.models.card import model_card
from pcenet.models.pretrained import CONFIG, WEIGHTS, bundled_folder, or_bundled, preprocessing_of

LARGEST_CONFIG = 2**24  # bytes; the names of 21,000 classes take half a megabyte
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "mean", "std")


class SavableModel(nn.Module, ModelHubMixin):
    """A network of this package: huggingface_hub's ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Attributes:
        task: what the network is for: ``"classify"`` images or ``"segment"`` them.
        model_args: the arguments that make the network again, the number of classes aside.
        num_classes: classes of the classifier.
        class_names: their names, once known.
        pretrained_cfg: timm's record of architecture and preprocessing.
        pruned: whether parts were cut off, so that the arguments no longer make this network.
    """

    task: Task = "classify"
    model_args: dict[str, Any]
    num_classes: int
    class_names: list[str] | None = None
    pretrained_cfg: dict[str, Any]
    pruned: bool = False

    def config(self) -> dict[str, Any]:
        """Everything but the weights: architecture, arguments, classes, preprocessing. No time and no path in it."""
        config: dict[str, Any] = {
            "architecture": self.pretrained_cfg["architecture"],
            "task": self.task,
            "num_classes": self.num_classes,
            "pretrained_cfg": {key: self.pretrained_cfg[key] for key in _PREPROCESSING if key in self.pretrained_cfg},
            "model_args": self.model_args,
        }
        if self.class_names is not None:
            config["label_names"] = list(self.class_names)
        return config

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
        return super().save_pretrained(save_directory, **kwargs)

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
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # Not save_file, which makes a file that only its owner may read.
        (save_directory / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
        (save_directory / CONFIG).write_text(json.dumps(self.config(), indent=2) + "\n")

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
    """Load a network that ``save_pretrained`` wrote, in evaluation mode and float32.

    Args:
        folder: holds ``model.safetensors`` and ``config.json``; or, where there is no such path, the name of weights
            that come with the package, such as ``"cifar10/pce_nano"``, see `bundled`.
        overrides: arguments of the network that replace the saved ones, such as ``dispatch="static"``.

    Raises:
        ValueError: if a file is missing or broken, or the weights do not fit the configuration; names both.
    """
    from pcenet.models.registry import create_network  # the networks are made of what this module defines

    hint = or_bundled(folder)
    folder = bundled_folder(folder) or Path(folder)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}; give a folder written by save_pretrained{hint}")
    shapes = _shapes_of(weights_path)
    try:
        if config_path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
        config = json.loads(config_path.read_text(encoding="utf-8"))
        arguments = {**config["model_args"], "num_classes": config["num_classes"], **overrides}
        if sum(arguments.get("depths") or ()) > len(shapes):  # each block has tensors; making blocks takes time
            raise ValueError(f"depths {arguments['depths']} make more blocks than there are tensors in {WEIGHTS}")

        def create() -> SavableModel:
            overlay = preprocessing_of(config)
            return create_network(config["architecture"], pretrained_cfg_overlay=overlay, **arguments)

        with torch.device("meta"):  # nothing is allocated before it is known to fit
            skeleton = create()
        misfit = f"{weights_path} does not fit {config_path.with_name(CONFIG)}"
        check_tensors(shapes, skeleton, misfit, "save them together anew")
        model = create()
    except MisfitError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{config_path} is no configuration of a PCE network: {reason}") from error
    model.load_state_dict(load_file(weights_path))
    model.class_names = _label_names(config, model, config_path)
    return model.eval()


def _label_names(config: dict[str, Any], model: SavableModel, path: Path) -> list[str] | None:
    names: list[str] | None = config.get("label_names")
    if names is None:
        return None
    if (
        not isinstance(names, list)
        or len(names) != model.num_classes
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{path}: label_names must be {model.num_classes} names, one per class, got {names}")
    return names


def _shapes_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as its header describes them, without their content."""
    with path.open("rb"):  # safetensors reports a file that may not be read as one that does not exist
        pass
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no mapping
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a broken one: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if it is broken.
    """
    _shapes_of(path)  # which says what is wrong
    return load_file(path)


class MisfitError(ValueError):
    """Tensors and network do not fit."""


def check_tensors(found: Mapping[str, Tensor], model: nn.Module, misfit: str, way_out: str) -> None:
    """Raise a `MisfitError` that names the first tensor which does not fit a network, and its shapes.

    Args:
        found: tensors by name, as of ``model.state_dict()``.
        model: the network.
        misfit: how the error begins, such as "FILE does not fit".
        way_out: how it ends: what the user can do.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            if name.rpartition(".")[2] == "num_batches_tracked":
                continue  # loading begins to count
            raise MisfitError(f"{misfit}: tensor {name} is missing; {way_out}")
        if name not in expected:
            raise MisfitError(f"{misfit}: tensor {name} is not part of the network; {way_out}")
        shape, wanted = tuple(found[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            raise MisfitError(f"{misfit}: tensor {name} has shape {shape}, expected {wanted}; {way_out}")
