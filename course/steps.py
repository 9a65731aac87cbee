"""Your file. Write one step after the other: put your code in the place of each
`raise NotImplementedError`. `python course/check.py 1` checks step 1.
NumPy alone; z are float64 arrays. course/README.md is the lab."""
from math import erfc

import numpy as np

def normal_cdf(z):
    """P(X <= z) of a standard normal X. Given."""
    return np.vectorize(erfc, otypes=[float])(-z / np.sqrt(2)) / 2

# ---- step 1: rho, phi' and kappa of "silu", "gelu" (exact) and "relu" --------
def selection_weight(activation, z):
    """rho(z) = phi(z) / z, shaped like z. SiLU: sigmoid(z); GELU: normal_cdf(z); ReLU: [z > 0]."""
    raise NotImplementedError

def phi(activation, z):
    """The activation of z, shaped like z. Given."""
    return z * selection_weight(activation, z)

def slope(activation, z):
    """phi'(z), shaped like z; ReLU has 0 at 0."""
    raise NotImplementedError

def homogeneity(activation, z):
    """kappa(z) = z phi'(z) / phi(z), shaped like z; 1 where phi(z) = 0."""
    raise NotImplementedError

# ---- step 2: effective homogeneity -------------------------------------------
def effective_homogeneity(activation, z):
    """k_hat of gates z (T, F): the mean of kappa weighted by phi^2; a number."""
    raise NotImplementedError

# ---- step 3: LoRA ------------------------------------------------------------
class LoRA:
    """y = x W^T + (alpha / rank) x A^T B^T for W (out, in), A (rank, in), B (out, rank).

    At the start A is uniform in [-1/sqrt(in), 1/sqrt(in)] from rng, and B is 0. Attributes W, A, B,
    scaling."""

    def __init__(self, W, rank, alpha, rng):
        raise NotImplementedError

    def __call__(self, x):
        """x (..., in) -> (..., out)."""
        raise NotImplementedError

    def merged(self):
        """The one matrix (out, in) that does the same."""
        raise NotImplementedError

# ---- step 4: the drift of a row whose gradient alone is masked ---------------
def drift(before, masked, beta1=0.9, beta2=0.999):
    """How far Adam moves a parameter in `masked` steps of gradient 0 after `before` steps of
    gradient 1, in units of the learning rate. Adam: m, v are moving averages of g, g^2, divided by
    1 - beta^t at step t = 1, 2, ...; the step is m / sqrt(v)."""
    raise NotImplementedError

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
    """Sums over the tokens of weight (T,) 1 of z (T, F), a dictionary: "score" (F,): sum of
    |phi'|; "tokens": sum of the weights; "z_slope_phi": sum of z phi' phi; "phi_phi": sum of phi^2;
    "positive": how many z > 0. What z holds at weight 0 does not matter."""
    raise NotImplementedError

def decide(state, sums, config):
    """The state after a step with these sums, a dictionary like that of start. config: "keep",
    "ema", "mask" ("derivative" or "none"), "scale" ("homogeneity" or "none"). If no token was
    seen, or a sum is not finite, all stays. See the pseudo-code in data/vectors/README.md."""
    raise NotImplementedError
