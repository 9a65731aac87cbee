"""NALoRA in other ways to train: several ranks, optimizers, wrappers."""
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from nalora import NALoRAConfig
from nalora_hf import NALoRA, adapters, load_adapter, lora_parameters, merge_lora, save_adapter
from nalora_hf.tests.helpers import (FFN, batch, equal, lora_llama, other_model, other_step,
                                     small_llama, snapshot, start, take_step, trained_lora)

ROOT = Path(__file__).resolve().parents[2]

def ddp_rank(rank, world, port, path, stride):
    """One rank of a data-parallel run, three steps. Writes what must be equal on all ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)
    model, opt, _ = start(None, lr=1e-2)
    parallel = nn.parallel.DistributedDataParallel(model)
    tool = NALoRA(parallel, opt, NALoRAConfig(keep=0.25, stride=stride))
    for i in range(3):
        tokens, targets = batch(i)
        parallel(tokens[rank::world], targets[rank::world])[1].backward()
        opt.step(), opt.zero_grad()
    tensors = {**snapshot(model),
               **{f"{name}/{k}": v for name, s in tool.state_dict()["ffns"].items()
                  for k, v in s.items()}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{path}/{world}-{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def test_two_ranks_equal_each_other_bit_for_bit_and_one_rank_within_tolerance(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(ddp_rank, (world, free_port(), str(tmp_path), 1), nprocs=world)
    one, two, other = (load_file(tmp_path / f"{name}.safetensors")
                       for name in ("1-0", "2-0", "2-1"))
    assert equal(two, other)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)

def fsdp_rank(rank, world, port, path):
    """Trains the small Llama under FSDP2 on this rank's share of each batch, over a checkpoint."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)

    def made():
        model = lora_llama(["q_proj", *FFN])
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)
        return model, opt, NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))

    def step(model, opt, seed):
        tokens, targets = (t[rank::world] for t in batch(seed))
        model(tokens, targets)[1].backward()
        opt.step(), opt.zero_grad()

    whole = lambda model: {name: p.full_tensor()
                           for name, p in model.named_parameters() if p.requires_grad}
    model, opt, tool = made()
    for i in range(5):
        if i == 3:
            weights, states = get_state_dict(model, opt)
            dcp.save({"model": weights, "optimizer": states},
                     checkpoint_id=path / f"checkpoint{world}")
        step(model, opt, i)
    again, new, other = made()
    weights, states = get_state_dict(again, new)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path / f"checkpoint{world}")
    set_state_dict(again, new, model_state_dict=weights, optim_state_dict=states)
    assert other.state_dict()["steps"] == 3
    for i in range(3, 5):
        step(again, new, i)
    assert equal(whole(model), whole(again))
    torch.save([whole(model), [s["mask"] for s in tool.statistics().values()]],
               path / f"{world}{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)

def test_two_ranks_of_fsdp2_equal_one_and_resume(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    def ranks(world):
        port = free_port()
        code = ("import sys; from pathlib import Path; "
                "from nalora_hf.tests.test_steer_setups import fsdp_rank; "
                f"fsdp_rank(int(sys.argv[1]), {world}, {port}, Path({str(tmp_path)!r}))")
        run = lambda rank: subprocess.run([sys.executable, "-c", code, str(rank)], cwd=ROOT,
                                          capture_output=True, text=True, timeout=120)
        with ThreadPoolExecutor() as pool:
            for done in pool.map(run, range(world)):
                assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"{world}{rank}.pt", weights_only=True)
                for rank in range(world)]

    ((one, masks),) = ranks(1)
    for parameters, theirs in ranks(2):
        assert (all(torch.equal(a, b) for a, b in zip(masks, theirs))
                and sum(m.sum() for m in masks) == 24)
        for name in one:
            torch.testing.assert_close(parameters[name], one[name], atol=1e-5, rtol=1e-4)

def test_a_step_skipped_by_grad_scaler_advances_nothing():
    for fused in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, overflow in enumerate((False, True, False)):
            before, state = snapshot(model), tool.statistics()
            loss = model(*batch(i))[1]
            scaler.scale(loss * (math.inf if overflow else 1)).backward()
            scaler.step(opt), scaler.update(), opt.zero_grad()
            assert equal(before, snapshot(model)) == overflow
            now = tool.statistics()
            assert all(torch.equal(now[n]["importance"], state[n]["importance"]) == overflow
                       for n in now)

