"""What stood with NALoRA's tests on other models and is not about them: checkpoints of the Llama,
data, runs and checkpoints of train_tiny.py, and our Llama and our tokenizers in transformers."""

import io
import json
import math
import os
import pickle
import random
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from data import problems
from nalora import Llama, LoRALinear, load_adapter, save_adapter
from test_nalora import (
    HERE,
    arguments,
    base,  # noqa: F401
    equal,
    lora_llama,
    one_thread,  # noqa: F401
    result,
    small_llama,
    tiny_pretraining,  # noqa: F401
    trained_lora,
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- checkpoints of the Llama --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {field: value}
        for field, values in {
            "hidden_size": ["32", -32, 0, 10**12, 32.0],
            "vocab_size": [1e3, 10**30, True],
            "num_hidden_layers": [1.5, 10**9, "2"],
            "num_attention_heads": [0, -4, "4"],
            "num_key_value_heads": [0, []],
            "head_dim": [[], -8, 7],
            "intermediate_size": [-1, None, {}],
            "max_position_embeddings": ["64", 0],
            "rope_theta": ["x", -1, math.nan],
            "rms_norm_eps": ["x", [], 0],
            "initializer_range": [-1, "y"],
            "hidden_act": [[], {}, 3],
            "tie_word_embeddings": ["no", 1],
            "rope_scaling": ["linear", [1], 3],
            "rope_parameters": [[1], "x"],
        }.items()
        for value in values
    ],
    ids=str,
)
def test_no_llama_has_such_a_config(tmp_path, change):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=f"{next(iter(change))}|rope_type|The config lacks"):
        Llama.from_pretrained(tmp_path)


def test_a_config_far_larger_than_the_weights_is_refused_before_it_takes_memory(
    tmp_path, monkeypatch
):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**24}))
    monkeypatch.setattr(Llama, "to", None)  # nothing is built but on the meta device
    with pytest.raises(ValueError, match="do not fit its config.json"):
        Llama.from_pretrained(tmp_path)


def test_broken_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        Llama.from_pretrained(tmp_path / "none")
    model = small_llama()
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in range(16):
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "num_hidden_layers": 3})
    )
    with pytest.raises(ValueError, match=r"do not fit its config.json\S* see .*model.layers.2"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="lacks vocab_size"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries LoRA"):
        lora_llama().save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_float8_is_refused_in_a_sentence(tmp_path):
    small_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        Llama.from_pretrained(tmp_path)


def test_tied_weights_stored_twice_must_agree(tmp_path):
    model = small_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for shift in (0, 1):
        head = weights["model.embed_tokens.weight"] + shift
        save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
        if shift:
            with pytest.raises(ValueError, match="two that differ"):
                Llama.from_pretrained(tmp_path)
        else:
            assert equal(Llama.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_llama_under_wrappers_is_saved_under_its_own_names(tmp_path):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    def compiled_ffns(model):
        for layer in model.model.layers:
            layer.mlp = torch.compile(layer.mlp, backend="eager")
        return model

    def checkpoints(model):
        checkpoint_wrapper.apply_activation_checkpointing(
            model, check_fn=lambda m: type(m).__name__ == "Block"
        )
        return model

    def parallel_ffn(model):
        model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
        return model

    for wrap in (compiled_ffns, checkpoints, parallel_ffn):
        wrap(small_llama()).save_pretrained(tmp_path)
        assert equal(Llama.from_pretrained(tmp_path).state_dict(), small_llama().state_dict())


# ---- files that are spoiled ----------------------------------------------------------------------


class Payload:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def spoiled(whole, trace):
    """(what was done, content): a file cut, with flipped bits, or replaced, such as by a pickle."""
    rng = random.Random(0)
    archive = io.BytesIO()
    torch.save(Payload(trace), archive)
    for content in (pickle.dumps(Payload(trace)), archive.getvalue()):
        yield "pickle", content
    for part in range(16):
        yield "cut", whole[: len(whole) * part // 16]
    for i in [rng.randrange(min(len(whole), 2000)) for _ in range(24)] + [
        rng.randrange(len(whole)) for _ in range(8)
    ]:
        yield "flipped", whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1 :]
    for content in (
        rng.randbytes(500),
        b"\x00" * 64,
        b"[1, 2]",
        b"null",
        b"7",
        b'"a"',
        b"[" * 100_000,
        b"{}",
        (2**60).to_bytes(8, "little") + b"{}",
        b'{"a": NaN}',
        "\ufeff{}".encode("utf-16"),
        (2).to_bytes(8, "little") + b"{}",
    ):
        yield "foreign", content


def readers(folder, base):
    """{file: a function that reads it}: all that this program opens."""
    run, adapter = folder / "run", lambda: load_adapter(small_llama(), folder / "adapter")
    set_up = lambda: train_tiny.set_up(
        train_tiny.resolve(train_tiny.command_line().parse_args(arguments(base, run)), "nalora")
    )
    return {
        "adapter/adapter_model.safetensors": adapter,
        "adapter/adapter_config.json": adapter,
        "adapter/nalora.json": adapter,
        "base/model.safetensors": lambda: Llama.from_pretrained(folder / "base"),
        "base/config.json": lambda: Llama.from_pretrained(folder / "base"),
        "data/tokenizer.tiktoken": lambda: problems.load_tokenizer(folder / "data"),
        "data/train.jsonl": lambda: problems.read_problems(folder / "data" / "train.jsonl"),
        "run/checkpoint.pt": lambda: train_tiny.load_checkpoint(set_up(), run),
        "run/config.json": lambda: train_tiny.load_checkpoint(set_up(), run),
    }


FILES = [
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/nalora.json",
    "base/model.safetensors",
    "base/config.json",
    "data/tokenizer.tiktoken",
    "data/train.jsonl",
    "run/checkpoint.pt",
    "run/config.json",
]


@pytest.fixture(scope="session")
def intact(base, tmp_path_factory):
    """One of every file that can be spoiled."""
    folder = tmp_path_factory.mktemp("intact")
    save_adapter(trained_lora(), folder / "adapter")
    small_llama().save_pretrained(folder / "base")
    shutil.copytree(
        HERE / "data", folder / "data", ignore=shutil.ignore_patterns("base", "*.py", "__pycache__")
    )
    assert train_tiny.main(arguments(base, folder / "run")) == 0
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_spoiled_file_is_refused_with_a_sentence_or_read_whole(intact, base, tmp_path, file):
    folder = tmp_path / "copy"
    shutil.copytree(intact, folder)
    read, path = readers(folder, base)[file], folder / file
    whole = path.read_bytes()
    read()
    before, refused = result(folder), 0
    for kind, content in spoiled(whole, tmp_path / "executed"):
        path.write_bytes(content)
        try:
            read()
            assert kind != "cut" or file.startswith("data/") or content == b"", len(content)
            assert kind != "pickle"
            assert "checkpoint" not in file or content == whole, (
                "a checkpoint that was changed is noticed"
            )
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 20 and not (tmp_path / "executed").exists()
    path.unlink()
    for spoil in (
        path.mkdir,
        lambda: (path.rmdir(), path.symlink_to("/dev/null")),
        lambda: (path.unlink(), path.symlink_to(path)),
    ):
        spoil()
        if (
            path.is_symlink()
            and not path.exists()
            and (file.startswith("run") or file.endswith("nalora.json"))
        ):
            continue  # files that need not be there, and a circle of links is none
        with pytest.raises(
            ValueError,
            match="cannot be read|holds no|is no checkpoint|holds a run|lacks|as a tokenizer|"
            "no plain LoRA",
        ):
            read()
    path.unlink()
    path.write_bytes(whole)
    assert result(folder) == before  # reading writes nothing
    read()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t, k: {**t, k: t[k].int()}, "int32"),
        (lambda t, k: {**t, k: t[k] * math.nan}, "finite"),
        (lambda t, k: {**t, k: t[k] / 0}, "finite"),
        (lambda t, k: {**t, k: t[k].bool()}, "bool"),
        (
            lambda t, k: {**t, k.replace("layers.0", "layers.0/../.."): t[k].clone()},
            "layers|not fit",
        ),
        (lambda t, k: {**t, "/etc/passwd": t[k].clone()}, "passwd|not fit"),
        (lambda t, k: {**t, k: t[k][:1]}, "not fit"),
        (lambda t, k: {}, "not fit"),
        (lambda t, k: {**t, k: t[k][None]}, "not fit"),
    ],
)
@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "base/model.safetensors"])
def test_weights_that_are_not_weights_are_refused(intact, tmp_path, file, spoil, message):
    shutil.copytree(intact, tmp_path / "copy")
    path, model = tmp_path / "copy" / file, small_llama()
    tensors = load_file(path)
    save_file(spoil(tensors, next(k for k in tensors if "layers.0.mlp.gate_proj" in k)), path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path.parent) if "adapter" in file else Llama.from_pretrained(
            path.parent
        )
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


