"""An update comes back from every wire form as the form promises, and nothing else is taken for one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies.messages import Arrays, MessageError, Wire, bytes_of
from strategies.wire import pack, size_of, unpack

FORMS: tuple[Wire, ...] = ("fp32", "bf16", "int8")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
VALUES = st.floats(-(2.0**100), 2.0**100, width=32)
UPDATES = st.dictionaries(st.sampled_from("abc"), hnp.arrays(np.float32, SHAPES, elements=VALUES), min_size=1)


def there_and_back(update: Arrays, form: Wire, *, seed: int = 0) -> Arrays:
    return unpack(pack(update, form, rng=np.random.default_rng(seed)), form, like=update)


def one(*values: float) -> Arrays:
    return {"a": np.array(values, dtype=np.float32)}


@settings(max_examples=60, deadline=None)
@given(update=UPDATES)
def test_float32_comes_back_as_it_was(update: Arrays) -> None:
    for name, value in there_and_back(update, "fp32").items():
        assert np.array_equal(value, update[name])


@settings(max_examples=60, deadline=None)
@given(update=UPDATES)
def test_bfloat16_is_within_a_256th_of_each_value(update: Arrays) -> None:
    for name, value in there_and_back(update, "bf16").items():
        least = np.float32(2.0**-133)  # of bfloat16's smallest numbers
        assert (np.abs(value - update[name]) <= np.maximum(np.abs(update[name]) * 2.0**-8, least)).all()


@settings(max_examples=60, deadline=None)
@given(update=UPDATES, seed=st.integers(0, 9))
def test_int8_is_within_a_127th_of_the_largest_in_its_row(update: Arrays, seed: int) -> None:
    for name, value in there_and_back(update, "int8", seed=seed).items():
        rows = value.shape[0] if value.ndim > 1 else 1
        if not value.size:
            continue
        exact, found = update[name].reshape(rows, -1).astype(np.float64), value.reshape(rows, -1)
        bound = np.abs(exact).max(1, keepdims=True) / 127 * (1 + 1e-5) + 1e-44
        assert (np.abs(found - exact) <= bound).all()


def test_int8_is_right_on_average() -> None:
    update = {"a": np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)}
    tries = 4_000
    mean = np.mean([there_and_back(update, "int8", seed=seed)["a"] for seed in range(tries)], axis=0)
    step = np.abs(update["a"]).max(1, keepdims=True) / 127
    assert (np.abs(mean - update["a"]) < 5 * 0.5 * step / np.sqrt(tries)).all()


def test_the_largest_value_of_a_row_is_kept_by_int8() -> None:
    found = there_and_back(one(-3.0, 1.0, 0.0), "int8")["a"]
    assert found[0] == pytest.approx(-3.0, rel=1e-6)
    assert found[2] == 0


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    ties = one(1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 2.0**-8)
    assert there_and_back(ties, "bf16")["a"].tolist() == [1.0, 1.0 + 2.0**-6, -1.0]


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_nothing_come_back(form: Wire) -> None:
    update = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.zeros((0, 4), np.float32),
        "c": np.zeros((), np.float32),
    }
    for name, value in there_and_back(update, form).items():
        assert np.array_equal(value, update[name])


@pytest.mark.parametrize(("form", "bytes_each"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_the_size_is_known_before(form: Wire, bytes_each: int) -> None:
    update = {"a": np.ones((8, 16), np.float32), "b": np.ones(5, np.float32), "c": np.ones((), np.float32)}
    scales = 4 * (8 + 1 + 1) if form == "int8" else 0
    packed = pack(update, form, rng=np.random.default_rng(0))
    assert bytes_of(packed) == size_of(update, form) == bytes_each * (8 * 16 + 5 + 1) + scales


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_gives_the_same_bytes(form: Wire) -> None:
    update = {"a": np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)}
    first, second = (pack(update, form, rng=np.random.default_rng(4)) for _ in "ab")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_value_beyond_bfloat16_is_named() -> None:
    with pytest.raises(MessageError, match=r"array 'a': a value is too large for bf16"):
        pack(one(3.4e38), "bf16", rng=np.random.default_rng(0))


LIKE = {"a": np.zeros((2, 3), np.float32)}
GOOD: dict[Wire, Arrays] = {form: pack(LIKE, form, rng=np.random.default_rng(0)) for form in FORMS}


@pytest.mark.parametrize(
    ("form", "sent", "message"),
    [
        ("int8", GOOD["fp32"], r"array 'a': expected int8\(2, 3\) in form int8, got float32\(2, 3\)"),
        ("bf16", GOOD["int8"], r"array 'a': expected uint16\(2, 3\) in form bf16, got int8"),
        ("int8", {"a": GOOD["int8"]["a"]}, r"'a/scale': expected float32\(2,\) in form int8, got nothing"),
        ("int8", {**GOOD["int8"], "b": GOOD["int8"]["a"]}, r"array 'b': expected nothing in form int8"),
        ("int8", {**GOOD["int8"], "a/scale": np.zeros(3, np.float32)}, r"expected float32\(2,\)"),
        ("bf16", {"a": np.zeros((3, 2), np.uint16)}, r"expected uint16\(2, 3\) in form bf16, got uint16\(3"),
        ("fp32", GOOD["bf16"], r"array 'a': expected float32\(2, 3\), got uint16"),
        ("fp32", {"a": np.full((2, 3), np.nan, np.float32)}, "array 'a' is not finite"),
        ("bf16", {"a": np.full((2, 3), 0x7F80, np.uint16)}, "array 'a' is not finite"),
        ("int8", {"a": np.ones((2, 3), np.int8), "a/scale": np.full(2, np.inf, np.float32)}, "not finite"),
    ],
)
def test_what_is_not_of_the_form_is_refused(form: Wire, sent: Arrays, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        unpack(sent, form, like=LIKE)
