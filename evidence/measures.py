"""What is measured on the trained models of a comparison: selection, forgetting, time, memory."""
import contextlib
import copy
import itertools
import math
import os
import platform
import re
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_tiny
from data import problems
from data.runs import read_json, read_records
from evidence import controls, other_base, peer_files, peers
from evidence.common import write_json
from nalora import (GatedFFN, Llama, effective_homogeneity, merge_lora, selection_weight,
                    value_and_slope, widen)

# what a row of comparison.json takes from a run's summary.json
KEPT = ("val_loss", "test_exact_match", "arithmetic_accuracy", "trainable_parameters",
        "peak_memory_mb", "file_bytes", "step_ms", "train_seconds")

# ---- measures of selection (ours) ----------------------------------------------------------------

def selection_misalignment(act, z, z_full, z_base):
    """M = ||rho(z) - rho(z_full)|| / ||rho(z_full) - rho(z_base)||, 0-dim: gates of one layer on
    the same tokens, all of one shape, in the adapted, the fully fine-tuned and the base model.
    0: full fine-tuning's selection; 1: no better than not adapting. ValueError if full fine-tuning
    moved no selection (0/0)."""
    rho, rho_full, rho_base = (selection_weight(act, widen(t)) for t in (z, z_full, z_base))
    moved = (rho_full - rho_base).norm()
    if moved == 0:
        raise ValueError("Full fine-tuning moved no selection weight here: M is 0/0.")
    return (rho - rho_full).norm() / moved

def selection_entropy(act, z):
    """H = -sum p log p / log F in [0, 1], 0-dim, of z (tokens, F), p_c ~ mean |phi'(z_c)| rho(z_c).
    1: all channels respond alike."""
    z = widen(z)
    p = (value_and_slope(act, z)[1].abs() * selection_weight(act, z)).mean(0).clamp(min=0)  # (F,)
    return torch.special.entr(p / p.sum()).sum() / math.log(len(p))

def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(),
                                                 dim=0).item()

@torch.no_grad()
def answer_gates(model, batches, limit=4000):
    """{FFN name: gates z (N, F)} of at most `limit` answer tokens, evenly spread over batches."""
    total = sum((targets != -100).sum().item() for _, targets, _ in batches)
    every = math.ceil(total / limit)
    found = {name: [] for name, ffn in model.named_modules() if isinstance(ffn, GatedFFN)}
    seen = {}

    def keep(name, linear, inputs, z):
        seen[name] = z

    handles = [model.get_submodule(name).gate_proj.register_forward_hook(partial(keep, name))
               for name in found]
    for tokens, targets, _ in batches:
        model(tokens)
        for name in found:
            found[name].append(seen[name][targets != -100][::every])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}

def observe(model, batches):
    """{FFN name: (gates on answer tokens (N, F), gate weight (F, hidden), activation)}."""
    gates = answer_gates(model, batches)
    ffns = {name: model.get_submodule(name) for name in gates}
    return {name: (gates[name], ffn.gate_proj.weight.detach(), ffn.act_fn)
            for name, ffn in ffns.items()}

def centred(act):
    """phi(z) - phi(0): phi itself, but for NoRA, which moves phi(0) and would give rho a pole."""
    def shifted(z):
        return act(z) - act(torch.zeros_like(z))
    return shifted

def selection_measures(model, base, full):
    """{column: [value per FFN]} from what `observe` saw of the model, the base and the fully
    fine-tuned reference (or None). M and the cosine of shifts are of rho itself, since NoRA's
    activation is not the base's."""
    columns = {"entropy": [], "k_hat": []}
    for z, _, act in model.values():
        columns["entropy"].append(selection_entropy(centred(act), z).item())
        columns["k_hat"].append(effective_homogeneity(centred(act), z).item())
    if not full:
        return columns
    columns |= {"misalignment": [], "shift_cosine": [], "weight_cosine": []}
    for name in model:
        rho, rho_base, rho_full = (selection_weight(centred(seen[name][2]), seen[name][0])
                                   for seen in (model, base, full))
        weight, weight_base, weight_full = (seen[name][1] for seen in (model, base, full))
        moved = rho - rho_base
        aim = rho_full - rho_base
        columns["misalignment"].append(((moved - aim).norm() / aim.norm()).item())
        columns["shift_cosine"].append(cosine(moved, aim))
        columns["weight_cosine"].append(cosine(weight - weight_base, weight_full - weight_base))
    return columns

# ---- the models of a comparison ------------------------------------------------------------------

def trained_model(out):
    """The model of a finished run, its adapter merged."""
    config = read_json(out / "config.json")
    if config["method"] == "full":
        return Llama.from_pretrained(out / "model").eval()
    model = Llama.from_pretrained(config["base"]).eval()
    peer_files.load_adapter(model, out / "adapter")
    return merged(model, config["method"])

def merged(model, method):
    """The model with what a method trained merged into its weights, as far as they can hold it.
    ValueError, with nothing changed, if they cannot."""
    if method == "nora++":
        merge_lora(model)                   # its weights merge, its activation cannot
    elif method not in ("full", "nora"):
        peers.merge(model)
    return model

