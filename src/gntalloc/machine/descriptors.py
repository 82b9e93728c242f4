"""Descriptors that programs send us, asked for or not: to let go of one must not be to wait.

Whose last close(2) it is, waits: for a TCP socket that shall linger, as long as its owner said. The kernel makes that
close for us too, where we read without room for descriptors, and where we close a socket that has some in its queue.
So all are taken, and told not to linger. A file on FUSE is asked at each close(2), and nothing ends that wait; so a
thread has it, which does nothing else. Where nobody has reason to send any they are refused at the sender, as far as
the kernel can do that.

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
_MOST = 253  # that go with one message: SCM_MAX_FD
_SPACE = socket.CMSG_SPACE(_MOST * 4)
_HOW = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)  # as numbers: flag by flag they cost as much as the call
_TRUNCATED = int(socket.MSG_CTRUNC)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_NO_LINGER = struct.pack("ii", 0, 0)
_A_PIECE = 65536


class Truncated(Exception):
    """There was no room for all the descriptors that came."""


def refuse(sock: socket.socket) -> bool:
    """Let nobody send descriptors to `sock`: EPERM. False: this kernel cannot (before 6.16), so some may come."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes, and the descriptors that came with them. Never waits.

    Raises:
        Truncated: we have no descriptors left.
        OSError: EAGAIN nothing is there; it cannot be read any more.
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
    """Close what a program sent. What would wait for a network does so without us."""
    for descriptor in descriptors:
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:  # it is no socket
            _close_file(descriptor)
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:
            pass  # of a kind that does not linger
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
        pass  # its file system has something to say, to whom it may concern; it is closed


def hang_up(sock: socket.socket) -> None:
    """Close `sock`, and let go of what is in its queue."""
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
        except OSError:
            break
        let_go(descriptors)
    sock.close()
