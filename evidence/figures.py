"""The pictures of the comparisons, each from comparison.json alone; evidence.report draws them."""
import itertools
import re
import statistics

import numpy as np

from data.runs import COLOURS, new_figure, save_figure
from evidence.paired import base_name, by_seed, joined, paired_difference, sweep_title
from evidence.peers import PEERS

ALL_VALUES = {"train-size": "all", "targets": "all linear"}  # what a sweep's empty value means
STYLES = {"lora": ("#000000", "o"), "nalora": ("#0072B2", "s"), "nalora-neutral": ("#56B4E9", "s"),
          "random-uniform": ("#E69F00", "s"), "nalora-shuffled": ("#CC79A7", "s"),
          "nalora-mask": ("#0072B2", "^"), "nalora-mask:score=rho_prime": ("#009E73", "v"),
          "nalora-mask:score=downstream": ("#D55E00", "D"), "shuffled-mask": ("#CC79A7", "s"),
          "shuffled-mask:score=rho_prime": ("#DDCC77", "v"), "redrawn-mask": ("#882255", "D"),
          "turns-mask": ("#009E73", "o"), "credit-mask": ("#56B4E9", "P"),
          "random-mask": ("#E69F00", "v"), "inverted-mask": ("#D55E00", "X"),
          "nalora-scale": ("#009E73", "D"), "uniform-scale": ("#CC79A7", "D"),
          "full": ("#999999", "P"), "full, another seed": ("#999999", "X")}
# The pairs that the figure of differences shows: a part of the method and LoRA, or its control.
PAIRS = [("nalora", "lora"), ("nalora", "nalora-shuffled"), ("nalora", "random-uniform"),
         ("nalora-mask", "lora"), ("nalora-mask", "shuffled-mask"), ("nalora-mask", "random-mask"),
         ("nalora-scale", "lora"), ("nalora-scale", "uniform-scale"),
         *((peer, "lora") for peer in PEERS), *((f"nalora-{peer}", peer) for peer in PEERS)]
ROWS = {"random-mask": "random mask: the same rows always",
        "nalora-mask": "derivative mask: the most responsive rows",
        "redrawn-mask": "redrawn mask: other rows in each step",
        "turns-mask": "turns mask: all rows in turn", "lora": "LoRA: all rows in every step"}
# {file: (column, what it shows of the sweeps over keep)}
KEEP = {"masks.png": ("val_loss", {"toy, AdamW": ["random-mask", "nalora-mask", "redrawn-mask",
                                                  "turns-mask", "lora"]}),
        "keep.png": ("val_loss", dict.fromkeys(
            ("toy, SGD", "SmolLM2, AdamW"), ["inverted-mask", "random-mask", "shuffled-mask",
                                             "nalora-mask", "redrawn-mask", "lora"])),
        "scores.png": ("val_loss", dict.fromkeys(
            ("toy, AdamW", "toy, SGD"), ["nalora-mask", "nalora-mask:score=downstream",
                                         "nalora-mask:score=rho_prime", "lora"])),
        "misalignment.png": ("misalignment", {"toy, AdamW": [
            "random-mask", "shuffled-mask", "nalora-mask", "redrawn-mask", "turns-mask", "lora"]})}

def draw_comparison(comparison, folder, anew=False):
    """All figures of a comparison; anew: only those that the folder has already."""
    rows = comparison["rows"]
    paired = len(comparison["seeds"]) > 1 and shown_pairs(comparison["variants"])
    aligned = any(row.get("weight_cosine") is not None for row in rows)
    recorded = any(len(row.get("history", [])) > 1 for row in rows)
    figures = {"differences.png": (draw_differences, paired),
               "alignment.png": (draw_alignment, aligned),
               "training.png": (draw_training, recorded),
               "homogeneity.png": (draw_one_homogeneity, True)}
    if comparison["sweep"]:
        figures = {"sweep.png": (draw_one_sweep, True)}
    for name, (draw, possible) in figures.items():
        if possible and (not anew or (folder / name).exists()):
            draw(comparison, folder / name)

WORDS = {"full": "full fine-tuning", "lora": "LoRA", "nalora": "NA-LoRA",
         "nalora-neutral": "NA-LoRA with neutral budget", "nalora-mask": "derivative mask",
         "nalora-scale": "homogeneity scale", "nalora-shuffled": "NA-LoRA with shuffled mask",
         "shuffled-mask": "shuffled mask", "random-mask": "random mask",
         "redrawn-mask": "redrawn mask", "inverted-mask": "inverted mask",
         "turns-mask": "turns mask", "credit-mask": "credit mask",
         "uniform-scale": "uniform scale", "random-uniform": "random mask, uniform scale",
         "nora": "NoRA", "nora++": "NoRA++", "loran": "LoRAN", "dora": "DoRA", "rslora": "rsLoRA",
         "lora+": "LoRA+", "pissa": "PiSSA", "score=rho_prime": "by |ρ'|",
         "score=downstream": "by |φ'u| and W_down", "mask=redrawn": "redrawn mask"}

