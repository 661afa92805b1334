"""Words of the command line, and YAML, to the options of a command: one line for a mistake, naming what was meant."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_origin

from pcenet.catalogue import fault_of_source, task_of_source
from pcenet.choices import did_you_mean
from pcenet.runs.config import COMMON, GROUPS, TrainConfig
from pcenet.runs.options import Option, choices_of, options_of
from pcenet.runtime.launcher import ranks_of_environment
from pcenet.texts import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

C = TypeVar("C")

MOST_KEYS = 500  # of a configuration; jsonargparse looks at unknown ones slowly
PRINT_CONFIG = "--print-config"
YAML = "pcenet"  # jsonargparse's name for our way of reading and writing it
KINDS = {
    "int | list": "a whole number, or a list of them such as [0, 1]",
    "list": "a list such as [a, b]",
    "int": "a whole number",
    "float": "a number",
    "dict": 'a mapping such as {"num_experts": 8}',
}
# What each command does, in a line of help.
ABOUT = {
    "train": "train a network on images",
    "compare": "train several networks with several seeds under one recipe, and compare them",
    "eval": "measure a trained network: accuracy or mIoU, each class, confusion matrix, router health",
    "check-data": "look for faults in a folder, .zip or .csv of images before training on it",
    "predict": "apply a trained network to image files, folders, archives and videos",
    "export": "write a trained network to an ONNX file, or to a program of torch.export",
    "explain": "write a page on what each expert of a trained network does, and how much it matters",
    "app": "show what each expert does, on a web page of this machine",
    "push": "publish the network of a run on the Hugging Face Hub, with a model card",
    "models": "list the networks with their cost and their dense twins",
    "bench": "measure time, latency and memory against the dense twin",
    "doctor": "show versions, hardware and speed, for a bug report",
}


@dataclass(frozen=True)
class Entry:
    """What the command line knows of one field of a config: type, explanation and default."""

    kind: Any
    option: Option
    default: Any


def entries_of(config_class: type[Any]) -> dict[str, Entry]:
    """The fields of a config class, whose annotations carry an `Option`, by name."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config_class)
    }
    return {name: Entry(kind, option, defaults[name]) for name, (kind, option) in options_of(config_class).items()}


def parse(command: str, config_class: type[C], arguments: list[str]) -> C:
    """The options of a command as its config; see `parse_values`."""
    return config_class(**parse_values(command, entries_of(config_class), arguments))


def parse_values(command: str, entries: dict[str, Entry], arguments: list[str]) -> dict[str, Any]:
    """Options, and YAML given with ``--config``, by field; of two values for one option the later wins.

    Options are spelt with hyphens (``--batch-size``); underscores are understood too.

    Args:
        command: its name.
        entries: what it knows.
        arguments: what follows the command.

    Raises:
        ValueError: for an unknown option or a value that does not fit; names the nearest one that exists.
    """
    known = ["-h", "--help", "--help-all", "--config", PRINT_CONFIG, *(option_name(name) for name in entries)]
    spellings = {name: name for name in known}
    end = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is no option
    words = [*(respell(word, spellings) for word in arguments[:end]), *arguments[end:]]
    check_config_files(words)
    if "--help-all" in words:
        parser = config_parser(command, entries, everything=True)
        parser.print_help()
        parser.exit()
    try:
        # jsonargparse prints no option that help hides.
        parser = config_parser(command, entries, everything=PRINT_CONFIG in words)
        values = parser.parse_args(words).as_dict()
        given = parser.parse_args(words, defaults=False).as_dict() if "task" in entries else {}
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), entries)) from error
    values.pop("config")
    if "task" in values and "task" not in given:
        values["task"] = task_of_the_data(values["data"])
    return dict(values)


def task_of_the_data(name: str) -> str:
    """The task where none is given; said in a line unless it is the usual one, or another process says it."""
    task = task_of_source(name) or ("classify" if fault_of_source(name) else None)
    if task is None:
        from pcenet.data import task_for

        task = task_for(name)
    if task != "classify" and not ranks_of_environment().rank:
        say(f"task {task}: {name} has images and masks")
    return task


