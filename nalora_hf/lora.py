"""LoRA in a model, under the model's own names, and out of it into the weights."""
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import nalora
from nalora_hf.modules import is_ours, match_names, replace_modules, unwrapped_modules

class LoRALinear(nalora.LoRALinear):
    """One that stands in for its nn.Linear in every way: it is in its mode, and has a weight, bias
    and sizes for code that asks for them, as torch's own encoder does. lora_A (rank, in) and
    lora_B (out, rank) are float32. ValueError on a rank or alpha that does not fit."""
    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        most = min(base.in_features, base.out_features)
        if type(rank) is not int or not 1 <= rank <= most:
            raise ValueError(f"rank is {rank!r}, but {base} takes a whole number, 1 to {most}.")
        if type(alpha) not in (int, float) or not 0 < alpha < 1e12:
            raise ValueError(f"alpha is {alpha!r}, which makes no plain LoRA: give a number above "
                             "zero.")
        # Not the base itself: a quantized weight need not know how to make another tensor.
        super().__init__(SimpleNamespace(in_features=base.in_features,
                                         out_features=base.out_features,
                                         weight=torch.empty(0, device=base.weight.device)),
                         rank, alpha)
        self.base_layer = base
        self.training = base.training
        self.in_features = base.in_features
        self.out_features = base.out_features

    @property
    def weight(self) -> Tensor:
        return merged(self)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

def merged(layer: nalora.LoRALinear) -> Tensor:
    """W + (alpha / rank) B A, (out, in), rounded once to W's dtype."""
    W = layer.base_layer.weight
    update = layer.scaling * (nalora.widen(layer.lora_B) @ nalora.widen(layer.lora_A))
    return (nalora.widen(W) + update).to(W.dtype)

def inject_lora(model: nn.Module, targets: str | Iterable[str], rank: int = 8,
                alpha: float = 16) -> list[str]:
    """Puts a LoRALinear in the place of every nn.Linear that `targets` name, freezes all else and
    returns their module names. targets: module names, whole or from a dot on ("mlp.gate_proj").
    ValueError, with nothing changed, if one matches nothing, its weight is not here (meta device,
    offloaded) or the model has LoRA."""
    linears = base_linears(model)
    if has_lora(model):
        raise ValueError("This model carries LoRA already: merge_lora(model) first.")
    if not targets or not isinstance(targets, Iterable):
        raise ValueError(f"No targets are given ({targets!r}): name at least one linear layer.")
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not match_names(linears, [target]):
            there = ", ".join(sorted({name.split(".")[-1] for name in linears}))
            raise ValueError(f"The target {target!r} matches no linear layer; there are {there}.")
    layers = new_layers(model, match_names(linears, targets), rank, alpha)
    put_lora(model, layers)
    return list(layers)

def new_layers(model, names, rank, alpha):
    """{name: LoRALinear}, not yet in the model. ValueError if that cannot be trained."""
    if has_peft(model):
        raise ValueError("This model carries an adapter of PEFT's: merge_and_unload() it first.")
    linears = base_linears(model)
    for name in names:
        if linears[name].weight.is_meta:
            raise ValueError(f"{name} has no data, since it is on the meta device or offloaded: "
                             "load the whole model into memory (no device_map), then inject LoRA.")
        if hasattr(linears[name].weight, "placements"):
            raise ValueError(f"{name} is sharded already: inject LoRA, then shard the model.")
    return {name: LoRALinear(linears[name], rank, alpha) for name in names}

def put_lora(model, layers):
    """Puts {name: LoRALinear} in the places of their base layers and freezes all else."""
    replace_modules(model, {layer.base_layer: layer for layer in layers.values()})
    model.requires_grad_(False)
    for p in lora_parameters(model):
        p.requires_grad_()

def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """{name without LoRA: nn.Linear}."""
    return {name.removesuffix(".base_layer"): m for name, m in unwrapped_modules(model).items()
            if isinstance(m, nn.Linear)}

def has_lora(model: nn.Module) -> bool:
    return any(is_ours(m, "LoRALinear") for m in model.modules())

def has_peft(model: nn.Module) -> bool:
    return any("base_layer" in m._modules and not is_ours(m, "LoRALinear")
               for m in model.modules())

def lora_pairs(layer):
    """[(A (rank, in), B (out, rank))] of a LoRALinear or a PEFT layer's active adapters, or []."""
    pair = [getattr(layer, part, None) for part in ("lora_A", "lora_B")]
    if any(part is None for part in pair):
        return []
    if isinstance(pair[0], nn.Parameter):
        return [tuple(pair)]
    pairs = [[part[name] for part in pair] for name in active_adapters(layer)]
    return [tuple(getattr(part, "weight", part) for part in pair) for pair in pairs]

def usable_parameters(name, layers):
    """[A, B, A, B, ...] of an FFN's layers. ValueError if they are not here, as matrices."""
    parameters = [p for layer in layers for pair in lora_pairs(layer) for p in pair]
    for p in parameters:
        if p.is_meta:
            raise ValueError(f"The LoRA of {name} stands on the meta device, without data: load "
                             "the base onto a device first (not offloaded).")
        within_rows = any(s.is_shard(1) for s in getattr(p, "placements", ()))
        if within_rows or p.dim() != 2 or not p.numel():
            raise ValueError(f"The LoRA parameters of {name} are flattened or sharded within rows "
                             "(FSDP1, ZeRO-3): use FSDP2's fully_shard.")
    return parameters

