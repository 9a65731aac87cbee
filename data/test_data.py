"""The executable specification of data/: its texts, problems.py and what runs.py shows."""
import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import train_tiny
from data import make_data, problems, runs
from nalora import Llama, LlamaConfig, NALoRAConfig, State

HERE = Path(__file__).resolve().parent.parent

TOKENIZER = problems.load_tokenizer()
END = TOKENIZER.eot_token
SPLITS = {split: problems.read_problems(HERE / "data" / f"{split}.jsonl")
          for split in problems.SPLITS}
PROBLEMS = [p for split in SPLITS.values() for p in split]
EQUATIONS = problems.read_problems(HERE / "data" / "arithmetic.jsonl")
TEXT = (HERE / "data" / "pretrain.txt").read_text()

def test_the_tokenizer_gives_a_text_back_and_reads_digit_by_digit():
    for text in ("Ann has 12 apples.\n12+5=17.", "", "naïve 東京 🙂 \x00\t", "<|endoftext|>"):
        assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text
    assert len(TOKENIZER.encode_ordinary("1234567890")) == 10
    assert TOKENIZER._pat_str == make_data.PATTERN and TOKENIZER.n_vocab == make_data.VOCAB == 640

def test_splits_share_no_template_with_operands():
    keys = {split: {(p["template"], *p["operands"]) for p in SPLITS[split]} for split in SPLITS}
    sizes = {split: len(k) for split, k in keys.items()}
    assert sizes == make_data.SIZES == {"train": 1500, "val": 200, "test": 500}
    assert len(set().union(*keys.values())) == len({p["prompt"] for p in PROBLEMS}) == 2200
    assert len({p["template"] for p in SPLITS["train"]}) == len(make_data.TEMPLATES) == 14

def test_every_solution_is_right_and_uses_the_operands():
    for p in PROBLEMS:
        assert p["operands"] == [int(n) for n in re.findall("[0-9]+", p["prompt"])]
        steps = re.findall(r"([0-9]+)([+-])([0-9]+)=([0-9]+)\.", p["completion"])
        assert len(steps) == 2 and steps[0][3] in (steps[1][0], steps[1][2])
        assert all(make_data.evaluate(int(x), sign, int(y)) == int(z) for x, sign, y, z in steps)
        assert problems.final_answer(p["completion"]) == p["answer"] == int(steps[1][3])

def test_the_texts_hold_no_word_problem_and_no_held_out_equation_but_every_token():
    assert not re.search(r"answer is [0-9]", TEXT)
    assert not any(d.partition("?")[2].count("=") > 1 for d in TEXT.split("\n"))  # no two steps
    equations = "\n".join(d for d in TEXT.splitlines() if d[0].isdigit())
    shown = set(re.findall(r"(?:^|(?<= ))[0-9]+[+-][0-9]+=", equations, re.M))
    held_out = {p["prompt"] for p in EQUATIONS}
    assert len(shown) > 9000 and len(held_out) == 1010 and not shown & held_out
    counts = np.bincount(problems.encode_text(TOKENIZER, HERE / "data" / "pretrain.txt"))
    used = {i for p in PROBLEMS for i in problems.encode_problem(TOKENIZER, p)[0]}
    assert min(counts[i] for i in used) > 200  # LoRA cannot train a row of a frozen, tied head

def test_make_data_makes_what_is_committed():
    documents, held_out, equations = make_data.pretraining_text()
    assert "\n".join(documents) + "\n" == TEXT and make_data.split_problems() == SPLITS
    assert "\n".join(held_out) + "\n" == (HERE / "data" / "pretrain_val.txt").read_text()
    assert [(p["prompt"], p["answer"]) for p in EQUATIONS] == equations

def test_the_committed_base_is_small_and_knows_equations_alone():
    weights = load_file(problems.BASE / "model.safetensors").values()
    assert {t.dtype for t in weights} == {torch.float16} and sum(t.numel() for t in weights) < 9e5
    model = Llama.from_pretrained(problems.BASE).eval()
    assert problems.arithmetic_accuracy(model, TOKENIZER, EQUATIONS[:200]) > 0.95
    assert problems.exact_match(model, TOKENIZER, SPLITS["test"][:50])[0] <= 0.02

