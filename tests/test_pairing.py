"""Pairing: an address that one source may use once."""

import asyncio
import contextlib
import logging
import os
import re
import ssl

import pytest
import uvloop

from amig import transport
from amig.errors import AmigError, HostError, LinkLost, PeerError, Untrusted, UsageError
from amig.session.reception import Reception
from amig.transport import pairing, tls
from amig.transport.address import PairAddress, TlsAddress, parse
from amig.transport.pairing import ALPN, MAX_TRIES, Answer, Kind, PairingHost, reachable
from tests.moving import homes  # noqa: F401 - a fixture

HERE = TlsAddress(host="127.0.0.1", port=0)


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


@contextlib.asynccontextmanager
async def inviting(**more):
    """A destination that waits; ends with every connection it let in."""
    host = PairingHost(**more)
    listener = await host.listen(HERE)
    admitted = []
    over = []

    async def serve():
        try:
            while True:
                admitted.append(await listener.accept())
        except AmigError as error:
            over.append(error)

    serving = asyncio.create_task(serve())
    try:
        yield host, listener, listener.invitation().reveal(), admitted, over
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await listener.close()
        for connection in admitted:
            connection.abort()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def with_other(invitation, **changes):
    address = parse(invitation)
    fields = {name: getattr(address, name) for name in ("host", "port", "fingerprint", "secret")}
    return PairAddress(**fields | changes)


def test_the_address_is_all_that_a_source_needs(run):
    async def main():
        async with inviting() as (host, _, invitation, admitted, _):
            near = await transport.connect(invitation)
            await until(lambda: admitted)
            await near.send(b"a guest")
            got = bytearray(7)
            await admitted[0].recv_into(got)
            assert got == b"a guest"
            assert near.version == "TLSv1.3"
            assert near.protocol == ALPN
            assert near.identity == host.fingerprint
            assert host.paired
            near.abort()

    run(main())


def test_the_same_source_comes_again_and_is_known_as_the_same(run):
    async def main():
        async with inviting() as (_, _, invitation, admitted, _):
            dialer = transport.Dialer(invitation)
            ends = [await dialer.connect(timeout=10) for _ in range(4)]
            await until(lambda: len(admitted) == 4)
            assert len({end.identity for end in admitted}) == 1
            assert len(admitted[0].identity) == 32
            for end in ends:
                end.abort()

    run(main())


def test_an_address_is_good_once(run, caplog):
    async def main():
        async with inviting() as (host, listener, invitation, admitted, _):
            near = await transport.connect(invitation)
            await until(lambda: admitted)
            with pytest.raises(Untrusted, match=r"has been used already.*somebody has seen the address"):
                await transport.connect(invitation)
            await until(lambda: listener.refused == 1)
            assert "after that had been used" in caplog.text
            assert len(admitted) == 1
            assert host.tries == 0
            await near.send(b"x")  # the first is not disturbed
            await admitted[0].recv_into(bytearray(1))
            near.abort()

    run(main())


def test_of_two_that_come_at_once_one_is_let_in(run):
    async def main():
        async with inviting() as (_, _, invitation, admitted, _):
            results = await asyncio.gather(*(transport.connect(invitation) for _ in range(8)), return_exceptions=True)
            came = [result for result in results if not isinstance(result, BaseException)]
            assert len(came) == 1
            assert all(isinstance(result, Untrusted) for result in results if result not in came)
            await until(lambda: admitted)
            assert len(admitted) == 1
            came[0].abort()

    run(main())


def test_wrong_secrets_are_counted_and_lock_the_address(run):
    async def main():
        async with inviting() as (host, listener, invitation, admitted, over):
            wrong = with_other(invitation, secret=os.urandom(20))
            for tries in range(1, MAX_TRIES + 1):
                with pytest.raises(Untrusted, match=r"refused: it does not know this secret"):
                    await transport.connect(wrong)
                assert host.tries == tries
            await until(lambda: over)
            assert host._judge(Kind.SECRET, True) is Answer.LOCKED, "one that was under way when the last try came"
            assert isinstance(over[0], Untrusted)
            assert f"{MAX_TRIES} wrong secrets were tried" in str(over[0])
            assert not admitted
            assert listener.refused == MAX_TRIES

    run(main())


def test_a_few_wrong_ones_do_not_keep_the_right_one_out(run):
    async def main():
        async with inviting() as (_, _, invitation, admitted, _):
            for _ in range(MAX_TRIES - 1):
                with pytest.raises(Untrusted):
                    await transport.connect(with_other(invitation, secret=os.urandom(20)))
            near = await transport.connect(invitation)
            await until(lambda: admitted)
            near.abort()

    run(main())


def test_an_address_expires(run):
    async def main():
        async with inviting(lasts=50) as (host, _, _, admitted, over):
            host._until -= 51
            await until(lambda: over)
            assert host._judge(Kind.SECRET, True) is Answer.EXPIRED, "one that was under way meanwhile"
            assert "nobody came within 50 s" in str(over[0])
            assert not admitted

    run(main())