def active_adapters(layer):
    """Names of a PEFT layer's adapters that compute and have an A and a B; of ours, none."""
    return [name for name in getattr(layer, "active_adapters", []) if name in layer.lora_A]

def lora_layers(model: nn.Module) -> dict[str, nalora.LoRALinear]:
    """{module name: LoRALinear, this one or nalora's} in module order. ValueError if there is none,
    or if an A or B is computed from others (pruned, parametrized, flattened by FSDP)."""
    layers = {n: m for n, m in unwrapped_modules(model).items() if is_ours(m, "LoRALinear")}
    if not layers:
        raise ValueError("This model's adapter is PEFT's: use its own save_pretrained and "
                         "merge_and_unload." if has_peft(model) else
                         "This model carries no LoRA (never injected, or merged already).")
    for name, layer in layers.items():
        if not {"lora_A", "lora_B"} <= layer._parameters.keys():
            raise ValueError(f"lora_A or lora_B of {name} is computed (pruned, parametrized or "
                             "flattened by FSDP), so it is no plain LoRA: make it permanent first.")
    return layers

def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """[A, B, A, B, ...] in module order: what the optimizer trains. ValueError as lora_layers."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]

@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """W <- W + (alpha / rank) B A, in float32 and rounded once to W's dtype; every nn.Linear is
    back in its place, frozen. Returns their names. Takes the memory of these weights once more.
    ValueError, with nothing changed, if there is no LoRA, or a weight is computed before each pass
    (pruned, parametrized), quantized, tied or on the meta device, or memory runs out."""
    layers = lora_layers(model)
    linears = {name: unwrapped_modules(layer.base_layer)[""] for name, layer in layers.items()}
    owners = Counter(place(t) for m in model.modules()
                     for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    before = {}
    try:
        for name, linear in linears.items():
            check_mergeable(name, linear, owners)
        new = {name: merged(layer) for name, layer in layers.items()}
        for name, linear in linears.items():
            before[name] = linear.weight.clone()
            linear.weight.copy_(new.pop(name))
        replace_modules(model, {layer: layer.base_layer for layer in layers.values()})
    except BaseException as e:  # an interruption, too
        for name, weight in before.items():
            with suppress(RuntimeError):  # one that cannot be written, and so is as it was
                linears[name].weight.copy_(weight)
        if isinstance(e, ValueError) or not isinstance(e, Exception):
            raise
        raise ValueError(f"Nothing is merged: {str(e) or type(e).__name__}") from e
    return list(layers)

# -- which weights can be merged into --------------------------------------------------------------
def check_mergeable(name, linear, owners):
    """ValueError if what is added to the weight would be lost, or change more than this layer."""
    weight = stored_weight(linear)
    if weight is None:
        raise ValueError(f"The weight of {name} is computed before each pass: make it permanent "
                         "first (prune.remove or remove_parametrizations, of its base_layer).")
    if owners[place(weight)] > 1:
        raise ValueError(f"{name} is tied to a layer that would change with it: load the base "
                         "untied to merge.")
    if not is_plain(weight):
        raise ValueError(f"The weight of {name} is quantized or on the meta device (offloaded): "
                         "load the base in floating point, and whole, to merge.")
    own = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    hooks = linear._forward_pre_hooks or linear._forward_hooks
    sharded = hasattr(weight, "placements")  # then a layer alone cannot be tried
    if (own or hooks) and not sharded and not follows_its_weight(linear):
        raise ValueError(f"{name} has a forward or a hook of its own, and does not compute "
                         "x W^T + b: take that off to merge.")

def stored_weight(linear):
    """The weight as it is stored (remove_parametrizations can leave a buffer), or None if another
    is computed from what is stored."""
    return linear._parameters.get("weight", linear._buffers.get("weight"))

def place(t):
    """Equal for tensors that are one, or two that share memory from the start."""
    return t.data_ptr() or id(t)

def is_plain(weight):
    """Whether it is a matrix of plain numbers that can be added to: floats of two bytes or more, no
    quantized or other subclass but FSDP2's, with its data here."""
    return (not weight.is_meta and weight.is_floating_point() and weight.element_size() > 1
            and (type(weight.detach()) is Tensor or hasattr(weight, "placements"))
            and weight.dim() == 2 and weight.numel() > 0)

def follows_its_weight(linear):
    """Whether a pass is x W^T + b with the W that is stored, tried with random numbers in it."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(linear.weight.shape, generator=numbers).to(linear.weight)  # (out, in)
    x = torch.randn(1, 3, linear.in_features, generator=numbers).to(weight)
    wanted = F.linear(x, weight, linear.bias)
    tensors = [*linear.parameters(), *linear.buffers()]  # observers of ranges, too
    before = [t.clone() for t in tensors]
    try:
        linear.weight.copy_(weight)
        return bool((linear(x) - wanted).abs().max() <= 0.01 * wanted.abs().max())
    finally:
        for t, old in zip(tensors, before):
            t.copy_(old)
