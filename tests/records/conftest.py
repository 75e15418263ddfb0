import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "train")]

import data_helpers

tokenizer, tokenizer_dir = data_helpers.tokenizer, data_helpers.tokenizer_dir
