"""Where the blocks of a run are computed: one device for all workers, with less memory where a GPU has too little."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.merging.blocks.device import ComputeDevice


class Place:
    """The device of the moment, and `notes` on why it is another than was asked for."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._device: ComputeDevice | None = None  # not known before torch is there
        self._lock = threading.Lock()

    @property
    def device(self) -> ComputeDevice:
        assert self._device is not None
        return self._device

    @device.setter
    def device(self, device: ComputeDevice) -> None:
        self._device = device

    def retreat(self, device: ComputeDevice, error: RuntimeError) -> None:
        """Go on with less memory where the GPU `device` had too little for `error`, which otherwise is raised again."""
        from adapterkit.merging.blocks.device import CPU, out_of_memory

        if device == CPU or not out_of_memory(error):
            raise error
        with self._lock:
            if self._device == device:  # else another worker has done it
                self._device = device.smaller()
                self.notes.append(f"{device.device} has too little memory free: went on with {self._device}")

    def __str__(self) -> str:
        return str(self._device)
