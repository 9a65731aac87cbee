"""Speed and memory of a training step: full fine-tuning, LoRA, NA-LoRA and, where transformers and
peft are installed, PEFT's LoRA and DoRA; all on the same weights, batches and optimizer.

    python -m evidence.bench --results evidence/results/bench
"""
import argparse
import concurrent.futures
import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_tiny
from data import problems
from data.runs import read_json
from evidence import compare, controls, measures, report
from evidence.common import write_json, write_text
from evidence.measures import in_alternation, peak_memory_mb, reset_peak_memory, timed
from nalora import Llama, LlamaConfig, NALoRA, inject_lora, lora_parameters

WARM_UP = 3  # rounds

def our_loop(config):
    """(training loop that yields (loss, tokens of the batch), device)."""
    run = controls.set_up(config)

    def loop():
        for step, loss in enumerate(train_tiny.training_loop(run)):
            yield loss, run.batches(step)[0].numel()

    return loop(), run.device

def peft_loop(config, **flags):
    """As our_loop, with transformers' model and PEFT's adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = controls.set_up(config)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(
        config.base, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
        use_safetensors=True)
    adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha,
                         target_modules=list(config.targets), **flags)
    model = get_peft_model(model.to(run.device).train(), adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, config.lr, weight_decay=config.weight_decay,
                                  fused=True)

    def loop():
        for step in range(config.steps):
            tokens, targets, _ = (t.to(run.device) for t in run.batches(step))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * train_tiny.schedule(config, step)
            with run.autocast:              # padding stands on the right: no mask is needed
                loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item(), tokens.numel()

    return loop(), run.device

def contestants(configs):
    """{name: function that makes (loop, device)}, PEFT's where transformers and peft are there."""
    makers = {method: partial(our_loop, config) for method, config in configs.items()}
    if all(map(importlib.util.find_spec, ("transformers", "peft"))):
        makers["PEFT LoRA"] = partial(peft_loop, configs["lora"])
        makers["PEFT DoRA"] = partial(peft_loop, configs["lora"], use_dora=True)
    return makers

def peak_of_process(make, steps=3):
    """Peak memory in MB of a process that does nothing but make a run and train a few steps."""
    loop, device = make()
    reset_peak_memory(device)
    for _ in range(steps):
        next(loop)
    return peak_memory_mb(device)

def in_new_process(function, *args):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, compare.follow_parent) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.BrokenExecutor:
            raise ValueError("A process that measures memory was killed from outside, perhaps for "
                             "want of memory: free some and give the command again.") from None

def matmul_peak(device, dtype, size=2048):
    """FLOP/s of the fastest of ten products of two square matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(torch.matmul, a, a)[0] for _ in range(10))

def flops_per_token(make):
    loop, _ = make()
    with FlopCounterMode(display=False) as counter:
        _, tokens = next(loop)
    return counter.get_total_flops() / tokens

def where_time_goes(make, steps=5):
    """{operation: share of the time of a step}, the ten largest, by PyTorch's profiler."""
    loop, _ = make()
    for _ in range(WARM_UP):
        next(loop)
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            next(loop)
    spent = {event.key: event.self_cpu_time_total + getattr(event, "self_device_time_total", 0)
             for event in profile.key_averages()}
    total = sum(spent.values())
    return {name: spent[name] / total
            for name in sorted(spent, key=spent.get, reverse=True)[:10]}