@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_the_same():
    losses, states = [], []
    for compiled in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25))
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        losses.append([take_step(forward, opt, i) for i in range(4)])
        states.append(tool.statistics())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.equal(states[0][name]["mask"], states[1][name]["mask"]) for name in states[0])

@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_step_as_one(order):
    results = []
    for several in (False, True):
        model = other_model()
        groups = [lora_parameters(model)[i::2] for i in (0, 1)]  # all A, all B
        opts = [torch.optim.AdamW(group, lr=0.01)
                for group in (groups if several else [sum(groups, [])])]
        tool = NALoRA(model, opts if several else opts[0], NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            other_step(model, i, *([opts[j] for j in order] if several else opts))
        results.append((snapshot(model), tool.state_dict()["steps"]))
    assert equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 3

@pytest.mark.parametrize("nalora_first", [True, False])
def test_its_state_is_in_the_optimizers(tmp_path, nalora_first):
    def made():
        model = other_model()
        return model, torch.optim.AdamW(lora_parameters(model), lr=0.05)

    config = NALoRAConfig(stride=3, keep=0.25)
    model, opt = made()
    NALoRA(model, opt, config)
    for i in range(3):
        other_step(model, i, opt)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()},
               tmp_path / "checkpoint.pt")
    again, new = made()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if nalora_first:
        tool = NALoRA(again, new, config)
    again.load_state_dict(saved["model"]), new.load_state_dict(saved["optimizer"])
    if not nalora_first:
        tool = NALoRA(again, new, config)
    assert "nalora" not in new.param_groups[0] and tool.state_dict()["steps"] == 3
    for i in range(3, 6):
        other_step(model, i, opt), other_step(again, i, new)
    assert equal(snapshot(model), snapshot(again))
    tool.remove()
    new.load_state_dict(saved["optimizer"])
    with pytest.raises(ValueError, match="This NALoRA state was made with"):
        NALoRA(again, new, NALoRAConfig(keep=0.75))

def test_an_optimizer_that_evaluates_at_averages_is_refused():
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

    model = lora_llama()
    with pytest.raises(ValueError, match="ScheduleFree evaluates at averages of its own"):
        NALoRA(model, ScheduleFree(lora_parameters(model), lr=0.1))

def test_names_are_the_models_own_under_every_wrapper(tmp_path):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    def compiled_ffns(model):
        for layer in model.model.layers:
            layer.mlp = torch.compile(layer.mlp, backend="eager")
        return model

    def checkpoints(model):
        checkpoint_wrapper.apply_activation_checkpointing(
            model, check_fn=lambda m: type(m).__name__ in ("Block", "LoRALinear"))
        return model

    def parallel_ffn(model):
        model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
        return model

    wrappers = [compiled_ffns, checkpoints, parallel_ffn, nn.DataParallel,
                lambda m: torch.compile(nn.DataParallel(m), backend="eager")]
    plain, (tokens, _) = trained_lora(), batch(0)
    save_adapter(plain, tmp_path / "plain")
    opt = torch.optim.AdamW(lora_parameters(plain))
    state = NALoRA(plain, opt).state_dict()
    for wrap in wrappers:
        model = wrap(trained_lora())
        save_adapter(model, tmp_path / "wrapped")
        for file in ("adapter_model.safetensors", "adapter_config.json", "nalora.json"):
            wrapped, plain_one = (tmp_path / kind / file for kind in ("wrapped", "plain"))
            assert wrapped.read_bytes() == plain_one.read_bytes()
        NALoRA(model, torch.optim.AdamW(lora_parameters(model))).load_state_dict(state)
        fresh = wrap(small_llama())
        load_adapter(fresh, tmp_path / "plain")
        wanted = plain(tokens)[0]
        torch.testing.assert_close(fresh(tokens)[0], wanted)
        merge_lora(fresh)
        torch.testing.assert_close(fresh(tokens)[0], wanted)
        assert not adapters.has_lora(fresh)
