"""Command line: every command a thin call of the library.

Exit codes: 0 fine; 2 wrong use or input, also no permission or a full disk; 3 a server stopped
answering; 1 stopped (Ctrl-C), or a fault of rvqa.
"""

import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rvqa.cli import fitting, using  # noqa: F401  registers their commands, in the order of --help
from rvqa.cli.options import AsJson, Quiet, app
from rvqa.cli.terminal import Stopped, show, show_json, show_warning, standard_output, stop, what_stands
from rvqa.errors import EngineError, InputError


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")] = Path(
        "demo-output/model"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole path on real cells: fit, tokenize, annotate held-out donors, predict a perturbation."""
    from rvqa.demo import run

    results = run(output, seed=seed, progress=not quiet, out=sys.stderr if as_json else sys.stdout)
    if as_json:
        show_json(results)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, kernels that are live or why not, machine, data folders; exit code 1 if rvqa cannot be used."""
    from rvqa.doctor import report, text

    facts = report()
    if as_json:
        show_json(facts)
    else:
        show(text(facts))
    if facts["problems"]:
        sys.exit(1)


def main() -> None:
    """Run the command line; input errors become one sentence and exit code 2."""
    warnings.showwarning = show_warning
    earlier = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with standard_output():
            app()
    except InputError as error:
        show(f"rvqa: {error}", file=sys.stderr)
        sys.exit(2)
    except EngineError as error:
        show(f"rvqa: {error}", file=sys.stderr)
        sys.exit(3)
    except Stopped:
        bar = "\n" if sys.stderr.isatty() else ""  # a progress bar stands on the line
        show(f"{bar}rvqa: Stopped; {what_stands()}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        show("rvqa: This is a fault of rvqa. Please report it to its authors with the lines above.", file=sys.stderr)
        sys.exit(1)
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
