"""`encode` and `decode`: AnnData in, documented keys out.

N cells, M levels (8), D latent width, G genes of the model's axis.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

import rvqa
from rvqa import counts as counting
from rvqa.errors import InputError
from rvqa.genes import GeneAlignment, align, refuse_transposed
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
    target = copy_of(adata) if copy else adata
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
        Codes of the wrong shape, dtype or range, an unknown gene, too many levels, or a target that is no number > 0.
    """
    tokenizer = model.cell_tokenizer if isinstance(model, Model) else model
    if levels is not None and not isinstance(levels, int | np.integer):
        raise InputError(f"levels is {levels!r}; expected a whole number.")
    if not 0 < target_sum <= 2**53:
        raise InputError(f"target_sum is {target_sum}; expected a number of counts above 0, such as 1e4.")
    try:
        array = np.array(codes, order="C")  # PyTorch takes no read-only array and no reversed one
    except ValueError as error:
        raise InputError(f"codes are not an array ({error}); expected uint8 [cells, levels].") from error
    return tokenizer.decode(array, genes=genes, levels=levels, target_sum=target_sum)


def cell_codes(
    adata: AnnData,
    tokenizer: CellTokenizer,
    *,
    layer: str | None,
    library_size_key: str | None,
    recover: bool = False,
) -> tuple[np.ndarray, GeneAlignment]:
    """Codes uint8 [N, M] of the cells of a file, and how its genes met the axis."""
    counts, alignment, library_size = read_cells(
        adata, tokenizer, layer=layer, library_size_key=library_size_key, recover=recover
    )
    return tokenizer.encode(counts, alignment, library_size), alignment


def read_cells(
    adata: AnnData, tokenizer: CellTokenizer, *, layer: str | None, library_size_key: str | None, recover: bool
) -> tuple[sp.csr_matrix, GeneAlignment, np.ndarray]:
    """Counts of a file, how its genes meet the axis, and library sizes; of a transposed file, refuse just that."""
    try:
        counts, var, library_size = counting.counts_var_and_depth(
            adata, layer=layer, library_size_key=library_size_key, recover=recover
        )
        return counts, align(var, tokenizer.axis), library_size
    except InputError:
        refuse_transposed(adata, tokenizer.axis)
        raise


def copy_of(adata: AnnData) -> AnnData:
    """Copy an AnnData; a backed one into memory."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def write_codes(adata: AnnData, tokenizer: CellTokenizer, codes_NM: np.ndarray, key_added: str) -> None:
    """Put codes and quantized latents where the contract says."""
    adata.obsm[f"{key_added}_codes"] = codes_NM
    adata.obsm[f"X_{key_added}"] = tokenizer.quantized_latent(codes_NM)


def record(adata: AnnData, key_added: str, facts: dict[str, Any]) -> None:
    """Add facts to `uns[key_added]`, which says where results come from; in place of what is no mapping."""
    earlier = adata.uns.get(key_added)
    kept = earlier if isinstance(earlier, Mapping) else {}
    adata.uns[key_added] = {**kept, "version": rvqa.__version__, **facts}
