"""Operating system calls that not every platform has, each with a fallback.

Linux has them all. macOS has its own calls for some and does without the others; the tests cover that by removing
names. Windows is not supported: the package imports and shows its help, the rest is untested. No other module checks
for the platform. Imports at the top are few, because this loads before ctrl-C is handled.
"""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap
    from typing import Any

    Name = str | os.PathLike[str]

MACOS = sys.platform == "darwin"

# Flags for os.open, whose descriptors are never inherited by child processes (PEP 446).
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
WRITE_FLAGS = os.O_RDWR | getattr(os, "O_BINARY", 0)
NEW_FLAGS = WRITE_FLAGS | os.O_CREAT | os.O_EXCL
FOLDER_FLAGS = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY)  # without O_PATH it must be readable
HAS_DIR_FD = os.open in os.supports_dir_fd

END_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
HAS_TIMER = hasattr(signal, "setitimer")
CPU_TIME_EXCEEDED = -getattr(signal, "SIGXCPU", 0)  # the exit code of a process that exceeded its limit
LIMITS_MEMORY = os.path.exists("/proc/self/statm")  # macOS accepts a limit on the address space but may not enforce it

# Errors of kernels, file systems and sandboxes for a call that they don't support. On macOS ENOTSUP isn't EOPNOTSUPP.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

FICLONE = 0x40049409  # Linux, ioctl_ficlone(2)
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # Linux, renameat2(2)
MACOS_AT_FDCWD, RENAME_SWAP, RENAME_EXCL = -2, 2, 4  # macOS, fclonefileat(2) and renamex_np(2)
F_PREALLOCATE, F_NOCACHE, F_FULLFSYNC = 42, 48, 51  # macOS, fcntl(2)
F_ALLOCATEALL, F_PEOFPOSMODE = 4, 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


# --- files -----------------------------------------------------------------------------------------------------------


def read_at(fd: int, into: memoryview, at: int) -> int:
    """Read into `into` from offset `at`; returns the number of bytes read. Threads may share `fd`."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], at)
    if hasattr(os, "pread"):
        data = os.pread(fd, len(into), at)
    else:
        with _seek_lock:
            os.lseek(fd, at, os.SEEK_SET)
            data = os.read(fd, len(into))
    into[: len(data)] = data
    return len(data)


def write_at(fd: int, data: memoryview | bytes, at: int) -> None:
    """Write all of `data` at offset `at`. Threads may share `fd`."""
    left = memoryview(data)
    while left:
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, left, at)
        else:
            with _seek_lock:
                os.lseek(fd, at, os.SEEK_SET)
                done = os.write(fd, left)
        left, at = left[done:], at + done


_seek_lock = _thread.allocate_lock()  # importing threading would take longer than the rest of this module


def flush(fd: int) -> None:
    """Flush an open file to the disk. On macOS fsync leaves it in the drive's cache; F_FULLFSYNC doesn't."""
    if MACOS and fcntl is not None:
        try:
            fcntl.fcntl(fd, F_FULLFSYNC)
            return
        except OSError as error:  # for example on a network share
            if error.errno not in (*UNSUPPORTED, errno.ENOTTY):
                raise
    os.fsync(fd)


def flush_path(path: Name) -> None:
    """Flush a file, or the names in a folder, to the disk; Windows can't open folders and flushes names itself."""
    if not HAS_DIR_FD and os.path.isdir(path):
        return
    fd = os.open(path, os.O_RDONLY if HAS_DIR_FD else WRITE_FLAGS)
    try:
        flush(fd)
    finally:
        os.close(fd)


