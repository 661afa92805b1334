"""A small network to export."""

from collections.abc import Callable

import pytest
from exporting import make_tiny

from pcenet.models import SavableModel


@pytest.fixture
def tiny() -> Callable[..., SavableModel]:
    """`exporting.make_tiny`."""
    return make_tiny
