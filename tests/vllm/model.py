"""Briefly fits the model that the tests of vLLM serve, on real cells: `python -m tests.vllm.model DIRECTORY`.

It uses Kang's cells without donors 1244 and 1256. Training needs DeepSpeed, which the tests' environment lacks.
"""

import os
import sys
from pathlib import Path

import anndata

from rvqa.data import splits
from rvqa.training.fit import FitSettings, fit_files
from rvqa.training.language.cpt import LanguageSettings
from rvqa.training.tokenizer.settings import TokenizerSettings


def main(directory: str) -> None:
    """Fit the model and save it."""
    cells = anndata.read_h5ad(Path(os.environ["RVQA_DATA_DIR"]) / "kang2018_ifnb_pbmc_2k.h5ad")
    train, _ = splits.by_donor(cells, "donor", ("1244", "1256"))
    settings = FitSettings(tokenizer=TokenizerSettings(epochs=60), language=LanguageSettings(steps=300, batch_size=64))
    model = fit_files(
        [cells[train].copy()],
        names=["kang"],
        labels="cell_type",
        condition="perturbation",
        control="control",
        settings=settings,
    )
    model.save_pretrained(directory, force=True)


if __name__ == "__main__":
    main(sys.argv[1])
