"""Trains the tiny Llama of data/base on two-step word problems: full fine-tuning, LoRA, NA-LoRA, its ablations and controls.

    python train_tiny.py --method nalora            about a minute on a laptop; results in runs/nalora
    python train_tiny.py --method all               full, lora and nalora on the same batches, one table
    python train_tiny.py --method nalora --resume   goes on after an interruption, to the same bits
    python train_tiny.py --sample "Ann has 23 apples. She buys 14 more. Later Ann sells 12 of them. How many apples does Ann have now?"
"""
import argparse
import base64
import contextlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nalora import (ACTIVATIONS, Llama, LlamaConfig, NALoRA, NALoRAConfig, homogeneity, inject_lora, load_adapter,
                    read_json, save_adapter, selection_weight, value_and_slope, write_json, write_whole)

DATA = Path(os.path.relpath(Path(__file__).resolve().parent / "data"))
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What each method sets in NALoRAConfig; None: no NALoRA. The controls are matched: the random and inverted masks to nalora-mask,
# the uniform scale to nalora-scale.
METHODS = {"pretrain": None, "full": None, "lora": None, "nalora": {}, "nalora-mask": {"scale": "none"}, "nalora-scale": {"mask": "none"},
           "random-mask": {"mask": "random", "scale": "none"}, "inverted-mask": {"mask": "inverted", "scale": "none"},
           "uniform-scale": {"mask": "none", "scale": "uniform"}}
LEARNING_RATE = {"pretrain": 3e-3, "full": 2e-3}                   # every LoRA method: 5e-3
TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, tie_word_embeddings=True)


# ---- data -------------------------------------------------------------------------------------------------------------------------


def load_tokenizer(data=DATA):
    """The byte-pair tokenizer of data/tokenizer.tiktoken as a tiktoken.Encoding; the last id is <|endoftext|>. Downloads nothing."""
    path = Path(data) / "tokenizer.tiktoken"
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in path.read_text().splitlines())}
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("its ranks are not 0, 1, 2, ... or a byte is missing")
        pattern = r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"            # a number is the sequence of its digits
        return tiktoken.Encoding("nalora-tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a tokenizer: {e}") from None


def read_problems(path):
    """A list of dicts with "prompt", "completion" and "answer" from a JSON-lines file. ValueError names the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            p = json.loads(line)
            if not (isinstance(p["prompt"], str) and isinstance(p["completion"], str) and isinstance(p["answer"], int)):
                raise ValueError("prompt and completion must be texts, answer a whole number")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: no problem with prompt, completion and answer ({e}).") from None
        problems.append(p)
    if not problems:
        raise ValueError(f"{path} holds no problem.")
    return problems


def encode_problem(tokenizer, problem):
    """(token ids, number of prompt tokens): <|endoftext|> prompt completion <|endoftext|>."""
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary(problem["prompt"])]
    return [*prompt, *tokenizer.encode_ordinary(problem["completion"]), tokenizer.eot_token], len(prompt)


def check_length(path, lengths, context):
    """ValueError naming the first line of a data file whose text does not fit the model's context."""
    for number, length in enumerate(lengths, 1):
        if length > context:
            raise ValueError(f"{path}, line {number}: {length} tokens exceed the context of {context}: shorten the text.")


def collate(encoded, end):
    """Encoded problems -> tokens (B, T), targets (B, T), token_mask (B, T). Targets are the completion, -100 elsewhere."""
    width = max(len(ids) for ids, _ in encoded) - 1
    tokens, targets = torch.full((len(encoded), width), end), torch.full((len(encoded), width), -100)
    mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(encoded):
        tokens[row, :len(ids) - 1], mask[row, :len(ids) - 1] = torch.tensor(ids[:-1]), True
        targets[row, prompt - 1:len(ids) - 1] = torch.tensor(ids[prompt:])
    return tokens, targets, mask


