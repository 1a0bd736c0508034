"""The source side of one migration, from the first connection to the release of the guest.

::

    CONNECTING ─ open ─> MEMORY ─ the rest fits ─> SWITCHOVER ─ PREPARED ─> COMMITTING ─ RUNNING ─> COMPLETED
         │                │  ▲                        │ │                       └─ no answer ─> in doubt, said aloud
         │                │  └── RECONNECTING <───────┘ │
         │                └──────^    │ connection lost │
         └───── any failure, or cancel┴─────────────────┴─> guest runs on

Until `Guest.commit` is called, everything that goes wrong leads back to a guest that runs as before with its dirty log
off. From that call on nothing is cancelled any more, and only the destination's word decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterable

from amig import bitmap
from amig.aio import to_its_end
from amig.digest import KEY_BYTES
from amig.errors import AmigError, ControlError, InDoubt, LinkLost
from amig.events import Notice, State, StateChanged
from amig.guest import Guest, Handover, LogStarted, Outcome
from amig.host.stock import in_use
from amig.memory import WORD_PAGES
from amig.policy import Convergence, Limits, Policy
from amig.session import verify
from amig.session.destination import Destination, OutOfPatience
from amig.session.progress import ProgressMeter, Tell
from amig.session.reconnect import reconnect
from amig.session.tasks import apart, one_error, telling
from amig.stages.ledger import Ledger
from amig.stages.pipeline import SourcePipeline
from amig.stages.resumption import Start
from amig.stages.send import Throttle
from amig.stats import MigrationStats
from amig.units import format_duration
from amig.wire.messages import RESUME_FEATURE, Digests, End, Hello

HASH_RATE = 1e9
"""Bytes a second that both sides hash at least, with ``verify`` full."""
PROGRESS_PERIOD = 0.1
"""Seconds between two progress events."""
SLOW = 4
"""Times the expected downtime that a paused guest waits, beside the time that the handover has."""


class SourceSession:
    """Moves one guest to one destination. Used once."""

    def __init__(
        self,
        guest: Guest,
        destination: Destination,
        *,
        migration: str,
        policy: Policy,
        limits: Limits,
        throttle: Throttle,
        tell: Tell,
        keep: bool,
        release: str,
    ) -> None:
        """``keep``: the guest runs on here afterwards (a live snapshot); only for a one-way destination."""
        self._guest = guest
        self._destination = destination
        self._migration = migration
        self._policy = policy
        self._throttle = throttle
        self._tell = tell
        self._keep = keep
        self._release = release
        self.state = State.CONNECTING
        self.stats = MigrationStats(pages_total=guest.info.memory.size // 4096)
        self.strategy = ""
        self.downtime_s: float | None = None
        self.identity = ""
        self._convergence = Convergence(policy=policy, limits=limits)
        self._meter = ProgressMeter(self.stats, self._convergence, tell)
        self._ledger = Ledger(guest.info.memory.regions)
        self._paused_at = 0.0
        self._paused = asyncio.Event()
        self._key = b"" if policy.verify == "off" else secrets.token_bytes(KEY_BYTES)
        self._digests = verify.digests(guest.info.memory.regions, self._key)
        self.verified = "none"
        self.reconnects = 0
        self._record_took = 0.0
        self._impatient = False
        """Whether the guest was paused in vain before, because the destination was not ready in time."""

    @property
    def can_cancel(self) -> bool:
        """Whether the guest can still be kept here."""
        return self.state in (State.CONNECTING, State.MEMORY, State.SWITCHOVER, State.RECONNECTING)

    async def run(self) -> None:
        """Do it all. Raises an `AmigError` with the guest running here, or `InDoubt`.

        Cancelling before COMMITTING leads back to the guest running here; later it is raised when all is over.
        """
        try:
            with one_error():
                await self._run()
        except BaseException as error:
            if self.can_cancel:
                await to_its_end(self._take_back(error))
            raise
        finally:
            await to_its_end(self._destination.close())

    async def _start_log(self) -> LogStarted:
        """Take the design that was asked for; else the host's best, or what others use already if that is safe."""
        asked, best = self._policy.dirty_log, self._guest.info.strategies
        if asked is not None or not best:
            return await self._guest.log_start(asked, unsafe=self._policy.may_lose_pages)
        try:
            return await self._guest.log_start(best[0])
        except ControlError as error:
            if error.code != "strategy-in-use":
                raise
        started = await self._guest.log_start(None)
        if started.strategy not in best:
            raise ControlError(f"the dirty log is in use with {started.strategy}, which loses pages", code="unsafe")
        return started

    async def _run(self) -> None:
        self._enter(State.CONNECTING)
        info = self._guest.info
        started = await self._start_log()
        self.strategy = started.strategy
        self.identity = await self._destination.open(
            Hello(
                migration=self._migration,
                name=info.name,
                engine=info.engine,
                vcpus=info.vcpus,
                memory=info.memory,
                machine=info.machine,
                streams=1 if self._destination.one_way else self._policy.streams or 1,
                compression=self._policy.compression,
                clock="freeze",
                memory_used=min(in_use(self._guest.memory.fds().values()), info.memory.size),
                amig=self._release,
                features_required=verify.features(self._policy.verify),
                features_optional=(RESUME_FEATURE,)
                if self._policy.reconnect and not self._destination.no_return
                else (),
                digest_key=self._key,
            )
        )
        if not self._keep:
            handover = Handover(migration=self._migration, destination=self._destination.address, peer=self.identity)
            began = time.monotonic()
            await self._guest.prepare(handover)
            self._record_took = time.monotonic() - began
        async with asyncio.TaskGroup() as group:
            ticker = group.create_task(self._report())
            await self._move()
            ticker.cancel()

    async def _move(self) -> None:
        """Move the guest, over as many connections as it takes."""
        start, sent = Start(began=time.monotonic()), None
        while True:
            sinks = self._destination.sinks(self._ledger.placed)
            pipeline = SourcePipeline(
                self._guest,
                sinks,
                policy=self._policy,
                convergence=self._convergence,
                throttle=self._throttle,
                ledger=self._ledger,
                stats=self.stats,
                observer=self._meter,
                on_pause=self._pausing,
                digests=self._digests,
                sent=sent,
                start=start,
            )
            self._enter(State.MEMORY)
            try:
                return await apart(self._attempt(pipeline))
            except LinkLost as lost:
                if self.state is State.COMPLETED:  # some watch struck in the moment in which it was to be called off
                    return None
                if self._ends_it(lost):
                    raise
                if self._paused.is_set():  # first of all: it may stand still for this
                    await self._guest.resume()
                    self._paused.clear()
                self._enter(State.RECONNECTING, str(lost))
                sent = pipeline.sent
                start = await self._come_back(lost, start, pipeline)

    async def _attempt(self, pipeline: SourcePipeline) -> None:
        """Move the guest over the connections that there are."""
        before = self.stats.pages_sent, self.stats.pages_zero
        self._convergence.measured(round_trip=await self._destination.round_trip(), record=self._record_took)
        if not self.reconnects:
            self._tell_if_short()
        async with asyncio.TaskGroup() as group:
            listener = group.create_task(self._destination.listen())
            await apart(self._until_prepared(pipeline, before))
            self._have_verified()
            await self._hand_over()
            listener.cancel()

    async def _until_prepared(self, pipeline: SourcePipeline, before: tuple[int, int]) -> None:
        """Have everything sent and the destination PREPARED, under the eyes of those who watch that this goes on.

        They have a group of their own. One that strikes in the very moment in which it is called off would else end
        what listens for the destination's word, with COMMIT on its way: a guest in doubt, for nothing.
        """
        prepared = False
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._destination.keep_alive())
                patience = group.create_task(self._bound_pause())
                state = await pipeline.run()
                await self._destination.finish(state, self._all_pages(), self._end(state, before))
                prepared = True
                patience.cancel()
                watch.cancel()
        except BaseExceptionGroup as struck:
            if not prepared or not isinstance(telling(struck), LinkLost):
                raise

    def _ends_it(self, lost: LinkLost) -> bool:
        """Whether this is the end of the migration, and not of a connection only."""
        again = isinstance(lost, OutOfPatience) and self._impatient
        self._impatient = self._impatient or isinstance(lost, OutOfPatience)
        if not self._policy.reconnect or not self.can_cancel or again:
            return True
        if self._destination.no_return:
            raise LinkLost(f"{lost}; it can't be reconnected: {self._destination.no_return}") from lost
        return False

    async def _come_back(self, lost: LinkLost, start: Start, pipeline: SourcePipeline) -> Start:
        """Find the destination again, and have everything that it has not got sent again; the guest runs."""
        # Above every number that was used, also for a round that had not ended.
        round_ = max(self.stats.rounds, start.round) + 1
        answer = await reconnect(
            self._destination, lost, since=self._ledger.since, round_=round_, patience=self._policy.reconnect
        )
        first_pass = start.sparse and answer.rounds <= start.round
        missing = self._ledger.resume(answer, round_, first_pass=first_pass)
        for region, words in missing.items():
            if first_pass and self._digests is not None:
                # Read and never placed: zero there. One that is a hole when its turn comes again is not read again, so
                # what it held before must not count any more.
                lost_pages = bitmap.to_pages(words & ~self._ledger.known[region])
                if len(lost_pages):
                    self._digests.zero(region, lost_pages)
            if pipeline.sent is not None:  # nobody knows which version of them the destination has
                pipeline.sent.forget(region, bitmap.to_pages(words))
            await self._guest.give_back(region, 0, words)
        self.reconnects += 1
        sparse = first_pass or pipeline.sparse
        return Start(began=start.began, round=round_, sparse=sparse, known=self._ledger.known if sparse else {})

    async def _hand_over(self) -> None:
        if self._keep:
            await self._guest.resume()
            self._running_again()
            await self._guest.log_stop()
            await self._destination.commit(self._migration)
            self._enter(State.COMPLETED)
            return
        if self._destination.one_way:
            await self._destination.commit(self._migration)  # sealed first, released after: nothing can get lost
        self._enter(State.COMMITTING)
        await to_its_end(self._commit())

    async def _commit(self) -> None:
        await self._guest.commit(self._migration)
        outcome = Outcome.RUNNING
        if not self._destination.one_way:
            try:
                outcome = await self._destination.commit(self._migration)
            except InDoubt as error:
                raise InDoubt(self._doubt(error)) from error
        self._running_again()
        try:
            await self._guest.release(self._migration, outcome)
        except AmigError as error:
            runs = "runs" if outcome is Outcome.RUNNING else "will never run"
            self._tell(Notice(text=f"the guest {runs} at {self._destination.address}; its old host says: {error}"))
        else:
            await self._destination.settled()
        if outcome is Outcome.DISCARDED:
            self._enter(State.FAILED, "the destination discarded the guest; it runs on here")
            raise AmigError(f"{self._destination.address} discarded the guest at the last moment; it runs on here")
        self._enter(State.COMPLETED)

    def _doubt(self, error: Exception) -> str:
        name, there = self._guest.info.name, self._destination.address
        return (
            f"COMMIT was sent to {there} and its answer was lost ({error}). The guest {name!r} is paused here and must "
            f"not run here unless the destination ({self.identity}) is known not to run it. Look there with "
            f"`amig status`: if it runs, `amig resolve {name} --discard` here; if it never will, "
            f"`amig resolve {name} --run-here`. Its host asks again by itself; `amig resolve {name}` asks at once"
        )

    async def _take_back(self, error: BaseException) -> None:
        """Leave the guest as it was before, with the bits that were in flight given back; then tell the destination.

        In this order, because a guest may stand still for this, and nobody can run it elsewhere before COMMIT.
        """
        reason = "cancelled" if isinstance(error, asyncio.CancelledError) else str(error) or type(error).__name__
        code = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
        gone = contextlib.suppress(AmigError, OSError)  # a host that is gone has done all this by itself
        with gone:
            if code == "failed":
                for region, words in self._ledger.in_flight().items():
                    whole = self._guest.info.memory.region(region)
                    assert len(words) * WORD_PAGES >= whole.pages  # noqa: S101 - a partial return would lose pages
                    await self._guest.give_back(region, 0, words)
        with gone:
            await self._guest.log_stop()
        with gone:
            await self._guest.resume()
        await self._destination.abort(code, reason)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_PERIOD)
            self._tell(self._meter.now(self.state))

    async def _bound_pause(self) -> None:
        """Raise `LinkLost` when the destination has the paused guest wait for far longer than was to be expected."""
        await self._paused.wait()
        if self._destination.one_way:
            return
        rate = self._convergence.rate(self.stats.link.bytes_per_s)
        expected = self._convergence.downtime(self._convergence.history[-1], rate) if rate else 0.0
        if self._policy.verify == "full":
            expected += self._guest.info.memory.size / HASH_RATE
        limit = self._policy.handover_timeout + SLOW * expected
        await asyncio.sleep(limit)
        raise OutOfPatience(
            f"{self._destination.address} did not take the last pages of the paused guest within {limit:.3g} s "
            f"({expected:.3g} s were expected), so it runs on here (--handover-timeout waits longer)"
        )

    def _pausing(self) -> None:
        self._paused_at = time.monotonic()
        self._paused.set()
        self._enter(State.SWITCHOVER)

    def _running_again(self) -> None:
        self.downtime_s = time.monotonic() - self._paused_at

    def _enter(self, state: State, reason: str = "") -> None:
        self.state = state
        self._tell(StateChanged(state=state, reason=reason))
        if state is State.COMPLETED:
            self._tell(self._meter.now(state))

    def _end(self, state: bytes, before: tuple[int, int]) -> End:
        """Return END; ``before`` are the pages, and zero pages, of the connections before these."""
        return End(
            rounds=self.stats.rounds,
            pages=self.stats.pages_sent - before[0],
            zero_pages=self.stats.pages_zero - before[1],
            state_bytes=len(state),
            state_digest=hashlib.blake2b(state, digest_size=32).digest(),
            memory_roots=b"" if self._digests is None else self._digests.roots(),
        )

    def _tell_if_short(self) -> None:
        """Say beforehand that the limit can't be kept, however little is left to send."""
        limit, fixed = self._convergence.limits.downtime, self._convergence.fixed
        most = limit + self._convergence.overrun
        if most > limit:
            self._tell(
                Notice(
                    text=f"the handover takes about {format_duration(fixed)} by itself, so the guest may stand still "
                    f"for {format_duration(most)}, more than --downtime {format_duration(limit)}"
                )
            )

    def _all_pages(self) -> Iterable[Digests]:
        """Return the digests of all memory, hashed as they are sent; nothing unless that was asked for."""
        if self._policy.verify != "full":
            return ()
        info = self._guest.info
        self._tell(
            Notice(text="hashing all memory while the guest is paused (--verify full): the downtime limit is off")
        )
        return verify.hash_memory(self._guest.memory, info.memory.regions, self._key)

    def _have_verified(self) -> None:
        if self._policy.verify != "off" and not self._destination.one_way:
            self.verified = self._policy.verify
