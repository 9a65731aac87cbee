"""What the tests of this folder share: a small Llama, a base model, steps."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # pytest may be started anywhere

from data import problems, runs
from nalora import Llama, LlamaConfig, inject_lora, lora_parameters

README = (HERE / "README.md").read_text(encoding="utf-8")
FFN = ["gate_proj", "up_proj", "down_proj"]
SMALL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base model that trains in no time."""
    path = tmp_path_factory.mktemp("base")
    runs.save_model(small_llama(vocab_size=problems.load_tokenizer().n_vocab,
                                max_position_embeddings=256, initializer_range=0.1), path)
    return path

def small_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return Llama(replace(SMALL, **{"initializer_range": 0.2, **changes}))

def lora_llama(targets=FFN, seed=0, **changes):
    model = small_llama(seed, **changes)
    inject_lora(model, targets, rank=4, alpha=8)
    return model

def start(model=None, optimizer=torch.optim.AdamW):
    """(model, optimizer), lora_B away from zero so that every gradient is alive."""
    model = model or lora_llama()
    torch.manual_seed(1)
    for p in lora_parameters(model)[1::2]:
        nn.init.normal_(p, std=0.02)
    return model, optimizer(lora_parameters(model), lr=1e-2)

def batch(seed, shape=(4, 15), vocab=61):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]

def take_step(model, opt, seed):
    loss = model(*batch(seed))[1]
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()

def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
