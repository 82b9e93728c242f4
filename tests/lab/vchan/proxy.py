"""One end of a vchan: Debian's vchan-socket-proxy, and a program at its socket.

Arguments and output are peer.py's, of whose words it knows `turns` only.
The proxy as a server takes the smallest rings, whatever READ and WRITE say.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from peer import PATIENCE, Case, Flow, bytes_twice


class ProxyEnd:
    def __init__(self, case: Case, peer: str, stack: ExitStack) -> None:
        self.case = case
        where = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "socket"
        command = ["vchan-socket-proxy", "-m", case.role, peer, case.path, str(where)]
        if case.role == "server":  # connects to our socket when its client has come
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(where))
                listening.listen(1)
                listening.settimeout(PATIENCE)
                self.start(command, stack)
                self.socket = stack.enter_context(listening.accept()[0])
        else:  # connects to its server when we have come
            self.start(command, stack)
            deadline = time.monotonic() + PATIENCE
            self.socket = stack.enter_context(socket.socket(socket.AF_UNIX))
            while self.socket.connect_ex(str(where)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        self.socket.settimeout(PATIENCE)

    def start(self, command: list[str], stack: ExitStack) -> None:
        self.proxy = subprocess.Popen(command)
        stack.callback(self.proxy.wait, PATIENCE)
        stack.callback(self.proxy.kill)

    def send(self, flow: Flow) -> None:
        for size in flow.sizes(self.case.amount):
            self.socket.sendall(flow.piece(size))

    def receive(self, flow: Flow) -> None:
        left = self.case.amount
        while left:
            got = self.socket.recv(min(left, 1 << 16))
            assert got, f"the end, {left} bytes too early"
            left -= flow.check(got)

    def run(self, data: memoryview) -> None:
        out, into = Flow.pair(self.case, data, (10_000, 10_000))
        for way in ("send", "receive") if self.case.mine else ("receive", "send"):
            if way == "send":
                self.send(out)
            else:
                self.receive(into)
        assert not self.socket.recv(1)  # it hangs up once the peer has closed: an earlier end would lose bytes
        print(self.case.mode, out.done - out.start, into.done - into.start)


def main() -> None:
    data = bytes_twice(sys.argv[1])
    for text in sys.argv[3:]:
        case = Case.parse(text)
        with ExitStack() as stack:
            ProxyEnd(case, sys.argv[2], stack).run(data)


if __name__ == "__main__":
    main()
