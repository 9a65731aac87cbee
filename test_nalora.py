"""The executable specification of nalora.py and train_tiny.py, in their order.

Run: pytest test_nalora.py. Offline, on the CPU. What else must hold stands in evidence/test_*.py:
other models and trainers, several ranks, broken files, interruptions."""
import copy
import functools
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import nalora
import train_tiny
from data import problems
from nalora import (ACTIVATIONS, GateSums, Llama, LlamaConfig, NALoRA, NALoRAConfig, State,
                    correct, decide, effective_homogeneity, homogeneity, importance_mask,
                    inject_lora, load_adapter, lora_parameters, merge_lora, observe, save_adapter,
                    selection_weight, step_scale, value_and_slope)

HERE = Path(__file__).resolve().parent
FFN = ["gate_proj", "up_proj", "down_proj"]
SMALL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
close = torch.testing.assert_close

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

def small_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return Llama(replace(SMALL, initializer_range=0.2, **changes))

def batch(seed, shape=(4, 15), vocab=61):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]

def lora_llama(targets=FFN, seed=0, **changes):
    model = small_llama(seed, **changes)
    inject_lora(model, targets, rank=4, alpha=8)
    return model

def start(config=None, model=None, optimizer=torch.optim.AdamW, **settings):
    """(model, optimizer, NALoRA or None), lora_B away from zero so that every gradient is alive."""
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

def first(tool):
    """Statistics of the first FFN."""
    return next(iter(tool.statistics().values()))

# ---- mathematics ---------------------------------------------------------------------------------

Z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
SIGMOID = torch.sigmoid
ROOT = math.sqrt(2 / math.pi)
TANH = (ROOT * (Z + 0.044715 * Z**3)).tanh()
TANH_SLOPE = (1 - TANH**2) * ROOT * (1 + 3 * 0.044715 * Z**2)
QUICK = SIGMOID(1.702 * Z)
CLOSED_FORMS = {  # (rho, phi')
    "silu": (SIGMOID(Z), SIGMOID(Z) * (1 + Z * (1 - SIGMOID(Z)))),
    "gelu": (NORMAL.cdf(Z), NORMAL.cdf(Z) + Z * NORMAL.log_prob(Z).exp()),
    "gelu_pytorch_tanh": (0.5 * (1 + TANH), 0.5 * (1 + TANH) + 0.5 * Z * TANH_SLOPE),
    "quick_gelu": (QUICK, QUICK * (1 + 1.702 * Z * (1 - QUICK))),
    "relu": ((Z > 0).double(), (Z > 0).double())}

@pytest.mark.parametrize("name", ACTIVATIONS)
def test_closed_forms(name):
    act = ACTIVATIONS[name]
    rho, slope = CLOSED_FORMS[name]
    phi, slope_by_autograd = value_and_slope(act, Z)
    close(phi, Z * rho, atol=1e-12, rtol=0)
    close(slope_by_autograd, slope, atol=1e-10, rtol=0)
    close(selection_weight(act, Z), rho, atol=1e-10, rtol=0)
    on = (phi != 0) & (Z != 0)
    close(homogeneity(act, Z)[on], (slope / rho)[on], atol=1e-7, rtol=1e-7)

@pytest.mark.parametrize("name, zero, top, top_at", [
    ("silu", -1.2785, 1.2785, 1.2785), ("gelu", -0.752, 1.2945, 0.84),
    ("quick_gelu", -0.751, 1.2785, 0.751)])
def test_known_points_of_kappa(name, zero, top, top_at):
    kappa = homogeneity(ACTIVATIONS[name], Z)
    assert abs(Z[kappa.abs().argmin()].item() - zero) < 1e-3
    assert abs(kappa.max().item() - top) < 1e-4
    assert abs(Z[kappa.argmax()].item() - top_at) < 5e-3
    assert torch.equal(kappa > 1, Z > 0)  # the coarse partition is the sign of z

def test_silu_slope_range():
    slope = value_and_slope(F.silu, Z)[1]
    assert abs(slope.min().item() + 0.0998) < 1e-4
    assert abs(slope.max().item() - 1.0998) < 1e-4

def test_a_gate_step_moves_features_and_selection():
    z = Z[::100]
    delta = 1e-4
    phi, slope = value_and_slope(F.silu, z)
    rho = selection_weight(F.silu, z)
    moved = F.silu(z + delta) - phi
    features = rho * delta
    selection = (slope - rho) * delta  # z rho' = phi' - rho
    assert (moved - features - selection).abs().max() < delta**2
    at = z != 0
    close((selection / features)[at], homogeneity(F.silu, z)[at] - 1, atol=1e-9, rtol=0)

@pytest.mark.parametrize("act, degree", [
    (lambda z: 3 * z, 1), (F.relu, 1), (lambda z: F.relu(z)**2, 2), (lambda z: z**3, 3)])
def test_homogeneous_activations_have_their_degree(act, degree):
    assert effective_homogeneity(act, Z).item() == pytest.approx(degree, abs=1e-12)
    assert (homogeneity(act, Z[Z > 0]) - degree).abs().max() < 1e-12

def test_k_hat_is_the_least_squares_degree():
    z = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi, slope = value_and_slope(F.silu, z)
    target = (z * slope).flatten().numpy()
    solution = np.linalg.lstsq(phi.reshape(-1, 1).numpy(), target, rcond=None)[0]
    assert effective_homogeneity(F.silu, z).item() == pytest.approx(solution.item(), abs=1e-12)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_gates_stay_finite(dtype):
    small = torch.logspace(-45, 4, 2000)
    z = torch.cat([torch.linspace(-1e4, 1e4, 20001), small, -small]).to(dtype)
    for act in ACTIVATIONS.values():
        for value in (homogeneity(act, z), selection_weight(act, z),
                      effective_homogeneity(act, z), effective_homogeneity(act, z * 0)):
            assert value.isfinite().all()
    assert effective_homogeneity(F.silu, z * 0) == 1

def scale_of(z, act=F.silu):
    sums = observe(act, z.reshape(1, -1), torch.ones(1))
    return step_scale(sums.k_hat(), sums.positive / (sums.tokens * z.numel()))

def test_partition_and_its_degenerate_cases():
    z = torch.tensor([-2.0, -1.0, 1.0, 3.0])
    assert scale_of(z).item() == pytest.approx(1 / effective_homogeneity(F.silu, z).item()) != 1
    assert scale_of(torch.arange(1.0, 100)) == scale_of(-torch.arange(1.0, 100)) == 1
    homogeneous = [F.relu, lambda z: 2 * z, F.leaky_relu]  # rho' = 0: k_hat is exactly 1
    for act in (*ACTIVATIONS.values(), *homogeneous):
        assert (scale_of(torch.linspace(-3, 5, 200), act) == 1) == (act in homogeneous)
    k = torch.tensor([0.1, 0.8, 1.0, 1.6, 9.0, 0.8, -1.0, 0.8])
    p = torch.tensor([0.5, 0.5, 0.5, 0.05, 0.5, 0.04, 0.5, 0.96])
    close(step_scale(k, p), torch.tensor([2, 1.25, 1, 0.625, 0.5, 1, 2, 1]))

@pytest.mark.parametrize("keep, width, kept", [
    (0.5, 10, 5), (0.1, 30, 3), (0.01, 30, 1), (1e-12, 30, 1), (1, 30, 30), (0.34, 3, 2)])
def test_importance_mask(keep, width, kept):
    importance = torch.rand(width, generator=torch.Generator().manual_seed(0))
    mask = importance_mask(importance, keep)
    assert mask.sum() == kept
    assert kept == width or importance[mask].min() >= importance[~mask].max()
    equals = importance_mask(torch.ones(width), keep)
    assert equals.tolist() == [True] * kept + [False] * (width - kept)

# ---- LoRA ----------------------------------------------------------------------------------------

def test_lora_starts_as_an_exact_no_op_and_adds_its_update():
    model = small_llama()
    tokens, _ = batch(0)
    before = model(tokens)[0]
    names = inject_lora(model, ["q_proj", *FFN], rank=3, alpha=12)
    assert torch.equal(before, model(tokens)[0])
    layer = model.get_submodule(names[0])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    weight = layer.base_layer.weight + 12 / 3 * layer.lora_B @ layer.lora_A
    close(layer(x), F.linear(x, weight))
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(32)
    assert layer.lora_A.std() > 0.5 / math.sqrt(32)

