"""Megatron checkpoints: loaded strictly by megatron-core's own model, its logits ours, and exact on the way back."""

from __future__ import annotations

import importlib
import os
import shutil
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoint.layouts import Layout, move, write_sources
from tests.distributed import run_ranks
from tests.huggingface import LENGTH, ModelReader, load_back, model_of, tokens_of
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.checkpoint.formats.megatron.reader import EXTRA, EXTRA_TENSORS, open_megatron
from vqmoe_ds.checkpoint.formats.megatron.writer import MegatronOptions, export_megatron
from vqmoe_ds.checkpoint.inspect import inspect
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import CheckpointError

VOCAB = 50
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "top-2": {"moe": {"router": "topk", "top_k": 2}},
    "top-1": {"moe": {"router": "topk", "top_k": 1}},
    "top-2, every second": {"moe": {"router": "topk", "top_k": 2}, "model": {"moe_every": 2, "dense_hidden": 40}},
    "top-2, over all": {"moe": {"router": "topk", "top_k": 2}, "router": {"softmax_over": "all"}},
    "top-2, norms of wide heads": {
        **{"moe": {"router": "topk", "top_k": 2}, "model": {"qk_norm": "heads", "head_width": 16}},
    },
    "top-2, grouped queries": {"moe": {"router": "topk", "top_k": 2}, "model": {"heads": 4, "kv_heads": 2}},
    "top-2, first blocks dense": {"moe": {"router": "topk", "top_k": 2}, "model": {"dense_layers": 2}},
    "top-2, biased queries": {"moe": {"router": "topk", "top_k": 2}, "model": {"qkv_bias": True}},
    "top-2, shared experts": {"moe": {"router": "topk", "top_k": 2, "shared_experts": 2}, "model": {"moe_every": 2}},
    "top-2, sliding window": {"moe": {"router": "topk", "top_k": 2}, "model": {"sliding_window": 5}},
    "top-2, tied embeddings": {"moe": {"router": "topk", "top_k": 2}, "model": {"tie_embeddings": True}},
    "dense": {"moe": {"router": "dense"}},
    "dense, norms of heads": {"moe": {"router": "dense"}, "model": {"qk_norm": "heads"}},
    "codes": {"codebook": {"num_codes": 9}},
    "codes alone": {"moe": {"top_k": 0}, "codebook": {"source_momentum": 0.9}},
    "codes, every second": {"codebook": {"source": "layer_state"}, "model": {"moe_every": 2}},
    "hash of tokens": {"moe": {"router": "hash_token"}},
}
EXACT = tuple(case for case in CASES if case.startswith(("top-", "dense")))
"""Those that Megatron computes as we do."""


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    """Ranks are forks of this process: what it has imported they need not."""
    importlib.import_module("megatron.core.models.gpt")


def config_of(case: str) -> RunConfig:
    sections = CASES[case]
    model = {"vocab_size": VOCAB, "layers": 4, "width": 24, "heads": 2, "sequence_length": LENGTH, "rope_theta": 500.0}
    return RunConfig(
        model={**model, **sections.get("model", {})},
        moe={"num_experts": 4, "expert_hidden": 12, **sections.get("moe", {})},
        codebook=sections.get("codebook", {}),
        router=sections.get("router", {}),
    )


def reader_of(case: str) -> ModelReader:
    reader = ModelReader(model_of(config_of(case)))
    reader.config["train"]["seed"] = 77
    return reader


def export(case: str, dst: Path, **options: Any) -> Path:
    export_megatron(reader_of(case), dst, MegatronOptions(**options))
    return dst


def let_megatron_run_on_cpu() -> None:
    """It asks for the current CUDA device and for its random states, though nothing here needs either."""
    import megatron.core.fusions.fused_softmax as softmax
    import megatron.core.transformer.moe.grouped_gemm_util as grouped
    import megatron.core.transformer.moe.moe_utils as utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch._dynamo.config.disable = True  # its fused activations would be compiled
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[return-value]
    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    softmax.get_sliding_window_causal_mask = _on_cpu(softmax.get_sliding_window_causal_mask)
    utils.te_general_gemm = None
    grouped.assert_grouped_gemm_is_available = lambda: None


def _on_cpu(function: Any) -> Any:
    """A function that makes its tensors by ``torch.ones`` on the GPU, and here does not."""
    ones = torch.ones

    def inside(*args: Any) -> Any:
        with patch("torch.ones", lambda *shape, device=None, **options: ones(*shape, **options)):
            return function(*args)

    return inside


