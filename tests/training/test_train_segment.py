"""Training and measuring segmentation networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pcenet.cli import main
from pcenet.data import IGNORE, open_segmentation_source
from pcenet.models import create_network, load_model
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.tasks import pixels
from pcenet.tasks.pixels import PixelScores, upsample
from pcenet.tasks.segmentation import Segmentation, SegmentationObjective, median_weights, pixel_counts
from pcenet.training.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures 48 x 64: sky (0) above ground (1), and at the left edge a stripe that does not count (7)."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    for split, count in (("train", 8), ("val", 3)):
        (root / split / "images").mkdir(parents=True)
        (root / split / "masks").mkdir()
        for index in range(count):
            rng = np.random.default_rng((len(split), index))
            horizon = int(rng.integers(16, 32))
            mask = np.zeros((48, 64), dtype=np.uint8)
            mask[horizon:] = 1
            pixels = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            pixels[:horizon, :, 2] += 180
            pixels[horizon:, :, 1] += 120
            mask[:, :4] = 7
            Image.fromarray(pixels).save(root / split / "images" / f"{index}.jpg")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    (root / "names.txt").write_text("sky\nground\n")
    return root


@pytest.mark.slow
def test_generated_scenes_are_trained_on_by_name(tmp_path: Path) -> None:
    options = ["--input-size", "32x32", "--batch-size", "4", "--max-images", "8", "--epochs", "1", "--threads", "1"]
    run = ["--out", str(tmp_path / "run"), "--model-args", '{"widths": [8, 8, 8], "num_experts": 2}', "--workers", "0"]
    assert main(["train", "--task", "segment", "--data", "scenes", *options, *run]) == 0
    model = load_model(tmp_path / "run" / "model")
    assert model.class_names == ["sky", "building", "road", "pavement", "tree", "person"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]["images"] == 200


def logits_of(classes: list[list[int]], num_classes: int, sure: float) -> torch.Tensor:
    """Logits ``[1, K, h, w]`` whose softmax is ``e^sure / (e^sure + K - 1)`` at the class given for each pixel."""
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).permute(2, 0, 1)[None] * sure


def test_scores_of_a_hand_made_map() -> None:
    # truth  0 0 1 x      predicted 0 1 1 1   (x does not count; class 2 neither occurs nor is predicted)
    mask = torch.tensor([[0, 0, 1, IGNORE]])
    scores = PixelScores(3, CPU)
    scores.update(logits_of([[0, 1, 1, 1]], 3, math.log(8)), [mask])
    counts = scores.compute()
    assert counts.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert counts.pixel_accuracy == pytest.approx(2 / 3)
    assert counts.iou[:2].tolist() == [1 / 2, 1 / 2]  # 1 / (2 + 1 - 1) and 1 / (1 + 2 - 1)
    assert math.isnan(counts.iou[2])
    assert counts.miou == pytest.approx(1 / 2)
    assert counts.loss == pytest.approx(-(2 * math.log(0.8) + math.log(0.1)) / 3, rel=1e-6)


def test_scores_add_up_over_images_of_any_size() -> None:
    scores = PixelScores(2, CPU)
    scores.update(logits_of([[0, 1]], 2, 5.0), [torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])])
    scores.update(logits_of([[1, 1]], 2, 5.0), [torch.tensor([[0, 1]])])
    assert scores.compute().confusion.tolist() == [[4, 1], [0, 5]]


def test_nothing_that_counts_is_zero() -> None:
    scores = PixelScores(2, CPU)
    scores.update(logits_of([[0, 1]], 2, 1.0), [torch.full((1, 2), IGNORE)])
    counts = scores.compute()
    assert (counts.loss, counts.miou, counts.pixel_accuracy) == (0, 0, 0)


def test_logits_are_enlarged_bilinearly() -> None:
    # Centres of four pixels between those of two: at 0, 1/4, 3/4 and 1 of the way.
    assert upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]


def test_median_weights_of_no_pixel_at_all() -> None:
    with pytest.raises(ValueError, match="class_weights 'median' needs pixels that count"):
        median_weights(torch.zeros(3).double())


def test_median_weights_by_hand() -> None:
    # Shares 0.1, 0.3, 0.6 and none: the median of those that occur is 0.3.
    weights = median_weights(torch.tensor([10.0, 30, 60, 0]))
    assert weights.tolist() == pytest.approx([3, 1, 0.5, 0])


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.0]])
def test_loss_is_that_of_a_loop_over_pixels(weights: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    targets = torch.randint(0, 3, (2, 4, 5), generator=generator)
    targets[0, :2] = IGNORE
    config = TrainConfig(task="segment", label_smoothing=0.2)
    loss = SegmentationObjective(config, torch.tensor(weights) if weights else None).loss(logits, targets)
    total = norm = 0.0
    for image in range(2):
        for row in range(4):
            for column in range(5):
                target = int(targets[image, row, column])
                if target == IGNORE:
                    continue
                log_probs = logits[image, :, row, column].log_softmax(0)
                weight = weights or [1.0] * 3
                smooth = sum(weight[k] * float(log_probs[k]) for k in range(3)) / 3
                total -= 0.8 * weight[target] * float(log_probs[target]) + 0.2 * smooth
                norm += weight[target]
    assert float(loss) == pytest.approx(total / norm, rel=1e-5)


def test_a_batch_without_pixels_that_count_has_no_loss_and_a_finite_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    targets = torch.full((1, 2, 2), IGNORE)
    task = SegmentationObjective(TrainConfig(task="segment"))
    loss = task.loss(logits, targets)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert float(task.right(logits, targets)) == 0


def test_pixels_are_counted_over_all_masks(scenes: Path) -> None:
    source = open_segmentation_source(scenes, "train", ignore_index=7)
    naive = [sum(int((np.asarray(source.mask(i)) == k).sum()) for i in range(8)) for k in range(2)]
    assert sum(naive) == 8 * 48 * 60
    assert pixel_counts(source).tolist() == naive


def options(scenes: Path, out: Path, *more: str) -> list[str]:
    line = f"train --task segment --data {scenes} --ignore-index 7 --epochs 2 --batch-size 4 --input-size 48x64"
    return [*line.split(), "--threads", "1", "--precision", "fp32", "--out", str(out), *more]


@pytest.mark.parametrize("model", ["pce_unet_nano", "dense_unet_nano"])
def test_a_run_from_the_command_line(
    model: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    names = str(scenes / "names.txt")
    given = options(scenes, folder.path, "--model", model, "--classes", names, "--class-weights", "median")
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "validation mIoU" in printed
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["task"] == "segment"
    assert metrics["val"]["images"] == 3
    assert metrics["val"]["pixels"] == 3 * 48 * 60
    assert set(metrics["val"]["iou"]) == {"sky", "ground"}
    assert bool(metrics["val_router"]) == model.startswith("pce")
    saved = yaml.safe_load(folder.config.read_text())
    assert (saved["input_size"], saved["model"], saved["batch_size"]) == ("48x64", model, 4)
    network = load_model(folder.model)
    assert (network.task, network.class_names) == ("segment", ["sky", "ground"])
    assert network.pretrained_cfg["input_size"] == (3, 48, 64)

    assert main(["eval", str(folder.path), "--threads", "1", "--precision", "fp32"]) == 0
    result = json.loads((folder.path / "eval-scenes-val.json").read_text())
    assert result["miou"] == pytest.approx(metrics["val"]["miou"], abs=1e-9)
    matrix = np.array(result["confusion"])
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert result["miou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert result["per_class"]["sky"]["share"] == pytest.approx(matrix[0].sum() / matrix.sum())


def test_it_learns_sky_from_ground(scenes: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        task="segment", model="dense_unet_nano", data=str(scenes), ignore_index=7, epochs=15, batch_size=4,
        input_size="48x64", out=str(tmp_path / "run"), precision="fp32", threads=1, ema_decay=0.9, warmup_epochs=2,
    )  # fmt: skip
    metrics = json.loads(train(config).metrics.read_text())
    assert metrics["val"]["miou"] > 0.9  # guessing by the share of pixels alone would give less than 0.5


def test_evaluation_does_not_depend_on_the_batch(scenes: Path) -> None:
    kind, config = Segmentation(), TrainConfig(task="segment", ignore_index=7)
    torch.manual_seed(0)
    model = create_network("dense_unet_nano", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 48, 64)})
    source = kind.open(config, str(scenes), "val")
    results = [
        kind.evaluate(
            model,
            kind.eval_loader(model, source, batch_size=size, workers=0),
            source.classes,
            device=CPU,
            precision="fp32",
        )
        for size in (1, 2, 3)
    ]
    assert results[0].images == 3
    assert results[0].confusion == results[1].confusion == results[2].confusion


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--model pce_nano", "model 'pce_nano' is made to classify; give --task classify"),
        ("--augment randaugment", "augment 'randaugment' is for classification"),
        ("--input-size 48x", "input_size must be pixels, such as 224, or to segment HEIGHTxWIDTH"),
        ("--min-scale 3", "min_scale 3 is above max_scale 2"),
        ("--model unet_nano", "did you mean 'pce_unet_nano'?"),
        ("--classes nowhere.txt", "nowhere.txt"),
    ],
)
def test_mistakes(changes: str, message: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(scenes, tmp_path / "run", *changes.split())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes_at_once", [1, 2, 3, 99])
def test_classes_at_full_size_are_made_a_few_at_a_time(classes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[4] = logits[1]  # of equal ones the first
    expected = pixels.upsample(logits, (37, 29)).argmax(0)
    made: list[int] = []
    whole = pixels.upsample

    def counting(part: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        made.append(len(part))
        return whole(part, size)

    monkeypatch.setattr(pixels, "upsample", counting)
    found = pixels.classes_at(logits, (37, 29), room=classes_at_once * 37 * 29 + 5)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)
    assert set(found.unique().tolist()) == {0, 1, 2, 3}
    assert max(made) <= classes_at_once
    assert sum(made) == 5
