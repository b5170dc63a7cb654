"""The messages of a secure sum on the wire."""

import json
from typing import Any

import numpy as np
import pytest

from strategies.messages import (
    MOST_SITES,
    Agree,
    Agreed,
    Arrays,
    Deal,
    Dealt,
    Facts,
    Mask,
    Masked,
    MessageError,
    Ready,
    ReleaseFacts,
    Revealed,
    TrainRequest,
    Unmask,
    addressed,
    decode,
    encode,
)
from strategies.secure_sum.messages import Terms
from tests.small_hospitals import plan
from tests.strategies.secure_sum.hospitals import session, terms, updates

FACTS = ReleaseFacts(
    site="site-1", server_round=1, patients_declared=1, steps=4, seconds=10.0, epsilon=0.5, epsilon_max=8.0,
    delta=1e-4, noise_multiplier=1.1, sample_rate=0.08, max_grad_norm=1.0, anchor=None,
    insecure_seed=False, replayed=False,
)  # fmt: skip


def attempt() -> tuple[Terms, list[Facts], Arrays]:
    """All that is said in one, but for the masked arrays; and those."""
    agreed = terms((3, 2, 1), threshold=2)
    sites = {name: session(agreed, name) for name in agreed.names}
    offers = tuple(site.offer() for site in sites.values())
    dealt = {name: site.deal(offers) for name, site in sites.items()}
    mine = {name: tuple(shares[number] for shares in dealt.values()) for number, name in enumerate(sites)}
    masked = {name: dict(site.mask(mine[name], updates(agreed)[name])) for name, site in sites.items()}
    consents = tuple(site.consent(agreed.names) for site in sites.values())
    number, first = agreed.session, agreed.names[0]
    return (
        agreed,
        [
            Ready(facts=FACTS, offer=offers[0]),
            Deal(session=number, offers=offers),
            Dealt(site=first, shares=dealt[first]),
            Mask(session=number, shares=mine[first]),
            Agree(session=number, survivors=agreed.names),
            Agreed(consent=consents[0]),
            Unmask(session=number, consents=consents),
            Revealed(reveal=sites[first].reveal(consents)),
        ],
        dict(masked[first]),
    )


def request(agreed: Terms | None) -> TrainRequest:
    return TrainRequest(
        run="run",
        server_round=1,
        bundle="b",
        plan=plan(),
        arrays={"w": np.ones(3, np.float32)},
        secure=agreed,
    )


def test_every_message_of_an_attempt_survives_the_wire() -> None:
    agreed, said, masked = attempt()
    for message in said:
        assert decode(encode(message)) == message
    got = decode(encode(Masked(site="site-1", arrays=masked)))
    assert isinstance(got, Masked)
    assert got.site == "site-1"
    assert {name: (value.dtype, value.tobytes()) for name, value in got.arrays.items()} == {
        name: (np.dtype("uint32"), value.tobytes()) for name, value in masked.items()
    }
    sent = decode(addressed(encode(request(agreed))))
    assert isinstance(sent, TrainRequest)
    assert sent.secure == agreed
    assert sent.secure.session == agreed.session


def test_terms_are_no_part_of_a_requests_identity() -> None:
    assert request(terms()).digest == request(None).digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threshold": 1}, "TrainRequest: wrong fields: secure"),
        ({"participants": []}, "TrainRequest: wrong fields: secure"),
        ({"value_range": -1.0}, "TrainRequest: wrong fields: secure"),
        ({"weighting": "mine"}, r"TrainRequest: wrong fields: secure\.weighting"),
        ({"backdoor": 1}, r"TrainRequest: wrong fields: secure\.backdoor"),
    ],
)
def test_malformed_terms_are_refused_by_name(change: dict[str, Any], reason: str) -> None:
    content = encode(request(terms()))
    facts = content["facts"]
    whole = json.loads(str(facts["json"]))
    facts["json"] = json.dumps({**whole, "secure": {**whole["secure"], **change}})
    with pytest.raises(MessageError, match=reason):
        decode(content)


def test_a_list_longer_than_any_federation_is_refused() -> None:
    _, said, _ = attempt()
    deal = said[1]
    assert isinstance(deal, Deal)
    content = encode(deal.model_copy(update={"offers": deal.offers * MOST_SITES}))
    with pytest.raises(MessageError, match="Deal: wrong fields: offers"):
        decode(content)


@pytest.mark.parametrize("session", ["", "AB" * 32, "ab" * 31, "../" + "ab" * 32])
def test_a_session_is_a_digest(session: str) -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        Agree(session=session, survivors=())
