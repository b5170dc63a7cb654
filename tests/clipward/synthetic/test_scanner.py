"""From phantom to stored pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clipward.synthetic.hospitals import PUBLIC_SCANNER
from clipward.synthetic.scanner import expose

QUIET = replace(PUBLIC_SCANNER, rows=200, columns=220, noise=0.0, mottle=0.0, exposure=0.0, marker="")


def flat(grey: float) -> np.ndarray:
    return np.full(QUIET.drawing_shape, grey, dtype=np.float32)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("inverted", [False, True])
def test_black_and_white_land_on_the_ends_of_the_window(bits: int, inverted: bool) -> None:
    scanner = replace(QUIET, bits_stored=bits, inverted=inverted)
    centre, width = scanner.window_centre_width
    ends = [centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2]  # PS3.3 C.11.2.1.2.1
    stored = [float(expose(flat(grey), scanner, np.random.default_rng(0))[100, 100]) for grey in (0, 1)]
    assert stored == (ends[::-1] if inverted else ends)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_stored_values_fit_their_bits_whatever_the_image_holds(bits: int) -> None:
    wild = np.random.default_rng(0).normal(0.5, 5, QUIET.drawing_shape).astype(np.float32)
    pixels = expose(wild, replace(QUIET, bits_stored=bits), np.random.default_rng(1))
    assert pixels.shape == (200, 220)
    assert pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert pixels.max() < 2**bits


def test_the_marker_stands_on_the_side_it_names() -> None:
    halves = {}
    for marker in ("L", "R", ""):
        pixels = expose(flat(0.0), replace(QUIET, marker=marker), np.random.default_rng(0)).astype(int)
        pixels -= pixels.min()
        halves[marker] = (bool(pixels[:, :110].any()), bool(pixels[:, 110:].any()))
    assert halves == {"L": (False, True), "R": (True, False), "": (False, False)}


def test_the_collimator_blackens_the_edges_alone() -> None:
    pixels = expose(flat(1.0), replace(QUIET, border=0.1), np.random.default_rng(3))
    low, high = QUIET.grey_range
    assert (pixels[[0, -1]] == low).all()
    assert (pixels[20:-20, 22:-22] == high).all()


def test_noise_has_the_stated_scale() -> None:
    low, high = QUIET.grey_range
    pixels = expose(flat(0.5), replace(QUIET, noise=0.05), np.random.default_rng(0))
    assert pixels.std() / (high - low) == pytest.approx(0.05, rel=0.02)
