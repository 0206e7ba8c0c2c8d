"""The one door to the kernels: a few functions, each a `torch.library` operator `rvqa::...` behind a checked wrapper.

Anyone can call the operators, so they check all that they are given: what is known without reading a tensor (shapes,
dtypes) also where `torch.compile` asks for the shapes of a result, values (NaN, ranges) when they run. The wrappers see
to the types that torch has no words for. Backends get valid, contiguous input and are chosen by
`rvqa.kernels.registry`. No operator has a gradient. Shape letters: see `rvqa.kernels.reference`, which also defines
every result; all backends on a CPU return the same bits.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvqa.errors import InputError
from rvqa.kernels import checks, registry

MAX_LEVELS = 256
MAX_CODEWORDS = 256
"""Largest codebook of `residual_quantize`, whose codes are uint8."""

NO_CODE = 255
"""In every level of a row with NaN or infinity that `residual_quantize` marks."""

MAX_NEAREST = 65_536
"""Largest codebook of `nearest_codeword`."""

_LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int32, torch.int64)
_COUNT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.uint8, torch.uint16, torch.uint32)

_MOST_COLUMNS = 2**31 - 1
"""Of a matrix: vector instructions gather by 32 bits."""


class Tables(NamedTuple):
    """Codebooks made ready by `prepare`; pass it on as it is."""

    codebooks_MKD: Tensor
    """Codewords, float32 [M, K, D], contiguous and finite."""

    packed: Tensor
    """What the backend makes of them, uint8; of its own layout, empty where it needs nothing."""


def prepare(codebooks: Tensor) -> Tables:
    """Check codebooks and make them ready for `residual_quantize` and `decode`.

    Parameters
    ----------
    codebooks
        Codewords of every level, float32 [M, K, D] with 1 <= M <= 256 and 1 <= K <= 256, on the device of later calls.

    Returns
    -------
    Tables
        Independent of later changes to `codebooks`.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong type, dtype or shape, or values that are not finite.
    """
    checks.require_tensors(codebooks=codebooks)
    _require_codebooks(codebooks)
    if codebooks.is_meta:
        raise InputError("codebooks are on meta, which has no values; prepare them where the latents will be")
    own = codebooks.detach().clone(memory_format=torch.contiguous_format)
    checks.require_finite("codebooks", own.flatten(0, 1), "codeword (level * K + index)")
    return Tables(own, registry.dispatch("pack", own.device)(own))


def residual_quantize(
    x: Tensor, tables: Tables, levels: int | None = None, *, not_finite: Literal["raise", "mark"] = "raise"
) -> Tensor:
    """Codes of latents: at every level the exactly nearest codeword to what the earlier levels left over.

    Parameters
    ----------
    x
        Latents [N, D], float32, or bfloat16 / float16 taken as the float32 values they stand for. Any strides.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to encode; all M by default.
    not_finite
        What to do about rows with NaN or infinity: "raise", or "mark" them with 255 in every level, which `decode`
        refuses (K < 256 only).

    Returns
    -------
    torch.Tensor
        Codes, uint8 [N, levels]: the argmin in exact real arithmetic, the lowest index on a tie. A row's codes depend
        on that row and the codebooks alone, whatever the batch, backend or thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, `levels` outside 1..M, NaN or infinity (number of rows, first row), or
        "mark" where 255 is a code.

    Notes
    -----
    Greedy residual quantization (Chen, Guan & Wang, Sensors 2010), with certified arithmetic: docs/exactness.md.
    """
    _require_tables(tables)
    checks.require_tensors(x=x)
    if not isinstance(not_finite, str) or not_finite not in ("raise", "mark"):
        raise InputError("not_finite is neither 'raise' nor 'mark'; expected one of these")
    return torch.ops.rvqa.residual_quantize.default(x, *tables, _whole(levels), not_finite == "mark")


def residual_norms(x: Tensor, codes: Tensor, tables: Tables) -> Tensor:
    """What each level left over: |x - sum of the codewords so far|.

    Parameters
    ----------
    x
        Latents [N, D], as for `residual_quantize`.
    codes
        Their codes, uint8 [N, L] with 1 <= L <= M.
    tables
        Result of `prepare`.

    Returns
    -------
    torch.Tensor
        float32 [N, L]: residual and squares in float64, in increasing level and column, rounded once; NaN for a row
        that is not finite.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, or a code that is not below K.
    """
    _require_tables(tables)
    checks.require_tensors(x=x, codes=codes)
    return torch.ops.rvqa.residual_norms.default(x, codes, *tables)


def nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly nearest codeword of every row, and its squared distance.

    Parameters
    ----------
    x
        Rows [N, D], float32, bfloat16 or float16. Any strides.
    codebook
        Codewords, float32 [K, D], 1 <= K <= 65,536.

    Returns
    -------
    index : torch.Tensor
        int64 [N]: the argmin in exact real arithmetic, the lowest index on a tie.
    distance : torch.Tensor
        Squared Euclidean distance, float32 [N]; infinite above 3.4e38.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, or values that are not finite.
    """
    checks.require_tensors(x=x, codebook=codebook)
    return torch.ops.rvqa.nearest_codeword.default(x, codebook)


