"""NA-LoRA (Nonlinearity-Aware LoRA, arXiv 2606.31717) in one file: an unofficial, educational
reference: mathematics, NALoRA, LoRA, a Llama. Other FFNs and trainers are nalora_hf's.

THE IDEA. The feed-forward network (FFN) of a Llama computes h = phi(z) * u from a gate
z = W_gate x and u = W_up x. Its activation is self-gated, a weight times the feature z itself:
phi(z) = rho(z) z. So moving a gate by delta moves two things at once:
    phi(z + delta) - phi(z)  =  rho(z) delta  +  z rho'(z) delta  +  O(delta^2)
                               features move     selection moves
LoRA is to change features, yet it also changes which channels are selected: the paper's selection
misalignment, see evidence/. The second move over the first is kappa - 1; kappa(z) = z phi' / phi is
the local degree of homogeneity (Euler: k where phi(t z) = t^k phi(z), t > 0). Where kappa > 1
(SiLU, GELU: z > 0) selection amplifies, else opposes. NA-LoRA does not undo that: it moves channels
that respond (phi'), by less where gates amplify (kappa). It adds no loss, weight or inference cost.

USE IT. One line turns a LoRA loop into an NA-LoRA loop:
    inject_lora(model, ["gate_proj", "up_proj", "down_proj"], rank=8, alpha=16)  # or PEFT's LoRA
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    nalora = NALoRA(model, optimizer)  # the one line; train as ever, save nalora.state_dict(), too
Padding counts as tokens unless nalora.token_mask (batch, seq), nonzero for real tokens, is set from
each pass to its backward. If nalora.steps stays 0, call model.train().

THE ALGORITHM. An FFN has F gate channels and LoRA pairs (A, B) on gate, up and down. z is what its
activation receives, LoRA's update included. Defaults: keep 0.5, ema 0.9, stride 17.
    start    importance I = 0, mask = every row, scale = 1, n = 0
    forward  Each pass in train mode with gradients: number its tokens i = 0, 1, ... row by row,
             padding too. w = 1 if i mod stride = n mod stride and token i is real, else 0.
             Sum over tokens; P, Q, G over channels, too; passes (recomputed, too) and ranks add up:
                 N = sum w   S_c = sum w |phi'(z_c)|   P = sum w z phi'(z) phi(z)
                 Q = sum w phi(z)^2   G = sum w [z > 0]
    step     before = A, B;  optimizer.step();  after = A, B.  If a pass came before it and
             GradScaler did not skip it: n = n + 1, and if the FFN's N > 0 and its sums are finite
                 I     = blend(S / N, I, ema)
                 mask  = the max(1, ceil(keep F - 1e-9)) channels of largest I, lower index first
                 k_hat = P / Q, or 1 if Q = 0;  p = G / (N F)
                 scale = 1 / clip(k_hat, 1/2, 2) if min(p, 1 - p) >= 0.05, else 1
             Then the sums are 0 (a skip keeps them). After every optimizer.step(), pass or not,
                 row c of B_gate                    = blend(before, after, mask_c scale)
                 A_gate, and A and B of up and down = blend(before, after, scale)
    blend(b, a, f) = b + f (a - b) if f < 1/2, else a - (a - b) (1 - f)  (exact at f = 0 and 1)
In numbers: first step, SiLU, one token, two channels, z = (1, -2):
    phi = (0.731, -0.238)  phi' = (0.928, -0.091)  N = 1  S = (0.928, 0.091)  G = 1  p = 1/2
    P = (1)(0.928)(0.731) + (-2)(-0.091)(-0.238) = 0.635   Q = 0.731^2 + 0.238^2 = 0.591
    k_hat = 1.07  scale = 0.931  I = 0.1 S = (0.093, 0.009)  mask = (1, 0). So row 0 of B_gate and
    every other A and B take 0.931 of the optimizer's step; row 1 stays bit for bit.

WHY the responsive channels? The gradient of row c of B_gate carries phi'(z_c), so SGD hardly moves
channels that do not respond. Adam normalises that away; the mask is to bring it back. All channels
share A_gate, so it has no mask. I is an average over steps, or the mask would flicker.
Why the step, not the gradient or the forward pass? Momentum and weight decay move a row whose
gradient is zero; putting it back is exact. Adam's moments see every gradient, so a released row
moves at once, by built-up momentum. A mask in the forward pass would change the model.
Why 1 / k_hat? Gates that grow by 1 % let phi grow by k_hat %; dividing makes equal steps count
equally. kappa of SiLU is 1 at 0 and for z -> inf, at most 1.28, and -inf for z -> -inf (of ReLU
below 0 it is 0/0, here 1). So k_hat weights it by phi^2, which goes to 0 faster than kappa grows.
GLOSSARY. z: gate pre-activation  phi: act  phi': slope  A, B: lora_A, lora_B  I: importance
    rho: selection_weight  kappa: homogeneity  k_hat: effective_homogeneity  p: occupancy

WHOSE IS WHAT. We have seen no equation of the paper. Never cite this file as its method.
    the paper, in public                           | our reading
    selection misalignment; "the local effective   | kappa - 1 as the ratio of the two moves;
      homogeneity of self-gated activations"       |   k_hat by least squares
    "a derivative-based temporal-importance mask   | phi' (not rho'), that large |phi'| moves; its
      for gate-related LoRA updates"               |   mean, ema, keep, hard cut, on B_gate's step
    "an activation-specific step-scaling rule when | z = 0 as cut, the 5 %, 1 / k_hat, its clip, its
      a meaningful coarse effective-homogeneity    |   reach over gate, up and down; all default
      partition is available"; training only       |   values
BEFORE YOU PORT, check: scale off and keep 1 are LoRA bit for bit; rows outside the mask keep their
bits under momentum and decay; data/vectors agree; evaluation leaves no trace.
"""
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1 the mathematics: pure functions, any leading dimensions (...)
def widen(t):
    """t in float32, or in float64 if it is: nothing is summed or blended in half precision."""
    return t if t.dtype == torch.float64 else t.float()

