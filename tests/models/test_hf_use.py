"""What is done with an exported model beside plain forward passes: packing, masks, adapters, offloading, other
vocabularies, damaged tables, the Trainer, graphs. Each does what it does to a stock model, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
    DataCollatorWithFlattening,
)

from tests.huggingface import CASES, LENGTH, VOCAB, ModelReader, config_of, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.models.hf import VQMoEConfig, VQMoEForCausalLM, VQMoEForSequenceClassification

LINEAR = [
    case for case, (moe, *_) in CASES.items() if moe.get("top_k", 1) and moe.get("router", "vq") in ("vq", "topk")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("hf") / "model"
        export_hf(ModelReader(model_of(config_of(case))), folder, ExportOptions(tokenizer="none"))
        found[case] = AutoModelForCausalLM.from_pretrained(folder)
    return found


def _far(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


# ------------------------------------------------------------ documents and masks

DOCUMENTS = (5, 1, 2, 8)


def _packed() -> tuple[list[Tensor], Tensor, Tensor]:
    documents = [tokens_of(1, length, seed=length) for length in DOCUMENTS]
    return documents, torch.cat(documents, dim=1), torch.cat([torch.arange(n) for n in DOCUMENTS]).unsqueeze(0)


def _blocks(window: int | None) -> Tensor:
    """Which token sees which, ``[1, 1, S, S]``."""
    number = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    band = torch.ones(LENGTH, LENGTH).tril().triu(1 - (window or LENGTH)).bool()
    return ((number == number.unsqueeze(1)) & band)[None, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_do_not_see_each_other(case: str, attention: str, models: dict[str, Any]) -> None:
    model = copy.deepcopy(models[case])
    model.set_attn_implementation(attention)
    documents, together, positions = _packed()
    blocks = _blocks(model.config.sliding_window)
    additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~blocks, torch.finfo(torch.float32).min)
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"attention_mask": additive}]
    if attention == "sdpa":  # eager attention adds masks up, as everywhere
        ways.append({"attention_mask": blocks})
    with torch.no_grad():
        alone = torch.cat([model(document).logits for document in documents], dim=1)
        for way in ways:
            assert _far(model(together, position_ids=positions, **way).logits, alone) < 1e-5, way
        assert _far(model(together).logits, alone) > 1e-3, "documents would matter to each other"


@pytest.mark.parametrize("case", ["context", "layer state", "top-2"])
def test_the_flattening_collator_trains_on_documents_alone(case: str, models: dict[str, Any]) -> None:
    model = copy.deepcopy(models[case]).train()
    documents = [document for document in _packed()[0] if document.shape[1] > 1]
    batch = DataCollatorWithFlattening()([{"input_ids": document[0].tolist()} for document in documents])
    output = model(**batch)
    losses = torch.cat(
        [nn.functional.cross_entropy(model(d).logits[0, :-1], d[0, 1:], reduction="none") for d in documents]
    )
    assert torch.allclose(output.loss - output.aux_loss, losses.mean(), atol=1e-5)


@pytest.mark.parametrize("source", ["context", "layer_state"])
def test_flex_attention_is_the_same_function(source: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "num_experts": 4}
    model = VQMoEForCausalLM(VQMoEConfig(vocab_size=VOCAB, code_source=source, **sizes)).eval()
    mask, positions = torch.ones(3, LENGTH, dtype=torch.long), _packed()[2].expand(3, -1)
    mask[0, :4] = 0
    answers = []
    with torch.no_grad():
        for attention in ("sdpa", "flex_attention"):
            model.set_attn_implementation(attention)
            padded = model(tokens_of(), attention_mask=mask).logits[mask.bool()]
            answers.append((padded, model(tokens_of(), position_ids=positions).logits))
    assert all(_far(*pair) < 1e-5 for pair in zip(*answers, strict=True))


@pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("case", CASES)
def test_experts_by_every_implementation_are_the_same_function(case: str, kind: str, models: dict[str, Any]) -> None:
    model, asked = copy.deepcopy(models[case]), VQMoEConfig.from_dict(models[case].config.to_dict())
    assert model.get_experts_implementation() == {"": "eager"}
    asked._experts_implementation = kind
    loaded = VQMoEForCausalLM(asked).eval()
    loaded.load_state_dict(model.state_dict())
    for switched in (loaded, model):
        switched.set_experts_implementation(kind)
        answers, gradients = [], []
        for each in (models[case], switched):
            each.zero_grad()
            logits = each(tokens_of()).logits
            logits.square().mean().backward()
            answers.append(logits.detach())
            gradients.append([weight.grad for weight in each.parameters() if weight.grad is not None])
        assert _far(*answers) < 1e-5
        assert all(_far(*pair) < 1e-5 for pair in zip(*gradients, strict=True))
    models[case].zero_grad()


@pytest.mark.parametrize("kind", ["grouped", "loop"])
def test_experts_by_an_implementation_that_they_lack_are_refused(kind: str, models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["context"])
    with pytest.raises(ValueError, match=f"experts_implementation='{kind}' is none of eager, .*grouped_mm"):
        model.set_experts_implementation(kind)


def test_a_mask_of_pairs_that_hides_padding_is_a_mask_of_tokens(models: dict[str, Any]) -> None:
    for case in ("context", "layer state", "position embedding"):
        kept = torch.tensor([[0] * 4 + [1] * 12])
        positions = (kept.cumsum(1) - 1).clamp_min(0)
        pairs = torch.ones(LENGTH, LENGTH).tril().bool()[None, None] & kept.bool()[:, None, None]
        with torch.no_grad():
            want = models[case](tokens_of(1), attention_mask=kept).logits[:, 4:]
            got = models[case](tokens_of(1), attention_mask=pairs, position_ids=positions).logits[:, 4:]
        assert _far(got, want) < 1e-5


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("case", ["context", "layer state", "sliding window"])
def test_whatever_hides_tokens_from_attention_hides_them_from_codes(
    case: str, low: float, models: dict[str, Any]
) -> None:
    documents, ids, positions = _packed()
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~_blocks(models[case].config.sliding_window), low)
    with torch.no_grad():
        logits = models[case](ids, attention_mask=mask, position_ids=positions).logits
        apart = torch.cat([models[case](document).logits for document in documents], dim=1)
    assert _far(logits, apart) < 1e-5


def test_a_token_that_one_head_sees_is_seen(models: dict[str, Any]) -> None:
    chosen: list[Tensor] = []
    model = copy.deepcopy(models["context, discrete only"])
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    mask = torch.ones(LENGTH, LENGTH).tril().bool().repeat(1, 2, 1, 1)
    mask[:, 0, 5:, :5] = False
    model(tokens_of(1), attention_mask=mask)
    model(tokens_of(1))
    assert torch.equal(*chosen)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.int64).tril(), "holds torch.int64: give bool"),
        (torch.ones(1, 1, LENGTH, LENGTH - 3).tril().bool(), r"has shape \(1, 1, 16, 13\); it must be \[batch, 1, new"),
        (torch.ones(1, 1, LENGTH - 3, LENGTH).tril().bool(), r"has shape \(1, 1, 13, 16\)"),
        (torch.ones(2, 1, LENGTH, LENGTH).tril().bool(), r"has shape \(2, 1, 16, 16\)"),
    ],
)
def test_masks_of_pairs_that_say_nothing_are_refused(mask: Tensor, reason: str, models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=reason):
        models["context"](tokens_of(3), attention_mask=mask)


@pytest.mark.parametrize("case", ["context", "context, projected", "position embedding", "early block", "top-2"])
def test_routes_are_those_of_float32_under_autocast(case: str, models: dict[str, Any]) -> None:
    """In bfloat16 a code or a logit of a router would be another one for every few hundredth token."""
    chosen, tokens = [], tokens_of(64)
    model = copy.deepcopy(models[case])
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, given: chosen.append(given[1][:, -1:]))
    model.model.layers[0].self_attn.register_forward_hook(lambda _, given, output: (torch.zeros_like(given[0]), None))
    model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens)
    assert torch.equal(*chosen)


@pytest.mark.parametrize("case", ["context", "dense"])
def test_static_caches_serve_under_autocast(case: str, models: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = models[case].generate(tokens_of(), **options)
        assert torch.equal(models[case].generate(tokens_of(), cache_implementation="static", **options), want)


@pytest.mark.parametrize("case", ["context", "top-2", "dense"])
def test_outputs_that_are_asked_for_are_there(case: str, models: dict[str, Any]) -> None:
    model = copy.deepcopy(models[case])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        asked = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
        output = model(tokens_of(), **asked)
        assert _far(output.logits, models[case](tokens_of()).logits) < 1e-5, "eager attention is the same function"
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, LENGTH, LENGTH)] * 4
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(3, 2, LENGTH))
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, LENGTH, 24)] * 5
    assert [tuple(t.shape) for t in output.router_logits] == [(3 * LENGTH, 4)] * (0 if case == "dense" else 4)


# ------------------------------------------------------------ weights are used by calling their module


@pytest.mark.parametrize("case", CASES)
def test_offloaded_weights_give_the_same(case: str, models: dict[str, Any], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = copy.deepcopy(models[case])
    with torch.no_grad():
        want = model(tokens_of()).logits
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert _far(model(tokens_of()).logits, want) < 1e-5
        new = model.generate(tokens_of(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            new, models[case].generate(tokens_of(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0)
        )


class Wrapped(nn.Module):
    """As quantised layers are: a module without ``weight``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.inner(*args)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_can_be_wrapped(case: str, models: dict[str, Any]) -> None:
    model, wrapped = copy.deepcopy(models[case]), []
    for name, module in list(model.named_modules()):
        if not list(module.children()) and name:
            wrapped.append(Wrapped(module))
            model.set_submodule(name, wrapped[-1])
    with torch.no_grad():
        assert _far(model(tokens_of()).logits, models[case](tokens_of()).logits) < 1e-5
    assert wrapped and all(module.calls for module in wrapped)


