"""`encode` and `decode`: AnnData in, documented keys out.

N cells, M levels (8), D latent width, G genes of the model's axis.
"""

from typing import Any

import numpy as np
from anndata import AnnData

import rvqa
from rvqa import counts as counting
from rvqa.genes import GeneAlignment, align
from rvqa.model import Model
from rvqa.tokenizer import CellTokenizer


def encode(
    adata: AnnData,
    model: Model | CellTokenizer,
    *,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    key_added: str = "rvqa",
    copy: bool = False,
) -> AnnData | None:
    """Tokenize cells: raw counts to 8 residual codes each.

    Parameters
    ----------
    adata
        Raw counts, cells by genes, named by symbols or Ensembl ids in any order.
    model
        From `rvqa.load`, or a `CellTokenizer` alone.
    layer
        Where the counts are: a key of `adata.layers`, or "raw" for `adata.raw`; `X` by default.
    library_size_key
        Column of `adata.obs` with every cell's total counts over all genes, for files cut to a few genes; by default
        the sum of the stored counts.
    recover
        Turn log1p-normalised values back into the counts they were made of, where the stored values prove these.
    key_added
        Prefix of the keys written.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        With `copy`, the new object; else None and `adata` gains
        `obsm["rvqa_codes"]`, uint8 [N, 8]: code of each level; the first is the broadest;
        `obsm["X_rvqa"]`, float32 [N, D]: quantized latent, for neighbours and UMAP;
        `uns["rvqa"]`: gene coverage and the model it came from.

    Raises
    ------
    rvqa.errors.InputError
        The values are not raw counts (with `recover`: nor provably made of them), a cell is empty, or fewer than 50 of
        the model's genes are measured.

    Examples
    --------
    >>> rvqa.encode(adata, model)  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_rvqa")  # doctest: +SKIP
    """
    tokenizer = model.cell_tokenizer if isinstance(model, Model) else model
    codes_NM, alignment = cell_codes(adata, tokenizer, layer=layer, library_size_key=library_size_key, recover=recover)
    target = adata.copy() if copy else adata
    write_codes(target, tokenizer, codes_NM, key_added)
    record(target, key_added, {"coverage": alignment.report(), "model": getattr(model, "source", "")})
    return target if copy else None


def decode(
    codes: np.ndarray,
    model: Model | CellTokenizer,
    *,
    genes: list[str] | None = None,
    levels: int | None = None,
    target_sum: float = counting.TARGET_SUM,
) -> np.ndarray:
    """Expected expression of codes.

    Parameters
    ----------
    codes
        uint8 [N, 8], e.g. `adata.obsm["rvqa_codes"]`.
    model
        The model that made them.
    genes
        Symbols to decode; by default all genes of the model's axis, in its order (`model.cell_tokenizer.axis.symbols`).
    levels
        Decode only the first levels: broad identity without detail.
    target_sum
        Scale of the result: counts per `target_sum` counts of a cell. Multiply by a library size / `target_sum` for
        counts.

    Returns
    -------
    numpy.ndarray
        float32 [N, genes]: expected counts per `target_sum`, not log-transformed.

    Raises
    ------
    rvqa.errors.InputError
        Codes of the wrong shape, dtype or range, an unknown gene, or too many levels.
    """
    tokenizer = model.cell_tokenizer if isinstance(model, Model) else model
    return tokenizer.decode(np.asarray(codes), genes=genes, levels=levels, target_sum=target_sum)


def cell_codes(
    adata: AnnData,
    tokenizer: CellTokenizer,
    *,
    layer: str | None,
    library_size_key: str | None,
    recover: bool = False,
) -> tuple[np.ndarray, GeneAlignment]:
    """Codes uint8 [N, M] of the cells of a file, and how its genes met the axis."""
    counts, var, library_size = counting.counts_var_and_depth(
        adata, layer=layer, library_size_key=library_size_key, recover=recover
    )
    alignment = align(var, tokenizer.axis)
    return tokenizer.encode(counts, alignment, library_size), alignment


def write_codes(adata: AnnData, tokenizer: CellTokenizer, codes_NM: np.ndarray, key_added: str) -> None:
    """Put codes and quantized latents where the contract says."""
    adata.obsm[f"{key_added}_codes"] = codes_NM
    adata.obsm[f"X_{key_added}"] = tokenizer.quantized_latent(codes_NM)


def record(adata: AnnData, key_added: str, facts: dict[str, Any]) -> None:
    """Add facts to `uns[key_added]`, which says where results come from."""
    adata.uns[key_added] = {**adata.uns.get(key_added, {}), "version": rvqa.__version__, **facts}
