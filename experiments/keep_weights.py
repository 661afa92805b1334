"""Keep the networks of a comparison's finished runs, kernels in float16, so that others can measure them.

    python experiments/keep_weights.py experiments/results/cifar10 experiments/weights/cifar10
    pcenet eval experiments/weights/cifar10/pce_nano-0 --data cifar10.zip --split val

Each becomes a model folder with the run's name, NETWORK-SEED; those that are there already are replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bundle_weights import copy_model

from pcenet.runs.folder import RunFolder
from pcenet.writing import write_atomically


def main(argv: Sequence[str] | None = None) -> None:
    """Keep what is finished, and name it; a mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the folder of the runs, as of pcenet compare --out")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the model folders go")
    arguments = parser.parse_args(argv)
    try:
        print(f"kept {', '.join(keep(arguments.runs, arguments.out))} in {arguments.out}")
    except ValueError as error:
        parser.error(str(error))


def keep(runs: Path, out: Path) -> list[str]:
    """Store the networks of the finished runs under a folder; returns the names of the runs.

    Raises:
        ValueError: if there is none, or a network has numbers beyond float16.
    """
    found = [RunFolder(path) for path in sorted(runs.iterdir()) if path.is_dir()] if runs.is_dir() else []
    finished = [run for run in found if run.finished]
    if not finished:
        raise ValueError(f"RUNS {runs} has no finished run with its model/; give the folder in which they were trained")
    for run in finished:
        write_atomically(out / run.path.name, partial(copy_model, run.model, half=True))
    return [run.path.name for run in finished]


if __name__ == "__main__":
    main()
