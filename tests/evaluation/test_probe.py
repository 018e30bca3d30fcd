"""What is seen of a layer is what the layer did, for every router."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.routed_models import CASES, EXPERTS, LENGTH, model_of, tokens_of
from tests.huggingface import ModelReader
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.data.tokenizers import ByteTokenizer, WordTokenizer
from vqmoe_ds.evaluation.collapse import run_expert
from vqmoe_ds.evaluation.probe import load_routed, read_probe, rows_of, visit_layers
from vqmoe_ds.runtime.errors import CheckpointError, DataError
from vqmoe_ds.runtime.files import new_folder


@pytest.mark.parametrize("case", CASES)
def test_rows_and_states_make_up_the_layers_output(case):
    model, tokens_BS = model_of(case), tokens_of()
    logits = model(tokens_BS)[0]
    visits = visit_layers(model, tokens_BS)
    assert torch.equal(model(tokens_BS)[0], logits) and len(visits) == 3
    for visit in visits:
        rows, offset_TD = rows_of(visit.routing), visit.routing.discrete_offset_TD
        y_TD = torch.zeros_like(visit.y_TD)
        for token, slot, expert, weight in zip(*(t.tolist() for t in vars(rows).values()), strict=True):
            q_1D = visit.x_TD[token : token + 1]
            if offset_TD is not None and slot == rows.slots_M.max():
                q_1D = q_1D + offset_TD[token : token + 1]
            y_TD[token] += weight * run_expert(visit.layer.experts, expert, q_1D)[0]
        assert torch.allclose(y_TD, visit.y_TD, atol=1e-4)
        counts_TN = rows.counts_TN(len(y_TD), EXPERTS)
        assert int(counts_TN.sum()) == len(rows.tokens_M)
        main_T = rows.main_expert_T(len(y_TD), EXPERTS)
        assert torch.equal(main_T == -1, counts_TN.sum(dim=1) == 0)
        sent_T = main_T.clamp_min(0)
        assert counts_TN.gather(1, sent_T.unsqueeze(1))[main_T >= 0].gt(0).all()


def test_rows_of_slots_are_the_experts_that_weigh_most():
    model, tokens_BS = model_of("softmoe"), tokens_of()
    for visit in visit_layers(model, tokens_BS):
        rows, weights_TC = rows_of(visit.routing), visit.routing.slots.weights_BSC.flatten(0, 1)
        assert rows.tokens_M.tolist() == list(range(tokens_BS.numel())) and not rows.slots_M.any()
        assert torch.equal(rows.weights_M, weights_TC.amax(dim=1))
        assert torch.equal(rows.experts_M, weights_TC.argmax(dim=1) // visit.layer.router.slots)
        assert torch.equal(rows.experts_M, rows.main_expert_T(tokens_BS.numel(), EXPERTS))
        assert len(rows.experts_M.unique()) > 1


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("vq")])
def test_codes_are_those_whose_experts_were_called(case):
    model = model_of(case)
    for visit in visit_layers(model, tokens_of()):
        rows = rows_of(visit.routing)
        experts_T = rows.experts_M[rows.slots_M == rows.slots_M.max()]
        assert torch.equal(model.bank.code_map_LK[visit.index][visit.codes_T], experts_T)
    assert "observe" not in vars(model.bank)
    assert visit_layers(model_of("topk"), tokens_of())[0].codes_T is None


def test_the_stream_goes_from_layer_to_layer():
    model = model_of("topk")
    first, second, _ = visit_layers(model, tokens_of())
    after_BSD = (first.stream_TD + first.y_TD).view(2, LENGTH, -1)
    attention_BSD = model.blocks[1].attention(model.blocks[1].attention_norm(after_BSD))
    assert torch.allclose(after_BSD + attention_BSD, second.stream_TD.view_as(after_BSD), atol=1e-5)


# ---------------------------------------------------------------- what is read


def _loaded(tokenizer) -> LoadedModel:
    model = model_of("topk", vocab=max(257, tokenizer.vocab_size if tokenizer else 0))
    return LoadedModel(model.config, model, tokenizer, 7, "somewhere", "memory")


def test_raw_text_is_spread_over_the_file_and_cut_by_the_tokenizer(tmp_path):
    (tmp_path / "text").write_text("ab cd\n" * 2000)
    found = read_probe(_loaded(ByteTokenizer()), str(tmp_path / "text"), 160)
    assert found.shape == (10, LENGTH) and found.dtype == torch.int64
    assert bytes(found[0].tolist()) == ("ab cd\n" * 4)[:LENGTH].encode()
    words = WordTokenizer(["ab", "cd"])
    found = read_probe(_loaded(words), str(tmp_path / "text"), 160)
    assert found.shape == (10, LENGTH) and words.decode(found[0].tolist()).startswith(" ab cd \n")
    assert read_probe(_loaded(ByteTokenizer()), str(tmp_path / "text"), 10**6).shape == (12000 // LENGTH - 1, LENGTH)


def test_text_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "short").write_text("a b")
    with pytest.raises(DataError, match="too few for one window"):
        read_probe(_loaded(ByteTokenizer()), str(tmp_path / "short"), 100)
    with pytest.raises(DataError, match="no stretch of 16 tokens"):
        read_probe(_loaded(WordTokenizer(["a"])), str(tmp_path / "short"), 100)
    with pytest.raises(DataError, match="does not exist"):
        read_probe(_loaded(ByteTokenizer()), str(tmp_path / "nothing"), 100)
    (tmp_path / "text").write_text("ab cd\n" * 2000)
    with pytest.raises(CheckpointError, match="name it with --tokenizer"):
        read_probe(_loaded(None), str(tmp_path / "text"), 100)
    with pytest.raises(DataError, match="somewhere does not say what it was trained on; name a text with --data"):
        read_probe(_loaded(WordTokenizer(["a"])), None, 100)


def test_prepared_data_is_read_whole_and_only_with_its_own_tokenizer(tmp_path):
    from tests.prepared import write_texts

    prefix = write_texts(tmp_path / "corpus", ["some text of a document"] * 40)
    found = read_probe(_loaded(ByteTokenizer()), prefix, 64)
    assert found.shape == (4, LENGTH) and b"some text" in bytes(found.clamp_max(255).flatten().tolist())
    with pytest.raises(DataError, match="was made by the tokenizer .*; prepare it with the model's"):
        read_probe(_loaded(WordTokenizer(["a"])), prefix, 64)


def test_a_dense_model_has_nothing_to_look_into(tmp_path):
    from tests.huggingface import config_of
    from tests.huggingface import model_of as hf_model_of

    with new_folder(tmp_path / "dense", False) as folder:
        write_portable(ModelReader(hf_model_of(config_of("dense"))), folder)
    with pytest.raises(CheckpointError, match="is a dense model"):
        load_routed(str(tmp_path / "dense"))
