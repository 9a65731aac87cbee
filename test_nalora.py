"""The executable specification of nalora.py and train_tiny.py, in their order. It opens with an
oracle: the pseudo-code of nalora.py's docstring in NumPy, which shares no code with it.
Run: pytest test_nalora.py. Offline, on the CPU."""
import ast
import builtins
import copy
import functools
import importlib
import itertools
import json
import math
import re
import signal
import symtable
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import nalora
import train_tiny
from data import problems, runs
from nalora import (GateSums, Llama, LlamaConfig, NALoRA, NALoRAConfig, State, blend, decide,
                    effective_homogeneity, homogeneity, importance_mask, inject_lora, load_adapter,
                    lora_layers, lora_parameters, merge_lora, observe, save_adapter,
                    selection_weight, step_scale, value_and_slope)

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
    trained = [p for p in lora_parameters(model) if p.requires_grad]
    opt = optimizer(trained, **{"lr": 1e-2, **settings})
    return model, opt, None if config is None else NALoRA(model, opt, config)

def take_step(model, opt, *seeds):
    """A step after a pass of each seed."""
    for seed in seeds:
        loss = model(*batch(seed))[1]
        loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()

def train(run, steps=range(3)):
    return [take_step(*run[:2], i) for i in steps]

def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def refuses(message, call, *args):
    with pytest.raises(ValueError, match=message):
        call(*args)

# ---- the oracle: the pseudo-code of nalora.py's docstring and nothing else, in NumPy float64 -----
def o_silu(z):  # phi, phi'
    rho = 1 / (1 + np.exp(-z))
    return rho * z, rho + rho * (1 - rho) * z
def o_blend(b, a, w):
    return np.where(w < 1 / 2, b + w * (a - b), a - (a - b) * (1 - w))
def o_observe(sums, z, real, n, stride):
    """Adds a pass z (batch, seq, F) to sums [N, S, P, Q, G], [] at first; real (batch, seq)."""
    for i, (row, real_i) in enumerate(zip(z.reshape(-1, z.shape[-1]), real.flatten())):
        if i % stride == n % stride and real_i:
            phi, slope = o_silu(row)
            terms = 1, abs(slope), (row * slope * phi).sum(), (phi * phi).sum(), (row > 0).sum()
            sums[:] = [total + term for total, term in zip(sums or [0] * 5, terms)]
def o_decide(state, sums, config):
    if not sums or not np.isfinite(np.hstack(sums)).all():
        return
    N, S, P, Q, G = sums
    I = state["importance"] = o_blend(S / N, state["importance"], config.ema)
    if config.mask == "derivative":
        order = sorted(range(len(I)), key=lambda c: (-I[c], c))
        count = max(1, math.ceil(config.keep * len(I) - 1e-9))
        state["mask"] = np.isin(range(len(I)), order[:count])
    k_hat = state["k_hat"] = P / Q if Q else 1
    p = state["occupancy"] = G / (N * len(I))
    if config.scale == "homogeneity":
        state["scale"] = 1 / min(max(k_hat, 1 / 2), 2) if min(p, 1 - p) >= 0.05 else 1
def o_start(F):
    return dict(importance=np.zeros(F), mask=np.ones(F, bool), k_hat=math.nan, occupancy=math.nan,
                scale=1)
def agree(state, right, **tolerance):
    for key, expected in right.items():
        np.testing.assert_allclose(getattr(state, key), expected, err_msg=key, **tolerance)

def test_the_worked_example_of_the_docstring():
    z, sums, s = np.array([[[1.0, -2.0]]]), [], o_start(2)
    o_observe(sums, z, np.ones((1, 1)), 0, 17)
    o_decide(s, sums, NALoRAConfig())
    phi, slope = o_silu(z[0, 0])
    right = [*phi, *slope, *sums[1], slope[0], phi[0], slope[1], phi[1], sums[2], phi[0], -phi[1],
             sums[3], round(s["k_hat"], 2), s["scale"], 0.1, *s["importance"], s["scale"]]
    text = nalora.__doc__.split("z = (1, -2):")[1].split("of the optimizer's step")[0]
    np.testing.assert_allclose([*map(float, re.findall(r"-?\d+\.\d+", text))], right, atol=5e-4)
    assert "N = 1 " in text and "G = 1  p = 1/2\n" in text and "mask = (1, 0)" in text
    assert (sums[0], sums[4], s["occupancy"], *s["mask"]) == (1, 1, 1 / 2, True, False)

def o_gradients(w, x, target, real):
    """({FFN: z}, {LoRA parameter: gradient of the sum of (x - target)^2 over real tokens}) of two
    FFNs, x <- x + FFN(x); w maps torch's names of parameters to arrays. rank 2, alpha 5."""
    W = {f"{i}.{n}": w[f"{i}.{n}.base_layer.weight"] +
         5 / 2 * w[f"{i}.{n}.lora_B"] @ w[f"{i}.{n}.lora_A"] for i in "01" for n in FFN}
    seen, grads = {}, {}
    for i in "01":
        seen[i] = x, x @ W[f"{i}.gate_proj"].T, x @ W[f"{i}.up_proj"].T
        x = x + (o_silu(seen[i][1])[0] * seen[i][2]) @ W[f"{i}.down_proj"].T
    dx = 2 * (x - target) * real[..., None]
    for i in "10":
        x, z, u = seen[i]
        phi, slope = o_silu(z)
        dh = dx @ W[f"{i}.down_proj"]
        dz, du = dh * u * slope, dh * phi
        for n, dy, x_in in (("gate", dz, x), ("up", du, x), ("down", dx, phi * u)):
            dW = 5 / 2 * np.einsum("bto,bti->oi", dy, x_in)
            grads[f"{i}.{n}_proj.lora_A"] = w[f"{i}.{n}_proj.lora_B"].T @ dW
            grads[f"{i}.{n}_proj.lora_B"] = dW @ w[f"{i}.{n}_proj.lora_A"].T
        dx = dx + dz @ W[f"{i}.gate_proj"] + du @ W[f"{i}.up_proj"]
    return {i: seen[i][1] for i in "01"}, grads

