"""What the stride does to experts: how well few pairs of a token and an expert tell which rows
matter.

    python -m nalora_hf.strides --text data/pretrain.txt --then data/train.jsonl --seed 0

A small Qwen3-MoE (2 layers, 128 experts of width 32, top 8) learns to predict the bytes of the
first file, 240 steps, then trains LoRA on the second, 60 steps of 2,048 bytes. Beside each other,
NALoRA's importance, mask and scale are decided by every pair, every 5th and every 17th; nothing
moves by them. At last a large sample (24 batches) tells the importance of the model as it is. The
last 30 steps count, and of that sample the experts with more than 200 pairs. Minutes on one core.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

from nalora import GateSums, NALoRAConfig, State, decide, importance_mask, observe
from nalora_hf import NALoRA

STRIDES = (1, 5, 17)
LAYERS = 2
EXPERTS = 128
TOP = 8
WIDTH = 32
BASE_STEPS = 240  # batches, as of the next two
STEPS = 60
SAMPLE = 24

class Beside(NALoRA):
    """Counts the sums of a step by several strides, too."""
    def see(self, ffn, z, trains):
        super().see(ffn, z, trains)
        of_pairs = observe(ffn.phi, z.detach()[:, None, ffn.columns], z.new_ones(len(z), 1))
        for stride in STRIDES:
            every = slice(self.steps % stride, None, stride)
            zero = ffn.group.state.importance.new_zeros(EXPERTS, WIDTH)
            zeros = GateSums(zero, *zero.new_zeros(4, EXPERTS))
            self.sums[stride, ffn.index] = GateSums(*(
                t.index_add(0, ffn.expert[every], found[every])
                for t, found in zip(zeros, of_pairs)))

def batch(data, generator, rows=16, length=128):
    first = torch.randint(len(data) - length, (rows,), generator=generator).tolist()
    return torch.stack([data[i:i + length] for i in first])

def read(path):
    return torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long()

def make_base(text, generator):
    """A mixture that can predict the text a little."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=EXPERTS,
        num_experts_per_tok=TOP, norm_topk_prob=True, output_router_logits=True,
        router_aux_loss_coef=0.01)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BASE_STEPS, eta_min=3e-4)
    for _ in range(BASE_STEPS):
        tokens = batch(text, generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model

def measure(text, then, seed):
    """{stride: {what: figure}}"""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(make_base(text, generator),
                           LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    nalora = Beside(model, optimizer, NALoRAConfig(mask="none", scale="none"))
    config = NALoRAConfig()
    zero = torch.zeros(EXPERTS, WIDTH)
    one = torch.ones(EXPERTS)
    states = {(stride, i): State(zero, zero == 0, one * torch.nan, one * torch.nan, one)
              for stride in STRIDES for i in range(LAYERS)}
    seen = {stride: {"pairs a step": [], "experts without": [], "mask changes": []}
            for stride in STRIDES}
    scales = {key: [] for key in states}
    for step in range(STEPS):
        nalora.sums = {}
        tokens = batch(then, generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for (stride, i), sums in nalora.sums.items():
            old = states[stride, i]
            new = states[stride, i] = decide(old, sums, config)
            if step >= STEPS // 2:
                figures = seen[stride]
                figures["pairs a step"].append(sums.tokens.mean())
                figures["experts without"].append((sums.tokens == 0).float().mean())
                figures["mask changes"].append((new.mask != old.mask).float().mean())
                scales[stride, i].append(new.scale)
    large = []
    for _ in range(SAMPLE):
        nalora.sums = {}
        tokens = batch(then, generator)
        model(input_ids=tokens, labels=tokens)
        large.append(nalora.sums)
    for stride, figures in seen.items():
        agree = []
        for i in range(LAYERS):
            pairs = sum(sums[1, i].tokens for sums in large)
            score = sum(sums[1, i].score for sums in large)
            mask = importance_mask(score / pairs[:, None], config.keep)
            agree.append((states[stride, i].mask == mask)[pairs > 200].float().mean())
        figures["mask as by a large sample"] = agree
        figures["scale's spread over steps"] = [torch.stack(scales[stride, i]).std(0).mean()
                                                for i in range(LAYERS)]
    return {stride: {what: statistics.mean(map(float, values)) for what, values in figures.items()}
            for stride, figures in seen.items()}

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nalora_hf.strides", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file for the base")
    parser.add_argument("--then", required=True, help="another for LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = measure(read(args.text), read(args.then), args.seed)
    print("| seed | stride |", *(f"{what} |" for what in found[1]))
    for stride, figures in found.items():
        print(f"| {args.seed} | {stride} |", *(f"{value:.4g} |" for value in figures.values()))

if __name__ == "__main__":
    sys.exit(main())
