"""Object storage on this machine: emulators of Google's and Amazon's, in threads of its own."""

import contextlib
import functools
import http
import logging
import socketserver
from collections.abc import Generator, Mapping

import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def google() -> Generator[Mapping[str, str]]:
    """gcp-storage-emulator; yields the environment in which programs find it."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    class Quiet(server.APIThread):
        """On a free port, and silent about callers that hang up."""

        def run(self):
            handler = functools.partial(server.RequestHandler, self._storage)
            self._httpd = socketserver.TCPServer((self._host, 0), handler)
            self._httpd.handle_error = lambda *_: None
            self.is_running.set()
            self._httpd.serve_forever(poll_interval=0.01)

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "APIThread", Quiet)
        patch.setattr(server.RequestHandler, "log_message", lambda *_: None)
        for name in ("_media_upload", "_multipart_upload", "_create_resumable_upload"):
            patch.setattr(objects, name, _conditional(getattr(objects, name)))
        with server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET) as running:
            port = running._api._httpd.server_address[1]
            yield {
                "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
                "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC
                "FSSPEC_GCS_TOKEN": "anon",
            }


def _conditional(upload):
    """An upload that keeps `ifGenerationMatch`, as Google does and the emulator does not."""

    def checked(request, response, storage):
        from gcp_storage_emulator.exceptions import NotFound

        wanted = request.query.get("ifGenerationMatch")
        if wanted:
            data = request.data
            meta = data.get("meta", data) if isinstance(data, dict) else {}
            name = request.query.get("name", [meta.get("name")])[0]
            try:
                found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                found = "0"
            if found != wanted[0]:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                return None
        return upload(request, response, storage)

    return checked


@contextlib.contextmanager
def amazon() -> Generator[Mapping[str, str]]:
    """moto's S3; yields the environment in which programs find it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.stop()
