"""Trains the tiny Llama of data/base on two-step word problems: full fine-tuning, LoRA or NA-LoRA.

    python train_tiny.py --method nalora            about a minute on a laptop; see runs/nalora
    python train_tiny.py --method all               full, lora and nalora on the same batches
    python train_tiny.py --method nalora --resume   goes on after an interruption, to the same bits
    python train_tiny.py --sample "Ann has 3 apples. She buys 4. How many apples does Ann have?"
"""
# To read: settings, methods, the training loop, data, evaluation. Below them is what a run needs
# besides: checkpoints, figures, the command line.

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads sleep soon; set before torch loads

import torch
from torch.nn.parallel import DistributedDataParallel

from data import problems
from data.problems import DATA, digest, read_splits, tokenizer_of
from nalora import (Llama, LlamaConfig, NALoRA, NALoRAConfig, inject_lora, load_adapter,
                    lora_parameters, read_json, refuse, save_adapter, write_files)

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # of torchrun
TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True}

# ---- a run's settings ----------------------------------------------------------------------------

def flag(default, help, **more):
    """A setting that the command line has, too."""
    return field(default=default, metadata={"help": help, **more})

@dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on, but for the machine; config.json holds it."""
    method: str = "nalora"
    data: str = flag(str(DATA), "folder like data/, or a JSON-lines file of prompt and completion")
    base: str = flag(str(DATA / "base"), "checkpoint folder of the base model (default: base/ of "
                     "the data)")
    train_size: int = flag(None, "train on the first N problems", metavar="N")
    test_size: int = flag(None, "test on the first N problems; 0: on none", metavar="N")
    seed: int = flag(0, "default: 0")
    device: str = flag("cpu", "default: the best there is", choices=["cpu", "cuda", "mps"])
    dtype: str = flag("float32", "of matrix products (default: float32)",
                      choices=["float32", "bfloat16"])      # by autocast; weights stay float32
    threads: int = flag(1, "CPU threads (default: PyTorch's choice)")
    ranks: int = 1                          # processes that torchrun started
    steps: int = flag(400, "default: 400; pretrain: 4000")
    batch_size: int = flag(16, "default: 16")
    eval_every: int = flag(50, "steps between records (default: 50; pretrain: 250)")
    optimizer: str = "adamw"
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
    ema: float = NALoRAConfig.ema
    stride: int = NALoRAConfig.stride

    def __post_init__(self):
        def check(names, low, high, words):
            for name in names.split():
                value = getattr(self, name)
                refuse(value is not None and not low <= value < high,
                       f"{dashed(name)} is {value}: give a number {words}.")

        least = math.ulp(0)                 # the smallest number above zero
        check("steps batch_size eval_every grad_clip lr alpha train_size", least, math.inf,
              "above zero")
        check("seed weight_decay test_size", 0, 2**62, "that is not negative and not that large")
        check("threads", 1, 1025, "from 1 to 1024")
        check("warmup beta1 beta2 momentum", 0, 1, "in [0, 1)")
        refuse(self.batch_size % self.ranks, f"--batch-size {self.batch_size} cannot be shared "
               f"evenly by {self.ranks} ranks: give a multiple of {self.ranks}.")

def dashed(name):
    return "--" + name.replace("_", "-")

DEFAULTS = {"full": {"lr": 2e-3}, "pretrain": {"lr": 3e-3, "steps": 4000, "eval_every": 250,
                                               "weight_decay": 0.1, "beta2": 0.95}}

# ---- the methods: each takes a model and gives the optimizer that trains it ----------------------

def full(model, c):
    return make_optimizer(list(model.parameters()), c)

def lora(model, c):
    inject_lora(model, c.targets, c.rank, c.alpha)
    return make_optimizer(lora_parameters(model), c)

def nalora(model, c, **parts):
    optimizer = lora(model, c)
    config = NALoRAConfig(keep=c.keep, ema=c.ema, stride=c.stride, **parts)
    NALoRA(model, optimizer, config)        # the whole difference between LoRA and NA-LoRA
    return optimizer                        # its steps are corrected now; see optimizer.nalora

METHODS = {"pretrain": full, "full": full, "lora": lora, "nalora": nalora,
           "nalora-mask": partial(nalora, scale="none"),
           "nalora-scale": partial(nalora, mask="none")}

def make_optimizer(parameters, c):
    """AdamW, or SGD; matrices alone decay. parameters: a list of them, or groups as torch has."""
    groups = parameters
    if not isinstance(parameters[0], dict):
        others = [p for p in parameters if p.dim() != 2]
        groups = [{"params": [p for p in parameters if p.dim() == 2]}]
        groups += [{"params": others, "weight_decay": 0.0}] if others else []
    options = {"lr": c.lr, "weight_decay": c.weight_decay, "fused": True}
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=c.momentum, **options)
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), **options)

# ---- the training loop ---------------------------------------------------------------------------

def training_loop(run, first=0):
    """All of training: yields the loss, nats per target token, after every optimizer step."""
    c = run.config
    optimizer = run.optimizer
    run.model.train()
    for step in range(first, c.steps):
        batch = run.batches(step)
        tokens, targets, token_mask = (t[RANK::c.ranks].to(run.device) for t in batch)      # (B, T)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(c, step)
        if hasattr(optimizer, "nalora"):
            optimizer.nalora.token_mask = token_mask        # optional: padding is not observed
        with run.autocast:
            _, loss = run.forward(tokens, targets)
        loss = loss * share_of_rank(c, targets, batch[1])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), c.grad_clip)
        if not math.isfinite(loss.item() + norm.item()):
            raise Diverged(f"The loss or its gradient is not finite at step {step + 1}: training "
                           "stops there; try a smaller --lr.")
        optimizer.step()        # with NA-LoRA its hooks then put rows back and scale the step
        optimizer.zero_grad()
        yield mean_over_ranks(c, loss.detach())

def schedule(c, step):
    """Share of the learning rate at a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(c.warmup * c.steps))
    done = max(0, step - warmup) / max(1, c.steps - warmup)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))

