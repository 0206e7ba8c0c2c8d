"""Long fits of the tokenizer: the best epoch is kept, a stopped fit continues, several processes agree.

As a program, which a test starts by torchrun, this file is one of two processes that fit the same cells.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file
from scipy import stats

from rvqa.data.alignment import align, map_columns
from rvqa.errors import InputError
from rvqa.io.tensors import read_json
from rvqa.tokenizer.model import CellTokenizer, CellTokenizerConfig
from rvqa.training.distributed import Processes
from rvqa.training.references import read_reference
from rvqa.training.tokenizer import checkpoint as tokenizer_checkpoint
from rvqa.training.tokenizer.cells import gather
from rvqa.training.tokenizer.fit import _set_statistics, fit_tokenizer, select_genes
from rvqa.training.tokenizer.losses import Reconstruction
from rvqa.training.tokenizer.run import Run
from rvqa.training.tokenizer.settings import LIKELIHOODS, TokenizerSettings, preset

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TokenizerSettings(hidden=16, latent=8, levels=3, entries=8, batch_size=40, epochs=6)
"""Of 162 cells: 4 steps an epoch, 24 in all, codebooks from the 13th on."""
HALF, STEPS = 12, 24
PLAIN = TokenizerSettings(
    hidden=16,
    latent=8,
    levels=1,
    entries=8,
    batch_size=5,
    epochs=1,
    thinning=0.0,
    panel_dropout=0.0,
    dropout=0.0,
    label_weight=0.0,
    dead_below=0.0,
    alignment=0.0,
    consistency=0.0,
)
"""Nothing random but the order and the k-means."""
SHARED = replace(TINY, checkpoint_steps=4, dead_below=2.0)
"""For two processes; codewords die."""


def drawn(seed, cells=162):
    """Draw four types of cells over 90 genes, at different depths."""
    shares = np.random.default_rng(0).dirichlet(np.full(90, 0.5), 4)
    rng = np.random.default_rng(seed)
    types = rng.integers(4, size=cells)
    counts = rng.poisson(shares[types] * rng.uniform(300, 3000, cells)[:, None]) + np.eye(cells, 90)
    adata = AnnData(counts.astype(np.float32))
    adata.var_names = [f"GENE{i}" for i in range(90)]
    adata.obs["label"] = [f"type {each}" for each in types]
    return adata


def reference_of(seed, cells=162):
    return read_reference(drawn(seed, cells), name=f"cells {seed}", labels="label")


@pytest.fixture(scope="module")
def cells():
    return [reference_of(1)]


@pytest.fixture(scope="module")
def held_out():
    return [reference_of(2, cells=50)]


def fit(cells, settings=TINY, **options):
    return fit_tokenizer(cells, settings, progress=False, **options)


def same(first, second):
    there, here = first.state_dict(), second.state_dict()
    return [name for name in there if not torch.equal(there[name], here[name])] == [] and there.keys() == here.keys()


@pytest.fixture
def seen(monkeypatch):
    """Weights after every step, of all fits of a test."""
    kept, taken = [], Run._take_step

    def step(run, rows):
        loss = taken(run, rows)
        kept.append({name: tensor.clone() for name, tensor in run.tokenizer.state_dict().items()})
        return loss

    monkeypatch.setattr(Run, "_take_step", step)
    return kept


@pytest.fixture
def as_fitted(monkeypatch):
    """Keep codebooks as the steps left them, because unused codes depend on the machine's arithmetic."""
    monkeypatch.setattr("rvqa.training.tokenizer.fit.fill_codebooks", lambda *_: None)


class Stop(Exception):
    """An exception that ends a fit in the middle."""


def stop_at(monkeypatch, step):
    """Make fits end in the middle of a step, after its draws; return a function that undoes this."""
    loss = Run._loss

    def fails(run, rows, *, quantize):
        value = loss(run, rows, quantize=quantize)
        if run.step == step:
            raise Stop
        return value

    monkeypatch.setattr(Run, "_loss", fails)
    return lambda: monkeypatch.setattr(Run, "_loss", loss)


