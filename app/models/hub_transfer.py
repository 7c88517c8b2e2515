"""Takes files of a model on the Hub piece by piece, past the shared cache: resumed where they are cut off, verified.

Nothing here writes to the disk: pieces are handed on in their order, as they come. No answer of the server is believed
before it was compared with what was asked for, and with the size and the hash in the Hub's listing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from app.errors import HubUnreachableError, VerificationError
from app.models.hub import Listing, expected_digest

if TYPE_CHECKING:
    import httpx2

Take = Callable[[bytes], None]
"""Is given a piece of a file, right after the one before it."""

_ATTEMPTS = 5
_ATTEMPT_BYTES = 1 << 16  # an attempt that brought no more than that has failed: a server cannot drip for ever
_PAUSE_SECONDS = 0.5
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def fetch(listing: Listing, name: str, take: Take) -> None:
    """Take a whole file. Raises VerificationError after its last piece if its hash is not what the Hub says.

    Also raises HubUnreachableError when the Hub does not answer as it should, and what huggingface-hub does.
    """
    size = size_of(listing, name)
    digest, expected = expected_digest(listing.files[name], size)
    if not expected:
        raise VerificationError(f"{listing.model.repo}: the Hub does not say the hash of {name}")

    def hashed(piece: bytes) -> None:
        digest.update(piece)
        take(piece)

    _receive(listing, name, 0, size, hashed)
    if digest.hexdigest() != expected:
        raise VerificationError(
            f"{listing.model.repo}: {name} has the hash {digest.hexdigest()}; the Hub says {expected}. It was removed; "
            "try again"
        )


def fetch_range(listing: Listing, name: str, first: int, count: int, take: Take) -> None:
    """Take bytes `first` to `first + count` of a file, unverified. Raises as `fetch` does."""
    _receive(listing, name, first, first + count, take)


def read(listing: Listing, name: str, count: int) -> bytes:
    """Return the first bytes of a file, unverified. Raises as `fetch` does."""
    out = bytearray()
    fetch_range(listing, name, 0, count, out.extend)
    return bytes(out)


def size_of(listing: Listing, name: str) -> int:
    """Return a file's size in bytes, as the Hub says it. Raises VerificationError if it does not."""
    size = listing.files[name].size
    if size is None or size < 0:
        raise VerificationError(f"{listing.model.repo}: the Hub does not say the size of {name}")
    return size


def _receive(listing: Listing, name: str, first: int, end: int, take: Take) -> None:
    import httpx2  # noqa: PLC0415 - slow to import, and local folders do without
    from huggingface_hub import errors  # noqa: PLC0415

    at, failures = first, 0
    while at < end:
        began, reason = at, "it ended too early"
        try:
            for piece in _pieces(listing, name, at, end):
                take(piece)
                at += len(piece)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            reason = str(error) or type(error).__name__
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            reason = f"status {error.response.status_code}"
        if at == end:
            return
        failures = failures + 1 if at - began <= _ATTEMPT_BYTES else 0
        if failures >= _ATTEMPTS:
            raise HubUnreachableError(
                f"{listing.model.repo}: the transfer of {name} stopped at byte {at} of {size_of(listing, name)}, and "
                f"{_ATTEMPTS} attempts in a row did not help: {reason}"
            )
        time.sleep(_PAUSE_SECONDS * failures)


def _pieces(listing: Listing, name: str, at: int, end: int) -> Iterator[bytes]:
    """Yield what one request brings of bytes `at` to `end`, from `at` on."""
    from huggingface_hub import constants, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415 - exported, but not to mypy
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(listing.model.repo, name, revision=listing.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    size = size_of(listing, name)
    if at > 0 or end < size:
        headers["Range"] = f"bytes={at}-{'' if end == size else end - 1}"
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(), retry_on_status_codes=(408, 429),
    ) as response:  # fmt: skip
        hf_raise_for_status(response)
        place = _place(listing, name, at, response)
        for piece in response.iter_raw():
            begin, place = place, place + len(piece)
            if place > end == size:
                raise VerificationError(f"{listing.model.repo}: {name} has more bytes than the {end} that the Hub says")
            yield piece[max(at - begin, 0) : max(end - begin, 0)]  # a range that is ignored brings what we have already
            if place >= end < size:
                return


def _place(listing: Listing, name: str, at: int, response: httpx2.Response) -> int:
    """Return with which byte of the file an answer begins. Raises if it is not one to what was asked."""
    size = size_of(listing, name)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubUnreachableError(f"{listing.model.repo}: {name} comes compressed, which was not asked for")
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != at:
            raise HubUnreachableError(
                f"{listing.model.repo}: asked for {name} from byte {at} on, the Hub sends "
                f"{response.headers.get('Content-Range', 'it')!r}"
            )
        place, stated = at, match[2]
    elif response.status_code == 200:
        place, stated = 0, response.headers.get("Content-Length", "*")
    else:
        raise HubUnreachableError(f"{listing.model.repo}: {name} is answered with status {response.status_code}")
    if stated not in {"*", str(size)}:
        raise VerificationError(f"{listing.model.repo}: {name} has {stated} bytes; the Hub says {size}")
    return place
