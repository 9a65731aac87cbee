"""NA-LoRA (Nonlinearity-Aware LoRA, arXiv 2606.31717) in one file: an unofficial, educational
reference. Its formulas are our reading of the paper's public text: see WHOSE IS WHAT.

THE IDEA. The feed-forward network (FFN) of a Llama computes h = phi(z) * u from a gate
z = W_gate x and features u = W_up x. Its activation is self-gated, a weight times a value,
phi(z) = rho(z) z. So moving a gate by delta moves two things at once:

    phi(z + delta) - phi(z)  =  rho(z) delta  +  z rho'(z) delta  +  O(delta^2)
                               features move     selection moves

LoRA treats its update as a change of features, yet it also changes which channels are selected:
the paper calls this selection misalignment. Their ratio, second to first, is kappa(z) - 1, where
kappa = z phi' / phi is the local degree of homogeneity (Euler: phi(t z) = t^k phi(z) for all t > 0
exactly when z phi' = k phi). Where kappa > 1 selection amplifies the move, where kappa < 1 it
opposes it. Where kappa = 1 (linear; ReLU away from 0) it stands still to first order. NA-LoRA lets
phi' and kappa steer the training of a LoRA adapter; it adds no loss, parameter or inference cost.

USE IT. One line turns a LoRA loop into an NA-LoRA loop:

    model = Llama.from_pretrained("data/base")  # or any model with gated FFNs
    inject_lora(model, ["gate_proj", "up_proj", "down_proj"], rank=8, alpha=16)  # or PEFT's
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-3)
    nalora = NALoRA(model, optimizer)  # the one line; now train as ever

THE ALGORITHM. Each FFN has F gate channels and LoRA pairs (A, B) on gate, up and down. Defaults:
keep 0.5, ema 0.9, stride 17. z is what the activation receives, with LoRA's update in it.

    start    importance I = 0, mask = every row, scale = 1, n = 0 steps
    forward  Number a rank's tokens i = 0, 1, ... since the last step: row by row, padding too, on
             across microbatches. Token i has weight w = 1 if i mod stride = n mod stride and it
             is no padding, else 0. Sum over tokens, and P, Q, G over channels as well:
                 N = sum w   S_c = sum w |phi'(z_c)|   P = sum w z phi'(z) phi(z)
                 Q = sum w phi(z)^2   G = sum w [z > 0]
             Microbatches and ranks add up; an FFN's sums that are not finite add nothing.
    step     before = A, B;  optimizer.step();  after = A, B.  If N > 0:
                 I     = blend(S / N, I, ema)
                 mask  = the max(1, ceil(keep F - 1e-9)) channels of largest I, lower index first
                 k_hat = P / Q, or 1 if Q = 0;  p = G / (N F)
                 scale = 1 / clip(k_hat, 1/2, 2) if min(p, 1 - p) >= 0.05, else 1
             If N = 0 all of these stay. Unless the step was skipped, n = n + 1, and
                 row c of B_gate                    = blend(before, after, mask_c scale)
                 A_gate, and A and B of up and down = blend(before, after, scale)
    blend(b, a, w) = b + w (a - b) if w < 1/2, else a - (a - b) (1 - w)  (exact at w = 0 and 1)

WHY the responsive channels? The gradient of row c of B_gate carries phi'(z_c), so plain SGD hardly
moves a channel that does not respond. Adam normalises gradients and moves it as far as any other.
The mask restores that preference. All channels share A_gate, so it has no mask. Attention has
no gate: its LoRA is left alone.
Why the step, not the gradient? Momentum and weight decay move a row whose gradient is zero. Rows
put back after the step are exact, and Adam's moments keep seeing true gradients.
Why 1 / k_hat? k_hat is the mean of kappa weighted by phi^2: gates that grow by 1 % let phi grow by
k_hat %, so dividing makes equal steps count equally. kappa of SiLU and GELU stays below 1.3, and so
does k_hat: the scale runs from 0.77 to 2. A negative k_hat (larger gates, smaller phi) is clipped,
too: the scale is 2, a choice. Where fewer than 5 % of the gates lie on one side of 0 there are no
two regimes, and the scale jumps to 1.
Why average I over steps, not k_hat? A mask that flickers moves every row in turn; a scale may vary.
Why every 17th token? It costs little, and moving on by one at each step misses no token for long.
Which settings are LoRA bit for bit? Scale off, together with mask off or keep = 1.

GLOSSARY: name in the code, symbol, meaning
    z, act, slope     z, phi, phi'  gate pre-activation; activation (SiLU); its derivative
    selection_weight  rho    phi(z) / z, the weight that z is given; SiLU: sigmoid(z)
    homogeneity       kappa  z phi' / phi = 1 + z rho' / rho; SiLU: 1 + z (1 - sigmoid(z))
    k_hat             -      effective homogeneity: the degree that fits an FFN best
    occupancy         p      share of z > 0; for SiLU and GELU kappa > 1 exactly there
    importance        I      moving average of mean |phi'| of a gate channel
    lora_A, lora_B    A, B   y = W x + (alpha / rank) B A x, A (rank, in), B (out, rank)

WHOSE IS WHAT. No equation of the paper is public to us. Never cite this file as its method.
    the paper, in public                           | our reading
    selection misalignment; "the local effective   | kappa - 1 as the ratio of the two moves;
      homogeneity of self-gated activations"       |   k_hat by least squares
    "a derivative-based temporal-importance mask   | phi' (not rho'), its mean, ema, keep, a
      for gate-related LoRA updates"               |   hard cut, on the step, on B_gate alone
    "an activation-specific step-scaling rule when | the sign of z as partition, the 5 %,
      a meaningful coarse effective-homogeneity    |   1 / k_hat, its clip, its reach over
      partition is available"                      |   gate, up and down
    both act in training only                      | all default values are ours

BEFORE YOU PORT, check: (1) scale off and keep = 1 equal LoRA bit for bit; (2) rows outside the
mask keep their bits under momentum and weight decay; (3) ten steps of two FFNs agree with the
NumPy oracle in test_nalora.py; (4) at stride 1, padded microbatches give the sums of one batch;
(5) evaluation and skipped steps leave no trace.

MAP. Part I the method - Part II LoRA and the Llama - Part III wiring and files
"""
import json
import math
import os
import re
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- Part I: the method. First pure functions: no state, no modules, any leading dimensions ------

def value_and_slope(act, z):
    """phi(z) and phi'(z), shaped like z, of any elementwise activation."""
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        z = z.detach().requires_grad_()
        phi = getattr(act, "forward", act)(z.clone())  # no hooks; some work in place
        slope, = torch.autograd.grad(phi, z, torch.ones_like(phi))
    return phi.detach(), slope

class GateSums(NamedTuple):
    """Sums over the observed tokens of a step; those of microbatches and ranks add up with +."""
    score: Tensor  # (..., F) S: sum of |phi'(z_c)|
    tokens: Tensor  # (...) N: sum of the weights
    z_slope_phi: Tensor  # (...) P: sum of z phi'(z) phi(z) over tokens and channels
    phi_phi: Tensor  # (...) Q: sum of phi(z)^2
    positive: Tensor  # (...) G: how many z > 0

    def __add__(self, other):
        return GateSums(*map(torch.add, self, other))

    def k_hat(self):
        """The degree k that fits z phi' = k phi best in least squares, (...); 1 if phi is 0."""
        return torch.where(self.phi_phi > 0, self.z_slope_phi / self.phi_phi, 1)

