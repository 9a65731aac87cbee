"""The executable specification of nalora.py and train_tiny.py, in their order. Run: pytest test_nalora.py. Offline, CPU."""
import copy
import functools
import gc
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
import warnings
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import nalora
import train_tiny
from nalora import (ACTIVATIONS, GateSums, Llama, LlamaConfig, LoRALinear, NALoRA, NALoRAConfig, State, correct, decide, effective_homogeneity,
                    homogeneity, importance_mask, inject_lora, load_adapter, lora_parameters, merge_lora, observe, save_adapter, selection_weight,
                    step_scale, value_and_slope)


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
    def regime(z, act=F.silu):
        sums = observe(act, z.reshape(1, -1), torch.ones(1))
        return sums.k_hat(), sums.positive / (sums.tokens * z.numel())

    k_hat, occupancy = regime(torch.tensor([-2.0, -1.0, 1.0, 3.0]))
    assert occupancy == 0.5 and step_scale(k_hat, occupancy).item() == pytest.approx(1 / k_hat.item()) != 1
    assert step_scale(*regime(torch.arange(1.0, 100))) == step_scale(*regime(-torch.arange(1.0, 100))) == 1
    for act, moves in [(act, name != "relu") for name, act in ACTIVATIONS.items()] + [(lambda z: 2 * z, False), (lambda z: F.leaky_relu(z), False)]:
        assert (step_scale(*regime(torch.linspace(-3, 5, 200), act)) != 1) == moves       # rho' = 0: k_hat is exactly 1
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


@pytest.mark.parametrize("config", [NALoRAConfig(keep=1, scale="none"), NALoRAConfig(mask="none", scale="none")])
def test_switched_off_it_is_lora_bit_for_bit(config):
    plain, tool = start(weight_decay=0.1), start(config, weight_decay=0.1)
    for i in range(20):
        assert take_step(*plain[:2], i) == take_step(*tool[:2], i)
    assert equal(snapshot(plain[0]), snapshot(tool[0]))


def test_what_is_off_hooks_nothing():
    count = lambda config: len(start(config)[2]._handles)
    assert count(NALoRAConfig(mask="none", scale="none")) == 0
    assert count(NALoRAConfig()) == 7  # two gates, the step twice, a parameter's backward, the optimizer's state twice


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


@pytest.mark.parametrize("mask", ["none", "derivative"])
def test_the_step_of_every_ffn_pair_is_scaled(mask):
    plain, tool = start(), start(NALoRAConfig(mask=mask))
    before = snapshot(plain[0])
    take_step(*plain[:2], 0), take_step(*tool[:2], 0)
    stepped, now, statistics = snapshot(plain[0]), snapshot(tool[0]), tool[2].statistics()
    for name in now:
        s = statistics[name.rsplit(".", 2)[0]]
        rows = s["mask"][:, None] if name.endswith("gate_proj.lora_B") else 1
        torch.testing.assert_close(now[name], before[name] + s["scale"] * rows * (stepped[name] - before[name]))
    scales = [s["scale"] for s in statistics.values()]
    assert scales[0] != scales[1] != 1


@pytest.mark.parametrize("stride", [1, 7])
def test_microbatches_equal_one_batch(stride):
    (model, opt, whole), (model_m, opt_m, parts) = (start(NALoRAConfig(stride=stride)) for _ in range(2))
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


@pytest.mark.parametrize("config", [NALoRAConfig(), NALoRAConfig(mask="none"), NALoRAConfig(scale="none")])
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
    mask, scale = rng.choice(["derivative", "none"]), rng.choice(["homogeneity", "none"])
    settings = NALoRAConfig(mask=mask, keep=rng.uniform(0.01, 1), scale=scale, ema=rng.choice([0, 0.9]), stride=rng.choice([1, 2, 17, 1000]))
    random_run(rng, model, config["vocab_size"], settings, NALoRA)


def random_run(rng, model, vocabulary, settings, steer):
    """Four random steps of a model that steer(model, optimizer, settings) steers: what must hold always."""
    mask = settings.mask
    model, opt, _ = start(None, model, rng.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]))
    tool = steer(model, opt, settings)
    pairs = [(layer.lora_A, layer.lora_B) for layer in nalora.lora_layers(model).values()]
    frozen = [(p, p.detach().clone()) for pair in pairs[1:] for p in pair if rng.random() < 0.3]    # of FFNs, too; one pair trains
    for p, _ in frozen:
        p.requires_grad_(False)
    for step in range(4):
        tokens, targets = batch(step, (rng.choice([1, 1, 3]), rng.choice([1, 2, 9])), vocabulary)
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


def test_no_sum_is_taken_in_half_precision():
    """Neither under autocast, as when one microbatch is summed up in the forward pass of the next, nor of gates that are half themselves."""
    torch.manual_seed(0)
    z, ones = torch.randn(2, 300, 48), torch.ones(2, 300)
    with torch.autocast("cpu", torch.bfloat16):
        sums = observe(F.silu, z, ones)
    assert all(map(torch.equal, sums, observe(F.silu, z, ones)))
    half = z.bfloat16()
    assert all(map(torch.equal, observe(F.silu, half, ones), observe(F.silu, half.float(), ones)))


def test_padding_may_hold_anything():
    z, weight = torch.randn(9, 48), torch.tensor([1] * 5 + [0] * 4)
    expected = observe(F.silu, z[:5], torch.ones(5))
    z[5:] = math.nan
    for found, right in zip(observe(F.silu, z, weight), expected):
        torch.testing.assert_close(found, right)


def test_a_pass_with_an_infinite_sum_adds_nothing():
    z = torch.randn(3, 9, 48)
    z[1, 4, 7] = math.inf
    sums = observe(F.silu, z, torch.ones(3, 9))
    assert all((total[1] == 0).all() and (total[0] != 0).any() for total in sums)


def test_the_pure_core_takes_any_leading_dimensions_and_sums_add_up():
    z, weight = torch.randn(2, 3, 8, 20), (torch.rand(2, 3, 8) < 0.7).float()
    weight[0, 0] = 0  # an FFN that saw nothing keeps its state
    whole = observe(F.silu, z, weight)
    halves = observe(F.silu, z[..., :4, :], weight[..., :4]) + observe(F.silu, z[..., 4:, :], weight[..., 4:])
    for found, right in zip(halves, whole):
        torch.testing.assert_close(found, right)
    state = State(torch.rand(2, 3, 20), torch.rand(2, 3, 20) < 0.5, *torch.rand(3, 2, 3))
    config = NALoRAConfig(keep=0.3, ema=0.4)
    new = decide(state, whole, config)
    assert all(torch.equal(now[0, 0], before[0, 0]) for now, before in zip(new, state))
    for i, j in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        alone = decide(State(*(t[i, j] for t in state)), GateSums(*(t[i, j] for t in whole)), config)
        assert all(map(torch.equal, alone, (t[i, j] for t in new)))
        seen = z[i, j][weight[i, j] > 0]
        score = value_and_slope(F.silu, seen)[1].abs().mean(0)
        torch.testing.assert_close(alone.importance, 0.6 * score + 0.4 * state.importance[i, j])
        assert alone.mask.sum() == 6 and alone.importance[alone.mask].min() >= alone.importance[~alone.mask].max()
        torch.testing.assert_close(alone.k_hat, effective_homogeneity(F.silu, seen))
        assert alone.occupancy.item() == pytest.approx((seen > 0).float().mean().item())
        assert alone.scale.item() == pytest.approx(1 / min(max(alone.k_hat.item(), 0.5), 2))


def test_correct_is_exact_at_both_ends_and_goes_beyond():
    before, after = torch.randn(2, 6, 3)
    factor = torch.tensor([0, 1, 0.3, 0.7, 2, -1])[:, None]
    found = correct(before, after, factor)
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], after[1])
    torch.testing.assert_close(found, before + factor * (after - before))


