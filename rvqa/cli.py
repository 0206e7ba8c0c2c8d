"""Command line: every command a thin call of the library. Exit codes: 0 fine, 2 wrong use or input, 1 failure."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer

from rvqa.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Single cells as ten tokens that a language model reads and writes.",
)

CellsIn = Annotated[Path, typer.Argument(help="Cells to read: .h5ad with raw counts.", show_default=False)]
ModelIn = Annotated[Path, typer.Option("--model", "-m", help="Model directory, as `rvqa fit` writes it.")]
FileOut = Annotated[Path, typer.Option("--output", "-o", help="File to write (.h5ad).")]
Layer = Annotated[str | None, typer.Option(help="Where the counts are: a layer, or `raw`. Default: X.")]
LibrarySize = Annotated[str | None, typer.Option(help="obs column with every cell's total counts over all genes.")]
Recover = Annotated[bool, typer.Option("--recover", help="Turn log1p values back into counts, if they prove them.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def fit(
    references: Annotated[list[Path], typer.Argument(help="Labelled reference cells: .h5ad files with raw counts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    labels: Annotated[str, typer.Option(help="obs column with cell types.")] = "cell_type",
    condition: Annotated[str | None, typer.Option(help="obs column with perturbations.")] = None,
    control: Annotated[str | None, typer.Option(help="Value of --condition for control cells.")] = None,
    base: Annotated[str | None, typer.Option(help="Pretrained causal language model to continue from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the language model; default in docs.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Make a model from labelled reference cells, in minutes on a laptop."""
    from rvqa.files import read_h5ad
    from rvqa.model import require_new_directory
    from rvqa.training.fit import fit_files, settings_for

    require_new_directory(output, force=force)
    model = fit_files(
        [read_h5ad(path) for path in references],
        names=[path.name for path in references],
        labels=labels,
        condition=condition,
        control=control,
        layer=layer,
        library_size_key=library_size_key,
        base=base,
        settings=settings_for(seed, steps=steps),
        progress=not quiet,
    )
    model.save_pretrained(output, force=force)
    print(f"{output}: {len(model.card.labels)} labels, {len(model.card.perturbations)} perturbations")


@app.command()
def encode(
    cells: CellsIn,
    model: ModelIn,
    output: FileOut,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
) -> None:
    """Tokenize cells: adds obsm rvqa_codes and X_rvqa."""
    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad

    require_writable(output, force=force)
    adata = read_h5ad(cells)
    rvqa.encode(adata, rvqa.load(model), layer=layer, library_size_key=library_size_key, recover=recover)
    write_h5ad(adata, output, force=force)
    print(f"{output}: codes of {adata.n_obs:,} cells")


@app.command()
def decode(
    cells: Annotated[Path, typer.Argument(help=".h5ad with obsm rvqa_codes, as `rvqa encode` writes it.")],
    model: ModelIn,
    output: FileOut,
    genes: Annotated[str | None, typer.Option(help="Symbols, separated by commas; default: all of the model.")] = None,
    force: Force = False,
) -> None:
    """Expected expression of codes, in counts per 10,000."""
    import pandas as pd
    from anndata import AnnData

    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad

    require_writable(output, force=force)
    adata = read_h5ad(cells)
    if "rvqa_codes" not in adata.obsm:
        raise InputError(f"{cells} has no obsm['rvqa_codes']. Make them: rvqa encode {cells} -m {model} -o OUT.h5ad")
    loaded = rvqa.load(model)
    names = [name.strip() for name in genes.split(",")] if genes else list(loaded.cell_tokenizer.axis.symbols)
    expression = rvqa.decode(adata.obsm["rvqa_codes"], loaded, genes=names)
    decoded = AnnData(X=expression, obs=adata.obs, var=pd.DataFrame(index=names))
    decoded.uns["rvqa"] = {"version": rvqa.__version__, "model": loaded.source, "X": "expected counts per 10,000"}
    write_h5ad(decoded, output, force=force)
    print(f"{output}: {decoded.n_obs:,} cells x {decoded.n_vars:,} genes")


@app.command()
def annotate(
    cells: CellsIn,
    model: ModelIn,
    output: FileOut,
    labels: Annotated[
        str | None, typer.Option(help="Labels to choose from, separated by commas; default: all.")
    ] = None,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Annotate cells with cell types: adds obs rvqa_cell_type and rvqa_confidence, and the codes."""
    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad

    require_writable(output, force=force)
    adata = read_h5ad(cells)
    rvqa.annotate(
        adata,
        rvqa.load(model),
        labels=[label.strip() for label in labels.split(",")] if labels else None,
        layer=layer,
        library_size_key=library_size_key,
        recover=recover,
        progress=not quiet,
    )
    write_h5ad(adata, output, force=force)
    for name, count in adata.obs["rvqa_cell_type"].value_counts().items():
        confidence = adata.obs["rvqa_confidence"][adata.obs["rvqa_cell_type"] == name].median()
        print(
            f"{name:30s} {count:8,d} cells  median confidence {confidence:.2f}" if count else f"{name:30s} {0:8d} cells"
        )


@app.command()
def perturb(
    cells: CellsIn,
    model: ModelIn,
    output: FileOut,
    perturbation: Annotated[str, typer.Option("--perturbation", "-p", help="Perturbation the model was taught.")],
    cell_type_key: Annotated[str, typer.Option(help="obs column with cell types.")] = "cell_type",
    control_key: Annotated[str | None, typer.Option(help="obs column with conditions.")] = None,
    control_value: Annotated[str | None, typer.Option(help="Its value for control cells.")] = None,
    n_samples: Annotated[int, typer.Option(help="Predicted cells for each control cell.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Predict what control cells look like under a perturbation, with counts."""
    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad

    require_writable(output, force=force)
    predicted = rvqa.perturb(
        read_h5ad(cells),
        rvqa.load(model),
        perturbation=perturbation,
        cell_type_key=cell_type_key,
        control_key=control_key,
        control_value=control_value,
        n_samples=n_samples,
        seed=seed,
        layer=layer,
        library_size_key=library_size_key,
        recover=recover,
        progress=not quiet,
    )
    write_h5ad(predicted, output, force=force)
    print(f"{output}: {predicted.n_obs:,} predicted cells x {predicted.n_vars:,} genes under {perturbation}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")] = Path(
        "demo-output/model"
    ),
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole path on real cells: fit, tokenize, annotate held-out donors, predict a perturbation."""
    from rvqa.demo import run

    results = run(output, seed=seed, progress=not quiet, out=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(results))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, and which kernels are live or why not."""
    from rvqa.doctor import report, text

    facts = report()
    print(json.dumps(facts) if as_json else text(facts))


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as a sentence, others with their kind."""
    kind = "" if category.__module__.startswith("rvqa") else f" ({category.__name__})"
    print(f"rvqa: warning{kind}: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; input errors become one sentence and exit code 2."""
    warnings.showwarning = _one_line
    try:
        app()
    except InputError as error:
        print(f"rvqa: {error}", file=sys.stderr)
        sys.exit(2)
