"""C programs of Xen's own libraries share pages, without Xen, and cannot tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runs import said, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from runs import Runs

    Build = Callable[..., str]


def test_one_shares_a_page_and_another_maps_it(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("share"), "2", "1", "1", "hello")
    (ref,) = said(granter).split()
    mapped = runs(2, build("map"), "1", "1", ref)
    assert (mapped.returncode, mapped.stdout, mapped.stderr) == (0, "hello 0\n", "")
    tell(granter, "?")
    assert said(granter) == "answer"
    granter.communicate(timeout=20)
    assert granter.returncode == 0


def test_many_pages_in_any_order_and_more_than_once(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("share"), "2", "8", "1", "page")
    refs = said(granter).split()
    order = [*reversed(refs), refs[3], refs[3]]
    mapped = runs(2, build("map"), "1", "0", *order)
    assert mapped.stdout.splitlines() == [f"page {refs.index(ref)}" for ref in order]


def test_a_peer_that_was_not_meant_maps_nothing(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("share"), "2", "1", "1", "secret")
    (ref,) = said(granter).split()
    mapped = runs(3, build("map"), "1", "0", ref)
    assert mapped.returncode == 1
    assert "Invalid argument" in mapped.stderr


def test_read_only_is_read_only(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("share"), "2", "1", "0", "look")
    (ref,) = said(granter).split()
    assert runs(2, build("map"), "1", "1", ref).returncode == 1
    assert runs(2, build("map"), "1", "0", ref).stdout == "look 0\n"
