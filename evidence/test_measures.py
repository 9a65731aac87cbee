"""What the measures say where the right value is known."""
import math

import pytest
import torch
import torch.nn.functional as F

from evidence import measures
from evidence.conftest import batch, small_llama

close = torch.testing.assert_close

def gates_of(rho):
    """Gates whose selection weights are rho, for SiLU: rho = sigmoid(z)."""
    return torch.logit(torch.tensor(rho, dtype=torch.float64))

def test_selection_misalignment():
    base = gates_of([[0.2, 0.5], [0.7, 0.4]])
    full = gates_of([[0.5, 0.5], [0.7, 0.8]])  # rho moves by (0.3, 0.4): norm 0.5
    halfway = gates_of([[0.2, 0.5], [0.7, 0.8]])
    M = measures.selection_misalignment
    assert M(F.silu, full, full, base) == 0
    assert M(F.silu, base, full, base).item() == pytest.approx(1)
    assert M(F.silu, halfway, full, base).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="moved no selection"):
        M(F.silu, full, base, base)

def test_no_measure_is_taken_in_half_precision():
    half = torch.randn(300, 48).bfloat16()
    whole = half.float()
    M = measures.selection_misalignment
    assert M(F.silu, half, 2 * half, half / 2) == M(F.silu, whole, 2 * whole, whole / 2)
    assert measures.selection_entropy(F.silu, half) == measures.selection_entropy(F.silu, whole)

def test_selection_entropy():
    entropy = measures.selection_entropy
    assert entropy(F.silu, torch.ones(3, 8)).item() == pytest.approx(1)
    one_open = torch.full((3, 8), -1000.0)
    one_open[:, 2] = 3
    assert entropy(F.silu, one_open).item() == pytest.approx(0, abs=1e-6)
    two_open = one_open.clone()
    two_open[:, 5] = 3
    assert entropy(F.silu, two_open).item() == pytest.approx(math.log(2) / math.log(8))

def square(z):
    """An activation whose selection weight is rho(z) = z."""
    return z * z

def test_selection_measures_on_hand_made_gates():
    z_base = torch.rand(50, 6) + 1
    w_base = torch.randn(6, 4)
    shift, other = torch.randn(2, 50, 6)
    other -= (other * shift).sum() / (shift * shift).sum() * shift  # orthogonal to the shift
    other *= shift.norm() / other.norm()
    delta = torch.eye(6, 4)
    full = {"ffn": (z_base + shift, w_base + delta, square)}
    base = {"ffn": (z_base, w_base, square)}
    for z, w, misaligned, shift_cosine, weight_cosine in [
            (z_base + shift, w_base + 2 * delta, 0, 1, 1),
            (z_base + shift / 2, w_base - delta, 0.5, 1, -1),
            (z_base + other, w_base + delta.roll(2, 0), 2**0.5, 0, 0)]:
        found = measures.selection_measures({"ffn": (z, w, square)}, base, full)
        M = measures.selection_misalignment(square, z, z_base + shift, z_base)
        assert found["misalignment"][0] == pytest.approx(M.item(), abs=1e-5)
        expected = {"misalignment": misaligned, "shift_cosine": shift_cosine,
                    "weight_cosine": weight_cosine, "k_hat": 2}
        for column, value in expected.items():
            assert abs(found[column][0] - value) < 1e-4, column
    assert abs(measures.selection_measures(base, base, full)["misalignment"][0] - 1) < 1e-5
    assert set(measures.selection_measures(base, base, None)) == {"entropy", "k_hat"}

def test_gates_are_those_of_the_answer_tokens():
    model = small_llama().eval()
    tokens, targets = batch(0)
    targets = targets.clone()
    targets[:, :9] = -100
    name = "model.layers.1.mlp"
    ffn = model.get_submodule(name)
    inputs = []

    def keep(module, x):
        inputs.append(x[0].detach())

    handle = ffn.register_forward_pre_hook(keep)
    found = measures.answer_gates(model, [(tokens, targets, None), (tokens[:1], targets[:1], None)])
    handle.remove()
    expected = [ffn.gate_proj(x[row, t]) for x in inputs for row in range(len(x))
                for t in range(9, 15)]
    close(found[name], torch.stack(expected))
    few = measures.answer_gates(model, [(tokens, targets, None)], limit=10)
    assert len(few[name]) == 8  # every third of 24

def test_text_that_the_base_writes():
    """One token at a time with a cache, drawn as from the whole text at once."""
    model = small_llama().eval()
    start = batch(0, (3, 4))[0]
    found = measures.written(model, start, 12)
    generator = torch.Generator().manual_seed(0)
    expected = start
    for _ in range(12):
        odds = model(expected)[0][:, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(odds, 1, generator=generator)], 1)
    assert torch.equal(found, expected)

def test_best_low_rank_change():
    base = small_llama(0)
    full = small_llama(1)
    gate = "model.layers.0.mlp.gate_proj"
    delta = full.get_submodule(gate).weight - base.get_submodule(gate).weight
    model = measures.truncated(full, base, ["gate_proj"], 3)
    change = model.get_submodule(gate).weight - base.get_submodule(gate).weight
    missed = torch.linalg.svdvals(delta)[3:].norm()  # Eckart and Young: no rank 3 is nearer
    close((change - delta).norm(), missed)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(up), base.get_parameter(up))
    whole = measures.truncated(full, base, ["gate_proj"], None)
    close(whole.get_submodule(gate).weight, full.get_submodule(gate).weight)
