"""ssh://: through a real sshd on loopback, and its parts without one."""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

import amig
from amig import transport
from amig.errors import HostError, LinkLost, NameTaken, PeerError, Refused, UsageError
from amig.guest import Outcome
from amig.host.handover import Records
from amig.session.asking import asked
from amig.session.endpoints import open_destination
from amig.transport import LinkOptions, ssh, stdio
from amig.transport.address import SshAddress
from tests import sshd
from tests.moving import assert_stayed, homes, hosting, move  # noqa: F401 - a fixture

FAST = amig.Policy(downtime=1.0, timeout=60, on_timeout="switch", connect_timeout=60)


@pytest.fixture
def far(tmp_path):
    with sshd.serving(tmp_path / "far") as far:
        yield far


async def until(condition, what, timeout=60):
    deadline = time.monotonic() + timeout
    while not (result := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline, f"this did not happen in time: {what}"
        await asyncio.sleep(0.05)
    return result


# --- a guest goes through ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("homes")
async def test_a_guest_goes_to_a_host_that_ssh_has_started_and_that_outlives_ssh(far):
    async with hosting(engine="simulator") as source:
        result = await move(source, far.address("web1"), FAST, link=far.options)
        assert result.status == "completed", result.error
        assert result.destination == "ssh://far/web1"
        assert (await source.ended()).how is amig.How.MOVED
    try:
        # The guest is hosted by a process of its own: no connection of sshd, nor the shell it started, is left.
        await until(lambda: not far.connections(), "ssh ends")
        status = await asyncio.to_thread(far.amig, "status", "web1", "--json")
        assert '"running"' in status.stdout, status
        verified = await asyncio.to_thread(far.amig, "verify", "web1", "--json")
        assert '"intact":true' in verified.stdout.replace(" ", ""), verified
        assert "the guest runs here now" in far.log("web1")
    finally:
        stopped = await asyncio.to_thread(far.amig, "stop", "web1")
    assert stopped.returncode == 0, stopped


async def test_a_host_far_away_answers_whether_it_lives_or_not(far):
    """What became of a migration is asked through ssh, too, while the guest runs there, and when its host has gone."""
    migration = "0123456789abcdef" * 2
    records = Records(far.folder / "state" / "amig")
    with pytest.raises(Refused, match="nothing is known here of migration"):
        async with asked(far.address("web1"), migration, far.options, timeout=60):
            pass
    arrival = records.arriving("web1")
    arrival.run(migration)
    arrival.close()
    host = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "amig", "run", "web1", "--engine", "simulator", "--workload", "idle", "--json"],
        env=os.environ | far.environment,
        stdout=subprocess.PIPE,
    )
    try:
        assert await asyncio.to_thread(host.stdout.readline)
        async with asked(far.address("web1"), migration, far.options, timeout=60) as outcome:
            assert outcome is Outcome.RUNNING
    finally:
        host.terminate()
        await asyncio.to_thread(host.communicate)
    await until(lambda: records.outcome(migration) is None, "the answer was confirmed")


@pytest.mark.usefixtures("homes")
async def test_a_cancelled_migration_leaves_nothing_over_there(far):
    async with hosting(engine="simulator") as source:
        slow = amig.Policy(bandwidth=5e6, connect_timeout=60)
        async with amig.Migration(source.name, far.address("web1"), slow, link=far.options) as migration:
            async for event in migration:
                if isinstance(event, amig.Progress) and event.bytes_sent:
                    migration.cancel()
        assert (await migration.result()).status == "cancelled"
        await assert_stayed(source)
        await until(lambda: not far.connections(), "ssh ends")
        await until(lambda: "no guest" in far.amig("list").stderr, "the host over there ends")


@pytest.mark.usefixtures("homes")
async def test_ssh_that_dies_on_the_way_leaves_the_guest_here(far):
    async with hosting(engine="simulator") as source:
        slow = amig.Policy(bandwidth=5e6, connect_timeout=60)
        with pytest.raises(LinkLost):
            async with amig.Migration(source.name, far.address("web1"), slow, link=far.options) as migration:
                async for event in migration:
                    if isinstance(event, amig.Progress) and event.bytes_sent:
                        for pid in far.connections():
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(int(pid), 9)
        await assert_stayed(source)
        await until(lambda: "no guest" in far.amig("list").stderr, "the host over there ends")


