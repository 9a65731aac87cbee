"""Checks the lab: `pytest course/check.py -k step1`. LAB=solutions checks another file than steps.
Each check says in words what is wrong."""
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import vectors

lab = importlib.import_module(os.environ.get("LAB", "steps"))
TORCH = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
         "relu": torch.nn.functional.relu}
Z = np.linspace(-6, 6, 241)

def say(right, message):
    if not right:
        pytest.fail(message, pytrace=False)

def close(a, b, tolerance=1e-8):
    a = np.asarray(a, dtype=float)
    return a.shape == np.shape(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)

def by_autograd(activation, z=Z):
    """phi and phi' of PyTorch."""
    z = torch.tensor(z, requires_grad=True)
    phi = TORCH[activation](z)
    slope, = torch.autograd.grad(phi.sum(), z)
    return phi.detach().numpy(), slope.numpy()

@pytest.mark.parametrize("activation", TORCH)
def test_step1_selection_weight_and_slope(activation):
    phi, slope = by_autograd(activation)
    rho = lab.selection_weight(activation, Z)
    say(close(Z * rho, phi), f"rho(z) z is not {activation}(z): rho is phi(z) / z.")
    found = lab.slope(activation, Z)
    say(not close(found, rho) or activation == "relu",
        "That is rho. phi = rho z, so phi' = rho + z rho', by the product rule.")
    say(close(found, slope), f"phi' of {activation} is not what autograd finds: at z = 1 it is "
        f"{by_autograd(activation, np.ones(1))[1][0]:.6f}.")

@pytest.mark.parametrize("activation", TORCH)
def test_step1_homogeneity(activation):
    phi, slope = by_autograd(activation)
    found = lab.homogeneity(activation, Z)
    say(np.isfinite(found).all(), "kappa is not finite somewhere: where phi(z) = 0 it is 1.")
    wanted = np.where(phi == 0, 1, Z * slope / np.where(phi == 0, 1, phi))
    say(close(found, wanted), "kappa is z phi'(z) / phi(z).")
    if activation == "silu":
        z = np.linspace(1.2, 1.4, 200_001)
        kappa = lab.homogeneity("silu", z)
        top = z[kappa.argmax()]
        say(abs(top - kappa.max()) < 1e-4 and abs(top - 1.27846) < 1e-4,
            "SiLU's kappa is largest at z = 1.27846, where it is 1.27846, too.")

@pytest.mark.parametrize("activation", TORCH)
def test_step2_effective_homogeneity(activation):
    z = np.random.default_rng(0).normal(-0.5, 2, (40, 7))
    phi, slope = by_autograd(activation, z)
    kappa = np.where(phi == 0, 1, z * slope / np.where(phi == 0, 1, phi))
    found = lab.effective_homogeneity(activation, z)
    wanted = (z * slope * phi).sum() / (phi * phi).sum()
    say(np.shape(found) == (), "k_hat is one number for the whole FFN.")
    say(not close(found, kappa.mean()) or activation == "relu",
        "That is the mean of kappa. kappa goes to minus infinity with z: weight it by phi^2.")
    say(not close(found, (phi * kappa).sum() / phi.sum()) or activation == "relu",
        "The weight is phi^2, not phi, which may be negative.")
    say(close(found, wanted), f"k_hat is {wanted:.6f} here, not {found}: sum z phi' phi over sum "
        "phi^2.")