def o_adamw(p, g, moments):
    """p after a step of AdamW: lr 0.01, decay 0.1, betas 0.9 and 0.999; moments [m, v, t]."""
    moments[:] = [0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g * g, moments[2] + 1]
    m, v, t = moments
    return p - 0.01 * (0.1 * p + m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))

# Steps of the optimizer: a kind, whether there is a token mask, and (batch, seq) of the passes.
STEPS = [("", 0, (2, 6)), ("", 1, (1, 5), (2, 4)), ("skipped", 1, (2, 5)), ("", 1, (1, 7)),
         ("dry", 0), ("evaluated", 0, (3, 4)), ("padding alone", 1, (2, 3)), ("", 0, (2, 4)),
         ("infinite", 1, (2, 6)), ("", 1, (2, 8)), ("", 0, (1, 9))]

@pytest.mark.parametrize("changes, bias, scales", [
    ({"stride": 1}, 0, []), ({"stride": 3, "keep": 0.3, "ema": 0.6}, 0, []), ({}, 0, []),
    ({"mask": "none"}, 0, []), ({"stride": 2, "scale": "none", "ema": 0}, 0, [1]),
    ({"stride": 1}, -20, [1]), ({"stride": 1}, -1.3, [1, 2])])
def test_nalora_agrees_with_the_oracle(changes, bias, scales):
    """bias shifts FFN 0's gates: -20 leaves no two regimes, -1.3 does at times and has k_hat < 1/2
    at others (`scales`)."""
    config = NALoRAConfig(**changes)
    torch.manual_seed(0)
    ffns = [nalora.GatedFFN(replace(SMALL, hidden_size=4, intermediate_size=7)) for _ in "01"]
    model = nn.Sequential(*ffns).double()
    inject_lora(model, FFN, rank=2, alpha=5)
    for name, p in model.double().named_parameters():
        nn.init.normal_(p, std=0.1 if "lora_B" in name else 0.5)
    ffns[0].gate_proj.base_layer.weight.data[:, 0] += bias  # x[..., 0] is 1
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    opt = torch.optim.AdamW(lora_parameters(model), lr=0.01, weight_decay=0.1, fused=True)
    tool = NALoRA(model, opt, config)
    states, moments = {i: o_start(7) for i in "01"}, {name: [0, 0, 0] for name in w}
    sums, n, seen = {"0": [], "1": []}, 0, set()
    for ffn in tool.ffns:
        agree(ffn.state, states[ffn.name])
    for kind, masked, *passes in STEPS:
        if kind != "dry":  # a dry step is one more with the same gradients
            opt.zero_grad()
            grads = {name: 0 for name in w if "lora" in name}
        for shape in passes:
            x, target = torch.randn(2, *shape, 4, dtype=torch.float64)
            x[..., 0] = 1
            real = (torch.rand(shape) < (0.7 if masked else 2)) & (kind != "padding alone")
            tool.token_mask = 7 * real if masked else None  # nonzero: real
            middle = x + ffns[0](x)
            ((middle + ffns[1](middle) - target)[real] ** 2).sum().backward()
            gates, new = o_gradients(w, x.numpy(), target.numpy(), real.numpy())
            grads = {name: g + new[name] for name, g in grads.items()}
            for i in "01":
                o_observe(sums[i], gates[i], real.numpy(), n, config.stride)
        if kind == "evaluated":  # and a pass without gradients: they leave no trace
            model.eval()(2 * x)
            with torch.no_grad():
                model.train()(3 * x)
        if kind == "infinite":  # FFN 1 sees one more pass, without a backward
            ffns[1].act_fn(torch.full((*shape, 7), math.inf, requires_grad=True))
            sums["1"] = [math.inf]
        opt.found_inf = torch.tensor(float(kind == "skipped"))  # as GradScaler does
        opt.step()
        if kind != "skipped":
            for i in "01" if passes else "":
                o_decide(states[i], sums[i], config)
                sums[i] = []
            n += len(passes) > 0
            for name, g in grads.items():
                s = states[name[0]]
                rows = s["mask"][:, None] if name.endswith("gate_proj.lora_B") else 1
                w[name] = o_blend(w[name], o_adamw(w[name], g, moments[name]), s["scale"] * rows)
        assert tool.steps == n
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach(), w[name], atol=1e-10, err_msg=f"{kind} {name}")
        for ffn in tool.ffns:
            agree(ffn.state, states[ffn.name], atol=1e-10)
        seen.add(float(states["0"]["scale"]))
    assert n == 9 and seen >= set(scales)

# ---- 1 the mathematics ---------------------------------------------------------------------------
def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)

Z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
ROOT, S, QUICK = math.sqrt(2 / math.pi), torch.sigmoid(Z), torch.sigmoid(1.702 * Z)
TANH = (ROOT * (Z + 0.044715 * Z**3)).tanh()
TANH_SLOPE = (1 - TANH**2) * ROOT * (1 + 3 * 0.044715 * Z**2)
CLOSED_FORMS = {  # act: (rho, phi', where kappa is 0, its maximum and where that is)
    F.silu: (S, S * (1 + Z * (1 - S)), -1.2785, 1.2785, 1.2785),
    nn.SiLU(inplace=True): (S, S * (1 + Z * (1 - S)), -1.2785, 1.2785, 1.2785),
    nn.GELU(): (NORMAL.cdf(Z), NORMAL.cdf(Z) + Z * NORMAL.log_prob(Z).exp(), -0.752, 1.2945, 0.84),
    nn.GELU("tanh"): (0.5 + TANH / 2, 0.5 + TANH / 2 + Z * TANH_SLOPE / 2, -0.752, 1.2943, 0.84),
    quick_gelu: (QUICK, QUICK * (1 + 1.702 * Z * (1 - QUICK)), -0.751, 1.2785, 0.751),
    nn.ReLU(): ((Z > 0).double(), (Z > 0).double(), None, 1, None)}

