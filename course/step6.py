"""Step 6 of the lab: does it help? Your own `observe` and `decide` choose which rows of the gate
may move, and five other choices stand beside it.

    python course/step6.py --seed 7               your seat's number; about two minutes on two cores
    python course/step6.py --steps 10             does the laptop train? Some seconds

Only the gates carry LoRA, one row in ten moves at a step, and no scale is used. If steps.py does
not pass the checks of step 5 yet, nalora.py's own functions run in their place."""
import argparse
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch

import train_tiny
import vectors
from nalora import NALoRA, NALoRAConfig, State, importance_mask

KEEP = 0.1

# ---- which rows move: functions of (steered, ffn), after `decide`, to bool (F,) ------------------

def responsive(steered, ffn):
    return ffn.state.mask

def shuffled(steered, ffn):
    return ffn.state.mask[steered.draw(ffn).argsort()]

def fixed(steered, ffn):
    return importance_mask(steered.draw(ffn), KEEP)

def redrawn(steered, ffn):
    return importance_mask(steered.draw(ffn, steered.steps), KEEP)

def unresponsive(steered, ffn):
    return importance_mask(-ffn.state.importance, KEEP)

class Steered(NALoRA):
    """NALoRA with `observe` and `decide` of a lab file, if there is one; `choose` then replaces the
    mask."""
    def __init__(self, model, optimizer, seed, lab, choose):
        super().__init__(model, optimizer, NALoRAConfig(keep=KEEP, scale="none"))
        self.seed = seed
        self.lab = lab
        self.choose = choose
        self.own = {ffn: lab.start(len(ffn.B_gate)) for ffn in self.ffns if lab}
        self.moved = {ffn: torch.zeros_like(ffn.state.mask) for ffn in self.ffns}

    def draw(self, ffn, step=0):
        """A random number for each row, (F,), of seed, FFN and step alone."""
        key = self.seed + 1_000_003 * self.ffns.index(ffn) + 1_000_000_007 * step
        return torch.rand(len(ffn.B_gate), generator=torch.Generator().manual_seed(key))

    def observe(self, ffn, z, weight):
        if not self.lab:
            return super().observe(ffn, z, weight)
        return self.lab.observe("silu", z.double().numpy(), weight.double().numpy())

    def decide(self, ffn):
        if self.lab:
            self.own[ffn] = self.lab.decide(self.own[ffn], ffn.sums, asdict(self.config))
            ffn.state = State(**{key: torch.as_tensor(t) for key, t in self.own[ffn].items()})
        else:
            super().decide(ffn)
        ffn.state = ffn.state._replace(mask=self.choose(self, ffn))
        self.moved[ffn] |= ffn.state.mask

def steer(model, c, lab, choose):
    """A method of train_tiny: LoRA, and which of its rows move."""
    optimizer, _ = train_tiny.lora(model, c)
    return optimizer, Steered(model, optimizer, c.seed, lab, choose)

# ---- six runs on the same batches ----------------------------------------------------------------

ROWS = {"all: LoRA": None, "the most responsive": responsive, "these, shuffled": shuffled,
        "random, fixed": fixed, "random, redrawn": redrawn, "the least responsive": unresponsive}
RATES = {"all: LoRA": 0.015}  # as tuning chose them in evidence/results/keep-adamw
RATE = 0.06

def run(name, seed, steps, lab):
    """(validation loss, share of rows that moved at some time) of one choice of rows."""
    choose = ROWS[name]
    method = partial(steer, lab=lab, choose=choose) if choose else train_tiny.lora
    c = train_tiny.Config(method="lora", seed=seed, steps=steps, targets=("gate_proj",),
                          lr=RATES.get(name, RATE), test_size=0)
    trained = train_tiny.set_up(c, methods={"lora": method})
    for _ in train_tiny.training_loop(trained):
        pass
    moved = [t.float().mean() for t in trained.nalora.moved.values()] if choose else [torch.ones(1)]
    return train_tiny.validate(trained, steps), float(sum(moved) / len(moved))

def own_lab(name):
    """(the lab file as a module or None, a sentence on it)."""
    try:
        lab = __import__(name)
        wrong = vectors.failures(lab, only=["gates"])
    except Exception:
        wrong = True
    if wrong:
        return None, f"{name}.py does not pass step 5 yet: nalora.py's own functions choose."
    return lab, f"`observe` and `decide` of {name}.py choose the rows."

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    args = parser.parse_args(argv)
    lab, sentence = own_lab(os.environ.get("LAB", "steps"))
    print(f"seed {args.seed}, {args.steps} steps. {sentence}\n", flush=True)
    print(f"{'rows that move':24}validation loss   moved at some time")
    for name in ROWS:
        loss, moved = run(name, args.seed, args.steps, lab)
        print(f"{name:24}{loss:15.4f}{moved:18.0%}", flush=True)
    return 0

if __name__ == "__main__":
    sys.exit(main())
