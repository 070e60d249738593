"""`fire.yaml` as frozen models: every number that changes a result has a name, a default and one line of why.

Fields marked `perf` are recorded but do not enter a stage's fingerprint: they change speed or memory, not the result.
Fields marked `addon` enter the fingerprints of the tables they add, not that of the table these belong to.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from .errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Scope = Literal["trajectory", "group", "step", "round"]
Denominator = Literal["tokens", "all_tokens", "sequences", "constant"]
Tracker = Literal["trackio", "wandb", "tensorboard"]
Engine = Literal["transformers", "vllm", "http", "fake"]
Normalise = Literal["none", "trajectory", "group", "step", "round"]

VERIFIERS = ("exact", "math", "choice", "code")

TEACHER = "teacher"  # what the only teacher, or the one of prompts without a route, is called
ADDED = ("topk", "base", "pass-rate")
ADDED_TEACHER = "teacher."  # with the teacher's name: all rows under one teacher of several

REDUCED_BITS = 10  # of the 23 in a float32's mantissa, where `score.precision` is reduced

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$"  # a folder under weights/, not a path
_ROUTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
# A rule's components: a file, which may hold a + if it begins with a slash or a dot, or a name.
_COMPONENT = re.compile(r"((?:\.{0,2}/|~).*?\.py(?::\w+)?(?=\+|$)|[^+]*)(?:\+|$)")
RULE_PARTS = ("keep", "weight", "advantage", "token_keep")
_LARGEST = 100_000  # values in a fire.yaml, aliases counted as often as they are used


def _field(default: Any, description: str, **kwargs: Any) -> Any:
    return Field(default, description=description, **kwargs)


def _perf(default: Any, description: str, **kwargs: Any) -> Any:
    """A field that changes speed or memory but not the result."""
    return Field(default, description=description, json_schema_extra={"perf": True}, **kwargs)


def _addon(default: Any, description: str, **kwargs: Any) -> Any:
    """A field that changes addons to a stage's table alone: it enters their fingerprints, not the stage's."""
    return Field(default, description=description, json_schema_extra={"addon": True}, **kwargs)


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def results(self) -> dict[str, Any]:
        """The fields that change a stage's own result, JSON-ready: what its fingerprint is made of."""
        return self.model_dump(mode="json", exclude=self._marked("perf") | self._marked("addon"))

    def performance(self) -> dict[str, Any]:
        """The fields that change speed or memory alone, JSON-ready: recorded beside the fingerprint."""
        return self.model_dump(mode="json", include=self._marked("perf"))

    @classmethod
    def _marked(cls, mark: str) -> set[str]:
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get(mark)}


class ModelConfig(Section):
    """A causal language model with its tokenizer."""

    model: str = _field(..., "Hub id or local folder (Hugging Face format, safetensors)")
    revision: str | None = _field(None, "Hub revision; a commit hash pins it")
    dtype: Dtype = _field("float32", "weights and matmuls while generating and scoring; softmax is fp32 or better")
    chat_template: str | None = _field(None, "file with a Jinja chat template, instead of the tokenizer's own")
    chat_template_kwargs: dict[str, Any] = _field(
        {}, "for the chat template: {enable_thinking: false}; date_string sets its date"
    )
    system: str | None = _field(
        None, "system message that this teacher alone sees, in place of the conversation's (teacher_prompt: own)"
    )
    trust_remote_code: bool = _field(
        False, "run Python code from the model's repository; leave off unless you wrote it"
    )
    device: str = _perf("auto", "auto, cpu, cuda, cuda:1, mps")
    url: str | None = _perf(None, "OpenAI-compatible server that runs it, http://host:8000/v1; null: loaded here")
    served_name: str | None = _perf(None, "the name under which the server lists it; null: model")
    api_key_env: str | None = _perf(None, "environment variable that holds the server's key, never the key itself")


class PromptsConfig(Section):
    """Where the prompts come from."""

    path: str = _perf(
        "prompts.jsonl", "JSONL or Parquet: file, or hf://datasets/user/name/file; relative to the run folder"
    )


