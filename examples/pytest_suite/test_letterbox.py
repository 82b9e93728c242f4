"""A suite for code that shares pages, with no Xen and no root: `pytest examples/pytest_suite`.

The fixtures are the plugin's, which comes with gntalloc. After each test they see that everything was given back.
"""

from __future__ import annotations

import pytest
from letterbox import LONGEST, Letterbox, post

import gntalloc
from gntalloc.testing import Domains, Program, faults


def test_a_letter_arrives(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with Letterbox(alice, bob.domid) as letterbox:
        post(bob, letterbox.grant, letterbox.bell.number, b"hello")
        assert letterbox.wait(timeout=30) == b"hello"


def write(domain: gntalloc.Domain, grant: str, bell: int) -> None:
    post(domain, gntalloc.Grant.parse(grant), bell, b"from another process")


def test_a_letter_of_another_process(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with Letterbox(alice, bob.domid) as letterbox, Program(bob, write, str(letterbox.grant), letterbox.bell.number):
        assert letterbox.wait(timeout=30) == b"from another process"


def test_a_writer_that_lies_about_the_length(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with (
        Letterbox(alice, bob.domid) as letterbox,
        bob.map(letterbox.grant) as mapped,
        bob.events.connect(alice.domid, letterbox.bell.number) as port,
    ):
        mapped.memory[:4] = (LONGEST + 1).to_bytes(4, "little")
        port.notify()
        with pytest.raises(ValueError, match="was announced"):
            letterbox.wait(timeout=30)


def test_no_pages_left(gntalloc_domains: Domains) -> None:
    """And then the fixture sees that the port was given back."""
    alice, bob = gntalloc_domains
    with faults.pages(alice, 0), pytest.raises(OSError, match="limit"):
        Letterbox(alice, bob.domid)
