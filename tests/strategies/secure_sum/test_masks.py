import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from strategies.secure_sum import masks
from strategies.secure_sum.fixed_point import BLOCK

KEY = bytes(range(32))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (BLOCK,), (BLOCK + 1,), (2, BLOCK)])
def test_a_mask_is_taken_away_exactly(shape: tuple[int, ...]) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)
    total = np.array(words)
    masks.add_mask(total, KEY, tensor="a", sign=1)
    assert words.size == 0 or not np.array_equal(total, words)
    masks.add_mask(total, KEY, tensor="a", sign=-1)
    np.testing.assert_array_equal(total, words)


def test_a_mask_does_not_repeat_from_block_to_block() -> None:
    total = np.zeros(3 * BLOCK, dtype=np.uint32)
    masks.add_mask(total, KEY, tensor="a", sign=1)
    first, second, third = total.reshape(3, BLOCK)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    shorter = np.zeros(5, dtype=np.uint32)
    masks.add_mask(shorter, KEY, tensor="a", sign=1)
    np.testing.assert_array_equal(shorter, first[:5])


def test_facts_that_are_joined_differently_are_different_contexts() -> None:
    assert masks.context("a", "b", "c") != masks.context("a", "bc", "")
    assert masks.context("a", ["b", "c"]) != masks.context("a", "b", "c")
    assert masks.context("a", 1) != masks.context("a", "1")
    assert masks.digest("a", '"') != masks.digest("a", '\\"')


def test_a_shared_key_is_the_same_on_both_sides_and_bound_to_its_purpose() -> None:
    ours, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    mine, other = (key.public_key().public_bytes_raw().hex() for key in (ours, theirs))
    key = masks.shared_key(ours, other, purpose="p", facts=("x",))
    assert key == masks.shared_key(theirs, mine, purpose="p", facts=("x",))
    assert len(key) == masks.KEY_BYTES
    assert key != masks.shared_key(ours, other, purpose="q", facts=("x",))
    assert key != masks.shared_key(ours, other, purpose="p", facts=("y",))


@pytest.mark.parametrize("public", ["00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f"])
def test_keys_of_low_order_are_known(public: str) -> None:
    assert masks.is_low_order(public)


def test_honest_keys_are_not_of_low_order() -> None:
    assert not masks.is_low_order(X25519PrivateKey.generate().public_key().public_bytes_raw().hex())