def test_ffns_of_different_width_and_activation_are_steered_side_by_side():
    """Each as if it were alone, though those that are alike stand stacked; also those that a pass leaves out."""
    class FFN(nn.Module):
        def __init__(self, width, act):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8)
            self.act_fn = act

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Swish(nn.Module):
        def __init__(self, beta):
            super().__init__()
            self.beta = beta                                        # a number, or a tensor, whose repr is rounded

        def forward(self, z):
            return z * torch.sigmoid(self.beta * z)

    def run(chosen):
        torch.manual_seed(0)
        ffns = [FFN(12, F.silu), FFN(20, F.silu), FFN(12, F.gelu), FFN(12, F.silu), FFN(12, Swish(0.7)), FFN(12, Swish(2.0)), FFN(12, Swish(0.7)),
                FFN(12, Swish(torch.tensor(0.5))), FFN(12, Swish(torch.tensor(0.50001)))]
        model = nn.ModuleList(ffns)
        inject_lora(model, ["gate_proj", "up_proj", "down_proj"], rank=2)
        start(None, model)
        model = nn.ModuleDict({str(i): ffns[i] for i in chosen})
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        for step in range(3):
            for i in chosen:
                x = torch.randn(5 + i, 8, generator=torch.Generator().manual_seed(10 * step + i))
                if (step, i) != (1, 3):
                    model[str(i)](x).square().sum().backward()
            opt.step(), opt.zero_grad()
        return len(tool._stacks), tool.statistics()

    stacks, together = run(range(9))
    assert stacks == 7
    for i in range(9):
        for key, value in run([i])[1][str(i)].items():
            torch.testing.assert_close(torch.as_tensor(together[str(i)][key]), torch.as_tensor(value), msg=f"{key} of {i}")


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


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indices = [i for i in args[1] if i is not None] if "aten.index." in name or "index_put" in name else []
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")) or any(i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing():
    model, opt, tool = start(NALoRAConfig(stride=1))
    tokens, targets = batch(0)
    tool.token_mask = torch.ones_like(tokens)
    for i in range(4):
        take_step(model, opt, i)  # NALoRA asks at passes 1, 2, 4, 8, 16, ... whether something else moved the rows; the next is 5
    for _ in range(1):
        with Waits() as waits:
            model(tokens)[0].sum().backward()
            model(tokens)[0].sum().backward()
            tool._before_step(opt, (), {})                          # alone, since AdamW reads its count of steps, which stands on the CPU
            tool._after_step(opt, (), {})
        assert waits.found == []
        opt.zero_grad()
    with Waits() as waits:
        next(iter(tool.statistics().values()))
    assert waits.found  # it can fail


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
    torch.distributed.barrier()
    os._exit(0)                                                     # gloo's threads can abort an interpreter that shuts down


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


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_it_warns_when_the_optimizer_it_was_given_is_not_the_one_that_steps(other, fused):
    model, opt, tool = start(NALoRAConfig())
    other = other(lora_parameters(model), lr=0.1, fused=fused)
    take_step(model, other, 0)
    with pytest.warns(UserWarning, match="Something else moved the LoRA parameters"):
        take_step(model, other, 1)
    model, opt, tool = start(NALoRAConfig())
    for i in range(6):
        take_step(model, opt, i)
    other = type(other)(lora_parameters(model), lr=0.1, fused=fused)
    with pytest.warns(UserWarning, match="Something else moved the LoRA parameters"):
        for i in range(6, 16):
            take_step(model, other, i)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(16, 40):
            take_step(model, opt, i)
        tool.remove()
        take_step(model, other, 40)


def test_a_forgotten_nalora_is_freed():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    held = [weakref.ref(x) for x in (tool, tool._watch, opt, lora_parameters(model)[0])]
    del model, opt, tool
    gc.collect()
    assert [x() for x in held] == [None] * 4


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
    lora_parameters(model)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        NALoRA(model, opt)
    lora_parameters(model)[1].requires_grad_(True)
    first = NALoRA(model, opt)
    with pytest.raises(ValueError, match="steered by another NALoRA"):
        NALoRA(model, opt)
    first.remove()
    NALoRA(model, opt).remove()
    sigmoid = lora_llama()
    sigmoid.model.layers[1].mlp.act_fn = torch.sigmoid
    with pytest.raises(ValueError, match="not self-gated"):
        NALoRA(sigmoid, torch.optim.AdamW(lora_parameters(sigmoid)))
    assert not any(m._forward_hooks for m in model.modules())


def test_flattened_parameters_are_refused():
    model = lora_llama()
    opt = torch.optim.AdamW(lora_parameters(model))
    for p in lora_parameters(model):
        p.data = p.data.flatten()[:0]  # as ZeRO-3 and FSDP1 leave them on other ranks
    with pytest.raises(ValueError, match="use FSDP2's fully_shard"):
        NALoRA(model, opt)


