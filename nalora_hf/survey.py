"""Which of transformers' causal language models NA-LoRA steers, tried one by one on tiny random
models under PEFT's LoRA on all linear layers:

    python -m nalora_hf.survey             every family, some minutes; writes MODELS.json, MODELS.md
    python -m nalora_hf.survey qwen3 glm4  some families, only printed
    python -m nalora_hf.survey --report    writes the table of MODELS.md from MODELS.json

A row says "steered" only if two things were seen. The importance is the mean |phi'| of what each
FFN's activation received, all tokens counted by a hook of our own (of an expert: what its weights
make of the tokens that the router gives it). And one step of SGD moved the rows of every B_gate, an
expert's alone, as the mask and the scale say, bit for bit, seen beside plain LoRA's step.
"""
import argparse
import contextlib
import io
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from nalora import NALoRAConfig, blend, value_and_slope
from nalora_hf.adapters import inject_lora, read_json, write_files
from nalora_hf.experts import Experts
from nalora_hf.families import activation, features
from nalora_hf.lora import lora_pairs
from nalora_hf.steer import NALoRA
from nalora_hf.tiny import build, loss_of

PACKAGE = Path(__file__).parent

# ---- one family ----------------------------------------------------------------------------------
# PEFT's on all linear layers, with those of fused experts, on these alone; ours.
WAYS = ("", "target_parameters", "target_parameters alone", "inject_lora")

def with_lora(model, way):
    """The model with LoRA on all linear layers, B away from 0."""
    if way == "inject_lora":
        head = model.get_output_embeddings()
        linears = {name: m for name, m in model.named_modules()
                   if type(m) is torch.nn.Linear and m is not head and min(m.weight.shape) >= 4}
        inject_lora(model, [name for name in linears if "router" not in name], rank=4, alpha=8)
    else:
        from peft import LoraConfig, get_peft_model
        config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
        if way == "target_parameters alone":
            config.target_modules = None
        if way:
            config.target_parameters = [f"{name}.{p}" for name, m in model.named_modules()
                                        if hasattr(m, "is_concatenated")
                                        for p, t in m.named_parameters() if t.dim() == 3]
        model = get_peft_model(model, config)
    torch.manual_seed(2)
    for layer in model.modules():
        for A, B in lora_pairs(layer):
            torch.nn.init.normal_(B.data, std=0.02)
    return model.train()

def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

def candidates(model):
    """Names of layers with LoRA beside an activation, for gate=."""
    names = {name: m for name, m in model.named_modules() if lora_pairs(m)}
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return dict.fromkeys(name.rpartition(".")[2] for name in names
                         if activation(parents[name]) is not None
                         and not re.search("router|attn|down_proj", name))

def steer(fresh, keywords):
    """(problem, FFNs) of one step beside plain LoRA's, from two equal models that fresh() makes.
    problem is "" where all is as it should be. ValueError if NALoRA refuses."""
    plain = fresh()
    try:
        loss_of(plain).backward()
    except Exception as e:
        raise ValueError(f"This LoRA does not run: {e}") from None
    optimizer_of(plain).step()
    model = fresh()
    optimizer = optimizer_of(model)
    nalora = NALoRA(model, optimizer, NALoRAConfig(stride=1, keep=0.25), **keywords)
    experts = note_experts([ffn for ffn in nalora.ffns if isinstance(ffn, Experts)])
    received, given = note_gates([ffn for ffn in nalora.ffns if not isinstance(ffn, Experts)])
    before = {id(p): p.detach().clone() for p in model.parameters()}
    loss_of(model).backward()
    try:
        optimizer.step()
    except ValueError as e:  # too late for a refusal
        return f"the step failed: {e}", nalora.ffns
    after = dict(zip(map(id, model.parameters()), plain.parameters()))
    called = [ffn for ffn in nalora.ffns if ffn in experts or ffn in received
              or ffn.state.k_hat.isfinite().any()
              or ffn in given and not isinstance(ffn.phi, torch.nn.Module)]
    if not called:  # a module that was not called is that of a fast path
        raise ValueError("no FFN that could be steered was called")
    for ffn in called:
        seen = experts.get(ffn) or {(): received.get(ffn) or given[ffn]}
        for e, z in seen.items():
            importance = value_and_slope(ffn.phi, torch.cat(z))[1].abs().mean(0)
            if not torch.allclose(importance * 0.1, ffn.state.importance[e], rtol=1e-5, atol=1e-7):
                return "importance is not that of the activation's input", nalora.ffns
        for p in ffn.parameters:
            is_gate = any(p is B for B in ffn.B_gates)
            if is_gate and torch.equal(p, before[id(p)]):
                return "no row of B_gate moved", nalora.ffns
            for part, e in shares(ffn, p):
                now, was, plainly = (t[part] for t in (p, before[id(p)], after[id(p)]))
                factor = ffn.state.scale[e].repeat(len(now), 1)
                if is_gate:
                    factor[ffn.rows] *= ffn.state.mask[e][:, None]
                if not torch.equal(now, blend(was, plainly, factor)):
                    return "a step is not blended as mask and scale say", nalora.ffns
    return "", nalora.ffns

