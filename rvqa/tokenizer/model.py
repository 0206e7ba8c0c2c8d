"""CellTokenizer: raw counts of a cell -> latent -> 8 residual codes of 32, and codes -> expression.

Encoder: x_g = log1p(counts per 10,000) of every measured gene g, standardised, unmeasured genes left out:
    h = b + sum_g measured_g (x_g - mean_g) / scale_g W_g,    z = A relu(LayerNorm(h)) + a
so a file's panel enters as a bias alone (`panel_bias`) and the sparse product is `ops.csr_project` with a folded W.
Decoder: latent -> log of each gene's share of a cell's counts; counts are negative binomial around library size x share
(the likelihood of Lopez et al., Nature Methods 2018, with the library size taken as known).

Shapes: N cells, G genes of the axis, H hidden units, D latent width, M levels, K codewords a level.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rvqa.data.alignment import GeneAlignment, map_columns, match_columns
from rvqa.data.cells import Cells
from rvqa.data.depth import TARGET_SUM, GeneShares
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError, require_known
from rvqa.io.json_text import shown
from rvqa.io.tensors import (
    OTHER_VERSION,
    REPAIR,
    read_json,
    read_tensors,
    require_same_tensors,
)
from rvqa.kernels import ops, registry
from rvqa.tokenizer.panel import PanelEncoder
from rvqa.tokenizer.persistence import read_genes, require_values

if TYPE_CHECKING:
    from rvqa.training.tokenizer.settings import TokenizerSettings


FORMAT_VERSION = 2

LARGEST_LAYER = 2**16
"""Most units of a layer, hidden or latent."""


@dataclass(frozen=True)
class CellTokenizerConfig:
    """Sizes of a `CellTokenizer`; saved as `config.json` beside its tensors."""

    hidden: int = 128
    latent: int = 32
    levels: int = 8
    entries: int = 32
    dropout: float = 0.3


class CellTokenizer(nn.Module):
    """Encoder, residual quantizer and decoder over one gene axis.

    Parameters
    ----------
    axis
        Genes in the order of the model's columns.
    config
        Sizes.
    shares
        Share of all counts that every gene takes, on the axis or not, for the depth of files cut to a panel; by default
        the genes of the axis are all there are, and alike.

    Notes
    -----
    `fit` makes a fitted one; a new one has random weights.
    """

    gene_mean_G: Tensor
    gene_scale_G: Tensor
    log_share_G: Tensor
    dispersion_G: Tensor
    codebooks_MKD: Tensor

    def __init__(self, axis: GeneAxis, config: CellTokenizerConfig, shares: GeneShares | None = None) -> None:
        super().__init__()
        self.axis, self.config = axis, config
        self._kept: tuple[object, ops.Tables] | None = None
        """Backend's `pack` and what `tables` made by it."""
        self.shares = shares or GeneShares(axis, np.full(len(axis), 1 / len(axis)))
        G, H, D = len(axis), config.hidden, config.latent
        self.project = nn.Linear(G, H)
        self.tail = nn.Sequential(nn.LayerNorm(H), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(H, D))
        self.decoder = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, G))
        self.register_buffer("gene_mean_G", torch.zeros(G))
        self.register_buffer("gene_scale_G", torch.ones(G))
        self.register_buffer("log_share_G", torch.full((G,), -np.log(G)))
        self.register_buffer("dispersion_G", torch.zeros(G))
        self.register_buffer("codebooks_MKD", torch.zeros(config.levels, config.entries, D))

    @classmethod
    def fit(
        cls,
        references: Sequence[Cells],
        settings: "TokenizerSettings | None" = None,
        *,
        progress: bool = True,
    ) -> "CellTokenizer":
        """Fit a tokenizer on reference cells: `rvqa.training.tokenizer.fit.fit_tokenizer`, which says more."""
        from rvqa.training.tokenizer.fit import fit_tokenizer

        return fit_tokenizer(references, settings, progress=progress)

    # Encoder

    def standardise(self, log1p_NG: Tensor, measured_NG: Tensor) -> Tensor:
        """Input of the first layer as training sees it, dense: 0 at the mean of a gene and where it is unmeasured."""
        return (log1p_NG - self.gene_mean_G) / self.gene_scale_G * measured_NG

    def encode_dense(self, standardised_NG: Tensor) -> Tensor:
        """Latent [N, D] of dense standardised input, with gradients; the layers are those of `latent`."""
        return self.tail(self.project(standardised_NG))

    def panel_bias(self, measured_G: np.ndarray) -> Tensor:
        """First layer's bias [H] for a file that measured these genes (bool [G])."""
        shift_G = (
            self.gene_mean_G.double()
            / self.gene_scale_G.double()
            * torch.tensor(measured_G, device=self.gene_mean_G.device)
        )
        return (self.project.bias.double() - self.project.weight.double() @ shift_G).float()

    @torch.inference_mode()
    def latent(self, counts: sp.csr_matrix, alignment: GeneAlignment, library_size: np.ndarray) -> Tensor:
        """Latents of raw counts, before quantization.

        Parameters
        ----------
        counts
            Raw counts, CSR [N, genes of the file].
        alignment
            Result of `rvqa.data.alignment.align` for that file and this axis.
        library_size
            Total counts of every cell over all its genes, float64 [N], > 0: `shares.depth` of the file.

        Returns
        -------
        torch.Tensor
            float32 [N, D]. A row depends on its cell, the file's panel and the model alone, not on the batch.
        """
        encoder = self.encoder(alignment)
        return encoder.latent(
            torch.from_numpy(counts.indptr),
            torch.from_numpy(counts.indices),
            torch.from_numpy(counts.data.astype(np.float32, copy=False)),
            torch.from_numpy(library_size),
        )

    def encoder(self, alignment: GeneAlignment) -> "PanelEncoder":
        """Make ready to encode cells of one file; what that takes is done once."""
        return PanelEncoder(self, alignment)

    @property
    def tables(self) -> ops.Tables:
        """Codebooks made ready for the kernels; kept until a codeword, the device or the backend changes.

        A fit changes codewords in place, so the values are compared: that is safe against every way to change them, and
        takes a few microseconds.
        """
        codebooks_MKD = self.codebooks_MKD
        pack = registry.dispatch("pack", codebooks_MKD.device)
        if self._kept is not None:
            kept_pack, tables = self._kept
            if kept_pack is pack and _equal(tables.codebooks_MKD, codebooks_MKD):
                return tables
        tables = ops.prepare(codebooks_MKD)
        self._kept = (pack, tables)
        return tables

    def quantize(self, latent_ND: Tensor) -> np.ndarray:
        """Codes uint8 [N, M] of latents."""
        return ops.residual_quantize(latent_ND, self.tables).numpy()

    def encode(self, counts: sp.csr_matrix, alignment: GeneAlignment, library_size: np.ndarray) -> np.ndarray:
        """Codes uint8 [N, M] of raw counts; arguments as for `latent`."""
        return self.quantize(self.latent(counts, alignment, library_size))

    # Decoder

    @torch.inference_mode()
    def quantized_latent(self, codes_NM: np.ndarray) -> np.ndarray:
        """Sum of the chosen codewords, float32 [N, D]; fewer columns than levels decode that prefix.

        Raises
        ------
        InputError
            Codes of another shape, dtype or range.
        """
        codes = np.ascontiguousarray(codes_NM)
        return ops.decode(torch.from_numpy(codes), self.tables).numpy()

    def log_share(self, latent_ND: Tensor) -> Tensor:
        """Log of the expected share of a cell's counts that every gene takes, [N, G], at most 0; with gradients."""
        return (self.log_share_G + self.decoder(latent_ND)).clamp(-30.0, 0.0)

    @torch.inference_mode()
    def share_blocks(self, codes_NM: np.ndarray, *, block: int = 1024) -> Iterator[tuple[slice, np.ndarray]]:
        """Expected share of a cell's counts by gene, float32 [block, G], block by block: never N x G at once."""
        self.eval()
        for start in range(0, len(codes_NM), block):
            rows = slice(start, min(start + block, len(codes_NM)))
            yield rows, self.log_share(torch.from_numpy(self.quantized_latent(codes_NM[rows]))).exp().numpy()

    def decode(
        self,
        codes_NM: np.ndarray,
        *,
        genes: Sequence[str] | None = None,
        levels: int | None = None,
        target_sum: float = TARGET_SUM,
    ) -> np.ndarray:
        """Expected counts per `target_sum`, float32 [N, genes]; see `rvqa.decode`."""
        columns = self._columns(codes_NM, genes, levels)
        result_NG = np.empty((len(codes_NM), len(columns)), dtype=np.float32)
        for rows, share_BG in self.share_blocks(codes_NM[:, :levels]):
            result_NG[rows] = share_BG[:, columns] * np.float32(target_sum)
        return result_NG

    def sample(
        self,
        codes_NM: np.ndarray,
        library_size: np.ndarray,
        *,
        seed: int = 0,
        genes: Sequence[str] | None = None,
        levels: int | None = None,
    ) -> sp.csr_matrix:
        """Counts drawn from codes at library sizes [N], float32 CSR [N, genes]; see `rvqa.decode`."""
        columns = self._columns(codes_NM, genes, levels)
        rng = np.random.default_rng(seed)
        return self.draw(codes_NM[:, :levels], library_size, rng, columns)

    def _columns(self, codes_NM: np.ndarray, genes: Sequence[str] | None, levels: int | None) -> np.ndarray:
        """Columns of the axis that genes stand for; codes, genes and levels are checked."""
        expected = self.config.levels
        if codes_NM.dtype != np.uint8 or codes_NM.ndim != 2 or codes_NM.shape[1] != expected:
            raise InputError(
                f"Codes have dtype {codes_NM.dtype} and shape {codes_NM.shape}; expected uint8 [cells, {expected}] "
                "as in adata.obsm['rvqa_codes']."
            )
        if levels is not None and not 1 <= levels <= expected:
            raise InputError(f"levels is {levels}; expected 1 to {expected}.")
        symbols = self.axis.symbols
        if genes is None:
            return np.arange(len(symbols))
        require_known("gene of this model", genes, symbols)
        index = {symbol: i for i, symbol in enumerate(symbols)}
        return np.array([index[gene] for gene in genes], dtype=np.int64)

    def share_sum(self, codes_NM: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
        """Weighted sum of expected shares over cells, float64 [G]: with library sizes, the expected total counts."""
        total_G = np.zeros(len(self.axis))
        for rows, share_BG in self.share_blocks(codes_NM):
            total_G += weight_N[rows] @ share_BG.astype(np.float64)
        return total_G

    def draw(
        self,
        codes_NM: np.ndarray,
        library_size: np.ndarray,
        rng: np.random.Generator,
        columns: np.ndarray | None = None,
    ) -> sp.csr_matrix:
        """Counts drawn around what codes stand for, float32 CSR [N, G or columns], given library sizes [N]."""
        columns = np.arange(len(self.axis)) if columns is None else columns
        dispersion_G = self.dispersion_G.double().numpy()[columns]
        blocks = [sp.csr_matrix((0, len(columns)), dtype=np.float32)]
        for rows, share_BG in self.share_blocks(codes_NM):
            mean_BG = share_BG[:, columns].astype(np.float64) * library_size[rows, None]
            blocks.append(draw_counts(mean_BG, dispersion_G, rng))
        return sp.vstack(blocks, format="csr")

    def recon_error(
        self, counts: sp.csr_matrix, alignment: GeneAlignment, library_size: np.ndarray, codes_NM: np.ndarray
    ) -> np.ndarray:
        """How badly codes explain the counts they were made of, float64 [N].

        Mean over the measured genes of the axis of (c - m)^2 / (m + a m^2), where m is the decoded mean at the cell's
        library size and a the gene's dispersion: about 1 for a cell like those of the fit, more for doublets, damaged
        cells and types never seen. Arguments as for `latent`, and codes uint8 [N, M].
        """
        on_axis = map_columns(counts, alignment)
        measured_G = alignment.measured
        dispersion_G = self.dispersion_G.double().numpy()[measured_G]
        error_N = np.empty(len(codes_NM))
        for rows, share_BG in self.share_blocks(codes_NM):
            mean_BG = share_BG[:, measured_G].astype(np.float64) * library_size[rows, None] + 1e-8
            counts_BG = on_axis[rows].toarray()[:, measured_G]
            error_N[rows] = ((counts_BG - mean_BG) ** 2 / (mean_BG + dispersion_G * mean_BG**2)).mean(1)
        return error_N

    # Files

    def fingerprint(self) -> str:
        """SHA-256 of all that decides codes and what they decode to: sizes, genes, tensors."""
        digest = hashlib.sha256(json.dumps(asdict(self.config)).encode())
        table = self._gene_table()
        digest.update(table.to_json(orient="values", double_precision=15).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _gene_table(self) -> pd.DataFrame:
        """All genes known, those of the axis first and in its order."""
        frame = self.shares.axis.to_frame().assign(share=self.shares.share_G)
        at = match_columns(frame, self.axis, aliases=False)
        order = np.argsort(np.where(at < 0, len(at), at), kind="stable")
        return frame.assign(on_axis=at >= 0).iloc[order]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and `genes.parquet` into a directory, made if it is not there."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path / "model.safetensors")
        self._gene_table().to_parquet(path / "genes.parquet", index=False)
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self.config)}, indent=2)
        (path / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "CellTokenizer":
        """Read what `save_pretrained` wrote; the loaded tokenizer gives the same codes, bit for bit.

        Raises
        ------
        InputError
            Not such a directory, another format version, or tensors that are missing or of another shape.
        """
        path = Path(directory)
        for name in ("config.json", "model.safetensors", "genes.parquet"):
            if not (path / name).is_file():
                raise InputError(
                    f"{path} is not a cell tokenizer: it has no {name}. Give the directory `rvqa fit` wrote."
                )
        kinds = {field.name: float if field.name == "dropout" else int for field in fields(CellTokenizerConfig)}
        settings = read_json(path / "config.json", {"format_version": int})
        version = settings.pop("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {shown(version)}; this rvqa reads version {FORMAT_VERSION}. {OTHER_VERSION}"
            )
        if set(settings) != set(kinds):
            raise InputError(
                f"{path / 'config.json'} has the settings {shown(sorted(settings))}; expected {sorted(kinds)}. {REPAIR}"
            )
        read_json(path / "config.json", kinds)
        config = CellTokenizerConfig(**settings)
        most = {"hidden": LARGEST_LAYER, "latent": LARGEST_LAYER, "levels": 64, "entries": 256}
        for name, size in most.items():
            if not 1 <= getattr(config, name) <= size:
                seen = shown(getattr(config, name))
                raise InputError(f"{path / 'config.json'}: {name!r} is {seen}; expected 1 to {size:,}. {REPAIR}")
        if not 0 <= config.dropout < 1:
            raise InputError(
                f"{path / 'config.json'}: 'dropout' is {shown(config.dropout)}; expected 0 and more, below 1. {REPAIR}"
            )
        axis, shares = read_genes(path / "genes.parquet")
        with torch.device("meta"):  # no memory, whatever sizes the file asks for
            expected = cls(axis, config, shares).state_dict()
        tensors = read_tensors(path / "model.safetensors")
        require_same_tensors(path / "model.safetensors", tensors, expected)
        require_values(path / "model.safetensors", tensors)
        tokenizer = cls(axis, config, shares)
        tokenizer.load_state_dict(tensors)
        return tokenizer.eval()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers on the same device."""
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def draw_counts(mean_BG: np.ndarray, dispersion_G: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Negative binomial counts with these means, float32 CSR [B, G]; variance = mean + dispersion x mean^2."""
    shape_G = 1.0 / np.maximum(dispersion_G, 1e-6)
    rate_BG = rng.gamma(np.broadcast_to(shape_G, mean_BG.shape), mean_BG / shape_G)
    return sp.csr_matrix(rng.poisson(rate_BG).astype(np.float32))
