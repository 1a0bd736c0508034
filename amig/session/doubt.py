"""Handovers in doubt, settled by asking: by a host whose migrator has gone, and for one that was killed itself.

The migrator asks first, for as long as its policy says. When it has gone, the host has the migration's id and the
destination on record, and goes on asking until somebody answers or an operator decides (`amig resolve`). A host that
was killed and is started again asks before it boots anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from amig.errors import AmigError, HostError
from amig.guest import Handover, Outcome
from amig.host.handover import Records
from amig.host.hosted import HostedGuest
from amig.host.names import NameLock
from amig.host.record import Record, RecordState
from amig.session.asking import asked
from amig.transport import LinkOptions

FIRST_PAUSE = 0.5
MAX_PAUSE = 30.0
"""Seconds between two questions."""


async def watch(hosted: HostedGuest, link: LinkOptions | None, tell: Callable[[str], None]) -> None:
    """Ask, whenever the migrator has gone after COMMIT, who runs the guest, and go by the answer. Ends by cancelling.

    ``tell`` hears what an operator should know: that it is asking, why that fails, how it ended.
    """
    while True:
        await hosted.forsaken.wait()
        await _settle(hosted, link, tell)


async def _settle(hosted: HostedGuest, link: LinkOptions | None, tell: Callable[[str], None]) -> None:
    pause = FIRST_PAUSE
    said = ""
    while (doubt := hosted.in_doubt) is not None:
        if not said:
            tell(
                f"{hosted.name} was handed over to {doubt.destination}, and whoever moved it has gone before it was "
                "known how that ended: it is paused here, and that host is being asked"
            )
        try:
            async with asked(doubt.destination, doubt.migration, link) as outcome:
                await hosted.release(doubt.migration, outcome)
        except (AmigError, OSError) as error:
            if hosted.in_doubt is None:  # an operator was quicker
                return
            if str(error) != said:
                said = str(error)
                tell(f"{hosted.name} stays in doubt: {error}. {advice(hosted.name, doubt)}")
            await _pause(hosted, pause)
            pause = min(2 * pause, MAX_PAUSE)
        else:
            runs_there = outcome is Outcome.RUNNING
            tell(f"{doubt.destination} has said that it {'runs' if runs_there else 'will never run'} {hosted.name}")
            return


async def _pause(hosted: HostedGuest, seconds: float) -> None:
    """Wait so long, or until the guest has ended."""
    ended = asyncio.ensure_future(asyncio.shield(hosted.ended))
    try:
        await asyncio.wait([ended], timeout=seconds)
    finally:
        ended.cancel()


def advice(name: str, doubt: Handover | Record) -> str:
    """Return what an operator can do."""
    return (
        f"Look at {doubt.destination} ({doubt.peer or 'unnamed'}) with amig status: if it runs there: amig resolve "
        f"{name} --discard; if it never will: amig resolve {name} --run-here"
    )


async def settle_record(name: str, link: LinkOptions | None = None, *, records: Records | None = None) -> Record | None:
    """Ask about a handover whose host is gone, and put the answer on record; returns it, None if none is in doubt.

    Raises `HostError` with what to do when nobody can say, `NameTaken` when its host lives: it asks by itself.
    """
    records = records or Records()
    if not _in_doubt(records.source(name)):
        return None
    lock = NameLock.take(name)
    try:
        record = records.source(name)
        return await _ask(name, record, link, records) if record is not None and _in_doubt(record) else None
    finally:
        lock.close()


def _in_doubt(record: Record | None) -> bool:
    return record is not None and record.state is RecordState.COMMITTED


async def _ask(name: str, record: Record, link: LinkOptions | None, records: Records) -> Record:
    try:
        async with asked(record.destination, record.migration, link) as outcome:
            return await asyncio.to_thread(records.resolve, name, outcome)
    except (AmigError, OSError) as error:
        raise HostError(
            f"guest {name} was handed over to {record.destination}, and this side was never told how that ended: it "
            f"may be running there, so it is not started here. That host could not be asked: {error}. "
            + advice(name, record)
        ) from error


@contextlib.asynccontextmanager
async def watching(hosted: HostedGuest, link: LinkOptions | None, tell: Callable[[str], None]) -> AsyncIterator[None]:
    """`watch` for the length of a block."""
    task = asyncio.create_task(watch(hosted, link, tell), name=f"amig-doubt-{hosted.name}")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