def in_words(label):
    """What a page calls a variant: "nalora-mask:score=rho_prime" is "derivative mask, by |ρ'|"."""
    method, _, flags = label.partition(":")
    if method.startswith("full, "):
        return method.replace("full", WORDS["full"], 1)
    base = method.removeprefix("nalora-")
    known = WORDS.get(method) or (f"NA-LoRA on {WORDS[base]}" if base in WORDS else method)
    return ", ".join([known, *(WORDS.get(f, f.replace("=", " ")) for f in flags.split(",") if f)])

def styles(labels):
    """{label: (colour, marker)}: those of STYLES, black stars and pluses for parts of full fine-
    tuning's change, others in turn."""
    free = itertools.cycle(["#009E73", "#CC79A7", "#56B4E9", "#999999"])

    def style(label):
        known = STYLES.get("full" if label.startswith("full:") else label)
        if not known and label.startswith("full, "):
            known = ("#000000", "*" if "rank" in label else "P")
        return known or (next(free), "d")

    return {label: style(label) for label in labels}

def layer_means(comparison, label, column):
    """[mean over seeds] per FFN."""
    rows = [row["layers"] for row in comparison["rows"]
            if row["variant"] == label and column in row.get("layers", ())]
    return np.mean([layers[column] for layers in rows], axis=0)

def draw_alignment(comparison, path):
    """Per FFN and variant: cosine of the gate's weight change with full fine-tuning's, against that
    of the change of selection; and M of each FFN."""
    labels = dict.fromkeys(row["variant"] for row in comparison["rows"])
    method = {label: comparison["variants"].get(label, {"method": label})["method"]
              for label in labels}
    labels = [label for label in labels if method[label] != "full"]
    if len(labels) > 6:  # too many to tell apart
        rank = next((label for label in labels if label.startswith("full, best")), None)
        shown = ("lora", "nalora", "nalora-shuffled", "full, another seed", rank)
        labels = [label for label in labels if method[label] in shown]
    figure, (left, right) = new_figure(2, width=8.3, height=4.4)
    for label, (colour, marker) in styles(labels).items():
        style = {"color": colour, "marker": marker, "linestyle": "", "label": in_words(label),
                 "markersize": 8 if "full, " in label else 5}
        weight, shift, missed = (layer_means(comparison, label, column)
                                 for column in ("weight_cosine", "shift_cosine", "misalignment"))
        left.plot(weight, shift, **style)
        right.plot(range(len(missed)), missed, **{**style, "linestyle": "-", "linewidth": 0.8})
    left.plot([0, 1], [0, 1], color="0.8", zorder=0)
    left.set(xlabel="alike in the gate's weights (cosine)", ylabel="alike in selection (cosine)",
             title="each layer against full fine-tuning's", xlim=(0, 1.03), ylim=(0, 1.03))
    right.axhline(1, color="0.8", zorder=0)
    right.text(0.98, 1.01, "as if not adapted", color="0.5", ha="right", va="bottom",
               transform=right.get_yaxis_transform())
    right.set(xlabel="layer", ylabel="misalignment M", title="how far the selection is missed",
              ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False,
                  ncols=3)
    save_figure(figure, path)

def draw_training(comparison, path):
    """k_hat over the steps of NA-LoRA's runs, a line per FFN: mean over seeds with a band of one
    standard deviation. On the right the scale that follows from it."""
    label = next(row["variant"] for row in comparison["rows"] if row.get("history"))
    histories = [row["history"] for row in comparison["rows"] if row["variant"] == label]
    figure, (ax,) = new_figure(1, width=8.3, height=3.4)
    steps = [record[0] for record in histories[0]]
    values = np.array([[record[1] for record in history] for history in histories])
    colours = figure_colours(values.shape[2])  # of (seeds, records, FFNs)
    for i, colour in enumerate(colours):
        mean = values[:, :, i].mean(0)
        deviation = values[:, :, i].std(0)
        ax.plot(steps, mean, color=colour, label=f"layer {i}")
        ax.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
    ax.axhline(1, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="step", ylabel="effective homogeneity k̂ of the batch")
    right = ax.secondary_yaxis("right", functions=(reciprocal, reciprocal))
    right.set_ylabel("step scale 1/k̂")
    right.spines["right"].set_visible(True)
    figure.legend(frameon=False, loc="outside right center", ncols=1 + len(colours) // 16,
                  fontsize=7 if len(colours) > 8 else 9)
    save_figure(figure, path)

