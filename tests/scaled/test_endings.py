"""How a run ends when it does not get to its end: signals, ranks and launchers that die, and a second
run in the same folder. Whole runs under torchrun, of two ranks, from an untrained checkpoint."""
import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
from processes import finish, prepare, start

import nano_moe_rl as nano
from scaled import checkpoint
from scaled.engine import EngineError
from scaled.export import export_nano
from scaled.folder import check_folder
from scaled.policy import load_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    prepare(folder, updates=4000)
    return folder


def begin(folder, name, *options, ranks=2):
    """A run that has made some updates and would make many more -> process, pids of its ranks."""
    process = start(folder, "scaled.train", "--config", "options.toml", "--name", name, *options, ranks=ranks)
    rows, until = folder / "runs" / name / "metrics.jsonl", time.monotonic() + 200
    while not (rows.exists() and len(rows.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.1)
    return process, children(process.pid)


def children(pid):
    """By RANK: what torchrun started, without what these started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            environment = (entry.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == pid:
            rank = next((x for x in environment if x.startswith(b"RANK=")), b"RANK=-1")
            found[int(rank[5:])] = int(entry.parent.name)
    return [found[rank] for rank in sorted(found) if rank >= 0]


def said(err):
    return [line for line in err.splitlines() if line.startswith("scaled: ")]


def ours_comes_last(err):
    """Nothing of gloo's or a traceback after our line but what torchrun adds itself."""
    after = err[err.rindex("scaled: "):]
    return "gloo" not in after and "Connection closed" not in after and "RuntimeError" not in after


def test_sigterm_finishes_the_update_saves_and_exits_with_0(folder):
    """Also when somebody has removed what the run has written about itself so far."""
    process, ranks = begin(folder, "term", "--tensorboard")
    for name in ("config.json", "metrics.jsonl"):
        (folder / "runs/term" / name).unlink()
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    code, out, err = finish(process, 60)
    rows = [json.loads(line) for line in (folder / "runs/term/metrics.jsonl").read_text().splitlines()]
    assert code == 0 and said(err) == [], err
    updates = rows[-1]["update"]
    assert f"stopped by SIGTERM after update {updates} of 4000; --resume term goes on" in out
    assert "all rewards equal: no gradient" in out  # an untrained policy is never right
    newest, = checkpoint.checkpoints(folder / "runs/term")
    assert checkpoint.version_of(newest) == updates and updates % 2 == 0
    assert newest.joinpath("metrics.jsonl").read_text() == (folder / "runs/term/metrics.jsonl").read_text()
    assert [row["update"] for row in rows] == list(range(updates + 1))
    assert json.loads((newest / "config.json").read_text())["prompts"] == 4
    assert not list(folder.glob("runs/term/.*"))  # neither a lock nor anything half written
    event = next(folder.glob("runs/term/events.out.*")).read_bytes()
    assert b"routing_agreement/0" in event and b"mismatch_kl" in event


def test_ctrl_c_has_its_own_exit_code(folder):
    """Which torchrun turns into 1."""
    process, _ = begin(folder, "alone", ranks=0)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process, 60)
    assert code == 130 and said(err)[0].startswith("scaled: stopped by Ctrl-C"), err


def test_sigterm_to_torchrun_saves_too(folder):
    process, _ = begin(folder, "term-all")
    process.terminate()
    code, out, err = finish(process, 60)
    assert "stopped by SIGTERM after update" in out and said(err) == [], err
    assert len(checkpoint.checkpoints(folder / "runs/term-all")) == 1


def test_sigterm_before_there_is_anything_to_save_leaves_nothing(folder):
    process = start(folder, "scaled.train", "--config", "options.toml", "--name", "early")
    until = time.monotonic() + 100
    while not (folder / "runs/early").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    code, out, err = finish(process, 60)
    assert code != 0 and not (folder / "runs/early").exists()
    assert len(said(err)) == 1 and said(err)[0].startswith("scaled: stopped by SIGTERM; --resume early"), err


@pytest.mark.parametrize("again", [0, 20])
def test_ctrl_c_ends_all_ranks_at_once_with_one_line(folder, again):
    """As a terminal does it: to torchrun's group, which tells its ranks, and by somebody who has no patience."""
    process, _ = begin(folder, f"interrupt-{again}", "--checkpoint-every", 2)
    os.killpg(process.pid, signal.SIGINT)
    for _ in range(again):
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process, 40)
    assert code != 0 and ours_comes_last(err)
    assert said(err) == [f"scaled: stopped by Ctrl-C; --resume interrupt-{again} goes on from its newest checkpoint, "
                         "if it has one"], err
    path = folder / f"runs/interrupt-{again}"
    assert not (path / ".lock").exists()
    for saved in checkpoint.checkpoints(path):  # whole, although one was made all the time
        digests = checkpoint.read_digests(saved)
        assert all(checkpoint.digest(saved / name) == digest for name, digest in digests.items())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named(folder, victim):
    process, ranks = begin(folder, f"killed-{victim}")
    os.kill(ranks[victim], signal.SIGKILL)
    code, out, err = finish(process, 60)
    assert code != 0 and len(said(err)) == 1 and f"rank {victim} ended without a word: killed, " in said(err)[0], err
    assert ours_comes_last(err) and "gloo" not in err, err


