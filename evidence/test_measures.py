"""What the measures say where the right value is known."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

from evidence import measures
from test_nalora import (
    batch,
    one_thread,  # noqa: F401
    small_llama,
)


def test_selection_misalignment():
    logit = lambda rho: torch.logit(
        torch.tensor(rho, dtype=torch.float64)
    )  # SiLU: rho = sigmoid(z), so z is chosen by its rho
    base, full = (
        logit([[0.2, 0.5], [0.7, 0.4]]),
        logit([[0.5, 0.5], [0.7, 0.8]]),
    )  # full fine-tuning moves rho by (0.3, 0.4): norm 0.5
    M = measures.selection_misalignment
    assert M(F.silu, full, full, base) == 0
    assert M(F.silu, base, full, base).item() == pytest.approx(1)
    assert M(F.silu, logit([[0.2, 0.5], [0.7, 0.8]]), full, base).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="moved no selection"):
        M(F.silu, full, base, base)
    half = torch.randn(300, 48).bfloat16()
    for measure in (measures.selection_entropy, lambda act, z: M(act, z, 2 * z, z / 2)):
        assert measure(F.silu, half) == measure(F.silu, half.float())


def test_selection_entropy():
    entropy = measures.selection_entropy
    assert entropy(F.silu, torch.ones(3, 8)).item() == pytest.approx(1)
    one_open = torch.full((3, 8), -1000.0)
    one_open[:, 2] = 3
    assert entropy(F.silu, one_open).item() == pytest.approx(0, abs=1e-6)
    two_open = one_open.clone()
    two_open[:, 5] = 3
    assert entropy(F.silu, two_open).item() == pytest.approx(math.log(2) / math.log(8))


def test_selection_measures_on_hand_made_gates():
    act = lambda z: z * z  # its selection weight is rho(z) = z
    z_base, w_base = torch.rand(50, 6) + 1, torch.randn(6, 4)
    shift, other = torch.randn(50, 6), torch.randn(50, 6)
    other -= (
        (other * shift).sum() / (shift * shift).sum() * shift
    )  # orthogonal to full fine-tuning's shift
    other *= shift.norm() / other.norm()
    delta = torch.eye(6, 4)
    full, base = {"ffn": (z_base + shift, w_base + delta, act)}, {"ffn": (z_base, w_base, act)}
    for z, w, misaligned, shift_cosine, weight_cosine in (
        (z_base + shift, w_base + 2 * delta, 0, 1, 1),
        (z_base + shift / 2, w_base - delta, 0.5, 1, -1),
        (z_base + other, w_base + delta.roll(2, 0), 2**0.5, 0, 0),
    ):
        found = measures.selection_measures({"ffn": (z, w, act)}, base, full)
        assert found["misalignment"][0] == pytest.approx(
            measures.selection_misalignment(act, z, z_base + shift, z_base).item(), abs=1e-5
        )
        for column, expected in (
            ("misalignment", misaligned),
            ("shift_cosine", shift_cosine),
            ("weight_cosine", weight_cosine),
            ("k_hat", 2),
        ):
            assert abs(found[column][0] - expected) < 1e-4, column
    assert abs(measures.selection_measures(base, base, full)["misalignment"][0] - 1) < 1e-5
    assert set(measures.selection_measures(base, base, None)) == {"entropy", "k_hat"}


def test_gates_are_those_of_the_answer_tokens():
    model, (tokens, targets) = small_llama().eval(), batch(0)
    targets = targets.clone()
    targets[:, :9] = -100
    name = "model.layers.1.mlp"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: inputs.append(x[0].detach())
    )
    found = measures.answer_gates(model, [(tokens, targets, None), (tokens[:1], targets[:1], None)])
    handle.remove()
    expected = [
        model.get_submodule(name).gate_proj(x[row, t])
        for x in inputs
        for row in range(len(x))
        for t in range(9, 15)
    ]
    torch.testing.assert_close(found[name], torch.stack(expected))
    assert (
        len(measures.answer_gates(model, [(tokens, targets, None)], limit=10)[name]) == 8
    )  # every third of 24
    assert not any(m._forward_hooks for m in model.modules())


def test_best_low_rank_change():
    base, full = small_llama(0), small_llama(1)
    gate = "model.layers.0.mlp.gate_proj"
    delta = full.get_submodule(gate).weight - base.get_submodule(gate).weight
    singular = torch.linalg.svdvals(delta)
    model = measures.truncated(full, base, ["gate_proj"], 3)
    change = model.get_submodule(gate).weight - base.get_submodule(gate).weight
    torch.testing.assert_close(
        (change - delta).norm(), singular[3:].norm()
    )  # Eckart and Young: no rank-3 matrix is nearer
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    assert torch.equal(
        model.get_parameter("model.layers.0.mlp.up_proj.weight"),
        base.get_parameter("model.layers.0.mlp.up_proj.weight"),
    )
    torch.testing.assert_close(
        measures.truncated(full, base, ["gate_proj"], None).get_submodule(gate).weight,
        full.get_submodule(gate).weight,
    )
