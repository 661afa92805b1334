"""The options of ``pcenet push``. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pcenet.runs.options import Option, check

SHOWN = 6  # images of the routing picture


@dataclass(frozen=True)
class PushConfig:
    """What is published; the annotations hold the explanations. Creating one checks every value.

    Raises:
        ValueError: for a value that breaks its rule, naming it.
    """

    run: Annotated[str, Option("The folder of a finished run.", positional=True)]
    repo: Annotated[
        str | None,
        Option(
            "Where it goes: NAME, or OWNER/NAME, on the Hub. Made where it is missing; what is there stays in its "
            "history."
        ),
    ] = None
    private: Annotated[bool, Option("Make a repository that only its owner sees.")] = False
    twin: Annotated[str | None, Option("The run of the dense twin, to stand beside the network's score and cost.")] = (
        None
    )
    images: Annotated[
        int | None,
        Option(
            "Images of the validation data in the picture of which expert served which patch. They are published with "
            f"it. 0: no picture. Default: {SHOWN} of the data that PCE knows by name, none of your own.",
            at_least=0,
            at_most=16,
        ),
    ] = None
    license: Annotated[
        str | None, Option("Licence of the weights, as the Hub names it, such as apache-2.0. Default: none is stated.")
    ] = None
    dry_run: Annotated[str | None, Option("Write all files to this folder, new or empty, and upload nothing.")] = None

    def __post_init__(self) -> None:
        check(self)
        if self.repo is None:
            raise ValueError("repo: say where the network goes with --repo NAME or --repo OWNER/NAME")
