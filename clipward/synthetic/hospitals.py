"""The hospitals and the public collection: who has which unit, which style, which patients.

The public collection comes from one plain unit and one plain style. Each hospital differs from it in
grey curve, sharpness, noise, field and format, in what it calls things, and in what it sees: that difference
is what a federation is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from clipward.synthetic.findings import CaseMix
from clipward.synthetic.scanner import Scanner
from clipward.synthetic.wording import HOSPITAL_STYLES, PUBLIC_STYLE, Style

PUBLIC_INDEX = 0


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """One source of studies.

    Attributes:
        index: 0 for the public collection, hospitals from 1.
        name: Folder name, "public" or "site-1".
        scanner: Its X-ray unit.
        style: How it reports.
        mix: What it sees.
    """

    index: int
    name: str
    scanner: Scanner
    style: Style
    mix: CaseMix


PUBLIC_SCANNER = Scanner(
    manufacturer="Clipward Public",
    model="Plain",
    rows=256,
    columns=256,
    bits_stored=12,
    inverted=False,
    window=True,
    transfer_syntax=ExplicitVRLittleEndian,
    annotated=True,
    gamma=1.0,
    contrast=1.0,
    brightness=0.0,
    blur=0.0,
    noise=0.03,
    mottle=0.010,
    exposure=0.02,
    bone=1.0,
    border=0.0,
    marker="L",
    bedside=0.0,
)

HOSPITAL_SCANNERS = (
    replace(
        PUBLIC_SCANNER,
        manufacturer="Clipward North",
        model="Bright",
        rows=288,
        columns=272,
        gamma=0.88,
        contrast=0.95,
        brightness=0.02,
        blur=0.5,
        noise=0.04,
        mottle=0.012,
        exposure=0.03,
        bone=1.15,
        border=0.03,
        bedside=0.1,
    ),
    replace(
        PUBLIC_SCANNER,
        manufacturer="Clipward East",
        model="Film",
        rows=240,
        columns=248,
        bits_stored=10,
        inverted=True,
        window=False,
        transfer_syntax=ImplicitVRLittleEndian,
        annotated=False,
        gamma=1.15,
        contrast=1.05,
        brightness=0.01,
        noise=0.05,
        mottle=0.014,
        exposure=0.03,
        bone=0.85,
        border=0.02,
        marker="R",
    ),
    replace(
        PUBLIC_SCANNER,
        manufacturer="Clipward South",
        model="Bedside",
        rows=224,
        columns=240,
        bits_stored=14,
        transfer_syntax=RLELossless,
        annotated=False,
        gamma=1.1,
        contrast=0.93,
        brightness=-0.02,
        blur=0.7,
        noise=0.04,
        mottle=0.016,
        exposure=0.04,
        bone=0.95,
        border=0.03,
        marker="",
        bedside=0.3,
    ),
    replace(
        PUBLIC_SCANNER,
        manufacturer="Clipward West",
        model="Compact",
        rows=256,
        columns=240,
        bits_stored=8,
        inverted=True,
        transfer_syntax=JPEGLSLossless,
        gamma=0.9,
        contrast=1.1,
        brightness=-0.02,
        blur=0.4,
        noise=0.05,
        mottle=0.014,
        exposure=0.03,
        bone=1.2,
        border=0.04,
        bedside=0.1,
    ),
    replace(
        PUBLIC_SCANNER,
        manufacturer="Clipward Coast",
        model="Archive",
        rows=208,
        columns=208,
        bits_stored=8,
        window=False,
        transfer_syntax=DeflatedExplicitVRLittleEndian,
        annotated=False,
        gamma=1.3,
        contrast=1.0,
        brightness=0.04,
        blur=0.7,
        noise=0.04,
        mottle=0.014,
        exposure=0.03,
        bone=1.05,
        border=0.03,
        marker="R",
        bedside=0.2,
    ),
)

# In the order of FINDINGS: a general hospital, a chest clinic, intensive care, cardiology, an outpost.
HOSPITAL_MIXES = (
    CaseMix(normal=0.46, weights=(1.0, 1.2, 1.2, 1.0, 0.7, 0.9, 0.8)),
    CaseMix(normal=0.46, weights=(1.3, 1.0, 0.8, 0.5, 1.1, 1.6, 0.4)),
    CaseMix(normal=0.44, weights=(1.2, 1.0, 1.4, 0.9, 1.2, 0.4, 1.8)),
    CaseMix(normal=0.46, weights=(0.7, 0.6, 1.3, 2.0, 0.5, 0.6, 1.4)),
    CaseMix(normal=0.48, weights=(1.2, 1.5, 1.0, 0.8, 0.8, 1.0, 0.4)),
)
PUBLIC_MIX = CaseMix(normal=0.45, weights=(1.0,) * 7)


def public_collection() -> Hospital:
    """The coordinator's public data."""
    return Hospital(
        index=PUBLIC_INDEX, name="public", scanner=PUBLIC_SCANNER, style=PUBLIC_STYLE, mix=PUBLIC_MIX
    )


def hospital(index: int) -> Hospital:
    """The hospital of a number, from 1; the same at every seed.

    The first five are written down above. Later ones pair units, styles and mixes anew and drift from them.
    """
    turn, place = divmod(index - 1, len(HOSPITAL_SCANNERS))
    scanner = HOSPITAL_SCANNERS[place]
    if turn:
        drift = np.random.default_rng(index)
        scanner = replace(
            scanner,
            model=f"{scanner.model} {turn + 1}",
            rows=scanner.rows + 8 * int(drift.integers(-1, 4)),
            columns=scanner.columns + 8 * int(drift.integers(-1, 4)),
            gamma=scanner.gamma * drift.uniform(0.85, 1.15),
            contrast=scanner.contrast * drift.uniform(0.9, 1.1),
            noise=scanner.noise * drift.uniform(0.7, 1.3),
            bone=scanner.bone * drift.uniform(0.8, 1.2),
        )
    return Hospital(
        index=index,
        name=f"site-{index}",
        scanner=scanner,
        style=HOSPITAL_STYLES[(place + turn) % len(HOSPITAL_STYLES)],
        mix=HOSPITAL_MIXES[(place + 2 * turn) % len(HOSPITAL_MIXES)],
    )