def value_and_slope(act, z):
    """phi(z) and phi'(z), shaped like z, of any elementwise activation: a function or a module."""
    act = getattr(act, "forward", act)  # skips a module's hooks
    own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
    with torch.enable_grad(), own:  # a checkpoint around this shall not see what it saves
        z = z.detach().requires_grad_()
        phi = act(z.clone())  # act may be in place
        slope, = torch.autograd.grad(phi, z, torch.ones_like(z))
    return phi.detach(), slope

def selection_weight(act, z):
    """rho(z) = phi(z) / z (SiLU: sigmoid(z)), shaped like z; at 0 its limit phi'(0)."""
    phi, slope = value_and_slope(act, z)
    return torch.where(z == 0, slope, phi / torch.where(z == 0, 1, z))

def homogeneity(act, z):
    """kappa = z phi' / phi = 1 + z rho' / rho at each z, shaped like z; 1 where phi(z) = 0."""
    phi, slope = value_and_slope(act, z)
    return torch.where(phi == 0, 1, z * slope / torch.where(phi == 0, 1, phi))

class GateSums(NamedTuple):
    """Over an FFN's observed tokens. Sums of passes and ranks add up."""
    score: Tensor  # (..., F) S: sum of |phi'(z_c)|
    tokens: Tensor  # (...) N: how many tokens
    z_slope_phi: Tensor  # (...) P: sum of z phi'(z) phi(z) over tokens and channels
    phi_phi: Tensor  # (...) Q: sum of phi(z)^2
    positive: Tensor  # (...) G: how many z > 0
    def __add__(self, other):
        return GateSums(*map(torch.add, self, other))

    def k_hat(self):  # the k that fits z phi' = k phi best in least squares, (...)
        return torch.where(self.phi_phi > 0, self.z_slope_phi / self.phi_phi, 1)