# Order


def test_the_order_of_cells_depends_on_the_seed_alone(cells, monkeypatch):
    """The order is that of an older version, which drew all permutations first by the same generator."""
    runs = []
    monkeypatch.setattr(Run, "run", lambda run, **_: runs.append(run))
    fit(cells, replace(TINY, max_steps=19, seed=5))
    (run,) = runs
    rng = np.random.default_rng(5)
    expected = [part for _ in range(5) for part in np.array_split(rng.permutation(162), 4)][:18]
    for first in (0, 3, 4, 17):
        given = list(run._batches(first))
        assert len(given) == 18 - first
        assert all(np.array_equal(*pair) for pair in zip(given, expected[first:], strict=True))
    assert run.rng.random() == rng.random()


# Validation


def test_the_weights_of_the_best_epoch_are_kept(cells, held_out, seen, monkeypatch, as_fitted):
    fit(cells)
    plain, losses = seen.copy(), [3.0, 1.0, 2.0]
    monkeypatch.setattr(Run, "validation_loss", lambda *_: losses.pop(0))
    best = fit(cells, validation=held_out)
    assert not losses
    assert len(seen) == 2 * STEPS
    for name, tensor in seen[-1].items():
        assert torch.equal(tensor, plain[-1][name]), name  # the steps equal those without validation
        if name != "dispersion_G":
            assert torch.equal(best.state_dict()[name], plain[HALF + 8 - 1][name]), name


@pytest.mark.parametrize(("patience", "steps"), [(0, STEPS), (1, HALF + 8), (2, STEPS)])
def test_patience_ends_the_fit(cells, held_out, seen, monkeypatch, patience, steps):
    losses = [1.0, 1.0, 0.5]
    monkeypatch.setattr(Run, "validation_loss", lambda *_: losses.pop(0))
    fit(cells, replace(TINY, patience=patience), validation=held_out)
    assert len(seen) == steps


def test_the_validation_loss_is_that_of_decoded_codes(cells, held_out, monkeypatch, as_fitted):
    """The loss is computed again by public functions: encode, decode, and scipy's Poisson."""
    losses, taken = [], Run.validation_loss
    monkeypatch.setattr(Run, "validation_loss", lambda *given: losses.append(taken(*given)) or losses[-1])
    few = [read_reference(drawn(2, 50)[:, 15:].copy(), name="few genes", labels="label")]
    tokenizer = fit(cells, validation=few)
    alignment = align(few[0].var, tokenizer.axis)
    counts = map_columns(few[0].counts, alignment)
    measured, observed = alignment.measured, counts.toarray()
    depth = few[0].at_depth(tokenizer.shares).library_size
    codes = tokenizer.encode(few[0].counts, alignment, depth)
    mean = tokenizer.decode(codes, target_sum=1.0).astype(np.float64) * depth[:, None]
    nll_NG = stats.poisson.logpmf(observed, observed) - stats.poisson.logpmf(observed, mean)
    expected = nll_NG[:, measured].sum(1).mean() * 20 / len(tokenizer.axis)
    assert min(losses) == pytest.approx(expected, rel=1e-4)
    assert 0 < measured.sum() < len(measured)


