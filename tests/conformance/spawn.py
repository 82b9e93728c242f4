"""Seats in a domain of `gntalloc run`: one process a domain, which forks a seat for each connection to its socket."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback

from seat import make, serve

__all__ = ["main"]


def main(path: str) -> None:
    """Serve until killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path + "-")
        listener.listen()
        os.rename(path + "-", path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            line, _ = listener.accept()
            if not os.fork():
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    with line, line.makefile("r") as steps, line.makefile("w") as answers:
                        print(os.getpid(), file=answers, flush=True)
                        serve(make("run"), steps, answers)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            line.close()


if __name__ == "__main__":
    main(sys.argv[1])
