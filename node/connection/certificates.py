"""Certificates of a federation: those on disk, and the one that a researcher's server shows."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from .check import OK, PROBLEM, WARNING, Check

EXPIRES_SOON = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a certificate says.

    Attributes:
        names: host names and addresses that it is made for, as gRPC reads them.
        begins: first moment of its validity, UTC.
        ends: last moment of its validity, UTC.
        fingerprint: SHA-256 of the certificate, 64 hexadecimal digits.
        signed_by_itself: whether its issuer is its subject, as Fed-BioMed makes it.
        issuer: who signed it, for people.
        public_key: DER.
    """

    names: tuple[str, ...]
    begins: datetime
    ends: datetime
    fingerprint: str
    signed_by_itself: bool
    issuer: str
    public_key: bytes

    @classmethod
    def read(cls, data: bytes) -> Certificate:
        """From PEM or DER. Raises: ValueError for anything else."""
        pem = b"-----BEGIN" in data
        made = x509.load_pem_x509_certificate(data) if pem else x509.load_der_x509_certificate(data)
        return cls(
            names=_names(made),
            begins=made.not_valid_before.replace(tzinfo=timezone.utc),
            ends=made.not_valid_after.replace(tzinfo=timezone.utc),
            fingerprint=made.fingerprint(hashes.SHA256()).hex(),
            signed_by_itself=made.issuer == made.subject,
            issuer=made.issuer.rfc4514_string(),
            public_key=made.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        )

    def fits(self, host: str) -> bool:
        """Whether gRPC takes the certificate for a host: an address must be listed, a name may match `*.` patterns."""
        host = host.strip("[]").rstrip(".").lower()
        if _is_address(host):
            return any(
                _is_address(name) and ipaddress.ip_address(name) == ipaddress.ip_address(host) for name in self.names
            )
        return any(_matches(name.lower().rstrip("."), host) for name in self.names if not _is_address(name))

    def validity(self, now: datetime) -> tuple[str, str, str]:
        """State, finding and remedy for a moment (with time zone); finding and remedy are empty while it is valid."""
        if now < self.begins:
            return (
                PROBLEM,
                f"is valid only from {self.begins:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
                f"{now.astimezone(timezone.utc):%Y-%m-%d %H:%M}",
                "set the clocks of both machines",
            )
        if now > self.ends:
            return PROBLEM, f"expired on {self.ends:%Y-%m-%d}", "make a new one at the researcher"
        if now > self.ends - EXPIRES_SOON:
            return WARNING, f"expires on {self.ends:%Y-%m-%d}", "make a new one at the researcher before that day"
        return OK, "", ""


def check_files(certificate: Path, key: Path, now: datetime | None = None) -> tuple[list[Check], Certificate | None]:
    """Certificate and private key of a component: present, readable, valid, belonging together, private.

    Args:
        certificate: PEM file.
        key: PEM file.
        now: moment for which they must be valid; default: the present.

    Returns: the checks "certificate" and "private key", and what the certificate says, None if it cannot be read.
    """
    now = now or datetime.now(timezone.utc)
    again = (
        f"put back {certificate.parent} from a backup, or make the component again and let every node restart: "
        "nodes keep the certificate that they saw first"
    )
    read = None
    try:
        read = Certificate.read(certificate.read_bytes())
        state, found, remedy = read.validity(now)
        remedy = again if state == PROBLEM and now > read.ends else remedy
        if state == OK:
            names = ", ".join(read.names) or "no name"
            found = f"for {names}, until {read.ends:%Y-%m-%d}, SHA-256 {read.fingerprint}"
        else:
            found = f"{certificate} {found}"
        checks = [Check(name="certificate", state=state, found=found, remedy=remedy)]
    except OSError as error:
        checks = [_unreadable("certificate", certificate, error, again)]
    except ValueError:
        checks = [Check(name="certificate", state=PROBLEM, found=f"{certificate} holds no certificate", remedy=again)]
    return [*checks, _check_key(key, read, again)], read


def _check_key(key: Path, certificate: Certificate | None, again: str) -> Check:
    name = "private key"
    try:
        public = load_pem_private_key(key.read_bytes(), password=None).public_key()
        mode = key.stat().st_mode
    except OSError as error:
        return _unreadable(name, key, error, again)
    except (ValueError, TypeError):  # TypeError: protected by a password, which Fed-BioMed cannot give
        return Check(name=name, state=PROBLEM, found=f"{key} holds no private key without a password", remedy=again)
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if certificate is not None and der != certificate.public_key:
        return Check(name=name, state=PROBLEM, found=f"{key} does not belong to the certificate", remedy=again)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = f"every user of this machine may read {key}" if mode & stat.S_IROTH else f"a group may use {key}"
        return Check(name=name, state=WARNING, found=found, remedy=f"chmod 600 {key}")
    return Check(name=name, found="belongs to the certificate, readable by its owner alone")


def _unreadable(name: str, file: Path, error: OSError, again: str) -> Check:
    if isinstance(error, PermissionError):
        again = "run this command as the user who runs the component, or let that user read the file"
    return Check(name=name, state=PROBLEM, found=f"{file} cannot be read ({error.strerror})", remedy=again)


def _names(made: x509.Certificate) -> tuple[str, ...]:
    """Alternative names; the common name counts only without any, and never as an address."""
    try:
        listed = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = [str(part.value) for part in made.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        return tuple(name for name in common if not _is_address(name))
    names: Sequence[object] = [
        *listed.get_values_for_type(x509.DNSName),
        *listed.get_values_for_type(x509.IPAddress),
    ]
    return tuple(map(str, names))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _matches(pattern: str, host: str) -> bool:
    """Whether a name matches; `*` stands for one whole first part, of at least three."""
    if not pattern.startswith("*."):
        return pattern == host
    first, _, rest = host.partition(".")
    return bool(first) and rest == pattern[2:] and "." in rest
