"""NA-LoRA (Nonlinearity-Aware LoRA, arXiv 2606.31717) in one file: an unofficial, educational reference. Its formulas are our reading of
the paper's public text, see WHOSE IS WHAT.

THE IDEA. The feed-forward network (FFN) of a Llama computes h = phi(z) * u from a gate z = W_gate x and features u = W_up x. Its
activation is self-gated, a value times a weight, phi(z) = rho(z) z, so moving a gate by delta moves two things at once:

    phi(z + delta) - phi(z)  =  rho(z) delta  +  z rho'(z) delta  +  O(delta^2)
                               features move     selection moves

LoRA treats its low-rank update as a change of features, yet it also changes which channels are selected: the paper calls this
selection misalignment. The second term over the first is kappa(z) - 1, where kappa = z phi'/phi is the local degree of homogeneity
(Euler: phi(t z) = t^k phi(z) for all t > 0 exactly when z phi' = k phi). kappa > 1: selection amplifies the move; kappa < 1: it
opposes it; kappa = 1 (linear, ReLU): selection stands still. NA-LoRA lets phi' and kappa steer the training of an ordinary LoRA adapter.
No extra loss, no extra parameter, nothing at inference.

THE ALGORITHM. Given LoRA pairs (A, B) on gate_proj, up_proj and down_proj of every FFN of F channels, and any optimizer; by default keep
is 0.5, ema 0.9, stride 17:

    forward   over every stride-th token since the last step, per gate channel c:   score_c = mean |phi'(z_c)|
              over the same tokens and all channels:   k_hat = sum z phi'(z) phi(z) / sum phi(z)^2,   p = share of z > 0
    step      remember A and B, let the optimizer step as ever (its moments see the true gradients), then per FFN:
              I     <- ema I + (1 - ema) score               temporal importance (F,), from 0, which leaves its order as it is
              mask  <- the ceil(keep F) channels with the largest I
              scale <- 1 / clip(k_hat, 1/2, 2)               but 1 if min(p, 1 - p) < 0.05 or phi has rho' = 0: then there are
                                                             no two regimes, kappa > 1 and kappa < 1, to tell apart
              row c of B_gate      <- before + mask_c scale (after - before)
              A_gate, A and B of up and down                 <- before + scale (after - before)

Why change the step and not the gradient? Adam divides the size of a gradient away again, and its momentum and weight decay move
rows whose gradient is zero. Putting rows back after the step is exact. All channels share A_gate, so it is scaled but not masked.
Why 1 / k_hat? A relative change of a gate moves its phi by about k_hat times as much. All six matrices of the FFN take the same scale,
so that gate, up and down keep their sizes of step relative to each other.

GLOSSARY. name in the code: symbol, meaning
    z                  z       gate pre-activation, (tokens, F); F channels are Hugging Face's `intermediate_size`
    act                phi     elementwise activation (SiLU in Llama)
    selection_weight   rho     phi(z) / z, the weight that z is given; SiLU: sigmoid(z)
    slope              phi'    derivative, by autograd
    homogeneity        kappa   z phi' / phi = 1 + z rho' / rho, per element; SiLU: 1 + z (1 - sigmoid(z))
    k_hat              -       effective homogeneity: the one degree that fits a layer best
    occupancy          p       share of z > 0, the coarse partition: for SiLU and GELU kappa > 1 exactly where z > 0
    score, importance  -, I    mean |phi'| of a gate channel over the tokens of a step; its moving average over steps
    mask, scale        m, s    the channels whose row of B_gate may move; what the step of an FFN is multiplied by
    lora_A, lora_B     A, B    y = W x + (alpha / rank) B A x, A (rank, in), B (out, rank)

WHOSE IS WHAT. The paper's public text (abstract and captions) states: selection misalignment and its link to "the local effective
homogeneity of self-gated activations"; "a derivative-based temporal-importance mask for gate-related LoRA updates"; "an activation-
specific step-scaling rule when a meaningful coarse effective-homogeneity partition is available". No equation of it is public to
us. Every formula here is OUR reading of these words: phi' as the derivative, its mean over tokens, ema, keep, the hard cut, acting
on the step and on B_gate alone, the least-squares k_hat, the partition by sign with its 5 % rule (meant for SiLU and GELU), 1/k_hat,
its clip and its reach over the whole FFN, budget="neutral", the other scores, and the measures of section 4. The controls answer a public
review of the paper (random, inverted, uniform) or are ours (shuffled, redrawn). Never cite this file as the authors' method.

MAP. 1 the mathematics of selection - 2 LoRA - 3 NA-LoRA - 4 measures - 5 the Llama it is shown on - 6 wiring and files
"""
import json
import math
import os
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# ---- 1. The mathematics of selection. `act` is any elementwise, self-gated activation, z any float tensor; no state, no modules. ----

def value_and_slope(act, z):
    """phi(z) and phi'(z), each shaped like z. Autograd differentiates, so any elementwise activation will do."""
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        z = z.detach().requires_grad_()
        phi = act(z)
        slope, = torch.autograd.grad(phi, z, torch.ones_like(phi))
    return phi.detach(), slope

def selection_weight(act, z):
    """rho(z) = phi(z) / z, shaped like z: the decision weight that the activation gives to its own input. Its limit at 0 is phi'(0)."""
    phi, slope = value_and_slope(act, z)
    return torch.where(z == 0, slope, phi / torch.where(z == 0, 1, z))

def homogeneity(act, z):
    """kappa(z) = z phi'(z) / phi(z), shaped like z, and 1 wherever phi(z) = 0: zero is homogeneous of every degree, 1 is neutral.

    Unbounded below for SiLU and GELU (kappa -> -inf as z -> -inf), so never average it; that is what k_hat is for.
    """
    phi, slope = value_and_slope(act, z)
    return torch.where(phi == 0, 1, z * slope / torch.where(phi == 0, 1, phi))

