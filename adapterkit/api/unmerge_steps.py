"""Undo several merges in sequence: the plan, and its run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.files.staging import Destination, staged
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.receipts.receipt import Receipt, find_receipt, read_receipt
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run.run import TensorMerged, run
from adapterkit.merging.run_options import RunOptions
from adapterkit.merging.unmerge import plan_undo
from adapterkit.reprs import Displayed
from adapterkit.text import counted


@dataclass(frozen=True, repr=False)
class UnmergePlan(Displayed):
    """Merges to undo in sequence, the last one first; `first` is the plan of that step.

    Each further step is planned on the output of the one before, with its receipt and adapters.
    """

    unit: ClassVar[str] = "tensors"
    first: MergePlan
    receipts: tuple[Receipt, ...]
    adapters: tuple[tuple[Adapter, ...], ...]  # of each receipt

    @property
    def out(self) -> Path:
        return self.first.out

    @property
    def destination(self) -> Destination:
        """The destination of the restored base."""
        return replace(self.first.destination(receipt=False), beside=True)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()  # each step has its own

    def facts(self) -> dict[str, Any]:
        """The plan as JSON data: the first step, and the adapters of each step."""
        return self.first.facts() | {"steps": [[one.name for one in receipt.adapters] for receipt in self.receipts]}

    def brief(self) -> str:
        return f"{self.first.base.name} → {self.out}, {counted(len(self.receipts), 'merge')} to undo"

    def lines(self) -> list[str]:
        """The plan as text."""
        steps = [" and ".join(one.name for one in receipt.adapters) for receipt in self.receipts]
        return [
            f"undo      {counted(len(steps), 'merge')}, in this order:",
            *(f"  {number}.      {step}" for number, step in enumerate(steps, 1)),
            self.first.lines()[-1],
        ]


@dataclass(frozen=True, slots=True)
class StepStarted:
    """The plan of the `number`-th of `total` merges, about to be undone."""

    plan: MergePlan
    number: int
    total: int


def run_steps(plan: UnmergePlan, options: RunOptions) -> Generator[StepStarted | TensorMerged | Merged, None, None]:
    """Undo every merge of `plan`; yields a `StepStarted` and the events of each step, the result last."""
    steps = len(plan.receipts)
    with staged(plan.destination) as last:
        between = [last.with_name(f"before-{number}") for number in range(1, steps)]
        step = replace(plan.first, out=(*between, last)[0])
        for number, out in enumerate((*between, last), 1):
            if number > 1:
                checkpoint = open_checkpoint(step.out)
                receipt = read_receipt(find_receipt(checkpoint.path) or checkpoint.path)
                step = plan_undo(checkpoint, receipt, plan.adapters[number - 1], out)
            yield StepStarted(step, number, steps)
            with closing(run(step, options)) as events:
                for event in events:
                    if isinstance(event, Merged):
                        result = event
                    else:
                        yield event
    yield replace(result, out=plan.out)
