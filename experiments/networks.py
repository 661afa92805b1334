"""Writes ``pcenet/networks.json``, which `pcenet models` shows: run it when a network has changed.

python experiments/networks.py
"""

import json
from pathlib import Path

import pcenet
from pcenet.models import describe, list_models

if __name__ == "__main__":
    found = {name: describe(name) for name in list_models()}
    path = Path(pcenet.__file__).parent / "networks.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
