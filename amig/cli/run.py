"""``amig run``: hosts a guest from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.cli.workload import WORKLOADS, words
from amig.errors import KvmUnavailable, UsageError
from amig.units import format_size

if TYPE_CHECKING:
    from amig.cli.hosting import Host
    from amig.host.service import HostService

_KERNEL = "Kernel"
_WORKLOAD = "Workload"
_HOST = options.HOST_PANEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be run."""

    memory: int
    vcpus: int
    kernel: Path | None
    initrd: Path | None
    append: str
    restore: str
    hugepages: bool
    cpu: str
    paused: bool
    engine: options.Engine
    dirty_ring: int
    initially_set: bool


@command(
    "amig run web1 --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0' --memory 2GiB --serial stdio",
    "amig run t1 --workload check --memory 512MiB --working-set 256MiB --rate 200MB/s --detach",
    "amig run t1 --workload random --dirty-ring 4096",
    "amig run t1 --restore file:t1.snapshot --serial file:t1.log",
    "amig run t1 --workload random --engine simulator        # where there is no KVM",
)
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the guest is called on this machine.")],
    kernel: Annotated[
        Path | None,
        typer.Option("--kernel", metavar="IMAGE", help="A PVH ELF image or a bzImage.", rich_help_panel=_KERNEL),
    ] = None,
    append: Annotated[
        str, typer.Option("--append", metavar="WORDS", help="The kernel's command line.", rich_help_panel=_KERNEL)
    ] = "",
    initrd: Annotated[
        Path | None,
        typer.Option("--initrd", metavar="FILE", help="The initial RAM disk (Linux).", rich_help_panel=_KERNEL),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            metavar="W",
            help=f"Run amig's own guest image: {', '.join(WORKLOADS)}.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    working_set: Annotated[
        str | None,
        typer.Option("--working-set", metavar="SIZE", help="What it works on.", rich_help_panel=_WORKLOAD),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="RATE", help="How fast it writes, all vCPUs.", rich_help_panel=_WORKLOAD),
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(
            "--write", metavar="byte|page", help="One byte of a page, or all of it.", rich_help_panel=_WORKLOAD
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            "--fill",
            metavar="KIND",
            help="Content before it starts: none, zero, const, text, random, mixed.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    hot: Annotated[
        str | None,
        typer.Option(
            "--hot", metavar="W:P", help="hotspot: W % of writes go to P % of pages.", rich_help_panel=_WORKLOAD
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of its random sequences.", rich_help_panel=_WORKLOAD)
    ] = None,
    restore: Annotated[
        str | None, typer.Option("--restore", metavar="file:PATH", help="Run a snapshot instead of a kernel.")
    ] = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Guest memory.")] = "512MiB",
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=64, help="Virtual processors.")] = 1,
    serial: options.Serial = "none",
    cpu: Annotated[
        str, typer.Option("--cpu", metavar="MODEL", help="host, or host,-feature,-feature to hide some.")
    ] = "host",
    hugepages: options.HugePages = False,
    paused: Annotated[bool, typer.Option("--paused", help="Don't start it; amig resume does.")] = False,
    engine: Annotated[options.Engine, typer.Option("--engine", help="What runs the guest.")] = options.Engine.KVM,
    dirty_ring: options.DirtyRing = None,
    initially_set: Annotated[
        bool,
        typer.Option(
            "--initially-set/--no-initially-set",
            help="Let a dirty log start with all pages set, where KVM can do that.",
            rich_help_panel=_HOST,
        ),
    ] = True,
    detach: options.Detach = False,
    json: options.Json = False,
    lifeline: options.Lifeline = False,
) -> None:
    """Run a guest and host it until it ends or has moved away.

    Stays in the foreground (Ctrl-C ends the guest) unless --detach. Ends with 0 when the guest switched itself off, was
    stopped, or has moved to another host.

    What the words of --workload mean, and more of them for --append, is in guest/README.md.
    """
    from amig.cli.hosting import Host, is_detached, serial_choice
    from amig.cli.hosting import detach as start
    from amig.cli.loop import run as run_loop

    if sum((kernel is not None, workload is not None, restore is not None)) != 1:
        raise UsageError("say what to run: one of --kernel IMAGE, --workload W and --restore file:PATH")
    details = {
        "working_set": working_set, "rate": rate, "write": write, "fill": fill, "hot": hot, "seed": seed
    }  # fmt: skip
    if workload is None and any(value is not None for value in details.values()):
        raise UsageError("--working-set, --rate, --write, --fill, --hot and --seed belong to --workload")
    if engine is options.Engine.SIMULATOR and kernel is not None:
        raise UsageError("the simulator runs no kernel: use --workload")
    if dirty_ring is not None and (engine is options.Engine.SIMULATOR or restore is not None):
        raise UsageError("--dirty-ring goes with a guest that is booted on KVM")
    if restore is not None and (append or initrd or paused):
        raise UsageError("--append, --initrd and --paused don't go with --restore: the guest goes on where it was")
    if workload is not None:
        own = words(workload, working_set=working_set, rate=rate, write=write, fill=fill, hot=hot, seed=seed)
        append = f"{own} {append}".strip()
    request = Request(
        memory=options.size("--memory", memory),
        vcpus=vcpus,
        kernel=kernel,
        initrd=initrd,
        append=append,
        restore=restore or "",
        hugepages=hugepages,
        cpu=cpu,
        paused=paused,
        engine=engine,
        dirty_ring=options.ring_bytes(dirty_ring) if dirty_ring is not None else 0,
        initially_set=initially_set,
    )
    choice = serial_choice(serial, json=json, detach=detach, lifeline=lifeline)
    if restore is not None and not is_detached():
        say.warn(
            "a snapshot is a clone: if the guest that was saved still runs, there are two of it from now on, with the "
            "same addresses and the same secrets"
        )
    if detach and not is_detached():
        ready = start(name)
        if json:
            say.json_line({"event": "running", "name": name, "pid": ready.pid, **ready.info})
        else:
            say.result(ready.info.get("text", name))
        return
    link = options.link(insecure=False, cert=None, key=None, ca=None)
    code = run_loop(_host(Host(name, choice, json=json, lifeline=lifeline, link=link), request))
    raise typer.Exit(code)


