"""Connections over tcp and unix sockets, on both event loops."""

import asyncio
import contextlib
import errno
import gc
import os
import socket
import stat
from typing import ClassVar

import numpy as np
import pytest
import uvloop

from amig import transport
from amig.errors import HostError, LinkLost, UsageError
from amig.transport.sock import YIELD_CALLS, SocketConnection

MIB = 1 << 20


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine on a loop of its own, of either kind."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run
    gc.collect()  # a socket that was forgotten warns here, in the test that forgot it


@pytest.fixture(params=["tcp", "unix"])
def address(request, tmp_path):
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"


@contextlib.asynccontextmanager
async def pair(address):
    listener = await transport.listen(address)
    near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
    try:
        yield near, far
    finally:
        near.abort()
        far.abort()
        await listener.close()


def small_buffers(*ends):
    """Make the kernel take little at once, so that sending has to wait."""
    for end in ends:
        end._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


async def stuck(task):
    """Wait until the task waits for the other side: it has had many turns and moves no more."""
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()


def test_bytes_arrive_in_order_and_are_counted(run, address):
    async def main():
        async with pair(address) as (near, far):
            content = os.urandom(3 * MIB)
            got = bytearray(len(content))
            async with asyncio.TaskGroup() as group:
                group.create_task(near.send(content[:10], b"", bytearray(content[10:MIB]), memoryview(content)[MIB:]))
                group.create_task(far.recv_into(got))
            assert got == content
            assert near.bytes_sent == far.bytes_received == len(content)
            await far.send(b"back")
            back = bytearray(4)
            await near.recv_into(back)
            assert back == b"back"

    run(main())


def test_more_buffers_than_one_system_call_takes_are_gathered_and_scattered(run, address):
    async def main():
        async with pair(address) as (near, far):
            near._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)  # so that it takes many calls
            pieces = [os.urandom(1 + i % 700) for i in range(2500)]
            into = [bytearray(len(p)) for p in reversed(pieces)]
            async with asyncio.TaskGroup() as group:
                group.create_task(near.send(*pieces))
                group.create_task(far.recv_into(*into))
            assert b"".join(into) == b"".join(pieces)

    run(main())


def test_byte_by_byte(run, address):
    async def main():
        async with pair(address) as (near, far):
            got = bytearray(100)
            receiving = asyncio.create_task(far.recv_into(memoryview(got)[:37], memoryview(got)[37:]))
            for i in range(100):
                await near.send(bytes([i]))
                await asyncio.sleep(0)
            await receiving
            assert got == bytes(range(100))

    run(main())


def test_empty_sends_and_receives_move_nothing(run, address):
    async def main():
        async with pair(address) as (near, far):
            await near.send()
            await near.send(b"", bytearray())
            await far.recv_into()
            await far.recv_into(bytearray(), bytearray())
            nothing = np.empty((0, 4096), np.uint8).data
            await near.send(nothing)
            await far.recv_into(nothing)
            await far.recv_into(nothing, nothing)
            assert (near.bytes_sent, far.bytes_received) == (0, 0)

    run(main())


def test_both_directions_at_once(run, address):
    async def main():
        async with pair(address) as (near, far):
            content = os.urandom(4 * MIB)
            one, two = bytearray(len(content)), bytearray(len(content))
            async with asyncio.TaskGroup() as group:
                for end, into in ((near, one), (far, two)):
                    group.create_task(end.send(content))
                    group.create_task(end.recv_into(into))
            assert one == two == content

    run(main())


def test_buffers_may_be_reused_once_send_has_returned(run, address):
    async def main():
        async with pair(address) as (near, far):
            buffer, got = bytearray(64 << 10), bytearray(64 << 10)

            async def sender():
                for i in range(50):
                    buffer[:] = bytes([i]) * len(buffer)
                    await near.send(buffer)
                    buffer[:] = b"\xff" * len(buffer)

            sending = asyncio.create_task(sender())
            for i in range(50):
                await far.recv_into(got)
                assert got == bytes([i]) * len(got)
            await sending

    run(main())


