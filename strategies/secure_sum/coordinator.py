"""The coordinator's half of a secure sum: it passes messages on, adds masked arrays and unmasks the sum."""

from collections.abc import Collection, Iterator, Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from strategies.secure_sum import masks, shamir
from strategies.secure_sum.errors import PeerRefused, StepRefused, TooFewSites
from strategies.secure_sum.messages import (
    Consent,
    KeyOffer,
    Reveal,
    SealedShare,
    Secret,
    Terms,
    consent_statement,
    is_signed,
    seed_digest,
    share_digest,
)


class Step(IntEnum):
    """What the coordinator is waiting for."""

    OFFER, DEAL, MASK, CONSENT, REVEAL, DONE = range(6)


class SecureSum:
    """One attempt at the weighted mean of the sites' updates.

    Every step takes the sites' messages one by one, in any order, and is closed by the method that says what
    to send next. A site without a message in a step has dropped out and is asked no more. A message that is
    refused leaves no trace: the site it is from may send another, or has dropped out.

    Guarantees:
        `mean` is the weighted mean over ``survivors`` up to ``terms.grid.error``, or an error: with
        `TooFewSites` in any step nothing is unmasked. At most as many sites as there are participants beyond
        the threshold may drop out, in any steps.
        Memory is one uint32 model, besides what is passed in. `mean` gives it up tensor by tensor.

    Args:
        terms: As sent to all participants.
        like: Names and shapes of the updates.
    """

    def __init__(self, terms: Terms, like: Mapping[str, NDArray[Any]]) -> None:
        self.terms = terms
        self.step = Step.OFFER
        self._sums = {name: np.zeros(value.shape, dtype=np.uint32) for name, value in like.items()}
        self._offers: dict[str, KeyOffer] = {}
        self._dealt: dict[str, dict[str, SealedShare]] = {}
        self._survivors: set[str] = set()
        self._consents: dict[str, Consent] = {}
        self._reveals: dict[str, Reveal] = {}

    @property
    def weight(self) -> int:
        """Sum of the weights of the summed sites."""
        return self.terms.weight_of(sorted(self._survivors))

    def take_offer(self, offer: KeyOffer) -> None:
        """A site's keys.

        Raises:
            PeerRefused: no participant's, not signed by its key, or another's keys.
            StepRefused: the step is over, or the site's were taken before.
        """
        self._require_due(Step.OFFER, offer.site, among=self.terms.by_name, taken=self._offers)
        offer.require_genuine(self.terms, public=self.terms.by_name[offer.site].public)
        taken = {key for other in self._offers.values() for key in (other.mask_key, other.seal_key)}
        if taken & {offer.mask_key, offer.seal_key} or offer.mask_key == offer.seal_key:
            raise PeerRefused(f"{offer.site!r} offers a key twice, or that of another site")
        self._offers[offer.site] = offer

    def offers(self) -> tuple[KeyOffer, ...]:
        """What to send to all that offered keys.

        Raises:
            TooFewSites: fewer than the threshold.
        """
        self._close(Step.OFFER, "offered keys", len(self._offers))
        return tuple(self._offers.values())

    def take_shares(self, site: str, shares: tuple[SealedShare, ...]) -> None:
        """What ``site`` dealt.

        Raises:
            PeerRefused: not one share for each site that offered keys.
            StepRefused: as above.
        """
        self._require_due(Step.DEAL, site, among=self._offers, taken=self._dealt)
        dealt = {share.holder: share for share in shares if share.dealer == site}
        if set(dealt) != set(self._offers) or len(dealt) != len(shares):
            raise PeerRefused(f"{site!r} did not deal one share of its own to each site that offered keys")
        self._dealt[site] = dealt

    def shares(self) -> dict[str, tuple[SealedShare, ...]]:
        """What to send to each site that dealt.

        Raises:
            TooFewSites: fewer than the threshold.
        """
        self._close(Step.DEAL, "dealt shares", len(self._dealt))
        return {site: tuple(dealt[site] for dealt in self._dealt.values()) for site in self._dealt}

    def fold(self, site: str, masked: Mapping[str, NDArray[Any]]) -> None:
        """Add the masked update of ``site``, or nothing of it.

        Raises:
            PeerRefused: another name, shape or dtype than expected.
            StepRefused: as above.
        """
        self._require_due(Step.MASK, site, among=self._dealt, taken=self._survivors)
        if set(masked) != set(self._sums):
            odd = sorted(set(masked) ^ set(self._sums))
            raise PeerRefused(f"update of {site!r} and model differ in {len(odd)} names, first {odd[0]!r}")
        for name, total in self._sums.items():
            if masked[name].dtype != np.uint32 or masked[name].shape != total.shape:
                got = f"{masked[name].dtype}{masked[name].shape}"
                raise PeerRefused(f"array {name!r} of {site!r}: expected uint32{total.shape}, got {got}")
        for name, total in self._sums.items():
            np.add(total, masked[name], out=total)
        self._survivors.add(site)

    def survivors(self) -> tuple[str, ...]:
        """Whom the sum is of: what to send to each of them.

        A site that consents will never consent to another sum of its answer to this request. So keep these
        names before sending them: once one of the sites has them, another attempt needs exactly these.

        Raises:
            TooFewSites: fewer than the threshold.
        """
        self._close(Step.MASK, "sent a masked update", len(self._survivors))
        return tuple(sorted(self._survivors))

    def take_consent(self, consent: Consent) -> None:
        """A site's agreement to the sum.

        Raises:
            PeerRefused: not signed by the site's key for this very sum.
            StepRefused: as above.
        """
        self._require_due(Step.CONSENT, consent.site, among=self._survivors, taken=self._consents)
        statement = consent_statement(
            self.terms,
            offers=list(self._offers.values()),
            dealers=list(self._dealt),
            survivors=list(self._survivors),
        )
        if not is_signed(statement, consent.signature, public=self.terms.by_name[consent.site].public):
            raise PeerRefused(f"the consent of {consent.site!r} is not signed by its key for this sum")
        self._consents[consent.site] = consent

    def consents(self) -> tuple[Consent, ...]:
        """What to send to all that consented.

        Raises:
            TooFewSites: fewer than the threshold.
        """
        self._close(Step.CONSENT, "agreed to the sum", len(self._consents))
        return tuple(self._consents.values())

    def take_reveal(self, reveal: Reveal) -> None:
        """A site's shares.

        Raises:
            PeerRefused: they are not those that were dealt to it, or not those that were asked for.
            StepRefused: as above.
        """
        self._require_due(Step.REVEAL, reveal.site, among=self._consents, taken=self._reveals)
        if set(reveal.seeds) != self._survivors or set(reveal.keys) != set(self._dealt) - self._survivors:
            raise PeerRefused(f"{reveal.site!r} did not reveal one share for each site that dealt shares")
        for dealer, share in reveal.seeds.items():
            self._require_dealt(share, which="seed", dealer=dealer, holder=reveal.site)
        for dealer, share in reveal.keys.items():
            self._require_dealt(share, which="key", dealer=dealer, holder=reveal.site)
        self._reveals[reveal.site] = reveal

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of the survivors' updates, float32; the attempt is over.

        Raises:
            TooFewSites: fewer than the threshold revealed their shares.
            PeerRefused: a site had dealt shares of something else than its secrets, which ends the attempt.
        """
        self._close(Step.REVEAL, "revealed shares", len(self._reveals))
        left = [self._own_mask(name) for name in self._survivors]
        for dropped in set(self._dealt) - self._survivors:
            left.extend(self._pair_masks(dropped))
        weight = self.weight
        means = {}
        for name in list(self._sums):
            total = self._sums.pop(name)
            for key, sign in left:
                masks.add_mask(total, key, tensor=name, sign=sign)
            means[name] = self.terms.grid.mean(total, weight=weight)
        return means

    def _own_mask(self, site: str) -> tuple[bytes, masks.Sign]:
        """Key of the mask that ``site`` put on alone, and the sign that takes it away."""
        seed = self._combined(site, {name: said.seeds[site] for name, said in self._reveals.items()})
        if seed_digest(self.terms, seed, site=site) != self._offers[site].seed_digest:
            raise PeerRefused(f"{site!r} dealt shares of another seed than it offered")
        return masks.self_key(seed, session=self.terms.session, site=site), -1

    def _pair_masks(self, dropped: str) -> Iterator[tuple[bytes, masks.Sign]]:
        """Keys and signs of the masks that ``dropped`` would have added, which the summed sites wait for."""
        shares = {name: said.keys[dropped] for name, said in self._reveals.items()}
        private = X25519PrivateKey.from_private_bytes(self._combined(dropped, shares))
        if private.public_key().public_bytes_raw().hex() != self._offers[dropped].mask_key:
            raise PeerRefused(f"{dropped!r} dealt shares of another key than it offered")
        for site in self._survivors:
            peer, pair = self._offers[site].mask_key, (dropped, site)
            key = masks.pair_key(private, peer, session=self.terms.session, sites=pair)
            yield key, masks.pair_sign(dropped, site)

    def _combined(self, dealer: str, revealed: Mapping[str, str]) -> bytes:
        """The secret of ``dealer`` that these shares, by holder, are of."""
        chosen = list(revealed.items())[: self.terms.threshold]
        try:
            return shamir.combine({self.terms.points[site]: bytes.fromhex(share) for site, share in chosen})
        except ValueError:
            raise PeerRefused(f"{dealer!r} dealt shares that are not of one secret") from None

    def _require_dealt(self, share: str, *, which: Secret, dealer: str, holder: str) -> None:
        dealt = self._dealt[dealer][holder]
        committed = {"seed": dealt.seed_digest, "key": dealt.key_digest}[which]
        made = share_digest(self.terms, bytes.fromhex(share), dealer=dealer, holder=holder, which=which)
        if made != committed:
            raise PeerRefused(
                f"{holder!r} revealed another share of the {which} of {dealer!r} than it was dealt"
            )

    def _require_due(self, step: Step, site: str, *, among: Collection[str], taken: Collection[str]) -> None:
        if self.step is not step:
            raise StepRefused(f"{site!r} sent its part of step {step.name}, due is step {self.step.name}")
        if site not in among:
            raise PeerRefused(f"{site!r} was not there in the step before {step.name}")
        if site in taken:
            raise StepRefused(f"{site!r} sent its part of step {step.name} twice")

    def _close(self, step: Step, did: str, count: int) -> None:
        if self.step is not step:
            raise StepRefused(f"step {step.name} cannot be closed, due is step {self.step.name}")
        if count < self.terms.threshold:
            raise TooFewSites(
                f"{count} of {len(self.terms.participants)} sites {did}, below the threshold of "
                f"{self.terms.threshold}: nothing was unmasked; start a new attempt when more sites are there"
            )
        self.step = Step(step + 1)