def test_who_has_come_in_time_stays_in(run):
    async def main():
        async with inviting(lasts=50) as (host, _, invitation, admitted, over):
            dialer = transport.Dialer(invitation)
            first = await dialer.connect(timeout=10)
            host._until -= 51
            second = await dialer.connect(timeout=10)
            await until(lambda: len(admitted) == 2)
            assert not over
            first.abort()
            second.abort()

    run(main())


def test_a_destination_with_another_certificate_is_told_nothing(run):
    """Somebody in between: it can pass everything on, but it has not the key of the certificate."""

    async def main():
        async with inviting() as (host, _, _, admitted, _), inviting() as (real, _, invitation, _, _):
            between = with_other(invitation, port=parse(invitation).port)
            listener = await host.listen(HERE)
            between = with_other(invitation, port=int(listener.address.rpartition(":")[2]))
            serving = asyncio.create_task(listener.accept())
            with pytest.raises(Untrusted, match=r"its certificate has another fingerprint.*in between"):
                await transport.connect(between)
            await until(lambda: listener.refused)
            assert host.tries == real.tries == 0, "it got a proof"
            assert not admitted
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await listener.close()

    run(main())


@contextlib.asynccontextmanager
async def impostor(host, speak):
    """A server with the right certificate that says what it likes."""
    listener = await tls.listening(HERE, host._context)

    async def serve():
        connection = await listener.accept()
        try:
            await connection.handshake()
            with contextlib.suppress(LinkLost):
                await speak(connection)
            await connection.close()
        finally:
            connection.abort()

    serving = asyncio.create_task(serve())
    try:
        yield PairAddress(
            host="127.0.0.1",
            port=int(listener.address.rpartition(":")[2]),
            fingerprint=host.fingerprint,
            secret=host.secret,
        )
    finally:
        await listener.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_a_destination_must_prove_that_it_has_the_secret(run):
    async def main():
        async def speak(connection):
            await connection.send(bytes(32))
            await connection.recv_into(bytearray(65))
            await connection.send(bytes([Answer.ADMITTED]) + bytes(32))

        async with impostor(PairingHost(), speak) as address:
            with pytest.raises(Untrusted, match="took our proof and has none itself"):
                await transport.connect(address)

    run(main())


def test_the_two_proofs_are_not_the_same(run):
    async def main():
        async def speak(connection):
            await connection.send(bytes(32))
            said = bytearray(65)
            await connection.recv_into(said)
            await connection.send(bytes([Answer.ADMITTED]) + said[33:])  # an echo

        async with impostor(PairingHost(), speak) as address:
            with pytest.raises(Untrusted, match="has none itself"):
                await transport.connect(address)

    run(main())


def test_an_answer_that_nobody_knows_is_no_admission(run):
    async def main():
        async def speak(connection):
            await connection.send(bytes(32))
            await connection.recv_into(bytearray(65))
            await connection.send(b"\xff" + bytes(32))

        async with impostor(PairingHost(), speak) as address:
            with pytest.raises(Untrusted, match="does not say why"):
                await transport.connect(address)

    run(main())


def test_a_destination_that_says_nothing_costs_the_time_limit(run):
    async def main():
        async def speak(connection):
            await connection.recv_into(bytearray(1))

        async with impostor(PairingHost(), speak) as address:
            with pytest.raises(LinkLost, match="did not answer to the pairing"):
                await transport.connect(address, timeout=0.5)

    run(main())


def test_a_proof_that_was_recorded_is_worth_nothing_elsewhere(run):
    """The same bytes again, on a connection of their own: the nonce is another one."""
    recorded = bytearray(65)

    async def main():
        host = PairingHost()

        async def speak(connection):
            await connection.send(bytes(32))
            await connection.recv_into(recorded)

        async with impostor(host, speak) as address:
            with pytest.raises(LinkLost):
                await transport.connect(address)
        listener = await host.listen(HERE)
        accepting = asyncio.create_task(listener.accept())
        where = TlsAddress(host="127.0.0.1", port=int(listener.address.rpartition(":")[2]))
        thief = await tls.connect(where, transport.Dialer(address)._pairing._context, timeout=10, alpn=ALPN)
        await thief.recv_into(bytearray(32))
        await thief.send(recorded)
        answer = bytearray(33)
        await thief.recv_into(answer)
        assert answer == bytes([Answer.WRONG]) + bytes(32)
        assert host.tries == 1
        thief.abort()
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await listener.close()

    run(main())


