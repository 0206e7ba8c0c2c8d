"""Commands that fit and evaluate."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rvqa.cli.options import AsJson, Force, Layer, LibrarySize, Memory, Quiet, Recover, ReportOut, app, evaluate_app
from rvqa.cli.terminal import (
    show,
    show_json,
    show_places,
)


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
    from rvqa.data.files.sources import read_cells
    from rvqa.data.reading import Layers
    from rvqa.io.model_directory import require_new_directory
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

    from rvqa.data.reading import Layers
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
    from rvqa.data.reading import Layers
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
