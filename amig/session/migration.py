"""`Migration`: one migration as a service embeds it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from amig.errors import AmigError, Cancelled, UsageError
from amig.events import ByteCounts, Event, PageCounts, Progress, Result, State, StateChanged, WindowMs
from amig.guest import Guest
from amig.guest import Progress as ShownProgress
from amig.policy import Limits, Policy
from amig.session.destination import Destination
from amig.session.endpoints import open_destination, open_source, shown
from amig.session.events import EventStream
from amig.session.release import RELEASE
from amig.session.source import SourceSession
from amig.transport import LinkOptions
from amig.transport.rate import RateLimiter


class Migration:
    """Moves a guest, and tells how it goes.

    ::

        async with amig.Migration("web1", "tcp://hostb:7000", amig.Policy(downtime=0.05)) as migration:
            async for event in migration:
                ...
        result = await migration.result()

    Entering starts it; it runs on its own from there, whether anybody reads its events or not. Leaving the block waits
    for its end, and raises its error if it failed; an exception in the block cancels it first. `cancel` asks for the
    guest to be kept; a migration that was cancelled that way is no error. Uses whatever event loop runs.

    ``source`` is a guest's name, the path of its control socket, ``file:PATH``, or any `Guest`, which is closed at the
    end; ``destination`` an address, or any `Destination`. A migration to a file is a live snapshot after which the
    guest runs on; with ``stop`` it does not.
    """

    def __init__(
        self,
        source: str | Guest,
        destination: str | Destination,
        policy: Policy | None = None,
        *,
        stop: bool = False,
        link: LinkOptions | None = None,
        id: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """``on_event`` is called with every event at once, progress included; it must not block.

        ``link`` has the certificates for ``tls://``, and says whether plain TCP may leave this machine.
        """
        self.policy = policy or Policy()
        self.id = id or uuid.uuid4().hex
        self._source = source
        self._destination = destination
        self._link = link
        self._stop = stop
        self._on_event = on_event
        self._limits = Limits.of(self.policy)
        self._session: SourceSession | None = None
        self._throttle: RateLimiter | None = None
        self._guest: Guest | None = None
        self._events: EventStream | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._asked = False
        self._began = 0.0
        self._took = 0.0

    # --- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Migration:
        if self._task is not None:
            raise UsageError("a Migration can be used once")
        self._events = EventStream()
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._run(), name=f"amig-migration-{self.id[:8]}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None  # noqa: S101 - entered
        if kind is not None:
            self.cancel()
        while not self._task.done():
            try:
                await asyncio.wait([self._task])
            except asyncio.CancelledError:
                self.cancel()
                if self._task.done():
                    raise
                await asyncio.wait([self._task])
                raise
        if kind is None and self._error is not None and not self.cancelled:
            raise self._error

    def __aiter__(self) -> EventStream:
        """Iterate over the events; ends with the migration."""
        if self._events is None:
            raise UsageError("enter the migration first: async with amig.Migration(…) as migration")
        return self._events

    async def _run(self) -> None:
        try:
            await self._migrate()
        except asyncio.CancelledError:
            if self._session is None or self._session.state is not State.COMPLETED:  # else it came too late
                self._error = Cancelled("the migration was cancelled; the guest runs on where it was")
                self._tell(StateChanged(state=State.CANCELLED))
            if not self._asked:
                raise
        except AmigError as error:
            self._error = error
            self._tell(StateChanged(state=State.FAILED, reason=str(error)))
        except Exception as error:
            self._error = error
            self._tell(StateChanged(state=State.FAILED, reason=f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._took = time.monotonic() - self._began
            assert self._events is not None  # noqa: S101 - entered
            self._events.close()

    async def _migrate(self) -> None:
        self._tell(StateChanged(state=State.CONNECTING))
        destination = self._destination
        if isinstance(destination, str):
            destination = open_destination(destination, self.policy, self._link)
        self.policy = self.policy.settled(processors=len(os.sched_getaffinity(0)), parallel=destination.parallel)
        if self._stop and not destination.one_way:
            raise UsageError("--stop is for snapshots: a guest that moves to a peer stops here anyway")
        guest = self._source if not isinstance(self._source, str) else await open_source(self._source)
        self._guest = guest
        ended: BaseException | None = None
        try:
            await self._announce(guest, destination)
            self._throttle = RateLimiter(self._limits.bandwidth)
            self._session = SourceSession(
                guest,
                destination,
                migration=self.id,
                policy=self.policy,
                limits=self._limits,
                throttle=self._throttle,
                tell=self._tell,
                keep=destination.one_way and not self._stop,
                release=RELEASE,
            )
            await self._session.run()
        except BaseException as error:
            ended = error
            raise
        finally:
            await asyncio.shield(self._leave(guest, ended))

    async def _announce(self, guest: Guest, destination: Destination) -> None:
        await guest.migration_begin(self.id, destination.address)

        def cancel(_: str) -> None:
            self.cancel()

        guest.on_cancel = cancel

    async def _leave(self, guest: Guest, error: BaseException | None) -> None:
        state = self._session.state if self._session else State.FAILED
        if not state.final:
            state = State.CANCELLED if isinstance(error, asyncio.CancelledError) else State.FAILED
        with contextlib.suppress(AmigError):
            reason = str(error)[:4096] if state is State.FAILED and error is not None else ""
            await guest.migration_end(str(state), reason)
        await guest.close()

    # --- steering ----------------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Ask for the guest to be kept where it is. Returns False when it is too late: the handover has begun."""
        if self._task is None or self._task.done():
            return False
        if self._session is not None and not self._session.can_cancel:
            return False
        if not self._asked:
            self._asked = True
            self._task.cancel()
        return True

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """Change the limit while the migration runs; None lifts it."""
        self._limits.bandwidth = bytes_per_s
        if self._throttle is not None:
            self._throttle.set_rate(bytes_per_s)

    def set_downtime(self, seconds: float) -> None:
        """Change the limit while the migration runs; counts from the next decision."""
        if not 0 < seconds <= 3600:
            raise UsageError("a downtime limit lies between 0 and 1 h")
        self._limits.downtime = seconds

    # --- how it is, and how it went ----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where it stands."""
        if self._task is not None and self._task.done():
            if self._error is None:
                return State.COMPLETED
            return State.CANCELLED if isinstance(self._error, Cancelled) else State.FAILED
        return self._session.state if self._session else State.CONNECTING

    @property
    def cancelled(self) -> bool:
        """Whether it ended because somebody called `cancel`."""
        return isinstance(self._error, Cancelled)

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None otherwise."""
        return self._error

    async def result(self) -> Result:
        """Wait for the end and return what it came to, whatever that is; never raises the migration's error.

        Cancelling the wait does not cancel the migration.
        """
        if self._task is None:
            raise UsageError("enter the migration first: async with amig.Migration(…) as migration")
        await asyncio.wait([self._task])
        return self._result()

    def _result(self) -> Result:
        state, session, error = self.state, self._session, self._error
        failed = error if state is State.FAILED else None
        text = None if error is None else (str(error) or type(error).__name__)
        common = {
            "status": str(state),
            "error": text if failed is not None else None,
            "exit_code": error.exit_code if isinstance(error, AmigError) else int(error is not None),
            "id": self.id,
            "source": self._source if isinstance(self._source, str) else self._source.info.name,
            "destination": (
                shown(self._destination) if isinstance(self._destination, str) else self._destination.address
            ),
            "total_ms": round(self._took * 1e3, 3),
            "chunk_bytes": self.policy.chunk,
            "streams": self.policy.streams or 1,
            "compression": self.policy.compression,
        }
        if session is None:
            return Result(**common)  # type: ignore[arg-type]
        stats = session.stats
        return Result(
            **common,  # type: ignore[arg-type]
            engine=self._guest.info.engine if self._guest else "",
            downtime_ms=None if session.downtime_s is None else round(session.downtime_s * 1e3, 3),
            rounds=stats.rounds,
            reconnects=session.reconnects,
            pages=PageCounts(
                total=stats.pages_total,
                sent=stats.pages_sent,
                zero=stats.pages_zero + stats.pages_holes,
                resent=stats.pages_resent,
                delta=stats.pages_delta,
            ),
            bytes=ByteCounts(memory=stats.bytes_memory, wire=stats.bytes_wire),
            window_ms=WindowMs(
                p50=round(stats.window.percentile(0.5) / 1e6, 4),
                p99=round(stats.window.percentile(0.99) / 1e6, 4),
                max=round(stats.window.max_ns / 1e6, 4),
            ),
            dirty_log=session.strategy,
            link_bytes_per_s=round(stats.link.bytes_per_s),
            verified=session.verified,
            stage_ms={
                "sync": round(stats.sync_ns / 1e6, 3),
                "take": round(stats.take_ns / 1e6, 3),
                "read": round(stats.read_ns / 1e6, 3),
                "digest": round(stats.digest_ns / 1e6, 3),
                "compress": round(stats.compress_ns / 1e6, 3),
            },
        )

    def _tell(self, event: Event) -> None:
        assert self._events is not None  # noqa: S101 - entered
        self._events.put(event)
        if self._on_event is not None:
            self._on_event(event)
        if isinstance(event, Progress) and self._guest is not None:
            self._guest.migration_progress(
                ShownProgress(
                    state=str(event.state),
                    round=event.round,
                    fraction=event.fraction,
                    remaining_pages=event.remaining_pages,
                    bytes_sent=event.bytes_sent,
                    bytes_per_s=event.bytes_per_s,
                    dirty_bytes_per_s=event.dirty_bytes_per_s,
                    eta_s=event.eta_s,
                    waiting_for=event.waiting_for,
                )
            )
