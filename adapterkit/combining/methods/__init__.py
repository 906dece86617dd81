"""The names of the ways to combine adapters, and what each takes; what they do is in `factored` and `elementwise`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Options = Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class Method:
    """A method in a line of help, with its options and their defaults.

    Where no limit is asked for, `truncated` means the greatest rank among the adapters, else every rank is kept.
    """

    help: str
    options: Options = field(default_factory=dict)
    truncated: bool = False
    chance: bool = False  # what it keeps depends on a seed
    biases: bool = False  # it has a rule for trained biases: it is linear in the adapters


DENSITY: Options = {"density": 0.5}
INNER: Options = {"inner": "ties", "density": 0.5}
INNERS = ("ties", "linear")

METHODS = {
    "linear": Method("the weighted sum of the updates, exactly", biases=True),
    "svd": Method("the same, truncated to the greatest rank among the adapters", truncated=True, biases=True),
    "cat": Method("the same, never truncated", biases=True),
    "ties": Method("trim to the greatest elements, elect signs, average (arXiv 2306.01708)", DENSITY, True),
    "dare_linear": Method("drop elements by chance, rescale, add up (arXiv 2311.03099)", DENSITY, True, True),
    "dare_ties": Method("drop by chance, elect signs, average", DENSITY, True, True),
    "magnitude_prune": Method("trim to the greatest elements, add up", DENSITY, True),
    "knots": Method("merge in the updates' common basis (arXiv 2410.19735)", INNER),
    "core": Method("merge in the factors' common bases (arXiv 2509.17786)", INNER),
    "tsv": Method("make the tasks' singular vectors orthogonal (arXiv 2412.00081)"),
    "iso": Method("make all singular values of the sum equal (arXiv 2502.04959)"),
    "peft_linear": Method("add up A's and B's apart, as PEFT's linear does: with cross terms"),
}
