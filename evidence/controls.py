"""NA-LoRA's controls: masks, scales and scores that answer the public review of the paper, or are
ours. Each is a row of a table below; `nalora.py` knows none of them.

    mask    derivative   the ceil(keep F) channels of largest importance: the method
            inverted     those of smallest importance
            shuffled     the derivative mask, dealt to other rows by a fixed permutation
            random       fixed random rows
            redrawn      random rows, drawn anew at every step
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
from nalora import (
    NALoRA,
    NALoRAConfig,
    importance_mask,
    step_scale,
    value_and_slope,
    widen,
)


def row_draw(seed, index, rows, step=0, device=None):
    """A number in [0, 1) for each row of FFN number `index`, (rows,): of seed, index and step
    alone, whatever the default dtype and device are."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * index + 1_000_000_007 * step)
    draw = torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu")
    return draw.to(device)


# ---- masks: functions of (nalora, stack) to bool (N, F) ------------------------------------------


def derivative(nalora, stack):
    return stack.state.mask


def inverted(nalora, stack):
    return importance_mask(-stack.state.importance, nalora.config.keep)


def shuffled(nalora, stack):
    return stack.state.mask.gather(-1, nalora.draws(stack).argsort(-1))


def random(nalora, stack):
    return importance_mask(nalora.draws(stack), nalora.config.keep)


def redrawn(nalora, stack):
    return importance_mask(nalora.draws(stack, nalora._steps), nalora.config.keep)


def every_row(nalora, stack):
    return torch.ones_like(stack.state.mask)


MASKS = {
    "derivative": derivative,
    "inverted": inverted,
    "shuffled": shuffled,
    "random": random,
    "redrawn": redrawn,
    "none": every_row,
}
BLIND_MASKS = ("random", "redrawn", "none")  # those that do not look at the gates


# ---- scales: functions of all homogeneity scales (FFNs,) -----------------------------------------


def own(scales):
    return scales


def mean_of_all(scales):
    return scales.mean().expand_as(scales).clone()


SCALES = {"homogeneity": own, "uniform": mean_of_all, "none": torch.ones_like}


# ---- scores: functions of (act, z, reach) to (N, T, F) -------------------------------------------


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


@dataclass(frozen=True)
class Config(train_tiny.Config):
    """train_tiny's, and the choices of the table above."""

    mask: str = "derivative"
    scale: str = "homogeneity"
    budget: str = "raw"
    score: str = "phi_prime"

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}."
                )
        if self.scale == "uniform" and self.budget == "neutral":
            raise ValueError(
                "scale='uniform' with budget='neutral' divides out to exactly 1: say scale='none'."
            )


