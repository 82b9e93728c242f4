"""The tables of gntalloc.abi against the C headers of the kernel, by way of a C compiler.

A program is made from the tables, prints what C thinks, and the two are compared. Debian's package of the
headers is linux-libc-dev; Xen's own public headers (libxen-dev) are used for the grant table where they are.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest

from gntalloc.abi import evtchn, gntalloc, gntdev, grants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

# What headers in use may still lack. Anything else that is missing fails.
NEWER_THAN_SOME_HEADERS = {"struct ioctl_evtchn_bind": "IOCTL_EVTCHN_BIND_STATIC"}

# Fields that are declared as arrays of one element.
ARRAYS = {"gref_ids", "refs"}

HEADERS = {"xen/gntalloc.h": gntalloc, "xen/gntdev.h": gntdev, "xen/evtchn.h": evtchn}

# The kernel's headers use these two names of Xen's and leave it to their reader to define them.
PRELUDE = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;
"""

XEN_NAMES = {
    "GTF_type_mask": grants.TYPE_MASK,
    "GTF_invalid": grants.INVALID,
    "GTF_permit_access": grants.PERMIT_ACCESS,
    "GTF_accept_transfer": grants.ACCEPT_TRANSFER,
    "GTF_transitive": grants.TRANSITIVE,
    "GTF_readonly": grants.PERMIT_READONLY,
    "GTF_reading": grants.READING,
    "GTF_writing": grants.WRITING,
    "GTF_sub_page": grants.SUB_PAGE,
    "GNTCOPY_source_gref": gntdev.COPY_SOURCE_GREF,
    "GNTCOPY_dest_gref": gntdev.COPY_DEST_GREF,
    "GNTTAB_NR_RESERVED_ENTRIES": grants.RESERVED_REFS,
    "DOMID_FIRST_RESERVED": grants.DOMID_FIRST_RESERVED,
    "DOMID_SELF": grants.DOMID_SELF,
    "DOMID_INVALID": grants.DOMID_INVALID,
    "sizeof(grant_entry_v1_t)": grants.V1_ENTRY_SIZE,
    "sizeof(union grant_entry_v2)": grants.V2_ENTRY_SIZE,
    **{name: code for code, name in grants.STATUS_NAMES.items()},
}


def compiler() -> str:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C compiler (apt install gcc)")
    return found


def run_c(folder: Path, text: str) -> dict[str, int]:
    """Compile a program that prints lines of `name number`, run it, and return what it printed."""
    source, program = folder / "check.c", folder / "check"
    source.write_text(text)
    built = subprocess.run(
        [compiler(), "-o", str(program), str(source)], capture_output=True, text=True, check=False, timeout=50
    )
    assert built.returncode == 0, built.stderr
    out = subprocess.run([program], capture_output=True, text=True, check=True, timeout=50).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in out.splitlines())}


def has_header(folder: Path, header: str) -> bool:
    probe = folder / "probe.c"
    probe.write_text(f"{PRELUDE}#include <{header}>\nint main(void) {{ return 0; }}\n")
    command = [compiler(), "-fsyntax-only", str(probe)]
    return subprocess.run(command, capture_output=True, check=False, timeout=50).returncode == 0


class Question(NamedTuple):
    """What C is asked, what we expect, and the macro without which there is nothing to ask."""

    expression: str
    expected: int
    macro: str | None

    def as_c(self) -> str:
        line = f'    printf("%s %lld\\n", "{self.expression}", (long long)({self.expression}));\n'
        return f"#ifdef {self.macro}\n{line}#endif\n" if self.macro else line


def questions(module: ModuleType) -> Iterator[Question]:
    """Every number of a module: ioctls, constants, and the size and the place of each field."""
    for name, number in [(name, number) for number, name in module.IOCTLS.items()] + [*module.CONSTANTS.items()]:
        yield Question(name, number, name)
    for struct in module.STRUCTS:
        c_struct = f"struct {struct.C_NAME}"
        macro = NEWER_THAN_SOME_HEADERS.get(c_struct)
        yield Question(f"sizeof({c_struct})", struct.SIZE, macro)
        for field, offset, size in struct.FIELDS:
            one = f"{field}[0]" if field in ARRAYS else field
            yield Question(f"offsetof({c_struct}, {field})", offset, macro)
            yield Question(f"sizeof((({c_struct} *)0)->{one})", size, macro)


@pytest.mark.parametrize("header", HEADERS)
def test_kernel_header(header: str, tmp_path: Path) -> None:
    if not has_header(tmp_path, header):
        pytest.skip(f"no <{header}> (apt install linux-libc-dev)")
    asked = list(questions(HEADERS[header]))
    body = "".join(question.as_c() for question in asked)
    found = run_c(tmp_path, f"{PRELUDE}#include <{header}>\nint main(void) {{\n{body}    return 0;\n}}\n")
    unanswered = {question.macro for question in asked if question.expression not in found}
    assert unanswered <= set(NEWER_THAN_SOME_HEADERS.values())
    assert found == {q.expression: q.expected for q in asked if q.macro not in unanswered}


def test_xen_header(tmp_path: Path) -> None:
    if not has_header(tmp_path, "xen/xen.h"):
        pytest.skip("no <xen/xen.h> (apt install libxen-dev)")
    body = "".join(Question(name, 0, None).as_c() for name in XEN_NAMES)
    text = "#define __XEN_INTERFACE_VERSION__ 0x00040400  /* new enough to know version 2 tables */\n"
    text += "#include <stdint.h>\n#include <stdio.h>\n#include <xen/xen.h>\n#include <xen/grant_table.h>\n"
    assert run_c(tmp_path, f"{text}int main(void) {{\n{body}    return 0;\n}}\n") == XEN_NAMES