def test_the_problem_in_the_docstring_is_encoded_as_it_says():
    problem = SPLITS["train"][713]
    says = " ".join(problems.__doc__.split())
    assert f'"{problem["prompt"]}"' in says and f'"{problem["completion"]}"' in says
    ids, prompt = problems.encode_problem(TOKENIZER, problem)
    batch = problems.collate([(ids, prompt), ([1] * 53, 2)], END)
    rows = [ids, *(t[0].int().tolist() for t in batch)]
    for name, row in zip(("token ids", "tokens", "targets", "token_mask"), rows):
        line = re.search(rf"^ +{name} +(.*)$", problems.__doc__, re.M)[1]
        head, middle, tail = ([int(n) for n in re.findall(r"-?\d+", part)]
                              for part in line.split("..."))
        assert len(row) == 52 and [row[:4], row[26:31], row[-4:]] == [head, middle, tail], name

@pytest.mark.parametrize("settings, steps, wanted, validation", [
    ({}, 200, "83b3b4f8686517af", "7ca588e4262b0c2c"),
    ({"batch_size": 5, "train_size": 99, "seed": 3}, 200, "3c8e1eff1521f9dd", "7ca588e4262b0c2c"),
    ({"method": "pretrain"}, 50, "d3a24b15697a90ed", "2c4c5d4fd0821cd8")])
