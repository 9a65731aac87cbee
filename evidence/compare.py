"""Compares methods: rates tuned with seeds of their own, then judged by paired differences.

    python -m evidence.compare --results evidence/results/toy      a little under an hour, two cores
    python -m evidence.compare --methods lora nalora-mask:keep=0.1 random-mask:keep=0.1 --seeds 0 1

Given again after an interruption, a command goes on where it was cut. Methods are those of
train_tiny.py, controls.py and peers.py; METHOD:FLAG=VALUE,... changes a setting of one variant.
"""
import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import torch

import train_tiny
from data import problems, runs
from data.runs import read_json
from evidence import controls, figures, measures, other_base, peer_files, peers, report
from evidence.common import write_json, write_text
from evidence.controls import Config
from nalora import write_files

controls.METHODS.update(peers.METHODS)
METHODS = [name for name in controls.METHODS if name != "pretrain"]
COMPARED = ["full", "lora", "nalora", "nalora-neutral", "nalora-mask", "nalora-scale",
            "nalora-shuffled", "shuffled-mask", "random-mask", "inverted-mask", "uniform-scale"]
TUNING_GRID = {"adamw": [1e-3, 2.5e-3, 6e-3, 1.5e-2], "sgd": [0.1, 0.3, 1.0, 3.0]}
SWEEPS = {"rank": [f"rank={r},alpha={2 * r}" for r in (1, 2, 4, 8, 16)],
          "train-size": ["train-size=100", "train-size=300", ""],
          "targets": ["", "targets=gate_proj+up_proj+down_proj", "targets=gate_proj"],
          "keep": [f"keep={k}" for k in (0.05, 0.1, 0.25, 0.5)],
          "score": ["score=phi_prime", "score=rho_prime", "score=downstream"],
          "optimizer": ["optimizer=adamw", "optimizer=sgd"]}
FIXED = ("method", "seed", "device", "dtype", "threads", "data", "base", "test_size",
         "eval_every")                      # settings in which variants may not differ
TYPES = {"train_size": int, "test_size": int, "eval_every": int}

# ---- variants ------------------------------------------------------------------------------------

def field_type(name):
    """What a setting is read as, on the command line and in METHOD:FLAG=VALUE."""
    kind = TYPES.get(name) or next(f.type for f in fields(Config) if f.name == name)
    return str if kind is tuple else kind

def configure(args, spec, **changes):
    """The Config of a variant such as "lora" or "nalora-mask:keep=0.1,targets=gate_proj+up_proj".
    ValueError if the spec cannot be read."""
    method, _, flags = spec.partition(":")
    if method not in METHODS:
        raise ValueError(f"--methods: {spec!r} names no method; choose among {', '.join(METHODS)}.")
    given = {f.name: getattr(args, f.name) for f in fields(Config)
             if getattr(args, f.name, None) is not None}
    own = {}
    may_differ = [f.name for f in fields(Config) if f.name not in FIXED]
    for flag in filter(None, flags.split(",")):
        key, _, text = flag.partition("=")
        name = key.replace("-", "_")
        if name not in may_differ:
            raise ValueError(f"--methods: {spec!r} cannot be read: {key!r} is not among the flags "
                             f"in which variants may differ, {', '.join(may_differ)}.")
        try:
            own[name] = text.split("+") if name == "targets" else field_type(name)(text)
        except ValueError:
            raise ValueError(f"--methods: {spec!r} cannot be read: {text!r} is no value of "
                             f"{key}.") from None
    given |= own | changes
    given |= {"method": method, "targets": list(given.get("targets", Config.targets))}
    data = Path(given.get("data", controls.DATA))
    base = str((data if data.is_dir() else Path(controls.DATA)) / "base")
    defaults = train_tiny.DEFAULTS.get(method, {})
    if given.get("optimizer") == "sgd":
        defaults = {"lr": 0.3}
    values = {"base": base, "threads": args.threads, "device": train_tiny.best_device(args.device),
              **defaults, **controls.PRESETS.get(method, {}), **given}
    return Config(**relevant(values))

