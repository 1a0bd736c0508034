"""Kernel images and archives made by hand, for the tests of the loaders."""

import struct

LOAD, NOTE = 1, 4


def note(name, kind, desc, align=4):
    def pad(b):
        return b + bytes(-len(b) % align)

    return pad(pad(struct.pack("<III", len(name) + 1, len(desc), kind) + name + b"\0") + desc)


def pvh_note(entry):
    return note(b"Xen", 18, struct.pack("<I", entry))


def amig_note(ap_entry, *, abi=1, max_cpus=64):
    return note(b"amig", 1, struct.pack("<4I", abi, ap_entry, 0x10000, max_cpus))


def elf_file(*headers, bits=64, machine=62, entry=0x100000):
    """An ELF file of ``(type, paddr, memsz, align, content)`` program headers."""
    wide = bits == 64
    head = 64 if wide else 52
    size = 56 if wide else 32
    at = head + size * len(headers)
    table, body = b"", b""
    for kind, paddr, memsz, align, content in headers:
        if wide:
            table += struct.pack("<IIQQQQQQ", kind, 7, at, paddr, paddr, len(content), memsz, align)
        else:
            table += struct.pack("<IIIIIIII", kind, at, paddr, paddr, len(content), memsz, 7, align)
        body += content
        at += len(content)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    shape = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    return (
        ident + struct.pack(shape, 2, machine, 1, entry, head, 0, 0, head, size, len(headers), 0, 0, 0) + table + body
    )


def bzimage(*, version=0x020F, xloadflags=1, sectors=1, header_end=0x26C, preferred=16 << 20, init_size=1 << 20,
            alignment=1 << 21, relocatable=1, cmdline_max=100, initrd_max=0x7FFFFFFF, payload=b"kernel"):  # fmt: skip
    """The parts of a bzImage that a loader looks at."""
    head = bytearray(512 * (1 + (sectors or 4)))
    head[0x1F1] = sectors
    head[0x201] = header_end - 0x202
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<I", head, 0x22C, initrd_max)
    struct.pack_into("<IB", head, 0x230, alignment, relocatable)
    struct.pack_into("<HI", head, 0x236, xloadflags, cmdline_max)
    struct.pack_into("<QI", head, 0x258, preferred, init_size)
    return bytes(head) + payload.ljust(0x201, b"\0")


def cpio(files):
    """A newc archive of ``{name: (mode, content)}``; a device node's content is (major, minor)."""
    out = bytearray()
    for inode, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], start=1):
        major, minor = content if isinstance(content, tuple) else (0, 0)
        data = b"" if isinstance(content, tuple) else content
        path = name.encode() + b"\0"
        fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(path), 0]
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + path
        out += bytes(-len(out) % 4)
        out += data
        out += bytes(-len(out) % 4)
    return bytes(out)