class Diverged(ValueError):
    """The loss of a run is not finite."""

def share_of_rank(c, targets, all_targets):
    """What a rank's loss is multiplied by, so that their mean is the mean over all targets."""
    return (targets != -100).sum() * c.ranks / (all_targets != -100).sum() if c.ranks > 1 else 1

def mean_over_ranks(c, loss):
    if c.ranks > 1:
        torch.distributed.all_reduce(loss)
    return loss.item() / c.ranks

def set_up(c, methods=METHODS):
    """What a run trains with, from its Config: model, optimizer, tokenizer, batches, validation,
    problems, equations, ... Writes nothing; ValueError where data, base and settings do not fit
    together. methods: evidence/ has more of them."""
    torch.manual_seed(c.seed)
    run = SimpleNamespace(config=c, device=torch.device(c.device))
    run.autocast = torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")
    if c.method == "pretrain":
        vocab_size = problems.load_tokenizer(c.data).n_vocab
        run.model = Llama(LlamaConfig(vocab_size=vocab_size, **TINY)).to(run.device)
    else:
        run.model = Llama.from_pretrained(c.base).to(run.device)
    problem_data(run)
    run.optimizer = methods[c.method](run.model, c)
    for group in run.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    run.trainable = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    run.forward = DistributedDataParallel(run.model) if c.ranks > 1 else run.model
    return run

def problem_data(run):
    """Puts into the run what data/problems.py reads: tokenizer, batches, validation, problems and
    equations. ValueError where data and model do not fit together."""
    c = run.config
    data = Path(c.data)
    model = run.model.config
    run.tokenizer = tokenizer_of(c.base, data, model.vocab_size)
    end = run.tokenizer.eot_token
    splits = read_splits(data)
    encoded, run.max_new = problems.encode_splits(run.tokenizer, splits, data,
                                                  model.max_position_embeddings)
    train = encoded["train"][:c.train_size]
    size = min(c.batch_size, len(train))
    refuse(size % c.ranks, f"{size} problems cannot be shared evenly by {c.ranks} ranks.")
    run.batches = problems.problem_batches(train, size, c.seed, end)
    run.validation = problems.in_order(encoded["val"], end)
    run.problems = splits["test"][:c.test_size]
    run.equations = problems.read_equations(data)[:c.test_size]
    endings = {p["prompt"][len(p["prompt"].rstrip()):] for p in splits["train"]}
    run.ending = endings.pop() if len(endings) == 1 else None   # what every prompt ends with
    if c.method == "pretrain":
        windows = problems.text_windows(run.tokenizer, data / "pretrain_val.txt")       # (N, 129)
        run.validation = [(windows[:, :-1], windows[:, 1:], None)]
        run.batches = problems.text_batches(run.tokenizer, data / "pretrain.txt", c.batch_size,
                                            c.seed)

# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def mean_loss(model, batches):
    """Cross-entropy in nats per target token over a list of batches."""
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for tokens, targets, _ in batches:
        n = (targets != -100).sum().item()
        total += n * model(tokens.to(device), targets.to(device))[1].item()
        count += n
    return total / count

def validate(run):
    run.model.eval()
    with run.autocast:
        loss = mean_loss(run.model, run.validation)
    run.model.train()
    return loss

def judge(run):
    """(share of held-out equations right, share of test problems right, what was answered to the
    test problems) of the trained model; None where no test problems were asked for."""
    if not run.problems:
        return None, None, []
    run.model.eval()
    equations = problems.arithmetic_accuracy(run.model, run.tokenizer, run.equations)
    return equations, *problems.exact_match(run.model, run.tokenizer, run.problems, run.max_new)

# ---- one run: train, keep what is needed to go on, judge, draw -----------------------------------

def train(run, out, state):
    """Trains from a checkpoint's {"step", "records"} to the last step; writes checkpoint.pt and
    metrics.jsonl in `out` at every record. Returns (records, seconds of each step)."""
    c = run.config
    tool = getattr(run.optimizer, "nalora", None)
    records = state["records"]
    first = state["step"]
    if not first and c.eval_every <= c.steps:
        records.append({"step": 0, "val_loss": validate(run)})
    before = tool.statistics() if tool and first else None
    losses = []
    times = []
    start = began = time.perf_counter()
    for step, loss in enumerate(training_loop(run, first), first + 1):
        times.append(time.perf_counter() - start)
        losses.append(loss)
        if step % c.eval_every == 0 or step == c.steps:
            record = {"step": step, "loss": sum(losses) / len(losses), "val_loss": validate(run)}
            losses = []
            if not math.isfinite(record["val_loss"]):
                raise Diverged(f"The validation loss is not finite at step {step}: training stops "
                               "there; try a smaller --lr.")
            if tool:
                now = tool.statistics()
                record["layers"] = {name: layer_record(s, before and before[name])
                                    for name, s in now.items()}
                before = now
            records.append(record)
            if RANK == 0:
                save_checkpoint(run, out, step, records)
            left = (time.perf_counter() - began) / (step - first) * (c.steps - step)
            print(f"{progress(record, c.steps)}  {left:4.0f} s left", flush=True)
        start = time.perf_counter()
    if RANK == 0:
        write_files(out, {"metrics.jsonl": json_lines(records)})    # a kill may have come before
    return records, times
def layer_record(now, before):
    """What metrics.jsonl keeps of an FFN's NA-LoRA statistics. density: share of B_gate's rows that
    move; turnover: share of the mask that changed since the last record, None at the first."""
    record = {key: now[key] if math.isfinite(now[key]) else None
              for key in ("k_hat", "occupancy", "scale")}
    changed = before and (now["mask"] != before["mask"]).float().mean().item()
    return {**record, "density": now["mask"].float().mean().item(), "turnover": changed}

def progress(record, steps):
    """A line such as "step 50/400  loss 0.68  val_loss 0.12  k_hat 0.98 to 1.06 ..."."""
    line = (f"step {record['step']:4d}/{steps}  loss {record['loss']:.4f}  "
            f"val_loss {record['val_loss']:.4f}")
    if "layers" in record:
        layers = record["layers"].values()
        for key in ("k_hat", "scale"):
            values = [layer[key] for layer in layers if layer[key] is not None] or [math.nan]
            line += f"  {key} {min(values):.2f} to {max(values):.2f}"
        line += f"  rows {statistics.mean(layer['density'] for layer in layers):.0%}"
    return line

def save_checkpoint(run, out, step, records):
    """One file, replaced whole: a kill at any moment leaves the old state or the new one."""
    state = {"config": asdict(run.config), "digest": run.digest, "step": step, "records": records,
             "model": {name: p.detach() for name, p in run.trainable.items()},
             "optimizer": run.optimizer.state_dict()}       # NA-LoRA's state is in it
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    write_files(out, {"checkpoint.pt": content, "metrics.jsonl": json_lines(records)})

def json_lines(rows):
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)