def relevant(values):
    """The settings without those that have no effect, so that equal runs have equal Configs."""
    method = values["method"]
    idle = {"beta1", "beta2"} if values.get("optimizer") == "sgd" else {"momentum"}
    if method in ("full", "nora"):
        idle |= {"rank", "alpha", "targets"}
    if method not in controls.PRESETS:
        idle |= {"mask", "scale", "budget", "score"}
        if not method.startswith("nalora"):
            idle |= {"keep", "ema", "stride"}
    mask = values.get("mask", "derivative")
    if method in controls.PRESETS and mask in controls.BLIND_MASKS:
        idle |= {"score", "ema"}
        if values.get("scale") == "none":
            idle |= {"stride"}
    if mask == "none":
        idle |= {"keep"}
    return {name: value for name, value in values.items() if name not in idle} | (
        {"targets": list(Config.targets)} if "targets" in idle else {})

def variants_of(args):
    """{label: {"method", "spec" (of --methods), "changes" (flags), "value" (of the sweep)}}. A
    method that no value touches occurs once, with the value None."""
    variants = {}
    for spec in args.methods:
        method, _, flags = spec.partition(":")
        alike = flags and configure(args, spec) == configure(args, method)
        if alike and not names_rate(spec):
            raise ValueError(f"--methods: {spec!r} is the same run as {method!r}: its flags have "
                             "no effect there, or are the defaults.")
        labels = {}
        for value in sweep_values(args):
            labels[spec + (":,"[":" in spec] + value if value else "")] = value
        if all(configure(args, label) == configure(args, spec) for label in labels):
            labels = {spec: None}
        for label, value in labels.items():
            variants[label] = {"method": method, "spec": spec,
                               "changes": label.partition(":")[2], "value": value}
    return variants

def sweep_values(args):
    if not args.values:
        return SWEEPS.get(args.sweep, [""])
    if args.sweep != "rank":
        return [f"{args.sweep}={value}" for value in args.values]
    if not all(map(str.isdecimal, args.values)):
        raise ValueError(f"--values {' '.join(args.values)}: ranks are whole numbers.")
    return [f"rank={value},alpha={2 * int(value)}" for value in args.values]

def grid(args, label):
    """The learning rates that a variant is tuned over: those of every variant, unless it names its
    own ("full:lr=0.002")."""
    config = configure(args, label)
    return [config.lr] if names_rate(label) else args.lrs or TUNING_GRID[config.optimizer]

def names_rate(spec):
    return re.search(r"[:,]lr=", spec)

def job(args, label, lr, seed, **changes):
    """(folder, Config) of one run."""
    folder = args.out / re.sub(r"[^\w.-]", "-", label) / f"lr{lr:g}-seed{seed}"
    return folder, configure(args, label, lr=lr, seed=seed, **changes)

# ---- runs ----------------------------------------------------------------------------------------

def save(run, out):
    """The weights of a run of any method. Returns the file."""
    if run.config.method == "full":
        runs.save_model(run.model, out / "model")
        return out / "model" / "model.safetensors"
    peer_files.save_adapter(run.model, out / "adapter", run.config.base)
    return next((out / "adapter").glob("*.safetensors"))

def judge(run):
    """Shares of held-out equations and of test problems that are right; None without any."""
    run.model.eval()
    equations = problems.arithmetic_accuracy(run.model, run.tokenizer, run.equations)
    exact, _ = other_base.exact_match(run.model, run.tokenizer, run.problems, run.max_new)
    return {"arithmetic_accuracy": equations, "test_exact_match": exact}

@cache                                      # a base may be large
def digest(data, base):
    """{file: SHA-256} of what a run on them reads."""
    config = Config(data=data, base=base)
    data = Path(data)
    splits = [data / f"{split}.jsonl" for split in problems.SPLITS]
    return runs.digest(config, splits if data.is_dir() else [data])

