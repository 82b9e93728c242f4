"""Take descriptors that programs send, asked for or not, and close them without waiting.

The process that makes the last close(2) may have to wait: for a TCP socket that lingers, as long as its owner said. The
kernel makes that close for us too, when we read without room for descriptors, and when we close a socket that has some
in its queue. So all descriptors are taken, and told not to linger. A file on FUSE is asked at each close(2), and no
event ends that wait. So a thread closes it, which does nothing else. Where programs have no reason to send descriptors
the sender is refused, as far as the kernel can do that.

Sources: unix(7), socket(7) on SO_LINGER, linux/net.h on SO_PASSRIGHTS.
"""

from __future__ import annotations

import _thread
import array
import os
import socket
import struct

__all__ = ["Truncated", "hang_up", "let_go", "receive", "refuse"]

_SO_PASSRIGHTS = 83  # since Linux 6.16
_MOST = 253  # descriptors of one message: SCM_MAX_FD
_SPACE = socket.CMSG_SPACE(_MOST * 4)
_HOW = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)  # as numbers: flag by flag they cost as much as the call
_TRUNCATED = int(socket.MSG_CTRUNC)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_NO_LINGER = struct.pack("ii", 0, 0)
_A_PIECE = 65536


class Truncated(Exception):
    """Not all of the descriptors that came had room here."""


def refuse(sock: socket.socket) -> bool:
    """Refuse descriptors to `sock` at the sender: EPERM. False: this kernel (before 6.16) cannot, so some may come."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes, and the descriptors that came with them. Never wait.

    Raises:
        Truncated: we have no descriptors left.
        OSError: EAGAIN: nothing is there. Another: the socket cannot be read any more.
    """
    data, controls, flags, _ = sock.recvmsg(size, _SPACE, _HOW)
    if not controls and not flags & _TRUNCATED:
        return data, []
    descriptors = array.array("i")
    for level, kind, content in controls:
        if (level, kind) == (_SOCKET_LEVEL, _RIGHTS):
            descriptors.frombytes(content[: len(content) // 4 * 4])
    if flags & _TRUNCATED:
        let_go(descriptors)
        raise Truncated
    return data, list(descriptors)


def let_go(descriptors: array.array[int] | list[int]) -> None:
    """Close the descriptors that a program sent. A close that waits for a network waits without us."""
    for descriptor in descriptors:
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:  # it is no socket
            _close_file(descriptor)
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:
            pass  # sockets of this kind do not linger
        _close(sock.detach())


def _close_file(descriptor: int) -> None:
    if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("/"):  # a pipe, a seccomp listener
        _close(descriptor)
        return
    try:
        _thread.start_new_thread(_close, (descriptor,))
    except RuntimeError:
        _close(descriptor)  # so many wait already


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        pass  # its file system reports an error, which does not concern us; the descriptor is closed


def hang_up(sock: socket.socket) -> None:
    """Close `sock`, and the descriptors in its queue."""
    try:
        sock.shutdown(socket.SHUT_RD)  # so no more comes
    except OSError:
        pass  # the other end is gone
    data = b"there may be some"
    while data:
        try:
            data, descriptors = receive(sock, _A_PIECE)
        except Truncated:
            continue
        except (OSError, MemoryError):
            break
        let_go(descriptors)
    sock.close()
