"""Answers of a round as a secure sum: they come under masks, and the coordinator sees their mean alone."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid
from pydantic import ValidationError

from server.errors import RunError
from server.exchange import Exchange, Outcome, Question, awaited
from server.federation import SecureAggregation
from server.metrics import RunLog
from server.prototypes import largest_value
from server.replies import UNKNOWN, read, refusal
from server.roster import Site
from strategies.files import write_text
from strategies.messages import (
    CONSENT,
    DEAL,
    MASK,
    REVEAL,
    Agree,
    Agreed,
    Arrays,
    Deal,
    Dealt,
    Facts,
    Mask,
    Masked,
    MessageError,
    Phase,
    Refusal,
    RefusalCode,
    Revealed,
    TrainRequest,
    Unmask,
    bytes_of,
    encode,
    require,
)
from strategies.secure_sum.coordinator import SecureSum
from strategies.secure_sum.errors import PeerRefused, SecureSumError, TooFewSites
from strategies.secure_sum.messages import Participant, Terms, Weighting

logger = logging.getLogger(f"clipward.{__name__}")

SUMS_FOLDER = "sums"
SUM = "secure sum"  # stands where a site's name stands when the mean is folded in
T = TypeVar("T", Dealt, Masked, Agreed, Revealed)


class Pledge(Facts):
    """What sites hold the coordinator to for one request, also after a crash of either.

    Attributes:
        terms: Of the last attempt.
        masked: A site may have masked its update, so further attempts need the same terms.
        survivors: Sites may have agreed to the sum of these, and agree to no other; null: none was asked.
    """

    version: Literal[1] = 1
    terms: Terms
    masked: bool = False
    survivors: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Pledges:
    """One small file a round, of one phase.

    Guarantees:
        When `keep` returns, the pledge is on the disk.
    """

    folder: Path

    def of(self, server_round: int) -> Pledge | None:
        """The pledge of a round, if one was made.

        Raises:
            RunError: it cannot be read; to go on without it could give away a site's update.
        """
        path = self._path(server_round)
        if not path.is_file():
            return None
        try:
            return Pledge.model_validate_json(path.read_text("utf-8"))
        except ValidationError as error:
            raise RunError(f"{path} is damaged: restore it, sites would refuse another sum") from error

    def keep(self, pledge: Pledge) -> Pledge:
        """Write it down before it is acted on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(pledge.terms.server_round), pledge.model_dump_json(indent=2) + "\n")
        return pledge

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:04d}.json"


