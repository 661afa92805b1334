"""Memory of each of 1, 2 and 4 processes that train a network of many experts: ``python benchmarks/process_memory.py``.

Runs ``pcenet train`` on the processor with each number of processes and both strategies, three steps each; prints what
the process with the most keeps: bytes of weights, gradients, optimiser state and averaged weights after a step, and the
largest resident memory, of the steps alone and of the whole run.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pcenet.runs.config import TrainConfig
from pcenet.runtime.launcher import Launcher
from pcenet.training.engine import local_part
from pcenet.training.loop import Trainer
from pcenet.training.run import train

EXPERTS = 256
CASES = [(1, "auto"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]
MEBI = 2**20


def kept(tensors: list[Tensor]) -> int:
    """Bytes that this process keeps of some tensors."""
    parts = [local_part(tensor) for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def measured_step(trainer: Trainer, *arguments: object) -> int:
    """A step, and what is kept after it. The peak counts from the end of the first step on."""
    images = TRAIN_STEP(trainer, *arguments)
    parameters, state = list(trainer.model.parameters()), trainer.state
    moments = [value for of_one in state.optimizer.state.values() for value in of_one.values()]
    states = [value for value in moments if isinstance(value, Tensor)]
    RESULT["weights"] = kept(parameters)
    RESULT["gradients"] = kept([p.grad for p in parameters if p.grad is not None])
    RESULT["optimiser"] = kept(states)
    RESULT["averages"] = kept(list(state.averaged.module.parameters()))
    if state.step == 1:
        Path("/proc/self/clear_refs").write_text("5")
    elif state.step == 3:
        lines = Path("/proc/self/status").read_text().splitlines()
        RESULT["peak of steps"] = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return images


RESULT: dict[str, int] = {}
TRAIN_STEP = Trainer.optimizer_step


def one_process(count: int, strategy: str, folder: str) -> None:
    """Do a process's part of a run, and write what it has kept."""
    Trainer.optimizer_step = measured_step
    options = {"epochs": 1, "batch_size": 32 // count, "max_images": 96, "workers": 0, "checkpoint_minutes": None}
    train(
        TrainConfig(
            out=f"{folder}/run",
            model_args={"num_experts": EXPERTS},
            device="cpu",
            precision="fp32",
            strategy=strategy,
            **options,
        )
    )
    RESULT["peak of all"] = max(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, RESULT["peak of steps"])
    Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(RESULT))


def main() -> None:
    """Run each case and print a table in MiB."""
    if len(sys.argv) > 1:
        one_process(int(sys.argv[1]), sys.argv[2], sys.argv[3])
        return
    print(f"pce_nano with {EXPERTS} experts, torch {torch.__version__}, MiB of the process that has most\n")
    names = ["weights", "gradients", "optimiser", "averages", "peak of steps", "peak of all"]
    print(f"| processes | strategy | {' | '.join([*names[:4], 'together', *names[4:]])} |")
    print("|---" * (len(names) + 3) + "|")
    for count, strategy in CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(count), strategy, folder]
            silent = os.dup(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = Launcher(command, count).run()
            os.dup2(silent, 1)
            if code:
                raise SystemExit(code)
            found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        most = {name: max(values[name] for values in found) / MEBI for name in names}
        cells = [most[name] for name in names]
        cells.insert(4, sum(cells[:4]))
        print(f"| {count} | {strategy} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
