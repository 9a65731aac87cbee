"""Small promises of train_tiny.py and data/problems.py, which mutants once broke unseen."""

import base64
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from data import problems
from test_nalora import (
    base,  # noqa: F401
    batch,
    lora_llama,
    one_thread,  # noqa: F401
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
