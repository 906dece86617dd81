"""What this machine has left, and who the Hub takes its user for."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapterkit.errors import AdapterkitError, NotAllowedError, OfflineError
from adapterkit.hub.client.ask import user


def machine() -> str:
    """The free disk here, and the memory of the GPU where there is one."""
    disk = f"disk {shutil.disk_usage(Path.cwd()).free / 1e9:.0f}G"
    try:
        import pynvml  # of nvidia-ml-py, where it is installed
    except ImportError:
        return disk
    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return disk
    return f"{disk}   GPU {memory.used / 1e9:.0f}/{memory.total / 1e9:.0f}G"


def who() -> tuple[str, str]:
    """`online @me` or what else is the case, and what a banner says of it."""
    try:
        name = user()
        return (f"online @{name}" if name else "online, no token"), ""
    except NotAllowedError as error:
        return "token refused", str(error)
    except OfflineError as error:
        return "offline", f"Offline: folders and the Hub cache are here still. ({error})"
    except AdapterkitError as error:
        return "Hub: ?", str(error)
