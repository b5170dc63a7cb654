"""Each rule against its definition in plain numpy; what it promises with attackers among the sites."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.messages import Arrays, MessageError
from strategies.rules import spill
from strategies.rules.robust import Krum, Median, TrimmedMean, fewest_for_krum, fewest_to_trim
from strategies.rules.rule import CannotCombine, Rule
from tests.strategies.updates import Round, drawn, one, room, rounds, zeros


def combined(rule: Rule, updates: list[Arrays], weights: list[float] | None = None) -> Arrays:
    for number, update in enumerate(updates):
        rule.fold(f"site-{number}", update, weights[number] if weights else 1.0)
    return rule.result()


@given(rounds(most=8))
def test_the_median_is_numpy_s(case: Round) -> None:
    like, updates = case
    with room() as folder:
        result = combined(Median(like, folder=folder), [update for update, _ in updates])
    for name in like:
        stack = np.stack([update[name].astype(np.float64) for update, _ in updates])
        np.testing.assert_array_equal(result[name], np.median(stack, axis=0).astype(np.float32))


@given(rounds(fewest=3, most=9), st.floats(0.34, 0.49))
def test_the_trimmed_mean_is_that_of_the_sorted_middle(case: Round, share: float) -> None:
    like, updates = case
    with room() as folder:
        result = combined(TrimmedMean(like, folder=folder, share=share), [update for update, _ in updates])
    cut = int(share * len(updates))
    for name in like:
        stack = np.sort(np.stack([update[name].astype(np.float64) for update, _ in updates]), axis=0)
        expected = stack[cut : len(updates) - cut].mean(axis=0)
        np.testing.assert_allclose(
            result[name], expected, rtol=1e-6, atol=1e-9 * np.abs(stack).max(initial=1)
        )


@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(0, 4), st.sampled_from([1.0, 1e3, 1e30]))
def test_no_value_leaves_the_honest_range_while_attackers_are_few(
    seed: int, attackers: int, more: int, scale: float
) -> None:
    honest = drawn(seed, 2 * attackers + 4 + more)
    updates = [*drawn(seed + 1, attackers, scale=scale), *honest]
    share = (max(attackers, 1) + 0.5) / len(updates)
    with room() as folder:
        like = zeros(honest[0])
        for rule in (Median(like, folder=folder), TrimmedMean(like, folder=folder, share=share)):
            for name, value in combined(rule, updates).items():
                stack = np.stack([update[name] for update in honest])
                assert (stack.min(axis=0) <= value).all()
                assert (value <= stack.max(axis=0)).all()


@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(0, 3))
def test_krum_gives_back_the_update_with_the_least_score(seed: int, attackers: int, more: int) -> None:
    updates = drawn(seed, fewest_for_krum(attackers) + more)
    flat = np.stack([np.append(update["a"], update["b"]) for update in updates]).astype(np.float64)
    squares = ((flat[:, None] - flat[None, :]) ** 2).sum(axis=2)
    scores = [
        np.sort(np.delete(row, i))[: len(updates) - attackers - 2].sum() for i, row in enumerate(squares)
    ]
    with room() as folder:
        result = combined(Krum(zeros(updates[0]), folder=folder, attackers=attackers), updates)
    for name, value in updates[int(np.argmin(scores))].items():
        np.testing.assert_array_equal(result[name], value)


@given(st.integers(0, 2**32), st.sampled_from([1.0, 1e3, 1e30]))
def test_krum_selects_no_attacker_far_from_honest_sites_that_agree(seed: int, distance: float) -> None:
    honest = drawn(seed, 5, scale=0.01)
    attackers = [
        {name: value + np.float32(distance) for name, value in update.items()} for update in honest[:2]
    ]
    with room() as folder:
        result = combined(Krum(zeros(honest[0]), folder=folder, attackers=2), [*attackers, *honest])
    assert any(all(np.array_equal(result[name], each[name]) for name in each) for each in honest)


def test_multi_krum_weighs_those_it_selects(tmp_path: Path) -> None:
    updates = [one(value) for value in (0.0, 1.0, 2.0, 100.0, 3.0)]
    rule = Krum(one(0.0), folder=tmp_path, attackers=1, selected=2)
    # With two neighbours each, 1 and 2 have the least scores: 1 + 1.
    assert combined(rule, updates, [9.0, 1.0, 3.0, 9.0, 9.0])["a"] == pytest.approx((1 * 1 + 3 * 2) / 4)


def test_multi_krum_selects_all_that_the_proof_covers_unless_told(tmp_path: Path) -> None:
    updates = [one(value) for value in (0.0, 1.0, 2.0, 100.0, 3.0)]
    rule = Krum(one(0.0), folder=tmp_path, attackers=1, selected=None)
    assert combined(rule, updates)["a"] == pytest.approx(1.5)


def test_of_equal_scores_the_first_update_wins(tmp_path: Path) -> None:
    rule = Krum(one(0.0), folder=tmp_path, attackers=0)
    assert combined(rule, [one(0.0), one(1.0), one(-1.0), one(2.0), one(-2.0)])["a"] == 0.0
    rule = Krum(one(0.0), folder=tmp_path, attackers=0)
    assert combined(rule, [one(2.0), one(2.0), one(2.0)])["a"] == 2.0


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, like = drawn(3, 7), zeros(drawn(3, 1)[0])

    def all_rules() -> list[bytes]:
        rules: list[Rule] = [
            Median(like, folder=tmp_path),
            TrimmedMean(like, folder=tmp_path, share=0.2),
            Krum(like, folder=tmp_path, attackers=2),
        ]
        return [value.tobytes() for rule in rules for value in combined(rule, updates).values()]

    whole = all_rules()
    monkeypatch.setattr(spill, "_MATRIX", 14)  # two values of seven updates
    assert all_rules() == whole


def test_the_folder_stays_empty(tmp_path: Path) -> None:
    rule = Median(one(0.0), folder=tmp_path)
    rule.fold("x", one(1.0), 1)
    assert not list(tmp_path.iterdir())


def test_a_refused_update_leaves_no_trace(tmp_path: Path) -> None:
    for rule in (Median(one(0.0), folder=tmp_path), Krum(one(0.0), folder=tmp_path, attackers=0)):
        for value in (1.0, 2.0, 2.5):
            rule.fold("x", one(value), 1)
        with pytest.raises(MessageError, match="not finite"):
            rule.fold("y", one(np.nan), 1)
        with pytest.raises(CannotCombine, match="positive and finite"):
            rule.fold("y", one(9.0), 0.0)
        assert rule.result()["a"] == 2.0


def test_a_median_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="there is no median"):
        Median(one(0.0), folder=tmp_path).result()


def test_a_share_that_cuts_nobody_is_refused_with_the_number_needed(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match=r"0.2 of 4 updates cuts none .* 5 are needed"):
        combined(TrimmedMean(one(0.0), folder=tmp_path, share=0.2), [one(1.0)] * 4)
    assert combined(TrimmedMean(one(0.0), folder=tmp_path, share=0.2), [one(1.0)] * 5)["a"] == 1.0


@pytest.mark.parametrize("share", [0.0, 0.5, -0.1, np.nan])
def test_a_share_out_of_range_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="share"):
        TrimmedMean(one(0.0), folder=tmp_path, share=share)


@given(st.floats(0.01, 0.49))
def test_the_fewest_to_trim_are_just_enough(share: float) -> None:
    fewest = fewest_to_trim(share)
    assert int(share * fewest) >= 1
    assert fewest == 3 or int(share * (fewest - 1)) == 0


def test_krum_names_how_many_updates_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="1 attackers among 5 updates or more, and has 4"):
        combined(Krum(one(0.0), folder=tmp_path, attackers=1), [one(1.0)] * 4)


def test_krum_cannot_select_more_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="selected=6 of 5"):
        combined(Krum(one(0.0), folder=tmp_path, attackers=1, selected=6), [one(1.0)] * 5)


@pytest.mark.parametrize(("attackers", "selected"), [(-1, 1), (1, 0)])
def test_krum_s_settings_out_of_range_are_refused(attackers: int, selected: int, tmp_path: Path) -> None:
    with pytest.raises(CannotCombine, match="expected attackers"):
        Krum(one(0.0), folder=tmp_path, attackers=attackers, selected=selected)
