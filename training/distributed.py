"""The processes that share one fit of the tokenizer, and what they tell each other; one process needs nothing.

Started by torchrun, every process runs the same program: each has a rank and a part of every batch.
"""

import atexit
import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rvqa.errors import InputError


def begin_alone(backend: str) -> None:
    """Begin a group of this process alone, where torchrun did not start it: no port is needed."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        begin_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def begin_group(backend: str, **options: Any) -> None:
    """Begin a process group that lasts as long as the process.

    It is taken down before the interpreter: threads of gloo that still hold tensors abort a process that is ending.
    """
    dist.init_process_group(backend, **options)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


class Processes:
    """All processes of a fit, seen from this one; joins their process group, or begins one that lasts.

    Parameters
    ----------
    device
        Where this process computes. Under torchrun "cuda" is the GPU of `LOCAL_RANK`.

    Raises
    ------
    rvqa.errors.InputError
        A device that torch does not know or does not have.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda":
                index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
                self.device = torch.device("cuda", index if self.device.index is None else self.device.index)
                torch.cuda.set_device(self.device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"Device {str(device)!r} cannot be used here ({reason}). Use 'cpu' or 'cuda'.") from error
        if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            begin_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, the same bits in each; returns it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of rank 0; returns it."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of all processes by rank, on the CPU; of one shape and dtype."""
        if self.world == 1:
            return [tensor.cpu()]
        own = tensor.to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return [part.cpu() for part in parts]

    def gather_texts(self, text: str) -> list[str]:
        """Texts of all processes by rank, of any length."""
        own = torch.tensor(list(text.encode(errors="surrogateescape")), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor([len(own)]))]
        parts = self.gather(F.pad(own, (0, max(sizes) - len(own))))
        return [
            bytes(part[:size].tolist()).decode(errors="surrogateescape")
            for part, size in zip(parts, sizes, strict=True)
        ]

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.sum_(torch.zeros(1, device=self.device)).item()

    def require_same(self, text: str) -> None:
        """Reject processes that differ in what `text` tells.

        Raises
        ------
        rvqa.errors.InputError
            In every process, where the text of any is another.
        """
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        others = self.gather(digest)
        if differing := [rank for rank, each in enumerate(others) if not torch.equal(each, others[0])]:
            raise InputError(
                f"Process {differing[0]} was given other cells, settings or checkpoints than process 0. Start all with "
                "the same arguments, and with a checkpoint folder that all can see."
            )

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes; none counts as 0."""
        if self.world == 1:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = self.sum_(torch.cat([each.flatten() for each in gradients])) / self.world
        for parameter, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
