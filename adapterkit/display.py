"""How a result shows itself: one line as part of something else, a few where it is printed, the same in a notebook."""

from __future__ import annotations

import html

from adapterkit.text import visible

# Lines that are too long for the page are broken; a $ is no formula, and < no tag.
PRE = '<pre class="tex2jax_ignore mathjax_ignore" style="white-space: pre-wrap">{}</pre>'


class Displayed:
    """The base of results: `repr` is one line, `str` a few lines, and a notebook shows those. Nothing is read for it.

    What strangers' files hold ends no line, steers no terminal, and is no HTML.
    """

    __slots__ = ()

    def brief(self) -> str:
        """What it is, in a few words."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """What a person should know of it."""
        return [self.brief()]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {visible(self.brief())}>"

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))

    def _repr_html_(self) -> str:
        return PRE.format(html.escape(str(self)))