# ---- data ----------------------------------------------------------------------------------------


def test_json_lines_are_split_at_line_feeds_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    row = '{{"prompt": "1{}1=", "completion": "2."}}'.format
    for c in "\u2028\u2029\x85\x0b\x0c\x1c":
        text = row(c) if ord(c) > 31 else row(json.dumps(c)[1:-1])
        path.write_text(f"\ufeff{text}\r\n\n  \n{row('+')}\n\n", encoding="utf-8")
        rows = problems.read_problems(path, answers=False)
        assert [(p["prompt"], p["line"]) for p in rows] == [(f"1{c}1=", 1), ("1+1=", 4)]
    path.write_text(row("\\ud83d") + "\n" + row("\\ud83d\\ude00") + "\n")
    rows = problems.read_problems(path, answers=False)
    assert [p["prompt"] for p in rows] == ["1\ufffd1=", "1\U0001f6001="]


def test_corrupt_data_names_file_and_line(base, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(
        HERE / "data", data, ignore=shutil.ignore_patterns("base", "*.py", "__pycache__")
    )
    lines = (data / "train.jsonl").read_text().splitlines()
    too_long = json.dumps({"prompt": "Ann " * 300, "completion": "1.", "answer": 1})
    for bad in (
        too_long,
        '{"prompt": "x"',
        '{"prompt": "x", "completion": "y"}',
        '{"prompt": 1, "completion": "y", "answer": 2}',
        "[]",
        "7",
    ):
        (data / "train.jsonl").write_text("\n".join([*lines[:6], bad, *lines[7:]]))
        assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(data)]) == 2
        assert "train.jsonl, line 7:" in capsys.readouterr().err
    for name, content, message in (
        ("train.jsonl", "", "holds no problem"),
        ("tokenizer.tiktoken", "broken", "cannot be read as a tokenizer"),
        ("tokenizer.tiktoken", "AA== 0\nAQ== 0\n", "a byte is missing"),
    ):
        (data / name).write_text(content)
        assert train_tiny.main([*arguments(base, tmp_path / "run"), "--data", str(data)]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
