"""What differs is found before the guest may run, and the source runs on: damage on the way, and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import amig
from amig.digest import PageDigests
from amig.errors import AmigError, MigrationError, Refused, SnapshotError, UsageError, VerifyFailed
from amig.events import Notice
from amig.memory import Pages
from amig.policy import Policy
from amig.session import inbound
from amig.session.migration import Migration
from amig.session.restore import restore
from amig.session.verify import FullCheck
from amig.stages.items import Block, PageIndex
from amig.stages.place import Place
from amig.stages.read import ChunkReader
from amig.wire.frames import HEADER_SIZE
from amig.wire.frametype import FrameType as F
from amig.wire.messages import Digests, Hello
from tests.flipping import Flip, flipping
from tests.modelguest import ModelGuest, ModelIncoming, one_region
from tests.moving import assert_stayed as assert_host_stayed
from tests.moving import homes, hosting, machine_of, move, verdict  # noqa: F401 - one is a fixture
from tests.moving import receiving as hosts_receiving
from tests.receiving import PAGES, Receiver, assert_moved, assert_stayed, busy_guest, receiving

MODES = ("digests", "full")
ENGINES = [pytest.param("kvm", marks=pytest.mark.kvm), "simulator"]
RAW = Policy(handover_timeout=2)
ZSTD = Policy(compression="zstd", handover_timeout=2)
FULL = Policy(verify="full", handover_timeout=2)
WAYS = [
    Policy(streams=streams, compression=compression, verify=mode)  # type: ignore[arg-type]
    for streams, compression, mode in ((1, "none", "digests"), (4, "zstd", "digests"), (2, "none", "full"))
]
ways = pytest.mark.parametrize("policy", WAYS, ids=lambda p: f"{p.streams}-{p.compression}-{p.verify}")


def writing_guest() -> ModelGuest:
    """Writes while it is moved: pages come again, some of them as zeros, some that were zero with content."""
    guest = busy_guest()
    left = [30]

    def write() -> None:
        if left[0] and guest.state is amig.RunState.RUNNING:
            left[0] -= 1
            guest.write(guest.random.integers(0, PAGES, 40))
            guest.write(guest.random.integers(0, PAGES, 20), zero=True)

    guest.before_take = guest.after_take = write
    return guest


# --- no false alarm --------------------------------------------------------------------------------------------------


@ways
async def test_pages_that_come_again_are_no_difference(policy: Policy) -> None:
    guest = writing_guest()
    async with receiving() as receiver, Migration(guest, receiver.address, replace(policy, chunk=1 << 18)) as migration:
        pass
    assert_moved(guest, receiver)
    result = await migration.result()
    assert result.pages.resent > 0
    assert result.verified == policy.verify


async def test_what_the_save_of_the_state_has_written_counts() -> None:
    guest = busy_guest()
    guest.on_save = lambda: guest.write([4, 5])
    async with receiving() as receiver, Migration(guest, receiver.address, FULL):
        pass
    assert_moved(guest, receiver)


async def test_without_digests_the_result_says_so() -> None:
    guest = busy_guest()
    async with receiving() as receiver, Migration(guest, receiver.address, Policy(verify="off")) as migration:
        pass
    assert_moved(guest, receiver)
    assert (await migration.result()).verified == "none"


async def test_full_says_that_it_exceeds_the_downtime_limit() -> None:
    guest = busy_guest()
    async with receiving() as receiver, Migration(guest, receiver.address, FULL) as migration:
        notices = [event.text async for event in migration if isinstance(event, Notice)]
    assert_moved(guest, receiver)
    assert any("downtime limit" in text for text in notices)


def test_another_mode_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="verify"):
        Policy(verify="maybe")  # type: ignore[arg-type]


# --- damage on the way -----------------------------------------------------------------------------------------------


def byte(at: int) -> Flip:
    return lambda _: at


def with_data(place: Callable[[int], int]) -> Flip:
    """In the first block with content: where ``place`` of its length says."""

    def where(frame: bytearray) -> int | None:
        data_bytes = int.from_bytes(frame[HEADER_SIZE + 32 : HEADER_SIZE + 36], "little")
        return place(len(frame)) if data_bytes else None

    return where


DAMAGE: dict[str, tuple[F, Flip, Policy]] = {
    "hello": (F.HELLO, byte(40), RAW),
    "block, type": (F.BLOCK, byte(4), RAW),
    "block, flags": (F.BLOCK, byte(5), RAW),
    "block, length": (F.BLOCK, byte(1), RAW),
    "block, checksum": (F.BLOCK, byte(9), RAW),
    "block, header": (F.BLOCK, byte(16 + 8), RAW),
    "block, page bitmap": (F.BLOCK, byte(16 + 40), RAW),
    "block, data": (F.BLOCK, with_data(lambda length: length - 5000), RAW),
    "block, last byte": (F.BLOCK, with_data(lambda length: length - 1), RAW),
    "block, data, full": (F.BLOCK, with_data(lambda length: length - 1), FULL),
    "block, compressed": (F.BLOCK, with_data(lambda length: length - 20), ZSTD),
    "round": (F.ROUND, byte(20), RAW),
    "state, header": (F.STATE, byte(16), RAW),
    "state": (F.STATE, byte(33), RAW),
    "digests": (F.DIGESTS, byte(100), FULL),
    "end": (F.END, byte(40), RAW),
    "end, length": (F.END, byte(0), RAW),
    "commit": (F.COMMIT, byte(20), RAW),
    "welcome": (F.WELCOME, byte(30), RAW),
    "placed": (F.PLACED, byte(18), RAW),
    "prepared": (F.PREPARED, byte(20), RAW),
}


@pytest.mark.parametrize(("kind", "where", "policy"), DAMAGE.values(), ids=DAMAGE)
async def test_a_flipped_bit_anywhere_in_the_stream_is_found_and_the_source_runs_on(
    kind: F, where: Flip, policy: Policy
) -> None:
    guest = busy_guest()
    async with receiving() as receiver, flipping(receiver.address, kind, where) as relay:
        with pytest.raises(AmigError):
            async with Migration(guest, relay.address, policy):
                pass
    assert guest.state is amig.RunState.RUNNING
    assert guest.hub.strategy is None, "the dirty log was left on"
    assert "run" not in receiver.guest.calls


async def test_without_digests_a_bit_flipped_in_live_pages_passes() -> None:
    """What digests are for: nothing else covers pages that the kernel has copied out of live memory."""
    guest = busy_guest()
    kind, where, _ = DAMAGE["block, data"]
    async with receiving() as receiver, flipping(receiver.address, kind, where) as relay:
        async with Migration(guest, relay.address, Policy(verify="off")):
            pass
    assert receiver.guest.array is not None
    assert not np.array_equal(receiver.guest.array.arrays[0], guest.array.arrays[0])


async def test_the_error_names_where_and_has_its_own_exit_code() -> None:
    guest = busy_guest()
    kind, where, policy = DAMAGE["block, data"]
    async with receiving() as receiver, flipping(receiver.address, kind, where) as relay:
        with pytest.raises(VerifyFailed, match=r"pages 0 to 1023 of region 0|pages 1024 to 2047") as failed:
            async with Migration(guest, relay.address, policy) as migration:
                pass
    assert isinstance(receiver.error, VerifyFailed)
    assert failed.value.exit_code == (await migration.result()).exit_code == 45
    assert (await migration.result()).verified == "none"


# --- damage in the destination's memory ------------------------------------------------------------------------------


class Damaged:
    """Flips a bit of one page of the destination each time it was filled, before its digest is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
        fill = Place._fill
        self.hits = 0

        def filled(stage: Place, block: Block, memory: Pages, index: PageIndex) -> None:
            digests, stage._digests = stage._digests, None
            fill(stage, block, memory, index)
            if page in index:
                memory[page, 17] ^= 8
                self.hits += 1
            stage._digests = digests
            if digests is not None:
                digests.hash(block.region, memory, index)

        monkeypatch.setattr(Place, "_fill", filled)


