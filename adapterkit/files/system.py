"""What operating systems do not all have: one name for each, and what comes nearest where it is missing.

Linux has all of it. macOS has other calls for some, and does without the rest; that is tested by taking names away.
Windows is not supported: the package imports there and shows its help, and everything beyond is untested.
Only this module asks which system it runs on, and only light modules are imported at its top.
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

# Flags of os.open, which never hands a descriptor to a child process (PEP 446).
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
WRITE = os.O_RDWR | getattr(os, "O_BINARY", 0)
NEW = WRITE | os.O_CREAT | os.O_EXCL
FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY)  # without O_PATH it must be readable, too
HAS_DIR_FD = os.open in os.supports_dir_fd

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
HAS_TIMER = hasattr(signal, "setitimer")
OUT_OF_TIME = -getattr(signal, "SIGXCPU", 0)  # what a process ends with that took more processor time than it may
LIMITS_MEMORY = os.path.exists("/proc/self/statm")  # macOS takes a limit on the address space, and may not keep it

# What kernels, file systems and sandboxes say of a call that they do not have. ENOTSUP is a number of its own on macOS.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

FICLONE = 0x40049409  # Linux's ioctl that makes a file share another's blocks
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # of renameat2(2)
MACOS_AT_FDCWD, RENAME_SWAP, RENAME_EXCL = -2, 2, 4  # of macOS's fclonefileat(2) and renamex_np(2)
F_PREALLOCATE, F_NOCACHE, F_FULLFSYNC = 42, 48, 51  # of macOS's fcntl(2)
F_ALLOCATEALL, F_PEOFPOSMODE = 4, 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


# --- files -----------------------------------------------------------------------------------------------------------


def read_at(fd: int, into: memoryview, at: int) -> int:
    """Read from `at` on, at most as much as `into` holds; returns how much came. Threads may share `fd`."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], at)
    if hasattr(os, "pread"):
        data = os.pread(fd, len(into), at)
    else:
        with _seeking:
            os.lseek(fd, at, os.SEEK_SET)
            data = os.read(fd, len(into))
    into[: len(data)] = data
    return len(data)


def write_at(fd: int, data: memoryview | bytes, at: int) -> None:
    """Write all of `data` at `at`. Threads may share `fd`."""
    left = memoryview(data)
    while left:
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, left, at)
        else:
            with _seeking:
                os.lseek(fd, at, os.SEEK_SET)
                done = os.write(fd, left)
        left, at = left[done:], at + done


_seeking = _thread.allocate_lock()  # threading would take longer to import than all the rest here


def flush(fd: int) -> None:
    """Wait until the disk has an open file. macOS's fsync leaves it in the drive's cache; F_FULLFSYNC does not."""
    if MACOS and fcntl is not None:
        try:
            fcntl.fcntl(fd, F_FULLFSYNC)
            return
        except OSError as error:  # on a network share, say
            if error.errno not in (*UNSUPPORTED, errno.ENOTTY):
                raise
    os.fsync(fd)


def flush_path(path: Name) -> None:
    """Wait until the disk has a file, or the names in a folder; Windows opens no folder, and keeps names by itself."""
    if not HAS_DIR_FD and os.path.isdir(path):
        return
    fd = os.open(path, os.O_RDONLY if HAS_DIR_FD else WRITE)
    try:
        flush(fd)
    finally:
        os.close(fd)


def reserve(fd: int, size: int) -> None:
    """Make a new file `size` bytes long, and take the room on the disk. Raises OSError where there is too little.

    A file system that cannot reserve gives a sparse file; a full disk then shows itself while it is written.
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
    """Open a file to be written past the page cache; -1 where that cannot be, which costs speed alone.

    Linux's O_DIRECT wants whole blocks, aligned; macOS's F_NOCACHE takes anything.
    """
    flags = os.O_WRONLY | getattr(os, "O_DIRECT", 0)
    if flags == os.O_WRONLY and not (MACOS and fcntl is not None):
        return -1
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that have no such thing
            raise
        return -1
    if flags == os.O_WRONLY:
        try:
            fcntl.fcntl(fd, F_NOCACHE, 1)
        except OSError:
            os.close(fd)
            return -1
    return fd


def start_disk(fd: int, count: int, at: int) -> None:
    """Say that the page cache need not keep these bytes, which makes the disk start on them; speed alone is lost."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)


def clone(source: int, target: Name) -> bool:
    """Make `target` share the blocks of the open file `source`; False, and no file, where the system cannot."""
    if MACOS:
        call = getattr(_libc(), "fclonefileat", None)
        return call is not None and call(source, MACOS_AT_FDCWD, os.fsencode(target), 0) == 0
    if fcntl is None:
        return False
    fd = os.open(target, NEW, 0o666)
    try:
        fcntl.ioctl(fd, FICLONE, source)
    except OSError:
        os.unlink(target)
        return False
    finally:
        os.close(fd)
    return True


def lock(fd: int, wait: bool = True) -> None:
    """Take the lock of an open file, which its process gives back with its end. Raises BlockingIOError without `wait`.

    Raises OSError with one of NO_LOCKS where there are none, as on some file systems.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


# --- names -----------------------------------------------------------------------------------------------------------


def exchange(one: Name, other: Name) -> bool:
    """Swap two names in one step; False where kernel or file system cannot, and nothing was done. Raises OSError."""
    return _rename(one, other, RENAME_EXCHANGE, RENAME_SWAP)


def rename_new(source: Name, target: Name) -> None:
    """Rename where nothing is called `target`; raises FileExistsError where something is."""
    if _rename(source, target, RENAME_NOREPLACE, RENAME_EXCL):
        return
    if os.path.lexists(target):  # a moment between this and the rename is left
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def _rename(source: Name, target: Name, flag: int, macos_flag: int) -> bool:
    """Rename by renameat2 or renamex_np; False where neither can, and nothing was done."""
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
    """Make a folder of that mode; macOS's mkdir drops the sticky bit, which then comes in a second step."""
    os.mkdir(path, mode)
    if MACOS:
        os.chmod(path, mode)


def user() -> int:
    """The number that new files have as their owner; 0 where files have none."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _libc() -> Any:
    """The C library, with whatever calls it has; None where it has no one name."""
    import ctypes

    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None


# --- memory, processors, processes -----------------------------------------------------------------------------------


def usable_cpus() -> int:
    """How many processors this process may use, or where the system does not say, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the processor."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = (line.partition(":")[2].strip() for line in stream if line.startswith("model name"))
            return next(names, "") or platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def private_memory(size: int) -> mmap:
    """Zeroed memory that starts on a page."""
    import mmap

    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def peak_memory() -> int:
    """The most bytes that this process has held."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MACOS else 1024)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: to give it back, and fault it in again, takes a tenth of every training step."""
    if mallopt := getattr(_libc(), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process and those that it started; to it alone where there are no groups."""
    (os.killpg if hasattr(os, "killpg") else os.kill)(pid, number)
