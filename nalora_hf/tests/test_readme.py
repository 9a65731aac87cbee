"""README.md does what it says: its snippets run, its command lines are known, and each row of its
table has a test."""
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

import nalora_hf
from nalora_hf.tests.helpers import batch, family

FOLDER = Path(nalora_hf.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")

def blocks(kind):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for language, text in found if language == kind]

def names_of(tmp_path):
    """What the snippets take for granted."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
            for row in batch(0)[0]]
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), max_steps=4, save_steps=2,
                                               report_to=[], use_cpu=True, logging_steps=1)
    return {**{name: getattr(nalora_hf, name) for name in nalora_hf.__all__}, "torch": torch,
            "model": family("Llama").eval(), "LoraConfig": peft.LoraConfig,
            "get_peft_model": peft.get_peft_model, "Trainer": transformers.Trainer,
            "arguments": arguments, "data": rows,
            "batches": [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}] * 4}

def sides(diff):
    """(old, new) of a diff."""
    lines = diff.splitlines()
    return ["\n".join(line[2:] for line in lines if line[:1] in f" {sign}") for sign in "-+"]

def steered(nalora, steps):
    assert nalora.steps == steps and len(nalora.ffns) == 2
    return all(ffn.state.mask.float().mean() == 0.5 for ffn in nalora.ffns)

def test_it_can_be_read_in_five_minutes():
    assert len(README.split()) <= 1000
    assert [len(diff.splitlines()) for diff in blocks("diff")] == [3, 3]
    assert "Expect the same loss as LoRA" in README

def test_peft_by_its_diff(tmp_path, capsys):
    names = names_of(tmp_path)
    old, new = sides(blocks("diff")[0])
    exec(new, names)
    assert "NALoRA steers 2 of 2 FFNs" in capsys.readouterr().out
    names["model"](**names["batches"][0]).loss.backward()
    names["optimizer"].step()
    assert steered(names["nalora"], 1)
    exec(old, names_of(tmp_path))

def test_trainer_by_its_diff_and_its_resume(tmp_path):
    names = names_of(tmp_path)
    old, new = sides(blocks("diff")[1])
    exec(sides(blocks("diff")[0])[0], names)
    exec(new, names)
    nalora = names["trainer"].pop_callback(nalora_hf.NALoRACallback).nalora
    assert steered(nalora, 4)
    line = names["trainer"].state.log_history[1]
    for name in re.findall(r"`(nalora_\w+)`", README):
        assert name in line
    assert (tmp_path / "out" / "checkpoint-2" / "nalora.pt").exists()
    names["trainer"].add_callback(nalora_hf.NALoRACallback)
    names["trainer"].train(resume_from_checkpoint=True)
    exec(sides(blocks("diff")[0])[0], plain := names_of(tmp_path / "plain"))
    exec(old, plain)
    assert not any("nalora_k_hat" in line for line in plain["trainer"].state.log_history)

def test_own_loop_and_what_follows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = names_of(tmp_path)
    own, save, distributed = blocks("python")
    exec(own, names)
    nalora = names["nalora"]
    assert steered(nalora, 4) and torch.equal(nalora.token_mask,
                                              names["batches"][0]["attention_mask"])
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(family("Llama"), tmp_path / "adapter").eval()
    tokens = batch(1)[0]
    torch.testing.assert_close(theirs(tokens).logits, names["model"].eval()(tokens).logits,
                               atol=1e-5, rtol=1e-5)
    wanted = nalora.state_dict()
    for snippet in (save, distributed):
        lines = snippet.splitlines()
        exec(lines[0], names)
        for group in nalora.groups:
            group.state = group.state._replace(mask=~group.state.mask)
        nalora.steps = 0
        exec("\n".join(lines[1:]), names)
        found = nalora.state_dict()
        assert found["steps"] == 4 and found["config"] == wanted["config"]
        for name, state in wanted["ffns"].items():
            assert all(torch.equal(found["ffns"][name][key], t) for key, t in state.items())
    capsys.readouterr()
    nalora.summary()
    shown, = (block.splitlines() for block in blocks("") if "channels" in block)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == shown[0] and len(printed) == len(shown)
    assert [line[:38] for line in printed] == [line[:38] for line in shown]  # figures may differ

def test_its_command_lines_are_known():
    finetune = pytest.importorskip("nalora_hf.finetune")
    lines = [line for block in blocks("") for line in block.splitlines() if "finetune" in line]
    assert len(lines) == 3
    for line in lines:
        given = shlex.split(line.partition("nalora_hf.finetune")[2])
        assert vars(finetune.command_line().parse_args(given))

ROWS = {
    "Llama, Mistral, Qwen, Gemma, SmolLM3":
        "test_interop_nalora_is_the_same_under_our_lora_and_pefts",
    "gate and up in one layer (Phi-3, GLM)": "test_a_fused_layer_is_steered_as_its_unfused_twin",
    "a gate that is changed before the activation (Gemma 3n)":
        "test_what_the_activation_receives_is_observed",
    "experts (Mixtral, Qwen3-MoE, OLMoE, MiniMax)":
        "test_experts_agree_with_the_oracle test_other_families_agree_with_the_oracle",
    "Liger's FFN": "test_interop_a_fused_ffn_is_steered_as_the_one_it_replaces",
    "rsLoRA, DoRA, PiSSA, OLoRA, AdaLoRA, dropout, `rank_pattern`, `modules_to_save`":
        "test_interop_lora_as_peft_configures_it test_interop_pissa_and_adalora",
    "LoRA+, LoRA-FA, Muon": "test_interop_optimizers",
    "bitsandbytes 4 bit, quanto int8": "test_interop_quantized_bases",
    "Trainer: accumulation, checkpointing of both kinds, `torch_compile`, evaluation in between, "
    "searches": "test_each_step_counts_the_real_tokens_of_its_own_batches "
                "test_each_trial_of_a_search_has_its_folder",
    "SFTTrainer (padding, packing, padding-free), DPOTrainer, GRPOTrainer":
        "test_interop_trl_with_the_callback_alone",
    "Accelerate": "test_interop_accelerate",
    "autocast, GradScaler":
        "test_autocast "
        "test_a_step_skipped_by_grad_scaler_is_none_and_its_passes_count_in_the_next",
    "`torch.compile`, `fullgraph=True`":
        "test_the_whole_model_is_one_graph_that_is_compiled_once",
    "DistributedDataParallel, FSDP2":
        "test_two_ranks_equal_each_other_bit_for_bit_and_one_within_tolerance",
    "two adapters of PEFT in turn": "test_interop_two_adapters_of_peft_are_steered_in_turn",
    "another name for the gate": "test_a_layer_that_the_activation_does_not_see_is_refused",
    "FFNs without a gate (GPT-2, OPT, CLIP, ViT)":
        "test_interop_ffns_without_a_gate_and_fused_ones",
    "vision and language": "test_interop_both_towers_of_a_vision_language_model",
    "no activation to be found": "test_the_activation_may_be_told_or_stand_in_the_config",
    "several optimizers": "test_several_optimizers_step_as_one",
    "experts of gpt-oss; experts with shared FFNs (Qwen2-MoE)":
        "test_experts_agree_with_the_oracle "
        "test_shared_ffns_beside_experts_are_groups_of_their_own",
    "dense and shared FFNs of DeepSeek-V3, GLM-4.5, Qwen3-Next":
        "test_interop_dense_and_shared_ffns_beside_experts_are_steered",
    "experts of Llama 4, LongCat, JetMoe":
        "test_what_cannot_be_seen_is_refused_with_the_reason",
    "experts by another implementation than `eager`, `grouped_mm`, `batched_mm`":
        "test_what_cannot_be_seen_is_refused_with_the_reason",
    "FSDP1, ZeRO-3": "test_flattened_parameters_are_refused",
    "schedule-free optimizers": "test_interop_schedule_free_is_refused",
    "VeRA, LoHa, OFT": "test_interop_adapters_without_a_and_b_are_refused",
    "LoRA that is offloaded": "test_lora_without_data_is_refused",
    "optimizers that are not torch's": "test_what_is_no_optimizer_of_torch_is_refused",
}

def test_each_row_of_the_table_has_its_test():
    table = README.partition("| | what you have | |\n|---|---|---|\n")[2]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("|")]
    assert [what.strip() for _, what, _ in rows] == list(ROWS)
    assert [kind.strip() for kind, *_ in rows if kind.strip()] == [
        "works unchanged", "needs an argument", "refused, because"]
    tests = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("tests/test_*.py"))
    for row, names in ROWS.items():
        for name in names.split():
            assert f"\ndef {name}(" in tests, f"{row}: there is no {name}"

def test_pefts_default_targets_have_no_gate():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(family("Llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="It is on q_proj, v_proj: .* or put LoRA on the gate"):
        nalora_hf.NALoRA(model, optimizer)
