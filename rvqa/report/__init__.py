"""`report.html`: what was found, in one file that opens anywhere and asks the network for nothing.

`annotation_report` and `perturbation_report` are for library users; the command line (`--report`) and the demo call
the same. `page` builds safe markup, `colours` and `figures` draw, `annotation` and `perturbation` say what is shown.
"""

from pathlib import Path
from typing import Any

from anndata import AnnData

from rvqa.data.columns import labels_of
from rvqa.data.reading import Reading
from rvqa.errors import InputError
from rvqa.evaluation.perturbation import compare
from rvqa.language.model import Model
from rvqa.report.annotation import add_annotation, coverage_text
from rvqa.report.page import Report, command_line, is_report
from rvqa.report.perturbation import add_perturbation, types_table

__all__ = ["Report", "annotation_report", "command_line", "is_report", "perturbation_report"]


def annotation_report(
    adata: AnnData,
    path: str | Path,
    *,
    title: str = "Annotated cells",
    truth: str | None = None,
    label_map: str | Path | None = None,
    key_added: str = "rvqa",
    command: str | None = None,
    force: bool = False,
) -> None:
    """Write a report on annotated cells.

    Parameters
    ----------
    adata
        After `rvqa.annotate`; not changed. Positions are `obsm["X_umap"]` where that is, else computed from the codes.
    path
        File to write, .html.
    title
        Heading, such as the file's name.
    truth
        Column of `adata.obs` with known types to compare with; cells without one are left out.
    label_map
        File with the name by which each label, of the known types and of the model, is compared: a JSON object, or two
        columns of a .csv or .tsv file. Without it, names are compared as they are, or through `label_to_cl.json` of
        `RVQA_REF_DIR` where that finds more of the known types among the model's labels; the report says which.
    key_added
        As given to `rvqa.annotate`.
    command
        Command to show as the one that made the results.
    force
        Replace a file that exists.

    Raises
    ------
    rvqa.errors.InputError
        Cells that are not annotated, an unknown column, a `label_map` that cannot be read, or a path that cannot be
        written.

    Examples
    --------
    >>> rvqa.annotate(adata, model)  # doctest: +SKIP
    >>> annotation_report(adata, "report.html", truth="cell_type")  # doctest: +SKIP
    """
    if f"{key_added}_cell_type" not in adata.obs or "labels" not in adata.uns.get(key_added, {}):
        raise InputError(
            f"adata has no annotation under {key_added!r}. Run rvqa.annotate(adata, model) first, or give its "
            "key_added."
        )
    if truth is not None:
        labels_of(adata, truth)
    record = adata.uns[key_added]
    lead = f"Cell types of {adata.n_obs:,} cells, chosen by a language model from ten tokens a cell."
    report = Report(title, lead=lead, facts=_facts(adata, record), command=command)
    add_annotation(report, adata, heading="Annotation", truth=truth, label_map=label_map, key_added=key_added)
    report.write(path, force=force)


def perturbation_report(
    adata: AnnData,
    predicted: AnnData,
    model: Model,
    path: str | Path,
    *,
    cell_type_key: str,
    control_key: str | None = None,
    control_value: str | None = None,
    title: str = "Predicted cells",
    command: str | None = None,
    force: bool = False,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
) -> None:
    """Write a report on predicted cells, beside the measured ones where `adata` has them.

    Parameters
    ----------
    adata
        As given to `rvqa.perturb`. Cells whose `control_key` is the perturbation, of the types predicted, are the
        measured ones.
    predicted
        What `rvqa.perturb` returned.
    model
        That predicted.
    path
        File to write, .html.
    cell_type_key, control_key, control_value
        As given to `rvqa.perturb`.
    title, command, force
        As for `annotation_report`.
    layer, library_size_key, recover
        As given to `rvqa.perturb`.

    Raises
    ------
    rvqa.errors.InputError
        As `rvqa.perturb`, or a path that cannot be written.
    """
    record, reading = predicted.uns["rvqa"], Reading(layer, library_size_key, recover)
    perturbation = str(record["perturbation"])
    found = compare(
        adata,
        predicted,
        model,
        perturbation=perturbation,
        cell_type_key=cell_type_key,
        control_key=control_key,
        control_value=control_value,
        reading=reading,
    )
    lead = f"{predicted.n_obs:,} cells under {perturbation}, written by a language model from control cells."
    report = Report(title, lead=lead, facts=_facts(found.groups["control"], record), command=command)
    add_perturbation(
        report,
        found.shift,
        found.groups,
        model,
        heading=f"{perturbation}: predicted shift",
        perturbation=perturbation,
        cell_type_key=cell_type_key,
        by_type=types_table(found.by_type),
        remark=found.remark,
        reading=reading,
    )
    report.write(path, force=force)


def _facts(adata: AnnData, record: Any) -> dict[str, str]:
    return {
        "Cells": f"{adata.n_obs:,}",
        "Genes in the file": f"{int(record.get('coverage', {}).get('n_file', adata.n_vars)):,}",
        "Model's genes measured": coverage_text(record.get("coverage", {})),
        "Model": str(record.get("model") or "in memory"),
    }
