"""YAML of strangers: plain values only, of bounded size, and no name twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import FormatError
from adapterkit.packages import needed

if TYPE_CHECKING:
    from yaml import Node

MAX_YAML = 100_000  # characters, which take PyYAML two seconds
MAX_NUMBER = 100  # characters


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document.

    Raises FormatError, with the line, for what is not YAML, aliases (a few lines of them unfold to any size), names
    that come twice, of which PyYAML keeps the last, and endless numbers.
    """
    yaml = needed("yaml", f"{where}: YAML")
    if len(text) > MAX_YAML:
        raise FormatError(f"{where}: has {len(text):,} characters of YAML, expected at most {MAX_YAML:,}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None
        _check(root, where, set())
        return yaml.SafeLoader("").construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise FormatError(f"{where}{line}: is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 31st of February
        raise FormatError(f"{where}: is not valid YAML: {str(error).splitlines()[0]}") from error
    except (LookupError, AttributeError, TypeError) as error:  # how PyYAML fails at `!!bool x` and `!!int ''`
        raise FormatError(f"{where}: is not valid YAML: a value is not what its tag (!!name) says") from error


def _check(node: Node, where: str, seen: set[int]) -> None:
    """Raise FormatError for what is valid in YAML and not taken here."""
    import yaml

    where_it_is = f"{where}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise FormatError(f"{where_it_is}: is referred to by an alias (*name); write it out in each place")
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
            raise FormatError(
                f"{where_it_is}: a number of {len(node.value):,} characters, expected {MAX_NUMBER} at most"
            )
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            _check(key, where, seen)
            _check(value, where, seen)
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise FormatError(f"{where}:{key.start_mark.line + 1}: names {key.value[:60]!r} twice")
                names.add(key.value)
    else:
        for inner in node.value:
            _check(inner, where, seen)
