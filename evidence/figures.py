"""The pictures of the comparisons, each from comparison.json alone; evidence.report draws them."""
import itertools
import math
import re
import statistics

import numpy as np

from data.runs import COLOURS, new_figure, save_figure
from evidence.paired import (DIFFERENCES, HIGHER_IS_BETTER, base_name, by_seed, paired_difference,
                             sweep_title)

README_MASKS = ("lora", "nalora-mask", "shuffled-mask", "random-mask", "redrawn-mask")
ALL_VALUES = {"train-size": "all", "targets": "all linear"}  # what a sweep's empty value means
STYLES = {"lora": ("#000000", "o"), "nalora": ("#0072B2", "s"), "nalora-neutral": ("#56B4E9", "s"),
          "random-uniform": ("#E69F00", "s"), "nalora-shuffled": ("#CC79A7", "s"),
          "nalora-mask": ("#0072B2", "^"), "nalora-mask:score=rho_prime": ("#009E73", "^"),
          "nalora-mask:score=downstream": ("#56B4E9", "^"), "shuffled-mask": ("#CC79A7", "^"),
          "shuffled-mask:score=rho_prime": ("#DDCC77", "v"), "redrawn-mask": ("#882255", "^"),
          "random-mask": ("#E69F00", "^"), "inverted-mask": ("#D55E00", "v"),
          "nalora-scale": ("#009E73", "D"), "uniform-scale": ("#CC79A7", "D"),
          "full": ("#999999", "P"), "full, another seed": ("#999999", "X")}

def draw_comparison(comparison, folder, anew=False):
    """All figures of a comparison; anew: only those that the folder has already."""
    rows = comparison["rows"]
    several = len(comparison["seeds"]) > 1
    aligned = any(row.get("weight_cosine") is not None for row in rows)
    recorded = any(len(row.get("history", [])) > 1 for row in rows)
    figures = {"differences.png": (draw_differences, several and "lora" in comparison["variants"]),
               "alignment.png": (draw_alignment, aligned),
               "training.png": (draw_training, recorded),
               "homogeneity.png": (draw_one_homogeneity, True)}
    if comparison["sweep"]:
        figures = {"sweep.png": (draw_one_sweep, True)}
    for name, (draw, possible) in figures.items():
        if possible and (not anew or (folder / name).exists()):
            draw(comparison, folder / name)

WORDS = {"full": "full fine-tuning", "lora": "LoRA", "nalora": "NA-LoRA",
         "nalora-neutral": "NA-LoRA, mean step kept", "nalora-mask": "mask alone",
         "nalora-scale": "scale alone", "nalora-shuffled": "NA-LoRA, mask on other rows",
         "shuffled-mask": "mask on other rows", "random-mask": "fixed random rows",
         "redrawn-mask": "random rows, redrawn", "inverted-mask": "least responsive rows",
         "turns-mask": "rows in turns", "credit-mask": "rows in turns, by importance",
         "uniform-scale": "mean scale for all", "random-uniform": "random rows, mean scale",
         "nora": "NoRA", "nora++": "NoRA++", "loran": "LoRAN", "dora": "DoRA", "rslora": "rsLoRA",
         "lora+": "LoRA+", "pissa": "PiSSA", "score=rho_prime": "by |ρ'|",
         "score=downstream": "by |φ'u| and W_down", "mask=redrawn": "random rows, redrawn"}

