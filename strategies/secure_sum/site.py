"""One site's half of a secure sum: it hides its update, and helps to unmask the sum of many, never of one."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from strategies.secure_sum import masks, shamir
from strategies.secure_sum.attempts import Kept
from strategies.secure_sum.errors import PeerRefused, StepRefused, TermsRefused
from strategies.secure_sum.messages import (
    SECRETS,
    Consent,
    KeyOffer,
    Reveal,
    SealedShare,
    Terms,
    consent_statement,
    is_signed,
    offer_statement,
    seed_digest,
    share_digest,
)

_ONCE = bytes(12)  # the nonce of a key that encrypts one message


class Agreements(Protocol):
    """What survives the site: `AgreementBook`, or a stand-in."""

    def first(self, subject: str, agreement: str) -> str:
        """The first agreement ever given on ``subject``: this one, if there was none."""


class SiteSession:
    """What one site does in one attempt: `offer`, `deal`, `mask`, `consent`, `reveal`, in this order.

    Guarantees, against a coordinator that says what it likes, together with c other participants:
        Every other site is who this site's pins say, and uses the keys it offered under these very terms.
        The coordinator learns nothing about this site's update but a weighted sum of at least ``threshold``
        updates, this one among them, and so of ``threshold - c`` honest ones, as long as
        c < 2·threshold - participants: any two groups that could unmask something then share an honest site,
        and an honest site agrees to one set of summed sites, in all attempts at a request together. Against a
        coordinator that keeps to the protocol but keeps all it sees, c < threshold is enough.
        For each peer it reveals the share of its seed or that of its key, never both.
        Asked the same again, it says the same again; asked something else, it refuses. The masked update is
        made once: two versions under one mask would give away their difference.

    A coordinator can always end the attempt, leave a site out, or pass on a sum it invented: secrecy is
    promised here, not that the model is good. It can also wait for another round; what the sums of different
    rounds tell together, only the noise in the updates limits. Pins taken from the coordinator protect
    nothing: they must come from the site's own settings, or have been kept from when they were first seen.

    Private keys, the seed and peers' shares are in ``kept`` alone, for an `AttemptBook`: to be on the disk
    before an answer leaves, so that no process masks a second time, and gone when the attempt is over. Keys
    are made for one attempt, so another has other masks. What must outlast it is in ``agreements``: under
    which terms the answer to a request was masked, and with whom it was summed.

    Args:
        terms: What the coordinator asks. The caller makes sure that ``terms.request`` is the digest of the
            request which the update answers, and that the same request always gets the same update.
        site: This site's name.
        weight: What its weight has to be. A site that took what it is told could be weighted so far above the
            others that the sum is its own update.
        at_least: The smallest threshold this site takes part under: its own policy.
        pins: Public Ed25519 keys by site, from this site's own settings, its own among them.
        sign: Signs with the private half of its own pin.
        agreements: Remembers what was agreed to, also after a crash.
        kept: The attempt as it stands, of another session; null: it begins here.

    Raises:
        TermsRefused: the site does not take part under these terms.

    Source:
        Bonawitz et al. (2017), Figure 4, and section 6.2 for active adversaries.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        site: str,
        weight: int,
        at_least: int,
        pins: Mapping[str, str],
        sign: Callable[[bytes], bytes],
        agreements: Agreements,
        kept: Kept | None = None,
    ) -> None:
        _require_acceptable(terms, site=site, weight=weight, at_least=at_least, pins=pins)
        self._terms, self._site, self._sign, self._agreements = terms, site, sign, agreements
        kept = kept or Kept.fresh(terms)
        self._mask_key, self._seal_key = (
            X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in (kept.mask_key, kept.seal_key)
        )
        self._seed = bytes.fromhex(kept.seed)
        self._offers = {offer.site: offer for offer in kept.offers}
        self._dealt = kept.dealt
        self._shares = {
            name: (bytes.fromhex(seed), bytes.fromhex(key)) for name, (seed, key) in kept.shares.items()
        }
        self._survivors = kept.survivors

    @property
    def kept(self) -> Kept:
        """The attempt as it stands: what another session goes on from."""
        return Kept(
            terms=self._terms,
            mask_key=self._mask_key.private_bytes_raw().hex(),
            seal_key=self._seal_key.private_bytes_raw().hex(),
            seed=self._seed.hex(),
            offers=tuple(self._offers.values()),
            dealt=self._dealt,
            shares={name: (seed.hex(), key.hex()) for name, (seed, key) in self._shares.items()},
            survivors=self._survivors,
        )

    def offer(self) -> KeyOffer:
        """This site's keys for the attempt."""
        mask, seal = (key.public_key().public_bytes_raw().hex() for key in (self._mask_key, self._seal_key))
        keys = (mask, seal, seed_digest(self._terms, self._seed, site=self._site))
        signature = self._sign(offer_statement(self._terms, site=self._site, keys=keys)).hex()
        return KeyOffer(
            site=self._site, mask_key=mask, seal_key=seal, seed_digest=keys[2], signature=signature
        )

    def deal(self, offers: Sequence[KeyOffer]) -> tuple[SealedShare, ...]:
        """Shares of this site's two secrets, one for each site that offered keys, itself among them.

        Raises:
            PeerRefused: an offer is not signed by its site's pinned key, or copies another's key.
            StepRefused: fewer than the threshold, a site twice, a stranger, not this site's own keys, or
                other offers than the first time.
        """
        offered = {offer.site: offer for offer in offers}
        if self._dealt:
            if offered != self._offers:
                raise StepRefused("the coordinator changed the keys it had passed on; start a new attempt")
            return self._dealt
        self._require_enough([offer.site for offer in offers], "offer keys", among=self._terms.names)
        _require_distinct_keys(offers)
        for offer in offers:
            offer.require_genuine(self._terms, public=self._terms.by_name[offer.site].public)
        if offered[self._site] != self.offer():
            raise StepRefused(f"the keys offered for {self._site!r} are not those it made for this attempt")
        points = {name: self._terms.points[name] for name in offered}
        seeds, keys = (
            shamir.split(secret, points=points.values(), threshold=self._terms.threshold)
            for secret in (self._seed, self._mask_key.private_bytes_raw())
        )
        self._offers = offered
        self._dealt = tuple(self._sealed(name, seeds[point], keys[point]) for name, point in points.items())
        return self._dealt

    def mask(
        self, shares: Sequence[SealedShare], update: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[str, NDArray[np.uint32]]]:
        """The weighted update in fixed point under all masks, tensor by tensor.

        Everything is checked before the first tensor. Beside what was yielded, one tensor is in memory.

        Args:
            shares: What was dealt to this site, by itself too.
            update: Float32, already noised.

        Raises:
            OutOfRange: a value does not fit; nothing was masked, and the terms are agreed to all the same.
            PeerRefused: a share was tampered with.
            StepRefused: it was masked before or is not yet due, fewer than the threshold dealt, or the answer
                to the same request was masked under other terms.
        """
        if not self._dealt or self._shares:
            raise StepRefused(
                f"site {self._site!r} masks its update once in an attempt, after it dealt its shares; "
                "start a new attempt"
            )
        self._require_enough([share.dealer for share in shares], "deal shares", among=self._offers)
        opened = {share.dealer: self._opened(share) for share in shares}
        keys = {name: self._pair_key(name) for name in opened if name != self._site}
        # Before the range is looked at: refusals under range after range would tell the largest value.
        self._agree("terms", self._terms.lasting)
        for name, values in update.items():
            self._terms.grid.check(name, values)
        self._shares = opened
        return self._masked(update, keys)

    def consent(self, survivors: Sequence[str]) -> Consent:
        """Agree to the sum of the updates of ``survivors``; durably, and to no other sum of this update.

        Raises:
            StepRefused: it is not yet due, fewer than the threshold, a site that dealt no shares, this site
                is not among them, or other sites were agreed to before, in this attempt or an earlier one.
        """
        self._require_enough(survivors, "are summed", among=self._shares)
        names = tuple(sorted(survivors))
        self._agree("sites", *names)
        self._survivors = names
        return Consent(site=self._site, signature=self._sign(self._consent_statement()).hex())

    def reveal(self, consents: Sequence[Consent]) -> Reveal:
        """The shares that unmask the sum agreed to: of summed sites the seed's, of dropped ones the key's.

        Raises:
            PeerRefused: a consent is not signed by its site's pinned key for the same sum, keys and terms.
            StepRefused: it is not yet due, fewer than the threshold consent, or one that is not summed.
        """
        self._require_enough([consent.site for consent in consents], "consent", among=self._survivors)
        statement = self._consent_statement()
        for consent in consents:
            public = self._terms.by_name[consent.site].public
            if not is_signed(statement, consent.signature, public=public):
                raise PeerRefused(
                    f"the consent of {consent.site!r} is not signed by its pinned key for the sum, keys and "
                    f"terms that {self._site!r} was shown: the coordinator told the two different things"
                )
        summed = set(self._survivors)
        return Reveal(
            site=self._site,
            seeds={name: seed.hex() for name, (seed, _) in self._shares.items() if name in summed},
            keys={name: key.hex() for name, (_, key) in self._shares.items() if name not in summed},
        )

    def _require_enough(self, names: Sequence[str], do_what: str, *, among: Collection[str]) -> None:
        """Refuse a group of sites that is too small, has a site twice, a stranger in it, or not this site."""
        if len(names) < self._terms.threshold:
            raise StepRefused(
                f"{len(names)} sites {do_what}, below the threshold of {self._terms.threshold}: "
                f"{self._site!r} goes no further"
            )
        if odd := [name for name in names if name not in among or names.count(name) > 1]:
            raise StepRefused(f"{odd[0]!r} is named twice, or was not there in the step before")
        if self._site not in names:
            raise StepRefused(f"{self._site!r} is not among the sites that {do_what}")

    def _agree(self, what: str, *facts: str) -> None:
        subject = masks.digest("subject", self._terms.request, what)
        agreement = masks.digest("agreement", self._terms.lasting, *facts)
        if self._agreements.first(subject, agreement) != agreement:
            raise StepRefused(
                f"site {self._site!r} agreed before to sum its answer to this request with other {what}, and "
                "two different sums would tell single updates apart: keep to the first, or send a new request"
            )

    def _consent_statement(self) -> bytes:
        return consent_statement(
            self._terms,
            offers=list(self._offers.values()),
            dealers=list(self._shares),
            survivors=self._survivors,
        )

    def _sealed(self, holder: str, seed_share: bytes, key_share: bytes) -> SealedShare:
        cipher, about = self._seal(self._site, holder)
        seed_commitment, key_commitment = (
            share_digest(self._terms, share, dealer=self._site, holder=holder, which=which)
            for share, which in zip((seed_share, key_share), SECRETS, strict=True)
        )
        return SealedShare(
            dealer=self._site,
            holder=holder,
            sealed=cipher.encrypt(_ONCE, seed_share + key_share, about).hex(),
            seed_digest=seed_commitment,
            key_digest=key_commitment,
        )

    def _opened(self, share: SealedShare) -> tuple[bytes, bytes]:
        """The shares of the dealer's seed and key, if they are what the dealer committed to."""
        cipher, about = self._seal(share.dealer, self._site)
        try:
            opened = cipher.decrypt(_ONCE, bytes.fromhex(share.sealed), about)
        except InvalidTag:
            raise PeerRefused(
                f"what {share.dealer!r} dealt to {self._site!r} was changed on the way, or belongs to "
                "another site, round or attempt"
            ) from None
        shares = opened[: shamir.SHARE_BYTES], opened[shamir.SHARE_BYTES :]
        for part, which, committed in zip(
            shares, SECRETS, (share.seed_digest, share.key_digest), strict=True
        ):
            made = share_digest(self._terms, part, dealer=share.dealer, holder=self._site, which=which)
            if made != committed:
                raise PeerRefused(
                    f"{share.dealer!r} dealt {self._site!r} another {which} than it committed to"
                )
        return shares

    def _seal(self, dealer: str, holder: str) -> tuple[ChaCha20Poly1305, bytes]:
        """The cipher for what ``dealer`` sends ``holder`` (one is this site), and what it is bound to."""
        peer = holder if dealer == self._site else dealer
        facts = (self._terms.session, dealer, holder)
        key = masks.shared_key(self._seal_key, self._offers[peer].seal_key, purpose="seal", facts=facts)
        return ChaCha20Poly1305(key), masks.context("sealed share", *facts)

    def _pair_key(self, peer: str) -> bytes:
        return masks.pair_key(
            self._mask_key,
            self._offers[peer].mask_key,
            session=self._terms.session,
            sites=(self._site, peer),
        )

    def _masked(
        self, update: Mapping[str, NDArray[Any]], keys: Mapping[str, bytes]
    ) -> Iterator[tuple[str, NDArray[np.uint32]]]:
        own = masks.self_key(self._seed, session=self._terms.session, site=self._site)
        weight = self._terms.by_name[self._site].weight
        for name, values in update.items():
            masked = self._terms.grid.encode(values, weight=weight)
            masks.add_mask(masked, own, tensor=name, sign=1)
            for peer, key in keys.items():
                masks.add_mask(masked, key, tensor=name, sign=masks.pair_sign(self._site, peer))
            yield name, masked


