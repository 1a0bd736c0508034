"""Finds the guest images that come with amig.

In a wheel they are ``amig/images/*.elf``; in a checkout (an editable install) ``guest/images/`` beside the package.
"""

from __future__ import annotations

import re
from pathlib import Path

from amig.errors import BootError

DEFAULT = "amig-guest"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PACKAGE = Path(__file__).resolve().parent.parent


def directories(package: Path = _PACKAGE) -> tuple[Path, Path]:
    """Where images may be, in the order in which they are looked for: packaged, then the checkout's."""
    return package / "images", package.parent / "guest" / "images"


def image_path(name: str = DEFAULT, *, package: Path = _PACKAGE) -> Path:
    """The ELF file of the image ``name`` (without ``.elf``).

    Raises BootError that says where it was looked for.
    """
    if not _NAME.fullmatch(name):
        raise BootError(f"{name!r} is not the name of a guest image (lower-case letters, digits and '-')")
    for directory in directories(package):
        path = directory / f"{name}.elf"
        if path.is_file():
            return path
    places = " and ".join(str(d) for d in directories(package))
    raise BootError(
        f"the guest image {name}.elf is neither in {places}: reinstall amig, or in a checkout run `make -C guest`"
    )


def image_names(*, package: Path = _PACKAGE) -> list[str]:
    """Names of all images that :func:`image_path` finds, sorted."""
    return sorted({path.stem for directory in directories(package) for path in directory.glob("*.elf")})
