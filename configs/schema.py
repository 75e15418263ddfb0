"""What can be configured when a draft head is trained: frozen, typed, unknown keys rejected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

SourceFormat = Literal["chat", "fim", "instruction", "plain", "tokenized"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Compute = Literal["auto", "bf16", "fp32"]
Template = Literal["auto", "chat", "alpaca"]
Paths = str | list[str] | None
Quantization = Literal["none", "nf4", "int8"]
Divergence = Literal["soft_ce", "kl", "reverse_kl", "overlap", "total_variation"]


def _in_range(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("give two numbers in [0, 1), for instance [0.9,0.95]")
    return betas


def _flag(value: object) -> object:
    """`--resume` alone arrives as true and means auto."""
    return {True: "auto", False: None}[value] if isinstance(value, bool) else value


Betas = Annotated[tuple[float, float], AfterValidator(_in_range)]
Resume = Annotated[str | None, BeforeValidator(_flag)]


class Section(BaseModel):
    """Base of every config: immutable, strict about keys, defaults checked too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )


class ModelConfig(Section):
    base: str | None = Field(None, description="target: folder or hub id; null = embedded")
    init_head: str | None = Field(None, description="head to start from: folder or hub id")
    dtype: Dtype = Field("auto", description="dtype of the frozen target; auto = as it is served")
    adapter: str | None = Field(None, description="LoRA of the tuned target: folder or hub id")
    method: Literal["eagle3", "eagle1"] = Field("eagle3", description="kind of head")
    quantization: Quantization | Literal["int8_cpu"] = Field(
        "none", description="of the target's linear layers"
    )
    draft_vocab_size: int | None = Field(None, ge=1, description="null = half, 32000 at most")
    feature_layers: tuple[int, int, int] | None = Field(
        None, description="three layer ids whose *inputs* are the features; null = 2, L//2, L-3"
    )
    intermediate_size: int | None = Field(None, ge=1, description="head MLP width; null = target's")
    num_heads: int | None = Field(None, ge=1, description="head query heads; null = target's")
    num_kv_heads: int | None = Field(None, ge=1, description="head kv heads; null = target's")
    num_layers: int | None = Field(None, ge=1, description="head layers; null = 1")
    qk_norm: bool | None = Field(None, description="norm queries and keys, as Qwen3")
    norm_before_residual: bool | None = Field(None, description="norm what layer 1 is added to")
    norm_before_fc: bool | None = Field(None, description="norm the concatenated features")
    fc_norm: bool | None = Field(None, description="norm each of the features")
    norm_output: bool | None = Field(None, description="feed back the output after the last norm")


class FimTokens(Section):
    prefix: str = Field(description="token before the prefix")
    suffix: str = Field(description="token before the suffix")
    middle: str = Field(description="token before the middle")
    eot: str = Field(description="token that ends the middle")


class Files(Section):
    path: Paths = Field(None, description="data file(s), comma separated; null = shipped")
    eval_path: Paths = Field(None, description="held-out files; null = shipped, or a share of path")

    @property
    def paths(self) -> list[str] | None:
        return _paths(self.path)

    @property
    def eval_paths(self) -> list[str] | None:
        return _paths(self.eval_path)


class MixtureSource(Files):
    format: SourceFormat = Field(description="format of this source")
    name: str | None = Field(None, description="what metrics call it; null = its format")
    weight: float = Field(1.0, gt=0, description="relative share of this source's rows")
    loss_weight: float = Field(1.0, gt=0, description="factor on the loss of this source's rows")


class RowsConfig(Files):
    """What every reader of records is told."""

    max_length: int = Field(512, ge=8, description="tokens a row may have")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of bad rows that is borne")
    strict: bool = Field(False, description="refuse rows with a field that is not used")
    heldout_fraction: float = Field(0.02, ge=0, lt=1, description="held out without eval data")
    cache_dir: str | None = Field(None, description="null = $EAGLE_CACHE or ~/.cache/eagle-heads")
    seed: int = Field(0, ge=0, description="seed of FIM cuts, mixture and order")


class DataConfig(RowsConfig):
    format: Literal[SourceFormat, "mixed"] = Field("fim", description="what the records are")
    mixture: list[MixtureSource] | None = Field(None, description="sources of format=mixed")
    on_policy: bool | None = Field(None, description="this target wrote it; null = see its card")
    features: str | None = Field(None, description="folder of `train.prepare features`")
    supervise: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="which chat and instruction tokens are targets"
    )
    instruction_template: Template = Field("auto", description="auto = chat where it is known")
    fim_spm_rate: float = Field(0.0, ge=0, le=1, description="share of suffix-prefix-middle rows")
    fim_spans_per_file: int = Field(4, ge=1, description="FIM rows cut out of each whole file")
    fim_tokens: FimTokens | None = Field(None, description="null = found in the tokenizer")
    min_supervised_tokens: int = Field(100, ge=1, description="below it a run is refused")
    num_proc: int | None = Field(None, ge=1, description="processes that tokenise; null = by cores")

    @model_validator(mode="after")
    def _mixture_or_path(self) -> DataConfig:
        if self.mixture is not None and self.format != "mixed":
            raise ValueError(f"mixture needs format=mixed, not {self.format}")
        if self.format == "mixed" and (self.path or self.eval_path):
            raise ValueError(
                "format=mixed reads no path or eval_path: name files in data.mixture, for instance "
                "'data.mixture=[{format: fim, path: f.jsonl, weight: 2}]'"
            )
        return self


