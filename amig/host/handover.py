"""What the records mean: preparing, committing and settling a handover on either side, and who may boot a guest."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

import msgspec

from amig.errors import ControlError, HostError
from amig.guest import Handover, Outcome
from amig.host.names import check_name
from amig.host.record import BadRecord, Record, RecordFile, RecordState, opened, state_dir, sync_dir

KEPT = 30 * 24 * 3600.0
"""Seconds that a destination keeps an answer for a source that has not said that it has it."""
_ANSWERS = {RecordState.RUNNING: Outcome.RUNNING, RecordState.DISCARDED: Outcome.DISCARDED}


class SourceHandover:
    """A source's record of one handover: PREPARED → COMMITTED → RELEASED or RETURNED. Calls block."""

    def __init__(self, file: RecordFile, record: Record) -> None:
        self._file = file
        self._record = record

    @property
    def handover(self) -> Handover:
        """Who takes the guest over."""
        return Handover(migration=self._record.migration, destination=self._record.destination, peer=self._record.peer)

    def _write(self, state: RecordState) -> None:
        self._file.write(msgspec.structs.replace(self._record, state=state))

    def commit(self) -> None:
        """Hand it over; durable when this returns."""
        self._write(RecordState.COMMITTED)

    def settle(self, outcome: Outcome) -> None:
        """Say how it ended; durable when this returns."""
        self._write(RecordState.RELEASED if outcome is Outcome.RUNNING else RecordState.RETURNED)

    def abandon(self) -> None:
        """Nothing was handed over: remove the record, or leave what does no harm."""
        _remove(self._file)

    def close(self) -> None:
        """Close the file; what it says stays."""
        self._file.close()


class Records:
    """The directory of records of one user; ``root`` None is `state_dir`. Calls block."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or state_dir()) / "handover"

    def _made(self) -> Path:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"can't make {self.root} for handover records: {error.strerror}") from error
        if self.root.stat().st_uid != os.geteuid():
            raise HostError(f"{self.root} belongs to another user: handover records there can't be trusted")
        return self.root

    # --- source ------------------------------------------------------------------------------------------------------

    def source_path(self, name: str) -> Path:
        """Return where the record of a guest that leaves is kept."""
        return self.root / f"{check_name(name)}.source"

    def source(self, name: str) -> Record | None:
        """Return what is known of the last handover of a guest; raises `BadRecord`."""
        try:
            with opened(self.source_path(name)) as file:
                return file.current
        except FileNotFoundError:
            return None

    def check_may_start_anew(self, name: str) -> None:
        """Raise `HostError` when the last that is known of a guest is that it moved away: booted, there would be two.

        It may come back by a migration, or from a snapshot.
        """
        record = self.source(name)
        if record is not None and record.state is RecordState.RELEASED:
            raise HostError(
                f"guest {name} moved to {record.destination} ({record.peer or 'unnamed'}, migration "
                f"{record.migration}): started here anew, there would be two of it. If it does not run there any more, "
                f"or shall be another guest of that name: amig resolve {name} --run-here"
            )

    def came_back(self, name: str) -> None:
        """A guest of that name has arrived and runs here: where one of that name went before counts no more."""
        record = self.source(name)
        if record is not None and record.state is not RecordState.COMMITTED:
            with opened(self.source_path(name)) as file:
                file.remove()

    def check_may_boot(self, name: str) -> None:
        """Raise `HostError` when a guest of that name was handed over and nobody knows how that ended."""
        record = self.source(name)
        if record is not None and record.state is RecordState.COMMITTED:
            raise HostError(
                f"guest {name} was handed over to {record.destination} ({record.peer or 'unnamed'}, migration "
                f"{record.migration}), and this side was never told how it ended: it may be running there, so it is "
                f"not started here. Look there (amig status). If it runs there: amig resolve {name} --discard; if "
                f"that host says it never will: amig resolve {name} --run-here"
            )

    def prepare(self, name: str, handover: Handover) -> SourceHandover:
        """Preallocate the record of a handover; raises `HostError`, also while another one is in doubt."""
        self._made()
        self.check_may_boot(name)
        record = Record(
            state=RecordState.PREPARED,
            guest=name,
            migration=handover.migration,
            destination=handover.destination,
            peer=handover.peer,
        )
        file = RecordFile.open(self.source_path(name), create=True)
        try:
            file.write(record)
        except BaseException:
            file.close()
            raise
        return SourceHandover(file, record)

    def resolve(self, name: str, outcome: Outcome) -> Record:
        """Settle a handover in doubt whose host is gone; raises `HostError` if there is none.

        DISCARDED also takes back a guest that is on record as moved away: it may be started here anew.
        """
        returns = outcome is Outcome.DISCARDED
        try:
            with opened(self.source_path(name)) as file:
                record = file.current
                known = record is not None and record.state is RecordState.RELEASED and returns
                if record is None or not (known or record.state is RecordState.COMMITTED):
                    raise HostError(f"no handover of guest {name} is in doubt")
                state = RecordState.RETURNED if returns else RecordState.RELEASED
                settled = msgspec.structs.replace(record, state=state)
                file.write(settled)
                return settled
        except FileNotFoundError:
            raise HostError(f"no handover of guest {name} is known here") from None

    # --- destination -------------------------------------------------------------------------------------------------

    def destination_path(self, migration: str) -> Path:
        """Return where the destination's answer for a migration is kept."""
        if len(migration) != 32 or not set(migration) <= set("0123456789abcdef"):
            raise ControlError(f"{migration!r} is no migration id", code="wrong-migration")
        return self.root / f"{migration}.destination"

    def arriving(self, name: str) -> ArrivalRecord:
        """Preallocate the record of a guest that arrives; raises `HostError`. Old records are tidied away.

        Only whoever holds the right to ``name`` may call this: what an earlier process of that name left is removed.
        """
        root = self._made()
        self.prune(name)
        path = root / f"{check_name(name)}.{secrets.token_hex(8)}.arriving"
        file = RecordFile.open(path, create=True)
        return ArrivalRecord(self, file, name)

    def outcome(self, migration: str) -> Outcome | None:
        """Return, durably, how a migration to here ended; None for one that was never heard of here.

        One that is still arriving is decided by the question: it is DISCARDED, and whoever receives it will see that.
        Only a source that has sent COMMIT, and has lost the answer, asks.
        """
        path = self.destination_path(migration)
        try:
            with opened(path) as file:
                state = file.decide(RecordState.DISCARDED)
        except FileNotFoundError:
            return None
        if state not in _ANSWERS:
            raise BadRecord(path, f"it says {state}")
        return _ANSWERS[state]

    def settled(self, migration: str) -> None:
        """The source has our answer on record: nobody will ask again, so it is removed. No-op while undecided."""
        path = self.destination_path(migration)
        try:
            with opened(path) as file:
                if file.current is not None and file.current.state is not RecordState.ARRIVING:
                    file.remove()
        except FileNotFoundError:
            pass

    def prune(self, name: str) -> None:
        """Remove what a dead process of that name left half-made, and answers that nobody has asked for in `KEPT`.

        A source that asks later is told that nothing is known, which leaves its guest in doubt, for people to resolve.
        """
        too_old = time.time() - KEPT
        half_made = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.arriving")
        for path in self.root.iterdir():
            with contextlib.suppress(OSError):
                old = path.suffix == ".destination" and path.lstat().st_mtime < too_old
                if old or half_made.fullmatch(path.name):
                    path.unlink()


