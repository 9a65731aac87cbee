"""The neighbours: no-ops at first, then trained, saved, loaded, merged; they agree with PEFT."""
import importlib.util
import json
import math
import random
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import runs
from evidence import peer_files, peers
from evidence.conftest import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                               take_step)
from nalora import NALoRA, NALoRAConfig, merge_lora, save_adapter

close = torch.testing.assert_close

def peer_llama(peer, rank=4, alpha=8, targets=("q_proj", *FFN), seed=0, wake=True):
    """A small model with a neighbour in it, its parameters away from zero."""
    model = small_llama(seed)
    peers.inject(model, peer, targets, rank, alpha)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if wake and p.requires_grad and "_B" in name:
            p.data += 0.02 * torch.randn_like(p)
    return model

def optimizer_of(model, peer, lr=1e-2, **settings):
    parameters = peers.learnt(model).values()
    if peer == "lora+":
        parameters = peers.lora_plus_groups(model, lr)
    return torch.optim.AdamW(parameters, lr=lr, **settings)

@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_starts_as_a_no_op_trains_and_leaves_the_base_alone(peer):
    base = small_llama()
    tokens = batch(9)[0]
    model = peer_llama(peer, wake=False)
    difference = (model(tokens)[0] - base(tokens)[0]).abs().max().item()
    assert difference < 1e-4 and (difference == 0 or peer == "pissa")
    assert set(peers.learnt(model)) == set(snapshot(model))
    opt = optimizer_of(model, peer, weight_decay=0.1)
    first = take_step(model, opt, 0)
    assert take_step(model, opt, 0) < first
    peers.unload(model)
    assert equal(dict(model.named_parameters()), dict(base.named_parameters()))
    assert not peers.carries(model)

def trained_peer(peer, steps=3):
    model = peer_llama(peer)
    opt = optimizer_of(model, peer)
    for i in range(steps):
        take_step(model, opt, i)
    return model

@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_is_saved_loaded_and_merged(peer, tmp_path):
    model = trained_peer(peer)
    tokens = batch(9)[0]
    parts = list(model.modules())
    random_state = torch.get_rng_state()
    model.requires_grad_(False)             # frozen or not, it is saved
    peer_files.save_adapter(model, tmp_path, base_model="base")
    assert list(model.modules()) == parts and torch.equal(torch.get_rng_state(), random_state)
    fresh = small_llama()
    peer_files.load_adapter(fresh, tmp_path)
    before = fresh(tokens)[0]
    close(before, model(tokens)[0], atol=1e-5, rtol=1e-4)
    if "nora" in peer:
        with pytest.raises(ValueError, match="cannot be merged"):
            peers.merge(fresh)
    else:
        peers.merge(fresh)
        assert not any(hasattr(m, "lora_A") for m in fresh.modules())
        with pytest.raises(ValueError):
            peers.merge(fresh)
    close(fresh(tokens)[0], before, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_folder_holds_one_adapter(peer, tmp_path):
    model, opt = start()
    take_step(model, opt, 0)
    save_adapter(model, tmp_path)           # plain LoRA
    peer_files.save_adapter(trained_peer(peer), tmp_path)
    narrow = small_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="does not fit|matches a linear layer"):
        peer_files.load_adapter(narrow, tmp_path)
    assert not peers.carries(narrow)
    with pytest.raises(ValueError, match="carries a neighbour"):
        peer_files.load_adapter(peer_llama("dora"), tmp_path)
    assert peer_files.load_adapter(small_llama(), tmp_path)
    peer_files.save_adapter(peer_llama("dora", targets=["q_proj"]), tmp_path)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert peer_files.load_adapter(small_llama(), tmp_path) == names

def test_merge_lora_does_not_mistake_a_neighbour_for_lora():
    for peer in ("loran", "dora"):
        with pytest.raises(ValueError, match="no LoRA"):
            merge_lora(peer_llama(peer))

class QuickGELU(nn.Module):
    def forward(self, z):
        return z * torch.sigmoid(1.702 * z)

@pytest.mark.parametrize("act, largest", [
    (nn.SiLU(), 1.15e-3), (nn.GELU(), 3.82e-3), (nn.GELU("tanh"), 3.84e-3),
    (QuickGELU(), 6.53e-3)], ids=str)
def test_the_rational_fit(act, largest):
    a, b, error = peers.fit_rational(act)
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    found = (peers.rational(z, a[:, None], b[:, None]) - act(z)).abs().max().item()
    assert error == pytest.approx(largest, rel=0.02) and found == pytest.approx(largest, rel=0.02)

