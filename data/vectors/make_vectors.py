"""Makes vectors.json and vectors.safetensors from nalora.py, in float64 and with fixed seeds.

    python data/vectors/make_vectors.py        seconds; README.md here tells the format

Numbers that are stored already and agree with the new ones within 1e-12 keep their bits.
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from nalora import (GateSums, NALoRA, NALoRAConfig, State, blend, decide,
                    inject_lora, lora_parameters, observe)

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
MARGIN = 1e-4  # least relative distance of importance at the cut: float32 must choose alike
FACES = ("gate_proj", "up_proj", "down_proj")

class UnluckySeed(Exception):
    """A choice that rounding could turn."""

# ---- gates: z and which tokens are real, step by step ------------------------
def gates_case(name, catches, config, shapes, width, activation="silu", change=None, ties=False):
    """Steps of passes of random gates. shapes: of each step, [(B, T), ...]; change(step, index, z,
    real) puts something special into a pass."""
    return {"name": name, "catches": catches, "config": config, "shapes": shapes, "width": width,
            "activation": activation, "change": change, "ties": ties}

def make_gates(case, seed, tensors):
    rng = torch.Generator().manual_seed(seed)
    config = NALoRAConfig(**case["config"])
    act = ACTIVATIONS[case["activation"]]
    width = case["width"]
    zero = torch.zeros(width, dtype=torch.float64)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    state = State(zero, zero == 0, nan, nan, torch.ones((), dtype=torch.float64))
    level = torch.randn(width, generator=rng, dtype=torch.float64)  # channels differ
    for step, shapes in enumerate(case["shapes"]):
        sums = GateSums(zero, *zero.new_zeros(4))
        for index, shape in enumerate(shapes):
            z = level + 1.5 * torch.randn(*shape, width, generator=rng, dtype=torch.float64)
            real = torch.ones(shape, dtype=torch.bool)
            if case["change"]:
                z = case["change"](step, index, z, real)
            number = torch.arange(real.numel()).view(shape)
            weight = (number % config.stride == step % config.stride) & real
            sums = sums + observe(act, z.flatten(0, 1), weight.flatten())
            tensors[f"{case['name']}/{step}/{index}/z"] = z
            tensors[f"{case['name']}/{step}/{index}/real"] = real.to(torch.uint8)
        state = decide(state, sums, config)
        if not case["ties"] and sums.tokens > 0:
            check_margin(state, config)
        for part in (sums, state):
            for key, t in part._asdict().items():
                tensors[f"{case['name']}/{step}/{key}"] = t.to(torch.uint8) if key == "mask" else t
    return {"steps": len(case["shapes"]), "passes": [len(s) for s in case["shapes"]]}

def check_margin(state, config):
    order = state.importance.sort(descending=True).values
    count = int(state.mask.sum())
    if config.mask != "none" and count < len(order):
        if (order[count - 1] - order[count]) / order[count - 1] < MARGIN:
            raise UnluckySeed
    if (torch.minimum(state.occupancy, 1 - state.occupancy) - 0.05).abs() < 1e-3:
        raise UnluckySeed

def pad_rows(step, index, z, real):
    """Row b of a pass has b tokens less; padding holds large numbers that nobody may count."""
    for row in range(len(real)):
        real[row, real.size(1) - row:] = False
    return torch.where(real[..., None], z, 50.0)

def poison(step, index, z, real):
    """A NaN in one gate of a real token, in the second pass of every other step, and in padding."""
    real[0, -1] = False
    z[0, -1] = torch.nan
    if index == 1 and step % 2 == 1:
        z[1, 2, 3] = torch.nan
    return z

def repeat_channels(step, index, z, real):
    """Channels in groups of four alike: ties, which the lower index wins."""
    return z[..., ::4].repeat_interleave(4, dim=-1)

def lower_and_lower(step, index, z, real):
    return z - 0.5 * step

def above_zero(step, index, z, real):
    return z.abs() + 0.3

def strongly_negative(step, index, z, real):
    """Most gates where kappa < 0, a few just above zero: k_hat < 0 in two regimes."""
    small = 0.02 * z.abs()
    return torch.where(z > 2.0, small, -2.2 - 0.3 * z.abs())

GATES = [
    gates_case("stride", "a stride that always begins at token 0, or sums of all tokens",
               {"stride": 17, "keep": 0.5}, [[(4, 32)]] * 6, 20),
    gates_case("microbatches", "numbering that runs on across the passes of a step, padding that "
               "has no number, padding that is counted, the sums of the last pass alone",
               {"stride": 5, "keep": 0.4}, [[(3, 13), (3, 13)]] * 5, 16, change=pad_rows),
    gates_case("few tokens", "a step that sees no token changes something",
               {"stride": 17, "keep": 0.3}, [[(2, 4)]] * 20, 12),
    gates_case("all positive", "a scale where one regime alone is seen",
               {"stride": 1, "keep": 0.5}, [[(2, 9)]] * 3, 12, change=above_zero),
    gates_case("crossing", "the 5 % of the partition: occupancy falls below it within the run",
               {"stride": 2, "keep": 0.5}, [[(4, 16)]] * 9, 16, change=lower_and_lower),
    gates_case("reversed", "k_hat below 0 and its clip: the scale is 2",
               {"stride": 1, "keep": 0.5}, [[(4, 16)]] * 3, 16, change=strongly_negative),
    gates_case("ties", "among equals the lower index comes first",
               {"stride": 1, "keep": 0.3}, [[(2, 8)]] * 3, 20, activation="relu",
               change=repeat_channels, ties=True),
    gates_case("ceil", "0.07 * 100 is above 7 in floats: seven channels move, not eight",
               {"stride": 1, "keep": 0.07}, [[(2, 8)]] * 2, 100),
    gates_case("ceil up", "the share of rows rounds up: 0.3 of 11 is four",
               {"stride": 1, "keep": 0.3}, [[(2, 8)]] * 2, 11),
    gates_case("slow average", "the moving average the wrong way round",
               {"stride": 1, "keep": 0.5, "ema": 0.8}, [[(2, 8)]] * 6, 14),
    gates_case("not a number", "a step with a sum that is not finite decides, all of it or but for "
               "a pass or a channel; a NaN in padding is seen",
               {"stride": 1, "keep": 0.5}, [[(3, 6), (3, 6)]] * 4, 12, change=poison),
    gates_case("gelu", "the derivative of SiLU where the model has GELU, the mean of kappa",
               {"stride": 3, "keep": 0.5}, [[(4, 16)]] * 4, 16, activation="gelu"),
    gates_case("relu", "k_hat of ReLU is 1", {"stride": 1, "keep": 0.5}, [[(4, 16)]] * 2, 16,
               activation="relu"),
    gates_case("mask off", "a mask that acts though it is off",
               {"stride": 1, "keep": 0.5, "mask": "none"}, [[(2, 8)]] * 2, 12),
    gates_case("scale off", "a scale that acts though it is off",
               {"stride": 1, "keep": 0.5, "scale": "none"}, [[(2, 8)]] * 2, 12),
]

# ---- blend: what it makes of a step (its cases are named "correct") ----------
def make_blend(name, scale, seed, tensors):
    rng = torch.Generator().manual_seed(seed)
    before = torch.randn(12, 3, generator=rng, dtype=torch.float64)
    after = before + 1e-2 * torch.randn(12, 3, generator=rng, dtype=torch.float64)
    mask = torch.rand(12, generator=rng) < 0.5
    scale = torch.tensor(scale, dtype=torch.float64)
    values = {"before": before, "after": after, "mask": mask.to(torch.uint8), "scale": scale,
              "gate_B": blend(before, after, (mask * scale)[:, None]),
              "others": blend(before, after, scale)}
    tensors.update({f"{name}/{key}": t for key, t in values.items()})

BLEND = {"correct 1": (1.0, "rows outside the mask keep their bits, the others the optimizer's"),
         "correct 0.78": (0.78, "the scale acts on all of A and B, the mask on B_gate alone"),
         "correct 2": (2.0, "a factor above 1 goes beyond the optimizer's step")}

# ---- traces: ten steps of training -------------------------------------------
TRACES = {
    "trace sgd": {"ffns": 1, "optimizer": {"name": "sgd", "lr": 0.05},
                  "config": {"stride": 3, "keep": 0.25},
                  "catches": "z without LoRA's update, A masked, too, a mask on A or up"},
    "trace adamw": {"ffns": 2, "optimizer": {"name": "adamw", "lr": 0.02, "beta1": 0.9,
                                             "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
                    "config": {"stride": 1, "keep": 0.5},
                    "catches": "a mask on the gradient: momentum and weight decay move the rows"},
}

class Residual(nn.Module):
    """FFNs one after the other, y = x + W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, ffns, width, hidden):
        super().__init__()
        self.ffns = nn.ModuleList()
        for _ in range(ffns):
            ffn = nn.Module()
            ffn.gate_proj = nn.Linear(width, hidden, bias=False)
            ffn.up_proj = nn.Linear(width, hidden, bias=False)
            ffn.down_proj = nn.Linear(hidden, width, bias=False)
            ffn.act_fn = nn.SiLU()
            self.ffns.append(ffn)

    def forward(self, x):  # (B, T, width)
        for ffn in self.ffns:
            x = x + ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x))
        return x