def observe(act, z, weight):
    """GateSums of gates z (..., T, F); weight (..., T): 1 or, whatever z holds there, 0."""
    z = widen(z)
    weight = weight.to(z.dtype)
    z = torch.where(weight[..., None] > 0, z, 0)  # (..., T, F); phi(0) = 0 adds nothing
    phi, slope = value_and_slope(act, z)  # (..., T, F) each
    return GateSums(score=(weight[..., None] * slope.abs()).sum(-2),  # phi'(0) is not 0
                    tokens=weight.sum(-1),
                    z_slope_phi=(z * slope * phi).sum((-2, -1)),
                    phi_phi=phi.square().sum((-2, -1)),
                    positive=z.sign().relu().sum((-2, -1)))

def effective_homogeneity(act, z):
    """k_hat of gates z (..., F) over all tokens and channels, 0-dim."""
    z = z.reshape(-1, z.size(-1))  # (T, F)
    return observe(act, z, z.new_ones(len(z))).k_hat()

def importance_mask(importance, keep):
    """Bool (..., F): the ceil(keep F) channels of largest importance, lower index first."""
    count = max(1, math.ceil(keep * importance.size(-1) - 1e-9))  # 0.07 * 100 > 7 in floats
    first = torch.argsort(importance, dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, first, True)

def step_scale(k_hat, occupancy):
    """1 / clip(k_hat, 1/2, 2), (...); 1 where less than 5 % of the gates lie on one side of 0."""
    two_regimes = torch.minimum(occupancy, 1 - occupancy) >= 0.05
    return torch.where(two_regimes, 1 / k_hat.clamp(0.5, 2), 1)

@dataclass(frozen=True)
class NALoRAConfig:
    """What the method can vary. ValueError on other values."""
    keep: float = 0.5  # share of the gate channels whose row of B_gate moves, in (0, 1]
    ema: float = 0.9  # decay of the importance per step, in [0, 1)
    stride: int = 17  # observe every 17th token; shifted by one each step
    mask: str = "derivative"  # or "none": every row moves
    scale: str = "homogeneity"  # or "none": scale 1
    def __post_init__(self):
        if not (0 < self.keep <= 1 and 0 <= self.ema < 1 and self.stride >= 1
                and self.mask in ("derivative", "none") and self.scale in ("homogeneity", "none")):
            raise ValueError(f"{self}: keep is in (0, 1], ema in [0, 1), stride 1 or more, mask "
                             "and scale as they are or 'none'.")

class State(NamedTuple):
    """What NA-LoRA knows of an FFN after a step."""
    importance: Tensor  # (..., F) I
    mask: Tensor  # (..., F) bool: the rows of B_gate that move
    k_hat: Tensor  # (...), NaN until something was observed, as occupancy
    occupancy: Tensor  # (...) p
    scale: Tensor  # (...)

def decide(state, sums, config):
    """The State after a step with `sums`; the old one where N = 0 or a sum is not finite."""
    importance = torch.lerp(sums.score / sums.tokens[..., None], state.importance, config.ema)
    mask = importance_mask(importance, config.keep) if config.mask != "none" else state.mask
    k_hat = sums.k_hat()  # (...)
    occupancy = sums.positive / (sums.tokens * importance.size(-1))  # (...)
    scale = step_scale(k_hat, occupancy) if config.scale != "none" else state.scale
    good = (sums.tokens > 0) & (sums.score.sum(-1) + sum(sums[1:])).isfinite()  # (...)
    return State(torch.where(good[..., None], importance, state.importance),
                 torch.where(good[..., None], mask, state.mask),
                 torch.where(good, k_hat, state.k_hat),
                 torch.where(good, occupancy, state.occupancy),
                 torch.where(good, scale, state.scale))

def blend(before, after, factor):
    """before + factor (after - before), exact at factor 0 and 1."""
    before = widen(before)
    return torch.lerp(before, widen(after), factor.to(before))

