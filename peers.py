"""The neighbours of NA-LoRA in one file, each as short as its idea: NoRA and NoRA++, LoRAN with Sinter, DoRA, rsLoRA, LoRA+ and PiSSA.

THREE ANSWERS TO ONE QUESTION. A gated FFN computes phi(W_gate x) * (W_up x), and LoRA updates the weights as if phi were not there.

    mask the gate's update      NA-LoRA (nalora.py): the optimizer's step of B_gate is put back where phi' is small
    adapt the gate's function   NoRA: phi itself becomes a trainable rational function, the weights stay
    bend the update             LoRAN: W + (alpha / rank) f(B A) with an elementwise f

and four variants of LoRA that a NA-LoRA should be measured against. With s = alpha / rank, A (rank, in), B (out, rank), B = 0 at the start:

    NoRA     phi(z) + R(z; a, b) - R(z; a0, b0),  R = P / Q,  P = sum_{i=0..5} a_i z^i,  Q = 1 + |sum_{j=1..4} b_j z^j|,  per group of channels
             a = a0 + s B_a A_a,  b = b0 + s B_b A_b  over 8 groups; (a0, b0) fitted to phi             rank 3, alpha 6      arXiv 2509.13240
    NoRA++   NoRA and LoRA together                                                                                         arXiv 2509.13240
    LoRAN    W + s f(B A),  Sinter f(x) = x + 5e-5 x sin(1e4 x)                                                             arXiv 2509.21870
    DoRA     m * (W + s B A) / ||W + s B A||, row by row, m trained from ||W||, the norm without gradient                   arXiv 2402.09353
    rsLoRA   s = alpha / sqrt(rank)                                                                                         arXiv 2312.03732
    LoRA+    B learns 16 times as fast as A                                                                                 arXiv 2402.12354
    PiSSA    A and B start as the rank leading singular directions of W, and W as the rest                                  arXiv 2404.02948

HOW SURE ARE WE? DoRA, rsLoRA, LoRA+ and PiSSA agree with PEFT over twenty steps (tests). LoRAN is what its authors' released code computes
(f on the product, then s), apart from the dropout of 0.2 on its input. NoRA follows its abstract and the released layer: degrees, rank, alpha,
separate low-rank pairs for numerator and denominator, A drawn and B = 0. Ours is the residual form: the released layer replaces phi by R, whose
misfit would change the base model before anything is learnt; phi + R - R0 starts as an exact no-op and has the same parameters. Also ours: Q has the
absolute value of the sum (as the paper of its rational functions), where the released kernels sum absolute values; the fit; all groups start alike.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import nalora
from nalora import LoRALinear, is_gated_ffn, lora_layers, read_json, read_tensors, write_json, write_tensors

PEERS = ("nora", "nora++", "loran", "dora", "rslora", "lora+", "pissa")
LORA_PLUS_RATIO = 16

# ---- 1. Linear layers whose update is not simply B A ---------------------------------------------------------------------------------

class PeerLinear(nn.Module):
    """Takes over the frozen layer and the pair of a LoRALinear and keeps the pair the way PEFT does: NALoRA finds it there, and
    nalora.merge_lora, which would merge it wrongly, does not."""

    active_adapters = ("default",)

    def __init__(self, lora):
        super().__init__()
        self.base_layer, self.rank, self.alpha, self.scaling = lora.base_layer, lora.rank, lora.alpha, lora.scaling
        self.lora_A, self.lora_B = nn.ParameterDict({"default": lora.lora_A}), nn.ParameterDict({"default": lora.lora_B})

    def update(self, x):
        """(alpha / rank) B A x, (..., out), as LoRALinear computes it."""
        low = F.linear(x.to(self.lora_A["default"].dtype), self.lora_A["default"]) * self.scaling                      # (..., rank)
        return low @ self.lora_B["default"].t().contiguous()

    def product(self):
        return self.lora_B["default"] @ self.lora_A["default"]                              # (out, in)

class LoRANLinear(PeerLinear):
    """y = base_layer(x) + (alpha / rank) f(B A) x with f(w) = w + amplitude w sin(frequency w), elementwise. amplitude 0 is LoRA bit for bit."""

    def __init__(self, lora, amplitude=5e-5, frequency=1e4):
        super().__init__(lora)
        self.amplitude, self.frequency = amplitude, frequency

    def bend(self):
        """f(B A) - B A, (out, in)."""
        w = self.product()
        return self.amplitude * w * torch.sin(self.frequency * w)

    def forward(self, x):                                                                   # (..., in)
        y = self.base_layer(x)                                                              # (..., out)
        y = y + self.update(x).to(y.dtype)
        return y if self.amplitude == 0 else y + F.linear(x.to(self.lora_A["default"].dtype), self.scaling * self.bend()).to(y.dtype)

    def merged(self):
        return nalora.widen(self.base_layer.weight) + self.scaling * (self.product() + self.bend())

class DoRALinear(PeerLinear):
    """y = (m / ||W + (alpha / rank) B A||) (W + (alpha / rank) B A) x + bias: row directions by LoRA, row lengths m (out,) by themselves."""

    def __init__(self, lora):
        super().__init__(lora)
        self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(self.norm())})

    @torch.no_grad()
    def norm(self):
        """||W + (alpha / rank) B A|| of each row, (out,), a constant for the gradient (section 4.3 of the paper)."""
        return (nalora.widen(self.base_layer.weight) + self.scaling * self.product()).norm(dim=1)

    def forward(self, x):                                                                   # (..., in)
        y = F.linear(x, self.base_layer.weight)                                             # (..., out)
        y = ((y + self.update(x).to(y.dtype)) * (self.lora_magnitude_vector["default"] / self.norm())).to(y.dtype)
        return y if self.base_layer.bias is None else y + self.base_layer.bias

    def merged(self):
        weight = nalora.widen(self.base_layer.weight) + self.scaling * self.product()
        return weight * (self.lora_magnitude_vector["default"] / weight.norm(dim=1))[:, None]

# ---- 2. An activation that learns ------------------------------------------------------------------------------------------------------

def rational(z, a, b):
    """P(z) / Q(z) of z (..., F) with coefficients a (6, F) or (6, 1) of P, lowest degree first, and b (4, F) or (4, 1) of Q, degree 1 first.
    Q >= 1, so there is no pole. z is held within +-1e4, where z^5 still fits into float32."""
    z = nalora.widen(z).clamp(-1e4, 1e4)
    p, q = a[-1], b[-1]
    for i in range(len(a) - 2, -1, -1):
        p = p * z + a[i]
    for j in range(len(b) - 2, -1, -1):
        q = q * z + b[j]
    return p / (1 + (q * z).abs())

def fit_rational(act, points=2001, rounds=30):
    """(a (6,), b (4,)) in float64, such that P/Q is act on [-8, 8]: least squares of P - act (Q - 1) = act, each point weighted by the last 1 / Q.
    For SiLU, GELU and QuickGELU the largest error is below 1e-2 (test)."""
    z = torch.linspace(-8, 8, points, dtype=torch.float64)
    y = act(z)
    powers = torch.stack([z**i for i in range(6)], 1)                                       # (points, 6)
    weight, best = torch.ones_like(z), (math.inf, None, None)
    for _ in range(rounds):
        # Q is taken as 1 + sum, without the absolute value, while fitting; a fit with a sign change in the sum shows in the error
        design = torch.cat([powers, -y[:, None] * powers[:, 1:5]], 1) * weight[:, None]     # (points, 10)
        solution = torch.linalg.lstsq(design, (y * weight)[:, None]).solution[:, 0]
        a, b = solution[:6], solution[6:]
        error = (rational(z, a[:, None], b[:, None]) - y).abs().max().item()
        best = min(best, (error, a, b), key=lambda fit: fit[0])
        weight = 1 / (1 + (powers[:, 1:5] @ b).abs())
    return best[1:]

class RationalActivation(nn.Module):
    """phi(z) + R(z; a, b) - R(z; a0, b0): at the start phi, bit for bit. Channels are cut into `groups` runs with coefficients of their own.

    act: the model's activation; channels: F. ValueError unless 1 <= groups <= channels and rank is at least 1.
    """

    def __init__(self, act, channels, groups=8, rank=3, alpha=6, device=None):
        super().__init__()
        if not (1 <= groups <= channels and rank >= 1):
            raise ValueError(f"{channels} channels cannot be cut into {groups} groups of rank {rank}: give 1 <= groups <= channels and a rank of at least 1.")
        self.act, self.scaling = act, alpha / rank
        for part, fitted in zip(("numerator", "denominator"), fit_rational(act)):
            self.register_buffer(part, fitted.float().to(device), persistent=False)         # made anew from phi, never saved
            A, B = torch.empty(rank, len(fitted), device=device), torch.zeros(groups, rank, device=device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.register_parameter(f"nora_A_{part}", nn.Parameter(A))
            self.register_parameter(f"nora_B_{part}", nn.Parameter(B))
        self.register_buffer("group", torch.arange(channels, device=device) * groups // channels, persistent=False)     # (F,)

    def coefficients(self, part):
        """Of every channel, (6, F) or (4, F)."""
        A, B = getattr(self, f"nora_A_{part}"), getattr(self, f"nora_B_{part}")
        return (getattr(self, part) + self.scaling * (B @ A)).t()[:, self.group]

    def forward(self, z):                                                                   # (..., F)
        if z.size(-1) != len(self.group):
            raise ValueError(f"This activation has coefficients for {len(self.group)} channels, and z has {z.size(-1)} (NA-LoRA needs one activation for all).")
        start = rational(z, self.numerator[:, None], self.denominator[:, None])
        moved = rational(z, self.coefficients("numerator"), self.coefficients("denominator")) - start
        return self.act(z) + moved.to(z.dtype)

# ---- 3. Into a model and out of it ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def start_from_singular_directions(lora):
    """PiSSA: W = U S V; A = sqrt(S_r / s) V_r, B = U_r sqrt(S_r / s), and the frozen layer becomes W - s B A. The pretrained one is kept aside."""
    weight = nalora.widen(lora.base_layer.weight)
    u, singular, v = torch.linalg.svd(weight, full_matrices=False)
    root = (singular[:lora.rank] / lora.scaling).sqrt()
    lora.lora_A.copy_(root[:, None] * v[:lora.rank])
    lora.lora_B.copy_(u[:, :lora.rank] * root)
    lora.pretrained = (lora.base_layer, lora.lora_A.clone(), lora.lora_B.clone())           # in a tuple: no part of the model
    rest = nn.Linear(weight.size(1), weight.size(0), lora.base_layer.bias is not None, weight.device, lora.base_layer.weight.dtype).requires_grad_(False)
    rest.weight.copy_(weight - lora.scaling * (lora.lora_B @ lora.lora_A))
    rest.bias = lora.base_layer.bias
    lora.base_layer = rest

def inject(model, peer, targets=(), rank=8, alpha=16):
    """Puts a neighbour into the model and freezes all else. targets, rank, alpha: of its LoRA part, as in nalora.inject_lora; NoRA has none.

    ValueError, with nothing changed, for a name that is not in PEERS, where inject_lora raises one, and if NoRA finds no gated FFN.
    """
    if peer not in PEERS:
        raise ValueError(f"There is no neighbour {peer!r}: choose among {', '.join(PEERS)}.")
    if any(isinstance(m, (PeerLinear, RationalActivation)) for m in model.modules()):
        raise ValueError("This model carries a neighbour already: start from the base model.")
    ffns = [m for m in model.modules() if is_gated_ffn(m)] if "nora" in peer else []
    if "nora" in peer and not ffns:
        raise ValueError("NoRA adapts the activation of gated FFNs, and this model has none.")
    widths = [ffn.gate_proj.weight.size(0) for ffn in ffns]
    if peer == "nora":
        model.requires_grad_(False)
    else:
        nalora.inject_lora(model, targets, rank, alpha * math.sqrt(rank) if peer == "rslora" else alpha)
    for ffn, width in zip(ffns, widths):
        ffn.act_fn = RationalActivation(ffn.act_fn, width, device=next(model.parameters()).device)
    kinds = {"loran": LoRANLinear, "dora": DoRALinear}
    for name, lora in lora_layers(model).items() if peer in ("loran", "dora", "pissa") else ():
        start_from_singular_directions(lora) if peer == "pissa" else model.set_submodule(name, kinds[peer](lora))

def parameter_groups(model, peer, lr):
    """What the optimizer trains: [{"params", "lr"}, ...]. LoRA+ gives B a rate of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if peer != "lora+":
        return [{"params": list(trained.values()), "lr": lr}]
    fast = [p for name, p in trained.items() if "lora_B" in name]
    return [{"params": [p for name, p in trained.items() if "lora_B" not in name], "lr": lr}, {"params": fast, "lr": lr * LORA_PLUS_RATIO}]

