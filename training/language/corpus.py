"""Examples for the language model: cells of the references in the templates of `rvqa.language.prompts`.

annotate   every labelled cell, with its codes at a random depth and on a random panel
generate   every labelled cell of known condition, from its label and condition
perturb    every perturbed cell from a random control cell of the same label and file; and control cells from other
           control cells under the condition "control", so that types never seen perturbed keep their profile
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rvqa.data.alignment import align
from rvqa.data.cells import Cells
from rvqa.language.prompts import ANNOTATE, CONTROL, GENERATE, PERTURB, TASKS, PromptEncoder
from rvqa.tokenizer.model import CellTokenizer


@dataclass(frozen=True)
class CorpusSettings:
    """Which examples make an epoch."""

    variants: int = 6
    """Number of readings of each cell: one as measured, the others thinned or with fewer genes."""
    generate_share: float = 0.25
    """Share of the labelled cells in an epoch."""
    perturb_repeats: int = 2
    """Number of control partners of each perturbed cell in an epoch."""
    unchanged_share: float = 0.5
    """Share of the control cells, in files with perturbed cells, that an epoch asks for under "control"."""


@dataclass(frozen=True)
class Batch:
    """Examples of one task, padded on the right."""

    task: str
    ids_BL: np.ndarray
    """int64 [B, L]."""
    answer_BL: np.ndarray
    """bool [B, L]: True at tokens that enter the loss."""


def words(references: Sequence[Cells]) -> tuple[list[str], list[str]]:
    """Return the labels and the perturbations of the references, each sorted."""
    labels = sorted({label for each in references for label in each.label_N if label})
    return labels, sorted({condition for each in references for condition in each.condition_N if condition})


def texts(references: Sequence[Cells]) -> list[str]:
    """Return every text that the templates can give without cells; the small tokenizer is trained on these."""
    labels, perturbations = words(references)
    filled = []
    for task in TASKS:
        for condition in [CONTROL, *perturbations]:
            for label in labels or [""]:
                both = (task.prompt + task.answer).replace("{label}", label).replace("{condition}", condition)
                filled += [part for part in both.split("{cell}") if part]
    return filled


class Corpus:
    """Draws one epoch of examples at a time; it computes the codes of all variants once."""

    def __init__(
        self,
        references: Sequence[Cells],
        cell_tokenizer: CellTokenizer,
        prompts: PromptEncoder,
        settings: CorpusSettings,
        *,
        seed: int,
        aside_N: np.ndarray | None = None,
    ) -> None:
        """`aside_N` is bool over the cells of all references in turn; cells where it is True give no example."""
        self.prompts, self.settings = prompts, settings
        self.rng = np.random.default_rng(seed)
        self.codes_VNM = np.concatenate([self._readings(each, cell_tokenizer) for each in references], axis=1)
        self.label_N = np.concatenate([each.label_N for each in references])
        self.condition_N = np.concatenate([each.condition_N for each in references])
        self.file_N = np.repeat(np.arange(len(references)), [len(each) for each in references])
        used_N = self.label_N != "" if aside_N is None else (self.label_N != "") & ~aside_N
        self.labelled = np.flatnonzero(used_N)
        said_N = np.array([condition is not None for condition in self.condition_N], dtype=bool)
        self.told = np.flatnonzero(used_N & said_N)
        perturbed = np.flatnonzero(used_N & said_N & (self.condition_N != ""))
        control = np.flatnonzero(used_N & (self.condition_N == ""))
        self._controls = dict(self._groups(control, self.file_N, self.label_N))
        self.perturbed = np.array([cell for cell in perturbed.tolist() if len(self.partners(cell))], dtype=np.int64)
        self.unchanged = control[np.isin(self.file_N[control], self.file_N[self.perturbed])]

    def _readings(self, reference: Cells, cell_tokenizer: CellTokenizer) -> np.ndarray:
        """Codes uint8 [variants, N, M] of one file: as measured, then at lower depths and on smaller panels."""
        alignment = align(reference.var, cell_tokenizer.axis)
        depth_N = reference.at_depth(cell_tokenizer.shares).library_size
        readings = [cell_tokenizer.encode(reference.counts, alignment, depth_N)]
        for _ in range(self.settings.variants - 1):
            keep = self.rng.uniform(0.4, 1.0)
            counts = reference.counts.copy()
            counts.data = self.rng.binomial(counts.data.astype(np.int64), keep).astype(np.float32)
            panel = alignment
            if self.rng.random() < 0.5:
                lost_G = self.rng.random(len(alignment.measured)) > self.rng.uniform(0.2, 1.0)
                column_map = alignment.column_map.copy()
                column_map[(column_map >= 0) & lost_G[column_map]] = -1
                panel = replace(alignment, column_map=column_map, measured=alignment.measured & ~lost_G)
            readings.append(cell_tokenizer.encode(counts, panel, depth_N * keep))
        return np.stack(readings)

    def partners(self, cell: int) -> np.ndarray:
        """Return rows of the control cells that share the label and the file of a cell."""
        return self._controls.get((str(self.file_N[cell]), str(self.label_N[cell])), np.array([], dtype=np.int64))

    def epoch(self, batch_size: int) -> list[Batch]:
        """Return the batches of one epoch in random order; each batch has one task."""
        rng, settings = self.rng, self.settings
        generated = rng.choice(self.told, round(settings.generate_share * len(self.told)), replace=False)
        kept = rng.choice(self.unchanged, round(settings.unchanged_share * len(self.unchanged)), replace=False)
        targets = np.concatenate([np.repeat(self.perturbed, settings.perturb_repeats), kept])
        controls = np.array([rng.choice(self.partners(cell)) for cell in targets.tolist()], dtype=np.int64)
        annotate, generate, perturb = [], [], []
        for (label,), rows in self._groups(self.labelled, self.label_N):
            prompt = self.prompts.ids(ANNOTATE.prompt, self._any_reading(rows))
            annotate.append((prompt, self.prompts.answer(ANNOTATE.answer, label=label)))
        for (label, condition), rows in self._groups(generated, self.label_N, self.condition_N):
            prompt = self.prompts.ids(GENERATE.prompt, label=label, condition=condition or CONTROL)
            generate.append((prompt, self.prompts.answer(GENERATE.answer, self.codes_VNM[0, rows])))
        order = np.arange(len(targets))
        for (label, condition), at in self._groups(order, self.label_N[targets], self.condition_N[targets]):
            source = self._any_reading(controls[at])
            prompt = self.prompts.ids(PERTURB.prompt, source, label=label, condition=condition or CONTROL)
            perturb.append((prompt, self.prompts.answer(PERTURB.answer, self.codes_VNM[0, targets[at]])))
        batches = []
        for task, parts in zip(TASKS, (annotate, generate, perturb), strict=True):
            ids_NL, answer_NL = self._padded(parts)
            shuffled = rng.permutation(len(ids_NL))
            for rows in np.array_split(shuffled, -(-len(ids_NL) // batch_size)) if len(ids_NL) else []:
                batches.append(Batch(task.name, ids_NL[rows], answer_NL[rows]))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _any_reading(self, rows: np.ndarray) -> np.ndarray:
        return self.codes_VNM[self.rng.integers(len(self.codes_VNM), size=len(rows)), rows]

    @staticmethod
    def _groups(rows: np.ndarray, *keys_N: np.ndarray) -> list[tuple[tuple[str, ...], np.ndarray]]:
        groups: dict[tuple[str, ...], list[int]] = {}
        for row in rows.tolist():
            groups.setdefault(tuple(str(key[row]) for key in keys_N), []).append(row)
        return [(key, np.array(members)) for key, members in sorted(groups.items())]

    def _padded(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        sizes = [max(len(prompt), len(answer)) for prompt, answer in parts]
        width = max((prompt.shape[1] + answer.shape[1] for prompt, answer in parts), default=0)
        ids_NL = np.full((sum(sizes), width), self.prompts.end, dtype=np.int64)
        answer_NL = np.zeros(ids_NL.shape, dtype=bool)
        start = 0
        for (prompt, answer), size in zip(parts, sizes, strict=True):
            middle, end = prompt.shape[1], prompt.shape[1] + answer.shape[1]
            ids_NL[start : start + size, :middle] = prompt
            ids_NL[start : start + size, middle:end] = answer
            answer_NL[start : start + size, middle:end] = True
            start += size
        return ids_NL, answer_NL