def test_exactly_the_adapters_train_and_the_base_keeps_its_bits():
    model, opt, _ = start(NALoRAConfig(), lora_llama(["q_proj", "mlp.gate_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert trainable == {f"{layer}.{m}.lora_{x}" for layer in layers for x in "AB"
                         for m in ("self_attn.q_proj", "mlp.gate_proj")}
    base = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    for i in range(3):
        take_step(model, opt, i)
    assert equal(base, {name: p for name, p in model.named_parameters() if name not in trainable})

def test_float32_adapters_on_a_bfloat16_base():
    model = Llama(SMALL).bfloat16()
    inject_lora(model, FFN, 4, 8)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    model, opt, tool = start(NALoRAConfig(), model)
    assert model(*batch(0))[0].dtype == torch.bfloat16
    take_step(model, opt, 0)
    assert all(s["importance"].dtype == torch.float32 for s in tool.statistics().values())

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merge(dtype, tolerance):
    model, opt, _ = start(None, lora_llama(["q_proj", *FFN]))
    take_step(model, opt, 0)
    model.to(dtype)
    tokens, _ = batch(1)
    expected = {name: m.base_layer.weight + m.scaling * m.lora_B @ m.lora_A
                for name, m in nalora.lora_layers(model).items()}
    before = model(tokens)[0]
    assert merge_lora(model) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert (model(tokens)[0] - before).abs().max() < tolerance
    assert set(model.state_dict()) == set(small_llama().state_dict())
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)

@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.to("meta"), "meta device"), (lambda w: w.to(torch.int8), "quantized")])
def test_merge_refuses_weights_that_are_not_there_or_quantized(spoil, message):
    model = lora_llama()
    layer = model.model.layers[1].mlp.down_proj.base_layer
    layer.weight = nn.Parameter(spoil(layer.weight.detach()), requires_grad=False)
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
    (["q_prj"], 4, 8, "'q_prj' matches no linear layer; there are down_proj, gate_proj"),
    ([], 4, 8, "No targets"), (["roj"], 4, 8, "matches no"), (["q_proj"], 0, 8, "rank is 0"),
    (["q_proj"], 33, 8, "from 1 to 32"), (["q_proj"], 2.0, 8, "rank is 2.0"),
    (["q_proj"], True, 8, "rank is True"), (["q_proj"], 4, 0, "alpha is 0"),
    (["q_proj"], 4, "8", "alpha is 8"), (["q_proj"], 4, math.nan, "alpha is nan")])
def test_inject_refuses(targets, rank, alpha, message):
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, targets, rank, alpha)
    assert all(p.requires_grad for p in model.parameters()) and not nalora.has_lora(model)

def test_inject_twice_is_refused():
    with pytest.raises(ValueError, match="carries LoRA already"):
        inject_lora(lora_llama(), FFN, 4, 8)

# ---- NA-LoRA: the pure core ----------------------------------------------------------------------

def test_the_pure_core_takes_any_leading_dimensions_and_sums_add_up():
    z = torch.randn(2, 3, 8, 20)
    weight = (torch.rand(2, 3, 8) < 0.7).float()
    weight[0, 0] = 0  # an FFN that saw nothing keeps its state
    whole = observe(F.silu, z, weight)
    halves = [observe(F.silu, z[..., part, :], weight[..., part])
              for part in (slice(4), slice(4, None))]
    for found, right in zip(halves[0] + halves[1], whole):
        close(found, right)
    state = State(torch.rand(2, 3, 20), torch.rand(2, 3, 20) < 0.5, *torch.rand(3, 2, 3))
    config = NALoRAConfig(keep=0.3, ema=0.4)
    new = decide(state, whole, config)
    assert all(torch.equal(now[0, 0], before[0, 0]) for now, before in zip(new, state))
    for i, j in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        sums = GateSums(*(t[i, j] for t in whole))
        alone = decide(State(*(t[i, j] for t in state)), sums, config)
        assert all(map(torch.equal, alone, (t[i, j] for t in new)))
        seen = z[i, j][weight[i, j] > 0]
        score = value_and_slope(F.silu, seen)[1].abs().mean(0)
        close(alone.importance, 0.6 * score + 0.4 * state.importance[i, j])
        assert torch.equal(alone.mask, importance_mask(alone.importance, 0.3))
        close(alone.k_hat, effective_homogeneity(F.silu, seen))
        assert alone.occupancy.item() == pytest.approx((seen > 0).float().mean().item())
        assert alone.scale.item() == pytest.approx(1 / min(max(alone.k_hat.item(), 0.5), 2))

def test_no_sum_is_taken_in_half_precision():
    """Neither under autocast nor of gates that are half themselves."""
    torch.manual_seed(0)
    z = torch.randn(2, 300, 48)
    ones = torch.ones(2, 300)
    with torch.autocast("cpu", torch.bfloat16):
        sums = observe(F.silu, z, ones)
    assert all(map(torch.equal, sums, observe(F.silu, z, ones)))
    half = z.bfloat16()
    assert all(map(torch.equal, observe(F.silu, half, ones), observe(F.silu, half.float(), ones)))

def test_padding_may_hold_anything():
    z = torch.randn(9, 48)
    expected = observe(F.silu, z[:5], torch.ones(5))
    z[5:] = math.nan
    for found, right in zip(observe(F.silu, z, torch.tensor([1] * 5 + [0] * 4)), expected):
        close(found, right)

def test_a_pass_with_an_infinite_sum_adds_nothing():
    z = torch.randn(3, 9, 48)
    z[1, 4, 7] = math.inf
    sums = observe(F.silu, z, torch.ones(3, 9))
    assert all((total[1] == 0).all() and (total[0] != 0).any() for total in sums)

def test_correct_is_exact_at_both_ends_and_goes_beyond():
    before, after = torch.randn(2, 6, 3)
    factor = torch.tensor([0, 1, 0.3, 0.7, 2, -1])[:, None]
    found = correct(before, after, factor)
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], after[1])
    close(found, before + factor * (after - before))

@pytest.mark.parametrize("setting, message", [
    ({"keep": 0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5"), ({"keep": "0.5"}, "keep is '0.5'"),
    ({"keep": math.nan}, "keep is nan"), ({"ema": 1.0}, "ema is 1.0"), ({"ema": "x"}, "ema is 'x'"),
    ({"stride": True}, "stride is True"), ({"stride": 0}, "stride is 0"),
    ({"mask": "top"}, "mask is 'top'"), ({"scale": None}, "scale is None")])
def test_config_refuses(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NALoRAConfig(**setting)

# ---- NA-LoRA: the step ---------------------------------------------------------------------------

def test_rows_are_put_back_bit_for_bit_or_take_exactly_loras_step():
    model, opt, tool = start(NALoRAConfig(scale="none", keep=0.3), weight_decay=0.1)
    plain, plain_opt, _ = start(weight_decay=0.1)
    for i in range(4):
        before = snapshot(model)
        plain.load_state_dict(model.state_dict())  # both optimizers saw the same gradients
        take_step(plain, plain_opt, i)
        take_step(model, opt, i)
        stepped = snapshot(plain)
        now = snapshot(model)
        for name, s in tool.statistics().items():
            B = f"{name}.gate_proj.lora_B"
            rows = s["mask"]
            assert rows.sum() == math.ceil(0.3 * 48)
            assert torch.equal(now[B][~rows], before[B][~rows])
            assert torch.equal(now[B][rows], stepped[B][rows])
            assert not torch.equal(now[B], stepped[B])
        others = [n for n in now if not n.endswith("gate_proj.lora_B")]
        assert others and all(torch.equal(now[n], stepped[n]) for n in others)

@pytest.mark.parametrize("config", [NALoRAConfig(keep=1, scale="none"),
                                    NALoRAConfig(mask="none", scale="none")])
def test_switched_off_it_is_lora_bit_for_bit(config):
    plain, plain_opt, _ = start(weight_decay=0.1)
    model, opt, _ = start(config, weight_decay=0.1)
    for i in range(20):
        assert take_step(plain, plain_opt, i) == take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))

def test_what_is_off_hooks_nothing():
    assert not start(NALoRAConfig(mask="none", scale="none"))[2]._handles
    # two gates, a parameter; the step, the optimizer's state and three modules around all, twice
    assert len(start(NALoRAConfig())[2]._handles) == 13

def test_statistics_are_those_of_the_step():
    model, opt, tool = start(NALoRAConfig(stride=1, ema=0.8))
    gates = {}
    for name, ffn in model.named_modules():
        if name.endswith("mlp"):
            ffn.gate_proj.register_forward_hook(
                lambda m, i, z, name=name: gates.update({name: z.detach().flatten(0, 1)}))
    importance = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), 0)
    for s in tool.statistics().values():
        assert math.isnan(s["k_hat"]) and s["scale"] == 1 and s["mask"].all()
    for i in range(3):
        take_step(model, opt, i)
        assert tool.statistics().keys() == gates.keys() == importance.keys()
        for name, s in tool.statistics().items():
            z = gates[name]
            score = value_and_slope(F.silu, z)[1].abs().mean(0)
            importance[name] = 0.8 * importance[name] + 0.2 * score
            close(s["importance"], importance[name])
            assert torch.equal(s["mask"], importance_mask(s["importance"], 0.5))
            k_hat = effective_homogeneity(F.silu, z)
            occupancy = (z > 0).float().mean()
            assert s["k_hat"] == pytest.approx(k_hat.item())
            assert s["occupancy"] == pytest.approx(occupancy.item())
            assert s["scale"] == pytest.approx(step_scale(k_hat, occupancy).item())