def widen(t):
    """t in float32, or in its own dtype if that is wider: no sum and no blend is made in half precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))

def gate_sums(act, z, tokens=None, score="phi_prime", reach=None):
    """Gates z (..., T, F) -> (..., F + 4), sums over the T tokens, so that microbatches simply add up; NA-LoRA keeps nothing else of z.

    The entries: the score of each channel (F), the number of tokens, and over tokens and channels: sum z phi'(z) phi(z), sum phi(z)^2,
    how many z > 0. tokens (..., T): 1 where a token counts and 0 for padding; None counts all. reach (..., T, F), for score="downstream":
    |u| times the norm of W_down's column, how far a move of phi reaches.
    """
    z = widen(z)
    tokens = z.new_ones(z.shape[:-1]) if tokens is None else tokens.to(z).expand(z.shape[:-1])
    z = torch.where(tokens[..., None] > 0, z, 0)        # padding adds nothing to the totals, whatever it holds, since phi(0) = 0
    phi, slope = value_and_slope(act, z)                                                    # (..., T, F) each
    scores = slope.abs()
    if score == "downstream":
        scores = scores * torch.where(tokens[..., None] > 0, reach, 0)
    if score == "rho_prime":
        nearby = torch.where(z.abs() < 1e-3, 1e-3, z)                                       # rho' = (phi' - rho) / z cancels at 0
        phi_nearby, slope_nearby = value_and_slope(act, nearby)
        scores = ((slope_nearby - phi_nearby / nearby) / nearby).abs()
    totals = [tokens.sum(-1), (z * slope * phi).sum((-2, -1)), (phi * phi).sum((-2, -1)), (z > 0).to(z).sum((-2, -1))]
    with torch.autocast(z.device.type, enabled=False):  # else the product is taken in half precision
        return torch.cat([(tokens[..., None, :] @ scores).squeeze(-2), torch.stack(totals, -1)], -1)

def regime(totals, channels):
    """(k_hat, occupancy), (...) each, of the last four entries of `gate_sums`, totals (..., 4), over `channels` channels.

    k_hat = sum z phi' phi / sum phi^2 solves z phi' = k phi in least squares, and is 1 if every phi is 0."""
    tokens, z_slope_phi, phi_phi, positive = totals.unbind(-1)
    return torch.where(phi_phi > 0, z_slope_phi / phi_phi, 1), positive / (tokens * channels)

def selects(act):
    """Whether the selection weight moves at all: False for linear and ReLU, whose rho' = 0 and whose regimes are thus one."""
    weights = [*act.parameters(), *act.buffers()] if isinstance(act, nn.Module) else []     # it may have some, on any device
    z = torch.linspace(-4, 4, 33, device=weights[0].device if weights else None)
    return not torch.allclose(homogeneity(act, z), torch.ones_like(z), atol=1e-5)

def importance_mask(importance, keep):
    """Bool (..., F): the ceil(keep F) channels of largest importance (..., F), lower index first among equals. ValueError unless
    0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, but it is the share of gate channels that may move: give a number in (0, 1].")
    count = max(1, math.ceil(keep * importance.size(-1) - 1e-9))                            # in floats 0.1 * 30 is above 3
    first = torch.argsort(importance, dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, first, True)

def step_scale(k_hat, occupancy):
    """1 / clip(k_hat, 1/2, 2), or 1 if under 5 % of the gates lie on one side of zero (or nothing was observed: NaN).

    A k_hat below 1/2, negative too, gives 2: selection opposes the step there."""
    two_regimes = torch.minimum(occupancy, 1 - occupancy) >= 0.05
    return torch.where(two_regimes, 1 / k_hat.clamp(0.5, 2), 1)

# ---- 2. LoRA (arXiv 2106.09685), complete. It knows nothing of what follows. -------------------------------------------------------

class LoRALinear(nn.Module):
    """y = base_layer(x) + (alpha / rank) B A x. A and B train in float32 whatever the base's dtype; B = 0 makes the start an exact no-op.

    base: nn.Linear, frozen here. ValueError unless rank is a whole number from 1 to min(in, out) and alpha is above zero.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        check_size(rank, alpha, base, "this layer")
        self.base_layer, self.rank, self.alpha, self.scaling = base.requires_grad_(False), rank, alpha, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))                               # uniform in +-1/sqrt(in), as nn.Linear

    def forward(self, x):                                                                   # (..., in)
        y = self.base_layer(x)                                                              # (..., out)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling                 # (..., rank)
        return y + (low @ self.lora_B.t().contiguous()).to(y.dtype)                         # contiguous: a faster backward for B

def check_size(rank, alpha, linear, name):
    largest = min(linear.in_features, linear.out_features)
    if not (type(rank) is int and 1 <= rank <= largest):
        raise ValueError(f"rank is {rank}, but {name} takes a whole number from 1 to {largest}.")
    if not (isinstance(alpha, (int, float)) and 0 < alpha < 1e12):
        raise ValueError(f"alpha is {alpha}: the update is scaled by alpha / rank, so give a number above zero.")

# ---- 3. NA-LoRA: what is observed, what is decided, what is done to the step -------------------------------------------------------

BLIND_MASKS = ("random", "redrawn", "none")             # those that do not look at the gates
CHOICES = {"mask": ("derivative", "inverted", "shuffled", *BLIND_MASKS), "scale": ("homogeneity", "uniform", "none"),
           "budget": ("raw", "neutral"), "score": ("phi_prime", "rho_prime", "downstream")}

@dataclass(frozen=True)
class NALoRAConfig:
    """The method, its ablations and its controls. ValueError on anything that does not stand here."""
    mask: str = "derivative"        # "derivative" | "inverted" (the least important) | "shuffled" (the derivative mask, dealt to other rows)
                                    # | "random" (fixed rows) | "redrawn" (random rows, drawn anew at each step) | "none"
    keep: float = 0.5               # share of the gate channels whose row of B_gate moves, in (0, 1]
    scale: str = "homogeneity"      # "homogeneity" | "uniform" (every FFN takes the arithmetic mean of those scales) | "none"
    budget: str = "raw"             # "neutral": mask divided by its mean, scales by their geometric mean over FFNs; the mean step stays LoRA's
    score: str = "phi_prime"        # "phi_prime": |phi'| | "rho_prime": |rho'| | "downstream": |phi' u| times the norm of W_down's column
    ema: float = 0.9                # decay of the importance per step, in [0, 1)
    stride: int = 17                # observe every 17th token, one place later at each step, so that all places get their turn
    seed: int = 0                   # of the shuffled, the random and the redrawn mask

    def __post_init__(self):
        check_config(self)