@pytest.mark.usefixtures("homes")
async def test_what_amig_says_there_is_said_here(far, caplog):
    """The name is taken over there: the error is the far side's own."""
    taken = await asyncio.to_thread(
        far.amig, "run", "web1", "--engine", "simulator", "--workload", "idle", "--memory", "64MiB", "--detach"
    )
    assert taken.returncode == 0, taken
    try:
        with pytest.raises(Refused, match=f"exit code {NameTaken.exit_code}; it said: .*web1") as caught:
            await transport.connect(far.address("web1"), far.options, timeout=60)
        assert "Traceback" not in str(caught.value)
        assert "ssh://far/web1: amig: " in caplog.text
    finally:
        await asyncio.to_thread(far.amig, "stop", "web1")


# --- ssh does not get there ----------------------------------------------------------------------------------------


async def test_a_key_that_is_not_known_there_is_said(far):
    with pytest.raises(LinkLost, match=r"ssh did not get to ssh://stranger/web1; it said: .*Permission denied"):
        await transport.connect("ssh://stranger/web1", far.options, timeout=60)


async def test_a_host_that_is_not_known_here_is_not_spoken_to(far):
    with pytest.raises(LinkLost, match="Host key verification failed"):
        await transport.connect("ssh://unknown/web1", far.options, timeout=60)


async def test_no_amig_there(far):
    options = LinkOptions(ssh=far.options.ssh, remote_amig="/nowhere/amig")
    with pytest.raises(HostError, match=r"can't run amig.*AMIG_REMOTE_PATH"):
        await transport.connect(far.address("web1"), options, timeout=60)


async def test_a_login_script_that_talks_is_recognized(far):
    options = LinkOptions(ssh=far.options.ssh, remote_amig="echo Welcome to hostb, have a nice day; true")
    with pytest.raises(PeerError, match=r"is not amig: it began with b'Welcome to ho.*login script"):
        await transport.connect(far.address("web1"), options, timeout=60)


async def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = LinkOptions(ssh=("ssh", "-F", "/dev/null"))
    if shutil.which("ssh") is None:
        pytest.skip("no ssh client here")
    with pytest.raises(LinkLost, match="Connection refused"):
        await transport.connect(f"ssh://127.0.0.1:{port}/web1", options, timeout=60)


# --- without ssh ---------------------------------------------------------------------------------------------------


def test_the_command_line_has_no_secret_and_no_room_for_tricks():
    address = SshAddress(host="hostb", name="web-1", user="me", port=2222)
    line = ssh.command_line(address, LinkOptions(ssh=("ssh", "-i", "key")), timeout=9.5)
    assert line[:3] == ["ssh", "-i", "key"]
    assert line[-3:] == ["--", "hostb", "amig receive --stdio --detach --name web-1"]
    assert "-oBatchMode=yes" in line
    assert "-oConnectTimeout=10" in line
    assert line[line.index("-p") + 1] == "2222"
    assert line[line.index("-l") + 1] == "me"


async def test_more_than_one_stream_is_refused_before_anything_is_started():
    with pytest.raises(UsageError, match="ssh://hostb/web1 is one connection: leave --streams out"):
        open_destination("ssh://hostb/web1", amig.Policy(streams=2))


def fake(code):
    """Options with a program in the place of ssh."""
    return LinkOptions(ssh=(sys.executable, "-c", f"import os, sys, time\n{code}"))


async def test_no_ssh_here():
    with pytest.raises(HostError, match=r"can't run /nowhere/ssh.*needs an ssh client"):
        await transport.connect("ssh://hostb/web1", LinkOptions(ssh=("/nowhere/ssh",)))


async def test_an_ssh_that_hangs_costs_the_time_limit_and_is_ended(monkeypatch):
    started = []
    start = ssh.SshConnection.start.__func__
    monkeypatch.setattr(
        ssh.SshConnection, "start", lambda *words: started.append(start(ssh.SshConnection, *words)) or started[0]
    )
    with pytest.raises(LinkLost, match=r"did not answer within 0\.3 s"):
        await transport.connect("ssh://hostb/web1", fake("time.sleep(60)"), timeout=0.3)
    assert started[0]._process.returncode == -9


async def test_bytes_go_through_and_the_process_is_gone_afterwards():
    echo = "os.write(1, b'amig stdio 1\\n')\nwhile d := os.read(0, 65536):\n  os.write(1, d)"
    connection = await transport.connect("ssh://hostb/web1", fake(echo), timeout=60)
    assert connection.bytes_received == 0
    assert connection.identity == b""
    content, got = os.urandom(1 << 20), bytearray(1 << 20)
    async with asyncio.TaskGroup() as group:
        group.create_task(connection.send(content))
        group.create_task(connection.recv_into(got))
    assert got == content
    process = connection._process
    await connection.close()
    await connection.close()
    assert process.returncode is not None


