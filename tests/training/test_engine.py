"""The DeepSpeed engine takes the same steps as plain PyTorch, and can be used twice in one process."""

import math
import subprocess
import sys

import torch

from rvqa.training.engine import Engine, OptimiserSettings


def linear():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def test_steps_equal_plain_pytorch():
    """AdamW, clipping at 1, warm-up over the first tenth and cosine to zero are written here by hand."""
    settings = OptimiserSettings(learning_rate=0.05, weight_decay=0.1, warmup=0.1)
    ours, theirs = linear(), linear()
    engine = Engine(ours, settings, total_steps=20, batch_size=8)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.98))
    for step in range(20):
        inputs, targets = data(step)
        engine.step(torch.nn.functional.mse_loss(engine(input=inputs), targets))
        rate = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
        optimiser.param_groups[0]["lr"] = 0.05 * rate
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(theirs(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
    engine.close()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_two_engines_one_after_the_other():
    for _ in range(2):
        layer = linear()
        engine = Engine(layer, OptimiserSettings(), total_steps=2, batch_size=8)
        inputs, targets = data(0)
        before = layer.weight.detach().clone()
        engine.step(torch.nn.functional.mse_loss(engine(input=inputs), targets))
        engine.close()
        assert not torch.equal(before, layer.weight)


def test_the_process_group_is_taken_down_before_the_interpreter():
    """Threads of gloo that outlive the interpreter abort the process, as in 12 of 25 fits on a busy machine."""
    program = "\n".join(
        (
            "import atexit",
            "import torch.distributed as dist",
            "from rvqa.training.distributed import begin_group",
            # the function registered first runs last
            "atexit.register(lambda: print('there' if dist.is_initialized() else 'gone'))",
            "begin_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
            "print('there' if dist.is_initialized() else 'gone')",
        )
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["there", "gone"]