@pytest.mark.parametrize("mask", ["none", "derivative"])
def test_the_step_of_every_ffn_pair_is_scaled(mask):
    plain, plain_opt, _ = start()
    model, opt, tool = start(NALoRAConfig(mask=mask))
    before = snapshot(plain)
    take_step(plain, plain_opt, 0)
    take_step(model, opt, 0)
    stepped = snapshot(plain)
    statistics = tool.statistics()
    for name, now in snapshot(model).items():
        s = statistics[name.rsplit(".", 2)[0]]
        rows = s["mask"][:, None] if name.endswith("gate_proj.lora_B") else 1
        close(now, before[name] + s["scale"] * rows * (stepped[name] - before[name]))
    scales = [s["scale"] for s in statistics.values()]
    assert scales[0] != scales[1] != 1

@pytest.mark.parametrize("stride", [1, 7])
def test_microbatches_equal_one_batch(stride):
    model, opt, whole = start(NALoRAConfig(stride=stride))
    model_m, opt_m, parts = start(NALoRAConfig(stride=stride))
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j:j + 1], targets[j:j + 1])[1] / 4).backward()
        opt_m.step()
        opt_m.zero_grad()
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"])
        assert a["k_hat"] == pytest.approx(b["k_hat"]) and a["scale"] == pytest.approx(b["scale"])
    for name, p in snapshot(model).items():
        close(p, snapshot(model_m)[name], atol=1e-5, rtol=1e-3)

def test_token_mask_leaves_padding_out():
    model, opt, short = start(NALoRAConfig(stride=1))
    take_step(model, opt, 0)
    model, opt, padded = start(NALoRAConfig(stride=1))
    tokens, targets = batch(0)
    padding = torch.zeros(4, 6, dtype=torch.long)
    padded.token_mask = torch.cat([torch.ones_like(tokens), padding], 1)
    model(torch.cat([tokens, padding], 1), torch.cat([targets, padding - 100], 1))[1].backward()
    opt.step()
    for a, b in zip(short.statistics().values(), padded.statistics().values()):
        close(a["importance"], b["importance"])
        assert a["k_hat"] == pytest.approx(b["k_hat"], rel=1e-5)
        assert a["occupancy"] == pytest.approx(b["occupancy"])
    fault = r"token_mask is \(4, 21\) but the gates see tokens \(4, 15\)"
    with pytest.raises(ValueError, match=fault):
        model(tokens, targets)

def test_stride_observes_every_nth_token():
    seen = []
    repeated = torch.randint(61, (1, 8)).repeat(7, 1).T.reshape(1, 56)  # each token 7 times
    targets = torch.randint(61, (1, 56))
    for stride in (1, 7):
        model, opt, tool = start(NALoRAConfig(stride=stride))
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight.data.zero_()  # layer 0 then sees the token alone, not its place
        model(repeated, targets)[1].backward()
        opt.step()
        seen.append(first(tool))
    close(seen[0]["importance"], seen[1]["importance"])  # one of each is enough
    assert seen[0]["k_hat"] == pytest.approx(seen[1]["k_hat"], rel=1e-5)

def test_no_place_of_a_sequence_is_always_missed():
    model, opt, tool = start(NALoRAConfig(stride=7, ema=0))
    tokens, targets = batch(0, (4, 14))  # every 7th of these stands at the same two places
    tool.token_mask = torch.arange(14).expand(4, 14) % 7 == 3
    observed = []
    for i in range(7):
        before = first(tool)["importance"]
        model(tokens, targets)[1].backward()
        opt.step()
        opt.zero_grad()
        observed.append(not torch.equal(before, first(tool)["importance"]))
    assert observed == [i == 3 for i in range(7)]  # at step 3, real tokens have their turn

def test_evaluation_leaves_no_trace():
    model, opt, _ = start(NALoRAConfig())
    model_e, opt_e, _ = start(NALoRAConfig())
    for i in range(3):
        with torch.no_grad():
            model_e(*batch(100 + i))  # no gradient
        model_e.eval()
        model_e(*batch(200 + i))  # evaluation mode
        model_e.generate(batch(0)[0], 3)
        model_e.train()
        assert take_step(model, opt, i) == take_step(model_e, opt_e, i)
    assert equal(snapshot(model), snapshot(model_e))

@pytest.mark.parametrize("config", [
    NALoRAConfig(), NALoRAConfig(mask="none"), NALoRAConfig(scale="none")])
def test_state_dict_round_trip(config):
    model, opt, tool = start(config)
    take_step(model, opt, 0)
    state = tool.state_dict()
    again, new, other = start(config, lora_llama(seed=0))
    again.load_state_dict(model.state_dict())
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.load_state_dict(state)
    for i in range(1, 4):
        take_step(model, opt, i)
        take_step(again, new, i)
    assert equal(snapshot(model), snapshot(again))
    assert other.state_dict()["steps"] == 4
    for name, s in tool.state_dict()["ffns"].items():
        assert equal(s, other.state_dict()["ffns"][name])
    with pytest.raises(ValueError, match="was made with"):
        start(NALoRAConfig(keep=0.123))[2].load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        start(config, lora_llama(num_hidden_layers=1))[2].load_state_dict(state)

def test_remove_gives_lora_back():
    plain, plain_opt, _ = start()
    model, opt, tool = start(NALoRAConfig())
    tool.remove()
    for i in range(3):
        take_step(plain, plain_opt, i)
        take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))

def test_a_step_skipped_by_a_fused_optimizer_advances_nothing():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    parameters = snapshot(model)
    opt.found_inf = torch.tensor(1.0)  # what GradScaler sets; a fused kernel then changes nothing
    model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    del opt.found_inf
    assert all(equal(before[name], s) for name, s in tool.state_dict()["ffns"].items())
    assert equal(parameters, snapshot(model))

@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_trains(act):
    model, opt, tool = start(NALoRAConfig(stride=1), lora_llama(hidden_act=act))
    losses = [take_step(model, opt, 0) for _ in range(5)]
    assert losses[-1] < losses[0]
    for s in tool.statistics().values():
        assert (s["scale"] == 1) == (act == "relu") and s["mask"].sum() == 24

@pytest.mark.parametrize("spoil", ["padding", "overflow", "overflow in float16"])
def test_useless_statistics_change_nothing(spoil):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    if spoil == "padding":
        tool.token_mask = torch.zeros(4, 15)
    else:
        weight = model.model.layers[1].mlp.gate_proj.base_layer.weight
        weight.data[0] *= math.inf if spoil == "overflow" else 1e6
    with torch.autocast("cpu", torch.float16, enabled="float16" in spoil):
        model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    for name, s in tool.state_dict()["ffns"].items():
        assert equal(before[name], s) or spoil != "padding" and "layers.0" in name

def test_it_warns_when_it_saw_no_gate():
    model, opt, tool = start(NALoRAConfig())
    model.eval()
    with pytest.warns(UserWarning, match="saw no gate"):
        take_step(model, opt, 0)

@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_and_low_precision_adapters(optimizer):
    model, opt, tool = start(NALoRAConfig(scale="none"), lora_llama().bfloat16(), optimizer)
    before = snapshot(model)
    take_step(model, opt, 0)
    for name, s in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B"
        same = (snapshot(model)[B] == before[B]).all(1)
        assert same[~s["mask"]].all() and not same[s["mask"]].all()

