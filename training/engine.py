"""The only file that knows DeepSpeed: one optimiser step, and nothing about what is learned.

It works in one process, and in several when torchrun starts them. On a machine without a GPU, DeepSpeed runs on its
CPU accelerator with gloo and torch's AdamW, and compiles no operator.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rvqa.errors import InputError
from rvqa.training.distributed import begin_alone


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Length of the warm-up, as a share of all steps."""
    gradient_clipping: float = 1.0
    zero_stage: int = 0
    """ZeRO stage 0, 1 or 2. At stage 0 each process holds everything."""


class Engine:
    """A model, its optimiser and its schedule.

    Parameters
    ----------
    model
        Model to train in place, in its own precision.
    settings
        Settings of the optimiser; see `OptimiserSettings`.
    total_steps
        Length of the schedule, in steps.
    batch_size
        Rows of one step in this process.

    Raises
    ------
    rvqa.errors.InputError
        DeepSpeed is not installed.
    """

    def __init__(self, model: nn.Module, settings: OptimiserSettings, *, total_steps: int, batch_size: int) -> None:
        deepspeed = _deepspeed()
        _start_process_group(deepspeed)
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimiser = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        warmup = max(1, round(settings.warmup * total_steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.gradient_clipping,
            "zero_optimization": {"stage": settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
            "steps_per_print": 10**9,
        }
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimiser,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimiser, factor),
            config=config,
            dist_init_required=False,
        )

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass of the model."""
        return self._engine(**inputs)

    def step(self, loss: Tensor) -> None:
        """Backward pass, gradient clipping, optimiser and schedule."""
        self._engine.backward(loss)
        self._engine.step()

    def close(self) -> None:
        """Free what DeepSpeed holds. The process group stays: DeepSpeed keeps references to it for the next engine."""
        self._engine.destroy()


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        import deepspeed
    except ImportError as error:
        raise InputError("Training needs DeepSpeed: DS_BUILD_OPS=0 pip install 'rvqa[train]'") from error
    return deepspeed


def _start_process_group(deepspeed: Any) -> None:
    """Join the process group, or begin one that lasts as long as the process."""
    if torch.distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    begin_alone(backend)
    if not on_gpu:
        # DeepSpeed would probe the compiler now and build a shared-memory collective, which gloo does not need.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
