"""The directive `pcenet-options`: the options of a command, as the program itself knows them."""

from __future__ import annotations

from importlib import import_module

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pcenet import parsing
from pcenet.runs.options import choices_of


class Options(SphinxDirective):
    """A definition list: each option, and what it does and is by default, in the words of its help.

    The directive's argument is the full name of the class that holds the options.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The list."""
        module, _, name = self.arguments[0].rpartition(".")
        entries = parsing.entries_of(getattr(import_module(module), name))
        entries.pop("recipe", None)  # in its place a command has the options of `pcenet train`
        return [nodes.definition_list("", *(item(name, entry) for name, entry in entries.items()))]


def item(name: str, entry: parsing.Entry) -> nodes.definition_list_item:
    """One option."""
    term = nodes.term()
    if entry.option.positional:
        term += nodes.literal(text=name.upper())
    else:
        term += nodes.literal(text=parsing.option_name(name))
    choices = choices_of(entry.kind)
    text = (f"One of {', '.join(choices)}. " if choices else "") + parsing.explained(entry)
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", "", *marked(text))))


def marked(text: str) -> list[nodes.Node]:
    """A text in which what stands between backticks is code."""
    parts = enumerate(text.split("`"))
    return [nodes.literal(text=part) if number % 2 else nodes.Text(part) for number, part in parts]


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directive known."""
    app.add_directive("pcenet-options", Options)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
