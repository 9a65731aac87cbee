"""The executable specification of data/runs.py and of train_tiny.py's command line: what a run
keeps, refuses and survives."""
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

import nalora
import train_tiny
from data import problems, runs
from nalora import Llama, LlamaConfig, NALoRAConfig
from test_nalora import arguments, at_step, result, succeeds

HERE = Path(__file__).resolve().parent.parent

def refused(capsys, argv, message):
    """Exit code 2 and one sentence that the message (a regular expression) is found in."""
    capsys.readouterr()
    assert train_tiny.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error

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
    refused(capsys, ["--sample", "--out", tmp_path], "holds several runs: name one")
    assert [runs.cell(x).strip() for x in (None, 1234567, 0.12345)] == ["-", "1,234,567", "0.123"]

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
