"""Package definition. Namespace discovery, so that `kernels/` adds files beside another package of
that name.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "eagle/__init__.py").read_text()).group(1)

setup(
    name="eagle-heads",
    version=VERSION,
    description="Train EAGLE draft heads and generate from any causal LM several times faster, losslessly",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(
        include=["configs*", "kernels*", "eagle*", "records*", "train*", "inference*"]
    ),
    include_package_data=False,
    package_data={
        "eagle.embedded": ["*", "heads/*/*", "data/*"],
        "kernels": ["*.cpp", "*.h"],
        "configs": ["presets/*.yaml", "presets/*/*.yaml", "deepspeed/*.json"],
        "inference.evaluation.shipped": ["*.jsonl"],
        "train.tracking": ["*.html"],
    },
    install_requires=[
        "torch>=2.9,<2.14",
        "transformers>=5.14,<6",
        "deepspeed>=0.18",
        "datasets>=4",
        "safetensors>=0.5",
        "triton>=3.3; platform_system == 'Linux'",
        "pydantic>=2.7",
        "omegaconf>=2.3",
        "rich>=13",
        "regex>=2025.10.22",
        "ninja>=1.11",
        "packaging>=23",
        "jinja2>=3.1",
        "psutil>=5.9",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "finetune": ["peft>=0.18", "trl>=1.14", "bitsandbytes>=0.48", "torchmetrics>=1.8"],
        "plots": ["matplotlib>=3.8"],
        "eval": ["torchmetrics>=1.8", "sacrebleu>=2.5"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "ty>=0.0.100",
            "build",
            "matplotlib>=3.8",
            "torchmetrics>=1.8",
            "sacrebleu>=2.5",
        ],
    },
    entry_points={"console_scripts": ["eagle = inference.console:main"]},
)