@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_autocast(dtype, tolerance):
    ends = []
    for enabled in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1))
        for i in range(8):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = model(*batch(i))[1]
            loss.backward()
            opt.step()
            opt.zero_grad()
        ends.append((loss.item(), tool.statistics()))
    (loss, statistics), (low_loss, low_statistics) = ends
    assert loss == pytest.approx(low_loss, rel=tolerance)
    for a, b in zip(statistics.values(), low_statistics.values()):
        assert b["importance"].dtype == torch.float32
        assert a["k_hat"] == pytest.approx(b["k_hat"], rel=tolerance)
        close(a["importance"], b["importance"], atol=tolerance, rtol=tolerance)

def test_gates_that_are_all_zero():
    model = lora_llama()
    model.model.layers[0].mlp.gate_proj.base_layer.weight.data.zero_()
    opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    take_step(model, opt, 0)  # lora_B = 0, so the gates of layer 0 are 0
    s = first(tool)
    assert (s["k_hat"], s["occupancy"], s["scale"]) == (1, 0, 1)
    assert s["importance"].tolist() == pytest.approx([0.05] * 48)  # (1 - ema) phi'(0)
    assert math.isfinite(take_step(model, opt, 1))

def test_a_float64_model_trains():
    model, opt, tool = start(NALoRAConfig(), lora_llama().double())
    take_step(model, opt, 0)
    take_step(model, opt, 1)
    assert all(s["importance"].dtype == torch.float64 for s in tool.statistics().values())
    base = small_llama().double()  # and so it does with its adapters in float32
    inject_lora(base, FFN, 4, 8)
    opt = torch.optim.AdamW(lora_parameters(base))
    tool = NALoRA(base, opt)
    take_step(base, opt, 0)
    for s in tool.statistics().values():
        assert s["importance"].dtype == torch.float32 and s["mask"].sum() == 24

@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    """Odd sizes, rank 1 to full, one token or none, padding only, frozen parts, any setting."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    model = small_llama(
        seed, hidden_size=heads * rng.choice([2, 4, 10]), intermediate_size=rng.randrange(1, 40),
        num_hidden_layers=rng.randrange(1, 4), num_attention_heads=heads, num_key_value_heads=1,
        head_dim=rng.choice([2, 6]), hidden_act=rng.choice(list(ACTIVATIONS)),
        vocab_size=rng.randrange(2, 30), tie_word_embeddings=rng.random() < 0.5)
    others = rng.sample(["q_proj", "v_proj", "o_proj"], rng.randrange(3))
    targets = [*FFN[:rng.randrange(1, 4)], *others]
    smallest = min(min(m.weight.shape) for name, m in nalora.base_linears(model).items()
                   if name.split(".")[-1] in targets)
    inject_lora(model, targets, rng.randrange(1, smallest + 1), rng.choice([1, 7.5, 16]))
    settings = NALoRAConfig(keep=rng.uniform(0.01, 1), ema=rng.choice([0, 0.9]),
                            stride=rng.choice([1, 2, 17, 1000]),
                            mask=rng.choice(["derivative", "none"]),
                            scale=rng.choice(["homogeneity", "none"]))
    random_run(rng, model, model.config.vocab_size, settings, NALoRA)

def random_run(rng, model, vocabulary, settings, steer):
    """Four random steps under steer(model, optimizer, settings): what must hold always."""
    optimizer = rng.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    model, opt, _ = start(None, model, optimizer)
    tool = steer(model, opt, settings)
    frozen = [(p, p.detach().clone()) for p in lora_parameters(model)[2:] if rng.random() < 0.3]
    for p, _ in frozen:
        p.requires_grad_(False)
    for step in range(4):
        shape = (rng.choice([1, 1, 3]), rng.choice([1, 2, 9]))
        tokens, targets = batch(step, shape, vocabulary)
        tool.token_mask = rng.choice([None, torch.ones_like(tokens), torch.zeros_like(tokens),
                                      torch.rand(tokens.shape) < 0.5])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (model(tokens, targets)[1] * rng.choice([1, 1, 0])).backward()  # 0: no gradient at all
        if rng.random() < 0.2:
            tool.token_mask = None
            model(tokens[:0])[0].sum().backward()  # a microbatch of nothing
        opt.step()
        opt.zero_grad()
        for name, s in tool.statistics().items():
            B = f"{name}.gate_proj.lora_B"
            moved = (model.get_parameter(B) != before[B]).any(1)
            assert not (moved & ~s["mask"]).any()
            assert s["importance"].isfinite().all() and 1e-6 < s["scale"] < 1e6
            width = len(s["mask"])
            kept = math.ceil(settings.keep * width - 1e-9)
            allowed = {width} if settings.mask == "none" else {kept, width}  # all at first
            assert s["mask"].sum().item() in allowed
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.equal(p, kept) for p, kept in frozen)
    with torch.no_grad():
        adapted = model(tokens)[0]
        merge_lora(model)
        close(model(tokens)[0], adapted, atol=1e-4, rtol=1e-3)

class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")
        indexed = "aten.index." in name or "index_put" in name
        by_bool = indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_bool or any(word in name for word in waits):
            self.found.append(name)
        return function(*args, **(kwargs or {}))

def test_a_step_waits_for_nothing():
    model, opt, tool = start(NALoRAConfig(stride=1))
    tokens, _ = batch(0)
    tool.token_mask = torch.ones_like(tokens)
    for i in range(4):
        take_step(model, opt, i)  # at passes 1, 2, 4, 8, ... it looks for steps by others
    with Waits() as waits:
        model(tokens)[0].sum().backward()
        model(tokens)[0].sum().backward()
        tool._before_step(opt, (), {})  # alone: AdamW itself reads its count of steps on the CPU
        tool._after_step(opt, (), {})
    assert waits.found == []
    with Waits() as waits:
        first(tool)
    assert waits.found  # it can fail

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
    one = NALoRA(model, opt)
    with pytest.raises(ValueError, match="steered by another NALoRA"):
        NALoRA(model, opt)
    one.remove()
    NALoRA(model, opt).remove()
    sigmoid = lora_llama()
    sigmoid.model.layers[1].mlp.act_fn = torch.sigmoid
    with pytest.raises(ValueError, match="not self-gated"):
        NALoRA(sigmoid, torch.optim.AdamW(lora_parameters(sigmoid)))
    assert not any(m._forward_hooks for m in model.modules())

# ---- an independent oracle: two gated FFNs in slow NumPy float64, written from nalora.py's -------
# ---- docstring and sharing no code with it; `w` maps the torch model's parameter names to arrays -

TOKENS, WIDTH, CHANNELS, RANK, ALPHA = 12, 4, 7, 2, 5
LR, DECAY, BETA1, BETA2, EPS = 1e-2, 0.1, 0.9, 0.999, 1e-8
DEFAULTS = {"mask": "derivative", "keep": 0.5, "scale": "homogeneity", "budget": "raw",
            "score": "phi_prime", "ema": 0.9}
SHAPES = {"gate_proj": (WIDTH, CHANNELS), "up_proj": (WIDTH, CHANNELS),
          "down_proj": (CHANNELS, WIDTH)}

def silu(z):
    """rho, rho', phi, phi' at z."""
    rho = 1 / (1 + np.exp(-z))
    return rho, rho * (1 - rho), z * rho, rho + z * rho * (1 - rho)

def gates_and_gradients(w, x, target):
    """({FFN: z (tokens, channels)}, {LoRA parameter: gradient of mean (x - target)^2}) of
    x <- x + FFN(x), twice."""
    names = [f"{i}.{projection}" for i in "01" for projection in SHAPES]
    W = {n: w[f"{n}.base_layer.weight"] + ALPHA / RANK * w[f"{n}.lora_B"] @ w[f"{n}.lora_A"]
         for n in names}
    seen = {}
    for i in "01":
        z = x @ W[f"{i}.gate_proj"].T
        u = x @ W[f"{i}.up_proj"].T
        seen[i] = x, z, u
        x = x + (silu(z)[2] * u) @ W[f"{i}.down_proj"].T
    dx = 2 * (x - target) / x.size
    dW = {}
    for i in "10":
        x, z, u = seen[i]
        _, _, phi, slope = silu(z)
        dh = dx @ W[f"{i}.down_proj"]
        dz = dh * u * slope
        du = dh * phi
        dW[f"{i}.down_proj"] = dx.T @ (phi * u)
        dW[f"{i}.gate_proj"] = dz.T @ x
        dW[f"{i}.up_proj"] = du.T @ x
        dx = dx + dz @ W[f"{i}.gate_proj"] + du @ W[f"{i}.up_proj"]
    dA = {f"{n}.lora_A": ALPHA / RANK * w[f"{n}.lora_B"].T @ dW[n] for n in names}
    dB = {f"{n}.lora_B": ALPHA / RANK * dW[n] @ w[f"{n}.lora_A"].T for n in names}
    return {i: z for i, (_, z, _) in seen.items()}, dA | dB

def adamw_step(p, g, moments, t):
    moments[:] = BETA1 * moments[0] + (1 - BETA1) * g, BETA2 * moments[1] + (1 - BETA2) * g * g
    mean = moments[0] / (1 - BETA1 ** t)
    square = moments[1] / (1 - BETA2 ** t)
    return -LR * DECAY * p - LR * mean / (np.sqrt(square) + EPS)

def oracle_score(c, v):
    return abs(silu(v)[3]) if c["score"] == "phi_prime" else silu(max(abs(v), 1e-3))[1]

def oracle_decide(c, gates, stats):
    """Brings `stats` up to date with the gates of this step's forward pass."""
    for i, s in stats.items():
        z = gates[i]
        I = s["importance"]
        for ch in range(CHANNELS):
            mean = sum(oracle_score(c, v) for v in z[:, ch]) / TOKENS
            I[ch] = c["ema"] * I[ch] + (1 - c["ema"]) * mean
        P = sum(v * silu(v)[3] * silu(v)[2] for v in z.flat)
        s["k_hat"] = P / sum(silu(v)[2] ** 2 for v in z.flat)
        s["occupancy"] = p = sum(v > 0 for v in z.flat) / z.size
        if c["mask"] != "none":
            order = sorted(range(CHANNELS), key=I.__getitem__, reverse=c["mask"] == "derivative")
            s["mask"] = np.isin(range(CHANNELS), order[:int(np.ceil(c["keep"] * CHANNELS))])
        one = c["scale"] == "none" or min(p, 1 - p) < 0.05
        s["scale"] = 1.0 if one else 1 / min(max(s["k_hat"], 0.5), 2)
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
        s = stats[name[0]]
        step = adamw_step(w[name], g, moments[name], t)
        if name.endswith("gate_proj.lora_B"):
            rows = s["mask"].astype(float)
            step *= (rows / rows.mean() if c["budget"] == "neutral" else rows)[:, None]
        w[name] += s["scale"] * step

