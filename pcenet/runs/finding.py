"""Finding the trained network that a name or a path means."""

from __future__ import annotations

from pathlib import Path

from pcenet.catalogue import CONFIG, bundled_folder, or_bundled
from pcenet.runs.folder import RunFolder


def find_model(name: str, option: str = "run") -> tuple[Path, RunFolder | None]:
    """The model folder that a path is or holds, and the run folder around it, if it is one.

    Args:
        name: a path or, where there is none, the name of weights that come with the package.
        option: what gave it, to be named in the error.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = bundled_folder(name) or Path(name)
    for folder in (path / "model", path):
        if (folder / CONFIG).is_file():
            run = RunFolder(folder.parent)
            return folder, run if run.config.is_file() else None
    reason = "training has not finished there" if (path / "config.yaml").is_file() else "there is no model/config.json"
    raise FileNotFoundError(f"{option}: {path} is no run folder or model folder: {reason}{or_bundled(name)}")