@pytest.mark.parametrize("setting, message", [({"keep": 0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5"), ({"keep": "0.5"}, "keep is '0.5'"), ({"keep": math.nan}, "keep is nan"),
                                              ({"ema": 1.0}, "ema is 1.0"), ({"ema": "x"}, "ema is 'x'"), ({"stride": True}, "stride is True"), ({"mask": "top"}, "mask is 'top'"), ({"scale": None}, "scale is None"), ({"stride": 0}, "stride is 0")])
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


def oracle_decide(c, gates, stats):
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
    oracle_decide(c, gates, stats)
    for name, g in grads.items():
        s, step = stats[name[0]], adamw_step(w[name], g, moments[name], t)
        if name.endswith("gate_proj.lora_B"):
            rows = s["mask"].astype(float)
            step *= (rows / rows.mean() if c["budget"] == "neutral" else rows)[:, None]
        w[name] += s["scale"] * step


@pytest.mark.parametrize("changes, bias, scales", [
    ({}, 0, []), ({"mask": "none"}, 0, []), ({"scale": "none"}, 0, [1]), ({}, -20, [1]), ({}, -1.3, [1, 2])])
def test_nalora_agrees_with_the_oracle(changes, bias, scales):
    """bias shifts FFN 0's gates: -20 leaves no two regimes; -1.3 does at times and has k_hat < 1/2 at others (`scales`)."""
    agrees_with_the_oracle(lambda model, optimizer: NALoRA(model, optimizer, NALoRAConfig(stride=1, **changes)), changes, bias, scales)


def agrees_with_the_oracle(steer, changes, bias, scales):
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
    tool = steer(model, optimizer)
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
    assert torch.equal(model.generate(tokens, 5, temperature=1e-3), model.generate(tokens, 5))
    draw = lambda seed, **kw: model.generate(tokens, 20, temperature=2.0, generator=torch.Generator().manual_seed(seed), **kw)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    first = model.generate(tokens, 1)[:, -1]
    out = model.generate(tokens, 20, stop=first[0].item())
    row = out[0, 7:]
    assert (row == first[0]).all()
    assert torch.equal(model.generate(tokens[:1], 20, stop=first[0].item())[0, 7:], first[:1])
    with pytest.raises(ValueError, match="exceed the context of 64"):
        model.generate(tokens, 59)
    with pytest.raises(ValueError, match="65 tokens exceed the context"):
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
def test_checkpoint_round_trip(tmp_path, tied):
    model, (tokens, _) = small_llama(tie_word_embeddings=tied), batch(0)
    model.save_pretrained(tmp_path / "whole")
    again = Llama.from_pretrained(tmp_path / "whole")
    assert again.config == model.config and equal(model.state_dict(), again.state_dict())
    assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", "model.safetensors"]
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied


def test_config_reads_both_rope_spellings():
    d = {**asdict(SMALL), "model_type": "llama", "torch_dtype": "float32", "eos_token_id": [3, 7], "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False}
    assert LlamaConfig.from_dict(d) == replace(SMALL, rope_theta=5e5, eos_token_id=[3, 7])
    del d["rope_theta"]
    assert LlamaConfig.from_dict({**d, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}) == replace(SMALL, rope_theta=7e5, eos_token_id=[3, 7])


@pytest.mark.parametrize("change, named", [({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 512}, "sliding_window"),
                                           ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type = 'llama3'"), ({"model_type": "gemma"}, "model_type"),
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
    with pytest.raises(ValueError, match=f"{next(iter(change))}|rope_type|The config lacks"):
        Llama.from_pretrained(tmp_path)


def test_a_config_far_larger_than_the_weights_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**24}))
    monkeypatch.setattr(Llama, "to", None)                          # nothing is built but on the meta device
    with pytest.raises(ValueError, match="do not fit its config.json"):
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
    with pytest.raises(ValueError, match=r"do not fit its config.json\S* see .*model.layers.2"):
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
    (lambda d, c, m: (d / "nalora.json").write_text('{"base": null}'), "norms"),
    (lambda d, c, m: (d / "nalora.json").write_text('{"base": {"x": "1"}}'), "norms"),
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
    nalora.write_files(tmp_path, {"file.json": {"a": 1}})
    with pytest.raises(ValueError, match="file.json cannot hold that"):
        nalora.write_files(tmp_path, {"other.json": {"b": 2}, "file.json": {"a": object()}})
    assert json.loads(target.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["file.json"]


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
    unnumbered = {split: [{k: v for k, v in p.items() if k != "line"} for p in SPLITS[split]] for split in SPLITS}
    assert make_data.split_problems() == unnumbered
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
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("summary.json", "checkpoint.pt") and not p.name.startswith(".tmp")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="session")
def uninterrupted(base, tmp_path_factory):
    """uninterrupted(method): what a run without interruptions leaves behind."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def of(method):
        assert train_tiny.main(arguments(base, folder / method, method)) == 0
        return result(folder / method)

    return of


@pytest.mark.parametrize("method", train_tiny.METHODS)
def test_every_method_runs_and_reports(base, tmp_path, capsys, method):
    assert train_tiny.main(arguments(base, tmp_path / "run", method)) == 0
    out, summary = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == method and math.isfinite(summary["val_loss"])
    assert {"seed", "trainable_parameters", "total_parameters", "step_ms", "train_seconds", "wall_seconds"} <= set(summary)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 2, 4, 6] and all(math.isfinite(r["loss"]) for r in records[1:])
    assert "s left" in out and "parameters train" in out and (tmp_path / "run" / "loss.png").exists()
    assert 0 <= summary["test_exact_match"] <= 1 and f"{method}: exact match" in out and len(re.findall(r"\[(?:right|wrong)", out)) == 3
    if method.startswith("nalora"):  # NA-LoRA is seen at work
        assert re.search(r"k_hat \d\.\d\d to \d\.\d\d  scale \d\.\d\d to \d\.\d\d  rows " + ("100%" if method == "nalora-scale" else "50%"), out)
    if method == "pretrain":
        Llama.from_pretrained(tmp_path / "run" / "model")
    assert any((tmp_path / "run" / "adapter").glob("*.safetensors")) == (method not in ("pretrain", "full"))
    assert (tmp_path / "run" / "nalora.png").exists() == ("layers" in records[1]) == method.startswith("nalora")
    assert train_tiny.main(["--sample", "Ann has 3 apples.", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("Ann has 3 apples.\n")


def test_method_all_prints_one_table(base, tmp_path, capsys):
    assert train_tiny.main(arguments(base, tmp_path / "all", "all", "--keep", "0.25")) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{m} +\d", out, re.M) for m in ("full", "lora", "nalora"))
    assert json.loads((tmp_path / "all" / "nalora" / "config.json").read_text())["keep"] == 0.25


def test_methods_are_what_they_are_called():
    for method, mask, scale in (("nalora", "derivative", "homogeneity"), ("nalora-mask", "derivative", "none"), ("nalora-scale", "none", "homogeneity")):
        optimizer = train_tiny.METHODS[method](small_llama(), train_tiny.Config(keep=0.25, ema=0.5, stride=3))
        assert optimizer.nalora.config == NALoRAConfig(keep=0.25, ema=0.5, stride=3, mask=mask, scale=scale)
    for method in ("full", "lora"):
        assert not hasattr(train_tiny.METHODS[method](small_llama(), train_tiny.Config()), "nalora")
    assert {m for m in train_tiny.METHODS if m in train_tiny.command_line().format_help()} >= {"pretrain", "full", "lora", "nalora", "nalora-mask", "nalora-scale"}


@pytest.fixture(scope="session")
def plain_result(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert train_tiny.main(arguments(base, out)) == 0
    return result(out)


@pytest.mark.parametrize("flag", ["--seed 1", "--lr 0.01", "--batch-size 5", "--train-size 8", "--rank 2", "--alpha 4", "--targets gate_proj up_proj",
                                  "--keep 0.2", "--dtype bfloat16", "--steps 5"])
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


def test_the_training_loop_shows_nalora_the_padding(base):
    run = train_tiny.set_up(train_tiny.Config(base=str(base), steps=3, batch_size=4, test_size=4))
    padded = 0
    for step, _ in enumerate(train_tiny.training_loop(run)):
        mask = run.batches(step)[2]
        assert torch.equal(run.optimizer.nalora.token_mask, mask)
        padded += (~mask).sum().item()
    assert step == 2 and padded > 0


def stepping(monkeypatch, before_step):
    """Calls before_step(step) whenever the training loop asks for a batch to train on."""
    original = train_tiny.training_loop

    def loop(run, first=0):
        batches = run.batches

        def watched(step):
            before_step(step)
            return batches(step)

        run.batches = watched
        return original(run, first)

    monkeypatch.setattr(train_tiny, "training_loop", loop)


@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, method) for method in ("pretrain", "full", "lora", "nalora", "nalora-mask", "nalora-scale"))])
def test_ctrl_c_and_resume_end_in_the_same_bits(base, uninterrupted, tmp_path, monkeypatch, capsys,
                                                method, at):
    wanted = uninterrupted(method)

    def interrupt(step):
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stepping(patch, interrupt)
        assert train_tiny.main(arguments(base, tmp_path / "cut", method)) == 130
    assert "--resume" in capsys.readouterr().err
    assert train_tiny.main(arguments(base, tmp_path / "cut", method, "--resume")) == 0
    assert result(tmp_path / "cut") == wanted


def test_torchrun_trains_the_same_on_two_ranks_and_resumes(base, tmp_path, capsys):
    def torchrun(ranks, *flags):
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", str(HERE / "train_tiny.py"),
                               *arguments(base, *flags)], capture_output=True, text=True)

    one = tmp_path / "one"
    assert train_tiny.main(arguments(base, one, "lora")) == 0
    run = torchrun(2, tmp_path / "two", "lora")
    assert run.returncode == 0 and run.stdout.count("exact match") == 1, run.stderr
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, tmp_path / "two"))
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-4)
    assert torchrun(2, tmp_path / "nalora", "nalora").returncode == 0
    whole = result(tmp_path / "nalora")
    for name in ("summary.json", "adapter/adapter_model.safetensors"):                      # as if cut before the end
        (tmp_path / "nalora" / name).unlink()
    assert torchrun(2, tmp_path / "nalora", "nalora", "--resume").returncode == 0 and result(tmp_path / "nalora") == whole
    refused = torchrun(2, tmp_path / "odd", "nalora", "--batch-size", "5")
    assert refused.returncode and refused.stderr.count("cannot be shared evenly by 2 ranks") == 1 and not (tmp_path / "odd").exists()


MORTAL = """import os, signal, sys, threading, train_tiny
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
code = train_tiny.main(sys.argv[2:])
os._exit(code)"""


KILLS = int(os.environ.get("NALORA_KILLS", 3))                      # 30 before a release
long = pytest.mark.skipif("NALORA_LONG" not in os.environ, reason="long: set NALORA_LONG=1, as CI does")


@long
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
    if KILLS >= 10:
        assert any("checkpoint.pt" in stage for stage in stages)


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "metrics.jsonl", "adapter_model.safetensors", "nalora.json", "loss.png", "summary.json"])
@pytest.mark.parametrize("moment", ["before the write", "before the rename"])
def test_a_death_while_a_file_is_written_costs_nothing(base, uninterrupted, tmp_path, monkeypatch, name,
                                                       moment):
    class Death(BaseException):
        """Nothing catches it, as nothing catches kill -9."""

    def dying(folder, files, write=nalora.write_files):
        if name not in files:
            return write(folder, files)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.tmp").write_bytes(b"half")
        if moment == "before the rename":
            for file in list(files)[:list(files).index(name)]:      # those before it stand already
                write(folder, {file: files[file]})
        raise Death

    for module in (nalora, train_tiny):
        monkeypatch.setattr(module, "write_files", dying)
    with pytest.raises(Death):
        train_tiny.main(arguments(base, tmp_path / "cut"))
    monkeypatch.undo()
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == uninterrupted("nalora")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the limit on a file's size that stands for a full disk is Unix's")
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(base, tmp_path, monkeypatch, capsys):
    import resource
    assert train_tiny.main(arguments(base, tmp_path / "whole")) == 0

    def full_from_step_4(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        stepping(patch, full_from_step_4)
        try:
            code = train_tiny.main(arguments(base, tmp_path / "cut"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert code == 2 and "checkpoint.pt cannot be written and is as it was before" in error and error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["checkpoint.pt", "config.json", "metrics.jsonl"]
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_output_that_cannot_be_written_is_said_in_one_sentence(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train_tiny.main(arguments(base, out)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / "file") in error
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "run" / "checkpoint.pt").rmdir()
    (tmp_path / "run" / "config.json").unlink()
    for name in ("config.json", "config.json.tmp", "checkpoint.pt.tmp"):           # links that lead out of --out are replaced, not followed
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" if name.endswith("tmp") else tmp_path / "nowhere")
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 0
    assert (tmp_path / "elsewhere").read_text() == "mine" and (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_another_number_of_threads_is_refused_with_its_reason(base, tmp_path, capsys):
    assert train_tiny.main(arguments(base, tmp_path / "run")) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert train_tiny.main([*arguments(base, tmp_path / "run", "nalora", "--resume"), "--threads", "2"]) == 2
    assert re.search("threads = 1, not 2: sums would be rounded .*--threads 1", capsys.readouterr().err)
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 0


# ---- bad input on the command line: one sentence, exit code 2, nothing written ------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--rank 0", "rank is 0"), ("--rank 33", "takes a whole number from 1 to"), ("--targets nothing", "matches no linear layer; there are"),
    ("--targets q_proj", "No gated FFN"), ("--keep 0", "keep is 0"), ("--keep 1.01", "keep is 1.01"),
    ("--method lora --keep 0.5", "--keep has no effect with --method lora"), ("--method full --rank 4", "--rank has no effect"),
    ("--method pretrain --train-size 5", "--train-size has no effect"), ("--base nowhere", "nowhere/config.json cannot be read"), ("--steps 0", "--steps is 0"),
    ("--lr -1", "--lr is -1"), ("--data nowhere", "nowhere"), ("--batch-size -2", "--batch-size is -2"),
    ("--seed -1", "negative"), ("--alpha 0", "--alpha is 0"), ("--threads 0", "--threads is 0"), ("--threads 99999999999999", "--threads is 99999999999999"), (f"--seed {10**20}", "that large"),
    ("--test-size -1", "--test-size is -1"), ("--method all --rank 0", "rank is 0"), ("--method all --targets q_proj", "No gated FFN"), ("--device mps", "--device mps is not available"), ("--method nalora-scale --keep 0.2", "--keep has no effect")])
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
    set_up = lambda: train_tiny.set_up(train_tiny.resolve(train_tiny.command_line().parse_args(arguments(base, run)), "nalora"))
    return {"adapter/adapter_model.safetensors": adapter, "adapter/adapter_config.json": adapter, "adapter/nalora.json": adapter,
            "base/model.safetensors": lambda: Llama.from_pretrained(folder / "base"), "base/config.json": lambda: Llama.from_pretrained(folder / "base"),
            "data/tokenizer.tiktoken": lambda: train_tiny.load_tokenizer(folder / "data"), "data/train.jsonl": lambda: train_tiny.read_problems(folder / "data" / "train.jsonl"),
            "run/checkpoint.pt": lambda: train_tiny.load_checkpoint(set_up(), run), "run/config.json": lambda: train_tiny.load_checkpoint(set_up(), run)}


FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/nalora.json", "base/model.safetensors", "base/config.json",
         "data/tokenizer.tiktoken", "data/train.jsonl", "run/checkpoint.pt", "run/config.json"]


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
        with pytest.raises(ValueError, match="cannot be read|holds no|is no checkpoint|holds a run|lacks|as a tokenizer|no plain LoRA|names no shards"):
            read()
    path.unlink()
    path.write_bytes(whole)
    assert result(folder) == before                                 # reading writes nothing
    read()


@pytest.mark.parametrize("spoil, message", [
    (lambda t, k: {**t, k: t[k].int()}, "int32"), (lambda t, k: {**t, k: t[k] * math.nan}, "finite"), (lambda t, k: {**t, k: t[k] / 0}, "finite"),
    (lambda t, k: {**t, k: t[k].bool()}, "bool"), (lambda t, k: {**t, k.replace("layers.0", "layers.0/../.."): t[k].clone()}, "layers|not fit"),
    (lambda t, k: {**t, "/etc/passwd": t[k].clone()}, "passwd|not fit"), (lambda t, k: {**t, k: t[k][:1]}, "not fit"), (lambda t, k: {}, "not fit"),
    (lambda t, k: {**t, k: t[k][None]}, "not fit")])
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
            ("config.json", {k: v for k, v in config.items() if k != "threads"}, ["--resume"], "threads = None"), ("config.json", {k: v for k, v in config.items() if k != "data"}, ["--sample"], "holds no run")):
        shutil.copytree(intact / "run", run)
        if file == "config.json":
            (run / "checkpoint.pt").unlink()               # it holds the configuration, too
        (run / file).write_text(json.dumps(content))
        before = result(run)
        assert train_tiny.main([*arguments(base, run), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and result(run) == before
        shutil.rmtree(run)


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
        monkeypatch.setattr(train_tiny, "set_up", lambda *_: (_ for _ in ()).throw(error))
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
    for bad in (too_long, '{"prompt": "x"', '{"prompt": "x", "completion": "y"}', '{"prompt": 1, "completion": "y", "answer": 2}', "[]", "7"):
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
    assert train_tiny.main(arguments(base, out)) == 2 and re.search("already holds a run.*--resume.*--out", capsys.readouterr().err)
    for change, message in ((["--lr", "0.1"], "lr = 0.005, not 0.1"), (["--keep", "0.3"], "keep = 0.5, not 0.3"), (["--method", "lora"], "not 'lora'")):
        assert train_tiny.main([*arguments(base, out, "nalora", "--resume"), *change]) == 2
        assert message in capsys.readouterr().err
    assert result(out) == before
    settings = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps({**json.loads(settings), "mask": "random"}))       # a setting that this script does not know
    assert train_tiny.main(arguments(base, out, "nalora", "--resume")) == 2 and "mask = 'random', not None" in capsys.readouterr().err
    (out / "config.json").write_text(settings)
    assert train_tiny.main(arguments(base, tmp_path / "other", "nalora", "--seed", "1")) == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", out)          # of another run
    assert train_tiny.main(arguments(base, out, "nalora", "--resume")) == 2 and "made with other settings" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(b"\x00" * 50)
    assert train_tiny.main(arguments(base, out, "nalora", "--resume")) == 2 and "is no checkpoint of this run" in capsys.readouterr().err


@pytest.mark.parametrize("every, stops_at, kept", [("1", "validation loss is not finite at step 4", 3), ("3", "gradient is not finite at step 5", 1)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(base, tmp_path, capsys, monkeypatch, every, stops_at, kept):
    out, rate = tmp_path / "run", train_tiny.schedule
    monkeypatch.setattr(train_tiny, "schedule", lambda c, step: 1e28 if step == 3 else rate(c, step))
    assert train_tiny.main(arguments(base, out, "nalora", "--eval-every", every)) == 2 and stops_at in capsys.readouterr().err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == kept + 1 and math.isfinite(records[-1]["val_loss"]) and not (out / "summary.json").exists()
    monkeypatch.setattr(train_tiny, "schedule", rate)
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
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 32, "val": 4, "test": 4}
    assert sorted(p["line"] for problems in splits.values() for p in problems) == list(range(1, 41))
    assert all(p["prompt"] == f"{p['line'] - 1}-0=" for problems in splits.values() for p in problems)
    assert splits == train_tiny.read_splits(tmp_path / "mine.jsonl")    # drawn always alike
    assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(tmp_path / "mine.jsonl")]) == 0
    assert "exact match" in capsys.readouterr().out
    assert train_tiny.is_right({"completion": "7."}, " 7. ") and not train_tiny.is_right({"completion": "7."}, "8.")
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:9]))
    assert train_tiny.main([*arguments(base, tmp_path / "other"), "--data", str(tmp_path / "mine.jsonl")]) == 2 and "at least 10" in capsys.readouterr().err


def test_without_test_problems_only_the_validation_loss_is_measured(base, tmp_path):
    assert train_tiny.main([*arguments(base, tmp_path / "run"), "--test-size", "0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_exact_match"] is None and summary["arithmetic_accuracy"] is None and math.isfinite(summary["val_loss"])


def figure_of(monkeypatch, draw, *args):
    """The figure that draw(*args, path) would save."""
    found = []
    monkeypatch.setattr(train_tiny, "save_figure", lambda figure, path: found.append(figure))
    draw(*args, Path("unused.png"))
    return found[0]


def test_the_figure_of_a_loss_shows_every_record(monkeypatch):
    records = [{"step": 0, "val_loss": 2.5}, {"step": 10, "loss": 1.5, "val_loss": 1.0}, {"step": 20, "loss": 0.75, "val_loss": 0.5}]
    other = [{**r, "val_loss": r["val_loss"] + 1} for r in records]
    figure = figure_of(monkeypatch, train_tiny.draw_loss, {"lora": records, "nalora": other})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["lora, validation"].get_xdata()) == [0, 10, 20] and list(lines["lora, validation"].get_ydata()) == [2.5, 1.0, 0.5]
    assert list(lines["nalora, validation"].get_ydata()) == [3.5, 2.0, 1.5]
    assert list(lines["lora, training"].get_xdata()) == [5, 15] and list(lines["lora, training"].get_ydata()) == [1.5, 0.75]
    assert len({line.get_color() for line in lines.values()}) == 2 and figure.axes[0].get_legend()


def test_the_figure_of_a_run_shows_every_layer(monkeypatch):
    layer = lambda x: {"k_hat": x, "occupancy": x / 2, "scale": 1 / x, "density": 0.5, "turnover": x / 4}
    records = [{"step": 0, "val_loss": 1}] + [{"step": s, "layers": {"a": layer(1 + s / 100), "b": layer(1.2)}} for s in (10, 20)]
    figure = figure_of(monkeypatch, train_tiny.draw_layers, records)
    assert len(figure.axes) == 4 and len({ax.get_title() for ax in figure.axes}) == 4
    for ax, key in zip(figure.axes, ("k_hat", "scale", "occupancy", "turnover")):
        a, b = ax.get_lines()[:2]
        assert list(a.get_xdata()) == [10, 20] and list(a.get_ydata()) == [layer(1.1)[key], layer(1.2)[key]] and set(b.get_ydata()) == {layer(1.2)[key]}
        assert a.get_color() != b.get_color()
        assert (len(ax.get_lines()) == 3) == (key in ("k_hat", "scale"))  # a line at 1
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["layer 0", "layer 1"]


# ---- README.md ----

README = (HERE / "README.md").read_text(encoding="utf-8")
OWN_MODEL = README.split("## On your own model")[1].split("\n## ")[0]


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.replace(OWN_MODEL, ""), re.S)
    assert snippets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(HERE / "data")
    exec(compile("\n".join(snippets), "README.md", "exec"), {})
    assert re.search(r"^[01]\.\d+$", capsys.readouterr().out, re.M)  # the k_hat that it prints
    assert load_adapter(Llama.from_pretrained(HERE / "data" / "base"), tmp_path / "runs" / "snippet")


def test_the_readme_names_what_exists():
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    parser = train_tiny.command_line()
    for command in re.findall(r"python train_tiny.py ([^#`\n]*)", README):
        parser.parse_args(shlex.split(command.replace("--help", "")))
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (HERE / path).exists(), path


# ---- gates of other kinds: fused, changed on the way, under other names --------------------------

class OtherFFN(nn.Module):
    """A gated FFN as other models write it. layout: how gate and up share one layer, or "apart"."""

    def __init__(self, layout="apart", change=None, act=None):
        super().__init__()
        wide = 12 if layout == "apart" else 24
        setattr(self, "gate_proj" if layout == "apart" else "gate_up_proj", nn.Linear(8, wide, bias=False))
        if layout == "apart":
            self.up_proj = nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn = nn.SiLU() if act is None else act
        self.layout = layout
        self.change = change or (lambda z: z)

    def parts(self):
        """Rows of the fused layer that make the gate, and those that make the features."""
        rows = torch.arange(24)
        return {"gate first": (rows[:12], rows[12:]), "gate last": (rows[12:], rows[:12]), "in turns": (rows[::2], rows[1::2])}[self.layout]

    def forward(self, x):
        if self.layout == "apart":
            z, u = self.gate_proj(x), self.up_proj(x)
        elif self.layout == "in turns":
            both = self.gate_up_proj(x)
            z, u = both[..., ::2], both[..., 1::2]
        else:
            z, u = self.gate_up_proj(x).chunk(2, dim=-1)
            if self.layout == "gate last":
                z, u = u, z
        return x + self.down_proj(self.act_fn(self.change(z)) * u)


def other_model(layout="apart", count=2, **settings):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(OtherFFN(layout, **settings) for _ in range(count))
    model.forward = lambda x: [x := layer(x) for layer in model.layers][-1]
    targets = ["gate_proj", "up_proj", "down_proj"] if layout == "apart" else ["gate_up_proj", "down_proj"]
    inject_lora(model, targets, rank=4, alpha=8)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.3)
    return model.train()


def other_step(model, seed, *optimizers):
    torch.manual_seed(seed)
    model.forward(torch.randn(2, 5, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


@pytest.mark.parametrize("change", [None, lambda z: 2 * z])
@pytest.mark.parametrize("layout", ["gate first", "gate last", "in turns"])
def test_a_fused_layer_is_steered_as_its_unfused_twin(layout, change):
    fused, twin = other_model(layout, change=change), other_model(change=change)
    with torch.no_grad():
        for ffn, apart in zip(fused.layers, twin.layers):
            for rows, layer in zip(ffn.parts(), (apart.gate_proj, apart.up_proj)):
                layer.base_layer.weight.copy_(ffn.gate_up_proj.base_layer.weight[rows])
                layer.lora_A.copy_(ffn.gate_up_proj.lora_A)
                layer.lora_B.copy_(ffn.gate_up_proj.lora_B[rows])
            apart.down_proj.load_state_dict(ffn.down_proj.state_dict())
    tools = []
    for model in (fused, twin):
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_A.requires_grad_(False)  # LoRA-FA: the twin's two A would part ways
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tools.append((model, opt, NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))))
    for i in range(4):
        for model, opt, _ in tools:
            other_step(model, i, opt)
    for a, b in zip(*(tool.statistics().values() for *_, tool in tools)):
        assert torch.equal(a["mask"], b["mask"]) and a["mask"].sum() == 3 and a["scale"] == pytest.approx(b["scale"], rel=1e-5) and a["scale"] != 1
    for ffn, apart in zip(fused.layers, twin.layers):
        for rows, layer in zip(ffn.parts(), (apart.gate_proj, apart.up_proj)):
            torch.testing.assert_close(ffn.gate_up_proj.lora_B[rows], layer.lora_B, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("change", [lambda z: z * 3, lambda z: z.reshape(10, 12).view(2, 5, 12), lambda z: z - 1])
def test_what_the_activation_receives_is_observed(change):
    model = other_model(change=change)
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    seen = []
    model.layers[1].act_fn.register_forward_pre_hook(lambda act, inputs: seen.append(inputs[0].detach()))
    other_step(model, 0, opt)
    importance = nalora.value_and_slope(F.silu, seen[0].flatten(0, 1))[1].abs().mean(0) * 0.1
    torch.testing.assert_close(tool.statistics()["layers.1"]["importance"], importance)
    skips = other_model(act=nn.SiLU())
    for layer in skips.layers:  # as a fused kernel does
        layer.forward = lambda x, self=layer: x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    opt = torch.optim.SGD(lora_parameters(skips), lr=0.1)
    tool = NALoRA(skips, opt, NALoRAConfig(stride=1))
    gates = []
    skips.layers[1].gate_proj.register_forward_hook(lambda gate, x, z: gates.append(z.detach()))
    other_step(skips, 0, opt), other_step(skips, 1, opt)
    a, b = (nalora.value_and_slope(F.silu, z.flatten(0, 1))[1].abs().mean(0) for z in gates)
    torch.testing.assert_close(tool.statistics()["layers.1"]["importance"], 0.1 * (0.9 * a + b))


def test_a_layer_that_the_activation_does_not_see_is_refused():
    model = other_model()
    for layer in model.layers:
        layer.up, layer.gate = layer._modules.pop("up_proj"), layer._modules.pop("gate_proj")
        layer.forward = lambda x, self=layer: x + self.down_proj(self.act_fn(self.gate(x)) * self.up(x))
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    with pytest.raises(ValueError, match="It is on down_proj, gate, up: name the one in front of the activation"):
        NALoRA(model, opt)
    tool = NALoRA(model, opt, gate="up")
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0, opt)
    tool.remove()
    for layer in model.layers:
        layer.forward = lambda x, self=layer: x + self.down_proj(self.up(x) * self.act_fn(self.gate(x)))
    tool = NALoRA(model, opt, gate="up")
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0, opt)
    tool.remove()
    tool = NALoRA(model, opt, NALoRAConfig(stride=1), gate="gate")
    other_step(model, 0, opt)
    assert math.isfinite(tool.statistics()["layers.1"]["k_hat"])
    with pytest.raises(ValueError, match="The gate of model.layers.0.mlp is gate_proj"):
        NALoRA(lora_llama(), opt, gate="up_proj")
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(other_model("gate first", act=F.silu), opt)
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(other_model("gate first", act=SHARED), opt)
    no_lora = small_llama()
    with pytest.raises(ValueError, match="inject it first"):
        NALoRA(no_lora, opt)


SHARED = nn.SiLU()


def test_the_activation_may_be_told_or_stand_in_the_config():
    model = lora_llama()
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.forward = lambda x, self=layer.mlp: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    runs = [start(NALoRAConfig(stride=1), model=m, optimizer=torch.optim.SGD) for m in (lora_llama(), model)]
    for model, opt, tool in runs:
        take_step(model, opt, 0)
    assert equal(snapshot(runs[0][0]), snapshot(model))
    tool.remove()
    model.config = None
    with pytest.raises(ValueError, match="model.layers.0.mlp has no activation"):
        NALoRA(model, opt)
    assert NALoRA(model, opt, act=F.gelu)._stacks[0].act is F.gelu


def test_it_says_what_is_steered(capsys):
    model = lora_llama(["q_proj", *FFN])
    model.model.layers[1].mlp.gate_proj = model.model.layers[1].mlp.gate_proj.base_layer
    tool = NALoRA(model, torch.optim.SGD(lora_parameters(model), lr=0.1))
    assert capsys.readouterr().out == f"{tool}\n" == "NALoRA steers 1 of 2 FFNs; plain LoRA on 2 q_proj, 1 up_proj, 1 down_proj.\n"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_step_as_one(order):
    results = []
    for several in (False, True):
        model = other_model()
        groups = [lora_parameters(model)[i::2] for i in (0, 1)]  # all A, all B
        opts = [torch.optim.AdamW(group, lr=0.01) for group in (groups if several else [sum(groups, [])])]
        tool = NALoRA(model, opts if several else opts[0], NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            other_step(model, i, *([opts[j] for j in order] if several else opts))
        results.append((snapshot(model), tool.state_dict()["steps"]))
    assert equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 3


@pytest.mark.parametrize("nalora_first", [True, False])
def test_its_state_is_in_the_optimizers(tmp_path, nalora_first):
    def made():
        model = other_model()
        return model, torch.optim.AdamW(lora_parameters(model), lr=0.05)

    config = NALoRAConfig(stride=3, keep=0.25)
    model, opt = made()
    NALoRA(model, opt, config)
    for i in range(3):
        other_step(model, i, opt)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    again, new = made()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if nalora_first:
        tool = NALoRA(again, new, config)
    again.load_state_dict(saved["model"]), new.load_state_dict(saved["optimizer"])
    if not nalora_first:
        tool = NALoRA(again, new, config)
    assert "nalora" not in new.param_groups[0] and tool.state_dict()["steps"] == 3
    for i in range(3, 6):
        other_step(model, i, opt), other_step(again, i, new)
    assert equal(snapshot(model), snapshot(again))
    tool.remove()
    new.load_state_dict(saved["optimizer"])
    with pytest.raises(ValueError, match="This NALoRA state was made with"):
        NALoRA(again, new, NALoRAConfig(keep=0.75))


def test_an_optimizer_that_evaluates_at_averages_is_refused():
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

    model = lora_llama()
    with pytest.raises(ValueError, match="ScheduleFree evaluates at averages of its own"):
        NALoRA(model, ScheduleFree(lora_parameters(model), lr=0.1))


def test_the_token_mask_of_a_text_leaves_another_tower_alone():
    model = nn.Module()
    model.text, model.vision = other_model().layers, other_model(count=1).layers
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    text, image = torch.randn(2, 5, 8), torch.randn(9, 8)
    with_padding = text.clone()
    with_padding[tool.token_mask == 0] = 100
    seen = {}
    for tower, x in ((model.text, with_padding), (model.vision, image)):
        for layer in tower:
            x = layer(x)
        x.square().mean().backward()
    tool._add_up()
    seen = {name: stack.sums.tokens[i].item() for stack in tool._stacks for i, name in enumerate(stack.names)}
    assert seen == {"text.0": 5, "text.1": 5, "vision.0": 9}


def fsdp_rank(rank, world, port, path):
    """Trains the small Llama under FSDP2 on this rank's part of each batch, with one checkpoint in between."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def made():
        model = lora_llama(["q_proj", *FFN])
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)
        return model, opt, NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))

    def step(model, opt, seed):
        tokens, targets = (t[rank::world] for t in batch(seed))
        model(tokens, targets)[1].backward()
        opt.step(), opt.zero_grad()

    whole = lambda model: {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    model, opt, tool = made()
    for i in range(5):
        if i == 3:
            weights, states = get_state_dict(model, opt)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path / f"checkpoint{world}")
        step(model, opt, i)
    again, new, other = made()
    weights, states = get_state_dict(again, new)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path / f"checkpoint{world}")
    set_state_dict(again, new, model_state_dict=weights, optim_state_dict=states)
    assert other.state_dict()["steps"] == 3
    for i in range(3, 5):
        step(again, new, i)
    assert equal(whole(model), whole(again))
    torch.save([whole(model), [s["mask"] for s in tool.statistics().values()]], path / f"{world}{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


def test_two_ranks_of_fsdp2_equal_one_and_resume(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    def ranks(world):
        port = free_port()
        code = f"from pathlib import Path; import test_nalora; test_nalora.fsdp_rank(int(__import__('sys').argv[1]), {world}, {port}, Path({str(tmp_path)!r}))"
        run = lambda rank: subprocess.run([sys.executable, "-c", code, str(rank)], cwd=HERE, capture_output=True, text=True, timeout=120)
        with ThreadPoolExecutor() as pool:
            for done in pool.map(run, range(world)):
                assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"{world}{rank}.pt", weights_only=True) for rank in range(world)]
    (one, masks), = ranks(1)
    for parameters, theirs in ranks(2):
        assert all(torch.equal(a, b) for a, b in zip(masks, theirs)) and sum(m.sum() for m in masks) == 24
        for name in one:
            torch.testing.assert_close(parameters[name], one[name], atol=1e-5, rtol=1e-4)