def observe(act, z, weight):
    """GateSums of gates z (..., T, F) with weight (..., T): 1 counts a token, 0 does not, whatever
    its z holds. All zero where a sum overflowed."""
    z = widen(z)
    weight = weight.to(z.dtype)
    z = torch.where(weight[..., None] > 0, z, 0)  # adds nothing: phi(0) = 0, S is weighted
    phi, slope = value_and_slope(act, z)  # (..., T, F) each
    positive = z.sign().relu_().sum((-2, -1))  # counts z > 0, but faster
    z_slope_phi = (z * slope).mul_(phi).sum((-2, -1))  # in place: less memory is touched
    with torch.autocast(z.device.type, enabled=False):
        score = (weight[..., None, :] @ slope.abs_()).squeeze(-2)  # (..., F)
    sums = GateSums(score, weight.sum(-1), z_slope_phi, phi.square_().sum((-2, -1)), positive)
    finite = (score.sum(-1) + sum(sums[1:])).isfinite()  # (...)
    return GateSums(*choose(finite, sums, [0] * 5))

def importance_mask(importance, keep):
    """Bool (..., F): the ceil(keep F) channels of largest importance (..., F), lower index first
    among equals. ValueError unless 0 < keep <= 1."""
    refuse(not 0 < keep <= 1, f"keep is {keep}: give the share of rows that move, in (0, 1].")
    count = max(1, math.ceil(keep * importance.size(-1) - 1e-9))  # in floats 0.07 * 100 > 7
    first = torch.argsort(importance, dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, first, True)

def step_scale(k_hat, occupancy):
    """1 / clip(k_hat, 1/2, 2); 1 if less than 5 % of gates lie on one side of 0 (or p is NaN)."""
    two_regimes = torch.minimum(occupancy, 1 - occupancy) >= 0.05
    return torch.where(two_regimes, 1 / k_hat.clamp(0.5, 2), 1)

@dataclass(frozen=True)
class NALoRAConfig:
    """What the method can vary. ValueError on anything that does not stand here."""
    keep: float = 0.5  # share of the gate channels whose row of B_gate moves, in (0, 1]
    ema: float = 0.9  # decay of the importance per step, in [0, 1)
    stride: int = 17  # observe every 17th token, one place later at each step
    mask: str = "derivative"  # or "none": every row moves
    scale: str = "homogeneity"  # or "none": scale 1

    def __post_init__(self):
        check_config(self)

class State(NamedTuple):
    """What NA-LoRA knows of FFNs after a step."""
    importance: Tensor  # (..., F)
    mask: Tensor  # (..., F) bool: the rows of B_gate that move
    k_hat: Tensor  # (...), NaN until something was observed, as occupancy
    occupancy: Tensor  # (...)
    scale: Tensor  # (...)

def decide(state, sums, config):
    """The State after a step in which `sums` were observed. Unchanged where no token was."""
    importance = torch.lerp(sums.score / sums.tokens[..., None], state.importance, config.ema)
    mask = importance_mask(importance, config.keep) if config.mask != "none" else state.mask
    k_hat = sums.k_hat()
    occupancy = sums.positive / (sums.tokens * importance.size(-1))
    scale = step_scale(k_hat, occupancy) if config.scale != "none" else state.scale
    return State(*choose(sums.tokens > 0, (importance, mask, k_hat, occupancy, scale), state))

def correct(before, after, factor):
    """blend(before, after, factor), exact at 0 and 1; a factor above 1 goes beyond `after`."""
    before = widen(before)
    return torch.lerp(before, widen(after), factor.to(before))

# ---- NALoRA: hooks around observe, decide and correct. FFNs of one width stand stacked (N, F) ----

GATES = ("gate_proj", "gate_up_proj")  # names of the linear layer in front of the activation

class NALoRA:
    """Turns a LoRA training loop into NA-LoRA: make one after the optimizer, change nothing else.
    It steers every FFN whose gate carries LoRA, ours or PEFT's, and says in one line how many.
    optimizer: one, or a list of those that step together. gate: name or names of the linear layer
    in front of an activation ("fc1", "mlp.c_fc"); one that holds gate and up at once will do. act:
    the activation of FFNs that have none as attribute. Make it before the first compiled call.
    With padded batches set `token_mask` (batch, seq), nonzero for real tokens (of an encoder-
    decoder: the encoder's), before each pass. An earlier NALoRA on these gates is removed.
    ValueError if no gate carries LoRA, or an optimizer lacks it, averages or has another NALoRA."""

    def __init__(self, model, optimizer, config=None, gate=GATES, act=None):
        self.config = config or NALoRAConfig()
        self.token_mask = None
        self._stacks, self._said = stack_ffns(model, gate, act)
        self._steered = steered_by(optimizer, self._stacks)  # {optimizer: [(parameter, ...)]}
        self._closure = None  # of an optimizer whose passes come within its step, such as LBFGS
        self._steps = 0
        self._handles = []
        if this_rank() == 0:
            print(self)
        if self.config.mask == self.config.scale == "none":
            return  # plain LoRA
        self._watch = Watch(self, model)
        self._observers = [Observer(self, stack, i) for stack in self._stacks
                           for i in range(len(stack.gates))]
        for o in self._steered:
            self._handles += [o.register_step_pre_hook(self._before_step),
                              o.register_step_post_hook(self._after_step)]
            o.nalora = self
        keep_in_checkpoints(self, o)  # one is enough

    def __repr__(self):
        return self._said

    def _see(self, stack, token_mask, start, z):
        """Samples what FFNs of a stack pass to their activation, z (..., F): (T, F), weight (T,).
        start: number of its first token since the last step."""
        every = slice((self._steps - start) % self.config.stride, None, self.config.stride)
        sample = z.detach().flatten(0, -2)[every].to(stack.state.importance, copy=True)  # (T, F)
        if token_mask is None:
            return sample, sample.new_ones(len(sample))
        return sample, token_mask.flatten()[every].ne(0).to(sample)

    def _count(self, stack, i, sample, *grad):
        """Backward has reached a pass of FFN i, so that it counts."""
        if i in stack.samples:  # of another microbatch
            self._add_up()
        if sample:
            stack.samples[i] = sample

    def _add_up(self):
        """Adds the sums over the samples of one pass to those of the step, a stack at a time."""
        for stack in self._stacks:
            if stack.samples:
                z, weight = stack.take_samples()  # (N, T, F), (N, T)
                # hidden from gradient checkpointing, which may be recomputing right now
                with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
                    stack.sums = stack.sums + self._observe(stack, z, weight)

    def _before_step(self, optimizer, args, kwargs):
        for observer in self._observers:
            observer.refuse_gate(observer.early and observer.pending)  # phi ran before its gate
        self._closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._before = [local(p).clone() for p, *_ in self._steered[optimizer]]

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs):
        """Optimizer hook: decides by what was seen, then corrects the step of every parameter."""
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler
        decided = len(self._steered) > 1 and not any(stack.seen for stack in self._stacks)
        if not decided and (skipped is None or not skipped.item()):
            self._add_up()
            warn_of_nothing(self._stacks, self.token_mask)
            sum_over_ranks(self._stacks)
            self._decide()
            self._steps += 1
        self._forget()
        factors = {stack: stack.factors(*self._factors(stack.state)) for stack in self._stacks}
        for (p, stack, i, is_gate_B), before in zip(self._steered[optimizer], self._before):
            rows, scales = factors[stack]  # (rows of B, 1) of each FFN, 0-dim
            factor = own_rows(rows[i], p) if is_gate_B else scales[i]
            after = local(p)
            after.copy_(correct(before, after, factor))
        self._before = None
        self._watch.note_rows()

    def _forget(self):  # at the end of a step, or when its gradients were thrown away
        for part in (self._watch, *self._observers, *self._stacks):
            part.forget()

    # What a variant overrides: what is summed, what is decided, what a step is multiplied by.

    def _observe(self, stack, z, weight):
        return observe(stack.act, z, weight)

    def _decide(self):
        for stack in self._stacks:
            stack.state = decide(stack.state, stack.sums, self.config)

    def _factors(self, state):
        """(N, F, 1) for the rows of B_gate, (N,) for every other A and B."""
        return (state.scale[:, None] * state.mask)[..., None], state.scale

    # Skip on first reading: looking in, keeping the state, taking it off.

    def statistics(self):
        """{FFN name: {"importance" (F,), "mask" (F,) bool, "k_hat", "occupancy", "scale": floats}}
        of the last step. Before the first: importance 0, k_hat and occupancy NaN, scale 1."""
        return {name: {key: t if t.dim() else t.item() for key, t in state.items()}
                for name, state in self.state_dict()["ffns"].items()}

    def state_dict(self):
        """{"config", "steps", "ffns": as `statistics`}. It is in optimizer.state_dict(), too."""
        ffns = {name: {key: t[i].clone() for key, t in stack.state._asdict().items()}
                for stack in self._stacks for i, name in enumerate(stack.names)}
        return {"config": asdict(self.config), "steps": self._steps, "ffns": ffns}

    def load_state_dict(self, state):
        """Goes on from a `state_dict`. ValueError if it is of another configuration or model."""
        check_state(state, self.state_dict())
        self._steps = state["steps"]
        for stack in self._stacks:
            for i, name in enumerate(stack.names):
                for key, t in state["ffns"][name].items():
                    getattr(stack.state, key)[i] = t

    def remove(self):
        """Takes every hook off. What follows is plain LoRA training."""
        while self._handles:
            self._handles.pop().remove()
        for optimizer in self._steered:
            if getattr(optimizer, "nalora", None) is self:
                del optimizer.nalora