class NALoRA:
    """Turns a LoRA training loop into NA-LoRA: make one after the optimizer, change nothing else.

    It observes every FFN whose gate carries LoRA, ours or PEFT's, while the model trains, and corrects the optimizer's steps. An FFN is
    told by its parts: gate_proj, up_proj, down_proj and an activation. In FFNs without a gate, fc2(act(fc1(x))), `gate` names the linear
    layer in front of the activation ("fc1", "mlp.c_fc"), which gates itself. Make it when the model has its final device and dtype, and
    before its first compiled call. To keep padding out of the statistics, set `token_mask` (batch, seq), nonzero for real tokens, before
    each forward pass. Under torch.distributed the ranks, all with one config, add up their statistics and decide alike. ValueError if no
    gate carries LoRA, or if the optimizer lacks its parameters, is steered already, or holds shards of them.
    """

    def __init__(self, model, optimizer, config=None, gate="gate_proj"):
        self.config = config = config or NALoRAConfig()
        self._optimizer = optimizer = getattr(optimizer, "optimizer", optimizer)            # inside Accelerate's wrapper
        self.token_mask, self._steps, self._handles = None, 0, []
        self._samples, self._sums, self._seen, self._before = {}, {}, {}, []                # of one pass; the rest of one step
        self._ffns, self._gate, self._version = find_ffns(model, gate), gate.split(".")[-1], None
        self._state = {name: initial_state(config, i, getattr(ffn, self._gate)) for i, (name, ffn) in enumerate(self._ffns.items())}
        self._controlled = [entry for name, ffn in self._ffns.items() for entry in controlled_parameters(config, name, ffn, self._gate)]
        check_optimizer(optimizer, self._controlled)
        if config.score == "downstream" and not all(map(is_gated_ffn, self._ffns.values())):
            raise ValueError("score='downstream' reads up_proj and down_proj, which this FFN lacks: choose another score.")
        self._selects = torch.tensor([selects(activation(ffn)) for ffn in self._ffns.values()]).to(next(iter(self._state.values()))["scale"].device)
        self._norms = {name: column_norms(ffn.down_proj) for name, ffn in self._ffns.items() if config.score == "downstream"}
        self._adapters = self._active()
        self._order = {name: row_draw(config, i, s["mask"]).argsort() for i, (name, s) in enumerate(self._state.items()) if config.mask == "shuffled"}
        self._observes = config.mask not in BLIND_MASKS or config.scale != "none"
        if self._observes:
            parts = (self._gate, "up_proj") if self._norms else (self._gate,)
            observe = torch.compiler.disable(self._observe)                                 # not as a decorator: that costs a second at import
            self._handles += [getattr(ffn, part).register_forward_hook(partial(observe, (name, part)))
                              for name, ffn in self._ffns.items() for part in parts]
        if self._controlled:
            self._handles += [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]
            optimizer.nalora = self
        if self._observes:
            self._handles.append(self._controlled[0][2].register_post_accumulate_grad_hook(self._after_backward))

    def _observe(self, key, linear, inputs, z):
        """Forward hook of a gate, and of up_proj for score="downstream" (key: the names of FFN and layer; z: its output). Training only:
        evaluation must leave no trace in the statistics."""
        if linear.training and torch.is_grad_enabled():
            flat = z.dim() == 2 and self.token_mask is not None and self.token_mask.numel() == len(z)   # some models flatten (batch, seq)
            if self.token_mask is not None and self.token_mask.shape != z.shape[:-1] and not flat:
                raise ValueError(f"token_mask is {tuple(self.token_mask.shape)} but the gates see tokens {tuple(z.shape[:-1])}: "
                                 "set it anew before each forward pass, or to None.")
            if self._version not in (None, self._controlled[0][2]._version) and not self._before:         # a closure runs inside the step
                self._version = None
                warnings.warn("The LoRA parameters moved, but NALoRA's hooks were not called: make it with the optimizer whose step() runs "
                              "(and remove() any earlier one).", stacklevel=3)
            if key in self._samples:                                                        # another microbatch has begun
                self._add_up()
            seen, stride = self._seen.get(key, 0), self.config.stride
            # token number i of this step is observed if i leaves the same rest by stride as the number of the step
            every, self._seen[key] = slice((self._steps - seen) % stride, None, stride), seen + z.shape[:-1].numel()
            tokens = None if self.token_mask is None else self.token_mask.flatten()[every].ne(0)
            self._samples[key] = z.detach().flatten(0, -2)[every].clone(), tokens           # (T, F), (T,)

    def _before_step(self, optimizer, args, kwargs):
        """Optimizer hook: remembers where A and B are."""
        self._before = [p.detach().clone() for _, _, p in self._controlled]

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs):
        """Optimizer hook: decides by what was seen, then sets each parameter between where it was and where the optimizer put it."""
        if self._adapters != (now := self._active()):
            self._adapters = now
            warnings.warn("Other adapters are active than when this NALoRA was made, and they train as plain LoRA: remove() it and make a new one.", stacklevel=3)
        skipped = getattr(optimizer, "found_inf", None)                                     # a fused optimizer under GradScaler
        if skipped is None or not skipped.item():
            self._add_up()
            if self._observes and not self._sums:
                warnings.warn("NALoRA saw no gate before this optimizer step: is the model in train() mode, and run under grad?", stacklevel=3)
            self._reduce()
            if self._sums:
                self._decide()
            if self.config.mask == "redrawn":
                for i, state in enumerate(self._state.values()):
                    state["mask"] = importance_mask(row_draw(self.config, i, state["mask"], self._steps), self.config.keep)
            self._steps += 1
        self._version, self._samples, self._sums, self._seen = None, {}, {}, {}
        for (name, is_gate_B, p), before in zip(self._controlled, self._before):
            # lerp is exact at both ends: 0 puts a row back, 1 leaves the step
            p.copy_(torch.lerp(widen(before), widen(p), self._factor(self._state[name], is_gate_B)))
        self._before = []

    def _decide(self):
        """The sums since the last step -> importance, mask, k_hat, occupancy, scale. Stays on the device: no host synchronisation."""
        c, states, alike = self.config, self._state.values(), {}
        for name, sums in self._sums.items():
            alike.setdefault((sums.shape, sums.device), []).append(name)
        for names in alike.values():                                                        # all FFNs of one width at once
            old = {key: torch.stack([self._state[name][key] for name in names]) for key in self._state[names[0]]}
            sums = torch.stack([self._sums[name] for name in names]).to(old["importance"])  # (FFNs, F + 4)
            importance = torch.lerp(sums[:, :-4] / sums[:, -4:-3], old["importance"], c.ema)                        # (FFNs, F)
            k_hat, occupancy = regime(sums[:, -4:], importance.size(-1))                    # (FFNs,) each
            new = dict(old, importance=importance, k_hat=k_hat, occupancy=occupancy)
            if c.mask not in BLIND_MASKS:
                new["mask"] = importance_mask(-importance if c.mask == "inverted" else importance, c.keep)
            if c.mask == "shuffled":
                new["mask"] = new["mask"].gather(-1, torch.stack([self._order[name] for name in names]))
            usable = sums[:, -4] > 0                                                        # a token was seen, else all stays as it was
            for key in ("importance", "mask", "k_hat", "occupancy"):
                chosen = torch.where(usable if new[key].dim() == 1 else usable[:, None], new[key], old[key])
                for name, value in zip(names, chosen):
                    self._state[name][key] = value
        if c.scale != "none":
            k_hats, occupancies = (torch.stack([s[key].to(self._selects.device) for s in states]) for key in ("k_hat", "occupancy"))    # (FFNs,)
            scales = torch.where(self._selects, step_scale(k_hats, occupancies), 1)
            if c.scale == "uniform":
                scales = scales.mean().expand_as(scales)
            if c.budget == "neutral":
                scales = scales / scales.log().mean().exp()
            for state, scale in zip(states, scales):
                state["scale"] = scale.to(state["importance"].device)

    def _factor(self, state, is_gate_B):
        """What the step of a parameter is multiplied by: a number, or for B_gate one per row, (F, 1)."""
        if not is_gate_B:
            return state["scale"]
        rows = state["mask"].to(state["scale"])                                             # (F,)
        return state["scale"] * (rows / rows.mean() if self.config.budget == "neutral" else rows)[:, None]

    def _add_up(self):
        """Adds the sums of the samples of one forward pass to those of this step, all FFNs of one shape at once."""
        alike = {}
        for (name, part), (z, tokens) in self._samples.items():
            if part == self._gate:
                alike.setdefault((z.shape, z.device, tokens is None, kind(activation(self._ffns[name]))), []).append(name)
        for names in alike.values():
            samples, masks = zip(*(self._samples[name, self._gate] for name in names))
            z, tokens = torch.stack(samples), None if masks[0] is None else torch.stack(masks).to(samples[0].device)      # (FFNs, T, F), (FFNs, T)
            reach = [self._samples[name, "up_proj"][0].abs() * self._norms[name] for name in names] if self._norms else []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):        # gradient checkpointing shall not record this
                all_sums = gate_sums(activation(self._ffns[names[0]]), z, tokens, self.config.score, torch.stack(reach) if reach else None)
            all_sums = torch.where(all_sums.sum(-1, keepdim=True).isfinite(), all_sums, 0)  # an overflowed pass counts nothing
            for name, sums in zip(names, all_sums):
                self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._samples = {}

    def _reduce(self):
        """Adds up the sums of all ranks, so that they decide alike; an FFN that a rank has not seen counts nothing there."""
        if self._observes and torch.distributed.is_available() and torch.distributed.is_initialized():
            widths = {name: len(s["importance"]) + 4 for name, s in self._state.items()}
            zeros = lambda name: self._state[name]["importance"].new_zeros(widths[name])
            flat = torch.cat([self._sums.get(name, zeros(name)).to(self._selects.device) for name in widths])
            torch.distributed.all_reduce(flat)
            self._sums = {name: sums.to(self._state[name]["scale"].device) for name, sums in zip(widths, flat.split(list(widths.values())))}

    def _after_backward(self, parameter):
        self._version = parameter._version                                                  # if it changed at the next pass, somebody stepped

    def _active(self):
        """Which adapters train now, told by the first gate."""
        return [id(p) for pair in lora_pairs(getattr(next(iter(self._ffns.values())), self._gate)) for p in pair]

    def statistics(self):
        """{FFN module name: {"importance" (F,), "mask" (F,) bool, "k_hat", "occupancy", "scale": floats}} of the last step.

        Before the first step, and in methods that never look at the gates: importance 0, k_hat and occupancy NaN, scale 1.
        """
        return {name: {key: v.clone() if v.dim() else v.item() for key, v in s.items()} for name, s in self._state.items()}

    def state_dict(self):
        """{"config": dict, "steps": int, "ffns": {FFN module name: {the keys of `statistics`: tensors}}}. Take it between optimizer steps."""
        return {"config": asdict(self.config), "steps": self._steps, "ffns": {name: {k: v.clone() for k, v in s.items()} for name, s in self._state.items()}}

    def load_state_dict(self, state):
        """Goes on from a `state_dict`. ValueError, with nothing changed, if it was made with another configuration or model."""
        if state["config"] != asdict(self.config):
            raise ValueError(f"This NALoRA state was made with {state['config']}, not with {asdict(self.config)}.")
        saved, here = ({name: {k: v.shape for k, v in s.items()} for name, s in ffns.items()} for ffns in (state["ffns"], self._state))
        if saved != here:
            raise ValueError("This NALoRA state was made on another model: the names or widths of its FFNs differ.")
        self._steps = state["steps"]
        self._state = {name: {k: state["ffns"][name][k].clone().to(v) for k, v in s.items()} for name, s in self._state.items()}

    def remove(self):
        """Takes every hook off. What follows is plain LoRA training."""
        while self._handles:
            self._handles.pop().remove()
        if self._controlled and getattr(self._optimizer, "nalora", None) is self:
            del self._optimizer.nalora

