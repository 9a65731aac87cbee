"""The toy: reads its problems and texts, makes batches of tokens, and judges answers.

One problem, line 714 of train.jsonl, as text and as tokens:

    prompt      "Emil has 2 keys. Ben has twice as many as Emil. He gets 20 more. Count the keys
                of Ben. "
    completion  "2+2=4. 4+20=24. The answer is 24."
    as text     end  Emil  has  _  ...   Ben    .   _   2   + ...   2   4   .  end
    token ids   639   519  264  32 ...   434   46  32  50  43 ...  50  52  46  639

The first 29 of the 52 ids are the prompt's. In a batch beside a problem of 53 ids, one row:

    tokens      639   519  264  32 ...   434   46  32  50  43 ...  50  52  46  639  without the last
    targets    -100  -100 -100 -100 ... -100 -100  50  43  50 ...  52  46 639 -100  the next token
    token_mask    1     1    1   1 ...     1    1   1   1   1 ...   1   1   1    0  padding is off

A target of -100 is not learnt: the completion and the end alone are.
"""
import base64
import functools
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
import torch

DATA = Path(__file__).resolve().parent
BASE = DATA / "base"                    # the model that all methods but `pretrain` begin with
SPLITS = ("train", "val", "test")
MAX_NEW = 32                            # tokens of the longest solution (27), and some

# ---- texts and tokens ----------------------------------------------------------------------------

