"""What can be configured when a base model is fine-tuned: the same rules as `schema.py`."""

from __future__ import annotations

import string
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.schema import (
    Betas,
    Compute,
    DataConfig,
    Dtype,
    Quantization,
    RowsConfig,
    RunConfig,
    Section,
    Template,
)

Schedule = Literal["constant", "linear", "cosine"]
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

    base: str | None = Field(None, description="base: folder or hub id; null = embedded")
    adapter: str | None = Field(None, description="adapter folder to start from; null = a new one")
    quantization: Quantization = Field("nf4", description="of the frozen linear layers")
    dtype: Dtype = Field("auto", description="of what is not quantized; auto = as it is served")
    compute: Compute = Field("auto", description="of products; auto = bf16 where the device has it")
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")


class LoraSection(Section):
    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scale: the update counts alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the first matrix")
    target_modules: str | list[str] = Field("all-linear", description="layers; or all-linear")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")


class FinetuneTrain(RunConfig):
    eval_batch_size: int | None = Field(None, ge=1, description="null = batch_size")
    grad_accum: int = Field(2, ge=1, description="micro batches per optimizer step")
    lr: float = Field(2e-4, gt=0, le=1, description="peak learning rate")
    schedule: Schedule = Field("constant", description="learning rate after the warmup")
    betas: Betas = Field((0.9, 0.999), description="AdamW betas, each in [0, 1)")
    grad_clip: float = Field(0.3, ge=0, description="gradient norm limit; 0 = off")
    zero: int | None = Field(None, ge=0, le=3, description="ZeRO stage; null = without DeepSpeed")
    gradient_checkpointing: bool = Field(True, description="compute activations again in backward")

    @model_validator(mode="after")
    def _patience(self) -> FinetuneTrain:
        if self.early_stopping_patience and not self.eval_every:
            raise ValueError(
                "train.early_stopping_patience needs evaluations: set train.eval_every"
            )
        return self


class SftConfig(Section):
    """Everything `python -m train.finetune sft` can be told."""

    model: PolicyConfig = PolicyConfig()
    lora: LoraSection = LoraSection()
    data: DataConfig = DataConfig(format="instruction")
    train: FinetuneTrain = FinetuneTrain()

    @model_validator(mode="after")
    def _no_loss_weights(self) -> SftConfig:
        if any(source.loss_weight != 1 for source in self.data.mixture or []):
            raise ValueError("loss_weight of a source is for draft heads; use its weight")
        return self


class TaskConfig(Section):
    """One task of the registry."""

    name: str = Field(description="what metrics and predictions call it")
    type: TaskType = Field(description="generation, classification, regression or ranking")
    fields: list[str] = Field(min_length=1, description="fields of a record in the template")
    label: str = Field(description="field with the label: text, class, number or list of numbers")
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
        """YAML reads `yes` and `no` as booleans; labels are text."""
        names = {True: "true", False: "false"}
        is_list = isinstance(value, list)
        return [names[v] if isinstance(v, bool) else v for v in value] if is_list else value

    @model_validator(mode="after")
    def _whole(self) -> TaskConfig:
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(self.template) if name}
        except ValueError as error:
            raise ValueError(f"task {self.name}: template: {error}; write {{{{ for {{") from error
        kind, classes = self.type, self.classes
        metrics, losses = METRICS[kind], LOSSES[kind]
        wrong = None
        if self.metric not in metrics:
            wrong = f"metric {self.metric!r} does not measure a {kind}; use {', '.join(metrics)}"
        elif self.loss_name not in losses:
            wrong = f"loss {self.loss!r} does not fit a {kind}; use {', '.join(losses)}"
        elif (kind == "classification") != (classes is not None):
            wrong = "classes are what a classification has, and only it"
        elif classes is not None and len(set(classes)) < max(2, len(classes)):
            wrong = "give two or more distinct classes"
        elif used != set(self.fields):
            wrong = f"the template reads {sorted(used)}, fields are {sorted(self.fields)}"
        elif self.label in self.fields:
            wrong = f"the label {self.label!r} stands in the prompt"
        if wrong is not None:
            raise ValueError(f"task {self.name}: {wrong}")
        return self


class TaskData(RowsConfig):
    heldout_fraction: float = Field(0.05, ge=0, lt=1, description="held out without eval data")
    max_rows: int | None = Field(None, ge=1, description="records read of each file; null = all")
    max_eval_rows: int | None = Field(None, ge=1, description="the same of each held-out file")


class TaskBalance(Section):
    weights: Literal["fixed", "uncertainty"] = Field("fixed", description="uncertainty: learned")
    temperature: float = Field(1.0, gt=0, description="draw tasks by rows ** (1 / temperature)")
    max_generations: int = Field(32, ge=0, description="held-out rows generated for each task")


class MultitaskConfig(Section):
    """Everything `python -m train.finetune multitask` can be told."""

    model: PolicyConfig = PolicyConfig()
    lora: LoraSection = LoraSection()
    data: TaskData = TaskData()
    tasks: list[TaskConfig] = Field([], description="the task registry")
    balance: TaskBalance = TaskBalance()
    train: FinetuneTrain = FinetuneTrain()

    @model_validator(mode="after")
    def _names(self) -> MultitaskConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {', '.join(names)}")
        if self.train.zero == 3:
            raise ValueError(
                "train.zero=3 needs the same layers in the same order on every rank, which batches "
                "of several tasks are not; use train.zero=2 or less"
            )
        return self


class PreferenceData(TaskData):
    template: Template = Field("auto", description="of text prompts; auto = chat if there is one")
    max_length: int = Field(1024, ge=8, description="tokens of a prompt with either answer")


class DpoSection(Section):
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = Field("sigmoid", description="loss")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="wrong preferences, for robust")


class DpoTrain(FinetuneTrain):
    lr: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(4, ge=1, description="pairs a process takes per micro batch")


class DpoConfig(Section):
    """Everything `python -m train.finetune dpo` can be told."""

    model: PolicyConfig = PolicyConfig()
    lora: LoraSection = LoraSection()
    data: PreferenceData = PreferenceData()
    dpo: DpoSection = DpoSection()
    train: DpoTrain = DpoTrain()


class MergeConfig(Section):
    """Everything `python -m train.finetune merge` can be told."""

    adapter: str | None = Field(None, description="adapter folder, or the run folder that holds it")
    base: str | None = Field(None, description="where the base is; null = where the adapter says")
    output: str | None = Field(None, description="folder of the merged model")
    dtype: Dtype = Field("auto", description="of the merged weights; auto = the base checkpoint's")
    rows: int = Field(16, ge=1, description="held-out rows on which the models are compared")
    data: DataConfig = DataConfig(format="instruction")
