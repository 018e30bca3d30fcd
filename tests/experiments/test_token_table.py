"""Token tables: balanced, deterministic, read back, trained with, and equal to the codes they were taken from."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.huggingface import ModelReader
from tests.prepared import write_texts
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.commands import usage
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.evaluation.passes import Passes
from vqmoe_ds.evaluation.probe import visit_layers
from vqmoe_ds.experiments import token_table
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import token_tables
from vqmoe_ds.moe.routers.token_table import NAME, read_table
from vqmoe_ds.runtime import memory
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.runtime.files import new_folder

VOCAB, EXPERTS, LAYERS = 600, 8, 3


def _counts(most: int = 2000) -> np.ndarray:
    """Zipf's law, and a tail that never occurs."""
    counts_V = (most / np.arange(3, VOCAB + 3)).astype(np.int64)
    counts_V[-50:] = 0
    return np.random.default_rng(1).permutation(counts_V)


def _embeddings(counts_V: np.ndarray) -> torch.Tensor:
    """Twelve groups of tokens that are alike."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(12, 16, generator=generator)
    return centres[torch.arange(len(counts_V)) % 12] + 0.1 * torch.randn(len(counts_V), 16, generator=generator)


def _table(method: str, counts_V: np.ndarray, seed: int = 0) -> torch.Tensor:
    if method == "embedding":
        return token_tables.embedding_table(_embeddings(counts_V), counts_V, EXPERTS, LAYERS, seed)
    if method == "routes":
        shares_LVN = torch.rand(LAYERS, VOCAB, EXPERTS, generator=torch.Generator().manual_seed(seed)).double()
        return token_tables.routes_table(shares_LVN * torch.from_numpy(counts_V > 0).view(1, -1, 1), counts_V, seed)
    return token_tables.random_table(counts_V, EXPERTS, LAYERS, seed)


@pytest.mark.parametrize("method", ["embedding", "random", "routes"])
def test_tables_are_balanced_deterministic_and_differ_between_layers_and_seeds(method: str) -> None:
    counts_V = _counts()
    table_LV = _table(method, counts_V)
    assert table_LV.shape == (LAYERS, VOCAB) and table_LV.min() >= 0 and table_LV.max() < EXPERTS
    assert counts_V.max() / counts_V.sum() * EXPERTS < 1.1
    assert max(token_tables.busiest(table_LV, counts_V, EXPERTS)) <= 1.1
    assert torch.equal(table_LV, _table(method, counts_V))
    assert not torch.equal(table_LV[0], table_LV[1])
    assert not torch.equal(table_LV, _table(method, counts_V, seed=1))


@pytest.mark.parametrize("method", ["embedding", "random", "routes"])
def test_a_token_that_is_more_than_a_share_has_an_expert_almost_to_itself(method: str) -> None:
    counts_V = _counts()
    counts_V[7] = counts_V.sum()
    table_LV, frequent = _table(method, counts_V), counts_V[7] / counts_V.sum() * EXPERTS
    assert max(token_tables.busiest(table_LV, counts_V, EXPERTS)) == pytest.approx(frequent, rel=0.01)
    counts_V[7] = 0
    loads_N = torch.bincount(table_LV[0], torch.from_numpy(counts_V).double(), EXPERTS)
    assert loads_N.max() <= 1.1 * loads_N.sum() / (EXPERTS - 1), "the others share the rest evenly"


def test_like_tokens_meet_in_one_expert() -> None:
    """Of two tokens of a group more share an expert than of two at random."""
    counts_V = _counts()
    group_V = torch.arange(VOCAB) % 12
    alike = group_V.unsqueeze(0) == group_V.unsqueeze(1)
    shares = {}
    for method in ("embedding", "random"):
        table_V = _table(method, counts_V)[0]
        together = table_V.unsqueeze(0) == table_V.unsqueeze(1)
        shares[method] = float(together[alike].float().mean())
    assert shares["embedding"] > 2 * shares["random"]


def test_round_robin_follows_the_rank() -> None:
    counts_V = np.array([5, 9, 1, 7])
    assert token_tables.round_robin_table(counts_V, 3, 2).tolist() == [[2, 0, 0, 1], [0, 1, 1, 2]]


def test_tokens_go_where_another_model_sent_them_as_far_as_experts_have_room() -> None:
    counts_V, shares_LVN = np.full(VOCAB, 10), torch.zeros(1, VOCAB, EXPERTS, dtype=torch.float64)
    wanted_V = torch.arange(VOCAB) % EXPERTS
    shares_LVN[0, torch.arange(VOCAB), wanted_V] = 0.6
    shares_LVN[0, :, 3] += 0.3
    assert torch.equal(token_tables.routes_table(shares_LVN, counts_V, 0)[0], wanted_V)
    shares_LVN[0, :, 3] += 0.6  # all want one expert; the first of them find room there
    table_V = token_tables.routes_table(shares_LVN, counts_V, 0)[0]
    assert (table_V[:70] == 3).all() and (table_V[100:] == wanted_V[100:]).float().mean() > 0.8
    assert max(token_tables.busiest(table_V.unsqueeze(0), counts_V, EXPERTS)) <= 1.06


def _config(router: dict[str, Any], path: Path | None = None, **options: Any) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 16, "heads": 2, "sequence_length": 12}
    options |= {} if path is None else {"path": str(path)}
    return RunConfig(model=model, moe={"num_experts": EXPERTS, "expert_hidden": 8, **router}, router=options,
                     codebook={"source": "token_embedding", "num_codes": 24})  # fmt: skip


def test_the_table_of_a_run_with_codes_gives_its_routes_to_the_bit(tmp_path: Path) -> None:
    codes = MoETransformer(_config({"router": "vq", "top_k": 0})).eval()
    codes.bank.code_map_LK.copy_(torch.randint(0, EXPERTS, codes.bank.code_map_LK.shape))
    token_table.write(tmp_path / "t.safetensors", token_table.table_of_codes(codes), "table", "")
    table = MoETransformer(_config({"router": "token_table"}, tmp_path / "t.safetensors")).eval()
    tokens_BS = torch.randint(0, VOCAB, (5, 12))
    for a, b in zip(visit_layers(codes, tokens_BS), visit_layers(table, tokens_BS), strict=True):
        assert torch.equal(a.routing.expert_ids_TR, b.routing.expert_ids_TR)
    with pytest.raises(CheckpointError, match="codebook.source=context"):
        token_table.table_of_codes(MoETransformer(_config({"router": "vq"}).model_copy(
            update={"codebook": RunConfig().codebook})))  # fmt: skip


@pytest.mark.parametrize("router", ["hash_token", "topk"])
def test_shares_are_the_weights_that_experts_had_for_a_token(router: str) -> None:
    model = MoETransformer(_config({"router": router, "top_k": 1 if router == "hash_token" else 2})).eval()
    tokens_BS = torch.randint(0, VOCAB - 100, (20, 12), generator=torch.Generator().manual_seed(0))
    shares_LVN = token_table.shares_of_routes(model, tokens_BS, Passes(io.StringIO()))
    seen_V = torch.bincount(tokens_BS.flatten(), minlength=VOCAB) > 0
    assert torch.allclose(shares_LVN.sum(dim=-1), seen_V.double().expand(LAYERS, -1))
    if router == "hash_token":
        assert torch.equal(shares_LVN.argmax(dim=-1)[:, seen_V], model.token_table_LV[:, seen_V])
        return
    # One that was seen once: its own two weights. The layer's routing sums to 1 for every token.
    (once, *_) = (torch.bincount(tokens_BS.flatten(), minlength=VOCAB) == 1).nonzero().flatten().tolist()
    place = int((tokens_BS.flatten() == once).nonzero())
    for visit in visit_layers(model, tokens_BS[place // 12 : place // 12 + 1]):
        ids, weights = visit.routing.expert_ids_TR[place % 12], visit.routing.weights_TR[place % 12].double()
        assert torch.allclose(shares_LVN[visit.index, once, ids], weights, atol=1e-6)


def test_the_command_counts_writes_both_forms_and_says_how_balanced(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    words = ["--method", "random", "--tokenizer", "bytes", "--experts", "4", "--layers", "2"]
    words += ["--data", str(tmp_path / "text.txt")]
    for form in ("table", "gate"):
        out = tmp_path / f"{form}.safetensors"
        parser = token_table.build_parser(usage(""))
        assert token_table.main(parser.parse_args([*words, "--form", form, "--out", str(out)])) == 0
    assert "busiest expert by layer, times the mean of 2,250 tokens" in capsys.readouterr().out
    table_LV = read_table(tmp_path / "table.safetensors", 2, 257, 4)
    gates = load_file(tmp_path / "gate.safetensors")
    assert sorted(gates) == [f"model.layers.{layer}.mlp.gate.tid2eid" for layer in (0, 1)]
    for layer, gate_V1 in enumerate(gates.values()):
        assert gate_V1.dtype == torch.int64 and torch.equal(gate_V1[:, 0], table_LV[layer])


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (None, "does not exist"),
        (b"no header", "cannot be read as a token table"),
        (torch.zeros(2, VOCAB, dtype=torch.int32), f"is [2, {VOCAB}], and the model has 3 MoE layer(s)"),
        (torch.zeros(LAYERS, VOCAB), "holds torch.float32, not whole numbers"),
        (torch.zeros(LAYERS, VOCAB, dtype=torch.bool), "holds torch.bool, not whole numbers"),
        ("mkfifo", "cannot be read as a token table: it is a FIFO, not a regular file"),
        ("mkdir", "cannot be read as a token table: it is a folder, not a regular file"),
        (torch.full((LAYERS, VOCAB), 8), "names expert 8, and moe.num_experts=8"),
        (torch.full((VOCAB,), -1), "names expert -1"),
    ],
)
def test_a_table_that_cannot_be_is_refused_in_a_sentence(tensor: Any, part: str, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    if isinstance(tensor, bytes):
        file.write_bytes(tensor)
    elif isinstance(tensor, str):
        subprocess.run([tensor, file], check=True)
    elif tensor is not None:
        save_file({NAME: tensor}, file)
    with pytest.raises(ConfigError) as refusal:
        config = _config({"router": "token_table"}, file)
        config.moe.facts.check_start(config, LAYERS)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_one_table_serves_all_layers_whatever_lies_past_the_vocabulary(tmp_path: Path, dtype: torch.dtype) -> None:
    table_V = torch.arange(VOCAB + 2) % EXPERTS
    table_V[VOCAB:] = 200
    save_file({NAME: table_V.to(dtype)}, tmp_path / "t.safetensors")
    model = MoETransformer(_config({"router": "token_table"}, tmp_path / "t.safetensors"))
    assert model.token_table_LV.shape == (LAYERS, VOCAB)
    assert torch.equal(model.token_table_LV[2], torch.arange(VOCAB) % EXPERTS)
    unread = MoETransformer(_config({"router": "token_table"}))
    unread.load_state_dict(model.state_dict())
    assert torch.equal(unread.token_table_LV, model.token_table_LV), "a checkpoint brings its table"


# ------------------------------------------------------------------ the command: what it is given


def _made(capsys: Any, *words: Any) -> tuple[int, str, str]:
    code = token_table.main(token_table.build_parser(usage("")).parse_args([str(word) for word in words]))
    return code, *capsys.readouterr()


def _refused(capsys: Any, *words: Any) -> str:
    code, _, said = _made(capsys, *words)
    assert code == 2 and said.count("\n") == 1 and "damaged" not in said
    return said


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seed", "-1"], "--seed -1 must lie between 0 and 4,294,967,295"),
        (["--seed", str(1 << 70)], f"--seed {1 << 70} must lie between 0 and"),
        (["--vocab_size", "-3"], "--vocab_size -3 must lie between 1 and"),
        (["--vocab_size", str(1 << 40)], "must lie between 1 and 4,194,304"),
        (["--experts", "0"], "--experts 0 must lie between 1 and 16,384"),
        (["--layers", "100000000"], "--layers 100000000 must lie between 1 and 1,024"),
        (["--experts", "300"], "--experts 300 are more than the 257 token ids; give at most one for each"),
        (["--data", "empty.txt"], "empty.txt holds no tokens, by which a table is balanced"),
        (["--data", "n" * 300], "does not exist"),
        (["--form", "gate", "--names", "a"], "must have {} once, for the number of the layer"),
        (["--form", "gate", "--names", "a{}{}"], "must have {} once"),
        (["--form", "gate", "--names", "a{}{x}"], "no other braces"),
        (["--form", "gate", "--names", "a{}{"], "no other braces"),
        (["--out", "text.txt/t.safetensors"], "lies in no folder that exists"),
        (["--out", "nothing/t.safetensors"], "lies in no folder that exists"),
        (["--out", f"{'n' * 230}.safetensors"], "has too long a name"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(words: list[str], part: str, text: Path, capsys: Any, monkeypatch):
    monkeypatch.chdir(text.parent)
    Path("empty.txt").touch()
    given = ["--method", "random", "--tokenizer", "bytes", "--experts", "4", "--layers", "2", "--data", text]
    assert part in _refused(capsys, *given, "--out", "t.safetensors", *words)
    assert not Path("t.safetensors").exists()


def test_a_disk_without_room_is_one_sentence(text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_table, "write_safetensors", full)
    given = ["--method", "random", "--tokenizer", "bytes", "--experts", "4", "--layers", "2", "--data", text]
    assert "could not be written (No space left" in _refused(capsys, *given, "--out", text.parent / "t.safetensors")


def test_a_corpus_in_the_ids_of_another_tokenizer_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Also where both vocabularies are as large, so that every id is in range."""
    tokenizers = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, words in zip(tokenizers, ("ab cab dab", "dab cab ab"), strict=True):
        file.write_text("\n".join(["[UNK]", "[SEP]", "[CLS]", "[PAD]", *words.split()]) + "\n")
    prefix = write_texts(tmp_path / "corpus", ["ab cab ab dab"] * 9, str(tokenizers[0]))
    given = ["--method", "random", "--experts", "2", "--layers", "2", "--out", tmp_path / "t.safetensors"]
    for data in (prefix, f"{prefix}.idx"):
        assert _made(capsys, *given, "--tokenizer", tokenizers[0], "--data", data)[0] == 0
    said = _refused(capsys, *given, "--tokenizer", tokenizers[1], "--data", prefix)
    assert "in the ids of another tokenizer than that of --tokenizer" in said


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "gpt_neox.embed_in.weight", "wte.weight"])
def test_embeddings_of_any_hugging_face_folder(tmp_path: Path, name: str) -> None:
    """Not the largest tensor, nor another embedding: the one whose name ends as those of tokens do."""
    embeddings_VD = torch.randn(30, 4).bfloat16()
    weights = {name: embeddings_VD, "vision.pos_embed.weight": torch.randn(90, 4), "lm_head.weight": torch.randn(30, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(token_table.read_embeddings(str(tmp_path)), embeddings_VD.float())
    save_file({name: embeddings_VD.char()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="as whole numbers, as quantised weights are"):
        token_table.read_embeddings(str(tmp_path))
    save_file({"vision.pos_embed.weight": torch.randn(90, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has none of embed_tokens.weight, wte.weight, .* so its embeddings"):
        token_table.read_embeddings(str(tmp_path))


def _saved(folder: Path, broken: bool = False) -> Path:
    """A model whose vocabulary is larger than that of its tokenizer."""
    config = RunConfig(
        model={"vocab_size": 320, "layers": 2, "width": 16, "heads": 2, "sequence_length": 12},
        data={"tokenizer_sha256": ByteTokenizer().checksum},
        codebook={"source": "token_embedding", "num_codes": 8},
        moe={"num_experts": 4, "expert_hidden": 8, "top_k": 0},
    )
    model = MoETransformer(config).requires_grad_(False)
    if broken:
        model.embed.weight[5, 3] = torch.nan
    with new_folder(folder, False) as into:
        write_portable(ModelReader(model), into)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _saved(tmp_path / "model")


@pytest.mark.parametrize("method", ["random", "round_robin", "embedding"])
def test_a_table_is_as_long_as_the_vocabulary_of_its_model(model: Path, text: Path, capsys: Any, method: str) -> None:
    words = [model, "--method", method, "--experts", "4", "--layers", "2", "--data", text, "--tokenizer", "bytes"]
    code, printed, said = _made(capsys, *words, "--out", text.parent / "t.safetensors")
    assert code == 0 and "2 layer(s), 320 token ids" in printed, said


def test_the_routes_of_a_model_become_a_table(model: Path, text: Path, capsys: Any) -> None:
    out = text.parent / "t.safetensors"
    given = ["--method", "routes", "--data", text, "--tokenizer", "bytes", "--out", out]
    code, printed, said = _made(capsys, model, *given, "--tokens", "500")
    assert code == 0, said
    assert "504 tokens read, 28 of 320 ids among them; the others have experts at random" in printed
    assert read_table(out, 2, 320, 4).shape == (2, 320)
    out.unlink()
    assert "--method routes needs MODEL" in _refused(capsys, *given)
    assert "are those of MODEL with --method routes" in _refused(capsys, model, *given, "--experts", "4")
    assert "--tokens 0 must lie between 1 and" in _refused(capsys, model, *given, "--tokens", "0")
    assert "give fewer --tokens" in _refused(capsys, model, *given, "--tokens", str(1 << 40))
    assert "balances by frequency; name a corpus" in _refused(capsys, model, *given[:2], *given[4:])
    assert not out.exists()


def test_a_hugging_face_folder_knows_its_tokenizer(model: Path, text: Path, capsys: Any) -> None:
    """Also one that this project exported, by what it says of the training."""
    export_hf(open_checkpoint(model), text.parent / "hf", ExportOptions(tokenizer="none"))
    (text.parent / "words.txt").write_text("\n".join(["[UNK]", "[SEP]", "[CLS]", "[PAD]", "the", "fox"]) + "\n")
    other = write_texts(text.parent / "corpus", ["the fox"] * 9, str(text.parent / "words.txt"))
    given = ["--experts", "4", "--layers", "2", "--out", text.parent / "t.safetensors"]
    for folder in (model, text.parent / "hf"):
        assert _made(capsys, folder, *given, "--data", text, "--tokenizer", "bytes")[0] == 0
        assert "in the ids of another tokenizer" in _refused(capsys, folder, *given, "--data", other)
        words = ["--data", text, "--tokenizer", text.parent / "words.txt"]
        assert "in the ids of another tokenizer" in _refused(capsys, folder, *given, *words)


def test_embeddings_that_are_no_numbers_are_refused(text: Path, capsys: Any) -> None:
    model = _saved(text.parent / "broken", broken=True)
    words = ["--data", text, "--tokenizer", "bytes", "--out", text.parent / "t.safetensors"]
    said = _refused(capsys, model, "--experts", "4", "--layers", "2", *words)
    assert "embed.weight is no matrix of finite numbers" in said
    assert "embeddings are no finite numbers" in _refused(capsys, model, "--method", "codes", *words)


@pytest.mark.parametrize("router, option", [("hash_ngrams", "ngrams"), ("hash_context", "window")])
def test_a_hash_of_the_token_alone_is_one(router: str, option: str) -> None:
    table_LV = token_table.table_of_codes(MoETransformer(_config({"router": router}, **{option: 1})))
    assert torch.equal(table_LV, MoETransformer(_config({"router": "hash_token"})).token_table_LV)


def test_two_experts_of_a_token_are_no_table() -> None:
    with pytest.raises(CheckpointError, match="moe.router=hash_and_code has 2 that are known ahead"):
        token_table.table_of_codes(MoETransformer(_config({"router": "hash_and_code"})))


def test_a_table_that_memory_cannot_hold_is_refused(text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 8 * 257 * 4 - 1)
    given = ["--tokenizer", "bytes", "--experts", "4", "--layers", "2", "--data", text]
    out = ["--out", text.parent / "t.safetensors"]
    assert "take --method round_robin" in _refused(capsys, "--method", "random", *given, *out)
    assert _made(capsys, "--method", "round_robin", *given, *out)[0] == 0


def test_weights_of_the_model_are_not_written_over(model: Path, text: Path, capsys: Any) -> None:
    (weights,) = model.glob("model*.safetensors")
    before = weights.read_bytes()
    given = ["--experts", "4", "--layers", "2", "--data", text, "--tokenizer", "bytes", "--out", weights]
    assert "which would be written over; name another file" in _refused(capsys, model, *given)
    assert weights.read_bytes() == before


# ------------------------------------------------------------------ gates


def test_a_gate_of_deepseek_v4_routes_by_its_table(tmp_path: Path) -> None:
    """transformers' own class loads a layer's tensor as it is written, and chooses the experts that it names."""
    models = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = models.DeepseekV4Config(
        vocab_size=VOCAB, hidden_size=8, num_experts_per_tok=1, n_routed_experts=EXPERTS, num_local_experts=EXPERTS
    )
    table_LV = _table("random", _counts())
    token_table.write(tmp_path / "g.safetensors", table_LV, "gate", token_table.GATE)
    gates = load_file(tmp_path / "g.safetensors")
    tokens_BS = torch.randint(0, VOCAB, (2, 12))
    for layer, table_V in enumerate(table_LV):
        router = models.DeepseekV4HashRouter(config)
        torch.nn.init.normal_(router.weight)
        router.load_state_dict({"weight": router.weight, "tid2eid": gates[token_table.GATE.format(layer)]})
        indices_T1 = router(torch.randn(2, 12, 8), tokens_BS)[2]
        assert torch.equal(indices_T1.squeeze(1), table_V[tokens_BS.flatten()])


def test_gates_are_numbered_by_block_and_a_learned_router_beside_codes_is_told(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config({"router": "vq", "top_k": 1})
    shape = config.model.model_copy(update={"layers": 4, "moe_every": 2})
    model = MoETransformer(config.model_copy(update={"model": shape})).eval()

    class Loaded:
        def __init__(self, *_given: Any) -> None:
            self.model = model

    monkeypatch.setattr(token_table, "load_model", Loaded)
    words = ["a-run", "--method", "codes", "--form", "gate", "--out", tmp_path / "g.safetensors"]
    code, printed, _ = _made(capsys, *words)
    assert code == 0 and "a-run also has a learned router (moe.top_k=1), whose experts no table holds" in printed
    gates = load_file(tmp_path / "g.safetensors")
    assert sorted(gates) == ["model.layers.1.mlp.gate.tid2eid", "model.layers.3.mlp.gate.tid2eid"]
    table_LV = token_table.table_of_codes(model)
    assert torch.equal(torch.stack([gates[name][:, 0] for name in sorted(gates)]), table_LV)