def is_gated_ffn(module):
    """True for a module made of gate_proj, up_proj, down_proj and an activation: an FFN is told by its parts, not by its name."""
    return all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")) and activation(module) is not None

def activation(ffn):
    """The elementwise activation of an FFN by the names that Hugging Face gives it, or None."""
    named = (getattr(ffn, name, None) for name in ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation"))
    return next((act for act in named if callable(act)), None)

def kind(act):
    """Equal for activations that may be evaluated in one call: same function, and no parameters of their own."""
    return id(act) if isinstance(act, nn.Module) and any(True for _ in act.parameters()) else repr(act)

def lora_pairs(module):
    """[(lora_A (rank, in), lora_B (out, rank)), ...] of a layer: one of our LoRALinear, the active adapters' of a PEFT layer, else none.
    All that NA-LoRA knows of LoRA."""
    if isinstance(module, LoRALinear):
        return [(module.lora_A, module.lora_B)]
    adapters = getattr(module, "active_adapters", []) if hasattr(module, "lora_A") else []
    weight = lambda part: getattr(part, "weight", part)                                     # a Linear, or in AdaLoRA a bare parameter
    return [(weight(module.lora_A[name]), weight(module.lora_B[name])) for name in adapters if name in module.lora_A]

def find_ffns(model, gate):
    """{name: module} of the FFNs whose gate carries LoRA. ValueError, with the reason, if there is none."""
    found, leaf = {}, gate.split(".")[-1]
    for name, module in model.named_modules():
        if f".{name}".endswith(f".{gate}") and lora_pairs(module):
            parent = name.rpartition(".")[0]
            ffn = model.get_submodule(parent)
            if gate != "gate_proj" and activation(ffn) is None:
                raise ValueError(f"{parent or 'the model'} has {leaf} but no activation (act_fn, activation_fn, act): gate must name the linear layer in front of one.")
            if gate != "gate_proj" or is_gated_ffn(ffn):
                found[parent.replace("_orig_mod.", "").removeprefix("module.")] = ffn       # one name under DDP and torch.compile, too
    if not found and any(name.endswith("gate_up_proj") for name, _ in (*model.named_modules(), *model.named_parameters())):
        raise ValueError("This model fuses gate and up into gate_up_proj, whose rows NA-LoRA cannot tell apart yet: use a model with gate_proj and up_proj.")
    if not found:
        raise ValueError(f"No gated FFN here has LoRA on its {leaf}: call inject_lora (or PEFT) with {leaf!r} among the targets first, "
                         "and name the layer with gate=... if the FFN has no gate_proj.")
    return found

def check_optimizer(optimizer, controlled):
    """ValueError unless the optimizer has step hooks, holds every controlled parameter, whole and trainable, and is not steered already."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(f"NALoRA hooks the step of a torch.optim.Optimizer, and this is {type(optimizer).__name__}: give it the one that steps "
                         "(with Trainer, call trainer.create_optimizer() first or pass optimizers=(optimizer, None)).")
    if getattr(optimizer, "nalora", None):
        raise ValueError("This optimizer is steered by another NALoRA: call optimizer.nalora.remove() first, else each step would be corrected twice.")
    if any(hasattr(p, "placements") or p.numel() == 0 or p.dim() != 2 for _, _, p in controlled):
        raise ValueError("The LoRA parameters are sharded (FSDP, ZeRO-3), and NA-LoRA must see whole rows: train with DistributedDataParallel.")
    if not all(p.requires_grad for _, _, p in controlled):
        raise ValueError("The FFNs' LoRA parameters are frozen: unfreeze them first (PeftModel.from_pretrained(..., is_trainable=True)).")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for _, _, p in controlled):
        raise ValueError("The optimizer does not hold the FFNs' LoRA parameters: make it from the trainable parameters, after LoRA is in place.")

def column_norms(linear):
    """(in,) norms of the columns of a linear layer's weight, the frozen one under LoRA."""
    return widen(getattr(linear, "base_layer", linear).weight.detach()).norm(dim=0)

def row_draw(config, index, rows, step=0):
    """A number in [0, 1) for each row (F,) of FFN number `index`, of seed, index and step alone: which rows the random masks keep, and how the
    shuffled one is dealt."""
    generator = torch.Generator().manual_seed(config.seed + 1_000_003 * index + 1_000_000_007 * step)
    return torch.rand(len(rows), generator=generator, dtype=torch.float32, device="cpu").to(rows.device)    # whatever the defaults are

def initial_state(config, index, gate):
    """The state of FFN number `index` before anything is observed: every row moves fully. The random mask is made here, once."""
    B = lora_pairs(gate)[0][1].detach()                                                     # (F, rank)
    zero = widen(B.new_zeros(()))
    return {"importance": zero.repeat(len(B)), "mask": importance_mask(row_draw(config, index, B), config.keep if config.mask == "random" else 1),
            "k_hat": zero + math.nan, "occupancy": zero + math.nan, "scale": zero + 1}

def controlled_parameters(config, name, ffn, gate):
    """Yields (FFN name, whether it is B_gate, parameter) of what the method steers: B_gate by the mask, every pair by the scale."""
    for part, linear in ffn.named_children():
        for A, B in lora_pairs(linear):
            if config.scale != "none" or config.mask != "none" and part == gate:
                yield name, part == gate, B
            if config.scale != "none":
                yield name, False, A

def check_config(c):
    for field, allowed in CHOICES.items():
        if getattr(c, field) not in allowed:
            raise ValueError(f"{field} is {getattr(c, field)!r}: choose one of {', '.join(allowed)}.")
    if not isinstance(c.keep, (int, float)):
        raise ValueError(f"keep is {c.keep!r}: give a number in (0, 1].")
    importance_mask(torch.ones(1), c.keep)                                                  # refuses a keep outside (0, 1]
    if not (isinstance(c.ema, (int, float)) and 0 <= c.ema < 1):
        raise ValueError(f"ema is {c.ema!r}: give a number in [0, 1).")
    if not (type(c.stride) is int and 1 <= c.stride < 2**31):
        raise ValueError(f"stride is {c.stride!r}: give a whole number of at least 1 (1 observes every token).")
    if type(c.seed) is not int or abs(c.seed) >= 2**62:
        raise ValueError(f"seed is {c.seed!r}: give a whole number below 2**62.")
    if c.scale == "uniform" and c.budget == "neutral":
        raise ValueError("scale='uniform' with budget='neutral' divides out to exactly 1: say scale='none'.")

# ---- 4. Measures of selection (ours) -----------------------------------------------------------------------------------------------

def effective_homogeneity(act, z):
    """k_hat of all of z, any shape, 0-dim: a degree that channels which are off do not disturb; exactly 1 for linear and ReLU."""
    return regime(gate_sums(act, z.reshape(1, -1))[-4:], z.numel())[0]

def selection_misalignment(act, z, z_full, z_base):
    """M = ||rho(z) - rho(z_full)|| / ||rho(z_full) - rho(z_base)||, 0-dim: gates of one layer on the same tokens, all of one shape,
    in the adapted, the fully fine-tuned and the base model. 0: full fine-tuning's selection; 1: no better than not adapting.
    ValueError if full fine-tuning moved no selection (0/0)."""
    rho, rho_full, rho_base = (selection_weight(act, widen(t)) for t in (z, z_full, z_base))
    moved = (rho_full - rho_base).norm()
    if moved == 0:
        raise ValueError("Full fine-tuning moved no selection weight here, so the misalignment is 0/0.")
    return (rho - rho_full).norm() / moved

def selection_entropy(act, z):
    """H = -sum p log p / log F in [0, 1], 0-dim, of z (tokens, F), p_c ~ mean |phi'(z_c)| rho(z_c). 1: all channels respond alike."""
    z = widen(z)
    p = (value_and_slope(act, z)[1].abs() * selection_weight(act, z)).mean(0).clamp(min=0)  # (F,)
    return torch.special.entr(p / p.sum()).sum() / math.log(len(p))

# ---- 5. The Llama it is shown on. Parameter and configuration names are Hugging Face's: its checkpoints load as they are. ----------

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
               "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z), "relu": F.relu}

@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, in the fields of a Hugging Face config.json. ValueError where they contradict each other."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None         # None: as many as num_attention_heads; fewer: grouped-query attention
    head_dim: int = None                    # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = None                # not used here; kept for whoever generates with what is saved
    eos_token_id: int = None

    def __post_init__(self):
        for f in fields(self):
            value, largest = getattr(self, f.name), 1000 if f.name == "num_hidden_layers" else 2**24
            fits = {int: type(value) is int and 1 <= value <= largest, float: type(value) in (int, float) and 0 < value < math.inf}
            if not fits.get(f.type, isinstance(value, f.type)) and not (value is f.default is None) and not f.name.endswith("token_id"):
                raise ValueError(f"{f.name} is {value!r}, which no Llama has.")
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads {self.num_attention_heads}, "
                             f"and head_dim {self.head_dim} must be even.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, but this Llama knows {', '.join(ACTIVATIONS)}.")

    @classmethod
    def from_dict(cls, d):
        """Reads the content of a Hugging Face config.json. ValueError names what it lacks or what this Llama cannot honour."""
        ropes = [d.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(rope, dict) for rope in ropes):
            raise ValueError("rope_scaling and rope_parameters must be objects (or null): it is not a Llama's config.json.")
        rope = {**ropes[0], **ropes[1]}
        d = {**d, **rope, "rope_scaling": rope.get("rope_type", rope.get("type", "default"))}
        plain = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "rope_scaling": "default",
                 "partial_rotary_factor": 1, "sliding_window": None, "pretraining_tp": 1, "quantization_config": None}
        for field, value in plain.items():
            if d.get(field, value) not in (value, None):
                raise ValueError(f"This Llama cannot honour {field} = {d[field]!r}: this file implements plain Llama only.")
        missing = [f.name for f in fields(cls) if f.default is MISSING and d.get(f.name) is None]
        if missing:
            raise ValueError(f"The configuration lacks {', '.join(missing)}: it is not a Llama's config.json.")
        return cls(**{f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None})

