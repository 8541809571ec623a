"""Send a folder to the Hugging Face Hub."""

import re
from pathlib import Path

from mpd_data.common.errors import ConfigError, requires
from mpd_data.common.models import hub_failures


def dataset_of(source: str) -> str | None:
    """Return OWNER/NAME of the hub's dataset that a source of prompts names (hf://OWNER/NAME… or
    hf://datasets/OWNER/NAME…); None for other sources."""
    match = re.match(r"hf://(?:datasets/(?=[^/]+/))?([\w.-]+/[\w.-]+)", source)
    return match and match[1]


def push(folder: Path, repository: str, patterns: list[str], is_dataset: bool, public: bool) -> str:
    """Upload the files of `folder` that match `patterns` to `repository` in one commit; return its
    URL. A repository that does not exist is made, private unless `public`; one that exists stays as
    visible as it is. Files that are there already are not sent again.

    The token is that of `hf auth login`, or HF_TOKEN. Raise ConfigError where the hub refuses.
    """
    with requires("hub", "pushing to the hub"):
        from huggingface_hub import HfApi
    kind = "dataset" if is_dataset else "model"
    api = HfApi()
    try:
        url = api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            repo_type=kind,
            allow_patterns=patterns,
            commit_message=f"Upload {folder.name} with mixed-policy-distillation",
        )
    except hub_failures() as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigError(
            f"{folder}: cannot be pushed to {repository} ({reason}). Log in with `hf auth login`,"
            " or set HF_TOKEN to a token that may write there, and run it again."
        ) from error
    return str(url)
