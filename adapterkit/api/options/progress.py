"""The option to draw a progress bar."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from adapterkit.options import Options, option


@dataclass(frozen=True)
class ProgressOptions(Options):
    """Whether a call draws a progress bar"""

    _: KW_ONLY
    progress: bool = option(False, "Draw a progress bar, in a notebook or on stderr", in_form=False, in_cli=False)
