import multiprocessing
import os
import stat
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import save_file

from client.releases import ReleaseStore
from privacy.signing import Anchor
from strategies.messages import Arrays, Release, digest_of
from tests.fake_site import facts

REQUEST = "ab" * 32
ANCHOR = Anchor(seq=3, head="ab" * 32, signature="cd" * 64, key="ef" * 32)


def release(update: Arrays | None = None, **changes: Any) -> Release:
    some = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)} if update is None else update
    return Release(facts=facts("north", 1, 40).model_copy(update=changes), update=some)


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(folder=tmp_path / "releases")


def test_what_was_never_stored_is_not_found(store: ReleaseStore) -> None:
    assert store.find(REQUEST) is None


@given(
    update=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__"),
        arrays_of.arrays(
            np.float32,
            arrays_of.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
            elements=st.floats(width=32, allow_nan=False),
        ),
        max_size=3,
    )
)
def test_a_stored_release_comes_back_bit_for_bit(
    update: Arrays, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = ReleaseStore(folder=tmp_path_factory.mktemp("store"))
    stored = store.store(REQUEST, release(update, epsilon=0.1 + 0.2, anchor=ANCHOR))
    found = store.find(REQUEST)
    assert found is not None
    assert digest_of(found.update) == digest_of(update)
    assert found.facts == stored.facts


def test_the_first_release_for_a_request_stays(store: ReleaseStore) -> None:
    first = store.store(REQUEST, release())
    second = store.store(REQUEST, release({"w": np.zeros((2, 3), dtype=np.float32)}, seconds=20.0))
    assert (digest_of(second.update), second.facts) == (digest_of(first.update), first.facts)
    assert len(list(store.folder.iterdir())) == 1


def test_other_requests_have_their_own_releases(store: ReleaseStore) -> None:
    store.store(REQUEST, release())
    other = store.store("cd" * 32, release({"w": np.ones(1, dtype=np.float32)}))
    assert other.update["w"].tolist() == [1.0]


def test_processes_that_store_at_once_agree_on_one_release(store: ReleaseStore) -> None:
    context, count, rounds = multiprocessing.get_context("fork"), 4, 25
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    racers = [
        context.Process(target=race, args=(store, number, rounds, barrier, sender))
        for number, (_, sender) in enumerate(pipes)
    ]
    for racer in racers:
        racer.start()
    answers = [receiver.recv() for receiver, _ in pipes]
    for racer in racers:
        racer.join()
    assert all(len(set(of_one_request)) == 1 for of_one_request in zip(*answers, strict=True))
    assert len(list(store.folder.iterdir())) == rounds


def race(store: ReleaseStore, number: int, rounds: int, barrier: Barrier, sender: Connection) -> None:
    mine = release({"w": np.full(1000, number, dtype=np.float32)})
    answers = []
    for server_round in range(rounds):
        barrier.wait()
        answers.append(float(store.store(f"{server_round:064d}", mine).update["w"][0]))
    sender.send(answers)


@pytest.mark.parametrize("broken", ["fsync", "link"])
def test_a_failure_while_storing_leaves_no_release_and_no_rubbish(
    broken: str, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            store.store(REQUEST, release())
    assert store.find(REQUEST) is None
    assert list(store.folder.iterdir()) == []
    assert store.store(REQUEST, release()).facts == release().facts


def test_only_the_owner_may_read_releases(store: ReleaseStore) -> None:
    store.store(REQUEST, release())
    (file,) = store.folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (store.folder, file)] == [0o700, 0o600]


def test_a_release_of_another_version_is_refused(store: ReleaseStore) -> None:
    store.folder.mkdir()
    save_file(release().update, store.folder / f"{REQUEST}.safetensors", metadata={"version": "1"})
    with pytest.raises(ValueError, match="release of version 1, this code reads 2"):
        store.find(REQUEST)


def test_what_a_killed_process_left_half_written_is_swept_by_the_next(store: ReleaseStore) -> None:
    store.folder.mkdir()
    for name in ("a.partial", "b.partial"):
        (store.folder / name).write_bytes(b"half")
    store.store(REQUEST, release())
    assert [path.name for path in store.folder.iterdir()] == [f"{REQUEST}.safetensors"]


def test_what_another_process_is_writing_is_not_swept(store: ReleaseStore) -> None:
    store.folder.mkdir()
    with store._writing():
        (store.folder / "a.partial").write_bytes(b"half of it")
        store.store(REQUEST, release())
        assert (store.folder / "a.partial").exists()
    store.store("cd" * 32, release())
    assert not (store.folder / "a.partial").exists()


def test_releases_remember_the_ledger_s_head(store: ReleaseStore) -> None:
    assert store.anchors() == {}
    store.store(REQUEST, release(anchor=ANCHOR))
    store.store("cd" * 32, release())
    (store.folder / "junk.safetensors").write_bytes(b"no release")
    save_file({}, store.folder / "older.safetensors", metadata={"version": "1", "facts": "{}"})
    assert store.anchors() == {f"{REQUEST}.safetensors": ANCHOR}
