"""LoRA in a model, under the model's own names, and PEFT's adapter files, read strictly and
written whole."""
import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn

import nalora
from nalora_hf.modules import match_names as named
from nalora_hf.modules import unwrapped_modules as own_modules

def refuse(wrong, message):
    if wrong:
        raise ValueError(message)

def shapes(tensors):
    return {name: tuple(t.shape) for name, t in tensors.items()}


# -- LoRA in a model, under the model's own names --------------------------------------------------
class LoRALinear(nalora.LoRALinear):
    """One that stands in for its nn.Linear in every way: it is in its mode, and has a weight, bias
    and sizes for code that asks for them, as torch's own encoder does. ValueError on a rank or
    alpha that does not fit."""
    def __init__(self, base, rank, alpha):
        most = min(base.in_features, base.out_features)
        refuse(type(rank) is not int or not 1 <= rank <= most,
               f"rank is {rank}, but {base} takes a whole number from 1 to {most}.")
        refuse(type(alpha) not in (int, float) or not 0 < alpha < 1e12,
               f"alpha is {alpha}, which makes no plain LoRA: give a number above zero.")
        super().__init__(base, rank, alpha)
        self.training = base.training
        self.in_features = base.in_features
        self.out_features = base.out_features

    @property
    def weight(self):
        return merged(self)

    @property
    def bias(self):
        return self.base_layer.bias

def merged(layer):
    """W + (alpha / rank) B A, (out, in), rounded once to W's dtype."""
    W = layer.base_layer.weight
    return (nalora.widen(W) + layer.scaling * (layer.lora_B @ layer.lora_A)).to(W.dtype)

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
    return any(isinstance(m, nalora.LoRALinear) for m in model.modules())

def lora_layers(model):
    """{module name: LoRALinear, this one or nalora's} in module order. ValueError if none."""
    refuse(not has_lora(model), "This model carries no LoRA (never injected, or merged already).")
    return {name: m for name, m in own_modules(model).items() if isinstance(m, nalora.LoRALinear)}

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
        layer.base_layer.weight.copy_(merged(layer))
    return list(layers)

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
    plain = all(type(m) in (LoRALinear, nalora.LoRALinear) for m in layers.values())
    sizes = {(m.rank, m.alpha, m.scaling) for m in layers.values()}
    rank, alpha, _ = next(iter(sizes))
    refuse(not plain or sizes != {(rank, alpha, alpha / rank)}, "An adapter holds plain LoRA of "
           "one size: these differ in rank or alpha, are more than LoRA or scaled otherwise.")
    held = {id(p) for p in lora_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    refuse(others, f"{', '.join(others[:3])} would not be in the adapter, yet trains: freeze it, "
           "or merge_lora(model) and save the model.")
    whole = own_modules(model)[""]
    writes = isinstance(whole, nalora.Llama) or hasattr(whole, "prepare_inputs_for_generation")
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

# -- a whole model ---------------------------------------------------------------------------------

class Llama(nalora.Llama):
    """nalora.Llama, which can also be saved."""

    def save_pretrained(self, directory, dtype=None):
        """Writes config.json and model.safetensors, in `dtype` if given, as transformers reads
        them, under the model's own names. ValueError under LoRA."""
        refuse(has_lora(self), "This model carries LoRA: merge_lora(model), or save_adapter.")
        weights = {f"{name}.{key}": p.detach().to(dtype or p.dtype).contiguous()
                   for name, m in own_modules(self).items()
                   for key, p in m.named_parameters(recurse=False)}
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied:
            del weights["lm_head.weight"]
        stored = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                  **asdict(self.config), "hidden_act": "silu", "tie_word_embeddings": tied,
                  "torch_dtype": stored}
        write_files(directory, {"model.safetensors": weights, "config.json": config})
