"""Train a tokenizer on a sample spread over a whole corpus.

    vqmoe-train-tokenizer my_text/ --output my_text.tokenizer
    vqmoe-train-tokenizer recipe:english-100mb --kind unigram --vocab_size 8192 --output english.tokenizer
    vqmoe-train-tokenizer wiki.train.tokens --kind word --vocab_size 33279 --sample_mb 0 --output w.tokenizer

SOURCE is anything that tools/prepare_data.py takes. unigram and bpe are lossless SentencePiece models; word is for text
that is already split at spaces, as WikiText is. The same sources, options and seed give the same tokenizer.
"""

import argparse
import sys

from vqmoe_ds.commands import importing, usage
from vqmoe_ds.runtime.terminal import run_tool


def build_parser() -> argparse.ArgumentParser:
    from vqmoe_ds.data.tokenizer_training import KINDS

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=form)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, recipe:NAME or hub:NAME")
    add("--output", required=True, metavar="FOLDER.tokenizer", help="folder to write")
    add("--kind", choices=KINDS, default="unigram", help="default unigram")
    add("--vocab_size", type=int, default=8192, help="ids, the end of a document included (default 8192)")
    add("--sample_mb", type=float, default=50, help="MB of text to train on (default 50; 0 for all)")
    add("--seed", type=int, default=0, help="of the draw of the sample (default 0)")
    add("--text_key", default="text", help="key or column that holds the text (default text)")
    add("--on_error", choices=("fail", "skip"), default="fail", help="what to do with unreadable text (default fail)")
    add("--cache_dir", metavar="FOLDER", help="where recipes and data sets of the hub are kept")
    return parser


def main() -> int:
    """Run the command that was given; the exit code."""
    with importing():
        import vqmoe_ds.data.tokenizer_training  # noqa: F401

    return run_tool(_train)


def _train() -> int:
    from vqmoe_ds.data.documents import SourceOptions
    from vqmoe_ds.data.tokenizer_training import check_output, train_tokenizer

    args = build_parser().parse_args()
    options = SourceOptions(text_key=args.text_key, on_error=args.on_error, cache_dir=args.cache_dir)
    folder = check_output(args.output)
    trained = train_tokenizer(args.sources, args.kind, args.vocab_size, args.sample_mb, args.seed, options)
    trained.tokenizer.save(folder)
    print(f"{folder}: {trained.report()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