def torch_optimizer(parameters, o):
    if o["name"] == "sgd":
        return torch.optim.SGD(parameters, lr=o["lr"])
    return torch.optim.AdamW(parameters, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"],
                             weight_decay=o["weight_decay"])

def trace(case, tensors, name, dtype=torch.float64):
    """Trains on a case's tensors, or on given W, A, B, x and target; yields what each step left."""
    get = {key.removeprefix(f"{name}/"): t for key, t in tensors.items()}
    hidden, width = get["0/gate_proj/W"].shape
    rank = get["0/gate_proj/A"].shape[0]
    model = Residual(case["ffns"], width, hidden).to(dtype)
    inject_lora(model, list(FACES), rank, case["alpha"])
    model.to(dtype)
    with torch.no_grad():
        for i, ffn in enumerate(model.ffns):
            for face in FACES:
                layer = getattr(ffn, face)
                layer.base_layer.weight.copy_(get[f"{i}/{face}/W"])
                layer.lora_A.copy_(get[f"{i}/{face}/A"])
                layer.lora_B.copy_(get[f"{i}/{face}/B"])
    optimizer = torch_optimizer(lora_parameters(model), case["optimizer"])
    nalora = NALoRA(model, optimizer, NALoRAConfig(**case["config"]))
    for step in range(case["steps"]):
        error = model(get[f"{step}/x"].to(dtype)) - get[f"{step}/target"].to(dtype)
        (error * error).mean().backward()
        found = {f"{i}/{face}/grad_{part}": getattr(getattr(ffn, face), f"lora_{part}").grad.clone()
                 for i, ffn in enumerate(model.ffns) for face in FACES for part in "AB"}
        optimizer.step()
        optimizer.zero_grad()
        found |= {f"{i}/{face}/{part}": getattr(getattr(ffn, face), f"lora_{part}").detach().clone()
                  for i, ffn in enumerate(model.ffns) for face in FACES for part in "AB"}
        for i, ffn in enumerate(nalora.ffns):
            found |= {f"{i}/{key}": t for key, t in ffn.state._asdict().items()}
        yield found

