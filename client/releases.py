"""Releases on disk, each under the digest of its request: stored before it leaves, never made twice.

None is ever pruned: while all releases of a run are kept, the run can be repeated at no cost, and nobody but
its people knows when they are done with it. To delete files by hand is safe at any time: the ledger remembers
the release, so its request is refused from then on instead of being answered with other bytes.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privacy.signing import Anchor
from strategies.files import sync
from strategies.messages import Release, ReleaseFacts

VERSION = "2"
RELEASES = "releases"  # in the site's folder
_WHOLE, _PARTIAL = ".safetensors", ".partial"


@dataclass(frozen=True, kw_only=True)
class ReleaseStore:
    """The folder of a site's releases.

    Guarantees:
        For one request there is at most one release, also when two processes store at the same moment:
        the second is given the first's. A stored release survives a power failure. What a killed process
        left half-written is removed by the next one that stores.
    """

    folder: Path

    def find(self, request_digest: str) -> Release | None:
        """The release that answered this request, if there is one."""
        path = self._path(request_digest)
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            if metadata.get("version") != VERSION:
                raise ValueError(f"release of version {metadata.get('version')}, this code reads {VERSION}")
            update = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return Release(facts=ReleaseFacts.model_validate_json(metadata["facts"]), update=update)

    def has(self, request_digest: str) -> bool:
        """Whether this request was answered by a release."""
        return self._path(request_digest).is_file()

    def store(self, request_digest: str, release: Release) -> Release:
        """Keep ``release`` as the answer to the request, unless there is one: then return that one."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = json.dumps(release.facts.model_dump(mode="json"), sort_keys=True)
        data = save(release.update, metadata={"version": VERSION, "facts": facts})
        with self._writing():
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=_PARTIAL)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, self._path(request_digest))
            except FileExistsError:
                release = self.find(request_digest) or release
            finally:
                os.unlink(temporary)
            sync(self.folder)
        return release

    def anchors(self) -> dict[str, Anchor]:
        """How far the ledger had got when each release was stored, by the name of its file.

        A file that cannot be read, or was written by another version, remembers nothing.
        """
        found = {}
        for path in sorted(self.folder.glob(f"*{_WHOLE}")):
            with suppress(SafetensorError, KeyError, ValueError), safe_open(path, framework="numpy") as file:
                facts = ReleaseFacts.model_validate_json(file.metadata()["facts"])
                if facts.anchor is not None:
                    found[path.name] = facts.anchor
        return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the folder beside others who write; whoever has it alone sweeps what the dead left there."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for partial in self.folder.glob(f"*{_PARTIAL}"):
                    partial.unlink()
            fcntl.flock(folder, fcntl.LOCK_SH)
            yield
        finally:
            os.close(folder)

    def _path(self, request_digest: str) -> Path:
        return self.folder / f"{request_digest}{_WHOLE}"
