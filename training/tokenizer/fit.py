"""Fits a CellTokenizer: a continuous autoencoder, then k-means, then joint training with EMA codebooks, random depth.

The loss of a cell, in nats per gene scale, has three terms: the Poisson negative log likelihood of its counts around
library size x share (a quasi-likelihood, consistent for the mean whatever the spread), a cross-entropy of known labels
read linearly from the latent, and the commitment to the chosen codewords. Moments give the negative binomial dispersion
afterwards. Inputs are thinned (binomial, a lower depth) and lose genes (a smaller panel) at random; targets never do.

Sources: VQ-VAE codebooks by exponential moving averages (van den Oord et al. 2017), replacement of unused codes and
random depth (SoundStream, Zeghidour et al. 2021), k-means++ (Arthur & Vassilvitskii 2007).
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rvqa.data.alignment import align, match_columns
from rvqa.data.cells import Cells
from rvqa.data.depth import GeneShares, log1p_normalise
from rvqa.data.genes import GeneAxis
from rvqa.data.shared_genes import SharedGenes, require_shared
from rvqa.errors import InputError, InputWarning
from rvqa.tokenizer.model import CellTokenizer, CellTokenizerConfig
from rvqa.training.distributed import Processes
from rvqa.training.tokenizer.cells import Gathered, gather
from rvqa.training.tokenizer.checkpoint import CheckpointFolder, identity
from rvqa.training.tokenizer.codebooks import fill_codebooks
from rvqa.training.tokenizer.run import Run
from rvqa.training.tokenizer.settings import TokenizerSettings, preset

__all__ = ["TokenizerSettings", "fit_tokenizer", "preset", "select_genes", "shared_genes"]


def shared_genes(references: Sequence[Cells]) -> SharedGenes:
    """Count the genes that the files have and share, for `rvqa.data.shared_genes.shared_sentence`.

    Raises
    ------
    rvqa.errors.InputError
        A file shares almost no gene with the others.
    """
    return _all_genes(references)[1]


def _all_genes(references: Sequence[Cells]) -> tuple[GeneAxis, SharedGenes]:
    """Return the genes of all files, each once, and what the files share."""
    axis = GeneAxis.union([reference.axis for reference in references])
    return axis, require_shared([each.name for each in references], [each.var for each in references], axis)


def select_genes(references: Sequence[Cells], n_top_genes: int) -> GeneAxis:
    """Choose highly variable genes over files that may measure different genes.

    In each file, genes seen in at least 10 cells are ranked by the log of variance over mean of log1p counts per
    10,000, standardised within 20 bins of the mean. Satija et al. 2015 do this before the logarithm, where a few cells
    with many counts decide. A gene takes its best rank over the files.

    Raises
    ------
    rvqa.errors.InputError
        A file shares almost no gene with the others, or fewer than 50 genes are seen in 10 cells.
    """
    axis, _ = _all_genes(references)
    best_G = np.full(len(axis), np.inf)
    for reference in references:
        mean_G, square_G, cells_G = (np.zeros(len(axis)) for _ in range(3))
        for rows, counts in reference.on_axis(axis):
            log1p = log1p_normalise(counts, reference.library_size[rows]).astype(np.float64)
            mean_G += np.asarray(log1p.sum(0)).ravel()
            square_G += np.asarray(log1p.multiply(log1p).sum(0)).ravel()
            cells_G += counts.getnnz(0)
        mean_G /= len(reference)
        variance_G = square_G / len(reference) - mean_G**2
        seen_G = np.flatnonzero(cells_G >= 10)
        if not len(seen_G):
            continue
        dispersion = np.log(np.maximum(variance_G[seen_G], 1e-12) / mean_G[seen_G])
        bins = (np.argsort(np.argsort(mean_G[seen_G], kind="stable"), kind="stable") * 20) // len(seen_G)
        score = np.empty(len(seen_G))
        for each in np.unique(bins):
            inside = bins == each
            score[inside] = (dispersion[inside] - np.median(dispersion[inside])) / (dispersion[inside].std() + 1e-9)
        rank = np.argsort(np.argsort(-score, kind="stable"), kind="stable")
        best_G[seen_G] = np.minimum(best_G[seen_G], rank)
    chosen = np.argsort(best_G, kind="stable")[: min(n_top_genes, int(np.isfinite(best_G).sum()))]
    if len(chosen) < 50:
        raise InputError(f"Only {len(chosen)} genes are seen in 10 cells or more; a tokenizer needs at least 50.")
    return axis.subset(np.sort(chosen))


def gene_shares(references: Sequence[Cells]) -> GeneShares:
    """Estimate the share of all counts that each gene takes, from files that may measure different genes.

    Raises
    ------
    rvqa.errors.InputError
        A file shares almost no gene with the others.
    """
    axis, _ = _all_genes(references)
    totals_FG = np.zeros((len(references), len(axis)))
    measured_FG = np.zeros(totals_FG.shape, dtype=bool)
    depth_F = np.full(len(references), np.nan)
    for file, reference in enumerate(references):
        column_map = match_columns(reference.var, axis)
        known = column_map >= 0  # True for all columns, unless a file names a gene in two ways
        np.add.at(totals_FG[file], column_map[known], reference.gene_totals()[known])
        measured_FG[file, column_map[known]] = True
        if reference.given:
            depth_F[file] = reference.library_size.sum()
    return GeneShares.estimate(axis, totals_FG, measured_FG, depth_F)


def fit_tokenizer(
    references: Sequence[Cells],
    settings: TokenizerSettings | None = None,
    *,
    validation: Sequence[Cells] = (),
    checkpoint: str | Path | None = None,
    scratch: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> CellTokenizer:
    """Fit a tokenizer on reference cells.

    Parameters
    ----------
    references
        One or several files, in memory or on disk; their gene panels may differ. Every cell in them is used.
    settings
        See `TokenizerSettings`. The same settings, cells, machine and number of processes give the same tokenizer; on
        a GPU this also needs `torch.use_deterministic_algorithms(True)`.
    validation
        Held-out files. They train no weight. Their loss is computed after every epoch with codebooks: the result has
        the weights with the lowest loss, and the fit ends after `settings.patience` epochs without a lower one.
    checkpoint
        Folder of the fit's state, written every `settings.checkpoint_steps` steps and at the end. If it has a state,
        the fit continues from there to the same result as without a stop.
    scratch
        Folder for the counts on the axis of the tokenizer, which then need not fit in memory. The caller removes it.
        Defaults to None, which keeps the counts in memory. The result is the same.
    device
        Device to compute on; the result is on the CPU.
    progress
        Whether to show a progress bar.

    Returns
    -------
    CellTokenizer
        The tokenizer in evaluation mode. Every code of every level is the code that `encode` gives at least one cell
        of the fit on this machine type. An `InputWarning` reports cells that are too alike for that.

    Raises
    ------
    rvqa.errors.InputError
        There are no cells, or fewer than codewords of a level or than processes; the device does not exist; the
        checkpoint is of other settings, cells or processes; or a folder cannot be written.

    Notes
    -----
    Under torchrun all processes must call this with the same arguments, and all return the same tokenizer. Each takes
    its part of every batch; gradients and codebooks are averaged over them. The process group stays open afterwards.
    """
    settings = settings or TokenizerSettings()
    processes = Processes(device)
    shares = gene_shares(references)
    references, validation = ([each.at_depth(shares) for each in files] for files in (references, validation))
    axis = select_genes(references, settings.n_top_genes)
    cells = _gathered(references, axis, scratch, "fit", processes)
    n = len(cells.library_size)
    if n < settings.entries:
        raise InputError(f"{n} cells cannot fill codebooks of {settings.entries} entries; give more cells.")
    if min(n, settings.batch_size) < 2 * processes.world:
        raise InputError(
            f"Batches of {min(n, settings.batch_size)} cells are too small for {processes.world} processes; expected 2 "
            "cells for each or more. Raise batch_size, or start fewer processes."
        )
    same = identity(references, validation, axis, settings, processes=processes.world, device=processes.device.type)
    folder = None if checkpoint is None else CheckpointFolder(Path(checkpoint), same)
    config = CellTokenizerConfig(settings.hidden, settings.latent, settings.levels, settings.entries, settings.dropout)
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        tokenizer = CellTokenizer(axis, config, shares)
        _set_statistics(tokenizer, cells, settings)
        held_out = _gathered(validation, axis, scratch, "validation", processes) if len(validation) else None
        run = Run(tokenizer.to(processes.device), cells, settings, validation=held_out, processes=processes)
        if folder is not None and (state := folder.read()) is not None:
            run.restore(state)
        processes.require_same(f"{same} {run.step}")
        run.run(progress=progress, checkpoint=folder)
    latent_ND = _latents_as_encoded(tokenizer.cpu().eval(), cells)
    _use_every_code(tokenizer, latent_ND, processes)
    _set_dispersion(tokenizer, cells, tokenizer.quantize(latent_ND))
    return tokenizer


def _gathered(
    files: Sequence[Cells], axis: GeneAxis, scratch: str | Path | None, part: str, processes: Processes
) -> Gathered:
    """Return the cells on the axis; if they stay on disk, one process writes them for all."""
    folder = None if scratch is None else Path(scratch) / part
    if folder is None or processes.world == 1:
        return gather(files, axis, folder=folder)
    if processes.first:
        gather(files, axis, folder=folder)
    processes.wait()
    return gather(files, axis, folder=folder, read=False)


def _set_statistics(tokenizer: CellTokenizer, cells: Gathered, settings: TokenizerSettings) -> None:
    """Set mean and scale of log1p counts per 10,000, and share of counts, over the cells that measured a gene."""
    sums_FG = np.zeros((4, *cells.measured_FG.shape))
    for file, rows in cells.blocks():
        counts, library_N = cells.counts[rows], cells.library_size[rows]
        log1p = log1p_normalise(counts, library_N).astype(np.float64)
        sums_FG[0, file] += np.asarray(log1p.sum(0)).ravel()
        sums_FG[1, file] += np.asarray(log1p.multiply(log1p).sum(0)).ravel()
        sums_FG[2, file] += np.asarray(counts.sum(0, dtype=np.float64)).ravel()
        sums_FG[3, file] += library_N.sum()
    files = len(cells.measured_FG)
    n_G = np.bincount(cells.file_N, minlength=files) @ cells.measured_FG
    total, square, count, library = (sums * cells.measured_FG for sums in sums_FG)
    mean_G = total.sum(0) / n_G
    scale_G = np.sqrt(np.maximum(square.sum(0) / n_G - mean_G**2, 0.0)).clip(settings.min_scale)
    share_G = (count.sum(0) + 0.5) / library.sum(0)
    tokenizer.gene_mean_G.copy_(torch.from_numpy(mean_G))
    tokenizer.gene_scale_G.copy_(torch.from_numpy(scale_G))
    tokenizer.log_share_G.copy_(torch.from_numpy(np.log(share_G)))


def _latents_as_encoded(tokenizer: CellTokenizer, cells: Gathered) -> Tensor:
    """Return latents [N, D] with the bits that `CellTokenizer.encode` quantizes; dense layers round differently."""
    latent_ND = torch.empty(len(cells.library_size), tokenizer.config.latent)
    own = align(tokenizer.axis.to_frame(), tokenizer.axis, aliases=False)
    own = replace(own, column_map=np.arange(len(tokenizer.axis), dtype=np.int32))  # the counts are on the axis already
    for file, rows in cells.blocks():
        alignment = replace(own, measured=cells.measured_FG[file])
        latent_ND[rows] = tokenizer.latent(cells.counts[rows], alignment, cells.library_size[rows])
    return latent_ND


def _use_every_code(tokenizer: CellTokenizer, latent_ND: Tensor, processes: Processes) -> None:
    """Fill the codebooks in one process and give them to all; warn where cells are too alike to use every code."""
    codebooks_MKD = tokenizer.codebooks_MKD.clone()
    if processes.first:
        fill_codebooks(codebooks_MKD, latent_ND)
    tokenizer.codebooks_MKD.copy_(processes.broadcast_(codebooks_MKD.to(processes.device)))
    used = [len(np.unique(codes_N)) for codes_N in tokenizer.quantize(latent_ND).T]
    if min(used) < tokenizer.config.entries:
        warnings.warn(
            f"The cells use {', '.join(map(str, used))} of {tokenizer.config.entries} codes at the levels 1 to "
            f"{len(used)}: they are too alike to use all. Give more cells or more different cells, or fit fewer levels "
            "or entries.",
            InputWarning,
            stacklevel=3,
        )


def _set_dispersion(tokenizer: CellTokenizer, cells: Gathered, codes_NM: np.ndarray) -> None:
    """Set the negative binomial dispersion of each gene by moments: sum((c - m)^2 - c) = dispersion x sum(m^2)."""
    excess_G, square_G = np.zeros(len(tokenizer.axis)), np.full(len(tokenizer.axis), 1e-12)
    for rows, share_BG in tokenizer.share_blocks(codes_NM):
        mean_BG = share_BG.astype(np.float64) * cells.library_size[rows, None]
        counts_BG = cells.counts[rows].toarray().astype(np.float64)
        measured_BG = cells.measured_FG[cells.file_N[rows]]
        excess_G += (((counts_BG - mean_BG) ** 2 - counts_BG) * measured_BG).sum(0)
        square_G += (mean_BG**2 * measured_BG).sum(0)
    tokenizer.dispersion_G.copy_(torch.from_numpy((excess_G / square_G).clip(0.0, 10.0)))
