"""Do an agent's work in its own domain: run commands, take files in, hand files out."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import termios
import threading

from .messages import CHUNK, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .link import Link

__all__ = ["WORK", "Commands"]

WORK = "/lab/files"

_READ = 16 * 1024


class Commands:
    """Carry out the host's messages in this domain. Output goes back as it comes."""

    def __init__(self, name: str, link: Link) -> None:
        self._name = name
        self._link = link
        self._running: dict[int, _Running] = {}

    def carry_out(self, message: Message) -> None:
        """Carry out one message. Work that takes long goes on in threads."""
        try:
            self._carry_out(message.head, message)
        except OSError as error:
            # The host does not wait for the answer to a file, or to a key that is pressed, but must hear of errors.
            self._tell("failed", asked=message.head["do"], why=str(error))

    def _carry_out(self, head: dict[str, Any], message: Message) -> None:
        match head["do"]:
            case "run":
                self._run(head)
            case "input":
                self._input(head["id"], message.body)
            case "resize":
                self._resize(head["id"], head["terminal"])
            case "put":
                _put(head, message.body)
            case "get":
                self._get(head["id"], head["paths"])

    def _tell(self, what: str, body: bytes = b"", **head: Any) -> None:
        self._link.send(Message({"from": self._name, "is": what, **head}, body))

    def _run(self, head: dict[str, Any]) -> None:
        number = head["id"]
        try:
            running = _Running(head["command"], head["environment"], head["terminal"])
        except OSError as error:
            # As a shell has it: 127 for no such command, 126 for one that cannot be executed.
            text = f"{head['command'][0]}: {error.strerror}\n"
            self._tell("output", text.encode(), id=number, stream=2)
            self._tell("ended", id=number, status=127 if isinstance(error, FileNotFoundError) else 126)
            return
        self._running[number] = running
        threading.Thread(target=self._follow, args=(number, running), daemon=True).start()

    def _follow(self, number: int, running: _Running) -> None:
        readers = [
            threading.Thread(target=self._forward, args=(number, stream, descriptor, running), daemon=True)
            for stream, descriptor in running.outputs.items()
        ]
        for reader in readers:
            reader.start()
        status = running.process.wait()
        for reader in readers:
            reader.join()
        del self._running[number]
        self._tell("ended", id=number, status=status if status >= 0 else 128 - status)

    def _forward(self, number: int, stream: int, descriptor: int, running: _Running) -> None:
        while True:
            if not select.select([descriptor], [], [], 1.0)[0]:
                # A child left in the background may hold the pipe for ever; the command itself has ended.
                if running.process.poll() is not None:
                    break
                continue
            try:
                data = os.read(descriptor, _READ)
            except OSError:  # EIO: the last program on this terminal has ended
                break
            if not data:
                break
            self._tell("output", data, id=number, stream=stream)
        os.close(descriptor)

    def _input(self, number: int, data: bytes) -> None:
        if running := self._running.get(number):
            os.write(running.terminal, data)

    def _resize(self, number: int, size: list[int]) -> None:
        if running := self._running.get(number):
            _resize(running.terminal, size)

    def _get(self, number: int, patterns: list[str]) -> None:
        missing = []
        for pattern in patterns:
            paths = _files(pattern)
            if not paths:
                missing.append(pattern)
            for path in paths:
                self._hand_out(number, path)
        self._tell("got", id=number, missing=missing)

    def _hand_out(self, number: int, path: str) -> None:
        with open(os.path.join(WORK, path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            first = True
            while (data := file.read(CHUNK)) or first:
                self._tell("file", data, id=number, path=path.lstrip("/"), mode=mode, first=first)
                first = False


class _Running:
    """Keep a command that runs, and the descriptors to talk to it with."""

    def __init__(self, command: list[str], environment: dict[str, str], terminal: list[int] | None) -> None:
        surroundings = {**os.environ, **environment}
        self.terminal = -1
        if terminal is None:
            self.process = subprocess.Popen(
                command,
                cwd=WORK,
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert self.process.stdout is not None
            assert self.process.stderr is not None
            self.outputs = {1: os.dup(self.process.stdout.fileno()), 2: os.dup(self.process.stderr.fileno())}
            self.process.stdout.close()
            self.process.stderr.close()
            return
        self.terminal, slave = os.openpty()
        _resize(slave, terminal)
        # A terminal becomes a session's own when the session's leader opens it. A small shell does that here.
        opened = ["/bin/sh", "-c", f'exec "$@" <>{os.ttyname(slave)} 1>&0 2>&0', "sh", *command]
        self.process = subprocess.Popen(opened, cwd=WORK, env=surroundings, start_new_session=True)
        os.close(slave)
        self.outputs = {1: os.dup(self.terminal)}


def _resize(terminal: int, size: list[int]) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def _put(head: dict[str, Any], data: bytes) -> None:
    path = os.path.join(WORK, head["path"])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb" if head["first"] else "ab") as file:
        file.write(data)
    os.chmod(path, head["mode"])


def _files(pattern: str) -> list[str]:
    """List the files that a pattern stands for, with all that is below a folder."""
    import glob  # late: see messages.py

    found = []
    for path in sorted(glob.glob(pattern, root_dir=WORK)):
        whole = os.path.join(WORK, path)
        if not os.path.isdir(whole):
            found.append(path)
        for folder, _, names in os.walk(whole):
            below = os.path.join(path, os.path.relpath(folder, whole))
            found += [os.path.normpath(os.path.join(below, name)) for name in sorted(names)]
    return [path for path in found if os.path.isfile(os.path.join(WORK, path))]
