"""Handovers that nobody has settled, from their records alone."""

from __future__ import annotations

from collections.abc import Iterator

from amig.cli import say
from amig.errors import HostError
from amig.host.handover import Records
from amig.host.record import RecordState


def unsettled(records: Records | None = None) -> Iterator[tuple[str, str]]:
    """Yield (guest, destination) of every handover that was committed and never released, sorted by name."""
    records = records or Records()
    for path in sorted(records.root.glob("*.source")):
        try:
            record = records.source(path.stem)
        except HostError as error:
            say.warn(str(error))
            continue
        if record is not None and record.state is RecordState.COMMITTED:
            yield path.stem, record.destination
