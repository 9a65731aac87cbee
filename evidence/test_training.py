"""Small promises of train_tiny.py and data/problems.py, which mutants once broke unseen."""

import base64
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from data import problems
from nalora import read_json
from test_nalora import (
    arguments,
    base,  # noqa: F401
    batch,
    lora_llama,
    one_thread,  # noqa: F401
    refused,
    succeeds,
    tiny_pretraining,  # noqa: F401
)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", float("inf")),
        ("momentum", 1),
        ("beta2", 1.0),
        ("grad_clip", 0),
        ("threads", 1025),
    ],
)
def test_a_setting_of_no_use_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"{train_tiny.dashed(name)} is {value}: give a number"):
        train_tiny.Config(**{name: value})


@pytest.mark.parametrize(
    "given, said, answer, right",
    [
        ("The answer is 5.", "The answer is: 5", 5, True),
        ("The answer is 5.", "The answer is = 5", 5, True),
        ("x", "a1 is 7, not b2", 7, True),
    ],
)
def test_a_number_is_read_behind_a_colon_and_is_no_part_of_a_name(given, said, answer, right):
    problem = {"prompt": "?", "completion": given, "answer": answer}
    assert problems.is_right(problem, said) is right


def test_the_split_of_a_file_stays_as_it_was(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [json.dumps({"prompt": f"{i}=", "completion": f"{i}"}) for i in range(20)]
    path.write_text("\n".join(rows))
    splits = problems.read_splits(path)
    assert [[p["line"] for p in splits[s]] for s in ("test", "val")] == [[5, 20], [7, 3]]


def test_a_prompt_has_a_token_at_least():
    tokenizer = SimpleNamespace(eot_token=7, opening=[], encode_ordinary=lambda text: [])
    assert problems.encode_prompt(tokenizer, "") == [7]


def test_every_document_stands_between_ends(tmp_path):
    tokenizer = problems.load_tokenizer()
    end = tokenizer.eot_token
    path = tmp_path / "text.txt"
    path.write_text("1\n23\n")
    one, two, three = tokenizer.encode_ordinary("123")
    assert problems.encode_text(tokenizer, path) == [end, one, end, two, three, end]
    path.write_text("1" * 127)
    assert problems.text_windows(tokenizer, path).shape == (1, 129)
    path.write_text("1" * 126)
    with pytest.raises(ValueError, match="has 128 tokens: at least 129 are needed"):
        problems.text_windows(tokenizer, path)


def test_an_answer_may_have_decimals(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "?", "completion": "12.5", "answer": 12.5}')
    assert problems.read_problems(path)[0]["answer"] == 12.5


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_tells_of_half_a_character(tmp_path, monkeypatch, capsys, rank):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "\\ud83d", "completion": "1", "answer": 1}')
    monkeypatch.setenv("RANK", rank)
    problems.read_problems(path)
    assert ("half a character" in capsys.readouterr().err) == (rank == "0")


def test_a_tokenizer_that_lacks_a_byte_is_refused(tmp_path):
    tokens = [bytes([b]) for b in range(255)] + [b"aa"]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
    (tmp_path / "tokenizer.tiktoken").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a byte is missing"):
        problems.load_tokenizer(tmp_path)


def test_the_mean_loss_is_over_targets_not_over_batches():
    model = lora_llama()
    tokens, targets = batch(0)
    few = targets.clone()
    few[:, 1:] = -100
    both = torch.cat((tokens, tokens)), torch.cat((targets, few)), None
    apart = train_tiny.mean_loss(model, [(tokens, targets, None), (tokens, few, None)])
    assert apart == pytest.approx(train_tiny.mean_loss(model, [both]), rel=1e-5)


def test_the_warm_up_is_rounded_and_one_step_is_enough():
    assert train_tiny.schedule(train_tiny.Config(steps=50), 0) == 0.5
    assert train_tiny.schedule(train_tiny.Config(steps=1), 0) == 1


def test_what_is_recorded_of_an_ffn():
    nan = float("nan")
    before, now = (
        {"mask": torch.tensor(m), "k_hat": nan, "occupancy": nan, "scale": 1.0}
        for m in ([True, False, True, False], [False, True, True, False])
    )
    record = train_tiny.layer_record(now, before)
    assert record == {
        "k_hat": None,
        "occupancy": None,
        "scale": 1.0,
        "density": 0.5,
        "turnover": 0.5,
    }
    whole = {**record, "density": 1.0}
    line = train_tiny.progress(
        {"step": 1, "loss": 1, "val_loss": 1, "layers": {"a": record, "b": whole}}, 2
    )
    assert line.endswith("k_hat nan to nan  scale 1.00 to 1.00  rows 75%")