@pytest.mark.parametrize("act", CLOSED_FORMS, ids=str)
def test_closed_forms_and_known_points(act):
    rho, slope, zero, top, top_at = CLOSED_FORMS[act]
    z = Z.clone().requires_grad_()
    phi, found = value_and_slope(act, z)
    assert torch.equal(z, Z) and not phi.requires_grad and not found.requires_grad
    close(phi, Z * rho, atol=1e-12, rtol=0)
    close(found, slope, atol=1e-10, rtol=0)
    close(selection_weight(act, Z), rho, atol=1e-10, rtol=0)
    kappa, on = homogeneity(act, Z), (phi != 0) & (Z != 0)
    close(kappa[on], (slope / rho)[on], atol=1e-7, rtol=1e-7)
    assert (kappa[phi == 0] == 1).all() and homogeneity(act, Z[:1] * 0) == 1
    assert selection_weight(act, Z[:1] * 0) == (0.5 if zero else 0)
    assert abs(kappa.max().item() - top) < 1e-4
    if zero:
        assert abs(Z[kappa.abs().argmin()].item() - zero) < 1e-3
        assert abs(Z[kappa.argmax()].item() - top_at) < 5e-3
        assert torch.equal(kappa > 1, Z > 0)  # the coarse partition is the sign of z
        delta = 1e-4  # features move by rho delta, selection kappa - 1 times as far
        close(act(Z + delta) - act(Z + 0), delta * rho * kappa, atol=delta**2, rtol=0)

def test_k_hat_fits_in_least_squares_and_no_sum_is_taken_in_half_precision():
    z = torch.randn(5, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi, slope = (part.numpy().reshape(-1, 1) for part in value_and_slope(F.silu, z))
    solution = np.linalg.lstsq(phi, z.numpy().reshape(-1, 1) * slope, rcond=None)[0]
    for act, degree in ((F.silu, solution.item()), (F.relu, 1), (lambda z: F.relu(z)**2, 2)):
        assert effective_homogeneity(act, z).item() == pytest.approx(degree, abs=1e-12)
        assert effective_homogeneity(act, z * 0) == 1
    z = torch.cat([torch.linspace(-1e4, 1e4, 999), z.flatten() ** 99])[:, None]  # extremes, too
    for act, half in itertools.product(CLOSED_FORMS, (z.float(), z.bfloat16(), z.half())):
        half, ones = half.clamp(-1e4, 1e4), torch.ones(len(z))
        with torch.autocast("cpu", torch.bfloat16):
            sums = observe(act, half, ones)
        assert all(map(torch.equal, sums, observe(act, half.float(), ones)))
        for value in (homogeneity(act, half), selection_weight(act, half), *sums):
            assert value.isfinite().all()

def test_step_scale_importance_mask_and_blend():
    k = torch.tensor([0.1, 0.8, 1.0, 1.6, 9.0, 0.8, -1.0, 0.8, 0.8])
    p = torch.tensor([0.5, 0.5, 0.5, 0.05, 0.5, 0.04, 0.5, 0.96, 0.949])
    close(step_scale(k, p), torch.tensor([2, 1.25, 1, 0.625, 0.5, 1, 2, 1, 1.25]))
    for keep, width, kept in ((0.5, 10, 5), (0.07, 100, 7), (1e-12, 9, 1), (1, 9, 9), (0.34, 3, 2)):
        importance = torch.rand(3, width)
        for row, mask in zip(importance, importance_mask(importance, keep)):
            assert torch.equal(mask.nonzero()[:, 0], row.topk(kept).indices.sort()[0])
        equals = importance_mask(torch.ones(width), keep)
        assert equals.tolist() == [True] * kept + [False] * (width - kept)
    before, after = torch.randn(2, 6, 3) * torch.tensor([1e-4, 1, 1e4])
    factor = torch.tensor([0, 1, 0.3, 0.7, 2, -1])[:, None]
    found = blend(before, after, factor)
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], after[1])
    close(found, before + factor * (after - before))
    halves = before.bfloat16(), after.bfloat16()
    assert torch.equal(blend(*halves, factor), blend(*(t.float() for t in halves), factor))
    assert blend(before.double(), after.double(), factor).dtype == torch.float64

def test_the_pure_core_takes_any_leading_dimensions_and_sums_add_up():
    torch.manual_seed(0)
    z, weight = torch.randn(2, 3, 8, 20), (torch.rand(2, 3, 8) < 0.7).float()
    weight[0, 0] = 0  # an FFN that saw nothing keeps its state
    z[weight == 0] = math.nan  # padding may hold anything
    a, b = (observe(F.silu, z[..., part, :], weight[..., part]) for part in (slice(4), slice(4, 9)))
    state = State(torch.rand(2, 3, 20), torch.rand(2, 3, 20) < 0.5, *torch.rand(3, 2, 3))
    config = NALoRAConfig(keep=0.3, ema=0.4)
    new = decide(state, a + b, config)
    for i, j in np.ndindex(2, 3):
        right, sums = {key: t[i, j].numpy() for key, t in state._asdict().items()}, []
        o_observe(sums, z[i, j].numpy(), weight[i, j].numpy(), 0, 1)
        o_decide(right, sums, config)
        agree(State(*(t[i, j] for t in new)), right, rtol=1e-5)
    for field, bad in itertools.product(GateSums._fields, (math.nan, math.inf)):
        spoilt = a._replace(**{field: getattr(a, field) * bad})  # one is enough to keep the state
        assert all(map(torch.equal, decide(state, spoilt, config), state))

def test_config_has_the_defaults_of_the_docstring_and_refuses():
    c = NALoRAConfig()
    assert f"Defaults: keep {c.keep}, ema {c.ema}, stride {c.stride}.\n" in nalora.__doc__
    assert (c.mask, c.scale) == ("derivative", "homogeneity")
    for key, value in (("keep", 0), ("keep", 1.5), ("keep", math.nan), ("ema", 1.0), ("ema", -0.1),
                       ("stride", 0), ("mask", "top"), ("scale", None)):
        refuses("keep is in", lambda: NALoRAConfig(**{key: value}))

# ---- 2 NALoRA ------------------------------------------------------------------------------------
def hooks(model, opt):
    modules = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return modules + len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks)

