"""``tools/inspect_checkpoint.py``: what is in a checkpoint, and how two differ."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.runtime.errors import reports_errors
from vqmoe_ds.runtime.files import list_tree


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", metavar="PATH", help="tag, run, portable, Hugging Face, Megatron or native DeepSpeed-MoE folder"
    )
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second checkpoint to compare the first with")
    parser.add_argument("--verify", action="store_true", help="compare every file with the checksum of the manifest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugin_option(parser)
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Print what is there, or what is wrong in one sentence; the exit code."""
    found = inspect(options.path, options.other, options.verify)
    print(json.dumps(found, indent=2) if options.json else _text(found))
    return 0


def inspect(path: str, other: str | None = None, verify: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint.

    Args:
        path: anything ``open_checkpoint`` takes.
        other: a second one, for ``differences``.
        verify: read every file and compare its checksum.

    Raises:
        CheckpointError: it cannot be opened, a file is not what the manifest says, or there is none to verify by.
    """
    from vqmoe_ds.checkpoint.open import open_checkpoint
    from vqmoe_ds.checkpoint.reader import sound

    reader = open_checkpoint(path)
    with sound(reader.path):
        found = _facts(reader, verify)
    if other is not None:
        found["differences"] = compare(reader, open_checkpoint(other))
    return found


def _facts(reader: Any, verify: bool) -> dict[str, Any]:
    from vqmoe_ds.checkpoint.figures import health
    from vqmoe_ds.checkpoint.open import verify_opened

    checked = f"{verify_opened(reader)} files match their checksums" if verify else "not compared (--verify)"
    files = [os.path.getsize(reader.path / name) for name in list_tree(reader.path, hidden=True)[0]]
    return {
        **{"path": str(reader.path), "kind": reader.kind, "step": reader.step, "layout": reader.layout},
        **{"files": len(files), "bytes": sum(files), "manifest": checked},
        "model": _describe(reader),
        "frozen": len(reader.frozen),
        "parameters": _parameters(reader),
        "optimizer": {"step": reader.optimizer_step()} if reader.has_optimizer else None,
        **{"skipped_steps": reader.counters.get("skipped_steps"), "layers": health(reader)},
    }


def _describe(reader: Any) -> str:
    from vqmoe_ds.checkpoint.reader import classes_of, describe_classes

    if "native" in reader.config:
        return "a model with deepspeed.moe.layer.MoE layers"
    return describe_classes(reader) if classes_of(reader) else "a language model"


def _parameters(reader: Any) -> dict[str, int]:
    """``sizes``; of a native model, which does not say how many experts a token visits, what is stored alone."""
    from vqmoe_ds.checkpoint.figures import sizes, stored_numbers
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config

    if "native" in reader.config:
        return {"stored": stored_numbers(reader.shapes)}
    return sizes(reader.shapes, run_config(reader.config, reader.path))


def compare(first: Any, second: Any) -> dict[str, list[Any]]:
    """Dotted name -> [value in the first, value in the second] of everything the two do not share."""
    from vqmoe_ds.config.deepspeed_json import leaves

    sides = [dict(leaves({"step": r.step, "layout": r.layout, "config": r.config})) for r in (first, second)]
    for side, reader in zip(sides, (first, second), strict=True):
        side.update({f"shape.{name}": list(shape) for name, shape in reader.shapes.items()})
    names = [*sides[0], *(name for name in sides[1] if name not in sides[0])]
    return {n: [side.get(n) for side in sides] for n in names if sides[0].get(n) != sides[1].get(n)}


def _text(found: dict[str, Any]) -> str:
    sizes, layout = found["parameters"], found["layout"] or {}
    used = ", {active:,} used by a token, {forward_flops_per_token:,} FLOPs a token forward"
    adam = f"Adam at step {found['optimizer']['step']}" if found["optimizer"] else "no optimizer"
    lines = [
        f"{found['path']}: {found['kind']}, step {found['step']}, {adam}",
        f"  {found['files']} files, {found['bytes']:,} bytes; manifest: {found['manifest']}",
        f"  {found['model']}" + (f", {found['frozen']} tensors frozen" if found["frozen"] else ""),
        "  written with " + (", ".join(f"{name} {value}" for name, value in layout.items()) or "no layout"),
        f"  {sizes['stored']:,} parameters" + (used.format(**sizes) if "active" in sizes else ""),
    ]
    for row in found["layers"]:
        norms = ", ".join(f"{k} {v['min']:.4f}/{v['mean']:.4f}/{v['max']:.4f}" for k, v in row["weight_norms"].items())
        if "codes" in row:
            told = f"{row['code_perplexity']} of {row['codes']} codes in use, {row['dead_codes']} dead"
            if "busiest_expert" in row:
                told += f"; busiest expert {row['busiest_expert']} x mean, {row['idle_experts']} idle"
            lines.append(f"  {row['layer']}: {told}")
        lines.append(f"  {row['layer']}: expert weights, root mean square least/mean/largest: {norms}")
    for name, (here, there) in found.get("differences", {}).items():
        lines.append(f"  differs: {name}: {here} here, {there} there")
    if found.get("differences") == {}:
        lines.append("  the two agree in step, layout, configuration and shapes")
    return "\n".join(lines)