@torch.no_grad()
def truncated(full, base, targets, rank):
    """base plus the best approximation of rank `rank` (None: all of it) of full fine-tuning's
    change in each target linear layer."""
    model = copy.deepcopy(base)
    theirs = dict(full.named_modules())
    for name, linear in model.named_modules():
        targeted = any(f".{name}".endswith(f".{target}") for target in targets)
        if isinstance(linear, torch.nn.Linear) and targeted:
            delta = theirs[name].weight - linear.weight
            if rank:
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                delta = u[:, :rank] * s[:rank] @ v[:rank]
            linear.weight += delta
    return model

def held_out_text(base, run):
    """Windows (B, T) to measure forgetting on: held-out pre-training text for the toy; for another
    base text that it writes itself at temperature 1, where the increase of the loss estimates
    KL(base || tuned)."""
    if not isinstance(run.tokenizer, other_base.CheckpointTokenizer):
        return problems.text_windows(run.tokenizer, problems.DATA / "pretrain_val.txt")
    start = torch.full((32, 1), (run.tokenizer.opening or [run.tokenizer.eot_token])[0])
    return written(base, start, 128)

@torch.no_grad()
def written(model, tokens, length):
    """What the model writes after tokens (B, T) at temperature 1, (B, T + length)."""
    generator = torch.Generator().manual_seed(0)
    cache = [[] for _ in range(model.config.num_hidden_layers)]
    new = tokens
    for _ in range(length):
        odds = model(new, cache=cache)[0][:, -1].float().softmax(-1)    # (B, vocab)
        new = torch.multinomial(odds, 1, generator=generator)           # (B, 1)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens

class Bench:
    """What all models of a comparison are measured on."""

    def __init__(self, config):
        self.run = controls.set_up(config)
        self.base = Llama.from_pretrained(config.base).eval()
        text = held_out_text(self.base, self.run)
        self.text = [(part[:, :-1], part[:, 1:], None) for part in text.split(16)]
        self.base_text_loss = problems.mean_loss(self.base, self.text)
        self.base_seen = observe(self.base, self.run.validation)

    def observe(self, model):
        return observe(model, self.run.validation)

    def forgetting(self, model):
        return problems.mean_loss(model, self.text) - self.base_text_loss

    def val_loss(self, model):
        with self.run.autocast:
            return problems.mean_loss(model.to(self.run.device), self.run.validation)

def means(layers):
    return {column: statistics.mean(values) for column, values in layers.items()}

def measure(config, variants, jobs, summaries, seeds, results, sweep):
    """(one row per variant and seed, what the base measures). A row without selection columns: no
    full fine-tuning to compare with. jobs: {"label seed=N": (folder, Config, kept)} below the
    folder `results`."""
    bench = Bench(config)
    rows = []
    full_of = {label: full_reference(variants, label) for label in variants}
    configs = [jobs[f"{label} seed={seeds[0]}"][1] for label in variants]
    lora = next((c for c in configs if c.method not in ("full", "nora")), train_tiny.Config())
    for seed in seeds:
        print(f"measuring the models of seed {seed}", flush=True)
        diverged = {label for label in variants if "diverged" in summaries[f"{label} seed={seed}"]}
        references = {label: trained_model(jobs[f"{label} seed={seed}"][0])
                      for label in set(full_of.values()) - {None} - diverged}
        seen = {label: bench.observe(model) for label, model in references.items()}
        for label in variants:
            out, c, _ = jobs[f"{label} seed={seed}"]
            row = {"variant": label, "seed": seed, "lr": c.lr}
            if label in diverged:
                rows.append({**row, "diverged": True})
                continue
            reference = None
            if full_of[label] in seen:
                reference = str(jobs[f"{full_of[label]} seed={seed}"][0].relative_to(results))
            summary = summaries[f"{label} seed={seed}"]
            measured = measured_model(out, bench, reference, seen.get(full_of[label]))
            rows.append({**row, **{key: summary[key] for key in KEPT}, **measured,
                         **means(measured["layers"]), "rows_moved": rows_moved(out),
                         "history": history(out)})
        if not sweep:
            rows += reference_rows(bench, references, seen, jobs, summaries, seeds, seed, lora)
    return rows, measured_base(bench)

def full_reference(variants, label):
    """The full fine-tuning that a variant is measured against: at its value of the sweep."""
    for other, v in variants.items():
        if v["method"] == "full" and v["value"] in (None, variants[label]["value"]):
            return other
    return None

def measured_model(out, bench, reference, full_seen):
    """The content of out/measures.json, made if there is none, or one against another reference."""
    path = out / "measures.json"
    if not path.exists() or read_json(path).get("reference", "") != reference:
        model = trained_model(out)
        layers = selection_measures(bench.observe(model), bench.base_seen, full_seen)
        write_json(path, {"reference": reference, "layers": layers,
                          "text_loss_increase": bench.forgetting(model)})
    return read_json(path)