# ---- 2 NALoRA: hooks that observe passes and correct steps
@dataclass(eq=False)
class SteeredFFN:
    """All that NA-LoRA keeps of one FFN."""
    name: str
    act: nn.Module  # its input is z
    B_gate: nn.Parameter  # (F, rank)
    parameters: list  # [A, B, ...] of gate, up and down, B_gate among them
    state: State = None
    sums: GateSums = None  # of the passes since the last step, if any
    def __post_init__(self):
        zero = widen(self.B_gate.detach().new_zeros(len(self.B_gate)))  # (F,)
        nan = zero.new_tensor(math.nan)
        self.state = State(zero, zero == 0, nan, nan, zero.new_tensor(1))

class Hook:
    """Shows NALoRA an activation's input. A copy or pickle of the model gets an idle hook."""
    def __init__(self, nalora=None, ffn=None):
        self.nalora = nalora
        self.ffn = ffn

    def __call__(self, act, inputs):
        if self.nalora is not None:
            self.nalora.see(self.ffn, inputs[0])

    def __reduce__(self):
        return Hook, ()

def lora_pair(linear):
    """[A (rank, in), B (out, rank)] of a layer with LoRA, ours or PEFT's, or []."""
    pair = [getattr(linear, name) for name in ("lora_A", "lora_B") if hasattr(linear, name)]
    if pair and hasattr(linear, "active_adapters"):  # PEFT's: {adapter: nn.Linear}
        pair = [part[name] for name in linear.active_adapters if name in pair[0] for part in pair]
    return [getattr(part, "weight", part) for part in pair]

