"""``pcenet push``: what the card says, what is uploaded to a stand-in for the Hub, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image

from pcenet.cli import main
from pcenet.data import SceneSource
from pcenet.models import create_network, load_model
from pcenet.models.card import model_card, plain
from pcenet.publish import command
from pcenet.publish.card import routing_section, score_section
from pcenet.publish.config import PushConfig
from pcenet.runs.config import TrainConfig
from pcenet.tasks import get_task
from pcenet.tasks.evaluation import Trained
from pcenet.training.run import train

Push = Callable[..., Path]
QUICK = {"epochs": 1, "batch_size": 8, "precision": "fp32", "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of a network and its twin, of which the former was also tried on other data."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.draw", lambda *_: None)
        for model in ("pce_nano", "dense_nano"):
            train(TrainConfig(model=model, data=str(pictures), out=str(root / model), **QUICK))
    evaluation = {"model": "pce_nano", "data": "others", "split": "test", "source": "/home/me/others", "images": 7}
    router = json.loads((root / "pce_nano" / "metrics.json").read_text())["val_router"]
    for health in router.values():
        health["load"] = [0.7, 0.2, 0.1, 0.0]
    for name, figures in (("test", {"top1": 3 / 7}), ("test-tta", {"top1": 4 / 7, "tta": True})):
        path = root / "pce_nano" / f"eval-others-{name}.json"
        path.write_text(json.dumps(evaluation | figures | {"router": router}))
    return {model: root / model for model in ("pce_nano", "dense_nano")}


@pytest.fixture
def dry(runs: dict[str, Path], tmp_path: Path) -> Push:
    """Writes what would be uploaded; gives the folder."""

    def write(repo: str = "me/colours", model: str = "pce_nano", **options: Any) -> Path:
        folder = command.push(PushConfig(run=str(runs[model]), repo=repo, dry_run=str(tmp_path / repo), **options))
        assert isinstance(folder, Path)
        return folder

    return write


class Hub:
    """A stand-in for the Hub's client: keeps what is uploaded, in a folder, or raises."""

    endpoint = "https://hub.example"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, bool] = {}
        self.error: Exception | None = None

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        name = repo if "/" in repo else f"me/{repo}"
        assert exist_ok
        self.made.setdefault(name, bool(private))
        return SimpleNamespace(repo_id=name)

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.made[repo])

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(command, "HfApi", lambda: found)
    monkeypatch.setattr(command, "get_token", lambda: "a token")
    return found


def test_a_card_says_what_the_run_found(runs: dict[str, Path], dry: Push, pictures: Path) -> None:
    run, folder = runs["pce_nano"], dry(license="mit", twin=str(runs["dense_nano"]))
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (run / "model" / name).read_bytes()
    metrics, twin = (json.loads((runs[name] / "metrics.json").read_text()) for name in ("pce_nano", "dense_nano"))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("pcenet", "mit")
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == (pictures.name, "accuracy")
    assert result.metric_value == pytest.approx(metrics["val"]["top1"], abs=1e-4)
    ours, theirs = metrics["val"]["top1"], twin["val"]["top1"]
    cost, twin_cost = metrics["complexity"], twin["complexity"]
    for words in (
        "3 classes: blue, green, red.",
        f"| pictures, val | 12 | {100 * ours:.0f} % |",
        "| others, test | 7 | 43 % |",
        "| others, test, with test-time augmentation | 7 | 57 % |",
        f"in place of each PCE layer, has {100 * theirs:.0f} % on the validation images",
        f"| `pce_nano` | {cost['parameters'] / 1e6:.2f} M | {cost['active_parameters'] / 1e6:.2f} M |",
        f"| {twin_cost['multiply_adds'] / 1e6:.2f} M |",
        "Of one image of 32 x 32 px",
        "On pictures, 1 epoch, with",
    ):
        assert words in card.text, words
    assert "| layer | pictures, val | others, test |\n|---|---|---|\n" in card.text
    for layer, health in metrics["val_router"].items():
        shares = ", ".join(f"{100 * load:.0f} %" for load in health["load"])
        assert f"| `{layer}` | {shares} | 70 %, 20 %, 10 %, 0 % |" in card.text
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["model"], recipe["data"], recipe["batch_size"]) == ("pce_nano", "pictures", 8)
    assert str(pictures.parent) not in card.content
    assert "/home/me" not in card.content
    assert "![" not in card.text, "pictures of one's own are not published unasked"


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (0.75, 0.738, "1.2 points ahead of it"),
        (0.738, 0.75, "1.2 points behind it"),
        (0.5, 0.5, "level with it"),
        (0.5, 0.4999, "level with it"),
    ],
)
def test_beside_the_twin(ours: float, theirs: float, words: str) -> None:
    metrics = [{"model": "m", "data": "d", "val": {"images": 101, "miou": score}} for score in (ours, theirs)]
    assert f"PCE is {words}, in one run of each." in score_section(metrics[0], (), metrics[1])


