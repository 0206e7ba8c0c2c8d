"""Runs all that needs a GPU in a few minutes: tests against the exact definition, then every bench.

python -m bench.gpu_suite --out DIR [--latents FILE.npy]

It needs only torch with CUDA, triton and pytest. rvqa need not be installed: links lay it out. The CUDA module is built
if nvcc and pybind11 exist. With --small, Triton's interpreter and the emulation of CUDA run.
It writes DIR/tests.txt, DIR/gpu.json and DIR/gpu.txt. It checks codes and results before it times them.
Contenders: the Triton kernels, the CUDA kernels, and the same algebra in eager torch and under torch.compile.
Floors: a large copy (bytes read and written per second) and large float32 and bfloat16 products in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Lay out the package, run the tests, then the benches."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--latents", help="float32 [N, D] .npy file of real latents")
    arguments.add_argument("--seconds", type=int, default=480, help="time limit of the whole run")
    arguments.add_argument("--small", action="store_true", help="tiny sizes, to try the script without a GPU")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if os.environ.get("RVQA_GPU_SUITE") != "inside":  # run again, with rvqa laid out
        tree = options.out.resolve() / "tree"
        subprocess.run([ROOT / ".ci" / "tree", tree], check=True)
        environment = {**os.environ, "RVQA_GPU_SUITE": "inside", "PYTHONPATH": str(tree)}
        if options.small:
            from tests.cuda import emulated

            environment |= {"TRITON_INTERPRET": "1", "RVQA_CUDA_EMULATED": str(emulated.library())}
        else:
            built = [
                sys.executable,
                "setup.py",
                "-q",
                "build_ext",
                "--build-lib",
                str(tree),
                "--build-temp",
                str(tree / "build"),
            ]
            if subprocess.run(built, cwd=ROOT, env={**os.environ, "RVQA_BUILD": "cuda"}, check=False).returncode:
                print("the CUDA module cannot be built here (see above): Triton alone is measured", flush=True)
        tests = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "--rootdir", str(tree)]
        tests += ["-n", "8"] if find_spec("xdist") else []  # Triton's compiler takes most of the time
        if not options.small:
            done = subprocess.run(tests, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            (options.out / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
            print(done.stdout[-3000:])
            if done.returncode:
                sys.exit("tests/gpu failed: nothing was timed")
        left = options.seconds - int(time.monotonic() - began)
        command = [sys.executable, "-m", "bench.gpu_suite", *sys.argv[1:], "--seconds", str(left)]
        sys.exit(subprocess.run(command, cwd=tree, env=environment, check=False).returncode)
    bench(options, began)


def bench(options: argparse.Namespace, began: float) -> None:
    """Time all kernels on the device."""
    import torch

    from rvqa.kernels import ops, reference, registry

    device = torch.device("cpu" if options.small else "cuda")
    if not options.small and not torch.cuda.is_available():
        sys.exit("no CUDA device; --small tries the script without one")
    backends = [name for name in ("triton", "cuda") if registry.reason_absent(name) is None]
    lines: list[str] = []

    def on(backend: str, run: Callable[[], object]) -> Callable[[], object]:
        """Return the same call, forced to one backend."""

        def forced() -> object:
            os.environ["RVQA_BACKEND"] = backend
            return run()

        return forced

    figures: dict[str, float | str] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "none"}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        (options.out / "gpu.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (options.out / "gpu.json").write_text(json.dumps({"name": "gpu_suite", "figures": figures}), encoding="utf-8")

    def seconds(run: Callable[[], object]) -> float:
        """Return the median of interleaved calls in seconds, by the device's own clock."""
        run()
        if device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        for _ in range(3):
            run()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(9)]
        for before, after in marks:
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
        return sorted(before.elapsed_time(after) for before, after in marks)[4] / 1e3

    big = 1 << (16 if options.small else 30)
    source = torch.ones(big, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * big / seconds(lambda: target.copy_(source))
    figures["copy_bytes_per_s"] = copy
    side = 64 if options.small else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device, dtype=dtype)
        figures[f"matmul_{str(dtype)[6:]}_flops"] = 2 * side**3 / seconds(lambda a=a: a @ a)
    say(f"{figures}")

    def eager(x: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
        codes = []
        for codebook in codebooks:
            score = (codebook * codebook).sum(1) - 2 * x @ codebook.T
            code = score.argmin(1)
            codes.append(code.to(torch.uint8))
            x = x - codebook[code]
        return torch.stack(codes, 1)

    compiled = torch.compile(eager)
    N = 64 if options.small else 1_000_000
    for D in (32, 64, 128, 256, 512):
        if time.monotonic() - began > options.seconds * 0.8:
            say(f"D={D} and later cases are left out: no time left")
            break
        generator = torch.Generator().manual_seed(D)
        x = (torch.randn(N, D, generator=generator) * torch.linspace(2, 0.1, D)).to(device)
        codebooks = torch.empty(8, 32, D, device=device)
        residual = x[:8192].clone()
        for m in range(8):
            codebooks[m] = residual[torch.randint(len(residual), (32,), generator=generator).to(device)] * 0.7
            residual = residual - codebooks[m][ops.nearest_codeword(residual, codebooks[m])[0]]
        tables = ops.prepare(codebooks)
        sample = slice(0, 20_000)
        right, _, _ = reference.residual_quantize(x[sample].cpu(), (codebooks.cpu(), codebooks.cpu()), 8)
        times = {}
        for backend in backends:
            quantize = on(backend, lambda x=x, tables=tables: ops.residual_quantize(x, tables))
            codes = quantize()
            wrong = int((codes[sample].cpu() != right).any(1).sum())
            figures[f"wrong_codes_{backend}_D{D}"] = wrong
            if wrong:
                sys.exit(f"{backend}: {wrong} of {len(right)} rows have wrong codes at D={D}: nothing more was timed")
            times[backend] = seconds(quantize)
        times["eager"] = seconds(lambda x=x, c=codebooks: eager(x, c))
        if not options.small:
            times["compiled"] = seconds(lambda x=x, c=codebooks: compiled(x, c))
        for backend in backends:
            mine = times[backend]
            figures |= {
                f"hbm_share_{backend}_D{D}": N * (4 * D + 8) / mine / copy,
                f"cells_per_s_{backend}_D{D}": N / mine,
                f"ratio_eager_{backend}_D{D}": times["eager"] / mine,
            }
            decode = on(backend, lambda codes=codes, tables=tables: ops.decode(codes, tables))
            figures[f"decode_hbm_share_{backend}_D{D}"] = N * (4 * D + 8) / seconds(decode) / copy
        if len(backends) == 2:
            figures[f"cuda_over_triton_D{D}"] = times["triton"] / times["cuda"]
        if "compiled" in times:
            figures[f"ratio_compiled_D{D}"] = times["compiled"] / min(times[backend] for backend in backends)
        say(f"D={D}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key.endswith(f"D{D}")))

    cells, H = (8, 32) if options.small else (65_536, 256)
    for G in (2_000, 5_000, 20_000):
        stored = min(1_460, G // 4)
        indptr = torch.arange(0, cells * stored + 1, stored, device=device)
        indices = torch.rand(cells, G, device=device).topk(stored, dim=1).indices.sort(1).values.flatten().int()
        data = torch.randint(1, 20, (cells * stored,), device=device).float()
        weight, bias = torch.randn(G, H, device=device), torch.zeros(H, device=device)
        right = reference.csr_project(indptr[:5].cpu(), indices.cpu(), data.cpu(), weight.cpu(), bias.cpu())

        def sparse(indptr=indptr, indices=indices, data=data, weight=weight, G=G) -> torch.Tensor:
            depth = data.view(cells, -1).sum(1)
            values = torch.log1p(data * (1e4 / depth).repeat_interleave(len(data) // cells))
            return torch.sparse_csr_tensor(indptr, indices.long(), values, (cells, G)) @ weight

        usual = seconds(sparse)
        for backend in backends:
            project = on(backend, lambda *given, a=(indptr, indices, data, weight, bias): ops.csr_project(*a))
            if not torch.equal(project()[:4].cpu(), right):
                sys.exit(f"{backend}: csr_project differs from the reference at G={G}: nothing more was timed")
            mine = seconds(project)
            figures |= {
                f"csr_cells_per_s_{backend}_G{G}": cells / mine,
                f"csr_ratio_cusparse_{backend}_G{G}": usual / mine,
            }
            say(f"csr_project {backend} G={G}: {cells / mine:.4g} cells/s, cuSPARSE {usual / mine:.3g} times as long")
    V, opener = (1_000, 733) if options.small else (151_936, 151_669)
    first = opener + 1 + 32 * torch.arange(8, device=device)
    windows = torch.stack([first, first + 32, torch.ones_like(first)], dim=1)
    for B in (1, 64, 256):
        states = torch.randint(0, 8, (B,), device=device)
        bias = torch.full((8, V), -torch.inf, device=device)
        for row, (lo, hi, _) in zip(bias, windows.tolist(), strict=True):
            row[lo:hi] = 0
        for backend in backends:
            logits = torch.randn(B, V, device=device)
            right = logits.cpu()
            reference.apply_span_mask_(right, states.cpu(), windows.cpu())
            mask = on(backend, lambda x=logits, s=states, w=windows: ops.apply_span_mask_(x, s, w))
            mask()
            if not torch.equal(logits.cpu(), right):
                sys.exit(f"{backend}: apply_span_mask_ differs from the reference at B={B}: nothing more was timed")
            mine = seconds(mask)
            added = seconds(lambda x=logits, s=states, b=bias: x.add_(b[s]))
            filled = seconds(lambda x=logits: x.fill_(-torch.inf))
            figures |= {
                f"mask_us_{backend}_B{B}": 1e6 * mine,
                f"mask_ratio_bias_{backend}_B{B}": added / mine,
                f"mask_of_fill_{backend}_B{B}": filled / mine,
            }
            say(f"mask {backend} B={B}: {1e6 * mine:.1f} us, gathered bias {1e6 * added:.1f}, fill_ {1e6 * filled:.1f}")
    say(f"{time.monotonic() - began:.0f} s")
    print(json.dumps({"name": "gpu_suite", "figures": figures}))


if __name__ == "__main__":
    main()
