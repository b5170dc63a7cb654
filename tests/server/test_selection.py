import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.roster import Site
from server.selection import select

NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=12, unique=True)


def sites(names: list[str]) -> list[Site]:
    return [Site(name=name, node_id=number) for number, name in enumerate(names)]


def drawn(names: list[str], count: int, *, server_round: int = 1, run: str = "r", seed: int = 0) -> list[str]:
    found, _ = select(sites(names), run=run, seed=seed, server_round=server_round, count=count)
    return [site.name for site in found]


@given(names=NAMES, count=st.integers(0, 15), server_round=st.integers(1, 9))
def test_so_many_are_drawn_and_the_rest_is_the_rest_in_order(
    names: list[str], count: int, server_round: int
) -> None:
    found, others = select(sites(names), run="r", seed=0, server_round=server_round, count=count)
    assert len(found) == min(count, len(names))
    assert sorted(site.name for site in [*found, *others]) == sorted(names)
    assert found == sorted(found, key=lambda site: site.name)
    assert others == sorted(others, key=lambda site: site.name)


@given(names=NAMES, count=st.integers(1, 12), order=st.randoms())
def test_the_order_and_the_nodes_of_the_sites_do_not_change_the_draw(
    names: list[str], count: int, order: random.Random
) -> None:
    shuffled = sorted(names, key=lambda _: order.random())
    assert drawn(shuffled, count) == drawn(names, count)


@given(names=NAMES.filter(lambda names: len(names) > 1), count=st.integers(1, 12))
def test_a_site_that_leaves_changes_the_draw_by_at_most_one_other(names: list[str], count: int) -> None:
    before, after = set(drawn(names, count)), set(drawn(names[1:], count))
    assert len(after - before) <= 1
    assert before - after <= {names[0]}


def test_run_seed_and_round_each_change_the_draw() -> None:
    names = [f"site-{number}" for number in range(40)]
    once = drawn(names, 10)
    assert once == drawn(names, 10)
    others = [drawn(names, 10, server_round=2), drawn(names, 10, seed=1), drawn(names, 10, run="s")]
    assert all(other != once for other in others)


def test_over_many_rounds_everybody_is_drawn_alike() -> None:
    names = [f"site-{number}" for number in range(10)]
    counts = Counter(name for number in range(1, 2001) for name in drawn(names, 3, server_round=number))
    # 2000 draws with probability 0.3: standard deviation 20.5, so 5 of them.
    assert all(abs(counts[name] - 600) < 103 for name in names)
