"""What coordinator and sites say to each other in a secure sum; text and numbers only, fit for JSON.

Keys, signatures, shares and ciphertexts are lowercase hexadecimal digits. Masked updates are plain arrays of
uint32 by name and have no class here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from strategies.secure_sum.errors import Malformed, PeerRefused, TermsRefused
from strategies.secure_sum.fixed_point import FixedPoint
from strategies.secure_sum.masks import KEY_BYTES, context, digest, is_low_order
from strategies.secure_sum.shamir import SHARE_BYTES

SIGNATURE_BYTES, TAG_BYTES = 64, 16
Secret = Literal["seed", "key"]
Weighting = Literal["declared", "equal"]
SECRETS: tuple[Secret, Secret] = (
    "seed",
    "key",
)  # a site is unmasked by its seed when it is summed, by its key otherwise


class Strict:
    """Base: unknown fields are refused."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # where it travels in a message


@dataclass(frozen=True, kw_only=True)
class Participant(Strict):
    """A site that is asked.

    Attributes:
        site: Its name.
        weight: Of its update in the mean: a public integer, such as its declared size, or 1.
        public: Its Ed25519 key, as the coordinator knows it.
    """

    site: str
    weight: int
    public: str

    def __post_init__(self) -> None:
        require_hex("public", self.public, KEY_BYTES)
        if not (self.site and self.weight >= 1):
            raise Malformed(f"expected a site with a name and weight={self.weight} >= 1")


