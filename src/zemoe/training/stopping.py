"""SIGINT and SIGTERM as a request to end after the step, instead of an end in the middle of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """signal: the name of the first one that came, None before; asked: whether there was one."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Let signals set `asked` while this is active; a second SIGINT does what SIGINT did before.

    One that is ignored stays ignored, as nohup and a shell's background leave SIGINT. Under torchrun a Ctrl-C arrives
    more than once, from the terminal and from torchrun: there all of them only ask. Outside of the main thread Python
    takes no signal handlers, and nothing happens here.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def ask(number: int, frame: object) -> None:
        stop.signal = stop.signal or signal.Signals(number).name
        if "TORCHELASTIC_RUN_ID" not in os.environ and signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
