"""Disks: a file, a backend in a process of its own in domain 0, and the frontend's domain 1."""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from tests.frontend.kit import SIZE

from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.nodes import Device, attach, detach
from gntalloc.testing import Program, two_domains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Domain, Machine

PATIENCE = 20.0
DEVICE = Device("vbd", 51712, 1, 0)


def serve(domain: Domain, device: Device, path: str, settings: dict[str, Any]) -> tuple[int, int]:
    """A backend, in its own process."""
    with Backend(domain, device, path, **settings) as backend:
        backend.serve()
        return backend.requests, backend.refused


class Setting:
    """A disk's file, and whoever serves it."""

    def __init__(self, machine: Machine, dom0: Domain, guest: Domain, path: Path, stack: ExitStack) -> None:
        self.machine, self.dom0, self.guest, self.path = machine, dom0, guest, path
        self.content = random.Random(7).randbytes(SIZE)
        path.write_bytes(self.content)
        self._stack = stack

    def attach(self, mode: str = "w") -> None:
        """As a toolstack."""
        attach(self.dom0.store, DEVICE, {"virtual-device": str(DEVICE.number), "device-type": "disk"}, {"mode": mode})
        self._stack.callback(self.detach)

    def detach(self) -> None:
        """The same."""
        detach(self.dom0.store, DEVICE)

    def backend(self, **settings: Any) -> Program:
        """Start a backend in a process."""
        return self._stack.enter_context(Program(self.dom0, serve, DEVICE, str(self.path), settings))

    def open(self, **settings: Any) -> BlockDevice:
        """Connect a frontend, in this process."""
        return self._stack.enter_context(BlockDevice(self.guest, **{"timeout": PATIENCE, **settings}))

    def now(self) -> bytes:
        """What is in the file."""
        return self.path.read_bytes()


@pytest.fixture
def setting(machine_for_disks: Machine, tmp_path: Path) -> Iterator[Setting]:
    """No backend yet, and nothing attached. All must be given back at the end."""
    with two_domains(machine_for_disks) as (guest, _), ExitStack() as stack:
        dom0 = machine_for_disks.domain(0)
        stack.callback(dom0.devices.close)
        stack.callback(dom0.close)
        yield Setting(machine_for_disks, dom0, guest, tmp_path / "disk.img", stack)


@pytest.fixture(scope="module")
def machine_for_disks() -> Iterator[Machine]:
    """Of domains 0, 1 and 2."""
    import gntalloc

    with gntalloc.Machine() as machine:
        for domid in (0, 1, 2):
            domain = machine.domain(domid)
            domain.close()
            domain.devices.close()
        yield machine


@pytest.fixture
def served(setting: Setting) -> Callable[..., BlockDevice]:
    """Attaches a disk, starts its backend with those settings, and connects."""

    def make(front: dict[str, Any] | None = None, mode: str = "w", **settings: Any) -> BlockDevice:
        setting.attach(mode)
        setting.backend(**settings)
        return setting.open(**(front or {}))

    return make
