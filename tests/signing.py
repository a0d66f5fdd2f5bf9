"""Key pairs for signatures, made when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Keys(NamedTuple):
    """Files of a private key and of its public one, in PEM."""

    private: Path
    public: Path


def make_keys(directory: Path, name: str = "me", curve: ec.EllipticCurve | None = None) -> Keys:
    """A new pair of elliptic-curve keys, P-256 if nothing else is said."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    keys = Keys(directory / f"{name}.pem", directory / f"{name}.pub")
    keys.private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    keys.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys
