"""Fits a CellTokenizer: warm continuous autoencoder, k-means, then joint training with EMA codebooks and random depth.

Loss a cell, in nats per gene scale: Poisson negative log likelihood of its counts around library size x share (a
quasi-likelihood: consistent for the mean whatever the spread; the negative binomial spread is fitted by moments after),
plus a cross-entropy of known labels read linearly from the latent, plus the commitment to the chosen codewords.
Inputs are thinned (binomial, a lower depth) and lose genes (a smaller panel) at random; targets never are.

Sources: VQ-VAE codebooks by exponential moving averages (van den Oord et al. 2017), dead-code replacement and random
depth (SoundStream, Zeghidour et al. 2021), k-means++ (Arthur & Vassilvitskii 2007).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rvqa.counts import TARGET_SUM, log1p_normalise
from rvqa.errors import InputError
from rvqa.genes import GeneAxis
from rvqa.kernels import ops
from rvqa.tokenizer import CellTokenizer, CellTokenizerConfig
from rvqa.training.reference import Reference


@dataclass(frozen=True)
class TokenizerSettings:
    """Everything that decides the result of `fit_tokenizer`, apart from the cells; saved with the model."""

    n_top_genes: int = 4000
    hidden: int = 128
    latent: int = 32
    levels: int = 8
    entries: int = 32
    dropout: float = 0.3
    epochs: int = 80
    """Half of them continuous, half with codebooks."""
    max_steps: int = 6000
    """Bound on the optimiser's steps, for large references."""
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    thinning: float = 0.7
    """Share of batches read at a depth thinned to 30-100 %."""
    panel_dropout: float = 0.5
    """Share of batches read with 15-100 % of the genes."""
    label_weight: float = 0.3
    label_smoothing: float = 0.1
    commitment: float = 0.25
    decay: float = 0.97
    """Of the codebooks' moving averages, per step."""
    dead_below: float = 0.3
    """Cells a step, by moving average, under which a codeword is replaced."""
    min_scale: float = 0.1
    """Floor of a gene's standard deviation on log1p of counts per 10,000."""
    seed: int = 0


@dataclass(frozen=True)
class TokenizerCells:
    """Cells on one axis: counts int-valued float32 CSR [N, G], library sizes [N], measured genes and labels by cell."""

    counts: sp.csr_matrix
    library_size: np.ndarray
    measured_FG: np.ndarray
    """bool, one row a file."""
    file_N: np.ndarray
    label_N: np.ndarray
    """Index of the label, -1 where unlabelled."""
    n_labels: int


def select_genes(references: Sequence[Reference], n_top_genes: int) -> GeneAxis:
    """Choose highly variable genes over files that may measure different ones.

    In each file, genes seen in at least 10 cells are ranked by the log of variance over mean of log1p counts per
    10,000, standardised within 20 bins of the mean (after Satija et al. 2015, who take it before the logarithm, where a
    few cells with many counts decide). A gene takes its best rank over the files.
    """
    axis = GeneAxis.union([reference.axis for reference in references])
    best_G = np.full(len(axis), np.inf)
    for reference in references:
        counts, alignment = reference.on(axis)
        log1p = log1p_normalise(counts, reference.library_size).astype(np.float64)
        mean_G = np.asarray(log1p.mean(0)).ravel()
        variance_G = np.asarray(log1p.multiply(log1p).mean(0)).ravel() - mean_G**2
        seen_G = np.flatnonzero((counts.getnnz(0) >= 10) & alignment.measured)
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


