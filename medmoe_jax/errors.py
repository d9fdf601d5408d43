"""Exceptions whose text is written for the user, and errors of the system that may pass."""

import contextlib
import errno
import re
from collections.abc import Generator

# Numbers of an OSError: storage is full, or it or the way to it failed; the same command may
# succeed later.
STORAGE_LOST = frozenset(
    {
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ENOSPC,
        errno.EROFS,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


class UserError(ValueError):
    """Bad input: the message names the field, file or line and says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


class ParameterError(UserError):
    """A parameter has a value that will not do: the message begins with the parameter's name."""


@contextlib.contextmanager
def field_names(prefix: str) -> Generator[None]:
    """Where the library says `remat: ...`, say `run.remat: ...`, the configuration's own name.

    Args:
      prefix: what stands before a parameter's name, such as `run.`.

    Raises:
      UserError: in place of a ParameterError.
    """
    try:
        yield
    except ParameterError as error:
        raise UserError(f"{prefix}{error}") from None


class Stopped(Exception):
    """The machine asked the run to stop: all that was done is saved, the same command continues."""


class StorageError(UserError):
    """What was to be kept could not be written: nothing in the input is wrong."""


# How libraries in other languages write the number of an error of the system into their texts.
_NUMBER = re.compile(r"os[ _]error(?:_code)?\W{1,3}(\d{1,9})\b")


def is_storage(error: BaseException) -> bool:
    """Whether an error says that storage is full or failed, by its number or its text."""
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    return isinstance(error, StorageError) or number in STORAGE_LOST


def bad_or_lost(message: str, cause: BaseException) -> UserError:
    """A StorageError with this message where the cause is storage, else a UserError."""
    return StorageError(message) if is_storage(cause) else UserError(message)


@contextlib.contextmanager
def within(place: str) -> Generator[None]:
    """Puts a place, such as `stages.align: `, before the message of any UserError in the block."""
    try:
        yield
    except UserError as error:
        raise bad_or_lost(f"{place}{error}", error) from None
