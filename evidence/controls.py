"""NA-LoRA's controls: masks, scales and scores that answer the public review of the paper, or are
ours. Each is a row of a table below; `nalora.py` knows none of them.

    mask    derivative   the ceil(keep F) channels of largest importance: the method
            inverted     those of smallest importance
            shuffled     the derivative mask, dealt to other rows by a fixed permutation
            random       fixed random rows
            redrawn      random rows, drawn anew at every step
            turns        the next ceil(keep F) rows in order, from the first again after the last
            credit       the rows of most credit: at every step a row earns credit in proportion to
                         its importance, together as many as move, and each that moves pays 1
            none         every row
    scale   homogeneity  1 / k_hat per FFN: the method
            uniform      the mean of these over FFNs, for all of them
            none         1
    budget  raw          as it is
            neutral      mask divided by its mean, scales by their geometric mean over FFNs: the
                         mean step stays LoRA's
    score   phi_prime    |phi'|, what the importance averages: the method
            rho_prime    |rho'|
            downstream   |phi' u| times the norm of W_down's column: how far a move of z reaches
"""
from dataclasses import dataclass
from functools import partial

import torch

import train_tiny
from data import problems
from evidence import other_base
from evidence.common import relative
from nalora import NALoRA, NALoRAConfig, importance_mask, step_scale, value_and_slope, widen

DATA = str(relative(problems.DATA))

def row_draw(seed, index, rows, step=0, device=None):
    """A number in [0, 1) for each row of FFN number `index`, (rows,): of seed, index and step
    alone, whatever the default dtype and device are."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * index + 1_000_000_007 * step)
    draw = torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu")
    return draw.to(device)

# ---- masks: functions of (control, ffn) to bool (F,) ---------------------------------------------

def derivative(control, ffn):
    return importance_mask(ffn.state.importance, control.config.keep)

def inverted(control, ffn):
    return importance_mask(-ffn.state.importance, control.config.keep)

def shuffled(control, ffn):
    return derivative(control, ffn)[control.draw(ffn).argsort()]

def random(control, ffn):
    return importance_mask(control.draw(ffn), control.config.keep)

def redrawn(control, ffn):
    return importance_mask(control.draw(ffn, control.steps), control.config.keep)

def turns(control, ffn):
    rows = torch.arange(len(ffn.state.mask), device=ffn.state.mask.device)
    count = importance_mask(ffn.state.importance, control.config.keep).sum()
    return (rows - control.steps * count) % len(rows) < count

def credit(control, ffn):
    mask, control.credit[ffn.name] = spend(control.credit[ffn.name], ffn.state.importance,
                                           control.config.keep)
    return mask

def spend(credit, importance, keep):
    """(mask, credit after it), (F,) each, of a step of `credit`; its sum stays."""
    importance = importance.to(credit)
    count = importance_mask(importance, keep).sum()
    even = torch.full_like(credit, 1 / len(credit))
    shares = torch.where(importance.sum() > 0, importance / importance.sum(), even)
    earned = credit + count * shares
    mask = importance_mask(earned, keep)
    return mask, earned - mask.to(credit)

def every_row(control, ffn):
    return torch.ones_like(ffn.state.mask)

MASKS = {"derivative": derivative, "inverted": inverted, "shuffled": shuffled, "random": random,
         "redrawn": redrawn, "turns": turns, "credit": credit, "none": every_row}
BLIND_MASKS = ("random", "redrawn", "turns", "none")    # those that do not look at the gates

# ---- scales: functions of all homogeneity scales (FFNs,) -----------------------------------------

def own(scales):
    return scales

def mean_of_all(scales):
    return scales.mean().expand_as(scales)

SCALES = {"homogeneity": own, "uniform": mean_of_all, "none": torch.ones_like}

# ---- scores: functions of (act, z, reach) to (T, F) ----------------------------------------------

def phi_prime(act, z, reach):
    return value_and_slope(act, z)[1].abs()

def rho_prime(act, z, reach):
    """|rho'(z)|; rho' = (phi' - rho) / z cancels near 0, so the score is taken beside it."""
    nearby = torch.where(z.abs() < 1e-3, 1e-3, z)
    phi, slope = value_and_slope(act, nearby)
    return ((slope - phi / nearby) / nearby).abs()

def downstream(act, z, reach):
    return value_and_slope(act, z)[1].abs() * reach

SCORES = {"phi_prime": phi_prime, "rho_prime": rho_prime, "downstream": downstream}
CHOICES = {"mask": MASKS, "scale": SCALES, "budget": ("raw", "neutral"), "score": SCORES}

# ---- the control ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config(train_tiny.Config):
    """train_tiny's, the choices of the table above, and the data."""
    base: str = str(relative(problems.BASE))
    data: str = DATA                        # folder like data/, or a JSON-lines file
    mask: str = "derivative"
    scale: str = "homogeneity"
    budget: str = "raw"
    score: str = "phi_prime"

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of "
                                 f"{', '.join(allowed)}.")
        if self.scale == "uniform" and self.budget == "neutral":
            raise ValueError("scale='uniform' with budget='neutral' divides out to exactly 1: say "
                             "scale='none'.")

