#!/usr/bin/env python
"""Train a small model per router, and compare the routes of each by precision, cache, export and ten steps of lag.

    python benchmarks/routes.py --out runs/routes        # ten minutes on one core; writes routes.md and routes.png

docs/routes.md has its table. Runs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

STEPS, LAG = 100, 10
MODELS: dict[str, dict[str, Any]] = {
    "vq-token": {"moe.top_k": 0, "codebook.source": "token_embedding"},
    "vq-token-frozen": {"moe.top_k": 0, "codebook.source": "token_embedding", "codebook.freeze_step": 60},
    "vq-context": {"moe.top_k": 0},
    "vq-context-frozen": {"moe.top_k": 0, "codebook.freeze_step": 60},
    "vq-state": {"moe.top_k": 0, "codebook.source": "layer_state"},
    "hash": {"moe.router": "hash_token"},
    "top1": {"moe.router": "topk", "moe.top_k": 1},
    "top2": {"moe.router": "topk", "moe.top_k": 2},
    "ac": {"moe.router": "adaptive_clustering", "moe.top_k": 2},
}
EVERY = {
    "moe.output_norm": False,  # stock Mixtral has none
    "train.learning_rate": 0.003,
    "run.sample_tokens": 0,
    "run.eval_every": 0,
    "run.final_eval_windows": 64,
    "run.keep_last": 0,
    "run.save_every": LAG,
    "run.probe_tokens": 0,
}
OLDER = f"{LAG} steps older"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routes"), help="folder of runs and figures")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens whose routes are compared")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {name: compared(name, options.out, options.tokens) for name in MODELS}
    ways = ["bf16", "cached", "hf", "mixtral", OLDER]
    rows = [[name, *(f"{shares[way]:.3%}" if way in shares else "-" for way in ways)] for name, shares in found.items()]
    text = table(["router", *ways], rows)
    (options.out / "routes.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(options.out / "routes.png", found)


def compared(name: str, out: Path, tokens: int) -> dict[str, float]:
    """Shares of (token, layer) pairs that differ from the fp32 forward pass, by way."""
    run_dir, report = out / name, out / f"{name}.json"
    if not (run_dir / "summary.json").exists():
        pairs = [word for field, value in (EVERY | MODELS[name]).items() for word in ("--set", f"{field}={value}")]
        _run("launchers/pretrain.py", "--run_dir", str(run_dir), "--train_steps", str(STEPS), *pairs)
    older = run_dir / "checkpoints" / f"global_step{STEPS - LAG:07d}"
    ways = ["bf16", "cached", *([] if name == "ac" else ["hf"]), *(["mixtral"] if name == "top2" else [])]
    _run("tools/compare_routes.py", str(run_dir), str(older), "--tokens", str(tokens), "--json", str(report),
         "--ways", *ways)  # fmt: skip
    comparisons = json.loads(report.read_text(encoding="utf-8"))["comparisons"]
    return {OLDER if one["way"] == str(older) else one["way"]: one["differing"] for one in comparisons}


def _run(file: str, *words: str) -> None:
    subprocess.run([sys.executable, str(ROOT / file), *words], check=True, stdout=subprocess.DEVNULL)


def draw(path: Path, found: dict[str, dict[str, float]]) -> None:
    """Bars of the two ways that differ, a group per router."""
    from vqmoe_ds.evaluation.plots import pyplot, save

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4))
    places = range(len(found))
    for shift, way in ((-0.2, "bf16"), (0.2, OLDER)):
        heights = [100 * shares[way] for shares in found.values()]
        bars = axes.bar([place + shift for place in places], heights, 0.4, label=way)
        axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=7)
    axes.set_xticks(places, list(found), rotation=20)
    axes.set(ylabel="tokens whose experts differ, %, mean of layers")
    axes.legend(title="against the fp32 forward pass")
    save(figure, path)


if __name__ == "__main__":
    main()
