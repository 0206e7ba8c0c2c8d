"""`encode` and `decode`: AnnData in, documented keys out.

N cells, M levels (8), D latent width, G genes of the model's axis.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import GeneAlignment, refuse_transposed
from rvqa.data.cells import Cells
from rvqa.data.counts import read_counts
from rvqa.data.depth import TARGET_SUM
from rvqa.data.files.keys import Keys, copied, require_copy, require_free
from rvqa.data.files.memory import limited
from rvqa.data.files.sources import read_cells
from rvqa.data.reading import Reading
from rvqa.errors import InputError, about
from rvqa.io.temporaries import scratch_folder
from rvqa.language.model import Model
from rvqa.tokenizer.model import CellTokenizer

if TYPE_CHECKING:
    from rvqa.atlas.reader import Codes


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
    memory: int | str | None = None,
    progress: bool = True,
) -> "AnnData | Codes | None":
    """Tokenize cells: raw counts to 8 residual codes each, in memory or, with `out`, in files of any size.

    Parameters
    ----------
    adata
        Raw counts, cells by genes, named by symbols or Ensembl ids in any order; or the path of an `.h5ad`, `.zarr`,
        `.h5mu` or Cell Ranger `.h5` file or of a folder of Matrix Market files, which is read into memory. With `out`
        also a pattern, or a list of these, whose genes may differ; they, and a backed or lazy AnnData, are read part by
        part.
    model
        From `rvqa.load`, or a `CellTokenizer` alone.
    out
        File to write: `.rvq` (5 bytes a cell), `.zarr`, `.parquet`, or `.h5ad` for a copy of one file with the keys
        below. Memory does not grow with the number of cells. A run that was stopped goes on where it was when it
        is started again with the same arguments, and gives the same bytes.
    layer
        Where the counts are: a key of `adata.layers`, or "raw" for `adata.raw`; `X` by default; "auto" for `X` or,
        where that holds no raw counts, the one place that does.
    library_size_key
        Column of `adata.obs` with every cell's total counts over all genes, for files cut to a few genes; by default
        the sum of the stored counts over the share of all counts that these genes take in the cells of the fit.
    recover
        Turn log1p-normalised values back into the counts they were made of, where the stored values prove these.
    recon_error
        Also write how badly each cell's codes explain its counts, to find doublets, empty droplets and types that the
        model never saw. Takes far longer than the codes: every gene is decoded.
    key_added
        Prefix of the keys written; rejected where the user keeps something else under such a key.
    copy
        Return a changed copy and leave `adata` as it is.
    obs, threads, cluster, force, in_place, append, device, progress
        With `out`: columns of `obs` to carry along (one that is called `cell`, `file` or `code_1` as `obs_cell` and so
        on: these names are those of the store); threads that read and encode (two a core by default);
        `dask.distributed.Client` or address of a scheduler whose workers do the work; replace an output that exists;
        write codes into the `.h5ad` file that is read, by copy and rename; add the cells to those of an output that
        exists, as if all had been encoded in one run; "cpu" or "cuda"; show progress.
    memory
        Most memory that reading a file may take, in MiB or as "4G"; by default three quarters of the machine's. What
        would take more is rejected, with both numbers.

    Returns
    -------
    AnnData, Codes or None
        With `out`, what `rvqa.open_codes` opens (None for `.h5ad`). With `copy` or a path, the new object; else None
        and `adata` gains
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
    with limited(memory):
        tokenizer = model.cell_tokenizer if isinstance(model, Model) else model
        source = getattr(model, "source", "")
        reading = Reading(layer, library_size_key, recover)
        if out is not None:
            if copy or key_added != "rvqa":
                raise InputError("copy and key_added are for cells in memory: leave out= away.")
            if recover or recon_error:
                others = {
                    "obs": obs,
                    "cluster": cluster,
                    "in_place": in_place,
                    "append": append,
                    "device": device != "cpu",
                }
                encode_in_memory(
                    adata, tokenizer, out, reading, recon_error=recon_error, source=source, force=force, others=others
                )
                return None
            from rvqa.atlas.encoder import Settings
            from rvqa.atlas.progress import Progress
            from rvqa.atlas.reader import open_codes
            from rvqa.atlas.run import encode_files

            settings = Settings(reading, tuple(obs))
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
                    model=source,
                )
            return None if Path(out).suffix == ".h5ad" else open_codes(out)
        given = in_memory(adata, layer=layer)
        obs_names = [f"{key_added}_recon_error"] if recon_error else []
        require_free(given, key_added, {"obs": obs_names, "obsm": code_names(key_added)})
        keys = code_keys(given, tokenizer, reading, recon_error=recon_error, source=source, key_added=key_added)
        target = copy_of(given) if copy and given is adata else given
        keys.add_to(target)
        return target if copy or given is not adata else None


