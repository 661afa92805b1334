from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from pcenet.cli import COMMANDS, main
from pcenet.comparison.config import OF_A_RUN
from pcenet.runs.config import COMMON, GROUPS, TrainConfig
from pcenet.training.loop import Trainer
from pcenet.training.run import train

Start = Callable[..., TrainConfig]

WRONG = [
    ("trian", "unknown command 'trian'; did you mean 'train'?"),
    ("--hepl", "unknown option '--hepl'; did you mean '--help'?"),
    (
        "",
        "no command given; give one of train, compare, eval, check-data, predict, export, explain,",
    ),
    ("train --bath-size 3", "unknown option '--bath-size'; did you mean '--batch-size'?"),
    ("train --epcohs=3", "unknown option '--epcohs'; did you mean '--epochs'?"),
    ("train --num-experts 8", "it is an argument of the network: give --model-args '{\"num_experts\": ...}'"),
    ("eval --border halo", "unknown option '--border'; did you mean"),
    ("train -x", "unknown option '-x'; did you mean"),
    ("train stray", "unrecognized arguments: stray"),
    ("train --lr", "argument --lr: expected one argument"),
    ("train --epochs many", "epochs must be a whole number, got 'many'"),
    ("train --input-size big", "input_size must be pixels, such as 224"),
    ("train --lr fast", "lr must be a number, got 'fast'"),
    ("train --epochs 0", "epochs must be at least 1, got 0"),
    ("train --seed -1", "seed must be at least 0, got -1"),
    ("train --precision bf61", "did you mean 'bf16'?"),
    ("train --augment crpo", "did you mean 'crop'?"),
    ("train --config nowhere.yaml", "--config: File does not exist: "),
    ("train --config typo.yaml", "unknown option 'epcohs' in the --config file; did you mean 'epochs'?"),
    ("train --config value.yaml", "batch_size must be a whole number, got 'x'"),
    ("train --config broken.yaml", "broken.yaml: while parsing a flow node"),
    ("train --config list.yaml", "list.yaml must hold options by their names"),
    ("train --model pce_nan --epochs 1", "model 'pce_nan' is unknown; did you mean 'pce_nano'?"),
    ("train --model resnet18", "model 'resnet18' is unknown; did you mean 'timm:resnet18'?"),
    ("train --model resnet18.a1_in1k", "model 'resnet18.a1_in1k' is unknown; did you mean 'timm:resnet18.a1_in1k'?"),
    ("train --model resnt18", "model 'resnt18' is unknown; did you mean 'timm:resnet18'?"),
    ("train --model dense_nan", "model 'dense_nan' is unknown; did you mean 'dense_nano'?"),
    ("train --model resnet18 --task segment", "model 'resnet18' is unknown; did you mean 'dense_"),
    ("compare --models [resnet18,dense_nano]", "model 'resnet18' is unknown; did you mean 'timm:resnet18'?"),
    ("train --data nowhere --epochs 1", "data source 'nowhere' does not exist"),
    ("train --resume nowhere.ckpt", "there is no checkpoint nowhere.ckpt"),
    ("train --model-args 3", "model_args must be a mapping such as"),
    ('train --model-args {"num_expert":2}', "did you mean 'num_experts'?"),
    ('train --model-args {"widths":"abc"}', "model_args {'widths': 'abc'} make no network"),
    ("eval", "the following arguments are required: run"),
    ("eval nowhere", "nowhere is no run folder or model folder"),
    ("eval unfinished", "training has not finished there"),
    ("eval . --split tset", "split 'tset' is not one of train, val, test, all; did you mean 'test'?"),
    ("models --jsno", "unknown option '--jsno'; did you mean '--json'?"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_a_mistake_is_one_line_and_exit_2(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "typo.yaml": "epcohs: 3\n",
        "value.yaml": "batch_size: x\n",
        "broken.yaml": "a: [\n",
        "list.yaml": "- 1\n",
        "unfinished/config.yaml": "model: pce_nano\n",
    }
    (tmp_path / "unfinished").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("options", "task"),
    [
        ("--data street", "segment"),
        ("--data street --classes [sky,road] --input-size 24x32", "segment"),
        ("--data street/train", "segment"),
        ("--config street.yaml", "segment"),
        ("--config given.yaml", "classify"),
        ("--data scenes", "segment"),
        ("--data street --task classify", "classify"),
        ("--data pets", "classify"),
        ("--data digits", "classify"),
        ("", "classify"),
    ],
)
def test_a_task_that_is_not_given_is_that_of_the_data(
    command: str,
    options: str,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("street/train/images/a.jpg", "street/train/masks/a.png", "pets/cat/a.jpg", "pets/dog/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "street.yaml").write_text("data: street\n")
    (tmp_path / "given.yaml").write_text("data: street\ntask: classify\n")
    configs: list[Any] = []
    monkeypatch.setattr(f"pcenet.{'training' if command == 'train' else 'comparison'}.run.{command}", configs.append)
    models = ["--models", "[pce_nano]"] if command == "compare" else []
    assert main([command, *options.split(), *models]) == 0
    (config,) = configs
    assert (config if command == "train" else config.recipe).task == task
    said = capsys.readouterr().out
    data = (config if command == "train" else config.recipe).data
    assert said == (f"task segment: {data} has images and masks\n" if task == "segment" else "")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_program_itself_exits_with_2_and_one_line() -> None:
    process = run_python("-m", "pcenet", "train", "--batchsize", "3")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == "pcenet: error: unknown option '--batchsize'; did you mean '--batch-size'?\n"


def test_help_and_mistakes_load_no_torch() -> None:
    process = run_python(
        "-c",
        "import sys; from pcenet.cli import main\n"
        "assert [main(['--help']), main(['train', '--help']), main(['train', '--epcohs'])] == [0, 0, 2]\n"
        "assert not {'torch', 'timm', 'lightning'} & set(sys.modules)",
    )
    assert process.returncode == 0, process.stderr
    for option in ("--batch-size", "--print-config", "--resume"):
        assert option in process.stdout


@pytest.mark.parametrize("spelling", [["--batch-size", "7"], ["--batch_size", "7"], ["--batch-size=7"]])
def test_options_take_hyphens_and_underscores(spelling: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *spelling, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["batch_size"] == 7


def test_print_config_leaves_no_option_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that --help hides too: else the file that it gives trains something else."""
    given = {"mixup": 0.2, "balance": 0.1, "weight_decay": 0.3, "schedule": "poly", "max_time": "1:30:00"}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for command in ("train", "compare"):
        assert main([command, *words, "--print-config"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed | given == printed
    assert main(["train", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out).keys() == {field.name for field in fields(TrainConfig)}


def test_what_follows_two_hyphens_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "nowhere", "--", "-dash.png"]) == 2
    assert "nowhere is no run folder" in capsys.readouterr().err


def test_printed_config_can_be_loaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "1e-5", "--data", "some dir/x: y", "--threads", "2", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert TrainConfig(**yaml.safe_load(printed)) == TrainConfig(lr=1e-5, data="some dir/x: y", threads=2)
    (tmp_path / "run.yaml").write_text(printed)
    config = ["--config", str(tmp_path / "run.yaml")]
    assert main(["train", *config, "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["train", *config, "--lr", "2", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["lr"] == 2


def arguments_of(config: TrainConfig) -> list[str]:
    changed = {k: v for k, v in asdict(config).items() if v != getattr(TrainConfig(), k)}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_train_then_eval_then_train_from_its_own_config(
    start: Start, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start("a", epochs=1)
    assert main(["train", *arguments_of(config)]) == 0
    output = capsys.readouterr().out
    assert "epoch 1/1" in output
    assert "24 training and 12 validation images, 3 classes" in output
    again = ["train", "--config", str(config.folder / "config.yaml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    capsys.readouterr()

    common = ["--batch-size", "8", "--workers", "0", "--precision", "fp32", "--device", "cpu"]
    assert main(["eval", str(config.folder), *common]) == 0
    assert "n/a (fewer than 5 classes)" in capsys.readouterr().out
    result = json.loads((config.folder / "eval-pictures-val.json").read_text())
    metrics = json.loads((config.folder / "metrics.json").read_text())
    assert result["model"] == "pce_nano"
    assert (result["data"], result["source"]) == ("pictures", str(pictures))
    assert {name: result[name] for name in metrics["val"]} == metrics["val"]
    assert sum(map(sum, result["confusion"])) == result["images"] == 12

    out = tmp_path / "elsewhere"
    model_folder = ["eval", str(config.folder / "model"), "--data", str(pictures), "--out", str(out), *common]
    assert main(model_folder) == 0
    outside = json.loads((out / "eval-pictures-val.json").read_text())
    assert outside.pop("run") == str(config.folder / "model")  # there, figures of any network may lie
    assert outside == result


def test_eval_tells_of_data_that_the_run_was_not_trained_with(
    start: Start, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path leads elsewhere from another folder: to other images, whose figures take no file's place."""
    for place in ("here", "there"):
        shutil.copytree(pictures, tmp_path / place / "pictures")
    image = tmp_path / "there" / "pictures" / "val" / "red" / "0.png"
    shutil.copy(image, image.with_name("00.png"))
    monkeypatch.chdir(tmp_path / "here")
    run = train(start("run", data="pictures", epochs=1)).path
    command = ["eval", str(run), "--device", "cpu", "--workers", "0"]
    assert main(command) == 0
    figures = (run / "eval-pictures-val.json").read_bytes()
    assert "not what" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "there")
    changed = f"pictures is not what {run} was trained with: val had 12 images and has 13; if that lies elsewhere"
    assert main(command) == 0
    assert changed in " ".join(capsys.readouterr().err.split())
    assert (run / "eval-pictures-val.json").read_bytes() == figures
    assert json.loads((run / "eval-pictures-2-val.json").read_text())["images"] == 13
    assert main([*command, "--split", "train"]) == 0
    assert "not what" not in capsys.readouterr().err, "these are the same in both"


def test_eval_of_new_pictures_says_that_it_measures_a_tenth_of_them(
    start: Start, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(start("run", epochs=1)).path
    shutil.copytree(pictures / "train", tmp_path / "new")  # 8 of each of 3 classes, no splits
    command = ["eval", str(run), "--data", str(tmp_path / "new"), "--device", "cpu", "--workers", "0"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "new is not divided: its val is a part held out of it, 3 images; --split all takes all of them" in said
    assert json.loads((run / "eval-new-val.json").read_text())["images"] == 3
    assert main([*command, "--split", "all"]) == 0
    assert "not divided" not in capsys.readouterr().err
    result = json.loads((run / "eval-new-all.json").read_text())
    assert sum(map(sum, result["confusion"])) == result["images"] == 24
    assert main([*command[:2], *command[4:]]) == 0
    assert "not divided" not in capsys.readouterr().err, "of the run's own images it is known"


def test_eval_refuses_other_classes_and_names_them(
    start: Start, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start(epochs=1)
    assert main(["train", *arguments_of(config)]) == 0
    other = tmp_path / "other"
    for name in ("red", "blue", "mauve"):
        (other / "val").mkdir(parents=True, exist_ok=True)
        (other / "val" / name).symlink_to(pictures / "val" / "red")
    capsys.readouterr()
    assert main(["eval", str(config.folder), "--data", str(other)]) == 2
    error = capsys.readouterr().err
    assert "green" in error
    assert "only in other: mauve" in error
    assert not list(config.folder.glob("eval-*"))


def test_eval_of_a_damaged_model_is_one_line(
    start: Start, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("pce_nano", num_classes=3)
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    content["model_args"]["num_expert"] = 4
    config.write_text(json.dumps(content))
    assert main(["eval", str(tmp_path / "model"), "--data", str(pictures)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(config) in error
    assert "num_expert" in error


def raising(error: BaseException) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        raise error

    return command


@pytest.mark.parametrize(("command", "advice"), [("train", "; --resume auto continues the run"), ("eval", "")])
def test_ctrl_c_exits_with_130_and_says_how_training_goes_on(
    command: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, command, raising(KeyboardInterrupt()))
    assert main([command]) == 130
    assert capsys.readouterr().err == f"pcenet: error: interrupted{advice}\n"


def test_ctrl_c_within_a_step_exits_with_130(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_loss(self: Trainer, batch: Any, number: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "batch_loss", batch_loss)
    assert main(["train", *arguments_of(start())]) == 130


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ModuleNotFoundError("No module named 'lightning'", name="lightning")
    monkeypatch.setitem(COMMANDS, "train", raising(missing))
    assert main(["train"]) == 2
    assert "pip install 'pcenet[train]'" in capsys.readouterr().err


def test_an_error_that_says_what_to_install_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "pictures need matplotlib: pip install 'pcenet[plot]'"
    monkeypatch.setitem(COMMANDS, "eval", raising(ModuleNotFoundError(message)))
    assert main(["eval"]) == 2
    assert capsys.readouterr().err == f"pcenet: error: {message}\n"


@pytest.mark.parametrize("name", ["numpy", None])
def test_another_missing_module_is_no_users_error(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "eval", raising(ModuleNotFoundError("No module named ...", name=name)))
    with pytest.raises(ModuleNotFoundError):
        main(["eval"])


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), (None, False)])
def test_a_traceback_is_shown_on_request(
    value: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if value is None:
        monkeypatch.delenv("PCENET_TRACEBACK", raising=False)
    else:
        monkeypatch.setenv("PCENET_TRACEBACK", value)
    monkeypatch.setitem(COMMANDS, "eval", raising(ValueError("from deep inside")))
    assert main(["eval"]) == 2
    *above, last = capsys.readouterr().err.splitlines()
    assert last == "pcenet: error: from deep inside"
    assert bool(above) == shown
    if shown:
        assert above[0] == "Traceback (most recent call last):"
        assert "raise error" in "".join(above)
    assert main(["--help"]) == 0
    assert "PCENET_TRACEBACK=1" in capsys.readouterr().out


def test_models_lists_cost_and_twins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["pce_nano"]["twin"] == rows["pce_nano_spec"]["twin"] == "dense_nano"
    assert rows["dense_nano"]["twin"] is None
    assert rows["pce_nano"]["input_size"] == [32, 32]
    assert (rows["pce_unet_nano"]["task"], rows["pce_unet_nano"]["input_size"]) == ("segment", [192, 256])
    assert rows["pce_nano"]["active_parameters"] < rows["pce_nano"]["parameters"]
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_every_option_of_a_run_has_its_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(item.name for item in fields(TrainConfig))
    assert set(grouped) >= COMMON


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"models", "doctor"}))
def test_help_says_what_an_option_is_by_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--print-config Print the options as YAML" in text
    assert not {"(type", "None", "print_config", "[=flags]", "--classes+"} & set(text.replace(":", " ").split())
    for words in {
        "train": (
            "Passes over the training images. Default: 15.",
            "Run folder to create. Default: runs/MODEL-DATA-SEED.",
        ),
        "predict": ("the image, from 0 to 1. Default: 0.5.", "Threads of torch. Default: torch's own choice. "),
        "bench": ("Borders of layers: zero, halo, exchange. Default: [zero, halo, exchange].",),
    }.get(command, ()):
        assert words in f"{text} "


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_shows_common_options_first_and_all_on_demand(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for word in ("--help", "--help-all"):
        assert main([command, word]) == 0
        texts.append(capsys.readouterr().out)
    common, everything = texts
    assert "--lr LR" in common
    assert "--balance-start" not in common
    assert f"`pcenet {command} --help-all` shows all options." in common
    # Not those of a single run where several are compared.
    names = {name for names in GROUPS.values() for name in names} - (set(OF_A_RUN) if command == "compare" else set())
    assert [name for name in names if f"--{name.replace('_', '-')}" not in everything] == []
