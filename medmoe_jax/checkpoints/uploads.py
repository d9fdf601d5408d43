"""Folders to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.data.hub import hub_errors
from medmoe_jax.errors import UserError

# What the hub's answers mean here, by their number.
_MEANS = {
    401: "the hub does not accept the token; log in again with `hf auth login`",
    403: "the token may not write there; take one with the right to write, or another name",
    409: "there is such a repository already, and nothing in it was changed; put another "
    "name into the command",
}


def check_repository(repository: str) -> None:
    """Raise UserError unless this can be the name of a repository, `org/name`."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise UserError(f"--push: {error}") from None
    if "/" not in repository:
        raise UserError(f"--push: '{repository}' names no organisation or user: write org/name")


def upload(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload a folder to a new repository of models; only the first process does.

    Args:
      folder: what is uploaded; it is not changed.
      repository: `org/name`, at which there is nothing yet.
      private: whether only its owners see it; otherwise as their settings say.

    Returns:
      Where it is.

    Raises:
      UserError: there is no token, the hub refuses, or it cannot be reached.
    """
    problem, place = from_first_process(lambda: _try_upload(folder, repository, private))
    if problem:
        command = ["hf", "upload", repository, str(folder), *(["--private"] if private else [])]
        raise UserError(
            f"{problem}. It is whole in {folder}; once that is mended: {shlex.join(command)}"
        )
    return place


def _try_upload(folder: str | Path, repository: str, private: bool) -> tuple[str, str]:
    """`(what went wrong, where it is)`, of which one is empty."""
    from huggingface_hub import HfApi, errors, get_token

    if not get_token():
        return f"{repository}: not uploaded: there is no token; `hf auth login` or set HF_TOKEN", ""
    api = HfApi()
    try:
        with hub_errors(f"{repository}: not uploaded"):
            place = api.create_repo(repository, private=private or None)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Export of medmoe_jax"
            )
    except UserError as error:
        cause = error.__cause__
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else 0
        means = f"{repository}: not uploaded: {_MEANS.get(status)}"
        return means if status in _MEANS else str(error), ""
    except RuntimeError as error:  # a large file, which goes apart from the commit, broke off
        return f"{repository}: not uploaded: {' '.join(str(error).split())}", ""
    return "", str(place)
