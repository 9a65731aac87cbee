"""The executable specification of train_tiny.py and data/: to be merged into test_nalora.py."""
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import nalora
import train_tiny
from data import make_data, problems, runs
from nalora import Llama, LlamaConfig, NALoRAConfig, State

HERE = Path(__file__).resolve().parent

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

# ---- data ----------------------------------------------------------------------------------------

TOKENIZER = problems.load_tokenizer()
END = TOKENIZER.eot_token
SPLITS = {split: problems.read_problems(HERE / "data" / f"{split}.jsonl")
          for split in problems.SPLITS}
PROBLEMS = [p for split in SPLITS.values() for p in split]
EQUATIONS = problems.read_problems(HERE / "data" / "arithmetic.jsonl")
TEXT = (HERE / "data" / "pretrain.txt").read_text()

def test_the_tokenizer_gives_a_text_back_and_reads_digit_by_digit():
    for text in ("Ann has 12 apples.\n12+5=17.", "", "naïve café 東京 🙂 \x00\t", "<|endoftext|>"):
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
    documents = TEXT.splitlines()
    assert not re.search(r"answer is [0-9]", TEXT)
    assert not any(d.partition("?")[2].count("=") > 1 for d in documents)  # no two-step question
    equations = "\n".join(d for d in documents if d[0].isdigit())
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

# ---- train_tiny.py -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """A random base model that trains in no time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(640, 32, 48, 2, 2, 1, max_position_embeddings=256, initializer_range=0.1,
                         tie_word_embeddings=True)
    train_tiny.save_model(Llama(config), path)
    return path

@pytest.fixture
def base(random_base, monkeypatch):
    """The same, with a smaller pre-training, fewer problems, a shorter text and no figures."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    read = problems.read_problems
    windows = problems.text_batches
    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, **small})
    monkeypatch.setattr(problems, "read_problems", lambda path: read(path)[:60])
    monkeypatch.setattr(problems, "text_batches", lambda tokenizer, path, *more: windows(
        tokenizer, path.with_name("pretrain_val.txt"), *more))
    for name in ("draw_loss", "draw_layers"):
        monkeypatch.setattr(runs, name, lambda what, path: runs.write_files(path.parent, {
            path.name: b"drawn"}))
    return random_base

def arguments(base, out, method="nalora", *more):
    fine = [] if method == "pretrain" else ["--base", str(base)]
    return ["--method", method, "--out", str(out), "--threads", "1", "--test-size", "4", "--steps",
            "6", "--eval-every", "2", "--batch-size", "4", *fine, *map(str, more)]

def succeeds(argv):
    assert train_tiny.main(list(map(str, argv))) == 0

def refused(capsys, argv, message):
    """Exit code 2 and one sentence that the message (a regular expression) is found in."""
    capsys.readouterr()
    assert train_tiny.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error

def read(path):
    return json.loads(path.read_text())

def result(out):
    """What must not depend on interruptions: file name -> bytes."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*"))
            if p.is_file() and p.name not in ("summary.json", "checkpoint.pt")}

