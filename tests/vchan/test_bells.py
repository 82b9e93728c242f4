"""Threads that share one bell: who does not sleep after all leaves nobody asleep beside."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from gntalloc.vchan.bells import Bells


class SilentPort:
    """Never rings."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def fileno(self) -> int:
        return self.reading

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


class HeldALittleTooLong:
    """The sleepers' lock; who gets it goes on only when another has begun to wait beside."""

    def __init__(self, bells: Bells, other: threading.Thread) -> None:
        self.lock = threading.Lock()
        self.bells = bells
        self.other = other

    def acquire(self, blocking: bool) -> bool:
        if not self.lock.acquire(blocking):
            return False
        if not self.other.ident:
            self.other.start()
            while not self.bells._beside:
                time.sleep(0.001)
        return True

    def release(self) -> None:
        self.lock.release()


def test_who_had_news_wakes_who_waits_beside() -> None:
    port: Any = SilentPort()
    bells = Bells(port)
    bells.news = 7
    other = threading.Thread(target=bells.sleep, args=(7, 30), daemon=True)
    bells._sleeping = HeldALittleTooLong(bells, other)  # type: ignore[assignment]
    bells.sleep(6, 30)  # it has missed something, so it does not sleep
    other.join(5)
    assert not other.is_alive()
    bells.close()