@ways
async def test_a_page_that_changed_as_it_was_placed_is_found(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Damaged(monkeypatch, 1234)
    guest = writing_guest()
    guest.write([1234])
    async with receiving() as receiver:
        with pytest.raises(VerifyFailed, match=r"page 1234 of|pages 1024 to 2047"):
            async with Migration(guest, receiver.address, policy):
                pass
    assert damaged.hits
    assert_stayed(guest)


class ChangesLater(ModelIncoming):
    """Its memory loses a bit after the last page was placed, just before it is hashed again."""

    wrong = (77, 2500, 2501)

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        assert self.array is not None
        self.array.arrays[region][list(self.wrong), 4095] ^= 128
        return super().data_ranges(region, first, count)


async def test_full_finds_what_changed_at_any_time_before_the_switchover_and_names_the_pages() -> None:
    guest = busy_guest()
    async with receiving(guest=ChangesLater()) as receiver:
        with pytest.raises(VerifyFailed, match=r"3 pages .* page 77 of region 0, pages 2500 to 2501 of region 0"):
            async with Migration(guest, receiver.address, FULL):
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"], "nothing was loaded"


async def test_full_finds_a_page_that_the_dirty_log_lost() -> None:
    guest = busy_guest()

    def behind_the_back() -> None:
        guest.array.arrays[0][500] += 1

    guest.on_save = behind_the_back
    async with receiving() as receiver:
        with pytest.raises(VerifyFailed, match=r"1 pages .* page 500 of region 0"):
            async with Migration(guest, receiver.address, FULL):
                pass
    assert_stayed(guest)


@pytest.mark.parametrize("broken", ["sent", "placed"])
async def test_the_check_bites_when_a_digest_is_not_replaced(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One side keeps the digest of a page's first version: if that went unnoticed, nothing would be proven."""
    take = PageDigests.hash
    seen: set[int] = set()

    def only_once(self: PageDigests, region: int, memory: Pages, index: PageIndex) -> None:
        new = np.array([page for page in index.tolist() if page not in seen], np.int64)
        seen.update(new.tolist())
        if len(new):
            take(self, region, memory, new)

    original = {"sent": ChunkReader._digest, "placed": Place._fill}[broken]

    def stubborn(*args):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(PageDigests, "hash", only_once)
        try:
            return original(*args)
        finally:
            monkeypatch.setattr(PageDigests, "hash", take)

    monkeypatch.setattr(*((ChunkReader, "_digest") if broken == "sent" else (Place, "_fill")), stubborn)
    guest = writing_guest()
    async with receiving() as receiver:
        with pytest.raises(VerifyFailed):
            async with Migration(guest, receiver.address, Policy(chunk=1 << 18)):
                pass
    assert_stayed(guest)


# --- the two sides agree on it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_destination_that_can_not_compare_is_refused_by_name(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "FEATURES", ())
    guest = busy_guest()
    async with receiving() as receiver:
        with pytest.raises(Refused, match="requires digests"):
            async with Migration(guest, receiver.address, Policy(verify=mode)):  # type: ignore[arg-type]
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == []


def hello(**more: object) -> Hello:
    return Hello(
        migration="0" * 32,
        name="x",
        engine="kvm",
        vcpus=1,
        memory=one_region(PAGES),
        machine=b"",
        digest_key=bytes(8),
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "parts",
    [[(0, 0, 10), (0, 0, 10)], [(0, 5, 10)], [(1, 0, 10)], [(0, 0, PAGES + 1)], [(0, 0, PAGES), (0, 0, 1)]],
    ids=["twice", "gap", "another region", "too many", "after the end"],
)
async def test_digests_out_of_order_are_an_error_of_the_source(parts: list[tuple[int, int, int]]) -> None:
    receiver = ModelIncoming(one_region(PAGES))
    check = FullCheck(receiver, hello())
    with pytest.raises(MigrationError, match=r"out of order|leave region"):
        for region, first, count in parts:
            check.compare(Digests(region=region, first=first, digests=bytes(8 * count)))


def test_memory_of_which_a_part_was_not_compared_is_not_equal() -> None:
    check = FullCheck(ModelIncoming(one_region(PAGES)), hello())
    check.compare(Digests(region=0, first=0, digests=bytes(8 * (PAGES - 1))))
    with pytest.raises(MigrationError, match="all pages"):
        check.finish()


# --- snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_restoring_a_snapshot_compares_it(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = writing_guest()
    path = f"{tmp_path}/x"
    policy = Policy(verify=mode, chunk=1 << 18)  # type: ignore[arg-type]
    async with Migration(guest, f"file:{path}", policy) as migration:
        pass
    assert (await migration.result()).verified == "none", "nobody has compared anything yet"
    await restore(path, ModelIncoming())
    guest_page = int(np.flatnonzero(guest.array.arrays[0].any(axis=1))[50])
    Damaged(monkeypatch, guest_page)
    copy = ModelIncoming()
    with pytest.raises(VerifyFailed, match=f"page {guest_page} of" if mode == "full" else "pages 0 to 1023"):
        await restore(path, copy)
    assert copy.calls == ["build", "discard"]


async def test_a_snapshot_with_features_of_tomorrow_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Migration(busy_guest(), f"file:{tmp_path}/x"):
        pass
    monkeypatch.setattr("amig.session.restore.FEATURES", ())
    with pytest.raises(SnapshotError, match="requires digests"):
        await restore(f"{tmp_path}/x", ModelIncoming())


# --- real guests -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("streams", [1, 4])
async def test_all_memory_of_a_guest_is_equal_when_it_moves(engine: str, streams: int) -> None:
    policy = Policy(verify="full", streams=streams, downtime=0.05, timeout=30, on_timeout="switch")
    async with hosting(engine=engine) as source, hosts_receiving() as target:
        result = await move(source, target.address, policy)
        await target.arrived()
        assert result.verified == "full"
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_stays_when_its_memory_arrives_damaged(
    engine: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(verify=mode, downtime=0.05, timeout=30, on_timeout="switch")  # type: ignore[arg-type]
    async with hosting(engine=engine) as source, hosts_receiving() as target:
        memory = machine_of(source).memory.pages(0)
        page = int(np.flatnonzero(memory[:4096].any(axis=1))[-1])
        damaged = Damaged(monkeypatch, page)
        with pytest.raises(
            VerifyFailed, match=f"page {page} of region 0" if mode == "full" else "pages .* of region 0"
        ):
            await move(source, target.address, policy)
        assert damaged.hits
        await assert_host_stayed(source)


__all__ = ["Receiver"]
