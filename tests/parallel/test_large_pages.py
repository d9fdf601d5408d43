"""A program that begins once more, to have large pages: as it was called, and once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import medmoe_jax
from medmoe_jax.parallel import large_pages

PROGRAM = """
import json, os, sys
from pathlib import Path
from medmoe_jax.parallel import large_pages

print(os.getpid(), flush=True)
large_pages.begin_again(Path(sys.argv[1]))
tunables, large = os.environ.get(large_pages.VARIABLE), large_pages.in_use(Path(sys.argv[1]))
print(json.dumps([tunables, sys.argv[2:], large, sys.flags.dev_mode]))
"""


def called(tmp_path, system, tunables):
    """What a program begins as, and what it tells when it goes on."""
    (tmp_path / "system").write_text(system)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != large_pages.VARIABLE}
    if tunables is not None:
        environment[large_pages.VARIABLE] = tunables
    command = [sys.executable, "-X", "dev", str(program), str(tmp_path / "system"), "a b", ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *begun, told = done.stdout.splitlines()
    return begun, json.loads(told)


@pytest.mark.skipif(not large_pages._glibc_has_it(), reason="no glibc of 2.35 or later")
@pytest.mark.parametrize("before", [None, "", "glibc.malloc.tcache_count=7"])
def test_a_program_begins_once_more_with_the_tunable(tmp_path, before):
    """The same process and arguments, Python's own too; other tunables stay."""
    begun, (tunables, arguments, large, dev_mode) = called(
        tmp_path, "always [madvise] never\n", before
    )
    assert len(begun) == 2 and len(set(begun)) == 1
    kept = [before] if before else []
    assert tunables.split(":") == [*kept, "glibc.malloc.hugetlb=1"]
    assert arguments == ["a b", ""] and dev_mode and large


@pytest.mark.parametrize(
    ("system", "before", "large"),
    [
        ("always [madvise] never\n", "glibc.malloc.hugetlb=0", False),
        ("always [madvise] never\n", "glibc.malloc.hugetlb=1", True),
        ("always [madvise] never\n", "glibc.malloc.hugetlb=2", False),  # pages set apart
        ("[always] madvise never\n", None, True),
        ("always madvise [never]\n", None, False),
        ("", None, False),
    ],
)
def test_a_program_goes_on_where_it_would_change_nothing(tmp_path, system, before, large):
    begun, told = called(tmp_path, system, before)
    assert len(begun) == 1 and told == [before, ["a b", ""], large, True]


@pytest.mark.parametrize(
    ("program", "own"),
    [
        ("main.py", False),
        ("medmoe", True),
        (str(Path(medmoe_jax.__file__).parent / "cli/main.py"), True),
    ],
)
def test_only_the_command_itself_begins_again(tmp_path, program, own):
    """A user's own main.py that imports the package has begun, and goes on."""
    code = f"import sys; sys.argv[0] = {program!r}\nfrom medmoe_jax.cli import early\n"
    code += "print(early.IS_PROGRAM)"
    environment = {**os.environ, large_pages.VARIABLE: f"{large_pages.TUNABLE}=0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{own}\n"


def test_where_there_is_no_such_system(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("begun again")

    monkeypatch.setattr(os, "execv", never)
    monkeypatch.delenv(large_pages.VARIABLE, raising=False)
    large_pages.begin_again(tmp_path / "absent")
    assert not large_pages.in_use(tmp_path / "absent")
    (tmp_path / "system").write_text("always [madvise] never\n")
    for name in ("", "musl 1.2.5", "glibc 2.34"):
        monkeypatch.setattr(os, "confstr", lambda _, name=name: name)
        large_pages.begin_again(tmp_path / "system")
