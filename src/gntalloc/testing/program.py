"""Program: a process of its own inside a domain, running a function of yours or a command.

It is a real one, so that it can be stopped and killed, and so that closing here is not closing there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Any, Self

from gntalloc.domain import current_domain
from gntalloc.errors import GntallocError, TimedOut
from gntalloc.places import store_path
from gntalloc.testing.cleanup import name_process
from gntalloc.testing.unmodified import Unmodified

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType, TracebackType

    from gntalloc.domain import Domain

__all__ = ["Program", "ProgramFailed", "environ", "last_words", "main"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

# What the child needs to find its way: the parent's sys.path first, then everything else can be imported.
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gntalloc.testing.program import main; main()"


class ProgramFailed(GntallocError):
    """A program ended without doing what it was started for; the text says how."""


class Program:
    """A process inside `domain`.

        def echo(domain, path):                      # at the top of the module
            with domain.listen(1, path) as listener, listener.accept() as channel:
                for message in channel:
                    channel.send(message)

        with Program(bob, echo, "path") as peer: ... # it is killed when the block ends, if it still runs then

    Args:
        domain: where. The process finds it with `gntalloc.current_domain()`.
        what: a function, which is called as `what(domain, *args)`; or a command, as a list of strings.
        args: for the function: anything that pickle can carry.
        before: a function without arguments, to be called there first.
        unmodified: the command knows nothing of us: it is to find /dev/xen, as under `gntalloc run`. What it starts
            is in the domain too, and ends with the block at the latest.
        options: for subprocess.Popen: env, cwd, stdout, … What the process writes goes where this one's does.

    A function is found as multiprocessing finds it: by the name of its module, or the file of that. So it stands at the
    top level, and the module is imported once more in the new process.

    Attributes:
        process: the subprocess.Popen; of an unmodified program it is that of `gntalloc run`, which ends as it does.

    Raises:
        FileNotFoundError: there is no such command.
        GntallocError: an unmodified program could not be started; the text says why.
    """

    def __init__(
        self,
        domain: Domain,
        what: Callable[..., Any] | Sequence[str | os.PathLike[str]],
        *args: Any,
        before: Callable[[], None] | None = None,
        unmodified: bool = False,
        **options: Any,
    ) -> None:
        self._asked = False  # for its result, or how it ended
        self._report = -1
        self._unmodified: Unmodified | None = None
        options["env"] = {**environ(domain), **options.pop("env", {})}
        options.setdefault("stdin", subprocess.DEVNULL)
        if not callable(what):
            if args or before is not None:
                raise TypeError("a command's arguments are in its list, and nothing can be called before it")
            command = [os.fspath(word) for word in what]
            self.name = command[0]
            if unmodified and domain.on_machine:  # on a real Xen the devices are there
                self._unmodified = Unmodified(domain, command, options)
                self.process = self._unmodified.process
            else:
                self.process = _popen(command, options)
        elif unmodified:
            raise TypeError("unmodified=True is for a command; a function finds the domain as its first argument")
        else:
            self.name = what.__qualname__
            self._start(_order(what, args, before), options)
        name_process(self.pid, f"Program {self.name}")

    def _start(self, order: bytes, options: dict[str, Any]) -> None:
        work = os.memfd_create("program")
        try:
            os.write(work, order)
            self._report = os.memfd_create("program")
            command = [
                sys.executable,
                *(f"-W{option}" for option in sys.warnoptions),
                "-c",
                _CHILD,
                json.dumps(sys.path),
                str(work),
                str(self._report),
            ]
            self.process = _popen(command, {**options, "pass_fds": (work, self._report)})
        except BaseException:
            self._forget()
            raise
        finally:
            os.close(work)

    @property
    def pid(self) -> int:
        """Of the process; of an unmodified program its own, and not that of `gntalloc run`."""
        return self.process.pid if self._unmodified is None else self._unmodified.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait until it ends.

        Returns:
            Its exit status; of one that was killed, minus the signal's number. A function's is 0, or 1 if it raised.

        Raises:
            TimedOut: it has not ended.
        """
        self._asked = True
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"{self!r} has not ended within {timeout} s") from None

    def result(self, *, timeout: float | None = None) -> Any:
        """Wait until it ends.

        Returns:
            What the function returned; of a command None, if its exit status is 0.

        Raises:
            Exception: what the function raised, with its traceback there as a note.
            ProgramFailed: it was killed, or ended in another way; or its result cannot be pickled.
            TimedOut: it has not ended.
        """
        status = self.wait(timeout=timeout)
        words = self.last_words
        if status >= 0 and words:
            returned, value, trace = pickle.loads(words)
            if returned:
                return value
            value.add_note(f"in {self!r}:\n{trace}")
            raise value
        if status or self._report >= 0:
            raise ProgramFailed(f"{self!r} {self.ending}")
        return None

    @property
    def ending(self) -> str:
        """In words, how it ended."""
        status = self.process.poll()
        if status is None:
            return "is still running"
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    @property
    def last_words(self) -> bytes:
        """What it reported before it ended."""
        return os.pread(self._report, os.fstat(self._report).st_size, 0) if self._report >= 0 else b""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal. With SIGKILL, which is what is sent if not told otherwise, wait until it is gone."""
        self._asked = True
        (self._unmodified or self.process).send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        """Kill it if it runs, and forget it; of an unmodified program also all that it has left. Can be repeated."""
        if self._unmodified is not None:
            self._unmodified.close()
        elif self.running:
            self.kill()
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._asked and not self.running:
                self.result()  # nobody has looked, so a failure would go unnoticed
        finally:
            self.close()

    def __repr__(self) -> str:
        return f"<Program {self.name} pid {self.pid}>"

    def _forget(self) -> None:
        report, self._report = self._report, -1
        if report >= 0:
            os.close(report)
        process = getattr(self, "process", None)
        for stream in (process.stdin, process.stdout, process.stderr) if process is not None else ():
            if stream is not None:
                stream.close()


def _popen(command: list[str], options: dict[str, Any]) -> subprocess.Popen[Any]:
    """Popen, whose errors are about the command and not about subprocess."""
    try:
        return subprocess.Popen(command, **options)
    except OSError as error:
        raise error.with_traceback(None) from None


def environ(domain: Domain) -> dict[str, str]:
    """Give the environment of a program in `domain`: this one's, and where the domain and its xenstore are."""
    found = {**os.environ, "GNTALLOC_DOMAIN": domain.address}
    if domain.on_machine:
        found["XENSTORED_PATH"] = store_path(os.path.dirname(domain.address), domain.domid)
    return found