def megatron_model(args: Namespace, ranks: dict[str, int]) -> Any:
    """megatron-core's own model from the arguments in a checkpoint, as Megatron-LM's ``gpt_builder`` makes it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    let_megatron_run_on_cpu()
    parallel_state.initialize_model_parallel(**ranks)
    names = (
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
        *(
            "normalization",
            "qk_layernorm",
            "add_bias_linear",
            "add_qkv_bias",
            "attention_dropout",
            "hidden_dropout",
            "params_dtype",
        ),
        *(
            "moe_router_topk",
            "moe_ffn_hidden_size",
            "moe_grouped_gemm",
            "moe_use_legacy_grouped_gemm",
            "moe_layer_freq",
        ),
        "moe_shared_expert_intermediate_size",
        *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_dtype"),
        *("tensor_model_parallel_size", "expert_model_parallel_size", "rotary_interleaved", "window_size"),
    )
    config = TransformerConfig(
        **{name: getattr(args, name) for name in names if hasattr(args, name)},
        **{"num_moe_experts": args.num_experts, "layernorm_epsilon": args.norm_epsilon},
        **{"gated_linear_unit": args.swiglu, "activation_func": F.silu, "use_cpu_initialization": True},
        **{"bias_activation_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False},
        **{"bias_dropout_fusion": False, "apply_rope_fusion": False, "gradient_accumulation_fusion": False},
    )
    if args.num_experts:
        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=args.qk_layernorm)
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    ).eval()


def _logits(rank: int, world: int, folder: str, cases: list[tuple[str, int, int]]) -> list[Tensor]:
    """Load each checkpoint strictly on ``world`` = TP * EP ranks and run it."""
    from megatron.core import parallel_state

    answers = []
    for name, tp, ep in cases:
        # Megatron counts tensor-parallel ranks first; with EP, the same ranks are data-parallel for the dense part.
        file = f"mp_rank_{rank % tp:02d}" + (f"_{rank // tp:03d}" if ep > 1 else "")
        state = torch.load(f"{folder}/{name}/iter_0000007/{file}/model_optim_rng.pt", weights_only=False)
        sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep}
        model = megatron_model(state["args"], sizes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9)
        model.load_state_dict(state["model"], strict=True)
        tokens = tokens_of(2, LENGTH, VOCAB)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        with torch.no_grad():
            answers.append(model(tokens, torch.arange(LENGTH).expand(2, -1), mask).float())
        parallel_state.destroy_model_parallel()
        dist.barrier()
    return answers


def _check_logits(tmp_path: Path, world: int, cases: list[tuple[str, int, int]]) -> None:
    names = [f"{case}-tp{tp}-ep{ep}" for case, tp, ep in cases]
    for name, (case, tp, ep) in zip(names, cases, strict=True):
        export(case, tmp_path / name, tp=tp, ep=ep)
    jobs = [(name, tp, ep) for name, (_, tp, ep) in zip(names, cases, strict=True)]
    ranks = run_ranks(world, _logits, str(tmp_path), jobs)
    for number, (case, _, _) in enumerate(cases):
        with torch.no_grad():
            ours, _ = model_of(config_of(case))(tokens_of(2, LENGTH, VOCAB))
        for answers in ranks:
            theirs = answers[number]
            assert not theirs[..., VOCAB:].any()
            if case in EXACT:
                assert (theirs[..., :VOCAB] - ours).abs().max() < 1e-5, case
            else:
                assert theirs.isfinite().all()


def test_megatron_core_loads_every_router_strictly_and_computes_the_same(tmp_path):
    _check_logits(tmp_path, 1, [(case, 1, 1) for case in CASES])


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2)])
def test_ranks_of_megatron_core_compute_the_same(tmp_path, tp, ep):
    cases = ["top-2, norms of wide heads", "top-2, every second", "codes"]
    if tp > 1:
        cases = ["top-2, norms of wide heads", "top-1", "dense", "codes alone"]
    _check_logits(tmp_path, tp * ep, [(case, tp, ep) for case in cases])


def _grouped(rank: int, world: int, folder: str) -> float:
    """Megatron's grouped experts, by the views its kernel takes of their weights, against ours."""
    state = torch.load(f"{folder}/iter_0000007/mp_rank_00/model_optim_rng.pt", weights_only=False)
    model = megatron_model(state["args"], {})
    model.load_state_dict(state["model"], strict=True)
    ours, worst = model_of(config_of("top-2")), 0.0
    x = torch.randn(5, 24)
    for layer, block in zip(model.decoder.layers, ours.blocks, strict=True):
        experts, mine = layer.mlp.experts, block.mlp.experts
        w1, w2 = experts.weight1.view(4, 24, -1), experts.weight2.view(4, -1, 24)
        for e in range(4):
            want = F.linear(F.silu(F.linear(x, mine.w1[e])) * F.linear(x, mine.w3[e]), mine.w2[e])
            worst = max(worst, (experts.activation_func(x @ w1[e]) @ w2[e] - want).abs().max().item())
    return worst


