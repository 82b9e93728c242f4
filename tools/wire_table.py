"""Print the table of docs/wire.md, made from the classes of gntalloc.wire.messages.

python tools/wire_table.py
"""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from gntalloc.wire import memory, messages

_NUMBERS = {"H": "u16", "I": "u32", "i": "i32", "Q": "u64", "s": "bytes"}


def _layout(kind: Any) -> str:
    form = messages.FORMS[kind]
    fields = list(get_type_hints(kind, vars(messages) | {"Region": memory.Region}))
    words = form.head.format.lstrip("=")
    codes = "".join(code for code in words if not code.isdigit())
    shown = [f"{name} {_NUMBERS[code]}" for name, code in zip(fields, codes, strict=False)]
    if form.tail is not None:
        last = fields[-1]
        shown.append(last if last == form.tail.name else f"{last}: {form.tail.name}")
    if form.descriptors:
        shown.append(f"descriptors: {form.descriptors}")
    return ", ".join(shown) or "nothing"


def table() -> str:
    """Make the table, in Markdown."""
    lines = ["| number | message | payload | what it does |", "|---|---|---|---|"]
    for kind, form in messages.FORMS.items():
        words = " ".join((inspect.getdoc(kind) or "").split())
        lines.append(f"| {form.kind or ''} | {kind.__name__} | {_layout(kind)} | {words} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
