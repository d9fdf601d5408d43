"""Uploads, against a stand-in that answers as the hub does."""

import shlex
import socket

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.cli.hf import app as hf

from medmoe_jax.checkpoints import uploads
from medmoe_jax.errors import UserError
from tests import upload_hub

FILES = {"README.md": b"---\nlicense: mit\n---\n# m\n", "model.safetensors": b"\x00\xff" * 40}


@pytest.fixture
def hub(monkeypatch):
    """A hub that accepts uploads."""
    with upload_hub.serving(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A folder to upload."""
    (tmp_path / "out").mkdir()
    for name, content in FILES.items():
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def whole(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_uploaded_as_it_is(hub, folder, private):
    place = uploads.upload(folder, "org/m", private)
    assert place.endswith("/org/m")
    assert hub.files == FILES and whole(folder)
    assert hub.made["org/m"].get("visibility") == ("private" if private else None)
    assert {token for _, token in hub.asked} == {"Bearer hf_stand_in"}


REFUSED = {
    ("repos/create", 401): "does not accept the token",
    ("repos/create", 403): "may not write there",
    ("repos/create", 409): "there is such a repository already",
    ("repos/create", 500): "500 Internal Server Error",
    ("preupload", 403): "may not write there",
    ("commit", 401): "does not accept the token",
}


@pytest.mark.parametrize("call, status", REFUSED)
def test_what_the_hub_refuses(hub, folder, call, status):
    hub.fails[call] = status
    with pytest.raises(UserError) as caught:
        uploads.upload(folder, "org/m")
    text = str(caught.value)
    assert text.startswith("org/m: not uploaded: ") and REFUSED[call, status] in text
    assert "\n" not in text and f"hf upload org/m {folder}" in text
    assert whole(folder) and not hub.files


@pytest.mark.parametrize("private", [False, True])
def test_the_command_for_later_does_what_was_asked(hub, folder, private):
    """As a shell and the `hf` command read it: whatever the folder's name, and for whom."""
    hub.fails["repos/create"] = 403
    folder = folder.rename(folder.with_name("my $(adapter)'s"))
    with pytest.raises(UserError) as caught:
        uploads.upload(folder, "org/m", private)
    command = shlex.split(str(caught.value).rpartition("once that is mended: ")[2])
    hub.fails.clear()
    assert command[0] == "hf"
    hf(command[1:], standalone_mode=False)
    assert hub.files == FILES
    assert hub.made["org/m"].get("visibility") == ("private" if private else None)


def test_large_files_that_nobody_takes(hub, folder):
    hub.large.add("model.safetensors")
    with pytest.raises(UserError, match=r"^org/m: not uploaded: ") as caught:
        uploads.upload(folder, "org/m")
    assert "\n" not in str(caught.value) and whole(folder) and "model.safetensors" not in hub.files


def test_a_large_file_that_breaks_off(hub, folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Error while uploading 'model.safetensors'\nto the Hub.")

    monkeypatch.setattr(HfApi, "upload_folder", broken)
    with pytest.raises(UserError, match=r"not uploaded: Error while uploading 'model.* to the Hub"):
        uploads.upload(folder, "org/m")


def test_a_repository_that_exists_is_left_as_it_is(hub, folder):
    uploads.upload(folder, "org/m")
    hub.files.clear()
    with pytest.raises(UserError, match="such a repository already, and nothing in it was changed"):
        uploads.upload(folder, "org/m")
    assert not hub.files


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token; `hf auth login` or set HF_TOKEN"):
        uploads.upload(folder, "org/m")
    assert not hub.asked and whole(folder)


def test_without_a_network(hub, folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match=r"org/m: not uploaded: .*refused") as caught:
            uploads.upload(folder, "org/m")
    assert "\n" not in str(caught.value) and whole(folder)


@pytest.mark.parametrize("name", ["m", "a/b/c", "org/m..", "../m", "org/"])
def test_names_that_cannot_be(name):
    with pytest.raises(UserError, match=r"^--push: "):
        uploads.check_repository(name)
    uploads.check_repository("org/m")
