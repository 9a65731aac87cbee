"""NA-LoRA in JAX: the pure core of nalora.py, and a training step around it. pip install jax

What a functional framework changes: there are no hooks, so a model returns its gates beside its
output; tokens are weighted by 0 or 1 instead of sliced, so that shapes do not depend on the step;
the state is an argument and a result. All of it may stand under jax.jit. (In a language whose
remainder may be negative, take care of token_weights; Python's and JAX's is not.)

    python course/vectors.py course/port_jax.py         passes every vector, in float64
"""
import math
from functools import partial

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=False),
               "relu": jax.nn.relu}
FACES = ("gate_proj", "up_proj", "down_proj")

# ---- the method --------------------------------------------------------------
def value_and_slope(activation, z):
    """phi(z) and phi'(z), shaped like z."""
    act = ACTIVATIONS[activation]
    return jax.jvp(act, (z,), (jnp.ones_like(z),))

def start(width):
    """The state of one FFN with `width` gate channels before the first step."""
    return {"importance": jnp.zeros(width), "mask": jnp.ones(width, bool), "k_hat": jnp.nan,
            "occupancy": jnp.nan, "scale": 1.0}

def token_weights(real, step, stride):
    """1 for the tokens of a pass that are observed, else 0, (B, T); real (B, T): False is padding.
    Each pass numbers its tokens from 0."""
    number = jnp.arange(real.size).reshape(real.shape)
    return ((number % stride == step % stride) & real).astype(float)

def observe(activation, z, weight):
    """Sums of gates z (T, F) over the tokens of weight (T,) 1. Those of passes add up."""
    z = jnp.where(weight[:, None] > 0, z, 0)
    phi, slope = value_and_slope(activation, z)
    return {"score": weight @ jnp.abs(slope), "tokens": weight.sum(),
            "z_slope_phi": (z * slope * phi).sum(), "phi_phi": (phi * phi).sum(),
            "positive": (z > 0).sum().astype(z.dtype)}

def importance_mask(importance, keep):
    """Bool (F,): the ceil(keep F) channels of largest importance, lower index first."""
    count = max(1, math.ceil(keep * importance.size - 1e-9))
    first = jnp.argsort(-importance, stable=True)[:count]
    return jnp.zeros(importance.shape, bool).at[first].set(True)

def decide(state, sums, config):
    """The state after a step with these sums; all stays where no token was observed or a sum is not
    finite."""
    finite = jnp.all(jnp.array([jnp.isfinite(t).all() for t in sums.values()]))
    tokens = jnp.where(sums["tokens"] > 0, sums["tokens"], 1)
    importance = (config["ema"] * state["importance"]
                  + (1 - config["ema"]) * sums["score"] / tokens)
    mask = state["mask"]
    if config["mask"] == "derivative":
        mask = importance_mask(importance, config["keep"])
    some = sums["phi_phi"] > 0
    k_hat = jnp.where(some, sums["z_slope_phi"] / jnp.where(some, sums["phi_phi"], 1), 1)
    occupancy = sums["positive"] / (tokens * importance.size)
    scale = jnp.ones(())
    if config["scale"] == "homogeneity":
        two_regimes = jnp.minimum(occupancy, 1 - occupancy) >= 0.05
        scale = jnp.where(two_regimes, 1 / jnp.clip(k_hat, 0.5, 2), 1)
    new = {"importance": importance, "mask": mask, "k_hat": k_hat, "occupancy": occupancy,
           "scale": scale}
    good = (sums["tokens"] > 0) & finite
    return jax.tree.map(partial(jnp.where, good), new, state)

def blend(before, after, factor):
    """before + factor (after - before), exact where factor is 0 or 1."""
    return jnp.where(factor < 0.5, before + factor * (after - before),
                     after - (after - before) * (1 - factor))

# ---- a model that returns its gates, and a step of training ------------------
def forward(lora, weights, scaling, x):
    """x (B, T, width) through residual FFNs -> (y, [z (B, T, F) of each]). lora, weights: a list
    with, for each FFN, {face: {"A", "B"}} and {face: W}."""
    gates = []
    for W, pairs in zip(weights, lora):
        def linear(face, x):
            low = x @ pairs[face]["A"].T
            return x @ W[face].T + scaling * low @ pairs[face]["B"].T
        z = linear("gate_proj", x)
        gates.append(z)
        x = x + linear("down_proj", jax.nn.silu(z) * linear("up_proj", x))
    return x, gates

def loss_and_gates(lora, weights, scaling, x, target):
    y, gates = forward(lora, weights, scaling, x)
    return ((y - target) ** 2).mean(), gates

def optimizer_step(o, p, g, moments, t):
    """(parameter, moments) after step t, from 1, of SGD or AdamW."""
    if o["name"] == "sgd":
        return p - o["lr"] * g, moments
    m = o["beta1"] * moments[0] + (1 - o["beta1"]) * g
    v = o["beta2"] * moments[1] + (1 - o["beta2"]) * g * g
    step = (m / (1 - o["beta1"] ** t)) / (jnp.sqrt(v / (1 - o["beta2"] ** t)) + o["eps"])
    return p - o["lr"] * o["weight_decay"] * p - o["lr"] * step, (m, v)

def steer(before, after, state):
    """What NA-LoRA makes of the optimizer's step of one FFN's {face: {"A", "B"}}."""
    new = jax.tree.map(lambda b, a: blend(b, a, state["scale"]), before, after)
    rows = (state["mask"] * state["scale"])[:, None]
    gate = "gate_proj"
    new[gate]["B"] = blend(before[gate]["B"], after[gate]["B"], rows)
    return new

def train_step(case, weights, lora, moments, states, step, x, target):
    """One step: gradient, optimizer, what the gates showed, what NA-LoRA makes of it. Under jit
    `case` is bound with partial; `step` (from 0) may be traced."""
    scaling = case["alpha"] / case["rank"]
    grad = jax.grad(loss_and_gates, has_aux=True)
    gradients, gates = grad(lora, weights, scaling, x, target)
    leaves, tree = jax.tree.flatten(lora)
    moved = [optimizer_step(case["optimizer"], p, g, m, step + 1)
             for p, g, m in zip(leaves, jax.tree.leaves(gradients), moments)]
    after = jax.tree.unflatten(tree, [p for p, _ in moved])
    weight = token_weights(jnp.ones(x.shape[:2], bool), step, case["config"]["stride"])
    states = [decide(state, observe("silu", z.reshape(-1, z.shape[-1]), weight.reshape(-1)),
                     case["config"]) for state, z in zip(states, gates)]
    lora = [steer(*three) for three in zip(lora, after, states)]
    return lora, [m for _, m in moved], states

def trace(case, t):
    """Trains on a trace's W, A, B, x and target; yields what each step left, by name."""
    ffns = range(case["ffns"])
    weights = [{face: t[f"{i}/{face}/W"] for face in FACES} for i in ffns]
    lora = [{face: {part: t[f"{i}/{face}/{part}"] for part in "AB"} for face in FACES}
            for i in ffns]
    moments = [(jnp.zeros(p.shape), jnp.zeros(p.shape)) for p in jax.tree.leaves(lora)]
    states = [start(len(W["gate_proj"])) for W in weights]
    compiled = jax.jit(partial(train_step, case, weights))
    for step in range(case["steps"]):
        lora, moments, states = compiled(lora, moments, states, step, t[f"{step}/x"],
                                         t[f"{step}/target"])
        found = {f"{i}/{key}": value for i in ffns for key, value in states[i].items()}
        yield found | {f"{i}/{face}/{part}": lora[i][face][part]
                       for i in ffns for face in FACES for part in "AB"}
