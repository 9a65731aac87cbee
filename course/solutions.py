"""The solutions of the lab (README.md). Read them after your own."""
from math import erfc

import numpy as np

def normal_cdf(z):
    """P(X <= z) of a standard normal X. Given."""
    return np.vectorize(erfc, otypes=[float])(-z / np.sqrt(2)) / 2

# ---- step 1: rho, phi' and kappa ---------------------------------------------
def selection_weight(activation, z):
    """rho(z) = phi(z) / z, shaped like z."""
    if activation == "silu":
        return 1 / (1 + np.exp(-z))
    if activation == "gelu":
        return normal_cdf(z)
    return (z > 0).astype(z.dtype)

def phi(activation, z):
    """The activation of z, shaped like z. Given."""
    return z * selection_weight(activation, z)

def slope(activation, z):
    """phi'(z), shaped like z; ReLU has 0 at 0."""
    rho = selection_weight(activation, z)
    if activation == "silu":
        return rho * (1 + z * (1 - rho))
    if activation == "gelu":
        return rho + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return rho

def homogeneity(activation, z):
    """kappa(z) = z phi'(z) / phi(z), shaped like z; 1 where phi(z) = 0."""
    value = phi(activation, z)
    safe = np.where(value == 0, 1, value)
    return np.where(value == 0, 1, z * slope(activation, z) / safe)

# ---- step 2: effective homogeneity -------------------------------------------
def effective_homogeneity(activation, z):
    """k_hat of gates z (T, F): the mean of kappa weighted by phi^2; a number."""
    value = phi(activation, z)
    return (z * slope(activation, z) * value).sum() / (value * value).sum()

# ---- step 3: LoRA ------------------------------------------------------------
class LoRA:
    """y = x W^T + (alpha / rank) x A^T B^T for W (out, in), A (rank, in), B (out, rank)."""

    def __init__(self, W, rank, alpha, rng):
        bound = 1 / np.sqrt(W.shape[1])
        self.W = W
        self.A = rng.uniform(-bound, bound, (rank, W.shape[1]))
        self.B = np.zeros((W.shape[0], rank))
        self.scaling = alpha / rank

    def __call__(self, x):  # (..., in) -> (..., out)
        return x @ self.W.T + self.scaling * (x @ self.A.T) @ self.B.T

    def merged(self):
        """The one matrix (out, in) that does the same."""
        return self.W + self.scaling * self.B @ self.A

# ---- step 4: the drift of a row whose gradient alone is masked ---------------
def drift(before, masked, beta1=0.9, beta2=0.999):
    """How far Adam moves a parameter in `masked` steps of gradient 0 after `before` steps of
    gradient 1, in units of the learning rate."""
    m = 0.0
    v = 0.0
    moved = 0.0
    for t in range(1, before + masked + 1):
        g = 1.0 if t <= before else 0.0
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        if t > before:
            moved += m / (1 - beta1**t) / np.sqrt(v / (1 - beta2**t))
    return moved

# ---- step 5: NA-LoRA ---------------------------------------------------------
def start(width):
    """The state before the first step, of one FFN with `width` gate channels. Given."""
    return {"importance": np.zeros(width), "mask": np.ones(width, bool), "k_hat": np.nan,
            "occupancy": np.nan, "scale": 1.0}

def token_weights(real, step, stride):
    """1 for the tokens of a pass that are observed, else 0, (B, T). real (B, T): False is padding;
    step: how many steps were taken. Tokens are numbered row by row, padding too. Given."""
    number = np.arange(real.size).reshape(real.shape)
    return ((number % stride == step % stride) & real).astype(float)

def blend(before, after, factor):
    """before + factor (after - before), exact where factor is 0 or 1. Given."""
    return np.where(factor < 0.5, before + factor * (after - before),
                    after - (after - before) * (1 - factor))

def observe(activation, z, weight):
    """Sums over the tokens of weight 1 of z (T, F): score (F,), tokens, z_slope_phi, phi_phi,
    positive. What z holds at weight 0 does not matter."""
    z = np.where(weight[:, None] > 0, z, 0)
    value = phi(activation, z)
    slopes = slope(activation, z)
    return {"score": weight @ np.abs(slopes), "tokens": weight.sum(),
            "z_slope_phi": (z * slopes * value).sum(), "phi_phi": (value * value).sum(),
            "positive": (z > 0).sum().astype(float)}

