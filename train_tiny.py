"""Trains the tiny Llama of data/base on two-step word problems: full fine-tuning, LoRA or NA-LoRA.

    python train_tiny.py --method nalora            about a minute on a laptop; see runs/nalora
    python train_tiny.py --method all               full, lora and nalora on the same batches
    python train_tiny.py --method nalora --resume   goes on after an interruption, to the same bits
    python train_tiny.py --sample "Ann has 3 apples. She buys 4. How many apples does Ann have?"
"""
# To read: settings, methods, the training loop. Below them is what a run needs besides:
# checkpoints, figures, the command line. Data and evaluation are in data/problems.py.

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
from data.problems import (DATA, CheckpointTokenizer, digest, encode_problem,  # noqa: F401
                           is_right, mean_loss, read_problems, read_splits)
# Those that are unused here were this file's once: other scripts may import them from it.
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
    base: str = flag(str(DATA / "base"), "base model, a folder (default: base/ of the data)")
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
        for names, low, high, words in (
                ("steps batch_size eval_every train_size", 1, math.inf, "above zero"),
                ("grad_clip lr alpha", math.ulp(0), math.inf, "above zero"),
                ("seed weight_decay test_size", 0, 2**62, "not negative and not that large"),
                ("threads", 1, 1025, "from 1 to 1024"),
                ("warmup beta1 beta2 momentum", 0, 1, "in [0, 1)")):
            for name in names.split():
                value = getattr(self, name)
                refuse(value is not None and not low <= value < high,
                       f"{dashed(name)} is {value}: give a number {words}.")

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
    if not isinstance(parameters[0], dict):
        split = [{"params": [p for p in parameters if p.dim() == 2]},
                 {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0}]
        parameters = [group for group in split if group["params"]]
    options = {"lr": c.lr, "weight_decay": c.weight_decay, "fused": True}
    if c.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=c.momentum, **options)
    return torch.optim.AdamW(parameters, betas=(c.beta1, c.beta2), **options)

# ---- the training loop ---------------------------------------------------------------------------

def training_loop(run, first=0):
    """All of training: yields the loss, nats per target token, after every optimizer step."""
    c = run.config
    optimizer = run.optimizer
    for step in range(first, c.steps):
        run.model.train()
        batch = run.batches(step)
        tokens, targets, token_mask = (t[RANK::c.ranks].to(run.device) for t in batch)      # (B, T)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(c, step)
        if hasattr(optimizer, "nalora"):
            optimizer.nalora.token_mask = token_mask        # optional: padding is not observed
        with run.autocast:
            _, loss = run.forward(tokens, targets)
        share = (targets != -100).sum() / (batch[1] != -100).sum()      # of targets, this rank's
        loss = loss * share * c.ranks       # the ranks' mean is now the mean over all targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.trainable.values(), c.grad_clip)
        if not math.isfinite(loss.item() + norm.item()):
            raise Diverged(f"The loss or its gradient is not finite at step {step + 1}: training "
                           "stops there; try a smaller --lr.")
        optimizer.step()        # with NA-LoRA its hooks then put rows back and scale the step
        optimizer.zero_grad()
        loss = loss.detach()
        if c.ranks > 1:
            torch.distributed.all_reduce(loss)
        yield loss.item() / c.ranks