def run_job(out, config, keep):
    """One run of a comparison; what it prints goes to log.txt in its folder. A run whose loss is
    not finite has the summary val_loss null."""
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    measures.reset_peak_memory(config.device)
    with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            summary = finish(config, out)
        except train_tiny.Diverged as e:
            summary = {"val_loss": None, "diverged": str(e),
                       "digest": digest(config.data, config.base)}
    write_json(out / "summary.json", summary)
    weights = out / "model" / "model.safetensors"
    for path in [out / "checkpoint.pt"] + [weights] * (not keep):
        path.unlink(missing_ok=True)        # gigabytes for a real model
    return read_summary(out)

def finish(config, out):
    """Trains a run, from its last checkpoint if there is one, saves and judges it: its summary."""
    began = time.perf_counter()
    run = controls.set_up(config)
    runs.claim(out, run.settings, resume=True)
    print(runs.describe(run), flush=True)
    records, times = train_tiny.train(run, out, runs.load_checkpoint(run, out))
    file = save(run, out)
    return {"method": config.method, "seed": config.seed, "val_loss": records[-1]["val_loss"],
            **judge(run), **runs.count_parameters(run), "file_bytes": file.stat().st_size,
            "digest": run.digest, **runs.machine(),
            "step_ms": 1000 * statistics.median(times) if times else None,
            "train_seconds": sum(times), "wall_seconds": time.perf_counter() - began,
            "peak_memory_mb": measures.peak_memory_mb(config.device)}

def read_summary(out):
    """The summary of a finished run. ValueError if it is something else."""
    summary = read_json(out / "summary.json")
    needed = set(measures.KEPT)
    if summary.get("val_loss", 0) is None:
        needed = {"val_loss", "diverged"}
    missing = sorted(needed - set(summary))
    if missing:
        raise ValueError(f"{out / 'summary.json'} lacks {missing[0]}: it is no summary of a "
                         f"comparison. Delete {out} to run it anew.")
    return summary

def finished(out, config):
    """Whether the run in the folder is finished. ValueError if it has other settings."""
    if not (out / "summary.json").exists():
        return False
    if read_json(out / "config.json") != json.loads(json.dumps(asdict(config))):
        raise ValueError(f"{out} holds a run with other settings: choose another --out, or use the "
                         "flags that it was made with.")
    summary = read_json(out / "summary.json")
    if summary.get("digest") != digest(config.data, config.base):
        raise ValueError(f"{out} holds a run on other data or another base than is there now: "
                         "choose another --out.")
    return True

def run_jobs(jobs, workers, later=0):
    """{name: summary} of {name: (folder, Config, whether its weights are kept)}; finished ones are
    read, not repeated. The time left is told with that of `later` more runs."""
    done = {}
    for name, (out, config, _) in jobs.items():
        if finished(out, config):
            done[name] = read_summary(out)
    todo = {name: job for name, job in jobs.items() if name not in done}
    began = time.perf_counter()
    at_start = len(done)
    print(f"{len(jobs)} runs, {len(done)} of them finished already", flush=True)
    for name, summary in job_results(todo, workers):
        done[name] = summary
        per_run = (time.perf_counter() - began) / (len(done) - at_start)
        left = per_run * (len(jobs) - len(done) + later) / 60
        loss = "diverged"
        if summary["val_loss"] is not None:
            loss = f"val_loss {summary['val_loss']:.4f}"
        if summary.get("test_exact_match") is not None:
            loss += f"  exact match {summary['test_exact_match']:.3f}"
        print(f"[{len(done)}/{len(jobs)}] {name}: {loss}   about {left:.0f} min left", flush=True)
    return done