@pytest.mark.parametrize("case", LINEAR)
def test_adapters_on_the_router_learn(case: str, models: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(copy.deepcopy(models[case]), peft.LoraConfig(target_modules=["gate"], r=2)).train()
    model(input_ids=tokens_of(), labels=tokens_of()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == len(models[case].config.moe_blocks)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        adapted = model.eval()(input_ids=tokens_of()).logits
        assert _far(adapted, models[case](tokens_of()).logits) > 1e-4
        assert _far(model.merge_and_unload()(tokens_of()).logits, adapted) < 1e-4


# ------------------------------------------------------------ tables


@pytest.mark.parametrize("width", [24, 32])  # PyTorch's products, and the compiled kernel where there is one
@pytest.mark.parametrize("bad", [4, 1 << 40, -1])
@pytest.mark.parametrize("case", ["context", "layer state", "hash of tokens"])
def test_experts_that_there_are_not_are_refused(case: str, bad: int, width: int) -> None:
    router = "hash_token" if case == "hash of tokens" else "vq"
    source = "layer_state" if case == "layer state" else "context"
    sizes = {"hidden_size": width, "num_attention_heads": 2, "moe_intermediate_size": 32, "num_experts": 4}
    model = VQMoEForCausalLM(VQMoEConfig(vocab_size=VOCAB, router=router, code_source=source, **sizes)).eval()
    table = model.model.token_table if router == "hash_token" else model.model.codebook.code_map
    table[1, :] = bad
    with torch.no_grad(), pytest.raises(IndexError, match=f"expert {bad} was asked for, and experts are 0 to 3"):
        model(tokens_of())


@pytest.mark.parametrize("case", CASES)
def test_a_model_made_without_memory_is_initialised_whole(case: str, models: dict[str, Any]) -> None:
    config = models[case].config
    with torch.device("meta"):
        model = VQMoEForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 40)
    model.init_weights()
    again = dict(VQMoEForCausalLM(config).named_buffers())
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, again[name]), name
    with torch.no_grad():
        assert model.eval()(tokens_of()).logits.isfinite().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 10])
