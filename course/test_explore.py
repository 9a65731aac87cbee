"""explore.html: its numbers are nalora.py's, what it says of them is true, and it loads nothing.
A headless Chromium (or Chrome, Edge) opens it: one on the PATH, or the one that CHROMIUM names."""
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nalora

PAGE = Path(__file__).resolve().parent / "explore.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge", "microsoft-edge")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
AS_OPENED = {"activation": "silu", "z": 1.28, "mean": -0.5, "spread": 1.5, "keep": 0.5,
             "differ": 0.5}
SETTINGS = [AS_OPENED | changes for changes in (
    {},
    {"mean": 1.3, "spread": 0.1},
    {"mean": 0, "spread": 0.1},
    {"activation": "relu"},
    {"mean": -0.8, "spread": 0.5},
    {"mean": -0.9, "spread": 0.5},
    {"differ": 0},
    {"activation": "gelu", "z": -2.5, "keep": 0.3, "differ": 1},
    {"activation": "gelu", "z": 0, "mean": -2, "spread": 3, "keep": 1},
    {"activation": "relu", "z": 0, "mean": -4, "spread": 0.1, "keep": 0.05},
    {"activation": "relu", "z": -3, "mean": 0, "keep": 0.7},
    {"mean": -1.65, "spread": 1},  # 5 % of the gates lie above 0
    {"mean": -1.9, "spread": 1.15},  # a little less
    {"z": -6, "mean": -4, "spread": 1.2, "keep": 0.05},
    {"z": 6, "mean": 4, "spread": 3, "keep": 0.95, "differ": 0.9})]

# What a person would do: moves each slider, and reads what the page then shows.
DRIVER = """
<pre id="found"></pre>
<script>
const text = id => document.getElementById(id).textContent;
document.getElementById("found").textContent = JSON.stringify(SETTINGS.map(setting => {
  for (const [id, value] of Object.entries(setting)) {
    const input = document.getElementById(id) || document.querySelector(`input[value=${value}]`);
    if (input.type === "radio") input.checked = true; else input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
  }
  const rows = [...document.querySelectorAll("#channels .row")];
  const bars = [...document.querySelectorAll("#histogram .gate")];
  const shown = {};
  for (const id of ["k_hat", "occupancy", "scale", "rows", "phi", "rho", "slope", "kappa", "says"])
    shown[id] = text(id);
  return {...compute(), shown, kept: rows.map(row => row.classList.contains("kept")),
          heights: bars.map(bar => Number(bar.getAttribute("height"))),
          wide: document.documentElement.scrollWidth - window.innerWidth};
}));
</script>
"""

def find_browser():
    named = os.environ.get("CHROMIUM")
    for name in [named] if named else BROWSERS:
        if path := shutil.which(name):
            return path
    if named:
        pytest.fail(f"CHROMIUM names {named}, which is no program.")
    pytest.skip("no Chromium on the PATH; CHROMIUM may name one")