# ---- Part II: LoRA, and the Llama it is shown on, with Hugging Face's names ----------------------

class LoRALinear(nn.Module):
    """y = base_layer(x) + (alpha / rank) B A x (arXiv 2106.09685); B = 0, a no-op, at the start.
    base: nn.Linear, which inject_lora freezes. A and B are float32. ValueError on a rank that does
    not fit."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        most = min(base.in_features, base.out_features)
        refuse(type(rank) is not int or not 1 <= rank <= most,
               f"rank is {rank}, but {base} takes a whole number from 1 to {most}.")
        refuse(type(alpha) not in (int, float) or not 0 < alpha < 1e12,
               f"alpha is {alpha}, which makes no plain LoRA: give a number above zero.")
        A = torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device)
        self.base_layer = base
        self.training = base.training
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B = nn.Parameter(A.new_zeros(base.out_features, rank))
        self.in_features = base.in_features
        self.out_features = base.out_features

    @property
    def weight(self):
        """W + (alpha / rank) B A, (out, in), rounded once to W's dtype: what merge_lora writes, and
        what code sees that asks a linear layer for its weight, as torch's own encoder does."""
        W = self.base_layer.weight
        return (widen(W) + self.scaling * (self.lora_B @ self.lora_A)).to(W.dtype)

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):  # (..., in)
        y = self.base_layer(x)  # (..., out)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (..., rank)
        return y + (low @ self.lora_B.t().contiguous()).to(y.dtype)  # contiguous: faster backward

def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}

@dataclass
class LlamaConfig:
    """The fields of a Hugging Face config.json. ValueError where they make no Llama."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # None: num_attention_heads
    head_dim: int = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: object = None  # these two are kept for whoever generates
    eos_token_id: object = None

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            fits = isinstance(value, f.type)
            if f.type in (int, float):
                most = 1000 if f.name == "num_hidden_layers" else 1e12
                fits = type(value) in (int, f.type) and 0 < value < most
            unset = value is None and f.default is None
            refuse(not (fits or unset), f"{f.name} is {value!r}, which no Llama has.")
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        refuse(heads % self.num_key_value_heads or self.head_dim % 2 or not self.head_dim,
               f"num_key_value_heads must divide {heads}, and head_dim must be even.")
        refuse(self.hidden_act not in ACTIVATIONS, f"hidden_act {self.hidden_act} is unknown here.")

    @classmethod
    def from_dict(cls, d):
        """Reads a config.json. ValueError names what it lacks or what this Llama cannot honour."""
        for key in ("rope_scaling", "rope_parameters"):
            rope = d.get(key) or {}
            d = {**d, **(rope if isinstance(rope, dict) else {"rope_type": rope})}
        plain = {"model_type": "llama", "rope_type": "default", "type": "default",
                 "partial_rotary_factor": 1, "attention_bias": False, "mlp_bias": False,
                 "attention_dropout": 0, "sliding_window": None, "pretraining_tp": 1,
                 "quantization_config": None}
        for key, value in plain.items():
            refuse(d.get(key) not in (value, None), f"This Llama knows no {key} = {d.get(key)!r}.")
        given = {f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None}
        lacking = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
        refuse(lacking, f"The config lacks {', '.join(lacking)}.")
        return cls(**given)

def rotary_tables(config, start, length, device):
    """cos and sin of each position's rotation angles, (length, head_dim) each, float32."""
    position = torch.arange(start, start + length, device=device).float()
    power = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angle = torch.outer(position, config.rope_theta ** -power).repeat(1, 2)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, T, head_dim); i is paired with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)