class SecureExchange:
    """Asks the sites of a round for one secure sum: of their updates, or of their prototypes.

    Each has a request, terms, keys and masks of its own: nothing of one fits the other.

    Args:
        grid: Flower's way to the sites.
        exchange: Asks them to train; they answer with keys.
        settings: The consortium's.
        weighting: By declared patients, or every site alike.
        min_sites: A round needs so many; no sum is agreed to that would be of fewer.
        folder: Of what sites hold the coordinator to; made when missing.
        log: Takes ``site_masked``, ``site_dropped_out``, ``sum_made`` and ``sum_failed``.
    """

    def __init__(
        self,
        grid: Grid,
        exchange: Exchange,
        settings: SecureAggregation,
        *,
        weighting: Weighting,
        min_sites: int,
        folder: Path,
        log: RunLog,
    ) -> None:
        self._grid, self._exchange, self._settings, self._log = grid, exchange, settings, log
        self._weighting, self._min_sites, self._folder = weighting, min_sites, folder

    def bound(self, server_round: int, phase: Phase) -> frozenset[str] | None:
        """Who alone can be asked for the round of this sum; null: anybody.

        Sites hold the coordinator to it. One that dropped out of a sum of prototypes trains all the same.
        """
        pledge = self._pledges(phase).of(server_round)
        if pledge is None or not pledge.masked:
            return None
        return frozenset(_askable(pledge) if phase == "train" else pledge.terms.names)

    def round(self, question: Question, sites: Sequence[Site]) -> Outcome:
        """Ask ``sites``, and fold the mean of what they mask into the question's folding.

        Guarantees:
            No answer of a single site reaches this process unmasked. Those in ``replied`` are in the mean;
            with fewer than the threshold there is none, nothing was unmasked, and ``replied`` is empty. What
            sites could hold the coordinator to is on the disk before they learn of it.

        Args:
            question: As for `Exchange.round`; its folding needs no more than a sum.
            sites: Whom to ask.
        """
        began, request = time.monotonic(), question.request
        refused = self._strangers(question, sites)
        try:
            pledge = self._pledge(question, [site for site in sites if site not in refused])
        except SecureSumError as error:
            nothing = Outcome(replied={}, refused=refused, late=[], seconds=0.0, aggregate_seconds=0.0)
            return self._failed(request, 0, error, nothing)
        terms = pledge.terms
        asked = {site.name: site for site in sites if site.name in _askable(pledge)}
        secure = SecureSum(terms, question.like)
        told = replace(question, request=replace(request, secure=terms), secure=secure)
        offered = self._exchange.round(told, list(asked.values()))
        attempt = _Attempt(
            self._grid,
            secure,
            phase=request.phase,
            sites=asked,
            log=self._log,
            step_seconds=self._settings.step_seconds,
        )
        outcome = replace(offered, refused={**refused, **offered.refused})
        try:
            mean, weight = attempt.go(pledge, self._pledges(request.phase))
        except SecureSumError as error:
            refused = {**outcome.refused, **attempt.dropped}
            return self._failed(request, terms.attempt, error, replace(outcome, replied={}, refused=refused))
        begin = time.monotonic()
        question.folding.fold(SUM, mean, weight)
        summed, now = attempt.survivors, time.monotonic()
        self._log.record(
            "sum_made",
            round=request.server_round,
            phase=request.phase,
            attempt=terms.attempt,
            sites=list(summed),
            threshold=terms.threshold,
            weight=weight,
        )
        return Outcome(
            replied={name: outcome.replied[name] for name in summed},
            refused={
                site: code
                for site, code in {**outcome.refused, **attempt.dropped}.items()
                if site.name not in summed
            },
            late=outcome.late,
            seconds=now - began,
            aggregate_seconds=attempt.mean_seconds + now - begin,
        )

    def _strangers(self, question: Question, sites: Sequence[Site]) -> dict[Site, RefusalCode]:
        """Sites without a key in the federation file: no other site would be summed with them."""
        strangers = [site for site in sites if site.name not in self._settings.sites]
        for site in strangers:
            logger.warning("site %s has no key under secure-aggregation.sites: it is not asked", site.name)
            self._log.record(
                question.refused,
                round=question.request.server_round,
                site=site.name,
                code=RefusalCode.POLICY,
                incident=UNKNOWN,
            )
        return dict.fromkeys(strangers, RefusalCode.POLICY)

    def _pledge(self, question: Question, sites: Sequence[Site]) -> Pledge:
        """The next attempt at this request, written down: under the terms of before, where sites masked."""
        request, pledges = question.request, self._pledges(question.request.phase)
        before = pledges.of(request.server_round)
        if before is not None and before.terms.request == request.digest:
            attempt = before.terms.attempt + 1
            if before.masked:
                terms = replace(before.terms, attempt=attempt)
                return pledges.keep(before.model_copy(update={"terms": terms}))
        else:
            attempt = 1
        weighting = question.weighting(self._weighting)
        threshold = self._settings.threshold or self._settings.least_threshold(len(sites), self._min_sites)
        terms = Terms(
            run=request.run,
            server_round=request.server_round,
            request=request.digest,
            attempt=attempt,
            participants=tuple(
                Participant(
                    site=site.name,
                    weight=1 if weighting == "equal" else site.patients,
                    public=self._settings.sites[site.name],
                )
                for site in sites
            ),
            threshold=threshold,
            value_range=self._value_range(request, sites),
            weighting=weighting,
        )
        return pledges.keep(Pledge(terms=terms))

    def _value_range(self, request: TrainRequest, sites: Sequence[Site]) -> float:
        """What no site's values are to pass: as the consortium set it, or from what the sites declare."""
        plan = request.plan.prototypes
        if request.phase != "prototypes" or plan is None:
            return self._settings.value_range
        return largest_value(plan, patients=max((site.patients for site in sites), default=1))

    def _pledges(self, phase: Phase) -> Pledges:
        return Pledges(folder=self._folder if phase == "train" else self._folder / phase)

    def _failed(
        self, request: TrainRequest, attempt: int, error: SecureSumError, outcome: Outcome
    ) -> Outcome:
        logger.warning("round %d, %s: no secure sum: %s", request.server_round, request.phase, error)
        self._log.record(
            "sum_failed",
            round=request.server_round,
            phase=request.phase,
            attempt=attempt,
            reason=str(error),
        )
        of = "" if request.phase == "train" else f" of {request.phase}"
        return replace(outcome, reason=f"no secure sum{of} was made: {error}")


