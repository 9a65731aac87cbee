"""NALoRA on the experts of mixtures agrees with a slow loop in float64 over pairs of a token and an
expert, which knows PEFT's blocks from PEFT alone and shares no code with experts.py."""
import itertools
import math
import os
import pickle
import warnings
import weakref
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from nalora import NALoRAConfig, State
from nalora_hf import NALoRA, NALoRACallback, inputs, strides, survey, tiny
from nalora_hf.tests.helpers import TINY, other_model, other_step

SIZES = TINY | dict(hidden_size=16, intermediate_size=8, moe_intermediate_size=8, head_dim=4,
                    num_experts=5, num_local_experts=5, num_experts_per_tok=2)
FAMILIES = ["Mixtral", "Qwen3Moe", "GptOss"]
OTHERS = ["Qwen3Next", "DeepseekV3", "Glm4Moe", "Olmoe", "MiniMax", "FlexOlmo", "Cohere2Moe",
          "Mellum"]
KERNELS = ["eager", "grouped_mm", "batched_mm"]
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

def mixture(family, kernel="grouped_mm", rank=3):
    """A tiny random mixture in train mode under PEFT, B away from 0. In those of FAMILIES no
    expert's rank is the number of experts, and at times an expert gets no token."""
    torch.manual_seed(0)
    if family in FAMILIES:
        kind = getattr(transformers, f"{family}Config")
        config = kind(**{name: size for name, size in SIZES.items() if name in vars(kind())})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    else:
        model = tiny.build(f"{family}ForCausalLM")
    model.set_experts_implementation(kernel)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    config.target_parameters = TARGETS if family == "GptOss" else None
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return model.train()

def tokens_of(seed, shape=(2, 9)):
    return torch.randint(3, 12, shape, generator=torch.manual_seed(seed))  # few, so few experts

# ---- the oracle ----------------------------------------------------------------------------------
def wrappers_of(model):
    """{name of experts: {parameter: PEFT's layer}}"""
    found = {}
    for name, m in model.named_modules():
        if getattr(m, "parameter_name", "") in ("gate_up_proj", "down_proj"):
            its = name.replace(".base_layer", "")
            found.setdefault(its, {})[m.parameter_name] = m
    return found