def reciprocal(values):
    return 1 / np.maximum(values, 1e-6)     # an axis is asked for more than it shows

def figure_colours(count):
    """`count` colours that can be told apart without colour vision: a sequence from dark to light
    if they are many."""
    import matplotlib
    if count <= 6:
        return COLOURS[:count]
    return [matplotlib.colormaps["viridis"](i / count) for i in range(count)]

def draw_one_homogeneity(comparison, path):
    draw_homogeneity([comparison], path)

def draw_homogeneity(comparisons, path):
    """k_hat by layer of each base model, on validation answers, before training and after."""
    if not comparisons:
        return
    figure, axes = new_figure(len(comparisons), width=8.3, height=3.4)
    for ax, comparison in zip(axes, comparisons):
        k_hat = comparison["base"]["layers"]["k_hat"]
        ax.plot(range(len(k_hat)), k_hat, color="0.4", marker="P", label="base")
        for label in ("full", "lora", "nalora"):
            if any(row["variant"] == label for row in comparison["rows"]):
                colour, marker = STYLES[label] if label != "full" else (COLOURS[1], "v")
                means = layer_means(comparison, label, "k_hat")
                size = 7 if label == "lora" else 4  # drawn over each other where they agree
                ax.plot(range(len(k_hat)), means, color=colour, marker=marker, markersize=size,
                        markerfacecolor="none", lw=1, label=in_words(label))
        ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        ax.set(xlabel="layer", ylabel="effective homogeneity k̂",
               title=base_name(comparison["base"]["path"]))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    save_figure(figure, path)

