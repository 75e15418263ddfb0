"""Rows of data: readers, rendering to (input_ids, loss_mask), prompts, mixture, quarantine, cache.

Knows files, formats and tokenizers; knows nothing of training and generation."""

from records.collate import Collator
from records.dataset import TokenizedData, load_dataset_for
from records.mixture import MixtureDataset
from records.sources import shipped
from records.tokens import load_tokenizer

__all__ = [
    "Collator",
    "MixtureDataset",
    "TokenizedData",
    "load_dataset_for",
    "load_tokenizer",
    "shipped",
]
