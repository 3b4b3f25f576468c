"""lm-eval learns our model's name when it imports torch.

lm-eval 0.4.13 loads no plugins of its own; but torch, when it is imported, calls what is installed under the entry
point `torch.backends`. In a program that has not imported lm-eval, this does nothing.
"""

from __future__ import annotations

import sys

NAME = "archscale"
TARGET = "archscale_megatron.evaluation.lm_eval_model:ArchScaleLM"


def register() -> None:
    """Make `lm_eval --model archscale` known. Never raises: a failure here would be one of `import torch`."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401  lm-eval adds its own only to a registry that is empty
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception as error:
        print(f"archscale_megatron: lm-eval does not learn of --model {NAME} ({error})", file=sys.stderr)
