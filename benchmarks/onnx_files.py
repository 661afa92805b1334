"""Time ONNX files of `pcenet export` against the first one, in turns in one process: medians in onnxruntime.

    python benchmarks/onnx_files.py dense_nano.onnx pce_nano.onnx --batches 1 8 64 --threads 2

A file is loaded for its turn alone: the threads of a session wait at full speed, also on the cores that another session
runs on.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime

WARM_UP = 3  # runs


def milliseconds(file: str, batch: int, runs: int, threads: int) -> list[float]:
    """Time of each run of a file, on noise, by a session of its own."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, settings)
    (images,) = session.get_inputs()
    noise = np.random.default_rng(0).standard_normal((batch, *images.shape[1:]), dtype=np.float32)
    times = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter()
        session.run(["logits"], {images.name: noise})
        times.append(1000 * (time.perf_counter() - start))
    return times[WARM_UP:]


def main() -> None:
    """Print a line for each batch size: milliseconds of each file, and its ratio to the first one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=400, help="of each file and batch size in a turn")
    options = parser.parse_args()
    for batch in options.batches:
        times: list[list[float]] = [[] for _ in options.files]
        for _ in range(options.turns):
            for file, own in zip(options.files, times, strict=True):
                own += milliseconds(file, batch, max(8, options.images // batch), options.threads)
        medians = [statistics.median(own) for own in times]
        print(f"batch {batch}:", ", ".join(f"{median:.2f} ms ({median / medians[0]:.2f})" for median in medians))


if __name__ == "__main__":
    main()