@pytest.mark.parametrize("changes, bias, scales", [
    ({}, 0, []), ({"mask": "none"}, 0, []), ({"scale": "none"}, 0, [1]), ({}, -20, [1]),
    ({}, -1.3, [1, 2])])
def test_nalora_agrees_with_the_oracle(changes, bias, scales):
    """bias shifts FFN 0's gates: -20 leaves no two regimes; -1.3 does at times and has k_hat < 1/2
    at others (`scales`)."""
    config = NALoRAConfig(stride=1, **changes)
    agrees_with_the_oracle(functools.partial(NALoRA, config=config), changes, bias, scales)

def agrees_with_the_oracle(steer, changes, bias, scales):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.ModuleDict({n: nn.Linear(*shape, bias=False)
                                         for n, shape in SHAPES.items()}) for _ in "01")
    model[0].act_fn = model[1].act_fn = F.silu
    inject_lora(model, list(SHAPES), RANK, ALPHA)
    for name, p in model.double().named_parameters():
        nn.init.normal_(p, std=0.1 if "lora_B" in name else 0.5)
    model[0].gate_proj.base_layer.weight[:, 0] += bias  # x[:, 0] is 1
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    moments = {name: np.zeros((2, *p.shape)) for name, p in w.items()}
    seen = set()
    stats = {i: {"importance": np.zeros(CHANNELS), "mask": np.ones(CHANNELS, bool)} for i in "01"}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=LR, betas=(BETA1, BETA2), eps=EPS,
                                  weight_decay=DECAY)
    tool = steer(model, optimizer)
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
    for t in range(1, 11):
        x, target = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
        x[:, 0] = 1
        y = x
        for ffn in model:
            y = y + ffn.down_proj(ffn.act_fn(ffn.gate_proj(y)) * ffn.up_proj(y))
        optimizer.zero_grad()
        F.mse_loss(y, target).backward()
        optimizer.step()
        oracle_step(DEFAULTS | changes, w, moments, stats, t, x.numpy(), target.numpy())
        for name, p in model.named_parameters():
            same(p.detach().numpy(), w[name], err_msg=f"step {t}: {name}")
        for i, found in tool.statistics().items():
            for key, expected in stats[i].items():
                same(found[key], expected, err_msg=f"step {t}: {key} of FFN {i}")
        seen.add(stats["0"]["scale"])
    assert seen >= set(scales)

# ---- the Llama -----------------------------------------------------------------------------------

def test_rotation_is_a_complex_phase_and_depends_on_distance_alone():
    cos, sin = nalora.rotary_tables(replace(SMALL, head_dim=8), 3, 10, "cpu")
    x = torch.randn(2, 4, 10, 8)
    angle = torch.outer(torch.arange(3.0, 13), 10000.0 ** -(torch.arange(4) / 4))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(10, 4), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    close(nalora.rotate(x, cos, sin), expected, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 6}])
def test_cached_generation_equals_uncached(changes):
    model = small_llama(**changes).eval()
    tokens, _ = batch(0, (3, 7))
    plain = tokens
    for _ in range(9):
        plain = torch.cat([plain, model(plain)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, 9), plain)

def test_attention_is_causal():
    model = small_llama().eval()
    tokens, _ = batch(0)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    a = model(tokens)[0]
    b = model(changed)[0]
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])

def test_sampling_stop_and_context():
    model = small_llama().eval()
    tokens, _ = batch(0, (3, 7))
    assert torch.equal(model.generate(tokens, 5, temperature=1e-3), model.generate(tokens, 5))
    draws = [model.generate(tokens, 20, temperature=2.0,
                            generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    end = model.generate(tokens, 1)[0, -1]
    assert (model.generate(tokens, 20, stop=end.item())[0, 7:] == end).all()
    assert torch.equal(model.generate(tokens[:1], 20, stop=end.item())[0, 7:], end[None])
    with pytest.raises(ValueError, match="exceed the context of 64"):
        model.generate(tokens, 59)
    with pytest.raises(ValueError, match="65 tokens exceed the context"):
        model(torch.zeros(1, 65, dtype=torch.long))
    cache = [[], []]
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="one token at a time, not 7"):
        model(tokens, cache=cache)

def test_loss_is_the_mean_over_targets():
    model = small_llama()
    tokens, targets = batch(0)
    targets = targets.clone()
    targets[:, :5] = -100
    logits, loss = model(tokens, targets)
    full = model(tokens)[0]
    close(logits, full[targets != -100])
    close(loss, F.cross_entropy(full.flatten(0, 1), targets.flatten(), ignore_index=-100))

@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path, tied):
    model = small_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    again = Llama.from_pretrained(tmp_path / "whole")
    assert again.config == model.config and equal(model.state_dict(), again.state_dict())
    assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", "model.safetensors"]
    assert ("lm_head.weight" in load_file(tmp_path / "whole" / "model.safetensors")) != tied
    with pytest.raises(ValueError, match="carries LoRA"):
        lora_llama().save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()

def test_config_reads_both_rope_spellings():
    d = {**asdict(SMALL), "model_type": "llama", "torch_dtype": "float32", "eos_token_id": [3, 7],
         "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False}
    expected = replace(SMALL, rope_theta=5e5, eos_token_id=[3, 7])
    assert LlamaConfig.from_dict(d) == expected
    del d["rope_theta"]
    d["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert LlamaConfig.from_dict(d) == expected

@pytest.mark.parametrize("change, named", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 512}, "sliding_window"), ({"model_type": "gemma"}, "model_type"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type = 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"hidden_act": "tanh"}, "tanh"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"vocab_size": None}, "vocab_size"),
    ({"attention_dropout": 0.1}, "attention_dropout")])
def test_config_refuses_by_name_what_it_cannot_honour(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        LlamaConfig.from_dict({**asdict(SMALL), **change})

# ---- adapters ------------------------------------------------------------------------------------

def trained_lora(targets=FFN, **changes):
    model, opt, _ = start(None, lora_llama(targets, **changes))
    take_step(model, opt, 0)
    return model

def read(path):
    return json.loads(path.read_text())

def test_adapter_round_trip(tmp_path):
    model = trained_lora()
    tokens, _ = batch(1)
    save_adapter(model, tmp_path, base_model="base", settings={"keep": 0.5})
    config = read(tmp_path / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == sorted(FFN)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 12
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert tensors[name].shape == (4, 32)
    fresh = small_llama()
    assert load_adapter(fresh, tmp_path) == list(nalora.lora_layers(model))
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])
    injected = lora_llama()
    load_adapter(injected, tmp_path)
    assert torch.equal(injected(tokens)[0], model(tokens)[0])
    load_adapter(small_llama().bfloat16(), tmp_path)  # another dtype is the same base

