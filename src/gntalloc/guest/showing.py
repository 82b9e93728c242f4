"""Show the machine which of its open files a descriptor is.

The machine takes no descriptors from programs: it might have to wait for what they are. A home is named by its inode.
A program that holds it can write a token to it, which the machine reads at its end.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from gntalloc import waits
from gntalloc.descriptors import inode_of_socket
from gntalloc.errors import DeviceError
from gntalloc.wire.messages import Show
from gntalloc.wire.token import make_token

if TYPE_CHECKING:
    from gntalloc.guest.connection import Answer, MachineConnection

__all__ = ["is_home", "show"]

_TRIES = 8  # others who hold the home may write there too, so much that the machine has not read all of it yet
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def is_home(channel: MachineConnection, inode: int) -> bool:
    """Ask whether this is the inode of a home in the channel's domain.

    Raises:
        MachineGone, MachineBroke: see `MachineConnection.ask`.
    """
    return channel.ask(Show(inode, make_token())).error == errno.EACCES


def show(channel: MachineConnection, home: int) -> Answer:
    """Show a home over this channel. The result is the file's handle there, the body a ShowAnswer.

    Raises:
        DeviceError: EBADF: it is no home of the channel's domain. EACCES: others write too much to it just now.
        MachineGone, MachineBroke: see `MachineConnection.ask`.
    """
    inode = inode_of_socket(home)
    for _ in range(_TRIES):
        token = make_token()
        if inode is None or not _write(home, token):
            raise DeviceError(errno.EBADF, "this is no open device file of a machine that runs")
        answer = channel.ask(Show(inode, token))
        if answer.error != errno.EACCES:
            if answer.error:
                raise DeviceError(answer.error, answer.why)
            return answer
    raise DeviceError(errno.EACCES, "others write so much to this open file that it cannot be shown now; try again")


def _write(home: int, token: bytes) -> bool:
    """Write a token to a home. False: the machine has closed its end, or this is no home."""
    sock = waits.Socket(fileno=home)
    try:
        sock.send(token, _NEVER_WAIT)
    except BlockingIOError:
        pass  # the machine reads there soon
    except OSError:
        return False
    finally:
        sock.detach()
    return True
