"""Certificates for tests: of a CA that both sides trust, of one that nobody does, and with whatever can be wrong."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import pytest

from amig.transport import LinkOptions, TlsFiles

trustme = pytest.importorskip("trustme", reason="certificates for tests come from trustme (the dev extra)")


@dataclass(frozen=True)
class Trust:
    """Options of sides that show one certificate or another."""

    folder: Path
    ca: object
    good: LinkOptions
    other: LinkOptions
    """Another certificate of the same CA and for the same name."""
    stranger: LinkOptions
    """Of a CA that `good` does not trust, while it trusts the CA of `good`."""
    misnamed: LinkOptions
    expired: LinkOptions


def options(folder: Path, name: str, certificate: object, ca: object) -> LinkOptions:
    """Write a certificate and whom to trust to files, and return options that say so."""
    files = {kind: folder / f"{name}-{kind}.pem" for kind in ("cert", "key", "ca")}
    for chain in certificate.cert_chain_pems:  # type: ignore[attr-defined]
        chain.write_to_path(files["cert"], append=True)
    files["key"].touch(mode=0o600)
    certificate.private_key_pem.write_to_path(files["key"])  # type: ignore[attr-defined]
    ca.cert_pem.write_to_path(files["ca"])  # type: ignore[attr-defined]
    return LinkOptions(tls=TlsFiles(**{kind: str(path) for kind, path in files.items()}))


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    folder = tmp_path_factory.mktemp("trust")
    ca, wrong = trustme.CA(), trustme.CA()
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    here = ("127.0.0.1", "localhost", "::1")
    return Trust(
        folder=folder,
        ca=ca,
        good=options(folder, "good", ca.issue_cert(*here), ca),
        other=options(folder, "other", ca.issue_cert(*here), ca),
        stranger=options(folder, "stranger", wrong.issue_cert(*here), ca),
        misnamed=options(folder, "misnamed", ca.issue_cert("hostb.example"), ca),
        expired=options(folder, "expired", ca.issue_cert(*here, not_after=then), ca),
    )
