"""Settings of a fit of the cell tokenizer, and presets of them."""

from dataclasses import dataclass

from rvqa.errors import InputError

LIKELIHOODS = ("poisson", "negative_binomial", "mse")
"""See `rvqa.training.tokenizer.losses`."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Everything except the cells that decides the result of `fit_tokenizer`; saved with the model.

    Raises
    ------
    rvqa.errors.InputError
        The likelihood is unknown, `checkpoint_steps` is below 1, or a weight or `patience` is below 0.
    """

    n_top_genes: int = 4000
    hidden: int = 128
    latent: int = 32
    levels: int = 8
    entries: int = 32
    dropout: float = 0.3
    epochs: int = 80
    """Passes over the cells: the first half is continuous, the second half uses codebooks."""
    max_steps: int = 6000
    """Most steps of the optimiser; it limits fits on large references."""
    batch_size: int = 256
    """Cells per step, over all processes."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    thinning: float = 0.7
    """Share of batches read at a depth thinned to 30-100 %."""
    panel_dropout: float = 0.5
    """Share of batches read with 15-100 % of the genes."""
    label_weight: float = 0.3
    label_smoothing: float = 0.1
    commitment: float = 0.25
    decay: float = 0.97
    """Decay of the codebooks' moving averages per step."""
    dead_below: float = 0.3
    """Cells per step, by moving average, below which a codeword is replaced. Codewords that no cell uses at the end of
    a fit are replaced at any value of this."""
    min_scale: float = 0.1
    """Floor of a gene's standard deviation on log1p of counts per 10,000."""
    seed: int = 0
    alignment: float = 1.0
    """Weight, in the first half of the fit, of the distance between the latents of a cell and of a partner in another
    file (`rvqa.training.tokenizer.partners`), in units of the spread of the latents. 0 turns it off."""
    consistency: float = 0.3
    """Weight, likewise, of the distance between the latents of a cell as measured and at another depth on another
    panel. 0 turns it off."""
    study_shift: float = 0.01
    """Penalty on an offset of each file to the decoded log share of each gene. With offsets the codes need not say
    which file a cell is from; offsets are dropped after the fit. 0 means no offsets."""
    quantize: bool = True
    """Whether the second half uses codebooks. False measures what they cost: the recipe is otherwise the same, and
    k-means makes the codebooks of the result at the end."""
    likelihood: str = "poisson"
    """Likelihood of the counts: one of `LIKELIHOODS`."""
    patience: int = 0
    """Number of epochs with codebooks and without a lower validation loss after which the fit ends; 0 turns this off.
    It has no effect without validation cells."""
    checkpoint_steps: int = 500
    """Steps between checkpoints; the result does not depend on it."""

    def __post_init__(self) -> None:
        if self.likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood is {self.likelihood!r}; expected one of {', '.join(LIKELIHOODS)}.")
        for name, least in (
            ("patience", 0),
            ("checkpoint_steps", 1),
            ("study_shift", 0),
            ("alignment", 0),
            ("consistency", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected {least} or more.")


_PRESETS = {
    "small": TokenizerSettings(),
    "atlas": TokenizerSettings(
        n_top_genes=36_000, hidden=256, latent=64, batch_size=2048, max_steps=200_000, epochs=20
    ),
}


def preset(name: str) -> TokenizerSettings:
    """Return settings: "small" (the defaults, minutes on two cores) or "atlas" (all genes, millions of cells, a GPU).

    Raises
    ------
    rvqa.errors.InputError
        The name is unknown.
    """
    if name not in _PRESETS:
        raise InputError(f"There is no preset {name!r}; expected one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]
