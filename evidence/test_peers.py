"""The neighbours: no-ops at first, then trained, saved, loaded, merged; they agree with PEFT."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

from evidence import peer_files, peers
from evidence.test_left_over import spoiled
from nalora import ACTIVATIONS, NALoRA, NALoRAConfig, merge_lora, save_adapter
from test_nalora import (
    FFN,
    batch,
    equal,
    lora_llama,
    one_thread,  # noqa: F401
    small_llama,
    snapshot,
    take_step,
    trained_lora,
)


def peer_llama(peer, rank=4, alpha=8, targets=("q_proj", *FFN), seed=0, wake=True):
    """A small model with a neighbour in it, its parameters away from zero."""
    model = small_llama(seed)
    peers.inject(model, peer, targets, rank, alpha)
    torch.manual_seed(1)
    for p in (
        [p for name, p in model.named_parameters() if p.requires_grad and "_B" in name]
        if wake
        else []
    ):
        p.data += 0.02 * torch.randn_like(p)
    return model


def optimizer_of(model, peer, lr=1e-2):
    return torch.optim.AdamW(
        peers.lora_plus_groups(model, lr) if peer == "lora+" else peers.learnt(model).values(),
        lr=lr,
        weight_decay=0.1,
    )


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_starts_as_a_no_op_trains_and_leaves_the_base_alone(peer):
    base, tokens = small_llama(), batch(9)[0]
    model = peer_llama(peer, wake=False)
    difference = (model(tokens)[0] - base(tokens)[0]).abs().max().item()
    assert difference < 1e-4 and (difference == 0 or peer == "pissa")
    assert set(peers.learnt(model)) == set(snapshot(model))
    losses = [take_step(model, optimizer_of(model, peer), 0) for _ in range(2)]
    assert losses[1] < losses[0]
    peers.unload(model)
    assert equal(
        dict(model.named_parameters()), dict(base.named_parameters())
    ) and not peers.carries(model)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_neighbour_is_saved_loaded_and_merged(peer, tmp_path):
    model, tokens = peer_llama(peer), batch(9)[0]
    opt = optimizer_of(model, peer)
    for i in range(3):
        take_step(model, opt, i)
    save_adapter(trained_lora(), tmp_path)  # an older adapter of another kind in the same folder
    parts, random_state = [id(m) for m in model.modules()], torch.get_rng_state()
    model.requires_grad_(False)  # frozen or not, it is saved
    peer_files.save_adapter(model, tmp_path, base_model="base", settings={"a": 1})
    assert [id(m) for m in model.modules()] == parts and torch.equal(
        torch.get_rng_state(), random_state
    )
    fresh = small_llama()
    peer_files.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(tokens)[0], model(tokens)[0], atol=1e-5, rtol=1e-4)
    before = fresh(tokens)[0]
    if "nora" in peer:
        with pytest.raises(ValueError, match="cannot be merged"):
            peers.merge(fresh)
    else:
        peers.merge(fresh)
        assert not any(hasattr(m, "lora_A") for m in fresh.modules())
        with pytest.raises(ValueError):
            peers.merge(fresh)
    torch.testing.assert_close(fresh(tokens)[0], before, atol=1e-5, rtol=1e-4)
    for other in (small_llama(seed=5), small_llama(num_hidden_layers=1)):
        with pytest.raises(ValueError, match="another base|does not fit"):
            peer_files.load_adapter(other, tmp_path)
        assert not peers.carries(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="carries a neighbour"):
        peer_files.load_adapter(peer_llama("dora"), tmp_path)
    peer_files.save_adapter(
        peer_llama("dora", targets=["q_proj"]), tmp_path
    )  # the folder then holds this one and nothing else
    fresh = small_llama()
    assert peer_files.load_adapter(fresh, tmp_path) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]


def test_merge_lora_does_not_mistake_a_neighbour_for_lora():
    for peer in ("loran", "dora"):
        with pytest.raises(ValueError, match="no LoRA"):
            merge_lora(peer_llama(peer))


@pytest.mark.parametrize(
    "name, largest",
    [("silu", 1.15e-3), ("gelu", 3.82e-3), ("gelu_pytorch_tanh", 3.84e-3), ("quick_gelu", 6.53e-3)],
)
def test_the_rational_fit(name, largest):
    a, b, error = peers.fit_rational(ACTIVATIONS[name])
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    found = (peers.rational(z, a[:, None], b[:, None]) - ACTIVATIONS[name](z)).abs().max().item()
    assert error == pytest.approx(largest, rel=0.02) and found == pytest.approx(largest, rel=0.02)


def test_the_rational_activation_is_its_formula():
    torch.manual_seed(0)
    act = peers.RationalActivation(F.silu, 10, groups=3)
    for p in act.parameters():
        nn.init.normal_(p, std=0.1)
    z = torch.randn(4, 10)
    a = act.numerator + 2 * act.nora_B_numerator @ act.nora_A_numerator  # alpha / rank = 2
    b = act.denominator + 2 * act.nora_B_denominator @ act.nora_A_denominator
    r = lambda v, a, b: (
        sum(a[i] * v**i for i in range(6)) / (1 + abs(sum(b[j] * v ** (j + 1) for j in range(4))))
    )
    for c in range(10):
        g = c * 3 // 10
        torch.testing.assert_close(
            act(z)[:, c],
            F.silu(z[:, c]) + r(z[:, c], a[g], b[g]) - r(z[:, c], act.numerator, act.denominator),
            atol=1e-5,
            rtol=1e-4,
        )
    assert act(torch.tensor([-1e30, -1e4, 0, 1e4, 1e30] * 2)[None]).isfinite().all()
    assert sum(p.numel() for p in act.parameters()) == 3 * (6 + 4) + 2 * 3 * 3
    with pytest.raises(ValueError, match="cannot be cut"):
        peers.RationalActivation(F.silu, 4, groups=8)


def test_loran_is_its_formula_and_without_amplitude_lora_bit_for_bit():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    x = torch.randn(5, 32)
    expected = lora(x)
    assert torch.equal(peers.LoRANLinear(lora, amplitude=0)(x), expected)
    w = lora.lora_B @ lora.lora_A
    bent = F.linear(x, lora.base_layer.weight + lora.scaling * (w + 5e-5 * w * torch.sin(1e4 * w)))
    torch.testing.assert_close(peers.LoRANLinear(lora)(x), bent, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("peer", ["rslora", "lora+", "dora", "pissa", "loran"])
def test_nalora_works_on_top_of_a_neighbour(peer):
    model = peer_llama(peer)
    opt = optimizer_of(model, peer)
    tool = NALoRA(model, opt, NALoRAConfig(keep=0.25, stride=1))
    for i in range(3):
        before = {name: p for name, p in snapshot(model).items() if "gate_proj.lora_B" in name}
        take_step(model, opt, i)
        for (name, p), s in zip(before.items(), tool.statistics().values()):
            same = (snapshot(model)[name] == p).all(1)
            assert same[~s["mask"]].all() and not same[s["mask"]].any() and s["mask"].sum() == 12


def spoiled_weight(value):
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    return model


def test_neighbours_refuse_with_nothing_changed():
    narrow, tied = (
        lambda: small_llama(intermediate_size=6),
        lambda: small_llama(tie_word_embeddings=True),
    )
    for make, change, message in (
        (small_llama, lambda m: peers.inject(m, "nothing", FFN), "no neighbour 'nothing'"),
        (small_llama, lambda m: peers.inject(m, "dora", ["x"]), "matches no linear"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), lambda m: peers.inject(m, "nora"), "has none"),
        (lambda: peer_llama("dora"), lambda m: peers.inject(m, "nora"), "already"),
        (lora_llama, lambda m: peers.inject(m, "nora"), "already"),
        (small_llama, lambda m: peers.inject(m, "loran", FFN, 99, 8), "rank is 99"),
        (small_llama, lambda m: peers.inject(m, "rslora", FFN, -1, 8), "rank is -1"),
        (small_llama, lambda m: peers.inject(m, "pissa", FFN, 4, math.nan), "alpha nan"),
        (small_llama, lambda m: peers.inject(m, "pissa", FFN, 20, 8), "saved as LoRA of rank 40"),
        (
            lambda: spoiled_weight(math.nan),
            lambda m: peers.inject(m, "pissa", FFN, 4, 8),
            "not finite",
        ),
        (tied, lambda m: peers.inject(m, "pissa", ["lm_head"], 4, 8), "tied"),
        (narrow, lambda m: peers.inject(m, "nora++", FFN, 4, 8), "cannot be cut into 8 groups"),
        (small_llama, lambda m: peer_files.save_adapter(m, Path("nowhere")), "no LoRA"),
        (
            lambda: peer_llama("nora++"),
            lambda m: NALoRA(m, torch.optim.AdamW(m.parameters())),
            "does not go with NoRA",
        ),
    ):
        model = make()
        before, parts, trains = (
            {k: v.clone() for k, v in model.state_dict().items()},
            [id(m) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
        )
        with pytest.raises(ValueError, match=message) as error:
            change(model)
        assert "\n" not in str(error.value)
        assert [id(m) for m in model.modules()] == parts and [
            p.requires_grad for p in model.parameters()
        ] == trains, message
        torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0, equal_nan=True)
    assert not Path("nowhere").exists()


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
    assert math.isfinite(take_step(model, optimizer_of(model, "dora"), 0)) and all(
        p.isfinite().all() for p in model.parameters()
    )


def test_loran_bends_the_same_under_autocast():
    lora = lora_llama().model.layers[0].mlp.gate_proj
    nn.init.normal_(lora.lora_B)
    layer = peers.LoRANLinear(lora, amplitude=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        bent = layer.bend()
    assert torch.equal(bent, layer.bend())


@pytest.mark.parametrize(
    "peer, file",
    [
        ("nora++", "peers.json"),
        ("nora++", "peers.safetensors"),
        ("loran", "peers.json"),
        ("dora", "adapter_config.json"),
        ("dora", "adapter_model.safetensors"),
    ],
)
def test_a_spoiled_neighbour_is_refused_with_nothing_changed(peer, file, tmp_path):
    peer_files.save_adapter(peer_llama(peer), tmp_path)
    whole, model, refused = (tmp_path / file).read_bytes(), small_llama(), 0
    names = [name for name, _ in model.named_modules()]
    described = json.loads(whole) if file == "peers.json" else {}
    more = (
        [
            ("named", json.dumps({**described, **change}).encode())
            for change in (
                {"targets": [["q"]]},
                {"targets": [{}]},
                {"rank": True},
                {"alpha": 10**400},
                {"alpha": -1},
                {"rank": None},
                {"base": []},
                {"peer": "rslora"},
                {"peer": ["nora"]},
            )
        ]
        if described
        else []
    )
    for kind, content in [*spoiled(whole, tmp_path / "executed"), *more]:
        (tmp_path / file).write_bytes(content)
        try:
            peer_files.load_adapter(model, tmp_path)
            peers.unload(model, list(model.parameters()))
            assert kind not in ("cut", "named")
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
        assert (
            [name for name, _ in model.named_modules()] == names
            and model.model.layers[0].mlp.act_fn is F.silu
            and all(p.requires_grad for p in model.parameters())
        )
    assert refused > 20


if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):

    @pytest.mark.parametrize(
        "peer, flags",
        [
            ("dora", {"use_dora": True}),
            ("rslora", {"use_rslora": True}),
            ("lora+", {}),
            ("pissa", {"init_lora_weights": "pissa"}),
        ],
    )
    def test_interop_twenty_steps_of_a_neighbour_agree_with_peft(tmp_path, peer, flags):
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.optimizers import create_loraplus_optimizer
        from transformers import AutoModelForCausalLM

        small_llama().save_pretrained(tmp_path)
        targets = ["q_proj", *FFN]
        ours = peer_llama(peer, targets=targets, wake=False)
        hf = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        theirs = get_peft_model(
            hf(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, **flags)
        )
        name_there = lambda name: (
            "base_model.model."
            + re.sub(
                r"(lora_[AB]|magnitude_vector)(\.default)?$",
                lambda m: f"{m[1]}.default.weight",
                name,
            )
        )
        pairs = {name: theirs.get_parameter(name_there(name)) for name in snapshot(ours)}
        for name, p in pairs.items():
            if (
                peer == "pissa"
            ):  # their own start: the product is ours up to the signs of singular vectors
                continue
            p.data.copy_(ours.get_parameter(name))
        if peer == "pissa":
            for name in [name.removesuffix(".lora_A") for name in pairs if name.endswith("lora_A")]:
                torch.testing.assert_close(
                    ours.get_parameter(f"{name}.lora_B") @ ours.get_parameter(f"{name}.lora_A"),
                    pairs[f"{name}.lora_B"] @ pairs[f"{name}.lora_A"],
                    atol=1e-4,
                    rtol=1e-3,
                )
                ours.get_parameter(f"{name}.lora_A").data.copy_(pairs[f"{name}.lora_A"])
                ours.get_parameter(f"{name}.lora_B").data.copy_(pairs[f"{name}.lora_B"])
        opt = torch.optim.AdamW(
            peers.lora_plus_groups(ours, 1e-3) if peer == "lora+" else peers.learnt(ours).values(),
            lr=1e-3,
        )
        their_opt = torch.optim.AdamW(pairs.values(), lr=1e-3)
        if peer == "lora+":
            their_opt = create_loraplus_optimizer(
                theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
            )
        for i in range(20):
            take_step(ours, opt, i)
            tokens, targets = batch(i)
            F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
            their_opt.step(), their_opt.zero_grad()
        for name, p in pairs.items():
            torch.testing.assert_close(ours.get_parameter(name), p, atol=2e-5, rtol=1e-3)
        peer_files.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path))
        loaded, tokens = PeftModel.from_pretrained(hf(), tmp_path / "adapter"), batch(9)[0]
        torch.testing.assert_close(loaded(tokens).logits, ours(tokens)[0], atol=1e-4, rtol=1e-3)