def test_what_eval_measured_on_the_same_images_stands_once() -> None:
    val = {"images": 101, "miou": 0.5}
    again, other = (
        {"data": "d", "split": split, "tta": False, "images": 101, "miou": 0.6} for split in ("val", "test")
    )
    text = score_section({"model": "m", "data": "/home/me/d", "val": val}, (again, other), None)
    rows = [line for line in text.splitlines() if line.startswith("| d, ")]
    assert len(rows) == 2
    assert "60.0" in rows[0]


def test_other_images_of_the_same_name_have_a_row_of_their_own() -> None:
    """As many or not: by their fingerprints they are others, and the run's own score stays."""
    metrics = {"model": "m", "data": "a/d", "fingerprint": {"val": [24, "x"]}, "val": {"images": 24, "top1": 1.0}}
    other = {"data": "d", "split": "val", "images": 24, "top1": 0.25, "fingerprint": {"val": [24, "y"]}}
    rows = [line for line in score_section(metrics, (other,), None).splitlines() if ", val" in line]
    assert [row.split("|")[1:3] for row in rows] == [[" d, val ", " 24 "], [" d (2), val ", " 24 "]]
    assert ["100" in row for row in rows] == [True, False]
    copies = other | {"source": "elsewhere/d", "fingerprint": {"val": [24, "x"]}}
    assert "d (2), val" in score_section(metrics, (copies,), None), "of the same names, elsewhere"
    again = other | {"source": "a/d", "top1": 0.5, "fingerprint": {"val": [24, "x"]}}
    rows = [line for line in score_section(metrics, (other, again), None).splitlines() if ", val" in line]
    assert ["50" in row for row in rows] == [True, False], "what was measured again stands for the run's own"


def test_a_card_shows_no_loads_of_training_as_if_they_were_health() -> None:
    """Runs of a version that counted in training alone have even loads by construction."""
    even = {"load": [0.5, 0.5], "entropy": 1.0, "max_min": 1.0, "drop_rate": 0.0, "dead": []}
    before = {"data": "d", "val": {"images": 9, "top1": 0.5}, "router": {"a": even}}
    assert routing_section(before, (), picture=False) == ""
    measured = {"data": "d", "split": "test", "router": {"a": even | {"load": [0.75, 0.25]}}}
    text = routing_section(before, [measured], picture=False)
    assert "| layer | d, test |" in text
    assert "| `a` | 75 %, 25 % |" in text
    assert "50 %" not in text


