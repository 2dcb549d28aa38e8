"""The `zemoe` command: its options, and how its errors and exit codes come about.

Exit codes: 0; 1 for what failed on the way; 2 for what was asked wrongly; 130 after Ctrl-C. An error is one line on
stderr that says what to do. The process begins in `zemoe_main`, which imports this.
"""

# No `from __future__ import annotations` here: typer evaluates annotations, and those of a command name what the
# function around it imported.

import json
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer


def _complain(message: str) -> None:
    from .messages import one_line

    print(one_line(f"zemoe: error: {message}"), file=sys.stderr)


class _Notes(logging.Handler):
    """What the library's log says at level INFO, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"zemoe: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _notes() -> Iterator[None]:
    logger, handler = logging.getLogger("zemoe"), _Notes()
    before, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level = before


@contextmanager
def _one_line_errors() -> Iterator[None]:
    import typer

    from .terminal import CommandError

    try:
        yield
    except CommandError as error:
        _complain(str(error))
        raise typer.Exit(error.code) from None
    except OSError as error:  # a file that can't be written; of the output streams zemoe_main takes care
        _complain(str(error))
        raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    import typer

    from ._version import __version__

    if wanted:
        print(f"zemoe {__version__}")
        raise typer.Exit


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result))


def app() -> "typer.Typer":
    """Return the command line as typer has it."""
    import typer

    cli = typer.Typer(
        name="zemoe",
        help="Zero-expert mixture-of-experts layers for PyTorch.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @cli.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    for add_command in (_add_generate, _add_doctor, _add_bench, _add_train, _add_report):  # as --help lists them
        add_command(cli)
    return cli


def _add_generate(cli: "typer.Typer") -> None:
    """Add `zemoe generate` to the command line."""
    import typer

    from .backends import BACKENDS
    from .generate.command import DTYPES, EMBEDDED, Request, run
    from .generate.decoding import Sampling
    from .terminal import CommandError, open_console

    text, source = partial(typer.Option, rich_help_panel="Text"), partial(typer.Option, rich_help_panel="Model")

    @cli.command(epilog="Example: zemoe generate --style bible --prompt '1 In the beginning' --seed 7")
    def generate(
        prompt: Annotated[str | None, text(help="Text to go on from.", show_default="one that fits the style")] = None,
        style: Annotated[
            str | None, text(help="A style token that the model has.", show_default="austen, if it has that")
        ] = None,
        max_new_tokens: Annotated[int, text(help="Stop after so many tokens.")] = 200,
        temperature: Annotated[float, text(help="0 takes the likeliest token each time.")] = 0.8,
        top_p: Annotated[float, text(help="Draw from the likeliest tokens that together reach this.")] = 0.95,
        seed: Annotated[int | None, text(help="Same seed, same text.", show_default="drawn, and shown")] = None,
        model: Annotated[
            Path, source(help="A LongCat-Flash checkpoint folder.", show_default="the embedded model")
        ] = EMBEDDED,
        backend: Annotated[
            str | None,
            source(help=f"Computes the experts: {' or '.join(BACKENDS)}.", show_default="first fit"),
        ] = None,
        device: Annotated[str, source(help="cpu, cuda, cuda:1 ...; zemoe doctor lists them.")] = "cpu",
        dtype: Annotated[str, source(help=f"{', '.join(DTYPES)}; auto is the checkpoint's own.")] = "auto",
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")
        ] = False,
    ) -> None:
        """Write text with a zero-expert language model, each token shaded by the FFN experts that it used."""
        with _one_line_errors():
            try:
                sampling = Sampling(
                    temperature=temperature, top_p=top_p, seed=secrets.randbelow(2**31) if seed is None else seed
                )
            except ValueError as error:
                raise CommandError(f"--{str(error).replace('_', '-', 1)}") from None
            request = Request(
                sampling=sampling,
                prompt=prompt,
                style=style,
                max_new_tokens=max_new_tokens,
                model=model,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            status = open_console(sys.stderr)
            code, result = run(request, status if as_json else open_console(sys.stdout), status)
            if as_json:
                _print_json(result)
        raise typer.Exit(code)


def _add_doctor(cli: "typer.Typer") -> None:
    """Add `zemoe doctor` to the command line."""
    import typer

    @cli.command()
    def doctor(
        as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    ) -> None:
        """Show versions, devices and backends, and test every backend against the reference."""
        from .doctor import examine, findings
        from .terminal import open_console

        found = examine()
        if as_json:
            _print_json(found)
        else:
            console = open_console(sys.stdout)
            for table in findings(found):
                console.print(table, "")
        raise typer.Exit(0 if found["ok"] else 1)


def _add_bench(cli: "typer.Typer") -> None:
    """Add `zemoe bench` to the command line."""
    import typer

    from .bench.baselines import BASELINES
    from .bench.cases import load_cases
    from .terminal import open_console

    layer, timing = partial(typer.Option, rich_help_panel="Layer"), partial(typer.Option, rich_help_panel="Timing")
    listed = "; several with commas"

    @cli.command(epilog="Example: zemoe bench first --tokens 1,16,64 --baseline torch,eager --plot layer.png")
    def bench(
        cases: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[CASE]...", help=f"{', '.join(load_cases())}.", show_default="those that suit the device"
            ),
        ] = None,
        tokens: Annotated[str | None, layer(help=f"T{listed}.", show_default="by case")] = None,
        zero_share: Annotated[
            str | None,
            layer(help=f"Share of all choices that zero experts get{listed}.", show_default="chance"),
        ] = None,
        skew: Annotated[
            float | None, layer(help="Share of the FFN choices that one expert gets.", show_default="chance")
        ] = None,
        dtype: Annotated[
            str | None, layer(help="float32, bfloat16 or float16.", show_default="float32 on the CPU, else bfloat16")
        ] = None,
        device: Annotated[str | None, layer(help="cpu, cuda, cuda:1 ...", show_default="a GPU if there is one")] = None,
        baseline: Annotated[
            str, timing(help=f"What to time beside it: {', '.join(BASELINES)}{listed}; or none.")
        ] = "torch,eager",
        repeats: Annotated[
            int | None,
            timing(help="Timed rounds, of which the median counts.", show_default="7 on the CPU, 20 on a GPU"),
        ] = None,
        seed: Annotated[int, timing(help="Of weights and inputs.")] = 0,
        csv: Annotated[Path | None, timing(help="Write the rows there, with commit and versions.")] = None,
        plot: Annotated[
            Path | None, timing(help="Draw them there, as .png, .svg or .pdf; needs the extra `report`.")
        ] = None,
        commit: Annotated[
            str | None, timing(help="What to write for the commit of this code.", show_default="what git says")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")
        ] = False,
    ) -> None:
        """Time one layer, router included, beside baselines and the machine's floor, after checking all of them."""
        from .bench.command import run
        from .bench.request import BenchRequest, numbers

        with _one_line_errors():
            request = BenchRequest(
                cases=tuple(cases or ()),
                baselines=() if baseline == "none" else tuple(baseline.split(",")),
                tokens=numbers("--tokens", tokens, int, 1, float("inf")),
                dtype=dtype,
                device=device,
                zero_shares=numbers("--zero-share", zero_share, float, 0, 1),
                skew=skew,
                repeats=repeats,
                seed=seed,
                csv=csv,
                plot=plot,
                commit=commit,
            )
            status = open_console(sys.stderr)
            code, result = run(request, status if as_json else open_console(sys.stdout), status)
            if as_json:
                _print_json(result)
        raise typer.Exit(code)