no_bias = partial(nn.Linear, bias=False)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = no_bias(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = no_bias(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = no_bias(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = no_bias(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, cache):  # (B, T, hidden)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, T, head_dim)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:  # a list, [] or [past k, past v]
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] or [k, v]
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, hidden)

class GatedFFN(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = no_bias(c.hidden_size, c.intermediate_size)
        self.up_proj = no_bias(c.hidden_size, c.intermediate_size)
        self.down_proj = no_bias(c.intermediate_size, c.hidden_size)
        self.act_fn = ACTIVATIONS[c.hidden_act]

    def forward(self, x):  # (B, T, hidden)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = GatedFFN(c)

    def forward(self, x, cos, sin, cache):  # (B, T, hidden)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """A Llama with fresh weights; `Llama.from_pretrained` loads trained ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = no_bias(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) -> (logits (B, T, vocab), None). With targets (B, T), -100 for none:
        (logits (N, vocab) of the N targets, their mean cross-entropy in nats). cache: a list per
        layer, [] at first; further calls take one token. ValueError beyond the context."""
        start = cache[0][0].size(2) if cache and cache[0] else 0
        length = tokens.size(1)
        most = self.config.max_position_embeddings
        refuse(start + length > most, f"{start + length} tokens exceed the context of {most}.")
        refuse(start and length > 1, f"A filled cache takes one token at a time, not {length}.")
        x = self.model.embed_tokens(tokens)  # (B, T, hidden)
        cos, sin = rotary_tables(self.config, start, length, tokens.device)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache and cache[i])
        x = self.model.norm(x)
        if targets is None:
            return self.lm_head(x), None
        logits = self.lm_head(x[targets != -100])  # (N, vocab)
        return logits, F.cross_entropy(logits.float(), targets[targets != -100])

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=0.0, stop=None, generator=None):
        """tokens (B, T), no padding -> (B, T + n), n <= max_new_tokens. temperature 0 is greedy; a
        row repeats `stop` after it. ValueError beyond the context."""
        cache = [[] for _ in self.model.layers]
        new = tokens
        stopped = torch.zeros_like(tokens[:, :1], dtype=torch.bool)  # (B, 1)
        for _ in range(max_new_tokens):
            logits = self(new, cache=cache)[0][:, -1].float()  # (B, vocab)
            if temperature > 0:
                odds = (logits / temperature).softmax(-1)
                new = torch.multinomial(odds, 1, generator=generator)  # (B, 1)
            else:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            tokens = torch.cat((tokens, new), dim=1)
            if stopped.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32):
        """Reads config.json and model.safetensors. ValueError if they are missing, broken or do
        not agree."""
        config = LlamaConfig.from_dict(read_json(Path(directory) / "config.json"))
        weights = read_tensors(Path(directory) / "model.safetensors")
        if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
            embedding = weights["model.embed_tokens.weight"]
            refuse(not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding),
                   f"{directory} ties lm_head to embed_tokens and stores two that differ.")
        with torch.device("meta"):  # compared before memory is asked for
            wrong = shapes(cls(config).state_dict()).items() ^ shapes(weights).items()
        refuse(wrong, f"The weights in {directory} do not fit its config.json: see "
               f"{sorted(wrong)[:2]}.")
        model = cls(config).to(dtype)
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, directory, dtype=None):
        """Writes config.json and model.safetensors, in `dtype` if given. ValueError under LoRA."""
        refuse(has_lora(self), "This model carries LoRA: merge_lora(model), or save_adapter.")
        weights = {f"{name}.{key}": p.detach().to(dtype or p.dtype).contiguous()
                   for name, m in own_modules(self).items()
                   for key, p in m.named_parameters(recurse=False)}
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        stored = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                  **asdict(self.config), "torch_dtype": stored}
        write_files(directory, {"model.safetensors": weights, "config.json": config})

# ---- Part III: wiring and files; skip it on first reading ----------------------------------------

def selection_weight(act, z):
    """rho(z) = phi(z) / z, shaped like z; at 0 its limit phi'(0)."""
    phi, slope = value_and_slope(act, z)
    return torch.where(z == 0, slope, phi / torch.where(z == 0, 1, z))

def homogeneity(act, z):
    """kappa(z) = z phi'(z) / phi(z), shaped like z; 1 where phi(z) = 0. It goes to -inf with z for
    SiLU and GELU: never average it, use effective_homogeneity."""
    phi, slope = value_and_slope(act, z)
    return torch.where(phi == 0, 1, z * slope / torch.where(phi == 0, 1, phi))

def effective_homogeneity(act, z):
    """k_hat of gates z (..., F) over all tokens and channels, 0-dim."""
    z = z.reshape(-1, z.size(-1))
    return observe(act, z, z.new_ones(len(z))).k_hat()

# -- small helpers ---------------------------------------------------------------------------------

def refuse(wrong, message):
    if wrong:
        raise ValueError(message)

def widen(t):
    """t in float32, or in its own dtype if that is wider: nothing is summed in half precision."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()

def choose(condition, yes, no):
    """Tensors of `yes` (...) or (..., F) where condition (...) holds, of `no` elsewhere."""
    return (torch.where(condition if y.dim() == condition.dim() else condition[..., None], y, n)
            for y, n in zip(yes, no))

def shapes(tensors):
    return {name: tuple(t.shape) for name, t in tensors.items()}

# -- which FFNs are steered, and by which optimizer ------------------------------------------------

class Stack:
    """FFNs of one width, device and activation; their states stand stacked."""

    def __init__(self, ffns, height, width, dtype, device):  # [(name, FFN, gate, activation)]
        self.names, self.ffns, self.gates, acts = zip(*ffns)
        self.act = acts[0]
        # Of each FFN, the module that the activation is, should it be the FFN's own.
        self.acts = [act if act in ffn.children() and acts.count(act) == 1 else None
                     for ffn, act in zip(self.ffns, acts)]
        self.height = height  # rows of B_gate
        self.rows = torch.arange(width, device=device)  # those that make z
        self.fused = height > width  # then the first pass tells which they are
        refuse(self.fused and None in self.acts, f"{self.names[0]} computes gate and up in one "
               "layer, and its activation is no module of its own: which rows are the gate's "
               "cannot be seen.")
        zero = widen(torch.zeros(len(ffns), width, dtype=dtype, device=device))
        refuse(value_and_slope(self.act, zero[0, :1])[0].any(),
               f"The activation of {self.names[0]} is not 0 at 0, so it is not self-gated.")
        one = zero.new_ones(len(ffns))
        self.state = State(zero, zero == 0, one * math.nan, one * math.nan, one)
        self.forget()

    def forget(self):
        """Begins a step: nothing is observed yet."""
        self.samples = {}  # {i: (z (T, F), weight (T,))} of one pass
        self.seen = Counter()  # {i: tokens since the last step}
        self.trained = False  # whether backward came through
        self.masked = False  # whether the token mask was of use
        score = torch.zeros_like(self.state.importance)  # (N, F)
        self.sums = GateSums(score, *score.new_zeros(4, len(score)))

    def take_samples(self):
        """Those of one pass, padded with weight 0 where an FFN saw fewer tokens, or none."""
        nothing = [t[:0] for t in next(iter(self.samples.values()))]
        samples = [self.samples.get(i, nothing) for i in range(len(self.gates))]
        self.samples = {}
        self.trained = True
        return [nn.utils.rnn.pad_sequence(t, batch_first=True) for t in zip(*samples)]

    def factors(self, rows, scales):
        """Those of a step of B_gate (N, rows of B, 1), whose rows that make no gate take the scale
        alone, and of other parameters (N,)."""
        if self.fused:
            every = scales[:, None, None].repeat(1, self.height, 1)
            rows = every.index_copy_(1, self.rows, rows)
        return rows.unbind(), scales.unbind()

def stack_ffns(model, gate, act):
    """([Stack of all FFNs whose gate carries LoRA], a sentence on what is steered)."""
    gates = [gate] if isinstance(gate, str) else list(gate)
    modules = own_modules(model)
    config = getattr(modules[""], "config", None)
    matches = {name: modules[name] for name in named(modules, gates)}
    alike = {}
    for path, layer in matches.items():
        name, _, leaf = path.rpartition(".")
        ffn = modules[name]
        theirs = [g for g in GATES if hasattr(ffn, g)]
        refuse(theirs and leaf not in theirs, f"The gate of {name} is {' or '.join(theirs)}.")
        phi = activation(ffn, config) or act
        if lora_pairs(layer) and phi is not None:
            B = lora_pairs(layer)[0][1]  # (rows, rank)
            key = (kind(phi), len(B), channels(ffn, layer), B.dtype, B.device)
            alike.setdefault(key, []).append((name, ffn, layer, phi))
    if not alike:
        refuse_all(modules, gates[0], matches)
    stacks = [Stack(ffns, *sizes) for (_, *sizes), ffns in alike.items()]
    names = [name for stack in stacks for name in stack.names]
    towers = {re.split(r"\.\d", f".{name}")[0] for name in names}  # what stands before the number
    twofold = getattr(config, "is_encoder_decoder", False)
    for stack in stacks:
        stack.several_towers = len(towers) > 1
        stack.decodes = [twofold and ".decoder." in f".{name}" for name in stack.names]
    plain = Counter(name.split(".")[-1] for name, m in modules.items()
                    if lora_pairs(m) and name.rpartition(".")[0] not in names)
    rest = ", ".join(f"{count} {name}" for name, count in plain.items()) or "nothing else"
    return stacks, f"NALoRA steers {len(names)} of {len(matches)} FFNs; plain LoRA on {rest}."

def refuse_all(modules, gate, matches):
    """ValueError: why no FFN can be steered, and what to do."""
    lora = [name for name, m in modules.items() if lora_pairs(m)]
    for name in lora:
        refuse(name in matches, f"{name.rpartition('.')[0]} has no activation (act_fn, act): say "
               "which one it is with act=...")
    refuse(any(hasattr(m, "base_layer") for m in matches.values()), f"The adapter on {gate} has no "
           "pair of A and B that could be steered: use LoRA.")
    experts = any(hasattr(m, "parameter_name") for m in modules.values())  # as PEFT wraps them
    refuse(experts, "The LoRA is on this model's fused experts, which NALoRA does not steer. If it "
           "has dense or shared FFNs, too, put LoRA on their gates: inject_lora reaches them.")
    refuse(not lora, f"No gated FFN here has LoRA on its {gate}: inject it first.")
    found = ", ".join(sorted({name.split(".")[-1] for name in lora}))
    raise ValueError(f"No gated FFN here has LoRA on its {gate}. It is on {found}: name the one in "
                     "front of the activation with gate=..., or put LoRA on the gate.")

def channels(ffn, gate):
    """F: the gate's rows, or half of them where the FFN's last layer takes half as many."""
    rows = len(lora_pairs(gate)[0][1])
    takes = [getattr(m, "in_features", 0) for m in ffn.children() if m is not gate]
    return rows // 2 if rows not in takes and rows / 2 in takes else rows

def activation(ffn, config=None):
    """An FFN's own activation; the config's, where a fused kernel took its place; or None."""
    for name in ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation"):
        if callable(getattr(ffn, name, None)):
            return getattr(ffn, name)
    if hasattr(ffn, "down_proj"):
        return ACTIVATIONS.get(getattr(getattr(ffn, "config", config), "hidden_act", None))
    return None

def kind(act):
    """Equal if one call may evaluate both: one object, or modules alike in class and attributes."""
    if not isinstance(act, nn.Module):
        return id(act)
    own = {key: value for key, value in vars(act).items() if "_hooks" not in key}
    return type(act), *((key, value if value.__hash__ else id(value))  # no two tensors are equal
                        for key, value in own.items() if value.__hash__ or value)

def lora_pairs(layer):
    """[(A (rank, in), B (out, rank))] of a LoRALinear or a PEFT layer's active adapters, or []."""
    if isinstance(layer, LoRALinear):
        return [(layer.lora_A, layer.lora_B)]
    names = getattr(layer, "active_adapters", []) if hasattr(layer, "lora_A") else []
    pairs = [(layer.lora_A[name], layer.lora_B[name]) for name in names if name in layer.lora_A]
    return [tuple(getattr(part, "weight", part) for part in pair) for pair in pairs]

def check_config(c):
    number = (int, float)
    fits = {"keep": type(c.keep) in number and 0 < c.keep <= 1,
            "ema": type(c.ema) in number and 0 <= c.ema < 1,
            "stride": type(c.stride) is int and 0 < c.stride < 2**31,
            "mask": c.mask in ("derivative", "none"), "scale": c.scale in ("homogeneity", "none")}
    for name, fit in fits.items():
        refuse(not fit, f"{name} is {getattr(c, name)!r}: NALoRAConfig says what it may be.")

def steered_by(optimizers, stacks):
    """{optimizer: [(p, stack, i, whether it is B_gate)]} of what trains. An earlier NALoRA on these
    gates is taken off."""
    optimizers = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    optimizers = [getattr(o, "optimizer", o) for o in optimizers]  # in Accelerate's wrapper
    for o in optimizers:
        refuse(not hasattr(o, "register_step_post_hook"), "NALoRA hooks the step of a "
               f"torch.optim.Optimizer, not a {type(o).__name__}.")
        # such as schedule-free ones
        refuse(hasattr(o, "eval"), f"{type(o).__name__} evaluates at averages of its own, which "
               "would move resting rows: use another optimizer.")
        refuse(getattr(o, "nalora", None),
               "This optimizer is steered by another NALoRA: call optimizer.nalora.remove() first.")
    steered = [(p, stack, i, layer is stack.gates[i] and p is pair[1])
               for stack in stacks for i, ffn in enumerate(stack.ffns)
               for name, layer in own_modules(ffn).items() if "." not in name
               for pair in lora_pairs(layer) for p in pair]
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]
             if p.requires_grad}
    for p, _, _, is_gate_B in steered:
        within_rows = any(s.is_shard(1) for s in getattr(p, "placements", ()))
        refuse(within_rows or p.dim() != 2 or not p.numel(), "The LoRA parameters are flattened or "
               "sharded within rows (FSDP1, ZeRO-3): use FSDP2's fully_shard.")
        refuse(id(p) not in owner and (p.requires_grad or is_gate_B), "The optimizer does not hold "
               "the FFNs' LoRA parameters, or they are frozen: make it after LoRA is in place (of "
               "PEFT with is_trainable=True), or give a list of all that step together.")
    for hook in [h for s in stacks for gate in s.gates for h in gate._forward_hooks.values()]:
        if isinstance(hook, Hook) and hook.call:  # such as when a notebook's cell runs again
            hook.call.__self__.tool.remove()
    return {o: [entry for entry in steered if owner.get(id(entry[0])) is o] for o in optimizers}

