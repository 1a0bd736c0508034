"""Whole migrations over tls:// and with pairing, and what somebody else on the network can't do to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

import amig
from amig import transport
from amig.errors import LinkLost, Refused, Untrusted, UsageError
from amig.events import State, StateChanged
from amig.session.inbound import Inbound
from amig.session.reception import Reception
from amig.transport import LinkOptions, TlsFiles
from amig.transport.framed import FramedConnection
from amig.transport.pairing import PairingHost
from amig.wire.messages import Join, Welcome
from amig.wire.states import SourceProtocol
from tests.modelguest import ModelGuest, ModelIncoming
from tests.moving import assert_stayed, homes, hosting, machine_of, move, verdict  # noqa: F401 - a fixture
from tests.trust import Trust, trust  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("homes")
BUSY = amig.Policy(downtime=0.1, timeout=60, on_timeout="switch", streams=4, compression="zstd")
HERE = "tls://127.0.0.1:0"


async def test_a_checking_guest_moves_over_tls_on_four_connections(trust: Trust) -> None:  # noqa: F811
    async with hosting(engine="simulator") as source, Reception(HERE, name="b", link=trust.good) as target:
        assert target.invitation == target.address
        result = await move(source, target.address, BUSY, link=trust.other)
        await target.arrived()
        assert result.streams == 4
        assert await verdict(machine_of(target.service)) == 0


async def test_a_checking_guest_moves_to_a_paired_host_on_four_connections(tmp_path: Path) -> None:
    async with hosting(engine="simulator") as source:
        async with Reception(HERE, name="b", pairing=PairingHost()) as target:
            invitation = target.invitation
            secret = invitation.rpartition(".")[2]
            events: list[amig.Event] = []
            result = await move(source, invitation, BUSY, on_event=events.append)
            await target.arrived()
            assert result.streams == 4
            assert await verdict(machine_of(target.service)) == 0
            ended = await source.ended()
        said = [*map(repr, events), repr(result), repr(ended), str(ended)]
        assert result.destination in invitation or result.destination.startswith(invitation[:40])
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in kept if "state" in path.parts], "there is a durable record"
    for text in (*said, *(path.read_bytes().decode(errors="replace") for path in kept)):
        assert secret not in text


async def test_a_pairing_is_for_one_attempt() -> None:
    async with (
        hosting(engine="simulator") as source,
        Reception(HERE, name="b", pairing=PairingHost()) as target,
    ):
        migration: amig.Migration

        def on_event(event: amig.Event) -> None:
            if isinstance(event, StateChanged) and event.state is State.MEMORY:
                asyncio.get_running_loop().call_soon(migration.cancel)

        async with amig.Migration(source.name, target.invitation, BUSY, on_event=on_event) as migration:
            pass
        with pytest.raises(amig.AmigError):
            await target.arrived()
        await assert_stayed(source)


@pytest.mark.parametrize("how", ["pairing", "certificates"])
async def test_a_connection_that_is_lost_is_made_anew_by_who_has_proved_to_be_the_same(
    trust: Trust,  # noqa: F811
    how: str,
) -> None:
    pairing, link = (PairingHost(), LinkOptions()) if how == "pairing" else (None, trust.good)
    cuts = 1

    def on_event(event: amig.Event) -> None:
        nonlocal cuts
        if cuts and isinstance(event, amig.Progress) and event.bytes_sent > 1 << 20:
            cuts -= 1
            for connection in migration._session._destination._links:  # type: ignore[union-attr, attr-defined]
                connection.abort()

    async with (
        hosting(engine="simulator") as source,
        Reception(HERE, name="b", pairing=pairing, link=link) as target,
    ):
        policy = amig.Policy(bandwidth=30e6, streams=2, downtime=1.0)
        migration = amig.Migration(source.name, target.invitation, policy, link=link, on_event=on_event)
        async with migration:
            pass
        assert (await migration.result()).reconnects == 1
        await target.arrived()
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_side_that_is_not_trusted_gets_no_guest_and_brings_none(trust: Trust, side: str) -> None:  # noqa: F811
    ours, theirs = (trust.stranger, trust.good) if side == "source" else (trust.good, trust.stranger)
    async with hosting(engine="simulator") as source, Reception(HERE, name="b", link=theirs) as target:
        with pytest.raises(Untrusted):
            await move(source, target.address, BUSY, link=ours)
        assert target.service.hosted.state is amig.RunState.INCOMING
        await assert_stayed(source)


@contextlib.asynccontextmanager
async def arriving(listener: transport.Listener):  # type: ignore[no-untyped-def]
    """A destination that has let one source in and waits for its further connections."""
    guest = ModelIncoming()

    async def run() -> None:
        inbound = Inbound(await listener.accept(), listener, guest, release="test")
        try:
            await inbound.run()
        finally:
            await inbound.close()

    task = asyncio.create_task(run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listener.close()


async def test_further_connections_need_the_certificate_of_the_first(
    trust: Trust,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else whose certificate is good, and who has even learned the token, does not get in."""
    listener = await transport.listen(HERE, trust.good)
    tokens: list[Welcome] = []
    real = transport.Dialer.connect
    dialled = 0

    async def connect(self: transport.Dialer, *, timeout: float):  # type: ignore[no-untyped-def]
        nonlocal dialled
        dialled += 1
        if dialled != 2:
            return await real(self, timeout=timeout)
        # In the place of the second connection, a thief with the right token comes first.
        thief = FramedConnection(await transport.connect(listener.address, trust.other), SourceProtocol())
        await thief.send_message(Join(migration=migration.id, token=tokens[0].token, stream=1))
        answer = await thief.receive()
        stolen.append(answer)
        thief.abort()
        return await real(self, timeout=timeout)

    stolen: list[object] = []
    receive = FramedConnection.receive

    async def spy(self: FramedConnection):  # type: ignore[no-untyped-def]
        message = await receive(self)
        if isinstance(message, Welcome):
            tokens.append(message)
        return message

    monkeypatch.setattr(transport.Dialer, "connect", connect)
    monkeypatch.setattr(FramedConnection, "receive", spy)
    guest = ModelGuest(512)
    guest.write(np.arange(0, 512, 2))
    async with arriving(listener) as task:
        async with amig.Migration(guest, listener.address, amig.Policy(streams=2), link=trust.good) as migration:
            pass
        await asyncio.wait_for(task, 20)
    assert type(stolen[0]).__name__ == "Refuse"
    assert (await migration.result()).streams == 2


