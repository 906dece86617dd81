r"""Names of tensors in checkpoints and in models, by model_type.

transformers 5 renames the tensors of some architectures when it loads them, and renames them back when it saves. An
adapter has the names in the model: those of transformers 5, or of transformers 4, which are mostly those on disk.

Source: transformers/conversion_mapping.py. tests/base/test_checkpoint_names.py compares both, model by model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from adapterkit.base import names_of_multimodal_models, names_of_text_models

# Each line is `on disk -> in the model`, applied in this order to the whole name of a tensor. A dot means a dot; the
# rest is a regular expression, which matches anywhere in the name, and at its end only whole words. Fused tensors get
# a name in FUSED of `architectures.py`, and stacked experts `experts.gate_up_proj` and `experts.down_proj`; `permuted_`
# before that means that rows are stored in another order.
RENAMED = names_of_text_models.RENAMED | names_of_multimodal_models.RENAMED

# The part of a model that a nested config describes, by its names in the model.
SCOPES = {
    "text_config": r"(model\.)?(language_model|text_model)\.",
    "vision_config": r"(model\.)?(vision_tower|vision_model|visual)\.",
    "encoder": r"encoder\.",
}

EXPERT = re.compile(r"\.experts\.\d+\.")


def names_in_model(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Return the function from a tensor's name on disk to its name in the model that `config` describes.

    It returns names that it does not know unchanged, as it does all names of unknown architectures.
    """
    parts = {"": config, **{SCOPES[key]: part for key, part in config.items() if key in SCOPES}}
    scopes = [
        (scope, _rules(str(part.get("model_type")))) for scope, part in parts.items() if isinstance(part, Mapping)
    ]
    used = [(re.compile(scope), rules) for scope, rules in scopes if rules]

    @lru_cache(1 << 14)
    def rename(name: str) -> str:
        for scope, rules in used:
            if inside := scope.match(name):
                name = name[: inside.end()] + _apply(rules, name[inside.end() :])
        return name

    def rename_as_first(name: str) -> str:
        """Rename tensors of any expert as those of the first, since a model has tens of thousands."""
        if (expert := EXPERT.search(name)) is None:
            return rename(name)
        return rename(EXPERT.sub(".experts.0.", name, count=1)).replace(".experts.0.", expert[0], 1)

    return rename_as_first if used else str


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], name: str) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name, count=1)
    return name


@lru_cache(256)
def _rules(model: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return the compiled lines of RENAMED for a model_type."""
    found = next((lines for models, lines in RENAMED.items() if model in models.split()), "")
    pairs = (line.split("->") for line in found.strip().splitlines())
    return tuple((_compiled(on_disk.strip()), in_model.strip()) for on_disk, in_model in pairs)


def _compiled(pattern: str) -> re.Pattern[str]:
    literal = re.sub(r"\.(?![+*])", r"\\.", pattern)
    return re.compile(literal + (r"(?!\w)" if pattern[-1].isalnum() else ""))