def test_batches_are_those_of_version_1(settings, steps, wanted, validation):
    def fingerprint(batches):
        total = hashlib.sha256()
        for t in (t for batch in batches for t in batch if t is not None):
            total.update(f"{t.dtype}{tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes())
        return total.hexdigest()[:16]

    found = problems.load(train_tiny.Config(**settings), LlamaConfig(**train_tiny.TINY))
    assert fingerprint(map(found["batches"], range(steps))) == wanted
    assert fingerprint(found["validation"]) == validation
    assert len(found["problems"]) == 500 and len(found["equations"]) == 1010

def test_the_mean_loss_is_over_targets_not_over_batches():
    model = Llama.from_pretrained(problems.BASE)
    batches = problems.in_order([problems.encode_problem(TOKENIZER, p) for p in PROBLEMS[:60]], END)
    nats = [nn.functional.cross_entropy(model(tokens)[0].transpose(1, 2), targets, reduction="none")
            [targets != -100] for tokens, targets, _ in batches]
    assert [len(tokens) for tokens, *_ in batches] == [50, 10]
    assert problems.mean_loss(model, batches) == pytest.approx(torch.cat(nats).mean().item(), 1e-5)

class Parrot(nn.Linear):
    """Answers every prompt with the same text, and goes on after its end."""
    def generate(self, tokens, max_new_tokens, stop):
        assert stop == END and (tokens[:, 0] == END).all()
        ids = torch.tensor([*TOKENIZER.encode_ordinary(self.text), END, 5])[:max_new_tokens]
        return torch.cat((tokens, ids.expand(len(tokens), -1)), dim=1)

def test_answers_are_cut_at_the_end_read_and_counted():
    model = Parrot(1, 1)
    model.text = "10."
    asked = [{"prompt": "5+5=", "answer": 10}, {"prompt": "10-0=", "answer": 10},
             {"prompt": "5+6=", "answer": 11}, {"prompt": "1+0=", "answer": 1}]
    assert problems.arithmetic_accuracy(model, TOKENIZER, asked) == 0.5
    model.text = "The answer is 1."
    assert problems.exact_match(model, TOKENIZER, asked) == (0.25, ["The answer is 1."] * 4)
    assert problems.exact_match(model, TOKENIZER, []) == (None, [])
    for text, answer in (("2+2=4. The answer is 24.", 24), ("The answer is 24", 24), ("24", None),
                         ("The answer is 12.5.", None), ("The answer is 1,234.", None)):
        assert problems.final_answer(text) == answer
        assert problems.is_right({"answer": 24}, text) is (answer == 24)

# ---- what pages say ------------------------------------------------------------------------------

def page(name):
    return (HERE / name).read_text(encoding="utf-8")

def test_the_readme_of_data_begins_with_a_problem_and_tells_every_template():
    text = page("data/README.md")
    line = int(re.search(r"\(line (\d+) of `train.jsonl`\)", text)[1])
    shown = re.findall(r"^(prompt|completion) +(.+)$", text, re.M)
    problem = SPLITS["train"][line - 1]
    assert shown == [(key, problem[key].strip()) for key in ("prompt", "completion")]
    templates = {template.__name__: template for template in make_data.TEMPLATES}
    for names, formulas in re.findall(r"^\| (`\w+_\w+`.*?) \|.*\| (a .*) \|$", text, re.M):
        signs = [formula.replace("±", "{}") for formula in formulas.split(", ")]
        told = [formula.format(*choice) for formula in signs
                for choice in itertools.product("+-", repeat=formula.count("{}"))]
        for name, formula in zip(re.findall(r"\w+", names), told, strict=True):
            _, steps = templates.pop(name)(make_data.Scene(random.Random(0)), 50, 20, 7)
            assert make_data.evaluate(*steps[1]) == eval(formula, {"a": 50, "b": 20, "c": 7}), name
    assert not templates

def test_the_readme_of_data_has_the_numbers_of_the_data():
    text = page("data/README.md")
    base = json.loads(page("evidence/results/toy/comparison.json"))["base"]
    solved = [f"{base[key]:.1%} of" for key in ("arithmetic_accuracy", "test_exact_match")]
    assert re.findall(r"\d+\.\d%  ?of", text) == solved
    held_out = page("data/pretrain_val.txt").count("\n")
    for words in (f"the {len(EQUATIONS):,} equations", f"| {held_out} documents",
                  "{train:,}, {val} and {test} two-step".format(**make_data.SIZES)):
        assert words in text

def test_the_first_page_is_short_says_soon_that_it_does_not_help_and_links_to_what_exists():
    text = page("README.md")
    assert len(text.split()) <= 1800 and "Not in our tests" in " ".join(text.split()[:60])
    for name in ("README.md", "data/README.md", "data/vectors/README.md"):
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", page(name)):
            assert ((HERE / name).parent / path).exists(), (name, path)
    lines = re.findall(r"\[`(\w+\.py)`\]\(.*\| (\d+) \|", text)
    assert lines == [(name, str(page(name).count("\n"))) for name in ("nalora.py", "train_tiny.py")]
    settings = re.search(r"NALoRAConfig\(.*?\)", text)[0]
    assert eval(settings, {"NALoRAConfig": NALoRAConfig}) == NALoRAConfig()
    fields = dict(re.findall(r"(\w+)=([^,)]+)", settings))
    assert fields.keys() == vars(NALoRAConfig()).keys()

# ---- runs.py -------------------------------------------------------------------------------------

def test_what_is_recorded_of_an_ffn():
    before, now = ({"a": State(None, torch.tensor(m), math.nan, math.nan, 1.0)}
                   for m in ([True, False, True, False], [False, True, True, False]))
    wanted = {"k_hat": None, "occupancy": None, "scale": 1.0, "density": 0.5, "turnover": 0.5}
    assert runs.layer_records(now, before) == {"a": wanted}
    assert runs.layer_records(now, None) == {"a": {**wanted, "turnover": None}}
    record = {"step": 1, "loss": 1, "val_loss": 1, "layers": {"a": wanted, "b": wanted}}
    assert runs.progress(record, 2).endswith("k_hat nan to nan  scale 1.00 to 1.00  rows 50%")

def test_the_best_device_is_taken_unless_one_is_named(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert train_tiny.best_device() == best and train_tiny.best_device("cpu") == "cpu"

def test_the_figures_show_every_record_and_layer(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: found.append(figure))
    layers = [{n: dict(k_hat=x, occupancy=x / 2, scale=1 / x, turnover=x / 4) for n, x in pair}
              for pair in ((("a", 1.1), ("b", 1.25)), (("a", 1.2), ("b", 1.25)))]
    records = [{"step": 0, "val_loss": 2.5},
               {"step": 10, "loss": 1.5, "val_loss": 1.0, "layers": layers[0]},
               {"step": 20, "loss": 0.75, "val_loss": 0.5, "layers": layers[1]}]
    train_tiny.draw_loss({"lora": records, "nalora": records}, tmp_path)
    runs.draw_layers(records, tmp_path)
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
              for line in found[0].axes[0].get_lines()}
    assert points["lora, validation"] == ([0, 10, 20], [2.5, 1.0, 0.5])
    assert points["nalora, training"] == ([5, 15], [1.5, 0.75])
    for ax, key in zip(found[1].axes, ("k_hat", "scale", "occupancy", "turnover")):
        a, b = ax.get_lines()[:2]
        assert list(a.get_ydata()) == [layer["a"][key] for layer in layers]
        assert list(b.get_xdata()) == [10, 20] and a.get_color() != b.get_color()
        assert (len(ax.get_lines()) == 3) == (key in ("k_hat", "scale"))  # a line at 1
