"""Read words of the command line: numbers, seconds, machines, domains. Each kind knows how to complete itself."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from gntalloc.digits import whole_number
from gntalloc.errors import GntallocError
from gntalloc.places import domids, is_name, machine_folder, machines

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ADDRESS",
    "DOMAIN",
    "LARGEST_DOMID",
    "MACHINE",
    "MOST_PAGES",
    "SECONDS",
    "DomidType",
    "MachineDomain",
    "Number",
]

LARGEST_DOMID = 32751
MOST_PAGES = (1 << 32) - 1  # one ALLOC could ask for so many
_MOST_SECONDS = 1_000_000.0  # eleven days: poll(2) takes no more than twice that
_SECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12}")


class _Type(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """Read a kind of word of the command line."""


class Number(_Type):
    """Read a whole number of ASCII digits, from `least` to `most`."""

    name = "number"

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert a text. A default may be a number already."""
        if isinstance(value, int):
            return value
        number = whole_number(value)
        if number is None or not self._least <= number <= self._most:
            self.fail(f"{value[:40]!r} is no number from {self._least} to {self._most}", param, ctx)
        return number


class DomidType(Number):
    """Read a domain's number, completed with those of the machine that `where` finds in the words before."""

    name = "domid"

    def __init__(self, most: int, where: Callable[[dict[str, Any]], str | None]) -> None:
        super().__init__(0, most)
        self._where = where

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete with those that are there."""
        name = self._where(ctx.params)
        return _beginning(incomplete, map(str, _domids(name) if name else ()))


class SecondsType(_Type):
    """Read seconds: 10, 0.5. Neither nan nor inf is accepted, which no wait can take."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a text. A default may be a number already."""
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        if not _SECONDS.fullmatch(str(value)) or float(value) > _MOST_SECONDS:
            self.fail(f"{str(value)[:40]!r} is no number of seconds, from 0 to {_MOST_SECONDS:.0f}", param, ctx)
        return float(value)


class MachineType(_Type):
    """Read a machine's name: a word, or a path."""

    name = "machine"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, if a machine can have it."""
        if not is_name(value):
            self.fail(f"a machine cannot be called {value!r}; give it a word, or a path with a /", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete with those that are there."""
        if "/" in incomplete:
            return [CompletionItem(incomplete, type="dir")]
        return _beginning(incomplete, _machines())


class MachineDomain(NamedTuple):
    """Name a domain of a machine, as `default/1` does."""

    machine: str
    domid: int


class DomainType(_Type):
    """Read a domain of a machine: NAME/DOMID."""

    name = "domain"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MachineDomain:
        """Convert a text."""
        name, _, number = str(value).rpartition("/")
        domid = whole_number(number, LARGEST_DOMID)
        if not is_name(name) or domid is None:
            self.fail(
                f"{value[:200]!r} is no domain; write the machine's name and the domid, as in default/1", param, ctx
            )
        return MachineDomain(name, domid)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete with those that are there."""
        return complete_address(incomplete)


MACHINE = MachineType()
DOMAIN = DomainType()
SECONDS = SecondsType()


class AddressType(_Type):
    """Read the domain to be in, as `current_domain` takes it."""

    name = "domain"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete with domains of machines that have a name, and with paths."""
        if incomplete.startswith(("/", ".")):
            return [CompletionItem(incomplete, type="file")]
        return complete_address(incomplete)


ADDRESS = AddressType()


def complete_address(incomplete: str) -> list[CompletionItem]:
    """Complete with NAME/DOMID of every machine of this user."""
    return _beginning(incomplete, (f"{name}/{domid}" for name in _machines() for domid in _domids(name)))


def _beginning(incomplete: str, words: Any) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _machines() -> list[str]:
    """List the machines, or none if something is wrong: a completion cannot tell an error."""
    try:
        return machines()
    except (GntallocError, OSError):
        return []


def _domids(name: str) -> list[int]:
    try:
        return domids(machine_folder(name))
    except (GntallocError, OSError):
        return []
