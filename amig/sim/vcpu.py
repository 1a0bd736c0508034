"""One vCPU of a simulated guest: the loop of guest/work.c, cut into steps between which it can be paused and moved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from amig.errors import GuestError
from amig.host import guest_abi as abi
from amig.host.guest_abi import PAGE_SIZE, Bad, Phase, State, Work, Write
from amig.sim import content
from amig.sim.plan import Plan
from amig.sim.ram import Frames, SimRam

BATCH: Final = 32
"""Pages that one step works on: what is written and marked in one atomic step.

With 64, each array is 256 KiB, which malloc takes from the kernel and gives back every time: six times slower.
"""

_SECOND: Final = 1_000_000_000

_Word = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class VcpuState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All that a vCPU remembers outside of memory."""

    own_filled: _Word = 0
    """Checked pages of its share written so far."""
    fill_at: _Word = 0
    """Other pages filled so far."""
    running: bool = False
    random: _Word = 0
    """How many random numbers were used."""
    next: _Word = 0
    """Sequential: the next page."""
    roll: _Word = 0
    """Check: the next page of the rolling pass."""
    salt: _Word = 0
    credit: _Word = 0
    """Nanoseconds earned and not spent."""
    last: _Word = 0
    """TSC up to which credit was earned."""
    request: _Word = 0
    """The verification under way, or the last one."""
    verify_at: _Word = 0
    verifying: bool = False
    bad: _Word = 0
    """Mismatches that the verification under way has found."""


