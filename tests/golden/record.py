"""Write the golden files: ``python tests/golden/record.py [PART ...]``, all parts by default.

Only a deliberate change of behaviour is a reason to run it; the diff then shows, a line a tensor, what changed. The
folders under ``saved`` are what users of earlier versions have on disk: they are made where they are missing and never
again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden.recipes import HERE, PARTS, SAVED, digests, losses, make_saved


def dump(value: Any, depth: int = 0) -> str:
    """JSON with one line for what holds no mapping."""
    if not isinstance(value, dict):
        return json.dumps(value)
    pad = "\n" + " " * depth
    return "{" + ",".join(f"{pad} {json.dumps(k)}: {dump(v, depth + 1)}" for k, v in value.items()) + pad + "}"


def write(part: str, content: Any) -> None:
    path = HERE / f"{part}.json"
    path.write_text(dump(content) + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


def save_folder(name: str) -> None:
    folder = SAVED / name
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as whole:
        make_saved(name).save_pretrained(whole)
        for file in ("config.json", "model.safetensors"):
            copyfile(Path(whole) / file, folder / file)


def main(parts: list[str]) -> None:
    torch.set_num_threads(1)
    for part in parts or [*PARTS, "training"]:
        if part == "training":
            write(part, {"losses": losses(torch.float64)})
            continue
        content = {}
        for name, recipe in PARTS[part].items():
            if part == "saved" and not (SAVED / name).exists():
                save_folder(name)
            start = time.perf_counter()
            content[name] = digests(recipe())
            if (seconds := time.perf_counter() - start) > 0.5:
                print(f"  {name}: {seconds:.1f} s")
        write(part, content)


if __name__ == "__main__":
    main(sys.argv[1:])
