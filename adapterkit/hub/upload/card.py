"""Model cards: add missing metadata and leave existing lines unchanged.

ModelCard of huggingface_hub, and ruamel.yaml, rewrite the whole YAML block, and lose comments, quotes or line breaks.
Keys and values, `base_model_relation` among them: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterkit.errors import FormatError
from adapterkit.text import markdown

YAML_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
Relation = Literal["adapter", "merge", "quantized", "finetune"]
UNCLOSED_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n\w+:")


@dataclass(frozen=True)
class CardFacts:
    """The metadata and contents of a repository's card."""

    name: str
    relation: Relation  # to the base
    base: str | None  # a Hub id
    tags: tuple[str, ...]
    pipeline: str | None
    license: str | None
    library: str  # that loads it
    example: Sequence[str]  # Python lines that load it
    rows: Mapping[str, str]  # of the table below the title of a new card
    unmergeable: str = ""  # why an adapter is not merged as it is, and what to do instead

    @property
    def is_adapter(self) -> bool:
        """Whether the repository needs its base."""
        return self.relation == "adapter"


def complete_card(text: str | None, facts: CardFacts, local: Sequence[str]) -> tuple[str, list[str]]:
    """Complete the card `text`, or write a new one; returns it with the names of the added or changed keys.

    Existing lines stay unchanged, except for a base or a tag with one of the `local` paths, and for a license other
    than the given one. Raises FormatError for invalid YAML.
    """
    block, body = _split(text or "")
    end = "\r\n" if "\r\n" in (block or body) else "\n"
    data, wanted = _load_yaml(block), _expected_keys(facts)
    changed: dict[str, Any] = (
        {"base_model": wanted.get("base_model")} if _is_local(data.get("base_model"), local) else {}
    )
    if isinstance(tags := data.get("tags"), list) and any(path in str(tag) for tag in tags for path in local):
        changed["tags"] = [tag for tag in tags if not any(path in str(tag) for path in local)]
    if isinstance(tags, list) and "adapterkit" in tags and (missing := [tag for tag in facts.tags if tag not in tags]):
        changed["tags"] = [*changed.get("tags", tags), *missing]
    if facts.license and data.get("license") not in (None, facts.license):
        changed["license"] = facts.license
    added = {key: value for key, value in wanted.items() if data.get(key) is None}
    block = _update_yaml(block, {**changed, **{key: value for key, value in added.items() if key in data}})
    if new := {key: value for key, value in added.items() if key not in data}:
        block += _dump_yaml(new)
    if not body.strip():
        body = _body(facts)
        added["a description"] = None
    return re.sub(r"\r?\n", end, f"---\n{block}---\n") + body, [*changed, *added]


def _split(text: str) -> tuple[str, str]:
    """Split a card into its YAML block, with the final line break, and its body.

    Removes a byte-order mark, which would hide the block from the Hub. Raises FormatError for an unclosed block.
    """
    text = text.removeprefix("\ufeff")
    if match := YAML_BLOCK.match(text):
        return match[1], text[match.end() :]
    if UNCLOSED_BLOCK.match(text):
        raise FormatError("README.md: YAML block is not closed; expected a line of --- after it")
    return "", text


def _update_yaml(block: str, values: Mapping[str, Any]) -> str:
    """Replace the lines of some keys in the YAML `block`, leaving all others unchanged."""
    changed = block
    for key, value in values.items():
        lines = re.compile(rf"^{key}[ \t]*:.*\n(?:[ \t-].*\n|[ \t]*\r?\n)*", re.MULTILINE)
        if match := lines.search(changed):
            changed = changed[: match.start()] + _dump_yaml({key: value}) + changed[match.end() :]
    expected = _load_yaml(block) | dict(values)
    try:
        return changed if _load_yaml(changed) == expected else _dump_yaml(expected)
    except FormatError:  # not one key per line, such as `{a: 1}`
        return _dump_yaml(expected)


def base_in_card(text: str | None) -> str | None:
    """The base in a card's metadata, or None."""
    found = _load_yaml(_split(text or "")[0]).get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) else None


def _expected_keys(facts: CardFacts) -> dict[str, Any]:
    wanted = {
        "base_model": facts.base,
        "base_model_relation": facts.relation if facts.base else None,
        "library_name": facts.library,
        "pipeline_tag": facts.pipeline,
        "license": facts.license,
        "tags": [*facts.tags, *([f"base_model:adapter:{facts.base}"] if facts.is_adapter else [])],
    }
    return {key: value for key, value in wanted.items() if value}


def _body(facts: CardFacts) -> str:
    """The body of a new card: title, table, and usage."""
    lines = ["", f"# {facts.name}", ""]
    if facts.rows:
        lines += [
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {markdown(value)} |" for name, value in facts.rows.items()),
            "",
        ]
    if facts.is_adapter:
        lines += ["```python", *facts.example, "```", ""]
        merge = ["Merge into the base:", "", "```", f"adapterkit merge {facts.base} {facts.name} -o merged", "```", ""]
        lines += [f"Not merged as it is: {markdown(facts.unmergeable)}", ""] if facts.unmergeable else merge
    return "\n".join(lines)


def _load_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError for dates such as February 31
        raise FormatError(f"README.md: invalid YAML block: {' '.join(str(error).split())[:200]}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise FormatError(f"README.md: YAML block is a {type(data).__name__}, expected a mapping")
    return data


def _dump_yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _is_local(value: Any, local: Sequence[str]) -> bool:
    return any(base in local for base in (value if isinstance(value, list) else [value]))
