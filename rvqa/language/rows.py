"""Rows of the embedding that cell tokens take, and how they start.

Legend: M levels, K entries of a codebook, D latent width, H hidden width, V rows of an embedding matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from rvqa.errors import InputError
from rvqa.language.vocabulary import CellVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_rows(model: PreTrainedModel, vocabulary: CellVocabulary) -> None:
    """Raise InputError unless the model's embedding and output matrices have a row for every cell token."""
    for name, matrix in _matrices(model).items():
        if matrix.shape[0] <= vocabulary.closer:
            raise InputError(
                f"The model's {name} matrix has {matrix.shape[0]} rows, but the cell tokens reach id "
                f"{vocabulary.closer}. Load the model saved with this tokenizer, or add rows with install_rows."
            )


def install_rows(
    model: PreTrainedModel,
    vocabulary: CellVocabulary,
    codebooks_MKD: torch.Tensor | npt.ArrayLike,
    *,
    seed: int,
    pad_to_multiple_of: int | None = None,
) -> None:
    """Give the cell tokens rows in a causal language model, in place; rows of other tokens keep their bits.

    A matrix that already has the rows keeps its size (Qwen3: 151,669 of 151,936 rows are used); a smaller one grows,
    and none ever shrinks. With the mean and the spread s (root mean square distance from the mean) of the rows before
    the opener, a code row is `mean + s * d` with d a sum of three parts along orthonormal directions (random ones where
    H < M + D + 2)::

        sqrt(0.6) * scale_m * (P @ (codeword - mean codeword of level m)) / r_m     what the code means
        sqrt(0.3) * direction of level m                                            which level it is
        sqrt(0.1) * random direction of the token                                   keeps any two rows apart

    r_m is the root mean square norm of the centred codewords and scale_m = max(sqrt(r_m / max r), 1/4): later levels
    stay smaller, but as a square root, since codewords shrink tenfold and rows would all but coincide. One P for all
    levels keeps directions of the latent comparable. All d are then scaled together to root mean square norm 1. A
    delimiter is `mean + s *` a direction of its own. An untied output matrix gets d with its own mean and spread.

    Parameters
    ----------
    model
        Causal language model with all parameters at hand (not partitioned).
    vocabulary
        Where the cell tokens lie; ids before `vocabulary.base` count as used.
    codebooks_MKD
        Codebooks of the cell tokenizer, floating point [levels, entries, D].
    seed
        Seed of the random directions; the global random state is left alone.
    pad_to_multiple_of
        Where the matrix must grow, round its number of rows up to a multiple of this.

    Raises InputError on codebooks of another shape or not finite, and on a model with fewer rows than tokens.
    """
    codebooks = torch.as_tensor(codebooks_MKD).detach().to("cpu", torch.float64)
    if codebooks.ndim != 3 or codebooks.shape[:2] != (vocabulary.levels, vocabulary.entries):
        raise InputError(
            f"Codebooks have shape {tuple(codebooks.shape)}; expected [{vocabulary.levels}, {vocabulary.entries}, "
            "latent width] as the vocabulary's. Use the cell tokenizer that the vocabulary was made for."
        )
    if not torch.isfinite(codebooks).all():
        raise InputError("Codebooks hold NaN or Inf; expected finite codewords. Fit the cell tokenizer again.")
    rows = [matrix.shape[0] for matrix in _matrices(model).values()]
    if min(rows) < vocabulary.base:
        raise InputError(
            f"The model has {min(rows)} embedding rows, but the tokenizer has {vocabulary.base} tokens before the cell "
            "tokens. Use the tokenizer that belongs to this model."
        )
    if min(rows) <= vocabulary.closer:
        model.resize_token_embeddings(max(vocabulary.closer + 1, *rows), pad_to_multiple_of, mean_resizing=False)
    require_rows(model, vocabulary)
    ours = slice(vocabulary.base, vocabulary.closer + 1)
    with torch.no_grad():
        for matrix in _matrices(model).values():
            directions = _directions(codebooks, matrix.shape[1], seed).to(matrix.device)
            mean, spread = _mean_and_spread(matrix[: vocabulary.base])
            matrix[ours] = (mean + spread * directions).to(matrix.dtype)
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            head.bias[ours] = head.bias[: vocabulary.base].mean()


def _matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the input embedding and, where it is another tensor, the output matrix: [V, H] each."""
    matrices: dict[str, Any] = {"embedding": model.get_input_embeddings().weight}
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices["embedding"]:
        matrices["output"] = head.weight
    return matrices


def _directions(codebooks_MKD: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Deviations of the new rows from the mean in units of the spread, float64 [M * K + 2, width], opener first."""
    M, K, D = codebooks_MKD.shape
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, D + M + 2, generator=generator, dtype=torch.float64)
    own = torch.nn.functional.normalize(torch.randn(M, K, width, generator=generator, dtype=torch.float64), dim=-1)
    basis = torch.linalg.qr(basis).Q if width >= D + M + 2 else torch.nn.functional.normalize(basis, dim=0)
    project_HD, level_HM, delimiter_H2 = basis.split([D, M, 2], dim=1)

    centred = codebooks_MKD - codebooks_MKD.mean(dim=1, keepdim=True)
    size_M11 = centred.square().sum(-1).mean(-1).sqrt()[:, None, None]
    scale_M11 = (size_M11 / size_M11.max().clamp_min(1e-300)).sqrt().clamp_min(0.25)
    meaning = scale_M11 * (centred / size_M11.clamp_min(1e-300)) @ project_HD.T
    rows = 0.6**0.5 * meaning + 0.3**0.5 * level_HM.T[:, None] + 0.1**0.5 * own
    rows = (rows / rows.square().sum(-1).mean().sqrt()).reshape(M * K, width)
    return torch.cat([delimiter_H2.T[:1], rows, delimiter_H2.T[1:]])


def _mean_and_spread(rows_VH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean row [H] and root mean square distance of rows from it, in float64, a few thousand rows at a time."""
    mean = sum(part.double().sum(0) for part in rows_VH.split(8192)) / rows_VH.shape[0]
    square = sum((part.double() - mean).square().sum() for part in rows_VH.split(8192)) / rows_VH.shape[0]
    return mean, square.sqrt()
