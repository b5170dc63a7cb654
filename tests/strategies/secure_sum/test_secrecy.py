"""What the coordinator sees of one site looks like noise; each check is seen to find a planted mistake."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from scipy import stats

from strategies.secure_sum import masks, shamir
from strategies.secure_sum.messages import Terms
from tests.strategies.secure_sum.hospitals import Arrays, Attempt, terms, updates

SIZE = 20_000
ALPHA = 1e-6  # a fair stream fails once in a million


def looks_random(words: NDArray[np.uint32]) -> bool:
    """Every byte value as often as every other (chi-square), in each of the four places of a word."""
    places = words.reshape(-1).view(np.uint8).reshape(-1, 4)
    tests = (stats.chisquare(np.bincount(places[:, i], minlength=256)).pvalue for i in range(4))
    return all(pvalue > ALPHA for pvalue in tests)


def is_unrelated(words: NDArray[np.uint32], plain: NDArray[Any]) -> bool:
    """No correlation with ``plain``, read as signed or as unsigned numbers."""
    flat = plain.reshape(-1).astype(np.float64)
    tests = (stats.pearsonr(view.reshape(-1), flat).pvalue for view in (words.view(np.int32), words))
    return all(pvalue > ALPHA for pvalue in tests)


def hidden(words: NDArray[np.uint32], plain: NDArray[Any]) -> bool:
    return looks_random(words) and is_unrelated(words, plain)


@pytest.fixture(scope="module")
def made() -> tuple[Terms, dict[str, Arrays]]:
    agreed = terms([1, 2, 3])
    return agreed, updates(agreed, size=SIZE // 2)


def test_a_masked_update_looks_random_and_unrelated_to_the_update(
    made: tuple[Terms, dict[str, Arrays]],
) -> None:
    attempt = Attempt(*made).until("mask")
    for name, masked in attempt.masked.items():
        assert hidden(masked["weight"], made[1][name]["weight"])


def test_masked_zeros_look_random_too(made: tuple[Terms, dict[str, Arrays]]) -> None:
    zeros = {name: {key: np.zeros_like(a) for key, a in update.items()} for name, update in made[1].items()}
    assert all(
        looks_random(masked["weight"]) for masked in Attempt(made[0], zeros).until("mask").masked.values()
    )


def test_a_masked_sum_of_prototypes_looks_random_and_unrelated() -> None:
    """Values as large as patients are many, on a grid as wide as all that are declared."""
    agreed = terms([1, 1, 1], value_range=16_000.0)
    rng = np.random.default_rng(0)
    sums = {name: {"sums": rng.normal(200, 900, SIZE).astype(np.float32)} for name in agreed.names}
    for name, masked in Attempt(agreed, sums).until("mask").masked.items():
        assert hidden(masked["sums"], sums[name]["sums"])
        assert not hidden(agreed.grid.encode(sums[name]["sums"], weight=1), sums[name]["sums"])


def test_the_sum_before_unmasking_looks_random(made: tuple[Terms, dict[str, Arrays]]) -> None:
    attempt = Attempt(*made).until("mask")
    total = sum(masked["weight"] for masked in attempt.masked.values())
    assert hidden(np.asarray(total, dtype=np.uint32), made[1]["site-3"]["weight"])


def test_without_masks_the_checks_fail(
    made: tuple[Terms, dict[str, Arrays]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: no masks at all, and masks that only cover the lower half of each word."""
    monkeypatch.setattr(masks, "add_mask", lambda *_, **__: None)
    plain = Attempt(*made).until("mask").masked["site-1"]["weight"]
    assert not looks_random(plain)
    assert not is_unrelated(plain, made[1]["site-1"]["weight"])
    half = plain + np.random.default_rng(0).integers(0, 2**16, plain.shape, dtype=np.uint32)
    assert not hidden(half, made[1]["site-1"]["weight"])


def late_update(made: tuple[Terms, dict[str, Arrays]]) -> NDArray[np.uint32]:
    """What is left of a late update once its site counts as dropped and its mask key was revealed.

    The masked update of site-3 arrives after the others were asked to unmask without it: the case that the
    self mask is for (Bonawitz et al. 2017, section 4, "double-masking").
    """
    agreed, plain = made
    attempt = Attempt(agreed, plain, silent={"site-3": "mask"}).until("reveal")
    late = dict(attempt.sites["site-3"].mask(attempt.shares["site-3"], plain["site-3"]))["weight"]
    shares = {
        agreed.points[name]: bytes.fromhex(said.keys["site-3"]) for name, said in attempt.reveals.items()
    }
    private = X25519PrivateKey.from_private_bytes(shamir.combine(shares))
    for offer in attempt.offers[:2]:
        pair = (offer.site, "site-3")
        key = masks.pair_key(private, offer.mask_key, session=agreed.session, sites=pair)
        masks.add_mask(late, key, tensor="weight", sign=-masks.pair_sign("site-3", offer.site))
    return late


