"""Read untrusted YAML: plain values within a size limit, no duplicate keys or aliases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.errors import FormatError
from adapterkit.packages import needed

if TYPE_CHECKING:
    from yaml import Node, SafeLoader

MAX_YAML = 100_000  # characters; PyYAML takes two seconds for them
MAX_NUMBER = 100  # characters


Lines: TypeAlias = dict[tuple[Any, ...], int]  # path of keys and indices -> line


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML document; see `parse_with_lines`."""
    return parse_with_lines(text, where)[0]


def parse_with_lines(text: str, where: str) -> tuple[Any, Lines]:
    """Parse a YAML document, and return with it the line of each value in mappings and lists.

    Raises FormatError, with the line, for invalid YAML, aliases (a few lines of them expand to any size), duplicate
    keys (PyYAML silently takes the last), and very long numbers.
    """
    yaml = needed("yaml", f"{where}: YAML")
    if len(text) > MAX_YAML:
        raise FormatError(f"{where}: has {len(text):,} characters of YAML, expected at most {MAX_YAML:,}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None, {}
        _check(root, where, set())
        loader = yaml.SafeLoader("")
        return loader.construct_document(root), dict(_lines(root, loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise FormatError(f"{where}{line}: is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: February 31
        raise FormatError(f"{where}: is not valid YAML: {str(error).splitlines()[0]}") from error
    except (LookupError, AttributeError, TypeError) as error:  # from `!!bool x` and `!!int ''`
        raise FormatError(f"{where}: is not valid YAML: a value doesn't match its tag (!!name)") from error


def _lines(node: Node, loader: SafeLoader, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield the path and the line of every value below `node`, a mapping's by its key."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, loader.construct_object(key, deep=True))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, loader, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), value.start_mark.line + 1
            yield from _lines(value, loader, (*at, index))


def _check(node: Node, where: str, seen: set[int]) -> None:
    """Raise FormatError for aliases, duplicate keys and very long numbers."""
    import yaml

    line = f"{where}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise FormatError(f"{line}: is used by an alias (*name); repeat the value instead")
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
            raise FormatError(f"{line}: has a number of {len(node.value):,} characters, expected at most {MAX_NUMBER}")
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            _check(key, where, seen)
            _check(value, where, seen)
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise FormatError(f"{where}:{key.start_mark.line + 1}: duplicate key {key.value[:60]!r}")
                keys.add(key.value)
    else:
        for inner in node.value:
            _check(inner, where, seen)