async def _host(host: Host, request: Request) -> int:
    from amig.host.service import HostService

    async def body() -> int:
        await host.ask_first()
        async with HostService(host.name, sinks=host.sinks) as service, host.keys(service):
            await _start(service, request)
            _announce(host, service, request)
            ended = await host.until_end(service)
        return host.last_word(ended)

    return await host.run(body)


async def _start(service: HostService, request: Request) -> None:
    sink = service.console.write
    if request.restore:
        from amig.session.reception import restore_here
        from amig.transport.address import FileAddress, parse

        address = parse(request.restore)
        if not isinstance(address, FileAddress):
            raise UsageError(f"--restore {request.restore}: a snapshot is a file, write file:PATH")
        await restore_here(service, address.path, hugepages=request.hugepages)
    elif request.engine is options.Engine.SIMULATOR:
        from amig.sim.guest import SimMachine
        from amig.sim.options import SimOptions

        simulated = SimOptions.parse(request.append, vcpus=request.vcpus)
        make = partial(SimMachine.boot, hugepages=request.hugepages, serial=sink)
        await service.start(await service.build(make, request.memory, simulated), paused=request.paused)
    else:
        from amig.host.boot import BootConfig
        from amig.host.images import image_path
        from amig.host.kvm_machine import KvmMachine, MachineConfig

        config = MachineConfig(
            memory=request.memory,
            vcpus=request.vcpus,
            hugepages=request.hugepages,
            cpu=request.cpu,
            dirty_ring=request.dirty_ring,
            initially_set=request.initially_set,
        )
        boot = BootConfig(kernel=request.kernel or image_path(), append=request.append, initrd=request.initrd)
        try:
            machine = await service.build(partial(KvmMachine.boot, sink=sink), config, boot)
        except KvmUnavailable as error:
            how = "" if request.kernel else "; or go on without it: --engine simulator"
            raise KvmUnavailable(f"{error}{how}", request=error.request, errno=error.errno) from error
        await service.start(machine, paused=request.paused)


def _announce(host: Host, service: HostService, request: Request) -> None:
    machine = service.hosted.machine
    name, how = host.name, "is paused" if request.paused else "runs"
    vcpus = f"{machine.vcpus} vCPU" + ("s" if machine.vcpus > 1 else "")
    engine = "KVM" if machine.engine == "kvm" else "the simulator"
    text = "\n".join(
        (
            f"{name} {how} on {engine}: {format_size(machine.memory.map.size)}, {vcpus}",
            f"  control socket {service.socket_path}",
            f"  amig status {name} | console {name} | migrate {name} DST | stop {name}",
            *(("  Ctrl-] ends it",) if host.interactive else ()),
        )
    )
    info = {"engine": machine.engine, "socket": str(service.socket_path)}
    host.say(text, {"event": "running", "name": name, **info})
    host.is_up(text=text, **info)
