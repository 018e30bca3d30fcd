"""Completion of commands in bash and zsh, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_ds.commands.completion import command_names

ROOT = Path(__file__).resolve().parents[1]
ASK = """
. "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
"_shtab_${1//-/_}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def _printed(shell: str, file: Path) -> Path:
    command = [sys.executable, ROOT / "tools/completion.py", shell]
    file.write_text(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout, "utf-8")
    return file


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _printed("bash", tmp_path_factory.mktemp("completion") / "bash")


@pytest.mark.parametrize(
    "line, offered",
    [
        ("vqmoe-pretrain --pre", {"--preset", "--precision"}),
        ("vqmoe-pretrain --preset base", {"base", "base-64e"}),
        ("vqmoe-pretrain --set moe.r", {"moe.router="}),
        ("vqmoe-finetune --set finetune.lora_r", {"finetune.lora_rank="}),
        ("vqmoe-convert --to h", {"hf"}),
        ("vqmoe-pretrain --ds_config ds_conf", {"ds_configs"}),
        ("vqmoe-inspect-checkpoint READ", {"README.md"}),
    ],
)
def test_bash_offers_options_choices_fields_and_files(bash: Path, line: str, offered: set[str]) -> None:
    asked = ["bash", "-c", ASK, "bash", str(bash), *line.split()]
    found = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20).stdout
    assert set(found.split()) == offered


def test_every_command_is_completed(bash: Path) -> None:
    script = bash.read_text("utf-8")
    names = {name.replace("_", "-") for name in command_names()} - {"completion"}
    assert {line.split()[-1] for line in script.splitlines() if line.startswith("complete ")} == {
        f"vqmoe-{name}" for name in names
    }


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_one_file_for_all(tmp_path: Path) -> None:
    file = _printed("zsh", tmp_path / "zsh")
    asked = f"autoload -U compinit; compinit -u -d {tmp_path}/dump; . {file}; print $_comps[vqmoe-plan]"
    found = subprocess.run(["zsh", "-fc", asked], check=True, capture_output=True, text=True, timeout=20)
    assert (found.stdout.strip(), found.stderr) == ("_shtab_vqmoe_plan", "")


def test_another_shell_is_refused() -> None:
    command = [sys.executable, ROOT / "tools/completion.py", "fish"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and "invalid choice: 'fish'" in found.stderr