# ---- hooks: whose they are, and when they count --------------------------------------------------

def state_of(tool):
    return {f"{n}/{k}": t for n, s in tool.state_dict()["ffns"].items() for k, t in s.items()}


@pytest.mark.parametrize("kind", ["zero_grad", "zeros in place", "GradScaler", "no backward"])
def test_a_pass_whose_gradients_are_thrown_away_leaves_nothing(kind):
    states = []
    for thrown in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=kind == "GradScaler")
        take_step(model, opt, 7)
        if thrown:
            loss = model(*batch(5))[1] * (math.inf if kind == "GradScaler" else 1)
            if kind != "no backward":
                scaler.scale(loss).backward()
            if kind == "GradScaler":
                scaler.step(opt)
                scaler.update()
            opt.zero_grad(set_to_none=kind != "zeros in place")
        for microbatch in (0, 1):           # two that count
            scaler.scale(model(*batch(microbatch))[1]).backward()
        scaler.step(opt)
        states.append(state_of(tool))
    assert equal(*states)


def checkpointed(model, reentrant):
    """The model with every block under gradient checkpointing."""
    for block in model.model.layers:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                          use_reentrant=reentrant)
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda module, inputs, x: x.requires_grad_())
    return model


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_mask_and_the_tokens_of_its_own_pass(reentrant):
    states = []
    for again in (False, True):
        model = checkpointed(lora_llama(), reentrant) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25), model)
        for step in range(2):
            total = 0
            for i, shape in enumerate(((4, 14), (4, 14))):          # two passes, one backward
                tokens, targets = batch(10 * step + i, shape)
                tool.token_mask = torch.arange(shape[1]) < 6 + i + torch.arange(4)[:, None]
                total = total + model(tokens, targets)[1]
            total.backward()
            opt.step()
            opt.zero_grad()
        states.append(state_of(tool))
    assert all(torch.allclose(states[0][k].float(), states[1][k].float(), rtol=1e-5)
               for k in states[0])
    assert not torch.isnan(states[0]["model.layers.0.mlp/k_hat"])


