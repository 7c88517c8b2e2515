"""Models on the Hugging Face Hub: `org/name[@revision]`, pinned to a commit, fetched into the shared cache, verified.

huggingface-hub does the transfer: it resumes, shares its cache with other programs, and takes the token, the endpoint
and the offline mode from HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. What it does not do is done here: only the files
that a conversion reads are fetched, their names are checked, and what was fetched is hashed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from app.errors import BadInputError, HubUnreachableError, StorageError, VerificationError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

INDEX_NAME = "model.safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?:@[\w][\w./-]{0,254})?", re.ASCII)
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "1_Pooling/config.json")
_MAX_FILES = 10_000
_HASH_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class HubModel:
    """A model's name on the Hub, and a branch, tag or commit of it."""

    repo: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name without its organization."""
        return self.repo.partition("/")[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """What the Hub says of a model's files, by name, at one commit."""

    model: HubModel
    commit: str
    files: dict[str, RepoSibling]

    def small_files(self) -> list[RepoSibling]:
        """Return the files that a conversion reads besides the weights."""
        return [file for name, file in self.files.items() if any(_matches(name, pattern) for pattern in _SMALL_FILES)]


def parse(text: str) -> HubModel | None:
    """Return the model that `org/name[@revision]` means, or None if the text has another form."""
    if not _NAME.fullmatch(text) or ".." in text:
        return None
    repo, _, revision = text.partition("@")
    return HubModel(repo, revision or None)


def fetch(model: HubModel) -> Path:
    """Return the folder of a model's files in the shared cache, fetched and verified as far as they were missing.

    Raises BadInputError for a model that does not exist, is closed to us or has no safetensors, HubUnreachableError
    when the Hub does not answer, StorageError for a full or unwritable disk, VerificationError for a file that is not
    what the Hub says it is; such a file is removed.
    """
    if is_offline():
        return _cached(model)
    with explained(model):
        listing = find(model)
        folder = _fetch_files(listing, listing.small_files())
        _fetch_files(listing, [listing.files[name] for name in shards_of(listing, folder)])
        return folder


def is_offline() -> bool:
    """Make huggingface-hub ready, and tell whether HF_HUB_OFFLINE forbids to ask the Hub anything."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import, and local folders do without
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    if not sys.stderr.isatty():
        disable_progress_bars()
    return bool(constants.HF_HUB_OFFLINE)


def find(model: HubModel) -> Listing:
    """Ask the Hub for a model's commit and files. Raises what huggingface-hub does: see `explained`."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha) or len(files) > _MAX_FILES:
        raise BadInputError(f"{model.repo}: the Hub's answer names no commit, or too many files")
    return Listing(model, info.sha, files)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def shards_of(listing: Listing, folder: Path) -> list[str]:
    """Return the names of a model's safetensors; `folder` holds its index, if it has one. Raises BadInputError."""
    model, files = listing.model, listing.files
    names = {name for name in files if _matches(name, "model*.safetensors")}
    if INDEX_NAME in files:
        try:
            names = set(json.loads((folder / INDEX_NAME).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInputError(f"{model.repo}: {INDEX_NAME} has no usable weight_map: {error!r}") from error
    missing = sorted(str(name) for name in names if name not in files)
    if missing:
        raise BadInputError(f"{model.repo}: {INDEX_NAME} names {', '.join(missing[:5])}, which the repository lacks")
    if not names:
        others = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        found = f"; it has {', '.join(others[:5])}" if others else ""
        raise BadInputError(f"{model.repo}: no model.safetensors and no {INDEX_NAME}{found}: only safetensors are read")
    return sorted(names)


def in_cache(listing: Listing, name: str) -> Path | None:
    """Return where the shared cache has a file of this very commit, or None."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    path = try_to_load_from_cache(listing.model.repo, name, revision=listing.commit)
    return Path(path) if isinstance(path, str) else None


def _fetch_files(listing: Listing, files: Sequence[RepoSibling]) -> Path:
    from huggingface_hub import constants, hf_hub_download  # noqa: PLC0415

    model = listing.model
    for file in files:
        check_name(model, file.rfilename)
    absent = [file for file in files if in_cache(listing, file.rfilename) is None]
    _check_room(Path(constants.HF_HUB_CACHE), sum(file.size or 0 for file in absent))
    folder = Path(constants.HF_HUB_CACHE)
    for file in files:
        path = Path(hf_hub_download(model.repo, file.rfilename, revision=listing.commit))
        depth = len(PurePosixPath(file.rfilename).parts)
        folder = path.parents[depth - 1]
        _verify(model, file, path, whole=file in absent)
    return folder


def check_name(model: HubModel, name: str) -> None:
    """Raise BadInputError for a file's name that leads out of the folder, or that cannot be shown."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts or not name.isprintable():
        raise BadInputError(f"{model.repo}: the repository has a file of the impossible name {name!r}")


def _check_room(cache: Path, needed: int) -> None:
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StorageError(
            f"{cache}: {needed} bytes are needed for the model's files, {free} are free; see HF_HUB_CACHE"
        )


def _verify(model: HubModel, file: RepoSibling, path: Path, *, whole: bool) -> None:
    """Compare a file's size with what the Hub says, and if it is to be looked at as a `whole`, its hash."""
    size = path.stat().st_size
    problem = f"has {size} bytes; the Hub says {file.size}" if file.size is not None and size != file.size else None
    if problem is None and whole:
        digest, expected = expected_digest(file, size)
        found = _digest(path, digest)
        if expected and found != expected:
            problem = f"has the hash {found}; the Hub says {expected}"
    if problem is not None:
        with contextlib.suppress(OSError):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise VerificationError(f"{model.repo}: {file.rfilename} {problem}. It was removed from the cache; try again")


def expected_digest(file: RepoSibling, size: int) -> tuple[hashlib._Hash, str | None]:
    """Return the beginning of a hash over a file's `size` bytes, and what the Hub says that it will be, in hex."""
    if file.lfs:
        return hashlib.sha256(), file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.blob_id  # as git names its content


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _cached(model: HubModel) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with explained(model):
        folder = Path(snapshot_download(model.repo, revision=model.revision, local_files_only=True))
        if not (folder / "config.json").is_file():
            raise BadInputError(f"{model.repo}: not whole in the cache, and HF_HUB_OFFLINE forbids to fetch the rest")
        return folder


@contextlib.contextmanager
def explained(model: HubModel) -> Iterator[None]:
    """Turn the exceptions of huggingface-hub into ours."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    named = f"{model.repo}{'@' + model.revision if model.revision else ''}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadInputError(f"{named}: gated; accept its terms on the Hub, then set HF_TOKEN to your token") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInputError(
            f"{named}: no such folder here and no such model on the Hub, or a private one: then set HF_TOKEN"
        ) from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise BadInputError(f"{named}: the Hub has no such revision or file: {_first_line(error)}") from error
    except errors.HFValidationError as error:
        raise BadInputError(f"{named}: not a name on the Hub: {_first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubUnreachableError(
            f"{named}: not in the cache, and the Hub cannot be asked: {_first_line(error)}"
        ) from error
    except (errors.HfHubHTTPError, httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise HubUnreachableError(f"{named}: the Hub does not answer as it should: {_first_line(error)}") from error
    except BrokenPipeError:
        raise  # who was told of the progress is gone
    except OSError as error:
        if error.errno is None:  # raised by huggingface-hub itself: what came is shorter or longer than announced
            raise HubUnreachableError(f"{named}: the transfer failed: {_first_line(error)}") from error
        raise StorageError(f"{error.filename or named}: {error.strerror or error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
