"""What a run is made of: frozen dataclasses, one per section of the YAML.

Standard library only, so that a configuration can be checked on a login node without torch.
Every field says its unit and the rule it obeys; `validate.py` enforces the rules, all at once.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from moesys.config.batch_schema import BatchConfig
from moesys.config.component_schema import ComponentConfig
from moesys.config.data_schema import DataConfig
from moesys.config.dispatch_schema import DispatchConfig
from moesys.config.optim_schema import OptimConfig, ScheduleConfig
from moesys.config.placement_schema import PlacementConfig


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How expert load is kept even. Each rule is off at 0 and the rules add up.

    The first three weigh E * sum_i f_i P_i (Switch, GShard), per layer and summed over layers, and differ in where f_i is
    counted.
    """

    micro_loss_coef: float = 0.0
    """f_i of one rank's micro-batch."""
    sequence_loss_coef: float = 0.0
    """f_i of each sequence (DeepSeek-V3)."""
    global_loss_coef: float = 0.0
    """f_i of all ranks and the micro-steps of a step so far, which lets experts specialise (2501.11873)."""
    device_loss_coef: float = 0.0
    """The same of groups of experts in the place of experts, counted as global (DeepSeekMoE)."""
    device_groups: int = 1
    """With device_loss_coef: equal groups of experts in a row, one for each device; divides num_experts."""
    width_loss_coef: float = 0.0
    """f_i times the expert's width over the mean, so that narrow experts serve more; counted as global (HMoE, 2408.10681).
    Needs expert_widths."""
    z_loss_coef: float = 0.0
    """Weight of mean(logsumexp(logits)^2) (ST-MoE)."""
    bias_update_rate: float = 0.0
    """Step of the aux-loss-free selection bias (DeepSeek-V3), once per optimizer step."""
    bias_end_step: int = 0
    """After so many optimizer steps the bias stays as it is (DeepSeek-V3: for the last 3 %); 0 = never."""

    @property
    def has_loss(self) -> bool:
        """Whether a balance loss is optimised."""
        coefficients = (self.micro_loss_coef, self.sequence_loss_coef, self.global_loss_coef)
        return any((*coefficients, self.device_loss_coef, self.width_loss_coef))


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The MoE layer: route, dispatch, experts, combine."""

    num_experts: int
    """Routed experts per layer; a multiple of parallel.ep."""
    experts_by_layer: tuple[int, ...] | None = None
    """Routed experts of each MoE layer, first to last, where they differ (pyramid of PR-MoE, 2201.05596): multiples of
    parallel.ep, of which num_experts is the largest. null = num_experts in every layer."""
    top_k: int
    """Experts per token, 1..num_experts."""
    d_expert: int
    """Hidden width of one routed expert."""
    expert_widths: tuple[int, ...] | None = None
    """Hidden widths of equal classes of routed experts, numbered class by class (HMoE, 2408.10681), of which d_expert is the
    mean; each rank of ep has as many of each. null = all are d_expert wide."""
    num_shared_experts: int = 0
    """Always-on experts of width d_expert, computed as one SwiGLU of num_shared_experts * d_expert."""
    shared_gate: Literal["none", "sigmoid", "softmax"] = "none"
    """How shared experts join the routed ones: none = added; sigmoid = times sigmoid(w x) (Qwen2-MoE); softmax = both
    weighed by the softmax of two learned scores (residual MoE of PR-MoE, 2201.05596)."""
    d_latent: int | None = None
    """Width in which rows travel and routed experts work, projected down before and up after. null = d_model."""
    zero_experts: int = 0
    """Experts that give nothing, from which a router chooses too (MoE++, 2410.07348)."""
    copy_experts: int = 0
    """Experts that give the token itself."""
    constant_experts: int = 0
    """Experts that give a learned mixture of the token and a learned vector."""
    router: ComponentConfig
    """The router class, e.g. moesys.moe.routers.TopKRouter, and its options."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity_factor: float | None = None
    """null = dropless. Otherwise, in training, each rank sends at most ceil(factor * T * K / E) rows to an expert."""
    capacity_policy: Literal["drop", "pad"] = "drop"
    """With a capacity: drop = only rows that exist travel; pad = every expert gets exactly capacity rows,
    so sizes are known without a device-to-host sync. Both drop what is over capacity."""
    capacity_priority: Literal["weight", "order", "random"] = "weight"
    """With a capacity: an expert keeps the slots of largest weight, the first ones (GShard, Switch), or random ones
    (random token selection, 2109.10465)."""
    expert_backend: Literal["auto", "grouped_mm", "loop"] = "auto"
    """auto = both are timed on this run's shapes at start-up and the faster one is kept for the whole run."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each class of routed experts."""
        return self.expert_widths or (self.d_expert,)

    @property
    def width_of_choice(self) -> list[int]:
        """Of all that a router chooses from; without a feed-forward 0."""
        per_class = self.num_experts // len(self.widths)
        own = [width for width in self.widths for _ in range(per_class)]
        return own + [0] * (self.num_choices - self.num_experts)

    @property
    def num_choices(self) -> int:
        """What a router chooses from: the experts, and those without a feed-forward."""
        return self.num_experts + self.zero_experts + self.copy_experts + self.constant_experts


