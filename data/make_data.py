"""Writes every text of the toy benchmark, and its tokenizer, from fixed seeds:

    python data/make_data.py [--out DIR]

A miniature of "MetaMathQA -> GSM8K". The base model reads `pretrain.txt` (short stories, one-step
questions and equations of a tiny world); the adapters learn two-step word problems with a worked
solution (`train.jsonl`) and are judged on `test.jsonl`.
All sentences are put together here, none is taken from elsewhere. See data/README.md for each file.
"""

import argparse
import base64
import json
import os
import random
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A run of letters with its leading space, single digits, single marks: a number is the sequence of
# its digits.
PATTERN = r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"
VOCAB = (
    640  # 639 byte-pair tokens and <|endoftext|>, which ends every document and starts every prompt
)
SIZES = {"train": 1500, "val": 200, "test": 500}

SHE = "Ann Eva Ida Lena Mia Nora Rosa Sara Tina Vera".split()
HE = "Ben Carl Dan Emil Finn Hugo Leo Max Otto Tom".split()
THINGS = (
    "apples books boxes cards coins cups eggs hats keys lamps maps nuts pens plums rings shells "
    "shoes stamps stones toys"
).split()
PLACES = "barn cellar garden house kitchen market river school shop street".split()
LOOKS = (
    "big blue bright clean cold dark dry green heavy little new old red round small warm white "
    "yellow"
).split()
GAIN = [
    ("buys", "bought"),
    ("finds", "found"),
    ("gets", "got"),
    ("wins", "won"),
    ("makes", "made"),
    ("picks up", "picked up"),
]
LOSE = [
    ("loses", "lost"),
    ("sells", "sold"),
    ("gives away", "gave away"),
    ("drops", "dropped"),
    ("breaks", "broke"),
    ("throws out", "threw out"),
]

class Scene:
    """The cast of one text: three people, one kind of thing, one tense, and the random source that
    words it."""

    def __init__(self, rng):
        self.rng = rng
        self.people = rng.sample(SHE + HE, 3)
        self.thing = rng.choice(THINGS)
        self.past = rng.random() < 0.5

    def say(self, *wordings):
        return self.rng.choice(wordings)

    def pronoun(self, person):
        return "she" if person in SHE else "he"

    def has(self, person, n):
        verb = "had" if self.past else "has"
        return self.say(
            f"{person} {verb} {n} {self.thing}.",
            f"{person} {verb} {n} {self.thing} at home.",
            f"There {'were' if self.past else 'are'} {n} {self.thing} in the bag of {person}.",
        )

    def change(self, person, n, verbs, extra):
        """One gain or loss by the person named last: `verbs` is GAIN or LOSE, `extra` how the
        amount may end ("more", "of them")."""
        verb = self.rng.choice(verbs)[self.past]
        who = self.say(
            person,
            self.pronoun(person).capitalize(),
            "Then " + self.pronoun(person),
            "Later " + person,
        )
        return f"{who} {verb} {n} {self.say(extra, self.thing)}."

    def gain(self, person, n):
        return self.change(person, n, GAIN, "more")

    def lose(self, person, n):
        return self.change(person, n, LOSE, "of them")

    def compare(self, person, other, n, word):
        verb = "had" if self.past else "has"
        return self.say(
            f"{person} {verb} {n} {word} {self.thing} than {other}.",
            f"{person} {verb} {n} {word} than {other}.",
        )

    def how_many(self, person):
        return self.say(
            f"How many {self.thing} does {person} have now?",
            f"How many {self.thing} has {person} in the end?",
            f"What is the number of {self.thing} that {person} has now?",
            f"Count the {self.thing} of {person}.",
        )

    def how_many_in_all(self, *people):
        names = (
            " and ".join(people) if len(people) < 3 else f"{people[0]}, {people[1]} and {people[2]}"
        )
        return self.say(
            f"How many {self.thing} do {names} have in all?",
            f"How many {self.thing} are there in all?",
            f"What is the number of {self.thing} of {names} together?",
        )

    def how_many_more(self, person, other):
        return self.say(
            f"How many more {self.thing} does {person} have than {other}?",
            f"How many {self.thing} does {other} need to have as many as {person}?",
        )

# The templates. Each takes a scene and three numbers and returns the sentences and the two steps
# (x, sign, y) of the solution.
def gain_gain(s, a, b, c):
    p = s.people[0]
    return [s.has(p, a), s.gain(p, b), s.gain(p, c), s.how_many(p)], [(a, "+", b), (a + b, "+", c)]