def load_tokenizer():
    """The byte-pair tokenizer, a tiktoken.Encoding; its last id is <|endoftext|>."""
    lines = (DATA / "tokenizer.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    pattern = r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"    # what is never merged: words, digits, marks
    tokenizer = tiktoken.Encoding("nalora-tiny", pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": len(ranks)})
    tokenizer.opening = [tokenizer.eot_token]           # another tokenizer may have another
    return tokenizer

def read_problems(path):
    """[{"prompt", "completion", "answer", ...}] of a file with one JSON object a line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None

def encode_prompt(tokenizer, prompt):
    return [*tokenizer.opening, *tokenizer.encode_ordinary(prompt)]

def encode_problem(tokenizer, problem):
    """(token ids, number of prompt tokens); see the top of this file."""
    prompt = encode_prompt(tokenizer, problem["prompt"])
    completion = tokenizer.encode_ordinary(problem["completion"])
    return [*prompt, *completion, tokenizer.eot_token], len(prompt)

def encode_text(tokenizer, path):
    """The documents (lines) of a text file as one list of token ids, <|endoftext|> around each."""
    lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    documents = tokenizer.encode_ordinary_batch(lines)
    return [i for ids in documents for i in (tokenizer.eot_token, *ids)] + [tokenizer.eot_token]

# ---- batches: tokens, targets (-100 where none is learnt) and token_mask, (B, T) each ------------

def collate(encoded, end):
    """One batch of encoded problems, padded on the right with the token `end`."""
    width = max(len(ids) for ids, _ in encoded) - 1     # T: the last id is a target only
    tokens = torch.full((len(encoded), width), end)
    targets = torch.full((len(encoded), width), -100)
    token_mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(encoded):
        tokens[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt - 1:len(ids) - 1] = torch.tensor(ids[prompt:])
        token_mask[row, :len(ids) - 1] = True
    return tokens, targets, token_mask

def problem_batches(encoded, size, seed, end):
    """batches(step) -> a batch of `size`. It is a function of seed and step alone, so that a
    resumed run sees the same data."""

    @functools.lru_cache(1)
    def order(epoch):
        """(batches, size) numbers of problems: shuffled, sorted by length within runs of eight
        batches (less padding), then the batches are shuffled again."""
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
    """[batch] of all encoded problems, 50 in each, the short ones first."""
    encoded = sorted(encoded, key=lambda e: len(e[0]))
    return [collate(encoded[i:i + 50], end) for i in range(0, len(encoded), 50)]

def text_batches(tokenizer, path, size, seed):
    """As problem_batches: random windows of a text, in which every token is learnt."""
    ids = torch.tensor(encode_text(tokenizer, path))

    def batches(step):
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(ids) - 128, size)
        window = torch.stack([ids[i:i + 129] for i in starts])                  # (B, 129)
        return window[:, :-1], window[:, 1:], torch.ones(size, 128, dtype=torch.bool)

    return batches

def text_windows(tokenizer, path):
    """A text file in consecutive windows of 129 tokens, (N, 129)."""
    ids = torch.tensor(encode_text(tokenizer, path))
    return ids[:len(ids) // 129 * 129].view(-1, 129)

def load(c, model):
    """What a run of train_tiny.py reads. c: its Config; model: its LlamaConfig."""
    tokenizer = load_tokenizer()
    files = [DATA / f"{split}.jsonl" for split in SPLITS]
    splits = [read_problems(path) for path in files]
    train, val, test = [[encode_problem(tokenizer, p) for p in part] for part in splits]
    longest = max(prompt for _, prompt in train + val + test) + MAX_NEW
    if model.vocab_size != tokenizer.n_vocab or model.max_position_embeddings < longest:
        raise ValueError(f"{c.base} has {model.vocab_size} tokens and a context of "
                         f"{model.max_position_embeddings}; the toy needs {tokenizer.n_vocab} and "
                         f"{longest}: for other tokens use nalora_hf, see nalora_hf/README.md.")
    end = tokenizer.eot_token                           # <|endoftext|>, also the padding
    train = train[:c.train_size]                        # all of them if it is None
    batches = problem_batches(train, min(c.batch_size, len(train)), c.seed, end)
    validation = in_order(val, end)
    if c.method == "pretrain":
        files = [DATA / "pretrain.txt", DATA / "pretrain_val.txt", *files]
        batches = text_batches(tokenizer, files[0], c.batch_size, c.seed)
        windows = text_windows(tokenizer, files[1])     # (N, 129)
        validation = [(windows[:, :-1], windows[:, 1:], None)]
    equations = read_problems(DATA / "arithmetic.jsonl")    # those that no text shows
    return {"tokenizer": tokenizer, "batches": batches, "validation": validation,
            "problems": splits[2][:c.test_size], "equations": equations[:c.test_size],
            "max_new": MAX_NEW, "files": files}

# ---- evaluation: the loss, and which answers are right -------------------------------------------

@torch.no_grad()
def mean_loss(model, batches):
    """Cross-entropy in nats per target token over a list of batches."""
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for tokens, targets, _ in batches:
        n = (targets != -100).sum().item()              # the batch's mean is over n targets
        total += n * model(tokens.to(device), targets.to(device))[1].item()
        count += n
    return total / count

def solve(model, tokenizer, prompts, max_new_tokens=MAX_NEW, encode=encode_prompt):
    """Greedy completions of the prompts, in order. Prompts of equal length share a batch, so none
    needs padding."""
    device = next(model.parameters()).device
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    answers = {}
    for length in dict.fromkeys(map(len, encoded)):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        tokens = torch.tensor([encoded[i] for i in rows], device=device)        # (B, length)
        out = model.generate(tokens, max_new_tokens, stop=tokenizer.eot_token)
        for i, ids in zip(rows, out[:, length:].tolist()):
            end = ids.index(tokenizer.eot_token) if tokenizer.eot_token in ids else None
            answers[i] = tokenizer.decode(ids[:end])
    return [answers[i] for i in range(len(prompts))]

def final_answer(text):
    """N of "The answer is N.", an int; None if there is no such number."""
    found = re.search(r"The answer is (-?\d+)(?!\d|[.,]\d)", text)      # 12.5 and 1,234 are not it
    return int(found[1]) if found else None

def is_right(problem, completion):
    return final_answer(completion) == problem["answer"]

def exact_match(model, tokenizer, problems, max_new_tokens=MAX_NEW):
    """(share of problems solved rightly, None without any; the completions)."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens)
    right = list(map(is_right, problems, completions))
    return sum(right) / len(right) if right else None, completions

def arithmetic_accuracy(model, tokenizer, problems):
    """Share of equations ("12+5=") that the model completes rightly; None without any."""
    completions = solve(model, tokenizer, [p["prompt"] for p in problems], max_new_tokens=4)
    right = [c.split(".")[0].strip() == str(p["answer"]) for c, p in zip(completions, problems)]
    return sum(right) / len(right) if right else None
