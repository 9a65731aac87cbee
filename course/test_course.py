"""The lab's own tests: the vectors are those of their script, every port passes them, solutions
pass the checks, empty steps fail all of them, and each usual mistake fails the check meant for it.
test_course_pages.py tests what the pages say."""
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
os.environ["LAB"] = "solutions"
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "data" / "vectors")]

import check
import make_vectors
import nalora
import solutions
import step6
import train_tiny
import vectors

# ---- the vectors -------------------------------------------------------------
def test_the_pseudo_code_of_the_vectors_is_that_of_nalora():
    text = (vectors.VECTORS / "README.md").read_text(encoding="utf-8").split("```")[1]
    assert text.strip() in nalora.__doc__ and text.startswith("\nAn FFN has F gate channels")
    assert text.endswith("(exact at f = 0 and 1)\n")

def test_the_step_in_numbers_of_the_vectors_is_what_nalora_makes():
    text = (vectors.VECTORS / "README.md").read_text(encoding="utf-8")
    port = vars(core_of_nalora(torch.float64))
    assert re.findall(r"^\| `(\w+)\(", text, re.M) == list(port)  # the six that a port exports
    port["token_weights"] = lambda real, *more: solutions.token_weights(np.array(real), *more)
    lines = text.split("## One step in numbers")[1].split("```")[1].strip().splitlines()
    for given, wanted in zip(lines[::2], lines[1::2], strict=True):
        name, _, call = given.removeprefix(">>> ").rpartition(" = ")
        port[name] = found = eval(call, port)
        wanted = eval(wanted, {"nan": np.nan})
        pairs = [(found, wanted)]
        if isinstance(wanted, dict):
            assert found.keys() == wanted.keys()
            pairs = [(found[key], wanted[key]) for key in wanted]
        for ours, told in pairs:
            np.testing.assert_allclose(np.asarray(ours), told, atol=5.1e-5, err_msg=given)

def test_the_readme_of_the_vectors_tells_what_a_port_sees():
    text = (vectors.VECTORS / "README.md").read_text(encoding="utf-8")
    assert f"{len(vectors.ABOUT['cases'])} cases at the tolerance of float64, 0 fail" in text
    (name, what, how, catches), = vectors.failures(port_with(**MUTANTS["rounded up in floats"]))
    assert f"`{name}, {what}: {how}. This case catches: {catches}.`" in text
    assert len(MUTANTS) == 31 and "Thirty-one misreadings" in text
    assert len(vectors.ABOUT["cases"]) == 20 and "Twenty cases" in text
    tolerance = vectors.ABOUT["tolerance"]
    assert tolerance == {"float64": 1e-10, "float32": 5e-5}
    assert "(1e-10 in float64, 5e-5 in float32)" in text

def test_a_port_is_told_what_was_left_out(tmp_path, capsys):
    path = tmp_path / "port.py"
    path.write_text("def blend(before, after, factor):\n"
                    "    return before + factor * (after - before)\n")
    assert vectors.main(path) == 0
    blends = sum(case["kind"] == "correct" for case in vectors.ABOUT["cases"].values())
    assert capsys.readouterr().out.splitlines() == [
        f"{blends} cases at the tolerance of float64, 0 fail",
        f"{20 - blends} were left out: the port has no observe, no trace"]