def rotary_tables(config, start, length, device):
    """cos and sin of each position's rotation angles, (length, head_dim) each, float32."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    angle = torch.outer(torch.arange(start, start + length, device=device).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, T, head_dim) in Hugging Face's half-rotation convention: i is paired with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, heads, kv_heads = c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache):                                                  # x (B, T, hidden)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)               # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:                                                               # a list, [] or [past k, past v]
            cache[:] = [torch.cat((past, now), dim=2) for past, now in zip(cache, (k, v))] or [k, v]
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                    # (B, T, hidden)

class GatedFFN(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.act_fn = ACTIVATIONS[c.hidden_act]

    def forward(self, x):                                                                   # (B, T, hidden)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = GatedFFN(c)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """A Llama with fresh weights, normal with standard deviation `initializer_range`; `Llama.from_pretrained` loads trained ones."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) int64 -> (logits (B, T, vocab), None).

        With targets (B, T), the next token of each position or -100 for none: (logits (N, vocab) at the N positions that have a
        target, their mean cross-entropy in nats). cache: a list per layer, [] at first, filled here; further calls take one token.
        ValueError if the text is longer than max_position_embeddings, or if a filled cache meets more than one token.
        """
        start = cache[0][0].size(2) if cache and cache[0] else 0
        if start + tokens.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"A text of {start + tokens.size(1)} tokens exceeds the context of {self.config.max_position_embeddings}: shorten it.")
        if start and tokens.size(1) > 1:
            raise ValueError(f"A filled cache takes one token at a time, not {tokens.size(1)}.")
        x = self.model.embed_tokens(tokens)                                                 # (B, T, hidden)
        cos, sin = rotary_tables(self.config, start, tokens.size(1), tokens.device)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache and cache[i])
        x = self.model.norm(x)
        if targets is None:
            return self.lm_head(x), None
        logits = self.lm_head(x[targets != -100])                                           # (N, vocab)
        return logits, F.cross_entropy(logits.float(), targets[targets != -100])

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=0.0, top_k=None, stop=None, generator=None):
        """tokens (B, T), no padding -> (B, T + n), n <= max_new_tokens, by a key/value cache. temperature 0 is greedy; top_k samples
        among the k likeliest; after the token `stop` a row repeats it, and n is reached when all rows stopped. ValueError beyond the context."""
        if tokens.size(1) < 1 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError("generate needs a prompt of at least one token, a temperature >= 0 and a top_k >= 1 (or None).")
        if tokens.size(1) + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(f"A prompt of {tokens.size(1)} tokens and {max_new_tokens} new ones exceed the context of "
                             f"{self.config.max_position_embeddings}: shorten the prompt or ask for fewer.")
        cache, new, stopped = [[] for _ in self.model.layers], tokens, tokens.new_zeros(len(tokens), dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits = self(new, cache=cache)[0][:, -1].float()                               # (B, vocab)
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -math.inf)
            new = logits.argmax(-1, keepdim=True)                                           # (B, 1)
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            if stop is not None:
                new = new.masked_fill(stopped[:, None], stop)
                stopped |= new[:, 0] == stop
            tokens = torch.cat((tokens, new), dim=1)
            if stopped.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32):
        """Reads config.json and model.safetensors (or the shards of its index). ValueError if they are missing, broken or do not agree."""
        c = LlamaConfig.from_dict(read_json(Path(directory) / "config.json"))
        weights = {k: v for k, v in read_weights(Path(directory)).items() if not k.endswith("rotary_emb.inv_freq")}   # old exports
        if c.tie_word_embeddings and "model.embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        attention, ffn = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads), 3 * c.intermediate_size
        asked, there = c.hidden_size * (c.vocab_size + c.num_hidden_layers * (attention + ffn)), sum(t.numel() for t in weights.values())
        if asked > 2 * there > 0:                               # found before the memory is asked for
            raise ValueError(f"The weights in {directory} are not those of its config.json, which describes {asked:,} numbers where {there:,} are.")
        model = cls(c).to(dtype)
        shapes, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (weights, model.state_dict()))
        wrong = sorted(k for k in {*shapes, *expected} if shapes.get(k) != expected.get(k))
        if wrong:
            raise ValueError(f"The weights in {directory} are not those of its config.json: {wrong[0]} is {shapes.get(wrong[0], 'missing')}, "
                             f"expected {expected.get(wrong[0], 'nothing of that name')} ({len(wrong)} such).")
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, directory, dtype=None):
        """Writes config.json and model.safetensors, in `dtype` if given. ValueError while LoRA is attached."""
        if any(isinstance(m, LoRALinear) for m in self.modules()):
            raise ValueError("This model carries LoRA: merge_lora(model) before saving it, or save_adapter(model, directory).")
        weights = {k: v.to(dtype or v.dtype).contiguous() for k, v in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self.config),
                  "torch_dtype": str(weights["model.norm.weight"].dtype).removeprefix("torch.")}
        write_tensors(Path(directory) / "model.safetensors", weights)
        write_json(Path(directory) / "config.json", config)

# ---- 6. Wiring and files. A file is written whole under a temporary name and then renamed; nothing is ever unpickled. ---------------

def inject_lora(model, targets, rank=8, alpha=16):
    """Puts a LoRALinear in the place of every nn.Linear that `targets` name, freezes all else and returns their module names.

    targets: module names, whole or from a dot on ("q_proj", "mlp.gate_proj"). ValueError, with nothing changed, if the model carries
    LoRA already, a target matches no linear layer, or the rank does not fit one.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("This model carries LoRA already: merge_lora(model) first, or start from the base model.")
    linears, chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}, set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = {name for name in linears if f".{name}".endswith(f".{target}")}
        if not matches:
            raise ValueError(f"The target {target!r} matches no linear layer; there are {', '.join(sorted({n.split('.')[-1] for n in linears}))}.")
        chosen |= matches
    for name in chosen:
        check_size(rank, alpha, linears[name], name)
    if not chosen:
        raise ValueError("No targets are given: name at least one linear layer, such as 'gate_proj'.")
    model.requires_grad_(False)
    names = [name for name in linears if name in chosen]
    for name in names:
        model.set_submodule(name, LoRALinear(linears[name], rank, alpha))
    return names