def encode_in_memory(
    given: Any,
    tokenizer: CellTokenizer,
    out: str | Path,
    reading: Reading,
    *,
    recon_error: bool,
    source: str,
    force: bool,
    others: Mapping[str, object],
) -> Keys:
    """Write a copy of one file with its codes; for what takes all of its cells at once.

    `others` are options of files that are read part by part, by name; none may be given here.

    Raises
    ------
    rvqa.errors.InputError
        Anything but the path of one file to `.h5ad`, one of `others`, or as for `encode`.
    """
    if given_too := [name for name, value in others.items() if value]:
        raise InputError(
            f"recover and recon_error (--recover, --recon-error) read all cells of one file at once, which "
            f"{', '.join(given_too)} cannot be combined with. Leave {'it' if len(given_too) == 1 else 'them'} out."
        )
    path = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
    if not isinstance(path, str | Path) or Path(out).suffix != ".h5ad":
        raise InputError(
            "recover and recon_error (--recover, --recon-error) are for one file that fits in memory, to .h5ad, or for "
            "an AnnData: leave out= away."
        )
    target = require_copy(path, out, force=force)
    own = reading.of(path)
    with about(path), copied(Path(path), target) as root:
        adata = read_cells(path, layer=own.layer)
        keys = code_keys(adata, tokenizer, own, recon_error=recon_error, source=source)
        keys.add_to_file(root)
    return keys


def code_keys(
    adata: AnnData,
    tokenizer: CellTokenizer,
    reading: Reading,
    *,
    recon_error: bool = False,
    source: str = "",
    key_added: str = "rvqa",
) -> Keys:
    """What `encode` adds to the cells of an AnnData; arguments as there."""
    cells, alignment, library_size = cells_on_axis(adata, tokenizer, reading)
    codes_NM = tokenizer.encode(cells.counts, alignment, library_size)
    obs = {}
    if recon_error:
        obs[f"{key_added}_recon_error"] = tokenizer.recon_error(cells.counts, alignment, library_size, codes_NM)
    facts = {"coverage": coverage_of(cells, alignment), "model": source}
    return Keys(obs, code_arrays(tokenizer, codes_NM, key_added), facts, key_added)


def decode(
    codes: np.ndarray,
    model: Model | CellTokenizer,
    *,
    genes: list[str] | None = None,
    levels: int | None = None,
    target_sum: float = TARGET_SUM,
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
        Codes of the wrong shape, dtype or range, an unknown gene, too many levels, a target that is not a number
        > 0, or library sizes that are not one number >= 0 a cell.
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
            f"library_size has shape {sizes.shape} or values that are not total counts; expected one number >= 0 for "
            f"each of {len(array)} cells, or one for all."
        )
    return tokenizer.sample(array, np.broadcast_to(sizes, len(array)), seed=seed, genes=genes, levels=levels)


def in_memory(given: Any, *, layer: str | None) -> AnnData:
    """An AnnData as it is, or what is in the file of a path.

    Raises
    ------
    rvqa.errors.InputError
        Neither, or a file that cannot be read.
    """
    if isinstance(given, AnnData) and not isinstance(given.obs, pd.DataFrame):
        raise InputError("This AnnData is lazy. Encode it with out=, or read it into memory: adata.to_memory().")
    if isinstance(given, AnnData):
        return given
    if isinstance(given, str | Path):
        return read_cells(given, layer=layer, whole=True)
    raise InputError(
        f"Cells in memory are an AnnData or the path of one file, not {type(given).__name__}. For several files pass "
        "out= as well."
    )


def cell_codes(
    adata: AnnData, tokenizer: CellTokenizer, reading: Reading | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes uint8 [N, M] of the cells of a file, and `coverage_of` its genes."""
    cells, alignment, depth_N = cells_on_axis(adata, tokenizer, reading)
    return tokenizer.encode(cells.counts, alignment, depth_N), coverage_of(cells, alignment)


def codes_of_file(
    path: Path, tokenizer: CellTokenizer, reading: Reading | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """`cell_codes` of a file that is read part by part; to recover counts it must fit in memory."""
    reading = reading or Reading()
    if reading.recover:
        own = reading.of(path)
        with about(path):
            return cell_codes(read_cells(path, layer=own.layer), tokenizer, own)
    from rvqa.atlas.encoder import Encoder, Settings, default_threads, encode_tasks

    parts: list[np.ndarray] = []
    with scratch_folder() as scratch:
        encoder = Encoder([path], tokenizer, Settings(reading), device="cpu", scratch=scratch)
        encode_tasks(
            encoder, encoder.tasks(), lambda task, codes, table: parts.append(codes), threads=default_threads()
        )
    return np.concatenate(parts), encoder.coverage[0]


def cells_on_axis(
    adata: AnnData, tokenizer: CellTokenizer, reading: Reading | None = None
) -> tuple[Cells, GeneAlignment, np.ndarray]:
    """Counts of a file, how its genes meet the axis, and depth; of a transposed file, reject just that."""
    try:
        cells = read_counts(adata, reading)
        return cells, cells.alignment(tokenizer.axis), cells.depth(tokenizer.shares)
    except InputError:
        refuse_transposed(adata, tokenizer.axis)
        raise


def coverage_of(cells: Cells, alignment: GeneAlignment) -> dict[str, Any]:
    """How the genes of a file met those of a model, and where its counts were, for `uns`."""
    return alignment.report() | {"counts_from": cells.place}


def copy_of(adata: AnnData) -> AnnData:
    """Copy an AnnData; a backed one into memory."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def code_names(key_added: str) -> list[str]:
    """Names in `obsm` of codes and of quantized latents."""
    return [f"{key_added}_codes", f"X_{key_added}"]


def code_arrays(tokenizer: CellTokenizer, codes_NM: np.ndarray, key_added: str = "rvqa") -> dict[str, np.ndarray]:
    """Codes and quantized latents under the names that the contract says."""
    return dict(zip(code_names(key_added), (codes_NM, tokenizer.quantized_latent(codes_NM)), strict=True))