# -- several ranks, and checkpoints ----------------------------------------------------------------

def local(p):
    """The part of a parameter that this rank holds: of FSDP2's DTensors some rows, else all."""
    return p.detach().to_local() if hasattr(p, "placements") else p.detach()

def own_rows(factor, p):
    """Of a factor (rows, 1) of all rows of p, those of this rank."""
    if hasattr(p, "placements"):
        whole = type(p).from_local(factor, p.device_mesh)  # the same on every rank
        return whole.redistribute(placements=p.placements).to_local()
    return factor

def check_state(saved, here):
    known = [(d["config"], {name: shapes(ffn) for name, ffn in d["ffns"].items()})
             for d in (saved, here)]
    refuse(known[0] != known[1], f"This NALoRA state was made with {saved['config']}, not with "
           f"{here['config']}, or on another model.")

def distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()

def this_rank():
    return torch.distributed.get_rank() if distributed() else 0

def warn_of_nothing(stacks, token_mask):
    if not any(stack.seen for stack in stacks):
        warnings.warn("NALoRA saw no gate before this step: is the model in train() mode, not "
                      "compiled before, and not as a whole under gradient checkpointing?")
    elif not any(stack.trained for stack in stacks):
        warnings.warn("NALoRA saw no backward pass reach a gate before this step: it cannot steer "
                      "an optimizer that steps during backward.")
    elif token_mask is not None and not any(stack.masked for stack in stacks):
        warnings.warn("token_mask fits no FFN's tokens: set it before each pass, or to None.")