def test_a_copy_of_a_steered_model_disturbs_nothing_and_says_that_it_is_not_steered():
    ends = []
    for copied in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1))
        take_step(model, opt, 0)
        if copied:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
                other_opt = torch.optim.AdamW(lora_parameters(other), lr=0.1)
                with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
                    take_step(other, other_opt, 5)
                NALoRA(other, other_opt, NALoRAConfig(stride=1)).load_state_dict(tool.state_dict())
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    take_step(other, other_opt, 6)
            other, other_opt, inert = copy.deepcopy((model, opt, tool))
            with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
                take_step(other, other_opt, 7)
        take_step(model, opt, 1)
        ends.append({**snapshot(model), **state_of(tool)})
    assert equal(*ends)


def test_a_cast_after_nalora_was_made_is_followed():
    model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
    model.double()
    before = snapshot(model)
    take_step(model, opt, 0)
    for name, s in tool.statistics().items():
        moved = (snapshot(model)[f"{name}.gate_proj.lora_B"] != before[f"{name}.gate_proj.lora_B"])
        assert torch.equal(moved.any(1), s["mask"])


# ---- adapters: what is told, what is held --------------------------------------------------------


@pytest.mark.parametrize("change, named", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"use_rslora": True}, "use_rslora"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"), ({"bias": "all"}, "bias"),
    ({"of_tomorrow": 3}, "of_tomorrow"), ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["x"]}, "target_parameters"), ({"peft_type": None}, "peft_type"),
    ({"init_lora_weights": "eva"}, ""), ({"init_lora_weights": False}, ""),
    ({"of_tomorrow": None, "of_the_day_after": [], "use_dora": False, "alpha_pattern": {}}, ""),
    ({"runtime_config": {"ephemeral_gpu_offload": False}, "lora_dropout": 0.1}, ""),
    ({"target_modules": FFN + ["q_proj"]}, "not complete"),
    ({"target_modules": ["gate_proj"]}, "not complete"), ({"target_modules": None}, "not complete"),
    ({"target_modules": r".*\.mlp\.(gate|up|down)_proj"}, ""),
    ({"target_modules": r".*\.(q|gate|up|down)_proj"}, "not complete"),
    ({"target_modules": "("}, "not complete"), ({"target_modules": 5}, "not complete"),
    ({"target_modules": FFN + ["q_proj"], "exclude_modules": ["q_proj"]}, "")], ids=str)
