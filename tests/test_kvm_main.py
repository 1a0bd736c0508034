"""``python -m amig.kvm``: what the gate prints, and fails by."""

from __future__ import annotations

import pytest

from amig.errors import KvmUnavailable
from amig.kvm import __main__ as command


@pytest.mark.kvm
def test_it_says_what_kvm_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main() == 0
    assert "manual dirty-log protect: " in capsys.readouterr().out


def test_an_unusable_kvm_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise KvmUnavailable("there is no /dev/kvm")

    monkeypatch.setattr(command.Kvm, "open", refuse)
    assert command.main() == KvmUnavailable.exit_code
    assert "no /dev/kvm" in capsys.readouterr().err
