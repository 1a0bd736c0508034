"""Every error that amig raises, and the exit code that belongs to it.

::

    AmigError                       1   anything that went wrong and has no better name
    ├── UsageError                  2   the caller asked for something that makes no sense
    ├── KvmError                   10   an ioctl failed: names the request, the errno and the remedy
    │   └── KvmUnavailable         11   no /dev/kvm, no permission, or a capability is missing
    ├── GuestError                 20   the guest stopped in a way it can't go on from
    │   └── BootError              21   the kernel image can't be booted
    ├── HostError                  30   a guest host can't be started, found or reached
    │   ├── NameTaken              31   another host of that name lives
    │   ├── NoSuchGuest            32   no host of that name
    │   └── ControlError           33   the guest protocol was broken, or the other side refused
    ├── MigrationError             40   the migration failed; the source runs on unless the text says otherwise
    │   ├── Refused                41   the peer said no at the handshake, with its reason
    │   ├── PeerError              42   the peer broke the wire protocol
    │   ├── LinkLost               43   the connection ended before the migration did
    │   ├── NotConverging          44   the time limit was reached and `--on-timeout cancel` was asked for
    │   ├── VerifyFailed           45   the destination's memory or state is not what was sent
    │   ├── InDoubt                46   the answer to COMMIT was lost: the text says which side may run
    │   └── Untrusted              47   one side did not prove to be who it should be: certificate, pairing secret
    ├── SnapshotError              50   a snapshot file can't be written or read
    └── Cancelled                 130   the migration was cancelled; the source runs on

Exit codes are part of the command line's interface and do not change between releases.
"""

from __future__ import annotations


class AmigError(Exception):
    """Root of all errors of amig; its text says what happened and what to do."""

    exit_code: int = 1


class UsageError(AmigError):
    """The caller asked for something that makes no sense."""

    exit_code = 2


class KvmError(AmigError):
    """An ioctl on a KVM descriptor failed.

    ``request`` is the name of the ioctl (``"KVM_SET_TSS_ADDR"``), ``errno`` what the kernel said.
    """

    exit_code = 10

    def __init__(self, message: str, *, request: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.request = request
        self.errno = errno


class KvmUnavailable(KvmError):
    """No usable KVM here: no device, no permission, or a capability that amig needs is missing."""

    exit_code = 11


class GuestError(AmigError):
    """The guest stopped in a way it can't go on from (triple fault, internal error of KVM)."""

    exit_code = 20


class BootError(GuestError):
    """The kernel image can't be booted: not an image we know, or it does not fit the guest's memory."""

    exit_code = 21


class HostError(AmigError):
    """A guest host can't be started, found or reached."""

    exit_code = 30


class NameTaken(HostError):
    """A host with this name is alive."""

    exit_code = 31


class NoSuchGuest(HostError):
    """No host has this name, or the one that had it is gone."""

    exit_code = 32


class ControlError(HostError):
    """The guest protocol was broken, or the host refused the request.

    ``code`` is the host's word for the reason (``"busy"``, ``"stale-generation"``, ...; see docs/guest-protocol.md).
    """

    exit_code = 33

    def __init__(self, message: str, *, code: str = "error") -> None:
        super().__init__(message)
        self.code = code


class MigrationError(AmigError):
    """The migration failed; the source guest runs on unless the text says otherwise."""

    exit_code = 40


class Refused(MigrationError):
    """The peer said no at the handshake; its reason is the text."""

    exit_code = 41


class PeerError(MigrationError):
    """The peer broke the wire protocol: a frame that is malformed, too large, or not allowed in this state."""

    exit_code = 42


class LinkLost(MigrationError):
    """The connection to the peer ended before the migration did."""

    exit_code = 43


class NotConverging(MigrationError):
    """The time limit was reached before the remaining pages fitted the downtime limit."""

    exit_code = 44


class VerifyFailed(MigrationError):
    """The destination's memory or device state is not what the source sent."""

    exit_code = 45


class InDoubt(MigrationError):
    """COMMIT was sent and its answer was lost; the text says which side may run and how to resolve it."""

    exit_code = 46


class Untrusted(MigrationError):
    """One side did not prove to be who it should be, so nothing was sent or taken; trying again does not help."""

    exit_code = 47


class SnapshotError(AmigError):
    """A snapshot file can't be written, or what was read is not a snapshot."""

    exit_code = 50


class Cancelled(AmigError):
    """The migration was cancelled before COMMIT; the source guest runs on."""

    exit_code = 130
