"""What the records mean: preparing, committing and settling a handover on either side, and who may boot a guest."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from amig.errors import ControlError, HostError
from amig.guest import Handover, Outcome
from amig.host.names import check_name
from amig.host.record import Record, RecordFile, RecordState, opened, state_dir, sync_dir


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
        """Nothing was handed over: remove the record."""
        self._file.remove()

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
        """Settle a handover in doubt whose host is gone, by an operator's word; raises `HostError` if there is none."""
        try:
            with opened(self.source_path(name)) as file:
                record = file.current
                if record is None or record.state is not RecordState.COMMITTED:
                    raise HostError(f"no handover of guest {name} is in doubt")
                state = RecordState.RELEASED if outcome is Outcome.RUNNING else RecordState.RETURNED
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
        """Preallocate the record of a guest that arrives; raises `HostError`."""
        path = self._made() / f"{check_name(name)}.{secrets.token_hex(8)}.arriving"
        file = RecordFile.open(path, create=True)
        return ArrivalRecord(self, file, name)

    def outcome(self, migration: str) -> Outcome:
        """Return, durably, how a migration to here ended: one that never ran here never will."""
        path = self.destination_path(migration)
        try:
            with opened(path) as file:
                record = file.current
        except FileNotFoundError:
            arrival = self.arriving("unknown")
            try:
                arrival.discard(migration)
            except ControlError:
                return Outcome.RUNNING  # it was published between our look and our word
            finally:
                arrival.close()
            return Outcome.DISCARDED
        running = record is not None and record.state is RecordState.RUNNING
        return Outcome.RUNNING if running else Outcome.DISCARDED


class ArrivalRecord:
    """A destination's record: preallocated at the handshake, published once as RUNNING or DISCARDED. Calls block."""

    def __init__(self, records: Records, file: RecordFile, name: str) -> None:
        self._records = records
        self._file = file
        self._name = name
        self.published: RecordState | None = None

    def run(self, migration: str) -> None:
        """Promise to run the guest; durable when this returns. Raises `ControlError` after a discard."""
        self._publish(migration, RecordState.RUNNING)

    def discard(self, migration: str) -> None:
        """Promise never to run it; durable when this returns. Raises `ControlError` when it runs."""
        self._publish(migration, RecordState.DISCARDED)

    def _publish(self, migration: str, state: RecordState) -> None:
        target = self._records.destination_path(migration)
        if self.published is not None:  # the published name is a link to this very file: it must not be written again
            if self.published is not state:
                raise ControlError(f"migration {migration} is already {self.published} here", code="wrong-state")
            return
        self._file.write(Record(state=state, guest=self._name, migration=migration))
        try:
            os.link(self._file.path, target)  # whoever is first decides: a link never replaces
        except FileExistsError:
            with opened(target) as there:
                said = there.current.state if there.current is not None else None
            if said is not state:
                raise ControlError(f"migration {migration} is already {said} here", code="wrong-state") from None
        except OSError as error:
            raise HostError(f"can't write the handover record {target}: {error.strerror}") from error
        sync_dir(target.parent)
        self.published = state

    def close(self) -> None:
        """Remove what was preallocated; a published record stays."""
        with contextlib.suppress(FileNotFoundError):
            self._file.path.unlink()
        self._file.close()
