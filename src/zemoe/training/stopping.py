"""SIGINT and SIGTERM as a request to end after the step, instead of an end in the middle of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """asked: whether a signal came."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """While this is active, the signals set `asked`; a second SIGINT does what SIGINT did before.

    Under torchrun a Ctrl-C arrives more than once, from the terminal and from torchrun: there all of them only ask.
    Outside of the main thread Python takes no signal handlers, and nothing happens here.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.asked = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
