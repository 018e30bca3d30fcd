"""``--profile``: a trace and a table of each rank, and the losses of a run without it."""

from __future__ import annotations

import argparse
import json
import re
import time

import pytest
import torch
from torch import nn
from torch.profiler import profile, record_function

from tests import warm
from tests.launchers.test_pretrain import LAUNCHER, _free_port, environment, losses, run, small  # noqa: F401
from vqmoe_ds.config.cli import profiled_steps
from vqmoe_ds.train.profiling import tables


def _shares(text: str) -> dict[str, float]:
    """Share of each part, of the first table."""
    return {part.strip(): float(share) for part, share in re.findall(r"^(\S.{35}) .* ([\d.]+)%$", text, re.MULTILINE)}


def test_traces_and_tables_of_two_ranks_change_no_loss(small, tmp_path):  # noqa: F811
    words = [*LAUNCHER, *small, "--train_steps", "6", "--ep_size", "2", "--set", "train.activation_checkpointing=true"]
    words += ["--set", "model.sequence_length=256"]  # attention is among the costliest then, whatever else runs here
    found = {}
    for name, extra in (("plain", []), ("profiled", ["--profile", "3:4"])):
        command = [*words, "--run_dir", str(tmp_path / name), *extra]
        ranks = warm.start_ranks(2, command, _free_port(), environment(), stdout=-1, stderr=-1, text=True)
        answers = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
        found[name] = losses(tmp_path / name), answers[0][0]
    assert found["plain"][0] == found["profiled"][0] and len(found["plain"][0]) == 6
    assert "profile of steps 3 to 4, rank 0: milliseconds per step" in found["profiled"][1]
    folder = tmp_path / "profiled/profile"
    assert {path.name for path in folder.iterdir()} == {f"rank{r}.{kind}" for r in (0, 1) for kind in ("json", "txt")}
    for rank in (0, 1):
        names = {event.get("name") for event in json.loads((folder / f"rank{rank}.json").read_text())["traceEvents"]}
        assert {"Attention", "VQRouter", "StackedExperts", "DeepSpeedMoELayer", "optimizer"} <= names
        parts, operations = (folder / f"rank{rank}.txt").read_text().split("\n\n")[1:]
        shares = _shares(parts)
        assert {"Attention, backward", "StackedExperts, backward", "reading data", "gradients"} <= shares.keys()
        assert sum(shares.values()) == pytest.approx(100, abs=2)
        assert re.search(r"^Attention +aten::_scaled_dot_product", operations, re.MULTILINE)


@pytest.mark.parametrize(("asked", "steps"), [("3:9", "3 to 9"), ("3", "3 to 5")])
def test_steps_that_the_run_does_not_take_are_refused(small, tmp_path, asked, steps):  # noqa: F811
    done = run([*small, "--train_steps", "4", "--run_dir", str(tmp_path / "run"), "--profile", asked])
    assert done.returncode == 2 and not (tmp_path / "run/profile").exists()
    assert done.stderr.count("\n") == 1
    assert f"--profile asks for steps {steps}, but this run takes steps 1 to 4" in done.stderr


def test_a_number_of_steps_or_the_first_and_the_last():
    assert profiled_steps("3") == (None, 3) and profiled_steps("10:13") == (10, 13) and profiled_steps("5:5") == (5, 5)
    for text in ("", "0", "-1", "3:", ":3", "5:4", "0:4", "three", "1:2:3"):
        with pytest.raises(argparse.ArgumentTypeError, match="write 3, or 10:13"):
            profiled_steps(text)


def test_backward_belongs_to_the_part_that_made_its_nodes():
    """In A a small product, in B a large one, and a sleep within C, which is Python's."""
    small_map, large_map = nn.Linear(8, 512), nn.Linear(512, 512)
    x_TD = torch.randn(2000, 8)
    with profile() as profiler:
        with record_function("A"):
            h_TD = small_map(x_TD)
        with record_function("C"):
            x_TD * 2  # sees the number of the node that B makes next
            time.sleep(0.02)
        with record_function("B"):
            for _ in range(4):
                h_TD = large_map(h_TD)
        h_TD.sum().backward()
    parts, operations = tables(profiler.events(), {"A", "B", "C"}, steps=1)
    shares = _shares("\n".join(parts))
    assert set(shares) == {"A", "B", "C", "other", "A, backward", "B, backward", "other, backward"}
    assert shares["B, backward"] > shares["B"] > shares["A"] and shares["B, backward"] > shares["A, backward"]
    (python,) = [line.split() for line in operations if line.startswith("C ") and "(Python)" in line]
    assert float(python[3]) >= 20  # milliseconds