def load_checkpoint(run, out):
    """Puts the run into the state of its last checkpoint and returns {"step", "records"}; step 0 if
    there is none. ValueError if the folder holds another run, or the file is damaged."""
    path = out / "checkpoint.pt"
    here = json.loads(json.dumps(asdict(run.config)))
    saved = read_json(out / "config.json") if (out / "config.json").exists() else here
    for key in {**saved, **here}:
        how = "resume it with its own settings, or choose another --out"
        if key == "threads":
            how = ("sums would be rounded in another order, so resume it with "
                   f"--threads {saved.get(key)}")
        refuse(saved.get(key) != here.get(key), f"{out} holds a run with {key} = "
               f"{saved.get(key)!r}, not {here.get(key)!r}: {how}.")
    if saved is here or not path.exists():
        return {"step": 0, "records": []}
    try:
        content = path.read_bytes()
        refuse(hashlib.sha256(content[:-32]).digest() != content[-32:],
               "its content is not what was written")
        state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        refuse(json.loads(json.dumps(state["config"])) != here, "it was made with other settings")
        for key, now in digest(run.config.data, run.config.base).items():
            refuse(state["digest"][key] != now, f"the {key} has changed since")
        parameters = {name: state["model"][name] for name in run.trainable}
        run.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, p in run.trainable.items():
                p.copy_(parameters[name])
        return {"step": state["step"], "records": state["records"]}
    except Exception as e:                  # torch raises many kinds
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of this run: {why}") from None

def save_results(run, out):
    """The trained weights: model/ where all trains, else adapter/. Returns the file."""
    c = run.config
    if c.method in ("pretrain", "full"):
        run.model.save_pretrained(out / "model", torch.float16 if c.method == "pretrain" else None)
        return out / "model" / "model.safetensors"
    save_adapter(run.model, out / "adapter", base_model=c.base, settings=asdict(c))
    return out / "adapter" / "adapter_model.safetensors"

def execute(c, out, resume=False, save=save_results, methods=METHODS):
    """One run from its Config to summary.json, which is returned. ValueError before anything is
    written if the run cannot be. save: writes its weights (evidence/ has another)."""
    began = time.perf_counter()
    run = set_up(c, methods)
    run.digest = digest(c.data, c.base)
    state = load_checkpoint(run, out) if resume else {"step": 0, "records": []}
    if (out / "summary.json").exists() and state["step"]:
        print(f"{out} is finished already: {(out / 'summary.json').read_text()}")
        return read_json(out / "summary.json")
    total = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.trainable.values())
    print(f"{c.method} on {c.base or c.data}: {trainable:,} of {total:,} parameters train "
          f"({trainable / total:.1%})\n{c.steps} steps of {c.batch_size}, {c.optimizer} at "
          f"{c.lr:g}, seed {c.seed}, {c.device}, {c.threads} threads; results in {out}", flush=True)
    if c.ranks > 1:
        torch.distributed.barrier()         # all ranks have read before rank 0 writes
    if RANK == 0:
        write_files(out, {"config.json": asdict(c)})
    records, times = train(run, out, state)
    if RANK:
        return None
    equations, exact, completions = judge(run)
    size = save(run, out).stat().st_size
    draw_loss({c.method: records}, out / "loss.png")
    if "layers" in records[-1]:
        draw_layers(records, out / "nalora.png")
    summary = {"method": c.method, "seed": c.seed, "val_loss": records[-1]["val_loss"],
               "trainable_parameters": trainable, "total_parameters": total,
               "step_ms": 1000 * statistics.median(times) if times else None,
               "train_seconds": sum(times), "arithmetic_accuracy": equations,
               "test_exact_match": exact, "file_bytes": size, "prompt_ending": run.ending,
               "max_new_tokens": run.max_new, "digest": run.digest,
               "wall_seconds": time.perf_counter() - began, "threads": torch.get_num_threads(),
               "machine": platform.machine(), "python": platform.python_version(),
               "torch": torch.__version__}
    write_files(out, {"summary.json": summary})
    for problem, completion in zip(run.problems[:3], completions):
        wanted = problem.get("answer", problem["completion"])
        right = problems.is_right(problem, completion)
        verdict = "right" if right else f"wrong, {wanted} was asked for"
        print(f"\n  {problem['prompt'].strip()}\n  {completion}   [{verdict}]")
    if run.problems:
        print(f"\n{c.method}: exact match {exact:.3f} on {len(run.problems)} test problems, "
              f"held-out equations right {equations:.3f}")
    print(f"validation loss {summary['val_loss']:.4f}; {summary['train_seconds']:.0f} s of "
          f"training, {summary['wall_seconds']:.0f} s in all; written to {out}")
    return summary

