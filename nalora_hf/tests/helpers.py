"""What the tests of this package share: small models, steps, states, broken files."""
import functools
import io
import os
import pickle
import random
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora_hf import Llama, LlamaConfig, NALoRA, inject_lora, lora_parameters
from nalora_hf.lora import lora_pairs

FFN = ["gate_proj", "up_proj", "down_proj"]
SMALL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)

# ---- our Llama -----------------------------------------------------------------------------------
def small_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return Llama(replace(SMALL, initializer_range=0.2, **changes))

def with_activation(model, act):
    """The model with that function in the place of each act_fn module."""
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = act
    return model

def batch(seed, shape=(4, 15), vocab=61):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]

def lora_llama(targets=FFN, seed=0, **changes):
    model = small_llama(seed, **changes)
    inject_lora(model, targets, rank=4, alpha=8)
    return model

def start(config=None, model=None, optimizer=torch.optim.AdamW, **settings):
    """(model, optimizer, NALoRA or None), lora_B away from zero so that every gradient is alive."""
    model = model or lora_llama()
    torch.manual_seed(1)
    for p in lora_parameters(model)[1::2]:
        nn.init.normal_(p, std=0.02)
    opt = optimizer(lora_parameters(model), **{"lr": 1e-2, **settings})
    return model, opt, None if config is None else NALoRA(model, opt, config)

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

def trained_lora(targets=FFN, **changes):
    model, opt, _ = start(None, lora_llama(targets, **changes))
    take_step(model, opt, 0)
    return model

def sgd(model):
    return torch.optim.SGD(lora_parameters(model), lr=0.1)

# ---- FFNs of other kinds -------------------------------------------------------------------------
class OtherFFN(nn.Module):
    """A gated FFN as other models write it. layout: how gate and up share one layer, or "apart"."""
    def __init__(self, layout="apart", change=None, act=None):
        super().__init__()
        wide = 12 if layout == "apart" else 24
        setattr(self, "gate_proj" if layout == "apart" else "gate_up_proj",
                nn.Linear(8, wide, bias=False))
        if layout == "apart":
            self.up_proj = nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn = nn.SiLU() if act is None else act
        self.layout = layout
        self.change = change or (lambda z: z)

    def parts(self):
        """Rows of the fused layer that make the gate, and those that make the features."""
        rows = torch.arange(24)
        return {"gate first": (rows[:12], rows[12:]), "gate last": (rows[12:], rows[:12]),
                "in turns": (rows[::2], rows[1::2])}[self.layout]

    def forward(self, x):
        if self.layout == "apart":
            z, u = self.gate_proj(x), self.up_proj(x)
        elif self.layout == "in turns":
            both = self.gate_up_proj(x)
            z, u = both[..., ::2], both[..., 1::2]
        else:
            z, u = self.gate_up_proj(x).chunk(2, dim=-1)
            if self.layout == "gate last":
                z, u = u, z
        return x + self.down_proj(self.act_fn(self.change(z)) * u)

def other_model(layout="apart", count=2, **settings):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(OtherFFN(layout, **settings) for _ in range(count))
    model.forward = lambda x: [x := layer(x) for layer in model.layers][-1]
    targets = (["gate_proj", "up_proj", "down_proj"] if layout == "apart"
               else ["gate_up_proj", "down_proj"])
    inject_lora(model, targets, rank=4, alpha=8)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.3)
    return model.train()

def skip_activations(model):
    """As a fused kernel does."""
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

def other_step(model, seed, *optimizers):
    torch.manual_seed(seed)
    model.forward(torch.randn(2, 5, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()

def in_blocks(layers):
    """FFNs as most models hold them: each in a block."""
    blocks = nn.ModuleList(nn.Module() for _ in layers)
    for block, layer in zip(blocks, layers):
        block.mlp = layer
    return blocks

# ---- what NALoRA knows ---------------------------------------------------------------------------
def state_of(tool):
    return {f"{n}/{k}": t for n, s in tool.state_dict()["ffns"].items() for k, t in s.items()}

def checkpointed(model, reentrant):
    """The model with every block under gradient checkpointing."""
    for block in model.model.layers:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                          use_reentrant=reentrant)
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda module, inputs, x: x.requires_grad_())
    return model

def ends_alike(make, exactly=True):
    """make(False) and make(True) give (model, optimizer, NALoRA) that know the same."""
    a, b = (state_of(make(case)[2]) for case in (False, True))
    if exactly:
        assert equal(a, b)
    for key in a:
        torch.testing.assert_close(a[key], b[key])

# ---- models of transformers ----------------------------------------------------------------------
TINY = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=64)

FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
            "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8}, "SmolLM3": {}}

def family(name, seed=0):
    import transformers
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**TINY, **FAMILIES[name]))

def wake(pairs):
    """B away from zero, alike for every model, so that every gradient is alive."""
    torch.manual_seed(3)
    with torch.no_grad():
        for A, B in pairs:
            A.copy_(torch.randn(A.shape) * 0.1), B.copy_(torch.randn(B.shape) * 0.02)
    return [p for pair in pairs for p in pair]

def pairs_of(model):
    return [pair for m in model.modules() for pair in lora_pairs(m)]

def hf_step(model, opt, seed):
    tokens, targets = batch(seed)
    loss = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())
    loss.backward(), opt.step(), opt.zero_grad()
    return loss.item()

def random_model(family, **changes):
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY, **changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)

def peft_llama():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(family("Llama"), LoraConfig(r=4, lora_alpha=8, target_modules=FFN))

# ---- broken files --------------------------------------------------------------------------------
class Payload:
    """Unpickled, it leaves a trace."""
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)

def spoiled(whole, trace):
    """(what was done, content): a file cut, with flipped bits, or replaced, such as by a pickle."""
    rng = random.Random(0)
    archive = io.BytesIO()
    torch.save(Payload(trace), archive)
    for content in (pickle.dumps(Payload(trace)), archive.getvalue()):
        yield "pickle", content
    for part in range(16):
        yield "cut", whole[: len(whole) * part // 16]
    for i in ([rng.randrange(min(len(whole), 2000)) for _ in range(24)]
              + [rng.randrange(len(whole)) for _ in range(8)]):
        yield "flipped", whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:]
    for content in (rng.randbytes(500), b"\x00" * 64, b"[1, 2]", b"null", b"7", b'"a"',
                    b"[" * 100_000, b"{}", (2**60).to_bytes(8, "little") + b"{}", b'{"a": NaN}',
                    "\ufeff{}".encode("utf-16"), (2).to_bytes(8, "little") + b"{}"):
        yield "foreign", content
