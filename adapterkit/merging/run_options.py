"""Options for running a plan. None of them changes the plan itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterkit.errors import UsageError

MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options for running a `MergePlan`.

    Args:
        threads: number of workers, 1 to 256; None for one per core, at most 8.
        device: auto, cpu, cuda or cuda:N; auto uses a GPU if that is faster.
        report: measure retention on every element instead of a sample.
        resume: reuse the files that an interrupted run of this plan finished.
        receipt: write the receipt that `unmerge` needs, if the plan can be undone.
        link: let unchanged files share the base's bytes (reflink or hard link).
        accept_loss: proceed even if quantization erases more than half of the update.

    Raises UsageError for an unknown device or an invalid number of threads.
    """

    threads: int | None = None
    device: str = "auto"
    report: bool = False
    resume: bool = False
    receipt: bool = True
    link: bool = False
    accept_loss: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(self.device))  # a torch.device too
        threads = self.threads
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
            raise UsageError(f"threads {threads!r}: expected a whole number from 1 to {MAX_THREADS}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UsageError(f"device {self.device!r}: expected auto, cpu, cuda or cuda:N")

    def check(self, *, quantized: bool, resumable: bool) -> None:
        """Raise UsageError for an option that does nothing: the output is not quantized, or the plan not resumable."""
        if self.accept_loss and not quantized:
            raise UsageError("only a quantized output can lose an update: `accept_loss` goes with `quantize`")
        if self.resume and not (resumable and self.receipt):
            raise UsageError("`resume` needs the hashes of a receipt and an unchanged plan", hint="omit `resume`")
