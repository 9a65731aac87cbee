"""Trains the tiny Llama of data/base on two-step word problems: full fine-tuning, LoRA, NA-LoRA, its ablations and controls.

    python train_tiny.py --method nalora            about a minute on a laptop; results in runs/nalora
    python train_tiny.py --method all               full, lora and nalora on the same batches, one table
    python train_tiny.py --method nalora --resume   goes on after an interruption, to the same bits
    python train_tiny.py --compare                  methods x learning rates x seeds: tables and figures in runs/compare
    python train_tiny.py --sample "Ann has 23 apples. She buys 14 more. Later Ann sells 12 of them. How many apples does Ann have now?"
"""
import argparse
import base64
import concurrent.futures
import contextlib
import copy
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import peers
from nalora import (ACTIVATIONS, BLIND_MASKS, CHOICES, Llama, LlamaConfig, NALoRA, NALoRAConfig, activation, gate_sums, homogeneity, inject_lora, is_gated_ffn,
                    lora_parameters, merge_lora, read_json, regime, selection_entropy, selection_weight, value_and_slope, write_json, write_whole)
from peers import load_adapter, save_adapter                        # of any method: plain LoRA they leave to nalora

ROOT = Path(os.path.relpath(Path(__file__).resolve().parent))
DATA = ROOT / "data"
RANK, LOCAL_RANK, RANKS = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))      # of torchrun
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What each method sets in NALoRAConfig; None: no NALoRA. The controls are matched: the shuffled, random, redrawn and inverted masks to nalora-mask,
# the uniform scale to nalora-scale, nalora-shuffled and random-uniform to nalora.
METHODS = {"pretrain": None, "full": None, "lora": None, "nalora": {}, "nalora-mask": {"scale": "none"}, "nalora-scale": {"mask": "none"},
           "random-mask": {"mask": "random", "scale": "none"}, "inverted-mask": {"mask": "inverted", "scale": "none"},
           "uniform-scale": {"mask": "none", "scale": "uniform"}, "random-uniform": {"mask": "random", "scale": "uniform"},
           "nalora-neutral": {"budget": "neutral"}, "nalora-shuffled": {"mask": "shuffled"}, "shuffled-mask": {"mask": "shuffled", "scale": "none"},
           "redrawn-mask": {"mask": "redrawn", "scale": "none"},
           **dict.fromkeys(peers.PEERS), **{f"nalora-{peer}": {} for peer in ("rslora", "lora+", "dora", "pissa")}}
LEARNING_RATE, SGD_LEARNING_RATE = {"pretrain": 3e-3, "full": 2e-3}, 0.3      # every LoRA method with AdamW: 5e-3
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


