"""The card that a repository is sent with: what is missing is added to what is there, which stays as it is.

Keys and values: https://huggingface.co/docs/hub/model-cards, and `base_model_relation` for what a model is of its base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import FormatError

BLOCK = re.compile(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What a card says of its repository."""

    name: str
    is_adapter: bool
    base: str | None  # a Hub id
    tags: tuple[str, ...]
    pipeline: str | None
    license: str | None
    rows: Mapping[str, str]  # of the table below the title, in a card that is new


def completed(text: str | None, facts: Facts, local: Sequence[str]) -> tuple[str, list[str]]:
    """The card `text`, or a new one, with what it lacks, and the names of what was added or changed.

    Every line that is there stays, but for a base that is one of the `local` paths, and another license than the one
    that is asked for. Raises FormatError for YAML that is none.
    """
    match = BLOCK.match(text or "")
    yaml_text, body = (match[1], (text or "")[match.end() :]) if match else ("", text or "")
    data = _parsed(yaml_text)
    wanted = _wanted(facts)
    replaced = [key for key in ("base_model",) if _is_local(data.get(key), local)]
    if facts.license and data.get("license") not in (None, facts.license):
        replaced.append("license")
    if replaced:
        tags = [tag for tag in data.get("tags") or [] if not any(path in str(tag) for path in local)]
        data |= {key: wanted.pop(key) for key in replaced if key in wanted}
        data |= {"tags": tags} if "tags" in data else {}
        yaml_text = _dumped(data)
    added = {key: value for key, value in wanted.items() if key not in data}
    if yaml_text and not yaml_text.endswith("\n"):
        yaml_text += "\n"
    yaml_text += _dumped(added) if added else ""
    if not body.strip():
        body = _body(facts)
        added["a description"] = None
    return f"---\n{yaml_text}---\n{body}", [*replaced, *added]


def base_of(text: str | None) -> str | None:
    """The base that a card names, where it names one."""
    match = BLOCK.match(text or "")
    found = _parsed(match[1]).get("base_model") if match else None
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) else None


def _wanted(facts: Facts) -> dict[str, Any]:
    wanted = {
        "base_model": facts.base,
        "base_model_relation": ("adapter" if facts.is_adapter else "finetune") if facts.base else None,
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": facts.pipeline,
        "license": facts.license,
        "tags": [*facts.tags, *([f"base_model:adapter:{facts.base}"] if facts.is_adapter else [])],
    }
    return {key: value for key, value in wanted.items() if value}


def _body(facts: Facts) -> str:
    """A description: what it is, and how it is used."""
    lines = ["", f"# {facts.name}", ""]
    if facts.rows:
        lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.rows.items()), ""]
    if facts.is_adapter:
        lines += [
            "```python", "from peft import AutoPeftModelForCausalLM", "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{facts.name}")', "```", "",
            "Merged into its base:", "", "```", f"adapterkit merge {facts.base} {facts.name} -o merged", "```", "",
        ]  # fmt: skip
    return "\n".join(lines)


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
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
    return value in local or (isinstance(value, list) and any(one in local for one in value))
