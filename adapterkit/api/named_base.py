"""Find the base that adapters name in their configs, for a merge that is given none."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack

from adapterkit.adapter.formats.format import ConfigFacts
from adapterkit.adapter.formats.table import describe_config
from adapterkit.adapter.weights import Adapter
from adapterkit.api.inputs import AnyAdapter
from adapterkit.base.checkpoint import is_base
from adapterkit.errors import MissingFileError, UsageError
from adapterkit.hub.locate import locate
from adapterkit.hub.names import as_hub_id, hub_repo

log = logging.getLogger(__name__)
HINT = "give the base before the adapters"


def named_base(adapters: Sequence[AnyAdapter]) -> str:
    """Return the base that all `adapters` name, a path or a Hub id, and log it.

    Raises UsageError if an adapter names none, or two name different ones; MissingFileError if the path does not exist.
    """
    if not adapters:
        raise UsageError("no adapter given: nothing to merge")
    with ExitStack() as headers:
        found = dict(_base_of(adapter, headers) for adapter in adapters)
    if len(found) > 1:
        named = ", ".join(f"{base} ({adapter})" for base, adapter in found.items())
        raise UsageError(f"the adapters name different bases: {named}", hint=HINT)
    [(base, adapter)] = found.items()
    try:
        here = as_hub_id(base) is not None or os.path.exists(os.path.expanduser(base))
    except MissingFileError:
        here = False
    if not here:
        raise MissingFileError(f"{adapter}: names the base {base}, which does not exist here", hint=HINT)
    log.warning("base: %s, named by %s", base, adapter)
    return base


def _base_of(adapter: AnyAdapter, headers: ExitStack) -> tuple[str, str]:
    """Return the base that an adapter names, with its revision on the Hub, and the adapter's name."""
    if isinstance(adapter, Adapter):
        facts = describe_config(adapter.files[0].parent) if adapter.files else ConfigFacts()
        base, name = adapter.base_model, "the adapter"
    else:
        path, name = locate(adapter, headers).path, str(adapter)
        if is_base(path):
            raise UsageError(f"{name}: is a model, expected an adapter", hint="give an adapter after it")
        facts = describe_config(path if path.is_dir() else path.parent)
        base = facts.base_model
    if not base:
        raise UsageError(f"{name}: names no base model", hint=HINT)
    pinned = facts.base_revision is not None and facts.base_model == base and hub_repo(base) == base
    return f"{base}@{facts.base_revision}" if pinned else base, name
