"""Files of a Hub repository, brought into the cache, and errors that say what to do.

Nothing here reads weights or imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddinfer.errors import EXIT_IO, DdinferError, UsageError

MODEL_INDEX = "model_index.json"


class HubError(DdinferError):
    """The Hub could not be reached, or answered with a fault of its own."""

    exit_code = EXIT_IO


def fetch_file(
    repo: str, file: str, *, revision: str | None = None, token: str | None = None
) -> Path:
    """One file of a repository, in the cache.

    Raises:
        UsageError: nothing there, access refused, or offline and not cached.
        HubError: the Hub could not be reached.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, revision):
        return Path(hf_hub_download(repo, file, revision=revision, token=token))


def fetch_files(
    repo: str,
    patterns: Sequence[str],
    *,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a repository in the cache, with the files that match.

    Raises:
        UsageError, HubError: see `fetch_file`.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, revision):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignore),
            )
        )


def list_files(repo: str, suffix: str, *, token: str | None = None) -> list[str]:
    """Names of a repository's files with this ending; offline, of those in the cache.

    Raises:
        UsageError, HubError: see `fetch_file`.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        folder = fetch_files(repo, [f"*{suffix}"], token=token)
        return sorted(str(p.relative_to(folder)) for p in folder.rglob(f"*{suffix}"))
    with _hub_errors(repo, None):
        return [name for name in HfApi(token=token).list_repo_files(repo) if name.endswith(suffix)]


def fetch_pipeline(
    repo: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """The folder of a pipeline in the cache, with the files that diffusers would load.

    Safe to call from every rank at once: the Hub's own file locks let one download and the
    others wait. With ``HF_HUB_OFFLINE=1`` only the cache is looked at.

    Raises:
        UsageError: also where there are no safetensors, see `fetch_file`.
        HubError: the Hub could not be reached.
    """
    from diffusers import DiffusionPipeline

    with _hub_errors(repo, revision):
        return Path(
            DiffusionPipeline.download(
                repo,
                variant=variant,
                revision=revision,
                token=token,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=trust_remote_code,
            )
        )


def remote_dtypes(
    repo: str, files: Iterable[str], *, revision: str | None = None, token: str | None = None
) -> dict[str, int] | None:
    """safetensors' dtype names → elements, of the first of these files that the Hub has.

    Only its header is fetched. ``None``: it has none of them.

    Raises:
        UsageError, HubError: see `fetch_file`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        try:
            with _hub_errors(repo, revision, missing_is_fine=True):
                found = HfApi(token=token).parse_safetensors_file_metadata(
                    repo, file, revision=revision
                )
        except EntryNotFoundError:
            continue
        return {str(kind): count for kind, count in found.parameter_count.items()}
    return None


@contextmanager
def _hub_errors(
    repo: str, revision: str | None, *, missing_is_fine: bool = False
) -> Iterator[None]:
    """Turns what huggingface_hub and diffusers raise into errors that name the fix."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = _explained(error, repo, revision)
        if found is None or (missing_is_fine and _is_missing_entry(error)):
            raise
        raise found from error


def _is_missing_entry(error: Exception) -> bool:
    from huggingface_hub import errors as hub

    return isinstance(error, hub.EntryNotFoundError) and not isinstance(
        error, hub.LocalEntryNotFoundError
    )


def _explained(error: Exception, repo: str, revision: str | None) -> DdinferError | None:
    from huggingface_hub import errors as hub

    at = f"{repo} at revision {revision}" if revision else repo
    offline = os.environ.get("HF_HUB_OFFLINE")
    why = f"HF_HUB_OFFLINE={offline} is set" if offline else "the Hub cannot be reached"
    explained: list[tuple[Any, str]] = [  # the most specific kinds first
        (
            hub.GatedRepoError,
            f"{at} is gated: accept its terms on the Hub, then pass --token (or run hf auth login)",
        ),
        (
            (hub.RepositoryNotFoundError, hub.HFValidationError),
            f"{repo} is neither a folder on this machine nor a repository on the Hub "
            "(or it is private: pass --token)",
        ),
        (hub.RevisionNotFoundError, f"{repo} has no revision {revision!r}"),
        (
            (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled),
            f"{at} is neither a folder on this machine nor complete in the Hub cache, and {why}",
        ),
        (
            hub.EntryNotFoundError,
            f"{at} has no {MODEL_INDEX}: not a diffusers pipeline (a single-file checkpoint "
            "must be converted first, see from_single_file and save_pretrained of diffusers)",
        ),
    ]
    for kinds, message in explained:
        if isinstance(error, kinds):
            return UsageError(message)
    if isinstance(error, hub.HfHubHTTPError):
        return HubError(f"{at}: the Hub answered with an error: {error}")
    if isinstance(error, OSError) and "safetensors" in str(error):
        return UsageError(
            f"{at} has no safetensors weights: {error}. Pickled weights can run code when "
            "read; if you trust them, pass --allow_pickle"
        )
    if isinstance(error, (ConnectionError, TimeoutError)):
        return HubError(f"{at}: the Hub cannot be reached: {error}")
    return None
