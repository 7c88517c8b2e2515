"""A model on the Hub whose shards come one at a time: each is fetched, verified, encoded and removed before the next.

The headers of all shards are read first, by ranges, so that the whole file is planned before any weight comes. What a
shard's tensors need of another one (scales, zero points, the order of groups) is fetched by ranges too, and compared
with that other shard when it is there: nothing gets its name before every byte that it is made of was verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Self

from app.errors import StorageError, UsageError, VerificationError
from app.models import hub, hub_transfer
from quantize.checkpoint import Checkpoint, StoredTensor, Told, Wanted, read_header
from quantize.source import Source
from quantize.tensors import Part

_COPIED_AT_ONCE = 1 << 22


def open_streamed(path: Path, workplace: Path) -> tuple[Source, StreamedCheckpoint]:
    """Fetch the small files of a model on the Hub into a folder, and the headers of its shards; no weight comes yet.

    Raises `UsageError` for what is not on the Hub, or if it must not be asked, and what `hub.fetch` raises.
    """
    model = None if path.exists() else hub.parse(str(path))
    if model is None:
        raise UsageError(f"--no-cache is for a model on the Hub, org/name[@revision]; {path} is none", param="no-cache")
    if hub.is_offline():
        raise UsageError(
            f"--no-cache fetches {model.repo} from the Hub, which HF_HUB_OFFLINE forbids; leave out one of the two",
            param="no-cache",
        )
    with hub.explained(model):
        remote = Remote(hub.find(model), workplace)
        for file in remote.listing.small_files():
            remote.place(file.rfilename)
        elsewhere = {name: remote.header for name in hub.shards_of(remote.listing, workplace) if not remote.link(name)}
        checkpoint = Checkpoint.open(workplace, elsewhere)
    source = Source(workplace, kind="hub", repository=model.repo, commit=remote.listing.commit)
    return source, StreamedCheckpoint(checkpoint.tensors, checkpoint.shards, remote)


class Remote:
    """A model's files on the Hub, and a folder where they are put. What the shared cache has is linked from there."""

    def __init__(self, listing: hub.Listing, folder: Path) -> None:
        self.listing = listing
        self.folder = folder
        self._headers: dict[str, tuple[int, bytes]] = {}

    def link(self, name: str) -> bool:
        """Put a file of the shared cache into the folder, as a link. Returns whether there is such a file."""
        hub.check_name(self.listing.model, name)
        cached = hub.in_cache(self.listing, name)
        if cached is None or cached.stat().st_size != hub_transfer.size_of(self.listing, name):
            return False
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(cached)
        return True

    def place(self, name: str) -> None:
        """Put a file into the folder, from the shared cache or from the Hub."""
        if not self.link(name):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.fetch(name, lambda _: None)

    def fetch(self, name: str, told: Told) -> None:
        """Put a file from the Hub into the folder. If it is not what the Hub and its header said, it is removed."""
        path = self.folder / name
        with hub.explained(self.listing.model):
            try:
                with path.open("xb", buffering=0) as file:
                    place = 0

                    def take(piece: bytes) -> None:
                        nonlocal place
                        self._write(file.fileno(), piece, place)
                        place += len(piece)
                        told(len(piece))

                    hub_transfer.fetch(self.listing, name, take)
                self._check_header(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def _write(self, file: int, piece: bytes, offset: int) -> None:
        rest = memoryview(piece)
        try:
            while rest:
                written = os.pwrite(file, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise StorageError(
                f"{self.folder.parent}: cannot keep a shard here until it is encoded: {error.strerror}"
            ) from error

    def header(self, path: Path) -> tuple[int, bytes]:
        """Return a shard's size and its bytes up to the data. Unverified: `fetch` compares them with what comes."""
        name = path.name
        hub.check_name(self.listing.model, name)
        size = hub_transfer.size_of(self.listing, name)
        header = read_header(path, size, lambda count: hub_transfer.read(self.listing, name, count))
        self._headers[name] = (len(header), hashlib.sha256(header).digest())
        return size, header

    def _check_header(self, path: Path) -> None:
        if path.name in self._headers:
            length, digest = self._headers[path.name]
            with path.open("rb") as file:
                if hashlib.sha256(file.read(length)).digest() != digest:
                    raise VerificationError(
                        f"{self.listing.model.repo}: {path.name} has another header than when it was asked for alone"
                    )

    def copy(self, tensor: StoredTensor, file: int, offset: int) -> bytes:
        """Write a tensor's bytes to a place in a file, by a range or from the shared cache. Returns their sha256."""
        digest, place = hashlib.sha256(), offset

        def take(piece: bytes) -> None:
            nonlocal place
            digest.update(piece)
            self._write(file, piece, place)
            place += len(piece)

        if tensor.shard.is_symlink():
            with tensor.shard.open("rb") as local:
                local.seek(tensor.offset)
                for first in range(0, tensor.nbytes, _COPIED_AT_ONCE):
                    take(local.read(min(_COPIED_AT_ONCE, tensor.nbytes - first)))
        else:
            with hub.explained(self.listing.model):
                hub_transfer.fetch_range(self.listing, tensor.shard.name, tensor.offset, tensor.nbytes, take)
        return digest.digest()


@dataclasses.dataclass(slots=True)
class _Round:
    """A shard, what its weights need of others, and what others need of it. Unless `fetched`, the cache has it."""

    shard: Path
    size: int
    fetched: bool
    companions: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    lent: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        """What it takes on the disk while it is there."""
        return (self.size if self.fetched else 0) + sum(tensor.nbytes for tensor in self.companions.values())


class StreamedCheckpoint(Checkpoint):
    """The tensors of a model on the Hub. Weights can be read in `rounds` only, those that a round speaks of."""

    def __init__(self, tensors: dict[str, StoredTensor], shards: list[Path], remote: Remote) -> None:
        super().__init__(tensors, shards)
        self._remote = remote
        self._companions: dict[str, StoredTensor] = {}
        self._digests: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        """Open nothing: `rounds` does."""
        return self

    def rounds(self, parts: Sequence[Part], told: Told) -> Generator[Wanted]:
        """Fetch one shard after the other, each with what its weights need of others; yield which parts it holds.

        Raises as `hub.fetch` does. A shard is removed when the next round is asked for, and when there is none.
        """
        rounds = self._rounds(parts)
        if not rounds:
            yield lambda part: part is None
        for number, each in enumerate(rounds):
            with self._here(each, told):
                yield functools.partial(self._holds, each.shard, number == 0)

    def expect(self, parts: Sequence[Part], output: int) -> int:
        """Return the bytes of all shards with anything of use that the cache lacks.

        Raises `StorageError` unless `output` bytes of results and the largest shard have room side by side.
        """
        rounds = self._rounds(parts)
        largest = max((each.disk_bytes for each in rounds), default=0)
        folder = self._remote.folder.parent
        free = shutil.disk_usage(folder).free
        if output + largest > free:
            raise StorageError(
                f"{folder}: {output} bytes are needed for the result and {largest} for the largest shard, "
                f"{free} are free"
            )
        return sum(each.size for each in rounds if each.fetched)

    def stated(self, shard: Path) -> tuple[int, str | None]:
        """Return a shard's size and sha256 as the Hub states them; what is fetched of it is compared with that."""
        listing = self._remote.listing
        lfs = listing.files[shard.name].lfs
        return hub_transfer.size_of(listing, shard.name), lfs.sha256 if lfs else None

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on. Safe to call from several threads."""
        super().read_into(self._companions.get(tensor.name, tensor), offset, buffer)

    def _holds(self, shard: Path, first: bool, part: Part | None) -> bool:
        return first if part is None else self._home(part) == shard

    def _home(self, part: Part) -> Path:
        return self.tensors[part.source].origins[0].shard

    def _rounds(self, parts: Sequence[Part]) -> list[_Round]:
        rounds: dict[Path, _Round] = {}

        def round_of(shard: Path) -> _Round:
            if shard not in rounds:
                size = hub_transfer.size_of(self._remote.listing, shard.name)
                rounds[shard] = _Round(shard, size, fetched=not shard.is_symlink())
            return rounds[shard]

        for part in parts:
            home = round_of(self._home(part))
            for name in part.sources:
                for origin in self.tensors[name].origins:
                    if origin.shard != home.shard:
                        home.companions[origin.name] = origin
                        round_of(origin.shard).lent[origin.name] = origin
        return [rounds[shard] for shard in self.shards if shard in rounds]

    @contextlib.contextmanager
    def _here(self, each: _Round, told: Told) -> Iterator[None]:
        aside = self._remote.folder / f"{each.shard.name}.companions"
        try:
            if each.fetched:
                self._remote.fetch(each.shard.name, told)
            self._files[each.shard] = os.open(each.shard, os.O_RDONLY | os.O_CLOEXEC)
            self._fetch_companions(each, aside)
            for tensor in each.lent.values():
                self._check_same(tensor, self._digest(tensor))
            yield
        finally:
            self.close()
            self._companions.clear()
            aside.unlink(missing_ok=True)
            if each.fetched:
                each.shard.unlink(missing_ok=True)

    def _fetch_companions(self, each: _Round, aside: Path) -> None:
        if not each.companions:
            return
        file = self._files[aside] = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        offset = 0
        for name, tensor in each.companions.items():
            self._check_same(tensor, self._remote.copy(tensor, file, offset))
            self._companions[name] = dataclasses.replace(tensor, shard=aside, offset=offset)
            offset += tensor.nbytes

    def _digest(self, tensor: StoredTensor) -> bytes:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_COPIED_AT_ONCE, tensor.nbytes)))
        for first in range(0, tensor.nbytes, _COPIED_AT_ONCE):
            piece = buffer[: tensor.nbytes - first]
            super().read_into(tensor, first, piece)
            digest.update(piece)
        return digest.digest()

    def _check_same(self, tensor: StoredTensor, digest: bytes) -> None:
        if self._digests.setdefault(tensor.name, digest) != digest:
            raise VerificationError(
                f"{self._remote.listing.model.repo}: the tensor {tensor.name!r} came by itself with other bytes than "
                f"{tensor.shard.name} has"
            )