def test_step3_lora():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(5, 4))
    x = rng.normal(size=(2, 3, 4))
    layer = lab.LoRA(W, 2, 6, np.random.default_rng(1))
    say(np.shape(layer.A) == (2, 4) and np.shape(layer.B) == (5, 2),
        "A is (rank, in), B is (out, rank).")
    say(close(layer(x), x @ W.T), "LoRA changes the output at the start: B has to be 0.")
    say(np.abs(layer.A).max() > 0, "A is 0, too: then neither ever gets a gradient.")
    say(np.abs(layer.A).max() <= 0.5, "A lies in [-1/sqrt(in), 1/sqrt(in)].")
    layer.B = rng.normal(size=(5, 2))
    plain = x @ W.T + (x @ layer.A.T) @ layer.B.T
    say(not close(layer(x), plain), "The update lacks its factor alpha / rank.")
    say(close(layer(x), x @ W.T + 3 * (x @ layer.A.T) @ layer.B.T),
        "The output is x W^T + (alpha / rank) x A^T B^T.")
    say(close(x @ layer.merged().T, layer(x)), "merged() is W + (alpha / rank) B A.")
    say(np.array_equal(layer.W, W), "merged() or the call changed W.")

def test_step4_drift():
    found = lab.drift(1000, 100)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
    for step in range(1100):
        if step == 1000:
            at = parameter.item()
        parameter.grad = torch.ones(1) * (step < 1000)
        optimizer.step()
    measured = at - parameter.item()
    say(found != 0, "A row whose gradient is 0 still moves: Adam's m is not 0.")
    frozen = sum(0.9**t for t in range(1, 101))
    say(abs(found - frozen) > 0.005, "v decays, too, and so enlarges the steps.")
    say(abs(found - measured) < 0.02, f"Adam itself drifts by {measured:.2f} learning rates here; "
        f"you have {found:.2f}. Mind the divisions by 1 - beta^t.")
    say(abs(lab.drift(10, 100) - measured) > 0.01, "The drift depends on how long it was trained.")

def test_step5_token_weights():
    real = np.ones((2, 5), bool)
    real[0, 3:] = False
    found = np.asarray(lab.token_weights(real, 0, 3), float)
    say(found.shape == (2, 5), "The weights are shaped (B, T), like real.")
    say(found[0, 3] == 0, "Token 3 is padding: its weight is 0.")
    say(close(found, [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]),
        "Padding has a number, too: rows are numbered 0 to 4 and 5 to 9.")
    say(close(lab.token_weights(real, 4, 3)[0], [0, 1, 0, 0, 0]),
        "At step n the tokens with i mod stride = n mod stride are observed: one place later.")

def test_step5_observe():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 4))
    weight = np.array([1.0, 0, 1, 1, 0, 1])
    sums = lab.observe("silu", z, weight)
    say(set(sums) == {"score", "tokens", "z_slope_phi", "phi_phi", "positive"},
        "The sums are score, tokens, z_slope_phi, phi_phi and positive.")
    kept = z[weight > 0]
    phi, slope = by_autograd("silu", kept)
    say(not close(sums["score"], slope.sum(0)), "The score is the sum of |phi'|, not of phi'.")
    wanted = {"score": np.abs(slope).sum(0), "tokens": 4.0, "positive": (kept > 0).sum(),
              "z_slope_phi": (kept * slope * phi).sum(), "phi_phi": (phi * phi).sum()}
    for key, value in wanted.items():
        say(close(sums[key], value), f"{key} is {sums[key]}, not {value}.")
    z[1] = np.nan
    say(close(lab.observe("silu", z, weight)["score"], wanted["score"]),
        "A NaN at a token of weight 0 is not seen: 0 * NaN is NaN, so replace z there.")
    z[0] = np.nan
    sums = lab.observe("silu", z, weight)
    say(np.isnan(sums["phi_phi"]) and sums["tokens"] == 4,
        "Give plain sums: a NaN at a token of weight 1 stays in them, for decide to see.")

def sums_of(score, tokens=1.0, k=1.1, occupancy=0.5):
    width = len(score)
    return {"score": np.array(score, float), "tokens": tokens, "z_slope_phi": k, "phi_phi": 1.0,
            "positive": occupancy * tokens * width}

CONFIG = {"keep": 0.5, "ema": 0.9, "stride": 1, "mask": "derivative", "scale": "homogeneity"}

