"""Options of train and evaluate, apart from the recipe's."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from adapterkit.api.options.progress import ProgressOptions
from adapterkit.options import Options, option, output, overwrite
from adapterkit.train.evaluate_options import EvaluateOptions

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyPath


@dataclass(frozen=True)
class TrainRunOptions(Options):
    """A run of a recipe"""

    _: KW_ONLY
    recipe: AnyPath | None = option(
        None, "Read options from this YAML file; options given here override it", label="recipe (YAML)", asked=True
    )
    out: AnyPath | None = output(None, asked=True)
    resume: bool = option(False, "Continue an interrupted run", label="continue a run")
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class EvaluateCall(ProgressOptions, EvaluateOptions):
    """An evaluation, with a bar"""
