"""One frozen, strict model per TOML section, and ``Config`` that holds them: the only list of settings.

Attribute paths equal TOML keys (``config.training.max_tokens``), except ``resume.from``, which is
``config.resume.from_``. Checks that need more than one setting live in ``rules``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from retrain.config.ranges import (
    Alpha,
    Bound,
    Count,
    Counts,
    Decay,
    Levels,
    LevelsOrInherited,
    Limit,
    Name,
    Names,
    Oversample,
    Peak,
    PositiveShare,
    Rank,
    RankOrAuto,
    Ranks,
    Rates,
    Seconds,
    Seed,
    SeedOrDrawn,
    Seeds,
    Share,
    SignedShare,
    SignedWeight,
    Size,
    StringOrStrings,
    Strings,
    Table,
    TableOrJson,
    Tables,
    Temperature,
    Uncertainty,
    Values,
    Weight,
)


class Section(BaseModel):
    """What every section has in common: strict types, no unknown key, no change after construction."""

    # Built when first used: most models are only ever parts of Config.
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True
    )


class Backend(Section):
    """Who learns, and where."""

    backend: Name = Field(default="local", description="The learner: local is PyTorch with PEFT; or your own.")
    devices: Name = Field(default="gpu:0", description="Where to compute: gpu:N or cpu.")
    adapter_path: str = Field(default="", description="Folder of the final adapter; empty: <log_dir>/adapter.")
    options: Table = Field(default_factory=dict, description="Options that a backend defines for itself.")
    max_concurrent: Size = Field(default=4, description="Calls to a remote backend at once, all runs together.")


class Model(Section):
    """The base model that the adapter is trained on."""

    model: Name = Field(
        default="Qwen/Qwen3-4B-Instruct-2507",
        description="A Hugging Face model id, a local folder, or retrain/tiny for the embedded model.",
    )
    base_url: str = Field(default="", description="URL of a remote training service.")
    lora_rank: Rank = Field(default=32, description="Rank of the LoRA adapter.")
    revision: str = Field(default="", description="Branch, tag or commit of the model; empty: its main branch.")
    quantization: Literal["", "nf4", "fp4"] = Field(
        default="", description="4-bit format of the frozen base model (QLoRA, on CUDA); empty: none."
    )
    trust_remote_code: bool = Field(default=False, description="Code that ships with a model never runs: false.")


class Lora(Section):
    """The adapter."""

    alpha: Limit = Field(default=0, description="LoRA alpha; 0: twice the rank.")
    dropout: Decay = Field(default=0.0, description="Dropout probability inside the adapter.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    init_from: str = Field(
        default="", description="Folder of a PEFT LoRA adapter to start from; empty: a fresh adapter."
    )


class Algorithm(Section):
    """How rewards become token-level advantages."""

    advantage_mode: Name = Field(
        default="maxrl",
        description="Advantage of a rollout: grpo, maxrl, grpo_std, rloo, reinforce_pp or your own.",
    )
    transform_mode: Name = Field(
        default="gtpo_sepa",
        description="Credit of tokens: none, gtpo, gtpo_{hicra,sepa,sepa_amp,sepa_amp_c}, entropy_mask or your own.",
    )
    algorithm_mode: str = Field(default="", description="One algorithm in place of both modes; empty: none.")
    uncertainty_kind: Uncertainty = Field(
        default="surprisal", description="Uncertainty: surprisal, predictive_variance or shannon_entropy."
    )
    params: Table = Field(default_factory=dict, description="Parameters of algorithm_mode.")
    advantage_params: Table = Field(default_factory=dict, description="Parameters of a plug-in advantage.")
    transform_params: Table = Field(
        default_factory=dict, description="Parameters of the transform: rho of entropy_mask, a plug-in's own."
    )


class Training(Section):
    """The training loop."""

    seed: SeedOrDrawn = Field(default=-1, description="Seed of sampling and data order; -1: drawn and recorded.")
    max_steps: Count = Field(default=500, description="Training steps of the run, resumed parts included.")
    batch_size: Size = Field(default=8, description="Tasks per step.")
    group_size: int = Field(default=16, ge=2, le=65536, description="Rollouts sampled per task.")
    max_tokens: Count = Field(default=2048, description="Longest rollout, in sampled tokens.")
    temperature: Temperature = Field(default=0.7, description="Sampling temperature of training rollouts.")
    top_p: PositiveShare = Field(default=1.0, description="Probability mass to sample from; 1: all of it.")
    lr: PositiveShare = Field(default=4e-5, description="Learning rate of AdamW.")
    weight_decay: Weight = Field(default=0.0, description="Weight decay of AdamW.")
    max_examples: Limit = Field(default=0, description="Tasks of the training set to use; 0: all.")
    save_every: Limit = Field(default=20, description="Steps between checkpoints; 0: only at the end.")
    keep_checkpoints: Count = Field(default=3, description="Newest checkpoints to keep.")
    warmup_steps: Limit = Field(default=0, description="Steps over which the learning rate rises to lr.")
    lr_schedule: Name = Field(
        default="constant", description="Learning rate after the warm-up: constant, linear or cosine."
    )
    lr_final_share: Share = Field(
        default=0.0, description="Share of lr that linear and cosine approach at the end: what step max_steps would have."
    )
    updates_per_batch: Size = Field(default=1, description="Optimizer updates per step, each over the whole batch.")
    truncated: Name = Field(
        default="score",
        description="Rollouts cut at max_tokens: score as they are, mask their credit, or soft punishment.",
    )
    soft_tokens: Limit = Field(
        default=0, description="Tokens before max_tokens where truncated = soft begins; 0: a fifth of it."
    )
    min_signal: Share = Field(
        default=0.0,
        description="Share of batch_size groups that must carry a signal before the step trains; 0: any.",
    )
    max_oversample: Oversample = Field(
        default=3.0, description="Most tasks to sample for min_signal, as a multiple of batch_size."
    )
    stop: Names = Field(default=(), description="Texts that end a rollout, besides the model's end tokens.")
    microbatch_tokens: Limit = Field(default=0, description="Tokens per forward pass; 0: from the memory plan.")
    phase_timeout_s: Seconds = Field(
        default=1800.0, description="Seconds that sampling, or scoring, a step may take before the run fails."
    )
    deterministic: bool = Field(
        default=False, description="CUDA's deterministic kernels: slower, needed there for byte-exact resume."
    )


class Optimizer(Section):
    """AdamW over the adapter's parameters."""

    beta1: Decay = Field(default=0.9, description="Decay of the mean of the gradient.")
    beta2: Decay = Field(default=0.95, description="Decay of the mean of the squared gradient.")
    eps: PositiveShare = Field(default=1e-8, description="Number added to the denominator of the update.")


