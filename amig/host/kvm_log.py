"""KVM's dirty bitmap as `amig.dirty.log.KernelLog`."""

from __future__ import annotations

from amig.dirty.log import LogAbilities
from amig.errors import KvmUnavailable, UsageError
from amig.kvm.abi_numbers import Cap, ManualProtect
from amig.kvm.vm import Vm
from amig.memory import Words


class KvmLog:
    """GET and CLEAR of a VM's slots; calls are serialised by the hub.

    Whether GET clears is a switch of the whole VM, so it is set when the first slot starts to log. ``initially_set``
    asks for logs that start all ones, where the kernel can do that (Linux 5.7). Starting is then quick, nothing is
    write-protected until it is cleared, and a page that is written before it was first sent is sent once: its bit is
    in the log, and so cleared by the take that comes before the read. Without it such a page is sent twice, except by
    the `exact` design.
    """

    def __init__(self, vm: Vm, *, initially_set: bool = True) -> None:
        self._vm = vm
        offered = ManualProtect(vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 3)
        manual = bool(offered & ManualProtect.ENABLE)
        self.abilities = LogAbilities(
            manual_clear=manual,
            initially_set=manual and initially_set and bool(offered & ManualProtect.INITIALLY_SET),
        )
        self._logging: set[int] = set()
        self._manual = False

    @property
    def logging(self) -> frozenset[int]:
        """The slots whose log is on."""
        return frozenset(self._logging)

    def start(self, slot: int, *, manual: bool) -> None:
        """Switch logging on; raises `UsageError` when other slots log the other way.

        `KvmUnavailable` when ``manual`` was asked for and this kernel lacks it.
        """
        self._logging &= set(self._vm.regions)  # a slot that was deleted took its log with it
        if not self._logging:
            self._choose(manual=manual)
        elif manual != self._manual:
            raise UsageError("all slots of a VM must be logged in the same way")
        self._vm.set_dirty_logging(slot, True)
        self._logging.add(slot)

    def stop(self, slot: int) -> None:
        """Switch logging off; nothing to do when it is off, or the VM closed."""
        if slot in self._logging:
            if not self._vm.closed:
                self._vm.set_dirty_logging(slot, False)
            self._logging.discard(slot)

    def get(self, slot: int, out: Words) -> None:
        """Fill ``out`` with the slot's dirty bits (KVM api.rst 4.8); raises `KvmError` when it isn't logged."""
        self._vm.get_dirty_log(slot, out)

    def clear(self, slot: int, first: int, count: int, words: Words) -> None:
        """Clear and write-protect the pages whose bits are set (KVM api.rst 4.117)."""
        self._vm.clear_dirty_log(slot, first, count, words)

    def _choose(self, *, manual: bool) -> None:
        if manual:
            if not self.abilities.manual_clear:
                raise KvmUnavailable("this KVM can't clear chosen pages (Linux 5.2): use the auto-clear strategy")
            self._vm.enable_manual_protect(initially_set=self.abilities.initially_set)
        elif self.abilities.manual_clear:
            self._vm.disable_manual_protect()
        self._manual = manual
