"""What a fit of the cell tokenizer is told: its settings, and presets of them."""

from dataclasses import dataclass

from rvqa.errors import InputError

LIKELIHOODS = ("poisson", "negative_binomial", "mse")
"""See `rvqa.training.tokenizer.losses`."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Everything that decides the result of `fit_tokenizer`, apart from the cells; saved with the model.

    Raises
    ------
    rvqa.errors.InputError
        An unknown likelihood, `checkpoint_steps` below 1, or a weight or `patience` below 0.
    """

    n_top_genes: int = 4000
    hidden: int = 128
    latent: int = 32
    levels: int = 8
    entries: int = 32
    dropout: float = 0.3
    epochs: int = 80
    """Half of them continuous, half with codebooks."""
    max_steps: int = 6000
    """Bound on the optimiser's steps, for large references."""
    batch_size: int = 256
    """Cells a step, of all processes together."""
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
    """Of the codebooks' moving averages, per step."""
    dead_below: float = 0.3
    """Cells a step, by moving average, under which a codeword is replaced. Codewords that no cell uses at the end of a
    fit are replaced whatever this is."""
    min_scale: float = 0.1
    """Floor of a gene's standard deviation on log1p of counts per 10,000."""
    seed: int = 0
    alignment: float = 1.0
    """Weight of the distance between a cell's latent and that of a partner in another file (`tokenizer_partners`), in
    units of the spread of the latents, in the first half of the fit. 0: none."""
    consistency: float = 0.3
    """Weight of the distance between latents of a cell as it is and at another depth on another panel, likewise. 0:
    none."""
    study_shift: float = 0.01
    """Penalty on an offset of each file to the decoded log share of each gene, so that codes need not say which file a
    cell is from; the offsets are dropped after the fit. 0: no offsets."""
    quantize: bool = True
    """False: the same recipe without codebooks in the second half, the yardstick of what they cost. Codebooks are then
    put into the result by k-means at the end."""
    likelihood: str = "poisson"
    """Of the counts: one of `LIKELIHOODS`."""
    patience: int = 0
    """Epochs with codebooks and without a lower validation loss that end the fit; 0 never does. Nothing without
    validation cells."""
    checkpoint_steps: int = 500
    """Steps from one checkpoint to the next; the result does not depend on it."""

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
    """Settings by name: "small" (the defaults: minutes on two cores) or "atlas" (all genes, millions of cells, a GPU).

    Raises
    ------
    rvqa.errors.InputError
        Another name.
    """
    if name not in _PRESETS:
        raise InputError(f"There is no preset {name!r}; expected one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]