def oracle_of(tool):
    """{FFN: the oracle's sums}, which grow with each pass of step 0."""
    seen = {ffn: [] for ffn in tool.ffns}
    for ffn in tool.ffns:
        ffn.act.register_forward_pre_hook(lambda m, args, sums=seen[ffn]: o_observe(
            sums, args[0].detach().double().numpy(), np.ones(args[0].shape[:2]), 0,
            tool.config.stride))
    return seen

def follows(seen, config):
    for ffn, sums in seen.items():
        right = o_start(len(ffn.B_gate))
        o_decide(right, sums, config)
        agree(ffn.state, right, rtol=1e-4)

def same(tool, other, tolerance=1e-4):
    assert tool.steps == other.steps and len(tool.ffns) == len(other.ffns) == 2
    for a, b in zip(tool.ffns, other.ffns):
        agree(b.state, a.state._asdict(), rtol=tolerance)
        for p, q in zip(a.parameters, b.parameters, strict=True):
            close(p, q, atol=1e-2 * tolerance, rtol=tolerance)

@pytest.mark.parametrize("changes", [{"keep": 0.3}, {"keep": 1}, {"mask": "none"}, "removed"])
def test_rows_are_put_back_bit_for_bit_and_what_is_off_is_lora(changes):
    config = NALoRAConfig(scale="none", **(changes if changes != "removed" else {}))
    plain, run = start(weight_decay=0.1), start(config, weight_decay=0.1)
    if changes == "removed":
        run[2].remove()
        assert hooks(*run[:2]) == 0
    for i in range(4):
        before = snapshot(run[0])
        plain[0].load_state_dict(run[0].state_dict())  # both optimizers saw the same gradients
        assert train(plain, [i]) == train(run, [i])
        right = snapshot(plain[0])
        for ffn in run[2].ffns:
            B, rows = f"{ffn.name}.gate_proj.lora_B", ffn.state.mask
            assert rows.sum() == (math.ceil(0.3 * 48) if changes == {"keep": 0.3} else 48)
            assert (right[B] != before[B]).any(1).all()  # momentum and decay move each row
            right[B][~rows] = before[B][~rows]
        assert equal(snapshot(run[0]), right)

def test_microbatches_are_one_padded_batch_whatever_the_padding_holds():
    model, opt, tool = start(NALoRAConfig(stride=1))
    a, b = tool.ffns
    z = torch.randn(2, 5, 48, requires_grad=True)
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    a.act(z.masked_fill(tool.token_mask[..., None] == 0, math.nan))
    tool.token_mask = None
    for tokens in z.flatten(0, 1)[[0, 1, 2, 5, 6]].split(2):  # microbatches
        b.act(tokens[None])
    close(a.sums, b.sums)
    tool.token_mask = torch.ones(4, 21)
    refuses(r"token_mask is \(4, 21\), but the gates see.*\(4, 15\)", model, *batch(0))

@pytest.mark.parametrize("seeds", [[0], [1, 2, 3]])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_chooses_the_same_masks(reentrant, seeds):
    plain, run = start(NALoRAConfig(stride=5)), start(NALoRAConfig(stride=5))
    for layer in run[0].model.layers:
        layer.forward = lambda *args, forward=layer.forward: checkpoint(
            forward, *args, use_reentrant=reentrant)
    run[0].model.embed_tokens.register_forward_hook(lambda m, args, x: x.requires_grad_())
    for i in range(3):
        for model, opt, _ in (plain, run):
            take_step(model, opt, *(10 * i + seed for seed in seeds))
    same(plain[2], run[2], 1e-5)

@pytest.mark.parametrize("change", [lambda z: z.clamp(-0.5, 1), lambda z: z * 0.5 + 0.3])
def test_a_gate_that_is_changed_on_its_way_is_seen_at_the_activation(change):
    model, opt, tool = start(NALoRAConfig(stride=2))
    for m in [layer.mlp for layer in model.model.layers]:
        m.forward = lambda x, m=m: m.down_proj(m.act_fn(change(m.gate_proj(x))) * m.up_proj(x))
    seen = oracle_of(tool)
    take_step(model, opt, 0)
    follows(seen, tool.config)

class PeftLinear(nn.Module):
    """LoRA as PEFT has it, in {adapter: nn.Linear}, or with an nn.Linear each."""
    def __init__(self, layer, many):
        super().__init__()
        self.base_layer = layer.base_layer
        self.many = many
        if many:
            self.active_adapters = ["new"]
        for part, weight in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            old, new = (nn.Linear(*weight.shape[::-1], bias=False) for _ in "12")
            new.weight = weight
            setattr(self, part, nn.ModuleDict({"old": old, "new": new}) if many else new)
    def forward(self, x):
        A, B = (part["new"] if self.many else part for part in (self.lora_A, self.lora_B))
        return self.base_layer(x) + B(A(x) * 2)

@pytest.mark.parametrize("many", [True, False])
def test_the_lora_of_others_is_steered(many):
    run, (other, opt, _) = start(NALoRAConfig()), start()
    for name, layer in lora_layers(other).items():
        other.set_submodule(name, PeftLinear(layer, many))
    found = NALoRA(other, opt)
    train(run)
    train((other, opt))
    same(run[2], found)

def test_state_dict_goes_on_to_the_same_bits(tmp_path):
    config = NALoRAConfig(stride=3)
    parts, others = start(config), start(config)
    train(parts, (0, 1))
    torch.save([part.state_dict() for part in parts], tmp_path / "all")
    others[0](*batch(8))  # what was seen before it is loaded does not count
    saved = torch.load(tmp_path / "all", weights_only=True)
    for part, state in zip(others, saved):
        part.load_state_dict(state)
    assert train(parts, (2, 3, 4)) == train(others, (2, 3, 4))
    for a, b in zip(parts[2].ffns, others[2].ffns):
        assert all(map(torch.equal, (*a.state, *a.parameters), (*b.state, *b.parameters)))
    for ffn, seen in zip(parts[2].ffns, parts[2].statistics().values(), strict=True):
        assert seen["k_hat"] == ffn.state.k_hat.item() and seen["mask"] is ffn.state.mask
        assert list(seen) == list(State._fields) and type(seen["scale"]) is float
    assert (saved[2]["config"], saved[2]["steps"], others[2].steps) == (asdict(config), 2, 5)
    assert saved[2]["ffns"]["model.layers.1.mlp"].keys() == set(State._fields)
    for wrong in (NALoRAConfig(keep=0.1), None), (config, lora_llama(num_hidden_layers=1)):
        refuses("another configuration or", start(*wrong)[2].load_state_dict, saved[2])

