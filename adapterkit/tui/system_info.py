"""The status line: free resources of this machine, and the Hub user."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapterkit.errors import AdapterkitError, NotAllowedError, OfflineError
from adapterkit.hub.client.call import user


def machine() -> str:
    """The free disk space, and the memory of the GPU if there is one."""
    disk = f"disk {shutil.disk_usage(Path.cwd()).free / 1e9:.0f}G"
    try:
        import pynvml  # from nvidia-ml-py, if installed
    except ImportError:
        return disk
    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return disk
    return f"{disk}   GPU {memory.used / 1e9:.0f}/{memory.total / 1e9:.0f}G"


def who() -> tuple[str, str]:
    """The Hub status, such as `online @me`, and the text of the banner."""
    try:
        name = user()
        return (f"online @{name}" if name else "online, no token"), ""
    except NotAllowedError as error:
        return "token refused", str(error)
    except OfflineError as error:
        reason = str(error).removeprefix("the Hub: ")
        return "offline", f"Offline: showing local folders and cache; {reason}"
    except AdapterkitError as error:
        return "Hub: ?", str(error)
