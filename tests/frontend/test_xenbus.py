"""The states: the table, the words, and the waiting, with both ends in this process."""

from __future__ import annotations

import errno
import threading
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.frontend.conftest import DEVICE, PATIENCE

from gntalloc import DeviceError, PeerClosed, TimedOut
from gntalloc.frontend.xenbus import BACK, FRONT, TABLE, End, State, draw, may

if TYPE_CHECKING:
    from tests.frontend.conftest import Setting

DOCS = Path(__file__).parents[2] / "docs" / "frontends.md"


@pytest.fixture
def ends(setting: Setting) -> tuple[End, End]:
    setting.attach()
    return (
        End(setting.guest.store, FRONT, DEVICE.front, DEVICE.back),
        End(setting.dom0.store, BACK, DEVICE.back, DEVICE.front),
    )


def test_the_numbers_are_xens() -> None:
    assert [state.name for state in State] == [
        "UNKNOWN", "INITIALISING", "INIT_WAIT", "INITIALISED", "CONNECTED", "CLOSING", "CLOSED", "RECONFIGURING",
        "RECONFIGURED",
    ]  # fmt: skip
    assert [int(state) for state in State] == list(range(9))


def test_the_table_has_each_step_once_and_ways_out_of_every_state() -> None:
    steps = [(step.side, step.state, step.to) for step in TABLE]
    assert len(set(steps)) == len(steps)
    for side in (FRONT, BACK):
        for start in {step.state for step in TABLE if step.side == side}:
            reached = {start}
            for _ in State:
                reached |= {step.to for step in TABLE if step.side == side and step.state in reached}
            assert {State.CONNECTED, State.CLOSED} <= reached, f"a {side} is stuck after {start}"


def test_the_documentation_shows_the_table() -> None:
    assert draw() in DOCS.read_text()


def test_a_step_that_is_not_in_the_table_is_refused(ends: tuple[End, End], setting: Setting) -> None:
    for end, (state, to) in product(ends, product(list(State)[1:], repeat=2)):
        setting.dom0.store.write(f"{end.folder}/state", str(int(state)))
        if may(end.side, state, to):
            end.go(to, {"note": int(to)})
            assert end.state == to
        else:
            with pytest.raises(ValueError, match="cannot go from"):
                end.go(to, {"note": "never"})
            assert end.state == state
            assert setting.dom0.store.read(f"{end.folder}/state") == str(int(state)).encode()
    assert setting.dom0.store.read(f"{DEVICE.front}/note") != b"never"


def test_waiting_ends_when_the_other_is_there(ends: tuple[End, End]) -> None:
    front, back = ends
    later = threading.Timer(0.05, back.go, (State.INIT_WAIT,))
    later.start()
    assert front.wait({State.INIT_WAIT, State.CONNECTED}, timeout=PATIENCE) == State.INIT_WAIT
    later.join(20)


def test_waiting_in_vain_says_where_the_other_is_and_what_it_complains_of(ends: tuple[End, End]) -> None:
    front, back = ends
    with pytest.raises(TimedOut, match=r"is in state 1 \(Initialising\), where 4 \(Connected\) was waited for"):
        front.wait({State.CONNECTED}, timeout=0)
    back.complain("the image is on fire", 1)
    with pytest.raises(TimedOut, match="it says: the image is on fire"):
        front.wait({State.CONNECTED}, timeout=0)
    back.go(State.CLOSED)
    with pytest.raises(PeerClosed, match=r"state 6 \(Closed\).*on fire"):
        front.wait({State.CONNECTED}, timeout=PATIENCE, unless={State.CLOSED})
    back.forget_complaint()
    assert front.complaint() is None


def test_a_device_that_is_detached_is_gone_for_both(ends: tuple[End, End], setting: Setting) -> None:
    front, back = ends
    setting.detach()
    assert front.peer == front.state == State.UNKNOWN
    with pytest.raises(PeerClosed, match="gone from xenstore"):
        front.wait({State.CONNECTED}, timeout=PATIENCE)
    with pytest.raises(DeviceError, match="detached") as caught:
        back.go(State.CLOSED)
    assert caught.value.errno == errno.ENODEV
    assert not setting.dom0.store.exists(DEVICE.back)


@pytest.mark.parametrize("value", ["", "9", "-1", "4 ", "four", "0004", "\xff", "4\0"])
def test_what_is_no_state_is_unknown(ends: tuple[End, End], setting: Setting, value: str) -> None:
    setting.guest.store.write(f"{DEVICE.front}/state", value)
    assert ends[1].peer == State.UNKNOWN


@pytest.mark.parametrize(
    ("value", "number"), [("7", 7), ("007", 7), ("-7", 5), ("", 5), ("1e3", 5), ("9" * 30, 5), ("101", 5), ("²", 5)]
)
def test_what_is_no_number_is_not_there(ends: tuple[End, End], setting: Setting, value: str, number: int) -> None:
    setting.guest.store.write(f"{DEVICE.front}/something", value)
    assert ends[1].number("something", 5, most=100) == number