def test_the_end_of_the_stream_says_how_much_came(run, address):
    async def main():
        async with pair(address) as (near, far):
            await near.send(b"abc")
            closing = asyncio.create_task(near.close())
            with pytest.raises(LinkLost, match="ended the connection: 3 of 10 bytes came"):
                await far.recv_into(bytearray(10))
            with pytest.raises(LinkLost, match="is lost"):
                await far.recv_into(bytearray(1))
            far.abort()
            await closing

    run(main())


def test_the_end_of_the_stream_in_many_buffers_says_how_much_came(run, address):
    async def main():
        async with pair(address) as (near, far):
            views = [bytearray(2) for _ in range(5)]
            receiving = asyncio.create_task(far.recv_into(*views))
            await near.send(b"abc")
            while far.bytes_received < 3:
                await asyncio.sleep(0)
            near.abort()
            with pytest.raises(LinkLost, match="3 of 10 bytes came"):
                await receiving
            assert b"".join(views)[:3] == b"abc"

    run(main())


def test_accepting_goes_on_after_what_passes_and_ends_at_what_does_not(run, address):
    async def main():
        listener = await transport.listen(address)
        real = listener._sock

        class Failing:
            problems: ClassVar = [errno.ECONNABORTED, errno.EMFILE, errno.EPROTO]

            def accept(self):
                if self.problems:
                    raise OSError(self.problems.pop(), "no")
                return real.accept()

            def __getattr__(self, name):
                return getattr(real, name)

        listener._sock = Failing()
        near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
        near.abort()
        far.abort()
        Failing.problems = [errno.EINVAL]
        with pytest.raises(HostError, match=r"can't accept on .*Invalid argument"):
            await listener.accept()
        await listener.close()

    run(main())


def test_a_peer_that_vanishes_while_we_send_is_a_lost_link(run, address):
    async def main():
        async with pair(address) as (near, far):
            small_buffers(near, far)
            sending = asyncio.create_task(near.send(bytes(8 * MIB)))
            await stuck(sending)
            far.abort()
            with pytest.raises(LinkLost, match=r"Broken pipe|reset by peer"):
                await sending
            with pytest.raises(LinkLost, match=r"Broken pipe|reset by peer"):
                await near.send(b"x")

    run(main())


@pytest.mark.parametrize("way", ["send", "recv"])
def test_abort_wakes_who_waits(run, address, way):
    async def main():
        async with pair(address) as (near, far):
            small_buffers(near, far)
            waiting = asyncio.create_task(near.send(bytes(8 * MIB)) if way == "send" else near.recv_into(bytearray(1)))
            await stuck(waiting)
            near.abort()
            near.abort()
            with pytest.raises(LinkLost, match="it was closed on this side"):
                await waiting
            assert near.outstanding() is None

    run(main())


def test_after_a_cancelled_send_nothing_can_be_sent_but_what_came_can_be_read(run, address):
    async def main():
        async with pair(address) as (near, far):
            small_buffers(near, far)
            sending = asyncio.create_task(near.send(bytes(8 * MIB)))
            await stuck(sending)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            with pytest.raises(LinkLost, match="a message to it was cut off"):
                await near.send(b"x")
            await far.send(b"why")
            why = bytearray(3)
            await near.recv_into(why)
            assert why == b"why"

    run(main())


def test_a_receive_cancelled_before_its_first_byte_does_no_harm(run, address):
    async def main():
        async with pair(address) as (near, far):
            receiving = asyncio.create_task(far.recv_into(bytearray(4)))
            await stuck(receiving)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            await near.send(b"abcd")
            got = bytearray(4)
            await far.recv_into(got)
            assert got == b"abcd"

    run(main())


def test_after_a_receive_cancelled_in_the_middle_nothing_can_be_received(run, address):
    async def main():
        async with pair(address) as (near, far):
            receiving = asyncio.create_task(far.recv_into(bytearray(4)))
            await near.send(b"ab")
            while far.bytes_received < 2:
                await asyncio.sleep(0)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            with pytest.raises(LinkLost, match="a message from it was cut off"):
                await far.recv_into(bytearray(1))

    run(main())


