"""Trains a tiny Llama on two-step word problems: full fine-tuning, LoRA or NA-LoRA.

    python train_tiny.py --method nalora              about a minute on a laptop; see runs/nalora
    python train_tiny.py --method all                 full, lora and nalora on the same batches
    python train_tiny.py --resume --out runs/nalora   goes on after an interruption, bit-identical
    python train_tiny.py --sample                     three test problems, answered by runs/nalora

Read it from the top: 1 data, 2 model, 3 methods, 4 the loop, 5 evaluation, 6 side by side. A run
is main -> start -> execute: set_up, train, test, save_results. What is below 6 may be skipped."""
import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # idle threads sleep soon; before torch loads

import torch

from data import problems, runs
from data.runs import best_device, draw_loss, save_model
from nalora import (Llama, LlamaConfig, NALoRA, NALoRAConfig, inject_lora, lora_parameters,
                    save_adapter)

# ---- settings ------------------------------------------------------------------------------------
# config.json of a run holds all of them. Those made with flag() are flags of the command line, too;
# start() fills in the device and the threads that are not given.

def flag(default, help, **more):
    return field(default=default, metadata={"help": help, **more})

@dataclass(frozen=True)
class Config:
    method: str = "nalora"
    base: str = flag(None, "base model, a folder (default: data/base)")
    train_size: int = flag(None, "train on the first N problems", metavar="N")
    test_size: int = flag(None, "test on the first N problems; 0: on none", metavar="N")
    seed: int = flag(0, "default: 0")
    device: str = flag("cpu", "default: the best there is", choices=["cpu", "cuda", "mps"])
    dtype: str = flag("float32", "of matrix products; weights stay float32 (default: float32)",
                      choices=["float32", "bfloat16"])
    threads: int = flag(1, "CPU threads (default: PyTorch's choice)")
    steps: int = flag(400, "default: 400; pretrain: 4000")
    batch_size: int = flag(16, "default: 16")
    eval_every: int = flag(50, "steps between records (default: 50; pretrain: 250)")
    optimizer: str = "adamw"                # or "sgd"
    lr: float = flag(5e-3, "peak learning rate (default: 5e-3; full: 2e-3; pretrain: 3e-3)")
    warmup: float = 0.03                    # share of the steps
    weight_decay: float = 0.0               # of matrices
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0                   # of SGD
    grad_clip: float = 1.0
    rank: int = flag(8, "of LoRA (default: 8)")
    alpha: float = flag(16.0, "the update is scaled by alpha / rank (default: 16)")
    targets: tuple = flag(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "down_proj"), "linear layers with LoRA (default: all seven of a block)")
    keep: float = flag(NALoRAConfig.keep, "share of gate rows that move in NA-LoRA (default: 0.5)")
    ema: float = NALoRAConfig.ema           # decay of the running mean of a row's importance
    stride: int = NALoRAConfig.stride       # NA-LoRA looks at every stride-th token

    def __post_init__(self):
        runs.check_ranges(self)

DEFAULTS = {"full": {"lr": 2e-3}, "pretrain": {"lr": 3e-3, "steps": 4000, "eval_every": 250,
                                               "weight_decay": 0.1, "beta2": 0.95}}

# ---- 1 data --------------------------------------------------------------------------------------
# 1,500 word problems to train on, each with its worked solution. The model reads a problem and
# learns the solution that follows it. A batch is three tensors of shape (B, T); one row, in words:
#     tokens      <end> Ann has 2 keys. ... ?  2 + 2 = 4 .  <pad>
#     targets     -100  -100  ...       2  + 2 = 4 . <end>  -100    the next token; -100: not learnt
#     token_mask  True  True  ...                     True  False   False: padding
# data/problems.py shows the same in token ids; its load() reads all data.

# ---- 2 model -------------------------------------------------------------------------------------
# A Llama of 0.87 M parameters in float32; nalora.py, part 4, has its code. `pretrain` begins with
# random weights and makes a base model from stories and equations. It solves no word problem yet.

TINY = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True}