@pytest.mark.parametrize("rank, size", [(1, 5000), (0, 100)])
def test_a_full_disk_is_said_in_one_line_and_loses_nothing(folder, rank, size):
    """No file of one rank may become longer, from some moment on: its shard of a checkpoint, the rows of metrics."""
    name = f"full-{rank}"
    process, ranks = begin(folder, name, "--checkpoint-every", 2)
    resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    code, out, err = finish(process, 60)
    assert code != 0 and len(said(err)) == 1 and "Traceback" not in err.split("scaled: ")[0], err
    # rank 0 writes shards too: whichever file came first
    assert re.search(rf"runs/{name}/(update-\d+ could not be saved|(metrics.jsonl|curves.png) could not be written): .*"
                     rf"File too large; --resume {name} goes on", said(err)[0]), err
    path = folder / "runs" / name
    newest = checkpoint.checkpoints(path)[-1]
    assert not list(path.glob(".update*"))
    if rank == 0:  # the folder is as above: once is enough
        return
    updates = checkpoint.version_of(newest) + 2
    code, out, err = finish(start(folder, "scaled.train", "--resume", name, "--updates", str(updates)))
    assert code == 0 and said(err) == [], err
    rows = [json.loads(line)["update"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(updates + 1))


def test_a_failure_of_the_engine_is_no_refusal(folder):
    process = start(folder, "scaled.train", "--config", "options.toml", "--name", "engine", ranks=0,
                    VLLM_CPU_KVCACHE_SPACE="1000000")  # GiB
    code, out, err = finish(process, 100)
    assert code == 1 and len(said(err)) == 1, err
    assert "rank 0 at the start: EngineError: vllm 0.30.0 failed " in said(err)[0] and "memory" in said(err)[0], err
    assert said(err)[0].endswith("; runs/engine/log.txt has what libraries said") and "Traceback" in err
    assert [path.name for path in (folder / "runs/engine").iterdir()] == ["log.txt"]
    check_folder(folder / "runs/engine", resume=False)  # the name is free: nothing has to be removed


def test_a_failure_of_the_trainer_is_no_refusal(tmp_path):
    """Whatever exception a library raises once the checkpoint has been found usable: here without a process group."""
    with pytest.raises(EngineError, match="^the training engine failed at its start: ValueError: .*process group"):
        export_nano(nano.Model(nano.Config()), tmp_path / "hf")
        load_policy(tmp_path / "hf", precision="fp32", logits_bytes=1, gradient_checkpointing=False, cpu_offload=False,
                    device="cpu")


def files(folder):
    """All but what the run that goes on there writes from time to time."""
    return sorted(path for path in folder.glob("*.json*") if path.name != "events.jsonl")


def test_ranks_do_not_outlive_torchrun(folder):
    """And while they run, nobody else gets their folder."""
    process, ranks = begin(folder, "launcher", "--checkpoint-every", 2)
    for options in (("--config", "options.toml", "--name", "launcher"), ("--resume", "launcher")):
        before = files(folder / "runs/launcher")
        code, out, err = finish(start(folder, "scaled.train", *options, ranks=0), 100)
        assert code == 2 and len(said(err)) == 1
        assert ("is taken; give another, or --resume launcher" if "--name" in options else
                "a run that has not ended is in runs/launcher") in said(err)[0]
        assert files(folder / "runs/launcher") == before
    rows = (folder / "runs/launcher/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in rows] == list(range(len(rows)))
    process.kill()
    code, out, err = finish(process, 30)  # which fails if a rank is left
    assert said(err) == ["scaled: torchrun has ended, and all ranks with it; --resume launcher goes on from its "
                         "newest checkpoint, if it has one"], err


def test_ranks_that_have_not_met_do_not_outlive_torchrun(folder):
    """SIGKILL before they have as much as imported torch: the store that they are to meet at is gone."""
    process = start(folder, "scaled.train", "--config", "options.toml", "--name", "orphans")
    until = time.monotonic() + 60
    while len(children(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    process.kill()
    code, out, err = finish(process, 120)
    assert len(said(err)) == 1 and "no meeting of ranks at " in said(err)[0], err
    assert said(err)[0].endswith("; torchrun has ended: start it again") and not (folder / "runs/orphans").exists()


def test_a_rank_that_fails_ends_all_with_its_line(folder):
    """Rank 1 fails in the middle of a run, over a reward that ends its process; rank 0 waits for it in a collective."""
    (folder / "quits.py").write_text("""import os
def reward(prompts, texts, tokens):
    os._exit(0) if os.environ["RANK"] == "1" and any(texts) else None  # not when it is tried, without responses
    return [0.0] * len(texts)
""")
    process = start(folder, "scaled.train", "--config", "options.toml", "--name", "quits", "--reward", "quits:reward")
    code, out, err = finish(process, 100)
    assert code != 0 and len(said(err)) == 1, err
    assert "rank 1 at update 0: RuntimeError: reward quits:reward: its process ended with code 0 for " in said(err)[0]