class ProblemBatches:
    """batches(step) -> (tokens, targets, token_mask), a function of seed and step alone, so that a resumed run sees the same data."""

    def __init__(self, encoded, batch_size, seed, end):
        self.encoded, self.batch_size, self.seed, self.end = encoded, min(batch_size, len(encoded)), seed, end
        self.epoch, self.batches = None, []

    def order(self, epoch):
        """Shuffled problems, sorted by length within runs of eight batches (less padding), the batches shuffled again."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled, run = rng.permutation(len(self.encoded)), 8 * self.batch_size
        by_length = [sorted(shuffled[i:i + run], key=lambda j: len(self.encoded[j][0])) for i in range(0, len(shuffled), run)]
        flat = [j for part in by_length for j in part]
        batches = [flat[i:i + self.batch_size] for i in range(0, len(flat) - self.batch_size + 1, self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __call__(self, step):
        epoch, position = divmod(step, len(self.encoded) // self.batch_size)
        if self.epoch != epoch:
            self.epoch, self.batches = epoch, self.order(epoch)
        return collate([self.encoded[j] for j in self.batches[position]], self.end)


class TextBatches:
    """Windows of `length` tokens at random places of a long text; like ProblemBatches a function of seed and step."""

    def __init__(self, ids, batch_size, length, seed):
        if len(ids) <= length:
            raise ValueError(f"The text has {len(ids)} tokens, fewer than one window of {length}.")
        self.ids, self.batch_size, self.length, self.seed = torch.tensor(ids), batch_size, length, seed

    def __call__(self, step):
        starts = np.random.default_rng([self.seed, step]).integers(0, len(self.ids) - self.length, self.batch_size)
        window = torch.stack([self.ids[i:i + self.length + 1] for i in starts])             # (B, length + 1)
        return window[:, :-1], window[:, 1:], None


def encode_text(tokenizer, path):
    """The documents (lines) of a text file as one list of token ids, <|endoftext|> before each."""
    documents = tokenizer.encode_ordinary_batch(Path(path).read_text(encoding="utf-8").splitlines())
    return [i for ids in documents for i in (tokenizer.eot_token, *ids)] + [tokenizer.eot_token]


# ---- evaluation -------------------------------------------------------------------------------------------------------------------


MAX_NEW = 32                                                        # tokens of the longest solution, and some


def solve(model, tokenizer, prompts, max_new_tokens=MAX_NEW):
    """Greedy completions of the prompts, in order. Prompts of equal length share a batch, so none needs padding."""
    device, answers, by_length = next(model.parameters()).device, {}, {}
    for i, prompt in enumerate(prompts):
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
        by_length.setdefault(len(ids), []).append((i, ids))
    for length, rows in by_length.items():
        out = model.generate(torch.tensor([ids for _, ids in rows], device=device), max_new_tokens, stop=tokenizer.eot_token)
        for (i, _), ids in zip(rows, out[:, length:].tolist()):
            answers[i] = tokenizer.decode(ids).split("<|endoftext|>")[0]
    return [answers[i] for i in range(len(prompts))]


def final_answer(text):
    """The number after "The answer is", or None."""
    found = re.search(r"The answer is (-?[0-9]+)", text)
    return int(found[1]) if found else None


def exact_match(model, tokenizer, problems):
    """(share of problems whose final answer is right, the completions)."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems])
    return sum(final_answer(c) == p["answer"] for c, p in zip(completions, problems)) / len(problems), completions


def arithmetic_accuracy(model, tokenizer, problems):
    """Share of equations ("12+5=") that the model completes rightly."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens=3)
    return sum(c.split(".")[0] == str(p["answer"]) for c, p in zip(completions, problems)) / len(problems)


@torch.no_grad()
def mean_loss(model, batches):
    """Cross-entropy in nats per target token over a list of batches."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for tokens, targets, _ in batches:
        n = (targets != -100).sum().item()
        total, count = total + n * model(tokens.to(device), targets.to(device))[1].item(), count + n
    return total / count


# ---- one run ----------------------------------------------------------------------------------------------------------------------