def load_model(c):
    """The model of a run. ValueError if --base is none that this script takes."""
    if c.method == "pretrain":
        return Llama(LlamaConfig(**TINY))
    folder = Path(c.base or problems.BASE)
    runs.check_base(folder)
    return Llama.from_pretrained(folder)

# ---- 3 methods -----------------------------------------------------------------------------------
# A method says which parameters train. It is a function of (model, c) that returns two things: the
# optimizer, and the NALoRA that corrects its steps, or None. LoRA adds two small matrices, A and B,
# to each linear layer. NA-LoRA (nonlinearity-aware) trains the same A and B: by hooks it watches
# how each gate of a feed-forward network responds, and after the optimizer's step it puts back the
# rows of the gate's B that respond least (mask), and shortens or lengthens all else (scale).

def full(model, c):
    return make_optimizer(list(model.parameters()), c), None

def lora(model, c):
    inject_lora(model, c.targets, c.rank, c.alpha)      # freezes the model and adds A and B
    return make_optimizer(lora_parameters(model), c), None

def nalora(model, c, **parts):
    optimizer, _ = lora(model, c)
    config = NALoRAConfig(keep=c.keep, ema=c.ema, stride=c.stride, **parts)
    return optimizer, NALoRA(model, optimizer, config)  # this line turns LoRA into NA-LoRA

METHODS = {"pretrain": full, "full": full, "lora": lora, "nalora": nalora,
           "nalora-mask": partial(nalora, scale="none"),    # only the mask
           "nalora-scale": partial(nalora, mask="none")}    # only the scale

def make_optimizer(parameters, c):
    """AdamW, or SGD; only matrices decay. parameters: a list of them, or groups as torch has."""
    groups = parameters
    if not isinstance(parameters[0], dict):
        groups = [{"params": [p for p in parameters if p.dim() == 2]},
                  {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    options = {"lr": c.lr, "weight_decay": c.weight_decay, "fused": True}
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=c.momentum, **options)
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), **options)

def set_up(c, methods=METHODS, load=problems.load):
    """Data, model and method of a run together. ValueError if they do not fit. evidence/ gives more
    methods, and another `load`, which reads the data for another tokenizer."""
    torch.manual_seed(c.seed)                           # LoRA's A, or a new model, is drawn from it
    device = best_device(c.device)
    model = load_model(c).to(device)
    data = load(c, model.config)
    optimizer, steering = methods[c.method](model, c)
    return SimpleNamespace(
        **data, config=c, model=model, optimizer=optimizer, nalora=steering, device=device,
        trainable={name: p for name, p in model.named_parameters() if p.requires_grad},
        autocast=torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16"),
        settings=runs.as_saved(c),                      # what config.json holds
        digest=runs.digest(c, data["files"]))           # a resumed run must find them unchanged

# ---- 4 the loop ----------------------------------------------------------------------------------
# The same for every method: a batch, its loss, one step. batches(step) depends on the seed and the
# step alone, so that a resumed run, and every method of a comparison, sees the same batches.

def training_loop(run, first=0):
    """All of training from step `first` on: yields each step's loss, in nats per target token."""
    c = run.config
    for step in range(first, c.steps):
        tokens, targets, token_mask = (t.to(run.device) for t in run.batches(step))     # (B, T)
        for group in run.optimizer.param_groups:        # initial_lr: its peak, kept at step 0
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(c, step)
        if run.nalora:
            run.nalora.token_mask = token_mask          # so that NA-LoRA leaves out the padding
        run.model.train()                               # validate() has set eval mode
        with run.autocast:                              # bfloat16 products, if asked for
            _, loss = run.model(tokens, targets)        # mean over the targets, which are shifted
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), c.grad_clip)
        check_finite(loss.item() + norm.item(), "loss or its gradient", step + 1)
        run.optimizer.step()                            # NA-LoRA's hook then corrects this step
        run.optimizer.zero_grad()
        yield loss.item()

