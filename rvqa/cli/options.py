"""The application, and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

import rvqa
from rvqa.cli.terminal import (
    show,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Single cells as ten tokens that a language model reads and writes.",
)


def _version(*, asked: bool) -> None:
    if asked:
        show(f"rvqa {rvqa.__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=lambda asked: _version(asked=asked), is_eager=True
        ),
    ] = False,
) -> None:
    """Single cells as ten tokens that a language model reads and writes."""


CellsIn = Annotated[
    Path,
    typer.Argument(
        help="Cells to read, raw counts: .h5ad, .zarr, .h5mu, 10x's .h5 or a folder with matrix.mtx.",
        show_default=False,
    ),
]
ModelIn = Annotated[
    Path, typer.Option("--model", "-m", help="Directory that `rvqa fit` wrote; for encode also a tokenizer's.")
]
FileOut = Annotated[Path, typer.Option("--output", "-o", help="File to write: .h5ad.")]
Layer = Annotated[
    list[str] | None,
    typer.Option(
        help="Where the counts are: X, a layer, raw, or NAME=FILE for one of several files (may be repeated). "
        "Default: auto, which is X or, where X holds no raw counts, the one place that does."
    ),
]
LibrarySize = Annotated[str | None, typer.Option(help="obs column with every cell's total counts over all genes.")]
Recover = Annotated[
    bool, typer.Option("--recover", help="Turn log1p values back into counts, where the result is exact.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
EngineOption = Annotated[
    str,
    typer.Option("--engine", help="What runs the language model: hf, vllm, or a server's address, http://host:8000."),
]


def _limited(context: typer.Context, memory: str | None) -> None:
    from rvqa.data.files.memory import limited

    context.with_resource(limited(memory))


Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Most memory that reading files may take, in MiB or as 4G. Default: three quarters of the machine's.",
        callback=_limited,
        expose_value=False,
    ),
]
ReportOut = Annotated[
    Path | None, typer.Option("--report", help="Page of figures and tables to write as well (.html).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model on cells that no fit has seen.")
app.add_typer(evaluate_app, name="evaluate")
