"""The fingerprint of a base in its adapters: hashes of a few rows of its weights.

It is kept as JSON in the metadata of the safetensors file, which PEFT ignores. `base/fingerprint.py` computes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from adapterkit.adapter.weights import Problem

KEY = "base_fingerprint"  # in the metadata
MAX_BYTES = 64 << 10
HASH = re.compile(r"[0-9a-f]{16}")

Fingerprint: TypeAlias = Mapping[str, tuple[str, str]]  # tensor -> dtype or scheme, hash of a row


def encoded(fingerprint: Fingerprint) -> dict[str, str]:
    """Return the metadata that keeps `fingerprint`."""
    return {KEY: json.dumps(fingerprint, separators=(",", ":"))} if fingerprint else {}


def decoded(metadata: Mapping[str, str], file: str) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
    """Return the fingerprint in `metadata`, and the problem if it cannot be read."""
    text = metadata.get(KEY)
    if text is None:
        return {}, []
    try:
        found = {name: (str(kind), hashed) for name, (kind, hashed) in json.loads(text[:MAX_BYTES]).items()}
        if all(isinstance(hashed, str) and HASH.fullmatch(hashed) for _, hashed in found.values()):
            return found, []
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return {}, [Problem(f"{file}: {KEY}", "is not a fingerprint of a base; ignored", fatal=False)]


def agreed(fingerprints: Iterable[Fingerprint]) -> dict[str, tuple[str, str]] | None:
    """Return what all fingerprints say, leaving out missing ones; None if two contradict each other."""
    merged: dict[str, tuple[str, str]] = {}
    for fingerprint in fingerprints:
        for name, row in fingerprint.items():
            if merged.setdefault(name, row) != row:
                return None
    return merged
