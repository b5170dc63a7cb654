from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.messages import Arrays
from strategies.rules.spill import Piece
from strategies.variates import Variates, VariatesLost
from tests.strategies.updates import drawn, zeros

LIKE = zeros(drawn(0, 1)[0])


def played(variates: Variates, vectors: Mapping[str, Arrays], *, weight: float = 1.0) -> None:
    """One whole round."""
    variates.begin(LIKE)
    _replace(variates, vectors, weight=weight)
    variates.finish()


def _replace(variates: Variates, vectors: Mapping[str, Arrays], *, weight: float = 1.0) -> None:
    for site, vector in vectors.items():
        variates.replace(site, partial(_values, vector), weight=weight)


def _values(vector: Arrays, at: Piece) -> NDArray[np.float64]:
    return at.of(vector).astype(np.float64)


def held(variates: Variates, site: str) -> Arrays:
    return variates.arrays(lambda at: variates.at(site, at))


def same(left: Arrays, right: Arrays) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in LIKE)


def test_a_vector_comes_back_as_it_was_written(tmp_path: Path) -> None:
    first, second = drawn(1, 2)
    variates = Variates(tmp_path)
    played(variates, {"one": first, "a/b \u00e9": second})
    assert same(held(variates, "one"), first)
    assert same(held(variates, "a/b \u00e9"), second)
    assert "one" in variates
    assert "other" not in variates


def test_the_mean_is_weighted_and_zero_at_first(tmp_path: Path) -> None:
    first, second = drawn(1, 2)
    variates = Variates(tmp_path)
    variates.begin(LIKE)
    assert same(variates.mean, LIKE)
    _replace(variates, {"one": first}, weight=3.0)
    _replace(variates, {"two": second}, weight=1.0)
    assert same(variates.mean, LIKE)
    variates.finish()
    for name, value in variates.mean.items():
        np.testing.assert_allclose(value, 0.75 * first[name] + 0.25 * second[name], rtol=1e-6)


def test_a_round_that_is_begun_again_forgets_what_it_took_in(tmp_path: Path) -> None:
    first, second, third = drawn(1, 3)
    variates = Variates(tmp_path)
    played(variates, {"one": first})
    variates.begin(LIKE)
    _replace(variates, {"one": second, "two": third})
    assert same(held(variates, "one"), first)
    variates.begin(LIKE)
    variates.finish()
    assert same(held(variates, "one"), first)
    assert "two" not in variates
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("behind", [0, 1])
def test_the_last_two_states_can_be_restored(behind: int, tmp_path: Path) -> None:
    vectors, variates = drawn(1, 8), Variates(tmp_path)
    states, means = [variates.state()], [LIKE]
    for number in range(4):
        played(
            variates, {"one": vectors[number]} if number % 2 else {"one": vectors[number], "two": vectors[4]}
        )
        states.append(variates.state())
        means.append(variates.mean)
    variates.begin(LIKE)  # a round that a kill ends before `finish`
    _replace(variates, {"one": vectors[5], "two": vectors[6], "three": vectors[7]})
    later = Variates(tmp_path)
    later.restore(states[-1 - behind])
    later.begin(LIKE)
    assert same(later.mean, means[-1 - behind])
    assert same(held(later, "one"), vectors[3 - behind])
    assert same(held(later, "two"), vectors[4])
    assert "three" not in later


def test_a_state_whose_vectors_are_gone_is_named(tmp_path: Path) -> None:
    vectors, variates = drawn(1, 4), Variates(tmp_path)
    played(variates, {"one": vectors[0]})
    old = variates.state()
    for vector in vectors[1:]:
        played(variates, {"one": vector})
    variates.begin(LIKE)
    later = Variates(tmp_path)
    later.restore(old)
    with pytest.raises(VariatesLost, match="vector of site 'one' from round 1 is gone"):
        later.begin(LIKE)


def test_a_vector_that_was_cut_short_is_named(tmp_path: Path) -> None:
    variates = Variates(tmp_path)
    played(variates, {"one": drawn(1, 1)[0]})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VariatesLost, match="vector of site 'one'"):
        variates.begin(LIKE)


def test_the_disk_holds_at_most_three_vectors_of_a_site(tmp_path: Path) -> None:
    variates = Variates(tmp_path)
    for vector in drawn(1, 9):
        played(variates, {"one": vector, "two": vector})
        assert len(list(tmp_path.iterdir())) <= 6


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other.f32").write_text("x")
    variates = Variates(tmp_path)
    for vector in drawn(1, 3):
        played(variates, {"one": vector})
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "other.f32").exists()


def test_the_folder_is_the_coordinator_s_alone(tmp_path: Path) -> None:
    variates = Variates(tmp_path / "sites")
    variates.begin(LIKE)
    assert (tmp_path / "sites").stat().st_mode & 0o777 == 0o700