def sample(out, prompt):
    """Prints completions by the trained model in `out`, of the prompt or of three test problems."""
    saved, summary = (read_json(path) if path.exists() else {}
                      for path in (out / "config.json", out / "summary.json"))
    known = {f.name for f in fields(Config)}
    refuse(saved.get("method") not in METHODS or not known <= set(saved), f"{out} holds no run of "
           f"this program: train one first, or name its folder with --out (such as {out}/nalora).")
    refuse(not {"prompt_ending", "max_new_tokens", "digest"} <= set(summary), f"The run in {out} "
           "is not finished, or of another version: run its command again with --resume, or anew.")
    c = Config(**{name: saved[name] for name in known})
    if c.method in ("pretrain", "full"):
        model = Llama.from_pretrained(out / "model")
    else:
        refuse(digest(c.data, c.base)["base"] != dict(summary["digest"]).get("base"),
               f"{c.base} is not the base model that {out} was trained on: it has changed since.")
        model = Llama.from_pretrained(c.base)
        load_adapter(model, out / "adapter")
    tokenizer = tokenizer_of(c.base, c.data, model.config.vocab_size)
    prompt = problems.whole_text(prompt)
    ending = summary["prompt_ending"]       # what every prompt ended with in training
    prompts = [prompt if ending is None else prompt.rstrip() + ending]
    if not prompt:
        prompts = [p["prompt"] for p in read_splits(Path(c.data))["test"][:3]]
    completions = problems.solve(model.eval(), tokenizer, prompts, summary["max_new_tokens"])
    for text, completion in zip(prompts, completions):
        print(f"{text.strip()}\n{completion}\n")

def run_all(args):
    """full, lora and nalora on the same batches, and one table of the three."""
    configs = {method: resolve(args, method) for method in ("full", "lora", "nalora")}
    with contextlib.redirect_stdout(io.StringIO()):
        for c in configs.values():
            set_up(c)                       # all three are checked before the first one trains
    summaries = {}
    for method, c in configs.items():
        print(f"\n=== {method} ===")
        summaries[method] = execute(c, args.out / method, args.resume)
    columns = {"exact match": "test_exact_match", "val loss": "val_loss",
               "equations": "arithmetic_accuracy", "trainable": "trainable_parameters",
               "ms/step": "step_ms", "train s": "train_seconds"}
    print(f"\n{'method':10}" + "".join(f"{title:>13}" for title in columns))
    for method, summary in summaries.items():
        print(f"{method:10}" + "".join(f"{cell(summary[key]):>13}" for key in columns.values()))
    write_files(args.out, {"summary.json": {"runs": summaries}})
    metrics = {m: (args.out / m / "metrics.jsonl").read_text().splitlines() for m in configs}
    draw_loss({m: list(map(json.loads, lines)) for m, lines in metrics.items()},
              args.out / "loss.png")

