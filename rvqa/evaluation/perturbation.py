"""Predicted cells against what was measured: the ruler of `rvqa.perturb`, for reports, the demo and training alike.

A profile is the mean over cells of log1p of counts per 10,000; a shift is the difference to the control's profile.
N cells, G genes that the control file measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import align, map_columns
from rvqa.data.columns import conditions_of, labels_of
from rvqa.data.depth import log1p_normalise
from rvqa.data.reading import Reading
from rvqa.encoding import cells_on_axis
from rvqa.errors import InputError
from rvqa.evaluation import baselines
from rvqa.evaluation.metrics import ShiftTruth
from rvqa.evaluation.profiles import log1p_on_axis
from rvqa.language.model import Model
from rvqa.perturbation import decode_counts, perturb, residual_ratios

FEWEST = 5
"""Measured cells of a type below which its shift says too little to compare with."""

MIN_CONTEXT = 10
"""Fewest control and perturbed cells of a type whose shift the baselines may use."""


@dataclass(frozen=True)
class Shift:
    """Change of the profile, predicted and, where cells were measured, true."""

    genes: Sequence[str]
    predicted_G: np.ndarray
    true_G: np.ndarray | None = None
    top: np.ndarray | None = None
    """Genes to mark; with `true_G`."""
    top_are: str = "differ most by Welch's t between measured and control cells"


@dataclass(frozen=True)
class TypeScores:
    """Cells of a type, and `ShiftTruth.scores` of its predicted profile where enough were measured."""

    name: str
    n_control: int
    n_predicted: int
    n_measured: int
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Compared:
    """Predicted cells against what a file measured."""

    shift: Shift
    groups: dict[str, AnnData]
    by_type: list[TypeScores]
    remark: str


def compare(
    adata: AnnData,
    predicted: AnnData,
    model: Model,
    *,
    perturbation: str,
    cell_type_key: str,
    control_key: str | None,
    control_value: str | None,
    reading: Reading | None = None,
) -> Compared:
    """Compare what `rvqa.perturb` predicted with the file it started from; parameters as there."""
    condition_N = None if control_key is None else conditions_of(adata, control_key, [str(control_value)])
    control = adata if condition_N is None else adata[condition_N == ""]
    control_types_N = labels_of(control, cell_type_key)
    axis = model.cell_tokenizer.axis
    cells, alignment, depth_N = cells_on_axis(control, model.cell_tokenizer, reading)
    measured_G = alignment.measured
    samples = predicted.n_obs // control.n_obs
    control_NG = log1p_normalise(map_columns(cells.counts, alignment), depth_N)[:, measured_G]
    predicted_NG = log1p_normalise(predicted.X, np.repeat(depth_N, samples))[:, measured_G]
    predicted_types_N = np.repeat(control_types_N, samples)

    measured, remark, measured_NG, types_N = None, "", None, np.zeros(0, dtype=object)
    if condition_N is not None:
        types_N = labels_of(adata, cell_type_key)
        inside_N = (condition_N == perturbation) & np.isin(types_N, control_types_N)
        try:
            if inside_N.any():
                measured, types_N = adata[inside_N], types_N[inside_N]
                measured_NG = log1p_on_axis(measured, axis, reading, shares=model.cell_tokenizer.shares)[:, measured_G]
        except InputError as error:
            measured, remark = None, f"Measured cells under {perturbation} cannot be read: {error}"

    total_G, true_G, weight = np.zeros(measured_G.sum()), np.zeros(measured_G.sum()), 0
    predicted_alone_G = np.zeros(measured_G.sum())
    by_type: list[TypeScores] = []
    top, left_out = np.zeros(0, dtype=np.int64), []
    for name in sorted(set(control_types_N)):
        before_NG = control_NG[control_types_N == name]
        after_G = _mean(predicted_NG[predicted_types_N == name])
        shift_G = after_G - _mean(before_NG)
        n = before_NG.shape[0]
        predicted_alone_G += n * shift_G / len(control_types_N)
        n_measured = int((types_N == name).sum()) if measured_NG is not None else 0
        if measured_NG is not None and n_measured >= FEWEST:
            truth = ShiftTruth.of(before_NG, measured_NG[types_N == name])
            scores = truth.scores(after_G)
            by_type.append(TypeScores(name, n, n * samples, n_measured, scores))
            total_G += n * shift_G
            true_G += n * (truth.perturbed_G - truth.control_G)
            weight, top = weight + n, truth.top
        else:
            left_out += [name] if n_measured else []
            by_type.append(TypeScores(name, n, n * samples, n_measured))
    if left_out:
        remark += f" Types with fewer than {FEWEST} measured cells are left out: {', '.join(left_out)}."
    genes = [str(symbol) for symbol, used in zip(axis.symbols, measured_G, strict=True) if used]
    groups = {"control": control, "predicted": predicted}
    if not weight or measured is None:
        return Compared(Shift(genes, predicted_alone_G), groups, by_type, remark)
    groups["measured"] = measured
    compared = [each for each in by_type if each.scores is not None]
    if len(compared) == 1:
        shift = Shift(genes, total_G / weight, true_G / weight, top)
    else:
        strongest = np.argsort(-np.abs(true_G), kind="stable")[:50]
        shift = Shift(genes, total_G / weight, true_G / weight, strongest, "move most in the measured cells")
        remark += f" The mean of {len(compared)} types, weighted by their control cells."
    return Compared(shift, groups, by_type, remark)


def _mean(cells_NG: Any) -> np.ndarray:
    return np.asarray(cells_NG.mean(0, dtype=np.float64)).ravel()


@dataclass(frozen=True)
class HeldOut:
    """Prediction of a type that was never seen perturbed, beside baselines and ceiling."""

    predicted: AnnData
    shift: Shift
    nearest_context: str
    """Type whose shift the baseline of the nearest context takes."""
    methods: dict[str, dict[str, float]]
    """`ShiftTruth.scores` by method, ours first."""


def evaluate_held_out(
    control: AnnData,
    perturbed: AnnData,
    contexts: AnnData,
    model: Model,
    *,
    perturbation: str,
    held_out_type: str,
    library_size_key: str | None = None,
    n_samples: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> HeldOut:
    """Predict the perturbed cells of one type and compare with the measured ones.

    Parameters
    ----------
    control, perturbed
        Measured cells of the type, `obs["label"]`.
    contexts
        Cells of other types, control and perturbed: `obs["label"]`, `obs["condition"]` ("control" or `perturbation`).
    model
        That predicts; it saw no perturbed cell of the type.
    perturbation, held_out_type
        What is predicted.
    library_size_key, n_samples, seed, progress
        As for `rvqa.perturb`.
    """
    tokenizer, reading = model.cell_tokenizer, Reading(library_size_key=library_size_key)
    measured_G = align(control, tokenizer.axis).measured

    def profile_cells(adata: AnnData) -> np.ndarray:
        on_axis = log1p_on_axis(adata, tokenizer.axis, reading, shares=tokenizer.shares)
        return on_axis.toarray()[:, measured_G]

    truth = ShiftTruth.of(profile_cells(control), profile_cells(perturbed))
    condition = contexts.obs["condition"].astype(str).to_numpy()
    labels = contexts.obs["label"].astype(str).to_numpy()
    controls, shifts = {}, {}
    for label in sorted(set(labels) - {held_out_type, ""}):
        before, after = ((labels == label) & (condition == name) for name in ("control", perturbation))
        if min(before.sum(), after.sum()) >= MIN_CONTEXT:
            controls[label] = profile_cells(contexts[before]).mean(0, dtype=np.float64)
            shifts[label] = profile_cells(contexts[after]).mean(0, dtype=np.float64) - controls[label]
    nearest, nearest_name = baselines.nearest_context(truth.control_G, controls, shifts)
    predicted = perturb(
        control,
        model,
        perturbation=perturbation,
        cell_type_key="label",
        n_samples=n_samples,
        seed=seed,
        library_size_key=library_size_key,
        progress=progress,
    )
    cells, alignment, depth_N = cells_on_axis(control, tokenizer, reading)
    generated = log1p_normalise(sp.csr_matrix(predicted.X), np.repeat(depth_N, n_samples)).toarray()[:, measured_G]

    # The ceiling: the true perturbed cells through the tokenizer, the same correction, the same draws.
    types_N = np.full(len(depth_N), held_out_type, dtype=object)
    codes_NM = tokenizer.encode(cells.counts, alignment, depth_N)
    on_axis = map_columns(cells.counts, alignment)
    ratio = residual_ratios(tokenizer, on_axis, measured_G, depth_N, codes_NM, types_N)
    true, true_alignment, true_depth_N = cells_on_axis(perturbed, tokenizer, reading)
    true_codes_NM = tokenizer.encode(true.counts, true_alignment, true_depth_N)
    true_types_N = np.full(len(true_codes_NM), held_out_type, dtype=object)
    rng = np.random.default_rng(seed)
    _, redrawn = decode_counts(tokenizer, true_codes_NM, true_depth_N, true_types_N, ratio, rng)
    ceiling = log1p_normalise(redrawn, true_depth_N).toarray()[:, measured_G]

    generated_G = generated.mean(0, dtype=np.float64)
    methods = {
        "rvqa, written by the language model": truth.scores(generated_G),
        "no change": truth.scores(truth.control_G),
        f"additive: mean shift of {len(shifts)} other types": truth.scores(baselines.additive(truth.control_G, shifts)),
        f"nearest context: shift of {nearest_name}": truth.scores(nearest),
        "tokenizer ceiling: the true cells, encoded and decoded": truth.scores(ceiling.mean(0, dtype=np.float64)),
    }
    genes = [symbol for symbol, used in zip(tokenizer.axis.symbols, measured_G, strict=True) if used]
    shift = Shift(genes, generated_G - truth.control_G, truth.perturbed_G - truth.control_G, truth.top)
    return HeldOut(predicted, shift, nearest_name, methods)
