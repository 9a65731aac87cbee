"""Step 6 of the lab: does it help? Your own `observe` and `decide` choose which rows of the gate
may move, and five other choices stand beside it.

    python course/step6.py --seed 7               your seat's number; about two minutes on two cores
    python course/step6.py --steps 10             does the laptop train? Half a minute
    python course/step6.py --optimizer sgd        to take home

Only the gates carry LoRA, one row in ten moves at a step, and no scale is used. If steps.py does
not pass the checks of step 5 yet, nalora.py's own functions run in their place."""
import argparse
import importlib
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

try:
    import torch

    import train_tiny
except ModuleNotFoundError as error:
    sys.exit(f"step6.py: {error.name} is not installed; course/README.md says how. Steps 1 to 5 do "
             "without it.")
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
# Learning rates of LoRA and of the others, as tuning chose them: evidence/results/keep-*
RATES = {"adamw": (0.015, 0.06), "sgd": (3.0, 6.0)}

def settings(choose, args):
    """The Config of one choice of rows. ValueError if --seed or --steps is out of range."""
    lora, others = RATES[args.optimizer]
    return train_tiny.Config(method="lora", seed=args.seed, steps=args.steps, test_size=0,
                             optimizer=args.optimizer, lr=others if choose else lora,
                             targets=("gate_proj",))

def train(c, choose, lab):
    """(validation loss, share of rows that moved at some time) of one choice of rows."""
    method = partial(steer, lab=lab, choose=choose) if choose else train_tiny.lora
    run = train_tiny.set_up(c, methods={"lora": method})
    for _ in train_tiny.training_loop(run):
        pass
    moved = torch.cat(list(run.nalora.moved.values())) if choose else torch.ones(1)
    return train_tiny.validate(run, c.steps), moved.float().mean().item()

def own_lab(name):
    """(the lab file as a module or None, a sentence on it)."""
    try:
        lab = importlib.import_module(name)
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
    parser.add_argument("--optimizer", default="adamw", choices=list(RATES))
    parser.add_argument("--file", default="steps", choices=["steps", "solutions"])
    args = parser.parse_args(argv)
    try:
        configs = {name: settings(choose, args) for name, choose in ROWS.items()}
    except ValueError as error:
        print(f"step6.py: {error}", file=sys.stderr)
        return 2
    lab, sentence = own_lab(args.file)
    print(f"seed {args.seed}, {args.steps} steps of {args.optimizer}. {sentence}\n")
    print(f"{'rows that move':24}validation loss   moved at some time", flush=True)
    for name, c in configs.items():
        loss, moved = train(c, ROWS[name], lab)
        print(f"{name:24}{loss:15.4f}{moved:18.0%}", flush=True)
    return 0

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
