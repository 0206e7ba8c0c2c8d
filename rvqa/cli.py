"""Command line: every command a thin call of the library.

Exit codes: 0 fine; 2 wrong use or input, also no permission or a full disk; 3 a server stopped
answering; 1 stopped (Ctrl-C), or a fault of rvqa.
"""

import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import typer

from rvqa.errors import EngineError, InputError, about

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
EngineOption = Annotated[
    str,
    typer.Option("--engine", help="What runs the language model: hf, vllm, or a server's address, http://host:8000."),
]
ReportOut = Annotated[
    Path | None, typer.Option("--report", help="Page of figures and tables to write as well (.html).")
]
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
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
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
        recover=recover,
        base=base,
        settings=settings_for(seed, steps=steps),
        progress=not quiet,
    )
    model.save_pretrained(output, force=force)
    print(f"{output}: {len(model.card.labels)} labels, {len(model.card.perturbations)} perturbations")


@app.command("fit-tokenizer")
def fit_tokenizer(
    files: Annotated[list[Path], typer.Argument(help="Cells: .h5ad files with raw counts, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Tokenizer directory to write.")],
    preset: Annotated[str, typer.Option(help="small (two cores, minutes) or atlas (36,000 genes).")] = "small",
    labels: Annotated[str, typer.Option(help="obs column with cell types, where there is one.")] = "cell_type",
    donor: Annotated[str, typer.Option(help="obs column with donors, where there is one.")] = "donor",
    condition: Annotated[str, typer.Option(help="obs column with perturbations, where there is one.")] = "condition",
    control: Annotated[str, typer.Option(help="Its values for control cells, separated by commas.")] = "control,ctrl",
    held_out: Annotated[str | None, typer.Option(help="Donors whose cells enter nothing, separated by commas.")] = None,
    validation: Annotated[str | None, typer.Option(help="Donors whose cells choose the best epoch.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs at most; default by preset.", min=2)] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a better one that end the fit; 0: none.", min=0)] = 0,
    likelihood: Annotated[str, typer.Option(help="poisson, negative_binomial or mse.")] = "poisson",
    continuous: Annotated[bool, typer.Option("--continuous", help="Without codebooks: what they are held to.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the fit's state: a killed fit goes on.")] = None,
    layer: Layer = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit a cell tokenizer alone, without a language model; under torchrun on several processes."""
    from dataclasses import replace

    from rvqa.training.tokenizer_files import fit_tokenizer_files
    from rvqa.training.tokenizer_settings import preset as settings_of

    settings = settings_of(preset)
    settings = replace(
        settings,
        epochs=settings.epochs if epochs is None else epochs,
        patience=patience,
        likelihood=likelihood,
        quantize=not continuous,
        seed=seed,
    )
    facts = fit_tokenizer_files(
        files,
        output,
        settings=settings,
        labels=labels,
        donor=donor,
        condition=condition,
        control=_names(control),
        held_out=_names(held_out),
        validation=_names(validation),
        layer=layer,
        checkpoint=checkpoint,
        device=device,
        force=force,
        progress=not quiet,
    )
    if as_json:
        _print_json(facts)
    else:
        print(
            f"{output}: {facts['genes']:,} genes, {facts['cells']['fit']:,} cells fitted in "
            f"{facts['fit_seconds']:.0f} s, {facts['peak_memory_gib']:.1f} GiB at most"
        )


evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model on cells that no fit has seen.")
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("tokenizer")
def evaluate_tokenizer(
    model: Annotated[Path, typer.Argument(help="Tokenizer directory, as `rvqa fit-tokenizer` writes it.")],
    data: Annotated[list[Path], typer.Option("--data", help="Files or folders, those of the fit among them.")],
    continuous: Annotated[
        Path | None, typer.Option(help="Directory of a fit with --continuous, for the variance that codes keep.")
    ] = None,
    labels: Annotated[str, typer.Option(help="obs column with cell types.")] = "cell_type",
    donor: Annotated[str, typer.Option(help="obs column with donors.")] = "donor",
    layer: Layer = None,
    seed: Annotated[int, typer.Option(help="Seed of draws.", min=0)] = 0,
    report: ReportOut = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a tokenizer: codes in use, meaning, hierarchy, depth, panels, decoded populations."""
    from rvqa.evaluation.tokenizer import evaluate_directory, text
    from rvqa.files import require_writable

    if report is not None:
        require_writable(report, force=force, suffix=".html")

    def say(what: str) -> None:
        if not quiet:
            print(f"rvqa: {what}", file=sys.stderr)

    result = evaluate_directory(
        model, data, continuous=continuous, labels=labels, donor=donor, layer=layer, seed=seed, say=say
    )
    if report is not None:
        from rvqa.report import command_line
        from rvqa.report.tokenizer import tokenizer_report

        tokenizer_report(result, report, title=f"Tokenizer {model.name}", command=command_line(), force=force)
    if as_json:
        _print_json(result)
    else:
        print(text(result))


@app.command()
def encode(
    cells: Annotated[
        list[Path],
        typer.Argument(help="Cells to read: .h5ad files or .zarr stores with raw counts.", show_default=False),
    ],
    model: ModelIn,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="To write: .rvq, .zarr, .parquet, or .h5ad (a copy with codes).")
    ],
    obs: Annotated[str | None, typer.Option(help="obs columns to carry along, separated by commas.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write codes into the .h5ad file that is read.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add the cells to those of an output that exists.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers do the work, or `local`.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that read and encode; default: two a core.", min=1)
    ] = None,
    recon_error: Annotated[
        bool, typer.Option("--recon-error", help="Add obs rvqa_recon_error: doublets and odd cells stand out.")
    ] = False,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as lines of JSON.")] = False,
) -> None:
    """Tokenize cells, of files of any size; a stopped run goes on where it was."""
    import rvqa
    from rvqa.files import DIAGNOSED, read_h5ad, require_writable, write_h5ad

    elsewhere = in_place or append or scheduler or obs or device != "cpu"
    alone = len(cells) == 1 and output.suffix == ".h5ad" and not elsewhere
    if (recover or recon_error) and not alone:
        raise InputError("--recover and --recon-error are for one .h5ad file that fits in memory, to .h5ad.")
    small = not os.path.isfile(cells[0]) or os.path.getsize(cells[0]) <= DIAGNOSED
    if alone and (recover or recon_error or small):
        require_writable(output, force=force, inputs=[cells[0]])
        adata, loaded = read_h5ad(cells[0]), rvqa.load(model)
        with about(cells[0]):
            rvqa.encode(
                adata, loaded, layer=layer, library_size_key=library_size_key, recover=recover, recon_error=recon_error
            )
        write_h5ad(adata, output, force=force)
        _print_coverage(adata)
        print(f"{output}: codes of {adata.n_obs:,} cells")
        return
    from rvqa.atlas.cluster import local_cluster
    from rvqa.atlas.outputs import require_output
    from rvqa.atlas.progress import Progress
    from rvqa.atlas.run import Settings, encode_files
    from rvqa.atlas.sources import expand
    from rvqa.genes import coverage_sentence
    from rvqa.model import load_tokenizer

    require_output(output, expand(cells), force=force or append, in_place=in_place)
    tokenizer = load_tokenizer(model)
    settings = Settings(layer, library_size_key, tuple(_names(obs)))
    with (
        Progress(show=not quiet, lines=sys.stdout if as_json else None) as shown,
        local_cluster(scheduler, threads) as cluster,
    ):
        facts = encode_files(
            cells,
            tokenizer,
            output,
            settings=settings,
            threads=threads,
            cluster=cluster,
            force=force,
            in_place=in_place,
            append=append,
            device=device,
            progress=shown,
            say=lambda text: None if quiet else print(f"rvqa: {text}", file=sys.stderr),
            model=str(model),
        )
    if as_json:
        _print_json(facts)
        return
    for name, report in facts["coverage"].items():
        print(
            f"genes: {coverage_sentence(report)}"
            if len(facts["coverage"]) == 1
            else f"{name}: {coverage_sentence(report)}"
        )
    print(f"{output}: codes of {facts['cells']:,} cells")


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

    require_writable(output, force=force, inputs=[cells])
    adata = read_h5ad(cells)
    if "rvqa_codes" not in adata.obsm:
        raise InputError(
            f"{cells} has no codes (obsm['rvqa_codes']). Make them with `rvqa encode`, and give its output."
        )
    loaded = rvqa.load(model)
    names = [name.strip() for name in genes.split(",")] if genes else list(loaded.cell_tokenizer.axis.symbols)
    with about(cells):
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
    engine: EngineOption = "hf",
    reasoning: Annotated[int, typer.Option(help="Tokens of evidence to write before each label.", min=0)] = 0,
    report: ReportOut = None,
    truth: Annotated[str | None, typer.Option(help="obs column of known types that the report compares with.")] = None,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Annotate cells with cell types: adds obs rvqa_cell_type and rvqa_confidence, and the codes."""
    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad
    from rvqa.obs import labels_of
    from rvqa.serving.engine import open_engine

    require_writable(output, force=force, inputs=[cells])
    if report is not None:
        require_writable(report, force=force, suffix=".html")
    elif truth is not None:
        raise InputError("--truth compares in the report, and there is none. Add --report FILE.html.")
    adata = read_h5ad(cells)
    if truth is not None:
        labels_of(adata, truth)
    loaded = rvqa.load(model, weights=engine == "hf")
    runs = open_engine(loaded, engine)
    with about(cells), _kept_replies(output, engine) as resume:
        rvqa.annotate(
            adata,
            loaded,
            labels=[label.strip() for label in labels.split(",")] if labels else None,
            engine=runs,
            reasoning=reasoning,
            resume=resume,
            layer=layer,
            library_size_key=library_size_key,
            recover=recover,
            progress=not quiet,
        )
        write_h5ad(adata, output, force=force)
    _print_coverage(adata)
    if report is not None:
        from rvqa.report import annotation_report, command_line

        title = f"Cell types of {cells.name}"
        annotation_report(adata, report, title=title, truth=truth, command=command_line(), force=force)
    for name, count in adata.obs["rvqa_cell_type"].value_counts().items():
        confidence = adata.obs["rvqa_confidence"][adata.obs["rvqa_cell_type"] == name].median()
        print(f"{name:30s} {count:8,d} cells  median confidence {confidence:.2f}")


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
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    engine: EngineOption = "hf",
    report: ReportOut = None,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Predict what control cells look like under a perturbation, with counts."""
    import rvqa
    from rvqa.files import read_h5ad, require_writable, write_h5ad
    from rvqa.serving.engine import open_engine

    require_writable(output, force=force, inputs=[cells])
    if report is not None:
        require_writable(report, force=force, suffix=".html")
    adata, loaded = read_h5ad(cells), rvqa.load(model, weights=engine == "hf")
    runs = open_engine(loaded, engine)
    columns: dict[str, Any] = {
        "cell_type_key": cell_type_key,
        "control_key": control_key,
        "control_value": control_value,
    }
    reading: dict[str, Any] = {"layer": layer, "library_size_key": library_size_key, "recover": recover}
    with about(cells), _kept_replies(output, engine) as resume:
        predicted = rvqa.perturb(
            adata,
            loaded,
            perturbation=perturbation,
            n_samples=n_samples,
            seed=seed,
            engine=runs,
            resume=resume,
            progress=not quiet,
            **columns,
            **reading,
        )
        write_h5ad(predicted, output, force=force)
    _print_coverage(predicted)
    if report is not None:
        from rvqa.report import command_line, perturbation_report

        title = f"{perturbation} on cells of {cells.name}"
        command = command_line()
        perturbation_report(
            adata, predicted, loaded, report, title=title, command=command, force=force, **columns, **reading
        )
    print(f"{output}: {predicted.n_obs:,} predicted cells x {predicted.n_vars:,} genes under {perturbation}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")] = Path(
        "demo-output/model"
    ),
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.", min=0)] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole path on real cells: fit, tokenize, annotate held-out donors, predict a perturbation."""
    from rvqa.demo import run

    results = run(output, seed=seed, progress=not quiet, out=sys.stderr if as_json else sys.stdout)
    if as_json:
        _print_json(results)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, kernels that are live or why not, machine, data folders; exit code 1 if rvqa cannot be used."""
    from rvqa.doctor import report, text

    facts = report()
    if as_json:
        _print_json(facts)
    else:
        print(text(facts))
    if facts["problems"]:
        sys.exit(1)


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


def _print_json(value: Any) -> None:
    """Print one JSON object; what is no number becomes null, since JSON has no NaN."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: plain(each) for name, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(plain(value), allow_nan=False))