@pytest.mark.parametrize("kind", [Kind.SESSION, 2, 255])
def test_there_is_no_session_before_there_is_one(run, kind):
    async def main():
        async with inviting() as (host, listener, invitation, admitted, _):
            address = parse(invitation)
            context = transport.Dialer(address)._pairing._context
            near = await tls.connect(TlsAddress(host=address.host, port=address.port), context, timeout=10, alpn=ALPN)
            nonce = bytearray(32)
            await near.recv_into(nonce)
            about = bytes([kind]) + address.fingerprint + bytes(32) + nonce
            # An empty key for a session that is not there yet must prove nothing, nor the secret under another name.
            key = b"" if kind == Kind.SESSION else address.secret
            await near.send(bytes([kind]) + bytes(32) + pairing._mac(key, b"source", about))
            answer = bytearray(33)
            await near.recv_into(answer)
            assert answer[0] == Answer.WRONG
            assert host.tries == 1
            await until(lambda: listener.refused)
            assert not admitted
            near.abort()

    run(main())


def test_a_wrong_session_is_refused_and_does_not_disturb(run):
    async def main():
        async with inviting() as (_, _, invitation, admitted, over):
            dialer = transport.Dialer(invitation)
            first = await dialer.connect(timeout=10)
            for _ in range(MAX_TRIES + 2):
                other = transport.Dialer(invitation)
                other._pairing._session = os.urandom(32)
                with pytest.raises(Untrusted, match="does not know this secret"):
                    await other.connect(timeout=10)
            second = await dialer.connect(timeout=10)
            await until(lambda: len(admitted) == 2)
            assert not over
            first.abort()
            second.abort()

    run(main())


def test_certificates_and_pairing_are_not_taken_for_one_another(run):
    async def main():
        async with inviting() as (host, listener, invitation, admitted, _):
            where = parse(invitation)
            context = tls.plain_context(ssl.PROTOCOL_TLS_CLIENT, tls.ALPN)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with pytest.raises(PeerError, match="without --pair"):
                await tls.connect(TlsAddress(host=where.host, port=where.port), context, timeout=10)
            await until(lambda: listener.refused)
            assert not admitted
            assert host.tries == 0

    run(main())


def test_a_wildcard_is_not_what_the_other_side_is_told():
    assert reachable("10.1.2.3") == "10.1.2.3"
    assert reachable("0.0.0.0") != "0.0.0.0"
    assert reachable("::") != "::"


def test_the_certificate_is_new_each_time_and_short_lived():
    from cryptography import x509

    one, two = PairingHost(), PairingHost()
    assert one.fingerprint != two.fingerprint
    assert one.secret != two.secret
    assert len(one.secret) == 20

    async def main():
        listener = await one.listen(HERE)
        accepting = asyncio.create_task(listener.accept())
        near = await transport.connect(listener.invitation())
        shown = x509.load_der_x509_certificate(near._tls.getpeercert(binary_form=True))
        life = shown.not_valid_after_utc - shown.not_valid_before_utc
        assert life.days <= 1
        near.abort()
        (await accepting).abort()
        await listener.close()

    asyncio.run(main())


def test_the_secret_is_in_no_log_and_no_error(run, caplog):
    caplog.set_level(logging.DEBUG)
    said = []

    async def main():
        async with inviting() as (host, _, invitation, admitted, _):
            secret = invitation.rpartition(".")[2]
            wrong = with_other(invitation, secret=os.urandom(20))
            for address in (wrong, with_other(invitation, fingerprint=os.urandom(32)), invitation, invitation):
                try:
                    connection = await transport.connect(address)
                except AmigError as error:
                    said.append(str(error))
                else:
                    said.append(f"{connection.peer} {connection!r}")
                    connection.abort()
            dialer = transport.Dialer(invitation)
            said.extend((dialer.address, repr(parse(invitation)), str(parse(invitation)), repr(host)))
            await until(lambda: admitted)
            said.extend((admitted[0].peer, *(task.get_name() for task in asyncio.all_tasks())))
            hidden = (secret, wrong.reveal().rpartition(".")[2], repr(host.secret), host.secret.hex())
            for text in (*said, caplog.text):
                for word in hidden:
                    assert word not in text

    run(main())
    assert len(said) > 8


@pytest.mark.usefixtures("homes")
async def test_a_reception_that_pairs_ends_when_nobody_can_come_any_more():
    for address, why in (("tcp://127.0.0.1:0", "tls://HOST:PORT"), ("unix:x", "tls://HOST:PORT")):
        with pytest.raises(UsageError, match=why):
            async with Reception(address, name="web1", pairing=PairingHost()):
                pass
    host = PairingHost()
    async with Reception("tls://127.0.0.1:0", name="web1", pairing=host) as reception:
        assert re.fullmatch(r"tls://127\.0\.0\.1:[0-9]+", reception.address)
        assert isinstance(parse(reception.invitation), PairAddress)
        host.tries = MAX_TRIES
        with pytest.raises(Untrusted, match="the address is void"):
            await asyncio.wait_for(reception.arrived(), 20)


async def test_a_taken_port_is_said():
    listener = await PairingHost().listen(HERE)
    where = TlsAddress(host="127.0.0.1", port=int(listener.address.rpartition(":")[2]))
    with pytest.raises(HostError, match=r"tls://127\.0\.0\.1:[0-9]+ is taken"):
        await PairingHost().listen(where)
    await listener.close()
