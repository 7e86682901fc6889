"""What an end of a migration shows and asks for: certificates, a shared key, a token."""

from __future__ import annotations

import errno
import os
import ssl
import stat
from dataclasses import dataclass, field
from typing import Self

from dirtylog.errors import BackendUnavailable

__all__ = ["Keys", "tls_context"]

_SHORTEST, _LONGEST = 16, 1024
_IDENTITY = "dirtylog"
# Forward secrecy, and nothing that can be done without the shared key: a peer with a certificate is not let in.
_PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305"


@dataclass(frozen=True, slots=True)
class Keys:
    """What an end of a migration shows and asks for.

    Parameters
    ----------
    cert, key, ca : path, optional
        PEM files: this end's certificate (its chain), the private key (where it is not in `cert`), and the
        certificates of who may sign the other end's. Both ends need `cert` and `ca`: each shows one and checks one.
    name : str, optional
        What the receiver's certificate must be issued to; by default the host that the sender connects to.
    psk : bytes, optional
        Instead of certificates: a key of 16 to 1024 bytes that both ends share. Needs Python 3.13.
    token : bytes, optional
        A secret of 16 to 1024 random bytes that both ends must hold, beside TLS or without.

    Raises
    ------
    ValueError
        Half of what is needed, or a secret too short to be one.
    BackendUnavailable
        A `psk`, and this interpreter's `ssl` has none.

    Notes
    -----
    Immutable. Secrets are not in its `repr`.
    """

    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    ca: str | os.PathLike[str] | None = None
    name: str | None = None
    psk: bytes | None = field(default=None, repr=False)
    token: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what could only half protect."""
        if (self.cert is None) != (self.ca is None) or (self.key is not None and self.cert is None):
            raise ValueError(
                f"cert is {self.cert!r}, key {self.key!r} and ca {self.ca!r}; TLS needs cert and ca at both ends "
                "(and key where the certificate's file has none)"
            )
        if self.psk is not None and self.cert is not None:
            raise ValueError("psk and cert are both given; use certificates or a shared key")
        for what, secret in (("psk", self.psk), ("token", self.token)):
            if secret is not None and not _SHORTEST <= len(secret) <= _LONGEST:
                raise ValueError(
                    f"{what} has {len(secret)} bytes; it must have {_SHORTEST} to {_LONGEST}: openssl rand -hex 32"
                )
        if self.psk is not None and not getattr(ssl, "HAS_PSK", False):
            raise BackendUnavailable("TLS-PSK", "the ssl module has no HAS_PSK", "use Python 3.13, or certificates")

    @property
    def encrypts(self) -> bool:
        """Whether there is enough for TLS."""
        return self.cert is not None or self.psk is not None

    @classmethod
    def from_files(
        cls,
        *,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        name: str | None = None,
        psk_file: str | os.PathLike[str] | None = None,
        token_file: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Make from files; those with secrets must not be readable by everybody.

        Raises
        ------
        PermissionError
            Everybody may read a file of a secret.
        OSError
            A file cannot be read.
        ValueError
            As for the class.
        """
        psk, token = (None if file is None else _secret(file) for file in (psk_file, token_file))
        return cls(cert, key, ca, name, psk, token)


def tls_context(keys: Keys, server: bool) -> ssl.SSLContext | None:
    """Make what one end speaks TLS with; None where it speaks none."""
    if not keys.encrypts:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if keys.psk is not None:
        _share(context, keys.psk, server)
        return context
    assert keys.cert is not None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        # Each connection proves itself again.
        context.num_tickets = 0
    context.load_cert_chain(keys.cert, keys.key, _no_password)
    context.load_verify_locations(keys.ca)
    return context


def _share(context: ssl.SSLContext, psk: bytes, server: bool) -> None:
    """Let a context speak with the holder of the key alone."""
    # In 1.3 a peer with any certificate could answer instead; in 1.2 the suite leaves it no way to.
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(_PSK_CIPHERS)
    # Neither stub nor attribute before 3.13.
    if server:
        context.set_psk_server_callback(lambda identity: psk if identity == _IDENTITY else b"")  # type: ignore[attr-defined,unused-ignore]
    else:
        context.set_psk_client_callback(lambda hint: (_IDENTITY, psk))  # type: ignore[attr-defined,unused-ignore]


def _no_password() -> str:
    """Answer instead of OpenSSL's prompt, which would wait at a terminal for ever."""
    raise ValueError("the private key is encrypted; decrypt it: openssl pkey -in KEY -out PLAIN")


def _secret(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
            raise PermissionError(errno.EACCES, "everybody may read this secret; chmod 600", os.fspath(path))
        return file.read(2 * _LONGEST).rstrip(b"\r\n")
