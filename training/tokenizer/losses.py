"""Loss of a cell's counts, given what was decoded for it: three likelihoods on one scale.

Each is a negative log likelihood in nats, minus its least value under a Poisson (the saturated term, which depends on
no parameter). It is summed over the measured genes of a cell. The run multiplies all by the same factor:

poisson             mean - c log(mean), minus the same at mean = c
negative_binomial   variance mean + a mean^2 with a learned a for every gene; equals poisson as a goes to 0
mse                 of a Gaussian of variance 1: half the squared error of log1p(counts per 10,000) / scale of the gene

So the weights of labels and commitment mean much the same with each likelihood. Shapes: B cells, G genes.
"""

import torch
from torch import Tensor, nn

from rvqa.data.depth import TARGET_SUM

_LOG_DISPERSION = (-10.0, 5.0)
"""Range of the negative binomial's log dispersion; below the range it is a Poisson in float32."""


class Reconstruction(nn.Module):
    """Loss of decoded cells; it holds the parameters that a likelihood learns itself.

    Parameters
    ----------
    likelihood
        One of `rvqa.training.tokenizer.settings.LIKELIHOODS`.
    gene_scale_G
        Scale of log1p counts per 10,000, float32 [G].
    """

    def __init__(self, likelihood: str, gene_scale_G: Tensor) -> None:
        super().__init__()
        self.gene_scale_G = gene_scale_G  # a plain attribute, because the tokenizer saves it
        self._loss = {"poisson": self._poisson, "negative_binomial": self._negative_binomial, "mse": self._mse}[
            likelihood
        ]
        if likelihood == "negative_binomial":
            self.log_dispersion_G = nn.Parameter(torch.full_like(gene_scale_G, -2.0))

    def forward(self, counts_BG: Tensor, library_B: Tensor, log_share_BG: Tensor, measured_BG: Tensor) -> Tensor:
        """Return the loss of every cell, float32 [B].

        Parameters
        ----------
        counts_BG
            Whole numbers, float32 [B, G].
        library_B
            Total counts, float32 [B].
        log_share_BG
            Decoded log of each gene's share, float32 [B, G].
        measured_BG
            Measured genes, bool [B, G]; other genes add nothing to the loss.
        """
        return (self._loss(counts_BG, library_B[:, None], log_share_BG) * measured_BG).sum(1)

    def _poisson(self, counts_BG: Tensor, library_B1: Tensor, log_share_BG: Tensor) -> Tensor:
        mean_BG = library_B1 * log_share_BG.exp()
        return mean_BG - torch.xlogy(counts_BG, mean_BG) + _saturated(counts_BG)

    def _negative_binomial(self, counts_BG: Tensor, library_B1: Tensor, log_share_BG: Tensor) -> Tensor:
        """With a = 1/t: lgamma(t) - lgamma(c + t) - c log a + (c + t) log1p(a mean) - c log(mean)."""
        log_a_G = self.log_dispersion_G.clamp(*_LOG_DISPERSION)
        log_mean_BG = library_B1.log() + log_share_BG
        growth_BG = torch.log1p((log_a_G + log_mean_BG).exp())
        loss_BG = (counts_BG + (-log_a_G).exp()) * growth_BG - counts_BG * log_mean_BG + _saturated(counts_BG)
        # The gamma functions cancel to 0 where c = 0, and nearly where a is small: float64 keeps what is left at c > 0.
        cells, genes = counts_BG.nonzero(as_tuple=True)
        c, log_a = counts_BG[cells, genes].double(), log_a_G[genes].double()
        t = (-log_a).exp()
        rising = torch.lgamma(c + t) - torch.lgamma(t) + c * log_a
        return loss_BG.index_put((cells, genes), -rising.float(), accumulate=True)

    def _mse(self, counts_BG: Tensor, library_B1: Tensor, log_share_BG: Tensor) -> Tensor:
        seen_BG = torch.log1p(counts_BG / library_B1 * TARGET_SUM)
        decoded_BG = torch.log1p(log_share_BG.exp() * TARGET_SUM)
        return 0.5 * ((decoded_BG - seen_BG) / self.gene_scale_G) ** 2


def relative_distance(one_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return the mean squared distance of rows over the total variance of both, a constant for gradients."""
    spread = torch.cat([one_BD, other_BD]).detach().var(0).sum() + 1e-6
    return (one_BD - other_BD).square().sum(1).mean() / spread


def _saturated(counts_BG: Tensor) -> Tensor:
    """Log likelihood of a Poisson whose mean is the count, without the factorial."""
    return torch.xlogy(counts_BG, counts_BG) - counts_BG