def schedule(c, step):
    """Share of the learning rate at a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(c.warmup * c.steps))
    done = max(0, step - warmup) / max(1, c.steps - warmup)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))

class Diverged(ValueError):
    """The loss of a run is not finite."""

def set_up(c, methods=METHODS):
    """What a run trains with, from its Config: model, optimizer, and what problems.load gives.
    Writes nothing; ValueError where they do not fit. methods: evidence/ has more of them."""
    torch.manual_seed(c.seed)
    if c.method == "pretrain":
        model = Llama(LlamaConfig(vocab_size=problems.load_tokenizer(c.data).n_vocab, **TINY))
    else:
        model = Llama.from_pretrained(c.base)
    run = SimpleNamespace(config=c, model=model.to(c.device), **problems.load(c, model.config))
    run.device = torch.device(c.device)
    run.settings = json.loads(json.dumps(asdict(c)))        # as config.json has them
    run.autocast = torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")
    run.optimizer = methods[c.method](model, c)
    run.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run.forward = DistributedDataParallel(model) if c.ranks > 1 else model
    return run

# ---- one run: train, keep what is needed to go on, judge, draw -----------------------------------

def validate(run):
    run.model.eval()
    with run.autocast:
        return mean_loss(run.model, run.validation)

def train(run, out, records):
    """Trains from where a checkpoint's records end to the last step; writes checkpoint.pt and
    metrics.jsonl in `out` at every new record. Returns (records, seconds of each step)."""
    c = run.config
    tool = getattr(run.optimizer, "nalora", None)
    first = records[-1]["step"] if records else 0
    if not records and c.eval_every <= c.steps:
        records = [{"step": 0, "val_loss": validate(run)}]
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
                save_checkpoint(run, out, records)
            left = (time.perf_counter() - began) / (step - first) * (c.steps - step)
            print(f"{progress(record, c.steps)}  {left:4.0f} s left", flush=True)
        start = time.perf_counter()
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

def save_checkpoint(run, out, records):
    """Each file is replaced whole, checkpoint.pt last: a kill before it costs the steps since the
    one before, and they are trained again to the same records."""
    state = {"config": run.settings, "digest": run.digest, "records": records,
             "model": {name: p.detach() for name, p in run.trainable.items()},
             "optimizer": run.optimizer.state_dict()}       # NA-LoRA's state is in it
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_files(out, {"metrics.jsonl": lines, "checkpoint.pt": content})

def load_checkpoint(run, out):
    """Puts the run into the state of its last checkpoint and returns its records; [] if there is
    none. ValueError if the folder holds another run, or the file is damaged."""
    path = out / "checkpoint.pt"
    if not (out / "config.json").exists():
        return []
    saved = read_json(out / "config.json")
    here = run.settings
    for key in {**saved, **here}:
        how = "resume it with its own settings, or choose another --out"
        if key == "threads":
            how = f"sums would be rounded in another order, so give --threads {saved.get(key)}"
        refuse(saved.get(key) != here.get(key), f"{out} holds a run with {key} = "
               f"{saved.get(key)!r}, not {here.get(key)!r}: {how}.")
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        refuse(hashlib.sha256(content[:-32]).digest() != content[-32:],
               "its content is not what was written")
        state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        refuse(state["config"] != here, "it was made with other settings")
        for key, now in run.digest.items():
            refuse(state["digest"][key] != now, f"the {key} has changed since")
        refuse(set(state["model"]) != set(run.trainable), "its parameters have other names")
        run.model.load_state_dict(state["model"], strict=False)     # what is frozen is not in it
        run.optimizer.load_state_dict(state["optimizer"])
        return state["records"]
    except Exception as e:                  # torch raises many kinds
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of this run: {why}") from None

def save_results(run, out):
    """The trained weights: model/ where all trains, else adapter/. Returns the file."""
    c = run.config
    if c.method in ("pretrain", "full"):
        run.model.save_pretrained(out / "model", torch.float16 if c.method == "pretrain" else None)
        return out / "model" / "model.safetensors"
    save_adapter(run.model, out / "adapter", base_model=c.base, settings=run.settings)
    return out / "adapter" / "adapter_model.safetensors"

def execute(c, out, resume=False, save=save_results, methods=METHODS):
    """One run from its Config to summary.json, which is returned. ValueError before anything is
    written if the run cannot be. save: writes its weights (evidence/ has another)."""
    began = time.perf_counter()
    run = set_up(c, methods)
    records = load_checkpoint(run, out) if resume else []
    if records and (out / "summary.json").exists():
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
        write_files(out, {"config.json": run.settings})
    records, times = train(run, out, records)
    if RANK:
        return None
    run.model.eval()
    equations = problems.arithmetic_accuracy(run.model, run.tokenizer, run.equations)
    exact, completions = problems.exact_match(run.model, run.tokenizer, run.problems, run.max_new)
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
        verdict = problems.verdict(problem, completion)
        print(f"\n  {problem['prompt'].strip()}\n  {completion}   [{verdict}]")
    if run.problems:
        print(f"\n{c.method}: exact match {exact:.3f} on {len(run.problems)} test problems, "
              f"held-out equations right {equations:.3f}")
    print(f"validation loss {summary['val_loss']:.4f}; {sum(times):.0f} s of training, "
          f"{summary['wall_seconds']:.0f} s in all; written to {out}")
    return summary

def sample(out, prompt):
    """Prints completions by the trained model in `out`, of the prompt or of three test problems."""
    config, summary = (read_json(path) if path.exists() else {}
                       for path in (out / "config.json", out / "summary.json"))
    refuse(config.get("method") not in METHODS or not {"base", "data"} <= set(config), f"{out} "
           f"holds no run: train one first, or name its folder with --out (such as {out}/nalora).")
    refuse(not {"prompt_ending", "max_new_tokens", "digest"} <= set(summary), f"The run in {out} "
           "is not finished, or of another version: run its command again with --resume, or anew.")
    base, data = config["base"], config["data"]
    if config["method"] in ("pretrain", "full"):
        model = Llama.from_pretrained(out / "model")
    else:
        refuse(digest(data, base)["base"] != dict(summary["digest"]).get("base"),
               f"{base} is not the base model that {out} was trained on: it has changed since.")
        model = Llama.from_pretrained(base)
        load_adapter(model, out / "adapter")
    tokenizer = problems.tokenizer_of(base, data, model.config.vocab_size)
    prompts = problems.sample_prompts(data, prompt, summary["prompt_ending"])
    completions = problems.solve(model.eval(), tokenizer, prompts, summary["max_new_tokens"])
    for text, completion in zip(prompts, completions):
        print(f"{text.strip()}\n{completion}\n")

def run_all(args, out):
    """full, lora and nalora on the same batches, and one table of the three."""
    configs = {method: resolve(args, method) for method in ("full", "lora", "nalora")}
    with contextlib.redirect_stdout(io.StringIO()):     # each says again what it is when it trains
        for c in configs.values():
            set_up(c)                       # all three are checked before the first one trains
    summaries = {m: execute(c, out / m, args.resume) for m, c in configs.items()}
    columns = {"exact match": "test_exact_match", "val loss": "val_loss",
               "equations": "arithmetic_accuracy", "trainable": "trainable_parameters",
               "ms/step": "step_ms", "train s": "train_seconds"}
    print(f"\n{'method':10}" + "".join(f"{title:>13}" for title in columns))
    for method, summary in summaries.items():
        print(f"{method:10}" + "".join(f"{cell(summary[key]):>13}" for key in columns.values()))
    write_files(out, {"summary.json": {"runs": summaries}})
    metrics = {m: (out / m / "metrics.jsonl").read_text().splitlines() for m in configs}
    draw_loss({m: list(map(json.loads, lines)) for m, lines in metrics.items()}, out / "loss.png")

def cell(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

# ---- figures -------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]

def new_figure(columns, width=9.0, height=3.2, rows=1):
    """(figure, its axes): one row as a list, several as an array."""
    import matplotlib.figure  # without pyplot, which would look for a display
    matplotlib.rcParams.update({"axes.prop_cycle": matplotlib.cycler(color=COLOURS),
                                "axes.spines.top": False, "axes.spines.right": False,
                                "font.size": max(9, width), "axes.titlesize": "medium"})
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0] if rows == 1 else axes

def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_files(path.parent, {path.name: picture.getvalue()})

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
    return Config(**{"base": base, "threads": torch.get_num_threads(), **DEFAULTS.get(method, {}),
                     **given, "data": str(data), "device": best_device(args.device),
                     "ranks": int(os.environ.get("WORLD_SIZE", 1))})

def best_device(name=None):
    """The device of that name, or the best there is. ValueError if it is not there."""
    devices = {"cuda": torch.cuda, "mps": torch.backends.mps}
    there = [device for device in devices if devices[device].is_available()] + ["cpu"]
    refuse(name and name not in there, f"--device {name} is not available here: leave it out.")
    return name or there[0]

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

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used; 130 at Ctrl-C."""
    args = command_line().parse_args(argv)
    out = args.out or Path("runs") / args.method
    try:
        if "WORLD_SIZE" in os.environ:
            join_ranks(args)
        c = resolve(args, args.method)
        torch.set_num_threads(c.threads)
        if args.sample is not None:
            sample(out, args.sample)
            return 0
        refuse(not args.resume and any(out.glob("*")), f"{out} already holds a run: add --resume "
               f"to go on with it or see it again, or --out {out}-2 to train anew.")
        if args.method == "all":
            run_all(args, out)
        else:
            execute(c, out, args.resume)
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        words = "out of memory|can't allocate|not enough memory"
        memory = isinstance(e, MemoryError) or re.search(words, str(e))
        if not memory and not isinstance(e, (ValueError, OSError)):
            raise                           # a bug of this program
        hint = "The memory does not suffice: try a smaller --batch-size." if memory else e
        if RANK == 0:
            print(f"train_tiny.py: {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted: run the same command with --resume to go on from the last record in "
              f"{out}, or from the start if there is none.", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # a terminal that cannot print a text
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
