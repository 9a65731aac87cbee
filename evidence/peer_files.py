"""What a neighbour has learnt, on disk: in PEFT's files, or in ours where PEFT does not know it."""
import json
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn

import nalora
from evidence.peers import (DoRALinear, PeerLinear, RationalActivation, inject, learnt, unload)
from nalora import LoRALinear, read_folder, write_files

def save_adapter(model, directory, base_model=None):
    """Writes what was learnt, and removes from the folder what an adapter of another kind left
    there. ValueError if there is nothing. rsLoRA, LoRA+ and PiSSA become plain LoRA, by
    nalora.save_adapter (PiSSA at twice the rank, s (B A - B0 A0), since the base is the pretrained
    one; exact in float32); DoRA PEFT's two files; NoRA, NoRA++ and LoRAN, which PEFT does not know,
    peers_config.json and peers_model.safetensors."""
    parts = dict(model.named_modules())
    nora = any(isinstance(m, RationalActivation) for m in parts.values())
    if not nora and not any(isinstance(m, PeerLinear) for m in parts.values()):
        save_plain(model, directory, base_model)
        clear(directory, "peers_")
        return
    ours = learnt(model)
    held = set(ours.values())
    others = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if others:
        raise ValueError(f"{', '.join(others[:3])} would not be in the adapter, yet trains: freeze "
                         "it.")
    loras = {name: m for name, m in parts.items() if isinstance(m, (PeerLinear, LoRALinear))}
    first = next(iter(loras.values()), None)
    tensors = {name: p.detach() for name, p in ours.items()}
    if isinstance(first, DoRALinear):
        tensors = {dora_key(name): t for name, t in tensors.items()}
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": first.rank,
                  "lora_alpha": first.alpha, "target_modules": list(loras), "lora_dropout": 0.0,
                  "bias": "none", "base_model_name_or_path": base_model, "use_dora": True,
                  "inference_mode": True}
        write(directory, "adapter_", config, tensors)
        clear(directory, "peers_")
        return
    peer = "loran" if not nora else "nora++" if loras else "nora"
    config = {"peer": peer, "targets": list(loras), "rank": first.rank if first else 1,
              "alpha": first.alpha if first else 1}
    write(directory, "peers_", config, tensors)
    clear(directory, "adapter_")

def write(directory, kind, config, tensors):
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    write_files(directory, {f"{kind}config.json": json.dumps(config, indent=2).encode(),
                            f"{kind}model.safetensors": weights})

def clear(directory, kind):
    for name in ("config.json", "model.safetensors"):
        (Path(directory) / f"{kind}{name}").unlink(missing_ok=True)

def dora_key(name):
    """PEFT's name in a file of one of our parameters: without the adapter's name, the pair with
    .weight."""
    key = "base_model.model." + name.removesuffix(".default")
    return key if "magnitude" in name else f"{key}.weight"

def save_plain(model, directory, base_model):
    """nalora.save_adapter, with PiSSA's layers replaced meanwhile by LoRALinears of twice the rank
    on the pretrained layers."""
    pissa = {name: m for name, m in model.named_modules() if hasattr(m, "pretrained")}
    with torch.random.fork_rng(devices=[]):  # their initialisation shall not be noticed
        plain = {name: as_plain_lora(m) for name, m in pissa.items()}
    try:
        for name, m in plain.items():
            model.set_submodule(name, m)
        nalora.save_adapter(model, directory, base_model)
    finally:
        for name, m in pissa.items():
            model.set_submodule(name, m)

@torch.no_grad()
def as_plain_lora(pissa):
    base, A, B = pissa.pretrained
    plain = LoRALinear(base, 2 * pissa.rank, 2 * pissa.alpha)
    plain.lora_A.copy_(torch.cat([pissa.lora_A, A]))
    plain.lora_B.copy_(torch.cat([pissa.lora_B, -B], 1))
    return plain

@torch.no_grad()
def load_adapter(model, directory):
    """Loads what save_adapter wrote, or PEFT for LoRA and DoRA, into the pretrained model. Returns
    the names of what it changed. ValueError, with nothing put in, if it is broken or another
    model's, or the model carries a neighbour."""
    if any(isinstance(m, (PeerLinear, RationalActivation)) or hasattr(m, "pretrained")
           for m in model.modules()):
        raise ValueError("This model carries a neighbour already: load into the base model.")
    kind = "peers_" if (Path(directory) / "peers_config.json").exists() else "adapter_"
    about, tensors = read_folder(directory, kind)
    if kind == "peers_":
        peer, names, rank, alpha = (about.get(k) for k in ("peer", "targets", "rank", "alpha"))
    elif not about.get("use_dora"):
        return nalora.load_adapter(model, directory)
    else:
        peer = "dora"
        rank, alpha = (about.get(k) for k in ("r", "lora_alpha"))
        names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                 for key in tensors if key.endswith(".lora_A.weight")]
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    fits = isinstance(names, list) and all(name in linears for name in names)
    if not fits or peer not in ("nora", "nora++", "loran", "dora"):
        raise ValueError(f"The adapter in {directory} does not fit this model: other module names, "
                         "so another base, or it is broken.")
    trained = [p for p in model.parameters() if p.requires_grad]
    changed = inject(model, peer, names, rank, alpha)
    here = {dora_key(name) if peer == "dora" else name: p for name, p in learnt(model).items()}
    if {k: p.shape for k, p in here.items()} != {k: t.shape for k, t in tensors.items()}:
        unload(model, trained)
        raise ValueError(f"The adapter in {directory} does not fit this model: other names or "
                         "shapes than its settings say.")
    for name, p in here.items():
        p.copy_(tensors[name])
    return changed
