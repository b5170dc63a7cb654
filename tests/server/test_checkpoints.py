import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import checkpoints
from server.checkpoints import load_latest, newest_round, save
from server.errors import CheckpointError
from strategies import files
from strategies.messages import Arrays, digest_of

ARRAYS: Arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(1.5, dtype=np.float32)}


def rounds(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 7, ARRAYS, {"bundle": "ab", "learning-rate": 1e-3})
    assert path == tmp_path / "run" / "checkpoints" / "round-0007"
    done = load_latest(tmp_path / "run")
    assert done is not None
    server_round, arrays, manifest = done
    assert server_round == 7
    assert digest_of(arrays) == digest_of(ARRAYS)
    assert {name: manifest[name] for name in ("version", "round", "bundle", "learning-rate")} == {
        "version": 1,
        "round": 7,
        "bundle": "ab",
        "learning-rate": 1e-3,
    }


def test_any_memory_layout_is_saved_as_what_it_means(tmp_path: Path) -> None:
    values: Arrays = {"t": ARRAYS["a"].T, "s": np.arange(9, dtype=np.float32)[::-2]}
    save(tmp_path, 1, values, {})
    done = load_latest(tmp_path)
    assert done is not None
    assert all(np.array_equal(done.arrays[name], value) for name, value in values.items())


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nowhere") is None
    assert newest_round(tmp_path / "nowhere") is None


def test_the_newest_is_loaded_and_the_last_three_stay(tmp_path: Path) -> None:
    for server_round in range(12):
        save(tmp_path, server_round, {"a": np.full(1, server_round, dtype=np.float32)}, {})
    assert rounds(tmp_path) == ["round-0009", "round-0010", "round-0011"]
    done = load_latest(tmp_path)
    assert done is not None
    assert (done.server_round, done.arrays["a"][0]) == (11, 11.0)
    assert newest_round(tmp_path) == 11


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for server_round in (9_999, 10_000):
        save(tmp_path, server_round, ARRAYS, {}, keep=1)
    assert rounds(tmp_path) == ["round-10000"]


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"version": 1, "rou')


def list_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def no_digest(path: Path) -> None:
    (path / "manifest.json").write_text('{"version": 1, "round": 2}')


def remove_arrays(path: Path) -> None:
    (path / "arrays.safetensors").unlink()


def cut_arrays(path: Path) -> None:
    content = (path / "arrays.safetensors").read_bytes()
    (path / "arrays.safetensors").write_bytes(content[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "arrays.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "arrays.safetensors").write_bytes(content)


def come_from_another_round(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("round-0001"), path)


@pytest.mark.parametrize(
    "damage",
    [
        remove_manifest,
        cut_manifest,
        list_manifest,
        no_digest,
        remove_arrays,
        cut_arrays,
        flip_a_bit,
        come_from_another_round,
    ],
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, ARRAYS, {})
    damage(save(tmp_path, 2, ARRAYS, {}))
    with caplog.at_level(logging.WARNING, logger="clipward"):
        done = load_latest(tmp_path)
    assert done is not None
    assert done.server_round == 1
    assert "passed over checkpoint round-0002" in caplog.text


def test_a_torn_checkpoint_is_replaced_when_its_round_is_done_again(tmp_path: Path) -> None:
    save(tmp_path, 1, ARRAYS, {})
    flip_a_bit(save(tmp_path, 2, ARRAYS, {}))
    save(tmp_path, 2, ARRAYS, {})
    done = load_latest(tmp_path)
    assert done is not None
    assert done.server_round == 2
    assert rounds(tmp_path) == ["round-0001", "round-0002"]


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 2, ARRAYS, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(CheckpointError, match="round-0002 has version 0, this program reads 1"):
        load_latest(tmp_path)


@pytest.mark.parametrize("step", ["save_file", "_sha256", "sync", "os.rename", "shutil.rmtree"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_crash_at_any_step_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    for server_round in range(3):
        save(tmp_path, server_round, ARRAYS, {})
    new = {name: -value.T for name, value in ARRAYS.items()}
    new["b"] = np.array(2.5, dtype=np.float32)
    with monkeypatch.context() as patched:
        crash_in(patched, step, call)
        try:
            save(tmp_path, 3, new, {})
            crashed = False
        except InterruptedError:
            crashed = True
    done = load_latest(tmp_path)
    assert done is not None
    assert digest_of(done.arrays) == digest_of(new if done.server_round == 3 else ARRAYS)
    assert done.server_round == 3 if not crashed else done.server_round in (2, 3)
    save(tmp_path, done.server_round + 1, new, {})
    assert len(rounds(tmp_path)) == 3


def crash_in(patched: pytest.MonkeyPatch, step: str, call: int) -> None:
    """Make the n-th call of a step die before it does anything."""
    left = [call]
    owner, name = {
        "save_file": (checkpoints, "save_file"),
        "_sha256": (checkpoints, "_sha256"),
        "sync": (checkpoints, "sync"),
        "os.rename": (os, "rename"),
        "shutil.rmtree": (shutil, "rmtree"),
    }[step]
    real = getattr(owner, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedError
        return real(*arguments, **named)

    patched.setattr(owner, name, dying)


def test_everything_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = files.sync, os.rename

    def watched_sync(path: Path) -> None:
        done.append(path.name if not path.name.startswith(".tmp-") else "temporary")
        sync(path)

    def watched_rename(source: Any, target: Any) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(checkpoints, "sync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    save(tmp_path, 1, ARRAYS, {})
    assert done[-5:] == ["arrays.safetensors", "manifest.json", "temporary", "rename", "checkpoints"]


def test_temporaries_of_a_crash_are_removed_and_foreign_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-old").mkdir(parents=True)
    (folder / ".tmp-old" / "arrays.safetensors").touch()
    (folder / "round-notes.txt").touch()
    save(tmp_path, 1, ARRAYS, {})
    assert rounds(tmp_path) == ["round-0001", "round-notes.txt"]


def test_a_crash_while_an_old_checkpoint_is_removed_leaves_none_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server_round in range(3):
        save(tmp_path, server_round, ARRAYS, {})

    def half(path: Path) -> None:
        (Path(path) / "arrays.safetensors").unlink()
        raise InterruptedError

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(InterruptedError):
        save(tmp_path, 3, ARRAYS, {})
    left = [checkpoints._load(path, int(path.name[6:])) for path in tmp_path.glob("checkpoints/round-*")]
    assert sorted(one.server_round for one in left) == [1, 2, 3]
