"""The same properties, at random and with everything: several slots, an alias, unaligned ranges, up to three users."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from amig import bitmap
from tests.test_dirty_hub_stateful import ABILITIES, PAGES, Reader, World, hot_pages, spans


class Exact(World):
    """`World`, where the first user is a migration that must not be sent anything without a reason."""

    strategy = "exact"

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.due = np.ones(PAGES, np.bool_)

    @rule(page=hot_pages, through_alias=st.booleans())
    def guest_writes(self, page: int, through_alias: bool) -> None:
        super().guest_writes(page, through_alias)
        self.due[page] = True

    @precondition(lambda self: self.unmarked)
    @rule()
    def another_source_marks(self) -> None:
        """A mark that comes late is a reason, too."""
        self.due[self.unmarked[0]] = True
        super().another_source_marks()

    @rule(which=st.integers(0, 2), span=spans)
    def takes(self, which: int, span: tuple[int, int]) -> None:
        super().takes(which, span)
        if self.reader(which) is self.readers[0]:
            first, words = self.readers[0].taken[-1]
            pages = bitmap.to_pages(words, first)
            assert self.due[pages].all(), f"needless: {pages[~self.due[pages]]}"
            self.due[pages] = False

    @rule(which=st.integers(0, 2))
    def gives_back(self, which: int) -> None:
        reader = self.reader(which)
        if reader is self.readers[0]:
            for first, words in reader.taken:
                self.due[bitmap.to_pages(words, first)] = True
        super().gives_back(which)

    @rule()
    def the_alias_comes_or_goes(self) -> None:
        super().the_alias_comes_or_goes()
        self.due[:] = True

    @rule()
    def the_last_slot_is_replaced(self) -> None:
        super().the_last_slot_is_replaced()
        self.due[:] = True


class Changing(Exact):
    """Migrations come to a log that others have switched on, and go; the design changes with them."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.readers.pop(0).user.close()
        self.readers.insert(0, Reader(self.hub.open("meter")))
        self.due[:] = True

    @precondition(lambda self: True)
    @rule(name=st.sampled_from(["exact", "slot-cache"]))
    def another_migration(self, name: str) -> None:
        self.readers[0].user.close()
        self.readers[0] = Reader(self.hub.open("migration", name))
        assert self.hub.strategy == name
        self.due[:] = True

    @rule(which=st.integers(0, 2), span=spans)
    def takes(self, which: int, span: tuple[int, int]) -> None:
        if not self.hub.users or not any(user.exact for user in self.hub.users):
            self.due[:] = True  # nobody is exact: copies may be needless
        super().takes(which, span)


@pytest.mark.parametrize("abilities", ["ones first", "zeros first"])
@pytest.mark.parametrize("kind", [Exact, Changing])
def test_exact_sends_nothing_needlessly_and_nobody_misses_a_write(kind: type[Exact], abilities: str) -> None:
    machine = type("Machine", (kind,), {"abilities": ABILITIES[abilities]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_the_machine_notices_a_needless_copy() -> None:
    """Page 0, written by another source and by the guest: `slot-cache` can't clear it."""

    def run(strategy: str) -> None:
        machine = type("Machine", (Exact,), {"abilities": ABILITIES["ones first"], "strategy": strategy})()
        machine.begin()
        machine.takes(0, (0, PAGES))
        machine.another_source_writes(0)
        machine.another_source_marks()
        machine.guest_writes(0, False)
        machine.takes(0, (0, PAGES))
        machine.syncs(0)
        machine.takes(0, (0, PAGES))
        machine.teardown()

    run("exact")
    with pytest.raises(AssertionError, match=r"needless: \[0\]"):
        run("slot-cache")
