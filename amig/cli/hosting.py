"""What `amig run` and `amig receive` share: the serial port, signals, detaching, and the last word on a guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import amig
from amig.cli import say, terminal
from amig.cli.app import Settings
from amig.cli.loop import on_signals
from amig.errors import ControlError, InDoubt, UsageError
from amig.host.console import SerialChoice, SerialKind, SerialOutput
from amig.host.detach import FIRST_DESCRIPTOR, READY_FD, Ready, ReadyPipe, log_path, start_detached
from amig.host.hosted import Ended, How
from amig.host.record import RecordState
from amig.host.service import HostService
from amig.session.doubt import settle_record, watching
from amig.transport import LinkOptions
from amig.transport.stdio import DESCRIPTORS

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def detach(name: str, *, timeout: float = 120.0, stdio: tuple[int, int] | None = None) -> Ready:
    """Start this very command again in the background; returns once it says that it is up. Raises `HostError`.

    ``stdio`` are descriptors that it gets as `amig.transport.stdio.inherited`.
    """
    package = Path(amig.__file__).parent.parent
    # Where amig is not the code of this directory, nothing of this directory may be imported.
    safe = [] if package == Path.cwd() else ["-P"]
    arguments = [*safe, "-m", "amig", *Settings.arguments]
    if stdio is None:
        return start_detached(arguments, log=log_path(name), timeout=timeout)
    places = {DESCRIPTORS: ":".join(str(FIRST_DESCRIPTOR + at) for at in range(len(stdio)))}
    return start_detached(arguments, log=log_path(name), timeout=timeout, environment=places, descriptors=stdio)


def is_detached() -> bool:
    """Whether this process is the host that `detach` has started."""
    return READY_FD in os.environ


def serial_choice(words: str, *, json: bool, detach: bool, lifeline: bool) -> SerialChoice:
    """Return ``--serial``, refused where standard input or output are spoken for."""
    choice = SerialChoice.parse(words)
    if choice.kind is SerialKind.STDIO and (json or detach or lifeline):
        raise UsageError("--serial stdio needs the terminal for itself: use --serial file:PATH, and amig console NAME")
    return choice


class Host:
    """A host in the foreground: what happens around its service."""

    def __init__(
        self, name: str, serial: SerialChoice, *, json: bool, lifeline: bool, link: LinkOptions | None = None
    ) -> None:
        """``link`` is how the destination of a handover in doubt is asked."""
        self.name = name
        self.json = json
        self._serial = serial
        self._lifeline = lifeline
        self._link = link or LinkOptions()
        self._pipe = ReadyPipe.from_environment()
        self._ended_by: signal.Signals | None = None
        self._output: SerialOutput | None = None
        self._up = False

    @property
    def interactive(self) -> bool:
        """Whether the guest has this terminal as its serial port."""
        return self._serial.kind is SerialKind.STDIO

    @property
    def sinks(self) -> tuple[SerialOutput, ...]:
        """For the service."""
        return () if self._output is None else (self._output,)

    async def ask_first(self) -> None:
        """Settle a handover that an earlier host of this name has left in doubt; raises `HostError` where that fails.

        Never starts anything: what may be started is another question.
        """
        record = await settle_record(self.name, self._link)
        if record is not None:
            runs = "runs it" if record.state is RecordState.RELEASED else "will never run it"
            text = f"{self.name} was handed over to {record.destination} before its host ended: that side {runs}"
            self.say(text, {"event": "doubt", "text": text})

    def say(self, text: str, value: object) -> None:
        """Tell people or programs, without disturbing the guest's own output."""
        if self.interactive:
            say.note(text)
        else:
            say.to_whoever_listens(say.encode(value) if self.json else text)

    def is_up(self, **info: str) -> None:
        """Tell whoever detached us that we are up."""
        self._up = True
        if self._pipe is not None:
            self._pipe.ready(**info)

    async def run(self, body: Callable[[], Awaitable[int]]) -> int:
        """Run ``body`` to its end; returns the exit code. SIGINT, SIGTERM and SIGHUP cancel it: the guest ends."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we run in one

        def stop(number: signal.Signals) -> None:
            if self._ended_by is None:
                self._ended_by = number
                task.cancel()
            else:
                say.note(f"amig: {self.name} is being ended")

        try:
            with on_signals(stop), self._opened_serial():
                if self._lifeline:
                    asyncio.get_running_loop().add_reader(0, self._lifeline_moves, stop)
                return await body()
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            name = self._ended_by.name
            self.say(f"{self.name} was ended by {name}", {"event": "ended", "how": "stopped", "reason": name})
            return EXIT_INTERRUPTED if self._ended_by == signal.SIGINT else 0 if self._up else EXIT_TERMINATED
        except BaseException as error:
            if self._pipe is not None:
                self._pipe.failed(error)
            raise

    @contextmanager
    def _opened_serial(self) -> Iterator[None]:
        self._output = self._serial.open()
        try:
            with terminal.raw_mode() if self.interactive else contextlib.nullcontext():
                yield
        finally:
            if self._output is not None:
                self._output.close()

    def _lifeline_moves(self, stop: Callable[[signal.Signals], None]) -> None:
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            stop(signal.SIGTERM)

    @asynccontextmanager
    async def keys(self, service: HostService) -> AsyncIterator[None]:
        """Feed the guest what is typed; Ctrl-] ends it, as Ctrl-C does a host without a terminal."""
        if not self.interactive:
            yield
            return
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we run in one

        async def feed() -> None:
            keys = terminal.Keys(escape=terminal.is_terminal())
            while data := await keys.read():
                with contextlib.suppress(ControlError):  # there is no guest yet
                    await service.console.feed(data)
            if terminal.is_terminal():
                self._ended_by = signal.SIGINT
                task.cancel()

        feeding = asyncio.create_task(feed())
        try:
            yield
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])

    def last_word(self, ended: Ended) -> int:
        """Say how the guest ended; returns the exit code, or raises what ended it."""
        if ended.how is How.FAILED and ended.error is not None:
            raise ended.error
        to = ended.handover.destination if ended.handover is not None else ""
        texts = {
            How.MOVED: f"{self.name} has moved to {to} and runs there",
            How.POWERED_OFF: f"{self.name} switched itself off",
            How.STOPPED: f"{self.name} was stopped",
        }
        value = {"event": "ended", "how": str(ended.how), "reason": ended.reason}
        self.say(texts.get(ended.how, ended.reason), value | ({"destination": to} if to else {}))
        return 0

    async def until_end(self, service: HostService) -> Ended:
        """Wait for the guest's end; ask where it runs when that is in doubt and nobody else can.

        Raises `InDoubt` when we are told to end while a handover is in doubt.
        """

        def tell(text: str) -> None:
            self.say(text, {"event": "doubt", "text": text})

        try:
            async with watching(service.hosted, self._link, tell):
                return await service.ended()
        except asyncio.CancelledError:
            doubt = service.hosted.in_doubt
            if doubt is None:
                raise
            raise InDoubt(
                f"{self.name} was handed over to {doubt.destination} and nobody has said how that ended; this copy "
                f"ends now. Look there with amig status: if it runs, amig resolve {self.name} --discard here; if it "
                f"never will, amig resolve {self.name} --run-here lets it be started here again"
            ) from None
