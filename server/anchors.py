"""What the coordinator remembers of the sites' ledgers: no site can shorten its history unseen."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from privacy.signing import Anchor
from server.errors import RunError
from strategies.files import sync

VERSION = 1
ANCHORS_FILE = "anchors.jsonl"


class AnchorRefused(ValueError):
    """A site's ledger is not the one seen before; the text says how, and what its people can do."""


class AnchorBook:
    """Heads of the sites' ledgers, one JSON object a line, appended and never changed.

    Guarantees:
        When `take` returns, the head is on the disk. From then on a head with a smaller number, another head
        with the same number, or one signed with another key is refused: the ledger was cut short, restored
        from a back-up, rewritten, or is another. A head with a larger number may still belong to a rewritten
        history; that only the site can see, which is why it is sent the last one with every request.

    The first key a site signs with is trusted, since nobody here can know better: a hospital that reads
    its ``site.pub`` out over the telephone makes that knowledge.

    Args:
        path: The file; read if it is there, made with the first head.

    Raises:
        RunError: a whole line is not an anchor of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: dict[str, Anchor] = {}
        if path.is_file():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(path, len(whole))  # a line torn by a crash counts for nothing
            for site, anchor in parse(whole.decode(), name=path.name):
                self._last[site] = anchor

    def last(self, site: str) -> Anchor | None:
        """The last head of this site's ledger; None: it has shown none."""
        return self._last.get(site)

    def take(self, site: str, anchor: Anchor, *, run: str, server_round: int) -> None:
        """Keep the head that came with a release of ``site``.

        Raises:
            AnchorRefused: the ledger went back, changed its past or its key, or the signature is not its
                key's. Nothing is kept.
        """
        self._require_continued(site, anchor)
        line = {
            "version": VERSION,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "site": site,
            "run": run,
            "round": server_round,
            **asdict(anchor),
        }
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self._path.parent)
        self._last[site] = anchor

    def _require_continued(self, site: str, anchor: Anchor) -> None:
        if not anchor.is_genuine:
            raise AnchorRefused(f"the head of {site}'s ledger is not signed with the key it names")
        last = self._last.get(site)
        if last is None:
            return
        if anchor.key != last.key:
            raise AnchorRefused(
                f"{site} signs its ledger with key {anchor.key[:16]}, before it was {last.key[:16]}: ask the "
                f"hospital by another way; to accept the new key, delete its lines from {self._path}"
            )
        if anchor.seq < last.seq or (anchor.seq == last.seq and anchor.head != last.head):
            how = "went back" if anchor.seq < last.seq else "was rewritten"
            raise AnchorRefused(
                f"the ledger of {site} {how}: it showed row {last.seq} and now ends at row {anchor.seq}; "
                "the hospital has to put its newest copy back"
            )


def parse(text: str, *, name: str) -> Iterator[tuple[str, Anchor]]:
    """Sites and their anchors, line by line.

    Raises:
        RunError: a line is not an anchor of this version; the message names it.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            fields = json.loads(line)
            version, site = fields["version"], str(fields["site"])
            anchor = Anchor(**{key: fields[key] for key in ("seq", "head", "signature", "key")})
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{name}, line {number} is no anchor: restore the file") from error
        if version != VERSION:
            raise RunError(f"{name}, line {number} has version={version!r}, this program reads {VERSION}")
        yield site, anchor
