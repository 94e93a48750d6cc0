"""The command `seg3dcam`: its commands put together, and how each run of it ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from seg3dcam.cli.calibrate import calibrate
from seg3dcam.cli.cohort import cohort
from seg3dcam.cli.cohort_compare import cohort_compare
from seg3dcam.cli.cohort_map import cohort_map
from seg3dcam.cli.compare import compare
from seg3dcam.cli.demo import demo
from seg3dcam.cli.evaluate import evaluate
from seg3dcam.cli.explain import Termination, explain
from seg3dcam.cli.features import features
from seg3dcam.cli.layers import layers
from seg3dcam.cli.methods import methods
from seg3dcam.cli.printing import complain, out, plain_warnings
from seg3dcam.cli.uncertainty import uncertainty
from seg3dcam.errors import ConfigError, EmptyRegionError, LayerError, Seg3dcamError, TargetError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Explain 3D segmentation networks: class activation maps in patient space.",
)
for command in (
    explain,
    cohort,
    cohort_compare,
    cohort_map,
    evaluate,
    compare,
    uncertainty,
    calibrate,
    layers,
    features,
    methods,
    demo,
):
    app.command()(command)

#: What may stand behind a flag by mistake, as in `--trust true`.
_YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a failure, 2 wrong use, 130 ended by Ctrl-C, 143 ended by SIGTERM.
    """
    try:
        with plain_warnings(), _ended_in_order():
            _check_flags(sys.argv[1:])
            app(prog_name="seg3dcam")
    except EmptyRegionError as error:
        complain(error, 1)
    except (ConfigError, LayerError, TargetError) as error:
        complain(error, 2)
    except (Seg3dcamError, MemoryError) as error:
        complain(str(error) or "out of memory", 1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which may not be imported
            complain(str(error) or "out of memory", 1)
        if "allocate memory" not in str(error) and "enough memory" not in str(error):
            raise
        complain(f"out of memory: {error}", 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"seg3dcam {version('seg3dcam')}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Explain 3D segmentation networks: class activation maps in patient space."""


def _check_flags(words: list[str]) -> None:
    """Raise ConfigError where a flag is given a value, which would be read as another scan."""
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands", {}).values()]
    parameters = [parameter for command in commands for parameter in command.params]
    flags = {name for p in parameters if getattr(p, "is_flag", False) for name in p.opts}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        given = value if equals else following
        no_scan = given.lower() in _YES_OR_NO and not Path(given).exists()
        if flag in flags and (equals or no_scan):
            raise ConfigError(
                f"{flag} {given}: {flag} is a flag, which takes no value. Write {flag} alone for "
                "yes, and leave it out for no"
            )


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does, with everything cleaned up.

    The first of them ends it; those that follow would only disturb the cleaning up.
    """

    def end(number: int, frame: Any) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        raise Termination if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    ends = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ends.append(signal.SIGINT)  # else a shell has asked to ignore it
    before = {one: signal.signal(one, end) for one in ends}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
