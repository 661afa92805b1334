"""Weights to start from: what a run takes of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pcenet import load_model
from pcenet.models import create_network
from pcenet.runs.config import TrainConfig
from pcenet.training.network import build_model, classifier_of


@pytest.mark.parametrize("option", ["pretrained", "init"])
@pytest.mark.parametrize(
    ("task", "weights"), [("classify", "cifar10/dense_nano"), ("segment", "camvid/dense_unet_nano")]
)
def test_a_classifier_of_other_classes_starts_afresh_even_if_they_are_as_many(
    task: Any, weights: str, option: str
) -> None:
    trained = load_model(weights)
    assert trained.class_names is not None
    start: Any = {"pretrained": True} if option == "pretrained" else {"init": weights}
    config = TrainConfig(task=task, model=weights.partition("/")[2], **start)
    same, other = build_model(config, trained.class_names), build_model(config, trained.class_names[::-1])
    right = trained.state_dict()
    assert all(torch.equal(tensor, right[key]) for key, tensor in same.state_dict().items())
    differing = {key for key, tensor in other.state_dict().items() if not torch.equal(tensor, right[key])}
    assert differing == classifier_of(other).keys()


def test_arguments_that_change_what_weights_compute_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained: dict[str, Any] = {"border": "zero", "patch_sizes": [None, 8, 4]}
    create_network("pce_nano", num_classes=3, **trained).save_pretrained(tmp_path)

    def warnings(**given: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pcenet"):
            build_model(TrainConfig(model="pce_nano", model_args=given, init=str(tmp_path), drop=0.1), "abc")
        return caplog.messages

    assert warnings(**trained, capacity_factor=None) == []
    (message,) = warnings(patch_sizes=[None, 8, 4])
    assert message.endswith("""has --model-args '{"border": "zero"}', not {"border": "exchange"}""")


def test_a_folder_whose_configuration_is_none(tmp_path: Path) -> None:
    create_network("pce_nano", num_classes=3).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^init: .*config\.json is no configuration of a PCE network"):
        build_model(TrainConfig(model="pce_nano", init=str(tmp_path)), "abc")