def decode(codes: Tensor, tables: Tables, levels: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """Latents of codes: the sum of the chosen codewords.

    Parameters
    ----------
    codes
        uint8 [N, L] with 1 <= L <= M, as `residual_quantize` gives them.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to add up; all L by default.
    out
        Contiguous float32 [N, D] to write to, in memory of its own. Fresh memory costs more than the sums: pass the
        same to every batch.

    Returns
    -------
    torch.Tensor
        `out` or a new one, float32 [N, D], added in float32 level by level, so the same bits everywhere.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, `levels` outside 1..L, or a code that is not below K (number and first).
    """
    _require_tables(tables)
    checks.require_tensors(codes=codes)
    levels = _whole(levels)
    if out is None:
        return torch.ops.rvqa.decode.default(codes, tables.codebooks_MKD, levels)
    checks.require_tensors(out=out)
    checks.require_writable("out", out)
    torch.ops.rvqa.decode_into.default(codes, tables.codebooks_MKD, levels, out)
    return out


def fold(tables: Tables, weight: Tensor, bias: Tensor) -> Tables:
    """Absorb a linear layer behind the latent into the codewords: `decode` then gives the layer's output.

    Parameters
    ----------
    tables
        Result of `prepare`.
    weight
        float32 [H, D], as `torch.nn.Linear` holds it.
    bias
        float32 [H]; goes into the first level.

    Returns
    -------
    Tables
        M x K rows of width H: sums of them are `latent @ weight.T + bias` up to the rounding of float32. For `decode`
        only.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype, shapes that do not fit, or sums that are not finite.
    """
    _require_tables(tables)
    checks.require_tensors(weight=weight, bias=bias)
    _require_codebooks(tables.codebooks_MKD)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        checks.require_dtype(name, tensor, (*_LATENT_DTYPES, torch.float64))
        checks.require_device(name, tensor, tables.codebooks_MKD)
    D = tables.codebooks_MKD.shape[2]
    if weight.ndim != 2 or weight.shape[1] != D or bias.shape != weight.shape[:1]:
        raise InputError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit as [H, {D}] and [H]")
    rows_MKH = tables.codebooks_MKD.double() @ weight.detach().double().T
    rows_MKH[0] += bias.detach().double()
    folded = rows_MKH.float()
    checks.require_finite("the folded codebooks", folded.flatten(0, 1), "codeword (level * K + index)")
    return Tables(folded, tables.packed.new_empty(0))


def csr_project(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    target_sum: float = 1e4,
    column_map: Tensor | None = None,
    library_size: Tensor | None = None,
) -> Tensor:
    """First encoder layer straight from sparse raw counts: log1p(counts * target_sum / library) @ weight + bias.

    Parameters
    ----------
    indptr
        Row pointers, int32 or int64 [N + 1], non-decreasing, into `indices` and `data`; need not start at 0, so a slice
        of the pointers of a larger matrix will do.
    indices
        Column of every stored entry, int32 or int64 [E], in any order; repeated columns are added up.
    data
        Raw counts, float32, float64, int32, uint8, uint16 or uint32 [E]; zero, or between 2^-149 and 2^53.
    weight
        float32 [G, H]. Standardisation of genes is folded into it.
    bias
        float32 [H].
    target_sum
        Counts a cell is scaled to.
    column_map
        int32 or int64, one entry per column of the counts: its row of `weight`, or -1 for a gene that counts only in
        the library size. Without it, columns are rows of `weight`.
    library_size
        Counts per cell [N], float32 or float64; by default the sum over **all** stored entries of a row, mapped or not.

    Returns
    -------
    torch.Tensor
        float32 [N, H]; `bias` for a row without counts. A row's bits depend on that row alone: not on the batch, the
        order of its entries, the index dtype, the backend (on a CPU) or the thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, pointers or columns out of range, counts that are negative or not finite,
        or a library size that is negative, not finite, or 0 in a row with counts.
    """
    checks.require_tensors(indptr=indptr, indices=indices, data=data, weight=weight, bias=bias)
    if column_map is not None:
        checks.require_tensors(column_map=column_map)
    if library_size is not None:
        checks.require_tensors(library_size=library_size)
    if not isinstance(target_sum, (float, int, np.floating, np.integer, torch.SymFloat)):
        raise InputError(f"target_sum is a {type(target_sum).__name__}; expected a number of counts, such as 1e4")
    _require_target(target_sum)
    return torch.ops.rvqa.csr_project.default(
        indptr, indices, data, weight, bias, float(target_sum), column_map, library_size
    )


def csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, *, columns: int, known: Tensor | None = None
) -> tuple[Tensor, int]:
    """Totals of sparse rows, and whether every entry is a raw count, in one look at each.

    Parameters
    ----------
    indptr, indices, data
        As for `csr_project`.
    columns
        Number of columns of the matrix.
    known
        bool [columns]: columns that count in the totals; all by default.

    Returns
    -------
    tuple
        Totals, float64 [N], exact; and how many entries are no raw counts: not whole, negative, not finite, above 2^24,
        or in a column outside the matrix. Where that is not 0 the totals are of no use.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, or row pointers out of range.
    """
    checks.require_tensors(indptr=indptr, indices=indices, data=data)
    if known is not None:
        checks.require_tensors(known=known)
    checks.require_whole("columns", columns, 0, 2**63 - 1)
    total_N, wrong = torch.ops.rvqa.csr_totals.default(indptr, indices, data, columns, known)
    if wrong.is_meta:
        raise InputError("indptr is on meta, which has no values; pass the matrix itself")
    return total_N, int(wrong)


