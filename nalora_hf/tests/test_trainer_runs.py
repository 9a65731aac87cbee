"""Trainer in its usual modes: each pass of a step counts once, and its real tokens alone, whatever
stands around the model. The learning rate is 0, so that NALoRA's state can be computed apart."""
import pytest
import torch

from nalora import NALoRAConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from transformers import TrainingArguments

from nalora_hf import NALoRA, NALoRACallback
from nalora_hf.tests.helpers import peft_llama
from nalora_hf.tests.trainers import Seen, importance_of, trainer_of

OLD = "gradient_checkpointing" in TrainingArguments.__init__.__code__.co_varnames
CHECKPOINTING = "gradient_checkpointing" if OLD else "activation_checkpointing"
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
MODES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "evaluated in between": EVALUATED,
    "reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    "not reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "compiled": COMPILED,
    "compiled, evaluated": COMPILED | EVALUATED,
    "not fused, clipped": {"optim": "adamw_torch", "max_grad_norm": 0.01},
    "lengths together": {"train_sampling_strategy": "group_by_length"},
}
for kind in ("reentrant", "not reentrant", "compiled"):
    MODES[f"{kind}, accumulated"] = MODES[kind] | MODES["accumulated"]
MODES["compiled, not reentrant"] = MODES["not reentrant"] | COMPILED

@pytest.fixture
def tokens(monkeypatch):
    """[how many tokens of each FFN a step has observed]"""
    found = []
    decide = NALoRA.decide

    def noting(self, group):
        found.append(group.sums.tokens.tolist())
        decide(self, group)

    monkeypatch.setattr(NALoRA, "decide", noting)
    return found

@pytest.mark.parametrize("mode", MODES)
def test_each_step_counts_the_real_tokens_of_its_own_batches(tmp_path, mode, tokens, recwarn):
    model = peft_llama()
    if "reentrant" in mode:
        model.enable_input_require_grads()
    callback = NALoRACallback(NALoRAConfig(stride=1))
    trainer = trainer_of(tmp_path, callback, model=model, learning_rate=0.0, **MODES[mode])
    trainer.train()
    every = trainer.args.gradient_accumulation_steps
    steps = [trainer.batches[i:i + every] for i in range(0, len(trainer.batches), every)]
    assert len(steps) == callback.nalora.steps == 4
    real = [sum(batch["attention_mask"].sum().item() for batch in step) for step in steps]
    assert tokens == [[count] * 2 for count in real] and len(set(real)) > 1
    wanted = importance_of(peft_llama(), steps)
    assert len(wanted) == 2
    for name, state in callback.nalora.statistics().items():
        torch.testing.assert_close(state["importance"], wanted[name], atol=1e-6, rtol=1e-4)
    assert not [w for w in recwarn if "NALoRA" in str(w.message)]

def test_the_oracle_sees_a_mask_of_the_batch_before(tmp_path):
    """What the test above would find if masks came a pass too late."""
    callback = NALoRACallback(NALoRAConfig(stride=1))
    trainer = trainer_of(tmp_path, callback, learning_rate=0.0)
    trainer.train()
    late = [batch | {"attention_mask": before["attention_mask"]}
            for before, batch in zip(trainer.batches[-1:] + trainer.batches, trainer.batches)]
    wanted = importance_of(peft_llama(), [[batch] for batch in late])
    for name, state in callback.nalora.statistics().items():
        assert (state["importance"] - wanted[name]).abs().max() > 1e-3

class Sometimes(Seen):
    """A Trainer whose every second batch has no mask."""
    def training_step(self, model, inputs, *args, **kwargs):
        if len(getattr(self, "batches", [])) % 2:
            inputs = {key: t for key, t in inputs.items() if key != "attention_mask"}
        return super().training_step(model, inputs, *args, **kwargs)

@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_without_a_mask_counts_all_tokens_after_one_with_a_mask(tmp_path, tokens, compiled):
    callback = NALoRACallback(NALoRAConfig(stride=1))
    trainer = trainer_of(tmp_path, callback, kind=Sometimes, **(COMPILED if compiled else {}))
    trainer.train()
    assert tokens[1] == tokens[3] == [24] * 2 and max(tokens[0] + tokens[2]) < 24