def gain_lose(s, a, b, c):
    p = s.people[0]
    return [s.has(p, a), s.gain(p, b), s.lose(p, c), s.how_many(p)], [(a, "+", b), (a + b, "-", c)]

def lose_gain(s, a, b, c):
    p = s.people[0]
    return [s.has(p, a), s.lose(p, b), s.gain(p, c), s.how_many(p)], [(a, "-", b), (a - b, "+", c)]

def lose_lose(s, a, b, c):
    p = s.people[0]
    return [s.has(p, a), s.lose(p, b), s.lose(p, c), s.how_many(p)], [(a, "-", b), (a - b, "-", c)]

def more_then_lose(s, a, b, c):
    p, q, _ = s.people
    return [s.has(p, a), s.compare(q, p, b, "more"), s.lose(q, c), s.how_many(q)], [
        (a, "+", b),
        (a + b, "-", c),
    ]

def fewer_then_gain(s, a, b, c):
    p, q, _ = s.people
    return [s.has(p, a), s.compare(q, p, b, "fewer"), s.gain(q, c), s.how_many(q)], [
        (a, "-", b),
        (a - b, "+", c),
    ]

def more_more(s, a, b, c):
    p, q, r = s.people
    return [s.has(p, a), s.compare(q, p, b, "more"), s.compare(r, q, c, "more"), s.how_many(r)], [
        (a, "+", b),
        (a + b, "+", c),
    ]

def more_fewer(s, a, b, c):
    p, q, r = s.people
    return [s.has(p, a), s.compare(q, p, b, "more"), s.compare(r, q, c, "fewer"), s.how_many(r)], [
        (a, "+", b),
        (a + b, "-", c),
    ]

def pool_three(s, a, b, c):
    p, q, r = s.people
    return [s.has(p, a), s.has(q, b), s.has(r, c), s.how_many_in_all(p, q, r)], [
        (a, "+", b),
        (a + b, "+", c),
    ]

def pool_then_lose(s, a, b, c):
    p, q, _ = s.people
    both = s.say("They put them together and", "Together they", "The two of them")
    return (
        [
            s.has(p, a),
            s.has(q, b),
            f"{both} {s.say('lost', 'sold', 'gave away')} {c} {s.say('of them', s.thing)}.",
            s.how_many_in_all(p, q),
        ],
        [(a, "+", b), (a + b, "-", c)],
    )

def gap_after_loss(s, a, b, c):
    p, q, _ = s.people
    # after q's number a pronoun would mean q
    lose = f"{s.say(p, 'Then ' + p)} {s.rng.choice(LOSE)[s.past]} {c} {s.thing}."
    return [s.has(p, a), s.has(q, b), lose, s.how_many_more(p, q)], [(a, "-", c), (a - c, "-", b)]

def start_unknown(s, a, b, c):
    p = s.people[0]
    now = s.say(f"Now {p} has {a} {s.thing}.", f"In the end {p} has {a} {s.thing}.")
    ask = s.say(
        f"How many {s.thing} did {p} have at first?", f"What was the number of {s.thing} before?"
    )
    return (
        [f"{p} {'had' if s.past else 'has'} some {s.thing}.", s.gain(p, b), s.lose(p, c), now, ask],
        [(a, "+", c), (a + c, "-", b)],
    )

def twice(s):
    p, q, _ = s.people
    return s.say(f"{q} has twice as many {s.thing} as {p}.", f"{q} has twice as many as {p}.")

def twice_then_gain(s, a, b, _):
    p, q, _ = s.people
    return [s.has(p, a), twice(s), s.gain(q, b), s.how_many(q)], [(a, "+", a), (a + a, "+", b)]

def twice_then_lose(s, a, b, _):
    p, q, _ = s.people
    return [s.has(p, a), twice(s), s.lose(q, b), s.how_many(q)], [(a, "+", a), (a + a, "-", b)]

TEMPLATES = [
    gain_gain,
    gain_lose,
    lose_gain,
    lose_lose,
    more_then_lose,
    fewer_then_gain,
    more_more,
    more_fewer,
    pool_three,
    pool_then_lose,
    gap_after_loss,
    start_unknown,
    twice_then_gain,
    twice_then_lose,
]

def evaluate(x, sign, y):
    return x + y if sign == "+" else x - y

