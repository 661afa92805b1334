"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("pcenet", derandomize=True, deadline=None, max_examples=15, database=None)
settings.load_profile("pcenet")

# The tensors of most tests have a few pixels: a second thread would spend its time waiting for the first.
THREADS = 1


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    # Set for the session, because fixtures of wider scope than a test train networks: sums that are split over another
    # number of threads are rounded differently, and runs are compared bit for bit.
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)