@torch.no_grad()
def merge(model):
    """Folds the neighbour into the weights, rounded once to their dtype. ValueError, with nothing changed, for NoRA, which needs its
    activation at inference, and where nalora.merge_lora raises one."""
    if any(isinstance(m, RationalActivation) for m in model.modules()):
        raise ValueError("NoRA has changed the activation, which no weight can express: it cannot be merged; save_adapter keeps it.")
    peers = {name: m for name, m in model.named_modules() if isinstance(m, PeerLinear)}
    if not peers:
        nalora.merge_lora(model)
    for name, layer in peers.items():
        layer.base_layer.weight.copy_(layer.merged())
        model.set_submodule(name, layer.base_layer)

def take_out(model):
    """The pretrained model again, whatever was learnt."""
    for name, m in list(model.named_modules()):
        if isinstance(m, (PeerLinear, LoRALinear)):
            model.set_submodule(name, getattr(m, "pretrained", (m.base_layer,))[0])
        if isinstance(m, RationalActivation):
            ffn = model.get_submodule(name.rpartition(".")[0])
            del ffn.act_fn                                                                  # a module's place does not take a plain function
            ffn.act_fn = m.act

def save_adapter(model, directory, base_model=None, settings=None):
    """Writes what was learnt: rsLoRA, LoRA+ and PiSSA as plain LoRA by nalora.save_adapter (PiSSA at twice the rank, B A - B0 A0, since the base
    is the pretrained one); the others to peers.safetensors and peers.json, and DoRA to PEFT's files, too. ValueError if there is nothing."""
    directory, parts = Path(directory), dict(model.named_modules())
    pissa = {name: m for name, m in parts.items() if hasattr(m, "pretrained")}
    peers = {name: m for name, m in parts.items() if isinstance(m, PeerLinear)}
    nora = any(isinstance(m, RationalActivation) for m in parts.values())
    if pissa:
        for name, m in pissa.items():
            model.set_submodule(name, as_plain_lora(m))
        try:
            nalora.save_adapter(model, directory, base_model, settings)
        finally:
            for name, m in pissa.items():
                model.set_submodule(name, m)
        return
    if not peers and not nora:
        nalora.save_adapter(model, directory, base_model, settings)
        return
    loras = peers or {name: m for name, m in parts.items() if isinstance(m, LoRALinear)}
    first = next(iter(loras.values()), None)
    peer = ("nora++" if loras else "nora") if nora else "dora" if isinstance(first, DoRALinear) else "loran"
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    described = {"peer": peer, "targets": list(loras), "rank": first and first.rank, "alpha": first and first.alpha, "settings": settings,
                 "base": nalora.fingerprint({name: m.base_layer for name, m in loras.items()})}
    write_tensors(directory / "peers.safetensors", tensors)
    write_json(directory / "peers.json", described)
    if peer == "dora":
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": first.rank, "lora_alpha": first.alpha,
                  "target_modules": list(loras), "lora_dropout": 0.0, "bias": "none", "use_dora": True, "inference_mode": True}
        write_tensors(directory / "adapter_model.safetensors", {
            f"base_model.model.{name}".replace(".default", ".weight").replace("vector.weight", "vector"): t for name, t in tensors.items()})
        write_json(directory / "adapter_config.json", config)

