"""Exceptions and their exit codes.

    AdapterkitError          1   the base class; catch this one
    ├── UsageError           2   invalid arguments; also a ValueError
    │   └── UnknownStrengthError 2   neither an adapter's files nor the call define its alpha
    ├── FormatError          1   a file is corrupt or unsupported
    │   ├── MissingFileError 1   no such file, directory or repository; also a FileNotFoundError
    │   ├── UnreadableError  1   no permission to read a file; also a PermissionError
    │   └── UnsafeFileError  1   a file that would run code, or reach outside its folder
    ├── ChangedError         1   an input changed while it was being read
    ├── LossError            1   quantizing would erase the update
    ├── MissingPackageError  1   a package is not installed; also an ImportError
    ├── FitError             3   adapter and base don't match
    ├── NotAllowedError      4   the Hub requires a login or a permission; also a PermissionError
    ├── OfflineError         5   the Hub is unreachable; also a ConnectionError
    ├── NoSpaceError         6   the disk is full
    └── OutputExistsError    7   the output already exists; also a FileExistsError

Every message says where, what was found and what was expected; its hint says what to do next. Ctrl-C exits with 130.
"""

from adapterkit.text import visible


class AdapterkitError(Exception):
    """The base class of all adapterkit errors; each argument is a line of the message.

    `hint` says what to do next. Both write parameters as in Python, in backticks: `overwrite=True`, `rank`; the command
    line replaces them by its options.
    """

    exit_code = 1

    def __init__(self, *lines: object, hint: str = "") -> None:
        super().__init__(*lines)
        self.args = lines  # OSError would interpret two of them as errno and strerror
        self.hint = hint

    @property
    def lines(self) -> list[str]:
        """The lines of the message, with control characters from untrusted files escaped."""
        return [visible(str(line)) for line in self.args]

    def __str__(self) -> str:
        """Return the message, followed by the hint."""
        between = "; " if len(self.args) == 1 else "\n"
        return between.join(filter(None, ["\n".join(self.lines), visible(self.hint)]))


class UsageError(AdapterkitError, ValueError):
    """The arguments are invalid: contradictory options, an output inside an input."""

    exit_code = 2


class UnknownStrengthError(UsageError):
    """Neither an adapter's files nor the call define its alpha; `reason` says which part is missing."""

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class FormatError(AdapterkitError):
    """A file is truncated, corrupt, or in an unsupported format."""


class MissingFileError(FormatError, FileNotFoundError):
    """No such file, directory or repository."""


class UnreadableError(FormatError, PermissionError):
    """No permission to read a file."""


class UnsafeFileError(FormatError):
    """A file would run code when loaded, or points outside its own folder."""


class ChangedError(AdapterkitError):
    """An input changed while it was being read, so that the result would be inconsistent."""


class LossError(AdapterkitError):
    """Quantizing the result would erase most of the update."""


class MissingPackageError(AdapterkitError, ImportError):
    """A required package is not installed or can't be imported."""


class FitError(AdapterkitError):
    """Adapter and base don't match: names, shapes, ranks or values disagree."""

    exit_code = 3


class NotAllowedError(AdapterkitError, PermissionError):
    """The Hub requires a login or a permission."""

    exit_code = 4


class OfflineError(AdapterkitError, ConnectionError):
    """The Hub is unreachable, and the file is not in the local cache."""

    exit_code = 5


class NoSpaceError(AdapterkitError):
    """The disk has too little space for the output."""

    exit_code = 6


class OutputExistsError(AdapterkitError, FileExistsError):
    """The output already exists."""

    exit_code = 7