def gate_of(family, outputs):
    """(z, phi, phi') of what gate_up gives for one pair, (2F,)."""
    alpha = 1.702 if family == "GptOss" else 1
    z = outputs[::2] if family == "GptOss" else outputs[:len(outputs) // 2]
    rho = 1 / (1 + np.exp(-alpha * z))
    return z, z * rho, rho + alpha * z * rho * (1 - rho)

class Oracle:
    """The experts of one layer: listens to their module's inputs."""
    def __init__(self, family, layers, config):
        self.family = family
        self.config = config
        self.layers = layers
        self.module = layers["gate_up_proj"].get_base_layer()
        self.module.register_forward_pre_hook(self.note)
        E = self.module.num_experts
        F = layers["gate_up_proj"].lora_B["default"].out_features // 2
        self.state = [{"importance": np.zeros(F), "mask": np.ones(F, bool), "scale": 1.0,
                       "k_hat": math.nan, "occupancy": math.nan} for _ in range(E)]
        self.pairs = [[] for _ in range(E)]  # z, phi, phi' of each pair since the last step
        self.mask = None
        self.steps = 0

    def note(self, module, args):
        W = self.layers["gate_up_proj"].get_param().detach().double()  # with LoRA: PEFT computes
        W = (W.transpose(1, 2) if module.is_transposed else W).numpy()
        bias = getattr(module, "gate_up_proj_bias", None)
        x = args[0].detach().double().numpy()
        pairs = [(e, t, j) for t, row in enumerate(args[1].tolist()) for j, e in enumerate(row)]
        if module.config._experts_implementation == "eager":
            pairs.sort(key=lambda pair: (pair[0], pair[2], pair[1]))
        else:  # torch orders pairs of one expert in a way of its own
            pairs = [pairs[i] for i in args[1].flatten().sort()[1].tolist()]
        for e, t, j in pairs[self.steps % self.config.stride::self.config.stride]:
            if args[2][t, j] and (self.mask is None or self.mask.flatten()[t]):
                outputs = W[e] @ x[t]
                if bias is not None:
                    outputs = outputs + bias[e].detach().double().numpy()
                self.pairs[e].append(gate_of(self.family, outputs))

    def decide(self):
        c = self.config
        for state, pairs in zip(self.state, self.pairs):
            if not pairs:
                continue
            F = len(state["mask"])
            S, P, Q, G = np.zeros(F), 0.0, 0.0, 0
            for z, phi, slope in pairs:
                S += abs(slope)
                P += (z * slope * phi).sum()
                Q += (phi * phi).sum()
                G += (z > 0).sum()
            I = state["importance"] = c.ema * state["importance"] + (1 - c.ema) * S / len(pairs)
            order = sorted(range(F), key=lambda f: -I[f])
            state["mask"] = np.isin(range(F), order[:math.ceil(c.keep * F)])
            state["k_hat"] = P / Q
            state["occupancy"] = p = G / (len(pairs) * F)
            state["scale"] = 1 / min(max(P / Q, 0.5), 2) if min(p, 1 - p) >= 0.05 else 1.0
        self.pairs = [[] for _ in self.state]
        self.steps += 1

    def factor(self, part, parameter):
        """What each element of A ("lora_A") or B is multiplied by, by PEFT's own blocks."""
        layer = self.layers[parameter]
        A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
        saved = A.detach().clone(), B.detach().clone()
        with torch.no_grad():  # each element's number, to be found again in PEFT's factors
            A.copy_(torch.arange(A.numel()).view_as(A)), B.copy_(torch.arange(B.numel()).view_as(B))
            blocks = [t.detach().long() for t in layer.get_delta_factors("default")[:2]]
            A.copy_(saved[0]), B.copy_(saved[1])
        if self.module.is_transposed:
            blocks = [t.transpose(1, 2) for t in blocks[::-1]]
        out, into = blocks  # (E, out, r) numbers of B's elements, (E, r, in) of A's
        p = A if part == "lora_A" else B
        factor = torch.full((p.numel(),), math.nan, dtype=torch.float64)
        for e, state in enumerate(self.state):
            numbers = into[e] if part == "lora_A" else out[e]
            factor[numbers.flatten()] = state["scale"]
            if part == "lora_B" and parameter == "gate_up_proj":
                for c, moves in enumerate(state["mask"]):
                    row = 2 * c if self.family == "GptOss" else c
                    factor[numbers[row]] = state["scale"] * moves
        assert not factor.isnan().any()
        return factor.view_as(p)

def same(found, expected, message):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=message)