def test_a_cell_of_the_table():
    assert [train_tiny.cell(x) for x in (None, 1234567, 0.12345)] == ["-", "1,234,567", "0.123"]


def own_data(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_all_of_the_validation_problems_count(base, tmp_path):
    rows = [{"prompt": f"{i}=" if i % 2 else f"{i}", "completion": "1"} for i in range(600)]
    data = own_data(tmp_path / "own.jsonl", rows)
    run = train_tiny.set_up(train_tiny.Config(data=data, base=str(base)))
    assert sum(len(tokens) for tokens, *_ in run.validation) == 60
    rows = [{"prompt": f"{i}" + " \n"[i % 2], "completion": "1"} for i in range(100)]
    data = own_data(tmp_path / "own.jsonl", rows)
    assert train_tiny.set_up(train_tiny.Config(data=data, base=str(base))).ending is None


def test_a_problem_may_fill_the_context(base, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "1"} for i in range(10, 30)]
    data = own_data(tmp_path / "own.jsonl", rows)
    line = problems.read_splits(Path(data))["val"][0]["line"]
    for digits, fits in ((253, True), (254, False)):  # end, two digits, these, end
        rows[line - 1]["completion"] = "1" * digits
        own_data(tmp_path / "own.jsonl", rows)
        c = train_tiny.Config(data=data, base=str(base), method="lora")
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="257 tokens"):
            train_tiny.set_up(c)


# ---- batches and prompts ----


