"""Data for a base with a tokenizer of its own, and problems of one's own in JSON lines. `load` is
for train_tiny.set_up; c is a Config that has `data`, a folder or a file, too. An answer is a number
after "The answer is" or "####", the last number, or the whole text."""
import json
import re
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np

from data.problems import (DATA, MAX_NEW, SPLITS, in_order, load_tokenizer, problem_batches, solve,
                           text_batches, text_windows)

def refuse(wrong, message):
    if wrong:
        raise ValueError(message)

# ---- tokenizers ----------------------------------------------------------------------------------

class CheckpointTokenizer:
    """The tokenizer of a Hugging Face checkpoint, with the members of tiktoken's used here."""

    def __init__(self, directory):
        try:
            from transformers import AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False,
                                                      local_files_only=True)
        except ImportError:
            raise ValueError(f"{directory} has a tokenizer of its own: pip install transformers "
                             "to read it.") from None
        except Exception as e:          # transformers raises many kinds; all mean the same here
            raise ValueError(f"The tokenizer in {directory} cannot be read: {e}") from None
        self.eot_token = tokenizer.eos_token_id
        refuse(self.eot_token is None,
               f"The tokenizer in {directory} has no end-of-sequence token.")
        self.n_vocab = len(tokenizer)
        self.decode = tokenizer.decode
        self.encode_ordinary = partial(tokenizer.encode, add_special_tokens=False)
        plain = self.encode_ordinary("1")
        dressed = tokenizer("1").input_ids
        starts = [i for i in range(len(dressed)) if dressed[i:i + len(plain)] == plain]
        self.opening = dressed[:starts[0]] if starts else []    # what it puts before a text

def tokenizer_of(base, vocab_size):
    """The checkpoint's own tokenizer if it has one, else the toy's. ValueError if it is none for a
    model of that vocabulary; a checkpoint's own may leave some tokens unused."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    own = base and any((Path(base) / name).exists() for name in files)
    tokenizer = CheckpointTokenizer(base) if own else load_tokenizer()
    refuse(vocab_size < tokenizer.n_vocab or not own and vocab_size != tokenizer.n_vocab,
           f"{base} has {vocab_size} tokens, its tokenizer has {tokenizer.n_vocab}.")
    return tokenizer

# ---- problems: every token sequence is opening, prompt, completion, end token --------------------

def read_problems(path, answers=True):
    """[{"prompt", "completion", "answer" (a must if `answers`), "line"}] of a JSON-lines file.
    ValueError names the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    problems = []
    cut = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            p = json.loads(line)
            whole = {key: whole_text(p[key]) for key in ("prompt", "completion")}
            cut += [number] if whole != {key: p[key] for key in whole} else []
            answer = p["answer"] if answers else p.get("answer", 0)
            refuse(type(answer) not in (int, float), "answer must be a number")
            problems.append({**p, **whole, "line": number})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path}, line {number}: no problem with prompt, completion and "
                             f"answer ({e}).") from None
    refuse(not problems, f"{path} holds no problem.")
    if cut:
        print(f"{path}, line {cut[0]}: half a character (a cut emoji) is read as U+FFFD; so in "
              f"{len(cut)} lines.", file=sys.stderr)
    return problems