class Loss(Section):
    """The policy loss."""

    kind: Name = Field(
        default="importance_sampling", description="Policy loss: importance_sampling, ppo, gspo or cispo."
    )
    agg: Literal["token_mean", "sequence_mean", "fixed"] = Field(
        default="token_mean",
        description="Mean over tokens, mean of the rollouts' means, or sum over batch * group * max_tokens.",
    )
    clip_low: Share | None = Field(
        default=None, description="How far the ratio may fall below 1; unset: ppo 0.2, gspo 3e-4, cispo 1."
    )
    clip_high: Weight | None = Field(
        default=None, description="How far the ratio may rise above 1; unset: ppo 0.2, gspo 4e-4, cispo 4."
    )
    dual_clip: Weight = Field(
        default=0.0, description="Bound of the ratio at negative advantages, for ppo, above 1; 0: off."
    )
    kl: Weight = Field(default=0.0, description="Weight of the KL divergence from the base model; 0: off.")
    kl_kind: Literal["k1", "k2", "k3"] = Field(default="k3", description="Estimator of the KL divergence.")
    entropy: SignedWeight = Field(default=0.0, description="Weight of an entropy bonus; 0: off.")
    tis_cap: Weight = Field(default=0.0, description="Cap of truncated importance sampling; 0: off.")
    grad_clip: Weight = Field(default=1.0, description="Largest norm of the gradient; 0: not clipped.")


class Gtpo(Section):
    """Weighting of tokens by their uncertainty."""

    beta: Weight = Field(default=0.1, description="Strength of the weighting; 0: off.")


class Hicra(Section):
    """Amplification of planning tokens."""

    alpha: Weight = Field(default=0.2, description="Strength of the amplification; 0: off.")