def r(z, a, b):
    """P(z) / Q(z), term by term."""
    q = sum(b[j] * z**(j + 1) for j in range(4))
    return sum(a[i] * z**i for i in range(6)) / (1 + abs(q))

def test_the_rational_activation_is_its_formula():
    torch.manual_seed(0)
    act = peers.RationalActivation(nn.SiLU(), 10, groups=3)
    for p in act.parameters():
        nn.init.normal_(p, std=0.1)
    z = torch.randn(4, 10)
    a0 = act.numerator
    b0 = act.denominator
    a = a0 + 2 * act.nora_B_numerator @ act.nora_A_numerator        # alpha / rank = 2
    b = b0 + 2 * act.nora_B_denominator @ act.nora_A_denominator
    for c in range(10):
        v = z[:, c]
        g = c * 3 // 10
        close(act(z)[:, c], F.silu(v) + r(v, a[g], b[g]) - r(v, a0, b0), atol=1e-5, rtol=1e-4)
    assert act(torch.tensor([-1e30, -1e4, 0, 1e4, 1e30] * 2)[None]).isfinite().all()
    assert sum(p.numel() for p in act.parameters()) == 3 * (6 + 4) + 2 * 3 * 3
    with pytest.raises(ValueError, match="cannot be cut"):
        peers.RationalActivation(nn.SiLU(), 4, groups=8)
    with pytest.raises(ValueError, match="10 channels, and z has 1"):
        act(z[:, :1])