@dataclass(frozen=True, kw_only=True)
class Terms(Strict):
    """What one attempt at a secure sum is about; every signature and key in it is bound to all of this.

    Attributes:
        run: Name of the run.
        server_round: From 1.
        request: Digest of the training request whose answers are summed.
        attempt: From 1; a new one for every new start with the same request.
        participants: The sites that are asked; all of them may be summed, ``threshold`` must be.
        threshold: Fewest sites that are summed, and that it takes to unmask: more than half of all, so that
            two groups of this size always have a site in common.
        value_range: Largest magnitude of an update's values.
        weighting: By the sizes that the sites declare, or every site alike: each knows its own.

    Raises:
        TermsRefused: a number is out of bounds or a site is named twice.
    """

    run: str
    server_round: int
    request: str
    attempt: int
    participants: tuple[Participant, ...]
    threshold: int
    value_range: float
    weighting: Weighting = "declared"

    def __post_init__(self) -> None:
        require_hex("request", self.request, 32)
        if self.server_round < 1 or self.attempt < 1:
            raise TermsRefused(f"expected server_round={self.server_round} and attempt={self.attempt} >= 1")
        if len(set(self.names)) != len(self.names):
            raise TermsRefused("a site is named twice among the participants")
        if not max(2, len(self.names) // 2 + 1) <= self.threshold <= len(self.names):
            raise TermsRefused(
                f"expected threshold={self.threshold} of at least 2, more than half of the "
                f"{len(self.names)} participants and at most all of them"
            )
        _ = self.grid.exponent

    @property
    def names(self) -> tuple[str, ...]:
        """The participants' names, in order."""
        return tuple(participant.site for participant in self.participants)

    @cached_property
    def by_name(self) -> Mapping[str, Participant]:
        """The participants."""
        return {participant.site: participant for participant in self.participants}

    @cached_property
    def points(self) -> Mapping[str, int]:
        """Where each site's shares are evaluated."""
        return {name: number for number, name in enumerate(self.names, start=1)}

    @cached_property
    def grid(self) -> FixedPoint:
        """How updates become integers."""
        total = sum(participant.weight for participant in self.participants)
        return FixedPoint(value_range=self.value_range, sites=len(self.participants), total_weight=total)

    @cached_property
    def lasting(self) -> str:
        """Identity of the terms but for the attempt."""
        # As a float, whatever it was written as: 4 and 4.0 are the same range.
        return digest("terms", {**asdict(self), "attempt": None, "value_range": float(self.value_range)})

    @cached_property
    def session(self) -> str:
        """Identity of the attempt."""
        return digest("session", self.lasting, self.attempt)

    def weight_of(self, names: Sequence[str]) -> int:
        """Sum of the weights of these sites."""
        return sum(self.by_name[name].weight for name in names)


@dataclass(frozen=True, kw_only=True)
class KeyOffer(Strict):
    """A site takes part, with keys made for this attempt alone.

    Attributes:
        site: Its name.
        mask_key: X25519, for the masks it shares with every other site.
        seal_key: X25519, under which others send it shares.
        seed_digest: Commits it to the seed of the mask it puts on alone.
        signature: By the site's own key, over the rest and the terms.
    """

    site: str
    mask_key: str
    seal_key: str
    seed_digest: str
    signature: str

    def __post_init__(self) -> None:
        for name in ("mask_key", "seal_key", "seed_digest"):
            require_hex(name, getattr(self, name), KEY_BYTES)
        require_hex("signature", self.signature, SIGNATURE_BYTES)

    def require_genuine(self, terms: Terms, *, public: str) -> None:
        """Refuse an offer that the owner of ``public`` did not make under these very terms.

        Raises:
            PeerRefused: naming the site; also where a key would make no secret.
        """
        keys = (self.mask_key, self.seal_key, self.seed_digest)
        if not is_signed(offer_statement(terms, site=self.site, keys=keys), self.signature, public=public):
            raise PeerRefused(
                f"the keys offered for {self.site!r} are not signed by its pinned key under these terms: "
                "they were swapped, or belong to another round or attempt"
            )
        if any(map(is_low_order, (self.mask_key, self.seal_key))):
            raise PeerRefused(f"{self.site!r} offers a key of low order: what is agreed with it is no secret")


@dataclass(frozen=True, kw_only=True)
class SealedShare(Strict):
    """One share of each of a dealer's two secrets, that only its holder can read.

    Attributes:
        dealer: The site whose secrets they are: its seed and the private half of its ``mask_key``.
        holder: The site that keeps the shares.
        sealed: ChaCha20-Poly1305 ciphertext of both shares.
        seed_digest: Commits to the share of the seed; a share is uniform in 521 bits, so this tells nothing.
        key_digest: Commits to the share of the private key.
    """

    dealer: str
    holder: str
    sealed: str
    seed_digest: str
    key_digest: str

    def __post_init__(self) -> None:
        require_hex("sealed", self.sealed, 2 * SHARE_BYTES + TAG_BYTES)
        require_hex("seed_digest", self.seed_digest, KEY_BYTES)
        require_hex("key_digest", self.key_digest, KEY_BYTES)


@dataclass(frozen=True, kw_only=True)
class Consent(Strict):
    """A site's signature under the names of those that are summed, and under all it has seen before."""

    site: str
    signature: str

    def __post_init__(self) -> None:
        require_hex("signature", self.signature, SIGNATURE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Reveal(Strict):
    """A site's shares of what unmasks the sum.

    Attributes:
        site: The holder.
        seeds: Of each summed site, by name, the share of its seed.
        keys: Of each site that dealt shares and is not summed, the share of its private mask key.
    """

    site: str
    seeds: dict[str, str]
    keys: dict[str, str]

    def __post_init__(self) -> None:
        for shares in (self.seeds, self.keys):
            for name, share in shares.items():
                require_hex(f"share of {name!r}", share, SHARE_BYTES)
        if both := sorted(set(self.seeds) & set(self.keys)):
            raise Malformed(f"site {self.site!r} reveals both secrets of {both[0]!r}: one at most is asked")


def offer_statement(terms: Terms, *, site: str, keys: tuple[str, str, str]) -> bytes:
    """What a `KeyOffer` signs."""
    return context("offer", terms.session, site, keys)


def consent_statement(
    terms: Terms, *, offers: Sequence[KeyOffer], dealers: Sequence[str], survivors: Sequence[str]
) -> bytes:
    """What a `Consent` signs: the keys in use, who dealt shares and who is summed, in any order."""
    seen = sorted((offer.site, offer.mask_key, offer.seal_key, offer.seed_digest) for offer in offers)
    return context("consent", terms.session, seen, sorted(dealers), sorted(survivors))


def share_digest(terms: Terms, share: bytes, *, dealer: str, holder: str, which: Secret) -> str:
    """Commitment to one share of ``dealer``'s seed or key."""
    return digest("share", terms.session, dealer, holder, which, share.hex())


def seed_digest(terms: Terms, seed: bytes, *, site: str) -> str:
    """Commitment to a site's seed."""
    return digest("seed", terms.session, site, seed.hex())


def is_signed(statement: bytes, signature: str, *, public: str) -> bool:
    """Whether the owner of ``public`` signed ``statement``; False for nonsense."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), statement)
    except (ValueError, InvalidSignature):
        return False
    return True


def require_hex(name: str, text: str, size: int) -> None:
    """Refuse what is not ``size`` bytes as lowercase hexadecimal digits.

    Raises:
        Malformed: naming the field.
    """
    if re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is None:
        raise Malformed(f"expected {name} to be {2 * size} lowercase hexadecimal digits")