def test_grouped_experts(tmp_path):
    export("top-2", tmp_path / "grouped", experts="grouped")
    assert run_ranks(1, _grouped, str(tmp_path / "grouped"))[0] < 1e-5


# ------------------------------------------------------------------ and back


@pytest.mark.parametrize(
    "options",
    [{}, {"tp": 2}, {"ep": 4}, {"tp": 2, "ep": 2}, {"experts": "grouped", "tp": 2, "ep": 2}, {"experts": "grouped"}],
    ids=str,
)
def test_back_again_is_bit_exact(tmp_path, options):
    for case in CASES:
        source = reader_of(case)
        options = {**options, "ep": 1} if case.startswith("dense") else options
        back = open_megatron(export(case, tmp_path / case, **options))
        assert back.layout == {"tp_size": options.get("tp", 1), "ep_size": options.get("ep", 1)}
        assert back.step == source.step and back.config["train"]["seed"] == 77
        assert back.names() == source.names()
        for name in source.names():
            assert torch.equal(back.tensor(name), source.tensor(name)), (case, name)
        assert back.buffers().keys() == source.buffers().keys()
        assert all(torch.equal(buffer, source.buffers()[name]) for name, buffer in back.buffers().items())
        load_back(back)


def test_bfloat16_is_rounded_once(tmp_path):
    back = open_megatron(export("codes", tmp_path / "m", dtype="bfloat16"))
    for name in back.names():
        rounds = "path_gate" not in name
        want = reader_of("codes").tensor(name)
        assert torch.equal(back.tensor(name), want.bfloat16().float() if rounds else want), name


def test_deepspeed_to_megatron_to_deepspeed(tmp_path):
    """A run's tag, through Megatron, is the same tag without moments, and DeepSpeed trains on from it."""
    layout = Layout(2, 2, 2)
    run_ranks(2, write_sources, str(tmp_path), [layout], 1)
    source = open_checkpoint(tmp_path / str(layout))
    _convert(source.path, tmp_path / "megatron", "--to", "megatron", "--tp", 2, "--ep", 2, "--experts", "grouped")
    _same_weights(source, open_checkpoint(tmp_path / "megatron"))
    _convert(tmp_path / "megatron", tmp_path / "portable", "--to", "portable")
    _same_weights(source, open_checkpoint(tmp_path / "portable"))
    _convert(tmp_path / "megatron", tmp_path / "tag", "--to", "deepspeed", "--zero", 1, "--ep", 1, "--world", 2)
    _same_weights(source, open_checkpoint(tmp_path / "tag"))
    losses = run_ranks(2, move, str(tmp_path), [("portable", layout), ("tag", Layout(3, 1, 2))], 3)[0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def _convert(*arguments: Any) -> None:
    assert main(build_parser("").parse_args([str(argument) for argument in arguments])) == 0


def _same_weights(one: CheckpointReader, other: CheckpointReader) -> None:
    assert one.shapes == {name: other.shape(name) for name in one.names()} and one.step == other.step
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name
    assert one.buffers().keys() == other.buffers().keys()
    assert all(torch.equal(buffer, other.buffers()[name]) for name, buffer in one.buffers().items())


@pytest.mark.parametrize("case", EXACT)
def test_a_checkpoint_of_megatron_itself_is_understood_by_its_arguments(case, tmp_path):
    iteration = export(case, tmp_path / "m", tp=2) / "iter_0000007"
    for name in (EXTRA, EXTRA_TENSORS):
        (iteration / name).unlink(missing_ok=True)
    back, source = open_megatron(tmp_path / "m"), reader_of(case)
    for section, skipped in (("model", {"dense_hidden"}), ("moe", {"num_experts", "expert_hidden", "top_k"})):
        for name in source.config[section].keys() - (skipped if case.startswith("dense") else {"dense_hidden"}):
            assert back.config[section][name] == source.config[section][name], name
    assert all(torch.equal(back.tensor(name), source.tensor(name)) for name in source.names())
    assert torch.equal(load_back(back)(tokens_of())[0], load_back(open_megatron(tmp_path / "m"))(tokens_of())[0])


@pytest.mark.parametrize(("case", "layers"), [("top-2, every second", 2), ("dense", 0), ("codes", 4)])
def test_inspection(case, layers, tmp_path):
    found = inspect(str(export(case, tmp_path / "m")))
    assert found["kind"] == "megatron" and found["parameters"] == sizes(reader_of(case).shapes, config_of(case))
    assert len(found["layers"]) == layers


# ------------------------------------------------------------------ refusals


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_megatron(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "options", "sentence"),
    [
        ("top-2", {"tp": 3}, "--tp 3 does not divide the 2 heads"),
        ("top-2, grouped queries", {"tp": 4}, "--tp 4 does not divide the 2 key-value heads"),
        ("top-2", {"ep": 3}, "--ep 3 does not divide the 4 experts"),
        ("dense", {"ep": 2}, "--ep 2 does not divide the 1 experts"),
    ],
)
def test_sizes_that_cannot_be(case, options, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        export(case, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"rope_scaling": "linear", "rope_factor": 2.0}}, r"positions \(model.rope_scaling=linear\)"),
        ({"moe": {"router": "topk", "shared_experts": 1, "shared_gate": True}}, r"by a gate \(moe.shared_gate\)"),
        ({"model": {"qk_norm": "full"}}, r"over all heads together \(model.qk_norm=full\), Megatron each"),
        (
            {"moe": {"router": "topk", "top_k": 1}, "router": {"softmax_over": "chosen"}},
            "by 1 .*, Megatron by its probability",
        ),
    ],
)
def test_what_megatron_cannot_compute_is_refused(sections, sentence, tmp_path):
    reader = ModelReader(model_of(RunConfig(**sections)))
    with pytest.raises(CheckpointError, match=sentence):
        export_megatron(reader, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(tmp_path):
    export("dense", tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists"):
        export("dense", tmp_path / "m")
    export("dense", tmp_path / "m", force=True)


def test_a_missing_rank(tmp_path):
    path = export("top-2", tmp_path / "m", tp=2, ep=2)
    shutil.rmtree(path / "iter_0000007" / "mp_rank_01_000")
    assert "tensor-parallel rank 1, expert-parallel rank 0 is missing" in _refused(path)


def test_other_expert_counts(tmp_path):
    path = export("top-2", tmp_path / "m", ep=4)
    for rank in (2, 3):
        shutil.rmtree(path / "iter_0000007" / f"mp_rank_00_{rank:03d}")
    assert "has 1 experts in each of 2 expert-parallel ranks, its configuration says 4" in _refused(path)


def test_files_of_two_iterations(tmp_path):
    path = export("top-2", tmp_path / "m", ep=2) / "iter_0000007" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "iteration": 8}, path)
    assert "mixes tags" in _refused(tmp_path / "m")


