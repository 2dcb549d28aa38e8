"""Where the `zemoe` command begins: signals and output streams, before anything large is imported.

It is a module of its own because `import zemoe` imports torch, for seconds: a Ctrl-C in them would end in a traceback
before a line of the package had run. Exit codes beside those of the commands: 130 after Ctrl-C, 143 after SIGTERM, 141
where whoever read the output is gone, 1 where it can't be written.
"""

import os
import sys

try:
    import io
    import signal
    import threading
    import time
except KeyboardInterrupt:
    os._exit(130)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 10  # to tidy up
_AGAIN = 0.5  # seconds; an exception that nobody deals with by then was swallowed: numpy's imports do that
_GONE = 128 + signal.SIGPIPE


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which whoever tidies up after Ctrl-C tidies up after too."""


def _quiet(*_: object) -> None:
    pass


class _Signals:
    """came: the first SIGINT or SIGTERM, 0 before. tidy: raise KeyboardInterrupt for it, instead of ending at once.
    end: when whatever goes on is ended.
    """

    def __init__(self) -> None:
        self.came, self.tidy, self.end = 0, False, 0.0
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as for what runs in the background of a shell, or nohup
                signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        again, self.came = bool(self.came), self.came or number
        threading.excepthook = sys.excepthook = _quiet
        sys.unraisablehook = self._lost
        if self.tidy and not again:
            self.end = time.monotonic() + _SECONDS
            signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
            raise self._exception()
        self._end()

    def _exception(self) -> KeyboardInterrupt:
        return KeyboardInterrupt() if self.came == signal.SIGINT else _Terminated()

    def _look(self, *_: object) -> None:
        """Called again and again: end what takes too long, and raise once more what was swallowed."""
        if time.monotonic() > self.end:
            self._end()
        error = sys.exc_info()[1]  # what an `except` or `finally` deals with just now, or what that came out of
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__cause__ or error.__context__
        if error is None and self.tidy:
            raise self._exception()

    def _lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Called back by compiled code, Python can't hand the exception on, and drops it."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._end()

    def _end(self) -> None:
        if self.tidy:
            _show_cursor()
        os._exit(128 + self.came)


def _show_cursor() -> None:
    """On a terminal, where a progress display may have hidden it."""
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.write(descriptor, b"\x1b[0m\x1b[?25h\n")
            return


class _Output(io.FileIO):
    """Standard output. What can't be written ends the process, once: from then on all goes to /dev/null."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                _complain(f"standard output can't be written ({error.strerror})")
            # No exception that anyone on the way takes for an error of his own.
            raise SystemExit(_GONE if isinstance(error, BrokenPipeError) else 1) from None


class _Errors(io.FileIO):
    """Standard error. What can't be written is dropped: there is nowhere to say so."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _complain(message: str) -> None:
    print(f"zemoe: error: {message}", file=sys.stderr, flush=True)


def _open_streams() -> None:
    """SystemExit if there is no standard output. Standard error that is closed becomes /dev/null."""
    closed = sys.stdout is None
    for descriptor in range(3):  # else the next file that is opened gets that number, and what is meant for the stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, kind, descriptor in (("stderr", _Errors, 2), ("stdout", _Output, 1)):
        old = getattr(sys, name)
        encoding, by_line = (old.encoding, old.line_buffering) if old else ("utf-8", True)
        raw = io.BufferedWriter(kind(descriptor, "w", closefd=False))
        # replace: a model may write what the encoding hasn't got
        stream = io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=by_line)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if closed:
        _complain("standard output is closed; redirect it to /dev/null to have none")
        raise SystemExit(1)


def _check_working_folder() -> None:
    """SystemExit if it was deleted: there MKL ends the process with a line about files that are all right."""
    try:
        os.getcwd()
    except FileNotFoundError:
        _complain("the working folder was deleted; change to one that is there")
        raise SystemExit(1) from None


def main() -> int:
    """Run the command line of this process; the exit code."""
    signals = _Signals()
    code = 1
    try:
        _open_streams()
        _check_working_folder()
        from zemoe import cli

        cli.app()  # what it imports; from here on there may be something to tidy up
        signals.tidy = True
        code = cli.main()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        # A KeyboardInterrupt in the middle of an import can come out of compiled code as another exception.
        if not signals.came:
            raise
        code = 128 + signals.came
    finally:
        signals.tidy = False
    if not signals.came:
        return code
    code = 128 + signals.came if code == 130 else code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # what compiled code still does in threads is not waited for
