"""TRL's trainers with the callback alone."""
import numpy as np
import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA
from nalora_hf.tests.helpers import family

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model

from nalora_hf import NALoRACallback

def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", *map(str, range(58))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>")

def texts(count):
    rng = np.random.default_rng(0)
    return [" ".join(map(str, rng.integers(58, size=n))) for n in rng.integers(4, 30, count)]

def sft(kind, arguments, common):
    if kind != "padding":
        arguments[kind] = True
    length = None if kind == "padding_free" else 32
    return trl.SFTTrainer(args=trl.SFTConfig(max_length=length, **arguments),
                          train_dataset=Dataset.from_dict({"text": texts(16)}), **common)

def dpo(arguments, common):
    rows = texts(16)
    pairs = {"prompt": rows[:8], "chosen": rows[8:], "rejected": rows[:8]}
    return trl.DPOTrainer(args=trl.DPOConfig(**arguments), train_dataset=Dataset.from_dict(pairs),
                          **common)

def grpo(arguments, common):
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    arguments |= {"num_generations": 2, "max_completion_length": 6}
    return trl.GRPOTrainer(args=trl.GRPOConfig(**arguments), reward_funcs=reward,
                           train_dataset=Dataset.from_dict({"prompt": texts(8)}), **common)

KINDS = ["padding", "packing", "padding_free", "DPO", "DPO, PEFT", "GRPO"]

@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_interop_trl_with_the_callback_alone(tmp_path, kind, reentrant, recwarn,
                                             monkeypatch):
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 4,
                 "report_to": [], "use_cpu": True, "bf16": False, "learning_rate": 1e-2,
                 "gradient_checkpointing": reentrant is not None,
                 "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)}}
    callback = NALoRACallback(NALoRAConfig(keep=0.25, stride=1))
    common = {"model": family("Llama"), "processing_class": word_tokenizer(),
              "peft_config": LoraConfig(r=4, target_modules="all-linear"), "callbacks": [callback]}
    if "PEFT" in kind:  # then TRL adds a reference adapter, which runs without gradients
        common["model"] = get_peft_model(common["model"], common.pop("peft_config"))
    if kind == "GRPO":  # it generates in train mode, without gradients
        trainer = grpo(arguments, common)
    else:
        trainer = dpo(arguments, common) if "DPO" in kind else sft(kind, arguments, common)
    real = []
    masked = []

    def note_batch(model, args, kwargs):
        if model.training and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            masked.append(mask is not None and bool((mask == 0).any()))
            real.append(kwargs["input_ids"].numel() if mask is None else mask.sum().item())

    trainer.model.register_forward_pre_hook(note_batch, with_kwargs=True)
    tokens = []
    decide = NALoRA.decide

    def noting(self, group):
        tokens.append(group.sums.tokens.tolist())
        decide(self, group)

    monkeypatch.setattr(NALoRA, "decide", noting)
    trainer.train()
    assert len(callback.nalora.ffns) == 2
    for ffn in callback.nalora.ffns:
        assert torch.equal((ffn.B_gate != 0).any(1), ffn.state.mask) and ffn.state.mask.sum() == 12
    assert tokens == [[sum(real)] * 2] and sum(real) > 0
    assert any(masked) == (kind not in ("packing", "padding_free"))
    assert not [w for w in recwarn if "NALoRA" in str(w.message)]
