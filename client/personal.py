"""Weights that a site trains and keeps: they never leave, and the next round goes on from them."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from client.releases import RELEASES, ReleaseStore
from client.site import Site
from strategies.files import sync
from strategies.messages import Arrays

PERSONAL = "personal"  # in the site's folder
_KEPT_ROUNDS = 2  # the last, and the one before it for a round that is asked again


def personal_weights(site: Site, run: str) -> "PersonalWeights":
    """What the site keeps of a run."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]  # the coordinator's words name no path
    releases = ReleaseStore(folder=site.folder / RELEASES)
    return PersonalWeights(folder=site.folder / PERSONAL / name, released=releases.has)


@dataclass(frozen=True, kw_only=True)
class PersonalWeights:
    """A site's own weights in one run, by round. What is written survives a power failure.

    They are made by noised steps as the release is, so what follows from them in later rounds costs nothing
    more. That is true of the one training that was charged: weights of a request count from the moment that
    its release is stored, so what a killed process left, whose request will be trained again under the same
    charge, is never used.

    Attributes:
        folder: Of the run; made when missing.
        released: Whether there is a release for the request of this digest.
    """

    folder: Path
    released: Callable[[str], bool]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder: of two processes with one request the second finds the release of the first."""
        self._make()
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def before(self, server_round: int) -> Arrays | None:
        """The newest of an earlier round; None: there is none, the site starts as all do."""
        earlier = [path for path in self._that_count() if _round(path) < server_round]
        return load_file(earlier[-1]) if earlier else None

    def newest(self) -> tuple[Arrays, dict[str, str]] | None:
        """The weights of the last round, and what was stored about them; None: there are none."""
        paths = self._that_count()
        if not paths:
            return None
        with safe_open(paths[-1], framework="numpy") as file:
            return load_file(paths[-1]), dict(file.metadata() or {})

    def store(
        self,
        server_round: int,
        arrays: Arrays,
        *,
        request: str = "",
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Keep this round's, in place of those that an earlier try of the round left.

        Args:
            server_round: The round.
            arrays: Its weights.
            request: Digest of the request whose release they belong to; empty: there is none to wait for.
            about: What it takes to use them.
        """
        self._make()
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
        target = self.folder / f"{server_round:06d}{request and '-'}{request}.safetensors"
        try:
            save_file(arrays, partial, metadata=dict(about or {}))
            sync(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        sync(self.folder)
        rounds = self._rounds()
        tried_before = [path for path in rounds if _round(path) == server_round and path != target]
        for path in (*tried_before, *rounds[: -_KEPT_ROUNDS - len(tried_before)]):
            path.unlink(missing_ok=True)

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _that_count(self) -> list[Path]:
        requests = {path: path.stem.partition("-")[2] for path in self._rounds()}
        return [path for path, request in requests.items() if not request or self.released(request)]

    def _rounds(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.partition("-")[0])
