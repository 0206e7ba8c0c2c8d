"""Command line: every command a thin call of the library.

Exit codes: 0 fine; 2 wrong use or input, also no permission or a full disk; 3 a server stopped
answering; 1 stopped (Ctrl-C), or a fault of rvqa.
"""

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import rvqa
from rvqa.errors import EngineError, InputError, about
from rvqa.terminal import (
    Stopped,
    show,
    show_coverage,
    show_json,
    show_places,
    show_warning,
    standard_output,
    stop,
    what_stands,
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


@app.command()
def fit(
    references: Annotated[
        list[Path], typer.Argument(help="Labelled reference cells with raw counts: .h5ad, .zarr, ...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    labels: Annotated[str, typer.Option(help="obs column with cell types.")] = "cell_type",
    condition: Annotated[str | None, typer.Option(help="obs column with perturbations.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Value of --condition for control cells; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pretrained causal language model to continue from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the language model. Default: 600.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    memory: Memory = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Make a model from labelled reference cells, in minutes on a laptop."""
    from rvqa.data.files.layers import Layers
    from rvqa.data.files.sources import read_cells
    from rvqa.language.model import require_new_directory
    from rvqa.training.fit import fit_files, settings_for

    require_new_directory(output, force=force)
    where = Layers.of(layer or [], references)
    layers = [where.layer(path) for path in references]
    model = fit_files(
        [read_cells(path, layer=own) for path, own in zip(references, layers, strict=True)],
        names=[path.name for path in references],
        labels=labels,
        condition=condition,
        control=control,
        layer=layers,
        library_size_key=library_size_key,
        recover=recover,
        base=base,
        settings=settings_for(seed, steps=steps),
        progress=not quiet,
    )
    model.save_pretrained(output, force=force)
    for reference in model.card.training["references"]:
        show_places(reference["name"], reference)
    show(model.card.training["genes"])
    show(f"{output}: {len(model.card.labels)} labels, {len(model.card.perturbations)} perturbations")


@app.command("fit-tokenizer")
def fit_tokenizer(
    files: Annotated[list[Path], typer.Argument(help="Files of cells with raw counts, or folders of .h5ad files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Tokenizer directory to write.")],
    preset: Annotated[str, typer.Option(help="small (two cores, minutes) or atlas (36,000 genes).")] = "small",
    labels: Annotated[str, typer.Option(help="obs column with cell types, where there is one.")] = "cell_type",
    donor: Annotated[str, typer.Option(help="obs column with donors, where there is one.")] = "donor",
    condition: Annotated[str, typer.Option(help="obs column with perturbations, where there is one.")] = "condition",
    control: Annotated[
        list[str] | None, typer.Option(help="Its value for control cells; may be repeated. Default: control, ctrl.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Donor whose cells enter nothing; may be repeated.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Donor whose cells choose the best epoch; may be repeated.")
    ] = None,
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

    from rvqa.data.files.layers import Layers
    from rvqa.training.tokenizer.fit_files import fit_tokenizer_files
    from rvqa.training.tokenizer.settings import preset as settings_of

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
        control=control or ("control", "ctrl"),
        held_out=held_out or (),
        validation=validation or (),
        layer=Layers.of(layer or [], files),
        checkpoint=checkpoint,
        device=device,
        force=force,
        progress=not quiet,
    )
    if as_json:
        show_json(facts)
    else:
        for name, file in facts["files"].items():
            show_places(name, file)
        show(
            f"{output}: {facts['genes']:,} genes, {facts['cells']['fit']:,} cells fitted in "
            f"{facts['fit_seconds']:.0f} s, {facts['peak_memory_gib']:.1f} GiB at most"
        )


evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model on cells that no fit has seen.")
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("tokenizer")
def evaluate_tokenizer(
    model: Annotated[Path, typer.Argument(help="Directory that `rvqa fit-tokenizer` or `rvqa fit` wrote.")],
    data: Annotated[list[Path], typer.Option("--data", help="Files or folders, those of the fit among them.")],
    continuous: Annotated[
        Path | None, typer.Option(help="Directory of a fit with --continuous, for the variance that codes keep.")
    ] = None,
    split: Annotated[
        Path | None, typer.Option(help="Table of cells and roles (.parquet) of the fit, where MODEL holds none.")
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
    from rvqa.data.files.layers import Layers
    from rvqa.evaluation.tokenizer import evaluate_directory
    from rvqa.evaluation.tokenizer_figures import text
    from rvqa.io.files import require_writable

    if report is not None:
        require_writable(report, force=force, suffix=".html")

    def say(what: str) -> None:
        if not quiet:
            show(f"rvqa: {what}", file=sys.stderr)

    result = evaluate_directory(
        model,
        data,
        continuous=continuous,
        split=split,
        labels=labels,
        donor=donor,
        layer=Layers.of(layer or [], data),
        seed=seed,
        say=say,
    )
    if report is not None:
        from rvqa.report.page import command_line
        from rvqa.report.tokenizer import tokenizer_report

        tokenizer_report(result, report, title=f"Tokenizer {model.name}", command=command_line(), force=force)
    if as_json:
        show_json(result)
    else:
        show(text(result))


@app.command()
def encode(
    cells: Annotated[
        list[Path],
        typer.Argument(
            help="Cells to read, raw counts: .h5ad, .zarr, .h5mu, 10x's .h5 or folders.", show_default=False
        ),
    ],
    model: ModelIn,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="To write: .rvq, .zarr, .parquet, or .h5ad (a copy with codes).")
    ],
    obs: Annotated[list[str] | None, typer.Option(help="obs column to carry along; may be repeated.")] = None,
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
    memory: Memory = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as lines of JSON.")] = False,
) -> None:
    """Tokenize cells, of files of any size; a stopped run goes on where it was."""
    from rvqa.data.columns import split_names
    from rvqa.data.files.layers import Layers, expand
    from rvqa.data.files.sources import obs_of

    files = expand(cells)
    layers = Layers.of(layer or [], files)
    if recover or recon_error:
        from rvqa.encoding import encode_in_memory

        if len(cells) > 1 or in_place or append or scheduler or obs or device != "cpu":
            raise InputError(
                "--recover and --recon-error are for one file that fits in memory, to .h5ad, without --obs, "
                "--in-place, --append, --scheduler and --device."
            )
        loaded = rvqa.load(model, weights=False)
        reading = {"layer": layers, "library_size_key": library_size_key, "recover": recover}
        keys = encode_in_memory(
            cells[0],
            loaded.cell_tokenizer,
            output,
            recon_error=recon_error,
            source=loaded.source,
            force=force,
            **reading,
        )
        show_coverage(keys.facts["coverage"])
        show(f"{output}: codes of {len(keys.obsm['rvqa_codes']):,} cells")
        return
    from rvqa.atlas.cluster import local_cluster
    from rvqa.atlas.encoder import Settings
    from rvqa.atlas.outputs import require_output
    from rvqa.atlas.progress import Progress
    from rvqa.atlas.run import encode_files
    from rvqa.language.model import load_tokenizer

    require_output(output, files, force=force or append, in_place=in_place)
    tokenizer = load_tokenizer(model)
    known = obs_of(str(files[0])).names if obs else ()
    settings = Settings(layers, library_size_key, tuple(split_names(obs or (), known)))
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
            say=lambda text: None if quiet else show(f"rvqa: {text}", file=sys.stderr),
            model=str(model),
        )
    if as_json:
        show_json(facts)
        return
    for name, report in facts["coverage"].items():
        show_coverage(report, "" if len(facts["coverage"]) == 1 else name)
    show(f"{output}: codes of {facts['cells']:,} cells")


@app.command()
def decode(
    cells: Annotated[Path, typer.Argument(help=".h5ad with obsm rvqa_codes, as `rvqa encode` writes it.")],
    model: ModelIn,
    output: FileOut,
    genes: Annotated[
        list[str] | None, typer.Option(help="Symbol to decode; may be repeated. Default: all of the model.")
    ] = None,
    force: Force = False,
) -> None:
    """Expected expression of codes, in counts per 10,000."""
    import pandas as pd
    from anndata import AnnData

    from rvqa.data.columns import split_names
    from rvqa.data.files.keys import storable
    from rvqa.data.files.sources import read_results
    from rvqa.io.files import require_writable, write_h5ad

    require_writable(output, force=force, inputs=[cells])
    adata = read_results(cells)
    if "rvqa_codes" not in adata.obsm:
        raise InputError(
            f"{cells} has no codes (obsm['rvqa_codes']). Make them with `rvqa encode`, and give its output."
        )
    loaded = rvqa.load(model)
    symbols = loaded.cell_tokenizer.axis.symbols
    names = split_names(genes, symbols) if genes else list(symbols)
    with about(cells):
        expression = rvqa.decode(adata.obsm["rvqa_codes"], loaded, genes=names)
    decoded = AnnData(X=expression, obs=storable(adata.obs), var=pd.DataFrame(index=names))
    decoded.uns["rvqa"] = {"version": rvqa.__version__, "model": loaded.source, "X": "expected counts per 10,000"}
    write_h5ad(decoded, output, force=force)
    show(f"{output}: {decoded.n_obs:,} cells x {decoded.n_vars:,} genes")


@app.command()
def annotate(
    cells: CellsIn,
    model: ModelIn,
    output: FileOut,
    labels: Annotated[
        list[str] | None, typer.Option(help="Label to choose from; may be repeated. Default: all.")
    ] = None,
    engine: EngineOption = "hf",
    reasoning: Annotated[int, typer.Option(help="Tokens of evidence to write before each label.", min=0)] = 0,
    report: ReportOut = None,
    truth: Annotated[str | None, typer.Option(help="obs column of known types that the report compares with.")] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(help="JSON or two columns (.csv, .tsv): names of known types, and those of the model for them."),
    ] = None,
    layer: Layer = None,
    library_size_key: LibrarySize = None,
    memory: Memory = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Annotate cells with cell types: adds obs rvqa_cell_type and rvqa_confidence, and the codes."""
    from rvqa.data.columns import split_names
    from rvqa.data.files.keys import require_copy
    from rvqa.data.files.layers import Layers, layer_of
    from rvqa.data.files.sources import obs_of, read_results
    from rvqa.evaluation.label_names import read_label_map
    from rvqa.io.files import require_writable
    from rvqa.serving.engines import open_engine

    require_copy(cells, output, force=force)
    if report is not None:
        require_writable(report, force=force, suffix=".html")
    elif truth is not None:
        raise InputError("--truth compares in the report, and there is none. Add --report FILE.html.")
    if truth is not None:
        with about(cells):
            obs_of(cells).require(truth)
    if label_map is not None:
        if truth is None:
            raise InputError("--label-map names known types, and there are none. Add --truth COLUMN.")
        read_label_map(label_map)
    loaded = rvqa.load(model, weights=engine == "hf")
    runs = open_engine(loaded, engine)
    with about(cells), _kept_replies(output, engine) as resume:
        rvqa.annotate(
            cells,
            loaded,
            out=output,
            labels=split_names(labels, loaded.card.labels) if labels else None,
            engine=runs,
            reasoning=reasoning,
            resume=resume,
            layer=layer_of(Layers.of(layer or [], [cells]), cells),
            library_size_key=library_size_key,
            recover=recover,
            force=force,
            progress=not quiet,
        )
    adata = read_results(output)
    show_coverage(adata.uns["rvqa"]["coverage"])
    if report is not None:
        from rvqa.report import annotation_report
        from rvqa.report.page import command_line

        title = f"Cell types of {cells.name}"
        annotation_report(
            adata, report, title=title, truth=truth, label_map=label_map, command=command_line(), force=force
        )
    for name, count in adata.obs["rvqa_cell_type"].value_counts().items():
        confidence = adata.obs["rvqa_confidence"][adata.obs["rvqa_cell_type"] == name].median()
        show(f"{name:30s} {count:8,d} cells  median confidence {confidence:.2f}")


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
    memory: Memory = None,
    recover: Recover = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Predict what control cells look like under a perturbation, with counts."""
    from rvqa.data.files.keys import storable
    from rvqa.data.files.layers import Layers, layer_of
    from rvqa.data.files.sources import read_cells
    from rvqa.io.files import require_writable, write_h5ad
    from rvqa.serving.engines import open_engine

    require_writable(output, force=force, inputs=[cells])
    if report is not None:
        require_writable(report, force=force, suffix=".html")
    own = layer_of(Layers.of(layer or [], [cells]), cells)
    adata, loaded = read_cells(cells, layer=own), rvqa.load(model, weights=engine == "hf")
    adata.obs = storable(adata.obs)
    runs = open_engine(loaded, engine)
    columns: dict[str, Any] = {
        "cell_type_key": cell_type_key,
        "control_key": control_key,
        "control_value": control_value,
    }
    reading: dict[str, Any] = {"layer": own, "library_size_key": library_size_key, "recover": recover}
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
    show_coverage(predicted.uns["rvqa"]["coverage"])
    if report is not None:
        from rvqa.report import perturbation_report
        from rvqa.report.page import command_line

        title = f"{perturbation} on cells of {cells.name}"
        command = command_line()
        perturbation_report(
            adata, predicted, loaded, report, title=title, command=command, force=force, **columns, **reading
        )
    show(f"{output}: {predicted.n_obs:,} predicted cells x {predicted.n_vars:,} genes under {perturbation}")


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


@contextmanager
def _kept_replies(output: Path, engine: str) -> Iterator[Path | None]:
    """File beside the output that keeps an engine's replies until the block is done; None for the model in here."""
    if engine == "hf":
        yield None
        return
    from rvqa.io.outcomes import resumable

    kept = output.with_name(f"{output.name}.replies")
    resumable.append(kept)
    yield kept
    kept.unlink(missing_ok=True)
    resumable.remove(kept)


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
