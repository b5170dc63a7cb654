import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import checkpoints
from server.checkpoints import Best, Checkpoint, best_of, load_best, load_latest, name_best, newest_round
from server.errors import CheckpointError
from strategies import files
from strategies.messages import Arrays, digest_of

ARRAYS: Arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(1.5, dtype=np.float32)}


def save(
    run_dir: Path, server_round: int, arrays: Arrays, facts: dict[str, Any], *, keep: int = 3, every: int = 0
) -> Path:
    done = Checkpoint(server_round, arrays, {}, facts)
    return checkpoints.save(run_dir, done, keep=keep, keep_every=every)


def rounds(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 7, ARRAYS, {"bundle": "ab", "learning-rate": 1e-3})
    assert path == tmp_path / "run" / "checkpoints" / "round-0007"
    done = load_latest(tmp_path / "run")
    assert done is not None
    server_round, arrays, strategy, manifest = done
    assert strategy == {}
    assert server_round == 7
    assert digest_of(arrays) == digest_of(ARRAYS)
    assert {name: manifest[name] for name in ("version", "round", "bundle", "learning-rate")} == {
        "version": 2,
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
    (path / "manifest.json").write_text('{"version": 2, "rou')


def list_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def no_digest(path: Path) -> None:
    (path / "manifest.json").write_text('{"version": 2, "round": 2}')


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
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(CheckpointError, match="round-0002 has version 1, this program reads 2"):
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


def test_a_run_that_saves_nothing_more_sweeps_what_a_crash_left(tmp_path: Path) -> None:
    checkpoints.sweep(tmp_path / "nowhere")
    save(tmp_path, 1, ARRAYS, {})
    (tmp_path / "checkpoints" / ".tmp-old").mkdir()
    checkpoints.sweep(tmp_path)
    assert rounds(tmp_path) == ["round-0001"]


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


STATE: Arrays = {"optimizer/m/a": np.ones(3, dtype=np.float64), "correction/h": np.zeros(2, dtype=np.float32)}


def with_state(run_dir: Path, server_round: int) -> Path:
    return checkpoints.save(run_dir, Checkpoint(server_round, ARRAYS, STATE, {}))


def test_the_state_of_the_strategy_lies_beside_the_weights_and_is_loaded(tmp_path: Path) -> None:
    path = with_state(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [
        "arrays.safetensors", "manifest.json", "strategy.safetensors",
    ]  # fmt: skip
    done = load_latest(tmp_path)
    assert done is not None
    assert digest_of(done.strategy) == digest_of(STATE)
    assert digest_of(done.arrays) == digest_of(ARRAYS)


@pytest.mark.parametrize("content", [None, b"", b"changed"])
def test_a_checkpoint_whose_strategy_is_damaged_is_torn(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, 1, ARRAYS, {})
    file = with_state(tmp_path, 2) / "strategy.safetensors"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    done = load_latest(tmp_path)
    assert done is not None
    assert done.server_round == 1


def test_facts_of_an_earlier_checkpoint_do_not_pass_for_its_own(tmp_path: Path) -> None:
    save(tmp_path, 1, ARRAYS, {})
    done = load_latest(tmp_path)
    assert done is not None
    checkpoints.save(tmp_path, done._replace(server_round=2, strategy=STATE))
    again = load_latest(tmp_path)
    assert again is not None
    assert (again.server_round, again.manifest["round"]) == (2, 2)
    assert digest_of(again.strategy) == digest_of(STATE)


@given(
    count=st.integers(1, 12),
    keep=st.integers(1, 4),
    every=st.integers(0, 5),
    best=st.none() | st.integers(0, 11),
)
@settings(max_examples=20, deadline=None)
def test_what_stays_is_the_newest_the_best_and_every_so_many(
    count: int, keep: int, every: int, best: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        for server_round in range(count):
            save(run_dir, server_round, {"a": np.zeros(1, np.float32)}, {}, keep=keep, every=every)
            if server_round == best:
                name_best(run_dir, Best(server_round=best, metric="m", value=0.5))
        newest = set(range(count)[-keep:])
        spared = {n for n in range(count) if every and n % every == 0} | ({best} & set(range(count)))
        assert rounds_of(run_dir) == newest | spared
        found = load_best(run_dir)
        assert (found.server_round if found else None) == (best if best in range(count) else None)


def rounds_of(run_dir: Path) -> set[int]:
    return {int(path.name[6:]) for path in run_dir.glob("checkpoints/round-*")}


def test_nothing_is_the_best_until_it_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1, ARRAYS, {})
    assert best_of(tmp_path) is None
    assert load_best(tmp_path) is None
    name_best(tmp_path, Best(server_round=1, metric="zero_shot.macro_auroc", value=0.75))
    document = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert document == {"version": 2, "round": 1, "metric": "zero_shot.macro_auroc", "value": 0.75}


def test_a_torn_best_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, 1, ARRAYS, {}))
    name_best(tmp_path, Best(server_round=1, metric="m", value=0.5))
    with pytest.raises(CheckpointError, match=r"the best checkpoint .*round-0001 cannot be used"):
        load_best(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9, "round": 1, "metric": "m", "value": 1}'])
def test_a_damaged_name_of_the_best_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1, ARRAYS, {})
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best\.json cannot be read .*: delete it"):
        best_of(tmp_path)