@pytest.fixture(scope="session")
def uninterrupted(random_base, tmp_path_factory):
    """uninterrupted(method): what a run without interruptions leaves behind."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def of(method):
        succeeds(arguments(random_base, folder / method, method))
        return result(folder / method)

    return of

@pytest.mark.parametrize("method", train_tiny.METHODS)
def test_every_method_runs_and_reports(base, tmp_path, capsys, method):
    run = tmp_path / "run"
    succeeds(arguments(base, run, method))
    out = capsys.readouterr().out
    summary = read(run / "summary.json")
    records = runs.read_records(run)
    assert summary["method"] == method and summary["val_loss"] == records[-1]["val_loss"]
    assert [r["step"] for r in records] == [0, 2, 4, 6]
    assert f"step    0/6  val_loss {records[0]['val_loss']:.4f}\n" in out  # the base's own
    assert f"step    6/6  loss {records[3]['loss']:.4f}  val_loss" in out and "0 s left" in out
    assert f"{method}: exact match {summary['test_exact_match']:.3f} on 4 test problems" in out
    assert len(re.findall(r"\[(?:right|wrong)", out)) == 3
    steered = method.startswith("nalora")
    rows = "100%" if method == "nalora-scale" else "50%"
    line = rf"k_hat \d\.\d\d to \d\.\d\d  scale \d\.\d\d to \d\.\d\d  rows {rows}"
    assert bool(re.search(line, out)) == steered == ("2 FFNs are steered" in out)
    assert ("layers" in records[1]) == (run / "nalora.png").exists() == steered
    file = "model/model" if method in ("full", "pretrain") else "adapter/adapter_model"
    tensors = load_file(run / f"{file}.safetensors").values()
    assert {t.dtype for t in tensors} == {torch.half if method == "pretrain" else torch.float}
    succeeds(["--sample", "Ann has 3 apples.", "--out", run])
    assert capsys.readouterr().out.startswith("Ann has 3 apples.\n")

def test_methods_and_optimizers_are_what_the_settings_say(base):
    c = train_tiny.Config(keep=0.25, ema=0.5, stride=3, lr=0.5, weight_decay=0.25, beta2=0.75)
    for method, parts in {"nalora": {}, "nalora-mask": {"scale": "none"}, "lora": None,
                          "nalora-scale": {"mask": "none"}, "full": None, "pretrain": None}.items():
        optimizer, steering = train_tiny.METHODS[method](Llama.from_pretrained(base), c)
        groups = optimizer.param_groups
        assert [g["weight_decay"] for g in groups] == [0.25, 0.0][:1 + (method[0] in "fp")]
        assert sum(len(g["params"]) for g in groups) == (20 if method[0] in "fp" else 28)
        assert [groups[0][k] for k in ("lr", "betas", "fused")] == [0.5, (0.9, 0.75), True]
        wanted = parts is not None and NALoRAConfig(keep=0.25, ema=0.5, stride=3, **parts)
        assert (steering and steering.config) == (wanted or None)
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 2.0}]
    sgd = train_tiny.make_optimizer(groups, train_tiny.Config(optimizer="sgd", momentum=0.125))
    assert type(sgd) is torch.optim.SGD and sgd.param_groups[0]["momentum"] == 0.125
    assert sgd.param_groups[0]["lr"] == 2.0

def test_the_training_loop_is_a_plain_one(base):
    c = train_tiny.Config(method="full", base=str(base), steps=6, batch_size=4, lr=2e-2, warmup=0.5)
    run = train_tiny.set_up(c)
    losses = list(train_tiny.training_loop(run))
    model = Llama.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for step, share in enumerate((1 / 3, 2 / 3, 1, 1, 0.75, 0.25)):  # three up, a cosine down
        tokens, targets, _ = run.batches(step)
        optimizer.param_groups[0]["lr"] = 2e-2 * share
        loss = nn.functional.cross_entropy(model(tokens)[0].transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(run.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert train_tiny.schedule(train_tiny.Config(steps=1), 0) == 1

def test_padding_is_shown_and_each_phase_has_its_mode(base, monkeypatch):
    run = train_tiny.set_up(train_tiny.Config(base=str(base), steps=3, batch_size=4, test_size=1,
                                              dtype="bfloat16"))
    run.model.eval()
    padded = 0
    for step, _ in enumerate(train_tiny.training_loop(run)):
        assert torch.equal(run.nalora.token_mask, run.batches(step)[2]) and run.model.training
        padded += (~run.batches(step)[2]).sum().item()
    assert step == 2 and padded > 0 and run.nalora.steps == 3
    monkeypatch.setattr(problems, "mean_loss", lambda model, batches: batches is run.validation
                        and torch.is_autocast_enabled("cpu") and not model.training)
    assert train_tiny.validate(run, 1) is True
    run.model.train()
    assert set(train_tiny.test(run)) == {"arithmetic_accuracy", "test_exact_match"}
    assert not run.model.training

@pytest.mark.parametrize("flag", [
    "--seed 1", "--lr 0.01", "--batch-size 5", "--train-size 8", "--rank 2", "--alpha 4",
    "--targets gate_proj up_proj", "--keep 0.2", "--dtype bfloat16", "--steps 5"])
def test_every_flag_changes_the_adapter(base, tmp_path, uninterrupted, flag):
    succeeds(arguments(base, tmp_path / "run", "nalora", *flag.split()))
    name = "adapter/adapter_model.safetensors"
    assert result(tmp_path / "run")[name] != uninterrupted("nalora")[name]

def test_what_is_recorded_of_an_ffn():
    nan = torch.tensor(math.nan)
    before, now = ({"a": State(nan, torch.tensor(m), nan, nan, torch.tensor(1.0))}
                   for m in ([True, False, True, False], [False, True, True, False]))
    wanted = {"k_hat": None, "occupancy": None, "scale": 1.0, "density": 0.5, "turnover": 0.5}
    assert runs.layer_records(now, before) == {"a": wanted}
    assert runs.layer_records(now, None) == {"a": {**wanted, "turnover": None}}
    record = {"step": 1, "loss": 1, "val_loss": 1, "layers": {"a": wanted, "b": wanted}}
    assert runs.progress(record, 2).endswith("k_hat nan to nan  scale 1.00 to 1.00  rows 50%")

def test_all_three_train_and_stand_in_one_table(base, tmp_path, capsys):
    out = tmp_path / "all"
    succeeds(arguments(base, out, "all", "--keep", "0.25"))
    said = capsys.readouterr().out
    assert all(re.search(rf"^{m} +[\d.]+ ", said, re.M) for m in ("full", "lora", "nalora"))
    assert read(out / "full" / "config.json")["lr"] == 2e-3
    wanted = result(out)
    shutil.rmtree(out / "nalora")  # as if it had been killed before
    succeeds(["--resume", "--out", out])
    assert capsys.readouterr().out.count("is finished already") == 2 and result(out) == wanted
    assert read(out / "nalora" / "config.json")["keep"] == 0.25
    refused(capsys, ["--sample", "--out", out], "holds no finished run")
    assert [runs.cell(x).strip() for x in (None, 1234567, 0.12345)] == ["-", "1,234,567", "0.123"]

# ---- interruptions ---------------------------------------------------------------------------

def at_step(monkeypatch, at, act):
    """Lets the training loop do something at a step."""
    rate = train_tiny.schedule
    monkeypatch.setattr(train_tiny, "schedule",
                        lambda c, step: act() if step == at else rate(c, step))

def interrupt():
    raise KeyboardInterrupt

@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, m) for m in train_tiny.METHODS)])
def test_ctrl_c_and_resume_are_bit_identical(base, uninterrupted, tmp_path, monkeypatch, capsys,
                                             method, at):
    wanted = uninterrupted(method)
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        at_step(patch, at, interrupt)
        assert train_tiny.main(arguments(base, out, method)) == 130
    assert f"python train_tiny.py --resume --out {out} goes on" in capsys.readouterr().err
    torch.set_num_threads(2)
    succeeds(["--resume", "--out", out])  # all else, and the threads, are in config.json
    assert result(out) == wanted and torch.get_num_threads() == 1

def test_kill_9_and_resume_are_bit_identical(random_base, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    mortal = ("import os, sys, train_tiny as t; rate = t.schedule; t.schedule = lambda c, step: "
              "os.kill(os.getpid(), 9) if step == 3 else rate(c, step); t.main(sys.argv[1:])")
    argv = [sys.executable, "-c", mortal, *arguments(random_base, out), "--train-size", "40"]
    assert subprocess.run(argv, cwd=HERE).returncode == -signal.SIGKILL
    assert (out / "checkpoint.pt").exists() and not (out / "adapter").exists()
    succeeds(["--resume", "--out", out])
    succeeds([*arguments(random_base, tmp_path / "whole"), "--train-size", "40"])
    assert result(out) == result(tmp_path / "whole")

@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "metrics.jsonl", "loss.png",
                                  "adapter_model.safetensors", "summary.json"])
def test_a_death_while_a_file_is_written_costs_nothing(base, uninterrupted, tmp_path, monkeypatch,
                                                       name):
    def dying(folder, files, write=nalora.write_files):
        if name in files:
            (Path(folder) / f"{name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt  # as kill -9: nothing is caught between this and main
        write(folder, files)

    command = arguments(base, tmp_path / "cut")
    (tmp_path / "cut" / "adapter").mkdir(parents=True)
    (tmp_path / "cut" / "adapter").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_files", dying)
        patch.setattr(nalora, "write_files", dying)
        patch.setattr(Path, "write_bytes", lambda path, b, write=Path.write_bytes: (
            path.parent.mkdir(exist_ok=True), write(path, b)))
        assert train_tiny.main(command) == 130
    succeeds([*command, "--resume"])
    assert result(tmp_path / "cut") == uninterrupted("nalora")

@pytest.mark.parametrize("every, stops_at, kept", [
    ("1", "validation loss is not finite at step 4", 3), ("3", "gradient is not finite at", 1)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        base, tmp_path, capsys, monkeypatch, every, stops_at, kept):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: 1e28)
        refused(capsys, arguments(base, out, "lora", "--eval-every", every), stops_at)
    assert len(runs.read_records(out)) == kept + 1
    refused(capsys, ["--sample", "--out", out], "holds no finished run")
    succeeds(["--resume", "--out", out])

def test_a_run_is_not_overwritten_and_resume_goes_on_with_it_alone(base, tmp_path, capsys):
    out = tmp_path / "run"
    again = ["--resume", "--out", out]
    succeeds(arguments(base, out))
    before = result(out)
    refused(capsys, arguments(base, out), f"already holds a run.*--resume.*--out {out}-2")
    for change in ("--lr 0.1", "--method lora", "--threads 2", "--targets q_proj"):
        refused(capsys, [*again, *change.split()], f"{change.split()[0]} .* contradicts")
    (out / "loss.png").unlink()
    succeeds([*again, "--lr", "0.005"])  # finished: the figure alone is made
    assert "is finished already" in capsys.readouterr().out and result(out) == before
    content = (out / "checkpoint.pt").read_bytes()
    for damaged in (b"\x00" * 50, content[:2000] + b"x" + content[2001:]):
        (out / "checkpoint.pt").write_bytes(damaged)
        refused(capsys, again, "checkpoint.pt is no checkpoint of this run")
    settings = read(out / "config.json")
    with pytest.raises(ValueError, match="--seed 5 contradicts"):
        train_tiny.execute(train_tiny.Config(**{**settings, "seed": 5}), out, resume=True)
    for changed in ({**settings, "data": "x"}, {"method": "nalora"}):
        (out / "config.json").write_text(json.dumps(changed))
        refused(capsys, again, "another version")
    for argv in (["--resume"], ["--sample"]):
        refused(capsys, [*argv, "--out", tmp_path / "nowhere"], "holds no run")

def test_a_run_is_not_continued_on_other_data_or_another_base(base, tmp_path, capsys, monkeypatch):
    again = ["--resume", "--out", tmp_path / "run"]
    shutil.copytree(base, tmp_path / "base")
    succeeds(arguments(tmp_path / "base", tmp_path / "run", "lora"))
    monkeypatch.setattr(runs, "digest", lambda c, files, digest=runs.digest: {
        **digest(c, files), "train.jsonl": "other"})
    refused(capsys, again, "train.jsonl has changed since")
    monkeypatch.undo()
    model = Llama.from_pretrained(base)
    model.model.norm.weight.data[0] += 1e-3
    train_tiny.save_model(model, tmp_path / "base")
    refused(capsys, again, "model.safetensors has changed since")
    refused(capsys, ["--sample", "--out", tmp_path / "run"], "has changed since")

# ---- the command line ------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--rank 0", "rank"), ("--targets nothing", "nothing"), ("--targets q_proj", "FFN"),
    ("--keep 0", "keep"), ("--method lora --keep 0.5", "--keep has no effect with --method lora"),
    ("--method full --rank 4", "--rank has no effect"), ("--lr nan", "--lr is nan"),
    ("--method pretrain --train-size 5", "--train-size has no effect"), ("--lr -1", "--lr is -1"),
    ("--method nalora-scale --keep 0.2", "--keep has no effect"), ("--steps 0", "--steps is 0"),
    ("--batch-size -2", "--batch-size is -2"), ("--seed -1", "--seed is -1"), ("--alpha 0", "alpha"),
    (f"--seed {10**20}", "--seed is 1"), ("--threads 0", "--threads is 0"), ("--threads 9999", "is 9"),
    ("--device mps", "mps is not available"), ("--test-size -1", "--test-size is -1"),
    ("--method all --rank 0", "rank")])
def test_bad_flags(base, tmp_path, capsys, flags, message):
    method = "pretrain" if "pretrain" in flags else "nalora"
    refused(capsys, [*arguments(base, tmp_path / "run", method), *flags.split()], message)
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("kind", ["hub", "m.gguf", "pytorch_model.bin", "qwen", "broken",
                                  "model.safetensors.index.json", "vocabulary", "context"])
def test_a_base_that_is_none_is_answered_with_what_to_use(base, tmp_path, capsys, kind):
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    config = Llama.from_pretrained(base).config
    if "." in kind:  # weights of other kinds
        (folder / "model.safetensors").rename(folder / kind)
    if kind in ("vocabulary", "context"):
        size = {"vocabulary": {"vocab_size": 641}, "context": {"max_position_embeddings": 64}}[kind]
        train_tiny.save_model(Llama(LlamaConfig(**{**asdict(config), **size})), folder)
    if kind in ("qwen", "broken"):
        qwen = json.dumps({**asdict(config), "model_type": "qwen2"})
        (folder / "config.json").write_text(qwen if kind == "qwen" else "{")
    message = "config.json cannot be read" if kind == "broken" else "use nalora_hf, see nalora_hf/"
    for given in [folder / kind, folder] if "." in kind else ["no/hub" if kind == "hub" else folder]:
        refused(capsys, arguments(given, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()

def test_a_sample_is_asked_as_training_asked(base, tmp_path, capsys, monkeypatch):
    run = ["--out", tmp_path / "run", "--sample"]
    succeeds([*arguments(base, tmp_path / "run"), "--test-size", "0"])
    assert read(tmp_path / "run" / "summary.json")["test_exact_match"] is None
    refused(capsys, [*run, "Ann " * 300], "exceed")
    asked = []
    monkeypatch.setattr(problems, "solve", lambda model, tokenizer, prompts: asked.append(
        (prompts, model.training)) or ["17"] * len(prompts))
    for prompt, wanted in (("How many?", ["How many? "]), (" 1 ", [" 1 "]),
                           ("", [p["prompt"] for p in SPLITS["test"][:3]])):
        succeeds([*run, prompt])
        assert asked.pop() == (wanted, False)

def test_the_best_device_is_taken_unless_one_is_named(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert train_tiny.best_device() == best and train_tiny.best_device("cpu") == "cpu"

@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_of_two_runs_that_start_at_once_one_is_refused(base, tmp_path, capsys, monkeypatch, more):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    set_up = train_tiny.set_up

    def slow(c, *rest):
        monkeypatch.setattr(train_tiny, "set_up", set_up)
        run = set_up(c, *rest)
        succeeds([*arguments(base, out, "lora"), "--seed", "1"])  # the other, from end to end
        return run

    monkeypatch.setattr(train_tiny, "set_up", slow)
    refused(capsys, [*arguments(base, out, "lora"), *more], "already holds a run|contradicts")
    assert read(out / "summary.json")["seed"] == 1

def test_a_figure_that_fails_costs_a_line(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "draw_loss", lambda *_: Path("no\nfonts").read_bytes())
    succeeds(arguments(base, tmp_path / "run"))
    assert re.fullmatch(r".*loss.png was not drawn: .*fonts'\n", capsys.readouterr().err)
    assert {"summary.json", "nalora.png"} <= {p.name for p in (tmp_path / "run").iterdir()}

def test_what_surrounds_a_run_changes_nothing(random_base, tmp_path):
    """RANK of a cluster, a notebook's MPLBACKEND, a terminal of ASCII, another working folder."""
    (tmp_path / "here").mkdir()
    command = [sys.executable, HERE / "train_tiny.py", *arguments(random_base, tmp_path / "run")]
    done = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True, env={
        **os.environ, "RANK": "1", "WORLD_SIZE": "", "MPLBACKEND": "module://none",
        "PYTHONIOENCODING": "ascii"}, cwd=tmp_path / "here")
    assert (done.returncode, done.stderr) == (0, "") and not any((tmp_path / "here").iterdir())
    assert (tmp_path / "run" / "nalora.png").read_bytes()[:4] == b"\x89PNG"
    assert not re.search("relpath|getcwd|cwd", (HERE / "data" / "problems.py").read_text())