def sum_over_ranks(stacks):
    """Adds the sums of all ranks of torch.distributed, so that they decide alike."""
    if distributed():
        for stack in stacks:
            for t in stack.sums:
                torch.distributed.all_reduce(t)

def keep_in_checkpoints(tool, optimizer):
    """Puts the state of NALoRA into optimizer.state_dict(), and takes what was loaded from one."""
    def save(optimizer, state):
        state["param_groups"][0]["nalora"] = tool.state_dict()

    def load(optimizer):
        group = optimizer.param_groups[0]
        if "nalora" in group:
            tool.load_state_dict(group.pop("nalora"))

    tool._handles += [optimizer.register_state_dict_post_hook(save),
                      optimizer.register_load_state_dict_post_hook(load)]
    load(optimizer)

# -- hooks: which passes count, and what goes past NALoRA ------------------------------------------

class Observer:
    """The hooks of one FFN: they sample each pass that trains, z as the activation receives it, or
    else, where that cannot be seen, as the gate gives it."""

    def __init__(self, tool, stack, i):
        self.tool = tool
        self.stack = stack
        self.i = i
        self.looked = False  # whether find_rows has
        self.forget()
        tool._handles.append(stack.gates[i].register_forward_hook(Hook(self.after_gate)))
        if stack.acts[i]:
            hook = Hook(self.before_act)
            tool._handles.append(stack.acts[i].register_forward_pre_hook(hook))

    def forget(self):
        self.pending = None  # until the activation comes: (gate's output, its sample, how to see z)
        self.early = False  # whether the activation came without one

    def after_gate(self, gate, z):
        """Forward hook of the gate. Evaluation, passes of the base model and passes under no_grad
        leave no trace, unless no_grad is gradient checkpointing's, within a pass with gradients."""
        self.pending = None
        tool = self.tool
        waiting = next(reversed(tool._watch.waiting.values()), None)  # of the innermost pass
        idle = not gate.training or getattr(gate, "disable_adapters", False)
        if idle or (waiting is None and not z.requires_grad):
            return
        sample = []
        see = None
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint computes again in backward
            if not tool._closure and tool._watch.gradients_dropped(gate):
                tool._forget()
            mask = self.fitting(tool.token_mask, z)
            see = partial(tool._see, self.stack, mask, self.stack.seen[self.i])
            self.stack.seen[self.i] += z.shape[:-1].numel()
            if not self.stack.fused:
                sample += see(z)
            when_reached = z.register_hook if z.requires_grad else waiting.append
            when_reached(partial(tool._count, self.stack, self.i, sample))
        if self.stack.acts[self.i]:
            self.pending = (z, sample, see)

    def before_act(self, act, inputs):
        """Forward pre-hook of the activation: is its input the gate's output as it is?"""
        if self.pending is None:
            self.early |= act.training and inputs[0].requires_grad
            return
        output, sample, see = self.pending
        self.pending = None
        if inputs[0] is not output:  # a part of it, or changed on the way
            sample.clear()  # before find_rows, whose backward would count it
            self.find_rows(inputs[0], output)
            if see:
                sample += see(inputs[0])

    def fitting(self, mask, z):
        """The token mask if it is of gates z. Of several towers it may be another's; of an
        encoder-decoder it is the encoder's."""
        if mask is None or self.stack.decodes[self.i]:
            return None
        if mask.shape == z.shape[:-1] or z.dim() == 2 and mask.numel() == len(z):
            self.stack.masked = True
            return mask  # some models flatten (batch, seq)
        refuse(not self.stack.several_towers, f"token_mask is {tuple(mask.shape)} but the gates "
               f"see tokens {tuple(z.shape[:-1])}: set it before each pass, or to None.")

    def find_rows(self, z, output):
        """Asks autograd, once, which rows of B make the activation's input z."""
        if self.looked or not z.numel() or not z.requires_grad:
            return
        self.looked = True
        self.refuse_gate(not output.requires_grad)
        grad, = torch.autograd.grad(z.sum(), output, retain_graph=True, allow_unused=True)
        width = self.stack.state.mask.size(-1)
        self.refuse_gate(grad is None or z.size(-1) != width)
        if self.stack.fused:
            rows = grad.flatten(0, -2).ne(0).any(0).nonzero().flatten()
            self.refuse_gate(len(rows) != width)
            self.stack.rows = rows

    def refuse_gate(self, wrong):
        refuse(wrong, f"In {self.stack.names[self.i]} the activation does not see the output of "
               "the layer that `gate` names: name the one before it.")

class Hook:
    """A hook in the model. Copies and pickles of it call nothing; a copied gate's says so."""

    def __init__(self, call=None):
        self.call = call

    @torch.compiler.disable
    def __call__(self, module, *seen):  # the inputs, and after a forward pass the output
        if self.call is not None:
            return self.call(module, seen[-1])
        live = any(getattr(hook, "call", None) for hook in module._forward_hooks.values())
        if getattr(seen[-1], "requires_grad", False) and module.training and not live:
            warnings.warn("NALoRA steers the model that this is a copy of, but the copy trains as "
                          "plain LoRA: make a NALoRA for it.")

    def __reduce__(self):
        return Hook, ()

def note_version(versions, parameter):
    versions[:] = [parameter.grad._version]

def call_all(waiting, grad):
    while waiting:
        waiting.pop()()

