"""Data for head training: files -> (input_ids, loss_mask) rows, cached, split and mixed."""

from records.collate import Collator
from records.dataset import TokenizedData, load_dataset_for
from records.mixture import MixtureDataset
from records.shipped import embedded_dir, shipped
from records.tokens import load_tokenizer

__all__ = [
    "Collator",
    "MixtureDataset",
    "TokenizedData",
    "embedded_dir",
    "load_dataset_for",
    "load_tokenizer",
    "shipped",
]