def lora_layers(model):
    """{module name: LoRALinear} in module order. ValueError if there is none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("This model carries no LoRA (never injected, or merged already): call inject_lora or load_adapter first.")
    return layers

def lora_parameters(model):
    """[A, B, A, B, ...] in module order: what the optimizer trains."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]

@torch.no_grad()
def merge_lora(model):
    """W <- W + (alpha / rank) B A, computed in float32 and rounded once to W's dtype; each nn.Linear is back in its place afterwards,
    and frozen. Returns their names.

    There is no way back, and a second call is a ValueError: nothing is left to merge. So is a quantized weight, one on the meta device,
    and a tied one, since merging it would change another layer too; then nothing is changed.
    """
    layers = lora_layers(model)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name, layer in layers.items():
        if layer.base_layer.weight.is_meta or not layer.base_layer.weight.is_floating_point():
            raise ValueError(f"The weight of {name} is {'not loaded (meta device)' if layer.base_layer.weight.is_meta else 'quantized'}: "
                             "load the base model in floating point to merge, or keep the adapter.")
        if owners[id(layer.base_layer.weight)] > 1:
            raise ValueError(f"The weight of {name} is tied to another layer, and merging would change both: untie it, or keep the adapter.")
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        weight.copy_(widen(weight) + layer.scaling * (layer.lora_B @ layer.lora_A))
        model.set_submodule(name, layer.base_layer)
    return list(layers)

