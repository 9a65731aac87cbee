"""train_tiny.py when things go wrong: kills, full disks, no memory, foreign terminals, ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import nalora
import train_tiny
from evidence.test_left_over import free_port, intact  # noqa: F401
from test_nalora import (
    HERE,
    arguments,
    base,  # noqa: F401
    one_thread,  # noqa: F401
    result,
    stepping,
    tiny_pretraining,  # noqa: F401
    uninterrupted,  # noqa: F401
)


def test_torchrun_trains_the_same_on_two_ranks_and_resumes(base, tmp_path, capsys):
    def torchrun(ranks, *flags):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={ranks}",
                f"--master_port={free_port()}",
                str(HERE / "train_tiny.py"),
                *arguments(base, *flags),
            ],
            capture_output=True,
            text=True,
        )

    one = tmp_path / "one"
    assert train_tiny.main(arguments(base, one, "lora")) == 0
    run = torchrun(2, tmp_path / "two", "lora")
    assert run.returncode == 0 and run.stdout.count("exact match") == 1, run.stderr
    ours, theirs = (
        load_file(path / "adapter" / "adapter_model.safetensors")
        for path in (one, tmp_path / "two")
    )
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-4)
    assert torchrun(2, tmp_path / "nalora", "nalora").returncode == 0
    whole = result(tmp_path / "nalora")
    for name in ("summary.json", "adapter/adapter_model.safetensors"):  # as if cut before the end
        (tmp_path / "nalora" / name).unlink()
    assert (
        torchrun(2, tmp_path / "nalora", "nalora", "--resume").returncode == 0
        and result(tmp_path / "nalora") == whole
    )
    refused = torchrun(2, tmp_path / "odd", "nalora", "--batch-size", "5")
    assert (
        refused.returncode
        and refused.stderr.count("cannot be shared evenly by 2 ranks") == 1
        and not (tmp_path / "odd").exists()
    )


MORTAL = """import os, signal, sys, threading, train_tiny
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
code = train_tiny.main(sys.argv[2:])
os._exit(code)"""


long = pytest.mark.skipif("NALORA_LONG" not in os.environ, reason="long: set NALORA_LONG=1")
KILLS = int(os.environ.get("NALORA_KILLS", 3))  # 30 before a release


@long
@pytest.mark.parametrize(
    "method", ["lora", "nalora"] if "NALORA_KILLS" in os.environ else ["nalora"]
)
def test_kill_9_at_random_moments_and_resume_end_in_the_same_bits(base, tmp_path, method):
    flags = ["--steps", "60", "--eval-every", "1", "--test-size", "2"]
    assert train_tiny.main(arguments(base, tmp_path / "whole", method, *flags)) == 0
    whole, longest, stages, moments = result(tmp_path / "whole"), 6.0, [], random.Random(method)
    while len(stages) < KILLS:
        out = tmp_path / f"cut{len(stages)}"
        command = arguments(base, out, method, *flags)
        moment = moments.uniform(0, longest)
        code = subprocess.run(
            [sys.executable, "-c", MORTAL, str(moment), *command], cwd=HERE, capture_output=True
        ).returncode
        if code == 0:  # it was faster than the moment
            longest = moment
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL, moment
        stages.append(sorted(p.name for p in out.rglob("*")) if out.exists() else [])
        assert train_tiny.main([*command, "--resume"]) == 0
        assert result(out) == whole, (moment, stages[-1])
    if KILLS >= 10:
        assert any("checkpoint.pt" in stage for stage in stages)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "checkpoint.pt",
        "metrics.jsonl",
        "adapter_model.safetensors",
        "nalora.json",
        "loss.png",
        "summary.json",
    ],
)
@pytest.mark.parametrize("moment", ["before the write", "before the rename"])
def test_a_death_while_a_file_is_written_costs_nothing(
    base, uninterrupted, tmp_path, monkeypatch, name, moment
):
    class Death(BaseException):
        """Nothing catches it, as nothing catches kill -9."""

    def dying(folder, files, write=nalora.write_files):
        if name not in files:
            return write(folder, files)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.tmp").write_bytes(b"half")
        if moment == "before the rename":
            for file in list(files)[: list(files).index(name)]:  # those before it stand already
                write(folder, {file: files[file]})
        raise Death

    for module in (nalora, train_tiny):
        monkeypatch.setattr(module, "write_files", dying)
    with pytest.raises(Death):
        train_tiny.main(arguments(base, tmp_path / "cut"))
    monkeypatch.undo()
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == uninterrupted("nalora")


@pytest.mark.skipif(
    not hasattr(signal, "SIGXFSZ"),
    reason="the limit on a file's size that stands for a full disk is Unix's",
)
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(
    base, tmp_path, monkeypatch, capsys
):
    import resource

    assert train_tiny.main(arguments(base, tmp_path / "whole")) == 0

    def full_from_step_4(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        stepping(patch, full_from_step_4)
        try:
            code = train_tiny.main(arguments(base, tmp_path / "cut"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert (
        code == 2
        and "checkpoint.pt cannot be written and is as it was before" in error
        and error.count("\n") == 1
    )
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
    ]
    assert train_tiny.main(arguments(base, tmp_path / "cut", "nalora", "--resume")) == 0
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_output_that_cannot_be_written_is_said_in_one_sentence(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train_tiny.main(arguments(base, out)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / "file") in error
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "run" / "checkpoint.pt").rmdir()
    (tmp_path / "run" / "config.json").unlink()
    for name in (
        "config.json",
        "config.json.tmp",
        "checkpoint.pt.tmp",
    ):  # links that lead out of --out are replaced, not followed
        (tmp_path / "run" / name).symlink_to(
            tmp_path / "elsewhere" if name.endswith("tmp") else tmp_path / "nowhere"
        )
    assert train_tiny.main(arguments(base, tmp_path / "run", "nalora", "--resume")) == 0
    assert (
        (tmp_path / "elsewhere").read_text() == "mine"
        and (tmp_path / "file").read_text() == "mine"
        and not (tmp_path / "nowhere").exists()
    )


def test_what_is_no_run_is_said_in_one_sentence(intact, base, tmp_path, capsys):
    run = tmp_path / "run"
    config = json.loads((intact / "run" / "config.json").read_text())
    for file, content, flags, message in (
        ("config.json", {"method": "lora", "data": "data"}, ["--sample"], "holds no run"),
        ("config.json", {**config, "method": "zzz"}, ["--sample"], "holds no run"),
        (
            "config.json",
            {k: v for k, v in config.items() if k != "threads"},
            ["--resume"],
            "threads = None",
        ),
        (
            "config.json",
            {k: v for k, v in config.items() if k != "data"},
            ["--sample"],
            "holds no run",
        ),
    ):
        shutil.copytree(intact / "run", run)
        if file == "config.json":
            (run / "checkpoint.pt").unlink()  # it holds the configuration, too
        (run / file).write_text(json.dumps(content))
        before = result(run)
        assert train_tiny.main([*arguments(base, run), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and result(run) == before
        shutil.rmtree(run)


def test_nothing_is_written_outside_out(base, tmp_path):
    """But for Matplotlib's list of fonts, which is in the user's cache."""
    folders = {name: tmp_path / name for name in ("home", "temporary", "here")}
    for folder in folders.values():
        folder.mkdir()
    environment = {
        **os.environ,
        "HOME": str(folders["home"]),
        "TMPDIR": str(folders["temporary"]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for key in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        environment.pop(key, None)
    done = subprocess.run(
        [sys.executable, str(HERE / "train_tiny.py"), *arguments(base, tmp_path / "out")],
        cwd=folders["here"],
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0 and (tmp_path / "out" / "summary.json").exists()
    assert [
        p
        for folder in folders.values()
        for p in folder.rglob("*")
        if p.is_file() and "matplotlib" not in str(p)
    ] == []


def test_memory_that_does_not_suffice_is_said(base, tmp_path, capsys, monkeypatch):
    for error in (
        MemoryError(),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes.\nmore"
        ),
    ):
        monkeypatch.setattr(train_tiny, "set_up", lambda *_: (_ for _ in ()).throw(error))
        assert train_tiny.main(arguments(base, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert "The memory does not suffice" in said and said.count("\n") == 1


def test_a_terminal_that_cannot_print_a_text_ends_no_run(base, tmp_path):
    rows = [{"prompt": f"{i} caf\u00e9 \U0001f600 ", "completion": "2."} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable,
        "train_tiny.py",
        *arguments(base, tmp_path / "run"),
        "--data",
        str(tmp_path / "own.jsonl"),
    ]
    run = subprocess.run(
        command,
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0 and "caf\\xe9" in run.stdout, run.stderr
