"""Channels on a real Xen, between a guest and dom0: ours against the stock C library, against Debian's proxy, and ours.

Every byte is compared where it arrives. GNTALLOC_LAB=1 runs it; GNTALLOC_LAB=all tries every placement of the rings in
every pair of domains, where otherwise each is tried in one of them.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import compiled
import pytest

if TYPE_CHECKING:
    from gntalloc.lab import Session

pytestmark = [
    pytest.mark.skipif(not os.environ.get("GNTALLOC_LAB"), reason="boots a real Xen: set GNTALLOC_LAB=1"),
    pytest.mark.timeout(900),
]

HERE = Path(__file__).parent / "vchan"
PEER, PROXY = ["python3", "peer.py"], ["python3", "proxy.py"]
OURS = "ours"

# What a server asks for to read and to write, and the orders of the rings that it gets.
PLACEMENTS = {
    "10/11": (1024, 1024),
    "11/10": (2048, 1024),
    "11/12": (2048, 2048),
    "12/11": (4096, 1),
    "11/20": (1, 1 << 20),
    **{f"{order}/{order}": (1 << order, 1 << order) for order in range(12, 21)},
}


class Case(NamedTuple):
    """See vchan/peer.py. `server` is who has that role, in words of the test: ours or other."""

    server: str
    sizes: tuple[int, int]
    mode: str
    amount: int
    who: str

    def for_end(self, end: str, path: str) -> str:
        role = "server" if end == self.server else "client"
        return f"{role},{path},{self.sizes[0]},{self.sizes[1]},{self.mode},{self.amount},{self.who}"

    def mine(self, end: str) -> bool:
        """Whether this end is the one that the case says WHO of."""
        return (self.who == "server") == (end == self.server)


def placements() -> list[Case]:
    """Each placement with either as the server, and each way to move bytes, in turn."""
    modes = itertools.cycle(["turns", "both", "packets"])
    whose = itertools.cycle(["server", "server", "client", "client"])
    found = []
    for (read, write), server in itertools.product(PLACEMENTS.values(), (OURS, "other")):
        count = 12_345 if min(read, write) < 4096 else 150_001 if max(read, write) < 1 << 16 else 2_500_003
        found.append(Case(server, (read, write), next(modes), count, next(whose)))
    return found


def endings() -> list[Case]:
    """Either closes, or is killed while the other reads, or writes."""
    every = itertools.product(("closing", "killed", "stalled"), (OURS, "other"), ("server", "client"))
    return [Case(server, (4096, 4096), mode, 10_000, who) for mode, server, who in every]


PAIRS = list(itertools.product(("pv", "pvh"), ("guest", "dom0")))
IDS = [f"{guest}, ours in {where}" for guest, where in PAIRS]


def share_of(cases: list[Case], pair: int) -> list[Case]:
    """What of them this pair of domains tries: no two pairs the same, and together all of it."""
    everything = os.environ["GNTALLOC_LAB"] == "all"
    return [case for number, case in enumerate(cases) if everything or (number + number // 4) % 4 == pair]


def expected(case: Case, end: str, *, extended: bool) -> list[str]:
    """What an end has to print, if it is one of ours; peer.c says less of how the other ended."""
    if case.mode in {"closing", "killed", "stalled"}:
        if case.mine(end):
            return []
        if end != OURS:
            return [f"{case.mode} gone" if case.mode == "stalled" else f"{case.mode} {case.amount} gone"]
        died = extended and case.mode != "closing"
        ends = ["PeerDied", "PeerDied"] if died else ["end", "PeerClosed"]
        return [f"{case.mode} {ends[1]}" if case.mode == "stalled" else " ".join([case.mode, str(case.amount), *ends])]
    return [f"{case.mode} {case.amount} {case.amount}"]


@pytest.fixture(scope="module")
def lab(xen: Session) -> Session:
    for domain in ("dom0", "pv", "pvh"):
        xen.put([HERE / f"{name}.py" for name in ("peer", "proxy", "events")], domain)
    return xen


@pytest.fixture(scope="module")
def peer_in_c(lab: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None or not Path("/usr/include/libxenvchan.h").exists():
        pytest.skip("the C library's peer is compiled here (apt install gcc libc6-dev libxen-dev)")
    return compiled.peer(lab, tmp_path_factory.mktemp("peer"))


_paths = itertools.count()


def play(lab: Session, guest: str, where: str, other: list[str], cases: list[Case]) -> dict[str, list[str]]:
    """Ours in `where`, which is the guest or dom0, and the other one opposite: what each printed."""
    domains = {OURS: guest, "other": "dom0"} if where == "guest" else {OURS: "dom0", "other": guest}
    number = {end: str(lab.domid(domain)) for end, domain in domains.items()}
    opposite = {OURS: "other", "other": OURS}
    paths = [
        f"/local/domain/{number[case.server]}/data/vchan/{number[opposite[case.server]]}/t{next(_paths)}"
        for case in cases
    ]
    commands = {
        domains[end]: [
            *(PEER if end == OURS else other), "some-bytes", number[opposite[end]],
            *(case.for_end(end, path) for case, path in zip(cases, paths, strict=True)),
        ]
        for end in domains
    }  # fmt: skip
    outcomes = lab.run_together(commands, timeout=600)
    said = {domain: outcome.output + outcome.errors for domain, outcome in outcomes.items()}
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}, said
    return {end: outcomes[domain].output.splitlines() for end, domain in domains.items()}


def check(printed: dict[str, list[str]], cases: list[Case], *, extended: bool = False) -> None:
    for end, lines in printed.items():
        names = end if not extended else OURS
        assert lines == [
            line
            for case in cases
            for line in expected(case if end == names else _seen_from(case), names, extended=extended)
        ]


def _seen_from(case: Case) -> Case:
    """The same for the other end, when both are ours."""
    return case._replace(server="other" if case.server == OURS else OURS)


@pytest.mark.parametrize("pair", range(4), ids=IDS)
def test_with_the_c_library(lab: Session, peer_in_c: Path, pair: int) -> None:
    """Every placement with either of them as the server; closes and SIGKILLs of either."""
    guest, where = PAIRS[pair]
    lab.put([peer_in_c], "dom0" if where == "guest" else guest)
    cases = [*share_of(placements(), pair), *share_of(endings(), pair)]
    check(play(lab, guest, where, ["./peer"], cases), cases)


@pytest.mark.parametrize("guest", ["pv", "pvh"])
def test_between_two_of_our_own(lab: Session, guest: str) -> None:
    """Bytes, half-closes with whole messages, a ring beyond libxenvchan's, and deaths that are not taken for closes."""
    large = (1 << 21, 4096)
    cases = [
        Case(OURS, (65536, 65536), "both", 300_000, "server"),
        Case(OURS, (1024, 1024), "closing", 5_000, "server"),
        Case("other", (65536, 65536), "killed", 200_000, "client"),
        Case(OURS, (4096, 4096), "killed", 10_000, "server"),
        Case("other", (4096, 4096), "stalled", 10_000, "server"),
    ]
    check(play(lab, guest, "guest", PEER, cases), cases, extended=True)
    talks = [Case("other", (65536, 65536), "messages", 20, "client"), Case(OURS, large, "messages", 8, "server")]
    for lines in zip(*play(lab, guest, "guest", PEER, talks).values(), strict=True):
        (_, sent, received), (_, other_sent, other_received) = (line.split() for line in lines)
        assert (sent, received) == (other_received, other_sent)


