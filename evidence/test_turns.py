"""The controls that let rows take turns: which rows move in each step, and how often."""
import copy

import pytest
import torch

from evidence.conftest import lora_llama, start, take_step
from evidence.controls import Config, Control, spend
from evidence.test_controls import start_control

def moved_rows(model, opt, control, steps):
    """[{FFN name: rows of B_gate that moved (F,)}] of each step, B itself being looked at."""
    seen = []
    for step in range(steps):
        before = {ffn.name: ffn.B_gate.detach().clone() for ffn in control.ffns}
        take_step(model, opt, step % 4)
        seen.append({ffn.name: (ffn.B_gate != before[ffn.name]).any(dim=1)
                     for ffn in control.ffns})
    return seen

def test_rows_in_turns_move_in_order():
    """Of 48 rows 10 a step: 0 to 9, 10 to 19, ..., 40 to 47 and 0 and 1, 2 to 11."""
    seen = moved_rows(*start_control(mask="turns", keep=0.2, scale="none"), steps=24)
    for step, moved in enumerate(seen):
        expected = sorted((10 * step + i) % 48 for i in range(10))
        for rows in moved.values():
            assert rows.nonzero().flatten().tolist() == expected
    for rows in zip(*(moved.values() for moved in seen)):
        assert (torch.stack(rows).sum(0) == 5).all()    # 24 steps of 10 rows are 5 rounds of 48

def test_rows_in_turns_depend_on_neither_seed_nor_gates():
    model, opt, control = start_control(mask="turns", keep=0.25, seed=3)
    other, other_opt, same = start_control(lora_llama(seed=9), mask="turns", keep=0.25, seed=4)
    for step in range(3):
        take_step(model, opt, step)
        take_step(other, other_opt, step + 5)
        for a, b in zip(control.ffns, same.ffns):
            assert torch.equal(a.state.mask, b.state.mask) and a.state.mask.sum() == 12

def test_credit_is_spent_as_computed_by_hand():
    """Importance 3, 2, 2, 1 and half of the rows: 0.75, 0.5, 0.5, 0.25 a step."""
    credit = torch.zeros(4, dtype=torch.float64)
    by_hand = [([0, 1], [-0.25, -0.5, 0.5, 0.25]), ([0, 2], [-0.5, 0, 0, 0.5]),
               ([1, 3], [0.25, -0.5, 0.5, -0.25]), ([0, 2], [0, 0, 0, 0])]
    for rows, left in by_hand * 2:
        mask, credit = spend(credit, torch.tensor([3.0, 2, 2, 1]), keep=0.5)
        assert mask.nonzero().flatten().tolist() == rows and credit.tolist() == left

def test_rows_without_importance_share_the_turns_evenly():
    mask, credit = spend(torch.zeros(4, dtype=torch.float64), torch.zeros(4), keep=0.5)
    assert mask.tolist() == [True, True, False, False]
    assert credit.tolist() == [-0.5, -0.5, 0.5, 0.5]

def test_credit_is_conserved_and_rows_move_as_often_as_they_earned():
    model, opt, control = start_control(mask="credit", keep=0.25, scale="none")
    earned = {ffn.name: torch.zeros(48, dtype=torch.float64) for ffn in control.ffns}
    count = dict.fromkeys(earned, 0)
    for step in range(160):
        moved = moved_rows(model, opt, control, 1)[0]
        for ffn in control.ffns:
            importance = ffn.state.importance.double()
            earned[ffn.name] += 12 * importance / importance.sum()
            assert torch.equal(moved[ffn.name], ffn.state.mask)
            assert moved[ffn.name].sum() == 12
            count[ffn.name] = count[ffn.name] + moved[ffn.name].long()
            credit = control.credit[ffn.name]
            assert credit.sum().item() == pytest.approx(0, abs=1e-9)
            torch.testing.assert_close(credit, earned[ffn.name] - count[ffn.name])
            assert credit.abs().max() < 2       # nobody waits for more than it earned
    for ffn in control.ffns:
        moves = count[ffn.name]
        assert moves.min() > 0 and moves.sum() == 160 * 12
        most, least = earned[ffn.name].argmax(), earned[ffn.name].argmin()
        assert moves[most] > moves[least] + 4   # by importance, not evenly

def test_credit_is_part_of_the_state():
    model, opt, control = start_control(mask="credit", keep=0.25)
    for step in range(3):
        take_step(model, opt, step)
    saved = copy.deepcopy(control.state_dict())
    again, new = start(lora_llama())
    other = Control(again, new, Config(mask="credit", keep=0.25))
    other.load_state_dict(saved)
    for ffn in control.ffns:
        assert control.credit[ffn.name].any()
        assert torch.equal(other.credit[ffn.name], control.credit[ffn.name])
    take_step(model, opt, 3)
    for name, credit in saved["credit"].items():
        assert torch.equal(other.credit[name], credit)      # a copy: not the first run's any more

def test_credit_waits_until_something_was_seen():
    model, opt, control = start_control(mask="credit", keep=0.25)
    control.token_mask = torch.zeros(4, 15)
    take_step(model, opt, 0)
    for ffn in control.ffns:
        assert ffn.state.mask.all() and not control.credit[ffn.name].any()