class CheckpointTokenizer:
    """The tokenizer of a Hugging Face checkpoint directory, with the members of tiktoken.Encoding that this file uses."""

    def __init__(self, directory):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(f"{directory} has a tokenizer of its own: pip install transformers to read it.") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as e:                                      # transformers raises many kinds; all mean the same here
            raise ValueError(f"The tokenizer in {directory} cannot be read: {e}") from None
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer in {directory} has no end-of-sequence token, so a completion could not end.")
        self.n_vocab, self.eot_token = len(self.tokenizer), self.tokenizer.eos_token_id
        self.opening = self.tokenizer("").input_ids                 # what it puts before a text by itself: often one token, or none

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def tokenizer_of(base, data):
    """The checkpoint's own tokenizer if its directory has one, else that of the toy."""
    own = any((Path(base) / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    return CheckpointTokenizer(base) if own else load_tokenizer(data if Path(data).is_dir() else DATA)


def read_problems(path, answers=True):
    """A list of dicts with "prompt", "completion" and "answer" (a must if `answers`) from a JSON-lines file. ValueError names the file
    and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            p = json.loads(line)
            if not (isinstance(p["prompt"], str) and isinstance(p["completion"], str) and isinstance(p["answer"] if answers else p.get("answer", 0), int)):
                raise ValueError("prompt and completion must be texts, answer a whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{path}, line {number}: no problem with prompt, completion and answer ({e}).") from None
        problems.append(p)
    if not problems:
        raise ValueError(f"{path} holds no problem.")
    return problems


def read_splits(data):
    """{"train", "val", "test": problems} of a folder that has them as files, or of one file of prompts and completions: there every tenth
    line is kept for test and the line after it for validation."""
    if data.is_dir():
        return {split: read_problems(data / f"{split}.jsonl") for split in ("train", "val", "test")}
    problems = read_problems(data, answers=False)
    if len(problems) < 10:
        raise ValueError(f"{data} holds {len(problems)} problems: at least 10 are needed to train, validate and test.")
    kept = {0: "test", 1: "val"}
    return {split: [p for i, p in enumerate(problems) if kept.get(i % 10, "train") == split] for split in ("train", "val", "test")}


def encode_prompt(tokenizer, prompt):
    """Token ids, at least one: what the tokenizer opens a text with (the toy's: <|endoftext|>) and the prompt."""
    return [*getattr(tokenizer, "opening", [tokenizer.eot_token]), *tokenizer.encode_ordinary(prompt)] or [tokenizer.eot_token]


def encode_problem(tokenizer, problem):
    """(token ids, number of prompt tokens): opening, prompt, completion, end token."""
    prompt = encode_prompt(tokenizer, problem["prompt"])
    return [*prompt, *tokenizer.encode_ordinary(problem["completion"]), tokenizer.eot_token], len(prompt)


def check_length(path, lengths, context):
    """ValueError naming the first line (or problem) of a data file whose text does not fit the model's context."""
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


def text_windows(tokenizer, path):
    """A text file in consecutive windows of 129 tokens, (N, 129); the rest is left out. ValueError if it has no such window."""
    ids = torch.tensor(encode_text(tokenizer, path))
    if len(ids) < 129:
        raise ValueError(f"{path} has {len(ids)} tokens: at least 129 are needed.")
    return ids[:len(ids) // 129 * 129].view(-1, 129)


# ---- evaluation -------------------------------------------------------------------------------------------------------------------


MAX_NEW = 32                                                        # tokens of the toy's longest solution, and some


def solve(model, tokenizer, prompts, max_new_tokens=MAX_NEW):
    """Greedy completions of the prompts, in order. Prompts of equal length share a batch, so none needs padding."""
    device, answers, by_length = next(model.parameters()).device, {}, {}
    for i, prompt in enumerate(prompts):
        ids = encode_prompt(tokenizer, prompt)
        by_length.setdefault(len(ids), []).append((i, ids))
    for length, rows in by_length.items():
        out = model.generate(torch.tensor([ids for _, ids in rows], device=device), max_new_tokens, stop=tokenizer.eot_token)
        for (i, _), ids in zip(rows, out[:, length:].tolist()):
            answers[i] = tokenizer.decode(ids[:ids.index(tokenizer.eot_token)] if tokenizer.eot_token in ids else ids)
    return [answers[i] for i in range(len(prompts))]


def final_answer(text):
    """The number after "The answer is", or None."""
    found = re.search(r"The answer is (-?[0-9]+)", text)
    return int(found[1]) if found else None


def is_right(problem, completion):
    """Whether the final number is the problem's answer; for a problem without one, whether the completion is the given one."""
    return final_answer(completion) == problem["answer"] if "answer" in problem else completion.strip() == problem["completion"].strip()


def exact_match(model, tokenizer, problems, max_new_tokens=MAX_NEW):
    """(share of problems solved rightly, the completions)."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens)
    return sum(map(is_right, problems, completions)) / len(problems), completions


def arithmetic_accuracy(model, tokenizer, problems):
    """Share of equations ("12+5=") that the model completes rightly."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens=4)
    return sum(c.split(".")[0].strip() == str(p["answer"]) for c, p in zip(completions, problems)) / len(problems)


@torch.no_grad()
def mean_loss(model, batches):
    """Cross-entropy in nats per target token over a list of batches."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for tokens, targets, _ in batches:
        n = (targets != -100).sum().item()
        total, count = total + n * model(tokens.to(device), targets.to(device))[1].item(), count + n
    return total / count


# ---- one run ----------------------------------------------------------------------------------------------------------------------


class Diverged(ValueError):
    """The loss of a run is not finite."""


class Run:
    """Model, data, optimizer and (for NA-LoRA methods) NALoRA of one configuration. Writes nothing."""

    def __init__(self, config):
        self.config, self.data = config, Path(config["data"])
        self.rank, self.ranks = RANK, config.get("ranks", 1)
        self.device = torch.device(config["device"], LOCAL_RANK if config["device"] == "cuda" else None)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config["dtype"] == "bfloat16")
        method = config["method"]
        self.tokenizer = load_tokenizer(self.data) if method == "pretrain" else tokenizer_of(config["base"], self.data)
        own_equations = self.data / "arithmetic.jsonl"              # pre-training never saw them
        self.equations = read_problems(own_equations if own_equations.exists() else DATA / "arithmetic.jsonl")[:config["test_size"]]
        splits = read_splits(self.data)
        self.problems, self.max_new = splits["test"][:config["test_size"]], MAX_NEW
        torch.manual_seed(config["seed"])
        self.nalora = None
        if method == "pretrain":
            self.model = Llama(LlamaConfig(vocab_size=self.tokenizer.n_vocab, **TINY)).to(self.device)
            ids = encode_text(self.tokenizer, self.data / "pretrain.txt")
            self.batches = TextBatches(ids, config["batch_size"], 128, config["seed"])
            held_out = text_windows(self.tokenizer, self.data / "pretrain_val.txt")
            self.validation = [(held_out[:, :-1], held_out[:, 1:], None)]
        else:
            self.model = Llama.from_pretrained(config["base"]).to(self.device)
            vocabulary = self.model.config.vocab_size
            if vocabulary < self.tokenizer.n_vocab or vocabulary != self.tokenizer.n_vocab and not isinstance(self.tokenizer, CheckpointTokenizer):
                raise ValueError(f"{config['base']} has {vocabulary} tokens, its tokenizer has {self.tokenizer.n_vocab}.")
            encoded = {split: [encode_problem(self.tokenizer, p) for p in problems] for split, problems in splits.items()}
            self.batches = ProblemBatches(encoded["train"][:config["train_size"]], config["batch_size"], config["seed"], self.tokenizer.eot_token)
            by_length = sorted(encoded["val"], key=lambda e: len(e[0]))
            self.validation = [collate(by_length[i:i + 50], self.tokenizer.eot_token) for i in range(0, len(by_length), 50)]
            context = self.model.config.max_position_embeddings
            self.max_new = max(MAX_NEW, *(len(ids) - prompt for ids, prompt in encoded["train"]))
            for split in splits:
                lengths = [prompt + self.max_new if split == "test" else len(ids) - 1 for ids, prompt in encoded[split]]
                check_length(self.data / f"{split}.jsonl" if self.data.is_dir() else f"{self.data} ({split})", lengths, context)
        if "peer" in config:
            peers.inject(self.model, config["peer"], *(config[k] for k in ("targets", "rank", "alpha") if k in config))
        elif "rank" in config:
            inject_lora(self.model, config["targets"], config["rank"], config["alpha"])
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for p in self.trainable.values() if p.dim() == 2]
        others = [p for p in self.trainable.values() if p.dim() != 2]
        groups, common = [{"params": decayed}, {"params": others, "weight_decay": 0.0}] if others else decayed, {"weight_decay": config["weight_decay"], "fused": True}
        if config.get("peer") == "lora+":
            groups = peers.lora_plus_groups(self.model, config["lr"])
        if config["optimizer"] == "sgd":
            self.optimizer = torch.optim.SGD(groups, config["lr"], momentum=config["momentum"], **common)
        else:
            self.optimizer = torch.optim.AdamW(groups, config["lr"], betas=(config["beta1"], config["beta2"]), **common)
        self.rates = [group["lr"] / config["lr"] for group in self.optimizer.param_groups]              # 1, but for LoRA+'s B
        self.forward = DistributedDataParallel(self.model) if self.ranks > 1 else self.model
        if config.get("nalora"):
            self.nalora = NALoRA(self.model, self.optimizer, NALoRAConfig(**config["nalora"]))

    def learning_rate(self, step):
        """Linear warm-up, then a cosine down to zero."""
        warmup = max(1, round(self.config["warmup"] * self.config["steps"]))
        rest = max(1, self.config["steps"] - warmup)
        return self.config["lr"] * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / rest))

    def train_step(self, step):
        """One optimizer step. Returns the loss of its batch and its number of tokens, padding included."""
        batch = self.batches(step)
        tokens, targets, token_mask = (t if t is None else t[self.rank::self.ranks].to(self.device) for t in batch)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = self.learning_rate(step) * rate
        if self.nalora:
            self.nalora.token_mask = token_mask                     # the whole difference to a LoRA loop, and it is optional
        with self.autocast:
            _, loss = self.forward(tokens, targets)
        loss = self.shared(loss, targets, batch[1])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config["grad_clip"])
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise Diverged(f"The loss or its gradient is not finite at step {step + 1}: training stops there; try a smaller --lr.")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()                                # so that a clock around this step times all of it
        return self.mean_over_ranks(loss.detach()).item(), batch[0].numel()

    def shared(self, loss, targets, all_targets):
        """This rank's loss, weighted so that its mean over ranks is the mean over the targets of the whole batch."""
        return loss * ((targets != -100).sum() * self.ranks / (all_targets != -100).sum()) if self.ranks > 1 else loss

    def mean_over_ranks(self, value):
        if self.ranks == 1:
            return value
        torch.distributed.all_reduce(value)
        return value / self.ranks

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
            tensors.update({f"optimizer.{i}.{key}": value for key, value in slots.items() if value is not None})    # SGD's momentum 0
        if self.nalora:
            state = self.nalora.state_dict()
            tensors.update({f"nalora.{name}/{key}": v for name, s in state["ffns"].items() for key, v in s.items()}, steps=torch.tensor(state["steps"]))
        return {name: t.contiguous() for name, t in tensors.items()}

    def load_state(self, tensors):
        """Takes over what `state` gave. Raises if a tensor is missing, misshapen or not finite."""
        slots, ffns, held = {}, {}, [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, p in self.trainable.items():
            if tensors[f"model.{name}"].shape != p.shape:
                raise ValueError(f"{name} has another shape")
        for name, tensor in tensors.items():
            if not name.startswith("nalora.") and not tensor.isfinite().all():              # k_hat is NaN until something is observed
                raise ValueError(f"{name} is not finite")
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                i, key = rest.split(".")
                if tensor.dim() and tensor.shape != held[int(i)].shape:
                    raise ValueError(f"{name} has another shape")
                slots.setdefault(int(i), {})[key] = tensor
            if kind == "nalora":
                ffn, key = rest.split("/")
                ffns.setdefault(ffn, {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.nalora:
            self.nalora.load_state_dict({"config": asdict(self.nalora.config), "steps": int(tensors["steps"]), "ffns": ffns})
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(tensors[f"model.{name}"])


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
                raise Diverged(f"The validation loss is not finite at step {step}: training stops there; try a smaller --lr.")
            if run.nalora:
                now = run.nalora.statistics()
                record["layers"], masks = layer_record(now, masks), {name: s["mask"] for name, s in now.items()}
            records.append(record)
            if run.rank == 0:
                save_checkpoint(run, out, step, records)
            elapsed = time.perf_counter() - began
            left = elapsed / (step - first) * (config["steps"] - step)
            print(f"step {step:5d}/{config['steps']}  loss {record['loss']:.4f}  val_loss {record['val_loss']:.4f}  "
                  f"{seen / elapsed:7,.0f} tokens/s  {left:4.0f} s left", flush=True)
    if run.rank == 0:
        write_lines(out / "metrics.jsonl", records)                 # in case the last session ended between checkpoint and metrics
    return records, times


def save_checkpoint(run, out, step, records):
    """One file, replaced whole, so that a kill at any moment leaves either the old state or the new one."""
    tensors, about = run.state(), json.dumps({"config": run.config, "step": step, "records": records})
    metadata = {"run": json.dumps({"about": about, "sha256": digest(about, tensors)})}     # one key: a fixed byte order
    write_whole(out / "checkpoint.safetensors", lambda path: save_file(tensors, path, metadata))
    write_lines(out / "metrics.jsonl", records)


def digest(about, tensors):
    """SHA-256 of a text and of the names, dtypes, shapes and bytes of tensors: what was changed since it was taken is noticed."""
    sha = hashlib.sha256(about.encode())
    for name, t in sorted(tensors.items()):
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


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
                metadata, tensors = json.loads(f.metadata()["run"]), {key: f.get_tensor(key) for key in f.keys()}
            if digest(metadata["about"], tensors) != metadata["sha256"]:
                raise ValueError("its content is not what was written")
            state = {**json.loads(metadata["about"]), "tensors": tensors}
            saved_config, _, _ = state["config"], state["step"], state["records"]
        except Exception as e:                                      # safetensors raises several kinds; all mean the same here
            raise ValueError(f"{path} is no readable checkpoint of this program: {e}") from None
    differ = sorted(k for k in {*saved_config, *config} if saved_config.get(k) != config.get(k))
    if differ == ["threads"]:
        saved = saved_config.get("threads")
        raise ValueError(f"{out} was trained with {saved} threads, now there are {config['threads']}: sums would be rounded in another order and the "
                         f"result would not be the uninterrupted run's bit for bit. Add --threads {saved}.")
    if differ:
        k = differ[0]
        raise ValueError(f"{out} holds a run with {k} = {saved_config.get(k)!r}, not {config.get(k)!r}: resume it with its own settings, or choose another --out.")
    return state


def prepare(config, out, resume):
    """(Run, state to resume from or None). All that can be wrong with a run is found here, before anything is written."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds a run: add --resume to go on with it, or choose another --out.")
    run, state = Run(config), load_checkpoint(out, config) if resume else None
    if state:
        try:
            run.load_state(state["tensors"])
        except Exception as e:                                      # missing, misshapen, not finite: many kinds, and all mean the same here
            raise ValueError(f"{out / 'checkpoint.safetensors'} is no checkpoint of this run: {e}") from None
    return run, state


def execute(config, out, resume):
    """One run from configuration to summary. Returns the summary, which is also written to out/summary.json."""
    began = time.perf_counter()
    run, state = prepare(config, out, resume)
    if state and (out / "summary.json").exists():
        print(f"{out} is finished already; its summary:")
        print((out / "summary.json").read_text())
        return read_summary(out)
    total = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.trainable.values())
    print(json.dumps(config, indent=2))
    print(f"{trainable:,} of {total:,} parameters train ({trainable / total:.1%})", flush=True)
    for error in {m.fit_error for m in run.model.modules() if isinstance(m, peers.RationalActivation)}:
        print(f"NoRA's rational function is within {error:.1e} of the model's activation on [-8, 8]", flush=True)
    if run.ranks > 1:
        torch.distributed.barrier()                                 # all ranks have read what there was before rank 0 writes
    if run.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", config)
    reset_peak_memory(run.device)
    records, times = train(run, out, state)
    if run.rank:
        return None
    memory = peak_memory_mb(run.device)
    run.model.eval()
    summary = {"method": config["method"], "seed": config["seed"], "val_loss": records[-1]["val_loss"], "trainable_parameters": trainable,
               "total_parameters": total, "step_ms": 1000 * statistics.median(times) if times else None, "train_seconds": sum(times),
               "arithmetic_accuracy": None, "test_exact_match": None}
    completions = []
    if run.problems:                                                # --test-size 0 judges on validation loss alone
        summary["arithmetic_accuracy"] = arithmetic_accuracy(run.model, run.tokenizer, run.equations)
        summary["test_exact_match"], completions = exact_match(run.model, run.tokenizer, run.problems, run.max_new)
    if config["method"] not in ("pretrain", "full"):
        save_adapter(run.model, out / "adapter", base_model=config["base"], settings=config)
        results = next((out / "adapter").glob("*.safetensors"))
    else:
        run.model.save_pretrained(out / "model", torch.float16 if config["method"] == "pretrain" else None)
        results = out / "model" / "model.safetensors"
    summary["file_bytes"] = results.stat().st_size
    draw_loss({config["method"]: records}, out / "loss.png")
    if run.nalora:
        draw_layers(records, out / "nalora.png")
    summary.update(peak_memory_mb=memory, wall_seconds=time.perf_counter() - began, threads=torch.get_num_threads(),
                   machine=platform.machine(), python=platform.python_version(), torch=torch.__version__)
    write_json(out / "summary.json", summary)
    for problem, completion in list(zip(run.problems, completions))[:3]:
        verdict = "right" if is_right(problem, completion) else f"wrong, {problem.get('answer', problem['completion'])} was asked for"
        print(f"\n  {problem['prompt'].strip()}\n  {completion}   [{verdict}]")
    if run.problems:
        print(f"\n{config['method']}: exact match {summary['test_exact_match']:.3f} on {len(run.problems)} test problems, "
              f"held-out equations right {summary['arithmetic_accuracy']:.3f}")
    print(f"validation loss {summary['val_loss']:.4f}")
    step_ms = f"{summary['step_ms']:.1f} ms a step, " if times else ""
    print(f"{step_ms}{summary['train_seconds']:.0f} s of training, {summary['wall_seconds']:.0f} s in all, peak memory {memory:,.0f} MB; written to {out}")
    return summary


def read_summary(out):
    """The summary of a finished run. ValueError if it is something else."""
    summary = read_json(out / "summary.json")
    needed = {"val_loss", "diverged"} if summary.get("val_loss", 0) is None else {"val_loss", "test_exact_match", "arithmetic_accuracy", "trainable_parameters",
                                                                               "peak_memory_mb", "file_bytes", "step_ms", "train_seconds"}
    if missing := sorted(needed - set(summary)):
        raise ValueError(f"{out / 'summary.json'} lacks {missing[0]}: it is no summary of this program. Delete {out} to run it anew.")
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


# ---- the comparison: variants x learning rates x seeds, judged by paired differences ------------------------------------------------


COMPARED = ["full", "lora", "nalora", "nalora-neutral", "nalora-mask", "nalora-scale", "nalora-shuffled", "shuffled-mask", "random-mask", "inverted-mask", "uniform-scale"]
CONTROLS = {"nalora": ["nalora-shuffled", "random-mask", "random-uniform"], "nalora-neutral": ["nalora"],
            "nalora-mask": ["shuffled-mask", "random-mask", "redrawn-mask", "inverted-mask"], "redrawn-mask": ["shuffled-mask", "random-mask"],
            "nalora-scale": ["uniform-scale"], **{peer: ["nalora"] for peer in peers.PEERS}, **{f"nalora-{peer}": [peer] for peer in peers.PEERS}}
TUNING_GRID = {"adamw": [1e-3, 2.5e-3, 6e-3, 1.5e-2], "sgd": [0.1, 0.3, 1.0, 3.0]}      # one grid for every variant
SWEEPS = {"rank": [f"rank={r},alpha={2 * r}" for r in (1, 2, 4, 8, 16)], "train-size": ["train-size=100", "train-size=300", ""],
          "targets": ["", "targets=gate_proj+up_proj+down_proj", "targets=gate_proj"], "keep": [f"keep={k}" for k in (0.05, 0.1, 0.25, 0.5)],
          "score": ["score=phi_prime", "score=rho_prime", "score=downstream"], "optimizer": ["optimizer=adamw", "optimizer=sgd"]}
# table: {column of a run: (title, digits)}
COLUMNS = {"results": {"val_loss": ("validation loss", 4), "test_exact_match": ("exact match", 3), "text_loss_increase": ("forgetting: text loss", 3),
                       "arithmetic_accuracy": ("held-out equations", 3)},
           "selection": {"misalignment": ("misalignment M", 3), "shift_cosine": ("selection-shift cosine", 3), "weight_cosine": ("weight cosine", 3),
                         "entropy": ("selection entropy", 4), "rows_moved": ("gate rows moved", 2)}}
DIFFERENCES = {**COLUMNS["results"], "misalignment": COLUMNS["selection"]["misalignment"]}      # what is compared seed by seed
HIGHER_IS_BETTER = ("test_exact_match", "arithmetic_accuracy")
ALL_VALUES = {"train-size": "all", "targets": "all linear"}         # what a sweep's empty value means
MAY_DIFFER = ["steps", "batch-size", "lr", "warmup", "weight-decay", "optimizer", "beta1", "beta2", "momentum", "grad-clip", "train-size", "rank", "alpha",
              "targets", *(f.name for f in fields(NALoRAConfig) if f.name != "seed")]


def configure(args, spec, **changes):
    """The run configuration of a variant such as "lora" or "nalora-mask:keep=0.1,targets=gate_proj+up_proj", with attributes changed."""
    def refuse(message):
        raise ValueError(f"--methods: {spec!r} cannot be read: {message}.")
    method, _, flags = spec.partition(":")
    if method not in METHODS or method == "pretrain":
        raise ValueError(f"--methods: {spec!r} names no method; choose among {', '.join(m for m in METHODS if m != 'pretrain')}.")
    words, parser = [], command_line()
    for name, _, value in (flag.partition("=") for flag in flags.split(",") if flag):
        if name not in MAY_DIFFER:
            refuse(f"{name!r} is not among the flags in which variants may differ, {', '.join(MAY_DIFFER)}")
        words += [f"--{name}", *filter(None, value.split("+"))]
    parser.error = refuse
    changed = parser.parse_args(words, argparse.Namespace(**{**vars(args), **changes}))
    return {**resolve(changed, method), "threads": args.threads}


def variants_of(args):
    """{label: {"method", "spec" (of --methods), "changes" (flags), "value" (of the sweep)}}. A method that no value touches occurs once,
    with the value None."""
    variants, values = {}, SWEEPS.get(args.sweep, [""])
    if args.values:
        if args.sweep == "rank" and not all(map(str.isdecimal, args.values)):
            raise ValueError(f"--values {' '.join(args.values)}: ranks are whole numbers.")
        values = [f"rank={value},alpha={2 * int(value)}" if args.sweep == "rank" else f"{args.sweep}={value}" for value in args.values]
    for spec in args.methods:
        if ":" in spec and configure(args, spec) == configure(args, spec.partition(":")[0]) and not names_rate(spec):
            raise ValueError(f"--methods: {spec!r} is the same run as {spec.partition(':')[0]!r}: its flags have no effect there, or are the defaults.")
        labels = {spec + (":,"[":" in spec] + value if value else ""): value for value in values}
        if all(configure(args, label) == configure(args, spec) for label in labels):
            labels = {spec: None}
        for label, value in labels.items():
            variants[label] = {"method": spec.partition(":")[0], "spec": spec, "changes": label.partition(":")[2], "value": value}
    return variants


def follow_parent():
    """Ends this worker at Ctrl-C and when the program that started it is killed: none is left to write into a run that is resumed."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(out, config, keep):
    """One run of a comparison; what it prints goes to log.txt in its folder. A run whose loss is not finite has the summary val_loss null."""
    torch.set_num_threads(config["threads"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            execute(config, out, resume=True)
        except Diverged as e:
            write_json(out / "summary.json", {"val_loss": None, "diverged": str(e)})
    for path in [out / "checkpoint.safetensors"] + [out / "model" / "model.safetensors"] * (not keep):
        path.unlink(missing_ok=True)                                # gigabytes for a real model; a summary says that the run is finished
    return read_summary(out)


def run_jobs(jobs, workers, later=0):
    """{name: summary} of {name: (folder, configuration, whether its weights are kept)}; finished ones are read, not repeated. The time left is told
    with that of `later` more runs."""
    done = {}
    for name, (out, config, _) in jobs.items():
        if (out / "summary.json").exists():
            if read_json(out / "config.json") != config:
                raise ValueError(f"{out} holds a run with other settings: choose another --out, or use the flags that it was made with.")
            done[name] = read_summary(out)
    todo, began, at_start = {name: job for name, job in jobs.items() if name not in done}, time.perf_counter(), len(done)
    print(f"{len(jobs)} runs, {len(done)} of them finished already", flush=True)
    for name, summary in job_results(todo, workers):
        done[name] = summary
        left = (time.perf_counter() - began) / (len(done) - at_start) * (len(jobs) - len(done) + later) / 60
        loss = "diverged" if summary["val_loss"] is None else f"val_loss {summary['val_loss']:.4f}"
        exact = "" if summary.get("test_exact_match") is None else f"  exact match {summary['test_exact_match']:.3f}"
        print(f"[{len(done)}/{len(jobs)}] {name}: {loss}{exact}   about {left:.0f} min left", flush=True)
    return done


def job_results(jobs, workers):
    """Yields (name, summary) as the jobs end. One worker: in this process."""
    if workers == 1 or len(jobs) < 2:
        yield from ((name, run_job(*job)) for name, job in jobs.items())
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent) as pool:
        futures = {pool.submit(run_job, *job): name for name, job in jobs.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.BrokenExecutor:
            raise ValueError("A run was killed from outside, perhaps for want of memory: give the same command again to go on, or fewer --jobs.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def job(args, label, lr, seed, **changes):
    """(folder, configuration) of one run."""
    return args.out / re.sub(r"[^\w.-]", "-", label) / f"lr{lr:g}-seed{seed}", configure(args, label, lr=lr, seed=seed, **changes)


def grid(args, label):
    """The learning rates that a variant is tuned over: those of every variant, unless it names its own ("full:lr=0.002")."""
    config = configure(args, label)
    return [config["lr"]] if names_rate(label) else args.lrs or TUNING_GRID[config["optimizer"]]


def names_rate(spec):
    return re.search(r"[:,]lr=", spec)


def tune(args, variants):
    """{label: {learning rate: mean validation loss over the tuning seeds, None where one diverged or there is no choice}}. No test data."""
    grids = {label: grid(args, label) for label in variants}
    name = "{} lr={:g} seed={}".format
    at_its_end = {"test_size": 0, "eval_every": 10**9}              # is how a tuning run is judged
    summaries = run_jobs({name(label, lr, seed): (*job(args, label, lr, seed, **at_its_end), False)
                          for label, rates in grids.items() if len(rates) > 1 for lr in rates for seed in args.tuning_seeds}, args.jobs,
                         later=len(variants) * len(args.seeds))
    losses = {label: dict.fromkeys(rates) for label, rates in grids.items()}
    for label, rates in grids.items():
        for lr in rates if len(rates) > 1 else ():
            values = [summaries[name(label, lr, seed)]["val_loss"] for seed in args.tuning_seeds]
            losses[label][lr] = None if None in values else statistics.mean(values)
        if len(rates) > 1 and not any(losses[label].values()):
            raise ValueError(f"{label} diverged at every learning rate: give smaller ones with --lrs.")
    return losses


def compare(args):
    """Tunes, runs, measures, writes comparison.json, .csv, .md and figures to args.results. Goes on where it was cut."""
    variants = variants_of(args)
    for label in variants:                                          # all that can be wrong is found before anything is written
        for lr in grid(args, label):
            configure(args, label, lr=lr)
        Run(configure(args, label))
    args.results.mkdir(parents=True, exist_ok=True)
    for label, losses in tune(args, variants).items():
        variants[label]["tuning"] = list(losses.items())
        variants[label]["lr"] = min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])
    jobs = {f"{label} seed={seed}": (*job(args, label, variant["lr"], seed), True) for seed in args.seeds for label, variant in variants.items()}
    summaries = run_jobs(jobs, args.jobs)
    torch.set_num_threads(args.jobs * args.threads)                 # from here on this process works alone
    rows, base = measure(args, variants, jobs, summaries)
    configurations = [configure(args, variant["spec"]) for variant in variants.values()]
    result = rounded({"variants": variants, "sweep": args.sweep, "seeds": args.seeds, "tuning_seeds": args.tuning_seeds, "base": base, "rows": rows,
                      "configuration": max(configurations, key=lambda c: "rank" in c), "step_time": step_times(args, variants, jobs, summaries), "machine": machine()})
    write_json(args.results / "comparison.json", result)
    result = read_json(args.results / "comparison.json")
    for name, text in (("comparison.csv", csv_text(rows)), ("comparison.md", markdown(result))):
        write_whole(args.results / name, lambda path: path.write_text(text, encoding="utf-8"))
    draw_comparison(result, args.results)
    if not args.sweep and "nalora" in variants:
        figure = args.out / f"at_work-lr{variants['nalora']['lr']:g}.png"                   # it trains two runs anew: once is enough
        if not figure.exists():
            draw_at_work(jobs, args.seeds[0], figure)
        write_whole(args.results / "at_work.png", lambda path: shutil.copyfile(figure, path))
    print(f"\n{markdown(result)}\nwritten to {args.results}")


# ---- what is measured on the trained models of a comparison ---------------------------------------------------------------------------


def trained_model(out):
    """The model of a finished run, its adapter merged."""
    config = read_json(out / "config.json")
    if config["method"] == "full":
        return Llama.from_pretrained(out / "model").eval()
    model = Llama.from_pretrained(config["base"]).eval()
    load_adapter(model, out / "adapter")
    if config.get("peer") == "nora++":
        merge_lora(model)                                           # its weights merge, its activation cannot
    elif config.get("peer") != "nora":
        peers.merge(model)
    return model


@torch.no_grad()
def answer_gates(model, batches, limit=4000):
    """{FFN name: gates z (N, F)} of at most `limit` answer tokens, evenly spread over the batches."""
    total, found, handles = sum((targets != -100).sum().item() for _, targets, _ in batches), {}, []
    for name, ffn in model.named_modules():
        if is_gated_ffn(ffn):
            hook = lambda _, __, z, name=name: found.setdefault(name, []).append(z[chosen][::math.ceil(total / limit)])
            handles.append(ffn.gate_proj.register_forward_hook(hook))
    for tokens, targets, _ in batches:
        chosen = targets != -100
        model(tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def observe(model, batches):
    """({FFN: gates (N, F)}, {FFN: gate weight}, {FFN: activation}) of a model, the gates on answer tokens."""
    ffns = {name: ffn for name, ffn in model.named_modules() if is_gated_ffn(ffn)}
    return answer_gates(model, batches), {name: ffn.gate_proj.weight.detach() for name, ffn in ffns.items()}, {name: activation(ffn) for name, ffn in ffns.items()}


def centred(act):
    """phi(z) - phi(0): phi itself, but for NoRA, which moves phi(0) too and would give rho = phi / z a pole."""
    return lambda z: act(z) - act(torch.zeros_like(z))


def selection_measures(model, base, full):
    """{column: [value per FFN]} from what `observe` saw of the model, the base and the fully fine-tuned reference (or None). M and the
    cosine of shifts are taken of rho itself, since NoRA's activation is not the base's."""
    (z, w), acts = model[:2], {n: centred(act) for n, act in model[2].items()}
    columns = {"entropy": [selection_entropy(acts[n], z[n]).item() for n in z], "k_hat": [regime(gate_sums(acts[n], z[n])[-4:], z[n].size(1))[0].item() for n in z]}
    if full:
        rho = lambda seen, n: selection_weight(centred(seen[2][n]), seen[0][n])
        moved, aim = ({n: rho(seen, n) - rho(base, n) for n in z} for seen in (model, full))
        columns["misalignment"] = [((moved[n] - aim[n]).norm() / aim[n].norm()).item() for n in z]
        columns["shift_cosine"] = [cosine(moved[n], aim[n]) for n in z]
        columns["weight_cosine"] = [cosine(w[n] - base[1][n], full[1][n] - base[1][n]) for n in z]
    return columns


@torch.no_grad()
def truncated(full, base, targets, rank):
    """base plus the best approximation of rank `rank` (None: all of it) of full fine-tuning's change in each target linear layer."""
    model = copy.deepcopy(base)
    theirs = dict(full.named_modules())
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            delta = theirs[name].weight - linear.weight
            if rank:
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                delta = u[:, :rank] * s[:rank] @ v[:rank]
            linear.weight += delta
    return model


def held_out_text(base, run):
    """Windows (B, T) to measure forgetting on: held-out pre-training text for the toy; for another base, text that it writes itself at
    temperature 1, where the increase of the loss estimates KL(base || tuned)."""
    if not isinstance(run.tokenizer, CheckpointTokenizer):
        return text_windows(run.tokenizer, DATA / "pretrain_val.txt")
    start = torch.full((32, 1), (run.tokenizer.opening or [run.tokenizer.eot_token])[0])
    return base.generate(start, 128, temperature=1.0, generator=torch.Generator().manual_seed(0))


def measure(args, variants, jobs, summaries):
    """(one row per variant and seed, what the base measures). A row without selection columns: no full fine-tuning to compare with."""
    run = Run(configure(args, next(iter(variants))))
    base = Llama.from_pretrained(run.config["base"]).eval()
    text = held_out_text(base, run)
    text_loss = lambda model: mean_loss(model, [(part[:, :-1], part[:, 1:], None) for part in text.split(16)])

    def val_loss(model):                                            # as Run.validate takes it
        with run.autocast:
            return mean_loss(model.to(run.device), run.validation)
    base_text_loss, base_seen, rows = text_loss(base), observe(base, run.validation), []
    full_of = {label: next((other for other, v in variants.items() if v["method"] == "full" and v["value"] in (None, own["value"])), None)
               for label, own in variants.items()}
    configs = [jobs[f"{label} seed={args.seeds[0]}"][1] for label in variants]
    lora = next((config for config in configs if "rank" in config), {"rank": 8, "targets": ALL_LINEAR})
    for seed in args.seeds:
        print(f"measuring the models of seed {seed}", flush=True)
        references = {label: trained_model(jobs[f"{label} seed={seed}"][0]) for label in set(full_of.values()) - {None} if "diverged" not in summaries[f"{label} seed={seed}"]}
        seen = {label: observe(model, run.validation) for label, model in references.items()}
        for label in variants:
            out, config, _ = jobs[f"{label} seed={seed}"]
            if "diverged" in summaries[f"{label} seed={seed}"]:
                rows.append({"variant": label, "seed": seed, "lr": config["lr"], "diverged": True})
                continue
            path, full_seen = out / "measures.json", seen.get(full_of[label])
            reference = full_seen and str(jobs[f"{full_of[label]} seed={seed}"][0].relative_to(args.out))
            if not path.exists() or read_json(path).get("reference", "") != reference:              # not measured yet, or against another one
                model = trained_model(out)
                layers = selection_measures(observe(model, run.validation), base_seen, full_seen)
                write_json(path, {"reference": reference, "text_loss_increase": text_loss(model) - base_text_loss, "layers": layers})
            measured, summary = read_json(path), summaries[f"{label} seed={seed}"]
            row = {"variant": label, "seed": seed, "lr": config["lr"], **{k: summary[k] for k in (
                "val_loss", "test_exact_match", "arithmetic_accuracy", "trainable_parameters", "peak_memory_mb", "file_bytes", "step_ms", "train_seconds")}}
            rows.append({**row, **measured, **{k: statistics.mean(v) for k, v in measured["layers"].items()}, "rows_moved": rows_moved(out), "history": history(out)})
        previous = args.seeds[args.seeds.index(seed) - 1]
        for label in references if previous != seed and not args.sweep else ():            # how far apart two full fine-tunings are
            if "diverged" in summaries[f"{label} seed={previous}"]:
                continue
            other = observe(trained_model(jobs[f"{label} seed={previous}"][0]), run.validation)
            layers = selection_measures(other, base_seen, seen[label])
            rows.append({"variant": "full, another seed", "seed": seed, "layers": layers, **{k: statistics.mean(v) for k, v in layers.items()}})
        for label, rank in itertools.product(references if not args.sweep else (), (lora["rank"], None)):
            model = truncated(references[label], base, lora["targets"], rank)
            layers = selection_measures(observe(model, run.validation), base_seen, seen[label])
            name = f"full, best rank {rank}" if rank else "full, linear layers"
            rows.append({"variant": name, "seed": seed, "text_loss_increase": text_loss(model) - base_text_loss, "val_loss": val_loss(model),
                         "layers": layers, **{k: statistics.mean(v) for k, v in layers.items()}})
    layers = selection_measures(base_seen, base_seen, None)
    return rows, {"path": run.config["base"], "val_loss": val_loss(base), "text_loss": base_text_loss, "layers": layers,
                  "positive": [(z > 0).float().mean().item() for z in base_seen[0].values()],
                  "arithmetic_accuracy": arithmetic_accuracy(base, run.tokenizer, run.equations) if run.equations else None,
                  "test_exact_match": exact_match(base, run.tokenizer, run.problems, run.max_new)[0] if run.problems else None,
                  **{k: statistics.mean(v) for k, v in layers.items()}}


def rows_moved(out):
    """Share of the rows of B_gate that are not zero as they were at the start, mean over FFNs; None if no gate carries LoRA."""
    path = out / "adapter" / "adapter_model.safetensors"
    weights = load_file(path) if path.exists() else {}
    shares = [B.any(dim=1).float().mean().item() for name, B in weights.items() if name.endswith("gate_proj.lora_B.weight")]
    return statistics.mean(shares) if shares else None


def history(out):
    """[[step, [k_hat per FFN], [scale per FFN]], ...] of a run whose method observes the gates, else []."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [(r["step"], list(r["layers"].values())) for r in records if "layers" in r]
    return [[step, *([s[key] for s in layers] for key in ("k_hat", "scale"))] for step, layers in seen if None not in (s["k_hat"] for s in layers)]


def step_times(args, variants, jobs, summaries):
    """{label: its step time / LoRA's}, in alternation in this process; kept in args.out, since another day's timing would differ."""
    if args.sweep or "lora" not in variants:
        return {}
    path, name = args.out / "step_time.json", lambda label: f"{label} seed={args.seeds[0]}"
    known = read_json(path) if path.exists() else {"lora": 1.0}
    pairs = max(5, min(60, int(10_000 / (summaries[name("lora")]["step_ms"] or 1000))))
    for label in variants:
        if label not in known:
            print(f"timing the steps of {label}", flush=True)
            known[label] = step_time_ratio(jobs[name("lora")][1], jobs[name(label)][1], pairs)
            write_json(path, known)
    return {label: known[label] for label in variants}


def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*: (.*)", info, re.M)
    return {"processor": named[1].strip() if named else platform.machine(), "cores": os.cpu_count(), "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__}


def rounded(value):
    """The value with every float at six significant digits, and NaN as null: results stay small and are JSON."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value


# ---- statistics and tables of a comparison -------------------------------------------------------------------------------------------


def bootstrap_interval(values, resamples=10_000):
    """(low, high) of the 95 % percentile bootstrap interval of the mean of the values (N,)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def by_seed(comparison, label, column):
    """{seed: value} of a variant; seeds where the column was not measured are missing."""
    return {row["seed"]: row[column] for row in comparison["rows"] if row["variant"] == label and row.get(column) is not None}


def paired_difference(ours, theirs):
    """(mean, low, high, in how many seeds its sign is the mean's) of ours - theirs, {seed: value} each, over their common seeds. ValueError if there
    are fewer than two."""
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        raise ValueError(f"A paired difference needs two seeds in common; here there are {len(seeds)}.")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.mean(differences)
    return (mean, *bootstrap_interval(differences), sum(d * mean > 0 for d in differences))


def references(comparison, label):
    """Labels that a variant is compared with, at its value of the sweep: every LoRA, its own method without flags, and of each control the
    one whose flags differ least, of the same score if it looks at the gates."""
    variants, own = comparison["variants"], comparison["variants"][label]
    of = lambda method: [other for other, v in variants.items() if v["method"] == method and other != label and v["value"] in (None, own["value"])]
    differing = lambda other: len(set(own["changes"].split(",")) ^ set(variants[other]["changes"].split(",")))
    score = lambda v: (re.findall(r"score=(\w+)", v["changes"]) or [NALoRAConfig.score])[0]
    blind = lambda v: (METHODS[v["method"]] or {"mask": "none"}).get("mask") in BLIND_MASKS
    fair = lambda method: [other for other in of(method) if blind(variants[other]) or score(variants[other]) == score(own)]
    controls = [min(fair(method), key=differing) for method in CONTROLS.get(own["method"], []) if fair(method)]
    plain = [other for other in of(own["method"]) if variants[other]["changes"] == (own["value"] or "")]
    return list(dict.fromkeys(of("lora") * (own["method"] != "lora") + plain + controls))


def describe(ours, theirs, digits):
    """"mean [low, high] verdict" of ours - theirs, {seed: value} each; a called difference with the number of seeds that agree in its sign.
    "-" where fewer than two seeds have both."""
    if len(set(ours) & set(theirs)) < 2:
        return "-"
    mean, low, high, agree = paired_difference(ours, theirs)
    verdict = "no difference seen" if low <= 0 <= high else f"{'lower' if mean < 0 else 'higher'} in {agree} of {len(set(ours) & set(theirs))}"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {verdict}"


def mean_and_deviation(values, digits):
    values = list(values)
    if not values:
        return "-"
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(comparison):
    """{"about", "results", "selection", "differences", "costs": Markdown} of a comparison, from comparison.json alone."""
    variants, rows, m, c = (comparison[k] for k in ("variants", "rows", "machine", "configuration"))
    adapters = f"LoRA of rank {c['rank']} and alpha {c['alpha']:g} on {'all linear layers' if c['targets'] == ALL_LINEAR else ', '.join(c['targets'])}, " if "rank" in c else ""
    text = {"about": f"Base {c['base']}, {c['train_size'] or 'all'} examples of {c['data']}, {adapters}{c['steps']} steps of {c['batch_size']}, {c['optimizer']}, {c['dtype']}; "
                     f"seeds {', '.join(map(str, comparison['seeds']))}; {tuning_text(comparison)}. {m['cores']} cores of {m['processor']}, Python {m['python']}, "
                     f"PyTorch {m['torch']}."}
    for name, columns in COLUMNS.items():
        columns = measured(comparison, columns)
        base = ["base", "", *(f"{comparison['base'][k]:.{digits}f}" if comparison["base"].get(k) is not None else "-" for k, (_, digits) in columns.items())]
        lines = [[label + diverged_text(rows, label), rate_text(variants[label]) if label in variants else "",
                  *(mean_and_deviation(by_seed(comparison, label, k).values(), digits) for k, (_, digits) in columns.items())]
                 for label in dict.fromkeys(row["variant"] for row in rows)]
        text[name] = markdown_table(["", "lr", *(title for title, _ in columns.values())], [base, *lines])
    if len(comparison["seeds"]) > 1:
        columns = measured(comparison, DIFFERENCES)

        def difference(label, other, k):
            if variants[label]["method"] == "full" and k == "misalignment":                 # 0 by definition: not a result
                return "-"
            return describe(by_seed(comparison, label, k), by_seed(comparison, other, k), columns[k][1])

        text["differences"] = markdown_table(["", *(title for title, _ in columns.values())], [
            [f"{label} - {other}", *(difference(label, other, k) for k in columns)] for label in variants for other in references(comparison, label)])
    if comparison["step_time"]:
        runs = {label: own for label in variants if (own := [row for row in rows if row["variant"] == label and "diverged" not in row])}
        text["costs"] = markdown_table(["", "trainable parameters", "step time / LoRA", "peak memory (MB)", "file (kB)"], [
            [label, f"{r[0]['trainable_parameters']:,}", f"{comparison['step_time'][label]:.2f}", f"{statistics.median(x['peak_memory_mb'] for x in r):,.0f}",
             f"{r[0]['file_bytes'] / 1e3:,.0f}"] for label, r in runs.items()])
    return text


def sweep_table(comparisons, column):
    """Markdown of mean paired differences: a row per pair of methods, a column per value of each sweep. Bold: every seed has that sign; in brackets: no
    difference seen."""
    pairs = {}
    for c in comparisons:
        for label, own in c["variants"].items():
            for other in references(c, label):
                value, ours, theirs = own["value"] or c["variants"][other]["value"], by_seed(c, label, column), by_seed(c, other, column)
                if value and len(seeds := set(ours) & set(theirs)) > 1:
                    mean, low, high, agree = paired_difference(ours, theirs)
                    text = f"{mean:+.{DIFFERENCES[column][1]}f}"
                    text = f"({text})" if low <= 0 <= high else f"**{text}**" if agree == len(seeds) else text
                    pairs.setdefault(f"{own['spec']} - {c['variants'][other]['spec']}", {})[f"{sweep_title(c)} {value.partition('=')[2]}"] = text
    headings = list(dict.fromkeys(heading for cells in pairs.values() for heading in cells))
    return markdown_table(["", *headings], [[pair, *(cells.get(heading, "") for heading in headings)] for pair, cells in pairs.items()])


def base_name(comparison):
    path = Path(comparison["base"]["path"])
    return "toy" if path.parts[-2:] == ("data", "base") else path.name


def sweep_title(comparison):
    """What a column or a panel of several sweeps is headed by, such as "toy, AdamW"."""
    return f"{base_name(comparison)}, {'SGD' if comparison['configuration']['optimizer'] == 'sgd' else 'AdamW'}"


def diverged_text(rows, label):
    own = [row for row in rows if row["variant"] == label]
    diverged = sum("diverged" in row for row in own)
    return f" ({diverged} of {len(own)} seeds diverged)" if diverged else ""


def rate_text(variant):
    """The learning rate of a variant, marked where it was the lowest or highest of its grid, so that the best one may lie beyond."""
    rates = [lr for lr, _ in variant["tuning"]]
    edge = " (lowest)" if variant["lr"] == min(rates) else " (highest)" if variant["lr"] == max(rates) else ""
    return f"{variant['lr']:g}" + edge * (len(rates) > 1)


def measured(comparison, columns):
    """Those of the columns that some run has."""
    return {k: v for k, v in columns.items() if any(row.get(k) is not None for row in comparison["rows"])}


def tuning_text(comparison):
    rates = sorted({lr for v in comparison["variants"].values() if len(v["tuning"]) > 1 for lr, _ in v["tuning"]})
    if not rates:
        return "learning rates given, not tuned"
    return f"learning rate of lowest validation loss among {', '.join(f'{lr:g}' for lr in rates)} with seed{'s' * (len(comparison['tuning_seeds']) > 1)} {', '.join(map(str, comparison['tuning_seeds']))}"


def markdown(comparison):
    captions = {"differences": "Paired differences, mean over seeds [95 % bootstrap interval]:\n\n",
                "costs": "Step time: median of few pairs of steps. Peak memory: of the whole run with its evaluation. For either alone there is --bench.\n\n"}
    return "\n\n".join(captions.get(name, "") + table for name, table in tables(comparison).items()) + "\n"


def with_tables(text, results):
    """The text with everything between <!-- TABLE of NAME --> and <!-- end --> made anew from results/NAME/comparison.json or bench.json;
    <!-- COLUMN of NAME NAME ... --> makes a `sweep_table`."""
    def block(found):
        measured = results / found[3].split()[0] / "bench.json"
        if found[2] in DIFFERENCES:
            made = {found[2]: sweep_table([read_json(results / name / "comparison.json") for name in found[3].split()], found[2])}
        else:
            made = bench_tables(read_json(measured)) if measured.exists() else tables(read_json(measured.with_name("comparison.json")))
        if found[2] not in made:
            raise ValueError(f"{found[1]}: there is no such table; choose among {', '.join(made)}.")
        return f"{found[1]}\n{made[found[2]]}\n<!-- end -->"
    return re.sub(r"(<!-- (\w+) of ([\w -]+) -->)\n.*?<!-- end -->", block, text, flags=re.S)


def report(results, readme):
    """Draws the figures of the comparisons in `results` and makes the README's tables anew, all from what was measured."""
    comparisons = {path.parent.name: read_json(path) for path in sorted(results.glob("*/comparison.json"))}
    if not comparisons:
        raise ValueError(f"{results} holds no comparison: make one with --compare --results {results}/NAME.")
    for name, comparison in comparisons.items():
        if not {"variants", "rows", "base", "seeds", "tuning_seeds", "sweep", "step_time", "configuration", "machine"} <= set(comparison):
            raise ValueError(f"{results / name / 'comparison.json'} is no comparison of this program: run its --compare again.")
    for name, comparison in comparisons.items():
        write_whole(results / name / "comparison.md", lambda path: path.write_text(markdown(comparison), encoding="utf-8"))
        draw_comparison(comparison, results / name, anew=True)
    whole = {c["base"]["path"]: c for c in comparisons.values() if {"full", "nalora"} <= set(c["variants"]) and not c["sweep"]}      # the last of each base
    draw_homogeneity(sorted(whole.values(), key=lambda c: len(c["base"]["layers"]["k_hat"])), results / "homogeneity.png")      # small ones first
    draw_sweeps([c for c in comparisons.values() if c["sweep"] == "keep"], results / "keep.png")
    write_whole(readme, lambda path: path.write_text(with_tables(readme.read_text(encoding="utf-8"), results), encoding="utf-8"))
    print(f"{readme} and the figures in {results} are made anew from {', '.join(comparisons)}.")


def csv_text(rows):
    """One line per variant and seed; what is per layer stays in the JSON."""
    names = list(dict.fromkeys(k for row in rows for k in row if k not in ("layers", "history", "reference")))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(rows))
    return buffer.getvalue()


# ---- figures ----------------------------------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]      # Okabe and Ito


def new_figure(columns, width=9.0, height=3.2, rows=1):
    """(figure, its axes): one row as a list, several as an array."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.prop_cycle": matplotlib.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
                         "font.size": max(9, width), "axes.titlesize": "medium"})            # a README shows every width as one
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes[0] if rows == 1 else axes


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
    kinds = {"k_hat": "homogeneity k_hat", "occupancy": "share of gates z > 0", "scale": "step scale", "density": "mask density",
             "turnover": "mask turnover per record"}
    figure, axes = new_figure(len(kinds), width=14)
    steps = [r["step"] for r in records]
    for ax, (kind, label) in zip(axes, kinds.items()):
        for i, (name, colour) in enumerate(zip(records[0]["layers"], figure_colours(len(records[0]["layers"])))):
            ax.plot(steps, [math.nan if r["layers"][name][kind] is None else r["layers"][name][kind] for r in records], ".-", color=colour, label=f"layer {i}")
        ax.set(xlabel="step", ylabel=label)
        if kind in ("density", "turnover"):
            ax.set_ylim(0, 1)
    layers = len(records[0]["layers"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, ncols=1 + layers // 16, fontsize=7 if layers > 8 else 9)
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
    titles = ("value phi", "selection weight rho = phi/z", "responsiveness phi'", "homogeneity z phi'/phi")
    for ax, title in zip(axes, titles):
        ax.set(xlabel="gate pre-activation z")
        ax.set_title(title)
        ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    axes[3].axhline(1, color="0.8", lw=0.8, zorder=0)
    axes[3].set_ylim(-2, 2)
    axes[3].text(2.7, 0.1, "z > 0: kappa > 1,\nselection amplifies", fontsize=8.5, ha="center")
    axes[3].text(-2.6, 1.4, "z < 0: kappa < 1,\nselection opposes", fontsize=8.5, ha="center")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_comparison(comparison, folder, anew=False):
    """The figures that comparison.json alone determines; anew: only those that the folder has already."""
    rows = comparison["rows"]
    figures = {"sweep.png": (lambda c, path: draw_sweeps([c], path), comparison["sweep"]),
               "differences.png": (draw_differences, not comparison["sweep"] and len(comparison["seeds"]) > 1 and "lora" in comparison["variants"]),
               "alignment.png": (draw_alignment, not comparison["sweep"] and any(row.get("weight_cosine") is not None for row in rows)),
               "training.png": (draw_training, not comparison["sweep"] and any(len(row.get("history", [])) > 1 for row in rows)),
               "homogeneity.png": (lambda c, path: draw_homogeneity([c], path), not comparison["sweep"])}
    for name, (draw, possible) in figures.items():
        if possible and (not anew or (folder / name).exists()):
            draw(comparison, folder / name)


# colour and marker of a method wherever several are drawn: squares do both, triangles mask, diamonds scale; oranges, pinks and
# the wine and sand triangles are controls
STYLES = {"lora": ("#000000", "o"), "nalora": ("#0072B2", "s"), "nalora-neutral": ("#56B4E9", "s"), "random-uniform": ("#E69F00", "s"),
          "nalora-shuffled": ("#CC79A7", "s"), "shuffled-mask": ("#CC79A7", "^"), "shuffled-mask:score=rho_prime": ("#DDCC77", "v"),
          "redrawn-mask": ("#882255", "^"),
          "nalora-mask:score=rho_prime": ("#009E73", "^"), "nalora-mask:score=downstream": ("#56B4E9", "^"),
          "nalora-mask": ("#0072B2", "^"), "random-mask": ("#E69F00", "^"), "inverted-mask": ("#D55E00", "v"), "nalora-scale": ("#009E73", "D"),
          "uniform-scale": ("#CC79A7", "D"), "full": ("#999999", "P"), "full, another seed": ("#999999", "X")}


def styles(labels):
    """{label: (colour, marker)}: those of STYLES, black stars and pluses for parts of full fine-tuning's change, others in turn."""
    free = itertools.cycle(["#009E73", "#CC79A7", "#56B4E9", "#999999"])

    def style(label):
        known = STYLES.get("full" if label.startswith("full:") else label)
        part = ("#000000", "*" if "rank" in label else "P") if label.startswith("full, ") else None
        return known or part or (next(free), "d")

    return {label: style(label) for label in labels}


def layer_means(comparison, label, column):
    """[mean over seeds] per FFN."""
    return np.mean([row["layers"][column] for row in comparison["rows"] if row["variant"] == label and column in row.get("layers", ())], axis=0)


def draw_alignment(comparison, path):
    """Per FFN and variant: cosine of the gate's weight change with full fine-tuning's, against that of the change of selection."""
    method = lambda label: comparison["variants"].get(label, {"method": label})["method"]
    labels = [label for label in dict.fromkeys(row["variant"] for row in comparison["rows"]) if method(label) != "full"]
    if len(labels) > 8:                                             # too many to tell apart
        labels = [label for label in labels if method(label) in ("lora", "nalora", "nalora-shuffled", "random-mask", "inverted-mask") or label.startswith("full, ")]
    figure, (left, right) = new_figure(2, width=11, height=4.6)
    for label, (colour, marker) in styles(labels).items():
        style = {"color": colour, "marker": marker, "linestyle": "", "label": label, "markersize": 9 if "full, " in label else 5}
        weight, shift, missed = (layer_means(comparison, label, column) for column in ("weight_cosine", "shift_cosine", "misalignment"))
        left.plot(weight, shift, **style)
        right.plot(range(len(missed)), missed, **{**style, "linestyle": "-", "linewidth": 0.8})
    left.plot([0, 1], [0, 1], color="0.8", zorder=0)
    left.set(xlabel="cosine of gate weight change with full fine-tuning's", ylabel="cosine of selection shift with full fine-tuning's", xlim=(0, 1.03), ylim=(0, 1.03))
    right.axhline(1, color="0.8", zorder=0)
    right.set(xlabel="layer", ylabel="selection misalignment M (1: as if not adapted)", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    save_figure(figure, path)


def draw_training(comparison, path):
    """k_hat and step scale over the steps of NA-LoRA's runs, a line per FFN: mean over seeds with a band of one standard deviation."""
    label = next(row["variant"] for row in comparison["rows"] if row.get("history"))
    histories = [row["history"] for row in comparison["rows"] if row["variant"] == label]
    figure, axes = new_figure(2, width=10, height=3.4)
    for ax, column, title in zip(axes, (1, 2), ("effective homogeneity k_hat of the batch", "step scale 1 / clip(k_hat, 1/2, 2)")):
        steps, values = [record[0] for record in histories[0]], np.array([[record[column] for record in h] for h in histories])      # (seeds, records, FFNs)
        colours = figure_colours(values.shape[2])
        for i, colour in enumerate(colours):
            mean, deviation = values[:, :, i].mean(0), values[:, :, i].std(0)
            ax.plot(steps, mean, color=colour, label=f"layer {i}")
            ax.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
        ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        ax.set(xlabel="step", ylabel=title)
    axes[0].set_title(label)
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(colours) // 16, fontsize=7 if len(colours) > 8 else 9)
    save_figure(figure, path)


def figure_colours(count):
    """`count` colours that can be told apart without colour vision: a sequence from dark to light if they are many."""
    import matplotlib
    return COLOURS[:count] if count <= 6 else [matplotlib.colormaps["viridis"](i / count) for i in range(count)]


def draw_homogeneity(comparisons, path):
    """k_hat by layer of each base model, on validation answers, before training and after."""
    if not comparisons:
        return
    figure, axes = new_figure(len(comparisons), width=5.5 * len(comparisons), height=3.4)
    for ax, comparison in zip(axes, comparisons):
        k_hat = comparison["base"]["layers"]["k_hat"]
        ax.plot(range(len(k_hat)), k_hat, color="0.4", marker="P", label="base")
        for label in ("full", "lora", "nalora"):
            if any(row["variant"] == label for row in comparison["rows"]):
                colour, marker = STYLES[label] if label != "full" else (COLOURS[1], "v")
                ax.plot(range(len(k_hat)), layer_means(comparison, label, "k_hat"), color=colour, marker=marker, markersize=7 if label == "lora" else 4,
                        markerfacecolor="none", lw=1, label=label)    # drawn over each other where they agree
        ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        ax.set(xlabel="layer", ylabel="effective homogeneity k_hat", title=base_name(comparison))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_differences(comparison, path):
    """Paired difference of every variant to LoRA: one point per seed, the mean and its 95 % bootstrap interval; blue is better, orange worse."""
    labels = [label for label, v in comparison["variants"].items() if v["method"] != "lora"][::-1]
    columns = {k: v for k, v in DIFFERENCES.items() if by_seed(comparison, "lora", k)}
    figure, axes = new_figure(len(columns), width=12, height=0.4 * len(labels) + 1.6)
    for ax, (column, (title, digits)) in zip(axes, columns.items()):
        lora = by_seed(comparison, "lora", column)
        own = {label: by_seed(comparison, label, column) for label in labels}
        if column == "misalignment":                                # full fine-tuning is its reference
            own |= {label: {} for label in labels if comparison["variants"][label]["method"] == "full"}
        differences = {label: [own[label][seed] - lora[seed] for seed in lora if seed in own[label]] for label in labels}
        reach = 6 * np.median([abs(statistics.mean(d)) + np.std(d) for d in differences.values() if d])
        for y, (label, values) in enumerate(differences.items()):
            if len(values) < 2:
                continue
            mean, low, high, _ = paired_difference(own[label], lora)
            colour = "#999999" if low <= 0 <= high else "#0072B2" if (mean > 0) == (column in HIGHER_IS_BETTER) else "#D55E00"
            if abs(mean) > reach:                                   # off the scale that the rest need: its number instead
                ax.text(0.98, y, f"{mean:+.{digits - 1}f}", color=colour, ha="right", va="center", transform=ax.get_yaxis_transform())
                continue
            ax.plot(values, [y - 0.3] * len(values), "|", color=colour, markersize=5, alpha=0.7)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=2, markersize=4)
        ax.axvline(0, color="0.6", lw=0.8, zorder=0)
        ax.set_yticks(range(len(labels)), labels if ax is axes[0] else [""] * len(labels))
        ax.set_title(title)
        ax.set_xlabel(f"minus LoRA's ({statistics.mean(lora.values()):.{digits}f}{' nats' if 'loss' in column else ''})", fontsize="small")
        ax.set_ylim(-0.7, len(labels) - 0.5)
        ax.locator_params(axis="x", nbins=3)
    save_figure(figure, path)


def draw_sweeps(comparisons, path):
    """Sweeps side by side: validation loss against the value of each, a curve per method with a band of one standard deviation over seeds, and M
    where a full fine-tuning tells it."""
    panels = [(c, column) for column in ("val_loss", "misalignment") for c in comparisons if any(row.get(column) for row in c["rows"])]
    if panels:
        rows = 1 + (len(panels) > 3)
        columns = math.ceil(len(panels) / rows)
        figure, axes = new_figure(columns, width=3.6 * columns + 1.5 * (columns == 1), height=3.2 * rows + 0.9, rows=rows)
        axes, handles = np.ravel(axes), {}
        look = styles(dict.fromkeys(v["spec"] for c in comparisons for v in c["variants"].values()))       # one for all panels
        for ax in axes[len(panels):]:
            ax.remove()
        for ax, (comparison, column) in zip(axes, panels):
            draw_curves(ax, comparison, look, column)
            ax.set(title=sweep_title(comparison))
            handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns + 1, frameon=False)
        save_figure(figure, path)


def draw_curves(ax, comparison, look, column="val_loss"):
    """A column against the value of the sweep with bands of one standard deviation, or side by side if there is but one value; across, what has none."""
    values = list(dict.fromkeys(v["value"] for v in comparison["variants"].values() if v["value"] is not None))
    ticks = [re.sub(r"(,.*|^.*?=)", "", value) or ALL_VALUES[comparison["sweep"]] for value in values]
    for i, method in enumerate(dict.fromkeys(v["spec"] for v in comparison["variants"].values())):
        colour, marker = look[method]
        labels = [label for label, v in comparison["variants"].items() if v["spec"] == method]
        seen = [list(by_seed(comparison, label, column).values()) for label in labels]
        if not any(map(any, seen)):                                 # not measured, or the reference itself, whose M is 0
            continue
        means, deviations = np.array([np.mean(x) for x in seen]), np.array([np.std(x, ddof=1) if len(x) > 1 else 0 for x in seen])
        if comparison["variants"][labels[0]]["value"] is None:
            ax.axhline(means[0], linestyle="--", color=colour, label=method)
            ax.axhspan(means[0] - deviations[0], means[0] + deviations[0], color=colour, alpha=0.2, lw=0)
        elif len(values) == 1:
            ax.errorbar([0.1 * i], means, yerr=deviations, fmt=marker, color=colour, label=method, markersize=4, capsize=3)
        else:
            ax.plot(range(len(values)), means, "-", marker=marker, color=colour, label=method, markersize=4)
            ax.fill_between(range(len(values)), means - deviations, means + deviations, color=colour, alpha=0.15, lw=0)
    ax.set_xticks(range(len(values)), ticks)
    ax.set(xlabel=comparison["sweep"], ylabel="misalignment M" if column == "misalignment" else "validation loss (nats per token)")
    if len(values) == 1:
        ax.set_xlim(-0.3, 0.8)
        ax.set_xticks([0.25], ticks)


def draw_at_work(jobs, seed, path):
    """How NA-LoRA acts in one run: importance of every gate channel over steps, and how far each row of B_gate travelled, against LoRA's."""
    config = {method: jobs[f"{method} seed={seed}"][1] for method in ("lora", "nalora") if f"{method} seed={seed}" in jobs}
    traces = {method: trace({**c, "lr": config["nalora"]["lr"]}) for method, c in config.items()}   # one learning rate: paths are to be compared
    importance, names = traces["nalora"]["importance"], list(traces["nalora"]["importance"])
    names = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(4, len(names)))]
    highest, keep = max(np.quantile(importance[name], 0.995) for name in names), config["nalora"]["nalora"]["keep"]
    figure, axes = new_figure(len(names), width=12, height=5.8, rows=2)
    for (top, bottom), name in zip(zip(*axes), names):
        order = np.argsort(-importance[name][-1])
        image = top.imshow(np.array(importance[name])[:, order].T, aspect="auto", cmap="viridis", vmin=0, vmax=highest, interpolation="nearest",
                           extent=(0, traces["nalora"]["steps"], len(order), 0))
        top.axhline(keep * len(order), color="white", linestyle="--", lw=1)
        bottom.axvline(keep * len(order), color="0.6", linestyle="--", lw=1)
        top.set(xlabel="step", title=name.removesuffix(".mlp").removeprefix("model."))
        for method, colour in (("lora", COLOURS[7]), ("nalora", COLOURS[0])):
            if method in traces:
                bottom.plot(traces[method]["travel"][name][order], ".", color=colour, markersize=2.5, label=method)
        bottom.set(xlabel="gate channel, sorted", ylim=(0, None))
    axes[0][0].set_ylabel("gate channel, sorted")
    axes[1][0].set_ylabel("path length of row\n(sum of norms of its steps)")
    axes[1][-1].legend(frameon=False, markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.colorbar(image, ax=axes[0], label="importance\n(moving average of mean |phi'|)", pad=0.01)
    save_figure(figure, path)


def trace(config):
    """Trains by a configuration, writes nothing. Returns, per FFN, the importance at about 50 moments (50, F) and the length of the path
    of each row of B_gate (F,)."""
    run = Run(config)
    rows = {name.removesuffix(".gate_proj.lora_B"): p for name, p in run.trainable.items() if name.endswith("gate_proj.lora_B")}
    importance, travel = {name: [] for name in rows}, {name: 0 for name in rows}
    for step in range(config["steps"]):
        before = {name: p.detach().clone() for name, p in rows.items()}
        run.train_step(step)
        for name, p in rows.items():
            travel[name] = travel[name] + (p.detach() - before[name]).norm(dim=1)
        if run.nalora and step % max(1, config["steps"] // 50) == 0:
            for name, s in run.nalora.statistics().items():
                importance[name].append(s["importance"].numpy())
    return {"importance": importance, "travel": {name: t.numpy() for name, t in travel.items()}, "steps": config["steps"]}


# ---- the benchmark ----------------------------------------------------------------------------------------------------------------


class PeftRun:
    """The same base, adapter shape, batches, targets and optimizer by transformers and PEFT: what a step is measured against."""

    def __init__(self, config, **flags):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        ours = Run({**config, "method": "lora"})
        self.config, self.batches, self.device, self.autocast = ours.config, ours.batches, ours.device, ours.autocast
        torch.manual_seed(config["seed"])
        model = AutoModelForCausalLM.from_pretrained(config["base"], dtype=torch.float32, trust_remote_code=False, local_files_only=True,
                                                     use_safetensors=True).to(self.device).train()
        self.model = get_peft_model(model, LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=config["targets"], **flags))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, config["lr"], weight_decay=config["weight_decay"], fused=True)

    def train_step(self, step):
        tokens, targets, _ = (t.to(self.device) for t in self.batches(step))
        with self.autocast:
            loss = self.model(input_ids=tokens, labels=targets, shift_labels=targets).loss         # padding stands on the right: no mask is needed
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, self.config["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item(), tokens.numel()


def contestants(args):
    """{name: a function that makes the run}, PEFT's where transformers and peft are installed."""
    configs = {method: resolve(args, method) for method in ("full", "lora", "nalora")}
    makers, config = {method: partial(Run, config) for method, config in configs.items()}, configs["lora"]
    if all(map(importlib.util.find_spec, ("transformers", "peft"))):
        makers |= {"PEFT LoRA": partial(PeftRun, config), "PEFT DoRA": partial(PeftRun, config, use_dora=True)}
    return makers


def peak_of_process(make, steps=3):
    """Peak memory in MB of a process that does nothing but make a run and train it for a few steps."""
    run = make()
    reset_peak_memory(run.device)
    for step in range(steps):
        run.train_step(step)
    return peak_memory_mb(run.device)


def in_new_process(function, *args):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.BrokenExecutor:
            raise ValueError("A process that measures memory was killed from outside, perhaps for want of memory: free some and give the command again.") from None


def timed(function, *args):
    start = time.perf_counter()
    value = function(*args)
    return time.perf_counter() - start, value


def in_alternation(makers, rounds):
    """{name: [(seconds of a step, loss, tokens), ...]}: every round all take the same batch in turn, forwards or backwards by
    turns. The first three rounds warm up."""
    runs, steps = {name: make() for name, make in makers.items()}, {name: [] for name in makers}
    for step in range(rounds + 3):
        for name in list(runs)[::1 if step % 2 else -1]:
            seconds, (loss, tokens) = timed(runs[name].train_step, step)
            steps[name].append((seconds, loss, tokens))
    return steps


def matmul_peak(device, dtype, size=2048):
    """FLOP/s of the fastest of ten products of two square matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return 2 * size**3 / min(timed(lambda: (a @ a, synchronize()))[0] for _ in range(10))


def flops_of_a_step(run):
    with FlopCounterMode(display=False) as counter:
        run.train_step(0)
    return counter.get_total_flops()


def where_time_goes(run, steps=5):
    """{operation: share of the time of a step}, the ten largest, by PyTorch's profiler."""
    for step in range(3):
        run.train_step(step)
    with torch.profiler.profile() as profile:
        for step in range(3, 3 + steps):
            run.train_step(step)
    spent = {event.key: event.self_cpu_time_total + getattr(event, "self_device_time_total", 0) for event in profile.key_averages()}
    total = sum(spent.values())
    return {name: spent[name] / total for name in sorted(spent, key=spent.get, reverse=True)[:10]}


def sized_run(layers, windows, with_nalora):
    """(a function that trains one step, its tokens): TINY with random weights and another depth, on `windows` windows of 64 tokens."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=640, **{**TINY, "num_hidden_layers": layers}))
    inject_lora(model, ALL_LINEAR)
    optimizer = torch.optim.AdamW(lora_parameters(model), fused=True)
    if with_nalora:
        NALoRA(model, optimizer)
    text = torch.randint(640, (windows, 65))

    def step():
        model(text[:, :-1], text[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_of_size(layers, windows, rounds):
    """{"lora", "nalora": median ms of a step} in alternation on the CPU."""
    steps = {"lora": sized_run(layers, windows, False), "nalora": sized_run(layers, windows, True)}
    taken = [{name: timed(step)[0] for name, step in steps.items()} for _ in range(rounds + 3)][3:]
    return {name: 1000 * statistics.median(t[name] for t in taken) for name in steps}


def bench(args):
    """Measures and writes bench.json and bench.md to args.results."""
    rounds, makers, config = given(args.steps, 40), contestants(args), resolve(args, "lora")
    if rounds < 2:
        raise ValueError(f"--steps is {rounds}: a benchmark needs at least two rounds.")
    if config["optimizer"] != "adamw":
        raise ValueError("--bench times steps of AdamW, on both sides: leave --optimizer out.")
    first = makers["lora"]()                                        # all that can be wrong is found before anything is written
    print(f"{rounds} rounds of {', '.join(makers)} in alternation", flush=True)
    steps, rows = in_alternation(makers, rounds), []
    against = lambda taken, other: quartiles([ours / theirs for (ours, _, _), (theirs, _, _) in zip(taken, steps[other][3:])]) if other in steps else None
    peak = matmul_peak(first.device, torch.bfloat16 if config["dtype"] == "bfloat16" else torch.float32)
    for name, taken in steps.items():
        print(f"memory and operations of {name}", flush=True)
        first_loss, taken, flops = taken[0][1], taken[3:], flops_of_a_step(makers[name]()) / taken[0][2]                       # flops per token
        rows.append({"name": name, "step_ms": quartiles([1000 * s for s, _, _ in taken]),
                     "ratio": against(taken, "lora"), "ratio_to_peft": against(taken, "PEFT LoRA"),
                     "tokens_per_second": statistics.median(tokens / s for s, _, tokens in taken), "first_loss": first_loss,
                     "peak_memory_mb": sorted(in_new_process(peak_of_process, makers[name]) for _ in range(3)),
                     "share_of_matmul_peak": statistics.median(flops * tokens / s for s, _, tokens in taken) / peak})
    print("where the time goes, sizes, start", flush=True)
    for step in range(rounds if first.problems else 0):             # so that it answers at length
        first.train_step(step)
    sizes = [(layers, 16) for layers in (2, 4, 8)] + [(4, windows) for windows in (8, 32)]
    start = [sys.executable, "-c", "import sys, nalora; nalora.Llama.from_pretrained(sys.argv[1])", Path(config["base"]).resolve()]
    result = rounded({"configuration": config, "rounds": rounds, "machine": machine(), "rows": rows, "matmul_peak": peak,
                      "profile": {name: where_time_goes(makers[name]()) for name in ("lora", "nalora")},
                      "sizes": [{"layers": layers, "windows": windows, **step_of_size(layers, windows, rounds)} for layers, windows in sizes],
                      "start_seconds": quartiles([timed(partial(subprocess.run, start, cwd=Path(__file__).resolve().parent, check=True))[0] for _ in range(3)]),
                      "problems": len(first.problems),
                      "generation_seconds": timed(exact_match, first.model.eval(), first.tokenizer, first.problems, first.max_new)[0] if first.problems else None})
    write_json(args.results / "bench.json", result)
    text = "\n\n".join(bench_tables(read_json(args.results / "bench.json")).values()) + "\n"
    write_whole(args.results / "bench.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"\n{text}\nwritten to {args.results}")


def quartiles(values):
    return statistics.quantiles(values, n=4)


def bench_tables(b):
    """{"steps", "sizes", "profile": Markdown} from bench.json alone."""
    c, m = b["configuration"], b["machine"]
    spread = lambda q, digits: f"{q[1]:.{digits}f} ({q[0]:.{digits}f} to {q[2]:.{digits}f})"
    peft = next((r["peak_memory_mb"][1] for r in b["rows"] if r["name"] == "PEFT LoRA"), None)
    steps = markdown_table(["", "ms a step", "time / LoRA's", "time / PEFT LoRA's", "tokens/s", "peak memory (MB)", "memory / PEFT LoRA's", "share of matmul peak", "first loss"], [
        [r["name"], spread(r["step_ms"], 1), spread(r["ratio"], 2), spread(r["ratio_to_peft"], 2) if r["ratio_to_peft"] else "-", f"{r['tokens_per_second']:,.0f}",
         spread(r["peak_memory_mb"], 0), f"{r['peak_memory_mb'][1] / peft:.2f}" if peft else "-", f"{r['share_of_matmul_peak']:.0%}", f"{r['first_loss']:.4f}"] for r in b["rows"]])
    about = (f"Base {c['base']}, {c['batch_size']} problems a step, rank {c['rank']}, {c['dtype']}, {c['threads']} threads, {b['rounds']} rounds; medians (and quartiles; of memory, of a whole process, the "
             f"range of three). A matrix product reaches {b['matmul_peak'] / 1e9:,.0f} GFLOP/s; shares of it count the products of a step, without attention's. {m['cores']} cores of {m['processor']}, Python {m['python']}, PyTorch {m['torch']}. "
             f"Starting Python, importing nalora and loading the base takes {spread(b['start_seconds'], 1)} s"
             + (f"; {b['problems']} problems are answered in {b['generation_seconds']:.1f} s." if b["generation_seconds"] else "."))
    sizes = markdown_table(["layers", "tokens a step", "LoRA (ms)", "NA-LoRA (ms)", "ratio"], [
        [s["layers"], 64 * s["windows"], f"{s['lora']:.1f}", f"{s['nalora']:.1f}", f"{s['nalora'] / s['lora']:.2f}"] for s in b["sizes"]])
    profile = markdown_table(["LoRA", "", "NA-LoRA", ""], [[f"`{x}`", f"{p:.1%}", f"`{y}`", f"{q:.1%}"] for (x, p), (y, q) in zip(*(b["profile"][k].items() for k in ("lora", "nalora")))])
    return {"steps": f"{about}\n\n{steps}", "sizes": sizes, "profile": profile}


# ---- the command line -------------------------------------------------------------------------------------------------------------


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=[*METHODS, "all"], default="nalora", help="what to train (default: %(default)s); all: full, lora and nalora")
    add("--out", type=Path, help="folder of results (default: runs/METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", nargs="?", const="", metavar="PROMPT", help="answer PROMPT (or three test problems) with the trained run in --out, and exit")
    add("--bench", action="store_true", help="time a training step of full, lora, nalora and, where installed, PEFT's LoRA and DoRA (--steps: rounds, default 40), and exit")
    add("--draw-activations", type=Path, metavar="PNG", help="draw the README's figure of phi, rho, phi' and kappa, and exit")
    add("--seed", type=int, default=0, help="of initialisation, data order and the random mask (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products, by autocast; weights stay float32 (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--test-size", type=int, metavar="N", help="judge on the first N test problems and equations, 0: on none (default: all)")
    add("--data", type=Path, default=DATA, help="folder of the data files, or one JSON-lines file of prompts and completions (default: data)")
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add("--compare", action="store_true", help="run methods x learning rates x seeds and judge the differences; goes on where it was cut")
    add("--methods", nargs="+", metavar="METHOD[:FLAG=VALUE,...]", default=COMPARED,
        help="what to compare, such as lora or nalora-mask:keep=0.1,rank=16 (default: %(default)s)")
    add("--sweep", choices=SWEEPS, help="compare at each value of: " + "; ".join(f"{k} ({' '.join(v or 'all' for v in values)})" for k, values in SWEEPS.items()))
    add("--values", nargs="+", help="of the sweep, instead of those")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the runs that are judged (default: %(default)s)")
    add("--tuning-seeds", type=int, nargs="+", default=[100, 101], help="of the runs that choose the learning rate (default: %(default)s)")
    add("--lrs", type=float, nargs="+", help="learning rates that every variant is tuned over; with one, nothing is tuned "
        f"(default: {' '.join(map(str, TUNING_GRID['adamw']))}; SGD: {' '.join(map(str, TUNING_GRID['sgd']))})")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each with --threads threads (default: %(default)s)")
    add("--results", type=Path, metavar="DIR", help="folder of tables and figures (default: --out)")
    add("--report", action="store_true", help="make the README's tables and figures anew from the comparisons in results/, and exit")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--steps", type=int, help="optimizer steps (default: 400; pretrain: 4000)")
    add("--batch-size", type=int, help="problems, or windows of 128 tokens, per step (default: 16)")
    add("--lr", type=float, help="peak learning rate (default: 5e-3; full: 2e-3; pretrain: 3e-3)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=float, help="of matrices (default: 0; pretrain: 0.1)")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="default: %(default)s")
    add("--beta1", type=float, help="of AdamW (default: 0.9)")
    add("--beta2", type=float, help="of AdamW (default: 0.999; pretrain: 0.95)")
    add("--momentum", type=float, help="of SGD (default: 0)")
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
        if field.name != "seed":
            group.add_argument(f"--{field.name}", type=type(field.default), choices=CHOICES.get(field.name), help=f"default: {field.default}")
    return parser


def given(value, default):
    return default if value is None else value


def resolve(args, method):
    """The complete configuration of one run, as JSON-able values. ValueError on a value or a flag that the method has no use for."""
    pretrain, adapts, sgd, preset = method == "pretrain", method not in ("pretrain", "full", "nora"), args.optimizer == "sgd", METHODS[method]
    several = args.method == "all" or args.compare or args.bench                  # methods: then a flag may be meant for some of them
    own = [f.name for f in fields(NALoRAConfig) if f.name != "seed"]
    useless = {"base": pretrain, "train_size": pretrain, **dict.fromkeys(("rank", "alpha", "targets"), not adapts), **dict.fromkeys(own, preset is None),
               "beta1": sgd, "beta2": sgd, "momentum": not sgd}
    for name, is_useless in useless.items():
        if is_useless and getattr(args, name) is not None and not several:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --method {method} and --optimizer {args.optimizer}: leave it out.")
    there = [d for d, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)) if available]
    device = there[0] if args.device == "auto" else args.device
    if device not in there:
        raise ValueError(f"--device {device} is not available here: choose {' or '.join(there)}.")
    config = {"method": method, "seed": args.seed, "device": device, "dtype": args.dtype, "threads": torch.get_num_threads(), "data": str(args.data),
              "steps": given(args.steps, 4000 if pretrain else 400), "batch_size": given(args.batch_size, 16),
              "lr": given(args.lr, SGD_LEARNING_RATE if sgd else LEARNING_RATE.get(method, 5e-3)), "warmup": args.warmup,
              "weight_decay": given(args.weight_decay, 0.1 if pretrain else 0.0), "optimizer": args.optimizer, "grad_clip": args.grad_clip,
              "eval_every": given(args.eval_every, 250 if pretrain else 50), "test_size": args.test_size}
    config |= {"momentum": given(args.momentum, 0.0)} if sgd else {"beta1": given(args.beta1, 0.9), "beta2": given(args.beta2, 0.95 if pretrain else 0.999)}
    if RANKS > 1:
        config |= {"ranks": RANKS}
        if config["batch_size"] % RANKS:
            raise ValueError(f"--batch-size {config['batch_size']} cannot be shared evenly by {RANKS} ranks: give a multiple of {RANKS}.")
    if not pretrain:
        config |= {"base": str(args.base or (args.data if args.data.is_dir() else DATA) / "base"), "train_size": args.train_size}
    if adapts:
        config |= {"rank": given(args.rank, 8), "alpha": given(args.alpha, 16.0), "targets": args.targets or ALL_LINEAR}
    if method.removeprefix("nalora-") in peers.PEERS:
        config |= {"peer": method.removeprefix("nalora-")}
    for name in ("seed", "weight_decay", "test_size"):              # before NALoRAConfig, which cannot name the flag
        if config[name] is not None and not 0 <= config[name] < 2**62:
            raise ValueError(f"--{name.replace('_', '-')} is {config[name]}: it cannot be negative or that large.")
    if preset is not None:
        chosen = {f: getattr(args, f) for f in own if getattr(args, f) is not None}
        c = NALoRAConfig(**{**preset, "seed": args.seed, **chosen})
        ordered = c.mask not in BLIND_MASKS
        idle = {**dict.fromkeys(preset, True), "keep": c.mask == "none", "score": not ordered, "ema": not ordered, "stride": not ordered and c.scale == "none"}
        for name in chosen:
            if idle.get(name) and not several:
                raise ValueError(f"--{name} has no effect with --method {method}, mask {c.mask!r} and scale {c.scale!r}: leave it out.")
        config["nalora"] = asdict(c)
    for name in ("steps", "batch_size", "eval_every", "grad_clip", "lr", "alpha", "train_size"):
        if config.get(name) is not None and not 0 < config[name] < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {config[name]}: give a number above zero.")
    for name in ("warmup", "beta1", "beta2", "momentum"):
        if name in config and not 0 <= config[name] < 1:
            raise ValueError(f"--{name} is {config[name]}: give a number in [0, 1).")
    return config


def sample(out, prompt):
    """Prints completions by the trained model in `out`."""
    config = read_json(out / "config.json") if (out / "config.json").exists() else {}
    known = isinstance(config.get("method"), str) and config["method"] in METHODS
    if not known or not all(isinstance(config.get(key), str) for key in ("data", *("base",) * (config["method"] != "pretrain"))):
        raise ValueError(f"{out} holds no run of this program: train one first, or name its folder with --out.")
    if not (out / "summary.json").exists():
        raise ValueError(f"The run in {out} is not finished: run its command again with --resume, then sample.")
    tokenizer = tokenizer_of(config["base"], Path(config["data"])) if "base" in config else load_tokenizer(config["data"])
    if config["method"] not in ("pretrain", "full"):
        model = Llama.from_pretrained(config["base"])
        load_adapter(model, out / "adapter")
    else:
        model = Llama.from_pretrained(out / "model")
    prompts = [prompt.strip() + " "] if prompt else [p["prompt"] for p in read_splits(Path(config["data"]))["test"][:3]]
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


def check_comparison(args):
    """Fills in what depends on other flags. ValueError on a flag that a comparison has no use for, or a value that makes no sense."""
    for name, instead in (("lr", "--lrs"), ("resume", "nothing: it always goes on where it was cut"), ("seed", "--seeds"), ("sample", "nothing")):
        if getattr(args, name) != command_line().get_default(name):
            raise ValueError(f"--{name} has no effect with --compare: use {instead}.")
    if args.values and not args.sweep:
        raise ValueError("--values are those of a sweep: name it with --sweep.")
    if not 1 <= args.jobs <= 1024:
        raise ValueError(f"--jobs is {args.jobs}: give a number from 1 to 1024.")
    for name in ("methods", "values", "seeds", "tuning_seeds", "lrs"):
        values = getattr(args, name)
        if values and len(set(values)) < len(values):
            raise ValueError(f"--{name.replace('_', '-')} names something twice.")
    if set(args.seeds) & set(args.tuning_seeds):
        raise ValueError("A seed that chooses the learning rate cannot also judge: --seeds and --tuning-seeds must differ.")
    args.threads, args.results = args.threads or 1, args.results or args.out


@contextlib.contextmanager
def ranks_of_torchrun(args):
    """Joins the ranks that torchrun started, if it did; only rank 0 speaks."""
    if RANKS == 1:
        yield
        return
    if args.compare or args.method == "all" or args.sample is not None:
        raise ValueError("torchrun trains one method on several ranks: give --method and no --compare or --sample.")
    cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
            yield
    finally:
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Returns the exit code: 0, or 2 with one sentence on standard error for input that cannot be used; 130 after Ctrl-C."""
    args = command_line().parse_args(argv)
    args.out = args.out or Path("runs") / ("compare" if args.compare else "bench" if args.bench else args.method)
    try:
        with ranks_of_torchrun(args):
            command(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        memory = isinstance(e, MemoryError) or re.search(r"out of memory|can't allocate|not enough memory", str(e))
        if not memory and not isinstance(e, (ValueError, OSError)):
            raise                                                   # a bug of this program
        if RANK == 0:
            print("train_tiny.py: " + (f"The memory does not suffice ({str(e).splitlines()[0] if str(e) else 'no more is known'}): try a smaller --batch-size, or "
                                       "fewer --jobs." if memory else str(e)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "again" if args.compare else "with --resume"
        print(f"\nInterrupted. What was trained up to the last checkpoint is safe in {args.out}: run the same command {again} to go on.", file=sys.stderr)
        return 130
    return 0


def command(args):
    """Does what the flags ask for."""
    if args.threads is not None:
        if not 1 <= args.threads <= 1024:
            raise ValueError(f"--threads is {args.threads}: give a number from 1 to 1024.")
        torch.set_num_threads(args.threads)
    if args.report:
        report(ROOT / "results", ROOT / "README.md")
    elif args.compare:
        check_comparison(args)
        compare(args)
    elif args.bench:
        args.results = args.results or args.out
        bench(args)
    elif args.draw_activations:
        draw_activations(args.draw_activations)
    elif args.sample is not None:
        sample(args.out, args.sample)
    elif args.method == "all":
        run_all(args)
    else:
        execute(resolve(args, args.method), args.out, args.resume)


if __name__ == "__main__":
    sys.exit(main())
