"""What a compressed frame says of itself, read before a decoder believes it."""

import struct

_SOC_SIZ = b"\xff\x4f\xff\x51"  # start of code stream, and the size that has to follow
_COD = b"\xff\x52"
_SOI = b"\xff\xd8"
# Start of frame: baseline to arithmetic but for the tables among them (DHT, JPG, DAC), and JPEG-LS.
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})


def declared_pixels(stream: bytes) -> int:
    """Return rows times columns that a stream tells its decoder to make room for; 0 where it tells nothing.

    Source:
        ISO/IEC 15444-1 A.5.1 (JPEG 2000), ISO/IEC 10918-1 B.2.2 (JPEG), ISO/IEC 14495-1 C.2.2 (JPEG-LS).
    """
    place = stream.find(_SOC_SIZ)
    try:
        if place >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", stream, place + 8)
            return int(max(0, right - left) * max(0, bottom - top))
        return _frame_pixels(stream) if stream.startswith(_SOI) else 0
    except struct.error:
        return 0


def _frame_pixels(stream: bytes) -> int:
    place = len(_SOI)
    while True:
        mark, kind, length = struct.unpack_from(">BBH", stream, place)
        if mark != 0xFF:
            return 0
        if kind in _FRAMES:
            rows, columns = struct.unpack_from(">HH", stream, place + 5)
            return int(rows * columns)
        place += 1 if kind == 0xFF else 2 + length  # any number of FF may precede a marker


def coding_style(stream: bytes) -> tuple[int, bool]:
    """Return how many wavelet levels a JPEG 2000 stream has, and whether their transformation is reversible.

    Source:
        ISO/IEC 15444-1 A.6.1.
    """
    place = 2
    while stream[place : place + 2] != _COD and place < len(stream):
        place += 2 + int.from_bytes(stream[place + 2 : place + 4])
    style = stream[place : place + 14]
    return (style[9], style[13] == 1) if len(style) == 14 else (0, False)