def test_a_model_that_this_trainer_cannot_compute(tmp_path):
    iteration = export("top-2", tmp_path / "m") / "iter_0000007"
    path = iteration / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    extra = {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(12)}
    torch.save({**state, "model": {**state["model"], **extra}}, path)
    assert "q_layernorm.weight of rank (0, 0)" in _refused(tmp_path / "m")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("dense", {"normalization": "LayerNorm", "apply_layernorm_1p": True, "activation_func_clamp_value": 7.0}),
        ("dense", {"qk_l2_norm": True, "softmax_type": "off-by-one", "softmax_scale": 0.1, "glu_linear_offset": 1.0}),
        ("dense", {"no_rope_freq": [0, 1, 0, 1], "rotary_seq_len_interpolation_factor": 4}),
        ("top-2", {"moe_router_topk_scaling_factor": 2.5, "moe_apply_probs_on_input": True}),
        ("top-2", {"moe_router_group_topk": 1, "moe_router_topk_limited_devices": 1}),
        ("top-2", {"moe_expert_capacity_factor": 1.25, "moe_router_force_load_balancing": True}),
        ("top-2", {"moe_router_load_balancing_type": "sinkhorn"}),
        ("top-2", {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}),
    ],
)
def test_options_that_leave_tensors_alone_and_change_the_model_are_refused(case, options, tmp_path):
    iteration = export(case, tmp_path / "m") / "iter_0000007"
    (iteration / EXTRA).unlink()
    path = iteration / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    vars(state["args"]).update(dict.fromkeys(options), moe_router_topk_scaling_factor=1.0)
    torch.save(state, path)
    open_megatron(tmp_path / "m")
    for name, value in options.items():
        torch.save({**state, "args": Namespace(**{**vars(state["args"]), name: value})}, path)
        assert f"has {name}={value}, but this trainer knows only" in _refused(tmp_path / "m")


def test_other_formats(tmp_path):
    iteration = export("top-2", tmp_path / "m") / "iter_0000007"
    (iteration / "metadata.json").write_text("{}")
    assert "torch_dist format" in _refused(tmp_path / "m")
    (iteration / "metadata.json").unlink()
    (iteration / "mp_rank_00").rename(iteration / "mp_rank_00_000_000")
    assert "pipeline-parallel" in _refused(tmp_path / "m")


def test_a_hostile_file(tmp_path):
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("touch executed",)

    path = export("dense", tmp_path / "m") / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"args": Hostile()}, path)
    assert "nothing of it was executed" in _refused(tmp_path / "m")


def test_no_checkpoint_at_all(tmp_path):
    assert "holds no Megatron checkpoint" in _refused(tmp_path)
