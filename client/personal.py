"""Weights that a site trains and keeps: they never leave, and the next round goes on from them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

from strategies.files import sync
from strategies.messages import Arrays

_KEPT_ROUNDS = 2  # the last, and the one before it for a round that is asked again


@dataclass(frozen=True, kw_only=True)
class PersonalWeights:
    """A site's own weights in one run, by round. What is written survives a power failure.

    They are made by noised steps as the release is, so what follows from them in later rounds costs nothing
    more.
    """

    folder: Path

    def before(self, server_round: int) -> Arrays | None:
        """The newest of an earlier round; None: there is none, the site starts as all do."""
        earlier = [path for number, path in self._rounds() if number < server_round]
        return load_file(earlier[-1]) if earlier else None

    def store(self, server_round: int, arrays: Arrays) -> None:
        """Keep this round's, in place of those that an earlier try of the round left."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
        try:
            save_file(arrays, partial)
            sync(partial)
            partial.replace(self.folder / f"{server_round:06d}.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        sync(self.folder)
        for _, path in self._rounds()[:-_KEPT_ROUNDS]:
            path.unlink()

    def _rounds(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.folder.glob("[0-9]*.safetensors"))
