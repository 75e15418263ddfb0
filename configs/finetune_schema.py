"""What can be configured when a base model is fine-tuned: the same rules as `schema.py`.

Knows nothing of torch, files or models; only of names, types and ranges.
"""

from __future__ import annotations

import math
import string
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.schema import Betas, DataConfig, Resume, Section, _paths

TaskType = Literal["generation", "classification", "regression", "ranking"]
# what each type can be measured and trained by; the first loss is the default
METRICS = {
    "generation": ("rouge_l", "exact_match"),
    "classification": ("accuracy", "macro_f1", "mcc", "auroc"),
    "regression": ("mae", "pearson", "spearman"),
    "ranking": ("pairwise_accuracy", "ndcg"),
}
LOSSES = {
    "generation": ("cross_entropy",),
    "classification": ("cross_entropy", "focal"),
    "regression": ("mse", "huber", "mae"),
    "ranking": ("logistic", "hinge"),
}


class PolicyConfig(Section):
    """The model that learns: a frozen base and a low-rank adapter."""

    base: str | None = Field(
        None, description="base model: folder or hub id, ORG/NAME[@REVISION]; null = embedded"
    )
    adapter: str | None = Field(None, description="adapter folder to start from; null = a new one")
    quantization: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="how the frozen linear layers are kept"
    )
    double_quant: bool = Field(True, description="quantize the scales of nf4 too")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of weights that are not quantized; auto = the checkpoint's, float32 for bf16 on a "
        "CPU without it",
    )
    compute: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="dtype of the computation; auto = bf16 where the device has it, else fp32",
    )
    attn_implementation: str | None = Field(
        None, description="sdpa, eager, flash_attention_2, ...; null = transformers' choice"
    )


class LoraSection(Section):
    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scale: the update counts alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the first matrix")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of layers, or all-linear (all but the output layer)"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")


class FinetuneTrain(Section):
    output: str | None = Field(None, description="run folder; null = runs/COMMAND")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; null = from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the data when max_steps is null")
    time_budget_minutes: float | None = Field(
        None,
        gt=0,
        description="end after so long, with a finished schedule, if the steps are not done before",
    )
    batch_size: int = Field(8, ge=1, description="rows a process takes per micro batch")
    eval_batch_size: int | None = Field(None, ge=1, description="null = batch_size")
    grad_accum: int = Field(2, ge=1, description="micro batches per optimizer step")
    lr: float = Field(2e-4, gt=0, le=1, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warmup"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    betas: Betas = Field((0.9, 0.999), description="AdamW betas, each in [0, 1)")
    grad_clip: float = Field(0.3, ge=0, description="gradient norm limit; 0 = off")
    seed: int = Field(0, ge=0, description="seed of the adapter, dropout and row order")
    zero: int | None = Field(
        None, ge=0, le=3, description="DeepSpeed ZeRO stage 0, 1, 2 or 3; null = without DeepSpeed"
    )
    gradient_checkpointing: bool = Field(
        True, description="compute activations again in backward: less memory, more time"
    )
    log_every: int = Field(10, ge=1, description="steps between metric rows")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; null = end")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="newest checkpoints kept, and the best")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations without a lower held-out loss that end the run"
    )
    resume: Resume = Field(None, description="auto = newest checkpoint in output; or a folder")

    @model_validator(mode="after")
    def _patience(self) -> FinetuneTrain:
        if self.early_stopping_patience and not self.eval_every:
            raise ValueError(
                "train.early_stopping_patience counts evaluations: set train.eval_every"
            )
        return self


class SftConfig(Section):
    """Everything `python -m train.finetune sft` can be told."""

    model: PolicyConfig = Field(default_factory=PolicyConfig, description="base and adapter")
    lora: LoraSection = Field(default_factory=LoraSection, description="shape of a new adapter")
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(format="instruction"), description="training data"
    )
    train: FinetuneTrain = Field(default_factory=FinetuneTrain, description="optimisation and run")

    @model_validator(mode="after")
    def _no_loss_weights(self) -> SftConfig:
        if any(source.loss_weight != 1 for source in self.data.mixture or []):
            raise ValueError(
                "loss_weight of a mixture's source is for draft heads; use its weight (share of rows)"
            )
        return self