class VerifyConfig(Section):
    """How a response is graded: by `fire verify`, `fire eval`, pass rates and, exact alone, rollout.verifier."""

    kind: str = _field(
        "exact",
        "exact (the same text), math (math-verify), choice (A to E), code (tests in a sandbox), FILE.py:function",
    )
    pattern: str | None = _field(
        None,
        "regular expression; the last match's first group is the answer; null: all text; math and choice look for it",
    )
    timeout_s: float = _field(10.0, "seconds for one response, all its tests together; longer: reward 0", gt=0)
    memory_mb: int = _field(1024, "memory for one response (math, code, function); more: reward 0", ge=64)
    workers: int | None = _perf(None, "processes that grade; null: one per CPU", ge=1)
    allow_unsafe: bool = _perf(False, "true: run code even where it cannot be kept from the network")

    @field_validator("kind")
    @classmethod
    def _is_a_verifier(cls, value: str) -> str:
        if value not in VERIFIERS and not re.fullmatch(r".+\.py:[^\W\d]\w*", value):
            raise ValueError(f"there is no verifier {value!r}; there are: {', '.join(VERIFIERS)}, FILE.py:function")
        return value


class RolloutConfig(Section):
    """How the student writes."""

    engine: Engine = _field(
        "transformers", "transformers (exact, CPU or GPU), vllm (fast), http (the student's url) or fake (dry runs)"
    )
    writer: Literal["student", "teacher"] = _field(
        "student", "teacher: each prompt's teacher writes instead, off-policy: texts to imitate (docs/experiments.md)"
    )
    n: int = _field(4, "samples per prompt", ge=1)
    prompts_per_round: int | None = _field(None, "prompts per round; null: all of them", ge=1)
    prompts_per_shard: int = _field(64, "prompts per Parquet shard: the unit of work and of loss by a kill", ge=1)
    raw: bool = _field(False, "true: the prompt text as it is, no chat template (base models)")
    max_prompt_tokens: int = _field(2048, "longer prompts are an error, or skipped", ge=1)
    long_prompts: Literal["error", "skip"] = _field("error", "what to do with prompts over max_prompt_tokens")
    max_new_tokens: int = _field(1024, "longest response; reaching it gives finish_reason 'length'", ge=1)
    temperature: float = _field(1.0, "sampling temperature; OPD assumes 1", gt=0)
    top_p: float = _field(1.0, "nucleus sampling; OPD assumes 1 (off)", gt=0, le=1)
    top_k: int = _field(0, "top-k sampling; OPD assumes 0 (off)", ge=0)
    verifier: Literal["none", "exact"] = _field(
        "none", "exact: reward 1 if the extracted answer equals `answer`, else 0"
    )
    rows_in_flight: int = _perf(64, "sequences generated together", ge=1)

    def results(self) -> dict[str, Any]:
        """As of every section; who writes enters where that is not the student."""
        return {k: v for k, v in super().results().items() if (k, v) != ("writer", "student")}


class ScoreConfig(Section):
    """How both models are evaluated on the student's tokens."""

    engine: Engine = _field(
        "transformers", "transformers (exact), vllm, http (urls) or fake; a teacher with a url is asked there anyway"
    )
    teacher_prompt: Literal["shared", "own"] = _field(
        "shared", "shared: the teacher sees the student's prompt ids; own: the messages under its own chat template"
    )
    entropy_topk: int = _field(
        20, "tokens listed by an engine that cannot give exact entropies; those are then lower bounds", ge=1
    )
    precision: Literal["exact", "reduced"] = _field(
        "exact",
        f"reduced: logprobs, entropies and KLs are rounded to {REDUCED_BITS} mantissa bits, an error of at most "
        f"2^-{REDUCED_BITS + 1} of each, and take 40 % less disk; rollout_logprob and student_logprob stay exact",
    )
    add: tuple[str, ...] = _addon(
        (), "further columns, each group in a table of its own: topk, base, pass-rate, teacher.NAME (of several)"
    )
    topk: int = _addon(16, "most likely tokens of each model that topk stores per response token", ge=1)
    pass_rate_samples: int = _addon(3, "answers of the teacher per prompt that pass-rate grades", ge=1)
    logits_budget_mb: int = _perf(256, "no [positions, vocabulary] float tensor is larger than this", ge=1)
    tokens_per_batch: int = _perf(8192, "padded tokens per forward pass", ge=1)

    def results(self) -> dict[str, Any]:
        """As of every section, with `rounding` in place of `precision`: exact tables depend on nothing more."""
        return {k: v for k, v in super().results().items() if k != "precision"} | self.rounding

    @property
    def rounding(self) -> dict[str, Any]:
        """What fingerprints say of numbers that are not exact: nothing where they are."""
        return {} if self.precision == "exact" else {"precision": {"mantissa_bits": REDUCED_BITS}}


