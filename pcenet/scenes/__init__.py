"""Drawing street scenes whose objects are known; `pcenet.data.SceneSource` makes a data set of them."""

from __future__ import annotations

from typing import NamedTuple


class SceneObject(NamedTuple):
    """One thing in an image, of which more is known than its class.

    Attributes:
        number: which it is in `pcenet.data.ObjectSource.instances`, from 1 on.
        class_name: its class.
        attribute: what is known about it, such as ``"clothes"``.
        category: that attribute's value, such as ``"red"``.
    """

    number: int
    class_name: str
    attribute: str
    category: str
