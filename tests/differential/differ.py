"""Two systems' answers to one episode, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from world import PAGE, Unfit, World

if TYPE_CHECKING:
    from world import Episode, File, Operation

__all__ = ["Difference", "comparable", "first_difference"]

FIRST_REF = 8  # those before are the kernel's own


class Difference(NamedTuple):
    """Where two systems part for the first time."""

    step: int
    operation: Operation
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"step {self.step}, {self.operation}: {self.theirs} there, {self.ours} here"


def comparable(episode: Episode, answers: list[Any], *, pv: bool = True) -> list[Any]:
    """The answers without what may differ.

    Which number a reference or a port has is the system's own affair: compared is that references are new ones. In
    what order events came in is not, because it may depend on when a guest is awake; nor of which ports, if the file
    has unbound one, whose number may have been given to another since; nor anything if an event may have met another.
    """
    world = World(pv=pv)
    live: dict[str, list[int]] = {}
    result: list[Any] = []
    for operation, answer in zip(episode, answers, strict=True):
        try:
            world.step(operation)
        except Unfit as why:
            raise ValueError(f"{operation} is unfit: {why}") from why
        if isinstance(answer, dict) and "refs" in answer:
            taken = {
                ref
                for name, refs in live.items()
                for ref, page in zip(refs, world.allocs[name].pages, strict=True)
                if page.users
            }
            refs = answer["refs"]
            new = len(set(refs) - taken) == len(refs) and min(refs, default=FIRST_REF) >= FIRST_REF
            index = answer["index"]
            if operation["as"] in world.allocs:
                live[operation["as"]] = refs
            result.append({"index": index // PAGE, "refs": f"{len(refs)} new" if new else f"{refs}, taken: {taken}"})
        elif isinstance(answer, dict) and "port" in answer:
            result.append("a port")
        elif operation["do"] == "events":
            result.append(_events(answer, world.seats[operation["seat"]].files[operation["file"]]))
        else:
            result.append(answer)
    return result


def _events(answer: Any, file: File) -> Any:
    if file.vague:
        return "some or none"
    if isinstance(answer, str):
        return answer
    return len(answer["ports"]) if file.lost_ports else sorted(answer["ports"])


def first_difference(episode: Episode, theirs: list[Any], ours: list[Any], *, pv: bool = True) -> Difference | None:
    """None if there is none."""
    pairs = zip(comparable(episode, theirs, pv=pv), comparable(episode, ours, pv=pv), strict=True)
    for step, (there, here) in enumerate(pairs):
        if there != here:
            return Difference(step, episode[step], there, here)
    return None
