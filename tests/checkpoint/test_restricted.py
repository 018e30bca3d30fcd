"""DeepSpeed's own loading executes nothing, at any ZeRO stage, in float32 and in float16; and it still loads."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.hostile import Evil
from tests.train.test_loss_scale import _scale, _trainer
from vqmoe_ds.checkpoint.io.archive import ZERO_STAGES
from vqmoe_ds.checkpoint.resume.restricted import without_pickles
from vqmoe_ds.runtime.errors import CheckpointError


def _in_the_tree(file: Path, evil: Evil) -> None:
    tree = torch.load(file, weights_only=False)
    torch.save({**tree, "and": evil}, file)


def _in_the_old_format(file: Path, evil: Evil) -> None:
    tree = torch.load(file, weights_only=False)
    torch.save({**tree, "and": evil}, file, _use_new_zipfile_serialization=False)


def _bare(file: Path, evil: Evil) -> None:
    file.write_bytes(pickle.dumps(evil, protocol=2))


def _resumed(trainer: Any, tag: Path, guarded: bool = True) -> Any:
    if not guarded:
        return trainer.session.engine.load_checkpoint(str(tag.parent), tag=tag.name)
    with without_pickles():
        return trainer.session.engine.load_checkpoint(str(tag.parent), tag=tag.name)


def _attack(trainer: Any, tag: Path, folder: Path) -> list[str]:
    """What went wrong with a pickle in each kind of file, in three ways; and one that is run, without the guard."""
    trap, problems = folder / "executed", []
    kinds = {file.name for file in tag.glob("*.pt") if "layer_" not in file.name}
    kinds |= set(sorted(file.name for file in tag.glob("layer_*.pt"))[:1])  # one expert stands for all
    for number, name in enumerate(sorted(kinds)):
        for poison in (_in_the_tree, _in_the_old_format, _bare):
            copy = Path(shutil.copytree(tag, folder / "poisoned" / tag.name))
            poison(copy / name, Evil(trap))
            try:
                _resumed(trainer, copy)
                problems.append(f"{name} {poison.__name__}: loaded")
            except CheckpointError as error:
                if "nothing of it was executed" not in str(error) or "\n" in str(error) or "open" not in str(error):
                    problems.append(f"{name}: {error}")
            if trap.exists():
                problems.append(f"{name} {poison.__name__}: executed")
            if number == 0 and poison is _in_the_tree:
                _resumed(trainer, copy, guarded=False)
                if not trap.exists():
                    problems.append("the attack is none")
                trap.unlink(missing_ok=True)
            shutil.rmtree(copy)
    return problems


def _resume_and_attack(rank: int, world: int, folder: str, stage: int, precision: str) -> tuple[Any, ...]:
    from tests.checkpoint.layouts import save

    values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision == "fp16":
        values["fp16"] = {"enabled": True, "initial_scale_power": 14}
    first = _trainer(rank, world, folder, values)
    for _ in range(2):
        first.train_step()
    tag = save(first.session, Path(folder) / "checkpoints", 2, 0)
    scale = _scale(first.session.engine) if precision == "fp16" else 0
    losses = [first.train_step().loss for _ in range(2)]
    again = _trainer(rank, world, folder, values)
    if precision == "fp16" and stage:
        _disturb(again.session.engine)
    _resumed(again, tag)
    restored = _scale(again.session.engine) if precision == "fp16" else 0
    again.step = 2
    resumed = [again.train_step().loss for _ in range(2)]
    problems = _attack(_trainer(rank, world, folder, values), tag, Path(folder))
    return losses, resumed, scale, restored, problems


def _disturb(engine: Any) -> None:
    """Another scale than the one saved, to see it restored."""
    holder = getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
    holder.cur_scale = 8.0


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("stage", range(4))
def test_deepspeeds_loading_restores_and_executes_nothing(stage: int, precision: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    [answer] = run_ranks(1, _resume_and_attack, str(tmp_path), stage, precision, timeout=200)
    losses, resumed, scale, restored, problems = answer
    assert problems == []
    assert resumed == losses
    assert restored == scale


# ------------------------------------------------------------------ the names that are let through


def _state(kind: type, values: dict[str, Any]) -> Any:
    thing = kind.__new__(kind)
    thing.__dict__.update(values)
    return thing


def _saved(thing: Any, path: Path) -> Path:
    torch.save(thing, path)
    return path


def test_what_deepspeed_saves_comes_back_as_it_was(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**14, 100, 1.0, 2, False, dtype=torch.float16)
    tree = [scaler, LossScaler(8.0), fragment_address(3, 4), *ZeroStageEnum]
    path = _saved(tree, tmp_path / "x.pt")
    with without_pickles():
        read = torch.load(path, weights_only=False)
    assert [type(thing) for thing in read] == [type(thing) for thing in tree]
    assert [vars(thing) for thing in read[:3]] == [vars(thing) for thing in tree[:3]]
    assert read[3:] == tree[3:]
    torch.save(read, path)  # and are saved again under their own names
    assert b"vqmoe_ds" not in path.read_bytes()


class _ByName:
    def __init__(self, owner: Any, name: str) -> None:
        self.pair = owner, name

    def __reduce__(self) -> tuple:
        return getattr, self.pair


def test_stages_that_were_pickled_by_name(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for name, stage in ZERO_STAGES.items():
        with without_pickles():
            assert torch.load(_saved(_ByName(ZeroStageEnum, name), tmp_path / "x.pt"), weights_only=False) == stage
    for owner, name in ((ZeroStageEnum, "__class__"), (LossScaler, "__init__"), (ZeroStageEnum, "mro")):
        path = _saved(_ByName(owner, name), tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="an attribute"), without_pickles():
            torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    "values",
    [{"update_scale": 3}, {"cur_scale": [1]}, {"cur_scale": torch.zeros(2)}, {"__class__": 1}, {"dynamic": "x"}],
)
def test_attributes_that_are_not_deepspeeds_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    path = _saved(_state(LossScaler, {}), tmp_path / "x.pt")
    thing = LossScaler(1.0)
    vars(thing).update(values)
    path = _saved(thing, path)
    with pytest.raises(CheckpointError, match="attributes of a LossScaler"), without_pickles():
        torch.load(path, weights_only=False)


def test_a_pickle_changes_no_member_of_a_class(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from tests.checkpoint.test_archive import call, text, write

    member = call("deepspeed.runtime.zero.config", "ZeroStageEnum", b"K\x03")
    path = write(tmp_path / "x.pt", b"\x80\x02" + member + b"}" + text("_value_") + b"K\x00sb.")
    with pytest.raises(CheckpointError, match="nothing of it was executed"), without_pickles():
        torch.load(path, weights_only=False)
    assert ZeroStageEnum.weights.value == 3


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_switch_is_as_before_afterwards(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", before)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a user's own opposite gives way
    path = _saved({"a": Evil(tmp_path / "executed")}, tmp_path / "x.pt")
    allowed = set(torch.serialization.get_safe_globals())
    for _ in range(2):
        with pytest.raises(CheckpointError), without_pickles():
            torch.load(path)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert not (tmp_path / "executed").exists()