def set_acts(model, make):
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = make()

@pytest.mark.parametrize("spoil, targets, held, message", [
    (id, ["up_proj", "q_proj"], 12, "LoRA on gate_proj"),
    (lambda m: set_acts(m, lambda: lambda z: F.silu(z)), FFN, 12, "a module act_fn each"),
    (lambda m: set_acts(m, lambda one=nn.SiLU(): one), FFN, 12, "a module act_fn each"),
    (id, FFN, 1, "LoRA of model.layers.0.mlp"), (id, FFN, 11, "LoRA of model.layers.1.mlp"),
    (lambda m: m.requires_grad_(False), FFN, 7, "lacks the LoRA of model.layers.1.mlp")])
def test_a_refusal_leaves_no_hook(spoil, targets, held, message):
    model = lora_llama(targets)
    spoil(model)
    opt = torch.optim.AdamW(lora_parameters(model)[:held])
    refuses(message, NALoRA, model, opt)
    assert hooks(model, opt) == 0

def test_a_copy_does_not_feed_the_original_and_a_second_nalora_takes_the_first_off(tmp_path):
    model, opt, tool = start(NALoRAConfig())
    torch.save(model, tmp_path / "model")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)):
        hook, = other.model.layers[0].mlp.act_fn._forward_pre_hooks.values()
        assert hook.nalora is None and hook.ffn is None
        other(*batch(0))[1].backward()
        own_opt = torch.optim.AdamW(lora_parameters(other))
        own = NALoRA(other, own_opt)
        take_step(other, own_opt, 0)
        assert own.steps == 1 and tool.steps == 0 and all(f.sums is None for f in tool.ffns)
    refuses("lacks the LoRA", NALoRA, model, torch.optim.AdamW(lora_parameters(model)[:3]))
    take_step(model, opt, 0)
    assert tool.steps == 1  # a refusal leaves the first alone
    second = NALoRA(model, opt)
    assert hooks(model, opt) == 4
    take_step(model, opt, 1)
    assert (tool.steps, second.steps) == (1, 1)

@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_and_its_passes_count_in_the_next(fused):
    model, opt, tool = start(NALoRAConfig(stride=1), fused=fused)
    seen, before = oracle_of(tool), snapshot(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, spoil in enumerate((math.inf, 1)):
        scaler.scale(model(*batch(i))[1] * spoil).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert equal(before, snapshot(model)) == (spoil == math.inf) == (tool.steps == 0)
    follows(seen, tool.config)

@pytest.mark.parametrize("optimizer, kind", [
    (torch.optim.SGD, "bf16"), (torch.optim.Adam, "bf16 base"), (torch.optim.AdamW, "autocast"),
    (torch.optim.Adagrad, "float64"), (torch.optim.SGD, "float64 base, gate alone, A frozen")])
def test_other_optimizers_and_precisions(optimizer, kind):
    dtype = torch.bfloat16 if "bf16" in kind else torch.float64 if "64" in kind else torch.float32
    model = small_llama().to(dtype)
    inject_lora(model, FFN[:1] if "alone" in kind else FFN, 4, 8)
    for A in lora_parameters(model)[::2] if "frozen" in kind else ():
        A.requires_grad_(False)
    model = model if "base" in kind else model.to(dtype)
    model, opt, tool = start(NALoRAConfig(stride=1), model, optimizer)
    before, seen = [p.detach().clone() for p in lora_parameters(model)], oracle_of(tool)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(*batch(0))[1].backward()
    opt.step()
    follows(seen, tool.config)
    old = dict(zip(lora_parameters(model), before))
    for ffn in tool.ffns:
        moved = (ffn.B_gate != old[ffn.B_gate]).any(1)
        assert not moved[~ffn.state.mask].any() and moved[ffn.state.mask].float().mean() > 0.9
        assert "frozen" not in kind or torch.equal(ffn.parameters[0], old[ffn.parameters[0]])
        sums = torch.float64 if kind == "float64" else torch.float32
        assert {t.dtype for t in ffn.state} == {sums, torch.bool}

def test_two_ranks_choose_what_one_process_chooses(monkeypatch):
    """At step 1 the second rank sees padding alone."""
    one, *two = (start(NALoRAConfig(stride=1)) for _ in range(3))
    for i in range(3):
        real = torch.arange(4)[:, None].expand(4, 15) < (2 if i == 1 else 4)
        for rank, (model, opt, tool) in ((0, one), (0, two[0]), (1, two[1])):
            part = slice(4) if model is one[0] else slice(2 * rank, 2 * rank + 2)
            opt.zero_grad()
            tool.token_mask = real[part]
            model(*(t[part] for t in batch(i)))[1].backward()
        one[1].step()
        for p, q in zip(*(lora_parameters(model) for model, _, _ in two)):
            p.grad = q.grad = (p.grad + q.grad) / 2  # as DDP does
        totals = [t for a, b in zip(two[0][2].ffns, two[1][2].ffns) for t in a.sums + b.sums]
        for _, opt, _ in two:
            left = iter(totals)
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: True)
                patch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(next(left)))
                opt.step()
            assert list(left) == []
    assert equal(snapshot(two[0][0]), snapshot(two[1][0]))
    same(one[2], two[0][2], 1e-3)