class Watch:
    """Knows which pass is under way, and notices what goes past NALoRA: other optimizers' steps,
    other adapters, gradients thrown away."""

    def __init__(self, tool, model):
        self.gate = tool._stacks[-1].gates[-1]  # backward comes to it first
        self.parameter = lora_pairs(self.gate)[0][1]  # B
        self.after_backward = []  # version of its gradient then (the hook holds it, not self)
        self.rows = None  # some of its rows, to compare at the next pass
        self.passes = 0
        self.adapters = self.active()
        # {whole module in a pass: calls for when backward reaches its output, None under no_grad}
        self.waiting = {}
        tool._handles.append(self.parameter.register_post_accumulate_grad_hook(
            partial(note_version, self.after_backward)))
        gates = {gate for stack in tool._stacks for gate in stack.gates}
        # the model, and each wrapper such as PEFT's, all of which hold every gate
        self.whole = [m for m in model.modules() if gates.issubset(m.modules())]
        for m in self.whole:
            tool._handles += [m.register_forward_pre_hook(Hook(self.begin_pass)),
                              m.register_forward_hook(Hook(self.end_pass), always_call=True)]

    def begin_pass(self, module, inputs):
        self.waiting[module] = [] if torch.is_grad_enabled() else None

    def end_pass(self, module, output):
        waiting = self.waiting.pop(module, None)
        if waiting:
            for t in torch.utils._pytree.tree_leaves(output):
                if getattr(t, "grad_fn", None):
                    t.register_hook(partial(call_all, waiting))

    def active(self):
        return list(getattr(self.gate, "active_adapters", []))

    def gradients_dropped(self, gate):
        """At a pass that trains: warns of other adapters and of steps by others. True if the
        gradients since the last step were thrown away."""
        if gate is self.gate:
            self.compare()
        if not self.after_backward:
            return False
        grad = self.parameter.grad
        return grad is None or (self.after_backward != [grad._version] and not grad.any())

    def compare(self):
        if self.adapters != self.active():
            self.adapters = self.active()
            warnings.warn("Other adapters are active than when this NALoRA was made, and train as "
                          "plain LoRA: remove() it and make a new one.")
        self.passes += 1
        if self.passes.bit_count() == 1:  # the device is waited for at passes 1, 2, 4, 8, ... alone
            before = self.rows
            self.note_rows()
            if before is not None and not torch.equal(before, self.rows):
                warnings.warn("Something else moved the LoRA parameters after NALoRA's step: give "
                              "NALoRA the optimizer whose step() moves them, once it is wrapped.")

    def note_rows(self):
        """Called after each step, too."""
        self.rows = local(self.parameter)[:8].nan_to_num()

    def forget(self):
        self.after_backward.clear()

def NALoRACallback(config=None, gate=GATES, act=None):
    """A callback for transformers' Trainer and TRL's: `callbacks=[NALoRACallback()]` makes NALoRA
    with the model and the optimizer that they have built, once training begins, and shows it the
    attention mask of each batch. Its state is in the trainer's checkpoints, in optimizer.pt."""
    from inspect import signature
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            before = getattr(getattr(optimizer, "optimizer", optimizer), "nalora", None)
            if before:  # a training with this optimizer was interrupted
                before.remove()
                optimizer.param_groups[0]["nalora"] = before.state_dict()
            self.nalora = NALoRA(model, optimizer, config, gate, act)
            if self.nalora._handles:  # else it is plain LoRA
                self.nalora._handles += [
                    m.register_forward_pre_hook(self.before_pass, with_kwargs=True)
                    for m in self.nalora._watch.whole]

        @torch.compiler.disable
        def before_pass(self, module, args, kwargs):
            given = signature(module.forward).bind_partial(*args).arguments | kwargs
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self.nalora.token_mask = mask
            elif len(self.nalora._watch.waiting) == 1:  # the outermost module
                self.nalora.token_mask = None

        def on_train_end(self, *args, **kwargs):
            self.nalora.remove()

    return Callback()

# -- LoRA in a model, under the model's own names --------------------------------------------------

def inject_lora(model, targets, rank=8, alpha=16):
    """Puts a LoRALinear in the place of every nn.Linear that `targets` name, freezes all else and
    returns their module names. targets: module names, whole or from a dot on ("mlp.gate_proj").
    ValueError, with nothing changed, if one matches nothing or the model has LoRA."""
    refuse(has_lora(model), "This model carries LoRA already: merge_lora(model) first.")
    targets = [targets] if isinstance(targets, str) else list(targets)
    refuse(not targets, "No targets are given: name at least one linear layer.")
    linears = base_linears(model)
    for target in targets:
        refuse(not named(linears, [target]), f"The target {target!r} matches no linear layer; "
               f"there are {', '.join(sorted({name.split('.')[-1] for name in linears}))}.")
    layers = {name: LoRALinear(linears[name], rank, alpha) for name in named(linears, targets)}
    put_lora(model, layers)
    return list(layers)

def named(names, targets):
    """Those of `names` that `targets` name: a list as in inject_lora or, as PEFT has it, one
    regular expression."""
    if isinstance(targets, str):
        with suppress(re.error):
            return [name for name in names if re.fullmatch(targets, name)]
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return []

def put_lora(model, layers):
    """Puts {name: LoRALinear} in the places of their base layers and freezes all else."""
    put(model, {layer.base_layer: layer for layer in layers.values()})
    model.requires_grad_(False)
    for p in lora_parameters(model):
        p.requires_grad_()

def base_linears(model):
    """{name without LoRA: nn.Linear}."""
    return {name.removesuffix(".base_layer"): m for name, m in own_modules(model).items()
            if isinstance(m, nn.Linear)}

def has_lora(model):
    return any(isinstance(m, LoRALinear) for m in model.modules())

def lora_layers(model):
    """{module name: LoRALinear} in module order. ValueError if there is none."""
    refuse(not has_lora(model), "This model carries no LoRA (never injected, or merged already).")
    return {name: m for name, m in own_modules(model).items() if isinstance(m, LoRALinear)}