class SimVcpu:
    """Steps are not to be called from two threads at a time."""

    def __init__(self, index: int, plan: Plan, ram: SimRam, tsc: Callable[[], int], say: Callable[[str], None]) -> None:
        self.index = index
        self.state = VcpuState()
        self._plan = plan
        self._share = plan.shares[index]
        self._ram = ram
        self._tsc = tsc
        self._say = say
        self._gpa = abi.CPU_GPA + index * abi.CPU_STRIDE
        self.block = np.frombuffer(ram.view(self._gpa, abi.CPU_STRIDE), abi.CPU, 1)
        self._all = np.frombuffer(ram.view(abi.CPU_GPA, abi.CPU_STRIDE * plan.options.vcpus), abi.CPU)
        self._control = np.frombuffer(ram.view(abi.CONTROL_GPA, abi.CONTROL.itemsize), abi.CONTROL, 1)
        self._status = np.frombuffer(ram.view(abi.STATUS_GPA, abi.STATUS.itemsize), abi.STATUS, 1)
        table = ram.view(self._share.generations, 4 * self._share.pages) if plan.gen_pages else np.empty(0, np.uint8)
        self._generations: npt.NDArray[np.uint32] = table.view(np.uint32)

    def boot(self) -> None:
        """Say in the block what this vCPU works on; the status page has been written."""
        share = self._share
        with self._stores():
            self.block["state"] = State.FILLING
            self.block["first_page"] = share.first
            self.block["pages"] = share.pages
            self.block["gen_gpa"] = share.generations if self._plan.gen_pages else 0
            self.block["tsc"] = self._tsc()

    def step(self) -> float:
        """Do one bounded piece of work; returns for how many seconds to wait before the next."""
        now = self._beat()
        state, options = self.state, self._plan.options
        if not state.running:
            return self._prepare(now)
        request = int(self._control["verify_request"][0])
        if state.verifying or request != int(self.block["verify_done"][0]):
            return self._verify_share(request)
        quiesce = int(self._control["quiesce"][0]) & 0xFFFFFFFF
        if options.workload < Work.SEQUENTIAL or quiesce or options.crash:
            if options.crash and self.index == 0:
                raise GuestError("the simulated guest crashed, as its command line asked for")
            state.last = now
            self._set(quiesced=quiesce)
            return options.tick_us / 1e6
        if int(self.block["quiesced"][0]):
            self._set(quiesced=0)
        return self._work(now)

    # Before the workload.

    def _prepare(self, now: int) -> float:
        state, share = self.state, self._share
        own = share.pages if self._plan.gen_pages else 0
        if state.own_filled < own:
            mine = np.arange(state.own_filled, min(own, state.own_filled + BATCH), dtype=np.int64)
            self._write_checked(mine)
            state.own_filled += mine.size
            self._set(filled=state.own_filled + state.fill_at)
            return 0
        if state.fill_at < share.fill_pages:
            numbers = np.arange(state.fill_at, min(share.fill_pages, state.fill_at + BATCH), dtype=np.int64)
            numbers += share.fill_first
            options = self._plan.options
            self._ram.write(self._plan.frames(numbers), content.filled(numbers, options.fill, options.seed))
            state.fill_at += numbers.size
            self._set(filled=state.own_filled + state.fill_at)
            return 0
        if int(self.block["state"][0]) == State.FILLING:
            self._set(state=State.FILLED)
        ready = int((self._all["state"] >= State.RUNNING).sum())
        if self.index == 0:
            self._status_set(cpus_ready=ready)
        if ready < self._plan.options.vcpus:
            return self._plan.options.tick_us / 1e6
        if self.index == 0:
            self._status_set(state=State.RUNNING, ready_tsc=now)
            self._say(f"amig-guest {abi.IMAGE} (simulated): ready workload={self._plan.options.workload.name.lower()}")
        self._set(state=State.RUNNING)
        state.running = True
        state.last = now
        return 0

    # The workload.

    def _work(self, now: int) -> float:
        state, options = self.state, self._plan.options
        if not options.rate_pages:
            self._write_batch(BATCH)
            return 0
        cost = _SECOND * options.vcpus // options.rate_pages
        state.credit += max(0, now - state.last)
        state.last = now
        most = max(options.burst_us * 1000, cost)
        if state.credit > most:
            self._set(skipped=int(self.block["skipped"][0]) + (state.credit - most) // cost)
            state.credit = most
        count = min(BATCH, state.credit // cost)
        if count:
            state.credit -= count * cost
            self._write_batch(count)
        if state.credit >= cost:
            return 0
        # Until the end of the slice, or until a whole page is earned where the pace is slower than that.
        slice_end = max(options.slice_us * 1000, cost - state.credit)
        return max(slice_end - (self._tsc() - now), 100_000) / _SECOND

    def _write_batch(self, count: int) -> None:
        state, share, options = self.state, self._share, self._plan.options
        random = content.randoms(self._stream, state.random, count)
        state.random += count
        if options.workload is Work.SEQUENTIAL:
            mine = (state.next + np.arange(min(count, share.pages), dtype=np.int64)) % share.pages
            if state.next + mine.size >= share.pages:
                self._set(passes=int(self.block["passes"][0]) + 1)
            state.next = (state.next + mine.size) % share.pages
        elif options.workload is Work.HOTSPOT:
            mine = self._hot(random)
        else:
            mine = content.below(random, share.pages)
        mine = np.unique(mine)
        if options.workload is Work.CHECK:
            self._check_batch(mine, count, int(random[0]))
        else:
            frames = self._plan.frames(mine + share.first)
            if options.write is Write.BYTE:
                self._ram.add(frames, (random[: mine.size] & np.uint64(0xFFF)).astype(np.int64))
            else:
                state.salt += 1
                kind = options.fill if options.fill > abi.Fill.ZERO else abi.Fill.RANDOM
                self._ram.write(frames, content.filled(mine + share.first, kind, options.seed, state.salt))
        self._set(writes=int(self.block["writes"][0]) + count)

    def _hot(self, random: content.U64) -> Frames:
        pages, options = self._share.pages, self._plan.options
        hot = max(1, pages * options.hot_pages // 100)
        cold = pages - hot
        chosen = content.below(random, hot)
        if cold:
            elsewhere = (random & np.uint64(0xFFFF)).astype(np.int64) * 100 >= options.hot_writes << 16
            chosen[elsewhere] = hot + content.below(random[elsewhere], cold)
        return chosen

    def _check_batch(self, mine: Frames, count: int, random: int) -> None:
        """Verify pages and write their next generation; verify the next ones of the rolling pass, now and then others.

        A page that is found wrong is told before it is written over.
        """
        state, pages = self.state, self._share.pages
        self._verify(mine, Phase.REWRITE)
        self._write_checked(mine)
        rolling = (state.roll + np.arange(min(count, pages), dtype=np.int64)) % pages
        self._verify(rolling, Phase.PASS)
        verified = mine.size + rolling.size
        if state.roll + rolling.size >= pages:
            self._set(passes=int(self.block["passes"][0]) + 1)
        state.roll = (state.roll + rolling.size) % pages
        if not random & 7:
            others = content.below(content.randoms(self._stream + 1, state.random, max(1, count // 8)), pages)
            self._verify(others, Phase.RANDOM)
            verified += others.size
        self._set(verified=int(self.block["verified"][0]) + verified)

    def _write_checked(self, mine: Frames) -> None:
        """Write the next generation of pages of the share; pages and table change in one step."""
        options = self._plan.options
        numbers = mine + self._share.first
        generations = self._generations[mine] + np.uint32(1)
        pages = content.checked(numbers, generations, options.seed, options.fill)
        with self._ram.atomically():
            self._ram.write(self._plan.frames(numbers), pages)
            self._generations[mine] = generations
            self._ram.mark(np.unique((self._share.generations + 4 * mine) // PAGE_SIZE))

    # Verification.

    def _verify_share(self, request: int) -> float:
        state = self.state
        if not state.verifying:
            state.verifying, state.request, state.verify_at, state.bad = True, request, 0, 0
        pages = self._share.pages if self._plan.gen_pages else 0
        mine = np.arange(state.verify_at, min(pages, state.verify_at + BATCH), dtype=np.int64)
        state.bad += self._verify(mine, Phase.REQUEST)
        state.verify_at += mine.size
        if state.verify_at < pages:
            return 0
        state.verifying = False
        self._set(
            verified=int(self.block["verified"][0]) + pages,
            verify_pages=pages,
            verify_mismatches=state.bad,
            verify_done=state.request,
        )
        if pages:
            verdict = "FAILED" if state.bad else "ok"
            self._say(
                f"check: verify {state.request} on vCPU {self.index} {verdict} pages={pages} mismatches={state.bad}"
            )
        return 0

    def wrong(self) -> int:
        """Return how many checked pages of the share are not what they should be; changes nothing."""
        found = 0
        end = self.state.own_filled
        for first in range(0, end, BATCH):
            with self._ram.atomically():  # so that page and table fit while the guest runs
                found += int(self._differ(np.arange(first, min(end, first + BATCH), dtype=np.int64))[0].size)
        return found

    def check_state(self, state: VcpuState) -> bool:
        """Return whether a state that came from elsewhere is one that this vCPU can go on from."""
        share = self._share
        own = share.pages if self._plan.gen_pages else 0
        return (
            state.own_filled <= own
            and state.fill_at <= share.fill_pages
            and (not state.running or (state.own_filled == own and state.fill_at == share.fill_pages))
            and max(state.next, state.roll, state.verify_at) <= share.pages
        )

    def _differ(self, mine: Frames) -> tuple[Frames, content.U64]:
        """Return which pages of the share are wrong, and what they hold."""
        options = self._plan.options
        numbers = mine + self._share.first
        pages = self._ram.read(self._plan.frames(numbers))
        bad = (pages != content.checked(numbers, self._generations[mine], options.seed, options.fill)).any(axis=1)
        return mine[bad], pages[bad]

    def _verify(self, mine: Frames, phase: Phase) -> int:
        wrong, pages = self._differ(mine)
        for i, page in zip(wrong.tolist(), pages, strict=True):
            self._report(i, page, phase)
        return int(wrong.size)

    def _report(self, i: int, page: content.U64, phase: Phase) -> None:
        options = self._plan.options
        number, generation = i + self._share.first, int(self._generations[i])
        kind, word = content.what_is_wrong(page, number, generation, options.seed, options.fill, self._plan.ws_pages)
        gpa = int(self._plan.frames(np.array([number]))[0]) * PAGE_SIZE
        self.mismatch(number, gpa, generation, int(page[0]), int(page[1]), kind, word, phase)

    def mismatch(
        self, page: int, gpa: int, expected: int, found: int, generation: int, kind: Bad, word: int, phase: Phase
    ) -> None:
        """Record something that is not as it should be, and tell it."""
        count = int(self.block["mismatches"][0])
        with self._stores():
            if count < abi.MAX_MISMATCHES:
                self.block["mismatch"][0, count] = (
                    page, gpa, expected, found, generation, kind, word, phase, self.index, self._tsc(),
                )  # fmt: skip
            self.block["mismatches"] = count + 1
        if count < abi.MAX_MISMATCHES:
            self._say(
                f"MISMATCH page={page} gpa={gpa:#x} expected gen={expected} found {kind.name.lower()} page={found} "
                f"gen={generation} word={word} cpu={self.index} by {phase.name.lower()}"
            )

    def fault(self) -> None:
        """Say that this vCPU, and so the guest, can't go on."""
        self._set(state=State.FAULT)
        self._status_set(state=State.FAULT)

    # The block.

    @property
    def _stream(self) -> int:
        return self._plan.options.seed * 2 * abi.MAX_CPUS + 2 * self.index

    def _beat(self) -> int:
        now = self._tsc()
        block = self.block
        gap = now - int(block["tsc"][0])
        reset = int(self._control["gap_reset"][0])
        with self._stores():
            if reset != int(block["gap_ack"][0]):
                block["gap_max"] = 0
                block["gap_tsc"] = now
                block["gap_ack"] = reset
            elif gap > int(block["gap_max"][0]):
                block["gap_max"] = gap
                block["gap_tsc"] = now
            block["tsc"] = now
            block["heartbeat"] += 1
        return now

    def _set(self, **values: int) -> None:
        with self._stores():
            for name, value in values.items():
                self.block[name] = value

    def _status_set(self, **values: int) -> None:
        with self._ram.stores(abi.STATUS_GPA, PAGE_SIZE):
            for name, value in values.items():
                self._status[name] = value

    def _stores(self) -> contextlib.AbstractContextManager[None]:
        return self._ram.stores(self._gpa, abi.CPU_STRIDE)