def shown_pairs(variants):
    """PAIRS as far as they are there; if these are few, every variant and LoRA, too."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(variants)]
    if "lora" in variants and len(pairs) < 5:
        pairs += [(label, "lora") for label in variants if label != "lora"]
    return list(dict.fromkeys(pairs))

def draw_differences(comparison, path):
    """Paired differences in validation loss: a tick per seed, the mean and its 95 % bootstrap
    interval; blue is better, orange worse, grey not seen to differ."""
    loss = {label: by_seed(comparison, label, "val_loss") for label in comparison["variants"]}
    shared = {pair: [loss[pair[0]][seed] - loss[pair[1]][seed] for seed in loss[pair[0]]
                     if seed in loss[pair[1]]] for pair in shown_pairs(comparison["variants"])}
    shared = {pair: values for pair, values in list(shared.items())[::-1] if len(values) > 1}
    if not shared:
        return
    figure, (ax,) = new_figure(1, width=8.3, height=0.36 * len(shared) + 1.1)
    reach = 6 * np.median([abs(statistics.mean(v)) + np.std(v) for v in shared.values()])
    for y, ((ours, theirs), values) in enumerate(shared.items()):
        mean, low, high, _ = paired_difference(loss[ours], loss[theirs])
        colour = "#0072B2" if mean < 0 else "#D55E00"
        if low <= 0 <= high:
            colour = "#999999"
        if abs(mean) > reach:  # off the scale that the rest need: its number instead
            ax.text(0.98, y, f"{mean:+.3f}", color=colour, ha="right", va="center",
                    transform=ax.get_yaxis_transform())
            continue
        ax.plot(values, [y - 0.28] * len(values), "|", color=colour, markersize=5, alpha=0.7)
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour,
                    capsize=2, markersize=4)
    ax.axvline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_yticks(range(len(shared)), [f"{in_words(a)} − {in_words(b)}" for a, b in shared])
    ax.set_xlabel("difference in validation loss (nats per token); ← the first is better")
    ax.set_ylim(-0.6, len(shared) - 0.5)
    save_figure(figure, path)

def draw_one_sweep(comparison, path):
    """Validation loss and M against the value of a sweep."""
    specs = dict.fromkeys(v["spec"] for v in comparison["variants"].values())
    columns = [column for column in ("val_loss", "misalignment")
               if any(row.get(column) for row in comparison["rows"])]
    draw_panels([(comparison, column, list(specs)) for column in columns], path)

def draw_keep(comparisons, results):
    """The figures of KEEP, from all sweeps over keep."""
    titles = dict.fromkeys(map(sweep_title, comparisons))
    sweeps = {t: joined([c for c in comparisons if sweep_title(c) == t]) for t in titles}
    for name, (column, panels) in KEEP.items():
        panels = [(sweeps[title], column, specs) for title, specs in panels.items()
                  if title in sweeps]
        if panels:
            draw_panels(panels, results / name, ROWS if name == "masks.png" else None)

def draw_panels(panels, path, legend=None):
    """(comparison, column, specs) side by side: the column against the value of the sweep, a curve
    per spec in the order of the legend, which says `legend` of it, if given."""
    figure, axes = new_figure(len(panels), width=8.3, height=3.9)
    specs = list(dict.fromkeys(spec for _, _, specs in panels for spec in specs))
    look = styles(specs)
    handles = {}
    for ax, (comparison, column, shown) in zip(axes, panels):
        draw_curves(ax, comparison, {spec: look[spec] for spec in shown}, column)
        ax.set(title=sweep_title(comparison), ylabel="misalignment M"
               if column == "misalignment" else "validation loss (nats per token)")
        shown = dict(zip(*ax.get_legend_handles_labels()[::-1]))
        handles = shown | handles
    there = [spec for spec in specs if in_words(spec) in handles]
    place = {"loc": "outside right center"} if len(panels) == 1 else {"loc": "outside lower center",
                                                                     "ncols": 3}
    if legend:
        place = {"loc": "upper right", "bbox_to_anchor": (0.98, 0.92), "fontsize": "large"}
    figure.legend([handles[in_words(spec)] for spec in there],
                  [(legend or {}).get(spec, in_words(spec)) for spec in there], frameon=False,
                  **place)
    save_figure(figure, path)

def draw_curves(ax, comparison, look, column):
    """A column against the value of the sweep with bands of one standard deviation; dashed across,
    what has no value. If there is but one value: a dot with a bar per spec, the names beside it."""
    variants = comparison["variants"]
    values = list(dict.fromkeys(v["value"] for v in variants.values() if v["value"] is not None))
    ticks = [re.sub(r"(,.*|^.*?=)", "", value) or ALL_VALUES[comparison["sweep"]]
             for value in values]
    names = []
    for spec, (colour, marker) in look.items():
        labels = [label for label, v in variants.items() if v["spec"] == spec]
        seen = [list(by_seed(comparison, label, column).values()) for label in labels]
        if not any(map(any, seen)):  # not measured, or the reference itself, whose M is 0
            continue
        means = np.array([np.mean(x) for x in seen])
        deviations = np.array([np.std(x, ddof=1) if len(x) > 1 else 0 for x in seen])
        style = {"color": colour, "label": in_words(spec)}
        if len(values) == 1:
            ax.errorbar([len(names)], means, yerr=deviations, fmt=marker, capsize=3, **style)
            names.append(in_words(spec))
        elif variants[labels[0]]["value"] is None:
            ax.axhline(means[0], linestyle="--", **style)
            ax.axhspan(means[0] - deviations[0], means[0] + deviations[0], color=colour, alpha=0.15,
                       lw=0)
        else:
            ax.plot(range(len(values)), means, marker=marker, markersize=5, **style)
            ax.fill_between(range(len(values)), means - deviations, means + deviations,
                            color=colour, alpha=0.15, lw=0)
    ax.set_xticks(range(len(values)), ticks)
    sweep = comparison["sweep"]
    ax.set_xlabel({"keep": "share of the gate rows that move in a step",
                   "train-size": "training examples"}.get(sweep, sweep))
    if len(values) == 1:
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right")
        ax.set_xlabel(f"{ax.get_xlabel()}: {ticks[0]}")

def draw_at_work(traces, keep, path):
    """How NA-LoRA acts in one run: importance of every gate channel over steps, and how far each
    row of B_gate travelled, against LoRA's. traces: {method: what measures.trace gives}."""
    importance = traces["nalora"]["importance"]
    names = list(importance)
    names = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(4, len(names)))]
    highest = max(np.quantile(importance[name], 0.995) for name in names)
    figure, axes = new_figure(len(names), width=8.3, height=4.6, rows=2)
    for (top, bottom), name in zip(zip(*axes), names):
        order = np.argsort(-importance[name][-1])
        image = top.imshow(np.array(importance[name])[:, order].T, aspect="auto", cmap="viridis",
                           vmin=0, vmax=highest, interpolation="nearest",
                           extent=(0, traces["nalora"]["steps"], len(order), 0))
        top.axhline(keep * len(order), color="white", linestyle="--", lw=1)
        bottom.axvline(keep * len(order), color="0.6", linestyle="--", lw=1)
        top.set(xlabel="step", title="layer " + re.findall(r"\d+", name)[0])
        for method, colour in (("lora", COLOURS[7]), ("nalora", COLOURS[0])):
            if method in traces:
                bottom.plot(traces[method]["travel"][name][order], ".", color=colour,
                            markersize=2.5, label=in_words(method))
        bottom.set(xlabel="gate channel", ylim=(0, None))
    axes[0][0].set_ylabel("gate channel, sorted")
    axes[1][0].set_ylabel("how far its row of B moved")
    figure.legend(*axes[1][-1].get_legend_handles_labels(), frameon=False, markerscale=4, ncols=2,
                  loc="outside lower center")
    figure.colorbar(image, ax=axes[0], label="importance", pad=0.01)
    save_figure(figure, path)