def as_plain_lora(pissa):
    """A LoRALinear of twice the rank on the pretrained layer, with the same output: s (B A - B0 A0) is what was learnt."""
    base, A, B = pissa.pretrained
    if 2 * pissa.rank > min(base.weight.shape):
        raise ValueError(f"PiSSA of rank {pissa.rank} is saved as LoRA of rank {2 * pissa.rank}, more than a layer of shape {tuple(base.weight.shape)} can take.")
    plain = LoRALinear(base, 2 * pissa.rank, 2 * pissa.alpha)
    plain.lora_A.data, plain.lora_B.data = torch.cat([pissa.lora_A.data, A]), torch.cat([pissa.lora_B.data, -B], 1)
    return plain

def load_adapter(model, directory):
    """Loads what save_adapter wrote into the pretrained model. ValueError, with nothing changed, if it is broken or another model's."""
    directory = Path(directory)
    if not (directory / "peers.json").exists():
        nalora.load_adapter(model, directory)
        return
    described, tensors = read_json(directory / "peers.json"), read_tensors(directory / "peers.safetensors")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets, base = described.get("targets"), described.get("base")
    if not isinstance(targets, list) or not isinstance(base, dict) or not set(targets) <= set(linears) or not set(base) <= set(linears):
        raise ValueError(f"The adapter in {directory} does not fit this model: other module names, so another base.")
    here = nalora.fingerprint({name: linears[name] for name in base})
    if not all(isinstance(norm, float) and math.isclose(norm, here[name], rel_tol=0.01) for name, norm in base.items()):
        raise ValueError(f"The adapter in {directory} was trained on another base model: the weights differ from those of this one.")
    if targets and not all(isinstance(described.get(k), (int, float)) for k in ("rank", "alpha")):
        raise ValueError(f"{directory / 'peers.json'} gives no rank and alpha: it is broken.")
    inject(model, described.get("peer"), targets, described.get("rank"), described.get("alpha"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {k: v.shape for k, v in trained.items()} != {k: v.shape for k, v in tensors.items()}:
        take_out(model)
        raise ValueError(f"The adapter in {directory} does not fit this model: other names or shapes than its settings say.")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
