"""Prepare labelled audio for training: log-mel spectrograms as images, speakers kept apart (docs/audio.md).

    vqmoe-prepare-audio clips/ --output data/words
    vqmoe-prepare-audio clips/ --output data/words-10dB --noise 10
    vqmoe-prepare-audio recordings/ --output data/digits --speaker '^[0-9]_([a-z]+)_' --size 64

clips/ holds CLASS/SPEAKER_ANYTHING.wav, or such folders in train/ and test/. --speaker finds the speaker in the name of
a file. Clips with noise are of the same names, speakers and splits, and the noise of a clip is the same every time.
"""

import sys

from vqmoe_ds.commands import command

main = command("data.prepare_audio", __doc__)

if __name__ == "__main__":
    sys.exit(main())