class Sepa(Section):
    """Schedule of selective uncertainty pooling over execution tokens."""

    steps: Limit = Field(default=500, description="Steps of the ramp from 0 to 1; 0: the ramp stays at 0.")
    schedule: Literal["linear", "auto"] = Field(
        default="linear", description="The ramp alone, or also the fall of the execution tokens' variance."
    )
    delay_steps: Limit = Field(default=50, description="Steps before the ramp begins.")
    correct_rate_gate: SignedShare = Field(
        default=0.1,
        description="Correct rate of a step that opens the gate for good; 0 or less: always open.",
    )
    ema_decay: Decay = Field(default=0.99, description="Decay of the variance's moving average, for auto.")
    threshold: PositiveShare = Field(default=0.2, description="Share of the first variance where auto acts.")
    warmup_updates: Count = Field(default=50, description="Steps that fix the first variance, for auto.")


class Planning(Section):
    """Which tokens count as planning."""

    detector: Name = Field(
        default="regex", description="Finds planning tokens: regex by phrases, semantic by meaning; or your own."
    )
    model: Name = Field(
        default="all-MiniLM-L6-v2", description="Embedding model of the semantic detector: a name or a folder."
    )
    threshold: SignedShare = Field(default=0.02, description="Margin of similarity of the semantic detector.")


class Inference(Section):
    """Who samples, and how."""

    engine: Name = Field(default="pytorch", description="The sampler: pytorch runs inside the process; or your own.")
    url: str = Field(default="", description="Server URL of engines other than pytorch.")
    attention_kernel: Literal["default", "flash", "triton", "tk", "cutlass"] = Field(
        default="default", description="Attention: PyTorch picks the kernel; flash refuses a device without FlashAttention."
    )
    dtype: Literal["auto", "bf16", "fp32", "fp8", "fp4"] = Field(
        default="auto", description="Number format of the model; auto: bf16 on CUDA, fp32 on the CPU."
    )
    kv_cache_dtype: Literal["auto", "bf16", "fp8", "int8"] = Field(
        default="auto", description="Number format of the KV cache; auto: the model's; fp8 holds twice the tokens."
    )
    prefix_caching: bool = Field(default=True, description="Compute a prompt once for all of its rollouts.")
    max_rows: Limit = Field(default=0, description="Rollouts sampled at once; 0: from the memory plan.")


class Data(Section):
    """The training tasks."""

    source: Name = Field(
        default="math",
        description="Tasks: math, gsm8k, arithmetic, jsonl, hf, reasoning_gym, mixture or your own source.",
    )
    path: str = Field(
        default="",
        description="File or folder of the data, beside the TOML or in the working directory; for hf also a Hub id.",
    )
    subset: str = Field(default="", description="For hf: the data set's configuration; empty: its default.")
    split: Name = Field(default="train", description="The part of the data to train on.")
    shuffle: bool = Field(default=True, description="A new order in every epoch, fixed by training.seed.")
    subjects: StringOrStrings = Field(default=(), description='Subjects of math; empty: five, "all": all.')
    instruction: str = Field(default="", description="Text after each problem; empty: the source's own.")
    system: str = Field(default="", description="System message before each problem; empty: none.")
    template_args: Table = Field(default_factory=dict, description="Arguments of the model's chat template.")
    levels: Levels = Field(default=(2,), description="Difficulty levels of arithmetic.")
    fields: dict[str, Name] = Field(
        default_factory=dict,
        description="For jsonl and hf: the field for our question, answer and id; a.b looks inside a.",
    )
    generators: Table = Field(
        default_factory=dict,
        description="For reasoning_gym: generator = { weight = 1.0, ... its own settings }.",
    )
    size: Count = Field(default=1000, description="For reasoning_gym: number of tasks.")
    seed: Seed = Field(default=0, description="For reasoning_gym: seed that the tasks are generated from.")
    mixture: Tables = Field(
        default=(),
        description="For mixture: tables with source, weight, name, reward and other keys of [data].",
    )


class Environment(Section):
    """Multi-turn environments."""

    provider: str = Field(default="", description="Your own environment; empty: one question, one answer.")
    id: str = Field(default="", description="The environment's id at its provider.")
    args: TableOrJson = Field(default_factory=dict, description="Arguments of the environment.")
    max_turns: int = Field(default=-1, ge=-1, le=65536, description="Turns per rollout; -1: the environment's.")
    auto_install: bool = Field(default=False, description="Install the environment when it is missing.")