def follows_the_oracle(family, model, config, steps=6, microbatches=1, masked=False):
    """Trains, and compares all that NALoRA knows and does with the oracles'. Returns it, and how
    often an expert got no token in a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    after = {}  # what the optimizer made, before NALoRA's hook
    optimizer.register_step_post_hook(lambda *_: after.update((p, p.detach().clone())
                                                              for p in trained))
    nalora = NALoRA(model, optimizer, config)
    oracles = {name: Oracle(family, layers, config) for name, layers in wrappers_of(model).items()}
    resting = 0
    for step in range(steps):
        for i in range(microbatches):
            tokens = tokens_of(10 * step + i)
            mask = torch.rand(tokens.shape, generator=torch.manual_seed(step)) < 0.7
            nalora.token_mask = mask if masked else None
            for oracle in oracles.values():
                oracle.mask = nalora.token_mask
            model(input_ids=tokens).logits.square().mean().backward()
        before = {p: p.detach().clone() for p in trained}
        optimizer.step()
        optimizer.zero_grad()
        statistics = nalora.statistics()
        assert statistics.keys() == oracles.keys()
        for name, oracle in oracles.items():
            resting += sum(not pairs for pairs in oracle.pairs)
            oracle.decide()
            for key in oracle.state[0]:
                same(statistics[name][key], np.array([s[key] for s in oracle.state]),
                     f"step {step}: {key} of {name}")
            for parameter, layer in oracle.layers.items():
                for part in ("lora_A", "lora_B"):
                    p = getattr(layer, part)["default"].weight
                    was = before.pop(p)
                    factor = oracle.factor(part, parameter)
                    same(p.detach(), was + factor * (after[p] - was), f"{parameter}.{part}")
                    assert torch.equal(p[factor == 0], was[factor == 0])
                    assert (factor == 0).any() == (parameter == "gate_up_proj" and part == "lora_B")
        for p in before:  # attention, router: plain LoRA
            assert torch.equal(p, after[p])
    return nalora, resting

@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_agree_with_the_oracle(family, kernel):
    nalora, resting = follows_the_oracle(family, mixture(family, kernel), NALoRAConfig(stride=1))
    assert resting and nalora.steps == 6  # experts without a token were among them

def test_lora_on_biases_is_plain_lora():
    model = mixture("GptOss")
    config = peft.LoraConfig(r=2, target_modules="all-linear",
                             target_parameters=TARGETS + ["mlp.experts.gate_up_proj_bias"])
    model = peft.get_peft_model(model.unload(), config).train()
    follows_the_oracle("GptOss", model, NALoRAConfig(stride=1), 2)

def test_a_lone_expert_agrees_with_the_oracle(monkeypatch):
    for name in ("num_experts", "num_local_experts", "num_experts_per_tok"):
        monkeypatch.setitem(SIZES, name, 1)
    for family in ("Qwen3Moe", "Mixtral"):  # PEFT cannot compute gpt-oss's
        follows_the_oracle(family, mixture(family), NALoRAConfig(stride=1), 2)

@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_masks_weights_and_microbatches_agree_with_the_oracle(kernel, monkeypatch):
    monkeypatch.setattr("nalora_hf.steer.SAMPLES", 500)  # bytes: add up within a step
    config = NALoRAConfig(stride=3, keep=0.2, ema=0.5)
    model = mixture("Qwen3Moe", kernel)
    for layers in wrappers_of(model).values():  # expert 2 gets weight 0, as Zaya's tokens that skip
        layers["gate_up_proj"].get_base_layer().register_forward_pre_hook(
            lambda module, args: (*args[:2], args[2] * (args[1] != 2)))
    follows_the_oracle("Qwen3Moe", model, config, 4, 2, masked=True)

@pytest.mark.parametrize("family, kernel", [*zip(OTHERS, itertools.cycle(KERNELS))])
def test_other_families_agree_with_the_oracle(family, kernel):
    follows_the_oracle(family, mixture(family, kernel), NALoRAConfig(stride=1), 2)

# ---- what holds as for dense FFNs ----------------------------------------------------------------
def trained(model, steps=3, config=None, saved=None, first=0, forward=None):
    """(NALoRA, optimizer) after so many steps of two microbatches with token masks."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    nalora = NALoRA(model, optimizer, config or NALoRAConfig(stride=2))
    if saved:
        optimizer.load_state_dict(saved[0])
        nalora.load_state_dict(saved[1])
    for step in range(first, first + steps):
        for i in (0, 1):
            tokens = tokens_of(10 * step + i)
            nalora.token_mask = tokens > 4
            (forward or model)(input_ids=tokens).logits.float().square().mean().backward()
            nalora.token_mask = None if forward else nalora.token_mask
        optimizer.step()
        optimizer.zero_grad()
    return nalora, optimizer

def knows_the_same(nalora, other, **tolerance):
    for name, state in nalora.state_dict()["ffns"].items():
        for key, t in state.items():
            torch.testing.assert_close(t, other.state_dict()["ffns"][name][key], equal_nan=True,
                                       **tolerance or dict(rtol=0, atol=0))

@pytest.mark.parametrize("family, kernel", [("Qwen3Moe", "grouped_mm"), ("GptOss", "eager"),
                                            ("Mixtral", "batched_mm")])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(family, kernel, reentrant):
    plain, _ = trained(mixture(family, kernel))
    model = mixture(family, kernel)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    nalora, _ = trained(model)
    assert nalora.steps == 3
    knows_the_same(nalora, plain)
    assert not any(ffn.received for ffn in nalora.ffns)  # nothing is held

@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_take_the_token_mask_of_their_pass(reentrant):
    def after_two_passes(checkpointed):
        model = mixture("Qwen3Moe")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        nalora = NALoRA(model, optimizer, NALoRAConfig(stride=1))
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for seed in (0, 1):
            tokens = tokens_of(seed)
            nalora.token_mask = tokens > 6
            loss = model(input_ids=tokens).logits.square().mean()
            nalora.token_mask = None
            loss.backward()
        optimizer.step()
        return nalora

    knows_the_same(after_two_passes(True), after_two_passes(False))

