"""Whether the plugins of jax that are installed are of the releases which that jax asks for.

A libtpu of another release ends in an error of its compiler or in a crash, and a CUDA plugin of
another is left out without a word, so that a run would go on the CPU. What fits, jax itself says
in the requirements of its extras.
"""

from __future__ import annotations

import glob
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from packaging.requirements import Requirement

from medmoe_jax.errors import UserError

# Files of devices, and the packages through which jax reaches them.
FILES = {"tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"), "gpu": ("/dev/nvidia[0-9]*",)}
PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}
_PLATFORMS = {"tpu": {"tpu"}, "gpu": {"gpu", "cuda"}}  # in JAX_PLATFORMS
_EXTRAS = ("tpu", "cuda12", "cuda13")  # of jax


class Misfit(NamedTuple):
    """A package that is installed in a release which another one does not take.

    Attributes:
      wanted: the package and the releases that would do.
      version: the release that is installed.
      asker: who asks, with its release.
    """

    wanted: Requirement
    version: str
    asker: str

    @property
    def text(self) -> str:
        """What is wrong."""
        wanted = self.wanted
        return (
            f"{wanted.name} {self.version} is installed; {self.asker} asks for {wanted.specifier}"
        )

    @property
    def remedy(self) -> str:
        """The command that mends it."""
        extras = f"[{','.join(sorted(self.wanted.extras))}]" if self.wanted.extras else ""
        return f"pip install '{self.wanted.name}{extras}{self.wanted.specifier}'"


def installed() -> dict[str, str]:
    """The version of every package of this environment, by normal name."""
    found = importlib.metadata.distributions()
    return {normal(one.name): one.version for one in found if one.name}


def normal(name: str) -> str:
    """A package's name in the one spelling that all its spellings have in common."""
    return name.lower().replace("_", "-").replace(".", "-")


def requirements(name: str, extras: Sequence[str]) -> list[Requirement]:
    """What an installed package asks for, with these extras; nothing where it is only a folder."""
    try:
        found = map(Requirement, importlib.metadata.requires(name) or [])
    except importlib.metadata.PackageNotFoundError:
        return []
    asked = [{"extra": extra} for extra in extras]
    return [one for one in found if not one.marker or any(map(one.marker.evaluate, asked))]


def misfits(versions: Mapping[str, str]) -> Iterator[Misfit]:
    """What jax runs on, jaxlib and plugins, where it is of a release that jax does not ask for.

    Args:
      versions: of the packages that are installed, by normal name.
    """
    asked = {normal(one.name): one for one in requirements("jax", (*_EXTRAS, ""))}
    for name in ("jaxlib", *PLUGINS["tpu"], *PLUGINS["gpu"]):
        if name in asked and name in versions and not fits(asked[name], versions[name]):
            yield Misfit(asked[name], versions[name], f"jax {versions['jax']}")


def fits(wanted: Requirement, version: str) -> bool:
    """Whether a release will do."""
    return wanted.specifier.contains(version, prereleases=True)


def check_libtpu() -> None:
    """Raise UserError where the installed libtpu is not of the release that jax asks for."""
    _check("tpu", installed())


def check_plugins(versions: Mapping[str, str] | None = None) -> None:
    """Raise UserError where jax would start a device of this machine with a plugin that is unfit.

    Args:
      versions: as for `misfits`; None = those of this environment.
    """
    asked = jax.config.values["jax_platforms"]
    for kind, names in _PLATFORMS.items():
        if (not asked or names & set(asked.split(","))) and files_of(kind):
            _check(kind, installed() if versions is None else versions)


def _check(kind: str, versions: Mapping[str, str]) -> None:
    """Raise UserError where plugins of a kind of device are there, and none of them fits."""
    there = [name for name in PLUGINS[kind] if name in versions]
    wrong = {normal(one.wanted.name): one for one in misfits(versions)}
    if there and all(name in wrong for name in there):
        first = wrong[there[0]]
        raise UserError(f"{first.text}: {first.remedy}")


def files_of(kind: str) -> list[str]:
    """The files of this machine's devices of a kind, `tpu` or `gpu`."""
    return [path for pattern in FILES[kind] for path in glob.glob(pattern)]
