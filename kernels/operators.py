"""The kernels as `torch.library` operators `rvqa::...`: each checks its arguments, then runs a backend.

Values are checked when an operator runs; shapes and types also when `torch.compile` asks for the shapes of a result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvqa.errors import InputError
from rvqa.kernels import checks, registry, shapes
from rvqa.kernels.shapes import NO_CODE, Tables

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
    shapes.check_tables(x, codebooks, packed)
    return x.new_empty((x.shape[0], shapes.level_count(levels, codebooks.shape[0])), dtype=torch.uint8)


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
    M, K, _ = shapes.check_tables(x, codebooks, packed)
    levels = shapes.level_count(levels, M)
    if mark and K > NO_CODE:
        raise InputError(f"not_finite is 'mark' with K={K}; expected 'raise', or K of at most 255")
    run = registry.dispatch("residual_quantize", x.device)
    codes_NM, wrong, first = run(_rows(x), Tables(codebooks, packed), levels)
    if wrong and not mark:
        raise InputError(f"x has NaN or infinity in {wrong} of {len(x)} rows, first in row {first}")
    return codes_NM


def _fake_nearest(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    shapes.check_nearest(x, codebook)
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


@_operator("nearest_codeword(Tensor x, Tensor codebook) -> (Tensor, Tensor)", _fake_nearest)
def _nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    shapes.check_nearest(x, codebook)
    checks.require_finite("codebook", codebook, "codeword")
    run = registry.dispatch("nearest_codeword", x.device)
    index_N, distance_N, wrong, first = run(_rows(x), _plain(codebook))
    if wrong:
        raise InputError(f"x has NaN or infinity in {wrong} of {len(x)} rows, first in row {first}")
    return index_N, distance_N


def _fake_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> Tensor:
    shapes.check_norms(x, codes, codebooks, packed)
    return x.new_empty(codes.shape, dtype=torch.float32)


@_operator("residual_norms(Tensor x, Tensor codes, Tensor codebooks, Tensor packed) -> Tensor", _fake_norms)
def _residual_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> Tensor:
    shapes.check_norms(x, codes, codebooks, packed)
    checks.require_codes(codes, codebooks.shape[1])
    return registry.dispatch("residual_norms", x.device)(_rows(x), codes.contiguous(), Tables(codebooks, packed))


def _fake_latents(codes: Tensor, codebooks: Tensor, levels: int | None) -> Tensor:
    shapes.check_codes(codes, codebooks, levels)
    return codebooks.new_empty((codes.shape[0], codebooks.shape[2]))


@_operator("decode(Tensor codes, Tensor codebooks, int? levels) -> Tensor", _fake_latents)
def _decode(codes: Tensor, codebooks: Tensor, levels: int | None) -> Tensor:
    return _run_decode(codes, codebooks, levels, None)


def _fake_nothing(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor) -> None:
    shapes.check_codes(codes, codebooks, levels)
    shapes.check_out(codes, codebooks, out)


@_operator("decode_into(Tensor codes, Tensor codebooks, int? levels, Tensor(a!) out) -> ()", _fake_nothing)
def _decode_into(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor) -> None:
    _run_decode(codes, codebooks, levels, out)


def _run_decode(codes: Tensor, codebooks: Tensor, levels: int | None, out: Tensor | None) -> Tensor:
    levels = shapes.check_codes(codes, codebooks, levels)
    codes = _rows(codes if levels == codes.shape[1] else codes[:, :levels])
    if out is not None:
        shapes.check_out(codes, codebooks, out)
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
    shapes.check_projection(indptr, indices, data, weight, bias, target_sum, column_map, library_size)
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
    shapes.check_projection(indptr, indices, data, weight, bias, target_sum, column_map, library_size)
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
    shapes.check_totals(indptr, indices, data, columns, known)
    return indptr.new_empty(indptr.shape[0] - 1, dtype=torch.float64), indptr.new_empty((), dtype=torch.int64)


@_operator(
    "csr_totals(Tensor indptr, Tensor indices, Tensor data, int columns, Tensor? known) -> (Tensor, Tensor)",
    _fake_totals,
)
def _csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    shapes.check_totals(indptr, indices, data, columns, known)
    run = registry.dispatch("csr_totals", data.device)
    known_C = None if known is None else known.contiguous()
    total_N, wrong = run(*map(_plain, (indptr.long(), indices, data)), columns, known_C)
    if wrong < 0:
        raise InputError("indptr decreases, leaves the entries or has a row of 2^31; it is not of this matrix")
    return total_N, torch.tensor(wrong, dtype=torch.int64, device=indptr.device)


def _fake_masked(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    shapes.check_mask(logits, states, windows)


@_operator("apply_span_mask_(Tensor(a!) logits, Tensor states, Tensor windows) -> ()", _fake_masked)
def _apply_span_mask_(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    shapes.check_mask(logits, states, windows)
    if not logits.is_inference():  # so that autograd notices the change if it has saved them
        torch.autograd.graph.increment_version(logits)
    registry.dispatch("apply_span_mask_", logits.device)(logits, states.contiguous(), windows)


def _rows(x: Tensor) -> Tensor:
    """Return rows with contiguous columns; the distance between rows may be any."""
    if x.requires_grad:
        x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _plain(x: Tensor) -> Tensor:
    """Return a contiguous tensor without a gradient; torch is called only if needed, as each call takes 0.5 us."""
    if x.requires_grad:
        x = x.detach()
    return x if x.is_contiguous() else x.contiguous()