def word_problem(rng):
    """One problem as a dict: prompt, completion, answer, template, operands. Every number lies
    between 1 and 99."""
    template = rng.choice(TEMPLATES)
    while True:
        a, b, c = rng.randint(2, 80), rng.randint(2, 60), rng.randint(2, 60)
        sentences, steps = template(Scene(rng), a, b, c)
        if all(1 <= n <= 99 for x, sign, y in steps for n in (x, y, evaluate(x, sign, y))):
            break
    answer = evaluate(*steps[1])
    work = " ".join(f"{x}{sign}{y}={evaluate(x, sign, y)}." for x, sign, y in steps)
    prompt = " ".join(sentences) + " "
    operands = [int(n) for n in re.findall("[0-9]+", prompt)]
    return {
        "prompt": prompt,
        "completion": f"{work} The answer is {answer}.",
        "answer": answer,
        "template": template.__name__,
        "operands": operands,
    }

def split_problems():
    """{split: problems}. A pair (template, operands) occurs once over all three splits, whatever
    its wording."""
    rng, seen, splits = random.Random(2), set(), {}
    for split, size in SIZES.items():
        splits[split] = []
        while len(splits[split]) < size:
            problem = word_problem(rng)
            key = (problem["template"], *problem["operands"])
            if key not in seen:
                seen.add(key)
                splits[split].append(problem)
    return splits

def story(rng):
    """A story with one or two changes or comparisons and the outcome, often with the equation in
    between. Nothing is asked of the reader."""
    s = Scene(rng)
    p, q, r = s.people
    a, b = rng.randint(1, 98), rng.randint(1, 98)
    if a + b > 99:
        a, b = 99 - a, 99 - b
    now = s.say("Now", "So now", "In the end", "After that")
    verb = "had" if s.past else "has"
    plus, minus = (
        s.say("", f" {x}{sign}{y}={evaluate(x, sign, y)}.")
        for x, sign, y in ((a, "+", b), (a + b, "-", b))
    )
    kind = rng.randrange(11)
    if kind == 0:
        return f"{s.has(p, a)} {s.gain(p, b)}{plus} {now} {s.pronoun(p)} {verb} {a + b} {s.thing}."
    if kind == 1:
        return f"{s.has(p, a + b)} {s.lose(p, b)}{minus} {now} {s.pronoun(p)} {verb} {a} {s.thing}."
    if kind == 2:
        return f"{s.has(p, a)} {s.compare(q, p, b, 'more')}{plus} So {q} {verb} {a + b} {s.thing}."
    if kind == 3:
        return (
            f"{s.has(p, a + b)} {s.compare(q, p, b, 'fewer')}{minus} So {q} {verb} {a} {s.thing}."
        )
    if kind == 4:
        return (
            f"{s.has(p, a)} {s.has(q, b)}{plus} "
            f"{s.say('Together they have', 'In all there are')} {a + b} {s.thing}."
        )
    if kind == 5:
        return (
            f"{s.has(p, a + b)} {s.has(q, b)}{minus} "
            f"{p} needs to give up {a} {s.thing} to have as many as {q}."
        )
    if kind == 6:
        c = rng.randint(1, 99 - a - b) if a + b < 99 else 0
        return (
            f"{s.has(p, a)} {s.gain(p, b)} {a}+{b}={a + b}. "
            f"{s.gain(p, c)} {a + b}+{c}={a + b + c}. "
            f"{now} {s.pronoun(p)} {verb} {a + b + c} {s.thing}."
        )
    if kind == 7:
        c = rng.randint(0, a)
        return (
            f"{s.has(p, a + b)} {s.lose(p, b)} {a + b}-{b}={a}. {s.lose(p, c)} {a}-{c}={a - c}. "
            f"{now} {s.pronoun(p)} {verb} {a - c} {s.thing}."
        )
    owners = [(p, a), (q, b), (r, rng.randint(1, 99))]
    rng.shuffle(owners)
    sentences = " ".join(s.has(who, n) for who, n in owners)
    if kind == 8:
        who, n = rng.choice(owners)
        return f"{sentences} {s.say('Who', 'We ask who')} has {n} {s.thing}? That is {who}."
    if s.rng.random() < 0.3:
        return f"{sentences} {p} and {q} together: {a}+{b}={a + b}."
    (p, a), (q, b) = sorted(rng.sample(owners, 2), key=lambda owner: -owner[1])
    more = s.say(f"{p} has more than {q}", f"{q} has fewer than {p}", f"{q} needs as many as {p}")
    return f"{sentences} {more}: {a}-{b}={a - b}."

