"""A stand-in for the Hugging Face hub on loopback, to which models are uploaded."""

import base64
import contextlib
import http.server
import json
import threading

from huggingface_hub import constants


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories with their files; `fails` has the number that a call is refused with.

    A file is part of the commit; those in `large` would go elsewhere, where nobody takes them.
    """

    made, files, asked, fails, large = {}, {}, [], {}, set()

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "xet" in self.path:
            return self._answer(403, {"error": "refused"})
        return self._answer(200, {"sha": "1" * 40, "id": "org/m", "siblings": []})

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
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"] in self.large else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._answer(200, {"files": told})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            done = {"commitUrl": f"{self.server.endpoint}/org/m/commit/2", "commitOid": "2" * 40}
            return self._answer(200, done)
        if call.endswith("info/lfs/objects/batch"):
            return self._answer(403, {"error": "refused"})
        return self._answer(200, {"errors": [], "warnings": []})  # validate-yaml

    def _answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(monkeypatch):
    """The hub, which huggingface_hub asks within the block, with a token."""
    for name, empty in (
        ("made", {}),
        ("files", {}),
        ("asked", []),
        ("fails", {}),
        ("large", set()),
    ):
        monkeypatch.setattr(Hub, name, empty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    try:
        yield Hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
