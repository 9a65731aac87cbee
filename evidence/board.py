"""The pictures that need no measurement: the board figure and the four curves of an activation.

    python -m evidence.board        draws board.png and activations.png
"""
import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from data.runs import COLOURS, new_figure, save_figure
from evidence.common import relative
from nalora import homogeneity, selection_weight, value_and_slope

HERE = relative(Path(__file__).resolve().parent)

def draw_activations(path):
    """phi, rho, phi' and kappa of SiLU, GELU and ReLU, and what NA-LoRA makes of the last two."""
    figure, axes = new_figure(4, width=8.3, height=2.9)
    z = torch.linspace(-5, 5, 1001)
    for name, act, style in (("SiLU", F.silu, "-"), ("GELU", F.gelu, "--"), ("ReLU", F.relu, ":")):
        phi, slope = value_and_slope(act, z)
        rho = selection_weight(act, z)
        kappa = homogeneity(act, z)
        if name == "ReLU":
            kappa[z < 0] = math.nan  # 0/0: the code's convention there is 1, the curve has none
        for ax, y in zip(axes, (phi, rho, slope, kappa)):
            ax.plot(z, y, style, label=name)
    for ax, title, use in zip(axes, ("activation φ(z)", "weight ρ = φ/z", "slope φ'",
                                     "homogeneity κ = zφ'/φ"),
                              ("", "", "drives the mask", "drives the scale")):
        ax.set(xlabel="gate z", xticks=(-5, 0, 5))
        ax.set_title(f"{title}\n")
        ax.text(0.5, 1.03, use, transform=ax.transAxes, ha="center", color=COLOURS[1],
                weight="bold")
        ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    axes[0].legend(frameon=False)
    axes[2].text(-5.2, 0.2, "shut: hardly\nresponds", va="bottom")
    axes[3].axhline(1, color="0.8", lw=0.8, zorder=0)
    axes[3].set_ylim(-2, 2.5)
    axes[3].text(2.7, 1.4, "κ > 1: selection\namplifies", ha="center", va="bottom")
    axes[3].text(-3.4, -0.4, "κ < 1:\nselection\nopposes", ha="center", va="bottom")
    save_figure(figure, path)

def draw_board(path):
    """The board figure: a gated FFN with LoRA, and where NA-LoRA looks and acts."""
    figure, (ax,) = new_figure(1, width=8.3, height=5.0)
    from matplotlib.patches import FancyBboxPatch, Rectangle

    blue = COLOURS[0]
    orange = COLOURS[1]
    ax.set(xlim=(0, 20), ylim=(0.4, 12.4))
    ax.axis("off")

    def write(x, y, text, **style):
        ax.text(x, y, text, **{"ha": "center", "va": "center", **style})

    def box(x, y, width, height, colour, text="", **style):
        ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.3", lw=0.8,
                               **style))
        write(x + width / 2, y + height / 2, text)

    def arrow(*corners, **style):
        """Through the corners, with a head at the last."""
        for start, end in pairwise(corners):
            head = "-|>" if end is corners[-1] else "-"
            look = {"arrowstyle": head, "color": "0.2", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", end, start, arrowprops=look | style)

    def adapted(x, y, name, moves):
        """W + B A, as it is multiplied; moves: whether each row of B moves."""
        box(x, y, 1.7, 2.4, "0.82", f"$W_{{{name}}}$")
        write(x + 2.1, y + 1.2, "+")
        for i, moved in enumerate(moves):
            look = {"colour": blue} if moved else {"colour": "white", "hatch": "//////"}
            box(x + 2.6, y + 2.4 - (i + 1) * 0.3, 0.5, 0.3, **look)
        box(x + 3.25, y + 0.95, 1.4, 0.5, blue)
        write(x + 2.85, y + 2.75, "B")
        write(x + 3.95, y + 1.8, "A")
        ax.add_patch(FancyBboxPatch((x + 2.45, y - 0.1), 2.35, 3.15, boxstyle="round,pad=0.05",
                                    facecolor="none", edgecolor=orange, linestyle="--"))

    def number(x, y, n):
        write(x, y, n, color="white", weight="bold", fontsize=8.5,
              bbox={"boxstyle": "circle,pad=0.2", "facecolor": orange, "edgecolor": "none"})

    adapted(1.9, 8.8, "gate", [True, True, False, True, False, False, True, False])
    adapted(1.9, 3.5, "up", [True] * 8)
    adapted(12.4, 6.2, "down", [True] * 8)
    write(0.4, 7.4, "x", fontsize=14)
    arrow((0.7, 7.7), (1.8, 9.8))
    arrow((0.7, 7.1), (1.8, 4.9))
    arrow((6.9, 10.0), (8.7, 10.0))
    write(7.8, 10.35, "z", fontsize=12)
    box(8.7, 9.4, 1.4, 1.2, "white", "φ")
    arrow((10.1, 10.0), (11.3, 10.0), (11.3, 7.9))
    arrow((6.9, 4.7), (11.3, 4.7), (11.3, 6.9))
    write(9.1, 5.05, "u", fontsize=12)
    write(11.3, 7.4, "×", fontsize=18)
    arrow((11.7, 7.4), (12.3, 7.4))
    arrow((17.4, 7.4), (18.6, 7.4))
    write(19.1, 7.4, "y", fontsize=14)

    look = {"color": orange, "linestyle": "--"}
    ax.add_patch(FancyBboxPatch((7.1, 6.9), 2.3, 1.0, boxstyle="round,pad=0.1", facecolor="white",
                                edgecolor=orange))
    write(8.25, 7.4, "NA-LoRA", color=orange)
    arrow((8.0, 9.9), (8.0, 8.05), **look)
    number(8.0, 9.1, "1")
    arrow((7.0, 7.5), (4.75, 8.8), **look)
    number(5.4, 8.4, "2")
    for corners in (((7.3, 8.0), (6.5, 8.65)), ((7.0, 7.1), (6.3, 6.65)),
                    ((9.0, 6.8), (9.0, 5.6), (16.0, 5.6), (16.0, 6.05))):
        arrow(*corners, **look)
    for x, y in ((6.9, 8.35), (6.65, 6.9), (13.5, 5.6)):
        number(x, y, "3")
    for i, step in enumerate((
            "looks at the gates z: how steep is φ there? Per channel, mean |φ'(z)| over steps",
            "puts back, after every step, the rows of the gate's B whose channels respond least",
            "multiplies the step of every A and B by 1/k̂; k̂ is one number, found from z")):
        number(0.6, 2.5 - 0.8 * i, str(i + 1))
        write(1.1, 2.5 - 0.8 * i, step, ha="left", fontsize=10)
    for i, (look, meaning) in enumerate((({"colour": "0.82"}, "frozen"),
                                         ({"colour": blue}, "trained by LoRA"),
                                         ({"colour": "white", "hatch": "//////"}, "put back"))):
        box(13.6, 11.7 - 0.75 * i, 0.6, 0.45, **look)
        write(14.5, 11.92 - 0.75 * i, meaning, ha="left")
    save_figure(figure, path)

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m evidence.board", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    out = parser.parse_args(argv).out
    draw_board(out / "board.png")
    draw_activations(out / "activations.png")
    return 0

if __name__ == "__main__":
    sys.exit(main())