def apply_span_mask_(logits: Tensor, states: Tensor, windows: Tensor) -> Tensor:
    """Set the logits of ids that a row may not write to -inf, in place.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16 [B, V], contiguous columns at any distance between rows.
    states
        int32 or int64 [B]: which window each row follows; -1 leaves the row as it is.
    windows
        int64 [S, 3], contiguous: lo, hi and inside. With inside 1 only ids in [lo, hi) stay, with 0 all others; an
        empty window has hi <= lo.

    Returns
    -------
    torch.Tensor
        The same `logits`. What stays keeps its bits.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype, shape or strides, logits that want a gradient, or on a CPU a state outside -1..S-1
        (number and first), before anything is written. Elsewhere values are not looked at, so that nothing waits for
        the device: a row with such a state stays as it is.
    """
    checks.require_tensors(logits=logits, states=states, windows=windows)
    checks.require_writable("logits", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        raise InputError("logits want a gradient, which this has not; use rvqa.grammar.apply_mask_")
    torch.ops.rvqa.apply_span_mask_.default(logits, states, windows)
    return logits


# ---- operators: valid shapes and dtypes in, values checked here or by the backend ------------------------------------

_library = torch.library.Library("rvqa", "DEF")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as operator `rvqa::name` for every device, with the shapes of its result."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rvqa::{name}", fake, lib=_library)
        return run

    return register


def _fake_codes(x: Tensor, codebooks: Tensor, packed: Tensor, levels: int | None, mark: bool) -> Tensor:  # noqa: FBT001
    _check_tables(x, codebooks, packed)
    return x.new_empty((x.shape[0], _level_count(levels, codebooks.shape[0])), dtype=torch.uint8)


@_operator(
    "residual_quantize(Tensor x, Tensor codebooks, Tensor packed, int? levels, bool mark) -> Tensor", _fake_codes
)
def _residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    packed: Tensor,
    levels: int | None,
    mark: bool,  # noqa: FBT001
) -> Tensor:
    M, K, _ = _check_tables(x, codebooks, packed)
    levels = _level_count(levels, M)
    if mark and K > NO_CODE:
        raise InputError(f"not_finite is 'mark' with K={K}; expected 'raise', or K of at most 255")
    run = registry.dispatch("residual_quantize", x.device)
    codes_NM, wrong, first = run(_rows(x), Tables(codebooks, packed), levels)
    if wrong and not mark:
        raise InputError(f"x has NaN or infinity in {wrong} of {len(x)} rows, first in row {first}")
    return codes_NM