class NALoRA:
    """Turns LoRA training into NA-LoRA: make it after the optimizer, then train as ever, also with
    accumulation, checkpointing, DDP, GradScaler or autocast. ValueError, and no hook, if no FFN can
    be steered or `optimizer` lacks their LoRA. A subclass may replace where z comes from (find,
    attach, see), the view of a parameter (value), the method (observe, decide, row_factor)."""
    def __init__(self, model, optimizer, config=None):
        self.config = config or NALoRAConfig()
        self.token_mask = None  # (batch, seq) of the next pass, nonzero for real tokens
        self.steps = 0  # n
        self.ffns = self.find(model)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for ffn in self.ffns:
            if not {ffn.B_gate, *(p for p in ffn.parameters if p.requires_grad)} <= held:
                raise ValueError(f"The optimizer lacks the LoRA of {ffn.name}.")
        self.handles = [optimizer.register_step_pre_hook(self.before_step),
                        optimizer.register_step_post_hook(self.after_step)]
        for ffn in self.ffns:
            self.attach(ffn)

    def find(self, model):
        found = []
        for name, ffn in model.named_modules():
            gate, up, down = (lora_pair(getattr(ffn, part, None))
                              for part in ("gate_proj", "up_proj", "down_proj"))
            if len(gate) == 2 and isinstance(getattr(ffn, "act_fn", None), nn.Module):
                found.append(SteeredFFN(name, ffn.act_fn, gate[1], gate + up + down))
        if not found or len({ffn.act for ffn in found}) < len(found):
            raise ValueError("NALoRA steers FFNs with gate_proj, up_proj, down_proj, a module "
                             "act_fn each, and LoRA on gate_proj; nalora_hf steers others.")
        return found

    def attach(self, ffn):
        for hook in list(ffn.act._forward_pre_hooks.values()):
            if getattr(hook, "nalora", None) is not None:
                hook.nalora.remove()  # such as when a notebook's cell runs again
        self.handles.append(ffn.act.register_forward_pre_hook(Hook(self, ffn)))

    def see(self, ffn, z):
        """A pass: adds the sums over z (..., F), the activation's input, to those of the step."""
        if not (ffn.act.training and z.requires_grad):
            return  # evaluation, or nothing learns
        real = z.new_ones(z.shape[:-1]) if self.token_mask is None else self.token_mask
        if z.shape[:-1] not in (real.shape, (real.numel(),)):  # or flat z
            raise ValueError(f"token_mask is {tuple(real.shape)}, but the gates see tokens "
                             f"{tuple(z.shape[:-1])}: set it before each pass, or to None.")
        every = slice(self.steps % self.config.stride, None, self.config.stride)
        sample = z.detach().flatten(0, -2)[every].to(ffn.state.importance)  # (T, F)
        sums = self.observe(ffn, sample, real.flatten()[every].ne(0).to(sample))
        ffn.sums = sums if ffn.sums is None else ffn.sums + sums

    def before_step(self, optimizer, args, kwargs):
        self.before = {p: self.value(p).clone() for ffn in self.ffns for p in ffn.parameters}

    def after_step(self, optimizer, args, kwargs):
        seen = [ffn for ffn in self.ffns if ffn.sums is not None]  # ranks that differ would hang
        if seen and self.step_ends(optimizer):
            for ffn in seen:
                self.sum_over_ranks(ffn)
                self.decide(ffn)
                ffn.sums = None
            self.steps += 1
        for ffn in self.ffns:
            for p in ffn.parameters:
                after = self.value(p)
                after.copy_(blend(self.before[p], after, self.factor(ffn, p)))
        self.before = None

    def step_ends(self, optimizer):
        """False if GradScaler made a fused optimizer skip this step."""
        return not getattr(optimizer, "found_inf", None)

    def sum_over_ranks(self, ffn):  # all decide alike
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for t in ffn.sums:
                torch.distributed.all_reduce(t)

    def value(self, p):
        return p.detach()

    def factor(self, ffn, p):
        """What the step of p is multiplied by: (F, 1) for B_gate, else 0-dim."""
        return self.row_factor(ffn) if p is ffn.B_gate else ffn.state.scale

    def observe(self, ffn, z, weight):
        return observe(ffn.act, z, weight)

    def decide(self, ffn):
        ffn.state = decide(ffn.state, ffn.sums, self.config)

    def row_factor(self, ffn):
        return (ffn.state.scale[..., None] * ffn.state.mask)[..., None]  # (F, 1)

    def statistics(self):  # {FFN name: its State as a dict of tensors and floats}
        return {ffn.name: {k: t if t.dim() else t.item() for k, t in ffn.state._asdict().items()}
                for ffn in self.ffns}

    def state_dict(self):
        return {"config": asdict(self.config), "steps": self.steps,
                "ffns": {ffn.name: ffn.state._asdict() for ffn in self.ffns}}

    def load_state_dict(self, saved):
        """Goes on from a `state_dict`. ValueError if its configuration or FFNs differ."""
        here = self.state_dict()
        if saved["config"] != here["config"] or saved["ffns"].keys() != here["ffns"].keys():
            raise ValueError("This state is of another configuration or other FFNs.")
        self.steps = saved["steps"]
        for ffn in self.ffns:
            tensors = saved["ffns"][ffn.name].items()
            ffn.state = State(**{key: t.to(ffn.state.mask.device) for key, t in tensors})
            ffn.sums = None

    def remove(self):
        """Takes every hook off. What follows is plain LoRA training."""
        for handle in self.handles:
            handle.remove()

# ---- 3 LoRA, and its files as PEFT writes them
class LoRALinear(nn.Module):
    """y = base_layer(x) + (alpha / rank) B A x (arXiv 2106.09685); A, B float32, B = 0 at first."""
    def __init__(self, base, rank, alpha):
        super().__init__()
        most = min(base.in_features, base.out_features)
        if type(rank) is not int or not 1 <= rank <= most or not 0 < alpha < math.inf:
            raise ValueError(f"rank {rank!r} or alpha {alpha!r} does not fit {base}.")
        A = base.weight.new_empty(rank, base.in_features, dtype=torch.float32)
        self.base_layer = base
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B = nn.Parameter(A.new_zeros(base.out_features, rank))

    def forward(self, x):  # (..., in)
        y = self.base_layer(x)  # (..., out)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (..., rank)
        return y + (low @ self.lora_B.t().contiguous()).to(y.dtype)  # contiguous: faster backward

