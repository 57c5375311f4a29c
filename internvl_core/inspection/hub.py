"""Models on Hugging Face's hub: what could be the id of one, and a quick question whether it is there.

Without the question a mistyped folder is asked for again and again by whatever loads it, for most of a minute.
"""

import re
from pathlib import Path

from internvl_core.errors import ArgumentError

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_TIMEOUT_S = 10
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def is_hub_id(text: str) -> bool:
    """Tell whether a text can be meant for the hub: `owner/name`, where owner is no folder here, or a bare name."""
    return _HUB_ID.fullmatch(text) is not None and not ("/" in text and Path(text.partition("/")[0]).exists())


def check_model(name: str) -> None:
    """Refuse what is neither a folder here nor a model on the hub, which is asked once.

    Raises:
        ArgumentError: it is not there, or the hub does not answer.
    """
    if Path(name).is_dir():
        return
    if not is_hub_id(name):
        raise ArgumentError(
            f"{name}: no such folder. Give a folder in Hugging Face's format, or a hub id (owner/name)."
        )
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # That of httpx or of httpx2, as the hub's version has it.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # isort: skip

    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return
        get_hf_file_metadata(hf_hub_url(name, _FILES[0]), timeout=_TIMEOUT_S)
    except EntryNotFoundError:
        return
    except (OSError, HTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            raise ArgumentError(
                f"{name}: no such folder, nor does the hub give such a model: {reason}. Correct the path."
            ) from None
        raise ArgumentError(
            f"{name}: no such folder, and the hub, which may have such a model, cannot be reached: {reason}. Correct "
            "the path, or try again with a network."
        ) from None
