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
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from pcenet import __version__
from pcenet.app.config import AppConfig
from pcenet.benchmark.config import BenchConfig
from pcenet.catalogue import SOURCES, check_network, fault_of_source, task_of_source
from pcenet.choices import TaskName, did_you_mean
from pcenet.comparison.config import OF_A_RUN, CompareConfig
from pcenet.explanation.config import ExplainConfig
from pcenet.exporting.config import ExportConfig
from pcenet.inference.config import PredictConfig
from pcenet.parsing import ABOUT, entries_of, parse, parse_json_flag, parse_values, read_variant
from pcenet.publish.config import PushConfig
from pcenet.runs.config import CheckDataConfig, EvalConfig, TrainConfig
from pcenet.runs.finding import find_model
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

TRAIN_EXTRA = ("lightning", "lightning_utilities", "scipy", "tensorboard", "torchmetrics")
TRACEBACK = "PCENET_TRACEBACK"
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
        + "".join(f"  {name:12}{about}\n" for name, about in ABOUT.items())
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


def check_source(config: TrainConfig) -> None:
    """Raise what opening the data would, where there is nothing of that name, before torch is imported."""
    if task_of_source(config.data) is None and (fault := fault_of_source(config.data, SOURCES[config.task])):
        raise ValueError(fault)


def run_train(arguments: list[str]) -> int | None:
    """``pcenet train``."""
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
    """``pcenet compare``."""
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
    from pcenet.comparison.run import compare, status

    (status if config.status else compare)(config)


def say_loading() -> None:
    """To somebody who waits: importing PyTorch takes some seconds."""
    if sys.stderr.isatty():
        say("loading PyTorch ...", to=sys.stderr)


def check_run(name: str) -> None:
    """Raise what `find_model` raises, before torch is imported; a file may be one that `pcenet export` wrote."""
    if not Path(name).is_file():
        find_model(name)


def run_eval(arguments: list[str]) -> None:
    """``pcenet eval``."""
    config = parse("eval", EvalConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.tasks.evaluation import evaluate

    evaluate(config)


def run_check_data(arguments: list[str]) -> int:
    """``pcenet check-data``."""
    config = parse("check-data", CheckDataConfig, arguments)
    say_loading()
    from pcenet.analysis.check_data import check_data

    return 0 if check_data(config).usable else 1


def run_predict(arguments: list[str]) -> int:
    """``pcenet predict``."""
    config = parse("predict", PredictConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.inference.predict import predict

    result = predict(config)
    return 0 if result.predicted else fail(f"none of {len(result.left_out)} files could be predicted", code=1)


def run_export(arguments: list[str]) -> None:
    """``pcenet export``."""
    config = parse("export", ExportConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.exporting.command import export

    export(config)


def run_explain(arguments: list[str]) -> None:
    """``pcenet explain``."""
    config = parse("explain", ExplainConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.explanation.command import explain

    explain(config)


def run_app(arguments: list[str]) -> None:
    """``pcenet app``."""
    config = parse("app", AppConfig, arguments)
    check_run(config.run)
    say_loading()
    from pcenet.app.server import serve

    serve(config)


def run_push(arguments: list[str]) -> None:
    """``pcenet push``."""
    config = parse("push", PushConfig, arguments)
    say_loading()
    from pcenet.publish.command import push

    push(config)


def run_models(arguments: list[str]) -> None:
    """``pcenet models``."""
    options = parse_json_flag("models", arguments)
    from pcenet import zoo

    if options.json:
        say(*json.dumps(zoo.records(), indent=2).splitlines())
        return
    rows = [row for task in get_args(TaskName) for row in zoo.rows(task)]
    say(*as_columns(zoo.TITLES, rows), "", *zoo.legend())


def as_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which every column is as wide as its widest entry: rich, which draws tables, is an extra."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def run_bench(arguments: list[str]) -> None:
    """``pcenet bench``."""
    config = parse("bench", BenchConfig, arguments)
    say_loading()
    from pcenet.benchmark.run import bench

    bench(config)


def run_doctor(arguments: list[str]) -> None:
    """``pcenet doctor``."""
    options = parse_json_flag("doctor", arguments)
    from pcenet.doctor import as_text, examine

    report = examine()
    say(*(json.dumps(report, indent=2) if options.json else as_text(report)).splitlines())


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