def lora_layers(model):
    """{module name: LoRALinear} in module order; a class of before a reload counts, too."""
    return {name: m for name, m in model.named_modules() if str(LoRALinear) in str(type(m).mro())}

def lora_parameters(model):
    """[A, B, A, B, ...] in module order: what the optimizer trains."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]

def inject_lora(model, targets, rank=8, alpha=16):
    """Puts a LoRALinear in the place of each nn.Linear that `targets` name, whole or from a dot on
    ("mlp.gate_proj"), and freezes all else. Returns their names. ValueError if that cannot be."""
    if lora_layers(model):
        raise ValueError("This model carries LoRA already: merge_lora(model) first.")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    matched = [[name for name in linears if f".{name}".endswith(f".{t}")] for t in targets]
    if not all(matched) or not matched:
        raise ValueError(f"Not each of {targets} matches a linear layer; there are "
                         f"{sorted({name.split('.')[-1] for name in linears})}.")
    layers = {name: LoRALinear(linear, rank, alpha) for name, linear in linears.items()
              if name in sum(matched, [])}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)

@torch.no_grad()
def merge_lora(model):
    """Puts each linear back, with W + (alpha / rank) B A. Returns their names, or a ValueError."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("This model carries no LoRA, or it is merged already.")
    for name, layer in layers.items():
        W = layer.base_layer.weight  # (out, in)
        merged = widen(W) + layer.scaling * (widen(layer.lora_B) @ widen(layer.lora_A))
        layer.base_layer.weight = nn.Parameter(merged.to(W.dtype), False)  # W may be tied
        model.set_submodule(name, layer.base_layer)
    return list(layers)

def write_files(directory, files):
    """Writes {name: bytes}; whatever happens, a file is the old one or the new."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.tmp").write_bytes(content)
    for name in files:
        (directory / f"{name}.tmp").replace(directory / name)

def read_folder(directory, prefix=""):
    """(its config.json, its model.safetensors) as dicts, or a ValueError."""
    try:
        config = json.loads((Path(directory) / f"{prefix}config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(Path(directory) / f"{prefix}model.safetensors")
        return dict(config), {k: t for k, t in tensors.items() if t.isfinite().all()}
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as e:
        raise ValueError(f"{directory} cannot be read: {e}") from None

def adapter_tensors(model):
    """{PEFT's name: A (rank, in) or B (out, rank)}."""
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach()
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}

def save_adapter(model, directory, base_model=None):
    """Writes PEFT's files; base_model: name or path. ValueError if they lack some that trains."""
    layers = {name: m for name, m in lora_layers(model).items() if str(type(m)) == str(LoRALinear)}
    sizes = {(layer.rank, layer.alpha) for layer in layers.values()}
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    if len(sizes) != 1 or trained - layers.keys():
        raise ValueError(f"An adapter is plain LoRA of one rank and alpha: {sizes}, {trained}.")
    rank, alpha = sizes.pop()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
              "target_modules": list(layers), "bias": "none",
              "base_model_name_or_path": base_model and str(base_model), "inference_mode": True}
    tensors = safetensors.torch.save(adapter_tensors(model), {"format": "pt"})
    write_files(directory, {"adapter_config.json": json.dumps(config, indent=2).encode(),
                            "adapter_model.safetensors": tensors})

