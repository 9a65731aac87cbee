"""This package beside nalora.py: both choose the same masks at every step and end alike. And
nalora.py alone on models of transformers with PEFT."""
import re
from pathlib import Path

import pytest
import torch

import nalora
import nalora_hf
from nalora_hf.tests.helpers import (FFN, TINY, batch, checkpointed, equal, lora_llama, small_llama,
                                     state_of)

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (nalora, nalora_hf)
CASES = {"plain": {}, "a quarter": {"keep": 0.25}, "all rows": {"keep": 1.0},
         "masked": {"masked": True}, "three microbatches": {"microbatches": 3},
         "no scale": {"scale": "none"}, "no mask": {"mask": "none"},
         "reentrant": {"reentrant": True}, "not reentrant": {"reentrant": False},
         "every token": {"stride": 1},
         "all of it": {"keep": 0.25, "masked": True, "microbatches": 3, "reentrant": False},
         "all of it, reentrant": {"keep": 0.25, "masked": True, "microbatches": 3,
                                  "reentrant": True}}

class Run:
    """A Llama that one of the two packages steers."""
    def __init__(self, package, microbatches=1, masked=False, reentrant=None, **settings):
        self.model = lora_llama()
        if reentrant is not None:
            checkpointed(self.model, reentrant)
        parameters = nalora.lora_parameters(self.model)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        config = nalora.NALoRAConfig(**{"stride": 3, **settings})
        self.nalora = package.NALoRA(self.model, self.optimizer, config)
        self.microbatches = microbatches
        self.masked = masked
        self.masks = []  # (FFNs, F) after each step
        self.said = []  # (FFNs, 3) k_hat, occupancy, scale

    def train(self, steps):
        for step in steps:
            for i in range(10 * step, 10 * step + self.microbatches):
                if self.masked:
                    generator = torch.Generator().manual_seed(i)
                    self.nalora.token_mask = torch.rand(4, 15, generator=generator) < 0.8
                self.model(*batch(i))[1].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            states = self.nalora.statistics().values()
            self.masks.append(torch.stack([s["mask"] for s in states]))
            self.said.append([s[key] for s in states for key in ("k_hat", "occupancy", "scale")])
        return self

