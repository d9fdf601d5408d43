"""Compiled programs are kept, and one that was is told from one that was not."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from medmoe_jax.training import compiling
from medmoe_jax.training.compiling import compile_ahead, keep_compiled


@pytest.fixture
def settings():
    """JAX's settings of its cache, none at first, as they were afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_where_programs_are_kept(settings, tmp_path):
    keep_compiled("", "")
    assert settings() is None
    for workdir in (tmp_path, tmp_path / "other", tmp_path):
        keep_compiled("", workdir)
        assert settings() == str(workdir / "compiled")
    keep_compiled(str(tmp_path / "chosen"), tmp_path)
    assert settings() == str(tmp_path / "chosen")
    keep_compiled("", "")
    assert settings() is None


def test_a_place_that_others_told_jax_holds_for_every_run_that_names_none(settings, tmp_path):
    keep_compiled("", tmp_path)
    theirs = str(tmp_path / "theirs")
    jax.config.update("jax_compilation_cache_dir", theirs)
    for directory, want in (("", theirs), (tmp_path / "own", None), (tmp_path / "2nd", None)):
        for _ in range(2):
            keep_compiled(directory, tmp_path)
            assert settings() == (want or str(directory))
    keep_compiled("", tmp_path / "other")
    assert settings() == theirs


def test_the_programs_of_each_run_of_a_process_are_in_its_own_place(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiling, "_WORTH", 0.0)
    jax.jit(lambda x: jnp.cos(x) + 7)(jnp.ones(3))  # JAX looks for its cache at the first program
    for number, name in enumerate(("a", "b", "c")):
        keep_compiled("", tmp_path / name)
        compile_ahead(jax.jit(lambda x, n=number: jnp.sin(x) + n), jnp.ones(3))
        kept = [len([*(tmp_path / one / "compiled").glob("*-cache")]) for one in ("a", "b", "c")]
        assert kept == [1] * (number + 1) + [0] * (2 - number)


def test_programs_of_a_run_on_object_storage_are_kept_here(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled("", "gs://bucket/w")
    assert settings() == str(tmp_path / "medmoe_jax" / "compiled")


def test_a_place_where_nothing_can_be_kept_is_told(settings, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    told = f"run.compilation_cache: {file} is no folder that can be written; compiled programs are"
    for place in (file, file / "below"):
        keep_compiled(str(place), tmp_path)
        assert told in capsys.readouterr().err
    keep_compiled(str(tmp_path / "new" / "one"), tmp_path)
    assert not capsys.readouterr().err and not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    keep_compiled(str(tmp_path / "new"), tmp_path)
    assert f"run.compilation_cache: {tmp_path} is no folder" in capsys.readouterr().err
    keep_compiled("", tmp_path)  # nobody asked for that place
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_kept_program_is_read_by_the_next_start(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_WORTH", 0.0)
    keep_compiled("", tmp_path)
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    texts = []
    for _ in range(2):
        program, how = compile_ahead(jax.jit(lambda x: jnp.sin(x) + 2), shape)
        texts.append(how)
        assert program(jnp.zeros(4)).tolist() == [2.0] * 4
        jax.clear_caches()
    assert texts[0].startswith("compiled in ")
    assert texts[1].startswith("read from the compilation cache in ")
    _, how = compile_ahead(jax.jit(lambda x: jnp.sin(x) + 3), shape)
    assert how.startswith("compiled in ")
