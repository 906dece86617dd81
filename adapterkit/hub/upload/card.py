"""The card that a repository is sent with: what is missing is added to what is there, which stays as it is.

ModelCard of huggingface_hub, and ruamel.yaml, write the whole block anew: comments, quotes or line breaks change.
Keys and values: https://huggingface.co/docs/hub/model-cards, and `base_model_relation` for what a model is of its base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterkit.errors import FormatError
from adapterkit.text import markdown

BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
Relation = Literal["adapter", "merge", "quantized", "finetune"]
NO_END = re.compile(r"\A\s*---[ \t]*\r?\n\w+:")


@dataclass(frozen=True)
class Facts:
    """What a card says of its repository."""

    name: str
    relation: Relation  # to its base
    base: str | None  # a Hub id
    tags: tuple[str, ...]
    pipeline: str | None
    license: str | None
    library: str  # that loads it
    example: Sequence[str]  # lines of Python that load it
    rows: Mapping[str, str]  # of the table below the title, in a card that is new

    @property
    def is_adapter(self) -> bool:
        """Whether it is nothing without its base."""
        return self.relation == "adapter"


def completed(text: str | None, facts: Facts, local: Sequence[str]) -> tuple[str, list[str]]:
    """The card `text`, or a new one, with what it lacks, and the names of what was added or changed.

    Every line that is there stays as it is, but for a base or a tag that is one of the `local` paths, and another
    license than the one that is asked for. Raises FormatError for YAML that is none.
    """
    block, body = _parts(text or "")
    end = "\r\n" if "\r\n" in (block or body) else "\n"
    data, wanted = _parsed(block), _wanted(facts)
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
    block = _changed(block, {**changed, **{key: value for key, value in added.items() if key in data}})
    if new := {key: value for key, value in added.items() if key not in data}:
        block += _dumped(new)
    if not body.strip():
        body = _body(facts)
        added["a description"] = None
    return re.sub(r"\r?\n", end, f"---\n{block}---\n") + body, [*changed, *added]


def _parts(text: str) -> tuple[str, str]:
    """The YAML of a card, which ends with a line's end, and the rest; a byte-order mark, by which the Hub would not
    see the YAML, is gone. Raises FormatError for YAML without an end.
    """
    text = text.removeprefix("\ufeff")
    if match := BLOCK.match(text):
        return match[1], text[match.end() :]
    if NO_END.match(text):
        raise FormatError("README.md: its YAML block has no end, expected a line of --- after it")
    return "", text


def _changed(block: str, values: Mapping[str, Any]) -> str:
    """The YAML `block` with the lines of some keys new, and all others as they are."""
    changed = block
    for key, value in values.items():
        lines = re.compile(rf"^{key}[ \t]*:.*\n(?:[ \t-].*\n|[ \t]*\r?\n)*", re.MULTILINE)
        if match := lines.search(changed):
            changed = changed[: match.start()] + _dumped({key: value}) + changed[match.end() :]
    expected = _parsed(block) | dict(values)
    try:
        return changed if _parsed(changed) == expected else _dumped(expected)
    except FormatError:  # written in a way that lines do not tell, as `{a: 1}`
        return _dumped(expected)


def base_of(text: str | None) -> str | None:
    """The base that a card names, where it names one."""
    found = _parsed(_parts(text or "")[0]).get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) else None


def _wanted(facts: Facts) -> dict[str, Any]:
    wanted = {
        "base_model": facts.base,
        "base_model_relation": facts.relation if facts.base else None,
        "library_name": facts.library,
        "pipeline_tag": facts.pipeline,
        "license": facts.license,
        "tags": [*facts.tags, *([f"base_model:adapter:{facts.base}"] if facts.is_adapter else [])],
    }
    return {key: value for key, value in wanted.items() if value}


def _body(facts: Facts) -> str:
    """A description: what it is, and how it is used."""
    lines = ["", f"# {facts.name}", ""]
    if facts.rows:
        lines += [
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {markdown(value)} |" for name, value in facts.rows.items()),
            "",
        ]
    if facts.is_adapter:
        lines += [
            "```python", *facts.example, "```", "",
            "Merged into its base:", "", "```", f"adapterkit merge {facts.base} {facts.name} -o merged", "```", "",
        ]  # fmt: skip
    return "\n".join(lines)


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 31st of February
        raise FormatError(f"README.md: its YAML block is broken: {' '.join(str(error).split())[:200]}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise FormatError(f"README.md: its YAML block is a {type(data).__name__}, expected keys with values")
    return data


def _dumped(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _is_local(value: Any, local: Sequence[str]) -> bool:
    return any(one in local for one in (value if isinstance(value, list) else [value]))
