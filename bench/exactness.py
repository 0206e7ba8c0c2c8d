"""Checks that codes are exact, on millions of natural and adversarial rows, by an independent judge.

python -m bench.exactness [--json] [--natural 10_000_000] [--adversarial 100_000]

The judge shares no code with the kernels. For every row and level it asks of each other codeword whether it is nearer
than the given one. Float64 scores with a bound on their error decide most pairs. Double-double sums, whose terms
(products of two float32) are exact in float64, decide most others, and `math.fsum`, which is exact, the rest.
"""

import math

import torch
from torch import Tensor

from bench import harness
from rvqa.kernels import ops
from tests.kernels.exact import FAMILIES

_BLOCK = 1 << 16


def wrong_rows(x_ND: Tensor, codebooks_MKD: Tensor, codes_NM: Tensor) -> int:
    """Count rows with a code that is not the exact argmin, lowest index on a tie, given the earlier codes."""
    wrong = 0
    for start in range(0, len(x_ND), _BLOCK):
        rows = slice(start, start + _BLOCK)
        wrong += int(_wrong(x_ND[rows].float(), codebooks_MKD, codes_NM[rows].long()).sum())
    return wrong


def wrong_rows_of_one_level(x_ND: Tensor, codebook_KD: Tensor, index_N: Tensor) -> int:
    """Count rows whose nearest codeword is another one, for codebooks of any size."""
    step = max(1, (1 << 24) // len(codebook_KD))
    parts = zip(x_ND.split(step), index_N.split(step), strict=True)
    return sum(int(_wrong(x_BD, codebook_KD[None], index_B[:, None]).sum()) for x_BD, index_B in parts)


def _wrong(x_ND: Tensor, codebooks_MKD: Tensor, codes_NM: Tensor) -> Tensor:
    N, D = x_ND.shape
    wrong_N = torch.zeros(N, dtype=torch.bool)
    r_ND, reach_N = x_ND.double(), x_ND.double().norm(dim=1)
    for m in range(codes_NM.shape[1]):
        c_KD, code_N = codebooks_MKD[m].double(), codes_NM[:, m]
        norm_K = c_KD.norm(dim=1)
        s_NK = (c_KD * c_KD).sum(1) - 2 * r_ND @ c_KD.T
        error_NK = (D + m + 8) * 2.0**-52 * norm_K * (norm_K + 2 * reach_N[:, None])
        at = code_N[:, None]
        gap_NK, doubt_NK = s_NK - s_NK.gather(1, at), error_NK + error_NK.gather(1, at)
        wrong_N |= (gap_NK < -doubt_NK).any(1)
        open_NK = gap_NK.abs() <= doubt_NK
        open_NK[torch.arange(N), code_N] = False
        row_P, k_P = open_NK.nonzero(as_tuple=True)
        for part in torch.arange(len(row_P)).split(200_000):
            row, k = row_P[part], k_P[part]
            sign = _sign(x_ND[row], codebooks_MKD, codes_NM[row, :m], m, k, code_N[row])
            wrong_N[row[(sign < 0) | ((sign == 0) & (k < code_N[row]))]] = True
        r_ND = r_ND - c_KD[code_N]
        reach_N = reach_N + norm_K[code_N]
    return wrong_N


def _sign(x_PD: Tensor, codebooks_MKD: Tensor, past_PM: Tensor, m: int, k_P: Tensor, a_P: Tensor) -> Tensor:
    """Return the exact sign of |r - c_k|^2 - |r - c_a|^2, r = x - sum of the codewords before level m."""
    ck, ca = codebooks_MKD[m, k_P].double(), codebooks_MKD[m, a_P].double()
    past = [codebooks_MKD[j, past_PM[:, j]].double() for j in range(m)]
    terms = [ck * ck, -ca * ca]
    for factor in (x_PD.double() * -2, *(2 * c for c in past)):
        terms += [factor * ck, -factor * ca]
    products = torch.stack(terms, 2).flatten(1)  # exact: 48 bits
    high, low = torch.zeros(len(products), dtype=torch.float64), torch.zeros(len(products), dtype=torch.float64)
    for term in products.T:  # double-double: two-sum, errors added up
        total = high + term
        part = total - high
        low = low + ((high - (total - part)) + (term - part))
        high = total
    value, size = high + low, products.abs().sum(1)
    sign = value.sign()
    same = (ck == ca).all(1)
    sign[same], value[same] = 0.0, math.inf  # decided
    # The sum of n errors, each below 2^-53 of a partial sum, is itself rounded n times.
    n = products.shape[1]
    for at in (value.abs() <= size * n * n * 2.0**-104).nonzero().flatten().tolist():
        exact = math.fsum(products[at].tolist())
        sign[at] = (exact > 0) - (exact < 0)
    return sign


def main() -> None:
    """Run the check."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--natural", type=int, default=10_000_000, help="rows over all natural cases")
    arguments.add_argument("--adversarial", type=int, default=100_000, help="rows of each adversarial family")
    arguments.add_argument("--ties", type=int, default=1_000, help="rows of each family where every pair is close")
    arguments.add_argument("--latents", nargs="*", default=[], help=".npy files of real latents, float32 [N, D]")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    checked: dict[str, list[int]] = {}

    def check(case: str, x_ND: Tensor, codebooks_MKD: Tensor) -> None:
        wrong = wrong_rows(x_ND, codebooks_MKD, ops.residual_quantize(x_ND, ops.prepare(codebooks_MKD)))
        before = checked.get(case, [0, 0])
        checked[case] = [before[0] + len(x_ND), before[1] + wrong]

    from bench.residual_quantize import fitted, problem

    widths = (32, 64, 128)
    for D in widths:
        part = options.natural // len(widths) + 1
        _, codebooks_MKD = problem(8192, D)
        generator, centres_CD = torch.Generator().manual_seed(1), torch.randn(20, D)
        for rows in torch.arange(part).split(1_000_000):
            x_ND = torch.randn(len(rows), D, generator=generator) * torch.linspace(2, 0.1, D)
            if int(rows[0]) % 2_000_000:  # every other million rows are in clusters
                x_ND = centres_CD[torch.randint(20, (len(rows),), generator=generator)] + x_ND / 4
            check(f"natural D={D}", x_ND, codebooks_MKD)
    for path in options.latents:
        import numpy as np

        latents_ND = torch.from_numpy(np.load(path)).float()
        check(f"real {path.rsplit('/')[-1]}", latents_ND, fitted(latents_ND, torch.Generator().manual_seed(0)))
    for name, make in FAMILIES.items():
        done, seed = 0, 0
        while done < (options.ties if name in ALL_CONTESTED else options.adversarial):
            x_ND, codebooks_MKD = make(4096, seed)
            check(name, x_ND, codebooks_MKD)
            done, seed = done + len(x_ND), seed + 1
    rows = [harness.Row(case, f"{n:,} rows", wrong, "wrong", 0.0, None) for case, (n, wrong) in checked.items()]
    figures = {
        "wrong_codes": float(sum(wrong for _, wrong in checked.values())),
        "rows_checked": float(sum(n for n, _ in checked.values())),
    }
    harness.report("exactness", rows, figures, as_json=options.json)


ALL_CONTESTED = ("permuted", "zero_codebooks", "grid", "scale_1e-38", "denormal", "absorbed", "origin")
"""Ties between all codewords, or scales at which float64 sums underflow: every pair goes to `math.fsum`."""


if __name__ == "__main__":
    main()