def test_what_the_card_shows_runs(dry: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = dry()
    monkeypatch.chdir(tmp_path)  # where me/colours is a folder
    Image.new("RGB", (50, 40), "red").save("picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] in ("blue", "green", "red")


def test_without_a_twins_run_its_cost_is_known(runs: dict[str, Path], dry: Push) -> None:
    text = (dry() / "README.md").read_text()
    cost = json.loads((runs["dense_nano"] / "metrics.json").read_text())["complexity"]
    assert f"| `dense_nano`, its dense twin | {cost['parameters'] / 1e6:.2f} M |" in text
    assert "points" not in text


def test_a_dense_network_has_no_routing(dry: Push) -> None:
    text = (dry(model="dense_nano", images=2) / "README.md").read_text()
    assert "## Routing" not in text
    assert "dense twin" not in text
    assert "expert" not in text


def test_a_picture_on_demand(dry: Push) -> None:
    folder = dry(images=2)
    with Image.open(folder / "routing.png") as picture:
        assert picture.format == "PNG"
    assert "](routing.png)" in (folder / "README.md").read_text()


def test_a_segmentation_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = SceneSource("val", count=3)
    overlay = {"input_size": (3, 64, 64)}
    model = create_network("pce_unet_nano", num_classes=6, widths=(4, 8, 8), pretrained_cfg_overlay=overlay).eval()
    model.class_names = list(source.classes)
    picture = command.drawn(Trained(model, tmp_path, None, get_task("segment"), source, "scenes"), 3, 0)
    assert Image.open(io.BytesIO(picture)).size[0] > 300
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("me/streets")
    source.image(0).save("picture.jpg")
    card = model_card(model.config(), "me/streets")
    assert card.data.pipeline_tag == "image-segmentation"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["model"](variables["images"]).shape == (1, 6, 64, 64)


def test_names_are_shown_as_they_are() -> None:
    assert plain("a_b|c\n<img src=x>") == r"a\_b\|c\\n\<img src=x\>"


def test_it_is_uploaded(runs: dict[str, Path], hub: Hub, dry: Push, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(runs["pce_nano"]), "--repo", "colours", "--private"]) == 0
    assert capsys.readouterr().out == "pushed to https://hub.example/me/colours\n"
    assert hub.made == {"me/colours": True}
    expected = {path.name: path.read_bytes() for path in dry("me/colours").iterdir()}
    found = {path.name: path.read_bytes() for path in (hub.root / "me" / "colours").iterdir()}
    assert found == expected, "with the owner's name on the card"
    x = torch.randn(2, 3, 32, 32)
    ours, theirs = load_model(hub.root / "me/colours"), load_model(runs["pce_nano"] / "model")
    assert torch.equal(ours(x), theirs(x))


def test_private_is_not_public(runs: dict[str, Path], hub: Hub) -> None:
    hub.made["me/colours"] = False
    with pytest.raises(ValueError, match="me/colours exists and is public; nothing was uploaded"):
        command.push(PushConfig(run=str(runs["pce_nano"]), repo="me/colours", private=True))
    assert not hub.root.exists()


def refusal(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused", response=response, server_message="no such organisation")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(401), r"refused \(401\): it does not know the token: log in again"),
        (refusal(403), r"refused \(403\): the token may not write to colours"),
        (refusal(404), r"refused \(404\): no such organisation"),
        (command.NoAnswerError("no route"), r"cannot be reached \(HTTPError: no route\)"),
        (ConnectionError("down"), r"cannot be reached \(ConnectionError: down\)"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_that_refuses_or_does_not_answer(
    runs: dict[str, Path], hub: Hub, error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    assert main(["push", str(runs["pce_nano"]), "--repo", "colours"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert line.endswith("nothing was uploaded; --dry-run FOLDER writes the files without uploading them")


def test_without_a_token_nothing_begins(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "get_token", lambda: None)
    monkeypatch.setattr(command, "draw", lambda *_: pytest.fail("it must not begin"))
    assert main(["push", str(runs["pce_nano"]), "--repo", "colours"]) == 2
    assert "there is no token of the Hugging Face Hub: log in with `hf auth login`" in capsys.readouterr().err


def test_what_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run, full = str(runs["pce_nano"]), tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "metrics.json").unlink()
    others = tmp_path / "others"
    shutil.copytree(runs["dense_nano"], others)
    metrics = json.loads((others / "metrics.json").read_text())
    (others / "metrics.json").write_text(json.dumps(metrics | {"data": "others"}))
    gone = tmp_path / "gone"
    shutil.copytree(run, gone)
    config = yaml.safe_load((gone / "config.yaml").read_text())
    (gone / "config.yaml").write_text(yaml.safe_dump(config | {"data": str(tmp_path / "nowhere")}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"repo": None}, "repo: say where the network goes with --repo"),
        ({"repo": "a b"}, "repo 'a b' must be NAME or OWNER/NAME"),
        ({"dry_run": str(full)}, "dry_run: .* is never overwritten"),
        ({"run": str(unfinished)}, "run: .* is no finished run"),
        ({"run": str(tmp_path)}, "run: .* is no run folder"),
        ({"twin": run}, r"twin: .* \(pce_nano\) is no dense network"),
        (
            {"twin": str(others)},
            "twin: .* was validated on 12 images of others .*, the network on 12 of pictures",
        ),
        ({"run": str(gone), "images": 1}, "images: .*nowhere.*; --images 0 leaves the picture out"),
        ({"images": -1}, "images must be at least 0"),
    ]
    for changes, message in cases:
        options = {"run": run, "repo": "colours", "dry_run": str(tmp_path / "new")} | changes
        with pytest.raises((ValueError, OSError), match=message):
            command.push(PushConfig(**options))
        assert not (tmp_path / "new").exists(), message
