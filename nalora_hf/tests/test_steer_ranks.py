"""NALoRA on several ranks: each test's two processes run in one start of both."""
import os
import socket
import warnings

import pytest
import torch
import torch.nn as nn

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import FFN, batch, equal, lora_llama, snapshot, start, state_of

CONFIG = NALoRAConfig(keep=0.25, stride=1)

def train(model, opt, tool, rank, world, steps=range(3), masked=False):
    """Each step with two microbatches; a rank takes its share of each."""
    for step in steps:
        for i in range(2):
            tokens, targets = (t[rank::world] for t in batch(10 * step + i))
            if masked:  # rank 1 sees padding alone
                tool.token_mask = torch.arange(4)[rank::world, None].expand(-1, 15) % 2 == 0
            (model(tokens, targets)[1] / 2).backward()
        opt.step()
        opt.zero_grad()

def ddp(rank, world, path, masked=False):
    model, opt, _ = start(None, lr=1e-2)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    tool = NALoRA(parallel, opt, CONFIG)
    train(parallel, opt, tool, rank, world, masked=masked)
    return {**snapshot(model), **state_of(tool)}

def ddp_masked(rank, world, path):
    return ddp(rank, world, path, masked=True)

def fsdp(rank, world, path):
    """FSDP2, over a checkpoint that is written after the third step."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def made():
        model = lora_llama(["q_proj", *FFN])
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)
        return model, opt, NALoRA(model.train(), opt, CONFIG)

    def whole(model):
        return {name: p.full_tensor().detach().clone()
                for name, p in model.named_parameters() if p.requires_grad}

    model, opt, tool = made()
    train(model, opt, tool, rank, world)
    weights, moments = get_state_dict(model, opt)
    checkpoint.save({"model": weights, "optimizer": moments, "nalora": tool},
                    checkpoint_id=path / f"fsdp-of-{world}")
    before = whole(model)
    train(model, opt, tool, rank, world, range(3, 5))
    after = whole(model)
    again, new, other = made()
    weights, moments = get_state_dict(again, new)
    checkpoint.load({"model": weights, "optimizer": moments, "nalora": other},
                    checkpoint_id=path / f"fsdp-of-{world}")
    set_state_dict(again, new, model_state_dict=weights, optim_state_dict=moments)
    assert other.steps == 3
    train(again, new, other, rank, world, range(3, 5))
    assert equal(after, whole(again)) and equal(state_of(tool), state_of(other))
    train(model, opt, tool, rank, world, range(5, 6))
    final = whole(model)
    for name, s in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B"
        assert torch.equal((final[B] != after[B]).any(1), s["mask"])
    return {**before, **{f"{name} in the end": t for name, t in after.items()}, **state_of(other)}

def apart(rank, world, path):
    """Each rank trains a model of its own, and rank 1 one step longer."""
    model, opt, _ = start(None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tool = NALoRA(model, opt, CONFIG)
    assert [str(w.message)[:28] for w in said] == ["torch.distributed is on, but"]
    train(model, opt, tool, rank, world, range(3 + rank))
    return {**snapshot(model), **state_of(tool)}

def told(rank, world, path):
    """As `apart`, but both ranks were named."""
    model, opt, _ = start(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tool = NALoRA(model, opt, CONFIG)
    tool.process_groups = [torch.distributed.group.WORLD]
    for i in range(2):
        tokens, targets = (t[rank::world] for t in batch(i))
        model(tokens, targets)[1].backward()
        for p in lora_parameters(model):
            torch.distributed.all_reduce(p.grad)
            p.grad /= world
        opt.step()
        opt.zero_grad()
    return {**snapshot(model), **state_of(tool)}

def joined(rank, world, path):
    """DDP's join(), for ranks whose numbers of batches differ."""
    model, opt, _ = start(None, lr=1e-2)
    parallel = nn.parallel.DistributedDataParallel(model)
    tool = NALoRA(parallel, opt, CONFIG)
    try:
        with parallel.join():
            train(parallel, opt, tool, rank, world, range(1))
    except ValueError as e:
        return str(e)

def run(kinds, rank, world, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(NALoRA|moved)")  # there is no reason to warn
        return {kind.__name__: kind(rank, world, path) for kind in kinds}

def one_of_two(rank, port, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=2)
    found = run((ddp, ddp_masked, fsdp, apart, told, joined), rank, 2, path)
    torch.save(found, path / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down

@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(one rank's results, [those of each of two])."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, path), nprocs=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        one = run((ddp, ddp_masked, fsdp), 0, 1, path)
    finally:
        torch.distributed.destroy_process_group()
    return one, [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

@pytest.mark.parametrize("kind", [ddp, ddp_masked, fsdp])
def test_two_ranks_equal_each_other_bit_for_bit_and_one_within_tolerance(ends, kind):
    one, (two, other) = ends
    one, two, other = (found[kind.__name__] for found in (one, two, other))
    assert equal(two, other) and one.keys() == two.keys()
    assert sum(t.sum() for name, t in one.items() if name.endswith("/mask")) == 24
    for name in one:
        if name.endswith("/mask"):
            assert torch.equal(one[name], two[name])
        else:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)

def test_ranks_that_train_apart_decide_by_their_own_batches_and_wait_for_nobody(ends):
    for rank in (0, 1):
        model, opt, tool = start(CONFIG)
        train(model, opt, tool, rank, 2, range(3 + rank))
        assert equal(ends[1][rank]["apart"], {**snapshot(model), **state_of(tool)})
    assert not equal(*(found["apart"] for found in ends[1]))

def test_ranks_may_be_named(ends):
    model, opt, tool = start(CONFIG)
    for i in range(2):
        model(*batch(i))[1].backward()
        opt.step(), opt.zero_grad()
    whole = {**snapshot(model), **state_of(tool)}
    two, other = (found["told"] for found in ends[1])
    assert equal(two, other)
    for name in whole:
        torch.testing.assert_close(two[name], whole[name], atol=1e-5, rtol=1e-4)

def test_uneven_batches_under_ddps_join_are_refused_in_a_sentence(ends):
    assert [found["joined"] for found in ends[1]] == [
        "NALoRA adds up over ranks at each step, so that they need the same number of batches: "
        "train without DDP's join()."] * 2

def test_parameters_sharded_within_rows_are_refused():
    from torch.distributed.tensor import Shard, distribute_tensor
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        model = lora_llama()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            A = layer.mlp.gate_proj.lora_A
            layer.mlp.gate_proj.lora_A = nn.Parameter(distribute_tensor(A.data, mesh, [Shard(1)]))
        with pytest.raises(ValueError, match="sharded within rows"):
            NALoRA(model, torch.optim.SGD(lora_parameters(model), lr=0.1))
    finally:
        torch.distributed.destroy_process_group()