def test_loran_is_its_formula_and_without_amplitude_lora_bit_for_bit():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    x = torch.randn(5, 32)
    expected = lora(x)
    assert torch.equal(peers.LoRANLinear(lora, amplitude=0)(x), expected)
    w = lora.lora_B @ lora.lora_A
    bent = lora.base_layer.weight + lora.scaling * (w + 5e-5 * w * torch.sin(1e4 * w))
    close(peers.LoRANLinear(lora)(x), F.linear(x, bent), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("peer", ["rslora", "lora+", "dora", "pissa", "loran"])
def test_nalora_works_on_top_of_a_neighbour(peer):
    model = peer_llama(peer)
    opt = optimizer_of(model, peer)
    nalora = NALoRA(model, opt, NALoRAConfig(keep=0.25, stride=1))
    assert len(nalora.ffns) == 2
    for i in range(3):
        before = [ffn.B_gate.detach().clone() for ffn in nalora.ffns]
        take_step(model, opt, i)
        for ffn, B in zip(nalora.ffns, before):
            assert torch.equal((ffn.B_gate != B).any(1), ffn.state.mask)
            assert ffn.state.mask.sum() == 12

# ---- what is refused -----------------------------------------------------------------------------

def spoiled_llama():
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    return model

@pytest.mark.parametrize("model, arguments, message", [
    (small_llama(), ("nothing", FFN), "no neighbour 'nothing'"),
    (small_llama(), ("dora", ["x"]), "matches a linear"),
    (nn.Sequential(nn.Linear(3, 3)), ("nora",), "has none"),
    (peer_llama("dora"), ("nora",), "already"), (lora_llama(), ("nora",), "already"),
    (small_llama(), ("loran", FFN, 99, 8), "rank 99"),
    (small_llama(), ("rslora", FFN, -1, 8), "rank is -1"),
    (small_llama(), ("pissa", FFN, 4, math.nan), "alpha nan"),
    (small_llama(), ("pissa", FFN, 20, 8), "saved as LoRA of rank 40"),
    (spoiled_llama(), ("pissa", FFN, 4, 8), "not finite"),
    (small_llama(tie_word_embeddings=True), ("pissa", ["lm_head"], 4, 8), "tied"),
    (small_llama(intermediate_size=6), ("nora++", FFN, 4, 8), "cannot be cut into 8 groups")],
    ids=str)
def test_neighbours_refuse_with_nothing_changed(model, arguments, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = list(model.modules())
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        peers.inject(model, *arguments)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == parts
    assert [p.requires_grad for p in model.parameters()] == trains
    close(dict(model.state_dict()), before, atol=0, rtol=0, equal_nan=True)

def test_a_model_without_lora_has_no_adapter(tmp_path):
    with pytest.raises(ValueError):
        peer_files.save_adapter(small_llama(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()

@pytest.mark.parametrize("peer", ["dora", "loran"])
def test_merging_a_neighbour_of_a_tied_or_missing_weight_is_refused(peer):
    model = small_llama(tie_word_embeddings=True)
    peers.inject(model, peer, ["lm_head"], 4, 8)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match="tied"):
        peers.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    with pytest.raises(ValueError, match="not loaded"):
        peers.merge(peer_llama(peer).to("meta"))

def test_dora_survives_a_row_of_zeros():
    model = small_llama()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    peers.inject(model, "dora", FFN, 4, 8)
    assert math.isfinite(take_step(model, optimizer_of(model, "dora"), 0))
    assert all(p.isfinite().all() for p in model.parameters())

def test_loran_bends_the_same_under_autocast():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    layer = peers.LoRANLinear(lora, amplitude=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        bent = layer.bend()
    assert torch.equal(bent, layer.bend())

def spoiled(whole):
    """(what was done, content): a file cut, with flipped bits, or replaced."""
    rng = random.Random(0)
    for part in range(16):
        yield "cut", whole[:len(whole) * part // 16]
    for i in [rng.randrange(min(len(whole), 2000)) for _ in range(32)]:
        yield "flipped", whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:]
    for content in (rng.randbytes(500), b"\0" * 64, b"[1, 2]", b"null", b'"a"', b"{}",
                    (2**60).to_bytes(8, "little") + b"{}"):
        yield "foreign", content
    if whole.startswith(b"{\n"):
        for change in ({"targets": [["q"]]}, {"targets": [{}]}, {"rank": True}, {"rank": None},
                       {"alpha": 10**400}, {"alpha": -1}, {"peer": "rslora"}, {"peer": ["nora"]}):
            yield "named", json.dumps({**json.loads(whole), **change}).encode()

@pytest.mark.parametrize("peer, file", [
    ("nora++", "peers_config.json"), ("nora++", "peers_model.safetensors"),
    ("loran", "peers_config.json"), ("dora", "adapter_config.json"),
    ("dora", "adapter_model.safetensors")])
def test_a_spoiled_neighbour_is_refused_and_not_put_in(peer, file, tmp_path):
    peer_files.save_adapter(peer_llama(peer), tmp_path)
    model = small_llama()
    parts = list(model.modules())
    refused = 0
    for kind, content in spoiled((tmp_path / file).read_bytes()):
        (tmp_path / file).write_bytes(content)
        try:
            peer_files.load_adapter(model, tmp_path)
            peers.unload(model, list(model.parameters()))
            assert kind != "cut" and (kind != "named" or peer == "dora")
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
        assert list(model.modules()) == parts
    assert refused > 20

# ---- PEFT is the oracle of those that it knows ---------------------------------------------------

def name_in_peft(name):
    name = name.removesuffix(".default")
    return f"base_model.model.{name}.default.weight"

@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("peft", "transformers"))),
                    reason="needs peft and transformers")
@pytest.mark.parametrize("peer, flags", [
    ("dora", {"use_dora": True}), ("rslora", {"use_rslora": True}), ("lora+", {}),
    ("pissa", {"init_lora_weights": "pissa"})])
def test_interop_twenty_steps_of_a_neighbour_agree_with_peft(tmp_path, peer, flags):
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    def pretrained():
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    runs.save_model(small_llama(), tmp_path)
    targets = ["q_proj", *FFN]
    ours = peer_llama(peer, targets=targets, wake=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **flags)
    theirs = get_peft_model(pretrained(), config)
    pairs = {name: (p, theirs.get_parameter(name_in_peft(name)))
             for name, p in ours.named_parameters() if p.requires_grad}
    for name, (p, theirs_p) in pairs.items():
        if peer != "pissa":
            theirs_p.data.copy_(p)
        elif name.endswith("lora_A"):       # the products agree, up to signs of singular vectors
            B, theirs_B = pairs[re.sub("A$", "B", name)]
            close(B @ p, theirs_B @ theirs_p, atol=1e-4, rtol=1e-3)
            p.data.copy_(theirs_p)
            B.data.copy_(theirs_B)
    opt = optimizer_of(ours, peer, lr=1e-3)
    their_opt = torch.optim.AdamW([theirs_p for _, theirs_p in pairs.values()], lr=1e-3)
    if peer == "lora+":
        their_opt = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3,
                                              loraplus_lr_ratio=16, loraplus_weight_decay=0.01)
    for i in range(20):
        take_step(ours, opt, i)
        tokens, targets = batch(i)
        F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        their_opt.step()
        their_opt.zero_grad()
    for p, theirs_p in pairs.values():
        close(p, theirs_p, atol=2e-5, rtol=1e-3)
    peer_files.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path))
    loaded = PeftModel.from_pretrained(pretrained(), tmp_path / "adapter")
    tokens = batch(9)[0]
    close(loaded(tokens).logits, ours(tokens)[0], atol=1e-4, rtol=1e-3)
