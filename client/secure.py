"""A site's part in a secure sum: it makes its release as always, and what leaves is masked.

The attempt under way lies in the site's folder until it is over: any process of the site answers the next
message of it, a restarted one too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from client.answers import answer_train
from client.errors import Refused
from client.policy import check_code, check_release, check_run
from client.releases import RELEASES, ReleaseStore
from client.site import SITE_FILE, Site
from strategies.messages import (
    Agree,
    Agreed,
    Deal,
    Dealt,
    Mask,
    Masked,
    Phase,
    Ready,
    RefusalCode,
    Release,
    Revealed,
    TrainRequest,
    Unmask,
)
from strategies.secure_sum.agreements import AgreementBook
from strategies.secure_sum.attempts import AttemptBook, Kept
from strategies.secure_sum.errors import StepRefused, TermsRefused
from strategies.secure_sum.masks import digest
from strategies.secure_sum.messages import KeyOffer, Terms
from strategies.secure_sum.site import SiteSession
from strategies.share import wire_of

AGREEMENTS = "agreements"
SUMMED: frozenset[Phase] = frozenset({"train", "prototypes"})
ATTEMPTS = "attempts"


def answer_request(site: Site, request: TrainRequest) -> Release | Ready:
    """Train; the release leaves at once, or waits here to be masked where the request names terms.

    Guarantees:
        Terms that the site does not accept are refused before anything is computed or charged. Once it has
        taken part in a secure sum of a run, nothing of that run leaves unmasked any more.

    Raises:
        Refused: with one of the closed list of codes.
        TermsRefused: the site takes no part under these terms.
        LedgerError: ledger or key cannot be used.
    """
    if request.secure is None:
        _refuse_unmasked(site, request)
        return check_release(site, answer_train(site, request))
    check_run(site, request.run)
    offer = _begun(site, request, request.secure)
    release = check_release(site, answer_train(site, request))
    _agreements(site).first(_run_of(request), "masked")
    return Ready(facts=release.facts, offer=offer)


def answer_deal(site: Site, asked: Deal) -> Dealt:
    """Deal shares of this site's two secrets."""
    with _attempt(site, asked.session) as (_, session):
        return Dealt(site=site.name, shares=session.deal(asked.offers))


def answer_mask(site: Site, asked: Mask) -> Masked:
    """Mask the stored release."""
    with _attempt(site, asked.session) as (terms, session):
        release = ReleaseStore(folder=site.folder / RELEASES).find(terms.request)
        if release is None:
            raise StepRefused("the release to be masked is gone from this site's folder: start a new attempt")
        return Masked(site=site.name, arrays=dict(session.mask(asked.shares, release.update)))


def answer_agree(site: Site, asked: Agree) -> Agreed:
    """Agree to the sum, and to no other of the same update."""
    with _attempt(site, asked.session) as (_, session):
        return Agreed(consent=session.consent(asked.survivors))


def answer_unmask(site: Site, asked: Unmask) -> Revealed:
    """Send what unmasks the sum agreed to; then the attempt is over, and nothing of it is kept."""
    with _attempt(site, asked.session, last=True) as (_, session):
        return Revealed(reveal=session.reveal(asked.consents))


def _begun(site: Site, request: TrainRequest, terms: Terms) -> KeyOffer:
    """This site's keys under ``terms``; asked again, the same."""
    if terms.request != request.digest:
        raise TermsRefused("the terms are of another request than the one they came with")
    if (terms.run, terms.server_round) != (request.run, request.server_round):
        raise TermsRefused("the terms name another run or round than their request")
    if request.phase not in SUMMED:
        raise TermsRefused(
            f"answers of phase {request.phase!r} are used one by one: only updates and prototypes are summed"
        )
    if request.phase == "prototypes" and terms.weighting != "equal":
        raise TermsRefused("sums of prototypes are added up as they are: expected weighting 'equal'")
    if (wire := wire_of(request)) != "fp32":
        raise TermsRefused(f"what travels as {wire} cannot be summed under masks: ask for fp32")
    book = _attempts(site)
    with book.held():
        kept = book.of(terms.session)
        session = _session(site, terms, kept)
        if kept is None:
            book.begin(session.kept)
    return session.offer()


@contextmanager
def _attempt(site: Site, session: str, *, last: bool = False) -> Iterator[tuple[Terms, SiteSession]]:
    """An attempt under way, and on leaving what it has become: on the disk before the answer leaves.

    Nothing changes where the step is refused; after the ``last`` one it is forgotten.

    Raises:
        StepRefused: there is none of this name.
    """
    check_code(site)
    book = _attempts(site)
    with book.held():
        if (kept := book.of(session)) is None:
            raise StepRefused(f"{site.name!r} knows of no such attempt: it is over, or was never asked")
        going_on = _session(site, kept.terms, kept)
        yield kept.terms, going_on
        if last:
            book.end(session)
        else:
            book.keep(going_on.kept)


def _session(site: Site, terms: Terms, kept: Kept | None) -> SiteSession:
    return SiteSession(
        terms,
        site=site.name,
        weight=site.settings.cohort.patients_declared if terms.weighting == "declared" else 1,
        at_least=site.settings.secure_aggregation.at_least,
        pins=site.pins(),
        sign=site.key().vouch,
        agreements=_agreements(site),
        kept=kept,
    )


def _refuse_unmasked(site: Site, request: TrainRequest) -> None:
    """Refuse what a coordinator could look at by itself, where that must not be.

    Raises:
        Refused: POLICY.
    """
    if site.settings.secure_aggregation.required:
        raise Refused(
            RefusalCode.POLICY,
            "the update would not be masked; to allow that, change secure-aggregation.required in "
            f"{SITE_FILE}",
        )
    if _agreements(site).has(_run_of(request)):
        raise Refused(
            RefusalCode.POLICY,
            f"run {request.run!r} began with masked updates, and is now to go on in the clear: sums and "
            "single updates of one run would tell too much of others; start a new run",
        )


def _run_of(request: TrainRequest) -> str:
    return digest("run", request.run)


def _attempts(site: Site) -> AttemptBook:
    return AttemptBook(folder=site.folder / ATTEMPTS)


def _agreements(site: Site) -> AgreementBook:
    return AgreementBook(folder=site.folder / AGREEMENTS)
