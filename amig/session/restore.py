"""Filling a guest from a snapshot file."""

from __future__ import annotations

from amig.errors import PeerError, SnapshotError
from amig.guest import Incoming
from amig.session.filling import Filling
from amig.session.tasks import one_error
from amig.session.verify import FEATURES, check_features
from amig.transport.file import read
from amig.transport.framed import FramedConnection
from amig.wire.messages import Hello, agree
from amig.wire.states import SnapshotReaderProtocol


async def restore(path: str, guest: Incoming, *, name: str | None = None, workers: int = 1) -> Hello:
    """Build, fill and load ``guest`` from the snapshot at ``path``; returns what the snapshot says of it.

    The guest does not run yet. A snapshot is a clone: whoever runs it while the original lives has two. Raises
    `SnapshotError` for what is no whole snapshot, `Refused` when this host can't run it.
    """
    reader = await read(path)
    link = FramedConnection(reader, SnapshotReaderProtocol())
    try:
        with one_error():
            hello = await link.receive()
            assert isinstance(hello, Hello)  # noqa: S101 - the table of states lets nothing else through
            try:
                check_features(hello, agree(hello, FEATURES))
            except PeerError as error:
                raise SnapshotError(f"{path} can't be restored: {error}") from error
            await guest.build(name=name or hello.name, machine=hello.machine, memory=hello.memory)
            filling = Filling(guest, hello, workers=workers)

            async def on_round(_: int) -> None:
                pass

            await filling.receive([link], on_round)
            await filling.load()
            return hello
    except BaseException as error:
        await guest.discard("")
        if isinstance(error, PeerError):
            raise SnapshotError(f"{path} is damaged: {error}") from error
        raise
    finally:
        await link.close()