class _Attempt:
    """The four steps after the sites have offered their keys.

    Attributes:
        survivors: Who is summed.
        dropped: Who fell silent or was refused, and with which code.
        mean_seconds: How long the unmasking took.
    """

    def __init__(
        self,
        grid: Grid,
        secure: SecureSum,
        *,
        phase: Phase,
        sites: Mapping[str, Site],
        log: RunLog,
        step_seconds: float,
    ) -> None:
        self._grid, self._secure, self._sites, self._log = grid, secure, sites, log
        self._phase, self._step_seconds, self._terms = phase, step_seconds, secure.terms
        self.survivors: tuple[str, ...] = ()
        self.dropped: dict[Site, RefusalCode] = {}
        self.mean_seconds = 0.0

    def go(self, pledge: Pledge, pledges: Pledges) -> tuple[Arrays, int]:
        """The mean, and the sum of the weights of whom it is of.

        Raises:
            SecureSumError: there is none.
        """
        secure, session = self._secure, self._terms.session
        offers = secure.offers()
        deal = Deal(session=session, offers=offers)
        self._step(DEAL, {offer.site: deal for offer in offers}, Dealt, _take_shares)
        shares = secure.shares()
        pledge = pledges.keep(pledge.model_copy(update={"masked": True}))
        masks = {name: Mask(session=session, shares=own) for name, own in shares.items()}
        self._step(MASK, masks, Masked, self._fold)
        survivors = secure.survivors()
        if pledge.survivors is not None and (missing := sorted({*pledge.survivors} - {*survivors})):
            raise TooFewSites(
                f"sites agreed before to the sum of {', '.join(pledge.survivors)} and agree to no other; "
                f"missing: {', '.join(missing)}: go on when they are back"
            )
        pledges.keep(pledge.model_copy(update={"survivors": survivors}))
        agree = Agree(session=session, survivors=survivors)
        self._step(CONSENT, dict.fromkeys(survivors, agree), Agreed, _take_consent)
        consents = secure.consents()
        unmask = Unmask(session=session, consents=consents)
        self._step(REVEAL, {consent.site: unmask for consent in consents}, Revealed, _take_reveal)
        begin = time.monotonic()
        self.survivors, weight, mean = survivors, secure.weight, secure.mean()
        self.mean_seconds = time.monotonic() - begin
        return dict(mean), weight

    def _step(
        self,
        action: str,
        asked: Mapping[str, Facts],
        expected: type[T],
        take: Callable[[SecureSum, str, T], None],
    ) -> None:
        """Ask each site for its part, and take what comes in time, one answer in memory at a time."""
        deadline, sent = time.time() + self._step_seconds, {}
        for name, said in asked.items():
            message = Message(
                encode(said),
                self._sites[name].node_id,
                action,
                ttl=2 * self._step_seconds,
                group_id=str(self._terms.server_round),
            )
            sent[name] = next(iter(self._grid.push_messages([message])), None)
        for name, message_id in sent.items():
            refused = self._heard(name, message_id, deadline, expected, take)
            if refused is not None:
                self.dropped[self._sites[name]] = refused.code
                self._log.record(
                    "site_dropped_out",
                    round=self._terms.server_round,
                    phase=self._phase,
                    site=name,
                    step=action.removeprefix("query."),
                    code=refused.code,
                    incident=refused.incident,
                )

    def _heard(
        self,
        name: str,
        message_id: str | None,
        deadline: float,
        expected: type[T],
        take: Callable[[SecureSum, str, T], None],
    ) -> Refusal | None:
        """Take one site's part; why not, if not."""
        if message_id is None:
            return refusal(RefusalCode.FAILED)
        reply = awaited(self._grid, message_id, deadline)
        if reply is None:
            return refusal(RefusalCode.DEADLINE)
        said = read(reply)
        if isinstance(said, Refusal):
            return said
        try:
            take(self._secure, name, require(said, expected))
        except (MessageError, SecureSumError) as error:
            logger.warning("round %d: part of %s not used: %.200s", self._terms.server_round, name, error)
            return refusal(RefusalCode.MESSAGE)
        return None

    def _fold(self, secure: SecureSum, name: str, said: Masked) -> None:
        _require_own(name, said.site)
        secure.fold(name, said.arrays)
        self._log.record(
            "site_masked",
            round=self._terms.server_round,
            phase=self._phase,
            site=name,
            bytes_up=bytes_of(said.arrays),
        )


def _take_shares(secure: SecureSum, name: str, said: Dealt) -> None:
    _require_own(name, said.site)
    secure.take_shares(name, said.shares)


def _take_consent(secure: SecureSum, name: str, said: Agreed) -> None:
    _require_own(name, said.consent.site)
    secure.take_consent(said.consent)


def _take_reveal(secure: SecureSum, name: str, said: Revealed) -> None:
    _require_own(name, said.reveal.site)
    secure.take_reveal(said.reveal)


def _require_own(name: str, said: str) -> None:
    if said != name:
        raise PeerRefused(f"{name!r} answered for {said!r}")


def _askable(pledge: Pledge) -> tuple[str, ...]:
    return pledge.terms.names if pledge.survivors is None else pledge.survivors