class RunConfig(Section):
    """What every training run is told."""

    output: str | None = Field(None, description="run folder; null = one under runs/")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; null = from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the data when max_steps is null")
    time_budget_minutes: float | None = Field(None, gt=0, description="end after so long, in order")
    batch_size: int = Field(8, ge=1, description="rows a process takes per micro batch")
    grad_accum: int = Field(1, ge=1, description="micro batches per optimizer step")
    lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    betas: Betas = Field((0.9, 0.95), description="AdamW betas, each in [0, 1)")
    grad_clip: float = Field(1.0, ge=0, description="gradient norm limit; 0 = off")
    seed: int = Field(0, ge=0, description="seed of new weights, dropout and row order")
    log_every: int = Field(10, ge=1, description="steps between metric rows")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; null = end")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without gain")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")
    resume: Resume = Field(None, description="auto = newest checkpoint in output; or a folder")


class TrainConfig(RunConfig):
    max_tokens_per_batch: int | None = Field(
        None, ge=8, description="padded tokens of a micro batch; null = batch_size rows each"
    )
    checkpoint_activations: bool = Field(False, description="compute again what backward needs")
    compile: bool = Field(False, description="torch.compile the head's layer")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices, AdamW for the rest; ZeRO 0 only"
    )
    zero: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage 0, 1, 2 or 3")
    dtype: Compute = Field("auto", description="of the head; auto = bf16 where the device has it")
    ttt_steps: int = Field(5, ge=1, le=16, description="unrolled steps of training-time test")
    ttt_decay: float = Field(0.8, gt=0, le=1, description="loss weight of step i is decay**i")
    feature_noise: float | None = Field(None, ge=0, description="null = 0.1 for eagle1, else 0")
    perf_every: int = Field(50, ge=0, description="steps between rows of time and memory; 0 = none")
    report_to: list[Literal["tensorboard", "wandb"]] | None = Field(
        None, description="trackers, comma separated, or none; null = tensorboard if installed"
    )
    profile: int = Field(0, ge=0, description="steps recorded by torch.profiler; 0 = none")

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """`a,b` is a list; `none` is an empty one."""
        if isinstance(value, str):
            value = _paths(value)
        return [] if value == ["none"] else value

    @field_validator("profile", mode="before")
    @classmethod
    def _some_steps(cls, value: object) -> object:
        """`--profile` alone arrives as true and means three steps."""
        return {True: 3, False: 0}[value] if isinstance(value, bool) else value


class LossConfig(Section):
    name: Literal[Divergence, "focal"] = Field(
        "soft_ce", description="loss; overlap is the LK loss, -log of the acceptance rate"
    )
    focal_over: Divergence = Field("soft_ce", description="loss that name=focal weights")
    gamma: float = Field(2.0, ge=0, description="focal exponent")
    alpha: float = Field(1.0, gt=0, description="focal scale")
    weight: Literal["overlap", "target_prob"] = Field("overlap", description="of the focal weight")
    tokens: Literal["supervised", "all"] = Field(
        "supervised", description="all: learn from every token, whatever the loss mask says"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="uniform share of the targets")
    feature_weight: float | None = Field(None, ge=0, description="eagle1: of smooth L1; null = 1")
    token_weight: float | None = Field(None, ge=0, description="eagle1: of loss.name; null = 0.1")
    depth_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="loss weight of each unrolled step; null = train.ttt_decay**i"
    )

    @model_validator(mode="after")
    def _applies(self) -> LossConfig:
        if self.focal_over != "soft_ce" and self.name != "focal":
            raise ValueError(f"focal_over={self.focal_over} needs name=focal, not {self.name}")
        base = self.focal_over if self.name == "focal" else self.name
        if self.label_smoothing and base not in ("soft_ce", "kl"):
            raise ValueError(f"label_smoothing applies to soft_ce and kl, not to {base}: set it 0")
        return self


class EvalConfig(Section):
    num_prompts: int = Field(8, ge=0, description="held-out prompts decoded; 0 = none")
    max_new_tokens: int = Field(48, ge=1, description="tokens decoded per prompt")
    tree: str = Field(
        "16,4,4", pattern=r"^\d+,\d+,\d+$", description="total_token,depth,top_k, as 16,4,4"
    )


class HeadTrainConfig(Section):
    """Everything `python -m train.main` can be told."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _agree(self) -> HeadTrainConfig:
        train, loss, eagle1 = self.train, self.loss, self.model.method == "eagle1"
        if train.early_stopping_patience and not (train.eval_every and self.eval.num_prompts):
            raise ValueError("early_stopping_patience: set train.eval_every and eval.num_prompts")
        if not eagle1 and (loss.feature_weight, loss.token_weight) != (None, None):
            raise ValueError("loss.feature_weight and token_weight are for model.method=eagle1")
        if eagle1 and self.data.features:
            raise ValueError("data.features is what EAGLE-3 heads read; leave it out for eagle1")
        if loss.depth_weights is not None and len(loss.depth_weights) != train.ttt_steps:
            raise ValueError(f"loss.depth_weights: list {train.ttt_steps}, one for a ttt step")
        longest = -(-self.data.max_length // 8) * 8
        if train.max_tokens_per_batch and train.max_tokens_per_batch < longest:
            raise ValueError(
                f"train.max_tokens_per_batch={train.max_tokens_per_batch} cannot hold a row of "
                f"data.max_length={self.data.max_length}: set at least {longest}"
            )
        return self


def _paths(value: str | list[str] | None) -> list[str] | None:
    """`a,b` and `[a, b]` both mean two files."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]