class TaskConfig(Section):
    """One task of the registry."""

    name: str = Field(description="what metrics and predictions call it")
    type: TaskType = Field(description="generation, classification, regression or ranking")
    fields: list[str] = Field(
        min_length=1, description="fields of a record that the template reads"
    )
    label: str = Field(
        description="field with the label: text, class, number, or a list of numbers"
    )
    template: str = Field(description="the prompt, with {field} for each field")
    classes: list[str] | None = Field(None, description="labels of a classification, in order")
    weight: float = Field(1.0, gt=0, description="factor on the task's loss")
    metric: str = Field(description="what the task is judged by")
    loss: str | None = Field(None, description="null = the type's default")
    max_new_tokens: int = Field(48, ge=1, description="tokens generated in an evaluation")

    @property
    def loss_name(self) -> str:
        return self.loss or LOSSES[self.type][0]

    @field_validator("classes", mode="before")
    @classmethod
    def _class_names(cls, value: object) -> object:
        """YAML reads `yes` and `no` as booleans and 1 as a number; labels are text."""
        if not isinstance(value, list):
            return value
        names = {True: "true", False: "false"}
        return [names[v] if isinstance(v, bool) else str(v) for v in value]

    @model_validator(mode="after")
    def _whole(self) -> TaskConfig:
        if self.metric not in METRICS[self.type]:
            raise ValueError(
                f"task {self.name}: metric {self.metric!r} does not measure a {self.type}; "
                f"use one of {', '.join(METRICS[self.type])}"
            )
        if self.loss is not None and self.loss not in LOSSES[self.type]:
            raise ValueError(
                f"task {self.name}: loss {self.loss!r} does not fit a {self.type}; "
                f"use one of {', '.join(LOSSES[self.type])}"
            )
        if (self.type == "classification") != (self.classes is not None):
            raise ValueError(
                f"task {self.name}: classes are what a classification has, and only it"
            )
        if self.classes is not None and len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"task {self.name}: give two or more distinct classes")
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(self.template) if name}
        except ValueError as error:
            raise ValueError(f"task {self.name}: template: {error}; write {{{{ for {{") from error
        if used != set(self.fields):
            raise ValueError(
                f"task {self.name}: the template reads {sorted(used)}, fields are {sorted(self.fields)}"
            )
        if self.label in self.fields:
            raise ValueError(f"task {self.name}: the label {self.label!r} stands in the prompt")
        return self


class TaskData(Section):
    path: str | list[str] | None = Field(
        None, description="file(s), comma separated; null = made of the shipped docstrings"
    )
    eval_path: str | list[str] | None = Field(
        None, description="held-out file(s); null = shipped, or heldout_fraction of the data"
    )
    max_length: int = Field(
        512, ge=8, description="tokens a row may have; longer ones are set aside"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of bad rows above which the run stops"
    )
    heldout_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of rows held out when no eval data is given"
    )
    max_rows: int | None = Field(None, ge=1, description="records read of each file; null = all")
    max_eval_rows: int | None = Field(
        None, ge=1, description="records read of each held-out file; null = all"
    )
    cache_dir: str | None = Field(
        None,
        description="folder for shipped data; null = $EAGLE_CACHE, else $XDG_CACHE_HOME/eagle-heads, else ~/.cache/eagle-heads",
    )
    seed: int = Field(0, ge=0, description="seed of the mixture of tasks")

    @property
    def paths(self) -> list[str] | None:
        return _paths(self.path)

    @property
    def eval_paths(self) -> list[str] | None:
        return _paths(self.eval_path)


class TaskBalance(Section):
    weights: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="uncertainty: task weights are learned with the model"
    )
    temperature: float = Field(
        1.0, gt=0, description="a task is drawn by rows ** (1 / temperature); 1 = by its rows"
    )
    max_generations: int = Field(
        32, ge=0, description="held-out rows generated for each generation task in an evaluation"
    )

    @field_validator("temperature")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("give a finite number; 1000 draws tasks equally")
        return value


class MultitaskConfig(Section):
    """Everything `python -m train.finetune multitask` can be told."""

    model: PolicyConfig = Field(default_factory=PolicyConfig, description="base and adapter")
    lora: LoraSection = Field(default_factory=LoraSection, description="shape of a new adapter")
    data: TaskData = Field(default_factory=TaskData, description="training data")
    tasks: list[TaskConfig] = Field(default_factory=list, description="the task registry")
    balance: TaskBalance = Field(default_factory=TaskBalance, description="between the tasks")
    train: FinetuneTrain = Field(default_factory=FinetuneTrain, description="optimisation and run")

    @model_validator(mode="after")
    def _names(self) -> MultitaskConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {', '.join(names)}")
        if self.train.zero == 3:
            raise ValueError(
                "train.zero=3 needs the same layers in the same order on every rank, and batches of "
                "several tasks differ; use train.zero=2 or less"
            )
        return self


class PreferenceData(TaskData):
    template: Literal["auto", "chat", "alpaca"] = Field(
        "auto", description="of text prompts: auto = the chat template if there is one, else alpaca"
    )
    max_length: int = Field(1024, ge=8, description="tokens of a prompt with either answer")


class DpoSection(Section):
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = Field("sigmoid", description="loss")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of wrong preferences that loss=robust reckons with"
    )


class DpoTrain(FinetuneTrain):
    lr: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(4, ge=1, description="pairs a process takes per micro batch")


class DpoConfig(Section):
    """Everything `python -m train.finetune dpo` can be told."""

    model: PolicyConfig = Field(default_factory=PolicyConfig, description="base and SFT adapter")
    lora: LoraSection = Field(default_factory=LoraSection, description="shape of a new adapter")
    data: PreferenceData = Field(default_factory=PreferenceData, description="preferences")
    dpo: DpoSection = Field(default_factory=DpoSection, description="objective")
    train: DpoTrain = Field(default_factory=DpoTrain, description="optimisation and run")


class MergeConfig(Section):
    """Everything `python -m train.finetune merge` can be told."""

    adapter: str | None = Field(None, description="adapter folder, or the run folder that holds it")
    base: str | None = Field(
        None, description="where the base is now; null = where the adapter says"
    )
    output: str | None = Field(None, description="folder of the merged model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the merged weights; auto = the base checkpoint's"
    )
    rows: int = Field(16, ge=1, description="held-out rows on which the models are compared")
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(format="instruction"), description="those rows"
    )
