"""The site's signature: Ed25519 over a ledger's row or another statement, and the anchors it makes."""

import os
import re
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from privacy.errors import KeyUnusable

KEY_FILE, PUBLIC_FILE = "site.key", "site.pub"
_LEDGER = b"clipward ledger "
_REMEDY = (
    f"restore {KEY_FILE} from the site's back-up; if it is lost for good, 'clipward budget sign SITE' makes "
    "a new one that vouches for the ledger as it is, which every coordinator notices and has to accept"
)


@dataclass(frozen=True, kw_only=True)
class SiteKey:
    """The key a site signs its ledger with; without the private half it can only read.

    Attributes:
        public: Public half, 64 hexadecimal digits.
    """

    public: str
    _private: Ed25519PrivateKey | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The key in ``folder``; where ``site.key`` is missing, the public half in ``site.pub``.

        Raises:
            KeyUnusable: neither is there, it cannot be read, or others than its owner may read the key.
        """
        private, public = folder / KEY_FILE, folder / PUBLIC_FILE
        if private.is_file():
            return cls._read(private)
        if not public.is_file():
            raise KeyUnusable(f"neither {KEY_FILE} nor {PUBLIC_FILE} lies beside the ledger: {_REMEDY}")
        if not _is_hex(text := public.read_text("utf-8", errors="replace").strip(), 64):
            raise KeyUnusable(f"{PUBLIC_FILE} holds no public key (64 hexadecimal digits): {_REMEDY}")
        return cls(public=text)

    @classmethod
    def open_or_make(cls, folder: Path) -> Self:
        """The key in ``folder``, made if there is none: durable, and for its owner's eyes alone.

        Two processes that make one at the same moment both get the first's.

        Raises:
            KeyUnusable: there is a key that cannot be used.
        """
        if not (folder / KEY_FILE).is_file():
            made = Ed25519PrivateKey.generate()
            pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            _write(folder / KEY_FILE, pem, mode=0o600, replace=False)
        key = cls._read(folder / KEY_FILE)
        _write(folder / PUBLIC_FILE, f"{key.public}\n".encode(), mode=0o644, replace=True)
        return key

    def sign(self, seq: int, digest: str) -> str:
        """Signature of row ``seq`` with hash ``digest``, 128 hexadecimal digits.

        Raises:
            KeyUnusable: only the public half is here.
        """
        if self._private is None:
            raise KeyUnusable(f"{KEY_FILE} is missing, so nothing can be charged: {_REMEDY}")
        return self._private.sign(_statement(seq, digest)).hex()

    def vouch(self, statement: bytes) -> bytes:
        """Signature of a statement of another kind, which says itself what it is for.

        Raises:
            KeyUnusable: only the public half is here.
            ValueError: it reads as a row of a ledger, which `sign` alone may say.
        """
        if statement.startswith(_LEDGER):
            raise ValueError(f"a statement that starts with {_LEDGER.decode()!r} is a ledger's: sign the row")
        if self._private is None:
            raise KeyUnusable(f"{KEY_FILE} is missing, so nothing can be signed: {_REMEDY}")
        return self._private.sign(statement)

    @classmethod
    def _read(cls, path: Path) -> Self:
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise KeyUnusable(f"{KEY_FILE} has mode {mode:o}, so others can sign as this site: chmod 600 it")
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise KeyUnusable(f"{KEY_FILE} is no private key: {_REMEDY}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyUnusable(f"{KEY_FILE} is no Ed25519 key: {_REMEDY}")
        return cls(public=key.public_key().public_bytes_raw().hex(), _private=key)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A signed statement of how far a ledger had got; kept elsewhere, it shows any shortening of it.

    Attributes:
        seq: Number of the ledger's last row.
        head: Hash of that row, which stands for all rows up to it.
        signature: The site's, over both.
        key: Public half of the key it was made with.

    Raises:
        ValueError: A field is malformed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # where it travels in a message

    seq: int
    head: str
    signature: str
    key: str

    def __post_init__(self) -> None:
        if not 0 <= self.seq < 2**63:
            raise ValueError(f"expected seq={self.seq} >= 0 and below 2**63")
        for name, digits in (("head", 64), ("signature", 128), ("key", 64)):
            if not _is_hex(getattr(self, name), digits):
                raise ValueError(f"expected {name} to be {digits} lowercase hexadecimal digits")

    @property
    def is_genuine(self) -> bool:
        """Whether the key named here made the signature."""
        return is_signed(self.seq, self.head, self.signature, key=self.key)


def is_signed(seq: int, digest: str, signature: str, *, key: str) -> bool:
    """Whether ``signature`` is that of ``key`` over row ``seq`` with hash ``digest``; False for nonsense."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), _statement(seq, digest))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _statement(seq: int, digest: str) -> bytes:
    """What is signed: named, so that no signature made for another purpose can stand in for it."""
    return _LEDGER + f"row {seq} {digest}".encode()


def _is_hex(text: str, digits: int) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is not None


def _write(path: Path, content: bytes, *, mode: int, replace: bool) -> None:
    """Write a file whole and durably, over what is there or else only if nothing is."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
