"""NALoRA on the experts of mixtures agrees with a slow loop in float64 over pairs of a token and an
expert, which knows PEFT's blocks from PEFT alone and shares no code with experts.py."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from nalora import NALoRAConfig
from nalora_hf import NALoRA

TINY = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=5, num_local_experts=5, n_routed_experts=5, num_experts_per_tok=2,
               moe_intermediate_size=8, n_group=1, topk_group=1, first_k_dense_replace=1)
FAMILIES = {"Mixtral": dict(intermediate_size=8), "Qwen3Moe": {}, "GptOss": dict(
    intermediate_size=8, layer_types=["full_attention", "sliding_attention"]), "DeepseekV3": {}}
KERNELS = ["eager", "grouped_mm", "batched_mm"]
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

def mixture(family, kernel="grouped_mm", rank=3, targets="all-linear"):
    """A tiny random mixture in train mode under PEFT, B away from 0, in which no expert's rank is
    the number of experts, and some experts get no token."""
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    default = vars(model_class.config_class())
    sizes = {k: v for k, v in (EXPERTS | TINY).items() if k in default}
    model = model_class(model_class.config_class(**sizes | FAMILIES[family]))
    model.set_experts_implementation(kernel)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    if family == "GptOss":
        config.target_parameters = TARGETS
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

def sigmoid(z):
    return 1 / (1 + np.exp(-z))

def gate_of(family, outputs):
    """(z, phi, phi') of what gate_up gives for one pair, (2F,)."""
    alpha = 1.702 if family == "GptOss" else 1
    z = outputs[::2] if family == "GptOss" else outputs[:len(outputs) // 2]
    rho = sigmoid(alpha * z)
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
        gate = self.layers["gate_up_proj"]
        W = gate.parametrized() if hasattr(gate, "parametrized") else self.weight(gate)
        bias = getattr(module, "gate_up_proj_bias", None)
        x, experts = args[0].detach().double().numpy(), args[1].tolist()
        for t, row in enumerate(experts):
            real = self.mask is None or self.mask.flatten()[t]
            if real and (t - self.steps) % self.config.stride == 0:
                for e in row:
                    outputs = W[e] @ x[t]
                    if bias is not None:
                        outputs = outputs + bias[e].detach().double().numpy()
                    self.pairs[e].append(gate_of(self.family, outputs))

    def weight(self, layer):
        """(E, 2F, in), PEFT's product added."""
        p = layer.get_base_layer()._parameters.get(layer.parameter_name)
        if p is None:  # while PEFT computes
            p = layer.get_base_layer().parametrizations[layer.parameter_name].original
        W = p.detach().double() + layer.get_delta_weight("default").detach().double()
        return (W.transpose(1, 2) if self.module.is_transposed else W).numpy()

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
                F = len(state["mask"])
                for c in range(F):
                    row = 2 * c if self.family == "GptOss" else c
                    factor[numbers[row]] = state["scale"] * state["mask"][c]
        assert not factor.isnan().any()
        return factor.view_as(p)

def oracles_of(family, model, config):
    return {name: Oracle(family, layers, config) for name, layers in wrappers_of(model).items()}

class Twin:
    """Plain LoRA's step from wherever the model stands, with moments of its own."""
    def __init__(self, model, **settings):
        self.theirs = [p for p in model.parameters() if p.requires_grad]
        self.own = [nn.Parameter(p.detach().clone()) for p in self.theirs]
        self.optimizer = torch.optim.AdamW(self.own, **settings)

    def step(self):
        """{parameter: (before, after)}"""
        for p, q in zip(self.own, self.theirs):
            p.data.copy_(q.detach())
            p.grad = q.grad.clone()
        before = [p.detach().clone() for p in self.own]
        self.optimizer.step()
        return {q: (b, p.detach().clone()) for q, b, p in zip(self.theirs, before, self.own)}

def same(found, expected, message):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=message)

def follows_the_oracle(family, model, config, steps=6, microbatches=1, masked=False, wrap=None):
    """Trains, and compares all that NALoRA knows and does with the oracle's."""
    settings = dict(lr=1e-2, weight_decay=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    nalora = NALoRA(model, optimizer, config)
    oracles = oracles_of(family, model, config)
    twin = Twin(model, **settings)
    resting = 0
    for step in range(steps):
        for i in range(microbatches):
            tokens = tokens_of(10 * step + i)
            mask = torch.rand(tokens.shape, generator=torch.manual_seed(step)) < 0.7
            for oracle in oracles.values():
                oracle.mask = mask if masked else None
            nalora.token_mask = mask if masked else None
            model(input_ids=tokens).logits.square().mean().backward()
        moves = twin.step()
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
                    before, after = moves.pop(p)
                    factor = oracle.factor(part, parameter)
                    same(p.detach(), before + factor * (after - before), f"{parameter}.{part}")
                    assert torch.equal(p[factor == 0], before[factor == 0])
                    assert (factor == 0).any() == (parameter == "gate_up_proj" and part == "lora_B")
        for p, (_, after) in moves.items():  # attention, router: plain LoRA
            assert torch.equal(p, after)
    assert resting  # an expert without a token was among them
    return nalora

@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_agree_with_the_oracle(family, kernel):
    follows_the_oracle(family, mixture(family, kernel), NALoRAConfig(stride=1))