class Control(NALoRA):
    """NALoRA with the mask, scale, budget and score of a Config (its seed draws random rows)."""
    def __init__(self, model, optimizer, c):
        super().__init__(model, optimizer, NALoRAConfig(c.keep, c.ema, c.stride))
        self.choices = c
        self.credit = {ffn.name: torch.zeros_like(ffn.state.importance, dtype=torch.float64)
                       for ffn in self.ffns}
        if c.mask == "random":              # from the first step on
            for ffn in self.ffns:
                ffn.state = ffn.state._replace(mask=random(self, ffn))
        if c.score == "downstream":
            self.inputs = {}                # {FFN: x of the pass that is being computed}
            for ffn in self.ffns:
                module = model.get_submodule(ffn.name)
                self.handles.append(module.register_forward_pre_hook(partial(self.keep_input, ffn)))

    def draw(self, ffn, step=0):
        """A random number for each row, (F,)."""
        rows = ffn.state.mask
        return row_draw(self.choices.seed, self.ffns.index(ffn), len(rows), step, rows.device)

    def decide(self, ffn):
        super().decide(ffn)
        if not ffn.state.k_hat.isnan():     # nothing seen yet: every row moves, as at the start
            ffn.state = ffn.state._replace(mask=MASKS[self.choices.mask](self, ffn))
        if ffn is [f for f in self.ffns if f.sums is not None][-1]:
            self.share_scales()             # all have decided

    def share_scales(self):
        c = self.choices
        homogeneity = [step_scale(ffn.state.k_hat, ffn.state.occupancy) for ffn in self.ffns]
        scales = SCALES[c.scale](torch.stack(homogeneity))      # (FFNs,)
        if c.budget == "neutral" and c.scale != "none":
            scales = scales / scales.log().mean().exp()
        for ffn, scale in zip(self.ffns, scales):
            ffn.state = ffn.state._replace(scale=scale)

    def state_dict(self):
        return {**super().state_dict(), "credit": dict(self.credit)}

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        self.credit = {name: t.to(self.credit[name]) for name, t in saved["credit"].items()}

    def row_factor(self, ffn):
        if self.choices.budget != "neutral":
            return super().row_factor(ffn)
        rows = ffn.state.mask.to(ffn.state.scale)
        return (ffn.state.scale * (rows / rows.mean()))[:, None]    # (F, 1)

    def observe(self, ffn, z, weight):
        sums = super().observe(ffn, z, weight)
        c = self.choices
        if c.score == "phi_prime":
            return sums
        counted = weight[:, None] > 0
        reach = torch.where(counted, self.reach(ffn), 0) if c.score == "downstream" else None
        scores = SCORES[c.score](ffn.act, torch.where(counted, z, 0), reach)    # (T, F)
        return sums._replace(score=(weight[:, None] * scores).sum(0))

    def keep_input(self, ffn, module, inputs):
        self.inputs[ffn] = module, inputs[0].detach()

    @torch.no_grad()
    def reach(self, ffn):
        """|u| times the norm of W_down's column, (T, F), of the tokens that `see` samples: up_proj
        may not have run yet, so u is computed from them."""
        module, x = self.inputs.pop(ffn)
        u = module.up_proj(x.flatten(0, -2)[self.steps % self.config.stride::self.config.stride])
        down = getattr(module.down_proj, "base_layer", module.down_proj)
        return widen(u).abs() * widen(down.weight).norm(dim=0)

def steered(model, c):
    """A method of train_tiny: LoRA, and a Control."""
    optimizer, _ = train_tiny.lora(model, c)
    return optimizer, Control(model, optimizer, c)

# What each method sets. Matched: the other masks to nalora-mask, uniform-scale to nalora-scale,
# nalora-shuffled and random-uniform to nalora.
PRESETS = {"nalora": {},
           "nalora-mask": {"scale": "none"},
           "nalora-scale": {"mask": "none"},
           "nalora-neutral": {"budget": "neutral"},
           "nalora-shuffled": {"mask": "shuffled"},
           "random-uniform": {"mask": "random", "scale": "uniform"},
           "uniform-scale": {"mask": "none", "scale": "uniform"},
           "shuffled-mask": {"mask": "shuffled", "scale": "none"},
           "random-mask": {"mask": "random", "scale": "none"},
           "redrawn-mask": {"mask": "redrawn", "scale": "none"},
           "turns-mask": {"mask": "turns", "scale": "none"},
           "credit-mask": {"mask": "credit", "scale": "none"},
           "inverted-mask": {"mask": "inverted", "scale": "none"}}
METHODS = {**train_tiny.METHODS, **dict.fromkeys(PRESETS, steered)}     # and those of peers.py
set_up = partial(train_tiny.set_up, methods=METHODS, load=other_base.load)