def reference_rows(bench, references, seen, jobs, summaries, seeds, seed, lora):
    """Rows on full fine-tuning itself: another seed of it, and the parts of its change."""
    rows = []
    previous = seeds[seeds.index(seed) - 1]
    for label, model in references.items():
        name = f"{label} seed={previous}"
        if previous != seed and "diverged" not in summaries[name]:
            other = bench.observe(trained_model(jobs[name][0]))
            layers = selection_measures(other, bench.base_seen, seen[label])
            rows.append({"variant": "full, another seed", "seed": seed, "layers": layers,
                         **means(layers)})
    for label, rank in itertools.product(references, (lora.rank, None)):
        model = truncated(references[label], bench.base, lora.targets, rank)
        layers = selection_measures(bench.observe(model), bench.base_seen, seen[label])
        name = f"full, best rank {rank}" if rank else "full, linear layers"
        rows.append({"variant": name, "seed": seed, "text_loss_increase": bench.forgetting(model),
                     "val_loss": bench.val_loss(model), "layers": layers, **means(layers)})
    return rows

def measured_base(bench):
    run = bench.run
    layers = selection_measures(bench.base_seen, bench.base_seen, None)
    positive = [(z > 0).float().mean().item() for z, _, _ in bench.base_seen.values()]
    row = {"path": run.config.base, "val_loss": bench.val_loss(bench.base),
           "text_loss": bench.base_text_loss, "layers": layers, "positive": positive,
           "arithmetic_accuracy": None, "test_exact_match": None, **means(layers)}
    if run.equations:
        row["arithmetic_accuracy"] = problems.arithmetic_accuracy(bench.base, run.tokenizer,
                                                                 run.equations)
    if run.problems:
        row["test_exact_match"], _ = other_base.exact_match(bench.base, run.tokenizer,
                                                            run.problems, run.max_new)
    return row

def rows_moved(out):
    """Share of the rows of B_gate that are not zero as at the start, mean over FFNs, or None."""
    path = out / "adapter" / "adapter_model.safetensors"
    weights = load_file(path) if path.exists() else {}
    shares = [B.any(dim=1).float().mean().item() for name, B in weights.items()
              if name.endswith("gate_proj.lora_B.weight")]
    return statistics.mean(shares) if shares else None

def history(out):
    """[[step, [k_hat per FFN], [scale per FFN]], ...] of a NA-LoRA run, else []."""
    found = []
    for record in read_records(out):
        if "layers" not in record:
            continue
        layers = list(record["layers"].values())
        if None not in [layer["k_hat"] for layer in layers]:
            found.append([record["step"], *([layer[key] for layer in layers]
                                            for key in ("k_hat", "scale"))])
    return found

def trace(c):
    """Trains by a Config, writes nothing. {"importance": {FFN: at about 50 moments (50, F)},
    "travel": {FFN: length of the path of each row of B_gate (F,)}, "steps"}."""
    run = controls.set_up(c)
    rows = {name.removesuffix(".gate_proj.lora_B"): p for name, p in run.trainable.items()
            if name.endswith("gate_proj.lora_B")}
    importance = {name: [] for name in rows}
    travel = dict.fromkeys(rows, 0)
    before = {name: p.detach().clone() for name, p in rows.items()}
    for step, _ in enumerate(train_tiny.training_loop(run)):
        for name, p in rows.items():
            travel[name] = travel[name] + (p.detach() - before[name]).norm(dim=1)
            before[name] = p.detach().clone()
        if run.nalora and step % max(1, c.steps // 50) == 0:
            for ffn in run.nalora.ffns:
                importance[ffn.name].append(ffn.state.importance.numpy())
    return {"importance": importance, "steps": c.steps,
            "travel": {name: t.numpy() for name, t in travel.items()}}

# ---- time and memory -----------------------------------------------------------------------------

def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*: (.*)", info, re.M)
    return {"processor": named[1].strip() if named else platform.machine(),
            "cores": os.cpu_count(), "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__}

def reset_peak_memory(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux: the high-water mark starts anew for this run
            Path("/proc/self/clear_refs").write_text("5")

def peak_memory_mb(device):
    """Of the GPU's allocator on CUDA, of the process on Linux and macOS, else NaN."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return math.nan

def timed(function, *args):
    """(seconds, what function(*args) gives)."""
    start = time.perf_counter()
    value = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()            # so that the clock sees all of it
    return time.perf_counter() - start, value

def in_alternation(loops, rounds):
    """{name: [(seconds, what next(loop) gives), ...]} of training loops: in every round each makes
    a step, forwards or backwards by turns."""
    steps = {name: [] for name in loops}
    for round_ in range(rounds):
        for name in list(loops)[::1 if round_ % 2 else -1]:
            steps[name].append(timed(next, loops[name]))
    return steps

def step_time_ratio(config, other, pairs):
    """Median over `pairs` of (step time of `other`) / (step time of `config`), in alternation, in
    one process, on the same batches."""
    loops = {}
    for name, c in (("one", config), ("other", other)):
        c = replace(c, steps=max(c.steps, pairs + 5))
        loops[name] = train_tiny.training_loop(controls.set_up(c))
    steps = in_alternation(loops, pairs + 5)
    ratios = [b / a for (a, _), (b, _) in zip(steps["one"], steps["other"])]
    return statistics.median(ratios[5:])
