"""Checkpoints of a run: written whole or not at all, verified when read."""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from server.errors import CheckpointError
from strategies.files import sync, write_text
from strategies.messages import Arrays

logger = logging.getLogger(f"clipward.{__name__}")

VERSION = 2
_ARRAYS, _STRATEGY, _MANIFEST = "arrays.safetensors", "strategy.safetensors", "manifest.json"
_BEST = "best.json"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"round-(\d{4,})")


class Checkpoint(NamedTuple):
    """The state of a run after a round; round 0 is the start.

    Attributes:
        server_round: The last round whose result is in ``arrays``.
        arrays: The trainable weights.
        strategy: The state of the strategy; empty where it has none.
        manifest: ``version``, ``round``, ``sha256`` of each file of arrays, and the facts given to `save`.
    """

    server_round: int
    arrays: Arrays
    strategy: Arrays
    manifest: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Best:
    """Which checkpoint is the best so far, by what measure."""

    server_round: int
    metric: str
    value: float


class _TornError(ValueError):
    """The folder is not a whole checkpoint."""


def save(run_dir: Path, done: Checkpoint, *, keep: int = 3, keep_every: int = 0) -> Path:
    """Write ``checkpoints/round-0007/`` and prune what is older.

    Guarantees:
        A crash at any moment leaves either no such folder or a whole one: files and folder are synced to the
        disk before the rename, and nothing older is removed before the new one is durable. The newest and
        the one that `name_best` named are never removed.

    Args:
        run_dir: Folder of the run; made when missing.
        done: What to write; its manifest holds JSON values.
        keep: How many of the newest checkpoints stay.
        keep_every: Rounds that are a multiple of it stay too; 0: none.

    Returns:
        The folder.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    sync(run_dir)
    _remove_temporaries(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_TEMPORARY))
    digests = {_ARRAYS: _write(temporary / _ARRAYS, done.arrays)}
    if done.strategy:
        digests[_STRATEGY] = _write(temporary / _STRATEGY, done.strategy)
    manifest = {**done.manifest, "version": VERSION, "round": done.server_round, "sha256": digests}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", "utf-8")
    for path in (*(temporary / name for name in digests), temporary / _MANIFEST, temporary):
        sync(path)
    target = folder / f"round-{done.server_round:04d}"
    if target.exists():  # what an earlier life of this run left torn, else it would have been loaded
        target.rename(tempfile.mkdtemp(dir=folder, prefix=_TEMPORARY))
    temporary.chmod(0o755)  # mkdtemp's 0700 would hide it from the people it is written for
    temporary.rename(target)
    sync(folder)
    for old in _dispensable(folder, keep=keep, keep_every=keep_every):
        old.rename(tempfile.mkdtemp(dir=folder, prefix=_TEMPORARY))  # in one move: half removed it were torn
    _remove_temporaries(folder)
    return target


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint, its digest verified; a torn one is passed over with a warning.

    Raises:
        CheckpointError: it was written by another version of this program.
    """
    for server_round, path in _newest_first(run_dir / "checkpoints"):
        try:
            return _load(path, server_round)
        except _TornError as error:
            logger.warning("passed over checkpoint %s: %s", path.name, error)
    return None


def name_best(run_dir: Path, best: Best) -> None:
    """Name the best checkpoint in ``checkpoints/best.json``; from then on it is kept."""
    document = {"version": VERSION, "round": best.server_round, "metric": best.metric, "value": best.value}
    write_text(run_dir / "checkpoints" / _BEST, json.dumps(document, allow_nan=False) + "\n")


def best_of(run_dir: Path) -> Best | None:
    """Which checkpoint was named the best; None: none was.

    Raises:
        CheckpointError: the file that names it cannot be read.
    """
    path = run_dir / "checkpoints" / _BEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r}")
        return Best(
            server_round=int(found["round"]), metric=str(found["metric"]), value=float(found["value"])
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it") from error


def load_best(run_dir: Path) -> Checkpoint | None:
    """The checkpoint that was named the best, its digest verified; None: none was.

    Raises:
        CheckpointError: it is torn, or it was written by another version of this program.
    """
    best = best_of(run_dir)
    if best is None:
        return None
    path = run_dir / "checkpoints" / f"round-{best.server_round:04d}"
    try:
        return _load(path, best.server_round)
    except _TornError as error:
        raise CheckpointError(f"the best checkpoint {path} cannot be used: {error}") from error


def sweep(run_dir: Path) -> None:
    """Remove what a killed `save` left half done, for a run that will save nothing more."""
    _remove_temporaries(run_dir / "checkpoints")


def newest_round(run_dir: Path) -> int | None:
    """The round of the newest checkpoint, whole or torn; None: there is none."""
    return next((server_round for server_round, _ in _newest_first(run_dir / "checkpoints")), None)


def _load(path: Path, server_round: int) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        version, written = manifest["version"], manifest["round"]
    except (OSError, ValueError, TypeError, KeyError):
        raise _TornError("its manifest is missing or damaged") from None
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version!r}, this program reads {VERSION}: "
            "continue the run with the program that wrote it, or start it anew in another folder"
        )
    try:
        digests = manifest["sha256"]
        if written != server_round or any(_sha256(path / name) != digests[name] for name in digests):
            raise _TornError("its arrays or its name are not those of its manifest")
        strategy = load_file(path / _STRATEGY) if _STRATEGY in digests else {}
        return Checkpoint(server_round, load_file(path / _ARRAYS), strategy, manifest)
    except (OSError, KeyError, TypeError, SafetensorError):
        raise _TornError("its arrays are missing or damaged") from None


def _dispensable(folder: Path, *, keep: int, keep_every: int) -> Iterator[Path]:
    best = best_of(folder.parent)
    for server_round, path in list(_newest_first(folder))[max(1, keep) :]:
        is_best = best is not None and best.server_round == server_round
        if not is_best and not (keep_every and server_round % keep_every == 0):
            yield path


def _write(path: Path, arrays: Arrays) -> str:
    """Write arrays; the digest of the file."""
    save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, path)
    return _sha256(path)


def _newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    names = {path: _NAME.fullmatch(path.name) for path in folder.glob("round-*")}
    rounds = [(int(match[1]), path) for path, match in names.items() if match]
    yield from sorted(rounds, reverse=True)


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