def cell(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

# ---- figures -------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]

def new_figure(columns, width=9.0, height=3.2, rows=1):
    """(figure, its axes): one row as a list, several as an array."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.prop_cycle": matplotlib.cycler(color=COLOURS),
                         "axes.spines.top": False, "axes.spines.right": False,
                         "font.size": max(9, width), "axes.titlesize": "medium"})
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                                layout="constrained")
    return figure, axes[0] if rows == 1 else axes

def save_figure(figure, path):
    import matplotlib.pyplot as plt
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_files(path.parent, {path.name: picture.getvalue()})
    plt.close(figure)

def draw_loss(runs, path):
    """Training and validation loss of {label: records}, from step 0 on."""
    figure, (ax,) = new_figure(1, width=6.5, height=3.6)
    for colour, (label, records) in zip(COLOURS, runs.items()):
        steps = [r["step"] for r in records]
        ax.plot(steps, [r["val_loss"] for r in records], color=colour, label=f"{label}, validation")
        middles = [(a + b) / 2 for a, b in pairwise(steps)]     # the loss is a mean between records
        ax.plot(middles, [r["loss"] for r in records[1:]], ":", color=colour,
                label=f"{label}, training")
    ax.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    ax.legend(frameon=False)
    save_figure(figure, path)

def draw_layers(records, path):
    """k_hat, step scale, share of positive gates and change of the mask of each FFN over steps."""
    records = [r for r in records if "layers" in r]
    steps = [r["step"] for r in records]
    names = list(records[0]["layers"])
    titles = {"k_hat": r"effective homogeneity $\hat{k}$", "scale": "step scale",
              "occupancy": "share of gates z > 0",
              "turnover": "share of the mask changed since the last point"}
    figure, axes = new_figure(2, width=9, height=6, rows=2)
    for ax, (key, title) in zip(axes.flat, titles.items()):
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)] if len(names) <= 8 else f"{i / len(names):.2f}"
            values = [r["layers"][name][key] for r in records]
            ax.plot(steps, values, ".-", color=colour, label=f"layer {i}")
        ax.set(xlabel="step", title=title)
        if key in ("k_hat", "scale"):
            ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        else:
            ax.set_ylim(0, 1.03)
    axes.flat[0].legend(frameon=False, fontsize="small", ncols=1 + len(names) // 8)
    save_figure(figure, path)

# ---- the command line ----------------------------------------------------------------------------

def command_line():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python train_tiny.py [FLAG VALUE]...",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=[*METHODS, "all"], default="nalora", help="default: nalora")
    add("--out", type=Path, help="folder of results (default: runs/METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", nargs="?", const="", metavar="PROMPT", help="answer PROMPT, or three test "
        "problems, with the trained run in --out")
    for f in fields(Config):
        if f.metadata:
            several = {"type": str, "nargs": "+"} if f.type is tuple else {"type": f.type}
            add(dashed(f.name), **several, **f.metadata)
    return parser

def resolve(args, method):
    """The Config of one run. ValueError on a value, or a flag that the method has no use for."""
    given = {f.name: getattr(args, f.name) for f in fields(Config)
             if getattr(args, f.name, None) is not None} | {"method": method}
    idle = {"pretrain": ("base", "train_size", "rank", "alpha", "targets", "keep"),
            "full": ("rank", "alpha", "targets", "keep"), "lora": ("keep",),
            "nalora-scale": ("keep",)}
    for name in idle.get(method, ()):
        refuse(name in given and args.method == method,
               f"{dashed(name)} has no effect with --method {method}: leave it out.")
    data = Path(given.get("data", DATA))
    base = str((data if data.is_dir() else DATA) / "base") if method != "pretrain" else ""
    return Config(**{"base": base, **DEFAULTS.get(method, {}), **given, "data": str(data),
                     "targets": list(given.get("targets", Config.targets)),
                     "device": best_device(args.device), "threads": torch.get_num_threads(),
                     "ranks": int(os.environ.get("WORLD_SIZE", 1))})

def best_device(name=None):
    """The device of that name, or the best there is. ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    device = name or next(name for name in there if there[name])
    refuse(not there[device], f"--device {device} is not available here: leave it out.")
    return device

def join_ranks(args):
    """Joins the ranks that torchrun started; rank 0 alone speaks."""
    refuse(args.method == "all" or args.sample is not None,
           "torchrun trains one method on several ranks: give --method, no --sample.")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")

def command(args):
    if args.threads is not None:
        refuse(not 1 <= args.threads <= 1024,
               f"--threads is {args.threads}: give a number from 1 to 1024.")
        torch.set_num_threads(args.threads)
    out = args.out = args.out or Path("runs") / args.method
    if args.sample is not None:
        sample(out, args.sample)
        return
    refuse(not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())),
           f"{out} already holds a run. To go on with it or see it again: add --resume. To train "
           f"anew: add --out {out}-2.")
    if args.method == "all":
        run_all(args)
    else:
        execute(resolve(args, args.method), out, args.resume)

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used; 130 at Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # a terminal that cannot print a text
    args = command_line().parse_args(argv)
    try:
        if "WORLD_SIZE" in os.environ:
            join_ranks(args)
        command(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        memory = re.search("out of memory|can't allocate|not enough memory", f"{e}")
        memory = memory or isinstance(e, MemoryError)
        if not memory and not isinstance(e, (ValueError, OSError)):
            raise                           # a bug of this program
        hint = "The memory does not suffice: try a smaller --batch-size." if memory else e
        if RANK == 0:
            print(f"train_tiny.py: {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. What {args.out} holds is safe: run the same command with --resume "
              "to go on from the last record, or from the start if there was none.",
              file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
