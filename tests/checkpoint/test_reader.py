"""Checkpoints of every layout are read as whole tensors, and nothing in them is believed or executed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import SAVED_AT, Layout, Training, write_one
from tests.distributed import run_ranks
from tests.hostile import Evil
from vqmoe_ds.checkpoint.formats.deepspeed.reader import adam_of
from vqmoe_ds.checkpoint.io.archive import load_archive
from vqmoe_ds.checkpoint.io.store import MANIFEST, read_manifest, write_manifest
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import FORMATS, KINDS, WeightsReader, register_format
from vqmoe_ds.config.load import load_config
from vqmoe_ds.runtime.errors import CheckpointError

LAYOUTS = [Layout(0, 2, 2), Layout(1, 2, 2), Layout(2, 1, 2), Layout(3, 2, 2), Layout(3, 1, 2, "bf16")]


def _save_and_tell(rank, world, folder, layouts):
    """Save each layout, and return what DeepSpeed itself says the tensors are (this rank's experts)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    answers = []
    for layout in layouts:
        training = Training(folder, layout, rank)
        training.train(SAVED_AT)
        training.save(Path(folder) / str(layout))
        truth = {}
        if layout.stage in (
            1,
            2,
        ):  # DeepSpeed links the moments after the first group's first step, before others have any
            training.session.engine.optimizer._hp_optimizer_states_linked = False
            training.session.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, param in training.session.model.named_parameters():
            if layout.stage:
                truth[name, "fp32"] = safe_get_full_fp32_param(param).clone()
                for kind in KINDS[1:]:
                    truth[name, kind] = safe_get_full_optimizer_state(param, kind).clone()
            else:
                state = training.session.engine.optimizer.state[param]
                truth[name, "fp32"] = param.detach().clone()
                truth.update({(name, kind): state[kind].clone() for kind in KINDS[1:]})
        answers.append((truth, dict(training.session.model.bank.named_buffers())))
        training.close()
    return answers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return folder, run_ranks(2, _save_and_tell, str(folder), LAYOUTS, timeout=200)


@pytest.fixture
def tag(saved, tmp_path):
    """A copy of a ZeRO-2 tag that a test may damage."""
    source = open_checkpoint(saved[0] / str(LAYOUTS[2])).path
    return Path(shutil.copytree(source, tmp_path / "checkpoints" / source.name))


def reseal(tag: Path, **changes) -> None:
    """A forger writes a manifest that fits."""
    manifest = read_manifest(tag)
    state = {key: value for key, value in manifest.items() if key not in ("format", "files")}
    write_manifest(tag, {**state, **changes})


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_tensors_are_those_deepspeed_gathers(number, saved):
    folder, answers = saved
    reader = open_checkpoint(folder / str(LAYOUTS[number]))
    assert (reader.step, reader.optimizer_step(), reader.has_optimizer) == (SAVED_AT, SAVED_AT, True)
    assert {name for name, _ in answers[0][number][0]} == set(reader.names())
    for (name, kind), mine in answers[0][number][0].items():
        parts = [mine]
        if ".experts." in name and LAYOUTS[number].ep == 2:
            parts.append(answers[1][number][0][name, kind])
        assert torch.equal(reader.tensor(name, kind), torch.cat(parts)), (name, kind)
    for name, buffer in answers[0][number][1].items():
        if name != "usage_LK":
            assert torch.equal(reader.buffers()[f"bank.{name}"], buffer)
    assert reader.client_state["vqmoe_ds"]["step"] == SAVED_AT
    assert reader.counters["adam"]["eps"] == 1e-7


def test_a_stretch_is_read_without_the_rest(saved):
    reader = open_checkpoint(saved[0] / str(LAYOUTS[3]))
    for name in ("blocks.1.mlp.experts.w2", "head.weight"):
        whole = reader.tensor(name, "exp_avg").flatten()
        assert torch.equal(reader.read(name, "exp_avg", 101, 333), whole[101:434])
        assert torch.equal(torch.cat(list(reader.stream(name, "exp_avg"))), whole)


@pytest.mark.parametrize(
    "stage, changes",
    [
        (0, {"moe.router": "dense", "moe.top_k": 1}),
        (2, {"moe.router": "dense", "moe.top_k": 1}),
        (0, {"moe.router": "hash_token", "model.moe_every": 2}),
        (1, {"moe.router": "topk", "moe.top_k": 2, "model.moe_every": 2}),
        (3, {"moe.top_k": 0, "codebook.code_dim": 4, "codebook.source": "token_embedding"}),
    ],
)
def test_names_come_in_the_order_of_the_model(stage, changes, tmp_path):
    names = run_ranks(1, write_one, str(tmp_path), Layout(stage, 1, 1), changes)[0]
    reader = open_checkpoint(tmp_path)
    assert reader.names() == names
    assert reader.tensor("head.weight", "exp_avg").abs().max() > 0
    assert all(torch.isfinite(buffer).all() for buffer in reader.buffers().values())


def test_a_run_folder_stands_for_its_newest_checkpoint_that_verifies(tag, caplog):
    newer = Path(shutil.copytree(tag, tag.with_name("global_step0000009")))
    (newer / "mp_rank_00_model_states.pt").write_bytes(b"half")
    for path in (tag, tag.parent, tag.parent.parent):
        caplog.clear()
        assert open_checkpoint(path).path == tag
        said = [] if path == tag else ["mp_rank_00_model_states.pt has 4 bytes", f"{tag.name} is taken instead"]
        assert len(caplog.messages) == bool(said) and all(part in caplog.messages[0] for part in said)


# ------------------------------------------------------------------ hostile files


def _replace_pickle(file: Path, payload: bytes) -> None:
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for name, content in records.items():
            new.writestr(name, payload if name.endswith("data.pkl") else content)


def test_a_hostile_pickle_is_refused_and_not_executed(tag, tmp_path):
    trap = tmp_path / "executed"
    _replace_pickle(tag / "mp_rank_00_model_states.pt", pickle.dumps({"module": Evil(trap)}, protocol=2))
    reseal(tag)
    with pytest.raises(
        CheckpointError, match=r"asks for (io|_io|__builtin__|builtins)\.open.*nothing of it was executed"
    ):
        open_checkpoint(tag)
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "torch.load", "builtins.eval", "torch._utils.load", "vqmoe_ds.runtime.errors.UserError"]
)
def test_no_other_name_is_looked_up(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    file = tmp_path / "x.pt"
    torch.save({}, file)
    _replace_pickle(file, f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match=f"asks for {name}"):
        load_archive(file)


class _ByName:
    """How early releases of Python 3.11 (3.11.2 for one) pickle a member of an enumeration."""

    def __init__(self, owner, name):
        self.pair = owner, name

    def __reduce__(self):
        return getattr, self.pair


def test_stages_that_were_pickled_by_name(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for stage in ZeroStageEnum:
        torch.save({"zero_stage": _ByName(ZeroStageEnum, stage.name)}, tmp_path / "x.pt")
        assert load_archive(tmp_path / "x.pt")["zero_stage"].args[0] == stage.value
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "__init__"), ([], "append")):
        torch.save({"zero_stage": _ByName(owner, name)}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=f"an attribute '{name}'.*nothing of it was executed"):
            load_archive(tmp_path / "x.pt")


