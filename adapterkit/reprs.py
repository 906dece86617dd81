"""Show results in one line (`repr`), in a few lines (`print`), or in a notebook."""

from __future__ import annotations

import html

from adapterkit.text import visible

# Wraps long lines, and disables formulas ($).
PRE = '<pre class="tex2jax_ignore mathjax_ignore" style="white-space: pre-wrap">{}</pre>'


class Displayed:
    """The base class of results: `repr` is one line, `str` a few lines, which notebooks show too. Reads no weights.

    Untrusted text is escaped, for terminals and for HTML.
    """

    __slots__ = ()

    def brief(self) -> str:
        """A description in a few words."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The lines to print."""
        return [self.brief()]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {visible(self.brief())}>"

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))

    def _repr_html_(self) -> str:
        return PRE.format(html.escape(str(self)))