def load_adapter(model, directory):
    """Injects what save_adapter or PEFT wrote. Returns its names. A ValueError leaves no LoRA."""
    config, tensors = read_folder(directory, "adapter_")
    odd = [key for key in ("use_rslora", "alpha_pattern") if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        odd.append("init_lora_weights")  # such as PiSSA, which changes the base
    targets = config.get("target_modules")
    if odd or config.get("peft_type") != "LORA" or not isinstance(targets, list):
        raise ValueError(f"{directory} holds no plain LoRA: see {odd or 'adapter_config.json'}.")
    names = inject_lora(model, targets, config.get("r"), config.get("lora_alpha") or 8)
    parts = adapter_tensors(model)
    wrong = {(k, t.shape) for k, t in parts.items()} ^ {(k, t.shape) for k, t in tensors.items()}
    if wrong:
        merge_lora(model)  # B is 0: this takes it off
        raise ValueError(f"{directory} is not complete or does not fit: see {sorted(wrong)[:2]}.")
    for key, t in parts.items():
        t.copy_(tensors[key])
    return names

# ---- 4 a Llama, with Hugging Face's names
@dataclass
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # None: num_attention_heads
    head_dim: int = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

def rotary_tables(config, start, end, device):
    """cos and sin of each position's rotation angles, (T, head_dim) each, float32."""
    position = torch.arange(start, end, device=device).float()
    power = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angle = torch.outer(position, config.rope_theta ** -power).repeat(1, 2)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, T, head_dim); i is paired with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
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
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.act_fn = nn.SiLU()
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
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
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
        """tokens (B, T) -> (logits (B, T, vocab), None); with shifted targets (B, T), -100: none,
        (logits (N, vocab) of these, their mean cross-entropy). cache: one [] a layer, at first."""
        start = cache[0][0].size(2) if cache and cache[0] else 0
        end = start + tokens.size(1)
        if end > self.config.max_position_embeddings or 0 < start < end - 1:
            raise ValueError(f"{end} tokens exceed the context, or 2 a filled cache.")
        x = self.model.embed_tokens(tokens)  # (B, T, hidden)
        cos, sin = rotary_tables(self.config, start, end, tokens.device)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache and cache[i])
        x = self.model.norm(x)
        if targets is None:
            return self.lm_head(x), None
        logits = self.lm_head(x[targets != -100])  # (N, vocab)
        return logits, F.cross_entropy(logits.float(), targets[targets != -100])

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, stop):
        """Greedy: tokens (B, T), no padding -> (B, T + n). After `stop` a row means nothing."""
        cache = [[] for _ in self.model.layers]
        new = tokens
        for n in range(1, 1 + max_new_tokens):
            new = self(new, cache=cache)[0][:, -1:].argmax(-1)  # (B, 1)
            tokens = torch.cat((tokens, new), dim=1)
            if (tokens[:, -n:] == stop).any(dim=1).all():
                break
        return tokens

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors as transformers does. ValueError under LoRA."""
        if lora_layers(self):
            raise ValueError("This model carries LoRA: merge_lora(model) first, or save_adapter.")
        weights = dict(self.named_parameters())  # a tied one once
        saved = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                 **asdict(self.config), "tie_word_embeddings": "lm_head.weight" not in weights,
                 "torch_dtype": str(self.lm_head.weight.dtype).removeprefix("torch.")}
        tensors = safetensors.torch.save(weights, {"format": "pt"})
        write_files(directory, {"config.json": json.dumps(saved, indent=2).encode(),
                                "model.safetensors": tensors})

    @classmethod
    def from_pretrained(cls, directory):
        """Reads config.json and model.safetensors. ValueError if they make no such Llama."""
        given, weights = read_folder(directory)
        given |= given.get("rope_parameters") or given.get("rope_scaling") or {}
        own = {"model_type": "llama", "hidden_act": "silu", "rope_type": "default", "factor": None}
        odd = {key: given[key] for key in own if given.get(key) not in (own[key], None)}
        if odd:
            raise ValueError(f"{directory} has {odd}, which this Llama cannot honour.")
        if given.get("tie_word_embeddings"):
            weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
        known = {f.name: given[f.name] for f in fields(LlamaConfig) if f.name in given}
        try:
            model = cls(LlamaConfig(**known))
            model.load_state_dict(weights)
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"{directory}: config.json and weights make no Llama: {e}") from None
        return model
