"""The neighbours of NA-LoRA in one file, each as short as its idea: NoRA and NoRA++, LoRAN with
Sinter, DoRA, rsLoRA, LoRA+ and PiSSA.

THREE WAYS TO BRING NONLINEARITY IN. A gated FFN computes phi(W_gate x) * (W_up x), and LoRA adds a
linear update to the weights.

    mask the gate's update     NA-LoRA (nalora.py): B_gate's step is put back where phi' is small
    adapt the gate's function  NoRA: phi becomes a trainable rational function, the weights stay
    bend the update            LoRAN: W + (alpha / rank) f(B A) with an elementwise f

and four variants of LoRA that NA-LoRA should be measured against. With s = alpha / rank,
A (rank, in), B (out, rank), B = 0 at the start:

    NoRA    phi(z) + R(z; a, b) - R(z; a0, b0) with R = P / Q, P = sum_{i=0..5} a_i z^i,
            Q = 1 + |sum_{j=1..4} b_j z^j|; a = a0 + s B_a A_a, b = b0 + s B_b A_b over 8 groups of
            channels; (a0, b0) fitted to phi; rank 3, alpha 6                     arXiv 2509.13240
    NoRA++  NoRA and LoRA together                                                arXiv 2509.13240
    LoRAN   W + s f(B A), Sinter f(w) = w + 5e-5 w sin(1e4 w)                     arXiv 2509.21870
    DoRA    m (W + s B A) / ||W + s B A||: one norm and one m per output, m trained from ||W||,
            the norm without gradient                                             arXiv 2402.09353
    rsLoRA  s = alpha / sqrt(rank)                                                arXiv 2312.03732
    LoRA+   B learns faster than A, here 16 times                                 arXiv 2402.12354
    PiSSA   A and B start as the leading singular directions of W, W as the rest  arXiv 2404.02948

HOW SURE ARE WE? DoRA, rsLoRA, LoRA+ and PiSSA agree with PEFT over twenty steps (tests). LoRAN's f,
its constants and its place, on the product before s, are those of the authors' released code
(github.com/liyinqiao2012/PEFT-LoRAN), whose dropout of 0.2 on the input is left out. With these
constants it is close to LoRA: no entry is bent by more than 5e-5 of itself, its gradient by a
factor within 1 +- 0.5 |w|. NoRA follows its abstract and the settings reported for it; a public
layer of that name agrees in degrees, rank, alpha, separate pairs for numerator and denominator, A
drawn and B = 0, but we could not establish that it is the authors'. Ours is the residual form: put
in the place of phi, R would change the base model by its misfit before anything is learnt;
phi + R - R0 starts as an exact no-op and has the same parameters. Also ours: the absolute value of
the sum in Q (public kernels sum absolute values), the fit, and that all groups start alike. NoRA
moves phi(0), too, so rho = phi / z has a pole there; where selection is measured,
phi(z) - phi(0) takes its place. On top of DoRA NA-LoRA masks B_gate, not the magnitudes m.
"""
import copy
import math
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import nalora
import train_tiny
from nalora import GatedFFN, LoRALinear, NALoRA, NALoRAConfig, widen

PEERS = ("nora", "nora++", "loran", "dora", "rslora", "lora+", "pissa")

# ---- 1. Linear layers whose update is not simply B A ---------------------------------------------

class PeerLinear(nn.Module):
    """Takes over the frozen layer and the pair of a LoRALinear and keeps the pair the way PEFT
    does: NALoRA finds it there, and nalora.merge_lora, which would merge it wrongly, does not."""
    active_adapters = ("default",)

    def __init__(self, lora):
        super().__init__()
        self.base_layer = lora.base_layer
        self.rank = lora.rank
        self.alpha = lora.alpha
        self.scaling = lora.scaling
        self.lora_A = nn.ParameterDict({"default": lora.lora_A})
        self.lora_B = nn.ParameterDict({"default": lora.lora_B})

    def update(self, x):
        """(alpha / rank) B A x, (..., out), as LoRALinear computes it."""
        A = self.lora_A["default"]
        low = F.linear(x.to(A.dtype), A) * self.scaling  # (..., rank)
        return low @ self.lora_B["default"].t().contiguous()

    def product(self):
        """B A (out, in), in the parameters' own precision even under autocast."""
        with torch.autocast(self.base_layer.weight.device.type, enabled=False):
            return self.lora_B["default"] @ self.lora_A["default"]

