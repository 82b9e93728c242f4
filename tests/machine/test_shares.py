"""Shares: what one domain takes of the machine's descriptors, another finds enough of."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest

from gntalloc.errors import DeviceError
from gntalloc.machine.quotas import Pool, Share

PATIENCE = 60


def take_all(share: Share) -> int:
    """Takes one after the other until there is no more: how many it has then."""
    while share.left > 0:
        share.take(1, errno.ENFILE, "a file")
    with pytest.raises(DeviceError, match="has its share of them") as caught:
        share.take(1, errno.ENFILE, "a file")
    assert caught.value.errno == errno.ENFILE
    return share.taken


def test_one_domain_gets_a_third() -> None:
    pool = Pool("descriptors", 300, "close some")
    assert take_all(Share(pool, 1, 1)) == 100
    assert pool.taken == 100


@pytest.mark.parametrize("domains", [2, 5, 50])
def test_the_domains_of_a_user_get_half_together_and_another_user_a_quarter(domains: int) -> None:
    pool = Pool("descriptors", 1200, "close some")
    for number in range(domains):
        take_all(Share(pool, 1, number))
    assert pool.taken <= 600
    late = Share(pool, 1, 1000)
    assert take_all(late) >= 1 or domains > 8
    assert take_all(Share(pool, 2, 2000)) >= 1200 // 6


def test_a_domain_that_comes_later_finds_some() -> None:
    pool = Pool("descriptors", 1000, "close some")
    assert all(take_all(Share(pool, number, number)) for number in range(7))


def test_what_is_given_back_can_be_taken_again() -> None:
    pool = Pool("descriptors", 300, "close some")
    share = Share(pool, 1, 1)
    take_all(share)
    share.give(10)
    assert share.left == 30  # each that it takes leaves two less: one for its user and one for all
    assert take_all(share) == 100
    with pytest.raises(DeviceError):
        share.take(2, errno.ENOMEM, "more")
    assert (share.taken, pool.taken) == (100, 100)  # nothing was taken of what was refused


PROGRAM = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))
import gntalloc
from gntalloc.errors import DeviceError, GntallocError
machine = gntalloc.Machine()
greedy, neighbour = machine.domain(1), machine.domain(2)
held, said = [], ""
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(PATH)
    from gntalloc.wire.messages import Hello, VERSION, frame
    try:
        sock.sendall(frame(Hello(VERSION), 1))
    except BrokenPipeError:  # it was refused already, and the answer says why
        pass
    answer = sock.recv(4096)
    held.append(sock)
    if b"share of them" in answer:
        raise DeviceError(24, answer.decode(errors="replace"))
ways = {
    "files": lambda: held.append(greedy.devices.open("gntdev")),
    "pages": lambda: held.append(greedy.share(2)),
    "connections": connect,
}
PATH = greedy.address
try:
    for _ in range(MOST):
        ways[sys.argv[1]]()
except OSError as error:
    said = f"{error.errno} {error}"
except GntallocError as error:
    said = str(error)
print(said.replace("\\n", " "))
neighbour.devices.open("evtchn").close()
with neighbour.share(1) as segment:
    print("the neighbour goes on", segment.held)
for each in held:
    each.close()
with greedy.share(2):
    print("and so it does itself")
machine.close()
"""


@pytest.mark.parametrize(
    ("way", "why"),
    [("files", errno.ENFILE), ("pages", errno.ENOMEM), ("connections", errno.EMFILE)],
)
def test_a_greedy_domain_is_refused_and_its_neighbour_is_not(way: str, why: int) -> None:
    """The limit is the machine's and the program's: a program of few descriptors beside a machine of few."""
    program = textwrap.dedent(PROGRAM).replace("MOST", "500")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, way],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, *rest = done.stdout.splitlines()
    assert said.startswith(str(why)), said
    assert "of the machine's 436 descriptors" in said
    assert rest == ["the neighbour goes on False", "and so it does itself"]
