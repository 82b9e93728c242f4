"""What a machine tells its owner of itself: typed, and made of the JSON that the control channel carries."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DomainStatistics", "GrantedPage", "OpenFile", "Statistics"]


class GrantedPage(NamedTuple):
    """One page that is granted, or released and still mapped by a peer."""

    granter: int
    ref: int
    peer: int
    writable: bool
    opener: int
    """The pid that opened the device file it was allocated with."""
    users: int
    """The file's list and the granter's maps; 0: it was released, and stays until the peer lets go."""
    mapped_by: tuple[int, ...]
    """The domains that map it."""
    held: bool
    """Whether it was released, or is mapped by a peer."""
    age: float
    """Seconds."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> GrantedPage:
        """Make one of the machine's answer."""
        return cls(**{**fields, "mapped_by": tuple(fields["mapped_by"])})


class OpenFile(NamedTuple):
    """One open device file."""

    domid: int
    device: str
    opener: int
    """The pid that opened it."""
    ports: tuple[int, ...]
    """The event channel ports that are bound on it."""
    mapped: int
    """Bytes of it that are mapped."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> OpenFile:
        """Make one of the machine's answer."""
        return cls(**{**fields, "ports": tuple(fields["ports"])})


class DomainStatistics(NamedTuple):
    """Counters of one domain."""

    domid: int
    uid: int
    """Whose programs may enter it."""
    limit: int
    """Pages that may be granted at once."""
    pages_in_use: int
    references: int
    ports: int
    files: int
    files_mapped: int
    """Files of which something is mapped."""
    nodes: int
    """Of xenstore, as are the following two."""
    watches: int
    transactions: int


class Statistics(NamedTuple):
    """Counters of a machine."""

    pid: int
    pages: int
    """Of memory."""
    extents: int
    """Pieces that the memory consists of."""
    descriptors: int
    """That the machine's process has open."""
    domains: tuple[DomainStatistics, ...]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Statistics:
        """Make one of the machine's answer."""
        return cls(**{**fields, "domains": tuple(DomainStatistics(**domain) for domain in fields["domains"])})