def test_memory_that_does_not_suffice_is_said_and_a_bug_is_not(base, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(train_tiny, "set_up", fails)
    for error in (MemoryError(), RuntimeError("can't allocate memory: 4000 bytes.\nmore")):
        refused(capsys, arguments(base, tmp_path / "out"), "The memory does not suffice")
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny.main(arguments(base, tmp_path / "run"))

def test_the_figures_show_every_record_and_layer(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: found.append(figure))
    records = [{"step": 0, "val_loss": 2.5}, {"step": 10, "loss": 1.5, "val_loss": 1.0},
               {"step": 20, "loss": 0.75, "val_loss": 0.5}]
    for r in records[1:]:
        r["layers"] = {name: {"k_hat": x, "occupancy": x / 2, "scale": 1 / x, "turnover": x / 4}
                       for name, x in (("a", 1 + r["step"] / 100), ("b", 1.25))}
    train_tiny.draw_loss({"lora": records, "nalora": records}, tmp_path)
    runs.draw_layers(records, tmp_path)
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
              for line in found[0].axes[0].get_lines()}
    assert points["lora, validation"] == ([0, 10, 20], [2.5, 1.0, 0.5])
    assert points["nalora, training"] == ([5, 15], [1.5, 0.75])
    for ax, key in zip(found[1].axes, ("k_hat", "scale", "occupancy", "turnover")):
        a, b = ax.get_lines()[:2]
        assert list(a.get_ydata()) == [r["layers"]["a"][key] for r in records[1:]]
        assert list(b.get_xdata()) == [10, 20] and a.get_color() != b.get_color()
        assert (len(ax.get_lines()) == 3) == (key in ("k_hat", "scale"))  # a line at 1
