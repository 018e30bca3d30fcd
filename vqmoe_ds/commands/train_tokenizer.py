"""Train a tokenizer on a sample spread over a whole corpus.

    vqmoe-train-tokenizer my_text/ --output my_text.tokenizer
    vqmoe-train-tokenizer recipe:english-100mb --kind unigram --vocab_size 8192 --output english.tokenizer
    vqmoe-train-tokenizer wiki.train.tokens --kind word --vocab_size 33279 --sample_mb 0 --output w.tokenizer

SOURCE is anything that tools/prepare_data.py takes. unigram and bpe are lossless SentencePiece models; word is for text
that is already split at spaces, as WikiText is. The same sources, options and seed give the same tokenizer.
"""

import sys

from vqmoe_ds.commands import command

main = command("data.tokenizer_training", __doc__)

if __name__ == "__main__":
    sys.exit(main())