def check_config_files(words: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the file, unless those given with ``--config`` hold options by their names.

    jsonargparse reads them again, with the same loader, but would wait for a pipe.
    """
    from pcenet.yaml_files import read_yaml

    given = [word for before, word in pairwise(words) if before == "--config"]
    given += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for path in filter(os.path.exists, given):
        values = read_yaml(Path(path))
        if values is None:
            raise ValueError(f"--config: {path} is empty; write options into it, such as epochs: 10")
        if not isinstance(values, dict):
            raise ValueError(f"--config: {path} must hold options by their names, such as epochs: 10")
        if len(values) > MOST_KEYS:
            raise ValueError(f"--config: {path} has {len(values)} keys, more than there are options")
        if any(str(name).replace("-", "_") == "trust_code" for name in values):
            raise ValueError(f"--config: {path} cannot say whom you trust; give --trust-code on the command line")


def config_parser(command: str, entries: dict[str, Entry], everything: bool = False) -> ArgumentParser:
    """A parser with ``--config``, ``--print-config`` and an option, or argument, for each field.

    Args:
        command: its name.
        entries: what it knows.
        everything: whether help shows all options of a training run, or the common ones alone.
    """
    from jsonargparse import ArgumentParser, set_dumper, set_loader
    from yaml import YAMLError

    from pcenet.yaml_files import parse_yaml, write_yaml

    set_loader(YAML, parse_yaml, (YAMLError,))
    set_dumper(YAML, write_yaml)
    parser = ArgumentParser(
        prog=f"pcenet {command}",
        description=ABOUT[command],
        formatter_class=argparse.HelpFormatter,  # jsonargparse's adds types, and defaults as YAML has them
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML,
        print_config=PRINT_CONFIG,
    )
    parser.add_argument("--config", action="config", help="YAML file with options by their names.")
    group_of = {name: group for group, names in GROUPS.items() for name in names} if "epochs" in entries else {}
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(group_of.values())}
    if group_of and not everything:
        parser.epilog = f"`pcenet {command} --help-all` shows all options."
    for name in [*(name for name in group_of if name in entries), *(name for name in entries if name not in group_of)]:
        entry, place = entries[name], groups[group_of[name]] if name in group_of else parser
        choices = choices_of(entry.kind)
        settings: dict[str, Any] = {"type": str if choices else entry.kind, "help": explained(entry)}
        if entry.kind is bool:
            settings = {"action": "store_true", "help": explained(entry)}
        if choices:  # the config itself checks them, and suggests the nearest
            settings["metavar"] = "{" + ",".join(choices) + "}"
        if entry.option.positional:
            words = {"nargs": "+", "type": str} if get_origin(entry.kind) is list else {}
            place.add_argument(name, **settings | words)
        else:
            if name in group_of and name not in COMMON and not everything:
                settings["help"] = argparse.SUPPRESS
            place.add_argument(option_name(name), default=entry.default, **settings)
    for action in parser._actions:
        if PRINT_CONFIG in action.option_strings:
            action.metavar, action.help = "", "Print the options as YAML, as --config reads them, and end."
        # Its second name for an option that is a list, --classes+, is none of ours.
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
    return parser


def explained(entry: Entry) -> str:
    """What an option does, and its default, unless it has none or the text says in words what that leads to."""
    default, text = entry.default, entry.option.help
    if entry.option.positional or "Default:" in text or default is None or default is False or default in ([], {}):
        return text
    shown = f"{default:g}" if isinstance(default, float) else str(default).replace("'", "")  # [a, b], as it is given
    return f"{text} Default: {shown}."


def option_name(field: str) -> str:
    """A field's name as an option: ``batch_size`` is ``--batch-size``."""
    return "--" + field.replace("_", "-")


def respell(word: str, spellings: dict[str, str]) -> str:
    """An option in the parser's spelling; other words as they are.

    Raises:
        ValueError: for an option that does not exist.
    """
    if not re.match("--?[A-Za-z]", word):
        return word
    name, equals, value = word.partition("=")
    known = name.replace("_", "-")
    if known not in spellings:
        likely = did_you_mean(known, spellings, 0.85) or of_the_network(known, spellings)
        raise ValueError(f"unknown option {name!r}{likely or did_you_mean(known, spellings)}")
    return spellings[known] + equals + value


def of_the_network(option: str, spellings: Collection[str]) -> str:
    """How to give what is an argument of networks, where a command takes such; else nothing."""
    if "--model-args" not in spellings:
        return ""
    from pcenet.models import model_options

    argument = option.lstrip("-").replace("-", "_")
    if not any(argument in model_options(name) for name in ("pce_nano", "pce_unet_nano")):
        return ""
    return f"; it is an argument of the network: give --model-args '{{\"{argument}\": ...}}'"


def explain(message: str, entries: dict[str, Entry]) -> str:
    """jsonargparse's message in the user's terms, with the option nearest to an unknown one."""
    if unknown := re.match(r"Option '(.*)' is not accepted", message):
        return f"unknown option {unknown[1]!r} in the --config file{did_you_mean(unknown[1], entries)}"
    wrong = re.match(r'Parser key "(\w+)":.*value: (.*)$', message, re.DOTALL)
    if wrong and wrong[1] in entries:
        name, value = wrong.groups()
        kind = next((text for kind, text in KINDS.items() if kind in str(entries[name].kind)), "a text")
        return f"{name} must be {kind}, got {value!r}"
    return message.replace('Parser key "config"', "--config")


def read_variant(label: Any, changes: Any) -> Any:
    """A variant's options with the types that ``pcenet train`` gives them; what is no mapping is left to the config.

    Raises:
        ValueError: for an unknown option or a value that does not fit, naming the label.
    """
    if not isinstance(changes, dict):
        return changes
    entries = entries_of(TrainConfig)
    try:
        values = config_parser("train", entries).parse_object(changes)
    except argparse.ArgumentError as error:
        raise ValueError(f"variants: {label}: {explain(str(error), entries)}") from error
    return {name: values[name] for name in changes}


def parse_json_flag(command: str, arguments: list[str]) -> argparse.Namespace:
    """The options of a command that takes ``--json`` alone."""
    parser = OneLineParser(prog=f"pcenet {command}", description=ABOUT[command], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    spellings = {name: name for name in ("-h", "--help", "--json")}
    return parser.parse_args([respell(word, spellings) for word in arguments])


class OneLineParser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``ValueError`` with argparse's message."""
        raise ValueError(message)
