"""Our models in lm-eval, `--model archscale`: its requests, computed by an engine.

Tokens, the token before an empty context, windows and what is cut off are those of lm-eval's `hf` model, so that the
scores are, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    _add_special_kwargs,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation.engine import Engine, Sampling
from archscale_megatron.evaluation.options import open_engine

ROUND = 256  # requests of each rank between two exchanges of answers
SAMPLING = {"temperature", "top_p", "top_k", "do_sample"}

Answers = Iterator[tuple[int, Any]]


@register_model("archscale")
class ArchScaleLM(TemplateLM):
    """An engine for lm-eval.

    On several ranks each is given all requests, computes its share, and learns the answers of the others.
    """

    def __init__(
        self,
        load: str | None = None,
        *,
        engine: Engine | None = None,
        journal: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        tokenizer_model: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        """
        Args:
            load: a run directory, a checkpoint or an export, if no engine is given; the options that follow are those
                of `add_engine_options`.
            journal: `evaluation.journal.Journal` of answers that need not be computed.
            batch_size: `auto` is the engine's own choice.
            max_batch_size: lm-eval's, which means nothing here.
            add_bos_token, prefix_token_id: as of lm-eval's `hf`.
        """
        super().__init__()
        # For standard errors lm-eval would fork, which an engine's threads make unsafe; the numbers are the same.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if engine is None:
            engine = open_engine(
                argparse.Namespace(
                    load=Path(str(load)),
                    dtype=dtype,
                    device=device if torch.cuda.is_available() else "cpu",  # lm-eval's default is cuda:0
                    batch_size=None if str(batch_size).startswith("auto") else int(batch_size),
                    max_length=max_length,
                    tokenizer_model=tokenizer_model,
                    tensor_model_parallel_size=tensor_model_parallel_size,
                    pipeline_model_parallel_size=pipeline_model_parallel_size,
                )
            )
        self.engine, self.tokenizer, self.max_length = engine, engine.tokenizer, engine.max_length
        self.add_bos_token, self._prefix_token_id, self._max_gen_toks = add_bos_token, prefix_token_id, max_gen_toks
        self._journal = journal

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context; raises ValueError if the tokenizer has no such token."""
        for token in (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("the tokenizer has neither bos nor eos token; give prefix_token_id")

    @property
    def tokenizer_name(self) -> str:
        return f"archscale-{self.engine.source['fingerprint']}"

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's own reports."""
        return {"model_source": self.engine.source, "model_sha": self.engine.source["fingerprint"]}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ValueError if the tokenizer has no template."""
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; leave --apply-chat-template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        options = _add_special_kwargs(add_special_tokens, self.add_bos_token)
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)

    # Requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def compute(indices: list[int]) -> Answers:
            pairs = [requests[i][1:] for i in indices]
            for i, scored in self._score(pairs):
                yield indices[i], (float(scored.logprobs.sum()), bool(scored.greedy.all()))

        answers = self._answers("loglikelihood", [text for text, *_ in requests], compute)
        return [(logprob, greedy) for logprob, greedy in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args for request in requests]

        def compute(indices: list[int]) -> Answers:
            windows = [self._windows(*texts[i]) for i in indices]
            of = [i for i, parts in enumerate(windows) for _ in parts]
            sums: dict[int, list[float]] = defaultdict(list)
            yield from ((indices[i], 0.0) for i, parts in enumerate(windows) if not parts)
            for window, scored in self._score(list(itertools.chain.from_iterable(windows))):
                found = sums[of[window]]
                found.append(float(scored.logprobs.sum()))
                if len(found) == len(windows[of[window]]):
                    yield indices[of[window]], sum(found)

        return self._answers("loglikelihood_rolling", texts, compute)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [request.args for request in requests]

        def compute(indices: list[int]) -> Answers:
            groups: dict[Sampling, list[int]] = defaultdict(list)
            for i in indices:
                groups[self._sampling(prompts[i][1])].append(i)
            for sampling, members in groups.items():
                if (room := self.max_length - sampling.max_new_tokens) < 1:
                    raise ValueError(
                        f"max_gen_toks {sampling.max_new_tokens} leaves no room in {self.max_length} tokens; give a "
                        "larger --max-length, or fewer max_gen_toks"
                    )
                contexts = [self._context(prompts[i][0])[-room:] for i in members]
                for i, generated in self.engine.generate(contexts, sampling, members):
                    text = self.tokenizer.decode(generated.ids, skip_special_tokens=True)
                    stop = list(sampling.stop)
                    yield members[i], postprocess_generated_text(text, stop=stop, think_end_token=None)

        return self._answers("generate_until", prompts, compute)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Any]]:
        """Scores of continuations behind contexts, of which the last max_length tokens are read."""
        sequences = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; with --max-length {self.max_length} it has "
                    f"1 to {self.max_length}"
                )
            sequences.append((context + continuation)[-self.max_length - 1 :])
        first = [len(tokens) - len(pair[1]) for tokens, pair in zip(sequences, pairs, strict=True)]
        return self.engine.score(sequences, first)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return list(map(make_disjoint_window, windows))

    def _context(self, text: str) -> list[int]:
        """A prompt's tokens; unlike before a continuation, the bos token alone is looked for in the text."""
        options = _add_special_kwargs(None, self.add_bos_token)
        if has_bos_prefix(text, self.tokenizer.bos_token):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(text, **options)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Of a request's options; raises ValueError for one that is not known."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, self._max_gen_toks))
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stop = handle_stop_sequences(kwargs.pop("until", None), eos=end)
        length = kwargs.pop("max_gen_toks")
        if unknown := sorted(kwargs.keys() - SAMPLING):
            raise ValueError(f"{unknown[0]}={kwargs[unknown[0]]!r} is not known here; generation takes {SAMPLING}")
        sampled = kwargs.get("do_sample")
        return Sampling(
            max_new_tokens=length,
            temperature=float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(kwargs.get("top_k", 0)) if sampled else 0,
            stop=tuple(text for text in stop if text),
        )

    # Who computes what, and what is there already

    def _answers(self, kind: str, requests: Sequence[Sequence[Any]], compute: Callable[[list[int]], Answers]) -> list:
        """The answer to each request. Those of a journal are not computed again; the others are noted there."""
        keys = _keys(kind, requests)
        done = {} if self._journal is None else self._journal.done
        found: dict[int, Any] = {i: done[key] for i, key in enumerate(keys) if key in done}
        rank, ranks = agreement.rank_and_size()
        with tqdm(total=len(requests), initial=len(found), desc=kind, disable=None if rank == 0 else True) as progress:

            def note(i: int, answer: Any) -> None:
                found[i] = answer
                self.cache_hook.add_partial(kind, requests[i], answer)
                if self._journal is not None:
                    self._journal.append(keys[i], answer)
                progress.update()

            for part in _rounds([i for i in range(len(requests)) if i not in found], requests, self.engine, ranks):
                if ranks == 1:
                    for i, answer in compute(part):
                        note(i, answer)
                    continue
                shares = agreement.of_all_ranks(dict(compute(part)))
                for i, answer in sorted({i: a for share in shares for i, a in share.items()}.items()):
                    note(i, answer)
        return [found[i] for i in range(len(requests))]


def _keys(kind: str, requests: Sequence[Sequence[Any]]) -> list[str]:
    """A name for each request that is the same in another process; the same request again has another."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        key = hash_args(kind, request)
        seen[key] += 1
        keys.append(f"{key}.{seen[key]}")
    return keys


def _rounds(indices: list[int], requests: Sequence[Sequence[Any]], engine: Engine, ranks: int) -> Iterator[list[int]]:
    """This rank's requests, in parts after which the ranks exchange answers; requests of one context stay together."""
    if ranks == 1:
        yield indices
        return
    groups = [list(group) for _, group in itertools.groupby(indices, key=lambda i: requests[i][0])]
    size = ROUND * engine.world_size
    for start in range(0, len(groups), size):
        mine = groups[start : start + size][engine.rank :: engine.world_size]
        yield list(itertools.chain.from_iterable(mine))
