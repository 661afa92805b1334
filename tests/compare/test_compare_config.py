"""Which runs a comparison asks for, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pcenet.cli import main
from pcenet.comparison.config import CompareConfig
from pcenet.comparison.run import baseline_of
from pcenet.runs.config import TrainConfig
from pcenet.runs.options import options_of


def test_runs_go_seed_by_seed_and_differ_by_what_they_are_told_to() -> None:
    recipe = TrainConfig(model="pce_nano", epochs=3, lr=0.01, model_args={"num_experts": 2})
    variants = {"slow": {"lr": 0.001}, "plain": None, "unused": {"lr": 1.0}}
    config = CompareConfig(["slow", "dense_nano", "plain"], [5, 2], variants, out="there", recipe=recipe)
    expected = [
        replace(recipe, out="there/slow-5", seed=5, lr=0.001, resume="auto"),
        replace(recipe, out="there/dense_nano-5", seed=5, model="dense_nano", resume="auto"),
        replace(recipe, out="there/plain-5", seed=5, resume="auto"),
        replace(recipe, out="there/slow-2", seed=2, lr=0.001, resume="auto"),
        replace(recipe, out="there/dense_nano-2", seed=2, model="dense_nano", resume="auto"),
        replace(recipe, out="there/plain-2", seed=2, resume="auto"),
    ]
    assert [run.config for run in config.runs] == expected
    assert [(run.label, run.seed) for run in config.runs][:2] == [("slow", 5), ("dense_nano", 5)]
    assert config.runs[0].lock == Path("there/slow-5.lock")


def test_what_is_not_given() -> None:
    config = CompareConfig(variants={"b": {}, "a": {"lr": 0.1}}, recipe=TrainConfig(data="some/where/birds.zip"))
    assert config.labels == ("b", "a")
    assert config.seed_list == (0, 1, 2)
    assert str(config.folder) == "runs/compare-birds"


def test_a_colon_is_no_part_of_a_folder_s_name() -> None:
    recipe = TrainConfig(task="segment")
    assert CompareConfig(["unet:pce_nano_s2"], 1, out="x", recipe=recipe).runs[0].name == "unet-pce_nano_s2-0"


def test_every_field_explains_itself() -> None:
    assert all(len(option.help) > 10 for _, option in options_of(CompareConfig).values())


def test_a_variant_adds_to_the_recipes_mappings() -> None:
    recipe = TrainConfig(model_args={"widths": [8, 8, 8], "num_experts": 4})
    variants = {"two": {"model_args": {"num_experts": 2}}, "none": {"model_args": {}}, "other": {"lr": 0.1}}
    config = CompareConfig(variants=variants, recipe=recipe)
    assert config.options("two", 0).model_args == {"widths": [8, 8, 8], "num_experts": 2}
    assert [config.options(label, 0).model_args for label in ("none", "other")] == [recipe.model_args] * 2


@pytest.mark.parametrize(
    ("labels", "baseline"),
    [
        (["pce_nano", "dense_nano", "pce_tiny"], "dense_nano"),
        (["pce_nano_spec", "pce_nano", "dense_nano", "pce_tiny"], "dense_nano"),
        (["base", "plain", "pce_tiny"], "plain"),  # the variant whose network is the twin
        (["pce_nano", "dense_tiny", "pce_tiny"], "pce_tiny"),
        (["dense_nano", "pce_nano"], "pce_nano"),  # a dense network has no twin
        (["pce_nano"], None),
    ],
)
def test_the_baseline_is_the_first_network_s_twin_or_else_the_last(labels: list[str], baseline: str | None) -> None:
    variants = {"base": {"model": "pce_nano"}, "plain": {"model": "dense_nano", "lr": 0.1}}
    assert baseline_of(CompareConfig(labels, variants=variants)) == baseline


def test_the_baseline_may_be_chosen() -> None:
    assert baseline_of(CompareConfig(["pce_nano", "dense_nano", "pce_tiny"], baseline="pce_tiny")) == "pce_tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "models and variants are empty: give what is to be compared"),
        ({"models": ["a/b"]}, "models: 'a/b' cannot be part of a folder's name"),
        ({"models": [".."]}, "models: '..' cannot be part of a folder's name"),
        ({"models": ["pce_nano", "pce_nano"]}, "models: 'pce_nano' is there twice"),
        ({"models": ["unet:pce_nano", "unet-pce_nano"]}, "another label has the same folder"),
        ({"models": ["pce_nano"], "baseline": "pce_nan"}, "baseline 'pce_nan' is not one of pce_nano; did you mean"),
        ({"models": ["pce_nano"], "seeds": 0}, "seeds must be at least 1, got 0"),
        ({"models": ["pce_nano"], "seeds": []}, "seeds=[] must be one or more whole numbers, each once"),
        ({"models": ["pce_nano"], "seeds": [2, 2]}, "seeds=[2, 2] must be one or more whole numbers, each once"),
        ({"models": ["pce_nano"], "seeds": [0, -1]}, "pce_nano: seed must be at least 0, got -1"),
        ({"variants": {"a": {"lr": -1.0}}}, "a: lr must be above 0, got -1.0"),
        ({"variants": {"a": {"temperature_epochs": 1.0}}}, "a: temperature_epochs 1 has no effect without temperature"),
        ({"variants": {"a": {"lrr": 1.0}}}, "variants: a: unknown option 'lrr'; did you mean 'lr'?"),
        ({"variants": {"a": {"seed": 1}}}, "variants: a: seed is not for one variant"),
        ({"variants": {"a": {"data": "digits"}}}, "variants: a: data is not for one variant"),
        ({"variants": {"a": {"overfit": 100}}}, "variants: a: overfit is not for one variant"),
        ({"variants": {"a": {"classes": ["sky", "road"]}}}, "variants: a: classes is not for one variant"),
        ({"variants": {"a": {"ignore_index": 1}}}, "variants: a: ignore_index is not for one variant"),
        ({"variants": {"a": {"threads": 1}}}, "variants: a: threads is not for one variant"),
        ({"variants": {"a": 3}}, "variants: a must be a mapping of options such as {lr: 0.002}, got 3"),
    ],
)
def test_options_that_break_a_rule_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompareConfig(**options)


@pytest.mark.parametrize(
    ("recipe", "line", "message"),
    [
        ("variants: {a: {lrr: 1}}", "", "variants: a: unknown option 'lrr' in the --config file; did you mean 'lr'?"),
        ("variants: {a: {lr: fast}}", "", "variants: a: lr must be a number, got 'fast'"),
        ("variants: {a: {lr: 0}}", "", "a: lr must be above 0, got 0"),
        ("variants: {a: {model: pce_nan}}", "", "a: model 'pce_nan' is unknown; did you mean 'pce_nano'?"),
        ("variants: {a: {model: pce_unet_nano}}", "", "a: model 'pce_unet_nano' is made to segment"),
        ("variants: {a: {model_args: {num_expert: 2}}}", "", "a: model_args: unknown argument 'num_expert'"),
        ("variants: {a: {model_args: {border: halos}}}", "", "a: model_args {'border': 'halos'} make no network"),
        ("variants: {3: {lr: fast}}", "", "variants: 3: lr must be a number"),
        ("variants: {wide: {lr: 0.1}}", "--models [wid]", "wid: model 'wid' is unknown; did you mean"),
        ("variants: {wide: {lr: 0.1}}", "--models [wid]", "variants: wide"),
        ("variants: 3", "", "variants must be a mapping"),
        ("variants: {1: {lr: 0.1}, '1': {lr: 0.2}}", "", "variants: a number and a text have one label among 1;"),
        ("epcohs: 3", "--models [pce_nano]", "unknown option 'epcohs' in the --config file; did you mean 'epochs'?"),
        ("seed: 3", "--models [pce_nano]", "unknown option 'seed' in the --config file; did you mean 'seeds'?"),
        ("epochs: 0", "--models [pce_nano]", "epochs must be at least 1, got 0"),
        ("epochs: 1", "--models pce_nano", "models must be a list such as [a, b], got 'pce_nano'"),
        (
            "epochs: 1",
            "--models [pce_nano] --seeds few",
            "seeds must be a whole number, or a list of them such as [0, 1]",
        ),
        ("epochs: 1", "--models [pce_nano] --seed 3", "unknown option '--seed'; did you mean '--seeds'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2_before_anything_is_trained(
    recipe: str,
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe + "\n")
    assert main(["compare", "--config", "recipe.yaml", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_file_holds_recipe_and_comparison_and_the_command_line_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[CompareConfig] = []
    monkeypatch.setattr("pcenet.comparison.run.compare", found.append)
    monkeypatch.chdir(tmp_path)
    Path("other.zip").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "epochs: 4\nlr: 1e-3\ndata: some.zip\nmodel: pce_tiny\nmodels: [base, small]\nseeds: [3, 1]\n"
        "variants:\n  base:\n  small: {lr: 5e-4, model_args: {num_experts: 2}}\n"
    )
    assert main(["compare", "--config", str(path), "--data", "other.zip", "--seeds", "2", "--out", "there"]) == 0
    (config,) = found
    assert config == CompareConfig(
        models=["base", "small"],
        seeds=2,
        variants={"base": None, "small": {"lr": 5e-4, "model_args": {"num_experts": 2}}},
        out="there",
        recipe=TrainConfig(epochs=4, lr=1e-3, data="other.zip", model="pce_tiny"),
    )


def test_the_recipe_of_the_guide_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^pcenet (compare .*)$", text, re.MULTILINE)
    assert [command + " --status" for command in commands[:1]] == commands[1:]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    assert main(commands[1].split()) == 0
    assert "runs/comparison: 0 of 9 runs are finished" in capsys.readouterr().out
