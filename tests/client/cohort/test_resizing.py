"""Sizes, areas and rounding on the way to the packed square."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.cohort import resizing
from client.cohort.outcomes import Code, RefusedError
from client.cohort.pixels import Frame
from client.cohort.resizing import fit_square, shrink, shrink_frame


@given(height=st.integers(2, 90), width=st.integers(2, 90), size=st.sampled_from([16, 33, 64]))
def test_aspect_is_kept_and_the_rest_is_black(height: int, width: int, size: int) -> None:
    grey = np.linspace(0.5, 1, height * width, dtype=np.float32).reshape(height, width)
    square = fit_square(grey, size=size)
    assert square.shape == (size, size)
    rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
    scale = size / max(height, width)
    assert len(rows) == max(1, round(height * scale))
    assert len(columns) == max(1, round(width * scale))
    assert abs(rows[0] - (size - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (size - 1 - columns[-1])) <= 1


def test_reduction_keeps_the_mean() -> None:
    values = np.random.default_rng(0).random((120, 240)).astype(np.float32)
    assert shrink(values, size=24).mean() == pytest.approx(values.mean(), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 80), seed=st.integers(0, 9))
@example(height=29, width=247, size=47, seed=9)  # a third of the averages are tied
def test_strips_give_the_same_averages_as_the_whole(height: int, width: int, size: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4096, (height, width), dtype=np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "_STRIP_VALUES", 1500)
        frame = Frame(values=values, shape=(height, width), top=4095)
        found = shrink_frame(frame, lambda rows: rows.astype(np.float32), size=size)
    whole = shrink(values.astype(np.float32), size=size)
    assert found.shape == whole.shape
    told = ~tied_rows(height, len(whole))
    np.testing.assert_allclose(found[told], whole[told], atol=0.01)


def tied_rows(height: int, rows: int) -> NDArray[np.bool_]:
    """Which of ``rows`` averages have a row's centre on their edge: rounding decides who has it."""
    twice, rest = np.divmod(2 * height * np.arange(rows + 1), rows)
    tied = (rest == 0) & (twice % 2 == 1)
    return np.asarray(tied[:-1] | tied[1:])


def test_strips_follow_the_rows_they_stand_for() -> None:
    values = np.repeat(np.arange(1000, dtype=np.uint16), 8).reshape(1000, 8)
    frame = Frame(values=values, shape=(1000, 8), top=4095)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "_STRIP_VALUES", 100)
        found = shrink_frame(frame, lambda rows: rows.astype(np.float32), size=50)
    np.testing.assert_allclose(found[:, 0], np.arange(9.5, 1000, 20))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells of glibc's allocator")
def test_memory_of_one_strip_is_used_for_the_next() -> None:
    """In a process of its own: this one's allocator has learned from all the tests before."""
    program = """
import resource
import numpy as np
from client.cohort.pixels import Frame
from client.cohort.resizing import shrink_frame
frame = Frame(values=np.ones((2500, 2000), np.uint16), shape=(2500, 2000), top=4095)
show = lambda: shrink_frame(frame, lambda rows: rows.astype(np.float32), size=224)
show()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
show()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    root = Path(__file__).parents[3]
    faults = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert int(faults) < 500  # 5,000 pages of floats pass through


def test_a_frame_smaller_than_the_square_is_enlarged() -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    frame = Frame(values=values, shape=(3, 4), top=4095)
    found = shrink_frame(frame, lambda rows: rows.astype(np.float32), size=16)
    np.testing.assert_array_equal(found, shrink(values.astype(np.float32), size=16))


@pytest.mark.parametrize("halvings", [1, 2, 3, 4])
def test_a_halved_frame_stands_where_the_whole_one_does(halvings: int) -> None:
    """A slope shows any displacement as an offset: a row of 2^k would be one of 0.5 * (2^k - 1)."""
    step = 2**halvings
    slope = np.add.outer(np.arange(640.0), 2 * np.arange(480.0)).astype(np.float32)
    whole = shrink_frame(Frame(values=slope, shape=slope.shape, top=9), lambda rows: rows, size=24)
    sampled = Frame(values=slope[::step, ::step], shape=slope.shape, halvings=halvings, top=9)
    halved = shrink_frame(sampled, lambda rows: rows, size=24)
    assert halved.shape == whole.shape
    assert np.abs(halved - whole)[1:-1, 1:-1].max() < 0.3 * step


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_to_the_nearest_level(bits: Literal[8, 16]) -> None:
    top = 2**bits - 1
    grey = np.array([[0, 0.4 / top], [0.6 / top, 1]], dtype=np.float32)
    np.testing.assert_array_equal(fit_square(grey, size=2, bits=bits), [[0, 0], [1, top]])


def test_one_level_everywhere_is_blank() -> None:
    with pytest.raises(RefusedError) as refused:
        fit_square(np.full((4, 4), 0.5, dtype=np.float32), size=4)
    assert refused.value.rejected.code == Code.E_BLANK
