"""The command line: ``pcenet check-data | train | compare | eval | predict | export | explain | app | push | models |
bench | doctor``.

Nothing heavy is imported before a command runs, so that help and mistakes in the options cost no time.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_origin

from pcenet import __version__
from pcenet.app.config import AppConfig
from pcenet.benchmark.config import BenchConfig
from pcenet.catalogue import SOURCES, check_network, fault_of_source, networks, task_of_source, weights_of
from pcenet.choices import did_you_mean
from pcenet.compare.config import OF_A_RUN, CompareConfig
from pcenet.explain.config import ExplainConfig
from pcenet.export.config import ExportConfig
from pcenet.inference.config import PredictConfig
from pcenet.publish.config import PushConfig
from pcenet.runs.config import COMMON, GROUPS, CheckDataConfig, EvalConfig, TrainConfig
from pcenet.runs.finding import find_model
from pcenet.runs.options import Option, choices_of, options_of
from pcenet.runtime.launcher import (
    LOST,
    LostProcessError,
    OtherProcessError,
    end_with_the_launcher,
    launch,
    ranks_of_environment,
)
from pcenet.runtime.memory import ran_out_of_memory
from pcenet.runtime.signals import Terminated
from pcenet.texts import one_line, print_whatever_comes, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

C = TypeVar(
    "C",
    TrainConfig,
    EvalConfig,
    PredictConfig,
    ExportConfig,
    ExplainConfig,
    CheckDataConfig,
    BenchConfig,
    AppConfig,
    PushConfig,
)

TRAIN_EXTRA = ("lightning", "lightning_utilities", "scipy", "tensorboard", "torchmetrics")
TRACEBACK = "PCENET_TRACEBACK"
MOST_KEYS = 500  # of a configuration; jsonargparse looks at unknown ones slowly
YAML = "pcenet"  # jsonargparse's name for our way of reading and writing it
KINDS = {
    "int | list": "a whole number, or a list of them such as [0, 1]",
    "list": "a list such as [a, b]",
    "int": "a whole number",
    "float": "a number",
    "dict": 'a mapping such as {"num_experts": 8}',
}
GO_ON = {"train": "; --resume auto continues the run", "compare": "; the same command goes on from there"}

LESS_ELSEWHERE = "end other programs, or use a machine with more of it"
LESS_AT_ONCE = f"give a smaller --batch-size or fewer --workers, {LESS_ELSEWHERE}"
MEMORY = {
    **dict.fromkeys(
        ("train", "compare"), f"give a smaller --batch-size or --input-size, fewer --workers, {LESS_ELSEWHERE}"
    ),
    **dict.fromkeys(("eval", "predict", "explain"), LESS_AT_ONCE),
    "bench": f"give a smaller --batch-size, {LESS_ELSEWHERE}",
}

OTHER_PATH = "choose another path"
WAYS_OUT = {
    errno.EACCES: f"allow it to be read and written, or {OTHER_PATH}",
    errno.EPERM: f"allow it to be read and written, or {OTHER_PATH}",
    errno.EROFS: OTHER_PATH,
    errno.EEXIST: OTHER_PATH,
    errno.ENOTDIR: OTHER_PATH,
    errno.EISDIR: OTHER_PATH,
    errno.ENAMETOOLONG: OTHER_PATH,
    errno.ENOSPC: f"make room, or {OTHER_PATH}",
    errno.EDQUOT: f"make room, or {OTHER_PATH}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0; 1 where a command found what it was given unusable and has said so; 2 after an error that the
        user can mend, printed as one line; 130 after Ctrl-C; 143 after SIGTERM; 3 of a process that has lost
        another one with which it trained.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_whatever_comes()
    show_warnings()
    try:
        return dispatch(arguments)
    except KeyboardInterrupt as error:
        what, code = ("stopped by SIGTERM", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        if ranks_of_environment().rank:  # the first process says it
            return code
        return fail(f"{what}{GO_ON.get(next(iter(arguments), ''), '')}", code)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in TRAIN_EXTRA:
            return fail(f"{error}; install what this command needs: pip install 'pcenet[train]'")
        if "pip install" not in str(error):
            raise
        return fail(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, LostProcessError):
            return fail(str(error), LOST)
        if ran_out_of_memory(error):
            return fail(no_memory(next(iter(arguments), "")))
        if not isinstance(error, OSError):
            raise
        return fail(explain_system(error))
    except OtherProcessError:
        return 2
    except ValueError as error:
        return fail(str(error))
    except SystemExit as error:  # argparse leaves this way after --help and --version
        return error.code if isinstance(error.code, int) else 0


def fail(message: str, code: int = 2) -> int:
    """Print one line on stderr, on request below the traceback of the error being handled; return the exit code."""
    if os.environ.get(TRACEBACK) == "1":
        say(*traceback.format_exc().splitlines(), to=sys.stderr)
    ranks = ranks_of_environment()
    who = f"{ranks}: " if ranks.rank else ""
    say(f"pcenet: error: {who}{one_line(message)}", to=sys.stderr)
    return code


def no_memory(command: str) -> str:
    """That memory, the computer's or the GPU's, ran out, and the way out."""
    return f"memory ran out; {MEMORY.get(command, LESS_ELSEWHERE)}{GO_ON.get(command, '')}"


def explain_system(error: OSError) -> str:
    """What the operating system refused, and the way out."""
    if not (error.filename and error.strerror):
        return str(error)
    way_out = WAYS_OUT.get(error.errno or 0, "check the path and whether its disk is in order")
    return f"{error.filename}: {error.strerror}; {way_out}"


def show_warnings() -> None:
    """Print the package's warnings as lines on stderr."""
    logger = logging.getLogger("pcenet")
    if not any(isinstance(handler, WarningLines) for handler in logger.handlers):
        logger.addHandler(WarningLines(logging.WARNING))


