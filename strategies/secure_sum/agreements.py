"""What a site must remember beyond a crash: for every update, under what terms and with whom it is summed."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from strategies.files import sync
from strategies.secure_sum.messages import require_hex


@dataclass(frozen=True, kw_only=True)
class AgreementBook:
    """A folder with one small file for each thing ever agreed to.

    It holds digests only, and for ever: what unmasks is in an `AttemptBook` while its attempt lasts.
    """

    folder: Path

    def first(self, subject: str, agreement: str) -> str:
        """The first agreement ever given on ``subject``: this one, if there was none.

        Guarantees:
            Durable before it returns, and the same for ever after, whoever asks and however often the site
            is restarted, two processes at once included.

        Args:
            subject: What it is about, 64 hexadecimal digits.
            agreement: What is to be agreed to.

        Raises:
            Malformed: ``subject`` is no digest.
        """
        require_hex("subject", subject, 32)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / subject
        if not path.is_file():
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(agreement)
                    file.flush()
                    os.fsync(file.fileno())
                path.hardlink_to(name)
            except FileExistsError:
                pass  # another process was first
            finally:
                os.unlink(name)
        sync(self.folder)
        return path.read_text(encoding="utf-8")

    def has(self, subject: str) -> bool:
        """Whether anything was ever agreed to on ``subject``."""
        require_hex("subject", subject, 32)
        return (self.folder / subject).is_file()