def sized_loop(layers, windows, with_nalora):
    """Training steps of TINY with random weights and another depth, on windows of 64 tokens."""
    torch.manual_seed(0)
    shape = {**train_tiny.TINY, "num_hidden_layers": layers}
    model = Llama(LlamaConfig(**shape))
    inject_lora(model, train_tiny.Config.targets)
    optimizer = torch.optim.AdamW(lora_parameters(model), fused=True)
    if with_nalora:
        NALoRA(model, optimizer)
    text = torch.randint(shape["vocab_size"], (windows, 65))
    while True:
        model(text[:, :-1], text[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield

def step_of_size(layers, windows, rounds):
    """{"lora", "nalora": median ms of a step} in alternation on the CPU."""
    loops = {"lora": sized_loop(layers, windows, False),
             "nalora": sized_loop(layers, windows, True)}
    steps = in_alternation(loops, rounds + WARM_UP)
    return {name: 1000 * statistics.median(s for s, _ in taken[WARM_UP:])
            for name, taken in steps.items()}

def quartiles(values):
    return statistics.quantiles(values, n=4)

def against(steps, name, other):
    """Quartiles of the step time of one contestant over another's, or None."""
    if other not in steps:
        return None
    pairs = zip(steps[name][WARM_UP:], steps[other][WARM_UP:])
    return quartiles([ours / theirs for (ours, _), (theirs, _) in pairs])

def measured_row(name, make, steps, peak):
    print(f"memory and operations of {name}", flush=True)
    taken = steps[name][WARM_UP:]
    flops = flops_per_token(make)
    rates = [tokens / seconds for seconds, (_, tokens) in taken]
    memory = sorted(in_new_process(peak_of_process, make) for _ in range(3))
    return {"name": name, "step_ms": quartiles([1000 * seconds for seconds, _ in taken]),
            "ratio": against(steps, name, "lora"),
            "ratio_to_peft": against(steps, name, "PEFT LoRA"),
            "tokens_per_second": statistics.median(rates), "first_loss": steps[name][0][1][0],
            "peak_memory_mb": memory,
            "share_of_matmul_peak": flops * statistics.median(rates) / peak}

def generation(config, rounds):
    """(number of problems, seconds that a model trained for some steps takes to answer them)."""
    run = controls.set_up(config)
    if not run.problems:
        return 0, None
    loop = train_tiny.training_loop(run)
    for _ in range(rounds):                 # so that it answers at length
        next(loop)
    prompts = [p["prompt"] for p in run.problems]
    seconds, _ = timed(problems.solve, run.model.eval(), run.tokenizer, prompts, run.max_new)
    return len(run.problems), seconds

def bench(args):
    """Measures and writes bench.json and bench.md to args.results."""
    rounds = args.rounds
    if rounds < 2:
        raise ValueError(f"--rounds is {rounds}: a benchmark needs at least two.")
    steps_needed = rounds + WARM_UP
    configs = {method: compare.configure(args, method, steps=max(400, steps_needed))
               for method in ("full", "lora", "nalora")}
    if configs["lora"].optimizer != "adamw":
        raise ValueError("The benchmark times steps of AdamW, on both sides: leave --optimizer "
                         "out.")
    makers = contestants(configs)
    config = configs["lora"]
    print(f"{rounds} rounds of {', '.join(makers)} in alternation", flush=True)
    steps = in_alternation({name: make()[0] for name, make in makers.items()}, steps_needed)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    peak = matmul_peak(config.device, dtype)
    rows = [measured_row(name, make, steps, peak) for name, make in makers.items()]
    print("where the time goes, sizes, start", flush=True)
    answered, seconds = generation(config, rounds)
    sizes = [(layers, 16) for layers in (2, 4, 8)] + [(4, windows) for windows in (8, 32)]
    start = [sys.executable, "-c", "import sys, nalora; nalora.Llama.from_pretrained(sys.argv[1])",
             Path(config.base).resolve()]
    here = Path(train_tiny.__file__).resolve().parent
    started = [timed(partial(subprocess.run, start, cwd=here, check=True))[0] for _ in range(3)]
    result = report.rounded({
        "configuration": asdict(config), "rounds": rounds, "machine": measures.machine(),
        "rows": rows, "matmul_peak": peak,
        "profile": {name: where_time_goes(makers[name]) for name in ("lora", "nalora")},
        "sizes": [{"layers": layers, "windows": windows, **step_of_size(layers, windows, rounds)}
                  for layers, windows in sizes],
        "start_seconds": quartiles(started), "problems": answered, "generation_seconds": seconds})
    write_json(args.results / "bench.json", result)
    tables = report.bench_tables(read_json(args.results / "bench.json"))
    text = "\n\n".join(tables.values()) + "\n"
    write_text(args.results / "bench.md", text)
    print(f"\n{text}\nwritten to {args.results}")

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m evidence.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--results", type=Path, default=Path("runs/bench"))
    compare.add_settings(parser, without=("steps",))
    args = parser.parse_args(argv)
    try:
        args.threads = args.threads or torch.get_num_threads()
        torch.set_num_threads(args.threads)
        bench(args)
    except (ValueError, OSError) as e:
        print(f"evidence.bench: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