class LoRANLinear(PeerLinear):
    """y = base_layer(x) + (alpha / rank) f(B A) x with f(w) = w + amplitude w sin(frequency w),
    elementwise. amplitude 0 is LoRA bit for bit."""
    def __init__(self, lora, amplitude=5e-5, frequency=1e4):
        super().__init__(lora)
        self.amplitude = amplitude
        self.frequency = frequency

    def bend(self):
        """f(B A) - B A, (out, in)."""
        w = self.product()
        return self.amplitude * w * torch.sin(self.frequency * w)

    def forward(self, x):  # (..., in)
        y = self.base_layer(x)  # (..., out)
        update = self.update(x)  # (..., out)
        if self.amplitude:
            bend = self.scaling * self.bend()
            update = update + F.linear(x.to(bend.dtype), bend)
        return y + update.to(y.dtype)

    def merged(self):
        return widen(self.base_layer.weight) + self.scaling * (self.product() + self.bend())

class DoRALinear(PeerLinear):
    """y = (m / ||W + (alpha / rank) B A||) (W + (alpha / rank) B A) x + bias: row directions by
    LoRA, row lengths m (out,) by themselves."""
    def __init__(self, lora):
        super().__init__(lora)
        self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(self.norm())})

    @torch.no_grad()
    def norm(self):
        """||W + (alpha / rank) B A|| of each row, (out,), a constant for the gradient (section 4.3
        of the paper). A row of zeros divides by something."""
        weight = widen(self.base_layer.weight) + self.scaling * self.product()
        return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)

    def length(self):  # m / ||W + (alpha / rank) B A||, (out,)
        return self.lora_magnitude_vector["default"] / self.norm()

    def forward(self, x):  # (..., in)
        y = F.linear(x, self.base_layer.weight)  # (..., out)
        y = ((y + self.update(x).to(y.dtype)) * self.length()).to(y.dtype)
        return y if self.base_layer.bias is None else y + self.base_layer.bias

    def merged(self):
        weight = widen(self.base_layer.weight) + self.scaling * self.product()
        return weight * self.length()[:, None]

# ---- 2. An activation that learns ----------------------------------------------------------------

def rational(z, a, b):
    """P(z) / Q(z) of z (..., F) with coefficients a (6, F) or (6, 1) of P, lowest degree first, and
    b (4, F) or (4, 1) of Q, degree 1 first. Q >= 1, so there is no pole. z is held within +-1e4,
    where z^5 still fits into float32."""
    z = widen(z).clamp(-1e4, 1e4)
    p = a[-1]
    for i in range(len(a) - 2, -1, -1):
        p = p * z + a[i]
    q = b[-1]
    for j in range(len(b) - 2, -1, -1):
        q = q * z + b[j]
    return p / (1 + (q * z).abs())

def fit_rational(act, points=2001, rounds=30):
    """(a (6,), b (4,), the largest error) in float64, such that P/Q is act on [-8, 8]: least
    squares of P - act (Q - 1) = act, each point weighted by the last 1 / Q. The largest errors
    (test): 1.2e-3 for SiLU, 3.8e-3 for GELU, 6.5e-3 for QuickGELU."""
    z = torch.linspace(-8, 8, points, dtype=torch.float64)
    y = copy.deepcopy(act).cpu().double()(z).detach()
    powers = torch.stack([z**i for i in range(6)], 1)  # (points, 6)
    weight = torch.ones_like(z)
    best = (math.inf, None, None)
    for _ in range(rounds):
        # Q is taken as 1 + sum, without the absolute value, while fitting; a fit with a sign change
        # in the sum shows in the error
        design = torch.cat([powers, -y[:, None] * powers[:, 1:5]], 1) * weight[:, None]
        solution = torch.linalg.lstsq(design, (y * weight)[:, None]).solution[:, 0]  # (10,)
        a, b = solution.split([6, 4])
        error = (rational(z, a[:, None], b[:, None]) - y).abs().max().item()
        if error < best[0]:
            best = (error, a, b)
        weight = 1 / (1 + (powers[:, 1:5] @ b).abs())
    return best[1], best[2], best[0]

