"""tls:// on both event loops: bulk data, who is let in, and what hostile peers can do."""

import asyncio
import contextlib
import errno
import gc
import os
import re
import socket
import ssl

import numpy as np
import pytest
import uvloop

from amig import transport
from amig.errors import AmigError, HostError, LinkLost, PeerError, Untrusted, UsageError
from amig.transport import LinkOptions, TlsFiles, admission, dial, tls
from amig.transport.address import parse_socket
from amig.transport.tlsconn import PIECE, TlsConnection, _pieces
from tests.trust import trust  # noqa: F401 - a fixture

MIB = 1 << 20
HERE = "tls://127.0.0.1:0"


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine on a loop of its own, of either kind, within 30 seconds."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    async def limited(coroutine):
        before = asyncio.all_tasks()
        async with asyncio.timeout(30):
            await coroutine
        assert asyncio.all_tasks() == before, "tasks were left behind"

    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda coroutine: runner.run(limited(coroutine))
    gc.collect()


@contextlib.asynccontextmanager
async def pair(server, client):
    listener = await transport.listen(HERE, server)
    near, far = await asyncio.gather(transport.connect(listener.address, client), listener.accept())
    try:
        yield near, far
    finally:
        near.abort()
        far.abort()
        await listener.close()


async def stuck(task):
    """Wait until the task waits for the other side: it has had many turns and moves no more."""
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()


def raw(listener):
    return socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2])), timeout=20)


# --- it carries ------------------------------------------------------------------------------------------------------


def test_both_sides_know_one_another_and_speak_nothing_older_than_1_3(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.other) as (near, far):
            assert near.version == far.version == "TLSv1.3"
            assert near.protocol == far.protocol == "amig/1"
            assert len(near.identity) == len(far.identity) == 32
            assert near.identity != far.identity
            assert near.pages is None

    run(main())


