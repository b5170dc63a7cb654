"""A site's own weights stay with it, round after round, and survive what a round does not."""

import threading
from pathlib import Path

import numpy as np

from client.personal import PersonalWeights


def own(folder: Path, *, released: frozenset[str] = frozenset()) -> PersonalWeights:
    return PersonalWeights(folder=folder, released=released.__contains__)


def weights(number: float) -> dict[str, np.ndarray]:
    return {"a": np.full((2, 2), number, dtype=np.float32)}


def value(store: PersonalWeights, *, server_round: int) -> float | None:
    found = store.before(server_round)
    return None if found is None else float(found["a"][0, 0])


def test_a_round_goes_on_from_the_newest_before_it(tmp_path: Path) -> None:
    store = own(tmp_path / "own")
    assert value(store, server_round=1) is None
    store.store(1, weights(1))
    store.store(2, weights(2))
    assert [value(store, server_round=number) for number in (1, 2, 3, 9)] == [None, 1, 2, 2]


def test_a_round_that_is_trained_again_replaces_its_own(tmp_path: Path) -> None:
    store = own(tmp_path)
    store.store(1, weights(1))
    store.store(1, weights(5))
    assert value(store, server_round=2) == 5


def test_only_the_last_two_rounds_stay(tmp_path: Path) -> None:
    store = own(tmp_path)
    for number in range(1, 6):
        store.store(number, weights(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000004.safetensors", "000005.safetensors"]


def test_what_a_killed_process_left_is_no_round(tmp_path: Path) -> None:
    (tmp_path / "tmpabc.partial").write_bytes(b"half")
    assert own(tmp_path).before(5) is None


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    own(tmp_path / "own").store(1, weights(1))
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0


def test_weights_of_a_request_count_once_its_release_is_stored(tmp_path: Path) -> None:
    own(tmp_path).store(1, weights(1), request="a")
    own(tmp_path).store(2, weights(2), request="b")
    assert value(own(tmp_path), server_round=3) is None
    assert value(own(tmp_path, released=frozenset("a")), server_round=3) == 1
    assert value(own(tmp_path, released=frozenset("ab")), server_round=3) == 2


def test_another_request_for_a_round_replaces_the_first_and_no_other_round(tmp_path: Path) -> None:
    store = own(tmp_path, released=frozenset("abc"))
    for number, request in ((1, "a"), (2, "b"), (2, "c")):
        store.store(number, weights(number), request=request)
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["000001-a", "000002-c"]


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with own(tmp_path).alone():
            entered.set()

    second = threading.Thread(target=enter)
    with own(tmp_path).alone():
        second.start()
        assert not entered.wait(0.05)
    second.join(timeout=60)
    assert entered.is_set()


def test_the_newest_say_what_they_are_of(tmp_path: Path) -> None:
    store = own(tmp_path, released=frozenset("a"))
    assert store.newest() is None
    store.store(1, weights(1), request="a", about={"bundle": "x"})
    store.store(2, weights(2), request="b", about={"bundle": "y"})
    found = store.newest()
    assert found is not None
    assert (float(found[0]["a"][0, 0]), found[1]) == (1.0, {"bundle": "x"})