class WarningLines(logging.Handler):
    """Writes to whatever stderr is at the time, so that lines appear above a progress bar, not inside it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        say(f"pcenet: warning: {one_line(record.getMessage())}", to=sys.stderr)


def dispatch(arguments: list[str]) -> int:
    """Run the command that the first argument names; return the exit code."""
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:]) or 0
    parser = argparse.ArgumentParser(
        prog="pcenet",
        usage="pcenet [-h] [--version] COMMAND ...",
        description="Convolutional networks whose patches are filtered by the expert chosen for them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "".join(f"  {name:12}{run.__doc__}\n" for name, run in COMMANDS.items())
        + "\n`pcenet COMMAND --help` explains a command's options."
        + f"\nAn error is one line; with the environment variable {TRACEBACK}=1 its traceback comes first.",
    )
    parser.add_argument("--version", action="version", version=f"pcenet {__version__}")
    if not arguments:
        parser.print_help()
        raise ValueError(f"no command given; give one of {', '.join(COMMANDS)}")
    word = arguments[0]
    if word in ("-h", "--help", "--version"):
        parser.parse_args([word])
    known = ("--help", "--version") if word.startswith("-") else tuple(COMMANDS)
    kind = "option" if word.startswith("-") else "command"
    raise ValueError(f"unknown {kind} {word!r}{did_you_mean(word, known)}")


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
    known = ["--config", "--help", "--help-all", *(option_name(name) for name in entries)]
    spellings = {name: name for name in known} | {"-h": "-h", "--print-config": "--print_config"}
    words = [respell(word, spellings) for word in arguments]
    check_config_files(words)
    if "--help-all" in words:
        parser = config_parser(command, entries, everything=True)
        parser.print_help()
        parser.exit()
    try:
        parser = config_parser(command, entries)
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
    """A parser with ``--config``, ``--print_config`` and an option, or argument, for each field.

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
    about = COMMANDS[command].__doc__
    parser = ArgumentParser(
        prog=f"pcenet {command}", description=about, exit_on_error=False, allow_abbrev=False, parser_mode=YAML
    )
    parser.add_argument("--config", action="config", help="YAML file with options by their names.")
    group_of = {name: group for group, names in GROUPS.items() for name in names} if "epochs" in entries else {}
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(group_of.values())}
    if group_of and not everything:
        parser.epilog = f"`pcenet {command} --help-all` shows all options."
    for name in [*(name for name in group_of if name in entries), *(name for name in entries if name not in group_of)]:
        entry, place = entries[name], groups[group_of[name]] if name in group_of else parser
        choices = choices_of(entry.kind)
        settings: dict[str, Any] = {"type": str if choices else entry.kind, "help": entry.option.help}
        if entry.kind is bool:
            settings = {"action": "store_true", "help": entry.option.help}
        if choices:  # the config itself checks them, and suggests the nearest
            settings["metavar"] = "{" + ",".join(choices) + "}"
        if entry.option.positional:
            words = {"nargs": "+", "type": str} if get_origin(entry.kind) is list else {}
            place.add_argument(name, **settings | words)
        else:
            if name in group_of and name not in COMMON and not everything:
                settings["help"] = argparse.SUPPRESS
            place.add_argument(option_name(name), default=entry.default, **settings)
    return parser


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


def check_source(config: TrainConfig) -> None:
    """Raise what opening the data would, where there is nothing of that name, before torch is imported."""
    if task_of_source(config.data) is None and (fault := fault_of_source(config.data, SOURCES[config.task])):
        raise ValueError(fault)


def run_train(arguments: list[str]) -> int | None:
    """train a network on images"""
    config = parse("train", TrainConfig, arguments)
    check_source(config)
    check_network(config.model_name, config.task)
    if config.init is not None and config.resume is None:  # what goes on needs it no more
        find_model(config.init, "init")
    if config.devices > 1 and ranks_of_environment().count == 1:
        return launch(["train", *arguments, "--task", config.task], config.devices)
    end_with_the_launcher()
    say_loading()
    if config.dry_run:
        from pcenet.training.rehearsal import dry_run

        dry_run(config)
    elif config.find != "none":
        from pcenet.training.find import find

        find(config)
    else:
        from pcenet.training.run import train

        train(config)
    return None