async def test_plain_tcp_needs_to_be_asked_for_on_both_sides() -> None:
    with pytest.raises(UsageError, match="--insecure"):
        async with Reception("tcp://0.0.0.0:0", name="b"):
            pass
    guest = ModelGuest(8)
    with pytest.raises(UsageError, match="--insecure"):
        async with amig.Migration(guest, "tcp://192.0.2.1:7000"):
            pass
    async with Reception("tcp://0.0.0.0:0", name="b", link=LinkOptions(insecure=True)):
        pass


async def test_a_plain_source_at_a_tls_destination_and_the_reverse(trust: Trust) -> None:  # noqa: F811
    async with hosting(engine="simulator") as source:
        async with Reception(HERE, name="b", link=trust.good) as target:
            with pytest.raises(LinkLost):
                await move(source, target.address.replace("tls:", "tcp:"), BUSY)
            await move(source, target.address, BUSY, link=trust.good)  # it still listens
            await target.arrived()
            async with Reception("tcp://127.0.0.1:0", name="c") as plain:
                with pytest.raises(amig.AmigError, match="is it plain tcp:// on that side"):
                    await move(target.service, plain.address.replace("tcp:", "tls:"), BUSY, link=trust.good)
                await move(target.service, plain.address, BUSY)
                await plain.arrived()
                assert await verdict(machine_of(plain.service)) == 0


async def test_missing_certificates_are_said_before_the_guest_is_touched(tmp_path: Path) -> None:
    none = LinkOptions(tls=TlsFiles(cert=str(tmp_path / "no")))
    async with hosting(engine="simulator") as source:
        with pytest.raises(UsageError, match=r"can't read .*/no: No such file.*--tls-cert"):
            await move(source, "tls://127.0.0.1:1", BUSY, link=none)
        await assert_stayed(source)
    with pytest.raises(UsageError, match="--tls-cert"):
        async with Reception(HERE, name="b", link=none):
            pass


async def test_the_result_of_a_migration_that_never_began_has_no_secret_either() -> None:
    guest = ModelGuest(8)
    broken = "tls://127.0.0.1:7000/#AAAA.BBBBsecret"
    with pytest.raises(UsageError) as caught:
        async with amig.Migration(guest, broken) as migration:
            pass
    result = await migration.result()
    for text in (str(caught.value), repr(result), json.dumps(result.destination)):
        assert "secret" not in text.replace("once", "")
    assert isinstance(caught.value, UsageError)
    assert Refused.exit_code != Untrusted.exit_code == 47
