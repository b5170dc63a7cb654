"""Both ways to a PACS encrypted, with an authority of the hospital and a certificate on each side."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.pacs import PacsRefused, PacsUnreachable
from tests.client.pacs import test_dicomweb, test_dimse
from tests.client.pacs.conftest import free_port


@dataclass(frozen=True, kw_only=True)
class Certificate:
    path: Path
    key: Path

    def context(self, purpose: ssl.Purpose, ca: Path) -> ssl.SSLContext:
        """Encrypts one side, which asks the other for its certificate."""
        context = ssl.create_default_context(purpose, cafile=ca)
        context.load_cert_chain(self.path, self.key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """One that vouches for itself, for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = Certificate(path=folder / "site.pem", key=folder / "site.key")
    paths.path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    paths.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def test_dicomweb_over_tls(certificate: Certificate, tmp_path: Path) -> None:
    server = test_dicomweb.Server()
    context = certificate.context(ssl.Purpose.CLIENT_AUTH, certificate.path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    with test_dicomweb.serving(server):
        result = test_dicomweb.run(
            url, tmp_path, ca=certificate.path, certificate=certificate.path, key=certificate.key
        )
        assert (result.instances, dict(result.codes)) == (3, {})
        with pytest.raises(PacsRefused, match=r"no encrypted connection .* set cohort\.dicomweb\.ca"):
            test_dicomweb.run(url, tmp_path / "other")


def test_dimse_over_tls(certificate: Certificate, tmp_path: Path) -> None:
    both = (
        certificate.context(ssl.Purpose.CLIENT_AUTH, certificate.path),
        certificate.context(ssl.Purpose.SERVER_AUTH, certificate.path),
    )
    with test_dimse.Node(free_port(), tls=both).running() as node:
        settings = test_dimse.table(
            node, tls=True, ca=certificate.path, certificate=certificate.path, key=certificate.key
        )
        result = test_dimse.run(settings, tmp_path)
        assert (result.instances, dict(result.codes)) == (2, {})
        with pytest.raises(PacsUnreachable, match=r"breaks off the greeting; see port, tls"):
            test_dimse.run(test_dimse.table(node, timeout_seconds=1), tmp_path / "other")
