"""What a neighbour has learnt, on disk: in PEFT's files, or in ours where PEFT does not know it."""

import math
from pathlib import Path

import torch
import torch.nn as nn

import nalora
from evidence.peers import (
    DoRALinear,
    PeerLinear,
    RationalActivation,
    inject,
    learnt,
    unload,
)
from nalora import LoRALinear, read_json, read_tensors, write_files


def save_adapter(model, directory, base_model=None, settings=None):
    """Writes what was learnt, and removes from the folder what an adapter of another kind left
    there. ValueError if there is nothing. rsLoRA, LoRA+ and PiSSA become plain LoRA, by
    nalora.save_adapter (PiSSA at twice the rank, s (B A - B0 A0), since the base is the pretrained
    one; exact in float32); DoRA PEFT's two files; NoRA, NoRA++ and LoRAN, which PEFT does not know,
    peers.safetensors and peers.json."""
    directory, parts = Path(directory), dict(model.named_modules())
    peers, nora = (
        [m for m in parts.values() if isinstance(m, PeerLinear)],
        [name for name, m in parts.items() if isinstance(m, RationalActivation)],
    )
    if not peers and not nora:
        save_plain(model, directory, base_model, settings)
        clear(directory, "peers.json", "peers.safetensors")
        return
    held = {id(p) for p in learnt(model).values()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if others:
        raise ValueError(
            f"{', '.join(others[:3])} would not be in the adapter, yet trains: freeze it."
        )
    loras = {name: m for name, m in parts.items() if isinstance(m, (PeerLinear, LoRALinear))}
    first, tensors = (
        next(iter(loras.values()), None),
        {name: p.detach() for name, p in learnt(model).items()},
    )
    gates = {
        name.rpartition(".")[0] + ".gate_proj": parts[name.rpartition(".")[0] + ".gate_proj"]
        for name in nora
    }
    base = nalora.fingerprint(
        {name: getattr(m, "base_layer", m) for name, m in {**gates, **loras}.items()}
    )
    if isinstance(first, DoRALinear):
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": first.rank,
            "lora_alpha": first.alpha,
            "target_modules": list(loras),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": True,
            "inference_mode": True,
        }
        files = {
            "adapter_model.safetensors": {dora_key(name): t for name, t in tensors.items()},
            "adapter_config.json": config,
            "nalora.json": {"settings": settings, "base": base},
        }
        write_files(directory, files)
        clear(directory, "peers.json", "peers.safetensors")
        return
    about = {
        "peer": ("nora++" if loras else "nora") if nora else "loran",
        "targets": list(loras),
        "rank": first.rank if first else 1,
        "alpha": first.alpha if first else 1,
        "settings": settings,
        "base": base,
    }
    write_files(directory, {"peers.safetensors": tensors, "peers.json": about})
    clear(directory, "adapter_model.safetensors", "adapter_config.json", "nalora.json")


def clear(directory, *names):
    for name in names:
        (directory / name).unlink(missing_ok=True)


def dora_key(name):
    """PEFT's name in a file of one of our parameters: without the adapter's name, the pair with
    .weight."""
    return (
        "base_model.model." + name.removesuffix(".default") + ".weight" * ("magnitude" not in name)
    )


def save_plain(model, directory, base_model, settings):
    """nalora.save_adapter, with PiSSA's layers replaced meanwhile by LoRALinears of twice the rank
    on the pretrained layers."""
    pissa = {name: m for name, m in model.named_modules() if hasattr(m, "pretrained")}
    with torch.random.fork_rng(devices=[]):  # their initialisation shall not be noticed
        plain = {name: as_plain_lora(m) for name, m in pissa.items()}
    try:
        for name, m in plain.items():
            model.set_submodule(name, m)
        nalora.save_adapter(model, directory, base_model, settings)
    finally:
        for name, m in pissa.items():
            model.set_submodule(name, m)


def as_plain_lora(pissa):
    base, A, B = pissa.pretrained
    plain = LoRALinear(base, 2 * pissa.rank, 2 * pissa.alpha)
    plain.lora_A.data, plain.lora_B.data = (
        torch.cat([pissa.lora_A.data, A]),
        torch.cat([pissa.lora_B.data, -B], 1),
    )
    return plain


def load_adapter(model, directory):
    """Loads what save_adapter wrote, or PEFT for LoRA and DoRA, into the pretrained model. Returns
    the names of what it changed. ValueError, with nothing changed, if it is broken or another
    model's, or the model carries a neighbour."""
    directory, config = Path(directory), {}
    if any(
        isinstance(m, (PeerLinear, RationalActivation)) or hasattr(m, "pretrained")
        for m in model.modules()
    ):
        raise ValueError("This model carries a neighbour already: load into the base model.")
    if (directory / "peers.json").exists():
        kept, tensors = (
            read_json(directory / "peers.json"),
            read_tensors(directory / "peers.safetensors"),
        )
        peer, names, rank, alpha, base = (
            kept.get(k) for k in ("peer", "targets", "rank", "alpha", "base")
        )
    else:
        config = read_json(directory / "adapter_config.json")
        if not config.get("use_dora"):
            return nalora.load_adapter(model, directory)
        tensors, peer = read_tensors(directory / "adapter_model.safetensors"), "dora"
        rank, alpha = nalora.plain_sizes({**config, "use_dora": False})
        names = [
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for key in tensors
            if key.endswith(".lora_A.weight")
        ]
        base = (
            read_json(directory / "nalora.json").get("base")
            if (directory / "nalora.json").exists()
            else {}
        )
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(base, dict)
        and {*names, *base} <= set(linears)
    ) or peer not in ("nora", "nora++", "loran", "dora"):
        raise ValueError(
            f"The adapter in {directory} does not fit this model: other module names, so another "
            "base, or it is broken."
        )
    here = nalora.fingerprint({name: linears[name] for name in base})
    if not all(
        isinstance(norm, float) and math.isclose(norm, here[name], rel_tol=0.01)
        for name, norm in base.items()
    ):
        raise ValueError(
            f"The adapter in {directory} was trained on another base model: the weights differ "
            "from those of this one."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    changed = inject(model, peer, names, rank, alpha)
    here = {dora_key(name) if peer == "dora" else name: p for name, p in learnt(model).items()}
    if {k: v.shape for k, v in here.items()} != {k: v.shape for k, v in tensors.items()}:
        unload(model, trained)
        raise ValueError(
            f"The adapter in {directory} does not fit this model: other names or shapes than its "
            "settings say."
        )
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(tensors[name])
    return changed
