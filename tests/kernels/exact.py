"""Exact codes by brute force in integers, and rows that mislead inexact methods. It shares no code with the kernels."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Case = tuple[Tensor, Tensor]


def to_integers(values: Tensor) -> np.ndarray:
    """Return float32 values as Python integers in units of 2^-149, of which every float32 is a whole number."""
    scaled = values.double().numpy() * 2.0**149
    return np.array([int(v) for v in scaled.ravel().tolist()], dtype=object).reshape(scaled.shape)


def exact_codes(x_ND: Tensor, codebooks_MKD: Tensor) -> Tensor:
    """Return greedy codes int64 [N, M]: at each level the codeword nearest to the residual, lowest index on a tie."""
    residual_ND, codebooks = to_integers(x_ND), to_integers(codebooks_MKD)
    codes_NM = torch.empty(len(x_ND), len(codebooks_MKD), dtype=torch.int64)
    for n, r_D in enumerate(residual_ND):
        for m, c_KD in enumerate(codebooks):
            gap_KD = r_D - c_KD
            distances = (gap_KD * gap_KD).sum(1).tolist()
            code = distances.index(min(distances))
            codes_NM[n, m] = code
            r_D = r_D - c_KD[code]
    return codes_NM


def fused(a: np.float32, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Float32(a * b + c), rounded once: by float64, or by fractions if that is half way between two float32."""
    rounded = np.float64(a) * b.astype(np.float64) + c.astype(np.float64)
    out = rounded.astype(np.float32)
    beyond = np.nextafter(out, np.where(rounded > out, np.inf, -np.inf).astype(np.float32))
    halfway = (rounded != out) & (rounded == (out.astype(np.float64) + beyond) / 2)
    for i in np.flatnonzero(halfway):
        true, stop = Fraction(float(a)) * Fraction(float(b[i])) + Fraction(float(c[i])), Fraction(float(rounded[i]))
        if true != stop:
            pair = sorted([out[i], beyond[i]])
            out[i] = pair[1] if true > stop else pair[0]
    return out