def _require_acceptable(
    terms: Terms, *, site: str, weight: int, at_least: int, pins: Mapping[str, str]
) -> None:
    for participant in terms.participants:
        if (pin := pins.get(participant.site)) is None:
            raise TermsRefused(
                f"no key is pinned here for {participant.site!r}: add it to this site's settings"
            )
        if pin != participant.public:
            raise TermsRefused(
                f"the key of {participant.site!r} is not the one pinned here: ask that site, not the "
                "coordinator, whether it has a new one"
            )
    if site not in terms.by_name:
        raise TermsRefused(f"{site!r} is not among the participants")
    if (asked := terms.by_name[site].weight) != weight:
        raise TermsRefused(f"expected weight {weight} for {site!r}, asked was {asked}")
    if terms.threshold < at_least:
        raise TermsRefused(
            f"the threshold is {terms.threshold}, and {site!r} takes part from "
            f"{at_least} on: agree on a larger threshold"
        )


def _require_distinct_keys(offers: Sequence[KeyOffer]) -> None:
    seen: dict[str, str] = {}
    for offer in offers:
        for key in (offer.mask_key, offer.seal_key):
            if key in seen:
                raise PeerRefused(f"{offer.site!r} offers the same key as {seen[key]!r}")
            seen[key] = offer.site