class RationalActivation(nn.Module):
    """phi(z) + R(z; a, b) - R(z; a0, b0): at the start phi, bit for bit. Channels are cut into
    `groups` runs with coefficients of their own. act: the model's activation, a module; channels:
    F. ValueError unless 1 <= groups <= channels and rank is at least 1."""
    def __init__(self, act, channels, groups=8, rank=3, alpha=6, device=None):
        super().__init__()
        if not (1 <= groups <= channels and rank >= 1):
            raise ValueError(f"{channels} channels cannot be cut into {groups} groups of rank "
                             f"{rank}: give 1 <= groups <= channels and a rank of at least 1.")
        self.act = act
        self.scaling = alpha / rank
        a, b, self.fit_error = fit_rational(act)
        for part, fitted in (("numerator", a), ("denominator", b)):
            # made anew from phi, never saved
            self.register_buffer(part, fitted.float().to(device), persistent=False)
            A = torch.empty(rank, len(fitted), device=device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B = torch.zeros(groups, rank, device=device)
            self.register_parameter(f"nora_A_{part}", nn.Parameter(A))
            self.register_parameter(f"nora_B_{part}", nn.Parameter(B))
        group = torch.arange(channels, device=device) * groups // channels  # (F,)
        self.register_buffer("group", group, persistent=False)

    def coefficients(self, part):
        """Of every channel, (6, F) or (4, F)."""
        A = getattr(self, f"nora_A_{part}")
        B = getattr(self, f"nora_B_{part}")
        return (getattr(self, part) + self.scaling * (B @ A)).t()[:, self.group]

    def forward(self, z):  # (..., F)
        if z.size(-1) != len(self.group):
            raise ValueError(f"This activation has coefficients for {len(self.group)} channels, "
                             f"and z has {z.size(-1)}.")
        start = rational(z, self.numerator[:, None], self.denominator[:, None])
        now = rational(z, self.coefficients("numerator"), self.coefficients("denominator"))
        return self.act(z) + (now - start).to(z.dtype)

# ---- 3. Into a model and out of it ---------------------------------------------------------------

def inject(model, peer, targets=(), rank=8, alpha=16):
    """Puts a neighbour into the model, freezes all else and returns the names of what it changed.
    Do it when the model is on its device. targets, rank, alpha: of its LoRA part, as in
    nalora.inject_lora; NoRA has none. ValueError, with nothing changed, for a name that is not in
    PEERS, a model that carries LoRA or a neighbour already, values that make no sense, and what the
    neighbour cannot be put into."""
    if peer not in PEERS:
        raise ValueError(f"There is no neighbour {peer!r}: choose among {', '.join(PEERS)}.")
    if carries(model):
        raise ValueError("This model carries LoRA or a neighbour already: start from the base "
                         "model.")
    if not (type(rank) is int and rank >= 1 and type(alpha) in (int, float) and 0 < alpha < 1e12):
        raise ValueError(f"rank is {rank!r} and alpha {alpha!r}: give a whole number of at least 1 "
                         "and a number above zero.")
    ffns = {name: m for name, m in model.named_modules()
            if "nora" in peer and isinstance(m, GatedFFN)}
    if "nora" in peer and not ffns:
        raise ValueError("NoRA adapts the activation of gated FFNs, and this model has none.")
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        adapted = {f"{name}.act_fn": rational_activation(ffn) for name, ffn in ffns.items()}
        names = []
        if peer != "nora":
            own_alpha = alpha * math.sqrt(rank) if peer == "rslora" else alpha
            names = nalora.inject_lora(model, targets, rank, own_alpha)
        model.requires_grad_(False)
        for name, act in adapted.items():
            model.set_submodule(name, act)
        for name in names:
            if peer == "pissa":
                start_from_singular_directions(model, name)
            if peer in ("loran", "dora"):
                kind = LoRANLinear if peer == "loran" else DoRALinear
                model.set_submodule(name, kind(model.get_submodule(name)))
        for p in learnt(model).values():
            p.requires_grad_()
    except (ValueError, RuntimeError):  # such as a singular value decomposition that fails
        unload(model, trained)
        raise
    return names + list(adapted)

def rational_activation(ffn):
    weight = ffn.gate_proj.weight  # (F, hidden)
    return RationalActivation(ffn.act_fn, len(weight), device=weight.device)

class PissaLinear(LoRALinear):
    """LoRA on what PiSSA leaves of the pretrained weight: no plain LoRA for that weight."""

@torch.no_grad()
def start_from_singular_directions(model, name):
    """PiSSA: W = U S V; A = sqrt(S_r / s) V_r, B = U_r sqrt(S_r / s), and the frozen layer becomes
    W - s B A. The pretrained layer is kept aside, at the cost of its memory. ValueError if it
    cannot be split or the result, LoRA of twice the rank, could not be saved."""
    lora = model.get_submodule(name)
    base = lora.base_layer
    weight = base.weight
    sound = weight.is_floating_point() and weight.isfinite().all()
    if not sound or owners(model)[weight] > 1:
        raise ValueError(f"The weight of {name} is quantized, not finite or tied to another layer: "
                         "PiSSA cannot split it.")
    if 2 * lora.rank > min(weight.shape):
        raise ValueError(f"PiSSA of rank {lora.rank} is saved as LoRA of rank {2 * lora.rank}, "
                         f"more than {name} of shape {tuple(weight.shape)} can take: give a "
                         "smaller rank.")
    u, singular, v = torch.linalg.svd(widen(weight), full_matrices=False)
    root = (singular[:lora.rank] / lora.scaling).sqrt()
    lora.lora_A.copy_(root[:, None] * v[:lora.rank])
    lora.lora_B.copy_(u[:, :lora.rank] * root)
    lora.__class__ = PissaLinear
    lora.pretrained = (base, lora.lora_A.clone(), lora.lora_B.clone())  # a tuple: no submodule
    rest = widen(weight) - lora.scaling * (lora.lora_B @ lora.lora_A)
    lora.base_layer = copy.deepcopy(base)
    lora.base_layer.weight = nn.Parameter(rest.to(weight.dtype), requires_grad=False)

def carries(model):
    """Whether there is LoRA, ours or PEFT's, or a neighbour in the model."""
    return any(hasattr(m, "lora_A") or isinstance(m, RationalActivation) for m in model.modules())

def owners(model):
    """{parameter: under how many names the model holds it}."""
    return Counter(p for _, p in model.named_parameters(remove_duplicate=False))

def learnt(model):
    """{name: parameter} of what the neighbour trains, frozen or not."""
    kinds = (PeerLinear, LoRALinear, RationalActivation)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    return {f"{name}.{part}": p for name, m in layers.items() for part, p in m.named_parameters()
            if part.startswith(("lora_", "nora_"))}

def lora_plus_groups(model, lr, ratio=16):
    """LoRA+ for any torch optimizer: [{"params": the As, "lr": lr}, {"params": the Bs, "lr": ratio
    lr}]."""
    slow = [p for name, p in learnt(model).items() if "lora_B" not in name]
    fast = [p for name, p in learnt(model).items() if "lora_B" in name]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]