def job_results(jobs, workers):
    """Yields (name, summary) as the jobs end. One worker: in this process."""
    if workers == 1 or len(jobs) < 2:
        for name, job in jobs.items():
            yield name, run_job(*job)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, follow_parent) as pool:
        futures = {pool.submit(run_job, *job): name for name, job in jobs.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.BrokenExecutor:
            raise ValueError("A run was killed from outside, perhaps for want of memory: give the "
                             "same command again to go on, or fewer --jobs.") from None
        finally:
            pool.shutdown(cancel_futures=True)

def follow_parent():
    """Ends this worker at Ctrl-C and when the program that started it is killed: none is left to
    write into a run that is resumed."""
    def interrupted(*_):
        os._exit(130)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    parent = os.getppid()
    signal.signal(signal.SIGINT, interrupted)
    threading.Thread(target=watch, daemon=True).start()

# ---- the protocol --------------------------------------------------------------------------------

def tune(args, variants):
    """{label: {learning rate: mean validation loss over the tuning seeds, None where one diverged
    or there is no choice}}. No test data."""
    grids = {label: grid(args, label) for label in variants}
    name = "{} lr={:g} seed={}".format
    jobs = {}
    for label, rates in grids.items():
        if len(rates) > 1:
            for lr, seed in itertools.product(rates, args.tuning_seeds):
                run = job(args, label, lr, seed, test_size=0, eval_every=10**9)
                jobs[name(label, lr, seed)] = (*run, False)
    summaries = run_jobs(jobs, args.jobs, later=len(variants) * len(args.seeds))
    losses = {label: dict.fromkeys(rates) for label, rates in grids.items()}
    for label, rates in grids.items():
        for lr in rates if len(rates) > 1 else ():
            values = [summaries[name(label, lr, s)]["val_loss"] for s in args.tuning_seeds]
            losses[label][lr] = None if None in values else statistics.mean(values)
        if len(rates) > 1 and not any(losses[label].values()):
            raise ValueError(f"{label} diverged at every learning rate: give smaller ones with "
                             "--lrs.")
    return losses

def lowest(losses):
    """The learning rate of lowest loss, never one that diverged (None); the only one, if so."""
    there = {lr: loss for lr, loss in losses.items() if loss is not None} or losses
    return min(there, key=there.get)

def compare(args):
    """Tunes, runs, measures, writes comparison.json, .csv, .md and figures to args.results. Goes
    on where it was cut."""
    variants = variants_of(args)
    for label in variants:                  # what can be wrong is found before a file is written
        for lr in grid(args, label):
            configure(args, label, lr=lr)
        run = controls.set_up(configure(args, label))
        measures.merged(run.model, run.config.method)   # as at the end, refused now if then
    args.results.mkdir(parents=True, exist_ok=True)
    for label, losses in tune(args, variants).items():
        variants[label]["tuning"] = list(losses.items())
        variants[label]["lr"] = lowest(losses)
    jobs = {f"{label} seed={seed}": (*job(args, label, variant["lr"], seed), True)
            for seed in args.seeds for label, variant in variants.items()}
    summaries = run_jobs(jobs, args.jobs)
    torch.set_num_threads(args.jobs * args.threads)         # from here on it works alone
    first = configure(args, next(iter(variants)))
    rows, base = measures.measure(first, variants, jobs, summaries, args.seeds, args.out,
                                  args.sweep)
    configurations = [configure(args, variant["spec"]) for variant in variants.values()]
    shown = next((c for c in configurations if c.method not in ("full", "nora")), first)
    result = report.rounded({
        "variants": variants, "sweep": args.sweep, "seeds": args.seeds,
        "tuning_seeds": args.tuning_seeds, "base": base, "rows": rows,
        "configuration": asdict(shown), "step_time": step_times(args, variants, jobs, summaries),
        "machine": measures.machine()})
    write_json(args.results / "comparison.json", result)
    result = read_json(args.results / "comparison.json")
    write_text(args.results / "comparison.csv", report.csv_text(rows))
    write_text(args.results / "comparison.md", report.markdown(result))
    figures.draw_comparison(result, args.results)
    if not args.sweep and "nalora" in variants:
        draw_at_work(args, variants["nalora"]["lr"], jobs)
    print(f"\n{report.markdown(result)}\nwritten to {args.results}")

def draw_at_work(args, lr, jobs):
    """at_work.png: two runs are trained anew for it, so it is kept in args.out."""
    figure = args.out / f"at_work-lr{lr:g}.png"
    if not figure.exists():
        names = {m: f"{m} seed={args.seeds[0]}" for m in ("lora", "nalora")}
        traces = {m: measures.trace(configure(args, m, lr=lr, seed=args.seeds[0]))
                  for m, name in names.items() if name in jobs}     # one rate: paths are compared
        figures.draw_at_work(traces, configure(args, "nalora").keep, figure)
    write_files(args.results, {"at_work.png": figure.read_bytes()})

def step_times(args, variants, jobs, summaries):
    """{label: its step time / LoRA's}, in alternation in this process; kept in args.out, since
    another day's timing would differ."""
    if args.sweep or "lora" not in variants:
        return {}
    path = args.out / "step_time.json"
    known = read_json(path) if path.exists() else {"lora": 1.0}
    lora = f"lora seed={args.seeds[0]}"
    pairs = max(5, min(60, int(10_000 / (summaries[lora]["step_ms"] or 1000))))
    for label in variants:
        if label not in known:
            print(f"timing the steps of {label}", flush=True)
            own = jobs[f"{label} seed={args.seeds[0]}"][1]
            known[label] = measures.step_time_ratio(jobs[lora][1], own, pairs)
            write_json(path, known)
    return {label: known[label] for label in variants}

# ---- the command line ----------------------------------------------------------------------------

def command_line():
    parser = argparse.ArgumentParser(prog="python -m evidence.compare", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", metavar="METHOD", default=COMPARED)
    add("--sweep", choices=SWEEPS, help="compare at each value of this setting")
    add("--values", nargs="+", help="of the sweep, instead of the usual ones")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the runs that judge")
    add("--tuning-seeds", type=int, nargs="+", default=[100, 101],
        help="of the runs that choose the learning rate")
    add("--lrs", type=float, nargs="+", help="learning rates to choose from; one: no tuning "
        f"(default: {TUNING_GRID})")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    add("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    add("--results", type=Path, metavar="DIR", help="folder of tables and figures (default: --out)")
    add_settings(parser, without=("lr",))
    return parser

def add_settings(parser, without=()):
    group = parser.add_argument_group("settings of every variant (default: train_tiny.py's)")
    for f in fields(Config):
        flag = f"--{f.name.replace('_', '-')}"
        if f.name == "targets":
            group.add_argument(flag, nargs="+")
        elif f.name not in ("method", "seed", *without):
            choices = {**controls.CHOICES, "optimizer": TUNING_GRID}.get(f.name)
            group.add_argument(flag, type=field_type(f.name), choices=choices,
                               metavar=None if choices else f.name.upper())

def check(args):
    """Fills in what depends on other flags. ValueError on values that make no sense."""
    if args.values and not args.sweep:
        raise ValueError("--values are those of a sweep: name it with --sweep.")
    if not 1 <= args.jobs <= 1024:
        raise ValueError(f"--jobs is {args.jobs}: give a number from 1 to 1024.")
    for name in ("methods", "values", "seeds", "tuning_seeds", "lrs"):
        values = getattr(args, name)
        if values and len(set(values)) < len(values):
            raise ValueError(f"--{name.replace('_', '-')} names something twice.")
    if set(args.seeds) & set(args.tuning_seeds):
        raise ValueError("A seed that chooses the learning rate cannot also judge: --seeds and "
                         "--tuning-seeds must differ.")
    args.threads = args.threads or 1
    args.results = args.results or args.out

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used."""
    args = command_line().parse_args(argv)
    try:
        check(args)
        compare(args)
    except (ValueError, OSError) as e:
        print(f"evidence.compare: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished runs are safe in {args.out}: give the same command again "
              "to go on.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