def one_step_question(rng):
    """A question that one equation answers, and that equation."""
    s = Scene(rng)
    p, q, _ = s.people
    a, b = rng.randint(1, 98), rng.randint(1, 98)
    plus = rng.random() < 0.5
    if plus and a + b > 99:
        a, b = 99 - a, 99 - b
    if not plus and a < b:
        a, b = b, a
    if plus:
        told, ask = rng.choice(
            [
                ([s.has(p, a), s.gain(p, b)], s.how_many(p)),
                ([s.has(p, a), s.compare(q, p, b, "more")], s.how_many(q)),
                ([s.has(p, a), s.has(q, b)], s.how_many_in_all(p, q)),
            ]
        )
    else:
        told, ask = rng.choice(
            [
                ([s.has(p, a), s.lose(p, b)], s.how_many(p)),
                ([s.has(p, a), s.compare(q, p, b, "fewer")], s.how_many(q)),
                ([s.has(p, a), s.has(q, b)], s.how_many_more(p, q)),
            ]
        )
    sign = "+" if plus else "-"
    return f"{' '.join(told)} {ask} {a}{sign}{b}={evaluate(a, sign, b)}."

def plain_story(rng):
    """Two or three sentences of the same world without arithmetic."""
    s = Scene(rng)
    p, q, r = s.people
    place, look, other = rng.choice(PLACES), rng.choice(LOOKS), rng.choice(LOOKS)
    lines = [
        f"{p} and {q} walk to the {place}.",
        f"The {s.thing} in the {place} are {look} and {other}.",
        f"{p} likes {look} {s.thing}, but {q} likes {other} {s.thing}.",
        f"{r} keeps the {s.thing} at the {place}.",
        f"Who has more {s.thing}, {p} or {r}?",
        f"{q} counts the {look} {s.thing} of {r}.",
        f"{p} has as many {s.thing} as {q}.",
        f"{p} has twice as many {s.thing} as {r}.",
        f"{r} had some {s.thing} at first and gave them to {q}.",
        f"How many {s.thing} does {p} see at the {place}?",
        f"{q} knows the answer.",
        f"The answer is in the {place}.",
        f"What was in the {place} before?",
        f"Did {p} see the {s.thing} at first?",
        f"The two of them did not count the {s.thing}.",
        f"They put the {s.thing} of {q} together.",
        f"{s.say('They', 'Together they')} gave away all {s.thing}.",
    ]
    return " ".join(rng.sample(lines, rng.choice((2, 3))))

def all_equations():
    """Every a+b and a-b whose numbers all lie between 0 and 99, as (question, answer)."""
    pairs = [(f"{a}+{b}=", a + b) for a in range(100) for b in range(100 - a)]
    return pairs + [(f"{a}-{b}=", a - b) for a in range(100) for b in range(a + 1)]

def pretraining_text():
    """(documents for training, documents held out, held-out equations). A tenth of the equations is
    never trained on."""
    rng = random.Random(1)
    equations = all_equations()
    rng.shuffle(equations)
    held_out, known = equations[: len(equations) // 10], equations[len(equations) // 10 :]
    documents = []
    for repeat in range(3):
        rng.shuffle(known)
        for i in range(0, len(known), 6):
            documents.append(
                " ".join(f"{question}{answer}." for question, answer in known[i : i + 6])
            )
    documents += (
        [story(rng) for _ in range(12000)]
        + [one_step_question(rng) for _ in range(6000)]
        + [plain_story(rng) for _ in range(4000)]
    )
    rng.shuffle(documents)
    return documents[500:], documents[:500], held_out

def train_tokenizer(text):
    """The byte-pair ranks {token bytes: rank} of the text, by tiktoken's own trainer."""
    from tiktoken._educational import bpe_train

    return bpe_train(data=text, vocab_size=VOCAB - 1, pat_str=PATTERN, visualise=None)

def write(path, text):
    """Writes a whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="folder to write to (default: the folder of this script)",
    )
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    documents, held_out_documents, held_out_equations = pretraining_text()
    splits = split_problems()
    write(out / "pretrain.txt", "\n".join(documents) + "\n")
    write(out / "pretrain_val.txt", "\n".join(held_out_documents) + "\n")
    write(
        out / "arithmetic.jsonl",
        "".join(
            json.dumps({"prompt": question, "completion": f"{answer}.", "answer": answer}) + "\n"
            for question, answer in held_out_equations
        ),
    )
    for split, problems in splits.items():
        write(out / f"{split}.jsonl", "".join(json.dumps(problem) + "\n" for problem in problems))
    ranks = train_tokenizer("\n".join(documents[:1000]))
    write(
        out / "tokenizer.tiktoken",
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()),
    )
    for path in sorted(out.glob("*.*")):
        print(f"{path.stat().st_size:>10,} bytes  {path.name}")

if __name__ == "__main__":
    main()