def shares(ffn, p):
    """[(part of p, whose it is: an expert's or, as (), the FFN's)], as PEFT lays experts out."""
    if not isinstance(ffn, Experts):
        return [((), ())]
    E = ffn.module.num_experts
    if any(p is layer.lora_A["default"].weight for layer in ffn.layers):
        return [(slice(e * len(p) // E, (e + 1) * len(p) // E), e) for e in range(E)]
    return [((slice(None), slice(e, None, E)), e) for e in range(E)]

def note_gates(ffns):
    """{FFN: what its activation receives}, {FFN: what its gate gives}, filled by each pass with
    gradients (HRM has some without). It does not ask NALoRA where it looks: an activation is called
    for the gate that ran last."""
    received = {}
    given = {}
    last = []

    def note_gate(ffn, z):
        last[:] = [ffn] if z.requires_grad else []
        for ffn in last:
            given.setdefault(ffn, []).append(z.detach().flatten(0, -2).float())

    def note_phi(phi, z):
        for ffn in last:
            if ffn.phi is phi:
                received.setdefault(ffn, []).append(z.detach().flatten(0, -2).float())

    for ffn in ffns:
        ffn.gate.register_forward_hook(lambda gate, x, z, ffn=ffn: note_gate(ffn, z))
    for phi in {ffn.phi for ffn in ffns}:
        if isinstance(phi, torch.nn.Module):
            phi.register_forward_pre_hook(lambda phi, inputs: note_phi(phi, inputs[0]))
    return received, given

def note_experts(layers):
    """{layer: {expert: what its weights make of the tokens that the router gives it}}, filled by
    each pass."""
    received = {}

    def note(layer, x, experts, scores):
        W = layer.gate.get_param()  # with LoRA, while it computes
        for e in experts.unique().tolist():
            token = ((experts == e) & (scores != 0)).any(-1)
            z = x[token] @ (W[e] if layer.module.is_transposed else W[e].T)
            z = z + layer.module.gate_up_proj_bias[e] if layer.module.has_bias else z
            z = z[:, layer.rows].detach().float()
            received.setdefault(layer, {}).setdefault(e, []).append(z)

    for layer in layers:
        layer.module.register_forward_pre_hook(
            lambda module, inputs, layer=layer: note(layer, *inputs))
    return received

def gated(ffn):
    """Whether an FFN multiplies its activation by features: another layer is as wide, or fused."""
    others = [m for m in ffn.module.children() if m is not ffn.gate]
    return getattr(ffn.module, "has_gate", ffn.fused) or any(
        features(m, "out") == ffn.width for m in others)

def try_way(name, way):
    """(row as of `try_family`, which of "experts" and "FFNs" are steered) with LoRA put in so."""
    def fresh():
        return with_lora(build(name), way)
    row = {"outcome": "refused", "how": "", "said": ""}
    try:
        names = candidates(fresh())
    except Exception as e:
        return row | {"said": f"This LoRA does not go in: {e}"}, []
    for keywords in [{}, *({"gate": gate} for gate in names), {"gate": "w1", "act": F.silu}]:
        try:
            problem, ffns = steer(fresh, keywords)
        except ValueError as e:
            row["said"] = row["said"] or str(e).splitlines()[0]
            continue
        how = [way, *(f"{k}={getattr(v, '__name__', repr(v))}" for k, v in keywords.items())]
        row = {"outcome": "wrong" if problem else "steered" if gated(ffns[0]) else "ungated",
               "how": ", ".join(filter(None, how)), "said": problem}
        return row, {"experts" if isinstance(ffn, Experts) else "FFNs" for ffn in ffns}
    return row, []

def try_family(name):
    """{"outcome": steered, ungated, refused, not built or wrong, "how", "said"} of a class."""
    try:
        mixture = any(hasattr(m, "is_concatenated") for m in build(name).modules())
    except ValueError as e:
        return {"outcome": "not built", "how": "", "said": str(e)}
    tries = [try_way(name, way) for way in (WAYS if mixture else WAYS[::3])]
    steered = {what: row for row, found in tries[::-1] for what in found}  # by the first way
    wrong = [row for row, _ in tries if row["outcome"] == "wrong"]
    if wrong or not steered:
        return (wrong or tries[0])[0]
    row = min(steered.values(), key=lambda row: row["outcome"])  # "steered" before "ungated"
    if mixture:
        hows = {what: its["how"] or "all-linear" for what, its in steered.items()}
        both = [its for its, found in tries if len(found) == 2]
        text = "; or ".join(f"{what}: {how}" for what, how in sorted(hows.items()))
        row = row | {"how": f"experts and FFNs: {both[0]['how']}" if both else text}
    return row

# ---- all families --------------------------------------------------------------------------------
def survey(chosen):
    """{class: row of `try_family`} of transformers' causal language models."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = {}
    for kind, names in NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if name in rows or chosen and kind not in chosen:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            rows[name] = try_family(name)
        print(name, *filter(None, rows[name].values()), sep=" | ", flush=True)
    return rows

MARK = "<!-- families -->"  # in MODELS.md, before the table
END = "<!-- end -->"
TITLES = {"steered": "Gated, steered and verified",
          "ungated": "No gate, steered and verified with the layer in front of the activation",
          "refused": "Refused", "not built": "Not tried: no tiny model of it could be built",
          "wrong": "Steered, but wrong"}

def report(rows):
    """The Markdown table of the families, by outcome."""
    lines = ["| outcome | how | families |", "|---|---|---|"]
    for outcome, title in TITLES.items():
        groups = {}
        for name, row in rows.items():
            if row["outcome"] == outcome:
                short = re.sub("(For(CausalLM|ConditionalGeneration)|"
                               "(Model)?(With)?LMHead(Model)?)$", "", name)
                how = row["how"] or ("PEFT, all linear layers" if outcome == "steered" else "")
                names = groups.setdefault(reason(row["said"]) or how, [])
                names.append(f"{short} (multimodal)" if short in names else short)
        count = sum(map(len, groups.values()))
        for how, names in sorted(groups.items(), key=lambda group: -len(group[1])):
            lines.append(f"| {title} ({count}) | {how} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines)

def reason(said):
    """What a refusal says, without the names of one model."""
    kinds = {
        "which carries no LoRA": "the gates are in experts without LoRA",
        "form of its own": "the experts are computed in a form of their own",
        "No gated FFN": "no linear layer stands in front of an activation and carries LoRA",
        "no module of its own": "gate and up are one layer, and the activation is no module",
        "This LoRA": "PEFT's LoRA does not go in, or its model does not run"}
    return next((kind for mark, kind in kinds.items() if mark in said), said.split(":")[0])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types, such as qwen3 (default: all)")
    parser.add_argument("--report", action="store_true", help="print the table of the last survey")
    args = parser.parse_args(argv)
    rows = read_json(PACKAGE / "MODELS.json") if args.report else survey(args.families)
    table = report(rows)
    print(table)
    if not args.families:
        write_files(PACKAGE, {"MODELS.json": rows})
        text = (PACKAGE / "MODELS.md").read_text(encoding="utf-8")
        before, _, rest = text.partition(MARK)
        text = f"{before}{MARK}\n{table}\n{END}{rest.partition(END)[2]}"
        write_files(PACKAGE, {"MODELS.md": text})

if __name__ == "__main__":
    sys.exit(main())