def in_words(label):
    """What a figure calls a variant: "nalora-mask:score=rho_prime" is "mask alone, by |ρ'|"."""
    method, _, flags = label.partition(":")
    base = method.removeprefix("nalora-")
    known = WORDS.get(method) or (f"NA-LoRA on {WORDS[base]}" if base in WORDS else method)
    if method == "nalora-mask" and "score=" not in flags:
        known += ", by |φ'|"
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
    of the change of selection."""
    labels = dict.fromkeys(row["variant"] for row in comparison["rows"])
    method = {label: comparison["variants"].get(label, {"method": label})["method"]
              for label in labels}
    labels = [label for label in labels if method[label] != "full"]
    if len(labels) > 8:  # too many to tell apart
        shown = ("lora", "nalora", "nalora-shuffled", "random-mask", "inverted-mask")
        labels = [label for label in labels
                  if method[label] in shown or label.startswith("full, ")]
    figure, (left, right) = new_figure(2, width=11, height=4.6)
    for label, (colour, marker) in styles(labels).items():
        style = {"color": colour, "marker": marker, "linestyle": "", "label": in_words(label),
                 "markersize": 9 if "full, " in label else 5}
        weight, shift, missed = (layer_means(comparison, label, column)
                                 for column in ("weight_cosine", "shift_cosine", "misalignment"))
        left.plot(weight, shift, **style)
        right.plot(range(len(missed)), missed, **{**style, "linestyle": "-", "linewidth": 0.8})
    left.plot([0, 1], [0, 1], color="0.8", zorder=0)
    left.set(xlabel="cosine of gate weight change with full fine-tuning's",
             ylabel="cosine of selection shift with full fine-tuning's", xlim=(0, 1.03),
             ylim=(0, 1.03))
    right.axhline(1, color="0.8", zorder=0)
    right.set(xlabel="layer", ylabel="selection misalignment M (1: as if not adapted)",
              ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    save_figure(figure, path)

def draw_training(comparison, path):
    """k_hat and step scale over the steps of NA-LoRA's runs, a line per FFN: mean over seeds with a
    band of one standard deviation."""
    label = next(row["variant"] for row in comparison["rows"] if row.get("history"))
    histories = [row["history"] for row in comparison["rows"] if row["variant"] == label]
    figure, axes = new_figure(2, width=10, height=3.4)
    steps = [record[0] for record in histories[0]]
    titles = ("effective homogeneity k_hat of the batch", "step scale 1 / clip(k_hat, 1/2, 2)")
    for ax, column, title in zip(axes, (1, 2), titles):
        values = [[record[column] for record in history] for history in histories]
        values = np.array(values)  # (seeds, records, FFNs)
        colours = figure_colours(values.shape[2])
        for i, colour in enumerate(colours):
            mean = values[:, :, i].mean(0)
            deviation = values[:, :, i].std(0)
            ax.plot(steps, mean, color=colour, label=f"layer {i}")
            ax.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2,
                            lw=0)
        ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        ax.set(xlabel="step", ylabel=title)
    axes[0].set_title(in_words(label))
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5),
                   ncols=1 + len(colours) // 16, fontsize=7 if len(colours) > 8 else 9)
    save_figure(figure, path)

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
    figure, axes = new_figure(len(comparisons), width=5.5 * len(comparisons), height=3.4)
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
        ax.set(xlabel="layer", ylabel="effective homogeneity k_hat", title=base_name(comparison))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    save_figure(figure, path)

def draw_differences(comparison, path):
    """Paired difference of every variant to LoRA: one point per seed, the mean and its 95 %
    bootstrap interval; blue is better, orange worse."""
    labels = [label for label, v in comparison["variants"].items() if v["method"] != "lora"][::-1]
    columns = {k: v for k, v in DIFFERENCES.items() if by_seed(comparison, "lora", k)}
    figure, axes = new_figure(len(columns), width=12, height=0.4 * len(labels) + 1.6)
    for ax, (column, (title, digits)) in zip(axes, columns.items()):
        lora = by_seed(comparison, "lora", column)
        unit = " nats" if "loss" in column else ""
        better = "better →" if column in HIGHER_IS_BETTER else "← better"
        own = {label: by_seed(comparison, label, column) for label in labels}
        if column == "misalignment":  # full fine-tuning is its reference
            own |= {label: {} for label in labels
                    if comparison["variants"][label]["method"] == "full"}
        differences = {
            label: [own[label][seed] - lora[seed] for seed in lora if seed in own[label]]
            for label in labels}
        spreads = [abs(statistics.mean(d)) + np.std(d) for d in differences.values() if d]
        reach = 6 * np.median(spreads)
        for y, (label, values) in enumerate(differences.items()):
            if len(values) < 2:
                continue
            mean, low, high, _ = paired_difference(own[label], lora)
            colour = "#0072B2" if (mean > 0) == (column in HIGHER_IS_BETTER) else "#D55E00"
            if low <= 0 <= high:
                colour = "#999999"
            if abs(mean) > reach:  # off the scale that the rest need: its number instead
                ax.text(0.98, y, f"{mean:+.{digits - 1}f}", color=colour, ha="right", va="center",
                        transform=ax.get_yaxis_transform())
                continue
            ax.plot(values, [y - 0.3] * len(values), "|", color=colour, markersize=5, alpha=0.7)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour,
                        capsize=2, markersize=4)
        ax.axvline(0, color="0.6", lw=0.8, zorder=0)
        words = [in_words(label) if ax is axes[0] else "" for label in labels]
        ax.set_yticks(range(len(labels)), words)
        ax.set_title(title)
        below = f"minus LoRA's ({statistics.mean(lora.values()):.{digits}f}{unit})\n{better}"
        ax.set_xlabel(below, fontsize="small")
        ax.set_ylim(-0.7, len(labels) - 0.5)
        ax.locator_params(axis="x", nbins=3)
    save_figure(figure, path)

def draw_one_sweep(comparison, path):
    draw_sweeps([comparison], path)

def draw_sweeps(comparisons, path, columns=("val_loss", "misalignment"), only=None):
    """Sweeps side by side: validation loss against the value of each, a curve per method (`only`
    some) with a band of one standard deviation over seeds, and M where it is known."""
    panels = [(c, k) for k in columns for c in comparisons if any(row.get(k) for row in c["rows"])]
    if not panels:
        return
    rows = 1 + (len(panels) > 3)
    columns = math.ceil(len(panels) / rows)
    figure, axes = new_figure(columns, width=3.6 * columns + 1.5 * (columns == 1),
                              height=3.2 * rows + 0.9, rows=rows)
    axes = np.ravel(axes)
    handles = {}
    specs = dict.fromkeys(v["spec"] for c in comparisons for v in c["variants"].values())
    look = {k: style for k, style in styles(specs).items() if only is None or k in only}
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, (comparison, column) in zip(axes, panels):
        draw_curves(ax, comparison, look, column)
        what = "loss" if column == "val_loss" else "M"
        ax.set(title=f"{what} ({sweep_title(comparison)})")
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns + 1,
                  frameon=False)
    save_figure(figure, path)

def draw_curves(ax, comparison, look, column="val_loss"):
    """A column against the value of the sweep with bands of one standard deviation, or side by side
    if there is but one value; across, what has none."""
    variants = comparison["variants"]
    values = list(dict.fromkeys(v["value"] for v in variants.values() if v["value"] is not None))
    ticks = [re.sub(r"(,.*|^.*?=)", "", value) or ALL_VALUES[comparison["sweep"]]
             for value in values]
    specs = dict.fromkeys(v["spec"] for v in variants.values())
    for i, method in enumerate(spec for spec in specs if spec in look):
        colour, marker = look[method]
        labels = [label for label, v in variants.items() if v["spec"] == method]
        seen = [list(by_seed(comparison, label, column).values()) for label in labels]
        if not any(map(any, seen)):  # not measured, or the reference itself, whose M is 0
            continue
        means = np.array([np.mean(x) for x in seen])
        deviations = np.array([np.std(x, ddof=1) if len(x) > 1 else 0 for x in seen])
        low = means - deviations
        high = means + deviations
        if variants[labels[0]]["value"] is None:
            ax.axhline(means[0], linestyle="--", color=colour, label=in_words(method))
            ax.axhspan(low[0], high[0], color=colour, alpha=0.2, lw=0)
        elif len(values) == 1:
            ax.errorbar([0.1 * i], means, yerr=deviations, fmt=marker, color=colour,
                        label=in_words(method), markersize=4, capsize=3)
        else:
            ax.plot(range(len(values)), means, "-", marker=marker, color=colour,
                    label=in_words(method), markersize=4)
            ax.fill_between(range(len(values)), low, high, color=colour, alpha=0.15, lw=0)
    ax.set_xticks(range(len(values)), ticks)
    sweep = comparison["sweep"]
    ax.set(xlabel="share of rows that move" if sweep == "keep" else sweep,
           ylabel="misalignment M" if column == "misalignment"
           else "validation loss (nats per token)")
    if len(values) == 1:
        ax.set_xlim(-0.3, 0.8)
        ax.set_xticks([0.25], ticks)

def draw_at_work(traces, keep, path):
    """How NA-LoRA acts in one run: importance of every gate channel over steps, and how far each
    row of B_gate travelled, against LoRA's. traces: {method: what measures.trace gives}."""
    importance = traces["nalora"]["importance"]
    names = list(importance)
    names = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(4, len(names)))]
    highest = max(np.quantile(importance[name], 0.995) for name in names)
    figure, axes = new_figure(len(names), width=12, height=5.8, rows=2)
    for (top, bottom), name in zip(zip(*axes), names):
        order = np.argsort(-importance[name][-1])
        image = top.imshow(np.array(importance[name])[:, order].T, aspect="auto", cmap="viridis",
                           vmin=0, vmax=highest, interpolation="nearest",
                           extent=(0, traces["nalora"]["steps"], len(order), 0))
        top.axhline(keep * len(order), color="white", linestyle="--", lw=1)
        bottom.axvline(keep * len(order), color="0.6", linestyle="--", lw=1)
        top.set(xlabel="step", title=name.removesuffix(".mlp").removeprefix("model."))
        for method, colour in (("lora", COLOURS[7]), ("nalora", COLOURS[0])):
            if method in traces:
                bottom.plot(traces[method]["travel"][name][order], ".", color=colour,
                            markersize=2.5, label=in_words(method))
        bottom.set(xlabel="gate channel, sorted", ylim=(0, None))
    axes[0][0].set_ylabel("gate channel, sorted")
    axes[1][0].set_ylabel("path length of row\n(sum of norms of its steps)")
    axes[1][-1].legend(frameon=False, markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.colorbar(image, ax=axes[0], label="importance\n(moving average of mean |φ'|)", pad=0.01)
    save_figure(figure, path)