def test_a_bare_pickle_is_not_a_checkpoint(tmp_path):
    trap = tmp_path / "executed"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(CheckpointError, match="cut short or is not a checkpoint file"):
        load_archive(tmp_path / "x.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    "numel, shape, part",
    [
        (10**9, (4,), "size mismatch"),
        (4, (10**6,), "outside its storage"),
        (-4, (4,), "size mismatch"),
    ],
)
def test_tensors_that_lie_about_their_size_are_refused(numel, shape, part, tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if thing == "here" else None

    class Lie:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, ("here", 0, shape, (1,), False, {}))

    file, payload = tmp_path / "x.pt", io.BytesIO()
    torch.save(torch.zeros(4), file)
    Pickler(payload, protocol=2).dump(Lie())
    _replace_pickle(file, payload.getvalue())
    with pytest.raises(CheckpointError, match=part):
        load_archive(file)


def test_a_pickle_cannot_bend_a_tensor_to_another_file(tmp_path):
    file = tmp_path / "x.pt"
    torch.save(torch.zeros(4), file)
    with zipfile.ZipFile(file) as archive:
        payload = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    bend = b"}q\x63(X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/shadowub."  # BUILD with {"path": …}
    _replace_pickle(file, payload[:-1] + bend)
    with pytest.raises(CheckpointError, match="not a sound checkpoint file"):
        load_archive(file)


# ------------------------------------------------------------------ damaged files


def _drop(tag):
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def _truncate(tag):
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-100])


def _newer(tag):
    manifest = json.loads((tag / MANIFEST).read_text())
    (tag / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))


