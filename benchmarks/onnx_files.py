"""Time ONNX files of `pcenet export` against the first one, in turns in one process: medians in onnxruntime.

    python benchmarks/onnx_files.py dense_nano.onnx pce_nano.onnx --batches 1 8 64 --threads 2

With one thread the processor time is measured, which other programs disturb less than the time on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime


def main() -> None:
    """Print a line for each batch size: milliseconds of each file, and its ratio to the first one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1000, help="images in all, for each file and batch size")
    options = parser.parse_args()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    # A session's threads would go on waiting at full speed, on the cores that the next session runs on.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [onnxruntime.InferenceSession(file, settings) for file in options.files]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    generator = np.random.default_rng(0)
    for batch in options.batches:
        images = generator.standard_normal((batch, *sessions[0].get_inputs()[0].shape[1:]), dtype=np.float32)
        times: list[list[float]] = [[] for _ in sessions]
        for turn in range(3 + max(10, options.images // batch)):
            for session, own in zip(sessions, times, strict=True):
                start = clock()
                session.run(["logits"], {"images": images})
                if turn >= 3:  # the first ones warm up
                    own.append(1000 * (clock() - start))
        medians = [statistics.median(own) for own in times]
        print(f"batch {batch}:", ", ".join(f"{median:.2f} ms ({median / medians[0]:.2f})" for median in medians))


if __name__ == "__main__":
    main()
