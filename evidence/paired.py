"""Paired differences: the same seed with two methods, and how sure their mean is."""
import statistics
from pathlib import Path

import numpy as np

# table: {column of a run: (title, digits)}
COLUMNS = {
    "results": {"val_loss": ("validation loss", 4), "test_exact_match": ("exact match", 3),
                "text_loss_increase": ("forgetting: text loss", 3),
                "arithmetic_accuracy": ("held-out equations", 3)},
    "selection": {"misalignment": ("misalignment M", 3),
                  "shift_cosine": ("selection-shift cosine", 3),
                  "weight_cosine": ("weight cosine", 3), "entropy": ("selection entropy", 4),
                  "rows_moved": ("gate rows moved", 2)}}
# what is compared seed by seed
DIFFERENCES = {**COLUMNS["results"], "misalignment": COLUMNS["selection"]["misalignment"]}
HIGHER_IS_BETTER = ("test_exact_match", "arithmetic_accuracy")

def bootstrap_interval(values, resamples=10_000):
    """(low, high) of the 95 % percentile bootstrap interval of the mean of the values (N,)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)

def by_seed(comparison, label, column):
    """{seed: value} of a variant; seeds where the column was not measured are missing."""
    return {row["seed"]: row[column] for row in comparison["rows"]
            if row["variant"] == label and row.get(column) is not None}

def paired_difference(ours, theirs):
    """(mean, low, high, in how many seeds its sign is the mean's) of ours - theirs, {seed: value}
    each, over their common seeds. ValueError if there are fewer than two."""
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        raise ValueError("A paired difference needs two seeds in common; here there are "
                         f"{len(seeds)}.")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.mean(differences)
    return (mean, *bootstrap_interval(differences), sum(d * mean > 0 for d in differences))

def base_name(path):
    """What a page calls the base model of that path, such as "toy"."""
    path = Path(path)
    name = "toy" if path.parts[-2:] == ("data", "base") else path.name
    return {"smollm2": "SmolLM2"}.get(name, name)

def sweep_title(comparison):
    """What a column or a panel of several sweeps is headed by, such as "toy, AdamW"."""
    sgd = comparison["configuration"]["optimizer"] == "sgd"
    return f"{base_name(comparison['base']['path'])}, {'SGD' if sgd else 'AdamW'}"

def joined(comparisons):
    """One comparison of several that share base, settings and seeds; a variant that is in two is
    the first's. ValueError if they share them not."""
    first = comparisons[0]
    for other in comparisons[1:]:
        for key in ("steps", "batch_size", "targets", "optimizer", "train_size"):
            if other["configuration"][key] != first["configuration"][key]:
                raise ValueError(f"Comparisons that differ in {key} cannot be joined.")
    result = {**first, "variants": {}, "rows": []}
    for comparison in comparisons:
        new = [label for label in comparison["variants"] if label not in result["variants"]]
        result["variants"] |= {label: comparison["variants"][label] for label in new}
        result["rows"] += [row for row in comparison["rows"] if row["variant"] in new]
    return result
