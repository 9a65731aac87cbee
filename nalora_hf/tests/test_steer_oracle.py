"""NALoRA agrees with an independent oracle: two gated FFNs in slow NumPy float64, written from the
docstring of nalora.py and sharing no code with it. `w` maps the torch model's parameter names to
arrays."""
import functools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora import NALoRAConfig
from nalora_hf import NALoRA, inject_lora, lora_parameters

TOKENS, WIDTH, CHANNELS, RANK, ALPHA = 12, 4, 7, 2, 5
LR, DECAY, BETA1, BETA2, EPS = 1e-2, 0.1, 0.9, 0.999, 1e-8
DEFAULTS = {"mask": "derivative", "keep": 0.5, "scale": "homogeneity", "ema": 0.9}
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
    mean = moments[0] / (1 - BETA1**t)
    square = moments[1] / (1 - BETA2**t)
    return -LR * DECAY * p - LR * mean / (np.sqrt(square) + EPS)

def oracle_decide(c, gates, stats):
    """Brings `stats` up to date with the gates of this step's forward pass."""
    for i, s in stats.items():
        z = gates[i]
        I = s["importance"]
        for ch in range(CHANNELS):
            mean = sum(abs(silu(v)[3]) for v in z[:, ch]) / TOKENS
            I[ch] = c["ema"] * I[ch] + (1 - c["ema"]) * mean
        P = sum(v * silu(v)[3] * silu(v)[2] for v in z.flat)
        s["k_hat"] = P / sum(silu(v)[2] ** 2 for v in z.flat)
        s["occupancy"] = p = sum(v > 0 for v in z.flat) / z.size
        if c["mask"] != "none":
            order = sorted(range(CHANNELS), key=I.__getitem__, reverse=True)
            s["mask"] = np.isin(range(CHANNELS), order[: int(np.ceil(c["keep"] * CHANNELS))])
        one = c["scale"] == "none" or min(p, 1 - p) < 0.05
        s["scale"] = 1.0 if one else 1 / min(max(s["k_hat"], 0.5), 2)

def oracle_step(c, w, moments, stats, t, x, target):
    gates, grads = gates_and_gradients(w, x, target)
    oracle_decide(c, gates, stats)
    for name, g in grads.items():
        s = stats[name[0]]
        step = adamw_step(w[name], g, moments[name], t)
        if name.endswith("gate_proj.lora_B"):
            step *= s["mask"][:, None]
        w[name] += s["scale"] * step

@pytest.mark.parametrize("changes, bias, scales",
                         [({}, 0, []), ({"mask": "none"}, 0, []), ({"scale": "none"}, 0, [1]),
                          ({"keep": 0.2, "ema": 0}, -20, [1]), ({}, -1.3, [1, 2])])
def test_nalora_agrees_with_the_oracle(changes, bias, scales):
    """bias shifts FFN 0's gates: -20 leaves no two regimes; -1.3 does at times and has k_hat < 1/2
    at others (`scales`)."""
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
    tool = NALoRA(model, optimizer, NALoRAConfig(stride=1, **changes))
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