def natural(N: int, M: int, K: int, D: int, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    scale_M = 0.6 ** torch.arange(M, dtype=torch.float32)
    return torch.randn(N, D, generator=g), torch.randn(M, K, D, generator=g) * scale_M[:, None, None]


def nudge(values: Tensor, ulps: Tensor) -> Tensor:
    """Move float32 values by whole ulps (away from zero for positive counts)."""
    return (values.contiguous().view(torch.int32) + ulps.to(torch.int32)).view(torch.float32)


def midpoints(N: int = 60, seed: int = 0) -> Case:
    """Rows half-way between two codewords, within 3 ulp in every coordinate."""
    g = torch.Generator().manual_seed(1 + 100 * seed)
    _, c_MKD = natural(0, 2, 32, 64, seed=2 + 100 * seed)
    pair = torch.randint(0, 32, (N, 2), generator=g)
    x_ND = (c_MKD[0][pair[:, 0]] + c_MKD[0][pair[:, 1]]) / 2
    return nudge(x_ND, torch.randint(-3, 4, x_ND.shape, generator=g)), c_MKD


def permuted(N: int = 12, seed: int = 0) -> Case:
    """Codewords that are permutations of one another, constant rows: 32-way exact ties at the first level."""
    g = torch.Generator().manual_seed(3 + 100 * seed)
    value_D = torch.randn(24, generator=g)
    c_KD = torch.stack([value_D[torch.randperm(24, generator=g)] for _ in range(32)])
    x_ND = torch.randn(N, 1, generator=g).expand(N, 24)
    return x_ND, torch.stack([c_KD, c_KD.flip(0) / 2, torch.zeros_like(c_KD)])


def duplicates(N: int = 40, seed: int = 0) -> Case:
    """Every codeword twice; the second has zeros as -0."""
    x_ND, c_MKD = natural(N, 3, 32, 33, seed=4 + 100 * seed)
    c_MKD[:, :, ::5] = 0
    c_MKD[:, 16:] = c_MKD[:, :16]
    c_MKD[:, 16:, ::5] = -0.0
    return x_ND, c_MKD


def twins(N: int = 40, seed: int = 0) -> Case:
    """Codewords in pairs that differ by one ulp in one coordinate; the nearer one may be second."""
    x_ND, c_MKD = natural(N, 3, 32, 33, seed=5 + 100 * seed)
    c_MKD[:, 1::2] = c_MKD[:, ::2]
    c_MKD[:, 1::2, 7] = nudge(c_MKD[:, ::2, 7], torch.tensor(1))
    return x_ND, c_MKD


def origin(N: int = 3, seed: int = 0) -> Case:
    """x = 0 with codewords in pairs +c, -c."""
    _, c_MKD = natural(0, 3, 32, 33, seed=6 + 100 * seed)
    c_MKD[:, 1::2] = -c_MKD[:, ::2]
    return torch.zeros(N, 33), c_MKD


def grid(N: int = 200, seed: int = 0) -> Case:
    """Small whole numbers: exact ties everywhere, at every level."""
    g = torch.Generator().manual_seed(7 + 100 * seed)
    return torch.randint(-3, 4, (N, 5), generator=g).float(), torch.randint(-2, 3, (4, 20, 5), generator=g).float()


def log_uniform(N: int = 20, seed: int = 0) -> Case:
    """Coordinates of all magnitudes and signs."""
    g = torch.Generator().manual_seed(8 + 100 * seed)

    def draw(*shape: int) -> Tensor:
        sign = torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0
        return sign * 10 ** (torch.rand(shape, generator=g) * 60 - 35)

    return draw(N, 16), draw(3, 16, 16)


def scaled(x_scale: float, c_scale: float) -> Callable[..., Case]:
    def make(N: int = 20, seed: int = 0) -> Case:
        x_ND, c_MKD = midpoints(max(N, 60), seed)
        return x_ND[:N, :16] * x_scale, c_MKD[:, :16, :16] * c_scale

    return make


def denormal(N: int = 30, seed: int = 0) -> Case:
    """Rows and codewords of a few of the smallest float32 values."""
    g = torch.Generator().manual_seed(9 + 100 * seed)
    tiny = 2.0**-149
    return torch.randint(-40, 41, (N, 8), generator=g) * tiny, torch.randint(-20, 21, (3, 16, 8), generator=g) * tiny


def huge(N: int = 20, seed: int = 0) -> Case:
    """Near the largest float32, where float32 scores and residuals overflow."""
    g = torch.Generator().manual_seed(10 + 100 * seed)
    largest = torch.finfo(torch.float32).max
    return (torch.rand(N, 8, generator=g) * 2 - 1) * largest, (torch.rand(3, 16, 8, generator=g) * 2 - 1) * largest


def absorbed(N: int = 10, seed: int = 0) -> Case:
    """Rows so much longer than the codewords that float64 residuals lose them."""
    x_ND, c_MKD = natural(N, 2, 16, 16, seed=11 + 100 * seed)
    return torch.full_like(x_ND, 2.0**70), torch.cat([c_MKD, c_MKD.roll(1, dims=2)])


def long_twins(N: int = 60, seed: int = 0) -> Case:
    """Codewords an ulp apart in every coordinate and long rows: float32 products lose the difference."""
    x_ND, c_MKD = natural(N, 2, 1, 64, seed=12 + 100 * seed)
    ulps = torch.randint(-1, 2, (2, 16, 64), generator=torch.Generator().manual_seed(12 + 100 * seed))
    return x_ND * 300, nudge(c_MKD.expand(2, 16, 64), ulps)


def norm_twins(N: int = 700, seed: int = 0) -> Case:
    """Squared norms within a few roundings of 16, where float32 spacing doubles, and rows short enough to show it."""
    g = torch.Generator().manual_seed(13 + 100 * seed)
    value_D = torch.randn(16, generator=g)
    value_D *= 4 / value_D.norm()
    c_KD = torch.stack([value_D[torch.randperm(16, generator=g)] for _ in range(128)])
    c_KD = nudge(c_KD, torch.randint(-1, 2, (128, 16), generator=g))
    return torch.randn(N, 16, generator=g) * 2.0**-20, c_KD[None]


def cancellation(N: int = 30, seed: int = 0) -> Case:
    """Two levels leave nothing but the rounding errors of the float32 residual; the third must still see them."""
    x_ND, c_MKD = natural(30, 3, 30, 16, seed=14 + 100 * seed)
    c_MKD[0] *= 3
    code_N = exact_codes(x_ND, c_MKD[:1])[:, 0]
    c_MKD[1] = x_ND - c_MKD[0][code_N]
    c_MKD[2] *= 2.0**-24
    return x_ND[:N], c_MKD


def partial_overflow(N: int = 1, seed: int = 0) -> Case:
    """A float32 dot product that overflows on the way to a winning score."""
    winner_D = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]) * 2.0**29
    return torch.full((N, 6), 2.0**97), torch.stack([torch.zeros(6), winner_D])[None]


FAMILIES: dict[str, Callable[..., Case]] = {
    "midpoints": midpoints,
    "permuted": permuted,
    "duplicates": duplicates,
    "twins": twins,
    "origin": origin,
    "grid": grid,
    "log_uniform": log_uniform,
    "denormal": denormal,
    "huge": huge,
    "absorbed": absorbed,
    "long_twins": long_twins,
    "norm_twins": norm_twins,
    "cancellation": cancellation,
    "partial_overflow": partial_overflow,
    "zero_codebooks": lambda N=5, seed=0: (natural(N, 1, 1, 8, seed)[0], torch.zeros(3, 32, 8)),
    **{f"scale_{scale:g}": scaled(scale, scale) for scale in (1e-38, 1e-30, 1e-22, 1e-20, 1e20, 1e30, 1e36)},
    "long_rows": scaled(1e36, 1.0),
    "long_codewords": scaled(1.0, 1e30),
}
