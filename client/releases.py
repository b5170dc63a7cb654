"""Releases on disk, each under the digest of its request: stored before it leaves, never made twice."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save

from strategies.files import sync
from strategies.messages import Release, ReleaseFacts

VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class ReleaseStore:
    """The folder of a site's releases.

    Guarantees:
        For one request there is at most one release, also when two processes store at the same moment:
        the second is given the first's. A stored release survives a power failure.
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

    def store(self, request_digest: str, release: Release) -> Release:
        """Keep ``release`` as the answer to the request, unless there is one: then return that one."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = json.dumps(release.facts.model_dump(mode="json"), sort_keys=True)
        data = save(release.update, metadata={"version": VERSION, "facts": facts})
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".partial")
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

    def _path(self, request_digest: str) -> Path:
        return self.folder / f"{request_digest}.safetensors"
