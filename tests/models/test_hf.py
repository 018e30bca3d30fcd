"""The Hugging Face model: the trainer's logits, losses and gradients; cache, padding, generation, number types."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, StaticCache

from tests.huggingface import CASES, LENGTH, VOCAB, ModelReader, config_of, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.huggingface.names import parts_of
from vqmoe_ds.models.hf import VQMoEConfig, VQMoEForCausalLM
from vqmoe_ds.models.transformer import MoETransformer

Pair = tuple[MoETransformer, Any]
STATIC_CACHES_CROP = Version(transformers.__version__) >= Version("5.24")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {case: _pair(case, tmp_path_factory.mktemp("hf") / "model") for case in CASES}


def _pair(case: str, folder: Path, **load: Any) -> Pair:
    model = model_of(config_of(case))
    export_hf(ModelReader(model), folder, ExportOptions(tokenizer="none"))
    return model, AutoModelForCausalLM.from_pretrained(folder, **load)


def _logits(model: MoETransformer, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens_BS)[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_trainer(case: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs[case]
    assert isinstance(theirs, VQMoEForCausalLM) and not theirs.training
    with torch.no_grad():
        logits = theirs(tokens_of()).logits
    assert (logits - _logits(ours, tokens_of())).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_kept_apart_as_by_the_trainer(case: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs[case]
    positions_BS = (torch.arange(LENGTH) % 5).expand(len(tokens_of()), -1)
    with torch.no_grad():
        logits = theirs(tokens_of(), position_ids=positions_BS, use_cache=False).logits
        assert (logits - ours(tokens_of(), positions_BS=positions_BS)[0]).abs().max() < 1e-5
    assert (logits - _logits(ours, tokens_of())).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_trainer(case: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = (copy.deepcopy(model).train() for model in pairs[case])
    tokens_BS = tokens_of(4)
    loss, aux = ours(tokens_BS[:, :-1], tokens_BS[:, 1:])
    (loss + aux).backward()
    output = theirs(tokens_BS, labels=tokens_BS)
    # The trainer's forward does not see the last token, ours does, so the auxiliary loss is compared on its own input.
    alone = theirs(tokens_BS[:, :-1])
    assert torch.allclose(alone.aux_loss, aux, atol=1e-6)
    assert torch.allclose(output.loss - output.aux_loss, loss, atol=1e-5)
    shifted = torch.nn.functional.cross_entropy(alone.logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
    theirs.zero_grad()
    (shifted + alone.aux_loss).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    wanted = dict(ours.named_parameters())
    for part in parts_of(ours.config, "vqmoe"):
        whole = wanted[part.source].grad
        assert whole is not None
        rows = whole if part.rows is None else whole[slice(*part.rows)]
        assert torch.allclose(gradients[part.name], rows, atol=1e-5), part.name
        assert rows.abs().sum() > 0, part.name


@pytest.mark.parametrize("case", CASES)
def test_the_cache_changes_nothing(case: str, pairs: dict[str, Pair]) -> None:
    theirs, tokens_BS = pairs[case][1], tokens_of()
    with torch.no_grad():
        whole = theirs(tokens_BS).logits
        cache, steps = DynamicCache(config=theirs.config), []
        for first, end in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12), (12, LENGTH)]:
            steps.append(theirs(tokens_BS[:, first:end], past_key_values=cache).logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str, pairs: dict[str, Pair]) -> None:
    theirs, tokens_BS, lengths = pairs[case][1], tokens_of(), [LENGTH, 9, 1]
    left, mask = torch.full_like(tokens_BS, 3), torch.zeros_like(tokens_BS)
    for row, length in enumerate(lengths):
        left[row, LENGTH - length :] = tokens_BS[row, :length]
        mask[row, LENGTH - length :] = 1
    more = tokens_of(seed=1)[:, :2]
    with torch.no_grad():
        out = theirs(left, attention_mask=mask, use_cache=True)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
        cached = theirs(more, attention_mask=mask, past_key_values=out.past_key_values).logits
        right = theirs(tokens_BS, attention_mask=torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).logits
        for row, length in enumerate(lengths):
            alone = theirs(torch.cat([tokens_BS[row : row + 1, :length], more[row : row + 1]], dim=1)).logits[0]
            assert (out.logits[row, LENGTH - length :] - alone[:length]).abs().max() < 1e-5, "left"
            assert (cached[row] - alone[length:]).abs().max() < 1e-5, "left, from the cache"
            assert (right[row, :length] - alone[:length]).abs().max() < 1e-5, "right"
    assert out.logits.isfinite().all()


def test_padding_takes_no_part_in_the_auxiliary_loss(pairs: dict[str, Pair]) -> None:
    theirs = copy.deepcopy(pairs["the paper's input"][1]).train()
    tokens_BS, mask = tokens_of(2), torch.ones(2, LENGTH, dtype=torch.long)
    padded = torch.nn.functional.pad(tokens_BS, (4, 0), value=3)
    mask = torch.nn.functional.pad(mask, (4, 0))
    alone, together = theirs(tokens_BS).aux_loss, theirs(padded, attention_mask=mask).aux_loss
    assert torch.allclose(alone, together, atol=1e-6)
    assert not torch.allclose(alone, theirs(padded).aux_loss, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_generates_what_the_trainer_would(case: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs[case]
    prompts = [tokens_of(seed=2)[0, :6], tokens_of(seed=3)[0, :3]]
    want = []
    for prompt in prompts:
        tokens = prompt.tolist()
        for _ in range(9):
            tokens.append(int(_logits(ours, torch.tensor([tokens]))[0, -1].argmax()))
        want.append(tokens[len(prompt) :])
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=0, padding_side="left")
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    keep = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert theirs.generate(padded, **keep)[:, 6:].tolist() == want
    assert theirs.generate(padded, **keep, use_cache=False)[:, 6:].tolist() == want


@pytest.mark.parametrize("case", ["context", "layer state", "hash of tokens"])
def test_sampling_beams_and_speculation_use_the_cache_rightly(case: str, pairs: dict[str, Pair]) -> None:
    theirs, prompt = pairs[case][1], tokens_of(2, 6)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(prompt, **beams), theirs.generate(prompt, **beams, use_cache=False))
    sampled = []
    for cached in (True, False):
        torch.manual_seed(0)
        sampled.append(theirs.generate(prompt, max_new_tokens=9, do_sample=True, pad_token_id=0, use_cache=cached))
    assert torch.equal(*sampled) and sampled[0].shape == (2, 15)
    torch.manual_seed(1)
    several = theirs.generate(prompt, max_new_tokens=9, do_sample=True, pad_token_id=0, num_return_sequences=4)
    assert several.shape == (8, 15) and len(set(map(tuple, several.tolist()))) > 2
    greedy = theirs.generate(prompt[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    for kind in (None, "static")[: 1 + STATIC_CACHES_CROP]:
        guess = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3, "cache_implementation": kind}
        assert torch.equal(theirs.generate(prompt[:1], **guess, pad_token_id=0), greedy)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_the_trainers_bfloat16_with_codes_in_float32(case: str, tmp_path: Path) -> None:
    ours, theirs = _pair(case, tmp_path / "model", dtype=torch.bfloat16)
    for module in (ours, cast := copy.deepcopy(theirs).float().bfloat16()):
        for parameter in module.parameters():  # as DeepSpeed does: parameters alone
            parameter.data = parameter.data.bfloat16()
    if ours.bank is not None:
        assert theirs.model.codebook.codes.dtype is torch.float32
        assert torch.equal(theirs.model.codebook.codes, ours.bank.codes_LKC)
        assert torch.equal(cast.model.codebook.codes, ours.bank.codes_LKC), "casting the model leaves codes alone"
    with torch.no_grad():
        want, got = _logits(ours, tokens_of()), theirs(tokens_of()).logits
    assert got.dtype is torch.bfloat16
    # Products are summed in another order; at a border of two experts rounding may send single tokens elsewhere.
    assert ((got - want).abs().amax(-1) < 0.06).float().mean() > 0.9


@pytest.mark.parametrize("case", ["context", "top-2"])
def test_recomputation_gives_the_same_gradients(case: str, pairs: dict[str, Pair]) -> None:
    gradients = []
    for recompute in (False, True):
        model = copy.deepcopy(pairs[case][1]).train()
        if recompute:
            with torch.no_grad():
                past = model(tokens_of()[:, :3], use_cache=True, past_key_values=DynamicCache()).past_key_values
            model.gradient_checkpointing_enable()
            with pytest.raises(ValueError, match="cannot go on from a cache of earlier tokens"):
                model(tokens_of()[:, 3:], past_key_values=past)
        model(tokens_of(), labels=tokens_of(), past_key_values=DynamicCache(config=model.config)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(gradients[1][name], gradient, atol=1e-7) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("case", CASES)
def test_embeddings_stand_for_tokens_unless_routes_need_the_tokens(case: str, pairs: dict[str, Pair]) -> None:
    theirs = pairs[case][1]
    with torch.no_grad():
        vectors = theirs.get_input_embeddings()(tokens_of())
        if theirs.model.token_table is not None or theirs.config.source_table:
            with pytest.raises(ValueError, match="give input_ids"):
                theirs(inputs_embeds=vectors)
            return
        assert torch.equal(theirs(inputs_embeds=vectors).logits, theirs(tokens_of()).logits)
        cache = DynamicCache(config=theirs.config)
        first = theirs(inputs_embeds=vectors[:, :7], past_key_values=cache).logits
        rest = theirs(tokens_of()[:, 7:], past_key_values=cache).logits
        assert (torch.cat([first, rest], dim=1) - theirs(tokens_of()).logits).abs().max() < 1e-5


def test_a_cache_that_cannot_tell_of_earlier_tokens_is_refused(pairs: dict[str, Pair]) -> None:
    with torch.no_grad():
        cache = pairs["top-2"][1](tokens_of(), use_cache=True).past_key_values
        sliding = DynamicCache(config=MistralConfig(num_hidden_layers=4, sliding_window=4))
        for case in ("context", "hash of n-grams"):
            with pytest.raises(ValueError, match="cache holds nothing of what this model's routes look back at"):
                pairs[case][1](tokens_of()[:, :1], past_key_values=cache)
            with pytest.raises(ValueError, match="use a DynamicCache or a StaticCache"):
                pairs[case][1](tokens_of()[:, :1], past_key_values=sliding)
        for case in ("hash of tokens", "hash of n-grams, one"):
            pairs[case][1](tokens_of()[:, :1], past_key_values=cache)
            pairs[case][1](tokens_of()[:, :1], past_key_values=sliding)


@pytest.mark.parametrize("case", CASES)
def test_static_caches_give_the_same(case: str, pairs: dict[str, Pair]) -> None:
    theirs, prompts = pairs[case][1], tokens_of(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    grown = theirs.generate(prompts, **options)
    assert torch.equal(theirs.generate(prompts, cache_implementation="static", **options), grown)
    with torch.no_grad():
        cache, steps = StaticCache(config=theirs.config, max_cache_len=LENGTH + 3), []
        if STATIC_CACHES_CROP:
            theirs(tokens_of()[:, 2:5], past_key_values=cache)
            cache.crop(-3)
        for first, end in [(0, 5), (5, 6), (6, 11), (11, LENGTH)]:
            steps.append(theirs(tokens_of()[:, first:end], past_key_values=cache).logits)
        assert (torch.cat(steps, dim=1) - theirs(tokens_of()).logits).abs().max() < 1e-5


def test_masks_of_another_shape_are_refused(pairs: dict[str, Pair]) -> None:
    for mask in (torch.ones(3, LENGTH - 1), torch.ones(3, LENGTH, LENGTH)):
        with pytest.raises(ValueError, match=r"it must be \[batch, past \+ new\] = \(3, 16\)"):
            pairs["context"][1](tokens_of(), attention_mask=mask)


def test_accumulated_batches_share_one_mean(pairs: dict[str, Pair]) -> None:
    theirs, tokens_BS = pairs["dense"][1], tokens_of()
    with torch.no_grad():
        whole = theirs(tokens_BS, labels=tokens_BS).loss
        count = tokens_BS[:, 1:].numel()
        parts = [theirs(row, labels=row, num_items_in_batch=count).loss for row in tokens_BS.split(1)]
    assert torch.allclose(sum(parts), whole, atol=1e-6)


def test_a_fresh_model_learns() -> None:
    torch.manual_seed(0)
    config = VQMoEConfig(vocab_size=VOCAB, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, num_experts=4)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(tokens_of(), labels=tokens_of()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_card_tells_of_two_experts_and_of_norms(tmp_path: Path) -> None:
    every, code = "A LayerNorm follows every expert.", "A LayerNorm follows the expert of the code."
    for case, told in (
        ("hash and code", ["a learned 2-way gate mixes them"]),
        ("hash and code, ungated, averaged table", ["all count alike", every]),
        (
            "hash of n-grams, three, normed",
            ["and fixed hashes of the last 2 to 3 tokens; a learned 3-way gate", every],
        ),
        ("hash of tokens, normed", ["gives every token id one expert", every]),
        ("top-2, normed", [every]),
        ("as released", [code]),
    ):
        _pair(case, tmp_path / case)
        card = (tmp_path / case / "README.md").read_text()
        assert all(text in card for text in told), card
        assert sum(norm in card for norm in (every, code)) == len({every, code} & set(told))


def test_the_card_tells_of_groups(tmp_path: Path) -> None:
    for case, told in (("context, two groups", True), ("context, discrete only", False)):
        _pair(case, tmp_path / case)
        assert ("Experts fall into 2 groups" in (tmp_path / case / "README.md").read_text()) == told