def test_partial_targets_are_written_by_their_full_names(tmp_path):
    name = "model.layers.1.mlp.gate_proj"
    save_adapter(trained_lora(["layers.1.mlp.gate_proj"]), tmp_path)
    assert read(tmp_path / "adapter_config.json")["target_modules"] == [name]
    assert load_adapter(small_llama(), tmp_path) == [name]

@pytest.mark.parametrize("spoil, message", [
    (lambda d, c: (d / "adapter_config.json").unlink(), "cannot be read"),
    (lambda d, c: (d / "adapter_model.safetensors").write_bytes(b"not a tensor"), "cannot be read"),
    (lambda d, c: {**c, "use_dora": True}, "use_dora"),
    (lambda d, c: {**c, "peft_type": "IA3"}, "no plain LoRA"),
    (lambda d, c: {**c, "r": 8}, "rank 8"),
    (lambda d, c: {**c, "lora_alpha": 10**400}, "no plain LoRA"),
    (lambda d, c: {**c, "lora_alpha": math.nan}, "no plain LoRA"),
    (lambda d, c: save_adapter(trained_lora(hidden_size=48, head_dim=12), d), "names or shapes"),
    (lambda d, c: save_adapter(trained_lora(num_hidden_layers=3), d), "other module names"),
    (lambda d, c: save_adapter(trained_lora(seed=7), d), "trained on another base model"),
    (lambda d, c: (d / "nalora.json").write_text('{"base": null}'), "norms"),
    (lambda d, c: (d / "nalora.json").write_text('{"base": {"x": "1"}}'), "norms")])
def test_foreign_adapters_are_refused(tmp_path, spoil, message):
    save_adapter(trained_lora(), tmp_path)
    config = spoil(tmp_path, read(tmp_path / "adapter_config.json"))
    if isinstance(config, dict):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not nalora.has_lora(model)

def test_an_adapter_unlike_the_lora_in_the_model_is_refused(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    for targets, rank, alpha in ((FFN, 2, 8), (FFN, 4, 16), (FFN[:2], 4, 8)):
        model = small_llama()
        inject_lora(model, targets, rank, alpha)
        before = snapshot(model)
        with pytest.raises(ValueError, match="differs from the LoRA already in the model"):
            load_adapter(model, tmp_path)
        assert equal(before, snapshot(model))

# ---- data ----------------------------------------------------------------------------------------

sys.path.insert(0, str(HERE / "data"))

import make_data  # noqa: E402

TOKENIZER = problems.load_tokenizer()
SPLITS = {split: problems.read_problems(HERE / "data" / f"{split}.jsonl")
          for split in problems.SPLITS}
PROBLEMS = [p for split in SPLITS.values() for p in split]
EQUATIONS = problems.read_problems(HERE / "data" / "arithmetic.jsonl")
TEXT = (HERE / "data" / "pretrain.txt").read_text()

@pytest.mark.parametrize("text", [
    "Ann has 12 apples.\n12+5=17.", "", " ", "naïve café 東京 🙂 \x00\t\r\n",
    "ALL caps, 1234567890!?  double  spaces", "<|endoftext|>"])
def test_tokenizer_round_trip(text):
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and all(i < TOKENIZER.n_vocab for i in ids)

def test_digits_are_single_tokens_and_the_pattern_is_the_trained_one():
    for number in range(1000):
        for i in TOKENIZER.encode_ordinary(f"has {number} eggs"):
            assert sum(c.isdigit() for c in TOKENIZER.decode([i])) <= 1
    assert TOKENIZER._pat_str == make_data.PATTERN and TOKENIZER.n_vocab == make_data.VOCAB

def test_splits_share_no_template_with_operands():
    keys = {split: [(p["template"], *p["operands"]) for p in SPLITS[split]] for split in SPLITS}
    sizes = {split: len(k) for split, k in keys.items()}
    assert sizes == make_data.SIZES == {"train": 1500, "val": 200, "test": 500}
    assert len(set().union(*keys.values())) == sum(map(len, keys.values()))
    assert len({p["prompt"] for p in PROBLEMS}) == 2200
    assert len({p["template"] for p in SPLITS["train"]}) == len(make_data.TEMPLATES) >= 12

def test_every_solution_is_right_and_uses_the_operands():
    for p in PROBLEMS:
        assert p["operands"] == [int(n) for n in re.findall("[0-9]+", p["prompt"])]
        steps = re.findall(r"([0-9]+)([+-])([0-9]+)=([0-9]+)\.", p["completion"])
        assert len(steps) == 2
        for x, sign, y, z in steps:
            assert make_data.evaluate(int(x), sign, int(y)) == int(z)
        assert steps[0][3] in (steps[1][0], steps[1][2])  # the second step uses the first
        assert problems.final_answer(p["completion"]) == p["answer"] == int(steps[1][3])

def test_pretraining_text_holds_no_word_problem_and_no_held_out_equation():
    assert not re.search(r"answer is [0-9]", TEXT)
    documents = TEXT.splitlines()
    assert not any(d.partition("?")[2].count("=") > 1 for d in documents)  # no two-step question
    equations = "\n".join(d for d in documents if d[0].isdigit())
    shown = set(re.findall(r"(?:^|(?<= ))[0-9]+[+-][0-9]+=", equations, re.M))
    held_out = {p["prompt"] for p in EQUATIONS}
    assert len(shown) > 9000 and len(held_out) == 1010 and not shown & held_out

def test_every_token_of_the_problems_was_trained_in_the_base():
    counts = np.bincount(TOKENIZER.encode_ordinary(TEXT), minlength=TOKENIZER.n_vocab)
    texts = (p["prompt"] + p["completion"] for p in PROBLEMS)
    used = {i for text in texts for i in TOKENIZER.encode_ordinary(text)}
    assert min(counts[i] for i in used) > 200  # LoRA cannot train a row of a frozen, tied head

def test_make_data_makes_what_is_committed():
    documents, held_out, equations = make_data.pretraining_text()
    assert "\n".join(documents) + "\n" == TEXT
    assert "\n".join(held_out) + "\n" == (HERE / "data" / "pretrain_val.txt").read_text()
    unnumbered = {split: [{k: v for k, v in p.items() if k != "line"} for p in SPLITS[split]]
                  for split in SPLITS}
    assert make_data.split_problems() == unnumbered
    assert [(p["prompt"], p["answer"]) for p in EQUATIONS] == equations

def test_the_committed_base_is_small_and_in_half_precision():
    path = HERE / "data" / "base" / "model.safetensors"
    assert path.stat().st_size < 4e6
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    model = Llama.from_pretrained(path.parent)
    assert problems.arithmetic_accuracy(model, TOKENIZER, EQUATIONS) > 0.95
    assert problems.exact_match(model, TOKENIZER, SPLITS["test"][:200])[0] <= 0.01

# ---- train_tiny.py -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base model that trains in no time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    config = replace(SMALL, vocab_size=TOKENIZER.n_vocab, num_attention_heads=2, head_dim=16,
                     num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1)
    Llama(config).save_pretrained(path)
    return path

@pytest.fixture(autouse=True)
def tiny_pretraining(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    whole = problems.text_batches

    def less(tokenizer, path, size, seed):
        return whole(tokenizer, path.with_name("pretrain_val.txt"), size, seed)

    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, **small})
    monkeypatch.setattr(problems, "text_batches", less)

def arguments(base, out, method="nalora", *more):
    fine = [] if method == "pretrain" else ["--base", str(base)]
    return ["--method", method, "--out", str(out), "--threads", "1", "--test-size", "4", "--steps",
            "6", "--eval-every", "2", "--batch-size", "4", *fine, *map(str, more)]

def succeeds(argv):
    assert train_tiny.main(list(map(str, argv))) == 0

def refused(capsys, argv, message):
    """Exit code 2 and one sentence that the message (a regular expression) is found in."""
    capsys.readouterr()
    assert train_tiny.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error

def result(out):
    """What a run leaves behind and what must not depend on interruptions: file name -> bytes."""
    passing = ("summary.json", "checkpoint.pt")
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in passing]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}