# Checkpoints


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("step", [5, HALF, HALF + 1, 22])
def test_a_stopped_fit_continues_to_the_same_tokenizer(cells, held_out, tmp_path, monkeypatch, step, likelihood):
    settings = replace(TINY, likelihood=likelihood, checkpoint_steps=3, study_shift=0.1)
    whole = fit(cells, settings, validation=held_out)
    go_on = stop_at(monkeypatch, step)
    with pytest.raises(Stop):
        fit(cells, settings, validation=held_out, checkpoint=tmp_path)
    go_on()
    torch.manual_seed(step)
    assert same(whole, fit(cells, settings, validation=held_out, checkpoint=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_continued_fit_takes_only_the_steps_that_are_left(cells, held_out, tmp_path, seen, monkeypatch):
    go_on = stop_at(monkeypatch, 20)
    settings = replace(TINY, checkpoint_steps=8, patience=1)
    with pytest.raises(Stop):
        fit(cells, settings, checkpoint=tmp_path)
    go_on()
    seen.clear()
    first = fit(cells, replace(settings, checkpoint_steps=100), checkpoint=tmp_path)
    assert len(seen) == STEPS - 16
    assert same(first, fit(cells, settings, checkpoint=tmp_path))
    assert len(seen) == STEPS - 16


def test_an_ended_fit_stays_ended(cells, held_out, tmp_path, seen, monkeypatch):
    monkeypatch.setattr(Run, "validation_loss", lambda *_: 1.0)
    settings = replace(TINY, patience=1)
    first = fit(cells, settings, validation=held_out, checkpoint=tmp_path)
    assert len(seen) == HALF + 8
    assert same(first, fit(cells, settings, validation=held_out, checkpoint=tmp_path))
    assert len(seen) == HALF + 8


def test_a_continued_fit_knows_its_best_epoch(cells, held_out, tmp_path, seen, monkeypatch, as_fitted):
    losses = [1.0, 3.0, 2.0]
    monkeypatch.setattr(Run, "validation_loss", lambda *_: losses.pop(0))
    go_on = stop_at(monkeypatch, HALF + 5)
    settings = replace(TINY, checkpoint_steps=1)
    with pytest.raises(Stop):
        fit(cells, settings, validation=held_out, checkpoint=tmp_path)
    go_on()
    best = fit(cells, settings, validation=held_out, checkpoint=tmp_path)
    assert not losses
    assert torch.equal(best.codebooks_MKD, seen[HALF + 4 - 1]["codebooks_MKD"])


@pytest.mark.parametrize("lost", [".safetensors", ".json"])
def test_a_write_that_fails_leaves_the_state_before(cells, tmp_path, seen, monkeypatch, lost):
    settings, whole, to_disk = replace(TINY, checkpoint_steps=6), fit(cells), tokenizer_checkpoint._to_disk

    def fails(scratch):
        if seen[STEPS + 13 :] and scratch.suffix == lost:
            scratch.write_bytes(b"{")
            raise Stop
        to_disk(scratch)

    monkeypatch.setattr(tokenizer_checkpoint, "_to_disk", fails)
    with pytest.raises(Stop):
        fit(cells, settings, checkpoint=tmp_path)
    monkeypatch.setattr(tokenizer_checkpoint, "_to_disk", to_disk)
    before = len(seen)
    assert same(whole, fit(cells, settings, checkpoint=tmp_path))
    assert len(seen) - before == STEPS - 12


def test_a_checkpoint_of_another_fit_is_refused(cells, held_out, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    with pytest.raises(Stop):
        fit(cells, replace(TINY, checkpoint_steps=1), checkpoint=tmp_path)
    for given, settings, options, message in (
        (cells, replace(TINY, epochs=8), {}, r"settings\.epochs is 6 there, 8 here"),
        (cells, replace(TINY, likelihood="mse"), {}, "settings.likelihood"),
        (held_out, TINY, {}, r"references\[0\]\.name is 'cells 1' there, 'cells 2' here"),
        (cells, TINY, {"validation": held_out}, "validation has 0 entries there, 1 here"),
        ([reference_of(1, cells=150)], TINY, {}, r"cells is 162 there, 150 here.*Remove that folder, or give another"),
        ([replace(cells[0], label_N=cells[0].label_N[::-1])], TINY, {}, r"references\[0\]\.labels"),
        ([replace(cells[0], total_N=cells[0].library_size + 1, given=True)], TINY, {}, r"references\[0\]\.counts"),
    ):
        with pytest.raises(InputError, match=message):
            fit(given, settings, checkpoint=tmp_path, **options)


def test_a_damaged_checkpoint_or_a_file_is_refused(cells, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        fit(cells, checkpoint=tmp_path / "file")
    folder = tmp_path / "new" / "folder"
    fit(cells, checkpoint=folder)
    (tensors,) = folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        fit(cells, checkpoint=folder)
    (folder / "checkpoint.json").write_text("[]")
    with pytest.raises(InputError, match="expected an object"):
        fit(cells, checkpoint=folder)


# Likelihoods


@pytest.fixture(scope="module")
def decoded():
    """Draw counts [B, G], library sizes [B] and log shares [B, G], from 0 to large values."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(40, 0.2), 6)
    library = np.array([1.0, 50, 500, 5e3, 5e4, 1e6])
    counts = rng.poisson(share * library[:, None] * rng.uniform(0.2, 3.0, (6, 40)))
    log_share = torch.from_numpy(np.log(share)).float().clamp(-30, 0)
    return torch.from_numpy(counts).float(), torch.from_numpy(library).float(), log_share


def per_cell(likelihood, decoded, *, log_dispersion=None, measured=None):
    loss = Reconstruction(likelihood, torch.linspace(0.1, 2.0, 40))
    if log_dispersion is not None:
        with torch.no_grad():
            loss.log_dispersion_G.copy_(torch.as_tensor(log_dispersion))
    return loss, loss(*decoded, torch.ones(6, 40, dtype=torch.bool) if measured is None else measured)


def test_likelihoods_are_those_of_scipy(decoded):
    c, library, log_share = (each.double().numpy() for each in decoded)
    mean = library[:, None] * np.exp(log_share)
    best = stats.poisson.logpmf(c, c)
    _, loss = per_cell("poisson", decoded)
    np.testing.assert_allclose(loss, (best - stats.poisson.logpmf(c, mean)).sum(1), rtol=2e-4)
    a = np.exp(np.linspace(-6.0, 3.0, 40))
    _, loss = per_cell("negative_binomial", decoded, log_dispersion=np.log(a))
    expected = (best - stats.nbinom.logpmf(c, 1 / a, 1 / (1 + a * mean))).sum(1)
    np.testing.assert_allclose(loss.detach(), expected, rtol=2e-3, atol=2e-3)
    _, loss = per_cell("mse", decoded)
    difference = np.log1p(1e4 * np.exp(log_share)) - np.log1p(1e4 * c / library[:, None])
    np.testing.assert_allclose(loss, 0.5 * ((difference / np.linspace(0.1, 2.0, 40)) ** 2).sum(1), rtol=1e-4)


def test_a_negative_binomial_without_dispersion_is_a_poisson(decoded):
    few = tuple(each[:4] for each in decoded)
    every = torch.ones(4, 40, dtype=torch.bool)
    _, poisson = per_cell("poisson", few, measured=every)
    _, binomial = per_cell("negative_binomial", few, log_dispersion=-50.0, measured=every)  # held at its floor
    np.testing.assert_allclose(binomial.detach(), poisson, rtol=0.02, atol=1e-3)


def test_the_dispersion_is_learned_from_the_spread():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(stats.nbinom.rvs(2.0, 2.0 / (2.0 + 30.0), size=(4000, 1), random_state=rng)).float()
    loss = Reconstruction("negative_binomial", torch.ones(1))
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        loss(counts, torch.full((4000,), 30.0), torch.zeros(4000, 1), torch.ones(4000, 1)).mean().backward()
        optimiser.step()
    assert loss.log_dispersion_G.exp().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_losses_are_finite_and_leave_out_unmeasured_genes(decoded, likelihood):
    counts, library, log_share = decoded
    measured = torch.ones(6, 40, dtype=torch.bool)
    measured[:, 3] = False
    log_share = log_share.clone().requires_grad_()
    loss, per = per_cell(likelihood, (counts, library, log_share), measured=measured)
    per.sum().backward()
    assert torch.isfinite(per).all()
    assert torch.isfinite(log_share.grad).all()
    assert (log_share.grad[:, 3] == 0).all()
    assert (log_share.grad[:, :3] != 0).any()
    for parameter in loss.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad[3] == 0


def test_likelihoods_give_different_tokenizers_and_dispersions_by_moments(cells):
    fitted = [fit(cells, replace(TINY, likelihood=each)) for each in LIKELIHOODS]
    for i, tokenizer in enumerate(fitted):
        assert (tokenizer.dispersion_G > 0).any()
        assert not same(tokenizer, fitted[i - 1])
        assert tokenizer.state_dict().keys() == fitted[0].state_dict().keys()


# Settings


def test_presets_and_settings():
    assert preset("small") == TokenizerSettings()
    atlas = preset("atlas")
    assert (atlas.n_top_genes, atlas.hidden, atlas.latent, atlas.batch_size) == (36_000, 256, 64, 2048)
    assert (atlas.max_steps, atlas.epochs) == (200_000, 20)
    with pytest.raises(InputError, match=r"'large'.*small, atlas"):
        preset("large")
    with pytest.raises(InputError, match=r"'gauss'.*poisson, negative_binomial, mse"):
        TokenizerSettings(likelihood="gauss")
    with pytest.raises(InputError, match="patience is -1"):
        TokenizerSettings(patience=-1)
    with pytest.raises(InputError, match="checkpoint_steps is 0"):
        TokenizerSettings(checkpoint_steps=0)


def test_an_unknown_device_is_refused(cells):
    with pytest.raises(InputError, match="'gpu' cannot be used here"):
        fit(cells, device="gpu")


# Several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the results of two processes."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def two(folder):
    """Tensors of both processes, by name of the fit and rank."""
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def in_two_processes(out, patch):
    cells, validated = [reference_of(1)], {"validation": [reference_of(2, cells=51)]}
    losses, taken = [], Run.validation_loss
    patch.setattr(Run, "validation_loss", lambda *given: losses.append(taken(*given)) or losses[-1])

    def keep(name, tokenizer):
        rank = torch.distributed.get_rank()
        tensors = tokenizer.state_dict() | {"losses": torch.tensor(losses, dtype=torch.float64)}
        save_file(tensors, out / f"{name}-{rank}.safetensors")
        losses.clear()

    keep("whole", fit(cells, SHARED, **validated))
    with pytest.MonkeyPatch.context() as only:
        only.setattr("rvqa.training.tokenizer.fit.fill_codebooks", lambda *_: None)
        keep("plain", fit(cells, PLAIN, **validated))
    run = Run.run

    def ends_badly(self, **options):
        run(self, **options)
        self.tokenizer.codebooks_MKD[:, 2:] += 1e3

    with pytest.MonkeyPatch.context() as only:
        only.setattr(Run, "run", ends_badly)
        keep("filled", fit(cells))
    keep("stored", fit(cells, SHARED, scratch=out / "scratch", **validated))
    go_on = stop_at(patch, HALF + 3)
    with pytest.raises(Stop):
        fit(cells, SHARED, checkpoint=out / "checkpoint", **validated)
    go_on()
    keep("continued", fit(cells, SHARED, checkpoint=out / "checkpoint", **validated))
    with pytest.raises(InputError, match="Process 1 was given other"):
        fit(cells, replace(TINY, seed=torch.distributed.get_rank()))
    with pytest.raises(InputError, match="too small for 2 processes"):
        fit(cells, replace(TINY, batch_size=3))


@pytest.mark.parametrize("name", ["whole", "plain", "filled", "stored", "continued"])
def test_two_processes_end_with_the_same_tokenizer(two, name):
    for key, tensor in two[f"{name}-0"].items():
        assert torch.equal(tensor, two[f"{name}-1"][key]), key


def test_two_processes_continue_to_the_same_tokenizer(two):
    for key, tensor in two["whole-0"].items():
        assert torch.equal(tensor, two["continued-0"][key]), key


def test_two_processes_read_one_copy_of_cells_on_disk(two, folder):
    for key, tensor in two["whole-0"].items():
        assert torch.equal(tensor, two["stored-0"][key]), key
    assert sorted(path.name for path in (folder / "scratch").iterdir()) == ["fit", "validation"]


def test_two_processes_take_the_steps_of_one(two, cells, monkeypatch, as_fitted):
    """Without randomness, averaged gradients and codebooks equal those of whole batches up to rounding."""
    losses, taken = [], Run.validation_loss
    monkeypatch.setattr(Run, "validation_loss", lambda *given: losses.append(taken(*given)) or losses[-1])
    alone = fit(cells, PLAIN, validation=[reference_of(2, cells=51)]).state_dict()
    alone["losses"] = torch.tensor(losses, dtype=torch.float64)
    for name, tensor in two["plain-0"].items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_draw_their_own_augmentation(two, folder):
    index = read_json(folder / "checkpoint" / "checkpoint.json")
    tensors = load_file(folder / "checkpoint" / index["tensors"])
    assert index["values"]["random"][0] != index["values"]["random"][1]
    assert not torch.equal(tensors["random.cpu.0"], tensors["random.cpu.1"])


def test_two_processes_leave_no_code_unused(two, cells):
    """The test moves six of eight codewords of each level away after the last step of this fit."""
    tokenizer = fit(cells)
    tokenizer.load_state_dict({name: tensor for name, tensor in two["filled-0"].items() if name != "losses"})
    codes = tokenizer.encode(cells[0].counts, align(cells[0].var, tokenizer.axis), cells[0].library_size)
    assert [len(np.unique(codes[:, level])) for level in range(3)] == [8, 8, 8]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        in_two_processes(Path(sys.argv[1]), patch)


def test_without_codebooks_the_latent_is_trained_alone():
    """With `quantize=False` the same cells give other latents, and the end result has codebooks that fit them."""
    cells = reference_of(1)
    alone, together = (fit_tokenizer([cells], replace(TINY, quantize=each), progress=False) for each in (False, True))
    assert not torch.equal(alone.project.weight, together.project.weight)
    alignment = align(cells.var, alone.axis)
    latent = alone.latent(cells.counts, alignment, cells.library_size)
    codes = alone.quantize(latent)
    assert [len(np.unique(codes[:, level])) for level in range(3)] == [8, 8, 8]
    error = ((latent.numpy() - alone.quantized_latent(codes)) ** 2).sum()
    assert error < 0.5 * ((latent - latent.mean(0)) ** 2).sum()


def test_offsets_of_a_study_are_learned_and_left_behind():
    """One file detects some genes twice as often: its offsets learn this, and the tokenizer drops them."""
    plain, other = reference_of(1), reference_of(2)
    factor = np.where(np.arange(90) % 2, 2.0, 1.0)
    thinned = np.random.default_rng(0).binomial(other.counts.toarray().astype(int), factor / 2)
    other = replace(other, counts=sp.csr_matrix(thinned, dtype=np.float32), total_N=thinned.sum(1).astype(float))
    tokenizer, run = fitted_run([plain, other], replace(TINY, study_shift=0.01, epochs=60, label_weight=0.0))
    learned_G = (run.shift_FG[1] - run.shift_FG[0]).detach().numpy()
    columns = [int(name.removeprefix("GENE")) for name in tokenizer.axis.symbols]
    assert np.corrcoef(learned_G, np.log(factor[columns]))[0, 1] > 0.8
    assert not any("shift" in name for name in tokenizer.state_dict())


def fitted_run(references, settings):
    """Return a tokenizer and the run that fitted it."""
    axis = select_genes(references, settings.n_top_genes)
    cells = gather(references, axis)
    torch.manual_seed(0)
    sizes = (settings.hidden, settings.latent, settings.levels, settings.entries, settings.dropout)
    tokenizer = CellTokenizer(axis, CellTokenizerConfig(*sizes))
    _set_statistics(tokenizer, cells, settings)
    run = Run(tokenizer, cells, settings, validation=None, processes=Processes("cpu"))
    run.run(progress=False, checkpoint=None)
    return tokenizer.eval(), run
