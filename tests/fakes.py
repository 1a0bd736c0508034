"""A guest without a CPU: real memory, an exact dirty log, and calls that are counted instead of carried out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from amig.control.server import ControlServer
from amig.errors import GuestError, VerifyFailed
from amig.host.handover import Records
from amig.host.hosted import HostedGuest
from amig.host.local import error_code
from amig.host.memory import MemfdMemory
from amig.host.relay import ConsoleRelay
from amig.host.session import HostSession
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim.kernel_log import SimKernelLog

MAP = MemoryMap(
    generation=1,
    regions=(Region(id=0, size=200 * PAGE_SIZE), Region(id=7, size=64 * PAGE_SIZE)),
    slots=(
        Slot(index=0, guest_phys=0, size=200 * PAGE_SIZE, region=0, offset=0),
        Slot(index=1, guest_phys=1 << 32, size=64 * PAGE_SIZE, region=7, offset=0),
    ),
)


class FakeMachine:
    """Implements `amig.host.machine.Machine`. ``calls`` names everything that was asked of it, in order."""

    engine = "fake"
    vcpus = 2

    def __init__(self, memory_map: MemoryMap = MAP) -> None:
        self.memory = MemfdMemory(memory_map)
        self.log = SimKernelLog(memory_map)
        self.on_stopped: Callable[[Exception | None], None] | None = None
        self.running = False
        self.closed = False
        self.calls: list[str] = []
        self.state = b"device state"
        self.loaded: bytes | None = None
        self.input = bytearray()
        self.output: Callable[[bytes], None] | None = None
        self.before_pause = threading.Event()
        self.before_pause.set()

    def write(self, region: int, page: int, value: int) -> None:
        """What a vCPU would do: change memory, and let the log know."""
        assert self.running, "a paused guest writes nothing"
        self.touch(region, page, value)

    def touch(self, region: int, page: int, value: int) -> None:
        """As the kernel writes into guest memory on the guest's behalf."""
        self.memory.pages(region)[page] = value
        for slot in self.memory.map.slots:
            if slot.region == region:
                self.log.guest_write(slot.index, [page - slot.offset // PAGE_SIZE])

    @property
    def logging(self) -> bool:
        return any(self.log.peek(slot.index) is not None for slot in self.memory.map.slots)

    def describe(self) -> bytes:
        return b"fake machine"

    def resume(self) -> None:
        assert not self.closed
        self.calls.append("resume")
        self.running = True

    def pause(self) -> None:
        self.before_pause.wait(30)
        self.calls.append("pause")
        self.running = False

    def save(self) -> bytes:
        assert not self.running
        self.calls.append("save")
        return self.state

    def load(self, state: bytes) -> None:
        if not state.startswith(b"device"):
            raise VerifyFailed("not the state of a fake machine")
        self.calls.append("load")
        self.loaded = state

    def serial_input(self, data: bytes) -> None:
        self.input += data

    def close(self) -> None:
        self.calls.append("close")
        self.running = False
        self.closed = True
        self.memory.close()

    def power_off(self) -> None:
        self.running = False
        assert self.on_stopped is not None
        self.on_stopped(None)

    def crash(self) -> None:
        self.running = False
        assert self.on_stopped is not None
        self.on_stopped(GuestError("triple fault"))


def build(description: bytes, memory_map: MemoryMap) -> FakeMachine:
    """A builder for `LocalIncoming`."""
    if description != b"fake machine":
        raise GuestError("not a fake machine")
    return FakeMachine(memory_map)


@asynccontextmanager
async def hosted_guest(directory: Path, name: str = "web1", *, start: bool = True) -> AsyncIterator[HostedGuest]:
    """A running guest, its records kept under ``directory``."""
    hosted = HostedGuest(name, records=Records(directory))
    try:
        await hosted.adopt(FakeMachine())
        if start:
            await hosted.start()
        yield hosted
    finally:
        await hosted.close()


@asynccontextmanager
async def serving(hosted: HostedGuest, path: Path, console: ConsoleRelay | None = None) -> AsyncIterator[ControlServer]:
    """Its control socket."""
    console = console or ConsoleRelay(hosted)
    server = ControlServer(path, lambda outbox: HostSession(hosted, outbox, console), error_code)
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.wait({task})
        server.close()
        if not task.cancelled():
            task.result()


async def until(condition: Callable[[], bool], what: str = "a condition", seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true") from None