def test_a_late_update_stays_hidden_though_its_mask_key_was_revealed(
    made: tuple[Terms, dict[str, Arrays]],
) -> None:
    assert hidden(late_update(made), made[1]["site-3"]["weight"])


def test_without_the_self_mask_a_late_update_would_lie_open(
    made: tuple[Terms, dict[str, Arrays]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the self mask is left out."""
    add_mask, self_key = masks.add_mask, masks.self_key
    own: list[bytes] = []

    def remembered(seed: bytes, **facts: str) -> bytes:
        own.append(self_key(seed, **facts))
        return own[-1]

    def without_own(total: NDArray[np.uint32], key: bytes, **facts: Any) -> None:
        if key not in own:
            add_mask(total, key, **facts)

    monkeypatch.setattr(masks, "self_key", remembered)
    monkeypatch.setattr(masks, "add_mask", without_own)
    late = late_update(made)
    assert not hidden(late, made[1]["site-3"]["weight"])
    grid = made[0].grid
    np.testing.assert_array_equal(late, grid.encode(made[1]["site-3"]["weight"], weight=3))


def stream(key: bytes, tensor: str = "a", size: int = SIZE) -> NDArray[np.uint32]:
    words = np.zeros(size, dtype=np.uint32)
    masks.add_mask(words, key, tensor=tensor, sign=1)
    return words


def keys_depend_on_every_byte(derive: Any) -> bool:
    """Whether changing any one byte of a 32-byte secret changes the mask."""
    base = bytes(range(32))
    changed = [base[:i] + bytes([base[i] ^ 1]) + base[i + 1 :] for i in range(32)]
    return len({stream(derive(secret), size=8).tobytes() for secret in (base, *changed)}) == 33


def test_every_byte_of_a_seed_counts() -> None:
    assert keys_depend_on_every_byte(lambda seed: masks.self_key(seed, session="s", site="a"))
    assert keys_depend_on_every_byte(lambda key: key)


def test_a_seed_folded_to_32_bits_would_be_found() -> None:
    """Planted: what Flower's SecAgg+ does with a 256-bit seed."""

    def folded(seed: bytes) -> bytes:
        return masks.self_key(seed[-4:].rjust(32, b"\0"), session="s", site="a")

    assert not keys_depend_on_every_byte(folded)


def unmasking_words(attempt: Attempt, name: str) -> NDArray[np.uint32]:
    """The masks on an update: the masked one less the plain one in fixed point."""
    weight = attempt.terms.by_name[name].weight
    plain = attempt.terms.grid.encode(attempt.updates[name]["weight"], weight=weight)
    return attempt.masked[name]["weight"] - plain


@pytest.mark.parametrize("change", [{}, {"attempt": 2}, {"server_round": 2}, {"request": "cd" * 32}])
def test_the_masks_of_two_attempts_rounds_or_phases_are_independent(
    made: tuple[Terms, dict[str, Arrays]], change: dict[str, Any]
) -> None:
    first = Attempt(*made).until("mask")
    second = Attempt(replace(made[0], **change), made[1]).until("mask")
    for name in made[0].names:
        one, other = unmasking_words(first, name), unmasking_words(second, name)
        assert looks_random(one - other)
        assert is_unrelated(one, other)


def test_the_same_keys_give_other_masks_under_other_terms_to_other_pairs_and_tensors() -> None:
    private, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    public = peer.public_bytes_raw().hex()
    one = masks.pair_key(private, public, session="one", sites=("a", "b"))
    assert masks.pair_key(private, public, session="two", sites=("a", "b")) != one
    assert masks.pair_key(private, public, session="one", sites=("a", "c")) != one
    assert masks.self_key(one, session="one", site="a") != masks.self_key(one, session="two", site="a")
    assert masks.self_key(one, session="one", site="a") != masks.self_key(one, session="one", site="b")
    assert is_unrelated(stream(one, "weight"), stream(one, "bias"))
    assert looks_random(stream(one, "weight") - stream(one, "bias"))


def test_the_masks_of_a_pair_cancel(made: tuple[Terms, dict[str, Arrays]]) -> None:
    ours, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    total = np.arange(7, dtype=np.uint32)
    for mine, other, names in ((ours, theirs, ("a", "b")), (theirs, ours, ("b", "a"))):
        public = other.public_key().public_bytes_raw().hex()
        key = masks.pair_key(mine, public, session="s", sites=names)
        masks.add_mask(total, key, tensor="t", sign=masks.pair_sign(*names))
    np.testing.assert_array_equal(total, np.arange(7))