@dataclass(frozen=True, kw_only=True)
class MemoryLayersConfig:
    """Layers with a dense feed-forward and a memory, of which each token reads top_k of num_keys^2 learned values
    (UltraMem, 2411.12364; UltraMemV2, 2508.18756)."""

    layers: tuple[int, ...] = ()
    """Which of the decoder's layers are such in the place of MoE."""
    num_keys: int = 64
    """Keys of each of two axes; a value has one of both."""
    top_k: int = 16
    """Values per token, 1..num_keys."""
    d_key: int = 64
    """Width of a key."""
    d_value: int = 128
    """Width of a value, before it is projected to the model's; a multiple of heads * parallel.ep."""
    d_pre: int = 64
    """Width of the pre-value that gates each value (PEER, 2407.04153), a multiple of parallel.ep; 0 = none."""
    rank: int = 2
    """Scores per key, which the Tucker core joins to the score of a value."""
    heads: int = 1
    """Cores, each with the score of its own slice of a value."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; dense first layers, then MoE layers."""

    vocab_size: int
    """At least the tokenizer's size."""
    num_layers: int
    """Transformer layers, dense ones included."""
    num_dense_layers: int = 0
    """The first layers keep a dense SwiGLU of width d_ffn; the rest are MoE. 0..num_layers."""
    share_depth: Literal["none", "moe", "all"] = "none"
    """What all MoE layers have one of: moe = router and experts, all = attention too; norms stay each layer's (WideNet,
    2107.11817)."""
    d_model: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    head_dim: int | None = None
    """Even. null = d_model / num_heads, which must then divide."""
    d_ffn: int
    """Hidden width of the dense layers."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over head_dim of q and k before RoPE (Qwen3)."""
    attention_experts: int = 1
    """Attentions of num_heads per layer, all of which see every token, weighed by a softmax gate (BAM, 2408.08274)."""
    attention_experts_kv: Literal["own", "shared"] = "own"
    """With attention_experts above 1: each has key/value heads of its own, or all read the same num_kv_heads."""
    tie_embeddings: bool = False
    """One matrix for embedding and output."""
    init_std: float = 0.02
    """Normal(0, init_std); projections back into the residual stream are divided by sqrt(2 num_layers)."""
    mtp_depth: int = 0
    """Multi-token prediction: so many further layers, each predicting one token further ahead (DeepSeek-V3, 2.2)."""
    mtp_loss_coef: float = 0.3
    """With mtp_depth: weight of the mean of their losses."""
    memory_layers: MemoryLayersConfig = field(default_factory=MemoryLayersConfig)
    moe: MoEConfig

    @property
    def total_layers(self) -> int:
        """With those of multi-token prediction, which come last."""
        return self.num_layers + self.mtp_depth

    @property
    def has_two_tables(self) -> bool:
        """Whether a pipeline's last stage needs the embedding too."""
        return self.tie_embeddings or self.mtp_depth > 0

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.num_heads

    @property
    def total_heads(self) -> int:
        """Query heads of a layer: those of all attention experts."""
        return self.num_heads * self.attention_experts

    @property
    def total_kv_heads(self) -> int:
        """Its key and value heads."""
        own = self.attention_experts_kv == "own"
        return self.num_kv_heads * (self.attention_experts if own else 1)

    @property
    def d_row(self) -> int:
        """Width of the rows that travel to routed experts."""
        return self.d_model if self.moe.d_latent is None else self.moe.d_latent

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that are MoE; those of multi-token prediction are if any other is."""
        layers = range(self.num_dense_layers, self.num_layers)
        decoder = tuple(layer for layer in layers if layer not in self.memory_layers.layers)
        return decoder and (*decoder, *range(self.num_layers, self.total_layers))

    @property
    def decoder_moe_layers(self) -> tuple[int, ...]:
        """Those that an evaluation runs, too."""
        return tuple(layer for layer in self.moe_layers if layer < self.num_layers)

    def moe_of(self, layer: int) -> MoEConfig:
        """Of one MoE layer, with its own number of experts."""
        numbers = self.moe.experts_by_layer
        if numbers is None:
            return self.moe
        number = numbers[self.moe_layers.index(layer)]
        return replace(self.moe, num_experts=number, experts_by_layer=None)

    def all_as(self, layer: int) -> "ModelConfig":
        """A model whose MoE layers are all like this one, if it is one."""
        return replace(self, moe=self.moe_of(layer)) if layer in self.moe_layers else self


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees over the world: world == pp * dp * cp * tp, and in a pipeline stage dp * cp * tp == edp * ep * etp.

    dp, the ranks that read different samples, is what the others leave over.
    """

    pp: int = 1
    """Pipeline parallel: ranks that share out the layers, by cost."""
    pp_schedule: Literal[
        "gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"
    ] = "1f1b"
    """With pp: the order of the micro-batches' forwards and backwards; zbv and dualpipev run two stages per rank."""
    pp_virtual_stages: int = 2
    """With an interleaved schedule: stages per rank."""
    cp: int = 1
    """Context parallel: ranks that share each sequence; 2 * cp divides data.seq_len."""
    cp_attention: Literal["ring", "ulysses"] = "ring"
    """With cp: keys and values go around, or each rank gets whole sequences of some heads (cp divides them)."""
    tp: int = 1
    """Tensor parallel: ranks that share each dense matrix; divides heads, key/value heads, d_ffn, vocabulary."""
    sequence_parallel: bool = True
    """With tp: norms, routers and shared experts work on a share of the tokens, which tp must divide."""
    ep: int = 1
    """Expert parallel: ranks that share out the experts; divides moe.num_experts."""
    etp: int = 1
    """Expert tensor parallel: ranks that share each expert's matrices; divides moe.d_expert."""
    zero: Literal[0, 1, 2, 3] = 0
    """What data and context ranks share out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    dp_shard: int | None = None
    """With zero: data ranks that share one copy; divides dp. null = all of dp."""

    @property
    def exchanges_over_data(self) -> bool:
        """Whether data ranks have experts, or slices of them, for each other: those of etp are neighbours, as those of tp are."""
        return self.ep > 1 or self.tp % self.etp > 0


Recompute = Literal["none", "moe", "attention", "selective", "layer"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Batch sizes are in tokens."""

    steps: int
    """Optimizer steps."""
    global_batch_tokens: int
    """Tokens per optimizer step over all ranks; a multiple of micro_batch_tokens * dp."""
    micro_batch_tokens: int
    """Tokens per forward of a data rank, which its tp ranks share out; a multiple of data.seq_len."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type. Parameters, gradients, optimizer state, routing and loss stay fp32."""
    recompute: Recompute = "none"
    """Made again in backward: the experts (no row travels again), attention, both (selective), or a layer but for its routing."""
    offload_ratio: float | None = 0.0
    """Of what blocks keep for their backward, the share that waits in host memory, 0 to 1 (ByteScale, 2502.21231). null = of each
    micro-batch as much as is not waited for, by what the way to the host and a product take at the start."""
    compile: bool = False
    """torch.compile for the element-wise work on queries and keys; some seconds of the first step. Measure: `moesys bench compile`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU for each local rank where torch sees one."""
    eval_every_steps: int = 0
    """Optimizer steps between evaluations; 0 = only after the last step."""
    eval_tokens: int = 0
    """Held-out tokens of each source per evaluation; 0 = all of the validation split."""
    log_every_steps: int = 1
    """Optimizer steps between records of metrics.jsonl."""
    start_timeout_s: float = 300.0
    """How long a rank waits for all the others to have started."""
    timeout_s: float | None = None
    """How long a collective may make no progress before the run is given up. null = ten times the slowest of the
    last steps (or evaluations), at least 20 s, at most 600 s; where a step may suddenly take longer set it."""
    elastic: bool = False
    """Another number of ranks goes on with smaller degrees, ep first, and the same batch (plan/elastic.py); false = refused."""
    grace_s: float = 120.0
    """From a signal to the end that its sender grants (`#SBATCH --signal=B:USR2@120`): what does not fit is left out."""

    def micro_steps(self, dp: int) -> int:
        """Micro-batches of each of `dp` data ranks in an optimizer step; of documents as sequences about so many."""
        return -(-self.global_batch_tokens // (self.micro_batch_tokens * dp))

    @property
    def compute_bytes(self) -> Literal[2, 4]:
        """Of a number in the compute type."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def exchanging_forwards(self) -> int:
        """Of a micro-step, in which a layer's rows travel: a recomputed layer's do again."""
        return 2 if self.recompute == "layer" else 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """Optimizer steps between checkpoints; 0 = only at the end and when a signal asks to stop."""
    keep_last: int = 2
    """How many of the newest checkpoints stay, at least 1."""
    asynchronous: bool = True
    """Write in the background from a copy of this rank's share in host memory. false = steps wait for the disk."""
    resume: bool = True
    """Continue from the newest good checkpoint in the run folder, if there is one."""
    init_from: str | None = None
    """Where a run without a checkpoint of its own has its weights from: a checkpoint, or a run (its newest). The
    optimizer and the data begin anew. null = drawn from run.seed."""


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """Steps whose loss or gradient norm is not finite or spikes, and copies of the weights that differ."""

    policy: Literal["stop", "skip", "reinject", "lower_rate", "roll_back"] = "stop"
    """The first answer: stop the run; skip = drop the gradients, the data goes on; reinject = that, and train on
    the batch later; lower_rate; roll_back = load the newest checkpoint, the data goes on. When its tries are used up
    the next of skip or reinject, lower_rate, roll_back, stop follows."""
    tries: int = 3
    """How often each answer is given before the next one, at least 1."""
    calm_steps: int = 100
    """Good steps in a row after which tries count from 0 again, at least 1."""
    sigma: float = 0.0
    """Deviations above the last good losses or norms that make a spike, at least 3; 0 = only what is not finite is one."""
    window_steps: int = 128
    """The last good ones: so many steps, at least 16."""
    warmup_steps: int = 64
    """Good steps before a spike is looked for; 16..window_steps."""
    rate_factor: float = 0.1
    """lower_rate: the learning rate is multiplied by this, between 0 and 1."""
    rate_steps: int = 20
    """lower_rate: for so many steps, at least 1."""
    reinject_after_steps: int = 50
    """reinject: optimizer steps until the batch is trained on again, at least 1."""
    replicas_every_steps: int = 0
    """Optimizer steps between comparisons of what ranks hold alike, also made before each checkpoint; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """metrics.jsonl is always written; these are further sinks of the same records."""

    tensorboard: bool = False
    """Event files under RUN/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; offline keeps its files under RUN/wandb."""
    wandb_project: str = "moesys"
    """The project that runs appear in."""
    peak_tflops: float | None = None
    """Per-rank peak that MFU is a share of. null = the rate of a large matrix product, measured at start-up."""
    record_choices_steps: int = 0
    """Of the first so many steps the experts of each token are written to RUN/choices, for router=replay; 0 = none."""
    straggler_every_steps: int = 10
    """Optimizer steps between comparisons of the ranks' compute times; 0 = none."""
    straggler_ratio: float = 1.5
    """Times the median rank's compute time, in three comparisons in a row, that make a straggler; above 1."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    name: str
    """A word for the run."""
    dir: str
    """The run folder: config.yaml, metrics.jsonl, summary.json, checkpoints/."""
    seed: int = 0
    """Of weights, sample order and noise."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