class Reward(Section):
    """How rollouts are scored."""

    type: Name = Field(
        default="match",
        description="match compares boxed answers as text, math by value; custom, composite, reasoning_gym.",
    )
    parts: Tables = Field(
        default=(), description="For composite: tables with name, type, weight, gate and keys of the type."
    )
    penalty: Bound = Field(default=0.0, description="For composite: the reward when a gate fails.")
    judge_model: str = Field(default="", description="Model that judges (type judge).")
    custom_module: str = Field(default="", description="Module of your reward function (type custom).")
    custom_function: Name = Field(default="score", description="Your reward function (type custom).")
    correct_at: Bound | None = Field(
        default=None, description="A reward above this is correct; unset: 0.5 for rewards in [0, 1]."
    )
    timeout_s: Seconds = Field(default=30.0, description="Seconds that scoring one rollout may take.")
    max_error_rate: Share = Field(default=0.1, description="Share of a step's rewards that may fail.")
    isolate: bool = Field(default=True, description="Run a custom reward in a child that can be killed.")


class Eval(Section):
    """Held-out evaluation."""

    source: str = Field(default="", description="Where held-out tasks come from; empty: no evaluation.")
    path: str = Field(default="", description="A local file or folder of the held-out data.")
    split: Name = Field(default="test", description="The part of the data to evaluate on.")
    levels: LevelsOrInherited = Field(default=(), description="Levels of arithmetic; empty: data.levels.")
    every: Limit = Field(default=0, description="Steps between evaluations; 0: only at the start and the end.")
    examples: Count = Field(default=256, description="Tasks of an evaluation, the same every time.")
    skip: Limit = Field(default=0, description="Held-out tasks, in their seeded order, that are passed over.")
    samples: Size = Field(default=1, description="Rollouts per task of an evaluation.")
    temperature: Temperature | None = Field(default=None, description="Sampling temperature; unset: training's.")
    max_tokens: Limit = Field(default=0, description="Longest answer, in sampled tokens; 0: training's.")
    seed: Seed = Field(default=0, description="Seed of the evaluation's own tasks and sampling noise.")
    suites: Tables = Field(
        default=(),
        description="Further held-out sets: tables with name, source and other keys of [eval] and [data].",
    )


class Backpressure(Section):
    """Batch size that follows measured throughput."""

    enabled: bool = Field(default=False, description="Adapt the batch size to measured throughput.")
    controller: Name = Field(default="usl", description="What chooses the batch size: usl, or one of your own.")
    warmup_steps: Limit = Field(default=10, description="Steps to measure before the first fit; 1 to 3 act as 4, 0: none.")
    ema_decay: Decay = Field(default=0.9, description="Decay of the logged throughput's moving average.")
    throttle_margin: PositiveShare = Field(default=0.85, description="Share of the best concurrency to use.")
    increase_margin: PositiveShare = Field(default=0.5, description="Share of the target to grow below.")
    min_batch_size: Size = Field(default=1, description="Smallest batch size.")
    max_batch_size: Size = Field(default=64, description="Largest batch size.")
    peak_gflops: Peak = Field(default=0.0, description="Peak GFLOP/s of the device; 0: no roofline hints.")
    peak_bw_gb_s: Peak = Field(default=0.0, description="Peak GB/s of the device's memory; 0: no hints.")


class Squeeze(Section):
    """Analysis and compression of a LoRA adapter's rank."""

    min_variance_retention: PositiveShare = Field(default=0.95, description="Share of variance to keep.")
    adapter_path: str = Field(default="", description="Folder of the adapter to analyse.")
    source_rank: RankOrAuto = Field(default=0, description="The adapter's rank; 0: model.lora_rank.")
    target_ranks: Ranks = Field(default=(), description="Ranks to evaluate; empty: the powers of two.")
    output_path: str = Field(default="", description="Folder of the compressed adapter; empty: none.")
    compress_to: RankOrAuto = Field(default=0, description="Rank to compress to; 0: the recommended one.")
    device: Name = Field(default="cpu", description="Device that computes the decompositions.")


class Resume(Section):
    """Continuing a run."""

    from_: str = Field(default="", alias="from", description="Folder of the run to continue; empty: none.")


