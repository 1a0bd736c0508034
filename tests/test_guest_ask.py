"""Asking amig's own guest image through its host: a host-side write that no migration may lose."""

from __future__ import annotations

import pytest

import amig
from amig.errors import ControlError
from amig.guest import Guest
from amig.host import guest_abi as abi
from amig.host.attach import open_control, open_guest
from tests.moving import CHECK, homes, hosting, machine_of, receiving, until

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
ENGINES = ["simulator", pytest.param("kvm", marks=pytest.mark.kvm)]


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_running_guest_answers(engine: str) -> None:
    async with hosting(CHECK, engine=engine, vcpus=2) as service, await open_control(service.name) as control:
        for number in (1, 2):
            assert await control.ask_guest("verify") == number
            while (guest := (await control.status()).guest) is None or guest.verify_done < number:
                pass
            assert guest.verify_pages == 24 * 256
            assert guest.verify_mismatches == guest.mismatches == 0
        assert await control.ask_guest("gap-reset") == 1
        while (guest := (await control.status()).guest) is None or guest.gap_ack < 1:
            pass


async def test_the_page_written_is_dirty_afterwards() -> None:
    page = abi.CONTROL_GPA // abi.PAGE_SIZE
    async with (
        hosting("workload=idle", engine="simulator") as service,
        await open_control(service.name) as control,
    ):
        guest: Guest = await open_guest(service.name)
        try:
            await guest.log_start(None)
            await guest.sync()
            pages = guest.info.memory.region(0).pages
            await guest.take_and_clear(0, 0, pages)
            await control.ask_guest("verify")
            words = (await guest.sync())[0]
            assert words[page // 64] >> page % 64 & 1
        finally:
            await guest.close()


async def test_a_guest_that_does_not_run_is_not_written_to() -> None:
    """Behind a migration's last sync the word would stay on this side."""
    async with hosting(CHECK, engine="simulator") as service, await open_control(service.name) as control:
        guest = await open_guest(service.name)
        await guest.pause()
        with pytest.raises(ControlError) as refused:
            await control.ask_guest("verify")
        assert refused.value.code == "wrong-state"
        await guest.resume()
        await guest.close()
        await control.ask_guest("verify")


async def test_another_guest_is_not_written_to() -> None:
    async with hosting(CHECK, engine="simulator") as service, await open_control(service.name) as control:
        memory = machine_of(service).memory
        await control.pause()
        memory.write(abi.STATUS_GPA, bytes(8))
        before = memory.read(abi.CONTROL_GPA, abi.PAGE_SIZE)
        await control.resume()
        with pytest.raises(ControlError) as refused:
            await control.ask_guest("verify")
        assert refused.value.code == "guest"
        assert memory.read(abi.CONTROL_GPA, abi.PAGE_SIZE) == before
        assert (await control.status()).guest is None


async def test_what_is_asked_on_the_way_is_answered_over_there() -> None:
    async with hosting(CHECK, engine="simulator") as service, receiving() as there:
        async with amig.Migration(service.name, there.address, amig.Policy(bandwidth=20e6, downtime=5.0)) as migration:
            async for event in migration:
                if isinstance(event, amig.Progress):
                    break
            async with await open_control(service.name) as control:
                number = await control.ask_guest("verify")
            migration.set_bandwidth(None)
        await there.arrived()
        memory = machine_of(there.service)
        await until(
            lambda: (abi.parse_cpus(memory.memory.pages(0).reshape(-1), 1)["verify_done"] >= number).all(), "it answers"
        )
