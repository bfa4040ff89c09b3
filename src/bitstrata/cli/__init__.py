"""The command line. `bitstrata COMMAND --help` explains each command; each lives in a file of its own.

Exit codes: 0 done, 1 an error (one line on stderr; --debug shows the traceback), 2 wrong usage.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import tyro

from bitstrata.cli.bench import Bench
from bitstrata.cli.common import CommandError
from bitstrata.cli.demo import Demo
from bitstrata.cli.eval import Eval
from bitstrata.cli.export import Export
from bitstrata.cli.info import Info
from bitstrata.cli.inspect import Inspect
from bitstrata.cli.kernels import fill_in
from bitstrata.cli.lower import Lower
from bitstrata.cli.pack import Pack
from bitstrata.cli.plan import Plan
from bitstrata.cli.quantize import Quantize
from bitstrata.cli.recipes import Recipes
from bitstrata.cli.report import Report
from bitstrata.cli.reproduce import Reproduce
from bitstrata.cli.run import Run
from bitstrata.cli.train import Train
from bitstrata.cli.tune import Tune
from bitstrata.cli.verify import Verify

DESCRIPTION = """Low-bit networks: trained once, one artifact, run at every bit-width in pure integer arithmetic.

Serving (numpy only): info, run, bench, tune, export. Everything else needs pip install "bitstrata[train]".
Any command takes --debug for a traceback instead of a one-line error."""

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Lower, tyro.conf.subcommand("lower")]
    | Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = fill_in([argument for argument in arguments if argument != "--debug"])
    try:
        command = tyro.cli(Command, prog="bitstrata", description=DESCRIPTION, args=arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        command.run()
    except SystemExit as stop:  # a run that was asked to stop, and has said so
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("bitstrata: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except (CommandError, ValueError, OSError, ArithmeticError, ImportError, KeyError, RuntimeError) as error:
        if debug:
            traceback.print_exc()
        print(f"bitstrata: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: BaseException) -> str:
    """The message on one line; the type is named where the message alone would not be understood."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__}: {text}"
    return text
