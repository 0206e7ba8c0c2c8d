"""`perturb`: what control cells would look like under a perturbation, cell by cell, with counts.

The language model reads a control cell's tokens, its type and the perturbation, and writes the tokens of a perturbed
cell. Its codes decode to shares s of a cell's counts. What the tokenizer loses on the control cells of that type is
put back, the same for every cell of the type:

    ratio_g = (sum of measured counts + a) / (sum of counts expected from the control cells' own codes + a)
    mean_g  = library size of the control cell x s_g x ratio_g,   a = PRIOR_COUNTS

so a model that writes the control's codes again predicts no change of the type's profile. Counts are drawn from a
negative binomial with that mean and the gene's dispersion.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from tqdm import tqdm

import rvqa
from rvqa.data.alignment import map_columns
from rvqa.data.columns import as_text, column, conditions_of, labels_of
from rvqa.data.reading import Reading
from rvqa.encoding import cells_on_axis, coverage_of, in_memory
from rvqa.errors import InputError, nearest, require_known
from rvqa.language.grammar import Rule
from rvqa.language.model import Model
from rvqa.language.prompts import PERTURB
from rvqa.serving.asks import BLOCK, Ask, Engine
from rvqa.serving.engines import open_engine
from rvqa.serving.replies import gather
from rvqa.tokenizer.model import CellTokenizer, draw_counts

PRIOR_COUNTS = 5.0
"""Counts added to both sides of the ratio: a gene with fewer in all control cells of a type says little about it."""


def perturb(
    adata: AnnData | str | Path,
    model: Model,
    *,
    perturbation: str,
    cell_type_key: str,
    control_key: str | None = None,
    control_value: str | None = None,
    n_samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    engine: str | Engine = "hf",
    resume: str | Path | None = None,
    progress: bool = True,
) -> AnnData:
    """Predict cells under a perturbation from control cells.

    Parameters
    ----------
    adata
        Raw counts, or the path of a file, as for `rvqa.encode`; not changed.
    model
        From `rvqa.load`, fitted with perturbed cells.
    perturbation
        One of `model.card.perturbations`.
    cell_type_key
        Column of `adata.obs` with the cells' types, among `model.card.labels`.
    control_key, control_value
        Column of `adata.obs`, and its value for control cells: predictions start from these. By default from all cells.
    n_samples
        Predicted cells for each control cell.
    temperature
        Of the draws of codes; 0 takes the likeliest of each level.
    seed
        Of codes and counts.
    layer, library_size_key, recover
        As for `rvqa.encode`.
    engine, resume
        As for `rvqa.annotate`. At temperature 0 all engines write the same codes; above, each draws its own.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData
        control cells x n_samples rows, genes of the model's axis. `X`: counts, float32 CSR, at the control cell's
        depth (its library size counts all genes, so the axis takes its share of it); `layers["mean"]`: their
        expectation, float32;
        `obsm["rvqa_codes"]`, uint8; `obs`: the control cell's columns (but `control_key` holds the perturbation) and
        `rvqa_control_cell`, `rvqa_sample`, `rvqa_perturbation`; `uns["rvqa"]`: provenance. Other columns stay those of
        the control cell, so one that says "control" still does.

    Raises
    ------
    rvqa.errors.InputError
        As for `rvqa.encode`; an unknown perturbation, column, control value or cell type, a cell without a type, or an
        engine that is not there.
    rvqa.errors.EngineError
        A server that stopped answering, or that does not hold its outputs to the grammar.

    Notes
    -----
    With `library_size_key` or a file cut to a few genes, genes outside the file are predicted from the codes alone.
    """
    require_known("perturbation of this model", [perturbation], model.card.perturbations)
    if not isinstance(n_samples, int | np.integer) or n_samples < 1:
        raise InputError(f"n_samples is {n_samples!r}; expected a whole number, 1 or more.")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; expected a whole number, 0 or more.")
    if (control_key is None) != (control_value is None):
        raise InputError(
            f"control_key={control_key!r} and control_value={control_value!r} go together: give the column and its "
            "value for control cells, or neither (--control-key, --control-value)."
        )
    adata = in_memory(adata, layer=layer)
    control = adata
    if control_key is not None and control_value is not None:
        known_N = column(adata, control_key, missing=())
        control_N = conditions_of(adata, control_key, [control_value]) == ""
        require_known(f"value of obs[{control_key!r}]", [as_text(control_value)], set(known_N) - {""})
        control = adata[control_N]
    types_N = labels_of(control, cell_type_key)
    if (unnamed := int((types_N == "").sum())) or not len(types_N):
        raise InputError(
            f"{unnamed} of {len(types_N)} control cells have no type in obs[{cell_type_key!r}]; every cell needs one. "
            "Drop the others, or annotate first and use 'rvqa_cell_type'."
        )
    if foreign := sorted(set(types_N) - set(model.card.labels)):
        raise InputError(
            f"{foreign[0]!r} is not a cell type of this model, but stands in obs[{cell_type_key!r}]. "
            f"{nearest(foreign[0], model.card.labels)} Or annotate the cells first and use 'rvqa_cell_type'."
        )

    runs = open_engine(model, engine)
    tokenizer = model.cell_tokenizer
    cells, alignment, library_N = cells_on_axis(control, tokenizer, Reading(layer, library_size_key, recover))
    control_codes_NM = tokenizer.encode(cells.counts, alignment, library_N)
    on_axis = map_columns(cells.counts, alignment)
    ratio = residual_ratios(tokenizer, on_axis, alignment.measured, library_N, control_codes_NM, types_N)

    source_N = np.repeat(np.arange(len(types_N)), n_samples)
    codes_NM = perturbed_codes(
        model,
        control_codes_NM[source_N],
        types_N[source_N],
        perturbation,
        temperature,
        seed,
        engine=runs,
        resume=resume,
        progress=progress,
    )
    mean_NG, sampled = decode_counts(
        tokenizer, codes_NM, library_N[source_N], types_N[source_N], ratio, np.random.default_rng(seed)
    )
    obs = control.obs.iloc[source_N].copy()
    sample_N = np.tile(np.arange(n_samples), len(types_N))
    names = control.obs_names.to_numpy()[source_N]
    obs["rvqa_control_cell"], obs["rvqa_sample"] = names, sample_N
    obs["rvqa_perturbation"] = pd.Categorical([perturbation] * len(obs))
    if control_key is not None:
        obs[control_key] = pd.Categorical([perturbation] * len(obs))
    obs.index = pd.Index([f"{name}_{perturbation}_{i}" for name, i in zip(names, sample_N, strict=True)])
    provenance: dict[str, Any] = {
        "version": rvqa.__version__,
        "model": model.source,
        "prediction": f"cells predicted under {perturbation}; not measured",
        "perturbation": perturbation,
        "temperature": temperature,
        "seed": seed,
        "coverage": coverage_of(cells, alignment),
    }
    frame = tokenizer.axis.to_frame().set_index("gene_symbol", drop=False)
    frame.index.name = None
    return AnnData(
        X=sampled,
        obs=obs,
        var=frame,
        obsm={"rvqa_codes": codes_NM},
        layers={"mean": mean_NG},
        uns={"rvqa": provenance},
    )


def residual_ratios(
    tokenizer: CellTokenizer,
    counts_NG: sp.csr_matrix,
    measured_G: np.ndarray,
    library_N: np.ndarray,
    codes_NM: np.ndarray,
    types_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """Measured over expected counts of cells by type, float64 [G] each, shrunk to 1; 1 where a gene is unmeasured."""
    ratio = {}
    for name in sorted(set(types_N)):
        rows = np.flatnonzero(types_N == name)
        measured = np.asarray(counts_NG[rows].sum(0, dtype=np.float64)).ravel()
        expected = tokenizer.share_sum(codes_NM[rows], library_N[rows])
        ratio[name] = np.where(measured_G, (measured + PRIOR_COUNTS) / (expected + PRIOR_COUNTS), 1.0)
    return ratio


def perturbed_codes(
    model: Model,
    codes_NM: np.ndarray,
    types_N: np.ndarray,
    perturbation: str,
    temperature: float,
    seed: int,
    *,
    engine: str | Engine = "hf",
    resume: str | Path | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Codes uint8 [N, M] that the language model writes for control cells of these types."""
    rule, span = Rule("one_cell"), model.vocabulary.span_length
    runs = open_engine(model, engine)
    result_NM = np.empty_like(codes_NM)
    with tqdm(total=len(codes_NM), desc="perturb", unit="cell", disable=None if progress else True) as bar:
        for name in sorted(set(types_N)):
            of_type = np.flatnonzero(types_N == name)
            for start in range(0, len(of_type), BLOCK):
                rows = of_type[start : start + BLOCK]
                ids_NL = model.prompts.ids(PERTURB.prompt, codes_NM[rows], label=name, condition=perturbation)
                seeds = [(int(seed) * 1_000_003 + row) % 2**63 for row in rows.tolist()]
                asks = [
                    Ask(tuple(ids), rule=rule, max_tokens=span + 1, temperature=temperature, seed=own)
                    for ids, own in zip(ids_NL.tolist(), seeds, strict=True)
                ]
                replies = gather(model, runs, asks, resume=resume, bar=bar)
                result_NM[rows] = model.vocabulary.codes(np.array([reply.ids[:span] for reply in replies]))
    return result_NM


def decode_counts(
    tokenizer: CellTokenizer,
    codes_NM: np.ndarray,
    library_N: np.ndarray,
    types_N: np.ndarray,
    ratio: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, sp.csr_matrix]:
    """Expected counts float32 [N, G] and negative binomial draws of them, CSR."""
    mean_NG = np.empty((len(codes_NM), len(tokenizer.axis)), dtype=np.float32)
    dispersion_G = tokenizer.dispersion_G.double().numpy()
    blocks = []
    for rows, share_BG in tokenizer.share_blocks(codes_NM):
        ratio_BG = np.stack([ratio[name] for name in types_N[rows]])
        mean_BG = share_BG.astype(np.float64) * library_N[rows, None] * ratio_BG
        blocks.append(draw_counts(mean_BG, dispersion_G, rng))
        mean_NG[rows] = mean_BG
    return mean_NG, sp.vstack(blocks, format="csr")
