"""Whether a call shows how far it is."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from adapterkit.options import Options, option


@dataclass(frozen=True)
class ProgressOptions(Options):
    """Whether a call shows how far it is"""

    _: KW_ONLY
    progress: bool = option(False, "Draw a progress bar, in a notebook or on stderr", in_form=False, in_cli=False)
