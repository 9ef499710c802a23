"""A model's ``config.json`` from the Hugging Face hub, through ``huggingface_hub`` and its cache.

``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_TOKEN`` mean what they mean there. No message repeats what the
library raised, since that may quote a request with its headers; a token is never read here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from launchkit.errors import HubError, LaunchkitError, MissingExtraError, UnknownModelError
from launchkit.hub.validate import MAX_CONFIG_BYTES, read_config_file, too_large

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_SECONDS = 10
REACHABLE_SECONDS = 3
_ON = ("1", "ON", "YES", "TRUE")  # huggingface_hub's ENV_VARS_TRUE_VALUES
FILE_NAME = "config.json"

# "name" or "owner/name", as the hub allows them.
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class Hub(Protocol):
    """What is needed of the hub; tests put another in its place."""

    def cached(self, model_id: str) -> Path | None:
        """The file in the local cache, if it is there."""
        ...

    def num_bytes(self, model_id: str) -> int | None:
        """The file's length, without downloading it; None where the server does not say."""
        ...

    def download(self, model_id: str) -> Path:
        """Download the file into the cache."""
        ...


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT``, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_reachable() -> bool:
    """Whether the hub, or the proxy that leads to it, answers at all. Libraries try again for most of a minute."""
    import socket
    from urllib.request import getproxies  # lazy: an HTTP client comes with it

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _ON or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in _ON:
        return False
    proxy = getproxies().get(urlsplit(endpoint()).scheme)
    address = urlsplit(proxy or endpoint())
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=REACHABLE_SECONDS):
            return True
    except OSError:
        return False


def is_model_id(name: str) -> bool:
    """Whether the hub could have a repository of this name."""
    return _MODEL_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch_config(model_id: str, *, hint: str = "", hub: Hub | None = None) -> dict[str, Any]:
    """The validated ``config.json`` of a hub repository; the cached copy where there is one.

    ``hint`` is what to suggest when the model is not found ("did you mean …"). Raises ``UnknownModelError``,
    ``HubError`` or ``ModelConfigError``, one line each.
    """
    if not is_model_id(model_id):
        advice = _advice(hint, "give owner/name, like Qwen/Qwen3-8B")
        raise UnknownModelError(f"{_short(model_id)} is neither a file, a directory nor a hub id; {advice}")
    hub = hub or HuggingFaceHub()
    path = hub.cached(model_id)
    if path is None:
        path = _download(model_id, hint=hint, hub=hub)
    return read_config_file(path)


def _download(model_id: str, *, hint: str, hub: Hub) -> Path:
    try:
        num_bytes = hub.num_bytes(model_id)
        if num_bytes is not None and num_bytes > MAX_CONFIG_BYTES:
            raise too_large(f"{model_id}'s {FILE_NAME}", num_bytes)
        return hub.download(model_id)
    except LaunchkitError:
        raise
    except Exception as error:  # each HTTP library and Python version has its own tree; the names below are stable
        raise explain(error, model_id=model_id, hint=hint) from None


def explain(error: Exception, *, model_id: str, hint: str) -> LaunchkitError:
    """The one line that tells what to do about an exception of ``huggingface_hub``, recognised by class name."""
    names = {cls.__name__ for cls in type(error).__mro__}
    host = endpoint().removeprefix("https://")
    if "GatedRepoError" in names:
        return HubError(
            f"{model_id} is gated; accept the licence at {endpoint()}/{model_id}, then `hf auth login`, "
            "or pass --config FILE"
        )
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return UnknownModelError(
            f"{host} has no model {model_id} that you may read; "
            f"{_advice(hint, 'check the spelling, or `hf auth login` if it is private')}"
        )
    if names & {"OfflineModeIsEnabled"}:
        return HubError(
            f"{model_id} is neither in the catalogue nor in the hub cache, and HF_HUB_OFFLINE is set; "
            f"{_advice(hint, 'unset it, or pass --config FILE')}"
        )
    # LocalEntryNotFoundError means that the hub was not reached, so it goes before its base, EntryNotFoundError.
    if names & {"LocalEntryNotFoundError", "ConnectionError", "TransportError", "TimeoutError"}:
        return HubError(
            f"{model_id} is not in the catalogue and {host} cannot be reached; "
            f"{_advice(hint, 'check the network, or pass --config FILE')}"
        )
    if names & {"EntryNotFoundError"}:
        return UnknownModelError(f"{model_id} has no {FILE_NAME} on {host}; pass --config FILE")
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = f"HTTP {status}" if status else type(error).__name__
    return HubError(f"{model_id} could not be read from {host} ({told}); try again, or pass --config FILE")


def _short(name: str) -> str:
    return repr(name) if len(name) <= 80 else f"{name[:76]!r} …"


def _advice(hint: str, otherwise: str) -> str:
    return f"{hint} else {otherwise}" if hint else otherwise


class HuggingFaceHub:
    """The real hub. ``huggingface_hub`` is imported on first use: it brings an HTTP client, 130 ms."""

    def __init__(self) -> None:
        try:
            from huggingface_hub.utils.tqdm import disable_progress_bars
        except ImportError as error:
            raise MissingExtraError(
                "the model is not in the catalogue and huggingface_hub is not installed; "
                "pip install huggingface_hub, or pass --config FILE"
            ) from error
        disable_progress_bars()  # one small file

    def cached(self, model_id: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model_id, FILE_NAME)
        return Path(found) if isinstance(found, str) else None

    def num_bytes(self, model_id: str) -> int | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        self._refuse_offline()
        url = hf_hub_url(model_id, FILE_NAME, endpoint=endpoint())
        return get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS, endpoint=endpoint()).size

    def download(self, model_id: str) -> Path:
        from huggingface_hub import hf_hub_download

        self._refuse_offline()
        return Path(hf_hub_download(model_id, FILE_NAME, endpoint=endpoint(), etag_timeout=TIMEOUT_SECONDS))

    def _refuse_offline(self) -> None:
        from huggingface_hub import constants, errors

        if constants.is_offline_mode():
            raise errors.OfflineModeIsEnabled(FILE_NAME)