def _fake_nearest(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    _check_nearest(x, codebook)
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


@_operator("nearest_codeword(Tensor x, Tensor codebook) -> (Tensor, Tensor)", _fake_nearest)
def _nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    _check_nearest(x, codebook)
    checks.require_finite("codebook", codebook, "codeword")
    run = registry.dispatch("nearest_codeword", x.device)
    index_N, distance_N, wrong, first = run(_rows(x), _plain(codebook))
    if wrong:
        raise InputError(f"x has NaN or infinity in {wrong} of {len(x)} rows, first in row {first}")
    return index_N, distance_N


def _fake_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> Tensor:
    _check_norms(x, codes, codebooks, packed)
    return x.new_empty(codes.shape, dtype=torch.float32)


@_operator("residual_norms(Tensor x, Tensor codes, Tensor codebooks, Tensor packed) -> Tensor", _fake_norms)
def _residual_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> Tensor:
    _check_norms(x, codes, codebooks, packed)
    checks.require_codes(codes, codebooks.shape[1])
    return registry.dispatch("residual_norms", x.device)(_rows(x), codes.contiguous(), Tables(codebooks, packed))


def _fake_latents(codes: Tensor, codebooks: Tensor, levels: int | None) -> Tensor:
    _check_codes(codes, codebooks, levels)
    return codebooks.new_empty((codes.shape[0], codebooks.shape[2]))


@_operator("decode(Tensor codes, Tensor codebooks, int? levels) -> Tensor", _fake_latents)
def _decode(codes: Tensor, codebooks: Tensor, levels: int | None) -> Tensor:
    return _run_decode(codes, codebooks, levels, None)


def _fake_nothing(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor) -> None:
    _check_codes(codes, codebooks, levels)
    _check_out(codes, codebooks, out)


@_operator("decode_into(Tensor codes, Tensor codebooks, int? levels, Tensor(a!) out) -> ()", _fake_nothing)
def _decode_into(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor) -> None:
    _run_decode(codes, codebooks, levels, out)


def _run_decode(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor | None) -> Tensor:
    levels = _check_codes(codes, codebooks, levels)
    codes = _rows(codes if levels == codes.shape[1] else codes[:, :levels])
    if out is not None:
        _check_out(codes, codebooks, out)
    return registry.dispatch("decode", codes.device)(codes, _plain(codebooks), levels, out)


def _fake_hidden(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> Tensor:
    _check_projection(indptr, indices, data, weight, bias, target_sum, column_map, library_size)
    return weight.new_empty((indptr.shape[0] - 1, weight.shape[1]))


@_operator(
    "csr_project(Tensor indptr, Tensor indices, Tensor data, Tensor weight, Tensor bias, float target_sum, "
    "Tensor? column_map, Tensor? library_size) -> Tensor",
    _fake_hidden,
)
def _csr_project(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> Tensor:
    _check_projection(indptr, indices, data, weight, bias, target_sum, column_map, library_size)
    indptr, indices, data, weight, bias = map(_plain, (indptr.long(), indices, data, weight, bias))
    if column_map is not None:
        if column_map.dtype == torch.int64:
            checks.require_range("column_map", column_map, -1, len(weight) - 1, "rows of weight, or -1")
        column_map = column_map.int().contiguous()
    if library_size is not None:
        library_size = library_size.double().contiguous()
    arguments = (indptr, indices, data, weight, bias, target_sum, column_map, library_size)
    return registry.dispatch("csr_project", weight.device)(*arguments)


def _fake_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_totals(indptr, indices, data, columns, known)
    return indptr.new_empty(indptr.shape[0] - 1, dtype=torch.float64), indptr.new_empty((), dtype=torch.int64)


@_operator(
    "csr_totals(Tensor indptr, Tensor indices, Tensor data, int columns, Tensor? known) -> (Tensor, Tensor)",
    _fake_totals,
)
def _csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_totals(indptr, indices, data, columns, known)
    run = registry.dispatch("csr_totals", data.device)
    known_C = None if known is None else known.contiguous()
    total_N, wrong = run(*map(_plain, (indptr.long(), indices, data)), columns, known_C)
    if wrong < 0:
        raise InputError("indptr decreases, leaves the entries or has a row of 2^31; it is not of this matrix")
    return total_N, torch.tensor(wrong, dtype=torch.int64, device=indptr.device)


def _fake_masked(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    _check_mask(logits, states, windows)


@_operator("apply_span_mask_(Tensor(a!) logits, Tensor states, Tensor windows) -> ()", _fake_masked)
def _apply_span_mask_(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    _check_mask(logits, states, windows)
    if not logits.is_inference():  # so that autograd knows, should it have kept them
        torch.autograd.graph.increment_version(logits)
    registry.dispatch("apply_span_mask_", logits.device)(logits, states.contiguous(), windows)


def _rows(x: Tensor) -> Tensor:
    """Rows with contiguous columns, at any distance from each other."""
    if x.requires_grad:
        x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _plain(x: Tensor) -> Tensor:
    """Contiguous, without a gradient; torch is called only where it changes something: each call takes 0.5 us."""
    if x.requires_grad:
        x = x.detach()
    return x if x.is_contiguous() else x.contiguous()


# ---- what is known without reading a tensor --------------------------------------------------------------------------


def _require_tables(tables: object) -> None:
    if not isinstance(tables, Tables):
        raise InputError(f"tables is a {type(tables).__name__}; expected what rvqa.kernels.ops.prepare returns")
    codebooks_MKD, packed = tables
    checks.require_tensors(codebooks=codebooks_MKD, packed=packed)


def _require_target(target_sum: float) -> None:
    if not 0 < target_sum <= checks.MAX_COUNT:
        raise InputError(f"target_sum is {checks.said(target_sum)}; expected a number of counts above 0, such as 1e4")


def _require_codebooks(codebooks: Tensor, narrowest: int = 1) -> tuple[int, int, int]:
    checks.require_dtype("codebooks", codebooks, (torch.float32,))
    if codebooks.ndim != 3:
        raise InputError(f"codebooks have shape {tuple(codebooks.shape)}; expected three axes [M, K, D]")
    M, K, D = codebooks.shape
    if not (1 <= M <= MAX_LEVELS and 1 <= K <= MAX_CODEWORDS and narrowest <= D):
        raise InputError(
            f"codebooks have shape [M={M}, K={K}, D={D}]; expected 1 <= M <= {MAX_LEVELS} levels, "
            f"1 <= K <= {MAX_CODEWORDS} codewords and D >= {narrowest}"
        )
    return M, K, D


def _require_latents(x: Tensor, codebook: Tensor, D: int) -> None:
    checks.require_dtype("x", x, _LATENT_DTYPES)
    checks.require_width("x", x, D)
    checks.require_device("x", x, codebook)


def _check_tables(x: Tensor, codebooks: Tensor, packed: Tensor) -> tuple[int, int, int]:
    M, K, D = _require_codebooks(codebooks)
    _require_latents(x, codebooks, D)
    checks.require_dtype("packed", packed, (torch.uint8,))
    checks.require_device("packed", packed, codebooks)
    if packed.ndim != 1 or not packed.is_contiguous():
        raise InputError("packed is not what rvqa.kernels.ops.prepare made; prepare the codebooks again")
    return M, K, D


def _check_codes(codes: Tensor, codebooks: Tensor, levels: int | None = None) -> int:
    """Number of levels that are asked for."""
    M, _, _ = _require_codebooks(codebooks, 0)
    checks.require_dtype("codes", codes, (torch.uint8,))
    sizes = codes.shape
    if len(sizes) != 2 or not 1 <= sizes[1] <= M:
        raise InputError(f"codes have shape {tuple(sizes)}; expected [N, levels] with 1 to {M} levels")
    checks.require_device("codes", codes, codebooks)
    return _level_count(levels, sizes[1])


def _check_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> None:
    _check_tables(x, codebooks, packed)
    _check_codes(codes, codebooks)
    if codes.shape[0] != x.shape[0]:
        raise InputError(f"codes have {codes.shape[0]} rows, x has {x.shape[0]}")


def _check_out(codes: Tensor, codebooks: Tensor, out: Tensor) -> None:
    checks.require_dtype("out", out, (torch.float32,))
    checks.require_device("out", out, codes)
    if out.shape != (codes.shape[0], codebooks.shape[2]) or not out.is_contiguous():
        raise InputError(f"out has shape {tuple(out.shape)}; expected contiguous [N, D] for these codes and tables")


def _check_nearest(x: Tensor, codebook: Tensor) -> None:
    checks.require_dtype("codebook", codebook, (torch.float32,))
    if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= MAX_NEAREST or codebook.shape[1] < 1:
        raise InputError(f"codebook has shape {tuple(codebook.shape)}; expected [K, D] with 1 <= K <= {MAX_NEAREST:,}")
    _require_latents(x, codebook, codebook.shape[1])


def _check_rows(indptr: Tensor, indices: Tensor, data: Tensor) -> None:
    checks.require_dtype("indptr", indptr, _INDEX_DTYPES)
    checks.require_dtype("indices", indices, _INDEX_DTYPES)
    checks.require_dtype("data", data, _COUNT_DTYPES)
    if indptr.ndim != 1 or indptr.shape[0] < 1 or indices.ndim != 1 or indices.shape != data.shape:
        raise InputError(
            f"indptr {tuple(indptr.shape)}, indices {tuple(indices.shape)}, data {tuple(data.shape)} are not the parts "
            "of one CSR matrix; expected [N + 1], [E] and [E]"
        )
    checks.require_device("indices", indices, indptr)
    checks.require_device("data", data, indptr)


def _check_projection(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> None:
    _check_rows(indptr, indices, data)
    checks.require_dtype("weight", weight, (torch.float32,))
    checks.require_dtype("bias", bias, (torch.float32,))
    if weight.ndim != 2 or bias.ndim != 1 or bias.shape[0] != weight.shape[1]:
        raise InputError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit as [G, H] and [H]")
    if weight.shape[0] > checks.MAX_GENES:
        raise InputError(f"weight has {weight.shape[0]:,} rows; expected at most {checks.MAX_GENES:,}")
    checks.require_device("indptr", indptr, weight)
    checks.require_device("bias", bias, weight)
    if column_map is not None:
        checks.require_dtype("column_map", column_map, _INDEX_DTYPES)
        checks.require_device("column_map", column_map, weight)
        if column_map.ndim != 1 or column_map.shape[0] > _MOST_COLUMNS:
            raise InputError(f"column_map has shape {tuple(column_map.shape)}; expected one axis of at most 2^31 - 1")
    if library_size is not None:
        checks.require_dtype("library_size", library_size, (torch.float32, torch.float64))
        checks.require_device("library_size", library_size, weight)
        if library_size.ndim != 1 or library_size.shape[0] != indptr.shape[0] - 1:
            raise InputError(
                f"library_size of shape {tuple(library_size.shape)} has {library_size.numel()} entries for "
                f"{indptr.shape[0] - 1} rows; expected one axis with one for each"
            )
    _require_target(target_sum)


def _check_totals(indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known: Tensor | None) -> None:
    _check_rows(indptr, indices, data)
    if columns < 0:
        raise InputError(f"columns is {columns}; expected how many the matrix has")
    if known is not None:
        checks.require_dtype("known", known, (torch.bool,))
        checks.require_device("known", known, indptr)
        if known.shape != (columns,):
            raise InputError(f"known has shape {tuple(known.shape)} for {columns} columns; expected one entry for each")


def _check_mask(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    checks.require_dtype("logits", logits, _LATENT_DTYPES)
    checks.require_dtype("states", states, _INDEX_DTYPES)
    checks.require_dtype("windows", windows, (torch.int64,))
    sizes, table = logits.shape, windows.shape
    if len(sizes) != 2 or states.shape != sizes[:1] or len(table) != 2 or table[1] != 3:
        raise InputError(
            f"logits {tuple(sizes)}, states {tuple(states.shape)} and windows {tuple(table)} do not fit as [B, V], [B] "
            "and [S, 3]"
        )
    (B, V), (row, column) = sizes, logits.stride()
    if (B > 1 and row < V) or (V > 1 and column != 1) or not windows.is_contiguous():
        raise InputError(
            f"logits {tuple(sizes)} have strides {logits.stride()}, windows {windows.stride()}; expected contiguous "
            "columns in rows that do not overlap, and contiguous windows"
        )
    device = logits.device
    if states.device != device or windows.device != device:
        raise InputError(
            f"logits are on {device}, states on {states.device}, windows on {windows.device}; expected one"
        )


def _whole(levels: int | None) -> int | None:
    if levels is not None:
        checks.require_whole("levels", levels, 1, MAX_LEVELS)
    return levels


def _level_count(levels: int | None, available: int) -> int:
    if levels is None:
        return available
    if not 1 <= levels <= available:
        raise InputError(f"levels is {levels}; expected 1 to {available}")
    return levels