# ---- 3 LoRA and its files ------------------------------------------------------------------------
def test_lora_starts_as_an_exact_no_op_and_exactly_the_adapters_train():
    model, (tokens, _), x = small_llama(), batch(0), torch.randn(5, 32)
    before = model(tokens)[0]
    names = inject_lora(model, ["mlp.gate_proj", "q_proj"], rank=3, alpha=12)
    assert torch.equal(before, model(tokens)[0]) and names == list(lora_layers(model))
    assert snapshot(model).keys() == {f"model.layers.{i}.{m}.lora_{x}" for i in (0, 1) for x in "AB"
                                      for m in ("self_attn.q_proj", "mlp.gate_proj")}
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    take_step(*start(NALoRAConfig(), model)[:2], 0)
    assert equal(base, {n: p for n, p in model.named_parameters() if not p.requires_grad})
    layer, A = model.get_submodule(names[0]), lora_llama().model.layers[0].mlp.down_proj.lora_A
    close(layer(x), F.linear(x, layer.base_layer.weight + 12 / 3 * layer.lora_B @ layer.lora_A))
    assert 0.5 / math.sqrt(48) < A.std() and A.abs().max() < 1 / math.sqrt(48)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge(dtype):
    model = small_llama(tie_word_embeddings=True).to(dtype)
    inject_lora(model, ["q_proj", *FFN, "lm_head"], 4, 8)
    start(None, model)
    embedding, before = model.model.embed_tokens.weight.clone(), model(batch(1)[0])[0]
    right = {name: (m.base_layer.weight.double() + 2 * m.lora_B.double() @ m.lora_A.double())
             for name, m in lora_layers(model).items()}
    assert merge_lora(model) == list(right)
    for name, weight in right.items():
        linear, weight = model.get_submodule(name), weight.to(dtype)
        assert type(linear) is nn.Linear and linear.weight.dtype == dtype
        close(linear.weight, weight, atol=1e-7, rtol=torch.finfo(dtype).eps)
        assert dtype != torch.bfloat16 or (linear.weight != weight).double().mean() < 1e-3
    close(model(batch(1)[0])[0], before, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    refuses("merged already", merge_lora, model)

@pytest.mark.parametrize("targets, rank, alpha, message", [
    (["q_prj"], 4, 8, "'q_prj'.* there are .*'down_proj', 'gate_proj'"), ([], 4, 8, "matches"),
    (["q_proj", "roj"], 4, 8, "matches"), (["q_proj"], 0, 8, "rank 0"), (FFN, 33, 8, "rank 33"),
    (["up_proj", "v_proj"], 17, 8, "rank 17"), (FFN, 4, 0, "alpha 0"), (FFN, 4, math.inf, "inf")])
def test_inject_refuses(targets, rank, alpha, message):
    model = small_llama()
    refuses(message, inject_lora, model, targets, rank, alpha)
    assert all(p.requires_grad for p in model.parameters()) and not lora_layers(model)
    inject_lora(model, FFN, rank=32)
    refuses("carries LoRA already", inject_lora, model, ["q_proj"])

def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def change_tensors(path, changes):
    tensors = load_file(path) | changes
    path.write_bytes(safetensors.torch.save({k: t for k, t in tensors.items() if t is not None}))

def test_adapter_round_trip_in_pefts_words(tmp_path):
    model = start(None, lora_llama(["layers.1.mlp.gate_proj", "up_proj"]))[0]
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, base_model=Path("the/base"))  # over the old one
    names = [f"model.layers.{m}" for m in ("0.mlp.up_proj", "1.mlp.gate_proj", "1.mlp.up_proj")]
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert json.loads(config.read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": names, "inference_mode": True,
        "base_model_name_or_path": "the/base"}
    assert safetensors.torch.load_file(file).keys() == {
        f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
    assert set(tmp_path.iterdir()) == {config, file}
    for init in (True, False, "gaussian", "eva", "orthogonal"):  # plain LoRA of PEFT, too
        change_json(config, init_lora_weights=init, use_rslora=False, alpha_pattern={}, unknown=1)
        fresh = small_llama()
        assert load_adapter(fresh, tmp_path) == names and equal(snapshot(fresh), snapshot(model))
        assert torch.equal(fresh(batch(1)[0])[0], model(batch(1)[0])[0])
    model.lm_head.weight.requires_grad_(True)
    model.get_submodule(names[0]).requires_grad_(False)  # as many layers train as before
    fresh.model.layers[1].mlp.gate_proj.alpha = 7
    for wrong in (model, fresh, small_llama().requires_grad_(False)):
        refuses("plain LoRA of one rank", save_adapter, wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()

B0 = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

@pytest.mark.parametrize("change, tensors", [
    ({"use_rslora": True}, {}), ({"alpha_pattern": {"up_proj": 3}}, {}), ({"r": 3}, {}),
    ({"init_lora_weights": "pissa"}, {}), ({"peft_type": "IA3"}, {}), ({"r": None}, {}),
    ({"target_modules": "all-linear"}, {}), ({"target_modules": ["no"]}, {}), ("{", {}),
    ({"target_modules": None}, {}),
    ({"lora_alpha": -1}, {}), ({}, {B0: None}), ({}, {B0: torch.zeros(48, 3)}), ("[1]", {}),
    ({}, {B0: torch.full((48, 4), math.nan)}),
    ({}, {B0: torch.zeros(48, 4).to(torch.float8_e4m3fn)}),
    ({}, {B0.replace("lora_B", "lora_magnitude_vector"): torch.zeros(48)}), ({}, b"no tensors")])
def test_other_adapters_are_refused(tmp_path, change, tensors):
    save_adapter(start()[0], tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    change_json(config, **change) if isinstance(change, dict) else config.write_text(change)
    change_tensors(file, tensors) if isinstance(tensors, dict) else file.write_bytes(tensors)
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    refuses(f"{tmp_path}|^rank|^Not each", load_adapter, model, tmp_path)
    assert equal(before, model.state_dict()) and not lora_layers(model)
    file.unlink()
    refuses("cannot be read", load_adapter, model, tmp_path)

def test_a_model_of_before_a_reload_is_known(tmp_path, monkeypatch):
    model, opt, _ = start(NALoRAConfig())
    layer = model.model.layers[0].mlp.up_proj
    for name, value in {**vars(nalora)}.items():
        monkeypatch.setitem(vars(nalora), name, value)  # is put back
    assert not isinstance(layer, importlib.reload(nalora).LoRALinear)
    save_adapter(model, tmp_path)
    assert load_adapter(small_llama(), tmp_path) == list(lora_layers(model))
    refuses("carries LoRA already", inject_lora, model, FFN)
    refuses("carries LoRA: merge_lora", model.save_pretrained, tmp_path)
    nalora.NALoRA(model, opt)
    assert hooks(model, opt) == 4  # it took the first one off
    layer.__class__ = type("Pissa", (type(layer),), {})
    refuses("plain LoRA", save_adapter, model, tmp_path)
    assert len(merge_lora(model)) == 6

def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    nalora.write_files(tmp_path / "a" / "b", {"one": b"1", "two": b"2"})
    write = Path.write_bytes
    def full(path, content):
        write(path, content[:1])
        if "two" in path.name:
            raise OSError("no space")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        nalora.write_files(tmp_path / "a" / "b", {"one": b"new", "two": b"new"})
    assert [(tmp_path / "a" / "b" / name).read_bytes() for name in ("one", "two")] == [b"1", b"2"]

# ---- 4 the Llama ---------------------------------------------------------------------------------
def test_rotation_is_a_complex_phase():
    cos, sin = nalora.rotary_tables(replace(SMALL, head_dim=8, rope_theta=500), 3, 13, "cpu")
    angle = torch.outer(torch.arange(3.0, 13), 500.0 ** -(torch.arange(4) / 4))
    x = torch.randn(2, 4, 10, 8)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(10, 4), angle)
    close(nalora.rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1))

@pytest.mark.parametrize("changes", [
    {"vocab_size": 5}, {"num_key_value_heads": None},  # of 5 tokens, each row comes to its stop
    {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 6}])
def test_generation_equals_uncached_and_ends_at_stop_or_context(changes):
    model, cache = small_llama(**changes), [[], []]
    tokens, _ = batch(0, (3, 7), changes.get("vocab_size", 61))
    plain = tokens
    for _ in range(9):
        plain = torch.cat([plain, model(plain)[0][:, -1:].argmax(-1)], 1)
    for rows, stop in itertools.product((slice(1), slice(3)), (-1, *plain[0, 7:].tolist())):
        length = max((row.tolist() + [stop]).index(stop) + 1 for row in plain[rows, 7:])
        assert torch.equal(model.generate(tokens[rows], 9, stop), plain[rows, :7 + min(length, 9)])
    assert model.generate(tokens, 58, stop=-1).shape == (3, 65)  # the 65th is never read
    refuses("65 tokens exceed the context", model.generate, tokens, 59, -1)
    refuses("65 tokens exceed the context", model, torch.zeros(1, 65, dtype=torch.long))
    model(tokens, cache=cache)
    refuses("or 2 a filled cache", model, tokens, None, cache)

def test_attention_is_causal_and_loss_is_the_mean_over_targets():
    model, (tokens, targets) = small_llama(), batch(0)
    logits = model(tokens)[0]
    changed = model(torch.where(torch.arange(15) < 9, tokens, 60 - tokens))[0]
    assert torch.equal(logits[:, :9], changed[:, :9])
    assert (logits[:, 9:] != changed[:, 9:]).any(-1).all()
    targets = targets.masked_fill(torch.arange(15) < 5, -100)
    found, loss = model(tokens, targets)
    close(found, logits[targets != -100])
    close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100))

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [
    {}, {"rope_theta": 5e5, "rope_scaling": None, "hidden_act": None},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}])