async def test_what_standard_error_says_is_bounded_and_harmless(caplog):
    noise = (
        "os.write(2, b'\\x1b[31mred\\n' + b'x' * 100000 + b'\\n' + b'line\\n' * 1000)\n"
        "os.write(1, b'amig stdio 1\\n'); os.write(2, b'last'); os.close(2); time.sleep(60)"
    )
    caplog.set_level(logging.WARNING)
    connection = await transport.connect("ssh://hostb/web1", fake(noise), timeout=60)
    while "last" not in connection.said():
        await asyncio.sleep(0.01)
    assert "\x1b" not in caplog.text
    assert len(caplog.records) <= ssh.MAX_LINES
    assert all(len(record.getMessage()) < ssh.MAX_LINE + 100 for record in caplog.records)
    assert len(connection.said()) < 20 * ssh.MAX_LINE
    connection.abort()


async def test_the_end_of_ssh_in_the_middle_comes_with_what_it_said():
    code = "os.write(1, b'amig stdio 1\\n'); os.write(2, b'Timeout, server hostb not responding.\\n')"
    connection = await transport.connect("ssh://hostb/web1", fake(code), timeout=60)
    with pytest.raises(LinkLost, match=r"0 of 16 bytes came; it said: Timeout, server hostb not responding\."):
        await connection.recv_into(bytearray(16))
    connection.abort()


# --- the far side's standard input and output ------------------------------------------------------------------------


@pytest.fixture(params=["socket", "pipes"])
def ends(request):
    """Two pairs of descriptors: those of the far side, and a socket or pipes of ours."""
    if request.param == "socket":
        ours, theirs = socket.socketpair()
        reader = theirs.detach()
        near = os.dup(ours.fileno()), ours.detach()
        yield (reader, os.dup(reader)), near
    else:
        their_in, our_out = os.pipe()
        our_in, their_out = os.pipe()
        yield (their_in, their_out), (our_in, our_out)


async def test_standard_input_and_output_are_a_connection(ends):
    theirs, ours = ends
    listener = stdio.StdioListener(*theirs)
    far = await listener.accept()
    near = stdio.connection(*ours)
    magic = bytearray(len(stdio.MAGIC))
    await near.recv_into(magic)
    assert magic == stdio.MAGIC
    content, one, two = os.urandom(3 << 20), bytearray(3 << 20), bytearray(3 << 20)
    async with asyncio.TaskGroup() as group:
        for end, into in ((near, one), (far, two)):
            group.create_task(end.send(content[:7], content[7:]))
            group.create_task(end.recv_into(memoryview(into)[:99], memoryview(into)[99:]))
    assert one == two == content
    assert far.outstanding() is None
    waiting = asyncio.create_task(listener.accept())
    await asyncio.sleep(0)
    closing = asyncio.create_task(near.close())
    with pytest.raises(LinkLost, match="0 of 1 bytes came"):
        await far.recv_into(bytearray(1))
    await far.close()
    await closing
    await listener.close()
    with pytest.raises(HostError, match="nobody else"):
        await waiting


async def test_a_listener_that_nobody_asked_closes_its_connection(ends):
    theirs, ours = ends
    listener = stdio.StdioListener(*theirs)
    await listener.close()
    await listener.close()
    near = stdio.connection(*ours)
    with pytest.raises(LinkLost):
        await near.recv_into(bytearray(1))
    near.abort()


def test_files_are_no_connection(tmp_path):
    with open(tmp_path / "x", "w+") as file, pytest.raises(UsageError, match="pipes or a socket"):
        stdio.connection(os.dup(file.fileno()), os.dup(file.fileno()))


def test_what_is_printed_by_mistake_does_not_get_into_the_stream():
    code = (
        "import os, sys\nfrom amig.transport import stdio\nfds = stdio.take_over()\nprint('by mistake', flush=True)\n"
        "os.system('echo by a child')\nassert sys.stdin.read() == ''\nos.write(fds[1], b'in the stream')\n"
        "assert not any(os.get_inheritable(fd) for fd in fds)\nassert os.read(fds[0], 10) == b'asked'"
    )
    said = subprocess.run([sys.executable, "-c", code], input=b"asked", capture_output=True, check=True)
    assert said.stdout == b"in the stream"
    assert said.stderr == b"by mistake\nby a child\n"


def test_a_terminal_is_told_what_it_is_for():
    ours, theirs = os.openpty()
    code = "from amig.transport import stdio\ntry: stdio.take_over()\nexcept Exception as error: sys.exit(str(error))"
    said = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], stdin=theirs, capture_output=True, text=True)
    os.close(ours)
    os.close(theirs)
    assert "ssh://HOST/NAME" in said.stderr
