"""`encode` and `decode`: AnnData in, documented keys out.

N cells, M levels (8), D latent width, G genes of the model's axis.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

import rvqa
from rvqa import counts as counting
from rvqa.errors import InputError
from rvqa.genes import GeneAlignment, align, refuse_transposed
from rvqa.model import Model
from rvqa.tokenizer import CellTokenizer

if TYPE_CHECKING:
    from rvqa.atlas.codes import Codes


def encode(
    adata: "AnnData | str | Path | Sequence[AnnData | str | Path]",
    model: Model | CellTokenizer,
    *,
    out: str | Path | None = None,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    recon_error: bool = False,
    key_added: str = "rvqa",
    copy: bool = False,
    obs: Sequence[str] = (),
    threads: int | None = None,
    cluster: Any = None,
    force: bool = False,
    in_place: bool = False,
    append: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> "AnnData | Codes | None":
    """Tokenize cells: raw counts to 8 residual codes each, in memory or, with `out`, in files of any size.

    Parameters
    ----------
    adata
        Raw counts, cells by genes, named by symbols or Ensembl ids in any order. With `out` also a path of an `.h5ad`
        or `.zarr` file, a pattern, or a list of these, whose genes may differ; a backed or lazy AnnData is read part by
        part.
    model
        From `rvqa.load`, or a `CellTokenizer` alone.
    out
        File to write: `.rvq` (5 bytes a cell), `.zarr`, `.parquet`, or `.h5ad` for a copy of one `.h5ad` file with the
        keys below. Memory does not grow with the number of cells. A run that was stopped goes on where it was when it
        is started again with the same arguments, and gives the same bytes.
    layer
        Where the counts are: a key of `adata.layers`, or "raw" for `adata.raw`; `X` by default.
    library_size_key
        Column of `adata.obs` with every cell's total counts over all genes, for files cut to a few genes; by default
        the sum of the stored counts over the share of all counts that these genes take in the cells of the fit.
    recover
        Turn log1p-normalised values back into the counts they were made of, where the stored values prove these.
    recon_error
        Also write how badly each cell's codes explain its counts, to find doublets, empty droplets and types that the
        model never saw. Takes far longer than the codes: every gene is decoded.
    key_added
        Prefix of the keys written.
    copy
        Return a changed copy and leave `adata` as it is.
    obs, threads, cluster, force, in_place, append, device, progress
        With `out`: columns of `obs` to carry along; threads that read and encode (two a core by default);
        `dask.distributed.Client` or address of a scheduler whose workers do the work; replace an output that exists;
        write codes into the `.h5ad` file that is read, by copy and rename; add the cells to those of an output that
        exists, as if all had been encoded in one run; "cpu" or "cuda"; show progress.

    Returns
    -------
    AnnData, Codes or None
        With `out`, what `rvqa.open_codes` opens (None for `.h5ad`). With `copy`, the new object; else None and `adata`
        gains
        `obsm["rvqa_codes"]`, uint8 [N, 8]: code of each level; the first is the broadest;
        `obsm["X_rvqa"]`, float32 [N, D]: quantized latent, for neighbours and UMAP;
        `uns["rvqa"]`: gene coverage and the model it came from;
        with `recon_error`, `obs["rvqa_recon_error"]`, float64 [N]: mean over the measured genes of the squared error
        over its expectation, about 1 for cells like those of the fit (`CellTokenizer.recon_error`).

    Raises
    ------
    rvqa.errors.InputError
        The values are not raw counts (with `recover`: nor provably made of them), a cell is empty, or fewer than 50 of
        the model's genes are measured; with `out`, an output that exists, or parts of another run beside it.

    Examples
    --------
    >>> rvqa.encode(adata, model)  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_rvqa")  # doctest: +SKIP
    """
    tokenizer = model.cell_tokenizer if isinstance(model, Model) else model
    if out is not None:
        if recover or recon_error or copy or key_added != "rvqa":
            raise InputError("recover, recon_error, copy and key_added are for cells in memory: leave out= away.")
        from rvqa.atlas.codes import open_codes
        from rvqa.atlas.progress import Progress
        from rvqa.atlas.run import Settings, encode_files

        settings = Settings(layer, library_size_key, tuple(obs))
        with Progress(show=progress) as shown:
            encode_files(
                adata,
                tokenizer,
                out,
                settings=settings,
                threads=threads,
                cluster=cluster,
                force=force,
                in_place=in_place,
                append=append,
                device=device,
                progress=shown,
                model=getattr(model, "source", ""),
            )
        return None if Path(out).suffix == ".h5ad" else open_codes(out)
    if not isinstance(adata, AnnData):
        raise InputError(f"Cells in memory are an AnnData, not {type(adata).__name__}. For files pass out= as well.")
    counts, alignment, library_size = read_cells(
        adata, tokenizer, layer=layer, library_size_key=library_size_key, recover=recover
    )
    codes_NM = tokenizer.encode(counts, alignment, library_size)
    error_N = tokenizer.recon_error(counts, alignment, library_size, codes_NM) if recon_error else None
    target = copy_of(adata) if copy else adata
    write_codes(target, tokenizer, codes_NM, key_added)
    if error_N is not None:
        target.obs[f"{key_added}_recon_error"] = error_N
    record(target, key_added, {"coverage": alignment.report(), "model": getattr(model, "source", "")})
    return target if copy else None


def decode(
    codes: np.ndarray,
    model: Model | CellTokenizer,
    *,
    genes: list[str] | None = None,
    levels: int | None = None,
    target_sum: float = counting.TARGET_SUM,
    sample: bool = False,
    library_size: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray | sp.csr_matrix:
    """Expected expression of codes, or counts drawn from them.

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
        expected counts.
    sample
        Draw counts instead: negative binomial around the expectation, with the dispersion that the fit found.
    library_size
        With `sample`: total counts of every cell, [N] or one number for all; `target_sum` by default.
    seed
        With `sample`: of the draws.

    Returns
    -------
    numpy.ndarray or scipy.sparse.csr_matrix
        float32 [N, genes]: expected counts per `target_sum`, not log-transformed, or with `sample` counts, sparse.

    Raises
    ------
    rvqa.errors.InputError
        Codes of the wrong shape, dtype or range, an unknown gene, too many levels, a target that is no number > 0, or
        library sizes that are not one number >= 0 a cell.
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
    if library_size is not None and not sample:
        raise InputError("library_size is for drawn counts: pass sample=True too, or scale with target_sum.")
    if not sample:
        return tokenizer.decode(array, genes=genes, levels=levels, target_sum=target_sum)
    sizes = np.asarray(target_sum if library_size is None else library_size, dtype=np.float64)
    if sizes.shape not in ((), (len(array),)) or not ((sizes >= 0) & (sizes <= 2**53)).all():
        raise InputError(
            f"library_size has shape {sizes.shape} or values that are no total counts; expected one number >= 0 for "
            f"each of {len(array)} cells, or one for all."
        )
    return tokenizer.sample(array, np.broadcast_to(sizes, len(array)), seed=seed, genes=genes, levels=levels)


def cell_codes(
    adata: AnnData,
    tokenizer: CellTokenizer,
    *,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
) -> tuple[np.ndarray, GeneAlignment]:
    """Codes uint8 [N, M] of the cells of a file, and how its genes met the axis."""
    counts, alignment, library_size = read_cells(
        adata, tokenizer, layer=layer, library_size_key=library_size_key, recover=recover
    )
    return tokenizer.encode(counts, alignment, library_size), alignment


def read_cells(
    adata: AnnData,
    tokenizer: CellTokenizer,
    *,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
) -> tuple[sp.csr_matrix, GeneAlignment, np.ndarray]:
    """Counts of a file, how its genes meet the axis, and depth; of a transposed file, refuse just that."""
    try:
        cells = counting.read_counts(adata, layer=layer, library_size_key=library_size_key, recover=recover)
        return cells.counts, align(cells.var, tokenizer.axis), tokenizer.shares.depth(cells)
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
