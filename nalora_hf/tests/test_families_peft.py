"""What people train with, under NALoRA: kinds of LoRA, optimizers, quantized bases, towers, and
mixtures of experts.

The packages are extras; .ci/run installs them."""
import pytest
import torch
import torch.nn.functional as F

from nalora import NALoRAConfig
from nalora_hf import NALoRA, inject_lora, save_adapter
from nalora_hf.tests.helpers import (FFN, TINY, batch, family, pairs_of, peft_llama, random_model,
                                     small_llama, wake)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

# One step from B = 0 moves the rows of the mask and no other.

def moved_as_masked(tool):
    """Whether the rows of every B_gate that have left 0 are those of the mask."""
    found = [torch.equal((ffn.B_gate != 0).any(1), ffn.state.mask) for ffn in tool.ffns]
    return len(found) >= 2 and all(found)

def one_step(model, optimizer, *others):
    tool = NALoRA(model.train(), [optimizer, *others] if others else optimizer,
                  NALoRAConfig(keep=0.25))
    tokens, targets = batch(0)
    F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten()).backward()
    for o in (optimizer, *others):
        o.step()
    return tool

def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]

@pytest.mark.parametrize("options",
                         [{"lora_dropout": 0.2}, {"use_rslora": True}, {"use_dora": True},
                          {"init_lora_weights": "olora"}, {"rank_pattern": {"gate_proj": 2}},
                          {"layer_replication": [[0, 2], [1, 2]]}, {"modules_to_save": ["lm_head"]},
                          {"exclude_modules": ["up_proj"]}, {"lora_bias": True}],
                         ids=lambda options: next(iter(options)))
def test_interop_lora_as_peft_configures_it(options):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(family("Llama"), LoraConfig(r=4, target_modules="all-linear", **options))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    tool = one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    if "init_lora_weights" not in options:
        assert moved_as_masked(tool)
    for name, state in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B.default.weight"
        moved = (model.get_parameter(B) != start[B]).any(1)
        assert torch.equal(moved, state["mask"]) and 0 < moved.sum() < 48

def test_interop_pissa_and_adalora():
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    ada = AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules="all-linear")
    for config in (config, ada):
        model = get_peft_model(family("Llama"), config)
        before = {id(B): B.detach().clone() for _, B in pairs_of(model)}
        for name, E in model.named_parameters():
            if "lora_E" in name:
                torch.nn.init.ones_(E)  # AdaLoRA's singular values, else B has no gradient
        tool = one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
        assert len(tool.ffns) == 2
        for ffn in tool.ffns:
            moved = (ffn.B_gate != before[id(ffn.B_gate)]).any(1)
            assert torch.equal(moved, ffn.state.mask)

@pytest.mark.parametrize("kind", ["LoRA+", "LoRA-FA", "Muon", "Muon and AdamW"])
def test_interop_optimizers(kind):
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    model = peft_llama()
    A, B = ([pair[i] for pair in pairs_of(model)] for i in (0, 1))
    if kind == "LoRA+":
        made = [create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)]
    elif kind == "LoRA-FA":
        made = [create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)]
    elif kind == "Muon":
        made = [torch.optim.Muon(A + B, lr=1e-2)]
    else:
        made = [torch.optim.Muon(B, lr=1e-2), torch.optim.AdamW(A, lr=1e-2)]
    assert moved_as_masked(one_step(model, *made))

def test_interop_schedule_free_is_refused():
    schedulefree = pytest.importorskip("schedulefree")
    model = peft_llama()
    with pytest.raises(ValueError, match="AdamWScheduleFree evaluates at averages of its own"):
        NALoRA(model, schedulefree.AdamWScheduleFree(trainable(model)))

@pytest.mark.parametrize("kind", ["VeRA", "LoHa", "OFT"])
def test_interop_adapters_without_a_and_b_are_refused(kind):
    import peft
    options = {"VeRA": {"r": 4}, "LoHa": {"r": 4}, "OFT": {"oft_block_size": 8}}[kind]
    name = {"VeRA": "VeraConfig", "LoHa": "LoHaConfig", "OFT": "OFTConfig"}[kind]
    config = getattr(peft, name)(target_modules=["gate_proj"], **options)
    model = peft.get_peft_model(family("Llama"), config)
    with pytest.raises(ValueError, match="no pair of A and B that could be steered"):
        NALoRA(model, torch.optim.AdamW(trainable(model)))

@pytest.mark.parametrize("kind", ["bitsandbytes", "quanto"])
def test_interop_quantized_bases(tmp_path, kind):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig
    pytest.importorskip("bitsandbytes" if kind == "bitsandbytes" else "optimum.quanto")
    if kind == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    else:
        config = QuantoConfig(weights="int8")
    small_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config,
                                                 device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    gate = model.base_model.model.model.layers[0].mlp.gate_proj
    assert kind == "quanto" or not gate.base_layer.weight.is_floating_point()
    assert moved_as_masked(one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2)))

def test_interop_both_towers_of_a_vision_language_model():
    import transformers
    text = {**TINY, "vocab_size": 80}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=32),
        text_config=transformers.LlamaConfig(**text), image_token_index=70, vision_feature_layer=-1)
    model = transformers.LlavaForConditionalGeneration(config)
    inject_lora(model, ["fc1", "fc2", "gate_proj", "up_proj", "down_proj"], rank=4, alpha=8)
    wake(pairs_of(model))
    for gate in ("gate_proj", ("gate_proj", "fc1")):
        opt = torch.optim.AdamW(trainable(model), lr=1e-2)
        tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25), gate=gate)
        tokens = torch.randint(3, 60, (2, 12))
        tokens[:, 1:5] = 70  # the image's four patches
        mask = torch.ones_like(tokens)
        mask[:, 6:] = 0
        mask[0, 6:] = torch.tensor([1, 1, 1, 0, 0, 0])
        tool.token_mask = mask
        pixels = torch.randn(2, 3, 16, 16)
        logits = model(input_ids=tokens, attention_mask=mask, pixel_values=pixels).logits
        logits.square().mean().backward()
        tool.add_up()
        seen = {ffn.name: ffn.group.sums.tokens[ffn.index].item() for ffn in tool.ffns}
        for name, count in seen.items():
            assert count == (10 if "vision" in name else mask.sum()) or "projector" in name
        assert any("vision" in name for name in seen) == (gate != "gate_proj") and len(seen) >= 2
        opt.step()
        opt.zero_grad()
        tool.remove()

def test_interop_dense_and_shared_ffns_beside_experts_are_steered(tmp_path):
    from peft import PeftModel

    def glm():
        sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Glm4Moe", head_dim=8, first_k_dense_replace=1, **sizes)

    def qwen():  # PEFT does not rewrite its targets
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Qwen2Moe", shared_expert_intermediate_size=24, **sizes)

    model = glm()
    inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
    tool = one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    assert list(tool.statistics()) == ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts"]
    assert moved_as_masked(tool)
    with pytest.raises(ValueError, match="PEFT reads these names as other parts of this model"):
        save_adapter(model, tmp_path)
    model = qwen()
    inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
    assert moved_as_masked(one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2)))
    save_adapter(model.eval(), tmp_path)
    tokens = batch(1)[0]
    theirs = PeftModel.from_pretrained(qwen(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)
