"""Addresses as operators write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import UsageError
from amig.transport import address
from amig.transport.address import FileAddress, TcpAddress, UnixAddress


@pytest.mark.parametrize(
    ("text", "parsed", "loopback"),
    [
        ("tcp://hostb:7000", TcpAddress(host="hostb", port=7000), False),
        ("TCP://127.0.0.1:0", TcpAddress(host="127.0.0.1", port=0), True),
        ("tcp://127.3.2.1:1/", TcpAddress(host="127.3.2.1", port=1), True),
        ("tcp://localhost:7000", TcpAddress(host="localhost", port=7000), True),
        ("tcp://[::1]:7000", TcpAddress(host="::1", port=7000), True),
        ("tcp://[fe80::1%eth0]:7000", TcpAddress(host="fe80::1%eth0", port=7000), False),
        ("tcp://0.0.0.0:65535", TcpAddress(host="0.0.0.0", port=65535), False),
        ("unix:sock", UnixAddress(path="sock"), True),
        ("unix:/run/a.sock", UnixAddress(path="/run/a.sock"), True),
        ("unix:///run/a.sock", UnixAddress(path="/run/a.sock"), True),
        ("file:web1.snap", FileAddress(path="web1.snap"), True),
        ("file:///var/web1.snap", FileAddress(path="/var/web1.snap"), True),
        ("file:a:b", FileAddress(path="a:b"), True),
    ],
)
def test_addresses_are_understood(text, parsed, loopback):
    assert address.parse(text) == parsed
    assert address.parse(text).is_loopback is loopback
    assert address.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not an address: write tcp://HOST:PORT"),
        ("hostb", "is not an address"),
        ("/run/a.sock", "is not an address"),
        ("hostb:7000", "is not a transport"),
        ("http://hostb:80", "'http' in .* is not a transport"),
        ("tls://hostb:7000", "tls:// is not available yet"),
        ("ssh://hostb", "ssh:// is not available yet"),
        ("tcp:hostb:7000", "lacks the slashes"),
        ("tcp://hostb", "needs a host and a port"),
        ("tcp://hostb:", "needs a host and a port"),
        ("tcp://:7000", "needs a host and a port"),
        ("tcp://hostb:65536", "needs a host and a port"),
        ("tcp://hostb:-1", "needs a host and a port"),
        ("tcp://hostb:७०", "needs a host and a port"),
        ("tcp://::1:7000", "needs brackets"),
        ("tcp://[::1]", "needs brackets"),
        ("tcp://[hostb]:7000", "is not an IPv6 address"),
        ("tcp://user@hostb:7000", "is not a host name"),
        ("tcp://two words:7000", "is not a host name"),
        ("unix:", "needs the path of a socket"),
        ("unix://run/a.sock", "after unix:// the path starts with a slash"),
        ("unix:/" + "x" * 107, "is too long"),
        ("unix:a\0b", "is not an address"),
        ("file:", "needs the path of a file"),
        ("file:/tmp/", "needs the path of a file"),
    ],
)
def test_what_is_not_an_address_is_refused_and_says_why(text, why):
    with pytest.raises(UsageError, match=why):
        address.parse(text)


def test_a_file_is_nobody_to_connect_to():
    with pytest.raises(UsageError, match="is a file"):
        address.parse_socket("file:x")
    assert address.parse_socket("unix:x") == UnixAddress(path="x")


@given(st.text(max_size=40), st.sampled_from(["", "tcp://", "unix:", "file:", "unix://", "tcp://["]))
def test_any_text_is_an_address_or_refused(text, scheme):
    try:
        parsed = address.parse(scheme + text)
    except UsageError:
        return
    assert address.parse(str(parsed)) == parsed
