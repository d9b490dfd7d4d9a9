"""A process that encodes rows beside others: ``python -m luthier.data.worker JOB``; see :mod:`luthier.data.encoded`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from luthier.data.encode import WordsDiffer
from luthier.data.encoded import WORDS_DIFFER

if __name__ == "__main__":
    try:
        pickle.loads(Path(sys.argv[1]).read_bytes()).run()
    except WordsDiffer:
        sys.exit(WORDS_DIFFER)