def _never_finished(tag):
    (tag / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage, part",
    [
        (_drop, "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"),
        (_truncate, "bytes instead of"),
        (_newer, "is of format 99"),
        (_never_finished, "no finished checkpoint"),
    ],
)
def test_damage_is_named_before_anything_is_read(damage, part, tag):
    damage(tag)
    with pytest.raises(CheckpointError, match=part) as caught:
        open_checkpoint(tag)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_drop, _truncate])
def test_damage_behind_a_manifest_that_fits_is_found_when_it_is_read(damage, tag):
    damage(tag)
    reseal(tag)
    with pytest.raises(CheckpointError, match="zero_pp_rank_1_mp_rank_00_optim_states.pt is (missing|cut short)"):
        open_checkpoint(tag).tensor("head.weight")


def test_files_of_two_tags_are_told_apart(tag, saved, tmp_path):
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    run_ranks(2, write_one, str(tmp_path), Layout(2, 1, 2), {})
    shutil.copy(open_checkpoint(tmp_path / "global_step0000001").path / name, tag / name)
    reseal(tag)
    with pytest.raises(CheckpointError, match="mixes tags: the optimizer of rank 1 is at step 1, that of rank 0 at 3"):
        open_checkpoint(tag).tensor("head.weight")
    other_stage = open_checkpoint(saved[0] / str(LAYOUTS[1])).path
    shutil.copy(other_stage / name, tag / name)
    reseal(tag)
    with pytest.raises(CheckpointError, match="mixes tags: .* of ZeRO stage 1 and 2 ranks, the model of stage 2"):
        open_checkpoint(tag).tensor("head.weight")
    reseal(tag, step=8)
    with pytest.raises(CheckpointError, match="mixes tags: its manifest is of step 8, its weights of step 3"):
        open_checkpoint(tag)


def test_an_elastic_optimizer_is_refused_by_name():
    with pytest.raises(CheckpointError, match="was saved with zero_optimization.elastic_checkpoint"):
        adam_of({"base_optimizer_state": [{"exp_avg": None}]}, Path("tag"))


def test_another_expert_count_is_a_contradiction(tag):
    config = load_config("tiny", None, {"moe.num_experts": 16}).config.model_dump(mode="json")
    reseal(tag, config=config)
    with pytest.raises(CheckpointError, match="has 4 experts, its configuration says 16"):
        open_checkpoint(tag)


def test_a_file_without_what_deepspeed_writes_is_one_sentence(tag):
    torch.save({"module": []}, tag / "mp_rank_00_model_states.pt")
    reseal(tag)
    with pytest.raises(CheckpointError, match="not laid out as its kind is"):
        open_checkpoint(tag)
    (tag / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match="is not a manifest"):
        open_checkpoint(tag)
    (tag / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="says nothing of step"):
        open_checkpoint(tag)


def test_a_wrong_layout_in_the_manifest_leaves_a_gap_that_is_named(tag):
    layout = read_manifest(tag)["layout"]
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    reseal(tag, layout={**layout, "world_size": 1})
    with pytest.raises(CheckpointError, match="of ZeRO stage 2 and 2 ranks, the model of stage 2 and 1 ranks"):
        open_checkpoint(tag).tensor("head.weight")


def test_what_a_folder_is_does_not_depend_on_the_order_of_imports(saved, tmp_path, monkeypatch):
    folder = tmp_path / "megatron"
    (folder / "mp_rank_00").mkdir(parents=True)
    (folder / "mp_rank_00" / "model_optim_rng.pt").touch()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for known in (dict(FORMATS), dict(reversed(FORMATS.items()))):
        monkeypatch.setattr("vqmoe_ds.checkpoint.open.FORMATS", known)
        assert open_checkpoint(saved[0] / str(LAYOUTS[0])).kind == "deepspeed"
        with pytest.raises(CheckpointError, match="holds a model of type None"):
            open_checkpoint(folder)


def test_a_format_registered_from_outside_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("vqmoe_ds.checkpoint.open.FORMATS", formats := dict(FORMATS))
    monkeypatch.setattr("vqmoe_ds.checkpoint.reader.FORMATS", formats)
    (tmp_path / "weights.mine").touch()
    register_format("mine", lambda path: (path / "weights.mine").exists(), Mine)
    assert open_checkpoint(tmp_path).kind == "mine"


class Mine(WeightsReader):
    kind, step = "mine", 3

    def __init__(self, path):
        super().__init__()
        self.path, self.config, self._shapes = path, {}, {}

    def buffers(self):
        return {}

    def pieces(self, name, kind="fp32"):
        return []
