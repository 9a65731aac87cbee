"""Three questions about a model: which of its FFNs are steered, which rows of which B make the gate
z, and where z can be seen."""
import inspect
import re
import warnings
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora import State, value_and_slope
from nalora_hf.lora import active_adapters, lora_pairs, usable_parameters
from nalora_hf.modules import match_names, unwrapped_modules
from nalora_hf.watch import Group, Hook

GATES = ("gate_proj", "gate_up_proj")  # names of the linear layer in front of the activation

def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}

class FFN:
    """What is known of a steered FFN: nalora.SteeredFFN's fields, for any layout."""
    group_class = Group

    def __init__(self, name, module, gate, phi, owns_phi, layers=None):
        self.name = name
        self.module = module
        self.gate = gate  # the layer in front of the activation
        self.phi = phi
        self.act = phi if owns_phi else gate  # phi's input is z, or else the gate's output
        self.layers = layers or [m for n, m in unwrapped_modules(module).items()
                                 if n and "." not in n]
        self.parameters = usable_parameters(name, self.layers)
        self.B_gates = [B for _, B in lora_pairs(gate)]  # of several active adapters, several
        self.B_gate = self.B_gates[0]  # (rows, rank)
        self.adapter = next(iter(active_adapters(gate)), None)  # PEFT's name of B_gate's
        self.width = gate_width(module, gate)  # F
        self.shape = (self.width,)  # of its importance
        self.fused = len(self.B_gate) > self.width  # then B's other rows make up
        self.rows = None if self.fused else torch.arange(self.width, device=self.B_gate.device)
        self.check_rows = self.fused  # look at the first pass whether z is the gate's output
        self.output = None  # the gate's, until then
        self.ignores_mask = False
        self.group = None  # and the place in it: steer.py's
        self.index = None
        self.forget()

    def attach(self, nalora):
        """Hooks that show where z is; the gate's output too, if it may make more than z."""
        handles = []
        if self.act is self.gate or self.check_rows:
            hook = Hook(nalora, self, "see" if self.act is self.gate else "note_output")
            handles.append(self.gate.register_forward_hook(hook, with_kwargs=True))
        if self.act is not self.gate:
            hook = Hook(nalora, self)
            handles.append(self.act.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def forget(self):
        """Begins a step."""
        self.counted = False  # a pass counted in forward, so that backward's is the same again
        self.forget_masks()

    def forget_masks(self):
        self.masks = []  # of passes without gradients: a checkpoint may compute them again
        self.again = False  # whether it has begun to
        self.masks_set = False  # whether masks are set anew then

    @property
    def state(self):
        return State(*(t[self.index].clone() for t in self.group.state))

    def is_active(self):
        """Whether the adapter that is steered computes. Asked by name: within a pass, FSDP2 has
        other parameters in their place."""
        if self.adapter is None:
            return True
        return self.adapter in self.gate.active_adapters and not self.gate.disable_adapters

    def kind(self):
        """Equal for FFNs that one call may observe."""
        return kind_of(self.phi), self.shape, self.B_gate.dtype, self.B_gate.device

    def tokens(self, z):
        """The shape of the tokens that gates z (..., F) are of."""
        return z.shape[:-1]

    def fitting(self, mask, z):
        """The token mask if it is of gates z (..., F), or None."""
        if mask is None or self.ignores_mask:
            return None
        tokens = self.tokens(z)
        if tokens in (mask.shape, (mask.numel(),)):  # some models flatten (batch, seq)
            return mask
        if not self.several_towers:  # else it may be another's
            raise ValueError(f"token_mask is {tuple(mask.shape)}, but the gates see tokens "
                             f"{tuple(tokens)}: set it before each pass, or to None.")

    def sample(self, z, mask, every):
        """(z (T, F), weight (T,)) of the tokens that `every` names."""
        if z.size(-1) != self.width:
            raise ValueError(f"In {self.name} the activation receives {z.size(-1)} channels, and "
                             f"the gate gives {self.width}: name the layer before it with gate=...")
        z = z.detach().flatten(0, -2)[every]
        return z, z.new_ones(len(z)) if mask is None else mask.flatten()[every].ne(0)

    def factor(self, p, rows, scales):
        """What the step of p is multiplied by: (rows, 1) for a B of the gate, else 0-dim."""
        if not any(p is B for B in self.B_gates):
            return scales[self.index]
        if not self.fused:
            return rows[self.index]
        factor = scales[self.index].repeat(len(p), 1)  # for rows that make no gate
        return factor if self.rows is None else factor.index_copy(0, self.rows, rows[self.index])

    def note_mask(self, mask):
        """Of a pass without gradients."""
        if self.again:
            self.forget_masks()
        self.masks.append(mask)

    def mask_of_recomputed(self, mask, z):
        """The mask of a pass that runs within backward, by those of passes without gradients: a
        checkpoint computes again the one pass that was, others set their masks anew."""
        self.again = True
        tokens = self.tokens(z).numel()
        masks = [other for other in self.masks if other is None or other.numel() == tokens]
        if all(other is masks[0] for other in masks):
            return masks[0] if masks else mask
        self.masks_set |= mask is not masks[-1]
        if not self.masks_set:
            warnings.warn("Several passes with their token masks came before one backward, under "
                          "reentrant checkpointing, which tells them not apart: use_reentrant="
                          "False does.")
        return mask

    def find_rows(self, z):
        """Which rows of B make z: those whose outputs are like it. The first pass tells."""
        if not z.numel():
            return
        output = z[..., :0] if self.output is None else self.output  # z came before it, or without
        output = output.flatten(0, -2)[:256].float()  # (T, rows)
        z = z.detach().flatten(0, -2)[:256].float()  # (T, F)
        alike = {}
        if z.size(-1) == self.width and len(z) == len(output):
            for rows in row_layouts(output.size(-1), self.width, z.device):
                both = torch.stack([output[:, rows].flatten(), z.flatten()])
                alike[rows] = torch.corrcoef(both)[0, 1].abs().nan_to_num().item()
        order = sorted(alike, key=alike.get, reverse=True)
        best, second = [alike[rows] for rows in order[:2]] + [0] * (2 - len(order))
        if best < 0.3 or second > 0.9 * best:
            raise ValueError(f"In {self.name} the activation does not see the output of the layer "
                             "that `gate` names: name the one before it.")
        self.rows = order[0]
        self.check_rows = False
        self.output = None

def row_layouts(count, width, device):
    """How a layer of so many rows may hold the gate's: all, a half, or every other one."""
    layouts = {1: [(0, 1)], 2: [(0, 1), (width, 1), (0, 2), (1, 2)]}  # (first row, stride)
    return [first + stride * torch.arange(width, device=device)
            for first, stride in layouts.get(count / width, [])]

def find_ffns(modules, gates, act, experts, why):
    """([FFN] whose gate carries LoRA, with `experts`, a sentence on what is steered). ValueError if
    none can be. why: other experts are not."""
    config = getattr(modules[""], "config", None)
    matches = {name: modules[name] for name in match_names(modules, gates)}
    given = activation_named(act)
    found = []
    for path, layer in matches.items():
        name, _, leaf = path.rpartition(".")
        theirs = [g for g in GATES if hasattr(modules[name], g)]
        if theirs and leaf not in theirs:
            raise ValueError(f"The gate of {name} is {' or '.join(theirs)}.")
        own = activation(modules[name], config)
        phi = given if own is None else own
        if lora_pairs(layer) and phi is not None:
            found.append((name, modules[name], layer, phi))
    if not found and not experts:
        refuse_all(modules, gates[0], matches, why)
    shared = Counter(id(phi) for *_, phi in found)
    ffns = [FFN(name, module, layer, phi, shared[id(phi)] == 1 and calls(module, phi))
            for name, module, layer, phi in found]
    for ffn in ffns:
        ffn.check_rows |= not {*gates} <= {*GATES}
    ffns += experts
    for ffn in ffns:
        check(ffn)
    towers = {re.split(r"\.\d", f".{ffn.name}")[0] for ffn in ffns}  # before the number
    twofold = getattr(config, "is_encoder_decoder", False)
    for ffn in ffns:  # a token mask is of one tower's tokens; of two halves, the encoder's
        ffn.several_towers = len(towers) > 1
        ffn.ignores_mask = twofold and ".decoder." in f".{ffn.name}"
    plain = Counter(name.split(".")[-1] for name, m in modules.items()
                    if lora_pairs(m) and not any(m in its.layers for its in ffns))
    rest = ", ".join(f"{count} {name}" for name, count in plain.items()) or "nothing else"
    steered = [f"{len(found)} of {len(matches)} FFNs"] if matches or not experts else []
    if experts:
        steered.append(f"{sum(its.count for its in experts)} experts in {len(experts)} layers")
    elif not why and any(hasattr(m, "is_concatenated") for m in modules.values()):
        why = "The experts carry no LoRA."
    said = f"NALoRA steers {' and '.join(steered)}; plain LoRA on {rest}. {why}".strip()
    return ffns, said

def check(ffn):
    """ValueError if it cannot be steered."""
    if ffn.fused and ffn.act is ffn.gate:
        raise ValueError(f"{ffn.name} computes gate and up in one layer, and its activation is no "
                         "module of its own: which rows are the gate's cannot be seen.")
    if value_and_slope(ffn.phi, torch.zeros(1, ffn.width, device=ffn.B_gate.device))[0].any():
        raise ValueError(f"The activation of {ffn.name} is not 0 at 0, so it is not self-gated.")

def refuse_all(modules, gate, matches, why):
    """ValueError: why no FFN can be steered, and what to do."""
    lora = [name for name, m in modules.items() if lora_pairs(m)]
    dense = [name for name, m in modules.items() if activation(m) is not None
             and any(features(part, "out") for part in m.children())
             and not re.search("router|attn|mixer", name)]
    experts = [(name, m) for name, m in modules.items() if "Experts" in type(m).__name__]
    if why and not dense:
        raise ValueError(why)
    if experts and not dense:
        path, m = experts[0]
        if not hasattr(m, "is_concatenated"):
            raise ValueError(f"{path} is a {type(m).__name__}, which computes its experts in a "
                             "form of its own, and there is no other FFN here.")
        name = ".".join(path.replace(".base_layer", "").split(".")[-2:])
        if any(getattr(modules[path], "parameter_name", "") == "gate_up_proj" for path in lora):
            raise ValueError(f"The gates here are in {name}.gate_up_proj: name that, or none.")
        raise ValueError(f"The gates of this model are in {name}.gate_up_proj, which carries no "
                         "LoRA: PEFT puts it there with target_parameters=["
                         f"'{name}.gate_up_proj', '{name}.down_proj'] in its LoraConfig.")
    for name in lora:
        if name in matches:
            raise ValueError(f"{name.rpartition('.')[0]} has no activation (act_fn, act): say "
                             "which one it is with act=...")
    if any(hasattr(m, "base_layer") for m in matches.values()):
        raise ValueError(f"The adapter on {gate} has no pair of A and B that could be steered: "
                         "use LoRA.")
    if why:
        raise ValueError(f"{why} The dense FFNs carry no LoRA: inject_lora puts it there, in a "
                         "model without PEFT's.")
    if not lora:
        raise ValueError(f"No gated FFN here has LoRA on its {gate}: inject it first.")
    found = ", ".join(sorted({name.split(".")[-1] for name in lora}))
    raise ValueError(f"No gated FFN here has LoRA on its {gate}. It is on {found}: name the one in "
                     "front of the activation with gate=..., or put LoRA on the gate.")

def gate_width(ffn, gate):
    """F: the gate's rows, or half of them where the FFN's last layer takes half as many."""
    rows = len(lora_pairs(gate)[0][1])
    takes = [features(m, "in") for m in ffn.children() if m is not gate]
    return rows // 2 if rows not in takes and rows / 2 in takes else rows

def features(layer, side):
    """How many features a linear layer takes (side "in") or gives ("out"), with LoRA or without;
    0 if it does not say."""
    name = f"{side}_features"
    return getattr(layer, name, getattr(getattr(layer, "base_layer", None), name, 0))

NAMES = ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation")

def activation(ffn, config=None):
    """An FFN's own activation; the config's, where a fused kernel took its place; or None."""
    for name in NAMES:
        if callable(getattr(ffn, name, None)):
            return getattr(ffn, name)
    if hasattr(ffn, "down_proj"):
        return ACTIVATIONS.get(getattr(getattr(ffn, "config", config), "hidden_act", None))
    return None

def activation_named(act):
    """The function of a name as configs write it, such as "silu"; else act itself."""
    if isinstance(act, str) and act not in ACTIVATIONS or not (
            act is None or isinstance(act, str) or callable(act)):
        raise ValueError(f"act={act!r} is no activation: give a function, a module or one of "
                         f"{', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS.get(act) if isinstance(act, str) else act

def calls(ffn, phi):
    """Whether phi is a module of this FFN's own that its forward pass calls. A fused kernel that
    was put into one FFN (Liger's) leaves the module in place and does not name it."""
    own = [name for name, m in ffn.named_children() if m is phi]
    patch = inspect.unwrap(vars(ffn).get("forward", phi.forward if own else None))
    code = getattr(getattr(patch, "__func__", patch), "__code__", None)
    return bool(own) and ("forward" not in vars(ffn) or code is None or own[0] in code.co_names)

def kind_of(act):
    """Equal if one call may evaluate both: one object, or modules alike in class and attributes."""
    if not isinstance(act, nn.Module):
        return id(act)
    own = {key: value for key, value in vars(act).items() if "_hooks" not in key}
    return type(act), *((key, value if value.__hash__ else id(value))  # no two tensors are equal
                        for key, value in own.items() if value.__hash__ or value)
