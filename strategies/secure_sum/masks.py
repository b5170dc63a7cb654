"""Masks: for every tensor a stream of uint32 that only the holder of a 256-bit key can make or remove."""

import hashlib
import json
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from numpy.typing import NDArray

from strategies.secure_sum.fixed_point import BLOCK, blocks

Sign = Literal[1, -1]
KEY_BYTES = 32
_ZEROS = bytes(4 * BLOCK)
_WORD = np.dtype("<u4")  # the same integers on every machine


def context(purpose: str, *facts: object) -> bytes:
    """What a key, hash or signature is for: two of them are equal only where all facts are."""
    return json.dumps(["clipward secure sum 1", purpose, *facts], allow_nan=False).encode()


def digest(purpose: str, *facts: object) -> str:
    """SHA-256 of a `context`, 64 hexadecimal digits."""
    return hashlib.sha256(context(purpose, *facts)).hexdigest()


def self_key(seed: bytes, *, session: str, site: str) -> bytes:
    """Key of the mask that ``site`` alone puts on its update, from its ``seed``."""
    return _derive(seed, context("self mask", session, site))


def shared_key(private: X25519PrivateKey, peer: str, *, purpose: str, facts: tuple[str, ...]) -> bytes:
    """The key that the owner of ``private`` and of the public half ``peer`` (hexadecimal) both get.

    Args:
        private: One side's private half.
        peer: The other side's public half.
        purpose: What the key is for.
        facts: What else it is bound to; the same on both sides.

    Raises:
        ValueError: ``peer`` is of low order; ``is_low_order`` says so before.
    """
    ours = private.public_key().public_bytes_raw().hex()
    secret = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer)))
    return _derive(secret, context(purpose, *sorted((ours, peer)), *facts))


def is_low_order(public: str) -> bool:
    """Whether everybody agrees on the same key with the owner of ``public``, so that it is no secret."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError:  # RFC 7748, section 6.1: the shared secret is all zeros, whatever our key is
        return True
    return False


def pair_key(private: X25519PrivateKey, peer: str, *, session: str, sites: tuple[str, str]) -> bytes:
    """Key of the mask that two sites put on their updates with opposite signs."""
    return shared_key(private, peer, purpose="pair mask", facts=(session, *sorted(sites)))


def pair_sign(site: str, peer: str) -> Sign:
    """The sign with which ``site`` adds the mask it shares with ``peer``: the opposite of the peer's."""
    return 1 if site < peer else -1


def add_mask(total: NDArray[np.uint32], key: bytes, *, tensor: str, sign: Sign) -> None:
    """Add the mask of ``key`` for ``tensor`` to ``total`` in place, or take it away (``sign`` -1).

    Guarantees:
        The mask is ChaCha20's key stream under a key derived from ``key`` and ``tensor``, so that without
        ``key`` it cannot be told from uniform words; the same call with the other sign removes it exactly.
        Beside ``total`` it takes two blocks of memory.

    Args:
        total: Contiguous, any shape, below 2^36 words.
        key: 32 bytes.
        tensor: Name of the tensor.
        sign: 1 or -1.
    """
    key = HKDFExpand(SHA256(), KEY_BYTES, context("tensor", tensor)).derive(key)
    # A key serves one tensor, once: its stream starts at counter 0 under nonce 0.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    made = bytearray(4 * BLOCK)
    words = np.frombuffer(made, dtype=_WORD)
    flat = total.reshape(-1)
    for part in blocks(total.size):
        size = part.stop - part.start
        stream.update_into(memoryview(_ZEROS)[: 4 * size], memoryview(made)[: 4 * size])
        if sign > 0:
            flat[part] += words[:size]
        else:
            flat[part] -= words[:size]


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