def fit_tokenizer(
    references: Sequence[Reference], settings: TokenizerSettings | None = None, *, progress: bool = True
) -> CellTokenizer:
    """Fit a tokenizer on reference cells.

    Parameters
    ----------
    references
        One or several files, of different gene panels if need be. Every cell in them is used.
    settings
        See `TokenizerSettings`; the same settings, cells and machine give the same tokenizer.
    progress
        Show a progress bar.

    Returns
    -------
    CellTokenizer
        In evaluation mode.

    Raises
    ------
    rvqa.errors.InputError
        No cells, or fewer cells than codewords of a level.
    """
    settings = settings or TokenizerSettings()
    axis = select_genes(references, settings.n_top_genes)
    cells = _gather(references, axis)
    if len(cells.library_size) < settings.entries:
        raise InputError(
            f"{len(cells.library_size)} cells cannot fill codebooks of {settings.entries} entries; give more cells."
        )
    config = CellTokenizerConfig(settings.hidden, settings.latent, settings.levels, settings.entries, settings.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer = CellTokenizer(axis, config)
        _set_statistics(tokenizer, cells, settings)
        _Fit(tokenizer, cells, settings).run(progress=progress)
    _set_dispersion(tokenizer, cells)
    return tokenizer.eval()


def _gather(references: Sequence[Reference], axis: GeneAxis) -> TokenizerCells:
    mapped = [reference.on(axis) for reference in references]
    names = sorted({label for reference in references for label in reference.labels if label})
    index = {name: i for i, name in enumerate(names)} | {"": -1}
    return TokenizerCells(
        counts=sp.vstack([counts for counts, _ in mapped], format="csr"),
        library_size=np.concatenate([reference.library_size for reference in references]),
        measured_FG=np.stack([alignment.measured for _, alignment in mapped]),
        file_N=np.repeat(np.arange(len(references)), [counts.shape[0] for counts, _ in mapped]),
        label_N=np.array([index[label] for reference in references for label in reference.labels]),
        n_labels=len(names),
    )


def _set_statistics(tokenizer: CellTokenizer, cells: TokenizerCells, settings: TokenizerSettings) -> None:
    """Mean and scale of log1p counts per 10,000, and share of all counts, over the cells that measured a gene."""
    log1p = log1p_normalise(cells.counts, cells.library_size).astype(np.float64)
    files = len(cells.measured_FG)
    sums_FG = np.zeros((4, *cells.measured_FG.shape))
    for file in range(files):
        rows = cells.file_N == file
        sums_FG[0, file] = np.asarray(log1p[rows].sum(0)).ravel()
        sums_FG[1, file] = np.asarray(log1p[rows].multiply(log1p[rows]).sum(0)).ravel()
        sums_FG[2, file] = np.asarray(cells.counts[rows].sum(0, dtype=np.float64)).ravel()
        sums_FG[3, file] = cells.library_size[rows].sum()
    n_G = np.bincount(cells.file_N, minlength=files) @ cells.measured_FG
    total, square, count, library = (sums * cells.measured_FG for sums in sums_FG)
    mean_G = total.sum(0) / n_G
    scale_G = np.sqrt(np.maximum(square.sum(0) / n_G - mean_G**2, 0.0)).clip(settings.min_scale)
    share_G = (count.sum(0) + 0.5) / library.sum(0)
    tokenizer.gene_mean_G.copy_(torch.from_numpy(mean_G))
    tokenizer.gene_scale_G.copy_(torch.from_numpy(scale_G))
    tokenizer.log_share_G.copy_(torch.from_numpy(np.log(share_G)))


def _set_dispersion(tokenizer: CellTokenizer, cells: TokenizerCells) -> None:
    """Negative binomial dispersion of each gene by moments: sum((c - m)^2 - c) = dispersion x sum(m^2)."""
    codes_NM = ops.residual_quantize(_latents(tokenizer, cells), tokenizer.tables).numpy()
    excess_G, square_G = np.zeros(len(tokenizer.axis)), np.full(len(tokenizer.axis), 1e-12)
    for rows, share_BG in tokenizer.share_blocks(codes_NM):
        mean_BG = share_BG.astype(np.float64) * cells.library_size[rows, None]
        counts_BG = cells.counts[rows].toarray().astype(np.float64)
        measured_BG = cells.measured_FG[cells.file_N[rows]]
        excess_G += (((counts_BG - mean_BG) ** 2 - counts_BG) * measured_BG).sum(0)
        square_G += (mean_BG**2 * measured_BG).sum(0)
    tokenizer.dispersion_G.copy_(torch.from_numpy((excess_G / square_G).clip(0.0, 10.0)))


@torch.inference_mode()
def _latents(tokenizer: CellTokenizer, cells: TokenizerCells) -> Tensor:
    """Latents by the layers as trained (dense); equal to `CellTokenizer.latent` up to rounding."""
    tokenizer.eval()
    log1p = log1p_normalise(cells.counts, cells.library_size)
    blocks = []
    for start in range(0, log1p.shape[0], 1024):
        measured = torch.from_numpy(cells.measured_FG[cells.file_N[start : start + 1024]])
        dense = torch.from_numpy(log1p[start : start + 1024].toarray())
        blocks.append(tokenizer.encode_dense(tokenizer.standardise(dense, measured)))
    return torch.cat(blocks)


class _Fit:
    """One run: state of the optimiser, the codebooks' moving averages and the random generators."""

    def __init__(self, tokenizer: CellTokenizer, cells: TokenizerCells, settings: TokenizerSettings) -> None:
        self.tokenizer, self.cells, self.settings = tokenizer, cells, settings
        self.rng = np.random.default_rng(settings.seed)
        with torch.no_grad():  # start near the mean profile
            for parameter in tokenizer.decoder[2].parameters():
                parameter.mul_(0.1)
        self.classifier = nn.Linear(settings.latent, max(cells.n_labels, 1))
        parameters = [*tokenizer.parameters(), *self.classifier.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.scale = TARGET_SUM / 500 / len(tokenizer.axis)
        self.usage_MK = torch.ones(settings.levels, settings.entries)
        self.sum_MKD = torch.zeros(settings.levels, settings.entries, settings.latent)

    def run(self, *, progress: bool) -> None:
        """Warm half, k-means, joint half with a learning rate that falls to zero."""
        settings, cells = self.settings, len(self.cells.library_size)
        per_epoch = max(1, round(cells / settings.batch_size))
        half = max(1, min(settings.epochs * per_epoch, settings.max_steps) // 2)
        with tqdm(total=2 * half, desc="tokenizer", unit="step", disable=None if progress else True) as bar:
            for step, rows in enumerate(self._batches(2 * half, per_epoch)):
                if step == half:
                    self._start_codebooks()
                quantize = step >= half
                if quantize:
                    for group in self.optimiser.param_groups:
                        group["lr"] = 0.5 * settings.learning_rate * (1 + math.cos(math.pi * (step - half) / half))
                loss = self._loss(rows, quantize=quantize)
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")

    def _batches(self, steps: int, per_epoch: int) -> "list[np.ndarray]":
        n = len(self.cells.library_size)
        epochs = -(-steps // per_epoch)
        batches = [part for _ in range(epochs) for part in np.array_split(self.rng.permutation(n), per_epoch)]
        return batches[:steps]

    def _loss(self, rows: np.ndarray, *, quantize: bool) -> Tensor:
        settings, tokenizer, cells = self.settings, self.tokenizer, self.cells
        counts = cells.counts[rows]
        library_B = cells.library_size[rows]
        measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]])
        tokenizer.train()
        latent_BD = tokenizer.encode_dense(self._input(counts, library_B, measured_BG))
        used_BD, extra = latent_BD, torch.zeros(())
        if quantize:
            full_BD, prefix_BD = self._quantize(latent_BD.detach())
            extra = settings.commitment * F.mse_loss(latent_BD, full_BD)
            used_BD = latent_BD + (prefix_BD - latent_BD).detach()  # straight-through gradient
        counts_BG = torch.from_numpy(counts.toarray())
        mean_BG = torch.from_numpy(library_B).float()[:, None] * tokenizer.log_share(used_BD).exp()
        saturated_BG = torch.xlogy(counts_BG, counts_BG) - counts_BG
        nll_BG = mean_BG - torch.xlogy(counts_BG, mean_BG) + saturated_BG
        loss = (nll_BG * measured_BG).sum(1).mean() * self.scale + extra
        label_B = torch.from_numpy(cells.label_N[rows])
        if (label_B >= 0).any() and settings.label_weight:
            logits_BL = self.classifier(used_BD)
            loss = loss + settings.label_weight * F.cross_entropy(
                logits_BL, label_B, ignore_index=-1, label_smoothing=settings.label_smoothing
            )
        return loss

    def _input(self, counts: sp.csr_matrix, library_B: np.ndarray, measured_BG: Tensor) -> Tensor:
        """Dense standardised input, at a random depth and on a random panel."""
        settings, rng = self.settings, self.rng
        if rng.random() < settings.thinning:
            keep = rng.uniform(0.3, 1.0)
            counts, library_B = counts.copy(), library_B * keep
            counts.data = rng.binomial(counts.data.astype(np.int64), keep).astype(np.float32)
        log1p_BG = torch.from_numpy(log1p_normalise(counts, library_B).toarray())
        if rng.random() < settings.panel_dropout:
            share = rng.uniform(0.15, 1.0)
            measured_BG = measured_BG & torch.from_numpy(rng.random(measured_BG.shape[1]) < share)
        return self.tokenizer.standardise(log1p_BG, measured_BG)

    def _start_codebooks(self) -> None:
        """k-means++ and 15 rounds of Lloyd on the residuals of every level, over at most 20,000 cells."""
        residual_ND = _latents(self.tokenizer, self.cells)
        if len(residual_ND) > 20_000:
            residual_ND = residual_ND[self.rng.choice(len(residual_ND), 20_000, replace=False)]
        for level in range(self.settings.levels):
            codebook_KD = k_means(residual_ND, self.settings.entries, self.rng)
            self.tokenizer.codebooks_MKD[level] = codebook_KD
            residual_ND = residual_ND - codebook_KD[ops.nearest_codeword(residual_ND, codebook_KD)[0]]
        self.sum_MKD.copy_(self.tokenizer.codebooks_MKD)

    @torch.no_grad()
    def _quantize(self, latent_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize, then move the codebooks; returns the full sum and a sum of random depth (half of the cells)."""
        settings, codebooks_MKD = self.settings, self.tokenizer.codebooks_MKD
        codes_BM = ops.residual_quantize(latent_BD, self.tokenizer.tables).long()
        full_depth = torch.rand(len(latent_BD)) < 0.5
        depth_B = torch.where(full_depth, settings.levels, torch.randint(1, settings.levels + 1, (len(latent_BD),)))
        residual_BD, prefix_BD = latent_BD.clone(), torch.zeros_like(latent_BD)
        for level in range(settings.levels):
            codes_B = codes_BM[:, level]
            chosen_BD = codebooks_MKD[level, codes_B]
            used_K = torch.bincount(codes_B, minlength=settings.entries).float()
            sum_KD = torch.zeros_like(codebooks_MKD[level]).index_add_(0, codes_B, residual_BD)
            self.usage_MK[level].lerp_(used_K, 1 - settings.decay)
            self.sum_MKD[level].lerp_(sum_KD, 1 - settings.decay)
            for dead in torch.nonzero(self.usage_MK[level] < settings.dead_below).flatten().tolist():
                self.sum_MKD[level, dead] = residual_BD[int(self.rng.integers(len(residual_BD)))]
                self.usage_MK[level, dead] = 1.0
            codebooks_MKD[level] = self.sum_MKD[level] / self.usage_MK[level][:, None]
            residual_BD -= chosen_BD
            prefix_BD += chosen_BD * (depth_B > level)[:, None]
        return latent_BD - residual_BD, prefix_BD


def k_means(rows_ND: Tensor, n_clusters: int, rng: np.random.Generator, *, rounds: int = 15) -> Tensor:
    """Codewords [K, D] by k-means++ and Lloyd; a cluster that loses all its rows keeps its place."""
    first = int(rng.integers(len(rows_ND)))
    codebook_KD = rows_ND[[first]]
    distance_N = ((rows_ND - codebook_KD) ** 2).sum(1)
    while len(codebook_KD) < n_clusters:
        weight = distance_N.double().numpy() + 1e-12
        following = rows_ND[[int(rng.choice(len(weight), p=weight / weight.sum()))]]
        distance_N = torch.minimum(distance_N, ((rows_ND - following) ** 2).sum(1))
        codebook_KD = torch.cat([codebook_KD, following])
    for _ in range(rounds):
        index_N, _ = ops.nearest_codeword(rows_ND, codebook_KD)
        count_K = torch.bincount(index_N, minlength=n_clusters)[:, None]
        sum_KD = torch.zeros_like(codebook_KD).index_add_(0, index_N, rows_ND)
        codebook_KD = torch.where(count_K > 0, sum_KD / count_K.clamp_min(1), codebook_KD)
    return codebook_KD
