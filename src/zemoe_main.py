"""The `zemoe` command begins here. It sets up signals and output streams before anything large is imported.

It is a module outside of the package because `import zemoe` imports torch, which takes seconds: a Ctrl-C in them would
end in a traceback before a line of the package had run.

Exit codes beside those of the commands: 130 after Ctrl-C, 143 after SIGTERM, 141 if whoever read the output is gone, 1
if the output can't be written.
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
_SECONDS = 10  # for tidying up after a signal
_AGAIN = 0.5  # seconds; a signal's exception that nobody has dealt with by then was swallowed, as numpy's imports do
_GONE = 128 + signal.SIGPIPE


class _Terminated(KeyboardInterrupt):
    """Is raised for SIGTERM. As a KeyboardInterrupt it reaches everyone who tidies up after Ctrl-C."""


def _quiet(*_: object) -> None:
    """Show nothing of an exception, in place of the hooks that would print a traceback."""


class _Signals:
    """Ends the process for SIGINT and SIGTERM: at once, or with time to tidy up.

    came: the first of these signals that came, 0 before. tidy: whether KeyboardInterrupt is raised for it, instead of
    ending the process at once. end: the time at which the process is ended if it is still tidying up.
    """

    def __init__(self) -> None:
        self.came, self.tidy, self.end = 0, False, 0.0
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background jobs and nohup ignore some
                signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        """Handle a signal: raise for the first one if there is something to tidy up, otherwise end the process."""
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
        """End what takes too long, and raise the exception once more if it was swallowed. A timer calls this."""
        if time.monotonic() > self.end:
            self._end()
        # Somebody deals with our exception if it is the one that an `except` or `finally` is at, or a cause of that.
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__cause__ or error.__context__
        if error is None and self.tidy:
            raise self._exception()

    def _lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """End the process if our exception is dropped, as it is in a function that compiled code calls back."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._end()

    def _end(self) -> None:
        if self.tidy:
            _show_cursor()
        os._exit(128 + self.came)


def _show_cursor() -> None:
    """Show a terminal's cursor again, which a progress display may have hidden."""
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.write(descriptor, b"\x1b[0m\x1b[?25h\n")
            return


class _Output(io.FileIO):
    """Standard output. If something can't be written the process ends; what is written after that goes to /dev/null."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                _complain(f"standard output can't be written ({error.strerror})")
            # A SystemExit, for anyone on the way might take an OSError for one of his own.
            raise SystemExit(_GONE if isinstance(error, BrokenPipeError) else 1) from None


class _Errors(io.FileIO):
    """Standard error. What can't be written is dropped, for there is no place left to say so."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _complain(message: str) -> None:
    """Write an error line to standard error."""
    print(f"zemoe: error: {message}", file=sys.stderr, flush=True)


def _open_streams() -> None:
    """Open standard output and standard error anew.

    Raise SystemExit if standard output is closed. Standard error that is closed becomes /dev/null.
    """
    closed = sys.stdout is None
    for descriptor in range(3):  # the next file that is opened would get a free number, and the stream's text with it
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, kind, descriptor in (("stderr", _Errors, 2), ("stdout", _Output, 1)):
        old = getattr(sys, name)
        # With PYTHONUNBUFFERED a stream writes through, and says that it is not buffered by line.
        encoding, by_line = (old.encoding, old.line_buffering or old.write_through) if old else ("utf-8", True)
        raw = io.BufferedWriter(kind(descriptor, "w", closefd=False))
        # "replace", because a model may write characters that the encoding hasn't got.
        stream = io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=by_line)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if closed:
        _complain("standard output is closed; redirect it to /dev/null to have none")
        raise SystemExit(1)


def _check_working_folder() -> None:
    """Raise SystemExit if the working folder was deleted.

    MKL would end the process there, with a line about files that are all right.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _complain("the working folder was deleted; change to one that is there")
        raise SystemExit(1) from None


def main() -> int:
    """Run the command line of this process, and return its exit code."""
    signals = _Signals()
    code = 1
    try:
        _open_streams()
        _check_working_folder()
        from zemoe import cli

        cli.app()  # imports what it needs; only after that there may be something to tidy up
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
    os._exit(code)  # without waiting for threads of compiled code