def test_with_asyncio(lab: Session) -> None:
    cases = [Case(OURS, (4096, 4096), "awaiting", 100_000, "server")]
    check(play(lab, "pvh", "guest", PEER, cases), cases, extended=True)


@pytest.mark.parametrize(("guest", "where"), [("pv", "guest"), ("pvh", "dom0")])
def test_with_the_proxy_of_debian(lab: Session, guest: str, where: str) -> None:
    cases = [
        Case(OURS, (65536, 65536), "turns", 300_000, "server"),
        Case("other", (1024, 1024), "turns", 20_000, "server"),
        Case(OURS, (4096, 4096), "turns", 50_000, "client"),
    ]
    check(play(lab, guest, where, PROXY, cases), cases)


def test_cat_moves_a_tree_one_way_and_a_file_the_other(lab: Session) -> None:
    pv = lab.domid("pv")
    lab.run(["cp", "-a", "/usr/lib/python3.11/email", "tree"], "pv")
    outcomes = lab.run_together(
        {
            "pv": ["sh", "-c", "tar -c tree | python3 -m gntalloc cat 0 files > got"],
            "dom0": ["sh", "-c", f"python3 -m gntalloc cat -l {pv} files < some-bytes | tar -x"],
        }
    )
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}, outcomes
    assert lab.run(["cmp", "got", "some-bytes"], "pv").exit_status == 0
    look = ["sh", "-c", "find tree | sort | tar -c --sort=name --no-recursion --numeric-owner -T - | sha256sum"]
    here, there = lab.run(look, "pv"), lab.run(look, "dom0")
    assert (here.exit_status, len(here.output)) == (0, 68)
    assert here.output == there.output


def test_cat_and_the_proxy_at_its_standard_streams(lab: Session) -> None:
    pv = lab.domid("pv")
    path = f"/local/domain/{pv}/data/vchan/0/proxied"
    # A descriptor that never ends: at the end of its input the proxy stops, with what it has read still unwritten.
    proxy = f"mkfifo never; vchan-socket-proxy -m client {pv} {shlex.quote(path)} - <>never >proxied"
    outcomes = lab.run_together(
        {"pv": ["sh", "-c", "python3 -m gntalloc cat -l 0 proxied < some-bytes"], "dom0": ["sh", "-c", proxy]}
    )
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}, outcomes
    assert lab.run(["cmp", "proxied", "some-bytes"]).exit_status == 0


@pytest.mark.parametrize("guest", ["pv", "pvh"])
def test_event_channels(lab: Session, guest: str) -> None:
    """domain.events: bind, connect, notify, wait, masks; a peer that is killed, and another that takes its place."""
    domid = str(lab.domid(guest))
    commands = {
        guest: ["python3", "events.py", "bind", "0"],
        "dom0": ["python3", "events.py", "connect", domid],
    }
    outcomes = lab.run_together(commands)
    assert [(outcome.exit_status, outcome.output) for outcome in outcomes.values()] == [(0, "done\n")] * 2, outcomes
