"""How the site is made, of the pages beside this file and of the docstrings: `make docs`. It fetches nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.inspect import signature, stringify_signature

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import pcenet

project = "PCE"
author = project_copyright = "The PCE authors"
release = version = pcenet.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "options",
]
exclude_patterns = ["_build"]
# `Name` in a docstring is a reference, and a wrong one fails the build.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    # What other projects define: their inventories would have to be fetched.
    ("py:.*", r"(abc|collections|contextlib|huggingface_hub|lightning|numpy|os|pathlib|PIL|rich|timm|torch)\..*"),
    # Names of types that stand for themselves in signatures, and what is private to a package.
    ("py:class", r"[A-Z]\w*|nn\.Module"),
    ("py:(class|exc)", r"pcenet\.(analysis|data|explain|inference|training|upcycling)\.\w+\.\w+"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False

smartquotes = False  # --out would become a dash and "out"
highlight_language = "none"
html_theme = "furo"
html_title = f"PCE {release}"


def find_by_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.reference | None:
    """What a docstring or a signature calls by its bare name, or by that of the module which defines it, is documented
    under the name of its package."""
    domain = env.domains["py"]
    full = node["reftarget"]
    name = full.rpartition(".")[2]
    found = [
        path
        for path, entry in domain.objects.items()
        if path.rpartition(".")[2] == name and not entry.aliased and entry.objtype in ("class", "exception", "function")
    ]
    if node["refdomain"] != "py" or not (full == name or full.startswith("pcenet.")) or len(found) != 1:
        return None
    node["reftarget"] = found[0]
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, text)


def skip_fields_of_tuples(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Fields of a named tuple stand in its docstring already."""
    return True if type(member).__name__ == "_tuplegetter" else None


def keep_letters(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """``num_experts: E.`` is a description, not the fifth item of a list."""
    lines[:] = [re.sub(r"^( +[\w, ]+: )([A-Z])\.", r"\1\\\2.", line) for line in lines]


def show_arguments(
    app: Sphinx, what: str, name: str, member: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """The arguments of a network are those of its constructor, not those of huggingface_hub's ``__new__``."""
    if what != "class" or arguments != "(*args, **kwargs)":
        return None
    return stringify_signature(signature(member.__init__, bound_method=True), show_annotation=False), result


def setup(app: Sphinx) -> None:
    """Connect what stands above."""
    app.connect("missing-reference", find_by_name)
    app.connect("autodoc-process-docstring", keep_letters, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", show_arguments)
    app.connect("autodoc-skip-member", skip_fields_of_tuples)