class ArrivalRecord:
    """A destination's record of one migration: ARRIVING → RUNNING or DISCARDED, decided once. Calls block.

    Preallocated at the handshake, and kept under the migration's id from `expect` on.
    """

    def __init__(self, records: Records, file: RecordFile, name: str) -> None:
        self._records = records
        self._file = file
        self._name = name
        self._migration = ""
        self.published: RecordState | None = None

    def expect(self, migration: str) -> None:
        """Let it be known, durably, that this migration arrives: a later question for it can be answered.

        Raises `ControlError` (``wrong-migration``) for an id that is known already, `HostError`.
        """
        target = self._records.destination_path(migration)
        self._file.write(Record(state=RecordState.ARRIVING, guest=self._name, migration=migration))
        try:
            os.link(self._file.path, target)  # a link never replaces
            self._file.path.unlink()
            self._file.path = target
            sync_dir(target.parent)
        except FileExistsError:
            raise ControlError(f"migration {migration} has been here before", code="wrong-migration") from None
        except OSError as error:
            raise HostError(f"can't make the handover record {target}: {error.strerror}") from error
        self._migration = migration

    def run(self, migration: str) -> None:
        """Promise to run the guest; durable when this returns. Raises `ControlError` after a discard."""
        self._decide(migration, RecordState.RUNNING)

    def discard(self, migration: str) -> None:
        """Promise never to run it; durable when this returns. Raises `ControlError` when it runs."""
        self._decide(migration, RecordState.DISCARDED)

    def _decide(self, migration: str, state: RecordState) -> None:
        if not self._migration:
            self.expect(migration)
        if migration != self._migration:
            raise ControlError(f"migration {self._migration} arrives here, not {migration}", code="wrong-migration")
        self.published = self._file.decide(state)
        if self.published is not state:
            raise ControlError(f"migration {migration} is already {self.published} here", code="wrong-state")

    def abandon(self) -> None:
        """Nothing was promised, so nobody will ask: remove it, or leave what does no harm."""
        if self.published is None:
            _remove(self._file)
        else:
            self._file.close()

    def close(self) -> None:
        """Close it. One that was expected stays, decided or not: an undecided one is decided when somebody asks."""
        if self._migration:
            self._file.close()
        else:
            _remove(self._file)


def _remove(file: RecordFile) -> None:
    """Remove a record that nothing depends on."""
    with contextlib.suppress(HostError):
        file.remove()
