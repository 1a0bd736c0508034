"""Addresses as operators write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import UsageError
from amig.transport import address
from amig.transport.address import FileAddress, PairAddress, SshAddress, TcpAddress, TlsAddress, UnixAddress


@pytest.mark.parametrize(
    ("text", "parsed", "loopback"),
    [
        ("tcp://hostb:7000", TcpAddress(host="hostb", port=7000), False),
        ("TCP://127.0.0.1:0", TcpAddress(host="127.0.0.1", port=0), True),
        ("tcp://127.3.2.1:1/", TcpAddress(host="127.3.2.1", port=1), True),
        ("tcp://localhost:7000", TcpAddress(host="localhost", port=7000), True),
        ("tcp://[::1]:7000", TcpAddress(host="::1", port=7000), True),
        ("tcp://[fe80::1%eth0]:7000", TcpAddress(host="fe80::1%eth0", port=7000), False),
        ("tls://hostb:7000", TlsAddress(host="hostb", port=7000), False),
        ("tls://[::1]:0", TlsAddress(host="::1", port=0), True),
        ("ssh://hostb/web1", SshAddress(host="hostb", name="web1"), False),
        ("SSH://me@hostb:2222/web-1.x", SshAddress(host="hostb", name="web-1.x", user="me", port=2222), False),
        ("ssh://me@corp@[::1]:22/w", SshAddress(host="::1", name="w", user="me@corp", port=22), False),
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
        ("", "is not an address: write tls://HOST:PORT"),
        ("hostb", "is not an address"),
        ("/run/a.sock", "is not an address"),
        ("hostb:7000", "is not a transport"),
        ("http://hostb:80", "'http' in .* is not a transport"),
        ("tls://hostb", "needs a host and a port"),
        ("tls:hostb:7000", "lacks the slashes: write tls://HOST:PORT"),
        ("tls://hostb:7000/#", "is not whole"),
        ("tls://hostb:7000/#abc", "is not whole"),
        (f"tls://hostb:7000/#{'A' * 43}", "is not whole"),
        (f"tls://hostb:7000/#{'A' * 43}.…", "is not whole"),
        (f"tls://hostb:7000/#{'A' * 43}.{'A' * 26}B", "is not whole"),
        ("ssh://hostb", "needs the name"),
        ("ssh://hostb/", "needs the name"),
        ("ssh://hostb/a b", "needs the name"),
        ("ssh://hostb/a;reboot", "needs the name"),
        ("ssh://hostb/-x", "needs the name"),
        ("ssh:hostb/web1", "lacks the slashes"),
        ("ssh://-oProxyCommand=x/web1", "is not a host name"),
        ("ssh://-l@hostb/web1", "the user or the port"),
        ("ssh://a b@hostb/web1", "the user or the port"),
        ("ssh://@hostb/web1", "the user or the port"),
        ("ssh://hostb:0/web1", "the user or the port"),
        ("ssh://hostb:99999/web1", "the user or the port"),
        ("ssh://hostb:x/web1", "is not a host name"),
        ("ssh://[hostb]/web1", "is not an IPv6 address"),
        ("ssh:///web1", "is not a host name"),
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


@given(
    st.text(max_size=40), st.sampled_from(["", "tcp://", "tls://", "ssh://", "unix:", "file:", "unix://", "tcp://["])
)
def test_any_text_is_an_address_or_refused(text, scheme):
    try:
        parsed = address.parse(scheme + text)
    except UsageError:
        return
    assert address.parse(str(parsed)) == parsed


PAIRING = PairAddress(host="hostb", port=7000, fingerprint=bytes(range(32)), secret=b"20 bytes of a secret")


def test_a_pairing_address_is_read_back_whole_and_shown_without_its_secret():
    whole = PAIRING.reveal()
    secret = whole.rpartition(".")[2]
    assert address.parse(whole) == PAIRING
    for shown in (str(PAIRING), repr(PAIRING), f"{PAIRING}", f"{PAIRING!r}"):
        assert secret not in shown
        assert "20 bytes" not in shown
    with pytest.raises(UsageError, match="is not whole"):
        address.parse(str(PAIRING))


@pytest.mark.parametrize("scheme", ["tls", "tsl", "tcp", "ssh", "unix2", "", "tls:/", "ssh:/"])
def test_no_error_repeats_what_may_be_a_secret(scheme):
    text = PAIRING.reveal().replace("tls:", f"{scheme}:", 1)
    for mangled in (text, text + "x", text[:-1], text.replace("hostb", "[x"), text.replace("7000", "port")):
        said = ""
        try:
            address.parse(mangled)
        except UsageError as error:
            said = str(error)
        assert mangled.rpartition(".")[2][:12] not in said


def test_a_pairing_address_and_ssh_are_nothing_to_listen_on():
    with pytest.raises(UsageError, match="for the other side"):
        address.parse_socket(PAIRING.reveal())
    with pytest.raises(UsageError, match="nothing listens on ssh"):
        address.parse_socket("ssh://hostb/web1")
