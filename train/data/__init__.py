"""Data for head training: files -> (input_ids, loss_mask) rows, cached, split and mixed."""

from train.data.collate import Collator
from train.data.dataset import TokenizedData, load_dataset_for
from train.data.mixture import MixtureDataset
from train.data.shipped import embedded_dir, shipped
from train.data.tokens import load_tokenizer

__all__ = [
    "Collator",
    "MixtureDataset",
    "TokenizedData",
    "embedded_dir",
    "load_dataset_for",
    "load_tokenizer",
    "shipped",
]
