"""Public bundles on disk, kept by digest: the model a run starts from and its anchors."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

from strategies.files import sync
from strategies.messages import PublicBundle


class BundleMissing(ValueError):
    """No whole bundle of this digest is in the folder."""


@dataclass(frozen=True, kw_only=True)
class BundleStore:
    """A folder of public bundles."""

    folder: Path

    def has(self, digest: str) -> bool:
        """Whether the bundle of this digest is here, whole."""
        return (self._path(digest) / "bundle.json").is_file()

    def store(self, bundle: PublicBundle) -> str:
        """Keep ``bundle``; returns its digest. A crash leaves a whole bundle or none."""
        digest = bundle.digest
        if self.has(digest):
            return digest
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self.folder, prefix=".partial-"))
        try:
            save_file(bundle.arrays(), partial / "arrays.safetensors")
            facts = {"version": 1, **bundle.facts()}
            (partial / "bundle.json").write_text(json.dumps(facts), encoding="utf-8")
            for written in (*partial.iterdir(), partial):
                sync(written)
            os.replace(partial, self._path(digest))
            sync(self.folder)
        except OSError:
            if not self.has(digest):  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return digest

    def load(self, digest: str) -> PublicBundle:
        """The bundle of this digest.

        Raises:
            BundleMissing: it was never stored here, or is not what its name says.
        """
        if not self.has(digest):
            raise BundleMissing(f"public bundle {digest[:12]} was never stored here")
        facts = json.loads((self._path(digest) / "bundle.json").read_text(encoding="utf-8"))
        bundle = PublicBundle.parse(facts, load_file(self._path(digest) / "arrays.safetensors"))
        if bundle.digest != digest:
            raise BundleMissing(f"public bundle {digest[:12]} was changed on disk; delete its folder")
        return bundle

    def _path(self, digest: str) -> Path:
        return self.folder / digest