def make_trace(name, case, seed, tensors):
    case |= {"kind": "trace", "alpha": 4, "rank": 2, "steps": 10, "activation": "silu",
             "config": asdict(NALoRAConfig(**case["config"]))}
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return std * torch.randn(*shape, generator=rng, dtype=torch.float64)

    width, hidden, rank = 8, 24, case["rank"]
    for i in range(case["ffns"]):
        for face in FACES:
            out, into = (width, hidden) if face == "down_proj" else (hidden, width)
            tensors[f"{name}/{i}/{face}/W"] = normal(out, into, std=0.3)
            tensors[f"{name}/{i}/{face}/A"] = normal(rank, into, std=0.3)
            tensors[f"{name}/{i}/{face}/B"] = normal(out, rank, std=0.2)
    for step in range(case["steps"]):
        tensors[f"{name}/{step}/x"] = normal(2, 11, width)
        tensors[f"{name}/{step}/target"] = normal(2, 11, width)
    for step, found in enumerate(trace(case, dict(tensors), name)):
        for key, t in found.items():
            tiny = "grad" in key and step == 0 and t.abs().min() < 2e-4  # Adam divides by it
            if tiny or not t.isfinite().all():
                raise UnluckySeed
            tensors[f"{name}/{step}/{key}"] = t.to(torch.uint8) if key.endswith("mask") else t
        for i in range(case["ffns"]):
            state = State(*(found[f"{i}/{key}"] for key in State._fields))
            check_margin(state, NALoRAConfig(**case["config"]))
    return case

# ---- all of them -------------------------------------------------------------
def lucky(make, *args):
    """make(*args, seed, tensors) with the first seed whose choices rounding cannot turn."""
    for seed in range(1000):
        tensors = {}
        try:
            return make(*args, seed, tensors), tensors
        except UnluckySeed:
            continue
    raise ValueError(f"No seed below 1000 serves {args[0]}.")

def make_all():
    """(content of vectors.json, tensors)."""
    cases = {}
    tensors = {}
    for case in GATES:
        sizes, made = lucky(make_gates, case)
        config = asdict(NALoRAConfig(**case["config"]))
        cases[case["name"]] = {"kind": "gates", "activation": case["activation"], **sizes,
                               "width": case["width"], "config": config, "catches": case["catches"]}
        tensors |= made
    for name, (scale, catches) in BLEND.items():
        make_blend(name, scale, 0, tensors)
        cases[name] = {"kind": "correct", "catches": catches}
    for name, case in TRACES.items():
        cases[name], made = lucky(make_trace, name, dict(case))
        tensors |= made
    about = {"format": 1, "tolerance": {"float64": 1e-10, "float32": 5e-5}, "cases": cases}
    return about, {key: t.contiguous() for key, t in tensors.items()}

def keep_stored(made, stored):
    """`made`, where a tensor agrees with the stored one with the bits of that: another PyTorch or
    another order of sums gives other last digits."""
    def same(key, t):
        old = stored.get(key, t.new_empty(0))
        return old.shape == t.shape and torch.allclose(old, t, 1e-12, 1e-12, equal_nan=True)
    return {key: stored[key] if same(key, t) else t for key, t in made.items()}

if __name__ == "__main__":
    about, tensors = make_all()
    path = HERE / "vectors.safetensors"
    tensors = keep_stored(tensors, load_file(path) if path.exists() else {})
    (HERE / "vectors.json").write_text(json.dumps(about, indent=1) + "\n")
    save_file(tensors, path)
    print(f"{len(about['cases'])} cases, {len(tensors)} tensors, {path.stat().st_size:,} bytes")