def _order(function: Callable[..., Any], args: tuple[Any, ...], before: Callable[[], None] | None) -> bytes:
    """Pickle what a child needs to call this."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):  # a class method belongs to the class that it is asked of
        module, name = owner.__module__, f"{owner.__qualname__}.{function.__name__}"
    else:
        module, name = function.__module__, function.__qualname__
    if "<" in name:
        raise ValueError(f"{name} cannot be called in another process: write it at the top level of its module")
    file = getattr(sys.modules[module], "__file__", None)
    return pickle.dumps((module, file and os.path.abspath(file), name, pickle.dumps((before, args))))


# In the child.


def main() -> None:
    """Do what the order says, and report."""
    work, report = map(int, sys.argv[2:4])
    last_words.descriptor = report
    os.set_inheritable(report, False)
    with open(work, "rb") as order:
        order.seek(0)
        module, file, name, rest = pickle.load(order)
    try:
        function: Any = _module(module, file)
        for part in name.split("."):
            function = getattr(function, part)
        before, args = pickle.loads(rest)
        if before is not None:
            before()
        told = True, function(current_domain(), *args), ""
    except Exception as error:
        told = False, error, _stack_of(error)
    last_words(_packed(name, told))
    sys.exit(0 if told[0] else 1)


def _stack_of(error: Exception) -> str:
    """Where it was raised, without our own part, and without the error itself, which is told beside it."""
    error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
    whole = "".join(traceback.format_exception(error))
    return whole.removesuffix("".join(traceback.format_exception_only(error))).rstrip("\n")


def _packed(name: str, told: tuple[bool, Any, str]) -> bytes:
    try:
        data = pickle.dumps(told)
        pickle.loads(data)  # an exception may be one that only seems to fit
    except Exception as error:
        what = f"{name} {'returned' if told[0] else 'raised'} {told[1]!r}"
        return pickle.dumps((False, ProgramFailed(f"{what}, which pickle cannot carry: {error}"), told[2]))
    return data


class _LastWords:
    """Where the program that this process is reports to."""

    descriptor = -1

    def __call__(self, words: bytes) -> None:
        """Report; once."""
        os.write(self.descriptor, words)


last_words = _LastWords()


def _module(name: str, file: str | None) -> ModuleType:
    """Import the module of that name if it is that file, else the file under that name."""
    if name == "__main__":
        name = "__mp_main__"  # as multiprocessing calls it, so that `if __name__ == "__main__"` is not run
    else:
        try:
            module = importlib.import_module(name)
            if file is None or os.path.abspath(getattr(module, "__file__", None) or "") == file:
                return module
        except ImportError:
            if file is None:
                raise
    spec = importlib.util.spec_from_file_location(name, file) if file else None
    if spec is None or spec.loader is None:
        raise ProgramFailed(f"the module {name} cannot be found in another process; have its functions in a file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if name == "__mp_main__":
        sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module