def test_two_senders_or_two_receivers_at_once_are_our_own_error(run, address):
    async def main():
        async with pair(address) as (near, far):
            small_buffers(near, far)
            tasks = [asyncio.create_task(near.send(bytes(8 * MIB))), asyncio.create_task(near.recv_into(bytearray(1)))]
            await stuck(tasks[0])
            with pytest.raises(RuntimeError, match="two tasks send"):
                await near.send(b"x")
            with pytest.raises(RuntimeError, match="two tasks receive"):
                await near.recv_into(bytearray(1))
            near.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main())


def test_other_tasks_get_their_turn_while_a_fast_peer_keeps_us_busy(run, address):
    async def main():
        async with pair(address) as (near, far):
            turns = 0
            done = False

            async def bystander():
                nonlocal turns
                while not done:
                    turns += 1
                    await asyncio.sleep(0)

            watching = asyncio.create_task(bystander())
            for _ in range(1000):
                await near.send(b"small")
            assert turns >= 1000 // YIELD_CALLS
            before = turns
            for _ in range(1000):
                await far.recv_into(bytearray(5))
            assert turns - before >= 1000 // YIELD_CALLS
            done = True
            await watching

    run(main())


def test_a_peer_that_closes_takes_what_is_under_way_so_that_its_last_message_is_not_lost(run, address):
    async def main():
        async with pair(address) as (near, far):
            near._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
            sending = asyncio.create_task(near.send(bytes(32 * MIB)))
            await stuck(sending)
            await far.send(b"stop!")
            closing = asyncio.create_task(far.close())
            await sending  # a peer that dropped the connection would make this fail before the message is read
            said = bytearray(5)
            await near.recv_into(said)
            assert said == b"stop!"
            await near.close()
            await closing

    run(main())


def test_what_the_peer_said_can_be_read_after_sending_to_it_has_failed(run, address):
    async def main():
        async with pair(address) as (near, far):
            small_buffers(near, far)
            sending = asyncio.create_task(near.send(bytes(8 * MIB)))
            await stuck(sending)
            await far.send(b"why")
            far.abort()
            with pytest.raises(LinkLost):
                await sending
            why = bytearray(3)
            await near.recv_into(why)
            assert why == b"why"

    run(main())


def test_outstanding_falls_to_zero_once_the_peers_kernel_has_everything(run):
    async def main():
        async with pair("tcp://127.0.0.1:0") as (near, far):
            await near.send(bytes(100))
            while near.outstanding():
                await asyncio.sleep(0)
            assert near.outstanding() == 0
            small_buffers(near, far)
            sending = asyncio.create_task(near.send(bytes(32 * MIB)))
            await stuck(sending)
            assert near.outstanding() > 0
            near.abort()
            await asyncio.gather(sending, return_exceptions=True)

    run(main())


def test_both_ends_send_small_frames_at_once_and_notice_a_dead_peer(run):
    async def main():
        async with pair("tcp://127.0.0.1:0") as ends:
            for end in ends:
                assert end._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert end._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert end._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000

    run(main())


def test_a_unix_socket_does_not_know_what_is_outstanding(run, tmp_path):
    async def main():
        async with pair(f"unix:{tmp_path}/s") as (near, _far):
            assert near.outstanding() is None
            assert near.peer == f"unix:{tmp_path}/s (pid {os.getpid()})"

    run(main())


def test_the_listener_says_the_real_port_and_peers_are_named(run):
    async def main():
        async with pair("tcp://127.0.0.1:0") as (near, far):
            host, _, port = near.peer.rpartition(":")
            assert host == "tcp://127.0.0.1"
            assert int(port) > 0
            assert far.peer.startswith("tcp://127.0.0.1:")

    run(main())


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6(run):
    async def main():
        try:
            listener = await transport.listen("tcp://[::1]:0")
        except HostError as err:
            pytest.skip(f"no IPv6 loopback here: {err}")
        assert listener.address.startswith("tcp://[::1]:")
        near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
        await near.send(b"6")
        got = bytearray(1)
        await far.recv_into(got)
        assert got == b"6"
        near.abort()
        far.abort()
        await listener.close()

    run(main())


