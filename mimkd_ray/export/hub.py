"""Pushing an export to the Hugging Face hub, or to what HF_ENDPOINT names in its place."""

from __future__ import annotations

from pathlib import Path

from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import scrubbed


def check_client(name: str) -> None:
    """Raise UserError where nothing can be pushed: the client is not installed, or nobody is logged in."""
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise UserError(
            f"--push-to {name} needs huggingface_hub, which is not installed: pip install mimkd-ray[export]"
        ) from error
    if get_token() is None:
        raise UserError(f"--push-to {name}: nobody is logged in to the hub: `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Make the model's repository if there is none and push all files of the folder; return its address.

    Raises UserError with the hub's own reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mimkd_ray")
    except Exception as error:  # the client passes on those of its HTTP library, too
        said = " ".join(scrubbed(getattr(error, "server_message", None) or str(error)).split())[:300]
        if not isinstance(error, HfHubHTTPError):  # the hub was not reached, or the name is none
            raise UserError(
                f"--push-to {name}, to {api.endpoint}: {said}; the files stay here; check the name, the network and "
                "HF_ENDPOINT"
            ) from error
        raise UserError(
            f"--push-to {name}: the hub at {api.endpoint} refuses: {error.response.status_code}: {said}; the files "
            "stay here; give a name that you may write to, with a token that may write (`hf auth login`)"
        ) from error
    return address