class Run:
    """Model, data, optimizer and (for NA-LoRA methods) NALoRA of one configuration. Writes nothing."""

    def __init__(self, config):
        self.config, self.data = config, Path(config["data"])
        self.device = torch.device(config["device"])
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config["dtype"] == "bfloat16")
        self.tokenizer = load_tokenizer(self.data)
        self.equations = read_problems(self.data / "arithmetic.jsonl")[:config["test_size"]]           # pre-training never saw them
        self.problems = read_problems(self.data / "test.jsonl")[:config["test_size"]]
        torch.manual_seed(config["seed"])
        method = config["method"]
        self.nalora = None
        if method == "pretrain":
            self.model = Llama(LlamaConfig(vocab_size=self.tokenizer.n_vocab, **TINY)).to(self.device)
            ids = encode_text(self.tokenizer, self.data / "pretrain.txt")
            self.batches = TextBatches(ids, config["batch_size"], 128, config["seed"])
            held_out = torch.tensor(encode_text(self.tokenizer, self.data / "pretrain_val.txt"))
            if len(held_out) < 129:
                raise ValueError(f"{self.data / 'pretrain_val.txt'} has {len(held_out)} tokens: at least 129 are needed.")
            held_out = held_out[:len(held_out) // 129 * 129].view(-1, 129)
            self.validation = [(held_out[:, :-1], held_out[:, 1:], None)]
        else:
            self.model = Llama.from_pretrained(config["base"]).to(self.device)
            if self.model.config.vocab_size != self.tokenizer.n_vocab:
                raise ValueError(f"{config['base']} has {self.model.config.vocab_size} tokens, the tokenizer of {self.data} has {self.tokenizer.n_vocab}.")
            splits = {s: [encode_problem(self.tokenizer, p) for p in read_problems(self.data / f"{s}.jsonl")] for s in ("train", "val")}
            self.batches = ProblemBatches(splits["train"][:config["train_size"]], config["batch_size"], config["seed"], self.tokenizer.eot_token)
            by_length = sorted(splits["val"], key=lambda e: len(e[0]))
            self.validation = [collate(by_length[i:i + 50], self.tokenizer.eot_token) for i in range(0, len(by_length), 50)]
            context = self.model.config.max_position_embeddings
            for split, encoded in splits.items():
                check_length(self.data / f"{split}.jsonl", [len(ids) - 1 for ids, _ in encoded], context)
            check_length(self.data / "test.jsonl", [encode_problem(self.tokenizer, p)[1] + MAX_NEW for p in self.problems], context)
        if "rank" in config:
            inject_lora(self.model, config["targets"], config["rank"], config["alpha"])
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for p in self.trainable.values() if p.dim() == 2]
        others = [p for p in self.trainable.values() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}] if others else decayed, lr=config["lr"],
                                           betas=(config["beta1"], config["beta2"]), weight_decay=config["weight_decay"], fused=True)
        if config.get("nalora"):
            self.nalora = NALoRA(self.model, self.optimizer, NALoRAConfig(**config["nalora"]))

    def learning_rate(self, step):
        """Linear warm-up, then a cosine down to zero."""
        warmup = max(1, round(self.config["warmup"] * self.config["steps"]))
        rest = max(1, self.config["steps"] - warmup)
        return self.config["lr"] * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / rest))

    def train_step(self, step):
        """One optimizer step. Returns the loss of its batch and its number of tokens, padding included."""
        tokens, targets, token_mask = (t if t is None else t.to(self.device) for t in self.batches(step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if self.nalora:
            self.nalora.token_mask = token_mask                     # the whole difference to a LoRA loop, and it is optional
        with self.autocast:
            _, loss = self.model(tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config["grad_clip"])
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise ValueError(f"The loss or its gradient is not finite at step {step + 1}: training stops there; try a smaller --lr.")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()                                # so that a clock around this step times all of it
        return loss.item(), tokens.numel()

    def validate(self):
        self.model.eval()
        with self.autocast:
            loss = mean_loss(self.model, self.validation)
        self.model.train()
        return loss

    def state(self):
        """Everything that training changes, as one flat dict of tensors."""
        tensors = {f"model.{name}": p.detach() for name, p in self.trainable.items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{key}": value for key, value in slots.items()})
        if self.nalora:
            tensors.update({f"nalora.{name}/{key}": v for name, s in self.nalora.state_dict()["ffns"].items() for key, v in s.items()})
        return {name: t.contiguous() for name, t in tensors.items()}

    def load_state(self, tensors):
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(tensors[f"model.{name}"])
        slots, ffns = {}, {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "optimizer":
                i, key = rest.split(".")
                slots.setdefault(int(i), {})[key] = tensor
            if kind == "nalora":
                ffn, key = rest.split("/")
                ffns.setdefault(ffn, {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.nalora:
            self.nalora.load_state_dict({"config": asdict(self.nalora.config), "ffns": ffns})


def layer_record(statistics_now, masks_before):
    """What metrics.jsonl keeps of NALoRA.statistics() per FFN; turnover is the share of the mask that changed since the last
    record, None at the first."""
    number = lambda x: x if math.isfinite(x) else None               # JSON knows no NaN
    return {name: {"k_hat": number(s["k_hat"]), "occupancy": number(s["occupancy"]), "scale": s["scale"], "density": s["mask"].float().mean().item(),
                   "turnover": (s["mask"] != masks_before[name]).float().mean().item() if masks_before else None} for name, s in statistics_now.items()}


def train(run, out, state=None):
    """Trains to the last step and writes checkpoint.safetensors and metrics.jsonl in `out` at every record. Returns (records, times)."""
    config, records, step, times = run.config, [], 0, []
    if state:
        run.load_state(state["tensors"])
        records, step = state["records"], state["step"]
    masks = {name: s["mask"] for name, s in run.nalora.statistics().items()} if run.nalora and records else None
    losses, seen, began = [], 0, time.perf_counter()
    run.model.train()
    first = step
    while step < config["steps"]:
        start = time.perf_counter()
        loss, tokens = run.train_step(step)
        times.append(time.perf_counter() - start)
        step, seen = step + 1, seen + tokens
        losses.append(loss)
        if step % config["eval_every"] == 0 or step == config["steps"]:
            record = {"step": step, "lr": run.learning_rate(step - 1), "loss": sum(losses) / len(losses), "val_loss": run.validate()}
            losses = []
            if not math.isfinite(record["val_loss"]):
                raise ValueError(f"The validation loss is not finite at step {step}: training stops there; try a smaller --lr.")
            if run.nalora:
                now = run.nalora.statistics()
                record["layers"], masks = layer_record(now, masks), {name: s["mask"] for name, s in now.items()}
            records.append(record)
            save_checkpoint(run, out, step, records)
            elapsed = time.perf_counter() - began
            left = elapsed / (step - first) * (config["steps"] - step)
            print(f"step {step:5d}/{config['steps']}  loss {record['loss']:.4f}  val_loss {record['val_loss']:.4f}  "
                  f"{seen / elapsed:7,.0f} tokens/s  {left:4.0f} s left", flush=True)
    write_lines(out / "metrics.jsonl", records)                     # in case the last session ended between checkpoint and metrics
    return records, times


def save_checkpoint(run, out, step, records):
    """One file, replaced whole, so that a kill at any moment leaves either the old state or the new one."""
    metadata = {"run": json.dumps({"config": run.config, "step": step, "records": records})}          # one key: a fixed byte order
    write_whole(out / "checkpoint.safetensors", lambda path: save_file(run.state(), path, metadata))
    write_lines(out / "metrics.jsonl", records)


def write_lines(path, rows):
    write_whole(path, lambda temporary: temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8"))


def load_checkpoint(out, config):
    """The state to resume from, or None if the run was cut before its first checkpoint. ValueError if it is another run's or broken."""
    path, state = out / "checkpoint.safetensors", None
    if not (out / "config.json").exists():
        return None
    saved_config = read_json(out / "config.json")
    if path.exists():
        try:
            with safe_open(path, "pt") as f:
                state = {**json.loads(f.metadata()["run"]), "tensors": {key: f.get_tensor(key) for key in f.keys()}}
            saved_config = state["config"]
        except Exception as e:                                      # safetensors raises several kinds; all mean the same here
            raise ValueError(f"{path} is no readable checkpoint of this program: {e}") from None
    differ = sorted(k for k in {*saved_config, *config} if saved_config.get(k) != config.get(k))
    if differ:
        k = differ[0]
        raise ValueError(f"{out} holds a run with {k} = {saved_config.get(k)!r}, not {config.get(k)!r}: resume it with its own settings, or choose another --out.")
    return state


def prepare(config, out, resume):
    """(Run, state to resume from or None). All that can be wrong with a run is found here, before anything is written."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds a run: add --resume to go on with it, or choose another --out.")
    return Run(config), load_checkpoint(out, config) if resume else None


def execute(config, out, resume):
    """One run from configuration to summary. Returns the summary, which is also written to out/summary.json."""
    began = time.perf_counter()
    run, state = prepare(config, out, resume)
    if state and (out / "summary.json").exists():
        print(f"{out} is finished already; its summary:")
        print((out / "summary.json").read_text())
        return read_json(out / "summary.json")
    total = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.trainable.values())
    print(json.dumps(config, indent=2))
    print(f"{trainable:,} of {total:,} parameters train ({trainable / total:.1%})", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    reset_peak_memory(run.device)
    records, times = train(run, out, state)
    memory = peak_memory_mb(run.device)
    run.model.eval()
    summary = {"method": config["method"], "seed": config["seed"], "val_loss": records[-1]["val_loss"], "trainable_parameters": trainable,
               "total_parameters": total, "step_ms": 1000 * statistics.median(times) if times else None, "train_seconds": sum(times),
               "arithmetic_accuracy": arithmetic_accuracy(run.model, run.tokenizer, run.equations)}
    summary["test_exact_match"], completions = exact_match(run.model, run.tokenizer, run.problems)
    if "rank" in config:
        save_adapter(run.model, out / "adapter", base_model=config["base"], settings=config)
    else:
        run.model.save_pretrained(out / "model", torch.float16 if config["method"] == "pretrain" else None)
    draw_loss({config["method"]: records}, out / "loss.png")
    if run.nalora:
        draw_layers(records, out / "nalora.png")
    summary.update(peak_memory_mb=memory, wall_seconds=time.perf_counter() - began, threads=torch.get_num_threads(),
                   machine=platform.machine(), python=platform.python_version(), torch=torch.__version__)
    write_json(out / "summary.json", summary)
    for problem, completion in list(zip(run.problems, completions))[:3]:
        verdict = "right" if final_answer(completion) == problem["answer"] else f"wrong, {problem['answer']} was asked for"
        print(f"\n  {problem['prompt'].strip()}\n  {completion}   [{verdict}]")
    print(f"\n{config['method']}: exact match {summary['test_exact_match']:.3f} on {len(run.problems)} test problems")
    print(f"validation loss {summary['val_loss']:.4f}, held-out equations right {summary['arithmetic_accuracy']:.3f}")
    step_ms = f"{summary['step_ms']:.1f} ms a step, " if times else ""
    print(f"{step_ms}{summary['train_seconds']:.0f} s of training, {summary['wall_seconds']:.0f} s in all, peak memory {memory:,.0f} MB; written to {out}")
    return summary


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):                          # Linux: the high-water mark starts anew for this run
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device):
    """Peak memory in MB: of the GPU's allocator on CUDA, of the process on Linux and macOS, else NaN."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    with contextlib.suppress(ImportError):
        import resource                                             # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return math.nan


def step_time_ratio(config, other, pairs):
    """Median over `pairs` of (step time of `other`) / (step time of `config`), in alternation, in one process, on the same batches."""
    runs, ratios = (Run(config), Run(other)), []
    for step in range(pairs + 5):
        times = []
        for run in runs if step % 2 else runs[::-1]:
            start = time.perf_counter()
            run.train_step(step)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0] if step % 2 else times[0] / times[1])
    return statistics.median(ratios[5:])


# ---- figures ----------------------------------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]      # Okabe and Ito


def new_figure(columns, width=9.0, height=3.2):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.prop_cycle": matplotlib.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def save_figure(figure, path):
    import matplotlib.pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


def draw_loss(runs, path):
    """Training and validation loss over steps of {label: records}."""
    figure, (ax,) = new_figure(1, width=5.5)
    for i, (label, records) in enumerate(runs.items()):
        steps = [r["step"] for r in records]
        ax.plot(steps, [r["val_loss"] for r in records], color=COLOURS[i], label=f"{label}, validation")
        ax.plot(steps, [r["loss"] for r in records], ":", color=COLOURS[i], label=f"{label}, training (mean since last record)")
    ax.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    ax.legend(frameon=False)
    save_figure(figure, path)


def draw_layers(records, path):
    """k_hat, occupancy, step scale, mask density and mask turnover of each FFN over steps."""
    kinds = {"k_hat": "effective homogeneity k_hat", "occupancy": "share of gates z > 0", "scale": "step scale", "density": "mask density",
             "turnover": "mask turnover per record"}
    figure, axes = new_figure(len(kinds), width=14)
    steps = [r["step"] for r in records]
    for ax, (kind, label) in zip(axes, kinds.items()):
        for i, name in enumerate(records[0]["layers"]):
            ax.plot(steps, [math.nan if r["layers"][name][kind] is None else r["layers"][name][kind] for r in records], ".-", color=COLOURS[i % len(COLOURS)], label=f"layer {i}")
        ax.set(xlabel="step", ylabel=label)
        if kind in ("density", "turnover"):
            ax.set_ylim(0, 1)
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_activations(path):
    """phi, rho, phi' and kappa of SiLU, GELU and ReLU: the four curves that the method is made of."""
    figure, axes = new_figure(4, width=12)
    z = torch.linspace(-5, 5, 1001)
    for name, style in (("silu", "-"), ("gelu", "--"), ("relu", ":")):
        act = ACTIVATIONS[name]
        (phi, slope), rho, kappa = value_and_slope(act, z), selection_weight(act, z), homogeneity(act, z)
        if name == "relu":
            kappa[z < 0] = math.nan                                 # 0/0: the code's convention there is 1, the curve has none
        for ax, y in zip(axes, (phi, rho, slope, kappa)):
            ax.plot(z, y, style, label={"silu": "SiLU", "gelu": "GELU", "relu": "ReLU"}[name])
    titles = ("value  phi(z)", "selection weight  rho = phi/z", "responsiveness  phi'(z)", "homogeneity  kappa = z phi'/phi")
    for ax, title in zip(axes, titles):
        ax.set(xlabel="gate pre-activation z")
        ax.set_title(title, fontsize=10)
        ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    axes[3].axhline(1, color="0.8", lw=0.8, zorder=0)
    axes[3].set_ylim(-2, 2)
    axes[3].text(2.6, 0.1, "z > 0: kappa > 1,\nselection amplifies", fontsize=8, ha="center")
    axes[3].text(-2.9, 1.4, "z < 0: kappa < 1,\nselection opposes", fontsize=8, ha="center")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


# ---- the command line -------------------------------------------------------------------------------------------------------------


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=[*METHODS, "all"], default="nalora", help="what to train (default: %(default)s); all: full, lora and nalora")
    add("--out", type=Path, help="folder of results (default: runs/METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", nargs="?", const="", metavar="PROMPT", help="answer PROMPT (or three test problems) with the trained run in --out, and exit")
    add("--draw-activations", type=Path, metavar="PNG", help="draw the README's figure of phi, rho, phi' and kappa, and exit")
    add("--seed", type=int, default=0, help="of initialisation, data order and the random mask (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products, by autocast; weights stay float32 (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--test-size", type=int, metavar="N", help="judge on the first N test problems and equations (default: all)")
    add("--data", type=Path, default=DATA, help="folder of the data files (default: data)")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--steps", type=int, help="optimizer steps (default: 400; pretrain: 4000)")
    add("--batch-size", type=int, help="problems, or windows of 128 tokens, per step (default: 16)")
    add("--lr", type=float, help="peak learning rate (default: 5e-3; full: 2e-3; pretrain: 3e-3)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=float, help="of matrices (default: 0; pretrain: 0.1)")
    add("--beta1", type=float, default=0.9, help="of AdamW (default: %(default)s)")
    add("--beta2", type=float, help="of AdamW (default: 0.999; pretrain: 0.95)")
    add("--grad-clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--eval-every", type=int, help="steps between records and checkpoints (default: 50; pretrain: 250)")
    group = parser.add_argument_group("fine-tuning (all methods but pretrain)")
    add = group.add_argument
    add("--base", type=Path, help="checkpoint directory of the base model (default: DATA/base)")
    add("--train-size", type=int, metavar="N", help="train on the first N problems (default: all)")
    group = parser.add_argument_group("LoRA and NA-LoRA methods")
    add = group.add_argument
    add("--rank", type=int, help="default: 8")
    add("--alpha", type=float, help="the update is scaled by alpha / rank (default: 16)")
    add("--targets", nargs="+", help="names of linear layers (default: all seven of a block)")
    group = parser.add_argument_group("NA-LoRA methods (default: what the method says; see NALoRAConfig)")
    for field in fields(NALoRAConfig):
        if field.name == "soft":
            group.add_argument("--soft", action=argparse.BooleanOptionalAction, help="weight rows by importance and cut none")
        elif field.name != "seed":
            choices = {"mask": ["derivative", "inverted", "random", "none"], "scale": ["homogeneity", "uniform", "none"],
                       "budget": ["raw", "neutral"], "score": ["phi_prime", "rho_prime"]}.get(field.name)
            group.add_argument(f"--{field.name}", type=type(field.default), choices=choices, help=f"default: {field.default}")
    return parser


def given(value, default):
    return default if value is None else value


def resolve(args, method):
    """The complete configuration of one run, as JSON-able values. ValueError on a value or a flag that the method has no use for."""
    pretrain, adapts, preset = method == "pretrain", method not in ("pretrain", "full"), METHODS[method]
    own = [f.name for f in fields(NALoRAConfig) if f.name != "seed"]
    useless = {"base": pretrain, "train_size": pretrain, **dict.fromkeys(("rank", "alpha", "targets"), not adapts), **dict.fromkeys(own, preset is None)}
    for name, is_useless in useless.items():
        if is_useless and getattr(args, name) is not None and args.method != "all":
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --method {method}: leave it out.")
    there = [d for d, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)) if available]
    device = there[0] if args.device == "auto" else args.device
    if device not in there:
        raise ValueError(f"--device {device} is not available here: choose {' or '.join(there)}.")
    config = {"method": method, "seed": args.seed, "device": device, "dtype": args.dtype, "threads": torch.get_num_threads(), "data": str(args.data),
              "steps": given(args.steps, 4000 if pretrain else 400), "batch_size": given(args.batch_size, 16),
              "lr": given(args.lr, LEARNING_RATE.get(method, 5e-3)), "warmup": args.warmup,
              "weight_decay": given(args.weight_decay, 0.1 if pretrain else 0.0), "beta1": args.beta1,
              "beta2": given(args.beta2, 0.95 if pretrain else 0.999), "grad_clip": args.grad_clip,
              "eval_every": given(args.eval_every, 250 if pretrain else 50), "test_size": args.test_size}
    if not pretrain:
        config |= {"base": str(args.base or args.data / "base"), "train_size": args.train_size}
    if adapts:
        config |= {"rank": given(args.rank, 8), "alpha": given(args.alpha, 16.0), "targets": args.targets or ALL_LINEAR}
    if preset is not None:
        chosen = {f: getattr(args, f) for f in own if getattr(args, f) is not None}
        c = NALoRAConfig(**{**preset, "seed": args.seed, **chosen})
        ranks = c.mask in ("derivative", "inverted")
        idle = {**dict.fromkeys(preset, True), "keep": c.soft or c.mask == "none", "score": not ranks, "ema": not ranks, "stride": not ranks and c.scale == "none"}
        for name in chosen:
            if idle.get(name) and args.method != "all":
                raise ValueError(f"--{name} has no effect with --method {method}, mask {c.mask!r}{' (soft)' * c.soft} and scale {c.scale!r}: leave it out.")
        config["nalora"] = asdict(c)
    for name in ("steps", "batch_size", "eval_every", "grad_clip", "lr", "alpha", "train_size", "test_size"):
        if config.get(name) is not None and not 0 < config[name] < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {config[name]}: give a number above zero.")
    for name in ("warmup", "beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"--{name} is {config[name]}: give a number in [0, 1).")
    if config["seed"] < 0 or config["weight_decay"] < 0:
        raise ValueError("--seed and --weight-decay cannot be negative.")
    return config


def sample(out, prompt):
    """Prints completions by the trained model in `out`."""
    config = read_json(out / "config.json") if (out / "config.json").exists() else {}
    if not {"data", "method"} <= set(config):
        raise ValueError(f"{out} holds no run of this program: train one first, or name its folder with --out.")
    if not (out / "summary.json").exists():
        raise ValueError(f"The run in {out} is not finished: run its command again with --resume, then sample.")
    tokenizer = load_tokenizer(config["data"])
    if "rank" in config:
        model = Llama.from_pretrained(config["base"])
        load_adapter(model, out / "adapter")
    else:
        model = Llama.from_pretrained(out / "model")
    prompts = [prompt.strip() + " "] if prompt else [p["prompt"] for p in read_problems(Path(config["data"]) / "test.jsonl")[:3]]
    for text, completion in zip(prompts, solve(model.eval(), tokenizer, prompts)):
        print(f"{text.strip()}\n{completion}\n")


def run_all(args):
    """full, lora and nalora on the same batches, and one table of the three."""
    out = args.out
    configs = {method: resolve(args, method) for method in ("full", "lora", "nalora")}
    for method, config in configs.items():
        prepare(config, out / method, args.resume)                  # all three are checked before the first one trains
    summaries, pairs = {}, 60
    for method, config in configs.items():
        print(f"\n=== {method} ===")
        summaries[method] = execute(config, out / method, args.resume)
    ratio = step_time_ratio(configs["lora"], configs["nalora"], pairs)
    columns = {"exact match": "test_exact_match", "val loss": "val_loss", "equations": "arithmetic_accuracy", "trainable": "trainable_parameters",
               "ms/step": "step_ms", "train s": "train_seconds", "peak MB": "peak_memory_mb"}
    print(f"\n{'method':10}" + "".join(f"{c:>13}" for c in columns))
    for method, s in summaries.items():
        print(f"{method:10}" + "".join(f"{s[k]:>13,}" if isinstance(s[k], int) else f"{s[k]:>13.3f}" if s[k] is not None else f"{'-':>13}" for k in columns.values()))
    print(f"\nNA-LoRA step / LoRA step = {ratio:.3f} (median of {pairs} pairs of steps, in alternation)")
    write_json(out / "summary.json", {"runs": summaries, "nalora_over_lora_step_time": ratio})
    records = {method: [json.loads(line) for line in (out / method / "metrics.jsonl").read_text().splitlines()] for method in configs}
    draw_loss(records, out / "loss.png")


def main(argv=None):
    """Returns the exit code: 0, or 2 with one sentence on standard error for input that cannot be used; 130 after Ctrl-C."""
    args = command_line().parse_args(argv)
    out = args.out = args.out or Path("runs") / args.method
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}: give a number above zero.")
            torch.set_num_threads(args.threads)
        if args.draw_activations:
            draw_activations(args.draw_activations)
        elif args.sample is not None:
            sample(out, args.sample)
        elif args.method == "all":
            run_all(args)
        else:
            execute(resolve(args, args.method), out, args.resume)
    except (ValueError, OSError) as e:
        print(f"train_tiny.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was trained up to the last checkpoint is safe in {out}: run the same command with --resume to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