@pytest.fixture(scope="session")
def uninterrupted(base, tmp_path_factory):
    """uninterrupted(method): what a run without interruptions leaves behind."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def of(method):
        succeeds(arguments(base, folder / method, method))
        return result(folder / method)

    return of

@pytest.mark.parametrize("method", train_tiny.METHODS)
def test_every_method_runs_and_reports(base, tmp_path, capsys, method):
    run = tmp_path / "run"
    succeeds(arguments(base, run, method))
    out = capsys.readouterr().out
    summary = read(run / "summary.json")
    assert summary["method"] == method and math.isfinite(summary["val_loss"])
    assert {"seed", "trainable_parameters", "total_parameters", "step_ms", "train_seconds",
            "wall_seconds"} <= set(summary)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 2, 4, 6]
    assert all(math.isfinite(r["loss"]) for r in records[1:])
    assert "s left" in out and "parameters train" in out and (run / "loss.png").exists()
    assert 0 <= summary["test_exact_match"] <= 1 and f"{method}: exact match" in out
    assert len(re.findall(r"\[(?:right|wrong)", out)) == 3
    nalora_runs = method.startswith("nalora")
    if nalora_runs:  # NA-LoRA is seen at work
        number = r"\d\.\d\d"
        rows = "100%" if method == "nalora-scale" else "50%"
        line = f"k_hat {number} to {number}  scale {number} to {number}  rows {rows}"
        assert re.search(line, out)
    if method == "pretrain":
        Llama.from_pretrained(run / "model")
    has_adapter = any((run / "adapter").glob("*.safetensors"))
    assert has_adapter == (method not in ("pretrain", "full"))
    assert (run / "nalora.png").exists() == ("layers" in records[1]) == nalora_runs
    succeeds(["--sample", "Ann has 3 apples.", "--out", run])
    assert capsys.readouterr().out.startswith("Ann has 3 apples.\n")

def test_method_all_prints_one_table(base, tmp_path, capsys):
    succeeds(arguments(base, tmp_path / "all", "all", "--keep", "0.25"))
    out = capsys.readouterr().out
    assert all(re.search(rf"^{m} +\d", out, re.M) for m in ("full", "lora", "nalora"))
    assert read(tmp_path / "all" / "nalora" / "config.json")["keep"] == 0.25

def test_methods_are_what_they_are_called():
    for method, parts in {"nalora": {}, "nalora-mask": {"scale": "none"},
                          "nalora-scale": {"mask": "none"}}.items():
        c = train_tiny.Config(keep=0.25, ema=0.5, stride=3)
        optimizer = train_tiny.METHODS[method](small_llama(), c)
        assert optimizer.nalora.config == NALoRAConfig(keep=0.25, ema=0.5, stride=3, **parts)
    for method in ("full", "lora"):
        optimizer = train_tiny.METHODS[method](small_llama(), train_tiny.Config())
        assert not hasattr(optimizer, "nalora")
    text = train_tiny.command_line().format_help()
    assert all(method in text for method in train_tiny.METHODS)

@pytest.mark.parametrize("flag", [
    "--seed 1", "--lr 0.01", "--batch-size 5", "--train-size 8", "--rank 2", "--alpha 4",
    "--targets gate_proj up_proj", "--keep 0.2", "--dtype bfloat16", "--steps 5"])
def test_every_flag_changes_the_adapter(base, tmp_path, uninterrupted, monkeypatch, flag):
    plain = uninterrupted("nalora")
    monkeypatch.setattr(train_tiny, "draw_loss", lambda *_: None)
    monkeypatch.setattr(train_tiny, "draw_layers", lambda *_: None)
    succeeds(arguments(base, tmp_path / "run", "nalora", *flag.split()))
    name = "adapter/adapter_model.safetensors"
    assert result(tmp_path / "run")[name] != plain[name]

def test_the_same_seed_gives_the_same_bits(base, tmp_path, uninterrupted):
    succeeds(arguments(base, tmp_path / "run"))
    assert result(tmp_path / "run") == uninterrupted("nalora")

def test_the_training_loop_shows_nalora_the_padding(base):
    c = train_tiny.Config(base=str(base), steps=3, batch_size=4, test_size=4)
    run = train_tiny.set_up(c)
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

@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, m) for m in train_tiny.METHODS)])
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
    succeeds(arguments(base, tmp_path / "cut", method, "--resume"))
    assert result(tmp_path / "cut") == wanted

@pytest.mark.parametrize("every, stops_at, kept", [
    ("1", "validation loss is not finite at step 4", 3),
    ("3", "gradient is not finite at step 5", 1)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        base, tmp_path, capsys, monkeypatch, every, stops_at, kept):
    out = tmp_path / "run"
    rate = train_tiny.schedule
    argv = arguments(base, out, "nalora", "--eval-every", every)
    monkeypatch.setattr(train_tiny, "schedule",
                        lambda c, step: 1e28 if step == 3 else rate(c, step))
    refused(capsys, argv, stops_at)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == kept + 1 and math.isfinite(records[-1]["val_loss"])
    assert not (out / "summary.json").exists()
    monkeypatch.setattr(train_tiny, "schedule", rate)
    succeeds([*argv, "--resume"])

def test_an_existing_run_is_not_overwritten_and_resume_checks_its_configuration(base, tmp_path,
                                                                                capsys):
    out = tmp_path / "run"
    again = arguments(base, out, "nalora", "--resume")
    succeeds(arguments(base, out))
    before = result(out)
    refused(capsys, arguments(base, out), "already holds a run.*--resume.*--out")
    for change, message in (("--lr 0.1", "lr = 0.005, not 0.1"), ("--method lora", "not 'lora'"),
                            ("--keep 0.3", "keep = 0.5, not 0.3")):
        refused(capsys, [*again, *change.split()], message)
    assert result(out) == before
    settings = read(out / "config.json")
    (out / "config.json").write_text(json.dumps({**settings, "mask": "random"}))
    refused(capsys, again, "mask = 'random', not None")  # a setting that this script lacks
    (out / "config.json").write_text(json.dumps(settings))
    succeeds(arguments(base, tmp_path / "other", "nalora", "--seed", "1"))
    shutil.copy(tmp_path / "other" / "checkpoint.pt", out)
    refused(capsys, again, "made with other settings")
    (out / "checkpoint.pt").write_bytes(b"\x00" * 50)
    refused(capsys, again, "is no checkpoint of this run")

def test_another_number_of_threads_is_refused_with_its_reason(base, tmp_path, capsys):
    again = arguments(base, tmp_path / "run", "nalora", "--resume")
    succeeds(arguments(base, tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    message = "threads = 1, not 2: sums would be rounded .*--threads 1"
    refused(capsys, [*again, "--threads", "2"], message)
    succeeds(again)

@pytest.mark.parametrize("changed", ["data", "base"])
def test_a_run_is_not_continued_on_other_data_or_another_base(base, tmp_path, capsys, changed):
    shutil.copytree(base, tmp_path / "base")
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": "2."}) for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    command = arguments(tmp_path / "base", tmp_path / "run", "nalora", "--data",
                        tmp_path / "own.jsonl")
    ask = ["--out", tmp_path / "run", "--sample", "1+1="]
    succeeds(command)
    succeeds(ask)
    (tmp_path / "run" / "summary.json").unlink()
    succeeds([*command, "--resume"])
    if changed == "data":
        (tmp_path / "own.jsonl").write_text("\n".join(rows[1:] + rows[:1]))
    else:
        model = Llama.from_pretrained(tmp_path / "base")
        model.model.norm.weight.data[0] += 1e-3  # too little for the norms in nalora.json
        model.save_pretrained(tmp_path / "base")
        refused(capsys, ask, "has changed since")
    (tmp_path / "run" / "summary.json").unlink()
    refused(capsys, [*command, "--resume"], f"the {changed} has changed since")

@pytest.mark.parametrize("flags, message", [
    ("--rank 0", "rank is 0"), ("--rank 33", "takes a whole number from 1 to"),
    ("--targets nothing", "matches no linear layer; there are"), ("--keep 0", "keep is 0"),
    ("--targets q_proj", "No gated FFN"), ("--keep 1.01", "keep is 1.01"),
    ("--method lora --keep 0.5", "--keep has no effect with --method lora"),
    ("--method full --rank 4", "--rank has no effect"), ("--lr -1", "--lr is -1"),
    ("--method pretrain --train-size 5", "--train-size has no effect"),
    ("--method nalora-scale --keep 0.2", "--keep has no effect"), ("--steps 0", "--steps is 0"),
    ("--base nowhere", "nowhere/config.json cannot be read"), ("--data nowhere", "nowhere"),
    ("--batch-size -2", "--batch-size is -2"), ("--alpha 0", "--alpha is 0"),
    ("--seed -1", "negative"), (f"--seed {10**20}", "that large"), ("--threads 0", "threads is 0"),
    ("--threads 99999999999999", "--threads is 99999999999999"), ("--device mps", "not available"),
    ("--test-size -1", "--test-size is -1"), ("--method all --rank 0", "rank is 0"),
    ("--method all --targets q_proj", "No gated FFN")])
def test_bad_flags(base, tmp_path, capsys, flags, message):
    method = "pretrain" if "pretrain" in flags else "nalora"
    refused(capsys, [*arguments(base, tmp_path / "run", method), *flags.split()], message)
    assert not (tmp_path / "run").exists()

def test_help_and_unknown_choices(capsys):
    for argv, code in ((["--help"], 0), (["--method", "ia3"], 2), (["--keep", "many"], 2)):
        with pytest.raises(SystemExit) as stop:
            train_tiny.main(argv)
        assert stop.value.code == code
    assert "ia3" in capsys.readouterr().err

def test_a_prompt_longer_than_the_context_is_refused(base, tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    succeeds(arguments(base, tmp_path / "run"))
    refused(capsys, ["--sample", "Ann has 3 apples. " * 60, *out], "exceed the context of 256")
    refused(capsys, ["--sample", "--out", tmp_path / "nowhere"], "holds no run")
    (tmp_path / "run" / "summary.json").unlink()
    refused(capsys, ["--sample", *out], "is not finished")

def test_one_file_of_prompts_and_completions(base, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"{i}-0=", "completion": f"{i}."}) for i in range(40)]
    path.write_text("\n".join(lines))
    splits = problems.read_splits(path)
    assert {split: len(p) for split, p in splits.items()} == {"train": 32, "val": 4, "test": 4}
    rows = [p for split in splits.values() for p in split]
    assert sorted(p["line"] for p in rows) == list(range(1, 41))
    assert all(p["prompt"] == f"{p['line'] - 1}-0=" for p in rows)
    assert splits == problems.read_splits(path)  # drawn always alike
    succeeds([*arguments(base, tmp_path / "run"), "--data", path])
    assert "exact match" in capsys.readouterr().out
    assert problems.is_right({"completion": "7."}, " 7. ")
    assert not problems.is_right({"completion": "7."}, "8.")
    path.write_text("\n".join(lines[:9]))
    refused(capsys, [*arguments(base, tmp_path / "other"), "--data", path], "at least 10")

def test_a_split_is_drawn_and_an_error_names_the_line_of_the_file(base, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{i % 10} {i}", "completion": "x"} for i in range(200)]
    for row_order in (rows, sorted(rows, key=lambda row: row["prompt"])):  # mixed, kind after kind
        path.write_text("\n".join(map(json.dumps, row_order)))
        kinds = {split: {p["prompt"][0] for p in part}
                 for split, part in problems.read_splits(path).items()}
        assert len(kinds["test"]) > 5 and len(kinds["train"]) == 10
    rows[15]["prompt"] *= 300
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = [*arguments(base, tmp_path / "run"), "--data", path]
    refused(capsys, argv, "own.jsonl, line 16:")

def test_a_sample_is_asked_as_training_asked(base, tmp_path, capsys, monkeypatch):
    asked = []
    answer = problems.solve

    def solve(model, tokenizer, prompts, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return answer(model, tokenizer, prompts, max_new_tokens)

    cases = (("=", "1+1=", "1+1="), ("\n", "1+1", "1+1\n"), (" ", " 1 ", " 1 "))
    for ending, given, wanted in cases:
        rows = [{"prompt": f"{i}+1{ending}", "completion": "2" * 40} for i in range(30)]
        out = tmp_path / f"run{ord(ending)}"
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
        succeeds([*arguments(base, out), "--data", tmp_path / "own.jsonl"])
        monkeypatch.setattr(problems, "solve", solve)
        succeeds(["--out", out, "--sample", given])
        monkeypatch.undo()
        assert asked.pop() == ([wanted], 41)  # 40 tokens and the end

@pytest.mark.parametrize("given, said, answer, right", [
    ("54.", "54.", 54, True), ("54.", "45.", 54, False), ("6*12=72\n#### 72", "#### 72", 72, True),
    ("#### 72", "72", 72, False), ("The answer is 16.", "The answer is 16.", 16, True),
    ("The answer is 16.", "16", 16, False), ("The answer is 1.", "The answer is 1,234.", 1, False),
    ("The answer is 5.", "The answer is 1,234.", 1234, True), ("x", "It is 12.5.", 12.5, True),
    ("The answer is 12.", "The answer is 12.5.", 12, False), ("x", "5-3=2", 2, True),
    ("The answer is 7.", "The answer is $72.", 72, True), ("x", "it is -$7", -7, True),
    ("x", "no number", 0, False), ("x", "1, 2", 2, True),
    ("x", "9007199254740993", 2**53 + 1, True)])
def test_a_number_is_read_as_the_data_writes_it(given, said, answer, right):
    problem = {"prompt": "?", "completion": given, "answer": answer}
    assert problems.is_right(problem, said) is right

def test_without_test_problems_only_the_validation_loss_is_measured(base, tmp_path):
    succeeds([*arguments(base, tmp_path / "run"), "--test-size", "0"])
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["test_exact_match"] is None and summary["arithmetic_accuracy"] is None
    assert math.isfinite(summary["val_loss"])

def figure_of(monkeypatch, draw, *args):
    """The figure that draw(*args, path) would save."""
    found = []
    monkeypatch.setattr(train_tiny, "save_figure", lambda figure, path: found.append(figure))
    draw(*args, Path("unused.png"))
    return found[0]

def points(line):
    return list(line.get_xdata()), list(line.get_ydata())

def test_the_figure_of_a_loss_shows_every_record(monkeypatch):
    records = [{"step": 0, "val_loss": 2.5}, {"step": 10, "loss": 1.5, "val_loss": 1.0},
               {"step": 20, "loss": 0.75, "val_loss": 0.5}]
    other = [{**r, "val_loss": r["val_loss"] + 1} for r in records]
    figure = figure_of(monkeypatch, train_tiny.draw_loss, {"lora": records, "nalora": other})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert points(lines["lora, validation"]) == ([0, 10, 20], [2.5, 1.0, 0.5])
    assert points(lines["nalora, validation"]) == ([0, 10, 20], [3.5, 2.0, 1.5])
    assert points(lines["lora, training"]) == ([5, 15], [1.5, 0.75])
    assert len({line.get_color() for line in lines.values()}) == 2 and figure.axes[0].get_legend()

def test_the_figure_of_a_run_shows_every_layer(monkeypatch):
    def layer(x):
        return {"k_hat": x, "occupancy": x / 2, "scale": 1 / x, "density": 0.5, "turnover": x / 4}

    records = [{"step": 0, "val_loss": 1}]
    for step in (10, 20):
        layers = {"a": layer(1 + step / 100), "b": layer(1.2)}
        records.append({"step": step, "layers": layers})
    figure = figure_of(monkeypatch, train_tiny.draw_layers, records)
    assert len(figure.axes) == 4 and len({ax.get_title() for ax in figure.axes}) == 4
    for ax, key in zip(figure.axes, ("k_hat", "scale", "occupancy", "turnover")):
        a, b = ax.get_lines()[:2]
        assert points(a) == ([10, 20], [layer(1.1)[key], layer(1.2)[key]])
        assert set(b.get_ydata()) == {layer(1.2)[key]} and a.get_color() != b.get_color()
        assert (len(ax.get_lines()) == 3) == (key in ("k_hat", "scale"))  # a line at 1
    legend = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["layer 0", "layer 1"]

# ---- README.md -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
OWN_MODEL = README.split("## On your own model")[1].split("\n## ")[0]

def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.replace(OWN_MODEL, ""), re.S)
    assert snippets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(HERE / "data")
    exec(compile("\n".join(snippets), "README.md", "exec"), {})
    assert re.search(r"^[01]\.\d+$", capsys.readouterr().out, re.M)  # the k_hat that it prints
    model = Llama.from_pretrained(HERE / "data" / "base")
    assert load_adapter(model, tmp_path / "runs" / "snippet")

def test_the_readme_names_what_exists():
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    parser = train_tiny.command_line()
    for command in re.findall(r"python train_tiny.py ([^#`\n]*)", README):
        parser.parse_args(shlex.split(command.replace("--help", "")))
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (HERE / path).exists(), path