def run_compare(arguments: list[str]) -> None:
    """train several networks with several seeds under one recipe, and compare them"""
    own, recipe = entries_of(CompareConfig), entries_of(TrainConfig)
    del own["recipe"]  # in its place stand the options of a training run
    for name in OF_A_RUN:
        del recipe[name]
    values = parse_values("compare", recipe | own, arguments)
    variants = {str(label): read_variant(label, changes) for label, changes in values["variants"].items()}
    if len(variants) < len(values["variants"]):
        raise ValueError(f"variants: a number and a text have one label among {', '.join(variants)}; give each its own")
    values["variants"] = variants
    recipe_config = TrainConfig(**{name: values[name] for name in recipe})
    config = CompareConfig(**{name: values[name] for name in own}, recipe=recipe_config)
    if not config.status:  # which asks for no data
        check_source(recipe_config)
    say_loading()
    from pcenet.compare.run import compare, status

    (status if config.status else compare)(config)


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


def say_loading() -> None:
    """To somebody who waits: importing PyTorch takes some seconds."""
    if sys.stderr.isatty():
        say("loading PyTorch ...", to=sys.stderr)


def check_run(name: str) -> None:
    """Raise what `find_model` raises, before torch is imported; a file may be one that `pcenet export` wrote."""
    if not Path(name).is_file():
        find_model(name)


def run_eval(arguments: list[str]) -> None:
    """measure a trained network: accuracy or mIoU, each class, confusion matrix, router health"""
    config = parse("eval", EvalConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.tasks.evaluation import evaluate

    evaluate(config)


def run_check_data(arguments: list[str]) -> int:
    """look for faults in a folder or .zip of images before training on it"""
    config = parse("check-data", CheckDataConfig, arguments)
    say_loading()
    from pcenet.analysis.check_data import check_data

    return 0 if check_data(config).usable else 1


def run_predict(arguments: list[str]) -> int:
    """apply a trained network to image files, folders and archives"""
    config = parse("predict", PredictConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.inference.predict import predict

    result = predict(config)
    return 0 if result.predicted else fail(f"none of {len(result.left_out)} files could be predicted", code=1)


def run_export(arguments: list[str]) -> None:
    """write a trained network to an ONNX file, or to a program of torch.export"""
    config = parse("export", ExportConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.export.command import export

    export(config)


def run_explain(arguments: list[str]) -> None:
    """write a page on what each expert of a trained network does, and how much it matters"""
    config = parse("explain", ExplainConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.explain.command import explain

    explain(config)


def run_app(arguments: list[str]) -> None:
    """show what each expert does, on a web page of this machine"""
    config = parse("app", AppConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.app.server import serve

    serve(config)


def run_push(arguments: list[str]) -> None:
    """publish the network of a run on the Hugging Face Hub, with a model card"""
    config = parse("push", PushConfig, arguments)
    say_loading()
    from pcenet.publish.command import push

    push(config)


def run_models(arguments: list[str]) -> None:
    """list the networks with their cost and their dense twins"""
    options = parse_json_flag("models", arguments)
    rows = [about | {"weights": list(weights_of(name))} for name, about in networks().items()]
    if options.json:
        say(*json.dumps(rows, indent=2).splitlines())
        return
    titles = ("name", "task", "input", "parameters", "active", "multiply-adds", "router", "routed", "twin", "weights")
    say(
        *as_columns(
            titles,
            [
                (
                    row["name"],
                    row["task"],
                    " x ".join(map(str, row["input_size"])),
                    f"{row['parameters'] / 1e6:.2f} M",
                    f"{row['active_parameters'] / 1e6:.2f} M",
                    f"{row['multiply_adds'] / 1e6:.1f} M",
                    f"{row['router_share']:.1%}",
                    f"{row['routed_share']:.1%}",
                    row["twin"] or "",
                    ", ".join(row["weights"]),
                )
                for row in rows
            ],
        )
    )


def as_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which every column is as wide as its widest entry: rich, which draws tables, is an extra."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def run_bench(arguments: list[str]) -> None:
    """measure time, latency and memory against the dense twin"""
    config = parse("bench", BenchConfig, arguments)
    say_loading()
    from pcenet.benchmark.run import bench

    bench(config)


def run_doctor(arguments: list[str]) -> None:
    """show versions, hardware and speed, for a bug report"""
    options = parse_json_flag("doctor", arguments)
    from pcenet.doctor import as_text, examine

    report = examine()
    say(*(json.dumps(report, indent=2) if options.json else as_text(report)).splitlines())


def parse_json_flag(command: str, arguments: list[str]) -> argparse.Namespace:
    """The options of a command that takes ``--json`` alone."""
    parser = OneLineParser(prog=f"pcenet {command}", description=COMMANDS[command].__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    spellings = {name: name for name in ("-h", "--help", "--json")}
    return parser.parse_args([respell(word, spellings) for word in arguments])


class OneLineParser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``ValueError`` with argparse's message."""
        raise ValueError(message)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": run_train,
    "compare": run_compare,
    "eval": run_eval,
    "check-data": run_check_data,
    "predict": run_predict,
    "export": run_export,
    "explain": run_explain,
    "app": run_app,
    "push": run_push,
    "models": run_models,
    "bench": run_bench,
    "doctor": run_doctor,
}
