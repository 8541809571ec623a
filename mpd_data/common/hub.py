"""Send a folder to the Hugging Face Hub."""

import re
import shlex
from pathlib import Path

from mpd_data.common.errors import ConfigError, requires
from mpd_data.common.models import hub_failures, resolve_model
from mpd_data.common.weights import require_whole


def dataset_of(source: str) -> str | None:
    """Return OWNER/NAME of the hub's dataset that a source of prompts names (hf://OWNER/NAME… or
    hf://datasets/OWNER/NAME…); None for other sources."""
    match = re.match(r"hf://(?:datasets/(?=[^/]+/))?([\w.-]+/[\w.-]+)", source)
    return match and match[1]


def require_name(repository: str) -> None:
    """Raise ConfigError unless `repository` is OWNER/NAME. Called when a command begins: what comes
    before an upload may take long."""
    with requires("hub", "pushing to the hub"):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        # Its own text offers a name without an owner.
        raise ConfigError(
            f"{repository}: the hub can have no repository of this name. Give one of the form"
            " OWNER/NAME: at most 96 letters, digits, '-', '_' and '.';"
            " neither '-' nor '.' at an end, no '--', no '..', and no '.git' at the end."
        ) from error
    if "/" not in repository:
        # The hub takes the token's user for the owner. Here a forgotten owner is a slip.
        raise ConfigError(f"{repository}: an upload needs an owner. Give OWNER/{repository}.")


def push_command(folder: Path, repository: str = "OWNER/NAME", public: bool = False) -> str:
    """Return the command that uploads `folder`, for messages."""
    return shlex.join(["mpd-gen", "push", str(folder), repository, *["--public"] * public])


def push_model(folder: Path, repository: str, public: bool) -> str:
    """Upload a model's or adapter's folder, like `push`. Raise ConfigError also where its files are
    not a whole model, and where an adapter's base is not available."""
    with requires("train", "comparing a model with its architecture before it is uploaded"):
        require_whole(resolve_model(str(folder), weights=False))
    return push(folder, repository, ["*"], False, public)


def push(folder: Path, repository: str, patterns: list[str], is_dataset: bool, public: bool) -> str:
    """Upload the files of `folder` that match `patterns` to `repository` in one commit; return its
    URL. A repository that does not exist is made, private unless `public`; one that exists stays as
    visible as it is. Files that are there already are not sent again.

    The token is that of `hf auth login`, or HF_TOKEN. Raise ConfigError where the hub refuses or
    cannot be reached.
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
            f"{folder}: cannot be pushed to {repository} ({reason}). {_remedy(error, api.endpoint)}"
            f" Then: {push_command(folder, repository, public)}"
        ) from error
    return str(url)


def _remedy(error: Exception, endpoint: str) -> str:
    """Return what to do about an `error` of the hub at `endpoint`."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return (
            f"Log in to {endpoint} with `hf auth login`, or set HF_TOKEN to a token that may write"
            " there."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, so that {endpoint} can be reached."
    if status == 404:
        return f"Check that OWNER is a user or an organisation of {endpoint}."
    if isinstance(error, OSError) and error.filename is not None:
        return "Check that this file can be read."
    return f"Check the network and that {endpoint} (HF_ENDPOINT) is up, or try again later."
