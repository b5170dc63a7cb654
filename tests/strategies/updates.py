"""Models and updates for the tests of strategies."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from strategies.messages import Arrays

Round = tuple[Arrays, list[tuple[Arrays, float]]]

values = st.floats(-1e6, 1e6, width=32)
weights = st.floats(1e-3, 1e6)


@st.composite
def rounds(draw: Any, fewest: int = 1, most: int = 5) -> Round:
    """A model, and updates of it with their weights."""
    shapes = draw(st.dictionaries(st.sampled_from("abc"), array_shapes(min_dims=0, max_dims=3, max_side=3)))

    def model() -> Arrays:
        return {name: draw(arrays(np.float32, shape, elements=values)) for name, shape in shapes.items()}

    return model(), [(model(), draw(weights)) for _ in range(draw(st.integers(fewest, most)))]


def drawn(seed: int, sites: int, *, scale: float = 1.0) -> list[Arrays]:
    """Updates of two arrays, one of them a scalar."""
    rng = np.random.default_rng(seed)
    return [
        {
            "a": (scale * rng.standard_normal((3, 5))).astype(np.float32),
            "b": np.float32(scale * rng.standard_normal(())) * np.ones((), np.float32),
        }
        for _ in range(sites)
    ]


def zeros(like: Arrays) -> Arrays:
    return {name: np.zeros_like(value) for name, value in like.items()}


def one(value: float) -> Arrays:
    return {"a": np.array([value], dtype=np.float32)}


@contextmanager
def room() -> Iterator[Path]:
    """A folder for one example of Hypothesis, where a fixture would serve all of them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
