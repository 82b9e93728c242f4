"""The shortest episode that still differs: delta debugging, in rounds, because asking a judge many at once is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from world import Unfit, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import Episode

__all__ = ["repaired", "shrink"]


def repaired(episode: Episode, *, pv: bool) -> Episode:
    """Without the operations that are unfit, because what they need is gone."""
    world = World(pv=pv)
    fit: Episode = []
    for operation in episode:
        try:
            world.step(operation)
        except Unfit:
            continue
        fit.append(operation)
    return fit


def shrink(episode: Episode, differ: Callable[[list[Episode]], list[bool]], *, pv: bool) -> Episode:
    """Leave out what can be left out.

    Args:
        episode: one that differs.
        differ: says of each of several episodes whether it does.
        pv: as the episode was generated.
    """
    chunk = len(episode) // 2
    while chunk:
        starts = range(0, len(episode), chunk)
        shorter = [repaired(episode[:start] + episode[start + chunk :], pv=pv) for start in starts]
        shorter = [candidate for candidate in shorter if len(candidate) < len(episode)]
        differing = [
            candidate for candidate, differs in zip(shorter, differ(shorter), strict=True) if candidate and differs
        ]
        if differing:
            episode = min(differing, key=len)
            chunk = min(chunk, len(episode) // 2 or 1)
        else:
            chunk //= 2
    return episode