def test_step5_decide_importance():
    one = lab.decide(lab.start(4), sums_of([4, 3, 2, 1], tokens=2.0), CONFIG)
    say(not close(one["importance"], [3.6 / 2, 1.35, 0.9, 0.45]),
        "The average is the wrong way round: I = ema I + (1 - ema) S / N.")
    say(not close(one["importance"], [0.4, 0.3, 0.2, 0.1]), "S is a sum: divide it by N.")
    say(close(one["importance"], [0.2, 0.15, 0.1, 0.05]), "I = ema I + (1 - ema) S / N.")
    nothing = {key: np.zeros_like(value) for key, value in sums_of([1, 1, 1, 1]).items()}
    same = lab.decide(one, nothing, CONFIG)
    say(all(np.array_equal(same[key], one[key]) for key in one),
        "A step that saw no token leaves everything as it was.")
    for bad in ({"score": np.array([1, np.nan, 1, 1])}, {"phi_phi": np.inf}):
        same = lab.decide(one, sums_of([1, 2, 3, 4]) | bad, CONFIG)
        say(all(np.array_equal(same[key], one[key]) for key in one),
            "A step with a sum that is not finite leaves everything as it was.")

def test_step5_decide_mask():
    def mask(score, keep):
        return lab.decide(lab.start(len(score)), sums_of(score), CONFIG | {"keep": keep})["mask"]

    say(np.asarray(mask([1, 2], 0.5)).dtype == bool, "The mask is boolean.")
    say(list(mask([1, 4, 3, 2], 0.5)) == [False, True, True, False],
        "The channels of largest importance move.")
    say(list(mask([2, 2, 2, 2], 0.5)) == [True, True, False, False],
        "Among equals the lower index comes first: sort stably, by -importance.")
    say(sum(mask(np.arange(11), 0.3)) == 4, "The number of rows rounds up: 0.3 of 11 is 4.")
    say(sum(mask(np.arange(100), 0.07)) == 7, "0.07 * 100 is 7.000000000000001 in floats: take off "
        "1e-9 before you round up.")
    off = lab.decide(lab.start(4), sums_of([1, 2, 3, 4]), CONFIG | {"mask": "none"})
    say(all(off["mask"]), "With mask \"none\" every row moves.")

def test_step5_decide_scale():
    def scale(**sums):
        return lab.decide(lab.start(4), sums_of([1, 2, 3, 4], **sums), CONFIG)["scale"]

    say(close(scale(k=1.25), 0.8), "The scale is 1 / k_hat: here 0.8.")
    say(close(scale(k=0.25), 2.0), "k_hat is clipped to [1/2, 2] first: the scale is 2 at most.")
    say(close(scale(k=-1.0), 2.0), "A negative k_hat is clipped to 1/2, too: the scale is 2.")
    say(close(scale(k=1.25, occupancy=0.04), 1.0) and close(scale(k=1.25, occupancy=0.97), 1.0),
        "Where less than 5 % of the gates lie on one side of 0 the scale is 1.")
    off = lab.decide(lab.start(4), sums_of([1, 2, 3, 4]), CONFIG | {"scale": "none"})
    say(off["scale"] == 1, "With scale \"none\" the scale is 1.")

def test_step5_blend():
    before, after = np.random.default_rng(0).normal(size=(2, 300))
    say(np.array_equal(lab.blend(before, after, np.zeros(300)), before)
        and np.array_equal(lab.blend(before, after, np.ones(300)), after),
        "It is exact at 0 and 1: below 1/2 start from before, else from after.")
    for factor in (0.25, 0.75, 2.0):
        found = lab.blend(before, after, np.full(300, factor))
        say(close(found, before + factor * (after - before)),
            "It is before + factor (after - before), also beyond after.")

@pytest.mark.parametrize("kind", ["gates", "correct"])
def test_step5_vectors(kind):
    for name, what, how, catches in vectors.failures(lab, only=[kind]):
        say(False, f"The case \"{name}\" fails at {what}, {how}. It catches: {catches}.")