def decide(state, sums, config):
    """The state after a step with these sums, plain ones: the old one if there was no token or one
    is not finite. config: keep, ema, mask, scale."""
    finite = all(np.isfinite(t).all() for t in sums.values())
    if sums["tokens"] == 0 or not finite:
        return state
    ema = config["ema"]
    width = len(state["importance"])
    importance = ema * state["importance"] + (1 - ema) * sums["score"] / sums["tokens"]
    mask = state["mask"]
    if config["mask"] == "derivative":
        count = max(1, int(np.ceil(config["keep"] * width - 1e-9)))
        mask = np.zeros(width, bool)
        mask[np.argsort(-importance, kind="stable")[:count]] = True
    k_hat = sums["z_slope_phi"] / sums["phi_phi"] if sums["phi_phi"] > 0 else 1.0
    occupancy = sums["positive"] / (sums["tokens"] * width)
    scale = 1.0
    if config["scale"] == "homogeneity" and min(occupancy, 1 - occupancy) >= 0.05:
        scale = 1 / np.clip(k_hat, 0.5, 2)
    return {"importance": importance, "mask": mask, "k_hat": k_hat, "occupancy": occupancy,
            "scale": scale}

# ---- for vectors.py: a trace of training, on the functions above ---------------
def trace(case, t):
    """Trains on a trace's W, A, B, x and its gradients; yields what each step left, by name."""
    ffns = range(case["ffns"])
    faces = ("gate_proj", "up_proj", "down_proj")
    names = [f"{i}/{face}/{part}" for i in ffns for face in faces for part in "AB"]
    p = {name: t[name].copy() for name in names}
    moments = {name: (np.zeros_like(t[name]), np.zeros_like(t[name])) for name in names}
    states = {i: start(len(t[f"{i}/gate_proj/W"])) for i in ffns}
    for step in range(case["steps"]):
        gates = gates_of(case, t, p, t[f"{step}/x"])
        after = {name: optimizer_step(case["optimizer"], p[name], t[grad_of(step, name)],
                                      moments[name], step + 1) for name in names}
        for i in ffns:
            weight = token_weights(np.ones(gates[i].shape[:2], bool), step,
                                   case["config"]["stride"])
            z = gates[i].reshape(-1, gates[i].shape[-1])
            sums = observe("silu", z, weight.reshape(-1))
            states[i] = decide(states[i], sums, case["config"])
        for name in names:
            state = states[int(name[0])]
            factor = np.asarray(state["scale"])
            if name.endswith("gate_proj/B"):
                factor = (state["mask"] * state["scale"])[:, None]
            p[name] = blend(p[name], after[name], factor)
        found = dict(p)
        for i in ffns:
            found |= {f"{i}/{key}": value for key, value in states[i].items()}
        yield found

def grad_of(step, name):
    head, _, part = name.rpartition("/")
    return f"{step}/{head}/grad_{part}"

def gates_of(case, t, p, x):
    """z (B, T, F) of each FFN, with LoRA's update in it, for x (B, T, width)."""
    scaling = case["alpha"] / case["rank"]
    gates = []
    for i in range(case["ffns"]):
        W = {face: t[f"{i}/{face}/W"] + scaling * p[f"{i}/{face}/B"] @ p[f"{i}/{face}/A"]
             for face in ("gate_proj", "up_proj", "down_proj")}
        z = x @ W["gate_proj"].T
        gates.append(z)
        x = x + (phi("silu", z) * (x @ W["up_proj"].T)) @ W["down_proj"].T
    return gates

def optimizer_step(o, p, g, moments, t):
    """The parameter after step t (from 1) of SGD or AdamW; changes `moments`."""
    if o["name"] == "sgd":
        return p - o["lr"] * g
    m, v = moments
    m[:] = o["beta1"] * m + (1 - o["beta1"]) * g
    v[:] = o["beta2"] * v + (1 - o["beta2"]) * g * g
    p = p - o["lr"] * o["weight_decay"] * p
    return p - o["lr"] * (m / (1 - o["beta1"]**t)) / (np.sqrt(v / (1 - o["beta2"]**t)) + o["eps"])
