"""transformers' own ``ModelTesterMixin`` and ``GenerationTesterMixin`` on a small model.

They are part of its repository, not of its wheel, and are used from there: from a checkout of the version installed
that the environment variable ``TRANSFORMERS_CHECKOUT`` names. With ``TRANSFORMERS_CHECKOUT=fetch`` git brings one into
the user's cache, once; where it cannot, pip brings the source distribution, which holds the first mixin alone, and one
skipped test says so. Without the variable nothing is fetched and everything here is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

import torch
import transformers
from transformers.models.auto import modeling_auto

from vqmoe_ds.models.hf import (
    VQMoEConfig,
    VQMoEForCausalLM,
    VQMoEForSequenceClassification,
    VQMoEModel,
)
from vqmoe_ds.runtime.files import user_cache

PACKAGE = "transformers_own_tests"
REPOSITORY = "https://github.com/huggingface/transformers"
NAME = f"transformers-{transformers.__version__}"


def _folder() -> Path:
    """The folder ``tests`` of transformers; skips the module where it cannot be had."""
    named = os.environ.get("TRANSFORMERS_CHECKOUT")
    if not named:
        pytest.skip("TRANSFORMERS_CHECKOUT names no checkout, nor fetch", allow_module_level=True)
    if named != "fetch":
        return Path(named) / "tests"
    return (_cloned() or _of_sources()) / "tests"


def _cloned() -> Path | None:
    """A checkout of the version installed, from the user's cache or by git; None where there is no way to it."""
    checkout = user_cache() / f"{NAME}.git"
    if not checkout.exists():
        partial = checkout.with_name(f".{checkout.name}.{os.getpid()}")
        options = ["--quiet", "--depth", "1", "--branch", f"v{transformers.__version__}"]
        slow = ["-c", "http.lowSpeedLimit=10000", "-c", "http.lowSpeedTime=20"]  # a network without a way out
        command = ["git", *slow, "clone", *options, REPOSITORY, str(partial)]
        silent = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
        try:
            subprocess.run(command, env=silent, capture_output=True, timeout=600, check=True)
            partial.rename(checkout)
        except (OSError, subprocess.SubprocessError):
            shutil.rmtree(partial, ignore_errors=True)
            return None
    return checkout


def _of_sources() -> Path:
    """The source distribution of the version installed, unpacked in the user's cache; skips the module without it."""
    cache = user_cache()
    source = cache / f"{NAME}.tar.gz"
    if not source.exists():
        options = ["--no-binary", "transformers", "--no-deps", "--no-build-isolation", "--dest", str(cache), "--quiet"]
        command = [sys.executable, "-m", "pip", "download", f"transformers=={transformers.__version__}", *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"pip brought no sources of {NAME} ({last})", allow_module_level=True)
    folder = cache / NAME
    if not folder.exists():
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.name.startswith(f"{NAME}/tests/")]
            archive.extractall(cache, members, filter="data")
    return folder


def _mixins() -> tuple[type, type]:
    """Both mixins; of a source distribution, without the second, an empty class in its place."""
    folder = _folder()
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("transformers' tests need parameterized: pip install parameterized", allow_module_level=True)
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    exports = ("ExportTesterMixin", "ExportGenerateTesterMixin")
    _stand_in(f"{PACKAGE}.exporters.test_export", *exports)
    _stand_in("tests.exporters.test_export", *exports)  # so they are imported too, and ``tests`` is ours here
    if not (folder / "generation").exists():
        _stand_in(f"{PACKAGE}.generation.test_utils", "GenerationTesterMixin")
    common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    return common.ModelTesterMixin, common.GenerationTesterMixin


def _stand_in(name: str, *mixins: str) -> None:
    module, parent = types.ModuleType(name), types.ModuleType(name.rpartition(".")[0])
    for mixin in mixins:
        setattr(module, mixin, type(mixin, (), {}))
    sys.modules[parent.__name__], sys.modules[module.__name__] = parent, module


ModelTesterMixin, GenerationTesterMixin = _mixins()


def test_the_mixin_of_generation_is_among_them() -> None:
    if not vars(GenerationTesterMixin).get("test_greedy_generate"):
        pytest.skip(f"GenerationTesterMixin has not run: git could not clone {REPOSITORY}, and PyPI's sources lack it")


class SmallModel:
    """Sizes and inputs that the mixins ask for."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4
    intermediate_size = 32

    def __init__(self, parent: Any, options: dict[str, Any]) -> None:
        self.parent, self.options = parent, options

    def get_config(self) -> VQMoEConfig:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return VQMoEConfig(
            **{name: getattr(self, name) for name in sizes},
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VQMoEConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


MAPPINGS = {
    "VQMoEModel": modeling_auto.MODEL_MAPPING_NAMES,
    "VQMoEForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "VQMoEForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


class _Suite(ModelTesterMixin, GenerationTesterMixin):  # type: ignore[valid-type]
    options: ClassVar[dict[str, Any]]
    all_model_classes = (VQMoEModel, VQMoEForCausalLM, VQMoEForSequenceClassification)
    all_generative_model_classes = (VQMoEForCausalLM,)
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        self.model_tester = SmallModel(self, self.options)
        for kind, names in MAPPINGS.items():  # by them the suite knows what stock classes are for
            patch = mock.patch.dict(names, {"vqmoe": kind})
            patch.start()
            self.addCleanup(patch.stop)


class TestContext(_Suite, unittest.TestCase):
    """With fewer heads of keys and values, experts that all tokens pass, and groups of experts."""

    options: ClassVar[dict[str, Any]] = {
        "router": "vq",
        "code_source": "context",
        "num_codes": 8,
        "code_groups": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    }


class TestLayerState(_Suite, unittest.TestCase):
    options: ClassVar[dict[str, Any]] = {"router": "vq", "code_source": "layer_state", "num_codes": 8}


class _HashSuite(_Suite):
    def test_inputs_embeds(self) -> None:
        self.skipTest("the table of experts needs ids of tokens: inputs_embeds are refused (tests/models/test_hf.py)")

    test_inputs_embeds_matches_input_ids = test_inputs_embeds


class TestHashAndCode(_HashSuite, unittest.TestCase):
    """With the norm that follows every expert."""

    options: ClassVar[dict[str, Any]] = {
        "router": "hash_and_code",
        "code_source": "context",
        "context_window": 2,
        "num_codes": 8,
        "expert_output_norm": True,
    }


class TestHashNGrams(_HashSuite, unittest.TestCase):
    options: ClassVar[dict[str, Any]] = {"router": "hash_ngrams", "ngrams": 3}