@torch.no_grad()
def merge(model):
    """Folds the neighbour into the weights, rounded once to their dtype, and returns the names of
    the layers. ValueError, with nothing changed, for NoRA, which needs its activation at inference,
    where there is nothing to merge, and for weights that are quantized, tied or not loaded."""
    if any(isinstance(m, RationalActivation) for m in model.modules()):
        raise ValueError("NoRA has changed the activation, which no weight can express: it cannot "
                         "be merged; save_adapter keeps it.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PeerLinear)}
    if not layers:
        return nalora.merge_lora(model)
    held = owners(model)
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        if weight.is_meta or not weight.is_floating_point() or held[weight] > 1:
            raise ValueError(f"The weight of {name} is quantized, not loaded or tied to another "
                             "layer: it cannot be merged.")
    for name, layer in layers.items():
        layer.base_layer.weight.copy_(layer.merged())
        model.set_submodule(name, layer.base_layer)
    return list(layers)

def unload(model, trained=()):
    """The pretrained model again, whatever was learnt, all of it frozen but `trained`."""
    for name, m in list(model.named_modules()):
        if isinstance(m, (PeerLinear, LoRALinear)):
            model.set_submodule(name, getattr(m, "pretrained", (m.base_layer,))[0])
        if isinstance(m, RationalActivation):
            model.set_submodule(name, m.act)
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_()

# ---- 4. Methods of train_tiny.py -----------------------------------------------------------------

def neighbour(model, c, peer):
    """The method that trains a neighbour."""
    inject(model, peer, c.targets, c.rank, c.alpha)
    groups = [p for p in model.parameters() if p.requires_grad]
    if peer == "lora+":
        groups = lora_plus_groups(model, c.lr)
    return train_tiny.make_optimizer(groups, c), None

def nalora_on(model, c, peer):
    """The same with NA-LoRA on top."""
    optimizer, _ = neighbour(model, c, peer)
    config = NALoRAConfig(keep=c.keep, ema=c.ema, stride=c.stride)
    return optimizer, NALoRA(model, optimizer, config)

METHODS = {peer: partial(neighbour, peer=peer) for peer in PEERS}
METHODS |= {f"nalora-{peer}": partial(nalora_on, peer=peer)
            for peer in ("rslora", "lora+", "dora", "pissa")}
