"""Run QEMU: write its command line, and keep the one process of it that belongs to a boot."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

from gntalloc.libc import PR_SET_PDEATHSIG, libc

if TYPE_CHECKING:
    from pathlib import Path

    from gntalloc.lab.images import Images

__all__ = ["Qemu", "arguments"]

# The memory that Xen keeps for itself, and that emulated hardware takes.
_XEN_MEMORY = 192

# Software emulation offers some features that Xen 4.17 hides badly: with them dom0 dies at its first page fault.
# Without rdtscp a PVH guest gets a time stamp counter it can live with.
# Without AVX and XSAVE the domains' registers stay apart: with them, two PV domains at work at the same time spoil
# each other's memory within seconds (tried: QEMU 7.2, Xen 4.17).
_CPU = (
    "max,-smap,-smep,-la57,-pku,-umip,-fsgsbase,-pcid,-invpcid,-rdtscp"
    ",-avx,-avx2,-f16c,-fma,-xsave,-xsaveopt,-xsavec,-xsaves"
)

# An oops must end the boot: otherwise it hangs until a time limit passes.
_DOM0 = "console=hvc0 earlyprintk=xen oops=panic panic=1 LAB_DOMAIN=dom0"


def arguments(program: str, *, dom0_memory: int, guests_memory: int, descriptor: int) -> list[str]:
    """Write QEMU's command line. The files are those of the folder where it is started.

    Args:
        program: The path of QEMU.
        dom0_memory: MiB for dom0.
        guests_memory: MiB for all guests together.
        descriptor: The socket to the agent in dom0.
    """
    xen = f"console=com1 com1=115200 dom0_mem={dom0_memory}M,max:{dom0_memory}M sched=credit bootscrub=0"
    # fmt: off
    return [
        program,
        "-accel", "tcg,thread=multi",
        "-cpu", _CPU,
        "-smp", "1",
        "-m", str(_XEN_MEMORY + dom0_memory + guests_memory),
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-net", "none", "-monitor", "none",
        "-kernel", "xen", "-append", xen,
        # Multiboot modules: the first is dom0's kernel with its arguments, the second its initramfs.
        "-initrd", f"vmlinux {_DOM0},initramfs",
        "-drive", "file=root,if=virtio,format=raw,readonly=on",
        "-drive", "file=initramfs,if=virtio,format=raw,readonly=on",
        "-serial", "file:serial.log",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=agent,fd={descriptor}",
        "-device", "virtserialport,chardev=agent,name=lab",
    ]
    # fmt: on


class Qemu:
    """Keep one running QEMU, and the socket to the agent in its dom0."""

    def __init__(
        self,
        program: str,
        images: Images,
        payload: bytes,
        folder: Path,
        *,
        dom0_memory: int,
        guests_memory: int,
    ) -> None:
        self._folder = folder
        # Links, because a comma or a space in a path would mean something to QEMU.
        for name, path in (("xen", images.hypervisor), ("vmlinux", images.kernel), ("root", images.root)):
            (folder / name).symlink_to(path)
        base = images.initramfs.read_bytes()
        (folder / "initramfs").write_bytes(base + bytes(-len(base) % 512) + payload)
        self.socket, theirs = socket.socketpair()
        command = arguments(
            program,
            dom0_memory=dom0_memory,
            guests_memory=guests_memory,
            descriptor=theirs.fileno(),
        )
        with theirs, open(folder / "qemu.log", "wb") as log:
            # QEMU has a session of its own: the terminal's Ctrl-C is for us, and we end QEMU in good order.
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                # If we are killed, the kernel ends QEMU in our place. It watches the thread that is here now.
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  # a C call, no lock
            )

    def log(self) -> str:
        """Read all that Xen and dom0 have written to the serial port, and QEMU's own complaints."""
        texts = []
        for name in ("serial.log", "qemu.log"):
            with contextlib.suppress(FileNotFoundError):
                texts.append((self._folder / name).read_text(errors="replace"))
        # Lines end in more than one way, depending on how many consoles they went through.
        return "\n".join(line for line in "\n".join(texts).splitlines() if line)

    def stop(self) -> None:
        """End QEMU now. Nothing is lost: a lab never writes to its images."""
        self.socket.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