def test_a_saved_llama_is_read_again_in_both_rope_spellings(tmp_path, tied, rope):
    model = small_llama(tie_word_embeddings=tied, rope_theta=5e5, rms_norm_eps=1e-4, head_dim=6)
    model.half().save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    assert json.loads(config.read_text()) == asdict(model.config) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "torch_dtype": "float16"}
    assert ("lm_head.weight" in load_file(file)) == (not tied)
    change_json(config, **rope)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == model.config and equal(model.float().state_dict(), again.state_dict())
    assert {m.eps for m in again.modules() if isinstance(m, nn.RMSNorm)} == {1e-4}
    assert again.model.layers[1].self_attn.k_proj.weight.shape == (2 * 6, 32)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    inject_lora(model, ["lm_head"])
    refuses("carries LoRA: merge_lora", model.save_pretrained, tmp_path / "new")
    assert not (tmp_path / "new").exists() and merge_lora(model) == ["lm_head"]  # not tied now
    model.save_pretrained(tmp_path)
    assert not Llama.from_pretrained(tmp_path).config.tie_word_embeddings

@pytest.mark.parametrize("drop, changes, message", [
    ([], {"model_type": "gemma"}, "model_type"), ([], {"hidden_act": "gelu"}, "gelu"),
    ([], {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3"),
    ([], {"rope_scaling": {"type": "linear", "factor": 2}}, "factor"),
    ([], {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    (["model.norm.weight"], {}, "model.norm.weight"), (["lm_head.weight"], {}, "lm_head.weight"),
    ([], {"hidden_size": 36}, "size mismatch"), ([], {"vocab_size": None}, "make no Llama"),
    (["model.embed_tokens.weight", "lm_head.weight"], {"tie_word_embeddings": True}, "no Llama")])
def test_from_pretrained_refuses(tmp_path, drop, changes, message):
    small_llama().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    change_tensors(tmp_path / "model.safetensors", dict.fromkeys(drop))
    refuses(message, Llama.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuses("cannot be read", Llama.from_pretrained, tmp_path)

# ---- nalora.py is read in one sitting ------------------------------------------------------------
def test_nalora_is_short_and_defines_each_name_before_its_use():
    source = Path(nalora.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= 600 and len(source) <= 33_000 and max(map(len, lines)) <= 100
    assert len(nalora.__doc__.splitlines()) <= 80
    known = set(dir(builtins))
    for node in ast.parse(source).body:
        scopes = [symtable.symtable(ast.unparse(node), "", "exec")]  # and those within
        names = scopes[0].get_symbols()
        known |= {s.get_name() for s in names if s.is_assigned() or s.is_imported()}
        for scope in scopes:
            scopes += scope.get_children()
            assert {s.get_name() for s in scope.get_symbols() if s.is_referenced()
                    and (s.is_global() or scope is scopes[0])} <= known
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [getattr(node, "module", None) or alias.name for alias in node.names]:
                assert name.split(".")[0] in {"torch", "safetensors", *sys.stdlib_module_names}

# ---- train_tiny.py (its settings, files and interruptions: data/test_runs.py) --------------------
@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """A random base model that trains in no time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(640, 32, 48, 2, 2, 1, max_position_embeddings=256, initializer_range=0.1,
                         tie_word_embeddings=True)
    train_tiny.save_model(Llama(config), path)
    return path

@pytest.fixture
def base(random_base, monkeypatch):
    """The same, with a smaller pre-training, fewer problems, a shorter text and no figures."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    read, batches, windows = problems.read_problems, problems.text_batches, problems.text_windows
    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, **small})
    monkeypatch.setattr(problems, "MAX_NEW", 8)
    monkeypatch.setattr(problems, "read_problems", lambda path: read(path)[:40])
    monkeypatch.setattr(problems, "text_batches", lambda tokenizer, path, *more: batches(
        tokenizer, path.with_name("pretrain_val.txt"), *more))
    monkeypatch.setattr(problems, "text_windows", lambda *of: windows(*of)[:8])
    for draw in ("draw_loss", "draw_layers"):
        monkeypatch.setattr(runs, draw, lambda _, p: runs.write_files(p.parent, {p.name: b"drawn"}))
    return random_base

def arguments(base, out, method="nalora", *more):
    fine = [] if method == "pretrain" else ["--base", str(base)]
    return ["--method", method, "--out", str(out), "--threads", "1", "--test-size", "4", "--steps",
            "6", "--eval-every", "2", "--batch-size", "4", *fine, *map(str, more)]

def succeeds(argv):
    assert train_tiny.main(list(map(str, argv))) == 0

def result(out):
    """What must not depend on interruptions: file name -> bytes."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*"))
            if p.is_file() and p.name not in ("summary.json", "checkpoint.pt")}

@pytest.fixture(scope="session")
def uninterrupted(random_base, tmp_path_factory):
    """uninterrupted(method): what a run without interruptions leaves behind."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def of(method):
        succeeds(arguments(random_base, folder / method, method))
        return result(folder / method)

    return of

@pytest.mark.parametrize("method", train_tiny.METHODS)
def test_every_method_runs_and_reports(base, tmp_path, capsys, method):
    run = tmp_path / "run"
    succeeds(arguments(base, run, method))
    out = capsys.readouterr().out
    summary = runs.read_json(run / "summary.json")
    records = runs.read_records(run)
    assert summary["method"] == method and summary["val_loss"] == records[-1]["val_loss"]
    assert [r["step"] for r in records] == [0, 2, 4, 6]
    assert f"step    0/6  val_loss {records[0]['val_loss']:.4f}\n" in out  # the base's own
    assert f"step    6/6  loss {records[3]['loss']:.4f}  val_loss" in out and "0 s left" in out
    assert f"{method}: exact match {summary['test_exact_match']:.3f} on 4 test problems" in out
    assert len(re.findall(r"\[(?:right|wrong)", out)) == 3
    steered = method.startswith("nalora")
    line = f"k_hat 1... to 1...  scale [01]... to [01]...  rows {100 if 'scale' in method else 50}%"
    assert bool(re.search(line, out)) == steered == ("2 FFNs are steered" in out)
    assert ("layers" in records[1]) == (run / "nalora.png").exists() == steered
    file = "model/model" if method in ("full", "pretrain") else "adapter/adapter_model"
    tensors = load_file(run / f"{file}.safetensors").values()
    assert {t.dtype for t in tensors} == {torch.half if method == "pretrain" else torch.float}
    succeeds(["--sample", "Ann has 3 apples.", "--out", run])
    assert capsys.readouterr().out.startswith("Ann has 3 apples.\n")

def test_the_training_loop_is_a_plain_one(base):
    c = train_tiny.Config(method="full", base=str(base), steps=6, batch_size=4, lr=2e-2, warmup=0.5)
    run = train_tiny.set_up(c)
    losses = list(train_tiny.training_loop(run))
    model = Llama.from_pretrained(base)  # the same, written once more
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for step, share in enumerate((1 / 3, 2 / 3, 1, 1, 0.75, 0.25)):  # three up, a cosine down
        tokens, targets, _ = run.batches(step)
        optimizer.param_groups[0]["lr"] = 2e-2 * share
        loss = nn.functional.cross_entropy(model(tokens)[0].transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(run.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert train_tiny.schedule(train_tiny.Config(steps=1), 0) == 1

def test_padding_is_shown_and_each_phase_has_its_mode(base, monkeypatch):
    c = train_tiny.Config(base=str(base), steps=3, batch_size=4, test_size=1, dtype="bfloat16")
    run = train_tiny.set_up(c)
    run.model.eval()
    for step, _ in enumerate(train_tiny.training_loop(run)):
        assert torch.equal(run.nalora.token_mask, run.batches(step)[2]) and run.model.training
    assert not run.nalora.token_mask.all() and run.nalora.steps == 3
    monkeypatch.setattr(problems, "mean_loss", lambda model, batches: batches is run.validation
                        and torch.is_autocast_enabled("cpu") and not model.training)
    assert train_tiny.validate(run, 1) is True
    run.model.train()
    assert len(train_tiny.test(run)) == 2 and not run.model.training

def at_step(monkeypatch, at, act):
    rate = train_tiny.schedule
    monkeypatch.setattr(train_tiny, "schedule",
                        lambda c, step: act() if step == at else rate(c, step))

@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, m) for m in train_tiny.METHODS)])
def test_ctrl_c_and_resume_are_bit_identical(base, uninterrupted, tmp_path, monkeypatch, capsys,
                                             method, at):
    wanted = uninterrupted(method)
    with monkeypatch.context() as patch:
        at_step(patch, at, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny.main(arguments(base, tmp_path, method)) == 130
    assert f"python train_tiny.py --resume --out {tmp_path} goes on" in capsys.readouterr().err
    torch.set_num_threads(2)  # config.json has the threads, and all else
    succeeds(["--resume", "--out", tmp_path])
    assert result(tmp_path) == wanted and torch.get_num_threads() == 1