@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What the page shows at each of SETTINGS, in a window of 400 pixels."""
    folder = tmp_path_factory.mktemp("explore")
    browser = find_browser()
    driver = DRIVER.replace("SETTINGS", json.dumps(SETTINGS))
    page = folder / "explore.html"
    text = PAGE.read_text(encoding="utf-8").replace("</body>", f"{driver}</body>")
    page.write_text(text, encoding="utf-8")
    run = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                          "--window-size=400,900", f"--user-data-dir={folder / 'profile'}",
                          page.as_uri()], capture_output=True, timeout=120)
    dom = run.stdout.decode("utf-8")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert found and found[1], run.stderr.decode("utf-8", "replace")[-2000:]
    return json.loads(html.unescape(found[1]))

def number(x, digits):
    return f"{x + 0:.{digits}f}".replace("-", "−")

@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_the_page_computes_what_nalora_does(opened, index):
    found = opened[index]
    asked = SETTINGS[index]
    assert {key: found[key] for key in asked} == asked
    act = ACTIVATIONS[asked["activation"]]
    z = torch.tensor([asked["z"]], dtype=torch.float64)
    phi, slope = nalora.value_and_slope(act, z)
    one = {"phi": phi, "rho": nalora.selection_weight(act, z), "slope": slope,
           "kappa": nalora.homogeneity(act, z)}
    for key, value in one.items():
        assert found["one"][key] == pytest.approx(value.item(), rel=1e-9, abs=1e-12), key
        assert found["shown"][key] == number(value.item(), 3)
    gates = torch.tensor(found["gates"], dtype=torch.float64)  # (T, F)
    assert gates.mean() == pytest.approx(asked["mean"], abs=1e-9)
    assert gates.std(correction=0) == pytest.approx(asked["spread"], rel=1e-9)
    zero = torch.zeros(gates.size(1), dtype=torch.float64)
    start = nalora.State(zero, zero == 0, zero.sum(), zero.sum(), zero.sum() + 1)
    sums = nalora.observe(act, gates, gates.new_ones(len(gates)))
    state = nalora.decide(start, sums, nalora.NALoRAConfig(keep=asked["keep"]))
    assert np.allclose(found["importance"], sums.score / sums.tokens, rtol=1e-9)
    assert found["mask"] == found["kept"] == state.mask.tolist()
    for key in ("k_hat", "occupancy", "scale"):
        assert found[key] == pytest.approx(getattr(state, key).item(), rel=1e-9, abs=1e-12), key
    assert found["shown"]["k_hat"] == number(state.k_hat.item(), 2)
    assert found["shown"]["scale"] == number(state.scale.item(), 2)
    assert found["shown"]["rows"] == f"{state.mask.sum()} of {len(zero)}"
    assert found["shown"]["occupancy"] == f"{100 * state.occupancy.item():.0f} %"

def test_the_histogram_is_that_of_the_gates(opened):
    for found in opened:
        heights = np.array(found["heights"])
        edges = np.linspace(-8, 8, len(heights) + 1)
        gates = np.clip(found["gates"], -7.99, 7.99)
        wanted = np.histogram(gates, edges)[0]
        assert np.allclose(heights / heights.sum(), wanted / wanted.sum(), atol=2e-3)

def test_nothing_is_wider_than_a_telephone(opened):
    assert all(found["wide"] <= 0 for found in opened)

def test_what_the_page_asks_to_try_is_so(opened):
    """The answers that are folded under "Try", in their order; SETTINGS 1 to 6."""
    _, top, linear, relu, opposed, shut, alike = opened[:7]
    assert round(top["k_hat"], 2) == 1.28 and top["scale"] == 1 and top["occupancy"] == 1
    assert abs(linear["k_hat"] - 1) < 0.01
    on = (np.array(relu["gates"]) > 0).mean(0)
    assert relu["k_hat"] == relu["scale"] == 1 and np.allclose(relu["importance"], on)
    assert round(opposed["k_hat"], 2) == 0.25 and opposed["scale"] == 2
    assert shut["scale"] == 1 and shut["occupancy"] < 0.05
    assert alike["mask"] == [True] * 12 + [False] * 12
    assert "steps are doubled" in opposed["shown"]["says"]
    assert "the scale stays 1" in shut["shown"]["says"]
    page = PAGE.read_text(encoding="utf-8")
    for told in ("Mean 1.3, spread 0.1", "k̂ is 1.28", "mean 0, spread 0.1",
                 "mean −0.8, spread 0.5", "k̂ is 0.25", "down to −0.9", "24 channels at 100 tokens"):
        assert told in page

def test_the_page_loads_nothing_and_every_slider_has_a_label():
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"://|\bsrc=|@import|url\(|fetch\(|import\(|XMLHttp|<link|<iframe", page)
    assert all((PAGE.parent / name).exists() for name in re.findall(r'href="([^"]+)"', page))
    inputs = re.findall(r"<input [^>]*>", page)
    in_labels = re.findall(r"<label>.*?(<input [^>]*>).*?</label>", page, re.S)
    assert inputs == in_labels and len(inputs) == 8 and "tabindex" not in page
    assert "prefers-color-scheme: dark" in page
