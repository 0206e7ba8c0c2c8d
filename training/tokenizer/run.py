"""One run of the tokenizer's fit: the loop, and all of its state.

A run is warm (continuous), then its codebooks start with k-means, then they move with the batches. Batches depend on
the seed and the step alone; augmentation, dropout and random depth have generators of their own in each process.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rvqa.data.depth import TARGET_SUM
from rvqa.kernels import ops
from rvqa.tokenizer.model import CellTokenizer
from rvqa.training.distributed import Processes
from rvqa.training.tokenizer.augmentation import Augmentation
from rvqa.training.tokenizer.cells import Gathered, latent_blocks
from rvqa.training.tokenizer.checkpoint import CheckpointFolder, State
from rvqa.training.tokenizer.codebooks import MovingCodebooks
from rvqa.training.tokenizer.losses import Reconstruction, relative_distance
from rvqa.training.tokenizer.partners import find_partners
from rvqa.training.tokenizer.settings import TokenizerSettings


class Run:
    """One fit, begun or continued: weights, optimiser, codebooks' moving averages, generators, and how far it is.

    Parameters
    ----------
    tokenizer
        Fitted in place; on the device of `processes`.
    cells
        To learn from; the same in all processes.
    settings
        See `TokenizerSettings`.
    validation
        Cells to choose the best epoch by, or None.
    processes
        Who shares the work.
    """

    def __init__(
        self,
        tokenizer: CellTokenizer,
        cells: Gathered,
        settings: TokenizerSettings,
        *,
        validation: Gathered | None,
        processes: Processes,
    ) -> None:
        self.tokenizer, self.cells, self.settings = tokenizer, cells, settings
        self.validation, self.processes, self.device = validation, processes, processes.device
        with torch.no_grad():  # start near the mean profile
            for parameter in tokenizer.decoder[2].parameters():
                parameter.mul_(0.1)
        self.classifier = nn.Linear(settings.latent, max(cells.n_labels, 1)).to(self.device)
        self.reconstruction = Reconstruction(settings.likelihood, tokenizer.gene_scale_G)
        shape = (len(cells.measured_FG), len(tokenizer.axis))
        self.shift_FG = nn.Parameter(torch.zeros(shape, device=self.device)) if settings.study_shift else None
        modules = (tokenizer, self.classifier, self.reconstruction)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.parameters += [] if self.shift_FG is None else [self.shift_FG]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.partners = find_partners(cells, seed=settings.seed) if settings.alignment else None
        self.scale = TARGET_SUM / 500 / len(tokenizer.axis)
        n = len(cells.library_size)
        self.per_epoch = max(1, round(n / settings.batch_size))
        self.half = max(1, min(settings.epochs * self.per_epoch, settings.max_steps) // 2)
        self.steps = 2 * self.half
        self.step, self.best_loss, self.waited = 0, math.inf, 0
        self.best: dict[str, Tensor] = {}
        self.rng = np.random.default_rng(settings.seed)
        if processes.rank:
            seeds = np.random.SeedSequence([settings.seed, processes.rank])
            self.rng = np.random.default_rng(seeds)
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        else:
            for _ in range(-(-self.steps // self.per_epoch)):  # go past what `_batches` draws from the same seed
                self.rng.permutation(n)
        self.augmentation = Augmentation(tokenizer, cells, settings, self.rng)
        self.codebooks = MovingCodebooks(tokenizer, settings, processes, self.rng)

    def run(self, *, progress: bool, checkpoint: CheckpointFolder | None) -> None:
        """Warm half, k-means, joint half with a learning rate that falls to zero. Ends with the best weights."""
        quiet = None if progress and self.processes.first else True
        with tqdm(total=self.steps, initial=self.step, desc="tokenizer", unit="step", disable=quiet) as bar:
            for rows in self._batches(self.step):
                if self.stopped:
                    break
                loss = self._take_step(rows)
                bar.update()
                if self.step % 20 == 1:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if self.validation is not None and self._ends_epoch():
                    self._validate(self.validation)
                due = self.step % self.settings.checkpoint_steps == 0 or self.step == self.steps or self.stopped
                if checkpoint is not None and due:
                    state = self.state()
                    if self.processes.first:
                        checkpoint.write(state)
                    self.processes.wait()  # a next fit may read it
        if self.best:
            self.tokenizer.load_state_dict(self.best)
        if not self.settings.quantize:
            self.codebooks.start(self.cells)

    @property
    def stopped(self) -> bool:
        """Whether the validation loss has not fallen for too long."""
        return 0 < self.settings.patience <= self.waited

    # One step

    def _batches(self, first: int) -> Iterator[np.ndarray]:
        """Rows of each batch from step `first` on: a permutation an epoch, in equal parts."""
        order = np.random.default_rng(self.settings.seed)
        for start in range(0, self.steps, self.per_epoch):
            parts = np.array_split(order.permutation(len(self.cells.library_size)), self.per_epoch)
            yield from parts[max(0, first - start) : self.steps - start]

    def _take_step(self, rows: np.ndarray) -> Tensor:
        """One step of the optimiser on a batch; returns the loss of this process' part of it."""
        settings = self.settings
        if self.step == self.half and settings.quantize:
            self.codebooks.start(self.cells)
        if self.step >= self.half:
            for group in self.optimiser.param_groups:
                turn = math.pi * (self.step - self.half) / self.half
                group["lr"] = 0.5 * settings.learning_rate * (1 + math.cos(turn))
        processes = self.processes
        own = rows[processes.rank :: processes.world]
        loss = self._loss(own, quantize=settings.quantize and self.step >= self.half)
        self.optimiser.zero_grad()
        weighted = loss if processes.world == 1 else loss * (len(own) * processes.world / len(rows))
        weighted.backward()
        processes.average_gradients(self.parameters)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def _loss(self, rows: np.ndarray, *, quantize: bool) -> Tensor:
        settings, tokenizer, cells = self.settings, self.tokenizer, self.cells
        counts = cells.counts[rows]
        library_B = cells.library_size[rows]
        measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]])
        tokenizer.train()
        latent_BD = tokenizer.encode_dense(self.augmentation.read(rows))
        used_BD, extra = latent_BD, self._pull(rows, latent_BD)
        if quantize:
            full_BD, prefix_BD = self.codebooks.quantize(latent_BD.detach())
            extra = extra + settings.commitment * F.mse_loss(latent_BD, full_BD)
            used_BD = latent_BD + (prefix_BD - latent_BD).detach()  # straight-through gradient
        log_share_BG = tokenizer.log_share(used_BD)
        if self.shift_FG is not None:
            shift_FG = self.shift_FG - self.shift_FG.mean(0)
            log_share_BG = (log_share_BG + shift_FG[torch.from_numpy(cells.file_N[rows]).to(self.device)]).clamp(
                max=0.0
            )
            extra = extra + settings.study_shift * shift_FG.square().mean()
        loss = self._reconstruct(log_share_BG, counts, library_B, measured_BG).mean() * self.scale + extra
        label_B = torch.from_numpy(cells.label_N[rows])
        if (label_B >= 0).any() and settings.label_weight:
            logits_BL = self.classifier(used_BD)
            loss = loss + settings.label_weight * F.cross_entropy(
                logits_BL, label_B.to(self.device), ignore_index=-1, label_smoothing=settings.label_smoothing
            )
        return loss

    def _pull(self, rows: np.ndarray, latent_BD: Tensor) -> Tensor:
        """Penalty on the distance of latents from those of partners, and of the same cells read worse.

        In the first half alone: pulled on to the end, codes would lose what tells cells of one kind apart.
        """
        settings = self.settings
        pull = torch.zeros((), device=self.device)
        if self.step >= self.half:
            return pull
        if settings.consistency:
            worse_BD = self.tokenizer.encode_dense(self.augmentation.read(rows, always=True))
            pull = settings.consistency * relative_distance(worse_BD, latent_BD.detach())
        if self.partners is not None:
            having, others = self.partners.draw(rows, self.rng)
            if len(having) > 1:
                own_BD = latent_BD[torch.from_numpy(having).to(self.device)]
                other_BD = self.tokenizer.encode_dense(self.augmentation.read(others))
                pull = pull + 0.5 * settings.alignment * relative_distance(own_BD, other_BD)
        return pull

    def _reconstruct(
        self, log_share_BG: Tensor, counts: sp.csr_matrix, library_B: np.ndarray, measured_BG: Tensor
    ) -> Tensor:
        """Loss [B] of decoded counts."""
        return self.reconstruction(
            torch.from_numpy(counts.toarray()).to(self.device),
            torch.from_numpy(library_B).float().to(self.device),
            log_share_BG,
            measured_BG.to(self.device),
        )

    # Validation

    def _ends_epoch(self) -> bool:
        """Whether an epoch with codebooks has just ended, or the run."""
        since = self.step - self.half
        return since > 0 and (since % self.per_epoch == 0 or self.step == self.steps)

    def _validate(self, cells: Gathered) -> None:
        """Keep the weights if they are the best so far."""
        loss = self.validation_loss(cells)
        self.waited += 1
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = {name: tensor.clone() for name, tensor in self.tokenizer.state_dict().items()}

    @torch.inference_mode()
    def validation_loss(self, cells: Gathered) -> float:
        """Mean loss a cell, read as it is and decoded from all of its codes; the same number in all processes."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tables, n = self.tokenizer.tables, len(cells.library_size)
        rank, world = self.processes.rank, self.processes.world
        for rows, latent_BD in latent_blocks(self.tokenizer, cells, slice(n * rank // world, n * (rank + 1) // world)):
            used_BD = latent_BD
            if self.settings.quantize:
                used_BD = ops.decode(ops.residual_quantize(latent_BD, tables), tables)
            measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]])
            counts, library_B = cells.counts[rows], cells.library_size[rows]
            total += self._reconstruct(self.tokenizer.log_share(used_BD), counts, library_B, measured_BG).double().sum()
        return self.processes.sum_(total).item() / n * self.scale

    # Checkpoints

    def state(self) -> State:
        """Everything `restore` needs, of all processes; every process must call it."""
        tensors = {"usage_MK": self.codebooks.usage_MK, "sum_MKD": self.codebooks.sum_MKD}
        parts: dict[str, dict[str, Any]] = {
            "tokenizer": self.tokenizer.state_dict(),
            "classifier": self.classifier.state_dict(),
            "reconstruction": self.reconstruction.state_dict(),
            "best": self.best,
            "study": {} if self.shift_FG is None else {"shift_FG": self.shift_FG},
        }
        for index, moments in self.optimiser.state_dict()["state"].items():
            parts[f"optimiser.{index}"] = moments
        for part, named in parts.items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in named.items()}
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for rank, generator in enumerate(self.processes.gather(torch.get_rng_state())):
            tensors[f"random.cpu.{rank}"] = generator
        if self.device.type == "cuda":
            for rank, generator in enumerate(self.processes.gather(torch.cuda.get_rng_state(self.device))):
                tensors[f"random.cuda.{rank}"] = generator
        generators = self.processes.gather_texts(json.dumps(self.rng.bit_generator.state))
        values = {
            "step": self.step,
            "best_loss": self.best_loss if self.best else None,
            "waited": self.waited,
            "random": [json.loads(each) for each in generators],
        }
        return State(values, tensors)

    def restore(self, state: State) -> None:
        """Go on from a state that `state` gave, bit for bit."""
        values, tensors = state
        rank = self.processes.rank

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}

        self.tokenizer.load_state_dict(part("tokenizer"))
        self.classifier.load_state_dict(part("classifier"))
        self.reconstruction.load_state_dict(part("reconstruction"))
        if self.shift_FG is not None:
            self.shift_FG.data.copy_(part("study")["shift_FG"])
        moments = {index: part(f"optimiser.{index}") for index in range(len(self.parameters))}
        groups = self.optimiser.state_dict()["param_groups"]
        found = {index: named for index, named in moments.items() if named}
        self.optimiser.load_state_dict({"state": found, "param_groups": groups})
        self.codebooks.usage_MK.copy_(tensors["usage_MK"])
        self.codebooks.sum_MKD.copy_(tensors["sum_MKD"])
        self.best = {name: tensor.to(self.device) for name, tensor in part("best").items()}
        self.step, self.waited = values["step"], values["waited"]
        self.best_loss = values["best_loss"] if self.best else math.inf
        self.rng.bit_generator.state = values["random"][rank]
        torch.set_rng_state(tensors[f"random.cpu.{rank}"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"], self.device)
