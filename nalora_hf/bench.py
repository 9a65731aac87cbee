"""What NA-LoRA costs beside LoRA on models of transformers: time and peak memory of a step.

    python -m nalora_hf.bench                                 16 small layers, eager and compiled
    python -m nalora_hf.bench --sizes mixture tiny-mixture    Qwen3-MoE, 8 layers, 16 experts
    python -m nalora_hf.bench --sizes small smollm2 1b --out nalora_hf/BENCH.md

Weights are random, of a Llama's shapes or of a mixture's, whose experts carry LoRA, too (by PEFT
alone: 16 experts, 4 of them for each token). Every kind has its own copy, all see the same batches,
and they take their steps in turn in one process; a time is the median of the rounds, a ratio the
median of the rounds' ratios with its quartiles. On a CPU it is CPU time, of one thread by default,
which other programs disturb little."""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, inject_lora

SIZES = {  # layers, hidden, FFN, heads, heads of k and v, vocabulary; sequences and their tokens
    "small": (16, 256, 768, 8, 4, 1024, 8, 128),
    "mixture": (8, 256, 128, 8, 4, 1024, 8, 128),
    "tiny-mixture": (8, 64, 32, 4, 2, 1024, 8, 64),
    "smollm2": (30, 576, 1536, 9, 3, 49152, 4, 256),
    "1b": (16, 2048, 8192, 32, 8, 128256, 4, 1024)}
KINDS = ["PEFT's LoRA", "NA-LoRA on PEFT's", "our LoRA", "NA-LoRA on ours"]

class Run:
    """One model in training. step() takes one optimizer step."""
    def __init__(self, kind, size, compiled, device, dtype, stride):
        from transformers import AutoConfig, AutoModelForCausalLM
        layers, hidden, ffn, heads, kv_heads, vocabulary, self.rows, self.length = SIZES[size]
        mixture = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=ffn)
        family, more = ("qwen3_moe", mixture) if "mixture" in size else ("llama", {})
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
                family, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn,
                num_hidden_layers=layers, num_attention_heads=heads, head_dim=hidden // heads,
                num_key_value_heads=kv_heads, use_cache=False, **more)).to(dtype)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        if "PEFT" in kind:
            from peft import LoraConfig, get_peft_model
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        else:
            inject_lora(model, targets, rank=8, alpha=16)
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                           lr=1e-4, fused=True)
        if "NA-LoRA" in kind:
            NALoRA(model, self.optimizer, NALoRAConfig(stride=stride))
        self.device = device
        whole = "mixture" not in size  # PEFT's LoRA on experts breaks the graph
        self.call = torch.compile(model, fullgraph=whole) if compiled else model
        self.steps = 0

    def step(self):
        """Seconds of one step."""
        generator = torch.Generator().manual_seed(self.steps)
        vocabulary = self.model.config.vocab_size
        tokens = torch.randint(vocabulary, (self.rows, self.length), generator=generator)
        tokens = tokens.to(self.device)
        self.steps += 1
        wait(self.device)
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        began = clock()
        self.call(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.device)
        return clock() - began

def wait(device):
    if device != "cpu":
        torch.accelerator.synchronize()

def measure(kinds, size, compiled, device, dtype, stride, rounds):
    """{kind: (seconds of each round, peak MB of its own or None)}."""
    runs = {}
    memory = {}
    for warm in (torch.float32, dtype):  # so that no kind pays for cuBLAS's workspace
        ones = torch.ones(64, 64, device=device, dtype=warm)
        ones @ ones
    for kind in kinds:
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        runs[kind] = Run(kind, size, compiled, device, dtype, stride)
        for _ in range(3):  # compiles, and fills the optimizer's state
            runs[kind].step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[kind].step()
            memory[kind] = (torch.cuda.max_memory_allocated() - held) / 1e6
    times = {kind: [] for kind in kinds}
    for i in range(rounds):
        for kind in kinds if i % 2 else kinds[::-1]:
            times[kind].append(runs[kind].step())
    return {kind: (times[kind], memory.get(kind)) for kind in kinds}

def rows(size, compiled, measured):
    """Lines of the table."""
    for kind, (seconds, memory) in measured.items():
        base = KINDS[0] if "PEFT" in kind else KINDS[2]
        ratio = ""
        share = ""
        if kind != base:
            ratios = [a / b for a, b in zip(seconds, measured[base][0])]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
            share = f"{memory / measured[base][1]:.4f}" if memory else ""
        yield (f"| {size} | {'compiled' if compiled else 'eager'} | {kind} | "
               f"{statistics.median(seconds) * 1000:.1f} | {ratio} | "
               f"{f'{memory:.0f}' if memory else ''} | {share} |")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"],
                        default=["eager", "compiled"])
    parser.add_argument("--lora", choices=["peft", "ours", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--stride", type=int, default=17, help="NALoRA's")
    parser.add_argument("--out", help="a Markdown file for the table (default: printed only)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(args.threads)
    machine = (torch.cuda.get_device_name() if device == "cuda"
               else f"{platform.machine()} CPU, {args.threads} thread(s)")
    chosen = {"peft": KINDS[:2], "ours": KINDS[2:], "both": KINDS}[args.lora]
    lines = [f"{machine}; base in {str(dtype).removeprefix('torch.')}, LoRA in float32, rank 8 on "
             f"all linear layers; torch {torch.__version__}; median of {args.rounds} rounds "
             "(quartiles).", "",
             "| model | mode | kind | ms a step | time, over LoRA | peak MB | memory, over LoRA |",
             "|---|---|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for size in args.sizes:
        for mode in args.modes:
            torch.compiler.reset()
            kinds = KINDS[:2] if "mixture" in size else chosen
            measured = measure(kinds, size, mode == "compiled", device, dtype, args.stride,
                               args.rounds)
            for line in rows(size, mode == "compiled", measured):
                lines.append(line)
                print(line, flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")

if __name__ == "__main__":
    sys.exit(main())
