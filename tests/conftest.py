"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("pcenet", derandomize=True, deadline=None, max_examples=15, database=None)
settings.load_profile("pcenet")


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    # The tensors of most tests have a few pixels: a second thread would spend its time waiting for the first.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
