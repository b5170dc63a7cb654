"""A federation of sites for secure sums, all in this process, each step open to what a test does to it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from strategies.secure_sum.coordinator import SecureSum
from strategies.secure_sum.messages import Consent, KeyOffer, Participant, Reveal, SealedShare, Terms
from strategies.secure_sum.site import SiteSession

Arrays = dict[str, NDArray[Any]]
STEPS = ("offer", "deal", "mask", "consent", "reveal")
KEYS = [Ed25519PrivateKey.generate() for _ in range(9)]
NAMES = [f"site-{number}" for number in range(1, 10)]
PINS = {name: key.public_key().public_bytes_raw().hex() for name, key in zip(NAMES, KEYS, strict=True)}


class Remembered(dict[str, str]):
    """Agreements in memory."""

    def first(self, subject: str, agreement: str) -> str:
        return self.setdefault(subject, agreement)


def terms(
    weights: Collection[int] = (1, 1, 1, 1, 1), *, threshold: int | None = None, **changes: Any
) -> Terms:
    """Terms for as many sites as there are weights."""
    participants = tuple(
        Participant(site=name, weight=weight, public=PINS[name])
        for name, weight in zip(NAMES, weights, strict=False)
    )
    facts: dict[str, Any] = {
        "run": "run",
        "server_round": 1,
        "request": "ab" * 32,
        "attempt": 1,
        "participants": participants,
        "threshold": threshold or len(participants) // 2 + 1,
        "value_range": 4.0,
    }
    return Terms(**{**facts, **changes})


def session(agreed: Terms, name: str, **changes: Any) -> SiteSession:
    """One site's."""
    facts: dict[str, Any] = {
        "site": name,
        "weight": changes.get("weight") or agreed.by_name[name].weight,
        "at_least": 2,
        "pins": PINS,
        "sign": KEYS[NAMES.index(name)].sign,
        "agreements": Remembered(),
    }
    return SiteSession(agreed, **{**facts, **changes})


def updates(agreed: Terms, *, size: int = 50, seed: int = 0) -> dict[str, Arrays]:
    """One for each site."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            "weight": rng.normal(0, 0.5, (size, 2)).clip(-4, 4).astype(np.float32),
            "scale": np.asarray(rng.uniform(-4, 4), dtype=np.float32),
        }
        for name in agreed.names
    }


@dataclass
class Attempt:
    """Runs an attempt step by step; a test looks at, and may change, all that was said in between."""

    terms: Terms
    updates: Mapping[str, Arrays]
    agreements: Mapping[str, Remembered] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    sites: dict[str, SiteSession] = field(init=False)
    server: SecureSum = field(init=False)
    offers: tuple[KeyOffer, ...] = ()
    dealt: dict[str, tuple[SealedShare, ...]] = field(default_factory=dict)
    shares: dict[str, tuple[SealedShare, ...]] = field(default_factory=dict)
    masked: dict[str, dict[str, NDArray[np.uint32]]] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    consents: tuple[Consent, ...] = ()
    reveals: dict[str, Reveal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = {
            name: session(self.terms, name, agreements=self.agreements.get(name, Remembered()))
            for name in self.terms.names
        }
        self.server = SecureSum(self.terms, next(iter(self.updates.values())))

    def speaking(self, names: Collection[str], step: str) -> list[str]:
        """Those of ``names`` that have not dropped out before or in ``step``."""
        gone = {name for name, when in self.silent.items() if STEPS.index(when) <= STEPS.index(step)}
        return [name for name in names if name not in gone]

    def until(self, last: str) -> "Attempt":
        """Run all steps up to ``last``."""
        for step in STEPS[: STEPS.index(last) + 1]:
            getattr(self, step)()
        return self

    def offer(self) -> None:
        for name in self.speaking(list(self.sites), "offer"):
            self.server.take_offer(self.sites[name].offer())
        self.offers = self.server.offers()

    def deal(self) -> None:
        for name in self.speaking([offer.site for offer in self.offers], "deal"):
            self.dealt[name] = self.sites[name].deal(self.offers)
            self.server.take_shares(name, self.dealt[name])
        self.shares = self.server.shares()

    def mask(self) -> None:
        for name in self.speaking(list(self.shares), "mask"):
            self.masked[name] = dict(self.sites[name].mask(self.shares[name], self.updates[name]))
            self.server.fold(name, self.masked[name])
        self.survivors = self.server.survivors()

    def consent(self) -> None:
        for name in self.speaking(self.survivors, "consent"):
            self.server.take_consent(self.sites[name].consent(self.survivors))
        self.consents = self.server.consents()

    def reveal(self) -> None:
        for name in self.speaking([consent.site for consent in self.consents], "reveal"):
            self.reveals[name] = self.sites[name].reveal(self.consents)
            self.server.take_reveal(self.reveals[name])


def attempt(agreed: Terms | None = None, **changes: Any) -> Attempt:
    """One under these terms, by default of five sites of weight 1, with an update each."""
    agreed = agreed or terms()
    return Attempt(agreed, updates(agreed), **changes)


def remembered(agreed: Terms) -> dict[str, Remembered]:
    """Agreements in memory for each site, which outlive an attempt."""
    return {name: Remembered() for name in agreed.names}


def exact_mean(agreed: Terms, updates: Mapping[str, Arrays], survivors: Collection[str]) -> Arrays:
    """What a secure sum should give."""
    weights = [agreed.by_name[name].weight for name in survivors]
    return {
        key: np.average(
            [updates[name][key].astype(np.float64) for name in survivors], axis=0, weights=weights
        )
        for key in next(iter(updates.values()))
    }


def assert_close(agreed: Terms, means: Arrays, exact: Arrays, survivors: Collection[str]) -> None:
    """Within the promised error, and the rounding to float32."""
    bound = agreed.grid.error(sites=len(survivors), weight=agreed.weight_of(list(survivors)))
    assert means.keys() == exact.keys()
    for name, value in exact.items():
        assert means[name].dtype == np.float32
        assert means[name].shape == np.shape(value)
        rounding = np.spacing(np.abs(means[name]))
        assert (np.abs(means[name].astype(np.float64) - value) <= bound + rounding).all(), name
