"""Which FFNs of a model are steered: their gates, widths, activations and LoRA pairs, under the
model's own names. FFNs of one width stand stacked."""
import math
import re
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora import GateSums, LoRALinear, State, value_and_slope, widen
from nalora_hf.modules import match_names, unwrapped_modules

GATES = ("gate_proj", "gate_up_proj")  # names of the linear layer in front of the activation

def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}  # as configs name them

def refuse(wrong, message):
    if wrong:
        raise ValueError(message)

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
        self.seen = Counter()  # {i: passes since the last step}
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
    modules = unwrapped_modules(model)
    config = getattr(modules[""], "config", None)
    matches = {name: modules[name] for name in match_names(modules, gates)}
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
    takes = [features(m, "in") for m in ffn.children() if m is not gate]
    return rows // 2 if rows not in takes and rows / 2 in takes else rows

def features(layer, side):
    """How many features a linear layer takes (side "in") or gives ("out"), with LoRA or without;
    0 if it does not say."""
    name = f"{side}_features"
    return getattr(layer, name, getattr(getattr(layer, "base_layer", None), name, 0))

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
