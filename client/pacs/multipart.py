"""Reading a ``multipart/related`` answer part by part, without holding any part in memory.

Source: RFC 2046 section 5.1.1; PS3.18 8.6.1.2.
"""

from collections.abc import Iterable, Iterator
from email.message import Message

from client.cohort.outcomes import Code
from client.pacs.errors import ItemFailed

MAX_HEADER_BYTES = 64 * 2**10


def parts(content_type: str, chunks: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    """Yield the body of each part as chunks of bytes; read one to its end before asking for the next.

    An answer that is not multipart is one part: some servers send a single object bare.

    Raises:
        ItemFailed: The answer ends before its closing boundary, or is none of the two.
    """
    message = Message()
    message["Content-Type"] = content_type
    if message.get_content_type() in ("application/dicom", "application/octet-stream"):
        yield iter(chunks)
        return
    boundary = message.get_param("boundary")
    if message.get_content_maintype() != "multipart" or not isinstance(boundary, str):
        raise ItemFailed(Code.E_FETCH_CUT, "Content-Type")
    stream = _Stream(chunks, b"\r\n--" + boundary.encode())
    for _ in stream.body():
        pass  # the preamble
    while not stream.at_end():
        yield stream.body()


class _Stream:
    """Bytes as they come, and the delimiter between parts."""

    def __init__(self, chunks: Iterable[bytes], delimiter: bytes) -> None:
        self._chunks = iter(chunks)
        self._delimiter = delimiter
        self._buffer = bytearray(b"\r\n")  # a delimiter may open the answer without its line break

    def body(self) -> Iterator[bytes]:
        """Yield what comes before the next delimiter, and step over that."""
        while (end := self._buffer.find(self._delimiter)) < 0:
            # The tail may hold the beginning of a delimiter.
            safe = len(self._buffer) - len(self._delimiter) + 1
            if safe > 0:
                yield bytes(self._buffer[:safe])
                del self._buffer[:safe]
            self._more()
        yield bytes(self._buffer[:end])
        del self._buffer[: end + len(self._delimiter)]

    def at_end(self) -> bool:
        """Read on to the next part's body; return whether there is none."""
        while len(self._buffer) < 2:
            self._more()
        if self._buffer.startswith(b"--"):
            return True
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise ItemFailed(Code.E_FETCH_CUT)
            self._more()
        del self._buffer[: end + 4]
        return False

    def _more(self) -> None:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise ItemFailed(Code.E_FETCH_CUT, passing=True)
        self._buffer += chunk
