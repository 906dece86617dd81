"""Hold the device of a run, and fall back to smaller chunks or the CPU if a GPU runs out of memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.merging.blocks.device import ComputeDevice


class Place:
    """The current device, and `notes` on falling back from the requested one."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._device: ComputeDevice | None = None  # unknown until torch is imported
        self._lock = threading.Lock()

    @property
    def device(self) -> ComputeDevice:
        assert self._device is not None
        return self._device

    @device.setter
    def device(self, device: ComputeDevice) -> None:
        self._device = device

    def fall_back(self, device: ComputeDevice, error: RuntimeError) -> None:
        """Fall back to smaller chunks or the CPU if `device` ran out of memory; else raise `error` again."""
        from adapterkit.merging.blocks.device import CPU, out_of_memory

        if device == CPU or not out_of_memory(error):
            raise error
        with self._lock:
            if self._device == device:  # no other worker was first
                self._device = device.smaller()
                self.notes.append(f"{device.device} ran out of memory: continued on {self._device}")

    def __str__(self) -> str:
        return str(self._device)