def schedule(c, step):
    """Share of the learning rate at a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(c.warmup * c.steps))
    done = max(0, step - warmup) / max(1, c.steps - warmup)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))

class Diverged(ValueError):
    """Ends a run whose loss is no longer finite."""

def check_finite(value, name, step):
    if not math.isfinite(value):
        raise Diverged(f"The {name} is not finite at step {step}: try a smaller --lr.")

def train(run, out, records):
    """Trains on from where `records` end. Returns (all records, seconds of each step)."""
    c = run.config
    if not records:
        records = [{"step": 0, "val_loss": validate(run, 0)}]
        print(runs.progress(records[0], c.steps), flush=True)
    first = records[-1]["step"]
    before = runs.states(run) if first else None        # NA-LoRA's, to tell how the mask changes
    losses = []
    times = []
    start = time.perf_counter()
    for step, loss in enumerate(training_loop(run, first), first + 1):
        times.append(time.perf_counter() - start)
        losses.append(loss)
        if step % c.eval_every == 0 or step == c.steps:
            mean = sum(losses) / len(losses)            # since the last record
            losses = []
            records.append({"step": step, "loss": mean, "val_loss": validate(run, step)})
            if run.nalora:
                records[-1]["layers"] = runs.layer_records(runs.states(run), before)
                before = runs.states(run)
            runs.save_checkpoint(run, out, records)
            left = sum(times) / len(times) * (c.steps - step)
            print(f"{runs.progress(records[-1], c.steps)}  {left:4.0f} s left", flush=True)
        start = time.perf_counter()                     # what stands above is not timed
    return records, times

# ---- 5 evaluation --------------------------------------------------------------------------------
# During training, each record holds the losses and what NA-LoRA saw in each feed-forward network;
# the first record is of the base model. At the end: how many test problems greedy decoding solves.

def validate(run, step):
    run.model.eval()
    with run.autocast:
        loss = problems.mean_loss(run.model, run.validation)
    check_finite(loss, "validation loss", step)
    return loss

def test(run):
    """Shares of held-out equations and of test problems that are right. Shows three problems."""
    run.model.eval()
    equations = problems.arithmetic_accuracy(run.model, run.tokenizer, run.equations)
    exact, texts = problems.exact_match(run.model, run.tokenizer, run.problems, run.max_new)
    for problem, text in zip(run.problems[:3], texts):
        right = problems.is_right(problem, text)
        verdict = "right" if right else f"wrong, {problem['answer']} was asked for"
        print(f"\n  {problem['prompt'].strip()}\n  {text}   [{verdict}]")
    if run.problems:
        print(f"\n{run.config.method}: exact match {exact:.3f} on {len(run.problems)} test "
              f"problems, held-out equations right {equations:.3f}")
    return {"arithmetic_accuracy": equations, "test_exact_match": exact}

# ---- 6 side by side ------------------------------------------------------------------------------
# `--method all`: three methods, one after the other on the same batches, and one table.

COMPARED = ("full", "lora", "nalora")

def run_all(configs, settings, out, resume):
    for c in configs.values():
        set_up(c)                                       # all are checked before the first trains
    runs.claim(out, settings, resume)
    summaries = {method: execute(c, out / method, resume) for method, c in configs.items()}
    runs.print_table(summaries)
    runs.write_json(out / "summary.json", {"runs": summaries})
    records = {method: runs.read_records(out / method) for method in configs}
    runs.draw(draw_loss, records, out / "loss.png")

# ---- one run, from its settings to its summary ---------------------------------------------------
# data/runs.py has what this needs and a reader does not: files, checkpoints, figures.

def save_results(run, out):
    """The trained weights: model/ where all trains, else adapter/. Returns the file."""
    if run.config.method in ("pretrain", "full"):
        half = torch.float16 if run.config.method == "pretrain" else None
        save_model(run.model, out / "model", half)      # a Hugging Face checkpoint
        return out / "model" / "model.safetensors"
    save_adapter(run.model, out / "adapter", base_model=run.config.base or problems.BASE)
    return out / "adapter" / "adapter_model.safetensors"

def execute(c, out, resume=False):
    """One run from its Config to summary.json, which is returned. ValueError before anything is
    written if the run cannot be."""
    began = time.perf_counter()
    run = set_up(c)
    runs.claim(out, run.settings, resume)               # from here on the folder is this run's
    records = runs.load_checkpoint(run, out) if resume else []
    if records and (out / "summary.json").exists():
        print(f"{out} is finished already: {(out / 'summary.json').read_text()}")
        runs.draw_figures(c.method, records, out)       # those that are missing
        return runs.read_json(out / "summary.json")
    print(f"{runs.describe(run)}; results in {out}", flush=True)
    records, times = train(run, out, records)
    shares = test(run)
    file = save_results(run, out)
    summary = {"method": c.method, "seed": c.seed, "val_loss": records[-1]["val_loss"], **shares,
               **runs.count_parameters(run), "file_bytes": file.stat().st_size,
               "digest": run.digest, **runs.machine(),
               "step_ms": 1000 * statistics.median(times) if times else None,
               "train_seconds": sum(times), "wall_seconds": time.perf_counter() - began}
    runs.write_json(out / "summary.json", summary)      # before the figures: they may fail
    runs.draw_figures(c.method, records, out)
    print(f"validation loss {summary['val_loss']:.4f}; {sum(times):.0f} s of training, "
          f"{summary['wall_seconds']:.0f} s in all; written to {out}")
    return summary

# ---- the command line ----------------------------------------------------------------------------
# Bad input ends with exit code 2 and one sentence, before anything is written.

def command_line():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python train_tiny.py [FLAG VALUE]...",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=[*METHODS, "all"], help="default: nalora")
    add("--out", type=Path, help="folder of results (default: runs/METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    add("--sample", nargs="?", const="", metavar="PROMPT", help="ask the run in --out; see above")
    for f in fields(Config):
        if f.metadata:
            several = {"type": str, "nargs": "+"} if f.type is tuple else {"type": f.type}
            add(runs.dashed(f.name), **several, **f.metadata)
    return parser

NO_EFFECT = {"pretrain": "base train_size rank alpha targets keep", "lora": "keep",
             "full": "rank alpha targets keep", "nalora-scale": "keep"}     # flags, of a method

def start(args, given, out):
    """Does what the command line says: answers, or trains one method or all three."""
    method = given.get("method", "nalora")
    idle = [runs.dashed(name) for name in NO_EFFECT.get(method, "").split() if name in given]
    if idle:
        raise ValueError(f"{idle[0]} has no effect with --method {method}: leave it out.")
    if args.sample is not None:
        return runs.sample(out, runs.read_run(out, Config), args.sample)
    if args.resume and (runs.begun(out) or "method" not in given):      # else --resume begins it
        given = {**runs.read_run(out, Config), **runs.check_same(out, given)}
        method = given["method"]
    elif not args.resume and any(out.glob("*")):
        runs.refuse_taken(out)
    settings = {"method": method, "threads": torch.get_num_threads(), **given}
    settings["device"] = best_device(given.get("device"))
    methods = COMPARED if method == "all" else [method]
    configs = {m: Config(**{**DEFAULTS.get(m, {}), **settings, "method": m}) for m in methods}
    torch.set_num_threads(settings["threads"])
    if method == "all":
        return run_all(configs, settings, out, args.resume)
    return execute(configs[method], out, args.resume)

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used; 130 at Ctrl-C."""
    args = command_line().parse_args(argv)
    flags = {f.name: getattr(args, f.name, None) for f in fields(Config)}
    given = {name: value for name, value in flags.items() if value is not None}
    out = args.out or Path("runs") / given.get("method", "nalora")
    try:
        start(args, given, out)
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        text = " ".join(str(e).split())                 # one line
        if isinstance(e, MemoryError) or "out of memory" in text or "can't allocate" in text:
            text = "The memory does not suffice: try a smaller --batch-size."
        elif isinstance(e, RuntimeError):
            raise                                       # a bug of this program
        print(f"train_tiny.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = f": python train_tiny.py --resume --out {out} goes on from the last record"
        print(f"\nInterrupted{how if runs.begun(out) else ''}.", file=sys.stderr)
        return 130

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)                  # a notebook's; figures here need none
    sys.stdout.reconfigure(errors="backslashreplace")   # a terminal that cannot print a text
    sys.exit(main())