def test_reentrant_checkpoints_say_that_they_cannot_tell_passes_apart():
    model = mixture("Qwen3Moe")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nalora = NALoRA(model, optimizer)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    losses = []
    for seed in (0, 1):
        nalora.token_mask = tokens_of(seed) > 6
        losses.append(model(input_ids=tokens_of(seed)).logits.square().mean())
    with pytest.warns(UserWarning, match="which tells them not apart"):
        sum(losses).backward()

def test_mask_model_and_state_may_be_on_several_devices():
    model = mixture("Qwen3Moe")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nalora = NALoRA(model, optimizer)
    for group in nalora.groups:  # as if the model had been there, and was moved since
        group.state = State(*(t.to("meta") for t in group.state))
    model(input_ids=tokens_of(1))
    assert {t.device.type for group in nalora.groups for passes in group.samples
            for sample in passes for t in sample} == {"meta"}
    ffn = nalora.ffns[0]
    ffn.pair, ffn.expert, ffn.scores = (t.to("meta") for t in (ffn.pair, ffn.expert, ffn.scores))
    z, weight, _ = ffn.sample(torch.empty(36, 8, device="meta"), tokens_of(1) > 4, slice(None))
    assert z.shape == (36, 8) and weight.shape == (36,)

def test_what_steps_are_multiplied_by_is_not_held():
    model = mixture("Qwen3Moe")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nalora = NALoRA(model, optimizer)
    factor = nalora.factor
    found = []

    def noted(ffn, p):
        t = factor(ffn, p)
        found.append(weakref.ref(t._base))  # of all layers
        return t

    nalora.factor = noted
    model(input_ids=tokens_of(1)).logits.square().mean().backward()
    optimizer.step()
    assert len(found) == 8 and not any(t() is not None for t in found)

def test_a_resumed_run_ends_with_the_same_bits():
    whole, _ = trained(mixture("Qwen3Moe"), 4)
    model = mixture("Qwen3Moe")
    first, optimizer = trained(model, 2)
    saved = optimizer.state_dict(), first.state_dict()
    again = mixture("Qwen3Moe")
    again.load_state_dict(model.state_dict())
    nalora, _ = trained(again, 2, saved=saved, first=2)
    knows_the_same(nalora, whole)
    with pytest.raises(ValueError, match="is of other FFNs"):
        trained(mixture("Mixtral", rank=2), saved=saved[:1] + ({**saved[1], "ffns": {}},))

def test_experts_without_lora_are_told_of():
    model = survey.with_lora(tiny.build("Qwen2MoeForCausalLM"), "")
    assert str(NALoRA(model, survey.optimizer_of(model))) == (
        "NALoRA steers 2 of 2 FFNs; plain LoRA on 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj, "
        "2 shared_expert_gate. The experts carry no LoRA.")

def test_what_it_tells(capsys):
    nalora, _ = trained(mixture("Qwen3Moe"))
    assert str(nalora).startswith("NALoRA steers 10 experts in 2 layers; plain LoRA on 2 q_proj")
    assert str(nalora).endswith("2 o_proj, 2 gate.")
    first = next(iter(nalora.statistics().values()))
    assert first["mask"].shape == (5, 8) and first["k_hat"].shape == (5,)
    nalora.summary()
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert all("mlp.experts" in line and " 40 " in line and "nan" not in line for line in lines)
    callback = NALoRACallback()
    callback.nalora = nalora
    logs = {}
    callback.on_log(None, transformers.TrainerState(), None, logs)
    assert 0.5 <= logs["nalora_rows"] < 1 and logs["nalora_k_hat_min"] <= logs["nalora_k_hat"]

