"""Exported folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from .checkpoint import one_line

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub's client raises when there is no connection: httpx's or httpx2's, by its release."""


def check_repository(name: str) -> None:
    """Raises ValueError for what is no repository's name, before anything is written."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository ({one_line(error)}); give OWNER/NAME") from error


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads a folder in one commit, into a repository that is made where there is none. -> its address.

    The token is huggingface_hub's: HF_TOKEN, or that of `hf auth login`. Raises ValueError where the hub cannot be reached or
    refuses; the folder stays as it is.
    """
    api = HfApi(library_name="commvlm")
    try:
        # None leaves it to the organisation; False would say public where new repositories are private.
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload the model, exported by commvlm"
        )
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise ValueError(f"{name} was not pushed: {_reason(error)}; later: hf upload {name} {folder}") from error
    return str(address)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, unset it"
    if isinstance(error, HfHubHTTPError):
        hint = " (log in: hf auth login, or set HF_TOKEN)" if error.response.status_code in (401, 403) else ""
        return one_line(error) + hint
    return f"the hub cannot be reached ({one_line(error)})"
