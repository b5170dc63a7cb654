"""Checkpoints of a run: written whole or not at all, verified when read."""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from server.errors import CheckpointError
from strategies.files import sync
from strategies.messages import Arrays

logger = logging.getLogger(f"clipward.{__name__}")

VERSION = 1
_ARRAYS, _MANIFEST = "arrays.safetensors", "manifest.json"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"round-(\d{4,})")


class Checkpoint(NamedTuple):
    """The state of a run after a round; round 0 is the start.

    Attributes:
        server_round: The last round whose result is in ``arrays``.
        arrays: The trainable weights.
        manifest: ``version``, ``round``, ``sha256`` of the arrays file, and the state given to `save`.
    """

    server_round: int
    arrays: Arrays
    manifest: Mapping[str, Any]


class _TornError(ValueError):
    """The folder is not a whole checkpoint."""


def save(
    run_dir: Path, server_round: int, arrays: Arrays, state: Mapping[str, Any], *, keep: int = 3
) -> Path:
    """Write ``checkpoints/round-0007/`` and prune what is older.

    Guarantees:
        A crash at any moment leaves either no such folder or a whole one: files and folder are synced to the
        disk before the rename, and nothing older is removed before the new one is durable.

    Args:
        run_dir: Folder of the run; made when missing.
        server_round: Names the folder.
        arrays: The trainable weights.
        state: JSON values for the manifest.
        keep: How many of the newest checkpoints stay.

    Returns:
        The folder.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    sync(run_dir)
    _remove_temporaries(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_TEMPORARY))
    save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, temporary / _ARRAYS)
    manifest = {"version": VERSION, "round": server_round, "sha256": _sha256(temporary / _ARRAYS), **state}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", "utf-8")
    for path in (temporary / _ARRAYS, temporary / _MANIFEST, temporary):
        sync(path)
    target = folder / f"round-{server_round:04d}"
    if target.exists():  # what an earlier life of this run left torn, else it would have been loaded
        target.rename(tempfile.mkdtemp(dir=folder, prefix=_TEMPORARY))
    temporary.chmod(0o755)  # mkdtemp's 0700 would hide it from the people it is written for
    temporary.rename(target)
    sync(folder)
    for _, old in list(_newest_first(folder))[keep:]:
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
        if written != server_round or _sha256(path / _ARRAYS) != manifest["sha256"]:
            raise _TornError("its arrays or its name are not those of its manifest")
        return Checkpoint(server_round, load_file(path / _ARRAYS), manifest)
    except (OSError, KeyError, SafetensorError):
        raise _TornError("its arrays are missing or damaged") from None


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