def assert_alike(a, b):
    """Two runs chose the same masks at every step and end alike."""
    assert torch.equal(torch.stack(a.masks), torch.stack(b.masks))
    torch.testing.assert_close(torch.tensor(a.said), torch.tensor(b.said), atol=1e-6, rtol=1e-5)
    for p, q in zip(nalora.lora_parameters(a.model), nalora.lora_parameters(b.model), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    for key, t in state_of(a.nalora).items():
        torch.testing.assert_close(t, state_of(b.nalora)[key], atol=1e-6, rtol=1e-5)
    assert a.nalora.steps == b.nalora.steps
    assert a.nalora.state_dict()["config"] == b.nalora.state_dict()["config"]

@pytest.mark.parametrize("case", CASES)
def test_both_choose_the_same_masks_and_end_alike(case):
    ours, theirs = (Run(package, **CASES[case]).train(range(8)) for package in PACKAGES)
    assert_alike(ours, theirs)
    keep = 1.0 if case == "no mask" else CASES[case].get("keep", 0.5)
    assert torch.stack(ours.masks).float().mean() == keep
    changed = torch.stack(ours.masks).float().diff(dim=0).abs().sum()
    assert (changed > 0) == (keep < 1)
    assert (torch.tensor(ours.said)[:, 2::3] == 1).all() == (case == "no scale")

@pytest.mark.parametrize("first, second", [PACKAGES, PACKAGES[::-1]],
                         ids=["to the package", "to the reference"])
def test_each_goes_on_from_the_others_state(first, second):
    whole = Run(second, keep=0.25).train(range(8))
    begun = Run(first, keep=0.25).train(range(4))
    rest = Run(second, keep=0.25)
    rest.model.load_state_dict(begun.model.state_dict())
    rest.optimizer.load_state_dict(begun.optimizer.state_dict())
    rest.nalora.load_state_dict(begun.nalora.state_dict())
    assert equal(state_of(rest.nalora), state_of(begun.nalora)) and rest.nalora.steps == 4
    rest.masks += begun.masks
    rest.said += begun.said
    assert_alike(rest.train(range(4, 8)), whole)

def test_readmes_own_loop_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    names = {}
    exec(snippet.replace("runs/snippet", str(tmp_path / "snippet")), names)
    assert [ffn.state.mask.sum() for ffn in names["nalora"].ffns] == [192] * 4
    assert capsys.readouterr().out.count("model.layers.") == 4
    assert (tmp_path / "snippet" / "adapter_model.safetensors").exists()

# What follows needs the extras.

@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma3", "SmolLM3"])
def test_interop_the_reference_steers_peft_under_both_kinds_of_checkpointing(name):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    kind = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    found = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        config = kind(**TINY)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steered = nalora.NALoRA(model, optimizer, nalora.NALoRAConfig(stride=3))
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        B = steered.ffns[0].B_gate
        for step in range(4):
            for tokens in torch.randint(1, 60, (2, 2, 12),  # two microbatches
                                        generator=torch.Generator().manual_seed(step)):
                model(input_ids=tokens, labels=tokens).loss.backward()
            before = B.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            moved = (B != before).any(dim=1)
            assert torch.equal(moved, steered.ffns[0].state.mask)
        assert steered.steps == 4 and len(steered.ffns) == config.num_hidden_layers
        found.append(torch.stack([ffn.state.mask for ffn in steered.ffns]))
    assert all(torch.equal(found[0], other) for other in found[1:])

def test_interop_peft_reads_the_references_adapter_and_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = small_llama().eval()
    model.save_pretrained(tmp_path / "base")
    nalora.inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
    for p in nalora.lora_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    tokens, _ = batch(1)
    wanted = model(tokens)[0]
    nalora.save_adapter(model, tmp_path / "adapter", base_model=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base",
                                                               dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = nalora.Llama.from_pretrained(tmp_path / "base").eval()
    nalora.load_adapter(again, tmp_path / "again")
    torch.testing.assert_close(again(tokens)[0], wanted, atol=0, rtol=0)

@pytest.mark.parametrize("tied", [True, False])
def test_interop_transformers_reads_what_the_reference_saves(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    ours = nalora.Llama(small_llama(tie_word_embeddings=tied, rope_theta=5e5).config).bfloat16()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaForCausalLM and theirs.dtype == torch.bfloat16
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    tokens, _ = batch(1)
    torch.testing.assert_close(theirs.float()(tokens).logits, ours.float()(tokens)[0],
                               atol=1e-5, rtol=1e-5)

def test_interop_the_committed_base_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "data" / "base",
                                                               dtype=torch.float32).eval()
    tokens = torch.randint(640, (3, 50), generator=torch.Generator().manual_seed(0))
    ours = nalora.Llama.from_pretrained(ROOT / "data" / "base").eval()
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize("number", [1, 2])
def test_interop_readmes_lines_for_peft_and_trainer_run(tmp_path, number):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    made = []

    def make_callback():
        made.append(nalora_hf.NALoRACallback())
        return made[0]

    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[number]
    assert snippet.count("\n") == 3
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(60, (8, 12))]
    names = {"torch": torch, "data": rows, "NALoRA": nalora.NALoRA,
             "NALoRACallback": make_callback, "Trainer": transformers.Trainer,
             "get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    names["model"] = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    names["arguments"] = transformers.TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True,
                                                        save_strategy="no", report_to=[])
    exec(snippet, names)
    if number == 1:
        names["model"](**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                       ).loss.backward()
        names["optimizer"].step()
        states = [ffn.state._asdict() for ffn in names["nalora"].ffns]
    else:
        states = list(made[0].nalora.statistics().values())
    assert len(states) == TINY["num_hidden_layers"]
    assert all(state["mask"].float().mean() == 0.5 for state in states)