def _add_train(cli: "typer.Typer") -> None:
    """Add `zemoe train` to the command line."""
    import typer

    from .terminal import open_console

    asked, running = partial(typer.Option, rich_help_panel="Run"), partial(typer.Option, rich_help_panel="How")

    @cli.command(epilog="Example: zemoe train --from models/tiny --data my.txt --out runs/mine")
    def train(
        data: Annotated[
            list[str] | None, asked(help="A text file, or a folder of *.txt; several with several --data.")
        ] = None,
        start: Annotated[
            str | None,
            asked(
                "--from",
                help="A LongCat-Flash checkpoint folder; models/tiny is the embedded one.",
                show_default="a new model",
            ),
        ] = None,
        out: Annotated[str | None, asked(help="The run's folder.", show_default="runs/zemoe")] = None,
        config: Annotated[Path | None, asked(help="A TOML file of settings.", show_default="none")] = None,
        changes: Annotated[
            list[str] | None, asked("--set", metavar="SECTION.KEY=VALUE", help="A setting, above those of the file.")
        ] = None,
        resume: Annotated[
            bool,
            running(
                "--resume", help="Go on from the last state; with no more than --out, with the settings found there."
            ),
        ] = False,
        dry_run: Annotated[
            bool, running("--dry-run", help="Print all settings, sizes and needs, and train nothing.")
        ] = False,
        as_json: Annotated[
            bool, running("--json", help="Print what happens as JSON lines on stdout, and nothing else there.")
        ] = False,
    ) -> None:
        """Train a zero-expert language model on text files; under torchrun, on several devices."""
        from .training import command

        request = command.TrainRequest(
            config=config,
            start=start,
            data=tuple(data or ()),
            out=out,
            overrides=tuple(changes or ()),
            resume=resume,
        )
        with _one_line_errors():
            if dry_run:
                planned = command.dry_run(request, open_console(sys.stderr if as_json else sys.stdout))
                if as_json:
                    _print_json(planned)
                raise typer.Exit
            raise typer.Exit(command.run(request, open_console(sys.stdout), as_json))


def _add_report(cli: "typer.Typer") -> None:
    """Add `zemoe report` to the command line."""
    import typer

    from .terminal import open_console

    @cli.command()
    def report(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that zemoe train wrote.")],
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")
        ] = False,
    ) -> None:
        """Draw a training run into RUN/plots, and say how it went; needs the extra `report`."""
        from .training import command

        with _one_line_errors():
            result = command.report(run, open_console(sys.stderr if as_json else sys.stdout))
        if as_json:
            _print_json(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (of the process, if `arguments` is None); the exit code."""
    import typer

    usage_error: Any = typer.BadParameter.__base__  # its own in new versions of typer, click's in old ones
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        with _notes():
            return app()(args=arguments or ["--help"], prog_name="zemoe", standalone_mode=False) or 0
    except usage_error as error:
        _complain(f"{error.format_message()} (zemoe --help tells more)")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