def ddp_rank(rank, world, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet{world}",
                                         rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(mixture("Qwen3Moe"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nalora = NALoRA(model, optimizer, NALoRAConfig(stride=1))
    for step in range(3):
        tokens = tokens_of(step, (4, 3))[rank::world]
        model(input_ids=tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(nalora.state_dict(), f"{path}/{world}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)

def test_ranks_add_up_each_experts_sums(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(ddp_rank, (world, str(tmp_path)), nprocs=world)
    one, two, other = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True)["ffns"]
                       for ranks in ("1-0", "2-0", "2-1"))
    for name, state in one.items():
        for key, t in state.items():
            assert torch.equal(two[name][key].nan_to_num(), other[name][key].nan_to_num())
            torch.testing.assert_close(t, two[name][key], equal_nan=True, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("family, kernel", [("GptOss", "eager"), ("Qwen3Moe", "grouped_mm")])
def test_a_copy_computes_by_itself_and_shows_nothing(family, kernel):
    model = mixture(family, kernel)
    nalora, _ = trained(model)
    model.eval()
    expected = model(input_ids=tokens_of(1)).logits
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        with warnings.catch_warnings(action="error"):  # it does not train yet
            assert torch.equal(copy(input_ids=tokens_of(1)).logits, expected)
        for p in copy.parameters():
            p.data.zero_()
        assert not copy(input_ids=tokens_of(1)).logits.any()
        with pytest.warns(UserWarning, match="is a copy of"):
            copy.train()(input_ids=tokens_of(1))
        its, _ = trained(copy)
        assert its.steps == 3
    assert torch.equal(model(input_ids=tokens_of(1)).logits, expected)
    assert nalora.steps == 3 and not nalora.seen
    nalora.remove()
    model.train()(input_ids=tokens_of(1)).logits.sum().backward()
    assert not nalora.seen

@pytest.mark.parametrize("family", ["GptOss", "Qwen3Moe"])
def test_two_adapters_are_steered_side_by_side(family):
    model = mixture(family)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    config.target_parameters = TARGETS if family == "GptOss" else None
    model.add_adapter("second", config)
    found = []
    for name in ("default", "second"):
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found.append((name, NALoRA(model, optimizer), optimizer))
    for name, nalora, optimizer in found + found[:1]:
        model.set_adapter(name)
        model(input_ids=tokens_of(1)).logits.square().mean().backward()
        assert [other.seen for _, other, _ in found] == [other is nalora for _, other, _ in found]
        optimizer.step()
        optimizer.zero_grad()
    assert [nalora.steps for _, nalora, _ in found] == [2, 1]

def test_a_pass_that_was_broken_off_leaves_nothing():
    plain, _ = trained(mixture("Mixtral", "eager"))
    model = mixture("Mixtral", "eager")
    down = list(wrappers_of(model).values())[-1]["down_proj"].get_base_layer()
    breaks = []

    def forward(**batch):
        """Breaks off within the experts at each first try."""
        handle = down.act_fn.register_forward_hook(lambda *_: breaks.append(0) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        return model(**batch)

    nalora, _ = trained(model, forward=forward)
    assert len(breaks) == 6 and nalora.steps == 3
    knows_the_same(nalora, plain, rtol=1e-5, atol=1e-6)  # layers before it count their pass twice

def test_half_precision_and_autocast():
    plain, _ = trained(mixture("Qwen3Moe"))
    half, _ = trained(mixture("Qwen3Moe").bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = trained(mixture("Qwen3Moe"))
    for nalora in (half, cast):
        for ffn, other in zip(nalora.ffns, plain.ffns):
            assert (ffn.state.mask == other.state.mask).float().mean() > 0.8
            assert ffn.state.importance.dtype == torch.float32

def test_experts_in_a_list_go_the_ordinary_path():
    model = other_model(count=3)
    model.forward = lambda x: model.layers[0](x[:, :3]) + model.layers[1](x[:, 2:])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nalora = NALoRA(model, optimizer, NALoRAConfig(stride=1))
    other_step(model, 0, optimizer)
    assert [ffn.state.mask.sum().item() for ffn in nalora.ffns] == [6, 6, 12]

def test_shared_ffns_beside_experts_are_groups_of_their_own():
    row, steered = survey.try_way("Qwen2MoeForCausalLM", "target_parameters")
    assert row["outcome"] == "steered" and steered == {"experts", "FFNs"}

def test_a_compiled_model_decides_as_an_eager_one():
    plain, _ = trained(mixture("Mixtral"), 1)
    torch.compiler.reset()
    model = mixture("Mixtral")
    model.compile(backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):  # PEFT's part of it would reach any
        nalora, _ = trained(model, 1)
    knows_the_same(nalora, plain)

@pytest.mark.parametrize("family", ["GptOss", "Qwen3Moe"])
def test_peft_saves_and_merges_what_was_trained(family, tmp_path):
    model = mixture(family)
    base = deepcopy(model).unload()
    trained(model)
    expected = model.eval()(input_ids=tokens_of(1)).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(input_ids=tokens_of(1)).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens_of(1)).logits, expected, rtol=1e-4,
                               atol=1e-4)

def test_strides_are_measured_beside_each_other(tmp_path, monkeypatch, capsys):
    for name, count in (("BASE_STEPS", 1), ("STEPS", 4), ("SAMPLE", 1), ("EXPERTS", 16)):
        monkeypatch.setattr(strides, name, count)
    text = tmp_path / "text"
    text.write_text("One plus one is two. " * 50)
    strides.main(["--text", str(text), "--then", str(text)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[:3] for row in rows] == [["0", "1", "1024"], ["0", "5", "204.8"],
                                        ["0", "17", "60.25"]]
    assert all(0 < float(share) <= 1 for row in rows for share in row[5:6])

def test_finetune_takes_a_mixture():
    rows = {"input_ids": [[3, 4]]}
    settings = {"method": "nalora", "gate": ["gate_proj", "gate_up_proj"]}
    inputs.check_trainer(settings, SimpleNamespace(model=mixture("Qwen3Moe"), train_dataset=rows,
                                                   eval_dataset=rows))

# ---- what is refused -----------------------------------------------------------------------------
def refuses(model, match, **settings):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=match) as e:
        NALoRA(model, optimizer, **settings)
    assert "gate=" not in str(e.value) and "inject_lora" not in str(e.value)
    assert not any(module._forward_pre_hooks for module in model.modules())

def test_what_cannot_be_seen_is_refused_with_the_reason(monkeypatch):
    model = mixture("Qwen3Moe")
    kernels = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    model.config._experts_implementation = "sonicmoe"
    refuses(model, "experts by 'sonicmoe', .*set_experts_implementation")
    gpt = survey.with_lora(tiny.build("GptOssForCausalLM"), "")
    puts = r"target_parameters=\['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'\]"
    refuses(gpt, f"mlp.experts.gate_up_proj, which carries no LoRA: PEFT puts it there with {puts}")
    refuses(survey.with_lora(tiny.build("MixtralForCausalLM"), "inject_lora"), puts)
    refuses(mixture("Mixtral"), "are in mlp.experts.gate_up_proj: name that", gate="gate_proj")
    jet = survey.with_lora(tiny.build("JetMoeForCausalLM"), "")
    refuses(jet, "JetMoeParallelExperts, which computes its experts in a form of its own")

    down = tiny.build("GptOssForCausalLM")
    peft.inject_adapter_in_model(peft.LoraConfig(target_parameters=TARGETS[1:]), down)
    refuses(down, r"target_parameters=\['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'\]")
    refuses(mixture("Qwen3Moe").to("meta"), "stands on the meta device")
    model = mixture("Qwen3Moe")
    for p in model.parameters():
        p.data = p.data.flatten()[:0] if p.requires_grad else p.data  # as ZeRO-3 leaves them
    refuses(model, r"flattened .*ZeRO-3")

    model = mixture("Qwen3Moe")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    NALoRA(model, optimizer)
    monkeypatch.setitem(kernels._global_mapping, "grouped_mm", kernels["batched_mm"])
    with pytest.raises(ValueError, match="does not receive what the gate gives"):
        model(input_ids=tokens_of(0))  # pairs in another order than is known
    monkeypatch.setitem(kernels._global_mapping, "grouped_mm", lambda self, x, *routing: x)
    with pytest.raises(ValueError, match="does not see each token's experts"):
        model(input_ids=tokens_of(0))
    model.config._experts_implementation = "deepgemm"
    monkeypatch.setitem(kernels._global_mapping, "deepgemm", kernels["batched_mm"])
    with pytest.raises(ValueError, match="experts by 'deepgemm'"):
        model(input_ids=tokens_of(0))