def whole_text(text):
    """The text with the half of a character that was cut, as emoji are in JSON, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def read_splits(data):
    """{"train", "val", "test": problems} of a folder, or of one file, where a tenth of the lines,
    drawn always alike, is kept for test and a tenth for validation."""
    if data.is_dir():
        return {split: read_problems(data / f"{split}.jsonl") for split in SPLITS}
    problems = read_problems(data, answers=False)
    refuse(len(problems) < 10, f"{data} holds {len(problems)} problems: at least 10 are needed.")
    order = np.random.default_rng(0).permutation(len(problems))
    parts = np.split(order, [len(order) // 10, len(order) // 10 * 2])
    names = ("test", "val", "train")
    return {split: [problems[i] for i in part] for split, part in zip(names, parts)}

def encode_prompt(tokenizer, prompt):
    """Token ids, at least one: what opens a text (the toy's: <|endoftext|>), if the prompt does
    not begin with it, and the prompt."""
    ids = tokenizer.encode_ordinary(prompt)
    if ids[:len(tokenizer.opening)] != tokenizer.opening:
        ids = [*tokenizer.opening, *ids]
    return ids or [tokenizer.eot_token]

def encode_problem(tokenizer, problem):
    """(token ids, number of prompt tokens)."""
    prompt = encode_prompt(tokenizer, problem["prompt"])
    completion = tokenizer.encode_ordinary(problem["completion"])
    end = [] if completion[-1:] == [tokenizer.eot_token] else [tokenizer.eot_token]
    return [*prompt, *completion, *end], len(prompt)

def encode_splits(tokenizer, splits, data, context):
    """{split: [(token ids, number of prompt tokens)]}, and the most new tokens an answer may need.
    ValueError names the first problem that exceeds the model's context, in tokens."""
    encoded = {split: [encode_problem(tokenizer, p) for p in splits[split]] for split in SPLITS}
    max_new = max(MAX_NEW, *(len(ids) - prompt for ids, prompt in encoded["train"]))
    for split in SPLITS:
        path = data / f"{split}.jsonl" if data.is_dir() else data
        for problem, (ids, prompt) in zip(splits[split], encoded[split]):
            length = prompt + max_new if split == "test" else len(ids) - 1
            refuse(length > context, f"{path}, line {problem['line']}: {length} tokens exceed the "
                   f"context of {context}: shorten it.")
    return encoded, max_new

def read_equations(data):
    """The equations that pre-training never saw: of the data folder, or the toy's."""
    path = data / "arithmetic.jsonl"
    return read_problems(path if path.exists() else DATA / "arithmetic.jsonl")

# ---- all of it -----------------------------------------------------------------------------------

def load(c, model):
    """As data.problems.load, for the base c.base and the data c.data."""
    data = Path(c.data)
    tokenizer = tokenizer_of(c.base, model.vocab_size)
    end = tokenizer.eot_token
    splits = read_splits(data)
    encoded, max_new = encode_splits(tokenizer, splits, data, model.max_position_embeddings)
    train = encoded["train"][:c.train_size]
    size = min(c.batch_size, len(train))
    batches = problem_batches(train, size, c.seed, end)
    validation = in_order(encoded["val"], end)
    files = [data / f"{split}.jsonl" for split in SPLITS] if data.is_dir() else [data]
    if c.method == "pretrain":
        batches = text_batches(tokenizer, data / "pretrain.txt", c.batch_size, c.seed)
        windows = text_windows(tokenizer, data / "pretrain_val.txt")                # (N, 129)
        validation = [(windows[:, :-1], windows[:, 1:], None)]
        files += [data / "pretrain.txt", data / "pretrain_val.txt"]
    return {"tokenizer": tokenizer, "batches": batches, "validation": validation,
            "problems": splits["test"][:c.test_size],
            "equations": read_equations(data)[:c.test_size], "max_new": max_new, "files": files}

# ---- answers -------------------------------------------------------------------------------------

NUMBER = r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"

def final_answer(text, mark="The answer is"):
    """The number right after the mark, the last one without a mark, or None."""
    if mark:
        numbers = re.findall(rf"^[\s:=]*({NUMBER})", text.partition(mark)[2])
    else:
        numbers = re.findall(NUMBER, text)
    return Decimal(re.sub("[$,]", "", numbers[-1])) if numbers else None

def is_right(problem, completion):
    """Whether the final number is the answer, found as the given completion shows it: after "The
    answer is" (the toy), after "####", or last. Without an answer the text must be the given."""
    given = problem["completion"]
    if "answer" not in problem:
        return completion.strip() == given.strip()
    mark = next((m for m in ("The answer is", "####") if m in given), "")
    return final_answer(completion, mark) == Decimal(str(problem["answer"]))

def exact_match(model, tokenizer, problems, max_new_tokens=MAX_NEW):
    """(share of problems solved rightly, None without any; the completions)."""
    prompts = [p["prompt"] for p in problems]
    completions = solve(model, tokenizer, prompts, max_new_tokens, encode_prompt)
    right = list(map(is_right, problems, completions))
    return sum(right) / len(right) if right else None, completions
