"""python -m nalora_hf.finetune on a tiny Llama with a tokenizer of its own, made here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nalora_hf
from nalora_hf.tests.helpers import TINY, equal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its client is imported
for package in ("transformers", "peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(package)

from nalora_hf import finetune

CHAT = """{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}
{%- endif %}{{ '|' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
MUTE = CHAT.replace("{%- generation %}", "").replace("{% endgeneration %}", "")

def make_model(folder, template=None, **changes):
    """A folder with a random Llama and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": len(words), "max_position_embeddings": 96,
                            "initializer_range": 0.2, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>",
                            unk_token="?", chat_template=template).save_pretrained(folder)
    return str(folder)

def sums(count=16):
    return [{"prompt": f"{i} + 1 = ", "completion": str(i + 1) * (1 + i % 3)} for i in range(count)]

def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(lines(sums()))
    return str(path)

@pytest.fixture
def built(monkeypatch):
    """[(trainer, callback, [token masks that it showed NALoRA])] of the runs of a test."""
    made = []
    build = finetune.build

    def noting(*args):
        trainer, callback = build(*args)
        masks = []
        made.append((trainer, callback, masks))
        return trainer, callback

    set_token_mask = nalora_hf.NALoRA.set_token_mask

    def noting_masks(self, *args):
        set_token_mask(self, *args)
        made[-1][2].append(self.token_mask)

    monkeypatch.setattr(nalora_hf.NALoRA, "set_token_mask", noting_masks)
    monkeypatch.setattr(finetune, "build", noting)
    return made

def run(out, *flags):
    assert finetune.main([*map(str, flags), "--out", str(out)]) == 0
    return nalora_hf.read_json(out / "run.json")

def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")

SIX = ("--steps", 6, "--lr", 0.01, "--eval-share", 0.25)

@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, data):
    """The folder of a finished run of each method, and of both."""
    out = tmp_path_factory.mktemp("finished")
    for method in ("lora", "nalora", "both"):
        merge = ["--merge"] * (method == "nalora")
        run(out / method, "--model", model, "--data", data, "--method", method, *SIX, *merge)
    return out

# ---- the data ------------------------------------------------------------------------------------
PAIRS = [{"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "", "completion": "yes"}]
ORDERS = [{"instruction": "Add.", "input": "2, 2", "output": "4"},
          {"instruction": "Agree.", "output": "yes"}]
TALKS = [{"messages": [{"role": "user", "content": "2 + 2?"},
                       {"role": "assistant", "content": answer}]} for answer in ("4", "yes")]
TEXTS = [{"text": "one"}, {"text": "two words"}]
ANSWERS = ["4</s>", "yes</s>"]
WHOLE = [f"user: 2 + 2?|assistant: {answer}</s>|" for answer in ("4", "yes")]
QUOTED = '"[{""role"": ""user"", ""content"": ""2 + 2?""}, {""role"": ""assistant"", ""content"": '

@pytest.mark.parametrize("name, content, template, learned", [
    ("rows.jsonl", lines(PAIRS), None, ANSWERS),
    ("indented.json", json.dumps(PAIRS, indent=2), None, ANSWERS),
    ("windows.jsonl", "\ufeff" + lines(PAIRS).replace("\n", "\r\n\r\n"), None, ANSWERS),
    ("rows.csv", "id,prompt,completion\n1,2 + 2 = ,4\n2,,yes\n", None, ANSWERS),
    ("orders.jsonl", lines(ORDERS), None, ANSWERS),
    ("chat.jsonl", lines(ORDERS), CHAT, ["4</s>|", "yes</s>|"]),
    ("orders.csv", 'instruction,input,output\nAdd.,"2, 2",4\nAgree.,,yes\n', None, ANSWERS),
    ("talks.jsonl", lines(TALKS), CHAT, ANSWERS),
    ("talks.csv", "".join(["messages\n", *(QUOTED + f'""{a}""}}]"\n' for a in ("4", "yes"))]), CHAT,
     ANSWERS),
    ("mute.jsonl", lines(TALKS), MUTE, WHOLE),  # this template does not tell whose tokens they are
    ("texts.jsonl", lines(TEXTS), None, ["one</s>", "two words</s>"]),
])
def test_each_format_is_trained_on_its_answers(tmp_path, built, name, content, template, learned):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    model = make_model(tmp_path / "model", template)
    record = run(tmp_path / "out", "--model", model, "--data", tmp_path / name, "--eval-data",
                 tmp_path / name, "--steps", 1)
    trainer = built[0][0]
    tokens = trainer.processing_class.convert_ids_to_tokens
    labels = [[t for t in row if t != -100] for row in trainer.train_dataset["labels"]]
    found = ["".join(tokens(row)) for row in labels]
    assert found == learned
    assert record["eval_loss"].keys() == {"base", "nalora"}

def test_an_instruction_and_its_input_are_in_the_prompt(tmp_path, built):
    (tmp_path / "rows.jsonl").write_text(lines(ORDERS))
    for template, prompt in ((None, "### Instruction:\nAdd.\n\n2, 2\n\n### Response:\n4</s>"),
                             (CHAT, "user: Add.\n\n2, 2|assistant: 4</s>|")):
        model = make_model(tmp_path / f"model{bool(template)}", template)
        run(tmp_path / f"out{bool(template)}", "--model", model, "--data", tmp_path / "rows.jsonl",
            "--eval-data", tmp_path / "rows.jsonl", "--steps", 1, "--method", "lora")
        trainer = built[-1][0]
        ids = trainer.train_dataset["input_ids"][0]
        assert "".join(trainer.processing_class.convert_ids_to_tokens(ids)) == prompt

def test_held_out_rows_are_drawn_from_the_seed(tmp_path, model, data, built):
    for i, seed in enumerate((1, 1, 2)):
        run(tmp_path / str(i), "--model", model, "--data", data, "--steps", 1, "--seed", seed,
            "--eval-share", 0.25)
    parts = [[{tuple(ids) for ids in part["input_ids"]}
              for part in (trainer.train_dataset, trainer.eval_dataset)] for trainer, *_ in built]
    assert all(len(train) == 12 and len(held) == 4 and not train & held for train, held in parts)
    assert parts[0] == parts[1] != parts[2]

# ---- the methods ---------------------------------------------------------------------------------
def test_nalora_sees_the_masks_and_keeps_rows(tmp_path, model, data, built):
    record = run(tmp_path / "out", "--model", model, "--data", data, "--steps", 1, "--keep", 0.25,
                 "--accumulate", 2, "--lr", 0.01)
    trainer, callback, masks = built[0]
    k_hat = [ffn.state.k_hat.item() for ffn in callback.nalora.ffns]
    assert record["nalora"] == {"steps": 1, "k_hat": k_hat} and len(k_hat) == 2
    assert len(masks) >= 2 and any((mask == 0).any() for mask in masks)
    gates = {k: B for k, B in adapter(tmp_path / "out").items() if "gate_proj.lora_B" in k}
    for (name, state), B in zip(callback.nalora.statistics().items(), gates.values()):
        assert torch.equal(B.ne(0).any(1), state["mask"]) and state["mask"].sum() == 12

def test_experts_are_named_among_the_targets(tmp_path, data, capsys):
    from transformers import GptOssConfig, GptOssForCausalLM
    folder = make_model(tmp_path / "model")
    sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_local_experts=4,
                 num_experts_per_tok=2, max_position_embeddings=96)
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(folder)
    flags = ("--model", folder, "--data", data, "--steps", "1")
    assert finetune.main([*flags, "--out", str(tmp_path / "refused")]) == 2
    assert ("which carries no LoRA: PEFT puts it there with --targets all-linear "
            "mlp.experts.gate_up_proj mlp.experts.down_proj.") in capsys.readouterr().err
    record = run(tmp_path / "out", *flags, "--targets", "all-linear", "mlp.experts.gate_up_proj",
                 "mlp.experts.down_proj")
    assert len(record["nalora"]["k_hat"]) == 2
    assert any("experts" in name for name in adapter(tmp_path / "out"))

def test_both_are_each_alone_and_stand_in_a_table(finished, capsys):
    both = nalora_hf.read_json(finished / "both" / "run.json")["eval_loss"]
    for method in ("lora", "nalora"):
        alone = nalora_hf.read_json(finished / method / "run.json")["eval_loss"]
        assert alone == {"base": both["base"], method: both[method]}
        assert equal(adapter(finished / "both" / method), adapter(finished / method))
        assert both[method] < both["base"]
    assert both["lora"] != both["nalora"]
    assert finetune.main(["--resume", str(finished / "both")]) == 0  # it is finished: the table
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["         eval loss  minus base", f"base    {both['base']:10.4f}"]
    assert printed[2:4] == [f"{m:8}{both[m]:10.4f}{both[m] - both['base']:+12.4f}"
                            for m in ("lora", "nalora")]

def test_the_base_is_printed_first_and_a_rise_is_said(tmp_path, model, data, capsys):
    loss = run(tmp_path / "out", "--model", model, "--data", data, "--lr", 8, "--steps", 6,
               "--method", "lora")["eval_loss"]
    printed = capsys.readouterr().out
    assert loss["lora"] is None or loss["lora"] > loss["base"]  # None: no number
    assert f"eval loss of the base: {loss['base']:.4f}" in printed.split("'train_loss'")[0]
    assert "The eval loss of lora ended above the base's: try a smaller --lr, such as 2." in printed
    assert "such as" not in "".join(finetune.summary({"base": 2.0, "lora": 1.9}, 1.0))
    assert "no number" in "".join(finetune.summary({"base": 2.0, "lora": None}, 1.0))

def test_the_base_loss_is_that_of_the_model_itself(tmp_path, model, data, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    (tmp_path / "one.jsonl").write_text(lines(sums(1)))
    record = run(tmp_path / "out", "--model", model, "--data", data, "--steps", 1, "--eval-data",
                 tmp_path / "one.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("0 + 1 = 1</s>", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :8] = -100
    loss = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, labels=labels).loss
    assert record["eval_loss"]["base"] == pytest.approx(loss.item(), rel=1e-5)

# ---- what is written, and going on ---------------------------------------------------------------
def test_merged_is_the_adapter_on_the_base(model, finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = AutoModelForCausalLM.from_pretrained(model)
    folder = finished / "nalora"
    ids = AutoTokenizer.from_pretrained(folder / "merged")("1 + 1 = 2", return_tensors="pt")
    before = base(**ids).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")(**ids).logits
    theirs = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == model
    torch.testing.assert_close(theirs(**ids).logits, merged, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 0.1

def test_resume_equals_the_uninterrupted_run(tmp_path, model, data, finished, built, capsys):
    from transformers import TrainerCallback
    made = finetune.build

    steps = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == 4:
                raise KeyboardInterrupt

    def stopped(*args):
        trainer, callback = made(*args)
        trainer.add_callback(Stop)
        return trainer, callback

    finetune.build = stopped  # the fixture puts it back
    flags = ["--model", model, "--data", data, *map(str, SIX), "--merge", "--out", str(tmp_path)]
    assert finetune.main(flags) == 130
    assert f"--resume {tmp_path} goes on" in capsys.readouterr().out
    (tmp_path / "checkpoint-9").mkdir()  # one that was being written
    assert finetune.main(["--resume", str(tmp_path)]) == 0
    assert steps == [1, 2, 3, 4, 4, 5, 6]  # from the checkpoint of step 3
    there, here = (nalora_hf.read_json(f / "run.json") for f in (finished / "nalora", tmp_path))
    assert here == there
    assert equal(adapter(tmp_path), adapter(finished / "nalora"))

def test_4_bit(tmp_path, data, built):
    pytest.importorskip("bitsandbytes")
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    run(tmp_path / "out", "--model", model, "--data", data, "--steps", 2, "--load-in-4bit")
    gate = built[0][0].model.base_model.model.model.layers[0].mlp.gate_proj
    assert not gate.base_layer.weight.is_floating_point()
    assert gate.lora_B["default"].weight.dtype == torch.float32
    assert gate.lora_B["default"].weight.ne(0).any(1).sum() >= 64

def test_two_ranks_do_as_one(tmp_path, model):
    (tmp_path / "rows.jsonl").write_text(lines(sums()))
    (tmp_path / "held.jsonl").write_text(lines(sums(4)))
    common = ["--model", model, "--data", str(tmp_path / "rows.jsonl"), "--eval-data",
              str(tmp_path / "held.jsonl"), "--steps", "4", "--lr", "0.01", "--method", "both"]
    run(tmp_path / "one", *common, "--batch-size", "4")
    root = str(Path(nalora_hf.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--standalone", "-m", "nalora_hf.finetune", *common,
                           "--batch-size", "2", "--out", str(tmp_path / "two")],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("eval loss of the base:") == 2  # rank 0, of each method
    assert done.stdout.count("minus base") == 1
    one, two = (adapter(tmp_path / name / "lora") for name in ("one", "two"))
    for name in one:  # the same rows at each step, whoever has them
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    record = nalora_hf.read_json(tmp_path / "two" / "run.json")
    assert record["nalora"]["steps"] == 4 and len(record["nalora"]["k_hat"]) == 2

def test_a_run_is_not_overwritten(tmp_path, model, data, finished, capsys):
    before = (finished / "lora" / "run.json").read_bytes()
    assert finetune.main(["--model", model, "--data", data, "--out", str(finished / "lora")]) == 2
    assert "already holds a run: go on with --resume" in capsys.readouterr().err
    assert (finished / "lora" / "run.json").read_bytes() == before
