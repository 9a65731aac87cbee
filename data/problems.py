"""What data/ and a file of one's own hold, as train_tiny.py takes it: tokenizers, problems and
texts, batches of their tokens, a model's loss on them, and whether its answers are right."""
import base64
import functools
import hashlib
import json
import os
import re
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch

from nalora import refuse

DATA = Path(os.path.relpath(Path(__file__).resolve().parent))
SPLITS = ("train", "val", "test")
MAX_NEW = 32                            # tokens of the toy's longest solution, and some

# ---- tokenizers ----------------------------------------------------------------------------------

def load_tokenizer(folder=DATA):
    """The toy's byte-pair tokenizer as a tiktoken.Encoding; the last id is <|endoftext|>."""
    path = Path(folder) / "tokenizer.tiktoken"
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        bytes_there = all(bytes([b]) in ranks for b in range(256))
        refuse(sorted(ranks.values()) != list(range(len(ranks))) or not bytes_there,
               "its ranks are not 0, 1, 2, ... or a byte is missing")
        pattern = r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"    # a number is the sequence of its digits
        return tiktoken.Encoding("nalora-tiny", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a tokenizer: {e}") from None

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

def tokenizer_of(base, data, vocab_size):
    """The checkpoint's own tokenizer if it has one, else the toy's. ValueError if it is none for a
    model of that vocabulary; a checkpoint's own may leave some tokens unused."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    own = base and any((Path(base) / name).exists() for name in files)
    folder = data if Path(data).is_dir() else DATA
    tokenizer = CheckpointTokenizer(base) if own else load_tokenizer(folder)
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
    if cut and os.environ.get("RANK", "0") == "0":      # one of torchrun's ranks
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
    opening = getattr(tokenizer, "opening", [tokenizer.eot_token])
    ids = tokenizer.encode_ordinary(prompt)
    if ids[:len(opening)] != opening:
        ids = [*opening, *ids]
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

def digest(data, base):
    """{"data", "base": SHA-256 over the names and contents of its files}."""
    kinds = (".json", ".jsonl", ".safetensors", ".model", ".tiktoken", ".txt")
    found = {}
    for key, place in (("data", Path(data)), ("base", Path(base or data))):
        total = hashlib.sha256()
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file() and (path.suffix in kinds or path == place):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                total.update(path.name.encode() + content)
        found[key] = total.hexdigest()
    return found

# ---- batches: tokens, targets (-100 where none is learnt) and token_mask, (B, T) each ------------

def collate(encoded, end):
    """One batch of encoded problems; the completion alone is learnt."""
    width = max(len(ids) for ids, _ in encoded) - 1
    tokens = torch.full((len(encoded), width), end)
    targets = torch.full((len(encoded), width), -100)
    mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(encoded):
        tokens[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt - 1:len(ids) - 1] = torch.tensor(ids[prompt:])
        mask[row, :len(ids) - 1] = True
    return tokens, targets, mask

def problem_batches(encoded, size, seed, end):
    """batches(step) -> a batch of `size`: a function of seed and step alone, so that a resumed run
    sees the same data."""

    @functools.lru_cache(1)
    def order(epoch):
        """Shuffled problems, sorted by length within runs of eight batches (less padding), the
        batches shuffled again."""
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(len(encoded))
        flat = []
        for i in range(0, len(shuffled), 8 * size):
            flat += sorted(shuffled[i:i + 8 * size], key=lambda j: len(encoded[j][0]))
        count = len(flat) // size
        return np.array(flat[:count * size]).reshape(count, size)[rng.permutation(count)]

    def batches(step):
        epoch, position = divmod(step, len(encoded) // size)
        return collate([encoded[j] for j in order(epoch)[position]], end)

    return batches

def in_order(encoded, end):
    """All encoded problems in batches of 50, the short ones first."""
    encoded = sorted(encoded, key=lambda e: len(e[0]))
    return [collate(encoded[i:i + 50], end) for i in range(0, len(encoded), 50)]

def encode_text(tokenizer, path):
    """The documents (lines) of a text file as one list of token ids, <|endoftext|> around each."""
    lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    documents = tokenizer.encode_ordinary_batch(lines)
    return [i for ids in documents for i in (tokenizer.eot_token, *ids)] + [tokenizer.eot_token]

def text_windows(tokenizer, path):
    """A text file in consecutive windows of 129 tokens, (N, 129). ValueError if it has none."""
    ids = torch.tensor(encode_text(tokenizer, path))
    refuse(len(ids) < 129, f"{path} has {len(ids)} tokens: at least 129 are needed.")
    return ids[:len(ids) // 129 * 129].view(-1, 129)

def text_batches(tokenizer, path, size, seed):
    """As problem_batches: random windows of a text, in which every token is learnt."""
    ids = torch.tensor(encode_text(tokenizer, path))

    def batches(step):
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(ids) - 128, size)
        window = torch.stack([ids[i:i + 129] for i in starts])                  # (B, 129)
        return window[:, :-1], window[:, 1:], torch.ones(size, 128, dtype=torch.bool)

    return batches

# ---- all of it -----------------------------------------------------------------------------------

def load(c, model):
    """What a run of train_tiny.py reads: tokenizer, digest, batches, validation, test problems and
    equations, the most new tokens an answer may need, and what every prompt ends with, None if they
    differ. c: its Config; model: a LlamaConfig. ValueError where these do not fit together."""
    data = Path(c.data)
    tokenizer = tokenizer_of(c.base, data, model.vocab_size)
    end = tokenizer.eot_token
    splits = read_splits(data)
    encoded, max_new = encode_splits(tokenizer, splits, data, model.max_position_embeddings)
    train = encoded["train"][:c.train_size]
    size = min(c.batch_size, len(train))
    batches = problem_batches(train, size, c.seed, end)
    validation = in_order(encoded["val"], end)
    if c.method == "pretrain":
        size = c.batch_size
        batches = text_batches(tokenizer, data / "pretrain.txt", size, c.seed)
        windows = text_windows(tokenizer, data / "pretrain_val.txt")                # (N, 129)
        validation = [(windows[:, :-1], windows[:, 1:], None)]
    refuse(size % c.ranks, f"{size} problems, a batch, cannot be shared evenly by {c.ranks} ranks: "
           f"give a --batch-size that is a multiple of {c.ranks}.")
    endings = {p["prompt"][len(p["prompt"].rstrip()):] for p in splits["train"]}
    return {"tokenizer": tokenizer, "digest": digest(data, c.base), "batches": batches,
            "validation": validation, "problems": splits["test"][:c.test_size],
            "equations": read_equations(data)[:c.test_size], "max_new": max_new,
            "ending": endings.pop() if len(endings) == 1 else None}

def sample_prompts(data, prompt, ending):
    """What --sample asks: the prompt with the ending that all had in training, None if they
    differed; without a prompt those of three test problems."""
    if not prompt:
        return [p["prompt"] for p in read_splits(Path(data))["test"][:3]]
    prompt = whole_text(prompt)
    return [prompt if ending is None else prompt.rstrip() + ending]

# ---- evaluation: the loss, and which answers are right -------------------------------------------

@torch.no_grad()
def mean_loss(model, batches):
    """Cross-entropy in nats per target token over a list of batches."""
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for tokens, targets, _ in batches:
        n = (targets != -100).sum().item()
        total += n * model(tokens.to(device), targets.to(device))[1].item()
        count += n
    return total / count

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

def verdict(problem, completion):
    if is_right(problem, completion):
        return "right"
    return f"wrong, {problem.get('answer', problem['completion'])} was asked for"

def share(right):
    return sum(right) / len(right) if right else None

def solve(model, tokenizer, prompts, max_new_tokens=MAX_NEW):
    """Greedy completions of the prompts, in order. Prompts of equal length share a batch, so none
    needs padding."""
    device = next(model.parameters()).device
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = {}
    for length in dict.fromkeys(map(len, encoded)):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        tokens = torch.tensor([encoded[i] for i in rows], device=device)        # (B, length)
        out = model.generate(tokens, max_new_tokens, stop=tokenizer.eot_token)
        for i, ids in zip(rows, out[:, length:].tolist()):
            end = ids.index(tokenizer.eot_token) if tokenizer.eot_token in ids else None
            answers[i] = tokenizer.decode(ids[:end])
    return [answers[i] for i in range(len(prompts))]

def exact_match(model, tokenizer, problems, max_new_tokens=MAX_NEW):
    """(share of problems solved rightly, None without any; the completions)."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens)
    return share(list(map(is_right, problems, completions))), completions

def arithmetic_accuracy(model, tokenizer, problems):
    """Share of equations ("12+5=") that the model completes rightly; None without any."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens=4)
    return share([c.split(".")[0].strip() == str(p["answer"])
                  for c, p in zip(completions, problems)])