def test_vocabularies_of_another_size(case: str, size: int, models: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(models[case])
    tokens_BS = tokens_of(vocab=VOCAB - 10)
    with torch.no_grad():
        want = model(tokens_BS).logits[..., : VOCAB - 10]
        model.resize_token_embeddings(size)
        assert _far(model(tokens_BS).logits[..., : VOCAB - 10], want) < 1e-5
        grown = torch.randint(0, size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        logits = model(grown).logits
        assert logits.shape == (2, LENGTH, size) and logits.isfinite().all()
        model.save_pretrained(tmp_path / "saved")
        assert _far(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(grown).logits, logits) < 1e-5
        base = AutoModel.from_pretrained(tmp_path / "saved")
        base.resize_token_embeddings(size + 3)
        assert base(grown + 3).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_what_a_folder_lacks_is_drawn_and_the_rest_stays_as_it_was_loaded(
    case: str, models: dict[str, Any], tmp_path: Path
) -> None:
    models[case].save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    missing = {"model.norm.weight", *(name for name in weights if name.endswith("codebook.codes"))}
    save_file({n: t for n, t in weights.items() if n not in missing}, tmp_path / "saved" / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=3)
    loaded, want = model.model.state_dict(), models[case].model.state_dict()
    assert loaded.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(loaded[name], tensor) is (f"model.{name}" not in missing), name
        assert not tensor.is_floating_point() or loaded[name].isfinite().all(), name


def test_a_text_of_nothing_is_said_and_a_row_of_padding_harms_no_other(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a text of no tokens"):
        models["context"](torch.zeros(1, 0, dtype=torch.int64))
    config = copy.deepcopy(models["context"].config)
    config.classifier_pool = "mean"
    tokens, mask = tokens_of(), torch.ones(3, LENGTH)
    mask[1] = 0
    assert VQMoEForSequenceClassification(config).eval()(tokens, attention_mask=mask).logits.isfinite().all()
    model = copy.deepcopy(models["top-2"]).train()  # a micro-batch of padding alone adds nothing to a batch
    loss = model(tokens, attention_mask=0 * mask, labels=torch.full_like(tokens, -100), num_items_in_batch=10).loss
    assert loss.item() == 0.0


# ------------------------------------------------------------ training


@pytest.mark.parametrize("case", ["context", "top-2"])
def test_accumulated_batches_weigh_the_auxiliary_loss_once(case: str, models: dict[str, Any]) -> None:
    model, row = copy.deepcopy(models[case]).train(), tokens_of(1)
    whole = model(row.repeat(8, 1), labels=row.repeat(8, 1), num_items_in_batch=8 * (LENGTH - 1))
    part = model(row.repeat(2, 1), labels=row.repeat(2, 1), num_items_in_batch=torch.tensor(8 * (LENGTH - 1)))
    assert torch.allclose(4 * part.loss, whole.loss, atol=1e-6)
    assert torch.allclose(whole.loss, model(row, labels=row).loss, atol=1e-6)


def test_the_trainer_logs_one_loss_however_batches_are_cut(models: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens_of(1).repeat(8, 1)]  # one row: balance is that of each
    logged = []
    for size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        trainer = Trainer(
            copy.deepcopy(models["top-2"]), TrainingArguments(str(tmp_path), **options, **quiet), train_dataset=rows
        )
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    assert abs(logged[0] - logged[1]) < 2e-4


# ------------------------------------------------------------ graphs


@pytest.mark.parametrize(
    "case",
    [
        "context",
        "layer state, soft output",
        "the paper's input",
        "as released",
        "top-2",
        "hash of tokens",
        "hash and code",
    ],
)
def test_whole_graphs_give_the_same(case: str, models: dict[str, Any]) -> None:
    model, mask = models[case], torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        want = model(tokens_of(), attention_mask=mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert _far(compiled(tokens_of(), attention_mask=mask, use_cache=False).logits, want) < 1e-5
        torch.compiler.reset()
        inputs = {"input_ids": tokens_of(), "attention_mask": mask, "use_cache": False}
        free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
        assert _far(program(**inputs).logits, want) < 1e-5
        inputs = {**inputs, "input_ids": tokens_of(5, 9), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
        assert _far(program(**inputs).logits, model(**inputs).logits) < 1e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["context", "layer state", "top-2"])
def test_a_traced_graph_follows_other_routes_than_those_it_was_traced_with(case: str, models: dict[str, Any]) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models[case]

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens, use_cache=False, return_dict=False)[0]

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), tokens_of(), check_trace=False)
        assert _far(traced(tokens_of(seed=3)), models[case](tokens_of(seed=3)).logits) < 1e-5


@pytest.mark.parametrize("case", ["context", "layer state, soft output"])
def test_steps_from_a_static_cache_are_one_graph(case: str, models: dict[str, Any]) -> None:
    model, prompts = models[case], tokens_of(2, 6)
    options = {"attention_mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4]), "max_new_tokens": 6, "do_sample": False}
    want = model.generate(prompts, **options, pad_token_id=0)
    graph = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    graph._compile_all_devices = True
    counters.clear()
    got = model.generate(prompts, cache_implementation="static", compile_config=graph, **options, pad_token_id=0)
    assert torch.equal(got, want) and counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
