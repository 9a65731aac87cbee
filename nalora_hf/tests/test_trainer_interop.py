"""Beside transformers and PEFT: our Llama is theirs, our LoRA is PEFT's, and so are our adapters.

The packages are extras: without them nothing here is collected."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nalora import Llama, value_and_slope
from nalora_hf import load_adapter, save_adapter
from nalora_hf.tests.helpers import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                                     take_step, trained_lora)

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
        "hidden_size": 48, "head_dim": int(rng.choice([4, 8, 12])),
        "rope_theta": float(rng.choice([1e2, 1e4, 5e5])),
        "tie_word_embeddings": bool(rng.integers(2))}
    ours, (tokens, _) = small_llama(**changes).eval(), batch(0, (3, int(rng.integers(1, 40))))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], atol=1e-5, rtol=1e-5)
    text = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12,
                           do_sample=False, eos_token_id=10**6, pad_token_id=0)
    assert torch.equal(text, ours.generate(tokens, 12, stop=-1))
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(Llama.from_pretrained(tmp_path / "theirs").state_dict(), ours.state_dict())

def test_interop_peft_loads_our_adapter_and_we_load_theirs(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    small_llama().save_pretrained(tmp_path / "base")
    model, (tokens, _) = trained_lora(["q_proj", *FFN]), batch(1)
    save_adapter(model, tmp_path / "ours", base_model=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base",
                                                                            dtype=torch.float32),
                                       tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = small_llama()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0], atol=0, rtol=0)

def test_interop_twenty_steps_of_lora_agree_with_peft(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    small_llama().save_pretrained(tmp_path)
    ours, opt, _ = start(None, lora_llama(["q_proj", *FFN]), weight_decay=0.1)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
                            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]))
    pairs = {name: theirs.get_parameter(f"base_model.model.{name}.default.weight")
             for name in snapshot(ours)}
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

def test_slopes_of_all_activations_of_transformers():
    """As backward gives them: plainly, in a checkpoint and its recomputation, under autocast."""
    from transformers.activations import ACT2CLS, ACT2FN
    z = torch.cat((torch.linspace(-12, 12, 96), torch.randn(32))).requires_grad_()
    acts = {name: ACT2FN[name] for name in ACT2CLS}
    acts["compiled"] = torch.compile(ACT2FN["gelu_new"], backend="aot_eager")
    for name, act in acts.items():
        phi = act(z.clone())
        expected = phi.detach(), torch.autograd.grad(phi.sum(), z)[0]
        seen = []

        def block(x):
            seen.append(value_and_slope(act, z.detach()))
            return x.sin()

        torch.utils.checkpoint.checkpoint(block, z, use_reentrant=False).sum().backward()
        if name != "prelu":  # whose weight autocast would round
            with torch.autocast("cpu", torch.bfloat16):
                block(z)
        for found in seen:
            torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")
