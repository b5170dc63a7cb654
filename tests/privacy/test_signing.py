"""The key a site signs its ledger with."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import KeyUnusable
from privacy.signing import Anchor, SiteKey, is_signed

HEAD = "ab" * 32


def test_a_key_vouches_for_statements_but_not_for_what_reads_as_a_row(tmp_path: Path) -> None:
    key = SiteKey.open_or_make(tmp_path)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public))
    public.verify(key.vouch(b"a sum"), b"a sum")
    with pytest.raises(ValueError, match="starts with 'clipward ledger ' is a ledger's: sign the row"):
        key.vouch(f"clipward ledger row 3 {HEAD}".encode())
    assert is_signed(3, HEAD, key.sign(3, HEAD), key=key.public)


def test_without_its_private_half_a_key_vouches_for_nothing(tmp_path: Path) -> None:
    public = SiteKey(public=SiteKey.open_or_make(tmp_path).public)
    with pytest.raises(KeyUnusable, match=r"site\.key is missing, so nothing can be signed"):
        public.vouch(b"a sum")


def test_a_key_is_made_once_for_its_owner_alone_beside_its_public_half(tmp_path: Path) -> None:
    key = SiteKey.open_or_make(tmp_path)
    assert SiteKey.open_or_make(tmp_path).public == SiteKey.open(tmp_path).public == key.public
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    assert (tmp_path / "site.pub").read_text() == f"{key.public}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"site.key", "site.pub"}
    assert "private" not in repr(key).lower()


def test_two_folders_have_two_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert SiteKey.open_or_make(tmp_path / "a").public != SiteKey.open_or_make(tmp_path / "b").public


def test_processes_that_make_a_key_together_agree_on_one(tmp_path: Path) -> None:
    children = []
    for number in range(6):
        if (child := os.fork()) == 0:
            (tmp_path / f"said-{number}").write_text(SiteKey.open_or_make(tmp_path).public)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    said = {path.read_text() for path in tmp_path.glob("said-*")}
    assert said == {SiteKey.open(tmp_path).public}
    assert (tmp_path / "site.pub").read_text().strip() in said


@given(seq=st.integers(0, 2**63 - 1), head=st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_signature_is_of_its_row_and_its_key_alone(
    seq: int, head: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("key")
    key = SiteKey.open_or_make(folder)
    signature = key.sign(seq, head)
    assert is_signed(seq, head, signature, key=key.public)
    assert not is_signed(seq + 1, head, signature, key=key.public)
    assert not is_signed(seq, head[1:] + head[0] + "0", signature, key=key.public)
    assert not is_signed(seq, head, signature, key="00" * 32)


def test_a_signature_is_what_the_format_says(tmp_path: Path) -> None:
    """Checked with the library alone, as an auditor would."""
    key = SiteKey.open_or_make(tmp_path)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex((tmp_path / "site.pub").read_text()))
    public.verify(bytes.fromhex(key.sign(7, HEAD)), f"clipward ledger row 7 {HEAD}".encode())


@pytest.mark.parametrize("signature", ["", "zz" * 64, "00" * 64, "ab"])
def test_nonsense_is_no_signature(signature: str, tmp_path: Path) -> None:
    assert not is_signed(1, HEAD, signature, key=SiteKey.open_or_make(tmp_path).public)
    assert not is_signed(1, HEAD, "00" * 64, key=signature)


def test_without_the_key_the_public_half_reads_and_does_not_sign(tmp_path: Path) -> None:
    public = SiteKey.open_or_make(tmp_path).public
    (tmp_path / "site.key").unlink()
    key = SiteKey.open(tmp_path)
    assert key.public == public
    with pytest.raises(
        KeyUnusable, match=r"site\.key is missing, so nothing can be charged: restore site\.key"
    ):
        key.sign(1, HEAD)


def test_with_neither_half_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyUnusable, match=r"neither site\.key nor site\.pub .*'clipward budget sign SITE'"):
        SiteKey.open(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_use_is_refused(mode: int, tmp_path: Path) -> None:
    SiteKey.open_or_make(tmp_path)
    (tmp_path / "site.key").chmod(mode)
    for make in (SiteKey.open, SiteKey.open_or_make):
        with pytest.raises(KeyUnusable, match=f"has mode {mode:o}.*chmod 600"):
            make(tmp_path)


def test_what_is_no_key_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, message in ((b"", "no private key"), (b"junk", "no private key"), (other, "no Ed25519 key")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyUnusable, match=message):
            SiteKey.open_or_make(tmp_path)
        assert path.read_bytes() == content
    path.unlink()
    (tmp_path / "site.pub").write_text("junk")
    with pytest.raises(KeyUnusable, match=r"site\.pub holds no public key"):
        SiteKey.open(tmp_path)


def test_an_anchor_is_genuine_or_not(tmp_path: Path) -> None:
    key = SiteKey.open_or_make(tmp_path)
    anchor = Anchor(seq=3, head=HEAD, signature=key.sign(3, HEAD), key=key.public)
    assert anchor.is_genuine
    for change in ({"seq": 4}, {"head": "cd" * 32}, {"signature": "00" * 64}, {"key": "00" * 32}):
        assert not replace(anchor, **change).is_genuine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": -1}, "seq=-1 >= 0"),
        ({"seq": 2**63}, "below"),
        ({"head": "AB" * 32}, "head to be 64 lowercase"),
        ({"signature": "ab" * 32}, "signature to be 128"),
        ({"key": "ab\n" * 32}, "key to be 64"),
    ],
)
def test_a_malformed_anchor_is_refused(change: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anchor(**{"seq": 1, "head": HEAD, "signature": "cd" * 64, "key": "ef" * 32, **change})  # type: ignore[arg-type]