def test_the_vectors_are_those_of_their_script():
    about, made = make_vectors.make_all()
    assert about == json.loads((vectors.VECTORS / "vectors.json").read_text())
    kept = load_file(vectors.VECTORS / "vectors.safetensors")
    assert kept.keys() == made.keys()
    for key, t in made.items():
        torch.testing.assert_close(kept[key], t, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert (vectors.VECTORS / "vectors.safetensors").stat().st_size < 1e6

def core_of_nalora(dtype):
    """nalora.py's pure core and NALoRA as a port."""
    def tensor(a):
        return torch.as_tensor(np.asarray(a)).to(dtype)

    def start(width):
        zero = torch.zeros(width, dtype=dtype)
        nan = torch.tensor(torch.nan, dtype=dtype)
        return nalora.State(zero, zero == 0, nan, nan, torch.ones((), dtype=dtype))._asdict()

    def observe(activation, z, weight):
        act = make_vectors.ACTIVATIONS[activation]
        return nalora.observe(act, tensor(z), tensor(weight))._asdict()

    def decide(state, sums, config):
        config = nalora.NALoRAConfig(**config)
        return nalora.decide(nalora.State(**state), nalora.GateSums(**sums), config)._asdict()

    def blend(before, after, factor):
        return nalora.blend(tensor(before), tensor(after), tensor(factor))

    def trace(case, t):
        t = {key: torch.as_tensor(value) for key, value in t.items()}
        return make_vectors.trace(case, t, "", dtype)

    return SimpleNamespace(start=start, token_weights=solutions.token_weights, observe=observe,
                           decide=decide, blend=blend, trace=trace)

def test_nalora_passes_the_vectors():
    assert vectors.failures(core_of_nalora(torch.float64)) == []
    assert vectors.failures(core_of_nalora(torch.float32), "float32") == []

def test_the_numpy_solution_passes_the_vectors():
    assert vectors.failures(solutions) == []

def test_interop_the_jax_port_passes_the_vectors():
    pytest.importorskip("jax")
    run = subprocess.run([sys.executable, "course/vectors.py", "course/port_jax.py"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0 and "0 fail" in run.stdout, run.stdout + run.stderr

def test_interop_the_tour_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    tour = nbformat.read(HERE / "tour.ipynb", as_version=4)
    pictures = [cell for cell in tour.cells if "plt.subplots" in cell.source
                or "panels(" in cell.source]
    assert all(cell.outputs and "xlabel" in cell.source for cell in pictures)
    assert int(re.search(r'"figure.dpi": (\d+)', tour.cells[1].source)[1]) >= 80
    for cell in tour.cells:  # a tenth of its steps
        cell.source = cell.source.replace("steps=120", "steps=12")
    nbclient.NotebookClient(tour, timeout=600, resources={"metadata": {"path": HERE}}).execute()
    printed = "".join(o.get("text", "") for c in tour.cells for o in c.get("outputs", []))
    for name in ("LoRA", "NA-LoRA", "random rows"):
        assert f"\n{name}: mean |change of rho|" in f"\n{printed}"
    assert "plain mean of kappa" in printed

# ---- misreadings, each of which the vectors must find ------------------------
def port_with(**changes):
    """The NumPy solution with some functions replaced; trace sees them, too."""
    names = ("start", "token_weights", "observe", "decide", "blend", "trace")
    spec = importlib.util.spec_from_file_location("mutant", HERE / "solutions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in changes.items():
        setattr(module, name, function)
    return SimpleNamespace(**{name: getattr(module, name) for name in names})

def always_from_token_0(real, step, stride):
    return solutions.token_weights(real, 0, stride)

def every_token(real, step, stride):
    return real.astype(float)

def numbered_on():
    """Tokens are numbered on across the passes of a step, as in version 1."""
    at = {}

    def start(width):
        at.update(step=None)
        return solutions.start(width)

    def token_weights(real, step, stride):
        first = at["first"] if step == at["step"] else 0
        at.update(step=step, first=first + real.size)
        number = first + np.arange(real.size).reshape(real.shape)
        return ((number % stride == step % stride) & real).astype(float)
    return {"start": start, "token_weights": token_weights}

def numbered_in_rows(real, step, stride):
    number = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    return ((number % stride == step % stride) & real).astype(float)

def padding_unnumbered(real, step, stride):
    number = np.cumsum(real).reshape(real.shape) - 1
    return ((number % stride == step % stride) & real).astype(float)

def padding_counted(real, step, stride):
    return solutions.token_weights(np.ones_like(real), step, stride)

def observe_with(**changed):
    def observe(activation, z, weight):
        return solutions.observe(activation, z, weight) | {
            key: function(activation, z, weight) for key, function in changed.items()}
    return observe

def pass_dropped(activation, z, weight):
    """A pass whose sums are not finite adds nothing, as in version 1."""
    sums = solutions.observe(activation, z, weight)
    finite = all(np.isfinite(t).all() for t in sums.values())
    return sums if finite else {key: np.zeros_like(t) for key, t in sums.items()}

def nan_in_padding(activation, z, weight):
    sums = solutions.observe(activation, z, weight)
    return sums if np.isfinite(z).all() else sums | {"phi_phi": np.nan}

def mean_kappa(activation, z, weight):
    """P that makes P / Q the mean of kappa."""
    kept = z[weight > 0]
    if kept.size == 0:
        return 0.0
    q = (solutions.phi(activation, kept) ** 2).sum()
    return solutions.homogeneity(activation, kept).mean() * q

def decide_with(edit):
    def decide(state, sums, config):
        new = solutions.decide(state, sums, config)
        return state if new is state else new | edit(state, sums, config, new)
    return decide

def empty_step_decides(state, sums, config):
    return solutions.decide(state, sums | {"tokens": max(sums["tokens"], 1e-9)}, config)

def channel_left_out(state, sums, config):
    """Channels that are not finite stay; the others go on."""
    finite = np.isfinite(sums["score"])
    if finite.all():
        return solutions.decide(state, sums, config)
    score = np.where(finite, sums["score"], state["importance"] * sums["tokens"])
    known = {"score": score, "z_slope_phi": state["k_hat"], "phi_phi": 1.0}
    return solutions.decide(state, sums | known, config)

def average_reversed(state, sums, config, new):
    mean = sums["score"] / sums["tokens"]
    return {"importance": (1 - config["ema"]) * state["importance"] + config["ema"] * mean}

def mask_of(count, key):
    def edit(state, sums, config, new):
        if config["mask"] == "none":
            return {}
        mask = np.zeros(len(new["mask"]), bool)
        order = np.argsort(key(new["importance"]), kind="stable")
        mask[order[:count(config["keep"], mask.size)]] = True
        return {"mask": mask}
    return edit

def right_count(keep, width):
    return int(np.ceil(keep * width - 1e-9))

def rounded_down(keep, width):
    return int(keep * width)

def rounded_up_floats(keep, width):
    return int(np.ceil(keep * width))

def higher_index_first(state, sums, config, new):
    if config["mask"] == "none":
        return {}
    order = np.argsort(new["importance"], kind="stable")[::-1]
    mask = np.zeros(len(order), bool)
    mask[order[:right_count(config["keep"], len(order))]] = True
    return {"mask": mask}

def scale_with(choose):
    def edit(state, sums, config, new):
        if config["scale"] == "none":
            return {}
        return {"scale": choose(new["k_hat"], min(new["occupancy"], 1 - new["occupancy"]))}
    return edit

def no_partition(k, p):
    return 1 / np.clip(k, 0.5, 2)

def another_partition(k, p):
    return 1 / np.clip(k, 0.5, 2) if p >= 0.1 else 1.0

def size_of_k(k, p):
    return 1 / np.clip(abs(k), 0.5, 2) if p >= 0.05 else 1.0

def unclipped(k, p):
    return 1 / k if p >= 0.05 else 1.0

def upside_down(k, p):
    return np.clip(k, 0.5, 2) if p >= 0.05 else 1.0

def masked_always(state, sums, config, new):
    order = np.argsort(-new["importance"], kind="stable")
    mask = np.zeros(len(order), bool)
    mask[order[:right_count(config["keep"], len(order))]] = True
    return {"mask": mask}

def scaled_always(state, sums, config, new):
    return {"scale": 1 / np.clip(new["k_hat"], 0.5, 2)}

def stops_at_after(before, after, factor):
    return solutions.blend(before, after, np.minimum(factor, 1))

def edited(name, old, new):
    """A function of the solution, which is edited as text."""
    source = (HERE / "solutions.py").read_text()
    assert source.count(old) == 1, old
    space = {}
    exec(source.replace(old, new), space)
    return space[name]

NO_MASK = ("            if name.endswith(\"gate_proj/B\"):\n"
                 "                factor = (state[\"mask\"] * state[\"scale\"])[:, None]\n", "")
MASK_ON_UP = ("name.endswith(\"gate_proj/B\")", "name.endswith((\"gate_proj/B\", \"up_proj/B\"))")
A_UNSCALED = ("            factor = np.asarray(state[\"scale\"])",
              "            factor = np.asarray(state[\"scale\"] if name[-1] == \"B\" else 1.0)")
A_MASKED = ("            factor = np.asarray(state[\"scale\"])",
            "            factor = np.asarray(0.0 if name.endswith(\"gate_proj/A\")\n"
            "                                else state[\"scale\"])")
NO_LORA = ("scaling = case[\"alpha\"] / case[\"rank\"]", "scaling = 0.0")
GRADIENT_MASKED = (  # in the place of the step's
    "                factor = (state[\"mask\"] * state[\"scale\"])[:, None]\n",
    "                rows = state[\"mask\"][:, None]\n"
    "                g = t[grad_of(step, name)] * rows\n"
    "                m, v = moments[name]\n"
    "                if case[\"optimizer\"][\"name\"] == \"adamw\":\n"
    "                    m -= (1 - case[\"optimizer\"][\"beta1\"]) * t[grad_of(step, name)]\n"
    "                    m /= case[\"optimizer\"][\"beta1\"]\n"
    "                    v -= (1 - case[\"optimizer\"][\"beta2\"]) * t[grad_of(step, name)] ** 2\n"
    "                    v /= case[\"optimizer\"][\"beta2\"]\n"
    "                    np.maximum(v, 0, out=v)\n"
    "                after[name] = optimizer_step(case[\"optimizer\"], p[name], g, moments[name],\n"
    "                                             step + 1)\n")

MUTANTS = {
    "always from token 0": {"token_weights": always_from_token_0},
    "every token": {"token_weights": every_token},
    "numbered on across passes": numbered_on(),
    "numbered anew in each row": {"token_weights": numbered_in_rows},
    "padding has no number": {"token_weights": padding_unnumbered},
    "padding counted": {"token_weights": padding_counted},
    "a pass with a NaN dropped": {"observe": pass_dropped},
    "a NaN in padding seen": {"observe": nan_in_padding},
    "a NaN decides": {"decide": edited("decide", " or not finite", "")},
    "a channel with a NaN left out": {"decide": channel_left_out},
    "mean of kappa": {"observe": observe_with(z_slope_phi=mean_kappa)},
    "an empty step decides": {"decide": empty_step_decides},
    "average the wrong way round": {"decide": decide_with(average_reversed)},
    "rounded down": {"decide": decide_with(mask_of(rounded_down, np.negative))},
    "rounded up in floats": {"decide": decide_with(mask_of(rounded_up_floats, np.negative))},
    "least important first": {"decide": decide_with(mask_of(right_count, np.positive))},
    "higher index first": {"decide": decide_with(higher_index_first)},
    "no partition": {"decide": decide_with(scale_with(no_partition))},
    "another partition": {"decide": decide_with(scale_with(another_partition))},
    "size of k_hat": {"decide": decide_with(scale_with(size_of_k))},
    "no clip": {"decide": decide_with(scale_with(unclipped))},
    "k_hat for 1 / k_hat": {"decide": decide_with(scale_with(upside_down))},
    "masked though off": {"decide": decide_with(masked_always)},
    "scaled though off": {"decide": decide_with(scaled_always)},
    "never beyond after": {"blend": stops_at_after},
    "z without LoRA": {"trace": edited("trace", *NO_LORA)},
    "no mask on the step": {"trace": edited("trace", *NO_MASK)},
    "mask on the gradient": {"trace": edited("trace", *GRADIENT_MASKED)},
    "mask on up, too": {"trace": edited("trace", *MASK_ON_UP)},
    "A masked, too": {"trace": edited("trace", *A_MASKED)},
    "A not scaled": {"trace": edited("trace", *A_UNSCALED)},
}

@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_vectors_find_every_misreading(name, precision):
    assert vectors.failures(port_with(**MUTANTS[name]), precision)

# ---- the lab -----------------------------------------------------------------
def run_check(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, HERE / "check.py", *arguments], cwd=cwd,
                          capture_output=True, text=True)

def test_the_solutions_pass_every_check(tmp_path):
    run = run_check("--file", "solutions", cwd=tmp_path)
    assert run.returncode == 0 and run.stdout == "the lab: 16 of 16 checks pass.\n", run.stdout

FIRST = {1: "selection_weight", 2: "effective_homogeneity", 3: "LoRA.__init__", 4: "drift",
         5: "observe"}

def test_a_step_that_is_not_written_says_so_in_one_line():
    lines = run_check().stdout.splitlines()
    assert lines == [f"step {n}: `{name}` is not written yet." for n, name in FIRST.items()] \
        + ["the lab: 0 of 16 checks pass."]
    assert run_check("2").stdout.splitlines() == [lines[1], "step 2: 0 of 3 checks pass."]

@pytest.mark.parametrize("wrong, words", [
    ("return 1 / (1 + np.exp(-y))", "steps.py, line 15, stops `selection_weight` with NameError"),
    ("return 1 +", "steps.py, line 15, is no Python: invalid syntax."),
    ("pass", "Does each function return what its docstring says?"),
    ("return 0 * z", "step 1, selection weight and slope, gelu: rho(z) z is not gelu(z)"),
    ("print('seen'); return 1 / (1 + np.exp(-z))", "seen")])
def test_a_slip_gets_a_sentence_and_no_traceback(tmp_path, wrong, words):
    for name in ("check.py", "vectors.py"):
        text = (HERE / name).read_text()
        (tmp_path / name).write_text(text.replace("Path(__file__).resolve().parents[1] / \"data\"",
                                                  f"Path({str(ROOT / 'data')!r})"))
    steps = (HERE / "steps.py").read_text()
    (tmp_path / "steps.py").write_text(steps.replace("    raise NotImplementedError",
                                                     f"    {wrong}", 1))
    run = subprocess.run([sys.executable, "check.py", "1"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert words in run.stdout and "Traceback" not in run.stdout + run.stderr, run
    assert run.returncode == 1 and len(run.stdout.splitlines()) < 9

def test_what_the_lab_gives_is_the_solution():
    given = ("normal_cdf", "phi", "start", "token_weights", "blend")
    source = {name: inspect.getsource(getattr(solutions, name)) for name in given}
    steps = (HERE / "steps.py").read_text()
    assert all(text in steps for text in source.values())
    assert steps.count("Given.") == len(given)

@pytest.mark.parametrize("activation", check.ACTIVATIONS)
def test_the_checks_know_what_is_right(activation):
    """By PyTorch's autograd and Adam."""
    z = torch.tensor(check.Z, requires_grad=True)
    phi = make_vectors.ACTIVATIONS[activation](z)
    slope, = torch.autograd.grad(phi.sum(), z)
    ours = check.by_quotient(activation)
    assert np.allclose(ours, [phi.detach(), slope], rtol=1e-9, atol=1e-9)

def test_the_drift_of_the_checks_is_adams():
    parameter = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
    for step in range(1100):
        if step == 1000:
            at = parameter.item()
        parameter.grad = torch.ones_like(parameter) * (step < 1000)
        optimizer.step()
    assert at - parameter.item() == pytest.approx(check.ADAM, abs=1e-4)

class BInOrder(solutions.LoRA):
    def __init__(self, W, rank, alpha, rng):
        super().__init__(W, rank, alpha, rng)
        self.B = rng.normal(size=self.B.shape)

class NoScaling(solutions.LoRA):
    def __init__(self, W, rank, alpha, rng):
        super().__init__(W, rank, alpha, rng)
        self.scaling = 1.0

class BothZero(solutions.LoRA):
    def __init__(self, W, rank, alpha, rng):
        super().__init__(W, rank, alpha, rng)
        self.A = 0 * self.A

def kappa_mean(activation, z):
    return solutions.homogeneity(activation, z).mean()

def weighted_by_phi(activation, z):
    value = solutions.phi(activation, z)
    return (value * solutions.homogeneity(activation, z)).sum() / value.sum()

def no_drift(before, masked, beta1=0.9, beta2=0.999):
    return 0.0

def frozen_v(before, masked, beta1=0.9, beta2=0.999):
    return sum(beta1**t for t in range(1, masked + 1))

def signed_score(activation, z, weight):
    z = np.where(weight[:, None] > 0, z, 0)
    return weight @ solutions.slope(activation, z)

def undivided(state, sums, config, new):
    return {"importance": config["ema"] * state["importance"] + (1 - config["ema"]) * sums["score"]}

def other_slope(activation, z):
    return solutions.selection_weight(activation, z)

def nan_at_zero(activation, z):
    with np.errstate(all="ignore"):
        return z * solutions.slope(activation, z) / solutions.phi(activation, z)

WRONG = [
    ("test_step1_selection_weight_and_slope", ("silu",), {"slope": other_slope}, "product rule"),
    ("test_step1_homogeneity", ("silu",), {"homogeneity": nan_at_zero}, "it is 1"),
    ("test_step2_effective_homogeneity", ("silu",), {"effective_homogeneity": kappa_mean},
     "mean of kappa"),
    ("test_step2_effective_homogeneity", ("gelu",), {"effective_homogeneity": weighted_by_phi},
     "phi\\^2, not phi"),
    ("test_step3_lora", (), {"LoRA": BInOrder}, "B has to be 0"),
    ("test_step3_lora", (), {"LoRA": NoScaling}, "alpha / rank"),
    ("test_step3_lora", (), {"LoRA": BothZero}, "ever gets a gradient"),
    ("test_step4_drift", (), {"drift": no_drift}, "still moves"),
    ("test_step4_drift", (), {"drift": frozen_v}, "v decays"),
    ("test_step5_observe", (), {"observe": observe_with(score=signed_score)}, "not of phi'"),
    ("test_step5_observe", (), {"observe": pass_dropped}, "plain sums"),
    ("test_step5_decide_importance", (), {"decide": decide_with(average_reversed)}, "wrong way"),
    ("test_step5_decide_importance", (), {"decide": decide_with(undivided)}, "divide it by N"),
    ("test_step5_decide_importance", (), {"decide": empty_step_decides}, "saw no token"),
    ("test_step5_decide_importance", (), MUTANTS["a NaN decides"], "not finite"),
    ("test_step5_decide_importance", (), {"decide": channel_left_out}, "not finite"),
    ("test_step5_decide_mask", (), MUTANTS["rounded down"], "rounds up"),
    ("test_step5_decide_mask", (), MUTANTS["rounded up in floats"], "1e-9"),
    ("test_step5_decide_mask", (), MUTANTS["higher index first"], "lower index"),
    ("test_step5_decide_mask", (), MUTANTS["least important first"], "largest importance"),
    ("test_step5_decide_scale", (), MUTANTS["no partition"], "less than 5 %"),
    ("test_step5_decide_scale", (), MUTANTS["no clip"], "clipped"),
    ("test_step5_decide_scale", (), MUTANTS["size of k_hat"], "negative"),
    ("test_step5_decide_scale", (), MUTANTS["k_hat for 1 / k_hat"], "1 / k_hat"),
    ("test_step5_vectors", (), MUTANTS["a NaN decides"], "It catches"),
]

@pytest.mark.parametrize("test, args, wrong, words", WRONG)
def test_each_usual_mistake_gets_its_own_words(monkeypatch, test, args, wrong, words):
    monkeypatch.setattr(check, "lab", SimpleNamespace(**{**vars(solutions), **wrong}))
    with pytest.raises(pytest.fail.Exception, match=words):
        getattr(check, test)(*args)

# ---- step 6 ------------------------------------------------------------------
def steered_run(lab, choose=step6.responsive):
    """A run of step 6 after two steps."""
    args = SimpleNamespace(seed=3, steps=2, optimizer="adamw")
    c = replace(step6.settings(choose, args), train_size=64)
    run = train_tiny.set_up(c, {"lora": partial(step6.steer, lab=lab, choose=choose)})
    assert len(list(train_tiny.training_loop(run))) == 2
    return run

@pytest.fixture(scope="module")
def own():
    return steered_run(solutions)

def test_step_6_runs_the_functions_of_the_lab(own):
    """They choose the rows of nalora.py, and another `decide` is seen."""
    reference = steered_run(None)
    for mine, wanted in zip(own.nalora.ffns, reference.nalora.ffns):
        assert torch.equal(mine.state.mask, wanted.state.mask)
        assert torch.equal(mine.B_gate, wanted.B_gate) and mine.state.mask.sum() == 39
    other = SimpleNamespace(**{**vars(solutions), **MUTANTS["least important first"]})
    for mine, changed in zip(own.nalora.ffns, steered_run(other).nalora.ffns):
        assert not torch.equal(mine.state.mask, changed.state.mask)

def test_the_choices_of_step_6_are_what_they_are_called(own):
    steered = own.nalora
    masks = {name: [choose(steered, ffn) for ffn in steered.ffns]
             for name, choose in step6.ROWS.items() if choose}
    assert all(mask.sum() == 39 for of_ffns in masks.values() for mask in of_ffns)
    for i, ffn in enumerate(steered.ffns):
        importance = ffn.state.importance
        most = masks["the most responsive"][i]
        least = masks["the least responsive"][i]
        assert importance[most].min() > importance[~most].max()
        assert importance[least].max() < importance[~least].min()
        assert torch.equal(ffn.B_gate.detach().ne(0).any(1), steered.moved[ffn])
    steered.steps += 1
    for name in ("these, shuffled", "random, fixed", "random, redrawn"):
        again = [step6.ROWS[name](steered, ffn) for ffn in steered.ffns]
        same = [torch.equal(a, b) for a, b in zip(masks[name], again)]
        assert not any(same) if name == "random, redrawn" else all(same)
        assert not torch.equal(masks[name][0], masks["the most responsive"][0])
    steered.steps -= 1

def test_step_6_says_whose_functions_it_runs_and_refuses_in_one_sentence(monkeypatch, capsys):
    assert step6.own_lab("solutions")[0] is solutions
    lab, sentence = step6.own_lab("steps")
    assert lab is None and sentence.startswith("steps.py does not pass step 5 yet")
    monkeypatch.setattr(step6, "ROWS", {"all: LoRA": None, "random, fixed": step6.fixed})
    assert step6.main(["--steps", "1", "--file", "solutions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "of solutions.py choose the rows" in lines[0] and len(lines) == 5
    assert re.fullmatch(r"random, fixed +2\.\d{4} +10%", lines[4])
    assert step6.main(["--steps", "0"]) == 2
    assert capsys.readouterr() == ("", "step6.py: --steps is 0: give a number of at least 1.\n")
