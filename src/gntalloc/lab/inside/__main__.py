"""Run the agent of one domain: `python3 -m inside`, started when the domain is up."""

from __future__ import annotations

import os
import sys

from .commands import WORK, Commands
from .guests import Guests
from .link import Link, console, port
from .messages import Message

# The kernel counts the virtio serial devices from nought or from one, depending on its version.
_PORTS = ("/dev/vport0p1", "/dev/vport1p1")


def main() -> None:
    """Be dom0's agent or a guest's, until the other side is gone."""
    os.makedirs(WORK, exist_ok=True)
    ports = [path for path in _PORTS if os.path.exists(path)]
    if ports:
        _dom0(port(ports[0]))
    else:
        _guest(console("/dev/hvc0"))


def _dom0(host: Link) -> None:
    commands = Commands("dom0", host)
    guests = Guests(host)
    _say_up("dom0", host)
    for message in host.receive():
        assert isinstance(message, Message)
        if message.head["do"] == "start":
            guests.start(message.head["name"], message.head["memory"])
        elif message.head["to"] == "dom0":
            commands.carry_out(message)
        else:
            guests.send(message.head["to"], message)


def _guest(dom0: Link) -> None:
    # From here on the console is ours: only the last words of a dying kernel may come between.
    with open("/proc/sys/kernel/printk", "w", encoding="utf-8") as file:
        file.write("1")
    name = os.environ["LAB_DOMAIN"]
    commands = Commands(name, dom0)
    _say_up(name, dom0)
    for message in dom0.receive():
        if isinstance(message, Message):
            commands.carry_out(message)


def _say_up(name: str, link: Link) -> None:
    versions = {"kernel": os.uname().release, "python": sys.version.split()[0]}
    link.send(Message({"from": name, "is": "up", "versions": versions}))


main()
