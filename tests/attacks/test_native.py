"""Every entry point of the kernels on hostile arguments, on each instruction set. Valid ones give the reference's bits,
all others one sentence, from the function and from its operator. `make fuzz` runs it under sanitizers.
"""

import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from rvqa.errors import InputError
from rvqa.kernels import ops, registry
from tests.attacks.cases import CASES, survive

if registry.backends()["cpu"] is not None:
    pytest.skip("the native module was not built", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
COUNTS = (torch.float32, torch.float64, torch.int32, torch.uint8, torch.uint16, torch.uint32)
ANY = tuple({*FLOATS, *INDICES, *COUNTS, torch.bool, torch.int8, torch.int16, torch.uint64, torch.complex64})
ROWS = (0, 1, 2, 11, 12, 13, 25, 40)

ENTRIES = {
    "prepare": None,
    "residual_quantize": "residual_quantize",
    "residual_norms": "residual_norms",
    "nearest_codeword": "nearest_codeword",
    "decode": "decode",
    "decode_into": "decode_into",
    "csr_project": "csr_project",
    "csr_totals": "csr_totals",
    "apply_span_mask_": "apply_span_mask_",
}
"""Each with its operator, if it has one."""

ALLOWED = {
    "codebooks": (torch.float32,),
    "codebook": (torch.float32,),
    "packed": (torch.uint8,),
    "x": FLOATS,
    "codes": (torch.uint8,),
    "out": (torch.float32,),
    "weight": (torch.float32,),
    "bias": (torch.float32,),
    "indptr": INDICES,
    "indices": INDICES,
    "data": COUNTS,
    "column_map": INDICES,
    "library_size": (torch.float32, torch.float64),
    "known": (torch.bool,),
    "logits": FLOATS,
    "states": INDICES,
    "windows": (torch.int64,),
}

NUMBERS = (
    -1,
    0,
    1,
    2,
    300,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**30,
    10**5000,
    1e-320,
    2.0**53,
    float("nan"),
    float("inf"),
)
THINGS = ("2", [1], b"", {}, 1j, np.ones(2), torch.ones(2, 2), object(), Path())


class Own(torch.Tensor):
    """A subclass of torch.Tensor, as users may define."""


class Draw:
    """Draws the arguments of one case from its seed alone."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.torch = torch.Generator().manual_seed(self.rng.getrandbits(60))

    def of(self, *values):
        return self.rng.choice(values)

    def normal(self, *shape, dtype=torch.float32):
        scale = self.of(1.0, 1.0, 1e-20, 1e20) if dtype is not torch.float16 else 1.0
        return torch.randn(shape, generator=self.torch).mul_(scale).to(dtype)

    def whole(self, low, high, *shape, dtype=torch.int64):
        return torch.randint(low, max(high, low + 1), shape, generator=self.torch).to(dtype)

    def codebooks(self):
        M, K, D = self.of(1, 2, 3, 4), self.of(1, 2, 5, 31, 32, 33, 64, 255, 256), self.of(1, 3, 8, 16, 17, 32, 40)
        codebooks = self.normal(M, K, D)
        if self.of(True, False):  # ties and repeated codewords
            codebooks = codebooks.div(codebooks.abs().max() / 2).round()
        return codebooks

    def tables(self):
        tables = ops.prepare(self.codebooks())
        # Tables of another backend have an empty `packed`.
        return {"codebooks": tables.codebooks_MKD, "packed": tables.packed[: self.of(None, None, 0)]}

    def rows_of_counts(self):
        N, columns = self.of(*ROWS), self.of(0, 1, 3, 64, 65, 200)
        stored = self.whole(0, self.of(1, 5, 90) if columns else 1, N)
        start = self.of(0, 0, 3)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), stored.cumsum(0)]) + start
        E = int(indptr[-1]) + self.of(0, 2)
        data = self.whole(0, self.of(2, 60, 200), E, dtype=self.of(*COUNTS))
        if data.is_floating_point() and self.of(True, False, False):
            data = data * self.of(0.1, 1e-40)
        indices = self.whole(0, columns, E, dtype=self.of(*INDICES))
        return {"indptr": indptr.to(self.of(*INDICES)), "indices": indices, "data": data}, columns

    def arguments(self, entry):
        """Return valid arguments by name; tables are given as their two tensors."""
        if entry == "prepare":
            return {"codebooks": self.codebooks()}
        if entry == "nearest_codeword":
            codebook = self.codebooks()[0]
            x = self.normal(self.of(*ROWS), codebook.shape[1], dtype=self.of(*FLOATS))
            return {"x": x, "codebook": codebook}
        if entry in ("residual_quantize", "residual_norms", "decode", "decode_into"):
            made, N = self.tables(), self.of(*ROWS)
            M, K, D = made["codebooks"].shape
            levels = self.of(None, self.rng.randint(1, M))
            codes = self.whole(0, K, N, M, dtype=torch.uint8)
            x = self.normal(N, D, dtype=self.of(*FLOATS))
            if entry == "residual_quantize":
                return {"x": x, **made, "levels": levels, "mark": self.of(True, False) and K < 256}
            if entry == "residual_norms":
                return {"x": x, "codes": codes, **made}
            if entry == "decode":
                return {"codes": codes, **made, "levels": levels}
            return {"codes": codes, **made, "levels": levels, "out": torch.zeros(N, D)}
        if entry == "apply_span_mask_":
            B, V, S = self.of(*ROWS), self.of(0, 1, 7, 64, 300), self.of(0, 1, 3)
            logits = self.normal(B, V + self.of(0, 0, 5), dtype=self.of(*FLOATS))[:, :V]
            windows = torch.cat([self.whole(-2, V + 3, S, 2), self.whole(0, 2, S, 1)], dim=1)
            return {"logits": logits, "states": self.whole(-1, S, B, dtype=self.of(*INDICES)), "windows": windows}
        rows, columns = self.rows_of_counts()
        if entry == "csr_totals":
            known = self.of(None, self.whole(0, 2, columns, dtype=torch.bool))
            return rows | {"columns": columns, "known": known}
        mapped, N = self.of(True, False), len(rows["indptr"]) - 1
        G, H = self.of(1, 64, 130) if mapped else columns, self.of(0, 1, 17, 64)
        return rows | {
            "weight": self.normal(G, H),
            "bias": self.normal(H),
            "target_sum": self.of(1e4, 1, 1e-300, 2.0**53),
            "column_map": self.whole(-1, G, columns, dtype=self.of(*INDICES)) if mapped else None,
            "library_size": self.of(None, self.whole(1, 900, N, dtype=self.of(torch.float32, torch.float64))),
        }

    def hostile(self, entry, arguments, names):
        """Alter one of the named arguments; return what to expect, as in `made`."""
        name = self.of(*names)
        names.remove(name)
        expect = self.altered(entry, arguments, name, names)
        if name == "packed":  # only the native module reads it, and decoding never does
            return "bad" if expect == "bad" and not entry.startswith("decode") else "loose"
        return "loose" if name == "codebooks" and "packed" in arguments and expect == "same" else expect

    def altered(self, entry, arguments, name, names):
        value = arguments[name]
        if not isinstance(value, torch.Tensor):
            if name == "mark":
                return "same"
            value = self.of(*NUMBERS, *THINGS)
            arguments[name] = value
            bad = not isinstance(value, (int, float)) or (isinstance(value, float) and name != "target_sum")
            return "bad" if bad and name not in ("column_map", "library_size", "known") else "same"
        how = self.rng.randrange(12)
        if how == 0:
            arguments[name] = self.of(
                None, 3, "x", *THINGS[:6], value.numpy() if value.dtype in (torch.float32, torch.int64) else []
            )
            return "same" if name in ("column_map", "library_size", "known", "out") else "bad"
        if how == 1:
            dtype = self.of(*ANY)
            arguments[name] = value.to(dtype)
            return "same" if dtype in ALLOWED[name] else "bad"
        if how == 2:
            arguments[name] = self.reshaped(value)
            return "same"
        if how == 3:
            arguments[name] = self.restrided(value)
            return "loose" if name in ("out", "logits") else "same"
        if how == 4:
            return self.relayed(name, arguments)
        if how == 5:  # memory is not aligned
            if name == "packed" or value.numel() == 0:
                return "same"
            memory = bytearray(1) + bytearray(value.contiguous().flatten().view(torch.uint8).numpy())
            arguments[name] = torch.frombuffer(memory, dtype=value.dtype, offset=1).reshape(value.shape)
            return "loose"
        if how == 6:
            arguments[name] = value.as_subclass(Own)
            return "same"
        if how == 7 and value.is_floating_point() and name not in ("out", "logits"):
            arguments[name] = value.requires_grad_()
            return "same"
        if how == 8 and name in ("out", "logits") and len(names) > 1:  # output shares memory with an input
            other = self.of(*(key for key in arguments if isinstance(arguments[key], torch.Tensor) and key in names))
            names.clear()
            size = max(value.numel() * value.itemsize, arguments[other].nbytes)
            memory = torch.zeros(size + 64, dtype=torch.uint8)
            for key in (other, name):
                was = arguments[key]
                shared = memory[: was.numel() * was.itemsize].view(was.dtype).reshape(was.shape)
                arguments[key] = shared.copy_(was)
            return "loose"
        return self.revalued(name, arguments)

    def reshaped(self, value):
        how = self.rng.randrange(6)
        if how == 0:
            return value[None]
        if how == 1:
            return value.flatten()
        axis = self.rng.randrange(value.ndim) if value.ndim else 0
        if value.ndim == 0:
            return value.reshape(1)
        if how == 2:
            return value.narrow(axis, 0, 0)
        if how == 3:
            return value.narrow(axis, 0, max(0, value.shape[axis] - 1))
        if how == 4:
            return torch.cat([value, value], dim=axis)
        return value.select(axis, 0) if value.shape[axis] else value.T

    def restrided(self, value):
        """Return the same shape in another layout; some have other values."""
        if value.ndim == 0 or value.numel() == 0:
            return value
        how, last = self.rng.randrange(6), value.ndim - 1
        if how == 0:
            return value.transpose(0, last).contiguous().transpose(0, last)
        if how == 1:
            return value[:1].expand(value.shape)
        if how == 2:
            return value.narrow(last, 0, 1).expand(value.shape)
        if how == 3:
            return torch.as_strided(torch.zeros(sum(value.shape), dtype=value.dtype), value.shape, [1] * value.ndim)
        if how == 4:
            wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] + 3, dtype=value.dtype)[..., 3::2]
            return wide[..., : value.shape[-1]].copy_(value)
        huge = [
            self.of(0, 2**40, 2**62, 2**63 - 1) if size == 1 else step
            for size, step in zip(value.shape, value.stride(), strict=True)
        ]
        return torch.as_strided(value, value.shape, huge)

    def relayed(self, name, arguments):
        """Change its layout, device or sign bit."""
        value = arguments[name]
        how = self.rng.randrange(5)
        common = value.dtype in (torch.float32, torch.int64)  # torch lacks these for some dtypes
        if how == 0 and common:
            arguments[name] = value.to_sparse()
        elif how == 1:
            arguments[name] = value.to("meta")
        elif how == 2 and common:
            arguments[name] = torch.nested.nested_tensor([value, value])
        elif how == 3 and value.dtype is torch.float32:
            arguments[name] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        elif value.is_floating_point():
            arguments[name] = torch._neg_view(-value)
            return "loose" if name in ("out", "logits") else "same"
        else:
            return "same"
        return "bad"

    def revalued(self, name, arguments):
        """Change values at a few places, or all of packed codebooks."""
        value = arguments[name] = arguments[name].clone()
        if value.numel() == 0:
            return "same"
        if name == "packed":
            if self.of(True, False):
                value[self.of(0, 64) :].view(torch.float32)[:] = self.of(
                    torch.nan, torch.inf, -torch.inf, 0.0, -3e38, 1e-45
                )
            else:
                at = self.whole(0, value.numel(), self.of(1, 9, 500))
                value[at] = self.whole(0, 256, len(at), dtype=torch.uint8)
            return "loose"
        at = self.whole(0, value.numel(), self.of(1, 1, 3)).tolist()
        for place in at:
            if value.is_floating_point():
                limits = torch.finfo(value.dtype)
                new = self.of(
                    torch.nan, torch.inf, -torch.inf, limits.max, -limits.max, limits.tiny / 4, -0.0, -1.0, 0.5
                )
            elif value.dtype is torch.bool:
                new = True
            else:
                limits = torch.iinfo(value.dtype)
                new = min(
                    max(self.of(-1, -2, 0, 1, 64, 200, 255, 2**31, 2**24 + 1, limits.min, limits.max), limits.min),
                    limits.max,
                )
            value.view(-1)[place] = new
        return "same"


def made(isa, number):
    """Return entry point, arguments and what to expect: "valid", "same" (as the reference), "bad" or "loose"."""
    draw = Draw(f"{isa} {number}")
    entry = list(ENTRIES)[number % len(ENTRIES)]
    arguments = draw.arguments(entry)
    names, expect = list(arguments), "valid"
    for _ in range(draw.of(0, 1, 1, 2)):
        if not names:
            break
        seen = draw.hostile(entry, arguments, names)
        expect = min(expect, seen, key=("loose", "bad", "same", "valid").index)
    return entry, arguments, expect


def run(entry, arguments):
    """Call the function in `rvqa.kernels.ops`."""
    given = dict(arguments)
    if "packed" in given:
        given["tables"] = ops.Tables(given.pop("codebooks"), given.pop("packed"))
    if entry == "residual_quantize":
        given["not_finite"] = "mark" if given.pop("mark") else "raise"
    return getattr(ops, "decode" if entry == "decode_into" else entry)(**given)


def operate(entry, arguments):
    """Call the operator behind it."""
    given = dict(arguments)
    if entry.startswith("decode"):
        given.pop("packed")
    if given.get("out", entry) is None:  # torch takes this for an undefined tensor
        raise TypeError("no out")
    result = getattr(torch.ops.rvqa, ENTRIES[entry])(**given)
    return given.get("out", given.get("logits")) if result is None else result


def outcome(function, isa, number, entry, arguments):
    """Return the result of a call, or how it ends."""
    if entry in ("decode_into", "apply_span_mask_"):  # which write to them
        _, arguments, _ = made(isa, number)
    try:
        result = function(entry, arguments)
    except Exception as error:
        return error
    return result if isinstance(result, tuple) else (result,)


def same(one, other):
    """Return whether two results have the same bits; all NaN count as equal."""
    for a, b in zip(one, other, strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = (each.detach().as_subclass(torch.Tensor).resolve_neg().contiguous() for each in (a, b))
        if not torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) and not torch.equal(
            a.nan_to_num(7), b.nan_to_num(7)
        ):
            return False
    return True


def call(number, folder):
    isa = os.environ["RVQA_ISA"]
    entry, arguments, expect = made(isa, number)
    os.environ["RVQA_BACKEND"] = "cpu"
    got = outcome(run, isa, number, entry, arguments)
    about = f"{entry} ({expect}, {isa}, case {number}): {got!r:.300}"
    if isinstance(got, Exception) and not isinstance(got, InputError):
        raise got
    assert expect != "valid" or not isinstance(got, Exception), about
    assert expect != "bad" or isinstance(got, Exception), about
    if ENTRIES[entry] and not (isinstance(got, tuple) and any(getattr(part, "is_meta", False) for part in got)):
        direct = outcome(operate, isa, number, entry, arguments)
        if isinstance(direct, Exception):
            assert isinstance(got, InputError) or arguments.get("out", 0) is None, (
                f"{about}; the operator: {direct!r:.300}"
            )
        elif not isinstance(got, Exception):
            assert expect == "loose" or useful(entry, got, direct), f"{about}; the operator: {direct!r:.300}"
    if expect in ("valid", "same") and entry != "prepare":
        os.environ["RVQA_BACKEND"] = "reference"
        right = outcome(run, isa, number, entry, arguments)
        if isinstance(got, Exception) or isinstance(right, Exception):
            assert isinstance(got, InputError), f"{about}; the reference: {right!r:.300}"
            assert isinstance(right, InputError), f"{about}; the reference: {right!r:.300}"
        else:
            assert useful(entry, got, right), f"{about}; the reference: {right!r:.300}"
    if isinstance(got, InputError):
        raise got


def useful(entry, got, right):
    """Return whether the meaningful parts are the same; totals of entries that are not counts are not."""
    if entry == "csr_totals" and int(right[1]):
        return int(got[1]) == int(right[1])
    return same(got, right)


@cache
def flags():
    return Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_entry_point(isa, tmp_path, monkeypatch):
    """Each instruction set gets a third of the cases of each entry point."""
    if isa not in ("portable", *(kind[:6] for kind in flags().split())):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("RVQA_ISA", isa)
    survive(call, tmp_path, cases=-(-CASES * len(ENTRIES) // 3))
