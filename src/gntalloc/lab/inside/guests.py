"""Run guests beside dom0: create them with xl, and talk to them through their consoles. This is for dom0 only."""

from __future__ import annotations

import os
import subprocess
import threading
import time

from .link import Link, console
from .messages import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Guests"]

_INITRAMFS = "/run/lab/initramfs"

# The initramfs this domain was booted with, which a kernel does not keep: the second disk holds it.
_INITRAMFS_DISK = "/dev/vdb"

# Emulated processors have no invariant time stamp counter. So a PVH guest refuses to start without tsc_mode, and a PV
# guest would ask the hypervisor for the time, in a system call of 70 µs: Python asks whenever it takes a lock.
_SETTINGS = """\
name = "{name}"
type = "{kind}"
kernel = "/boot/vmlinux"
ramdisk = "{initramfs}"
cmdline = "console=hvc0 oops=panic panic=1 clocksource=tsc tsc=reliable LAB_DOMAIN={name}"
tsc_mode = "native"
memory = {memory}
vcpus = 1
vif = []
disk = ["format=raw,vdev=xvda,access=r,backendtype=phy,script=/lab/attach,target=/dev/vda"]
on_crash = "destroy"
on_reboot = "destroy"
"""


class Guests:
    """Keep the guests of this boot, by name, which is also their kind: pv or pvh."""

    def __init__(self, host: Link) -> None:
        self._host = host
        self._links: dict[str, Link] = {}

    def start(self, name: str, memory: int) -> None:
        """Create a guest. Its start and its end are told to the host as they happen."""
        threading.Thread(target=self._live, args=(name, memory), daemon=True).start()

    def send(self, name: str, message: Message) -> None:
        """Pass a message on to a guest's agent. If that is gone, the message is dropped: the host hears anyway."""
        try:
            self._links[name].send(message)
        except OSError:
            return

    def _live(self, name: str, memory: int) -> None:
        try:
            domid = _create(name, memory)
            link = console(_console_of(domid))
        except (OSError, RuntimeError) as error:
            self._tell(name, "lost", why=str(error))
            return
        self._links[name] = link
        for message in link.receive():
            if isinstance(message, Message):
                message.head["domid"] = domid
                self._host.send(message)
            else:
                self._tell(name, "log", message)
        self._tell(name, "lost", why="it went down")

    def _tell(self, name: str, what: str, body: bytes = b"", **head: Any) -> None:
        self._host.send(Message({"from": name, "is": what, **head}, body))


_preparing = threading.Lock()


def _create(name: str, memory: int) -> int:
    settings = f"/run/lab/{name}.cfg"
    with _preparing:
        if not os.path.exists(_INITRAMFS):
            _ask("cp", _INITRAMFS_DISK, _INITRAMFS)
    with open(settings, "w", encoding="utf-8") as file:
        file.write(_SETTINGS.format(name=name, kind=name, initramfs=_INITRAMFS, memory=memory))
    _ask("xl", "create", "-q", settings)
    return int(_ask("xl", "domid", name))


def _console_of(domid: int) -> str:
    for _ in range(100):
        path = _ask("xenstore-read", f"/local/domain/{domid}/console/tty")
        if path:
            return path
        time.sleep(0.1)
    raise RuntimeError("xenconsoled gave it no terminal")


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and command[0] == "xl":
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()
