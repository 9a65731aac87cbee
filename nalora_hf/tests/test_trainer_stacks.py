"""What people train with, under NALoRA: kinds of LoRA, optimizers, quantized bases, TRL, families.

The packages are extras; .ci/run installs them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nalora_hf
from nalora import NALoRAConfig
from nalora_hf import NALoRA, NALoRACallback, families, inject_lora, save_adapter, steer, survey
from nalora_hf.tests.helpers import (FFN, TINY, batch, family, pairs_of, peft_llama, random_model,
                                     small_llama, wake)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

# ---- what people train with: one step from B = 0 moves the rows of the mask and no other ---------
def moved_as_masked(tool):
    """Whether the rows of every B_gate that have left 0 are those of the mask."""
    found = []
    for stack in tool._stacks:
        for i, gate in enumerate(stack.gates):
            B = families.lora_pairs(gate)[0][1]
            found.append(torch.equal((B != 0).any(1), stack.state.mask[i]))
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
    for stack in tool._stacks:
        for i, name in enumerate(stack.names):
            B = f"{name}.gate_proj.lora_B.default.weight"
            moved = (model.get_parameter(B) != start[B]).any(1)
            assert torch.equal(moved, stack.state.mask[i])

def test_interop_pissa_and_adalora():
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    ada = AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules="all-linear")
    for config in (config, ada):
        model = get_peft_model(family("Llama"), config)
        pairs = [pair for m in model.modules() for pair in families.lora_pairs(m)]
        before = {id(B): B.detach().clone() for _, B in pairs}
        wake = [p for name, p in model.named_parameters() if "lora_E" in name]
        for E in wake:
            torch.nn.init.ones_(E)  # AdaLoRA's singular values, else B has no gradient
        tool = one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
        for stack in tool._stacks:
            for i, gate in enumerate(stack.gates):
                B = families.lora_pairs(gate)[0][1]
                assert torch.equal((B != before[id(B)]).any(1), stack.state.mask[i])

@pytest.mark.parametrize("kind", ["LoRA+", "LoRA-FA", "Muon", "Muon and AdamW"])
def test_interop_optimizers(kind):
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    model = peft_llama()
    pairs = [pair for m in model.modules() for pair in families.lora_pairs(m)]
    A, B = ([pair[i] for pair in pairs] for i in (0, 1))
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

def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", *map(str, range(58))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>")

@pytest.mark.parametrize("kind", ["padding", "packing", "padding_free", "DPO", "DPO, PEFT"])
def test_interop_trl_with_the_callback_alone(tmp_path, kind, recwarn):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(58, size=n))) for n in rng.integers(4, 30, 16)]
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 4,
                 "report_to": [], "use_cpu": True, "bf16": False, "learning_rate": 1e-2,
                 "gradient_checkpointing": False}
    callback = NALoRACallback(NALoRAConfig(keep=0.25, stride=1))
    masks = []
    set_mask = type(callback).before_pass

    def noting(self, model, args, kwargs):
        set_mask(self, model, args, kwargs)
        masks.append(self.nalora.token_mask)

    type(callback).before_pass = noting
    common = {"model": family("Llama"), "processing_class": word_tokenizer(),
              "peft_config": LoraConfig(r=4, target_modules="all-linear"), "callbacks": [callback]}
    if "PEFT" in kind:  # then TRL adds a reference adapter, which runs without gradients
        common["model"] = get_peft_model(common["model"], common.pop("peft_config"))
    if "DPO" in kind:
        pairs = {"prompt": texts[:8], "chosen": texts[8:], "rejected": texts[:8]}
        trainer = trl.DPOTrainer(args=trl.DPOConfig(**arguments),
                                 train_dataset=Dataset.from_dict(pairs), **common)
    else:
        if kind != "padding":
            arguments[kind] = True
        length = None if kind == "padding_free" else 32
        args = trl.SFTConfig(max_length=length, **arguments)
        data = Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(args=args, train_dataset=data, **common)
    trainer.train()
    assert moved_as_masked(callback.nalora)
    assert not [w for w in recwarn if "NALoRA" in str(w.message)]
    if kind == "padding" or "DPO" in kind:
        assert masks and all(mask is not None and (mask == 0).any() for mask in masks)

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
        tool._add_up()
        seen = {name: stack.sums.tokens[i].item() for stack in tool._stacks
                for i, name in enumerate(stack.names)}
        for name, count in seen.items():
            assert count == (10 if "vision" in name else mask.sum()) or "projector" in name
        assert any("vision" in name for name in seen) == (gate != "gate_proj") and len(seen) >= 2
        opt.step()
        opt.zero_grad()
        tool.remove()

@pytest.mark.parametrize("name", [
    "LlamaForCausalLM",  # gate_proj
    "Glm4ForCausalLM",  # gate and up in one layer
    "DoryForCausalLM",  # the gate is changed before the activation
    "Lfm2ForCausalLM",  # another name, and no activation module
    "DeepseekV3ForCausalLM",  # dense and shared FFNs beside experts
    "MixtralForCausalLM",  # experts alone
    "GPT2LMHeadModel",  # no gate
    "MiniMaxM3VLForCausalLM",  # a fused layer whose activation cannot be seen
])
def test_interop_families_are_what_the_table_says(name):
    if not hasattr(__import__("transformers"), name):
        pytest.skip("this transformers has no such model")
    table = nalora_hf.read_json(survey.PACKAGE / "MODELS.json")
    assert survey.try_family(name) == table[name]

def test_interop_the_survey_sees_what_is_wrong(monkeypatch):
    monkeypatch.setattr(steer.Observer, "before_act", lambda *args: None)  # the gate's output, then
    assert survey.try_family("DoryForCausalLM")["outcome"] == "wrong"
    monkeypatch.undo()
    monkeypatch.setattr(steer, "own_rows", lambda factor, p: factor.roll(1, 0))
    assert survey.try_family("LlamaForCausalLM")["outcome"] == "wrong"

def test_interop_experts_are_left_alone_and_dense_and_shared_ffns_are_steered(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    def glm():
        sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Glm4Moe", head_dim=8, first_k_dense_replace=1, **sizes)

    def qwen():  # PEFT does not rewrite its targets
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Qwen2Moe", shared_expert_intermediate_size=24, **sizes)

    theirs = get_peft_model(glm(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="The LoRA is on this model's fused experts"):
        NALoRA(theirs, torch.optim.AdamW(theirs.parameters()))
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