def test_an_adapter_is_what_it_says_or_refused(tmp_path, change, named):
    save_adapter(trained_lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = small_llama()
    if not named:
        assert len(load_adapter(model, tmp_path)) == 6
        return
    with pytest.raises(ValueError, match=named):
        load_adapter(model, tmp_path)
    assert not nalora.has_lora(model)


def test_keys_without_prefix_are_read_and_none_is_thrown_away(tmp_path):
    model, (tokens, _) = trained_lora(), batch(1)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    bare = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    save_file(bare, path)
    fresh = small_llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])
    save_file({**tensors, **{k: t + 1 for k, t in bare.items()}}, path)     # which one holds?
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(small_llama(), tmp_path)


def test_tied_weights_stored_twice_must_agree(tmp_path):
    model = small_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for shift in (0, 1):
        head = weights["model.embed_tokens.weight"] + shift
        save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
        if shift:
            with pytest.raises(ValueError, match="two that differ"):
                Llama.from_pretrained(tmp_path)
        else:
            assert equal(Llama.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_names_are_the_models_own_under_every_wrapper(tmp_path):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    def compiled_ffns(model):
        for layer in model.model.layers:
            layer.mlp = torch.compile(layer.mlp, backend="eager")
        return model

    def checkpoints(model):
        checkpoint_wrapper.apply_activation_checkpointing(
            model, check_fn=lambda m: type(m).__name__ in ("Block", "LoRALinear"))
        return model

    def parallel_ffn(model):
        model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
        return model

    wrappers = [compiled_ffns, checkpoints, parallel_ffn, nn.DataParallel,
                lambda m: torch.compile(nn.DataParallel(m), backend="eager")]
    plain, (tokens, _) = trained_lora(), batch(0)
    save_adapter(plain, tmp_path / "plain")
    opt = torch.optim.AdamW(lora_parameters(plain))
    state = NALoRA(plain, opt).state_dict()
    for wrap in wrappers:
        model = wrap(trained_lora())
        save_adapter(model, tmp_path / "wrapped")
        for file in ("adapter_model.safetensors", "adapter_config.json", "nalora.json"):
            assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
        NALoRA(model, torch.optim.AdamW(lora_parameters(model))).load_state_dict(state)
        fresh = wrap(small_llama())
        base = nalora.own_modules(fresh)[""]
        base.save_pretrained(tmp_path / "base")
        assert equal(Llama.from_pretrained(tmp_path / "base").state_dict(), small_llama().state_dict())
        load_adapter(fresh, tmp_path / "plain")
        wanted = plain(tokens)[0]
        torch.testing.assert_close(fresh(tokens)[0], wanted)
        merge_lora(fresh)
        torch.testing.assert_close(fresh(tokens)[0], wanted)
        assert not nalora.has_lora(fresh)


def test_what_an_adapter_would_not_hold_is_refused(tmp_path):
    model = trained_lora()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight would not be in the adapter"):
        save_adapter(model, tmp_path / "a")

    class More(LoRALinear):
        pass

    model = trained_lora()
    model.model.layers[0].mlp.gate_proj.__class__ = More
    with pytest.raises(ValueError, match="more than LoRA"):
        save_adapter(model, tmp_path / "a")
    model = trained_lora()
    model.model.layers[0].mlp.gate_proj.scaling *= 2
    with pytest.raises(ValueError, match="scaled otherwise"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="cannot hold"):
        save_adapter(trained_lora(), tmp_path / "a", settings={"x": object()})
    assert not list(tmp_path.rglob("*.*"))
    save_adapter(trained_lora(), tmp_path / "a", base_model=Path("some/base"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "CAUSAL_LM"
    classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject_lora(classifier, ["0"], 2, 4)
    save_adapter(classifier, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] is None


def test_two_files_are_both_old_or_both_serialised(tmp_path):
    nalora.write_files(tmp_path, {"a.json": 1, "b.json": 2})
    with pytest.raises(ValueError, match="b.json cannot hold"):
        nalora.write_files(tmp_path, {"a.json": 3, "b.json": {1, 2}})
    assert [(tmp_path / n).read_text() for n in ("a.json", "b.json")] == ["1\n", "2\n"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_float8_is_refused_in_a_sentence(tmp_path):
    small_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        Llama.from_pretrained(tmp_path)


# ---- layers --------------------------------------------------------------------------------------


def test_a_layer_at_two_places_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with pytest.raises(ValueError, match="several places"):
        inject_lora(model, ["a.0"], 2, 4)
    assert not nalora.has_lora(model) and shared.weight.requires_grad
    model["b"][0] = nn.Linear(8, 8)
    inject_lora(model, ["a.0"], 2, 4)
    model["b"][0] = model["a"][0]
    with pytest.raises(ValueError, match="several places"):
        merge_lora(model)


def test_code_that_asks_for_weight_and_bias_finds_lora_in_them():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    for model, targets, call in ((encoder, ["linear1", "linear2"], lambda: encoder(x)),
                                 (attention, ["out_proj"], lambda: attention(x, x, x)[0])):
        plain = call().detach()
        inject_lora(model, targets, 4, 8)
        for p in lora_parameters(model):
            nn.init.normal_(p, std=0.2)
        slow = call()                       # with gradients: no fast path
        slow.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in lora_parameters(model))
        with torch.no_grad():
            fast = model.eval() and call()
        assert not torch.allclose(fast, plain, atol=1e-3)
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        layer = next(iter(nalora.lora_layers(model).values()))
        assert (layer.in_features, layer.out_features) == layer.base_layer.weight.shape[::-1]
        assert layer.bias is layer.base_layer.bias


# ---- train_tiny.py does what it trained ----------------------------------------------------------


@pytest.mark.parametrize("given, said, answer, right", [
    ("54.", "54.", 54, True), ("54.", "45.", 54, False), ("6*12=72\n#### 72", "#### 72", 72, True),
    ("#### 72", "72", 72, False), ("The answer is 16.", "The answer is 16.", 16, True),
    ("The answer is 16.", "16", 16, False), ("The answer is 1.", "The answer is 1,234.", 1, False),
    ("The answer is 5.", "The answer is 1,234.", 1234, True), ("x", "It is 12.5.", 12.5, True),
    ("The answer is 12.", "The answer is 12.5.", 12, False), ("x", "5-3=2", 2, True),
    ("The answer is 7.", "The answer is $72.", 72, True), ("x", "it is -$7", -7, True),
    ("x", "no number", 0, False), ("x", "1, 2", 2, True), ("x", "9007199254740993", 2**53 + 1, True)])
def test_a_number_is_read_as_the_data_writes_it(given, said, answer, right):
    assert train_tiny.is_right({"prompt": "?", "completion": given, "answer": answer}, said) is right


def test_json_lines_are_split_at_line_feeds_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    row = '{{"prompt": "1{}1=", "completion": "2."}}'.format
    for c in "\u2028\u2029\x85\x0b\x0c\x1c":
        text = row(c) if ord(c) > 31 else row(json.dumps(c)[1:-1])
        path.write_text(f"\ufeff{text}\r\n\n  \n{row('+')}\n\n", encoding="utf-8")
        problems = train_tiny.read_problems(path, answers=False)
        assert [(p["prompt"], p["line"]) for p in problems] == [(f"1{c}1=", 1), ("1+1=", 4)]
    path.write_text(row("\\ud83d") + "\n" + row("\\ud83d\\ude00") + "\n")
    problems = train_tiny.read_problems(path, answers=False)
    assert [p["prompt"] for p in problems] == ["1\ufffd1=", "1\U0001f6001="]


def test_a_split_is_drawn_and_an_error_names_the_line_of_the_file(base, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{i % 10} {i}", "completion": "x"} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    kinds = {split: {p["prompt"][0] for p in problems}
             for split, problems in train_tiny.read_splits(path).items()}
    assert len(kinds["test"]) > 5 and len(kinds["train"]) == 10
    rows.sort(key=lambda row: row["prompt"])                        # kind after kind
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len({p["prompt"][0] for p in train_tiny.read_splits(path)["test"]}) > 5
    rows[15]["prompt"] *= 300
    path.write_text("\n".join(map(json.dumps, rows)))
    assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(path)]) == 2
    assert "own.jsonl, line 16:" in capsys.readouterr().err


def test_a_sample_is_asked_as_training_asked(base, tmp_path, capsys, monkeypatch):
    asked = []

    def solve(model, tokenizer, prompts, max_new_tokens, solve=train_tiny.solve):
        asked.append((prompts, max_new_tokens))
        return solve(model, tokenizer, prompts, max_new_tokens)

    for ending, given, wanted in (("=", "1+1=", "1+1="), ("\n", "1+1", "1+1\n"), (" ", " 1 ", " 1 ")):
        rows = [{"prompt": f"{i}+1{ending}", "completion": "2" * 40} for i in range(30)]
        out = tmp_path / f"run{ord(ending)}"
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [*arguments(base, out), "--data", str(tmp_path / "own.jsonl")]
        assert train_tiny.main(command) == 0
        monkeypatch.setattr(train_tiny, "solve", solve)
        assert train_tiny.main(["--out", str(out), "--sample", given]) == 0
        monkeypatch.undo()
        assert asked.pop() == ([wanted], 41)    # 40 tokens and the end


def test_a_sample_is_not_drawn_from_another_base(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    assert train_tiny.main(arguments(tmp_path / "base", tmp_path / "run")) == 0
    ask = ["--out", str(tmp_path / "run"), "--sample", "1+1="]
    assert train_tiny.main(ask) == 0
    model = Llama.from_pretrained(tmp_path / "base")
    model.model.norm.weight.data[0] += 1e-3                         # too little for the norms
    model.save_pretrained(tmp_path / "base")
    assert train_tiny.main(ask) == 2 and "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["data", "base"])
def test_a_run_is_not_resumed_on_other_data_or_another_base(base, tmp_path, capsys, changed):
    shutil.copytree(base, tmp_path / "base")
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": "2."}) for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    command = [*arguments(tmp_path / "base", tmp_path / "run"), "--data", str(tmp_path / "own.jsonl")]
    assert train_tiny.main(command) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert train_tiny.main([*command, "--resume"]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    if changed == "data":
        (tmp_path / "own.jsonl").write_text("\n".join(rows[1:] + rows[:1]))
    else:
        model = Llama.from_pretrained(tmp_path / "base")
        model.model.norm.weight.data[0] += 1e-3
        model.save_pretrained(tmp_path / "base")
    assert train_tiny.main([*command, "--resume"]) == 2
    assert f"the {changed} has changed since" in capsys.readouterr().err


def test_a_terminal_that_cannot_print_a_text_ends_no_run(base, tmp_path):
    rows = [{"prompt": f"{i} caf\u00e9 \U0001f600 ", "completion": "2."} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "train_tiny.py", *arguments(base, tmp_path / "run"),
               "--data", str(tmp_path / "own.jsonl")]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and "caf\\xe9" in run.stdout, run.stderr