def save_adapter(model, directory, base_model=None, settings=None):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does; what PEFT does not know goes to nalora.json.

    base_model: name or path of the base, for PEFT; settings: any JSON value, for the record. ValueError if the model has no LoRA.
    """
    layers, directory = lora_layers(model), Path(directory)
    (rank, alpha), *others = {(layer.rank, layer.alpha) for layer in layers.values()}
    if others:
        raise ValueError("The LoRA layers differ in rank or alpha, and an adapter_config.json holds one of each: inject them alike.")
    tensors = {f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach()
               for name, layer in layers.items() for part in ("lora_A", "lora_B")}
    linears = [n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    leaves = sorted({name.split(".")[-1] for name in layers})
    complete = {n for n in linears if n.split(".")[-1] in leaves} == set(layers)            # else last parts would name too many
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank, "lora_alpha": alpha,
              "target_modules": leaves if complete else list(layers), "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    write_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", config)
    write_json(directory / "nalora.json", {"settings": settings, "base": fingerprint({n: l.base_layer for n, l in layers.items()})})

def load_adapter(model, directory):
    """Loads an adapter that save_adapter or PEFT wrote, injecting LoRA where there is none yet. Returns the module names.

    ValueError, with nothing changed, if a file is missing or broken, the adapter is more than plain LoRA, or its modules, shapes,
    rank, alpha or base model are not this model's.
    """
    directory = Path(directory)
    config, tensors = read_json(directory / "adapter_config.json"), read_tensors(directory / "adapter_model.safetensors")
    rank, alpha = plain_rank_and_alpha(directory, config)
    linears = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    key, names = "base_model.model.{}.{}.weight".format, {k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in tensors}
    fits = {key(n, part): shape for n in names & set(linears)
            for part, shape in (("lora_A", (rank, linears[n].in_features)), ("lora_B", (linears[n].out_features, rank)))}
    if not tensors or {k: tuple(t.shape) for k, t in tensors.items()} != fits:
        raise ValueError(f"The adapter in {directory} (rank {rank}) does not fit this model: other module names or shapes, so another base.")
    present = {n: (m.rank, m.alpha) for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if present and present != dict.fromkeys(names, (rank, alpha)):
        raise ValueError(f"The adapter in {directory} (rank {rank}, alpha {alpha}, {len(names)} modules) differs from the LoRA already in the model.")
    if (directory / "nalora.json").exists():
        saved, here = read_json(directory / "nalora.json").get("base"), fingerprint({n: linears[n] for n in names})
        if not isinstance(saved, dict) or not all(isinstance(norm, (int, float)) for norm in saved.values()):
            raise ValueError(f"{directory / 'nalora.json'} is not what save_adapter wrote: its \"base\" holds no norms. Delete it to load the adapter unchecked.")
        if any(not math.isclose(saved.get(n, here[n]), here[n], rel_tol=0.01) for n in names):
            raise ValueError(f"The adapter in {directory} was trained on another base model: the weights differ from those of this one.")
    if not present:
        inject_lora(model, names, rank, alpha)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(tensors[key(name, "lora_A")])
            layer.lora_B.copy_(tensors[key(name, "lora_B")])
    return list(lora_layers(model))

def plain_rank_and_alpha(directory, config):
    """(rank, alpha) of the content of an adapter_config.json. ValueError if it asks for more than one plain LoRA pair per layer."""
    more = [k for k in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if config.get(k)]
    numbers = all(isinstance(config.get(k), (int, float)) and 0 < config[k] < 1e12 for k in ("r", "lora_alpha"))
    if more or not numbers or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(f"{directory} holds no plain LoRA adapter (see {more[0] if more else 'peft_type, bias, r, lora_alpha'} in adapter_config.json).")
    return config["r"], config["lora_alpha"]

def fingerprint(linears):
    """{name: norm of the weight's first row}: within 1 % equal for the same base in any dtype, and hardly for another base."""
    return {name: linear.weight[0].detach().float().norm().item() for name, linear in linears.items()}

def write_whole(path, save):
    """Calls save(a temporary path) and renames the result to `path`: whatever happens, `path` is the old file or the new one. OSError where
    nothing can be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)                                                   # it may be a link to something else
        save(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise OSError(f"{path} cannot be written and is as it was before: {e}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()

def write_json(path, value):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))

def write_tensors(path, tensors):
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))

def read(path, parse):
    """parse(path), with a ValueError that names the file where it is missing, truncated or something else."""
    try:
        return parse(path)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None

def read_json(path):
    return read(path, lambda p: dict(json.loads(p.read_text(encoding="utf-8"))))

def read_tensors(path):
    """{name: tensor} of a safetensors file. ValueError also if one holds whole numbers, infinity or NaN: no weights do."""
    tensors = read(path, load_file)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path} cannot be used: {name} ({str(tensor.dtype).removeprefix('torch.')}) holds something else than finite floating-point numbers.")
    return tensors

def read_weights(directory):
    """All tensors of a checkpoint directory: model.safetensors, or else the shards that model.safetensors.index.json names."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return read_tensors(directory / "model.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()):
        raise ValueError(f"{index} names no shards, or one outside its own directory: it is not a checkpoint's index.")
    return {key: tensor for shard in sorted(set(shards.values())) for key, tensor in read_tensors(directory / shard).items()}