class WeighConfig(Section):
    """Which rule turns scores into one coefficient per token."""

    rule: str | dict[str, str] = _field(
        "uniform",
        "a name from `fire rules`, such as fire; or {keep:, weight:, advantage:} as SQL expressions; "
        "uniform: plain on-policy distillation (docs/evidence.md says why)",
    )
    name: str | None = _field(None, "folder under weights/; null: the rule's name", pattern=_NAME)
    params: dict[str, Any] = _field({}, "the rule's parameters, e.g. {percentile: 20, alpha: 1.0}")
    scope: Scope | None = _field(None, "scope of every statistic: trajectory, group, step, round; null: the rule's own")
    denominator: Denominator | None = _field(
        None, "mean over: tokens, all_tokens, sequences, constant; null: the rule's own"
    )
    constant: float | None = _field(None, "the denominator when denominator is constant", gt=0)
    truncated: Literal["keep", "drop"] = _field("keep", "trajectories cut by max_new_tokens (finish_reason 'length')")
    end_token: Literal["keep", "mask"] = _field(
        "keep", "mask: the token that ended a response has no coefficient (student and teacher end differently)"
    )
    rollout_is_cap: float | None = _field(
        None, "cap of exp(student_logprob - rollout_logprob) as a factor; null: off", gt=0
    )
    teacher: str = _field(
        "routed",
        "which teacher counts, of several: routed, average, confident (per trajectory), token (per token), or a name",
    )
    entropy: Literal["exact", "any"] = _field(
        "exact", "any: rules may read entropies that are only bounds: from a server's top-k, or an average of teachers"
    )


