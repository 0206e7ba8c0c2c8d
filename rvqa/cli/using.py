"""Commands that read and write cells."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import rvqa
from rvqa.cli.options import (
    CellsIn,
    EngineOption,
    FileOut,
    Force,
    Layer,
    LibrarySize,
    Memory,
    ModelIn,
    Quiet,
    Recover,
    ReportOut,
    app,
)
from rvqa.cli.terminal import (
    show,
    show_coverage,
    show_json,
)
from rvqa.errors import InputError, about


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
    from rvqa.data.files.given import expand
    from rvqa.data.files.sources import obs_of
    from rvqa.data.reading import Layers, Reading

    files = expand(cells)
    layers = Layers.of(layer or [], files)
    if recover or recon_error:
        from rvqa.encoding import encode_in_memory

        others = {"--obs": obs, "--scheduler": scheduler, "--in-place": in_place, "--append": append}
        loaded = rvqa.load(model, weights=False)
        keys = encode_in_memory(
            cells,
            loaded.cell_tokenizer,
            output,
            Reading(layers, library_size_key, recover),
            recon_error=recon_error,
            source=loaded.source,
            force=force,
            others=others | {"--device": device != "cpu"},
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
    settings = Settings(Reading(layers, library_size_key), tuple(split_names(obs or (), known)))
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
    from rvqa.data.files.sources import obs_of, read_results
    from rvqa.data.reading import Layers, layer_of
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
    from rvqa.data.files.sources import read_cells
    from rvqa.data.reading import Layers, layer_of
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
