"""Adapter files as PEFT writes them, read strictly and written whole."""
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

import nalora
from nalora_hf.files import read_json, read_tensors, write_files
from nalora_hf.lora import LoRALinear as LoRALinear
from nalora_hf.lora import inject_lora as inject_lora
from nalora_hf.lora import merge_lora as merge_lora
from nalora_hf.lora import (base_linears, has_lora, is_plain, lora_layers, lora_parameters,
                            new_layers, put_lora, stored_weight)
from nalora_hf.modules import VERSION, is_ours, match_names, shapes, unwrapped_modules

def save_adapter(model: nn.Module, directory: str | Path, base_model: str | Path | None = None,
                 settings: object = None, nalora: nalora.NALoRA | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, and nalora.json (how
    it was trained, and norms of the base). base_model: name or path of the base, for PEFT;
    settings: any JSON value, for the record; nalora: the NALoRA that steered, if one did.
    Under FSDP2 every rank has to call it. ValueError if the files would not hold all that trains,
    or it is no plain LoRA of one size."""
    layers = lora_layers(model)
    plain = all((type(m).__module__, type(m).__name__) in PLAIN_CLASSES for m in layers.values())
    sizes = {(m.rank, m.alpha, m.scaling) for m in layers.values()}
    rank, alpha, _ = next(iter(sizes))
    if not plain or sizes != {(rank, alpha, alpha / rank)}:
        raise ValueError("An adapter holds plain LoRA of one size: these differ in rank or alpha, "
                         "are more than LoRA or scaled otherwise.")
    held = {id(p) for p in lora_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if others:
        raise ValueError(f"{', '.join(others[:3])} would not be in the adapter, yet trains: freeze "
                         "it, or merge_lora(model) and save the model.")
    tensors = {key: t.full_tensor() if hasattr(t, "full_tensor") else t
               for key, t in adapter_tensors(layers).items()}
    if any(t.is_meta for t in tensors.values()):
        raise ValueError("The LoRA is offloaded, its data is not here: take accelerate's hooks off "
                         "first (accelerate.hooks.remove_hook_from_submodules(model)).")
    whole = unwrapped_modules(model)[""]
    writes = is_ours(whole, "Llama") or hasattr(whole, "prepare_inputs_for_generation")
    encodes = getattr(getattr(whole, "config", None), "is_encoder_decoder", False)
    task = ("SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM") if writes else None
    targets = sorted({name.split(".")[-1] for name in layers})  # last parts, if they name no other
    if match_names(base_linears(model), targets) != list(layers):
        targets = list(layers)
    if not peft_reads(whole, targets):
        raise ValueError("PEFT reads these names as other parts of this model, its fused experts: "
                         "merge_lora(model) and save the model.")
    config = {"peft_type": "LORA", "task_type": task, "r": rank, "lora_alpha": alpha,
              "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
              "base_model_name_or_path": base_model and str(base_model), "inference_mode": True}
    record = method_record(nalora) | {"settings": settings, "base": fingerprint(layers)}
    write_files(directory, {"adapter_model.safetensors": tensors, "adapter_config.json": config,
                            "nalora.json": record})

PLAIN_CLASSES = [("nalora", "LoRALinear"), ("nalora_hf.lora", "LoRALinear")]  # reloaded, too

def method_record(nalora=None) -> dict:
    """{"method", "config", "version"}: what nalora.json says of a checkpoint or an adapter.
    nalora: the NALoRA that steered; without it the method is LoRA."""
    if nalora is None:
        return {"method": "lora", "config": None, "version": VERSION}
    config = getattr(nalora, "config", None)
    if type(config).__name__ != "NALoRAConfig":
        raise ValueError("nalora is the NALoRA that steered the model, and no "
                         f"{type(nalora).__name__}.")
    return {"method": "nalora", "config": asdict(config), "version": VERSION}

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

def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Loads an adapter that save_adapter or PEFT wrote, injecting LoRA where there is none yet.
    Returns the module names. ValueError, with nothing changed, if it is broken, incomplete, more
    than plain LoRA or another model's (a base that was fine-tuned a little is not noticed)."""
    linears = base_linears(model)
    directory = adapter_folder(directory)
    config = read_json(directory / "adapter_config.json")
    rank, alpha = plain_sizes(config)
    stored = read_tensors(directory / "adapter_model.safetensors")
    tensors = {PREFIX + key.removeprefix(PREFIX): t for key, t in stored.items()}
    names = match_names(linears, config.get("target_modules"))
    if config.get("layers_to_transform") or config.get("exclude_modules"):  # not all of them
        names = [name for name in names if f"{PREFIX}{name}.lora_A.weight" in tensors]
    injected = has_lora(model)
    layers = lora_layers(model) if injected else new_layers(model, names, rank, alpha)
    alike = all((m.rank, m.alpha) == (rank, alpha) for m in layers.values())
    wrong = sorted(shapes(tensors).items() ^ shapes(adapter_tensors(layers)).items())
    if wrong or not alike or not tensors or len(tensors) < len(stored):
        raise ValueError(f"The adapter in {directory} (rank {rank}, alpha {alpha}) is not complete,"
                         " does not fit this model (other module names or shapes) or differs from "
                         f"the LoRA already in the model: see {wrong[:2]}.")
    record = directory / "nalora.json"
    norms = read_json(record).get("base") if record.exists() else {}
    here = fingerprint(layers)
    same = isinstance(norms, dict) and all(
        type(norm) is float and math.isclose(norm, here.get(name, norm), rel_tol=0.01)
        for name, norm in norms.items())
    if not same:
        raise ValueError(f"The adapter in {directory} was trained on another base model: the norms "
                         "of its weights in nalora.json are not this model's.")
    if any(t.is_meta or hasattr(t, "placements") for t in adapter_tensors(layers).values()):
        raise ValueError("The LoRA in this model is offloaded or sharded: load the adapter first.")
    if not injected:
        put_lora(model, layers)
    for key, t in adapter_tensors(layers).items():
        t.copy_(tensors[key])
    return list(layers)

def adapter_folder(directory):
    """The folder as a Path. ValueError if there is no adapter in it."""
    folder = Path(directory)
    if not folder.exists():
        raise ValueError(f"There is no folder {folder}. If that is a name on the hub, download it "
                         "first: huggingface_hub.snapshot_download returns the folder.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that holds adapter_config.json.")
    there = sorted(path.name for path in folder.iterdir())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if name not in there:
            raise ValueError(f"{folder / name} cannot be read: the folder holds "
                             f"{', '.join(there) or 'nothing'}.")
    return folder

PREFIX = "base_model.model."  # PEFT's

def adapter_tensors(layers: dict) -> dict:
    """{name in an adapter: A (rank, in) or B (out, rank)} of {name: LoRALinear}."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
            for name, layer in layers.items() for part in ("lora_A", "lora_B")}

def fingerprint(layers: dict) -> dict:
    """{name: norm of the base weight's first row}: within 1 % for the same base in any dtype.
    A weight that is quantized, parametrized or not here has none."""
    linears = {name: unwrapped_modules(layer.base_layer)[""] for name, layer in layers.items()}
    weights = {name: vars(linear).get("weight", stored_weight(linear))
               for name, linear in linears.items()}
    return {name: weight[0].detach().float().norm().item()
            for name, weight in weights.items() if weight is not None and is_plain(weight)}

# What an adapter_config.json of plain LoRA may hold: fields with any value, or one of these values.
IGNORED_FIELDS = """peft_type r lora_alpha target_modules exclude_modules layers_to_transform
                    layers_pattern task_type base_model_name_or_path revision inference_mode
                    peft_version auto_mapping lora_dropout megatron_core runtime_config
                    qalora_group_size""".split()
ALLOWED_VALUES = {"bias": ["none"],
                  "init_lora_weights": [True, "gaussian", "eva", "orthogonal"]}  # same base

def plain_sizes(config):
    """(rank, alpha) of an adapter_config.json. ValueError if it is not surely plain LoRA."""
    more = [key for key, value in config.items() if value and key not in IGNORED_FIELDS
            and value not in ALLOWED_VALUES.get(key, [])]
    if more or config.get("peft_type") != "LORA":
        raise ValueError("adapter_config.json is of no plain LoRA adapter: see "
                         f"{', '.join(more) or 'peft_type'}.")
    return config.get("r"), config.get("lora_alpha")

# -- a whole model ---------------------------------------------------------------------------------

class Llama(nalora.Llama):
    """nalora.Llama, saved out of wrappers and in another dtype, too, and more strictly."""

    def save_pretrained(self, directory, dtype=None):
        """Writes config.json and model.safetensors, in `dtype` if given, as transformers reads
        them, under the model's own names. ValueError under LoRA."""
        if has_lora(self):
            raise ValueError("This model carries LoRA: merge_lora(model), or save_adapter.")
        weights = {f"{name}.{key}": p.detach().to(dtype or p.dtype).contiguous()
                   for name, m in unwrapped_modules(self).items()
                   for key, p in m.named_parameters(recurse=False)}
        with torch.device("meta"):
            plain = type(self)(self.config).state_dict()
        if shapes(weights) != shapes(plain) or any(t.is_meta for t in weights.values()):
            raise ValueError("This model's weights are offloaded, or other than its class has them "
                             "(pruned, parametrized): make them permanent first.")
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied:
            del weights["lm_head.weight"]
        stored = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                  **asdict(self.config), "hidden_act": "silu", "tie_word_embeddings": tied,
                  "torch_dtype": stored}
        write_files(directory, {"model.safetensors": weights, "config.json": config})