class LoraConfig(Section):
    """Adapters: small trained matrices B A beside each weight W, which is frozen."""

    rank: int = _field(32, "rows of A and columns of B", ge=1)
    alpha: float = _field(32.0, "the weight is W + (alpha / rank) B A", gt=0)
    targets: Literal["all-linear"] | tuple[str, ...] = _field(
        "all-linear", "all-linear: every linear layer but the head; or names of layers: [q_proj, v_proj]"
    )

    @field_validator("targets")
    @classmethod
    def _names_something(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("targets must name at least one layer, or be all-linear")
        return value


class TrainConfig(Section):
    """How the coefficients are executed."""

    weights: str | None = _field(None, "folder under weights/ to train on; null: weigh.name or the rule", pattern=_NAME)
    batch_size: int | None = _field(
        64, "trajectories per optimizer step; null: the whole round (the paper's setting)", ge=1
    )
    epochs: int = _field(1, "passes over the round's steps", ge=1)
    lr: float = _field(1e-6, "AdamW learning rate after warm-up", gt=0)
    betas: tuple[float, float] = _field((0.9, 0.999), "AdamW betas")
    eps: float = _field(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = _field(0.0, "AdamW weight decay", ge=0)
    warmup_steps: int = _field(0, "linear warm-up over global steps", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = _field("constant", "after warm-up; decay needs total_steps")
    total_steps: int | None = _field(None, "global step at which a decaying schedule reaches 0", ge=1)
    max_grad_norm: float = _field(1.0, "gradient norm clipping; 0: off", ge=0)
    lora: LoraConfig | None = _field(
        None, "train adapters alone: {rank: 32, alpha: 32, targets: all-linear}, {} for these; null: all weights"
    )
    clip: float = _field(0.2, "PPO clip range of the probability ratio", gt=0)
    dual_clip: float | None = _field(None, "lower bound of the surrogate for negative advantages; null: off", gt=1)
    compute_dtype: Literal["float32", "bfloat16", "float64"] = _field(
        "float32", "forward and backward; master weights stay fp32"
    )
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] = _field("bfloat16", "dtype of checkpoints/")
    ratio_tolerance: float | None = _field(
        None, "largest mean |log ratio| before a round's first step; null: by dtype", gt=0
    )
    max_drift_kl: float | None = _field(
        None, "end the round before a step at which KL(old || now) is above this, nats per token; null: off", gt=0
    )
    min_ess: float | None = _field(
        None, "end it where the ratios' effective sample size is below this share of the tokens; null: off", gt=0, lt=1
    )
    keep_states: Literal["last", "all"] = _field("last", "optimizer states to keep under .fire/train")
    save_every: int = _perf(0, "also save the training state every so many steps; 0: at the end of a round", ge=0)
    max_nonfinite_steps: int = _perf(
        3, "steps of a round skipped because loss or gradient is not finite; one more ends training; 0: the first", ge=0
    )
    tokens_per_microbatch: int = _perf(8192, "tokens per forward and backward pass, padding included", ge=1)
    packing: Literal["auto", "on", "off"] = _perf(
        "auto", "rows one after the other instead of padded; auto: where attention takes rows of any length (flash)"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = _perf(
        None, "how transformers computes attention while training; flash needs bfloat16; null: the model's default"
    )
    logits_budget_mb: int = _perf(256, "no [positions, vocabulary] float tensor is larger than this", ge=1)
    gradient_checkpointing: bool = _perf(False, "recompute activations in the backward pass: less memory, more time")
    tracker: Tracker | None = _perf(
        None, "trackio, wandb or tensorboard follows metrics.jsonl, on this machine; null: none"
    )
    device: str = _perf("auto", "auto, cpu, cuda, cuda:1, mps")

    def executed(self) -> dict[str, Any]:
        """The fields that a checkpoint's fingerprint has: those that act beyond what the weights were made with.

        A bound that is off is not one of them: a checkpoint from before there were bounds stays what it is.
        """
        elsewhere = {"weights", "batch_size", "keep_states"}
        off = {name for name in ("max_drift_kl", "min_ess") if getattr(self, name) is None}
        return {name: value for name, value in self.results().items() if name not in elsewhere | off}

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas {list(value)} must lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def _flash_is_half_precision(self) -> TrainConfig:
        if "flash" in (self.attention or "") and self.compute_dtype != "bfloat16":
            raise ValueError(f"attention {self.attention} needs compute_dtype: bfloat16")
        return self

    @model_validator(mode="after")
    def _decay_needs_an_end(self) -> TrainConfig:
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(f"schedule {self.schedule} needs total_steps")
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps {self.total_steps} must be more than warmup_steps {self.warmup_steps}")
        return self

    def results(self) -> dict[str, Any]:
        """As of any section; adapters enter where there are some."""
        return {k: v for k, v in super().results().items() if k != "lora" or v is not None}


class EvalConfig(Section):
    """Accuracy on held-out prompts: those with `answer`, or with what else verify.kind compares with."""

    prompts: str | dict[str, str] | None = _perf(
        None, "held-out prompts, as prompts.path; several: {NAME: FILE}; null: no evaluation in `fire run`"
    )
    limit: int | None = _field(None, "the first so many prompts; null: all", ge=1)
    greedy: bool = _field(True, "one greedy answer per prompt")
    n: int = _field(4, "sampled answers per prompt; 0: none", ge=0)
    k: tuple[int, ...] = _field((1,), "k of pass@k and maj@k, each at most n")
    temperature: float = _field(1.0, "sampling temperature", gt=0)
    max_new_tokens: int | None = _field(None, "longest answer; null: rollout.max_new_tokens", ge=1)

    @model_validator(mode="after")
    def _asks_for_something(self) -> EvalConfig:
        if not self.greedy and not self.n:
            raise ValueError("greedy: false with n: 0 leaves nothing to evaluate")
        return self

    @field_validator("prompts")
    @classmethod
    def _names_of_benchmarks(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for name in value if isinstance(value, dict) else ():
            if not is_benchmark(name):
                raise ValueError(f"{name!r} cannot be the name of a benchmark (letters, digits, ., _, + and -)")
        return value


class VllmConfig(Section):
    """Engine vllm: one process per model, in an environment that may be another than this one."""

    python: str | None = _perf(None, "interpreter of an environment that has vllm; null: this one")
    max_model_len: int | None = _perf(None, "longest prompt and response together; null: what the stage needs", ge=2)
    max_num_seqs: int = _perf(256, "sequences generated together", ge=1)
    max_num_batched_tokens: int | None = _perf(None, "tokens per forward pass; null: vllm's own", ge=1)
    gpu_memory_utilization: float = _perf(0.9, "share of the GPU's memory", gt=0, le=1)
    tensor_parallel_size: int = _perf(1, "GPUs that share one model", ge=1)
    enforce_eager: bool = _perf(False, "true: no CUDA graphs; starts faster, generates slower")
    keep: bool = _perf(False, "true: stay on the GPU between stages and reload weights, if training has another GPU")
    cpu_kv_cache_gb: float = _perf(2.0, "size of the key-value cache without a GPU", gt=0)
    start_timeout: float = _perf(900.0, "seconds until the engine must be ready", gt=0)
    args: dict[str, Any] = _perf({}, "further arguments of vllm.LLM")


class HttpConfig(Section):
    """Models behind a url: how hard a server is asked and how long it may be away."""

    concurrency: int = _perf(32, "requests in flight per server", ge=1)
    timeout: float = _perf(600.0, "seconds for one answer", gt=0)
    deadline: float = _perf(120.0, "seconds without any success after which the command stops", gt=0)


class RayConfig(Section):
    """`--ray`: where engines are placed on a Ray cluster."""

    address: str | None = _perf(None, "of an existing cluster, as in ray.init; null: a local one")
    workers: int | None = _perf(None, "engines; null: one per GPU, or per `threads` CPUs", ge=1)


class Config(Section):
    """The whole of `fire.yaml`."""

    seed: int = _field(0, "everything random is a function of this", ge=0)
    threads: int | None = _perf(None, "CPU threads; bytes repeat only for an equal number; null: torch's default", ge=1)
    student: ModelConfig
    teacher: ModelConfig | None = None
    teachers: dict[str, ModelConfig] = _field(
        {}, "several teachers by name, for prompts that name one as `teacher`; keys of each as for the others"
    )
    base: ModelConfig | None = _field(
        None, "Reference model of base_logprob (score.add: [base]); null: the given student"
    )
    prompts: PromptsConfig = PromptsConfig()
    verify: VerifyConfig = VerifyConfig()
    rollout: RolloutConfig = RolloutConfig()
    score: ScoreConfig = ScoreConfig()
    weigh: WeighConfig = WeighConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    vllm: VllmConfig = VllmConfig()
    http: HttpConfig = HttpConfig()
    ray: RayConfig = RayConfig()

    @field_validator("teachers")
    @classmethod
    def _names_of_teachers(cls, value: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        taken = {TEACHER, "student", "base", "routed", "average", "confident", "token", "all"}
        for name in value:
            if name in taken or not _ROUTE.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of a teacher (letters, digits, - and _; not a keyword)")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        known = {TEACHER: self.teacher} if self.teacher else {}
        known |= self.teachers
        for name in self.score.add:
            there = (*ADDED, *(f"{ADDED_TEACHER}{n}" for n in known))
            if name not in there:
                raise ValueError(f"score.add: there are no further columns {name!r}; there are: {', '.join(there)}")
        if self.weigh.teacher not in ("routed", "average", "confident", "token", *known):
            kinds = ", ".join(("routed", "average", "confident", "token", *known))
            raise ValueError(f"weigh.teacher: {self.weigh.teacher!r} is none of {kinds}")
        for model, who in ((self.student, "student"), (self.base, "base")):
            if model is not None and model.system is not None:
                raise ValueError(f"{who}.system: only a teacher has a system message of its own")
        if self.score.teacher_prompt == "shared" and any(
            t is not None and t.system is not None for t in known.values()
        ):
            raise ValueError("a teacher's system message needs score.teacher_prompt: own")
        if self.rollout.writer == "teacher" and self.score.teacher_prompt == "own":
            raise ValueError("rollout.writer: teacher needs score.teacher_prompt: shared")
        for engine, where in ((self.rollout.engine, "rollout"), (self.score.engine, "score")):
            if engine == "http" and self.student.url is None:
                raise ValueError(f"{where}.engine: http needs student.url")
        if self.score.engine == "http" and any(t is not None and t.url is None for t in known.values()):
            raise ValueError("score.engine: http needs the url of every teacher")
        return self

    @field_validator("eval")
    @classmethod
    def _k_within_n(cls, value: EvalConfig) -> EvalConfig:
        if value.n and any(k < 1 or k > value.n for k in value.k):
            raise ValueError(f"eval.k {list(value.k)} must lie between 1 and eval.n = {value.n}")
        return value

    @property
    def weights_name(self) -> str:
        """The folder under `weights/` that `weigh` writes."""
        rule = self.weigh.rule
        if self.weigh.name or not isinstance(rule, str) or is_expression(rule):
            return self.weigh.name or "expression"
        # A rule of a file, `path/mine.py:Sharp` or `path/mine.py`, is called by its class, else by its file.
        names = [re.sub(r"^.*?([^/]+?)\.py(?::(\w+))?$", lambda m: (m[2] or m[1]).lower(), n) for n in split_rule(rule)]
        return re.sub(r"[^A-Za-z0-9._+-]", "-", "+".join(names))

    @property
    def trained_weights(self) -> str:
        """The folder under `weights/` that `train` executes: the lineage of the run."""
        return self.train.weights or self.weights_name


def is_benchmark(name: str) -> bool:
    """True for what may name an evaluation: a folder under evals/, where rounds have folders too."""
    return bool(re.fullmatch(_NAME, name)) and name != "start" and not name.startswith("round-")


def split_rule(text: str) -> list[str]:
    """The components of a rule's text: `fire+mine.py:Sharp` is two. A path with a + in it begins with / or ./."""
    pieces = [m[1].strip() for m in _COMPONENT.finditer(text)]
    return pieces if text.endswith("+") or len(pieces) == 1 else pieces[:-1] if pieces[-1] == "" else pieces


def is_expression(text: str) -> bool:
    """True for `weight = ...; keep = ...`, which is no name of a rule; a path may hold an equals sign."""
    first = text.partition("=")[0].strip()
    return "=" in text and (first in RULE_PARTS or ".py" not in text)


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read `fire.yaml`, apply `a.b=c` overrides, validate. Raises ConfigError naming the key and the nearest match."""
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "there is no fire.yaml",
            where=where,
            fix=f"fire init {path.parent} --student MODEL --teacher MODEL --prompts FILE",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        fix = "give the run directory that `fire init` made"
        raise ConfigError(f"fire.yaml cannot be read: {error}", where=where, fix=fix) from None
    values = parse_yaml(text, "fire.yaml", where)
    if not isinstance(values, dict):
        fix = f"remove it, then: fire init {path.parent} --student MODEL --teacher MODEL --prompts FILE"
        raise ConfigError("fire.yaml must hold keys and values", where=where, fix=fix)
    for name, field in Config.model_fields.items():
        # A section whose keys are all commented out is one without changes.
        whole = _section_of(field.annotation) is field.annotation or _is_mapping(field.annotation)
        if name in values and values[name] is None and whole:
            values[name] = {}
    for override in overrides:
        _override(values, override)
    return parse_config(values, where)


def parse_yaml(text: str, what: str, where: str | None = None) -> Any:
    """The plain value of YAML text. Raises ConfigError for bad YAML, a key given twice, or aliases without end."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{what} is not valid YAML: {error}", where=where, fix="correct the YAML") from None
    pending, count = [value], 0
    while pending:
        node = pending.pop()
        count += 1
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if count > _LARGEST:
            text = f"{what} is too large: more than {_LARGEST} values"
            raise ConfigError(text, where=where, fix="write values instead of YAML aliases (*name)")
    return value


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the later one would silently replace a whole section."""


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_keys)


def parse_config(values: dict[str, Any], where: str) -> Config:
    """Validate plain values. Raises ConfigError listing every wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError("; ".join(lines), where=where, fix="edit fire.yaml, or use --set key=value") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set takes key=value, not {override!r}", fix="--set train.lr=1e-5")
    value = text if _is_text(key) and text != "null" else parse_yaml(text, f"the value of --set {key}")
    node = values
    *parents, last = key.split(".")
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part} is not a section", fix=f"--set {part}=VALUE")
    node[last] = value


def _is_text(key: str) -> bool:
    """True for a field that takes text alone: its value on the command line is not read as YAML."""
    section, _, name = key.rpartition(".")
    top, _, inner = section.partition(".")
    annotation = Config.model_fields[top].annotation if top in Config.model_fields else None
    model = _section_of(annotation) if bool(inner) == _is_mapping(annotation) else None
    if model is None or name not in model.model_fields:
        return False
    annotation = model.model_fields[name].annotation
    return set(getattr(annotation, "__args__", (annotation,))) <= {str, type(None)} and annotation is not type(None)


def _explain(error: ErrorDetails) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{key!r} is missing"
    if not path:  # about several sections together
        return error["msg"].removeprefix("Value error, ")
    return f"{key!r}: {error['msg']}" + (
        "" if isinstance(error["input"], dict) else f", not {reprlib.repr(error['input'])}"
    )


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            for candidate in (annotation, *getattr(annotation, "__args__", ())):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    model = candidate
    return list(model.model_fields)


def render_config(values: dict[str, Any]) -> str:
    """The commented text of a new `fire.yaml`: every field with its description, `values` over the defaults."""
    lines = ["# Settings of this run. `fire rollout|score|weigh|train|run` read it; --set key=value wins.", ""]
    for name, field in Config.model_fields.items():
        given = values.get(name)
        section = _section_of(field.annotation)
        about = field.description or (section.__doc__ if section else "") or ""
        if section is None:
            lines.append(_line(name, field.default if given is None else given, field.description, ""))
        elif _is_mapping(field.annotation):
            lines += ["", f"# {about}", f"{name}:" if given else f"{name}: {{}}"]
            for key, inner in (given or {}).items():
                quoted = yaml.safe_dump(key, width=10**9).splitlines()[0]  # `no` would be read as false
                lines += [f"  {quoted}:", *_rendered(section, inner, "    ")]
        elif given is None and section is not field.annotation:
            none = f"{about};" if field.description else f"{about} null: none;"
            lines += ["", f"# {none} else keys as for the others.", f"{name}: null"]
        else:
            lines += ["", f"# {about}", f"{name}:", *_rendered(section, given or {}, "  ")]
    return "\n".join(lines) + "\n"


def _rendered(section: type[BaseModel], given: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, sub in section.model_fields.items():
        default = None if sub.is_required() else sub.default
        lines.append(_line(key, given.get(key, default), sub.description, indent))
    return lines


def _is_mapping(annotation: Any) -> bool:
    """True for sections by name."""
    return getattr(annotation, "__origin__", None) is dict


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _line(key: str, value: Any, description: str | None, indent: str) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    if len(text.splitlines()) > 1:  # line breaks inside a value: as escapes
        text = yaml.safe_dump(plain, default_flow_style=True, width=10**9, default_style='"').strip()
    return f"{indent}{key}: {text}" + (f"  # {description}" if description else "")
