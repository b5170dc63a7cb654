"""A site's own weights stay with it, round after round, and survive what a round does not."""

from pathlib import Path

import numpy as np

from client.personal import PersonalWeights


def weights(number: float) -> dict[str, np.ndarray]:
    return {"a": np.full((2, 2), number, dtype=np.float32)}


def value(store: PersonalWeights, *, server_round: int) -> float | None:
    found = store.before(server_round)
    return None if found is None else float(found["a"][0, 0])


def test_a_round_goes_on_from_the_newest_before_it(tmp_path: Path) -> None:
    store = PersonalWeights(folder=tmp_path / "own")
    assert value(store, server_round=1) is None
    store.store(1, weights(1))
    store.store(2, weights(2))
    assert [value(store, server_round=number) for number in (1, 2, 3, 9)] == [None, 1, 2, 2]


def test_a_round_that_is_trained_again_replaces_its_own(tmp_path: Path) -> None:
    store = PersonalWeights(folder=tmp_path)
    store.store(1, weights(1))
    store.store(1, weights(5))
    assert value(store, server_round=2) == 5


def test_only_the_last_two_rounds_stay(tmp_path: Path) -> None:
    store = PersonalWeights(folder=tmp_path)
    for number in range(1, 6):
        store.store(number, weights(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000004.safetensors", "000005.safetensors"]


def test_what_a_killed_process_left_is_no_round(tmp_path: Path) -> None:
    (tmp_path / "tmpabc.partial").write_bytes(b"half")
    assert PersonalWeights(folder=tmp_path).before(5) is None


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    PersonalWeights(folder=tmp_path / "own").store(1, weights(1))
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0
