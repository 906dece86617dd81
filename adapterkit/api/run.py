"""Run any plan: an event for each tensor or module as it is done, the result last.

>>> plan = adapterkit.plan_merge("base", ["adapter"], "out")
>>> for event in adapterkit.run(plan): ...  # TensorMerged …, then Merged
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from adapterkit.api.options.progress import ProgressOptions
from adapterkit.api.progress import downloads_shown, progress_bar
from adapterkit.api.unmerge_steps import StepStarted, UnmergePlan, run_steps
from adapterkit.combining.plan import AdapterMade, AdapterPlan, ModuleDone
from adapterkit.combining.write import make_adapter
from adapterkit.errors import UsageError
from adapterkit.hub.events import BytesDone, Fetched, Pulled, Pushed
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run.run import TensorMerged, check_options
from adapterkit.merging.run.run import run as run_merge
from adapterkit.merging.run_options import RunOptions

if TYPE_CHECKING:
    import torch

    from adapterkit.hub.pull import PullPlan
    from adapterkit.hub.upload.push import PushPlan

HubPlan: TypeAlias = "PullPlan | PushPlan"
Plan: TypeAlias = "MergePlan | UnmergePlan | AdapterPlan | HubPlan"
HubEvent: TypeAlias = BytesDone | Fetched | Pulled | Pushed
Event: TypeAlias = StepStarted | TensorMerged | Merged | ModuleDone | AdapterMade | HubEvent
T = TypeVar("T", bound=ProgressOptions)
R = TypeVar("R", Merged, AdapterMade, Pulled, Pushed)


@overload
def run(plan: HubPlan, *, progress: bool = False) -> Generator[HubEvent, None, None]: ...
@overload
def run(plan: AdapterPlan, *, progress: bool = False) -> Generator[ModuleDone | AdapterMade, None, None]: ...
@overload
def run(
    plan: UnmergePlan, *, progress: bool = False, threads: int | None = None, device: str | torch.device = "auto"
) -> Generator[StepStarted | TensorMerged | Merged, None, None]: ...
@overload
def run(
    plan: MergePlan,
    *,
    progress: bool = False,
    threads: int | None = None,
    report: bool = False,
    device: str | torch.device = "auto",
    resume: bool = False,
    receipt: bool = True,
    link: bool = False,
    accept_loss: bool = False,
) -> Generator[TensorMerged | Merged, None, None]: ...
@overload
def run(plan: Plan, *, progress: bool = False, **how: Any) -> Generator[Event, None, None]: ...
def run(plan: Plan, *, progress: bool = False, **how: Any) -> Generator[Event, None, None]:
    """Run `plan` as a stream of events; on failure nothing is left behind.

    Args:
        plan: What a function named plan_… returned.
        progress: Draw a progress bar beside the events, in a notebook or on stderr.
        how: For plans of merges, the fields of `RunOptions`: threads, device, report, resume, receipt, link,
            accept_loss. For plans of unmerging, threads and device.

    Yields:
        An event per tensor, module or file, then the result.

    Raises:
        UsageError: An option doesn't fit the plan, or there is no such device.
        ChangedError: An input has changed since the plan was made.
        FitError: Factors are not finite, or results exceed their dtype.
        LossError: Quantizing would erase the update.
        NoSpaceError: The disk is too small.
        OutputExistsError: The output has come to exist.
    """
    events = _events(plan, how)
    return _with_bar(events, plan) if progress else events


def in_one_call(plan: Callable[[T], Plan], options: T, made: type[R], how: RunOptions | None = None) -> R:
    """Make the plan for `options` and run it to its end; `made` is the type of the result."""
    with downloads_shown(options.progress):
        planned = plan(options)
    *_, result = run(planned, progress=options.progress, **(asdict(how) if how else {}))
    assert isinstance(result, made)
    return result


def _events(plan: Plan, how: dict[str, Any]) -> Generator[Event, None, None]:
    if isinstance(plan, MergePlan | UnmergePlan):
        options = RunOptions(**how)
        check_options(plan if isinstance(plan, MergePlan) else plan.first, options)
        return run_merge(plan, options) if isinstance(plan, MergePlan) else run_steps(plan, options)
    if how:
        raise UsageError(f"unexpected option `{next(iter(how))}`: only merges take it")
    return make_adapter(plan) if isinstance(plan, AdapterPlan) else plan.steps()


def _with_bar(events: Generator[Event, None, None], plan: Plan) -> Generator[Event, None, None]:
    """Yield the events, and draw a bar."""
    what = plan.out.name if isinstance(plan, MergePlan | UnmergePlan | AdapterPlan) else ""
    with progress_bar(what, plan.unit) as show, closing(events):
        for event in events:
            if isinstance(event, StepStarted):
                show(0, event.plan.edits, f"{what}, merge {event.number} of {event.total}")
            elif isinstance(event, TensorMerged | ModuleDone):
                show(event.done, event.total)
            elif isinstance(event, BytesDone):
                show(event.done, event.total, event.what)
            yield event
