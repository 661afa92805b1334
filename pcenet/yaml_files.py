"""YAML that a stranger may have written is read quickly, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from pcenet.reading import check_regular

LARGEST = 2**18  # bytes of a file
MOST = 100_000  # values, those that aliases repeat counted each time
DEEPEST = 100  # lists and mappings within each other

MERGE = "tag:yaml.org,2002:merge"
INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30}|0x[0-9a-fA-F_]{1,30})$")  # longer ones are texts, and no option's
FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)


class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc] # yaml comes without types
    """YAML's plain values, none of Python's; no key twice, and aliases that neither multiply nor lead in a circle."""

    def get_single_node(self) -> yaml.Node | None:
        """The root of the document."""
        self.root = super().get_single_node()
        _check_size(self.root)
        return self.root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; at the root, where keys are options, hyphens are as good as underscores."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            name = self.construct_object(key)
            name = name.replace("-", "_") if node is self.root and isinstance(name, str) else name
            line = key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{key.value!r} is given twice, in lines {lines[name]} and {line}; keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)


class OptionLoader(BoundedLoader):
    """Options as people write them: 1e-3 is a number; 010 and 1:30, which YAML 1.1 takes for 8 and 90, are texts, from
    which the type of the option makes a number, or an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for tag, pattern in ((":int", INT), (":float", FLOAT)):
    OptionLoader.add_implicit_resolver(f"tag:yaml.org,2002{tag}", pattern, list("-+0123456789."))


def parse_yaml(text: str, loader: type[BoundedLoader] = OptionLoader) -> Any:
    """The value of a text.

    Raises:
        ValueError: for a key that comes twice, or more values or levels than anybody writes.
        yaml.YAMLError: if it is no YAML.
    """
    try:
        return yaml.load(text, loader)
    except RecursionError as error:
        raise ValueError(f"lists and mappings lie within each other more than {DEEPEST} deep") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of PyYAML's own
        raise ValueError("a value does not fit the tag (!!...) before it; leave the tag out") from error


def read_yaml(path: Path, loader: type[BoundedLoader] = OptionLoader) -> Any:
    """The value of a file.

    Raises:
        ValueError: naming the file, if it is no regular one, too large, no YAML, or as for `parse_yaml`.
        OSError: if it cannot be read.
    """
    check_regular(path, LARGEST)
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"), loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_yaml(value: Any) -> str:
    """A value as YAML in ASCII, keys in their order: it is printed, too, and other characters might be obeyed there."""
    return yaml.safe_dump(value, sort_keys=False)


def _check_size(root: yaml.Node | None) -> None:
    """Raise a ``ValueError`` for a document that would grow beyond bounds: aliases stand for all below them."""
    count = 0
    below = [(root, 0)]
    while below:
        node, depth = below.pop()
        count += 1
        if count > MOST:
            raise ValueError(f"it has more than {MOST} values, those that aliases (*name) repeat counted each time")
        if depth > DEEPEST:
            raise ValueError(f"lists and mappings lie within each other more than {DEEPEST} deep")
        if isinstance(node, yaml.SequenceNode):
            below += [(each, depth + 1) for each in node.value]
        elif isinstance(node, yaml.MappingNode):
            below += [(each, depth + 1) for pair in node.value for each in pair]
