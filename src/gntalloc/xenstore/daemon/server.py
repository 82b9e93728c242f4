"""Turn requests into answers and events, errno for errno as the C daemon of Xen 4.17 does.

Sources: Xen 4.17.7, docs/misc/xenstore.txt and how tools/xenstore behaves, compared with the running daemon request
by request (tests/xenstore/xs_run.py). docs/xenstore.md lists what is different here, and why.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.steps import finish_steps
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon import arguments
from gntalloc.xenstore.daemon.commits import commit, forget
from gntalloc.xenstore.daemon.control import OK, Control
from gntalloc.xenstore.daemon.domains import Domain, Domains
from gntalloc.xenstore.daemon.keeper import Keeper
from gntalloc.xenstore.daemon.limits import Quotas, Refused
from gntalloc.xenstore.daemon.nodes import Nodes
from gntalloc.xenstore.daemon.permissions import Entry
from gntalloc.xenstore.daemon.request import Request
from gntalloc.xenstore.daemon.session import Session, Watch
from gntalloc.xenstore.daemon.transactions import Transaction
from gntalloc.xenstore.daemon.tree import Node, Tree, home, is_name, too_long
from gntalloc.xenstore.daemon.view import View
from gntalloc.xenstore.daemon.watches import Watches
from gntalloc.xenstore.wire import Message, Type

if TYPE_CHECKING:
    from gntalloc.steps import Steps
    from gntalloc.xenstore.daemon.request import Handler
__all__ = ["Daemon"]

SELF = 0x7FF0  # DOMID_SELF
INTRODUCED, RELEASED = "@introduceDomain", "@releaseDomain"
_NUMBERS = 1 << 32  # so many numbers of transactions there are
_LONGEST_SPECIAL = 2048


class Kind(NamedTuple):
    """Say how one type of request is served."""

    serve: Handler
    privileged: bool = False
    outside: bool = False
    """Whether the number of a transaction is ignored."""


class Daemon:
    """Be the whole store. Sessions come from `connect`, requests go to `handle`.

    Domains come with `create` and `introduce`. Domain 0 is there from the start.

    Args:
        quotas: the quotas of each domain.
        by_number: see `Domains`. Without it permissions are xenstored's.
    """

    def __init__(self, quotas: Quotas | None = None, *, by_number: bool = False) -> None:
        self.quotas = quotas or Quotas()
        self.tree = Tree()
        self.domains = Domains(self.tree, self.quotas, by_number=by_number)
        self._watches = Watches(self.tree, self.domains, self.quotas)
        self._keeper = Keeper(self.tree, self.domains, self._watches, self.quotas)
        self._special: dict[str, tuple[Entry, ...]] = {INTRODUCED: (Entry(0, 0),), RELEASED: (Entry(0, 0),)}
        self._new_watches: list[Watch] = []  # those that the request which is served just now has set
        self._last_session = 0
        self.talking: set[Session] = set()
        """Connections that have messages to send, or that were ended. The code that sends removes them."""
        self.sessions: dict[Domain, list[Session]] = {}
        nodes = Nodes(self.quotas, self.domains, self._special)
        control = Control(self.quotas, self.domains, self._unread)
        self._kinds: dict[int, Kind] = {
            Type.CONTROL: Kind(lambda request: control.obey(request.body), privileged=True),
            Type.WATCH: Kind(self._watch, outside=True),
            Type.UNWATCH: Kind(self._unwatch, outside=True),
            Type.TRANSACTION_START: Kind(self._transaction_start),
            Type.TRANSACTION_END: Kind(self._transaction_end),
            Type.INTRODUCE: Kind(self._introduce, privileged=True),
            Type.RELEASE: Kind(self._release, privileged=True),
            Type.GET_DOMAIN_PATH: Kind(self._get_domain_path),
            Type.IS_DOMAIN_INTRODUCED: Kind(self._is_domain_introduced, privileged=True),
            Type.RESUME: Kind(self._resume, privileged=True),
            Type.SET_TARGET: Kind(self._set_target, privileged=True),
            Type.RESET_WATCHES: Kind(self._reset_watches),
            wire.WHY: Kind(self._why, outside=True),
            **{kind: Kind(serve) for kind, serve in nodes.handlers.items()},
        }
        self._keeper.place("/", Node(0, (Entry(0, 0),)))
        self.introduce(0)
        self.own_view().make("/tool/xenstored", b"")

    # Domains and connections.

    def create(self, domid: int) -> None:
        """Note that there is a domain of that number, which permissions can name. It may be there already."""
        self.domains.existing.add(domid)
        self.domains.know(domid)

    def introduce(self, domid: int) -> None:
        """Talk with a domain that is there. If it was introduced before, it loses its watches and transactions."""
        domain = self.domains.know(domid)
        if domain is None:
            raise Refused(errno.ENOENT)
        if domain.introduced:
            for session in self.sessions.get(domain, ()):
                self._reset(session)
                session.drop_unread()
            return
        domain.introduced = True
        if domid:
            self._watches.fire_special(INTRODUCED, self._special[INTRODUCED])

    def release(self, domid: int) -> None:
        """Stop talking with a domain: its connections end, its nodes go, and so do its permissions."""
        domain = self.domains.get(domid)
        if domain is None:
            return
        self._hang_up(domain)
        self._remove_nodes_of(domain)
        del self.domains[domid]
        for other in self.domains.values():
            if other.target == domid:
                other.target = None  # or the next domain of that number would be served
        for name, entries in self._special.items():
            owner = entries[0]._replace(domid=0) if entries[0].domid == domid else entries[0]
            others = (entry for entry in entries[1:] if self.domains.by_number or entry.domid != domid)
            self._special[name] = (owner, *others)
        if domain.introduced:
            self._watches.fire_special(RELEASED, self._special[RELEASED])

    def destroy(self, domid: int) -> None:
        """Note that there is no domain of that number any more. Domain 0 cannot go: only its connections end."""
        if domid:
            self.domains.existing.discard(domid)
            self.release(domid)
        else:
            self._hang_up(self.domains[0])

    def connect(self, domid: int) -> Session:
        """Make a connection for a program in an introduced domain.

        Raises:
            Refused: ENOENT: the domain was not introduced.
        """
        domain = self.domains.connected(domid)
        self._last_session += 1
        session = Session(domain, self._last_session, self.talking)
        self.sessions.setdefault(domain, []).append(session)
        return session

    def disconnect(self, session: Session) -> None:
        """Forget a connection that has ended."""
        self._reset(session)
        self._watches.forget(session)
        session.leave()
        talking = self.sessions.get(session.domain, [])
        if session in talking:
            talking.remove(session)
        if not talking:
            self.sessions.pop(session.domain, None)

    def usage(self, domid: int) -> dict[str, int]:
        """Count what a domain has in use."""
        domain = self.domains.get(domid)
        names = "nodes", "watches", "transactions"
        return {name: 0 if domain is None else getattr(domain, name) for name in names}

    def own_view(self) -> View:
        """Give the tree for the daemon itself: it may do everything, and nothing counts."""
        return View(self._keeper, None)

    def handle(self, session: Session, message: Message) -> Refused | None:
        """Serve one request at once, and return why it was refused, if it was.

        Then its answer and its events are in the outboxes of the sessions.
        """
        return finish_steps(self.begin(session, message))

    def begin(self, session: Session, message: Message) -> Steps[Refused | None]:
        """Serve one request in pieces. As `handle`, but others may be served in between.

        What it changes in the common tree, it changes in one piece: others see the tree as it was before, or as it is
        after. Then, in pieces, it tells the watches, and at last it is answered.
        """
        refused: Refused | None = None
        try:
            kind, body = message.type, (yield from self._serve(session, message))
            if len(body) > wire.PAYLOAD_MAX:
                raise Refused(errno.E2BIG, f"the answer has {len(body)} bytes, and a message {wire.PAYLOAD_MAX}")
        except Refused as refusal:
            kind, body = Type.ERROR, wire.join(wire.error_name(refusal.code))
            refused = session.refused = refusal
        new, self._new_watches = self._new_watches, []
        yield from self._watches.catch_up(self._watches.take_fresh())
        session.answer(Message(kind, message.req_id, message.tx_id, body))
        for watch in new:
            self._watches.fire_first(watch)
        yield from self._watches.catch_up(self._watches.take_fresh())
        return refused

    def catch_up(self) -> Steps[None]:
        """Tell watches, in pieces, of all that was changed and that no request tells them of."""
        self._watches.take_fresh()
        yield from self._watches.catch_up_all()

    def _serve(self, session: Session, message: Message) -> Steps[bytes]:
        kind = self._kinds.get(message.type)
        if kind is None:
            raise Refused(errno.ENOSYS)
        if kind.privileged and not session.privileged:
            raise Refused(errno.EACCES, "only domain 0 may ask that")
        transaction = None
        if message.tx_id and not kind.outside:
            transaction = session.transactions.get(message.tx_id)
            if transaction is None:
                raise Refused(errno.ENOENT, f"there is no transaction {message.tx_id}")
        view = View(self._keeper, session, transaction)
        answer = kind.serve(Request(session, transaction, view, message.body))
        return answer if isinstance(answer, bytes) else (yield from answer)

    def _unread(self, domain: Domain) -> int:
        return sum(session.answers for session in self.sessions.get(domain, ()))

    def _hang_up(self, domain: Domain) -> None:
        for session in list(self.sessions.get(domain, ())):
            self.disconnect(session)
            session.end()

    def _reset(self, session: Session) -> None:
        for watch in list(session.watches.values()):
            self._watches.remove(watch)
        for transaction in list(session.transactions.values()):
            self._forget(session, transaction)

    def _forget(self, session: Session, transaction: Transaction) -> None:
        del session.transactions[transaction.number]
        session.domain.transactions -= 1
        forget(session, transaction)

    def _remove_nodes_of(self, domain: Domain) -> None:
        """Remove a domain's nodes, from the top: below a removed node nothing is left to look at."""
        view = self.own_view()
        wanted = self.tree.above_owned(domain.domid)
        pending = ["/"]
        while pending and domain.nodes > 0:
            path = pending.pop()
            node = self.tree[path]
            mine = node.permissions[0].domid == domain.domid
            if mine and path == "/":  # the root was given to this domain; the daemon would lose everything
                view.put(path, view.change_owner(node, (node.permissions[0]._replace(domid=0), *node.permissions[1:])))
            elif mine:
                view.remove(path)
            if path == "/" or not mine:
                prefix = "" if path == "/" else path
                below = (f"{prefix}/{name}" for name in reversed(node.children))
                pending.extend(name for name in below if name in wanted)

    # Watches.

    def _watch(self, request: Request) -> bytes:
        session = request.session
        path, token, relative = self._watch_arguments(request)
        special = path.startswith("@")
        if len(path) > _LONGEST_SPECIAL if special else not is_name(path, self.quotas.path_max):
            raise Refused(errno.EINVAL, "" if special else too_long(path, self.quotas.path_max))
        if (path, token) in session.watches:
            raise Refused(errno.EEXIST)
        domain = session.domain
        if not session.privileged:
            if domain.watches > domain.quotas.watches:
                raise Refused(errno.E2BIG, f"watches {domain.quotas.watches}: {_used(domain, domain.watches)}")
            if domain.memory + len(path) + len(token) >= domain.quotas.memory:
                raise Refused(errno.ENOMEM, f"memory {domain.quotas.memory}: {_used(domain, domain.memory)} bytes")
        watch = self._watches.add(session, path, token, relative)
        self._new_watches.append(watch)
        return OK

    def _unwatch(self, request: Request) -> bytes:
        path, token, _ = self._watch_arguments(request)
        watch = request.session.watches.get((path, token))
        if watch is None:
            raise Refused(errno.ENOENT)
        self._watches.remove(watch)
        return OK

    def _watch_arguments(self, request: Request) -> tuple[str, bytes, int]:
        first, token, *more = arguments.strings(request.body, 2)
        if more:
            raise Refused(errno.EINVAL)
        relative = 0 if first[:1] in (b"/", b"@") else len(home(request.session.domain.domid)) + 1
        return request.whole(first), token, relative

    def _reset_watches(self, request: Request) -> bytes:
        self._reset(request.session)
        return OK

    # Transactions.

    def _transaction_start(self, request: Request) -> bytes:
        if request.transaction is not None:
            raise Refused(errno.EBUSY, "it was asked for in a transaction")
        session = request.session
        if not session.privileged and session.domain.transactions > session.domain.quotas.transactions:
            used = _used(session.domain, session.domain.transactions)
            raise Refused(errno.ENOSPC, f"transactions {session.domain.quotas.transactions}: {used} open")
        number = session.last_transaction
        while True:
            number = (number + 1) % _NUMBERS
            if number and number not in session.transactions:
                break
        session.last_transaction = number
        session.transactions[number] = Transaction(number)
        session.domain.transactions += 1
        self.tree.advance()
        return b"%d\0" % number

    def _transaction_end(self, request: Request) -> bytes:
        how = arguments.one(request.body)
        if how not in (b"T", b"F"):
            raise Refused(errno.EINVAL)
        transaction = request.transaction
        if transaction is None:
            raise Refused(errno.ENOENT)
        try:
            if how == b"T":
                commit(self._keeper, transaction, limited=not request.session.privileged)
        finally:
            self._forget(request.session, transaction)
        return OK

    # A request that no other daemon has.

    def _why(self, request: Request) -> bytes:
        """Give the reason of the connection's last refusal, if it says more than the errno did."""
        refused, request.session.refused = request.session.refused, None
        if refused is None or not refused.reason:
            raise Refused(errno.ENOENT)
        return refused.reason.encode("latin-1", "replace")[: wire.PAYLOAD_MAX]

    # Domains, for domain 0.

    def _introduce(self, request: Request) -> bytes:
        domid, _frame, port, *_ = arguments.strings(request.body, 3)
        if arguments.integer(port) <= 0:
            raise Refused(errno.EINVAL)
        self.introduce(arguments.decimal(domid))
        return OK

    def _release(self, request: Request) -> bytes:
        domid = self._other_domain(request).domid
        self.release(domid)
        self.domains.forget_permissions(domid)
        return OK

    def _resume(self, request: Request) -> bytes:
        self._other_domain(request)
        return OK

    def _other_domain(self, request: Request) -> Domain:
        domid = arguments.decimal(arguments.one(request.body))
        if not domid:
            raise Refused(errno.EINVAL)
        return self.domains.connected(domid)

    def _get_domain_path(self, request: Request) -> bytes:
        return home(arguments.decimal(arguments.one(request.body))).encode() + b"\0"

    def _is_domain_introduced(self, request: Request) -> bytes:
        domid = arguments.decimal(arguments.one(request.body))
        domain = self.domains.get(domid)
        known = domid == SELF or (domain is not None and domain.introduced)
        return b"T\0" if known else b"F\0"

    def _set_target(self, request: Request) -> bytes:
        domid, target, *_ = arguments.strings(request.body, 2)
        domain = self.domains.connected(arguments.decimal(domid))
        domain.target = self.domains.connected(arguments.decimal(target)).domid
        return OK


def _used(domain: Domain, number: int) -> str:
    return f"domain {domain.domid} has {number}"
