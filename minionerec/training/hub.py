"""A finished model folder on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi

from minionerec.common.files import InputError, first_line
from minionerec.common.processes import say
from minionerec.common.settings import HubFlags


def check_hub_flags(flags: HubFlags) -> None:
    """Stop before hours of work if their result could not be sent.

    Raises:
        InputError: what is missing.
    """
    if not flags.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(flags, name):
                raise InputError(f"--{name}: has an effect with --push_to_hub True only")
        return
    if not flags.hub_model_id:
        raise InputError("--push_to_hub True: needs --hub_model_id, such as my-name/my-model")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise InputError("--push_to_hub True: HF_HUB_OFFLINE is set, so nothing can be sent")


def push_model_folder(folder: str | Path, flags: HubFlags) -> None:
    """Send a model folder, card and catalogue included, where --push_to_hub asks for it. Main process only.

    Raises:
        InputError: the hub refused it or cannot be reached; the folder stays as it is.
    """
    if not flags.push_to_hub:
        return
    api = HfApi()
    try:
        repo = api.create_repo(flags.hub_model_id, private=flags.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=str(folder), commit_message="Add a MiniOneRec model")
    except Exception as error:  # of the hub, of its client, of the network: each has errors of its own
        raise InputError(
            f"--hub_model_id {flags.hub_model_id}: not sent ({first_line(error)}); {folder} is complete, and "
            f"`python -m scripts.model_card --model {folder} --push_to_hub True --hub_model_id {flags.hub_model_id}` "
            "tries again"
        ) from None
    say(f"[hub] {folder} -> {repo}")
