"""Uploads, against a stand-in that answers as the hub does."""

import base64
import http.server
import json
import socket
import threading

import pytest
from huggingface_hub import constants

from medmoe_jax.checkpoints import uploads
from medmoe_jax.errors import UserError

FILES = {"README.md": b"---\nlicense: mit\n---\n# m\n", "model.safetensors": b"\x00\xff" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories with their files; `fails` has the number that a call is refused with."""

    made, files, asked, fails = {}, {}, [], {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(200, {"sha": "1" * 40, "id": "org/m", "siblings": []})

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        call = self.path.split("?")[0].removeprefix("/api/")
        self.asked.append((call, self.headers.get("Authorization")))
        what = call.split("/")[3] if call.startswith("models/") else call
        if what in self.fails:
            return self._answer(self.fails[what], {"error": "refused"})
        if call == "repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.made:
                return self._answer(409, {"error": "You already created this model repo"})
            self.made[name] = asked
            return self._answer(200, {"url": f"{self.server.endpoint}/{name}", "name": name})
        if what == "preupload":
            files = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self._answer(200, {"files": told})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            done = {"commitUrl": f"{self.server.endpoint}/org/m/commit/2", "commitOid": "2" * 40}
            return self._answer(200, done)
        return self._answer(200, {"errors": [], "warnings": []})  # validate-yaml

    def _answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback, and a token for it."""
    for name, empty in (("made", {}), ("files", {}), ("asked", []), ("fails", {})):
        monkeypatch.setattr(Hub, name, empty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


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