def lora_parameters(model):
    """[A, B, A, B, ...] in module order: what the optimizer trains."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]

@torch.no_grad()
def merge_lora(model):
    """W <- W + (alpha / rank) B A, in float32 and rounded once to W's dtype; every nn.Linear is
    back in its place, frozen. Returns their names. ValueError, with nothing changed, if there is
    no LoRA or a weight is quantized, tied or on the meta device."""
    layers = lora_layers(model)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        refuse(owners[id(weight)] > 1 or weight.is_meta or not weight.is_floating_point(),
               f"{name} is tied to a layer that would change with it, or quantized, or on the meta "
               "device: load the base untied and in floating point to merge.")
    put(model, {layer: layer.base_layer for layer in layers.values()})
    for layer in layers.values():
        layer.base_layer.weight.copy_(layer.weight)
    return list(layers)

def own_modules(model):
    """{name: module} under the model's own names, whatever wrappers stand around its parts: of
    torch.compile, DDP, FSDP or activation checkpointing."""
    wrapped = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    modules = dict(model.named_modules())
    own = {"": ""}
    for name in list(modules)[1:]:  # parents first
        parent, _, part = name.rpartition(".")
        skip = part in wrapped or isinstance(modules[parent], parallel)
        own[name] = own[parent] if skip else f"{own[parent]}.{part}".removeprefix(".")
    return {own[name]: m for name, m in modules.items()}

def put(model, new):
    """Puts new[m] in the place of each module m. ValueError if one stands at several places."""
    places = [(parent, part, m) for parent in model.modules() for part, m in parent._modules.items()
              if m in new]
    refuse(len(places) > len(new), f"One of {', '.join(sorted({part for _, part, _ in places}))} "
           "stands at several places of the model: a change of one would change all.")
    for parent, part, m in places:
        setattr(parent, part, new[m])

# -- files -----------------------------------------------------------------------------------------

def save_adapter(model, directory, base_model=None, settings=None):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, and nalora.json.
    base_model: name or path of the base, for PEFT; settings: any JSON value, for the record.
    ValueError if that would not hold all that trains, or is no plain LoRA of one size."""
    layers = lora_layers(model)
    kinds = {(type(m), m.rank, m.alpha, m.scaling) for m in layers.values()}
    _, rank, alpha, _ = next(iter(kinds))
    refuse(kinds != {(LoRALinear, rank, alpha, alpha / rank)}, "An adapter holds plain LoRA of one "
           "size: these layers differ in rank or alpha, are more than LoRA or scaled otherwise.")
    held = {id(p) for p in lora_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    refuse(others, f"{', '.join(others[:3])} would not be in the adapter, yet trains: freeze it, "
           "or merge_lora(model) and save the model.")
    whole = own_modules(model)[""]
    writes = isinstance(whole, Llama) or hasattr(whole, "prepare_inputs_for_generation")
    encodes = getattr(getattr(whole, "config", None), "is_encoder_decoder", False)
    task = ("SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM") if writes else None
    targets = sorted({name.split(".")[-1] for name in layers})  # last parts, if they name no other
    if named(base_linears(model), targets) != list(layers):
        targets = list(layers)
    refuse(not peft_reads(whole, targets), "PEFT reads these names as other parts of this model, "
           "its fused experts: merge_lora(model) and save the model.")
    config = {"peft_type": "LORA", "task_type": task, "r": rank, "lora_alpha": alpha,
              "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
              "base_model_name_or_path": base_model and str(base_model), "inference_mode": True}
    write_files(directory, {"adapter_model.safetensors": adapter_tensors(layers),
                            "adapter_config.json": config,
                            "nalora.json": {"settings": settings, "base": fingerprint(layers)}})

def peft_reads(model, targets):
    """Whether PEFT, if it is here, takes target_modules as they are written: it rewrites those of
    some models whose experts are fused."""
    with suppress(ImportError):
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        config = LoraConfig(target_modules=targets)
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            return False
        return set(config.target_modules) == set(targets)
    return True

def load_adapter(model, directory):
    """Loads an adapter that save_adapter or PEFT wrote, injecting LoRA where there is none yet.
    Returns the module names. ValueError, with nothing changed, if it is broken, incomplete, more
    than plain LoRA or another model's (a base that was fine-tuned a little is not noticed)."""
    directory = Path(directory)
    config = read_json(directory / "adapter_config.json")
    rank, alpha = plain_sizes(config)
    stored = read_tensors(directory / "adapter_model.safetensors")
    tensors = {PREFIX + key.removeprefix(PREFIX): t for key, t in stored.items()}
    linears = base_linears(model)
    names = named(linears, config.get("target_modules"))
    if config.get("layers_to_transform") or config.get("exclude_modules"):  # not all of them
        names = [name for name in names if f"{PREFIX}{name}.lora_A.weight" in tensors]
    layers = (lora_layers(model) if has_lora(model) else
              {name: LoRALinear(linears[name], rank, alpha) for name in names})
    alike = all((m.rank, m.alpha) == (rank, alpha) for m in layers.values())
    wrong = sorted(shapes(tensors).items() ^ shapes(adapter_tensors(layers)).items())
    refuse(wrong or not alike or not tensors or len(tensors) < len(stored),
           f"The adapter in {directory} (rank {rank}, alpha {alpha}) is not complete, does not fit "
           "this model (other module names or shapes) or differs from the LoRA already in the "
           f"model: see {wrong[:2]}.")
    record = directory / "nalora.json"
    norms = read_json(record).get("base") if record.exists() else {}
    here = fingerprint(layers)
    same = isinstance(norms, dict) and all(
        type(norm) is float and math.isclose(norm, here.get(name, norm), rel_tol=0.01)
        for name, norm in norms.items())
    refuse(not same, f"The adapter in {directory} was trained on another base model: the norms of "
           "its weights in nalora.json are not this model's.")
    if not has_lora(model):
        put_lora(model, layers)
    for key, t in adapter_tensors(layers).items():
        t.copy_(tensors[key])
    return list(layers)

PREFIX = "base_model.model."  # PEFT's

def adapter_tensors(layers):
    """{name in an adapter: A (rank, in) or B (out, rank)} of {name: LoRALinear}."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
            for name, layer in layers.items() for part in ("lora_A", "lora_B")}

def fingerprint(layers):
    """{name: norm of the base weight's first row}: within 1 % for the same base in any dtype."""
    return {name: getattr(m, "base_layer", m).weight[0].detach().float().norm().item()
            for name, m in layers.items()}

# What an adapter_config.json of plain LoRA may hold: TOLD with any value, PLAIN with one of these.
TOLD = """peft_type r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern
          task_type base_model_name_or_path revision inference_mode peft_version auto_mapping
          lora_dropout megatron_core runtime_config qalora_group_size""".split()
PLAIN = {"bias": ["none"],
         "init_lora_weights": [True, "gaussian", "eva", "orthogonal"]}  # none changes the base

def plain_sizes(config):
    """(rank, alpha) of an adapter_config.json. ValueError if it is not surely plain LoRA."""
    more = [key for key, value in config.items()
            if value and key not in TOLD and value not in PLAIN.get(key, [])]
    refuse(more or config.get("peft_type") != "LORA", "adapter_config.json is of no plain LoRA "
           f"adapter: see {', '.join(more) or 'peft_type'}.")
    return config.get("r"), config.get("lora_alpha")

def write_files(directory, files):
    """Writes {name: tensors, JSON value, text or bytes}: every name.tmp first, then all take their
    places, so that a file is the old one or the new, whatever happens. OSError if it cannot."""
    folder = Path(directory)
    new = {name: folder / f"{name}.tmp" for name in files}
    try:
        for name, value in files.items():
            if name.endswith(".safetensors"):
                value = safetensors.torch.save(value, {"format": "pt"})
            if name.endswith(".json"):
                value = json.dumps(value, indent=2) + "\n"
            folder.mkdir(parents=True, exist_ok=True)
            new[name].unlink(missing_ok=True)  # it may be a link to something else
            new[name].write_bytes(value.encode() if type(value) is str else value)
        for name in files:
            new[name].replace(folder / name)
    except TypeError as e:
        raise ValueError(f"{name} cannot hold that: {e}") from None
    except OSError as e:
        raise OSError(f"{folder / name} cannot be written and is as it was before: {e}") from None
    finally:
        for path in new.values():
            with suppress(OSError):
                path.unlink()

def read(path, parse):
    """parse(path), with a ValueError that names the file where it is missing or broken."""
    try:
        return parse(path)
    except (OSError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None

def read_json(path):
    return read(path, lambda p: dict(json.loads(p.read_text(encoding="utf-8"))))

def read_tensors(path):
    """{name: tensor} of a safetensors file. ValueError if one is not of finite floats."""
    tensors = read(path, safetensors.torch.load_file)
    for name, t in tensors.items():
        floats = t.is_floating_point() and t.element_size() > 1
        refuse(not floats or not t.isfinite().all(),
               f"{path} cannot be used: {name} ({t.dtype}) does not hold finite floats.")
    return tensors
