"""A whole host: from its name to its end, for a guest that starts here and for one that arrives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from amig.errors import BootError, ControlError, GuestError, HostError, NameTaken, Refused, VerifyFailed
from amig.guest import Handover, Outcome, RunState
from amig.host.attach import open_control, open_guest
from amig.host.handover import Records
from amig.host.incoming import LocalIncoming
from amig.host.life import MachineEnvelope, StateEnvelope
from amig.host.names import live_hosts
from amig.host.service import HostService, How, host

from .fakes import MAP, FakeMachine, build, until

ID = "0123456789abcdef" * 2
FAKE = msgspec.msgpack.encode(MachineEnvelope(engine="fake", description=b"fake machine"))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


async def start(service: HostService, **options: bool) -> FakeMachine:
    machine = await service.build(FakeMachine)
    await service.start(machine, **options)
    return machine


async def wait_for(future: asyncio.Future[object]) -> object:
    async with asyncio.timeout(30):
        return await future


# --- amig run --------------------------------------------------------------------------------------------------------


async def test_a_host_from_start_to_end() -> None:
    seen = bytearray()
    async with HostService("web1", sinks=(seen.extend,)) as service:
        machine = await start(service)
        assert [name for name, _ in live_hosts()] == ["web1"]
        service.console.write(b"hello\n")
        assert seen == b"hello\n"
        async with await open_control("web1") as client:
            assert (await client.status()).state is RunState.RUNNING
            await client.stop()
            ended = await service.ended()
    assert ended.how is How.STOPPED
    assert machine.closed
    assert list(live_hosts()) == []


async def test_a_guest_can_start_paused() -> None:
    async with HostService("web1") as service:
        machine = await start(service, paused=True)
        assert not machine.running
        async with await open_control("web1") as client:
            assert (await client.status()).operator_paused
            await client.resume()
        assert machine.running


async def test_a_guest_that_moves_away_ends_its_host_after_its_answer() -> None:
    async with HostService("web1") as service:
        await start(service)
        guest = await open_guest("web1")
        await guest.pause()
        await guest.prepare(Handover(migration=ID, destination="tcp://far:7000", peer="far/w"))
        await guest.commit(ID)
        ending = asyncio.ensure_future(service.ended())
        await guest.release(ID, Outcome.RUNNING)
        ended = await ending
    assert ended.how is How.MOVED
    assert ended.handover is not None
    assert ended.handover.destination == "tcp://far:7000"
    await guest.close()


async def test_stop_is_answered_although_it_ends_the_host() -> None:
    async def serve() -> None:
        async with HostService("web1") as service:
            await start(service)
            ready.set()
            await service.ended()

    ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve())
        await ready.wait()
        async with await open_control("web1") as client:
            await client.stop()
            await client.gone()
    assert list(live_hosts()) == []


async def test_one_host_a_name() -> None:
    async with HostService("web1"):
        with pytest.raises(NameTaken, match="amig stop web1"):
            async with HostService("web1"):
                pass


async def test_a_name_in_doubt_is_not_started(tmp_path: Path) -> None:
    async with HostService("web1") as service:
        await start(service)
        guest = service.guest()
        await guest.pause()
        await guest.prepare(Handover(migration=ID, destination="tcp://far:7000", peer="far/w"))
        await guest.commit(ID)
        with pytest.raises(ControlError) as caught:
            await service.stop()
        assert caught.value.code == "in-doubt"
        await guest.close()
    with pytest.raises(HostError, match="tcp://far:7000"):
        async with HostService("web1"):
            pass
    assert list(live_hosts()) == []
    Records().resolve("web1", Outcome.DISCARDED)
    async with HostService("web1") as service:
        await start(service)


async def test_all_of_amig_run_in_one_call() -> None:
    machines: list[FakeMachine] = []

    def make(sink: Callable[[bytes], None]) -> FakeMachine:
        machine = FakeMachine()
        machine.output = sink
        machines.append(machine)
        return machine

    def ready(service: HostService) -> None:
        assert machines[0].output == service.console.write
        machines[0].power_off()

    ended = await host("web1", make, ready=ready)
    assert ended.how is How.POWERED_OFF
    assert machines[0].closed

    with pytest.raises(GuestError, match="triple fault"):
        await host("web1", make, ready=lambda _: machines[1].crash())
    assert machines[1].closed

    def broken(_: object) -> FakeMachine:
        raise BootError("not an image")

    with pytest.raises(BootError):
        await host("web1", broken)
    assert list(live_hosts()) == []


async def test_a_cancelled_host_closes_everything() -> None:
    machines: list[FakeMachine] = []

    async def serve() -> None:
        async with HostService("web1") as service:
            machines.append(await start(service))
            guest = await open_guest("web1")
            await guest.log_start(None)
            guests.append(guest)
            await service.ended()

    guests: list[object] = []
    task = asyncio.create_task(serve())
    await until(lambda: bool(guests))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machines[0].closed
    assert machines[0].calls.count("close") == 1
    assert list(live_hosts()) == []
    await guests[0].close()  # type: ignore[attr-defined]


# --- amig receive ----------------------------------------------------------------------------------------------------


async def fill(incoming: LocalIncoming) -> str:
    identity = await incoming.build(name="web1", machine=FAKE, memory=MAP)
    incoming.populate(0, 0, 64)
    incoming.pages(0)[3] = 7
    incoming.pages(7)[63] = 9
    incoming.punch(7, 63, 1)
    await incoming.load(msgspec.msgpack.encode(StateEnvelope(machine=b"device state")))
    return identity


async def test_a_guest_arrives_and_runs() -> None:
    async with HostService("web2") as service:
        async with await open_control("web2") as client:
            status = await client.status()
            assert (status.state, status.vcpus, status.engine) == (RunState.INCOMING, 0, "")
        with pytest.raises(ControlError, match="waiting for a guest"):
            await open_guest("web2")
        incoming = service.incoming({"fake": build})
        identity = await fill(incoming)
        assert identity.endswith("/web2")
        assert service.hosted.state is RunState.INCOMING
        with pytest.raises(ControlError):
            await incoming.run()
            await incoming.settle()
        await incoming.commit(ID)
        machine = service.hosted.machine
        assert isinstance(machine, FakeMachine)
        assert "resume" not in machine.calls
        assert Records().outcome(ID) is Outcome.RUNNING
        await incoming.run()
        await incoming.settle()
        assert machine.running
        assert machine.loaded == b"device state"
        guest = await open_guest("web2")
        assert guest.memory.pages(0)[3].tolist() == [7] * 4096
        assert not guest.memory.pages(7)[63].any()
        await guest.close()
        with pytest.raises(Refused, match="has a guest already"):
            await service.incoming({"fake": build}).build(name="web1", machine=FAKE, memory=MAP)
        await incoming.discard(ID)
        assert machine.running
    assert machine.closed


async def test_a_discarded_guest_never_runs_and_another_may_come() -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        await fill(incoming)
        machine = service.hosted.machine
        await incoming.discard(ID)
        await incoming.discard(ID)
        assert machine.closed  # type: ignore[attr-defined]
        assert Records().outcome(ID) is Outcome.DISCARDED
        with pytest.raises(ControlError):
            await incoming.commit(ID)
        again = service.incoming({"fake": build})
        await fill(again)
        await again.commit("f" * 32)
        await again.run()
        await again.settle()
        assert service.hosted.state is RunState.RUNNING


async def test_nothing_is_put_on_record_for_a_guest_that_was_never_whole(tmp_path: Path) -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        await incoming.build(name="web1", machine=FAKE, memory=MAP)
        await incoming.discard(ID)
    assert os.listdir(tmp_path / "state" / "amig" / "handover") == []


async def test_a_committed_guest_can_not_be_discarded() -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        await fill(incoming)
        await incoming.commit(ID)
        with pytest.raises(ControlError):
            await incoming.discard(ID)
        await incoming.run()
        await incoming.settle()
        assert service.hosted.state is RunState.RUNNING


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (b"", "makes no sense"),
        (b"\xc1", "makes no sense"),
        (msgspec.msgpack.encode({"engine": "fake"}), "makes no sense"),
        (msgspec.msgpack.encode(MachineEnvelope(engine="vax", description=b"")), "'vax'.*fake"),
        (msgspec.msgpack.encode(MachineEnvelope(engine="fake", description=b"other")), "not a fake machine"),
    ],
)
async def test_what_can_not_be_built_is_refused_with_the_reason(machine: bytes, why: str) -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        with pytest.raises(Refused, match=why):
            await incoming.build(name="web1", machine=machine, memory=MAP)
        await incoming.discard(ID)
        assert service.hosted.state is RunState.INCOMING
        await fill(service.incoming({"fake": build}))


async def test_state_that_does_not_fit_is_refused() -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        await incoming.build(name="web1", machine=FAKE, memory=MAP)
        with pytest.raises(VerifyFailed):
            await incoming.load(b"rubbish")
        with pytest.raises(ControlError):
            await incoming.commit(ID)


async def test_a_destination_that_was_asked_too_early_does_not_run_it() -> None:
    async with HostService("web2") as service:
        incoming = service.incoming({"fake": build})
        await fill(incoming)
        assert Records().outcome(ID) is None
        await incoming.expect(ID)
        assert Records().outcome(ID) is Outcome.DISCARDED
        with pytest.raises(ControlError):
            await incoming.commit(ID)
        with pytest.raises(ControlError):
            await incoming.run()
            await incoming.settle()
        await incoming.discard(ID)
        assert service.hosted.state is RunState.INCOMING