def test_names_are_resolved(run):
    async def main():
        listener = await transport.listen("tcp://127.0.0.1:0")
        port = listener.address.rpartition(":")[2]
        near, far = await asyncio.gather(transport.connect(f"tcp://localhost:{port}"), listener.accept())
        near.abort()
        far.abort()
        await listener.close()
        with pytest.raises(HostError, match="can't be resolved"):
            await transport.connect(f"tcp://{'x' * 70}.invalid:1", transport.LinkOptions(insecure=True))

    run(main())


def test_nobody_there_is_said_with_what_to_do(run, address, tmp_path):
    async def main():
        listener = await transport.listen(address)
        gone = listener.address
        await listener.close()
        with pytest.raises(LinkLost, match=r"nobody listens at .*: start `amig receive .*` there"):
            await transport.connect(gone)

    run(main())


def test_a_host_that_does_not_answer_ends_in_time(run, tmp_path):
    async def main():
        # A unix listener whose backlog is full makes connecting wait, as a host behind a silent firewall does.
        with socket.socket(socket.AF_UNIX) as deaf, contextlib.ExitStack() as stack:
            deaf.bind(str(tmp_path / "s"))
            deaf.listen(0)
            for _ in range(4):
                filler = stack.enter_context(socket.socket(socket.AF_UNIX))
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(str(tmp_path / "s"))
            with pytest.raises(LinkLost, match=r"did not answer within 0\.05 s"):
                await transport.connect(f"unix:{tmp_path}/s", timeout=0.05)

    run(main())


def test_a_taken_port_is_said(run):
    async def main():
        listener = await transport.listen("tcp://127.0.0.1:0")
        with pytest.raises(HostError, match="is taken by another program"):
            await transport.listen(listener.address)
        await listener.close()
        with pytest.raises(HostError, match="can't listen on"):
            await transport.listen("tcp://192.0.2.1:0", transport.LinkOptions(insecure=True))

    run(main())


def test_files_are_not_connected_to(run):
    async def main():
        for use in (transport.connect, transport.listen):
            with pytest.raises(UsageError, match="is a file"):
                await use("file:x")

    run(main())


def test_a_unix_socket_is_for_its_owner_and_goes_with_its_listener(run, tmp_path):
    path = tmp_path / "s"

    async def main():
        old = os.umask(0)
        try:
            listener = await transport.listen(f"unix:{path}")
        finally:
            os.umask(old)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        await listener.close()
        await listener.close()
        assert not path.exists()

    run(main())


def test_a_socket_left_behind_is_replaced_but_nothing_else_is(run, tmp_path):
    path = tmp_path / "s"

    async def main():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        first = await transport.listen(f"unix:{path}")
        with pytest.raises(HostError, match=r"somebody listens at .* already"):
            await transport.listen(f"unix:{path}")
        os.unlink(path)
        path.write_text("precious")
        with pytest.raises(HostError, match="exists and is not a socket"):
            await transport.listen(f"unix:{path}")
        await first.close()
        assert path.read_text() == "precious", "what took the socket's place is not ours to remove"
        with pytest.raises(HostError, match=r"can't listen on .*No such file"):
            await transport.listen(f"unix:{tmp_path}/no/s")

    run(main())


def test_closing_a_listener_wakes_who_accepts_and_keeps_connections(run, address):
    async def main():
        listener = await transport.listen(address)
        near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
        accepting = asyncio.create_task(listener.accept())
        await stuck(accepting)
        with pytest.raises(RuntimeError, match="two tasks accept"):
            await listener.accept()
        await listener.close()
        with pytest.raises(HostError, match="is closed"):
            await accepting
        with pytest.raises(HostError, match="is closed"):
            await listener.accept()
        await near.send(b"x")
        await far.recv_into(bytearray(1))
        near.abort()
        far.abort()

    run(main())


def test_a_cancelled_accept_loses_no_connection(run, address):
    async def main():
        listener = await transport.listen(address)
        accepting = asyncio.create_task(listener.accept())
        await stuck(accepting)
        near = await transport.connect(listener.address)
        accepting.cancel()
        ended = (await asyncio.gather(accepting, return_exceptions=True))[0]
        far = ended if isinstance(ended, SocketConnection) else await listener.accept()
        await near.send(b"x")
        await far.recv_into(bytearray(1))
        near.abort()
        far.abort()
        await listener.close()

    run(main())