class Logging(Section):
    """What a run writes, and where."""

    log_dir: Name = Field(default="logs/train", description="The run directory.")
    wandb_project: str = Field(default="", description="Project at wandb; setting it turns wandb on.")
    wandb_run_name: str = Field(default="", description="Name of the run at wandb; empty: the condition.")
    wandb_entity: str = Field(default="", description="User or team at wandb.")
    wandb_group: str = Field(default="", description="Group of the run at wandb.")
    wandb_tags: str = Field(default="", description="Tags of the run at wandb, separated by commas.")
    trackers: Strings = Field(default=(), description="Experiment trackers besides the run directory.")
    strategic_grams: str = Field(
        default="", description="Planning phrases, as a JSON array or with commas; empty: the built-in ones."
    )
    generations: Limit = Field(default=8, description="Rollouts per step that are written as text.")
    rollouts: bool = Field(default=True, description="Store every rollout compactly, for replay.")
    rollouts_mb: Limit = Field(
        default=2000,
        description="Megabytes of stored rollouts, beyond which the oldest steps are dropped; 0: no limit.",
    )


class Plugins(Section):
    """Where your own modules are found."""

    search_paths: Strings = Field(
        default=("plugins",),
        description="Folders, relative to the TOML's folder, then the working directory.",
    )


class Tune(Section):
    """Values to choose from for each condition before a campaign, on seeds and tasks of their own."""

    lr: Rates = Field(default=(), description="Learning rates to try for each condition.")
    field: str = Field(default="", description="Another setting to try, by its dotted key; empty: training.lr.")
    values: Values = Field(default=(), description="Values of that setting to try.")
    seeds: Seeds = Field(default=(1, 2, 3), description="Seeds of the trials, none of them one of campaign.seeds.")
    max_steps: Limit = Field(default=0, description="Training steps of a trial; 0: those of the campaign.")
    split: str = Field(
        default="",
        description="Part of the held-out data to choose on; empty: the tasks that follow the evaluation's own.",
    )


class Campaign(Section):
    """Many runs: conditions times seeds."""

    seeds: Seeds = Field(
        default=(42, 101, 202, 303, 404, 505, 606, 707), description="Seeds that every condition runs with."
    )
    max_steps: Count = Field(default=500, description="Training steps of every run.")
    parallel: bool = Field(default=False, description="Run several runs at once.")
    max_workers: Limit = Field(default=0, description="Most runs at once; 0: as many as fit the devices.")
    stagger_seconds: Peak = Field(default=0.0, description="Seconds between two starts.")
    launcher: Literal["serial", "processes", "ray"] = Field(default="serial", description="Starts the runs.")
    ray_address: str = Field(
        default="", description="Address of a running Ray cluster; empty: RAY_ADDRESS, else one on this machine."
    )
    threads: Limit = Field(
        default=0, description="CPU threads of each run; 0: the cores shared among the runs at once."
    )
    baseline: str = Field(default="", description="Condition to compare with; empty: the first.")
    alpha: Alpha = Field(default=0.05, description="Rate of false verdicts over all comparisons with the baseline.")
    smallest_effect: PositiveShare = Field(
        default=0.02, description="Smallest difference of the outcome that matters; 0.02 is two points."
    )
    test: Literal["welch", "paired"] = Field(
        default="welch", description="Test of a difference: Welch's t, or the t of differences paired by seed."
    )
    looks: Counts = Field(
        default=(),
        description="Numbers of seeds after which results are judged, the last being all; empty: once, when all are done.",
    )
    threshold: Share | None = Field(
        default=None, description="Held-out accuracy to which the steps are counted; unset: they are not."
    )
    deviation: Share = Field(
        default=0.0,
        description="Standard deviation of the outcome over seeds, to tell beforehand what can be seen; 0: unknown.",
    )
    pilot: str = Field(default="", description="An earlier campaign or folder of runs to take the deviation from.")
    conditions: Tables = Field(
        default=(),
        description="Modes and overrides of any other setting; empty: the standard five conditions.",
    )
    tune: Tune = Field(default=Tune(), description="Values to choose from before the campaign.")


class Config(Section):
    """A whole configuration. ``campaign`` and ``squeeze`` are None unless the TOML has that section."""

    backend: Backend = Backend()
    model: Model = Model()
    lora: Lora = Lora()
    algorithm: Algorithm = Algorithm()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    gtpo: Gtpo = Gtpo()
    hicra: Hicra = Hicra()
    sepa: Sepa = Sepa()
    planning: Planning = Planning()
    inference: Inference = Inference()
    data: Data = Data()
    environment: Environment = Environment()
    reward: Reward = Reward()
    eval: Eval = Eval()
    backpressure: Backpressure = Backpressure()
    squeeze: Squeeze | None = None
    resume: Resume = Resume()
    logging: Logging = Logging()
    plugins: Plugins = Plugins()
    campaign: Campaign | None = None
