"""Checks the lab, and says in words what is wrong.

    python course/check.py 1                      step 1; without a number all five
    python course/check.py --file solutions       another file of course/ than steps.py

Needs NumPy, safetensors and pytest. `pytest course/check.py` runs the same checks."""
import argparse
import functools
import importlib
import math
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import vectors

FILE = HERE / f"{os.environ.get('LAB', 'steps')}.py"
WRITTEN_IN = {"selection_weight": 1, "slope": 1, "homogeneity": 1, "effective_homogeneity": 2,
              "LoRA": 3, "drift": 4, "observe": 5, "decide": 5}

# ---- words -------------------------------------------------------------------
def say(right, message):
    if not right:
        pytest.fail(message, pytrace=False)

def explain(error):
    """One sentence on an exception: what is not written yet, or which line of the file stopped."""
    if isinstance(error, SyntaxError):
        return f"{FILE.name}, line {error.lineno}, is no Python: {error.msg}."
    what = f"{type(error).__name__}: {error}"
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(FILE)]
    if not own:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        return f"Does each function return what its docstring says? The check stops at `{line}` " \
               f"with {what}."
    frame, line = own[-1]
    name = frame.f_code.co_name
    if "self" in frame.f_locals:
        name = f"{type(frame.f_locals['self']).__name__}.{name}"
    step = WRITTEN_IN.get(name.partition(".")[0])
    if step and isinstance(error, NotImplementedError):
        return f"step {step}: `{name}` is not written yet."
    return f"{FILE.name}, line {line}, stops `{name}` with {what}."

def in_words(check):
    """The check, which ends in a sentence where what it checks ends in an exception."""
    @functools.wraps(check)
    def checked(*args, **kwargs):
        error = broken
        try:
            error or check(*args, **kwargs)
        except Exception as raised:
            error = raised
        say(error is None, error and explain(error))
    return checked

broken = None
lab = None
try:
    lab = importlib.import_module(FILE.stem)
except Exception as error:
    broken = error

# ---- what is right -----------------------------------------------------------
def silu(z):
    return z / (1 + np.exp(-z))

def gelu(z):
    return z * np.vectorize(math.erfc, otypes=[float])(-z / math.sqrt(2)) / 2

def relu(z):
    return np.maximum(z, 0)

ACTIVATIONS = {"silu": silu, "gelu": gelu, "relu": relu}
Z = np.linspace(-6, 6, 241)
ADAM = 9.0711  # drift of torch.optim.Adam in 100 steps of gradient 0 after 1,000 of gradient 1

def close(a, b, tolerance=1e-8):
    a = np.asarray(a, dtype=float)
    return a.shape == np.shape(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)

def by_quotient(activation, z=Z):
    """phi, and phi' as (phi(z + h) - phi(z - h)) / 2h; ReLU has 0 at 0."""
    phi = ACTIVATIONS[activation]
    h = 1e-5
    slope = (phi(z + h) - phi(z - h)) / (2 * h)
    return phi(z), np.where(z == 0, 0, slope) if activation == "relu" else slope

# ---- the checks --------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_words
def test_step1_selection_weight_and_slope(activation):
    phi, slope = by_quotient(activation)
    rho = lab.selection_weight(activation, Z)
    say(close(Z * rho, phi), f"rho(z) z is not {activation}(z): rho is phi(z) / z.")
    found = lab.slope(activation, Z)
    say(not close(found, rho) or activation == "relu",
        "That is rho. phi = rho z, so phi' = rho + z rho', by the product rule.")
    say(close(found, slope), f"phi' of {activation} is not the slope of phi: at z = 1 it is "
        f"{by_quotient(activation, np.ones(1))[1][0]:.6f}.")

@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_words
def test_step1_homogeneity(activation):
    phi, slope = by_quotient(activation)
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

@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_words
def test_step2_effective_homogeneity(activation):
    z = np.random.default_rng(0).normal(-0.5, 2, (40, 7))
    phi, slope = by_quotient(activation, z)
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

@in_words
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

@in_words
def test_step4_drift():
    found = lab.drift(1000, 100)
    say(found != 0, "A row whose gradient is 0 still moves: Adam's m is not 0.")
    frozen = sum(0.9**t for t in range(1, 101))
    say(abs(found - frozen) > 0.005, "v decays, too, and so enlarges the steps.")
    say(abs(found - ADAM) < 0.02, f"Adam itself drifts by {ADAM:.2f} learning rates "
        f"here; you have {found:.2f}. Mind the divisions by 1 - beta^t.")
    say(abs(lab.drift(10, 100) - ADAM) > 0.01, "The drift depends on how long it was trained.")

@in_words
def test_step5_observe():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 4))
    weight = np.array([1.0, 0, 1, 1, 0, 1])
    sums = lab.observe("silu", z, weight)
    say(set(sums) == {"score", "tokens", "z_slope_phi", "phi_phi", "positive"},
        "The sums are score, tokens, z_slope_phi, phi_phi and positive.")
    kept = z[weight > 0]
    phi, slope = by_quotient("silu", kept)
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

@in_words
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

@in_words
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

@in_words
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

@in_words
def test_step5_vectors():
    for name, what, how, catches in vectors.failures(lab, only=["gates"]):
        say(False, f"The case \"{name}\" fails at {what}, {how}. It catches: {catches}.")

# ---- python course/check.py --------------------------------------------------
class Tally:
    """Counts the checks; keeps each sentence once."""
    def __init__(self):
        self.passed = 0
        self.all = 0
        self.sentences = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.all += 1
            self.passed += report.passed
        if report.failed:
            test, _, of = report.nodeid.rpartition("::")[2].partition("[")
            _, step, name = test.split("_", 2)
            subject = ", ".join(filter(None, [name.replace("_", " "), of.rstrip("]")]))
            sentence = report.longreprtext.strip()
            known = sentence.startswith(("step", "Does"))
            self.sentences.setdefault(sentence, "" if known else f"step {step[4:]}, {subject}: ")

    def lines(self):
        """What to print; of a step's functions that are not written yet the first alone."""
        seen = set()
        for sentence, subject in self.sentences.items():
            kind = sentence.partition(":")[0] if sentence.endswith("not written yet.") else sentence
            if kind not in seen:
                yield subject + sentence
            seen.add(kind)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", type=int, choices=range(1, 6))
    parser.add_argument("--file", default="steps", choices=["steps", "solutions"])
    args = parser.parse_args(argv)
    os.environ["LAB"] = args.file
    tally = Tally()
    names = f"step{args.step or ''}"
    quiet = ["-s", "-p", "no:terminal", "-p", "no:cacheprovider"]  # -s: shows what it prints
    pytest.main([str(Path(__file__)), "-k", names, *quiet], plugins=[tally])
    for line in tally.lines():
        print(line)
    which = f"step {args.step}" if args.step else "the lab"
    print(f"{which}: {tally.passed} of {tally.all} checks pass.")
    return 0 if 0 < tally.passed == tally.all else 1

if __name__ == "__main__":
    sys.exit(main())
