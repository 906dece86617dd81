"""What can go wrong, and the exit code each kind ends with.

    AdapterkitError          1   anything below; catch this one
    ├── UsageError           2   the call itself makes no sense
    │   └── UnknownStrengthError 2   neither an adapter's files nor the call give its alpha
    ├── FormatError          1   a file is not what it claims to be
    │   └── UnsafeFileError  1   a file that would run code, or reach outside its folder
    ├── ChangedError         1   an input changed while it was being read
    ├── LossError            1   quantizing would erase the update
    ├── MissingPackageError  1   a package that is not installed; an ImportError, too
    ├── FitError             3   adapter and base do not belong together
    ├── NotAllowedError      4   the Hub wants a login, or a permission
    ├── OfflineError         5   the Hub cannot be reached
    ├── NoSpaceError         6   the disk is too small
    └── OutputExistsError    7   there is something where the output should go

Every message says where, what was found and what was expected; its hint says what to do next. Ctrl-C ends with 130.
"""

from adapterkit.text import visible


class AdapterkitError(Exception):
    """The root of everything adapterkit raises on purpose; each of its arguments is a line of the message.

    `hint` says what to do next. Both name a parameter as Python does, in backticks: `overwrite=True`, `rank`;
    the command line puts its own option there.
    """

    exit_code = 1

    def __init__(self, *lines: object, hint: str = "") -> None:
        super().__init__(*lines)
        self.hint = hint

    @property
    def lines(self) -> list[str]:
        """The lines of the message, in which nothing that strangers' files hold ends a line or steers a terminal."""
        return [visible(str(line)) for line in self.args]

    def __str__(self) -> str:
        """The message, and the hint after it."""
        between = "; " if len(self.args) == 1 else "\n"
        return between.join(filter(None, ["\n".join(self.lines), visible(self.hint)]))


class UsageError(AdapterkitError):
    """The call itself makes no sense: contradicting options, an output inside its own input."""

    exit_code = 2


class UnknownStrengthError(UsageError):
    """Neither an adapter's files nor the call give its alpha; `reason` names what is missing."""

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class FormatError(AdapterkitError):
    """A file is not what it claims to be: truncated, corrupt, or of a kind no reader knows."""


class UnsafeFileError(FormatError):
    """A file that would run code when loaded, or that points outside its own folder."""


class ChangedError(AdapterkitError):
    """An input changed while it was being read, so that the result would fit neither of its states."""


class LossError(AdapterkitError):
    """Quantizing the result would erase most of the update."""


class MissingPackageError(AdapterkitError, ImportError):
    """A package that this needs is not installed, or cannot be imported."""


class FitError(AdapterkitError):
    """Adapter and base do not belong together: names, shapes, ranks or numbers disagree."""

    exit_code = 3


class NotAllowedError(AdapterkitError):
    """The Hub wants a login or a permission that is not there."""

    exit_code = 4


class OfflineError(AdapterkitError):
    """The Hub cannot be reached and the local cache does not hold what was asked for."""

    exit_code = 5


class NoSpaceError(AdapterkitError):
    """The disk has no room for the output."""

    exit_code = 6


class OutputExistsError(AdapterkitError):
    """There is something where the output should go."""

    exit_code = 7
