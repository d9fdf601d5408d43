"""What a path names: a place on disk, on object storage, or none that is known.

Every path that a person gives comes through `place`, which takes all that is supported, or `local`,
which takes a disk alone; all else is refused, by name, before anything is made. `Path("gs://b/x")`
would be a local folder `gs:`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

from medmoe_jax.errors import StorageError, UserError


class _Scheme(NamedTuple):
    """The extra of setup.py that brings a scheme, and the module which fsspec needs for it."""

    extra: str
    module: str


_SCHEMES = {"gs": _Scheme("gcs", "gcsfs"), "s3": _Scheme("s3", "s3fs")}
REMOTE = frozenset(_SCHEMES)
# One slash is what is left of two once a path was made of it.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def is_hidden(name: str | os.PathLike) -> bool:
    """Whether a file or a folder that it lies in is hidden, by its name below the folder asked for.

    Programs keep their own copies and caches there, such as `.ipynb_checkpoints/`.
    """
    return any(part.startswith(".") for part in Path(name).parts)


def scheme_of(path: str | os.PathLike) -> str:
    """What stands before `:/`, such as `gs`; "" for a path on this machine's disk."""
    found = _URI.match(os.fspath(path))
    return found[1].lower() if found else ""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on object storage; it costs nothing and asks nobody."""
    return scheme_of(path) in REMOTE


def check_utf8(text: str, where: str = "") -> None:
    """Raise UserError, beginning with `where`, for a name or word with bytes that are not UTF-8.

    Disks and shells take any bytes. Python holds them as text that nothing can write: no report and
    no record, and neither JAX nor its cache.
    """
    shown = text.encode("utf-8", "backslashreplace").decode()
    if shown != text:
        raise UserError(
            f"{where}'{shown}' is not UTF-8 text; write it in UTF-8 (rename a file that is called "
            "so), or set the locale to UTF-8"
        )


def check(path: str | os.PathLike, field: str, schemes: Iterable[str]) -> None:
    """Raise UserError unless a path is on this machine's disk or has one of these schemes.

    Its name, and that of the current folder where it lies there, must be UTF-8.

    Args:
      path: as a person gave it.
      field: the option or field it stands in; "" where that is not known.
      schemes: such as `gs`, or `hf` where names of the hub will do.
    """
    scheme, where = scheme_of(path), f"{field}: " if field else ""
    check_utf8(os.fspath(path), where)
    if not scheme:
        if os.fspath(path) and not os.path.isabs(path):
            check_utf8(os.getcwd(), f"{where}the current folder ")
        _check_locale(os.fspath(path), where)
        return
    if scheme not in schemes:
        known = ["a path of this machine", *(f"{one}://" for one in sorted(schemes))]
        raise UserError(
            f"{where}'{os.fspath(path)}' is a place that cannot be used here; give "
            f"{' or '.join(known)} (a folder that is named so is ./{os.fspath(path)})"
        )
    if scheme in REMOTE:
        _check_remote(os.fspath(path), where, scheme)


def _check_locale(path: str, where: str) -> None:
    """Raise UserError for a name that the system cannot be told in the encoding of the locale."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise UserError(
            f"{where}'{path}' cannot be written in the encoding of the locale, "
            f"{sys.getfilesystemencoding()}; set the locale to UTF-8 (LC_ALL=C.UTF-8)"
        ) from None


def _check_remote(path: str, where: str, scheme: str) -> None:
    if not re.match(rf"{scheme}://[^/]+", path):
        raise UserError(f"{where}'{path}' names no bucket; write {scheme}://BUCKET/PATH")
    needed = _SCHEMES[scheme]
    if importlib.util.find_spec(needed.module) is None:
        raise UserError(
            f"{where}'{path}' needs the package {needed.module}, which is not installed: "
            f"pip install 'medmoe_jax[{needed.extra}]'"
        )


def place(path: str | os.PathLike, field: str = "") -> Path:
    """The place that a path names, with pathlib's methods wherever it lies.

    Raises:
      UserError: the scheme is not supported, or its package is not installed.
    """
    check(path, field, REMOTE)
    if not is_remote(path):
        return Path(at_home(os.fspath(path)))
    _configure()
    from etils import epath

    return cast("Path", epath.Path(os.fspath(path)))


def local(path: str | os.PathLike, field: str = "") -> Path:
    """A path on this machine's disk. Raises UserError for any other."""
    check(path, field, ())
    return Path(at_home(os.fspath(path)))


def at_home(path: str) -> str:
    """A path in which `~/` at the beginning is the home folder, and `~user/` that user's.

    Shells leave it as it is in `--option=~/x`, and nobody means a folder that is called `~`. A
    name that no user has is that of a folder.
    """
    return os.path.expanduser(path)


@functools.cache
def _configure() -> None:
    """No lists are kept: other programs, and TensorStore in this one, write where we look."""
    import fsspec.config

    for names in (("gs", "gcs"), ("s3", "s3a")):
        for name in names:
            fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or folder. Raises UserError: see `place`."""
    return place(path).exists()


def make_folder(path: Path) -> None:
    """Make a folder with those above it; on object storage there are none to make.

    Raises:
      UserError, StorageError: see `check_makeable`.
    """
    if not is_remote(path):
        check_makeable(path)
        path.mkdir(parents=True, exist_ok=True)


def check_file(path: str | os.PathLike) -> None:
    """Raise UserError where no file can be put in the place of what is at a path, or links lead to.

    A folder is none, nor is a device or a pipe, as `/dev/stdout` may be.
    """
    path = place(path)
    if is_remote(path) or path.is_file() or not path.exists():
        return
    what = "a folder" if path.is_dir() else "no ordinary file"
    raise UserError(f"{path}: is {what}; give the path of a file")


def check_makeable(folder: Path) -> None:
    """Whether a folder is there or may be made, as far as paths tell; on object storage it may.

    Raises:
      UserError: something else stands there or above.
      StorageError: on the way lies a link to nothing, such as to a disk that is not mounted.
    """
    if is_remote(folder):
        return
    for one in (folder, *folder.absolute().parents):
        if one.is_symlink() and not one.exists():
            raise StorageError(
                f"{folder}: cannot be made: {one} is a link to {os.readlink(one)}, which is not "
                "there"
            )
        if one.exists() and not one.is_dir():
            raise UserError(f"{one}: is not a folder; give the path of a folder, or of a new one")


def nearest(path: Path) -> Path:
    """What is there at a path on this machine, or closest above it."""
    # `Path.exists` raises behind a folder that cannot be entered.
    return next(one for one in (path, *path.absolute().parents) if os.path.exists(one))


def absolute(path: Path) -> Path:
    """A path that does not depend on the current folder."""
    return path if is_remote(path) else path.absolute()


def cache_folder() -> Path:
    """Where this machine keeps what can be fetched or made again: $XDG_CACHE_HOME/medmoe_jax."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    check_utf8(os.fspath(home), "$XDG_CACHE_HOME, or .cache of the home folder: ")
    return Path(home) / "medmoe_jax"