@contextmanager
def _kept_replies(output: Path, engine: str) -> Iterator[Path | None]:
    """File beside the output that keeps an engine's replies until the block is done; None for the model in here."""
    if engine == "hf":
        yield None
        return
    from rvqa.files import resumable

    kept = output.with_name(f"{output.name}.replies")
    resumable.append(kept)
    yield kept
    kept.unlink(missing_ok=True)
    resumable.remove(kept)


def _names(given: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in given.split(",") if name.strip()] if given else []


def _print_coverage(adata: Any) -> None:
    """Print one line on how the genes of a file met those of the model."""
    from rvqa.genes import coverage_sentence

    print(f"genes: {coverage_sentence(adata.uns['rvqa']['coverage'])}")


class _Stopped(BaseException):
    """Ctrl-C, or a request to end; not the interrupt that click answers itself."""


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _written() -> str:
    """Say which outputs stand complete and what can go on, where the module that writes them was needed at all."""
    files = sys.modules.get("rvqa.files")
    outputs = ", ".join(map(str, files.written)) if files else ""
    folders = ", ".join(map(str, files.resumable)) if files else ""
    said = [f"{outputs} was complete by then."] if outputs else [] if folders else ["nothing was written."]
    return " ".join([*said, *([f"the same command goes on from {folders}."] if folders else [])])


def main() -> None:
    """Run the command line; input errors become one sentence and exit code 2."""
    warnings.showwarning = _one_line
    earlier = {each: signal.signal(each, _stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except InputError as error:
        print(f"rvqa: {error}", file=sys.stderr)
        sys.exit(2)
    except EngineError as error:
        print(f"rvqa: {error}", file=sys.stderr)
        sys.exit(3)
    except _Stopped:
        bar = "\n" if sys.stderr.isatty() else ""  # a progress bar stands on the line
        print(f"{bar}rvqa: Stopped; {_written()}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        print("rvqa: This is a fault of rvqa. Please report it to its authors with the lines above.", file=sys.stderr)
        sys.exit(1)
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
