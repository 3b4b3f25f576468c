"""Tokenize JSONL into Megatron's indexed dataset: see --help and archscale_megatron/data/preprocess.py."""

import os
import sys

# Tokenizers that need transformers to load do not need it to import torch (2 s).
os.environ.update(USE_TORCH="0", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

from archscale_megatron.data.preprocess import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