class Control(NALoRA):
    """NALoRA with the mask, scale, budget and score of a Config (its seed draws random rows)."""

    def __init__(self, model, optimizer, c):
        super().__init__(model, optimizer, NALoRAConfig(c.keep, c.ema, c.stride))
        self.choices = c
        self.numbers = {}  # {(stack, i): number of the FFN}
        for stack in self._stacks:
            for i in range(len(stack.gates)):
                self.numbers[stack, i] = len(self.numbers)
        if c.mask == "random":
            self._set(mask=random)
        if c.score == "downstream":
            self._hook_features()

    def draws(self, stack, step=0):
        """A number per row of each FFN of the stack, (N, F)."""
        width = stack.state.mask.size(-1)
        return torch.stack(
            [
                row_draw(
                    self.choices.seed, self.numbers[stack, i], width, step, stack.state.mask.device
                )
                for i in range(len(stack.gates))
            ]
        )

    def _set(self, mask):
        for stack in self._stacks:
            stack.state = stack.state._replace(mask=mask(self, stack))

    def _decide(self):
        c = self.choices
        seen = [stack.sums.tokens > 0 for stack in self._stacks]
        before = [stack.state for stack in self._stacks]
        super()._decide()
        for stack, was_seen, old in zip(self._stacks, seen, before):
            new = MASKS[c.mask](self, stack)
            if c.mask != "redrawn":
                new = torch.where(was_seen[:, None], new, old.mask)
            stack.state = stack.state._replace(mask=new)
        homogeneity = [
            step_scale(stack.state.k_hat, stack.state.occupancy) for stack in self._stacks
        ]
        scales = SCALES[c.scale](torch.cat([s.to(homogeneity[0].device) for s in homogeneity]))
        if c.budget == "neutral" and c.scale != "none":
            scales = scales / scales.log().mean().exp()
        for stack, part in zip(self._stacks, scales.split([len(s) for s in homogeneity])):
            stack.state = stack.state._replace(scale=part.to(stack.state.scale))

    def _factors(self, state):
        if self.choices.budget != "neutral":
            return super()._factors(state)
        rows = state.mask.to(state.scale)
        rows = rows / rows.mean(-1, keepdim=True)
        return (state.scale[:, None] * rows)[..., None], state.scale

    def _observe(self, stack, z, weight):
        sums = super()._observe(stack, z, weight)
        if self.choices.score == "phi_prime":
            return sums
        counted = weight[..., None] > 0
        z = torch.where(counted, widen(z), 0)
        reach = None
        if self.choices.score == "downstream":
            parts = [self.features[stack, i] * self.norms[stack, i] for i in range(len(z))]
            reach = torch.where(counted, torch.stack(parts), 0)
        scores = SCORES[self.choices.score](stack.act, z, reach)  # (N, T, F)
        with torch.autocast(z.device.type, enabled=False):
            score = (weight.to(z.dtype)[..., None, :] @ scores).squeeze(-2)  # (N, F)
        finite = score.sum(-1, keepdim=True).isfinite() & (sums.tokens > 0)[:, None]
        return sums._replace(score=torch.where(finite, score, 0))

    def _count(self, stack, i, *sample):
        super()._count(stack, i, *sample)  # may add up the pass before, with its features
        if self.choices.score == "downstream":
            self.features[stack, i] = self.latest[stack, i]

    def _hook_features(self):
        """Samples |u| where the gates are sampled, for score="downstream"."""
        self.features = {}  # of the passes that `stack.samples` holds
        self.latest = {}  # of the last forward pass
        self.norms = {}
        for stack in self._stacks:
            for i, ffn in enumerate(stack.ffns):
                if not hasattr(ffn, "up_proj"):
                    raise ValueError(
                        "score='downstream' reads up_proj and down_proj, which this "
                        "FFN lacks: choose another score."
                    )
                down = getattr(ffn.down_proj, "base_layer", ffn.down_proj)
                self.norms[stack, i] = widen(down.weight.detach()).norm(dim=0)  # (F,)
                self._handles.append(ffn.up_proj.register_forward_hook(self._features(stack, i)))

    def _features(self, stack, i):
        @torch.compiler.disable
        def hook(linear, inputs, u):
            if linear.training and torch.is_grad_enabled():
                first = (self._steps - stack.seen["up", i]) % self.config.stride
                every = slice(first, None, self.config.stride)
                stack.seen["up", i] += u.shape[:-1].numel()
                self.latest[stack, i] = widen(u.detach().flatten(0, -2)[every]).abs()  # (T, F)

        return hook


def steered(model, c):
    """A method of train_tiny: LoRA, and a Control."""
    optimizer = train_tiny.lora(model, c)
    Control(model, optimizer, c)
    return optimizer


# What each method sets. Matched: the other masks to nalora-mask, uniform-scale to nalora-scale,
# nalora-shuffled and random-uniform to nalora.
PRESETS = {
    "nalora": {},
    "nalora-mask": {"scale": "none"},
    "nalora-scale": {"mask": "none"},
    "nalora-neutral": {"budget": "neutral"},
    "nalora-shuffled": {"mask": "shuffled"},
    "random-uniform": {"mask": "random", "scale": "uniform"},
    "uniform-scale": {"mask": "none", "scale": "uniform"},
    **{
        f"{mask}-mask": {"mask": mask, "scale": "none"}
        for mask in ("shuffled", "random", "redrawn", "inverted")
    },
}
METHODS = {**train_tiny.METHODS, **dict.fromkeys(PRESETS, steered)}  # and those of peers.py
set_up = partial(train_tiny.set_up, methods=METHODS)
