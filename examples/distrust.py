"""Two processes that do not trust each other share one page: Alice writes, Bob reads, Alice is told when he lets go.

    sudo python examples/distrust.py nobody daemon       both, as these two users, on a machine of root's
    python examples/distrust.py alice                    one of them, in the domain that its environment names: 1
    python examples/distrust.py bob                      the other: 2

docs/isolation.md says what each way to start them withstands. Alice needs no answer of Bob's to be safe: whatever he
does, her calls end, and what she has written stays as she wrote it.
"""

from __future__ import annotations

import pwd
import subprocess
import sys

import gntalloc

ALICE, BOB = 1, 2  # domains
PATIENCE = 30.0  # seconds that one waits for the other


def alice(domain: gntalloc.Domain) -> None:
    with domain.share(BOB) as shared:  # for reading: not even root can write there now, but by this map
        shared.memory[:5] = b"hello"
        with domain.listen(BOB, "page") as listener, listener.accept(timeout=PATIENCE) as channel:
            channel.send(str(shared.grant).encode())
            try:
                print(f"alice: bob says {channel.recv(timeout=PATIENCE)!r}", flush=True)
            except (gntalloc.PeerGone, gntalloc.TimedOut) as error:
                print(f"alice: bob says nothing: {error}", flush=True)
        try:
            shared.wait_released(timeout=PATIENCE)  # also when he was killed
            print("alice: bob has let go of the page", flush=True)
        except gntalloc.TimedOut:
            print("alice: bob keeps the page; it is his to read for as long as he lives", flush=True)


def bob(domain: gntalloc.Domain) -> None:
    with domain.connect(ALICE, "page", timeout=PATIENCE) as channel:
        grant = gntalloc.Grant.parse(channel.recv(timeout=PATIENCE).decode())
        with domain.map(grant) as mapped:
            read = bytes(mapped.memory[:5])
            channel.send(b"thank you for " + read)
            try:
                mapped.memory[:5] = b"HELLO"
            except TypeError as error:
                print(f"bob: reads {read!r}, and cannot write: {error}", flush=True)


def both(*users: str) -> None:
    """Start each as a user of its own. Only root can."""
    ids = [pwd.getpwnam(user) for user in users]
    with gntalloc.Machine() as machine:
        for domid, user in zip((ALICE, BOB), ids, strict=True):
            machine.domain(domid, uid=user.pw_uid).close()
        started = [
            subprocess.Popen(
                [sys.executable, __file__, role],
                env=machine.environ(domid),
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                cwd="/",
            )
            for role, domid, user in zip(("alice", "bob"), (ALICE, BOB), ids, strict=True)
        ]
        for name, process in zip(users, started, strict=True):
            if process.wait():
                sys.exit(f"the program of {name} has failed")


def main() -> None:
    match sys.argv[1:]:
        case ["alice"]:
            alice(gntalloc.current_domain())
        case ["bob"]:
            bob(gntalloc.current_domain())
        case [first, second]:
            both(first, second)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
