"""What is kept of an attempt is all that another process needs to go on, and no more than has to be there."""

from pathlib import Path

import numpy as np
import pytest

from strategies.secure_sum.attempts import MOST, AttemptBook, Kept
from strategies.secure_sum.errors import Malformed, StepRefused
from tests.strategies.secure_sum.hospitals import (
    STEPS,
    Attempt,
    assert_close,
    attempt,
    exact_mean,
    remembered,
    session,
    terms,
)


@pytest.fixture
def book(tmp_path: Path) -> AttemptBook:
    return AttemptBook(folder=tmp_path / "attempts")


def restarted(made: Attempt, book: AttemptBook, name: str) -> None:
    """Let a site go on from what is on its disk alone."""
    with book.held():
        book.keep(made.sites[name].kept)
        kept = book.of(made.terms.session)
    assert kept == made.sites[name].kept
    made.sites[name] = session(made.terms, name, kept=kept, agreements=made.agreements[name])


def test_sites_that_are_restarted_after_every_step_end_with_the_sum(book: AttemptBook) -> None:
    agreed = terms([1, 2, 3])
    made = attempt(agreed, agreements=remembered(agreed))
    for step in STEPS:
        getattr(made, step)()
        for name in agreed.names:
            restarted(made, book, name)
    assert_close(
        agreed, dict(made.server.mean()), exact_mean(agreed, made.updates, agreed.names), agreed.names
    )


def test_a_restarted_site_says_the_same_again_and_masks_no_second_time(book: AttemptBook) -> None:
    agreed = terms([1, 2, 3])
    made = attempt(agreed, agreements=remembered(agreed)).until("mask")
    site = made.sites["site-1"]
    offer, dealt = site.offer(), site.deal(made.offers)
    restarted(made, book, "site-1")
    site = made.sites["site-1"]
    assert (site.offer(), site.deal(made.offers)) == (offer, dealt)
    with pytest.raises(StepRefused, match="masks its update once in an attempt"):
        site.mask(made.shares["site-1"], {"weight": np.zeros(3, dtype=np.float32)})


def test_another_attempt_has_other_keys() -> None:
    one, other = Kept.fresh(terms()), Kept.fresh(terms())
    assert len({one.mask_key, one.seal_key, one.seed, other.mask_key, other.seal_key, other.seed}) == 6


def test_what_is_kept_shows_no_secret() -> None:
    kept = Kept.fresh(terms())
    assert not any(secret in repr(kept) for secret in (kept.mask_key, kept.seal_key, kept.seed))


def test_what_is_over_is_gone(book: AttemptBook) -> None:
    kept = [Kept.fresh(terms(run=f"run-{number}")) for number in range(MOST + 2)]
    with book.held():
        for one in kept:
            book.begin(one)
        assert [book.of(one.terms.session) is not None for one in kept] == [False] * 2 + [True] * MOST
        again = Kept.fresh(terms(run=kept[-1].terms.run, attempt=2))
        book.begin(again)
        assert book.of(kept[-1].terms.session) is None
        book.end(again.terms.session)
        book.end(again.terms.session)
        assert len(list(book.folder.iterdir())) == MOST - 1


def test_what_a_crash_left_half_written_does_not_stay(book: AttemptBook) -> None:
    kept = Kept.fresh(terms())
    with book.held():
        book.keep(kept)
    (path,) = book.folder.iterdir()
    (book.folder / f".{path.name}.x3k9").write_text(path.read_text()[:-3])
    with book.held():
        assert list(book.folder.iterdir()) == [path]
        assert book.of(kept.terms.session) == kept


def test_a_file_that_is_not_whole_or_of_another_form_is_no_attempt(book: AttemptBook) -> None:
    kept = Kept.fresh(terms())
    with book.held():
        book.keep(kept)
        (path,) = book.folder.iterdir()
        whole = path.read_text()
        for text in (
            whole[:-3],
            "",
            whole.replace('"version":1', '"version":2'),
            whole.replace(kept.seed, "00"),
        ):
            path.write_text(text)
            assert book.of(kept.terms.session) is None
    with pytest.raises(Malformed):
        book.of("../site")
