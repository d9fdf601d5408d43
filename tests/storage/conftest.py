"""Emulators for the session, and a folder of each for a test."""

import os
import uuid

import pytest

from medmoe_jax.storage.places import place
from tests import clouds


@pytest.fixture(scope="session")
def emulators(tmp_path_factory):
    """Both emulators, found by this process and those that it starts."""
    patched = pytest.MonkeyPatch.context()
    with clouds.google() as google, clouds.amazon() as amazon, patched as patch:
        cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
        for name, value in (google | amazon | cache).items():
            patch.setenv(name, value)
        import fsspec.config

        fsspec.config.set_conf_env(fsspec.config.conf)
        yield dict(os.environ)


@pytest.fixture(params=["gs", "s3"])
def cloud(request, emulators):
    """A new folder on object storage."""
    return place(f"{request.param}://{clouds.BUCKET}/{uuid.uuid4().hex}")