def test_a_batch_holds_problems_of_like_length_and_each_epoch_its_own_order():
    lengths = [2 + 7 * i % 16 for i in range(16)]  # eight batches of two
    encoded = [([i] * length, 1) for i, length in enumerate(lengths)]
    batches = problems.problem_batches(encoded, 2, 0, 99)
    epochs = [[batches(8 * epoch + i)[0] for i in range(8)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(tokens.size(1) for tokens in epoch) == [2, 4, 6, 8, 10, 12, 14, 16]
        assert sorted(row for tokens in epoch for row in tokens[:, 0].tolist()) == list(range(16))
    orders = [[tokens.size(1) for tokens in epoch] for epoch in epochs]
    assert orders[0] != orders[1] and sorted(orders[0]) not in orders


def test_a_window_of_text_is_learnt_token_for_token_and_drawn_by_the_seed():
    path = problems.DATA / "pretrain_val.txt"
    tokenizer = problems.load_tokenizer()
    drawn = [
        problems.text_batches(tokenizer, path, 4, seed)(step) for seed, step in ((0, 0), (1, 0))
    ]
    for tokens, targets, mask in drawn:
        assert tokens.shape == targets.shape == mask.shape == (4, 128) and mask.all()
        assert torch.equal(tokens[:, 1:], targets[:, :-1]) and not torch.equal(tokens, targets)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_as_many_problems_are_read_as_are_asked_for(base):
    c = train_tiny.Config(base=str(base), method="lora", train_size=3, test_size=4)
    run = train_tiny.set_up(c)
    assert len(run.problems) == len(run.equations) == 4 and len(run.batches(0)[0]) == 3
    with pytest.raises(ValueError, match="16 problems, a batch, cannot be shared evenly by 3"):
        train_tiny.set_up(train_tiny.Config(base=str(base), method="lora", ranks=3))
    run = train_tiny.set_up(train_tiny.Config(method="pretrain", base="", batch_size=3000))
    assert [t.shape[1] for t in run.validation[0][:2]] == [128, 128]  # windows of text
    assert len(run.batches(0)[0]) == 3000  # more than there are problems


def test_an_answer_may_be_as_long_as_the_longest_in_training():
    rows = {
        split: [{"prompt": "1=", "completion": "1" * n, "line": 1}]
        for split, n in (("train", 40), ("val", 50), ("test", 60))
    }
    tokenizer = problems.load_tokenizer()
    assert problems.encode_splits(tokenizer, rows, problems.DATA, 99)[1] == 41


def test_what_a_sample_asks():
    asked = problems.sample_prompts(problems.DATA, "", None)
    assert asked == [p["prompt"] for p in problems.read_problems(problems.DATA / "test.jsonl")[:3]]
    assert problems.sample_prompts(problems.DATA, "half \ud83d", None) == ["half \ufffd"]


# ---- a run ----


def test_a_step_is_timed_without_what_comes_between_steps(base, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(train_tiny, "time", clock)
    c = train_tiny.Config(base=str(base), method="lora", steps=4, batch_size=4, eval_every=9)
    records, times = train_tiny.train(train_tiny.set_up(c), tmp_path, [])
    assert times == [1] * 4 and [r["step"] for r in records] == [4]


def test_a_gradient_that_is_not_finite_stops_a_run(base, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    run = train_tiny.set_up(train_tiny.Config(base=str(base), method="lora"))
    with pytest.raises(train_tiny.Diverged, match="at step 1"):
        next(train_tiny.training_loop(run))


def test_what_is_written_of_a_trained_model(base, tmp_path):
    run = train_tiny.set_up(train_tiny.Config(method="pretrain", base=""))
    train_tiny.save_results(run, tmp_path)
    assert read_json(tmp_path / "model" / "config.json")["torch_dtype"] == "float16"
    run = train_tiny.set_up(train_tiny.Config(base=str(base), method="lora"))
    train_tiny.save_results(run, tmp_path)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base)
    assert read_json(tmp_path / "adapter" / "nalora.json")["settings"] == run.settings


def test_all_three_say_once_what_they_are_and_go_on(base, tmp_path, capsys):
    argv = arguments(base, tmp_path / "all", "all")
    succeeds(argv)
    out = capsys.readouterr().out
    assert out.count("NALoRA steers") == 1
    first = problems.read_problems(problems.DATA / "test.jsonl")[:3]
    assert all(out.count(p["prompt"].strip()) == 3 for p in first)
    assert (tmp_path / "all" / "loss.png").exists()
    refused(capsys, argv, "already holds a run")
    succeeds([*argv, "--resume"])
    assert capsys.readouterr().out.count("is finished already") == 3


@pytest.mark.parametrize("key", ["prompt_ending", "max_new_tokens", "digest"])
def test_a_run_of_another_version_is_not_asked(tmp_path, capsys, key):
    (tmp_path / "config.json").write_text(json.dumps({"method": "lora", "base": "", "data": ""}))
    summary = {k: "" for k in ("prompt_ending", "max_new_tokens", "digest") if k != key}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    refused(capsys, ["--sample", "--out", tmp_path], "of another version")


# ---- the command line ----


def settings_of(*argv, method="nalora"):
    return train_tiny.resolve(train_tiny.command_line().parse_args(argv), method)


def test_what_is_not_given_follows_from_the_rest(tmp_path):
    toy = str(problems.DATA / "base")
    assert settings_of().base == settings_of("--data", str(tmp_path / "own.jsonl")).base == toy
    assert settings_of("--data", str(tmp_path)).base == str(tmp_path / "base")
    assert settings_of(method="pretrain").base == ""
    torch.set_num_threads(2)
    assert settings_of().threads == 2


def test_the_best_device_is_taken_unless_one_is_named(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert train_tiny.best_device() == best and train_tiny.best_device("cpu") == "cpu"


@pytest.mark.parametrize("flags", [["--resume"], ["--sample"]])
def test_a_run_and_a_sample_have_their_threads_and_their_folder(monkeypatch, flags):
    found = []

    def note(out):
        found.append((out, torch.get_num_threads()))

    monkeypatch.setattr(train_tiny, "execute", lambda c, out, resume: note(out) or resume)
    monkeypatch.setattr(train_tiny, "sample", lambda out, prompt: note(out))
    assert train_tiny.main(["--method", "lora", "--threads", "2", *flags]) == 0
    assert found == [(Path("runs/lora"), 2)]
    assert train_tiny.main(["--method", "lora", "--threads", "0", *flags]) == 2 and len(found) == 1


def test_a_bug_is_not_told_as_a_sentence(base, tmp_path, monkeypatch):
    def set_up(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_tiny, "set_up", set_up)
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny.main(arguments(base, tmp_path / "run"))


@pytest.mark.parametrize("argv", [["--method", "all"], ["--sample"]])
def test_ranks_train_one_method(argv):
    with pytest.raises(ValueError, match="torchrun trains one method"):
        train_tiny.join_ranks(train_tiny.command_line().parse_args(argv))