def reserve(fd: int, size: int) -> None:
    """Extend a new file to `size` bytes and reserve the disk space. Raises OSError if there is too little.

    Where the file system can't reserve space the file is sparse, and a full disk fails later, on a write.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
            return
        if MACOS and fcntl is not None:
            from struct import pack

            fcntl.fcntl(fd, F_PREALLOCATE, pack("@Iiqqq", F_ALLOCATEALL, F_PEOFPOSMODE, 0, size, 0))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    os.ftruncate(fd, size)


def open_direct(path: Name) -> int:
    """Open a file for direct I/O; returns -1 where that isn't supported, which only costs speed.

    O_DIRECT on Linux needs whole, aligned blocks; F_NOCACHE on macOS takes any.
    """
    flags = os.O_WRONLY | getattr(os, "O_DIRECT", 0)
    if flags == os.O_WRONLY and not (MACOS and fcntl is not None):
        return -1
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not supported by the file system
            raise
        return -1
    if flags == os.O_WRONLY:
        try:
            fcntl.fcntl(fd, F_NOCACHE, 1)
        except OSError:
            os.close(fd)
            return -1
    return fd


def start_writeback(fd: int, count: int, at: int) -> None:
    """Start writing these bytes from the page cache to the disk, by advising the kernel to drop them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)


def clone(source: int, target: Name) -> bool:
    """Make `target` a reflink of the open file `source`; returns False, and makes no file, if unsupported."""
    if MACOS:
        call = getattr(_libc(), "fclonefileat", None)
        return call is not None and call(source, MACOS_AT_FDCWD, os.fsencode(target), 0) == 0
    if fcntl is None:
        return False
    fd = os.open(target, NEW_FLAGS, 0o666)
    try:
        fcntl.ioctl(fd, FICLONE, source)
    except OSError:
        os.unlink(target)
        return False
    finally:
        os.close(fd)
    return True


def lock(fd: int, wait: bool = True) -> None:
    """Lock an open file until it is closed or the process ends. Without `wait`, raises BlockingIOError if it is locked.

    Raises OSError with an errno in NO_LOCKS where locks aren't supported, as on some file systems.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


# --- names -----------------------------------------------------------------------------------------------------------


def exchange(one: Name, other: Name) -> bool:
    """Swap two names atomically; returns False, and does nothing, if unsupported. Raises OSError."""
    return _rename(one, other, RENAME_EXCHANGE, RENAME_SWAP)


def rename_new(source: Name, target: Name) -> None:
    """Rename `source` to `target`; raises FileExistsError if `target` exists."""
    if _rename(source, target, RENAME_NOREPLACE, RENAME_EXCL):
        return
    if os.path.lexists(target):  # this check races with the rename, for lack of an atomic call
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def _rename(source: Name, target: Name, flag: int, macos_flag: int) -> bool:
    """Rename by renameat2 or renamex_np; returns False, and does nothing, if neither is supported."""
    import ctypes

    libc, old, new = _libc(), os.fsencode(source), os.fsencode(target)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, ctypes.c_uint(flag))
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(old, new, ctypes.c_uint(macos_flag))
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def make_folder(path: Name, mode: int) -> None:
    """Make a folder with this mode; on macOS mkdir drops the sticky bit, so chmod sets it."""
    os.mkdir(path, mode)
    if MACOS:
        os.chmod(path, mode)


def user_id() -> int:
    """Return the user id that owns new files; 0 where files have no owner."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _libc() -> Any:
    """Return the C library, or None where it can't be loaded."""
    import ctypes

    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None


# --- memory, processors, processes -----------------------------------------------------------------------------------


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, or of all CPUs where the affinity is unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the CPU."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = (line.partition(":")[2].strip() for line in stream if line.startswith("model name"))
            return next(names, "") or platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def page_aligned_memory(size: int) -> mmap:
    """Return zeroed memory that starts on a page boundary."""
    import mmap

    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def peak_memory() -> int:
    """Return the peak memory use of this process, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MACOS else 1024)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: returning it and faulting it in again takes a tenth of every training step."""
    if mallopt := getattr(_libc(), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group of `pid`, or to the process alone where there are no groups."""
    (os.killpg if hasattr(os, "killpg") else os.kill)(pid, number)
