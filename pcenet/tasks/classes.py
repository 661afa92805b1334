"""Whether two lists of classes are the same: of two splits, a checkpoint and its data, a network and a data set."""

from __future__ import annotations

from collections.abc import Sequence

from pcenet.data.names import bare, nearly, one_form


def check_same_classes(expected: Sequence[str], found: Sequence[str], expected_by: str, found_in: str) -> None:
    """Raise a ``ValueError`` that names the difference unless both lists are the same, in the same order.

    Names are the same in either Unicode form.
    """
    ours, theirs = ([one_form(name) for name in names] for names in (expected, found))
    if ours == theirs:
        return
    missing = [name for name in expected if one_form(name) not in theirs]
    extra = [name for name in found if one_form(name) not in ours]
    if missing or extra:
        difference = "; ".join(
            f"only {where}: {', '.join(names)}"
            for where, names in ((f"in {expected_by}", missing), (f"in {found_in}", extra))
            if names
        )
    else:
        difference = f"the same classes in another order, {', '.join(expected)} and {', '.join(found)}"
    alike = {bare(name): name for name in extra}
    difference += next((f".{hint}" for name in missing if (hint := nearly(name, alike))), "")
    raise ValueError(f"classes of {found_in} are not those of {expected_by}: {difference}")
