"""The pictures that need no measurement: the board figure and the four curves of an activation.

    python -m evidence.board        draws board.png and activations.png
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from data.runs import COLOURS, new_figure, save_figure
from evidence.common import relative
from nalora import homogeneity, selection_weight, value_and_slope

HERE = relative(Path(__file__).resolve().parent)

def draw_activations(path):
    """phi, rho, phi' and kappa of SiLU, GELU and ReLU: the four curves that the method is made
    of."""
    figure, axes = new_figure(4, width=12)
    z = torch.linspace(-5, 5, 1001)
    for name, act, style in (("SiLU", F.silu, "-"), ("GELU", F.gelu, "--"), ("ReLU", F.relu, ":")):
        phi, slope = value_and_slope(act, z)
        rho = selection_weight(act, z)
        kappa = homogeneity(act, z)
        if name == "ReLU":
            kappa[z < 0] = math.nan  # 0/0: the code's convention there is 1, the curve has none
        for ax, y in zip(axes, (phi, rho, slope, kappa)):
            ax.plot(z, y, style, label=name)
    titles = ("value φ(z)", "selection weight ρ = φ/z", "responsiveness φ'",
              "homogeneity κ = zφ'/φ")
    for ax, title in zip(axes, titles):
        ax.set(xlabel="gate pre-activation z")
        ax.set_title(title)
        ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    axes[3].axhline(1, color="0.8", lw=0.8, zorder=0)
    axes[3].set_ylim(-2, 2.3)
    axes[3].text(2.6, 1.4, "κ > 1: selection\namplifies", ha="center", va="bottom", fontsize=11)
    axes[3].text(-3.3, 0, "κ < 1:\nselection\nopposes", ha="center", va="bottom", fontsize=11)
    axes[0].legend(frameon=False)
    save_figure(figure, path)

def draw_board(path):
    """The board figure: a gated FFN with LoRA, and where NA-LoRA looks and acts."""
    figure, (ax,) = new_figure(1, width=10, height=5)
    from matplotlib.patches import Rectangle

    blue = COLOURS[0]
    orange = COLOURS[1]
    grey = "0.82"
    ax.set(xlim=(0, 20), ylim=(0, 10))
    ax.axis("off")

    def box(x, y, width, height, colour, text="", **style):
        ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.3", lw=0.8,
                               **style))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def arrow(start, end, colour="0.2", style="-"):
        look = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "linestyle": style}
        ax.annotate("", end, start, arrowprops=look)

    def adapted(x, y, name, rows):
        """A frozen weight with its pair A, B; rows: the colour of each row of B."""
        box(x, y, 1.7, 2.2, grey, f"$W_{{{name}}}$")
        ax.text(x + 1.85, y + 1.75, "+", ha="center", va="center")
        box(x + 2.0, y + 1.5, 1.1, 0.5, blue, "")
        ax.text(x + 2.55, y + 1.75, "A", ha="center", va="center", color="white")
        for i, colour in enumerate(rows):
            box(x + 3.3, y + 2.2 - (i + 1) * 2.2 / len(rows), 0.45, 2.2 / len(rows), colour)
        ax.text(x + 3.52, y + 2.35, "B", ha="center", va="bottom")

    moving = [blue, blue, grey, blue, grey, grey, blue, grey]
    adapted(2.2, 6.4, "gate", moving)
    adapted(2.2, 1.4, "up", [blue] * 8)
    adapted(13.4, 3.9, "down", [blue] * 8)
    ax.text(0.5, 5.0, "x", ha="center", va="center", fontsize=14)
    arrow((0.8, 5.2), (2.1, 7.4))
    arrow((0.8, 4.8), (2.1, 2.6))
    arrow((6.1, 7.5), (7.9, 7.5))
    ax.text(7.0, 7.7, "z", ha="center", va="bottom")
    box(8.0, 6.9, 1.6, 1.2, "white", "φ")
    arrow((9.7, 7.2), (11.3, 5.4))
    arrow((6.1, 2.5), (11.3, 4.6))
    ax.text(8.7, 3.2, "u", ha="center", va="bottom")
    ax.text(11.7, 5.0, "×", ha="center", va="center", fontsize=18)
    arrow((12.1, 5.0), (13.3, 5.0))
    arrow((17.3, 5.0), (18.9, 5.0))
    ax.text(19.3, 5.0, "y", ha="center", va="center", fontsize=14)
    ax.text(10.6, 8.0, "1  Watch: mean |φ'(z)| of each channel,\n    smoothed over steps",
            color=orange, ha="left", va="center")
    arrow((10.5, 7.9), (9.7, 7.7), orange, "--")
    ax.text(7.1, 9.5, "2  Only rows of B of responsive channels move (blue);\n"
            "    the others are put back after optimizer.step()", color=orange, ha="left",
            va="center")
    arrow((7.0, 9.4), (6.05, 8.4), orange, "--")
    ax.text(2.4, 0.7, "3  One number per FFN, k̂ (the φ²-weighted mean of κ = zφ'/φ): "
            "all six A and B take the step × 1/k̂, with k̂ clipped to [1/2, 2]", color=orange,
            ha="left", va="center")
    legend = "grey: frozen or put back\nblue: trained"
    ax.text(0.2, 9.4, legend, ha="left", va="center", color="0.3")
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
