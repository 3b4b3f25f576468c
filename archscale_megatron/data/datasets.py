"""Megatron's indexed datasets for `pretrain`: built as Megatron builds them, checked before anything starts."""

from __future__ import annotations

import argparse
import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

# .idx files (megatron.core.datasets.indexed_dataset): 9 bytes of magic, version, dtype code, sequence count.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQ")


def check_data(args: argparse.Namespace) -> None:
    """Check that every dataset that the arguments name is there and holds documents.

    Raises:
        FileNotFoundError: no dataset named, or a file of one is missing.
        ValueError: a file is not an indexed dataset, or has no documents.
    """
    if args.mock_data:
        return
    if not (prefixes := _prefixes(args)):
        raise FileNotFoundError("no data: give --data-path, --train-data-path or --mock-data")
    for prefix in prefixes:
        check_dataset(prefix)


def check_ends_of_documents(args: argparse.Namespace, end_of_document: int) -> None:
    """Raises ValueError if the first document of a dataset does not end with `end_of_document`."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for prefix in () if args.mock_data else _prefixes(args):
        dataset = IndexedDataset(prefix)  # by name: its documents are views that die with it
        last = int(dataset[0][-1])
        if last != end_of_document:
            raise ValueError(
                f"--reset-at-eod: the first document of {prefix} ends with token {last}, not with the tokenizer's "
                f"end-of-document token {end_of_document}; preprocess with --append-eod and the same tokenizer"
            )


def _prefixes(args: argparse.Namespace) -> list[str]:
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    blends = [b for b in (blend, *(blend_per_split or ())) if b is not None]
    return list(dict.fromkeys(prefix for prefixes, _ in blends for prefix in prefixes))


def check_dataset(prefix: str) -> None:
    """Check the indexed dataset `prefix`.bin and .idx; raises as `check_data`."""
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise FileNotFoundError(
                f"{prefix}{suffix}: no such file; --data-path takes the path without .bin or .idx "
                "of what tools/preprocess_data.py wrote"
            )
    with open(prefix + ".idx", "rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise ValueError(f"{prefix}.idx: not the index of an indexed dataset")
    if INDEX_HEADER.unpack(header)[3] == 0 or Path(prefix + ".bin").stat().st_size == 0:
        raise ValueError(f"{prefix}: the dataset is empty")


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets of `samples` samples each, as `pretrain` asks for them.

    Only the first rank of a tensor-parallel group reads, on the stages that `reads_data` names.
    """
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    def is_built_here(vp_stage: int | None) -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and reads_data(vp_stage)

    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, samples, partial(is_built_here, vp_stage), dataset_config(args))
    return builder.build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def reads_data(vp_stage: int | None) -> bool:
    """Does this (virtual) pipeline stage read batches? Those that embed tokens or compute the loss do, and with
    `--reset-at-eod` all, to know where documents start."""
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return get_args().reset_at_eod or is_first_or_last_pipeline_stage(vp_stage)


def dataset_config(args: argparse.Namespace) -> Any:
    """Megatron's GPTDatasetConfig for Megatron's data arguments."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=None if sequences is None else json.loads(Path(sequences).read_text()),
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        data_parallel_size=args.data_parallel_size,
    )
