"""What finetune.py refuses: one sentence, exit code 2, nothing written."""
import json
import re
from pathlib import Path

import pytest

from nalora_hf.tests.test_finetune import TALKS, finetune, lines, make_model, sums

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(lines(sums()))
    return str(path)

def row(**changes):
    return lines(sums(2)) + json.dumps({**sums(1)[0], **changes}) + "\n"

@pytest.mark.parametrize("content, said", [
    (None, "The data file .*rows.jsonl cannot be read: No such file or directory."),
    ("", "rows.jsonl holds no rows"),
    (lines([{"question": "a", "answer": "b"}]), "has the columns question, answer, but prompt and"),
    ("{\n", "Line 1 of .*rows.jsonl is not valid JSON"),
    ("[1, 2]", "Row 1 of .*rows.jsonl is a number, but an object"),
    (row(completion=None), "completion in row 3 of .*rows.jsonl is null, but text is needed"),
    (row(completion=7), "completion in row 3 of .*rows.jsonl is a number, but text is needed"),
    (row(completion=" "), "completion in row 3 of .*rows.jsonl is empty, but text is needed"),
    (row(completion="\ud800"), "completion in row 3 of .* holds half a character"),
    (lines(sums(1)), "rows.jsonl holds 1 rows, of which --eval-share 0.1 leaves none to train on"),
    (lines(TALKS), "The model has no chat template, which messages need"),
    (lines([{"messages": TALKS[0]["messages"][:1]}]), "has no message of the role assistant"),
])
def test_mistakes_in_the_data(tmp_path, model, capsys, content, said):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    refused(tmp_path, capsys, said, ["--model", model, "--data", str(tmp_path / "rows.jsonl")])

def refused(tmp_path, capsys, said, flags):
    out = tmp_path / "out"
    assert finetune.main([*flags, "--out", str(out)]) == 2
    words = capsys.readouterr().err.strip().split("\r")[-1].splitlines()[-1]
    assert re.search(said, words) and words.startswith("nalora_hf.finetune: "), words
    assert not re.search("Traceback|Error", words) and not out.exists()

@pytest.mark.parametrize("spoil, said", [
    ("no tokenizer", "holds no tokenizer"), ("pickle", "pytorch_model.bin, but weights as .safete"),
    ("no config", "there is no config.json"), ("adapter", "holds an adapter"),
    ("small", "The tokenizer gives token [0-9]+, which the model does not have"),
    ("hub", "is no file or folder here, and no model of that name"),
    ("no GGUF", "is a file, but no GGUF file")])
def test_mistakes_in_the_model(tmp_path, data, capsys, spoil, said):
    folder = Path(make_model(tmp_path / "model", vocab_size=12 if spoil == "small" else 99))
    if spoil == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    if spoil == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if spoil == "no config":
        (folder / "config.json").unlink()
    if spoil == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    name = {"hub": "nobody/nothing", "no GGUF": data}.get(spoil, str(folder))
    refused(tmp_path, capsys, said, ["--model", name, "--data", data])

@pytest.mark.parametrize("flags, said", [
    (["--lr", "0"], "0 is no number from 1e-12"), (["--steps", "1.5"], "1.5 is no whole number"),
    (["--targets", "nothing"], "--targets nothing matches no linear layer; there are .*gate_proj"),
    (["--targets", "q_proj"], "NA-LoRA cannot steer this model. .*q_proj.*--gate"),
    (["--steps", "1", "--epochs", "1"], "exclude each other"),
    (["--max-length", "3"], "No row to train on has an answer within 3 tokens"),
    (["--merge", "--load-in-4bit"], "--load-in-4bit goes neither")])
def test_mistakes_in_the_flags(tmp_path, model, data, capsys, flags, said):
    refused(tmp_path, capsys, said, ["--model", model, "--data", data, *flags])
