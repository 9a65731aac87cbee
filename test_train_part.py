"""The executable specification of train_tiny.py and data/runs.py."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import nalora
import train_tiny
from data import problems, runs
from nalora import Llama, LlamaConfig, NALoRAConfig

HERE = Path(__file__).resolve().parent

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

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
    read, batches, windows = problems.read_problems, problems.text_batches, problems.text_windows
    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, **small})
    monkeypatch.setattr(problems, "MAX_NEW", 8)
    monkeypatch.setattr(problems, "read_problems", lambda path: read(path)[:40])
    monkeypatch.setattr(problems, "text_batches", lambda tokenizer, path, *more: batches(
        tokenizer, path.with_name("pretrain_val.txt"), *more))
    monkeypatch.setattr(problems, "text_windows", lambda *of: windows(*of)[:8])
    for draw in ("draw_loss", "draw_layers"):
        monkeypatch.setattr(runs, draw, lambda _, p: runs.write_files(p.parent, {p.name: b"drawn"}))
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
    summary = runs.read_json(run / "summary.json")
    records = runs.read_records(run)
    assert summary["method"] == method and summary["val_loss"] == records[-1]["val_loss"]
    assert [r["step"] for r in records] == [0, 2, 4, 6]
    assert f"step    0/6  val_loss {records[0]['val_loss']:.4f}\n" in out  # the base's own
    assert f"step    6/6  loss {records[3]['loss']:.4f}  val_loss" in out and "0 s left" in out
    assert f"{method}: exact match {summary['test_exact_match']:.3f} on 4 test problems" in out
    assert len(re.findall(r"\[(?:right|wrong)", out)) == 3
    steered = method.startswith("nalora")
    line = f"k_hat 1... to 1...  scale [01]... to [01]...  rows {100 if 'scale' in method else 50}%"
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
        whole = method in ("full", "pretrain")
        assert [g["weight_decay"] for g in groups] == ([0.25, 0.0] if whole else [0.25])
        assert sum(len(g["params"]) for g in groups) == (20 if whole else 28)
        assert [groups[0][k] for k in ("lr", "betas")] == [0.5, (0.9, 0.75)]
        assert steering is None if parts is None else steering.config == NALoRAConfig(
            keep=0.25, ema=0.5, stride=3, **parts)
    sgd = train_tiny.make_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 2.0}],
                                    train_tiny.Config(optimizer="sgd", momentum=0.125))
    assert [sgd.param_groups[0][k] for k in ("lr", "momentum")] == [2.0, 0.125]

def test_the_training_loop_is_a_plain_one(base):
    c = train_tiny.Config(method="full", base=str(base), steps=6, batch_size=4, lr=2e-2, warmup=0.5)
    run = train_tiny.set_up(c)
    losses = list(train_tiny.training_loop(run))
    model = Llama.from_pretrained(base)  # the same, written once more
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
    c = train_tiny.Config(base=str(base), steps=3, batch_size=4, test_size=1, dtype="bfloat16")
    run = train_tiny.set_up(c)
    run.model.eval()
    for step, _ in enumerate(train_tiny.training_loop(run)):
        assert torch.equal(run.nalora.token_mask, run.batches(step)[2]) and run.model.training
    assert not run.nalora.token_mask.all() and run.nalora.steps == 3
    monkeypatch.setattr(problems, "mean_loss", lambda model, batches: batches is run.validation
                        and torch.is_autocast_enabled("cpu") and not model.training)
    assert train_tiny.validate(run, 1) is True
    run.model.train()
    assert len(train_tiny.test(run)) == 2 and not run.model.training

@pytest.mark.parametrize("flag", [
    "--seed 1", "--lr 0.01", "--batch-size 5", "--train-size 8", "--rank 2", "--alpha 4",
    "--targets gate_proj up_proj", "--keep 0.2", "--dtype bfloat16", "--steps 5"])
def test_every_flag_changes_the_adapter(base, tmp_path, uninterrupted, flag):
    succeeds(arguments(base, tmp_path / "run", "nalora", "--test-size", "0", *flag.split()))
    name = "adapter/adapter_model.safetensors"
    assert result(tmp_path / "run")[name] != uninterrupted("nalora")[name]

def test_all_three_train_and_stand_in_one_table(base, tmp_path, capsys):
    succeeds(arguments(base, tmp_path, "all", "--keep", "0.25"))
    said = capsys.readouterr().out
    assert all(re.search(rf"^{m} +[\d.]+ ", said, re.M) for m in ("full", "lora", "nalora"))
    assert runs.read_json(tmp_path / "full" / "config.json")["lr"] == 2e-3
    wanted = result(tmp_path)
    shutil.rmtree(tmp_path / "nalora")  # as if it had been killed before
    succeeds(["--resume", "--out", tmp_path])
    assert capsys.readouterr().out.count("is finished already") == 2 and result(tmp_path) == wanted
    assert runs.read_json(tmp_path / "nalora" / "config.json")["keep"] == 0.25
    refused(capsys, ["--sample", "--out", tmp_path], "holds no finished run")
    assert [runs.cell(x).strip() for x in (None, 1234567, 0.12345)] == ["-", "1,234,567", "0.123"]

# ---- interruptions ---------------------------------------------------------------------------

def at_step(monkeypatch, at, act):
    """Lets the training loop do something at a step."""
    rate = train_tiny.schedule
    monkeypatch.setattr(train_tiny, "schedule",
                        lambda c, step: act() if step == at else rate(c, step))

@pytest.mark.parametrize("at, method", [(0, "nalora"), *((3, m) for m in train_tiny.METHODS)])
def test_ctrl_c_and_resume_are_bit_identical(base, uninterrupted, tmp_path, monkeypatch, capsys,
                                             method, at):
    wanted = uninterrupted(method)
    with monkeypatch.context() as patch:
        at_step(patch, at, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny.main(arguments(base, tmp_path, method)) == 130
    assert f"python train_tiny.py --resume --out {tmp_path} goes on" in capsys.readouterr().err
    torch.set_num_threads(2)  # config.json has the threads, and all else
    succeeds(["--resume", "--out", tmp_path])
    assert result(tmp_path) == wanted and torch.get_num_threads() == 1

def test_kill_9_and_resume_are_bit_identical(random_base, tmp_path):
    mortal = ("import os, sys, train_tiny as t; rate = t.schedule; t.schedule = lambda c, step: "
              "os.kill(os.getpid(), 9) if step == 3 else rate(c, step); t.main(sys.argv[1:])")
    argv = [sys.executable, "-c", mortal, *arguments(random_base, tmp_path / "cut")]
    assert subprocess.run(argv, cwd=HERE).returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    succeeds(["--resume", "--out", tmp_path / "cut"])
    succeeds(arguments(random_base, tmp_path / "whole"))
    assert result(tmp_path / "cut") == result(tmp_path / "whole")

@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "metrics.jsonl", "loss.png",
                                  "adapter_model.safetensors", "summary.json"])
def test_a_death_while_a_file_is_written_costs_nothing(base, uninterrupted, tmp_path, monkeypatch,
                                                       name):
    def dying(folder, files, write=nalora.write_files):
        if name in files:
            write(folder, {f"{name}.tmp": b"half"})
            raise KeyboardInterrupt  # as kill -9: nothing catches it before main
        write(folder, files)

    command = arguments(base, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_files", dying)
        patch.setattr(nalora, "write_files", dying)
        assert train_tiny.main(command) == 130
    succeeds([*command, "--resume"])
    assert result(tmp_path / "cut") == uninterrupted("nalora")

@pytest.mark.parametrize("every, stops_at, kept", [
    ("1", "validation loss is not finite at step 4", 3), ("3", "gradient is not finite at", 1)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        base, tmp_path, capsys, monkeypatch, every, stops_at, kept):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: 1e28)
        refused(capsys, arguments(base, tmp_path, "lora", "--eval-every", every), stops_at)
    assert len(runs.read_records(tmp_path)) == kept + 1
    refused(capsys, ["--sample", "--out", tmp_path], "holds no finished run")
    succeeds(["--resume", "--out", tmp_path])

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
    settings = runs.read_json(out / "config.json")
    with pytest.raises(ValueError, match="--seed 5 contradicts"):
        train_tiny.execute(train_tiny.Config(**{**settings, "seed": 5}), out, resume=True)
    for changed in ({**settings, "data": "x"}, {"method": "nalora"}):
        (out / "config.json").write_text(json.dumps(changed))
        refused(capsys, again, "another version")
    refused(capsys, ["--resume", "--out", tmp_path / "nowhere"], "holds no run")

def test_a_run_is_not_continued_on_other_data_or_another_base(base, tmp_path, capsys, monkeypatch):
    again = ["--resume", "--out", tmp_path / "run"]
    shutil.copytree(base, tmp_path / "base")
    succeeds(arguments(tmp_path / "base", tmp_path / "run", "lora"))
    monkeypatch.setattr(runs, "digest", lambda c, files, digest=runs.digest: {
        **digest(c, files), "train.jsonl": "other"})
    refused(capsys, again, "train.jsonl has changed since")
    monkeypatch.undo()
    torch.manual_seed(1)
    train_tiny.save_model(Llama(Llama.from_pretrained(base).config), tmp_path / "base")
    refused(capsys, again, "model.safetensors has changed since")
    refused(capsys, ["--sample", "--out", tmp_path / "run"], "has changed since")

# ---- the command line ------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--rank 0", "rank"), ("--targets nothing", "nothing"), ("--targets q_proj", "FFN"),
    ("--keep 0", "keep"), ("--method lora --keep 0.5", "--keep has no effect with --method lora"),
    ("--method full --rank 4", "--rank has no effect"), ("--lr nan", "--lr is nan"),
    ("--method pretrain --train-size 5", "--train-size has no effect"), ("--lr -1", "--lr is -1"),
    ("--method nalora-scale --keep 0.2", "--keep has no effect"), ("--steps 0", "--steps is 0"),
    ("--batch-size -2", "--batch-size is -2"), ("--seed -1", "--seed is -1"), ("--alpha 0", "al"),
    (f"--seed {10**20}", "--seed is 1"), ("--threads 0", "--threads is 0"),
    ("--threads 9999", "--threads is 9999"),
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
        size = {"vocabulary": {"vocab_size": 641}, "context": {"max_position_embeddings": 32}}[kind]
        train_tiny.save_model(Llama(LlamaConfig(**{**asdict(config), **size})), folder)
    if kind in ("qwen", "broken"):
        qwen = json.dumps({**asdict(config), "model_type": "qwen2"})
        (folder / "config.json").write_text(qwen if kind == "qwen" else "{")
    message = "config.json cannot be read" if kind == "broken" else "use nalora_hf, see nalora_hf/"
    refused(capsys, arguments("org/name" if kind == "hub" else folder, tmp_path / "run"), message)
    refused(capsys, arguments(folder / "m.gguf", tmp_path / "run"), "use nalora_hf, see nalora_hf/")
    assert not (tmp_path / "run").exists()

def test_a_sample_is_asked_as_training_asked(base, tmp_path, capsys, monkeypatch):
    run = ["--out", tmp_path / "run", "--sample"]
    test_problems = problems.read_problems(HERE / "data" / "test.jsonl")
    succeeds([*arguments(base, tmp_path / "run"), "--test-size", "0"])
    assert runs.read_json(tmp_path / "run" / "summary.json")["test_exact_match"] is None
    refused(capsys, [*run, "Ann " * 300], "exceed")
    asked = []
    monkeypatch.setattr(problems, "solve", lambda model, tokenizer, prompts: asked.append(
        (prompts, model.training)) or ["17"] * len(prompts))
    for prompt, wanted in (("How many?", ["How many? "]), (" 1 ", [" 1 "]),
                           ("", [p["prompt"] for p in test_problems[:3]])):
        succeeds([*run, prompt])
        assert asked.pop() == (wanted, False)

@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_of_two_runs_that_start_at_once_one_is_refused(base, tmp_path, capsys, monkeypatch, more):
    set_up = train_tiny.set_up

    def slow(*given):
        monkeypatch.setattr(train_tiny, "set_up", set_up)
        succeeds(arguments(base, tmp_path, "lora", "--seed", "1"))  # the other, from end to end
        return set_up(*given)

    monkeypatch.setattr(train_tiny, "set_up", slow)     # tmp_path is there and empty: that is fine
    refused(capsys, arguments(base, tmp_path, "lora", *more), "already holds a run|contradicts")
    assert runs.read_json(tmp_path / "summary.json")["seed"] == 1

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
        **os.environ, "RANK": "1", "WORLD_SIZE": "", "MPLBACKEND": "no_such_backend",
        "PYTHONIOENCODING": "ascii"}, cwd=tmp_path / "here")
    assert (done.returncode, done.stderr) == (0, "") and not any((tmp_path / "here").iterdir())
    assert (tmp_path / "run" / "nalora.png").read_bytes()[:4] == b"\x89PNG"
    assert not re.search("relpath|getcwd|cwd", (HERE / "data" / "problems.py").read_text())

def test_memory_that_does_not_suffice_is_said_and_a_bug_is_not(base, tmp_path, capsys, monkeypatch):
    said = iter([MemoryError(), RuntimeError("can't allocate memory\nmore"), RuntimeError("a bug")])
    monkeypatch.setattr(train_tiny, "set_up", lambda *_: (_ for _ in ()).throw(next(said)))
    for _ in range(2):
        refused(capsys, arguments(base, tmp_path / "out"), "The memory does not suffice")
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny.main(arguments(base, tmp_path / "run"))