def test_bytes_arrive_in_order_both_ways_at_once_and_are_counted(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            content = os.urandom(5 * MIB + 12345)
            one, two = bytearray(len(content)), bytearray(len(content))
            async with asyncio.TaskGroup() as group:
                for end, into in ((near, one), (far, two)):
                    group.create_task(end.send(content[:10], b"", content[10:MIB], memoryview(content)[MIB:]))
                    group.create_task(end.recv_into(memoryview(into)[:77], memoryview(into)[77:]))
            assert one == two == content
            assert near.bytes_sent == far.bytes_received == near.bytes_received == len(content)
            while near.outstanding():
                await asyncio.sleep(0)

    run(main())


def test_thousands_of_small_buffers_and_empty_ones(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            pieces = [os.urandom(i % 700) for i in range(3000)]
            into = [bytearray(len(p)) for p in reversed(pieces)]
            async with asyncio.TaskGroup() as group:
                group.create_task(near.send(*pieces))
                group.create_task(far.recv_into(*into))
            assert b"".join(into) == b"".join(pieces)
            sent = near.bytes_sent
            await near.send(np.empty((0, 4096), np.uint8).data, b"")
            await far.recv_into(bytearray())
            assert near.bytes_sent == sent

    run(main())


@pytest.mark.parametrize("sizes", [(10, 20), (40_000, 3, 3, MIB), (3,) * 200_000, (30_000,) * 40, (0, 0), (PIECE + 1,)])
def test_pieces_are_worth_a_call_and_lose_nothing(sizes):
    buffers = [os.urandom(size) for size in sizes]
    pieces = list(_pieces(buffers))
    assert b"".join(pieces) == b"".join(buffers)
    assert all(0 < len(piece) <= PIECE for piece in pieces)
    assert len(pieces) <= 2 + 2 * sum(size >= 32 << 10 for size in sizes) + 2 * sum(sizes) // PIECE


def test_the_end_of_the_stream_says_how_much_came(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            await near.send(b"abc")
            closing = asyncio.create_task(near.close())
            with pytest.raises(LinkLost, match="ended the connection: 3 of 10 bytes came"):
                await far.recv_into(bytearray(10))
            far.abort()
            await closing

    run(main())


def test_a_cut_without_a_goodbye_is_a_lost_link_too(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            await near.send(b"abc")
            near.abort()
            with pytest.raises(LinkLost, match="3 of 10"):
                await far.recv_into(bytearray(10))

    run(main())


def test_the_last_message_before_closing_is_not_lost(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            sending = asyncio.create_task(near.send(bytes(32 * MIB)))
            await stuck(sending)
            await far.send(b"stop!")
            closing = asyncio.create_task(far.close())
            said = bytearray(5)
            await near.recv_into(said)
            assert said == b"stop!"
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            near.abort()
            await closing

    run(main())


def test_after_a_cancelled_send_nothing_can_be_sent_but_what_came_can_be_read(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            sending = asyncio.create_task(near.send(bytes(64 * MIB)))
            await stuck(sending)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            with pytest.raises(LinkLost, match="a message to it was cut off"):
                await near.send(b"x")
            await far.send(b"why")
            why = bytearray(3)
            await near.recv_into(why)
            assert why == b"why"

    run(main())


def test_a_send_cancelled_in_its_first_piece_leaves_no_hole_in_the_stream(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            for end in (near, far):
                end._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                end._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sending = asyncio.create_task(near.send(bytes(PIECE)))
            await stuck(sending)
            assert near.bytes_sent == 0, "a part of the piece is out, but not all"
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            with pytest.raises(LinkLost, match="a message to it was cut off"):
                await near.send(b"x")

    run(main())


def test_a_receive_cancelled_before_its_first_byte_does_no_harm(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            receiving = asyncio.create_task(far.recv_into(bytearray(4)))
            await stuck(receiving)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            await near.send(b"abcd")
            got = bytearray(4)
            await far.recv_into(got)
            assert got == b"abcd"

    run(main())


def test_abort_wakes_who_waits(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, _far):
            waiting = [
                asyncio.create_task(near.recv_into(bytearray(1))),
                asyncio.create_task(near.send(bytes(64 * MIB))),
            ]
            await stuck(waiting[0])
            near.abort()
            near.abort()
            for task in waiting:
                with pytest.raises(LinkLost, match="closed on this side"):
                    await task
            assert near.outstanding() is None

    run(main())


def test_a_bit_flipped_on_the_way_ends_the_connection(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            near._tls.write(b"x" * 100)
            spoilt = bytearray(near._outgoing.read())
            spoilt[50] ^= 1
            near._sock.send(spoilt)
            with pytest.raises(PeerError, match=r"TLS with .* failed"):
                await far.recv_into(bytearray(100))
            with pytest.raises(LinkLost):
                await far.recv_into(bytearray(1))

    run(main())


# --- who is let in ---------------------------------------------------------------------------------------------------


async def refused(server, client, *, serves=True):
    """Connect, say and ask something; returns what the client and what the server's listener made of it."""
    listener = await transport.listen(HERE, server)
    accepting = asyncio.create_task(listener.accept())
    error = None
    connection = None
    try:
        connection = await transport.connect(listener.address, client)
        await connection.send(b"hello")
        await connection.recv_into(bytearray(1))
    except AmigError as caught:
        error = caught
    finally:
        if connection is not None:
            connection.abort()
    while not listener.refused:
        await asyncio.sleep(0.01)
    assert not accepting.done(), "it was let in"
    accepting.cancel()
    await asyncio.gather(accepting, return_exceptions=True)
    await listener.close()
    return error


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ("stranger", "does not prove who it is: .*(issuer|self.signed)"),
        ("misnamed", "does not prove who it is: IP address mismatch"),
        ("expired", "does not prove who it is: certificate has expired"),
    ],
)
def test_a_server_that_is_not_who_it_should_be_is_told_nothing(run, trust, shown, why):  # noqa: F811
    async def main():
        error = await refused(getattr(trust, shown), trust.good)
        assert isinstance(error, Untrusted)
        assert re.search(why, str(error))

    run(main())


@pytest.mark.parametrize(("shown", "why"), [("stranger", "unknown ca"), ("expired", "certificate expired")])
def test_a_client_that_is_not_trusted_is_told_so_and_kept_out(run, trust, shown, why, caplog):  # noqa: F811
    async def main():
        error = await refused(trust.good, getattr(trust, shown))
        assert isinstance(error, Untrusted)
        assert f"did not accept our certificate: {why}" in str(error)
        assert "was not let in" in caplog.text

    run(main())


def test_a_client_without_a_certificate_is_kept_out(run, trust, monkeypatch):  # noqa: F811
    def bare(files):
        context = tls.plain_context(ssl.PROTOCOL_TLS_CLIENT, tls.ALPN)
        context.load_verify_locations(files.ca)
        return context

    async def main():
        monkeypatch.setattr(dial.tls, "client_context", bare)
        error = await refused(trust.good, trust.good)
        assert isinstance(error, Untrusted)
        assert "did not accept our certificate: certificate required" in str(error)

    run(main())


def test_names_are_checked_as_names(run, trust):  # noqa: F811
    async def main():
        listener = await transport.listen("tls://localhost:0", trust.good)
        port = listener.address.rpartition(":")[2]
        near, far = await asyncio.gather(transport.connect(f"tls://localhost:{port}", trust.good), listener.accept())
        near.abort()
        far.abort()
        await listener.close()

    run(main())


@pytest.mark.parametrize(("server", "client"), [(True, False), (False, True)])
def test_tls_and_plain_tcp_do_not_meet(run, trust, server, client):  # noqa: F811
    async def main():
        listener = await transport.listen(HERE if server else "tcp://127.0.0.1:0", trust.good)
        port = listener.address.rpartition(":")[2]
        accepting = asyncio.create_task(listener.accept())
        if client:
            connecting = asyncio.create_task(transport.connect(f"tls://127.0.0.1:{port}", trust.good))
            far = await accepting
            await far.recv_into(bytearray(16))  # a ClientHello, read as a frame: PeerError a floor above
            await far.send(b"ABORT, in frames of ours")
            with pytest.raises(PeerError, match="does not speak TLS: is it plain tcp"):
                await connecting
            far.abort()
        else:
            near = await transport.connect(f"tcp://127.0.0.1:{port}")
            await near.send(bytes(4096))
            with pytest.raises(LinkLost, match="ended the connection"):
                await near.recv_into(bytearray(1000))
            near.abort()
            while not listener.refused:
                await asyncio.sleep(0.01)
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()

    run(main())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
def test_nothing_older_than_tls_1_3_is_spoken_by_either_side(run, trust, version, monkeypatch):  # noqa: F811
    new = tls.plain_context

    def old(kind, alpn):
        context = new(kind, alpn)
        with (
            pytest.warns(DeprecationWarning, match="is deprecated")
            if version < ssl.TLSVersion.TLSv1_2
            else contextlib.nullcontext()
        ):
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    async def main():
        monkeypatch.setattr(tls, "plain_context", old)
        listener = await transport.listen(HERE, trust.good)
        monkeypatch.setattr(tls, "plain_context", new)
        accepting = asyncio.create_task(listener.accept())
        with pytest.raises(PeerError, match=r"does not speak TLS 1\.3"):
            await transport.connect(listener.address, trust.good)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()
        monkeypatch.setattr(dial.tls, "plain_context", old)
        outdated = dial.Dialer(HERE, trust.good)._context
        monkeypatch.setattr(tls, "plain_context", new)
        listener = await transport.listen(HERE, trust.good)
        accepting = asyncio.create_task(listener.accept())
        with pytest.raises(PeerError, match=r"does not speak TLS 1\.3|failed"):
            await tls.connect(parse_socket(listener.address), outdated, timeout=10)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()

    run(main())


def test_another_protocol_in_tls_is_not_ours(run, trust):  # noqa: F811
    async def main():
        listener = await transport.listen(HERE, trust.good)
        accepting = asyncio.create_task(listener.accept())
        context = tls.client_context(trust.good.tls)
        context.set_alpn_protocols(["h2"])
        with pytest.raises(PeerError, match="speaks TLS, but not amig/1 in it"):
            await tls.connect(parse_socket(listener.address), context, timeout=10)
        while not listener.refused:
            await asyncio.sleep(0.01)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()

    run(main())


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x40\x00" + bytes(16384), b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)]
)
def test_garbage_instead_of_a_handshake_bothers_nobody(run, trust, junk):  # noqa: F811
    async def main():
        listener = await transport.listen(HERE, trust.good)
        accepting = asyncio.create_task(listener.accept())
        with raw(listener) as stranger:
            with contextlib.suppress(ConnectionError):
                await asyncio.to_thread(stranger.sendall, junk)
            near = await transport.connect(listener.address, trust.good)
            far = await accepting
            near.abort()
            far.abort()
        await listener.close()

    run(main())


def test_a_stalled_handshake_holds_up_nobody_and_ends(run, trust, monkeypatch):  # noqa: F811
    async def main():
        listener = await transport.listen(HERE, trust.good)
        listener._timeout = 0.3
        accepting = asyncio.create_task(listener.accept())
        with raw(listener) as silent, raw(listener) as slow:
            slow.send(b"\x16\x03\x01")
            near = await transport.connect(listener.address, trust.good)
            far = await accepting
            near.abort()
            far.abort()
            accepting = asyncio.create_task(listener.accept())
            while listener.refused < 2:
                await asyncio.sleep(0.01)
            for stranger in (silent, slow):
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.to_thread(stranger.recv, 100) in (b"",) or True
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()

    run(main())


def test_a_server_that_stalls_in_the_handshake_costs_the_client_its_time_limit_and_no_more(run, trust):  # noqa: F811
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            with pytest.raises(LinkLost, match=r"did not finish the TLS handshake within 0\.2 s"):
                await transport.connect(f"tls://127.0.0.1:{silent.getsockname()[1]}", trust.good, timeout=0.2)

    run(main())


def test_many_silent_strangers_take_no_more_than_their_places(run, trust, monkeypatch):  # noqa: F811
    async def main():
        monkeypatch.setattr(admission, "MAX_STRANGERS", 4)
        listener = await transport.listen(HERE, trust.good)
        accepting = asyncio.create_task(listener.accept())
        strangers = [raw(listener) for _ in range(20)]
        while listener.refused < 16:
            await asyncio.sleep(0.01)
            assert len(listener._strangers) <= 6
        near = await transport.connect(listener.address, trust.good)
        far = await accepting
        near.abort()
        far.abort()
        await listener.close()
        for stranger in strangers:
            stranger.close()

    run(main())


def test_a_cancelled_accept_loses_nobody_and_close_ends_a_waiting_one(run, trust):  # noqa: F811
    async def main():
        listener = await transport.listen(HERE, trust.good)
        accepting = asyncio.create_task(listener.accept())
        await stuck(accepting)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        near, far = await asyncio.gather(transport.connect(listener.address, trust.good), listener.accept())
        waiting = asyncio.create_task(listener.accept())
        await stuck(waiting)
        await listener.close()
        await listener.close()
        with pytest.raises(HostError, match="is closed"):
            await waiting
        await near.send(b"x")
        await far.recv_into(bytearray(1))
        near.abort()
        far.abort()

    run(main())


# --- one and the same peer -------------------------------------------------------------------------------------------


def test_a_further_connection_that_shows_another_certificate_is_dropped(run, trust):  # noqa: F811
    async def main():
        first = await transport.listen(HERE, trust.good)
        dialer = transport.Dialer(first.address, trust.good)
        one, here = await asyncio.gather(dialer.connect(timeout=10), first.accept())
        two, there = await asyncio.gather(dialer.connect(timeout=10), first.accept())
        assert one.identity == two.identity
        assert here.identity == there.identity
        await first.close()
        second = await transport.listen(first.address, trust.other)
        accepting = asyncio.create_task(second.accept())
        with pytest.raises(Untrusted, match="another certificate than on the first connection"):
            await dialer.connect(timeout=10)
        for connection in (one, two, here, there, await accepting):
            connection.abort()
        await second.close()

    run(main())


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_looked_for_in_the_configuration(run, trust, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "amig" / "tls"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for kind in ("cert", "key", "ca"):
        (folder / f"{kind}.pem").symlink_to(trust.folder / f"good-{kind}.pem")

    async def main():
        async with pair(None, None) as (near, _):
            assert near.identity

    run(main())


@pytest.mark.parametrize("kind", ["cert", "key", "ca"])
def test_what_is_missing_or_broken_is_named_with_what_to_do(trust, tmp_path, kind, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    files = {k: getattr(trust.good.tls, k) for k in ("cert", "key", "ca")}
    with pytest.raises(UsageError, match=f"can't read {tmp_path}/amig/tls/{kind}.pem.*--tls-{kind}.*--pair"):
        tls.client_context(TlsFiles(**files | {kind: None}))
    (tmp_path / "broken").write_text("-----BEGIN NONSENSE-----\n")
    (tmp_path / "broken").chmod(0o600)
    with pytest.raises(UsageError, match="can't be used"):
        tls.client_context(TlsFiles(**files | {kind: str(tmp_path / "broken")}))


def test_a_key_that_others_can_read_or_that_needs_a_passphrase_is_refused(trust, tmp_path):  # noqa: F811
    from cryptography.hazmat.primitives import serialization

    content = (trust.folder / "good-key.pem").read_bytes()
    key = tmp_path / "key"
    key.write_bytes(content)
    key.chmod(0o644)
    files = trust.good.tls
    with pytest.raises(UsageError, match="is open to other users: chmod 0600"):
        tls.server_context(TlsFiles(cert=files.cert, key=str(key), ca=files.ca))
    locked = serialization.load_pem_private_key(content, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    key.write_bytes(locked)
    key.chmod(0o600)
    with pytest.raises(UsageError, match="no passphrase"):
        tls.server_context(TlsFiles(cert=files.cert, key=str(key), ca=files.ca))


# --- plain TCP -------------------------------------------------------------------------------------------------------


def test_plain_tcp_leaves_the_machine_only_where_that_was_asked_for(run):
    async def main():
        with pytest.raises(UsageError, match=r"in the clear.*ssh://hostb/NAME.*--insecure"):
            await transport.connect("tcp://hostb:7000")
        with pytest.raises(UsageError, match=r"--pair.*--insecure"):
            await transport.listen("tcp://0.0.0.0:0")
        listener = await transport.listen("tcp://0.0.0.0:0", LinkOptions(insecure=True))
        await listener.close()

    run(main())


def test_no_keys_are_written_where_the_environment_says(run, trust, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))

    async def main():
        async with pair(trust.good, trust.good):
            pass

    run(main())
    assert not (tmp_path / "keys").exists()


def test_errors_of_the_socket_are_a_lost_link(run, trust):  # noqa: F811
    async def main():
        async with pair(trust.good, trust.good) as (near, far):
            real = near._sock

            class Failing:
                def send(self, _):
                    raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

                def recv_into(self, _):
                    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

                def __getattr__(self, name):
                    return getattr(real, name)

            near._sock = Failing()
            with pytest.raises(LinkLost, match="No buffer space"):
                await near.send(b"x")
            with pytest.raises(LinkLost, match="timed out"):
                await near.recv_into(bytearray(1))
            assert isinstance(far, TlsConnection)

    run(main())
