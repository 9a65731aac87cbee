"""Runs the test vectors of data/vectors against a port: a module, or any object, with

    start(width) -> state
    token_weights(real, step, stride) -> weight
    observe(activation, z, weight) -> sums
    decide(state, sums, config) -> state
    blend(before, after, factor) -> parameter
    trace(case, tensors) -> yields, for each step, {name: array}

States and sums are dictionaries of arrays by the names in data/vectors/README.md. A function that
a port lacks is not tested.

    python course/vectors.py course/port_jax.py
"""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

VECTORS = Path(__file__).resolve().parents[1] / "data" / "vectors"
ABOUT = json.loads((VECTORS / "vectors.json").read_text())

def load():
    """{case: ({about it}, {name: array})}."""
    tensors = load_file(VECTORS / "vectors.safetensors")
    cases = {}
    for name, case in ABOUT["cases"].items():
        keys = [key for key in tensors if key.startswith(f"{name}/")]
        cases[name] = (case, {key.removeprefix(f"{name}/"): tensors[key] for key in keys})
    return cases

def results(port, case, t):
    """Yields (what, got, wanted) of one case."""
    run = {"gates": run_gates, "correct": run_blend, "trace": run_trace}[case["kind"]]
    yield from run(port, case, t)

def run_gates(port, case, t):
    state = port.start(case["width"])
    for step, passes in enumerate(case["passes"]):
        sums = None
        for index in range(passes):
            z = t[f"{step}/{index}/z"]  # (B, T, F)
            real = t[f"{step}/{index}/real"].astype(bool)  # (B, T)
            weight = np.asarray(port.token_weights(real, step, case["config"]["stride"]))
            flat = z.reshape(-1, z.shape[-1])
            part = port.observe(case["activation"], flat, weight.reshape(-1))
            sums = part if sums is None else {key: sums[key] + part[key] for key in part}
        for key, value in sums.items():
            yield f"step {step}: {key}", value, t[f"{step}/{key}"]
        state = port.decide(state, sums, case["config"])
        for key, value in state.items():
            yield f"step {step}: {key}", value, t[f"{step}/{key}"]

def run_blend(port, case, t):
    rows = (t["mask"] * t["scale"])[:, None]
    yield "gate_B", port.blend(t["before"], t["after"], rows), t["gate_B"]
    yield "others", port.blend(t["before"], t["after"], t["scale"]), t["others"]

def run_trace(port, case, t):
    for step, found in enumerate(port.trace(case, t)):
        for key, value in found.items():
            yield f"step {step}: {key}", value, t[f"{step}/{key}"]

NEEDS = {"gates": "observe", "correct": "blend", "trace": "trace"}  # of the port, by kind of case

def failures(port, precision="float64", only=None):
    """[(case, what, largest error, what the case catches)]: the first failure of each case."""
    tolerance = ABOUT["tolerance"][precision]
    found = []
    for name, (case, t) in load().items():
        if (only and case["kind"] not in only) or not hasattr(port, NEEDS[case["kind"]]):
            continue
        for what, got, wanted in results(port, case, t):
            got = np.asarray(got, dtype=np.float64)
            if got.shape != wanted.shape:
                how = f"shape {got.shape}, not {wanted.shape}"
                found.append((name, what, how, case["catches"]))
                break
            if not np.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
                error = np.nanmax(np.abs(got - wanted)) if np.isfinite(got).any() else np.nan
                found.append((name, what, f"off by {error:.2g}", case["catches"]))
                break
    return found

def main(path):
    spec = importlib.util.spec_from_file_location("port", path)
    port = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(port)
    precision = getattr(port, "PRECISION", "float64")
    wrong = failures(port, precision)
    for name, what, how, catches in wrong:
        print(f"{name}, {what}: {how}. This case catches: {catches}.")
    lacks = [NEEDS[case["kind"]] for case, _ in load().values()
             if not hasattr(port, NEEDS[case["kind"]])]
    tried = len(ABOUT["cases"]) - len(lacks)
    print(f"{tried} cases at the tolerance of {precision}, {len(wrong)} fail")
    if lacks:
        print(f"{len(lacks)} were left out: the port has no {', no '.join(sorted({*lacks}))}")
    return 1 if wrong else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
