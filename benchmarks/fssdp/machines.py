"""Clusters that there are, and layers of models that were trained."""

from dataclasses import dataclass

ACHIEVED_FLOPS = 0.45
"""Of a GPU's peak, in attention and in experts alike."""
ACHIEVED_BYTES = 0.8
"""Of a link's rate."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes with as many GPUs each, a rank on each. Rates are those of data sheets; of a link, one way."""

    name: str
    per_node: int = 8
    peak_flops: float
    """Per second, dense, in the 16 bits that it multiplies fastest."""
    inside_bytes_per_s: float
    """Of a GPU to all others of its node."""
    uplinks: int
    """Network cards of a node; as many GPUs share each."""
    uplink_bytes_per_s: float

    @property
    def flops_per_s(self) -> float:
        return ACHIEVED_FLOPS * self.peak_flops

    @property
    def per_uplink(self) -> int:
        """Ranks."""
        return self.per_node // self.uplinks


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attention and MoE, and what a rank does with it in a step."""

    name: str
    d_model: int
    num_experts: int
    top_k: int
    expert_parameters: int
    dense_parameters: int
    """That each token passes beside its experts: projections of attention, shared experts."""
    score_width: int
    """Numbers that a token and one it attends to multiply: over all heads, of a key and of a value."""
    seq_len: int
    sequences: int
    """Of a rank's micro-step."""
    micro_steps: int

    @property
    def tokens(self) -> int:
        """Of a rank's micro-step."""
        return self.sequences * self.seq_len

    @property
    def dense_flops(self) -> float:
        """Of a rank's forward before rows are sent; a token attends to half of its sequence on average."""
        per_token = 2 * self.dense_parameters + self.seq_len * self.score_width
        return float(self.tokens * per_token)

    @property
    def expert_flops(self) -> float:
        """Of a forward of the mean rank's experts."""
        return float(self.tokens * self.top_k * 2 * self.expert_parameters)


_GBIT = 1e9 / 8
P3DN = Cluster(
    name="p3dn, V100",
    peak_flops=125e12,
    inside_bytes_per_s=150e9,
    uplinks=1,
    uplink_bytes_per_s=100 * _GBIT,
)
P4D = Cluster(
    name="p4d, A100",
    peak_flops=312e12,
    inside_bytes_per_s=300e9,
    uplinks=4,
    uplink_bytes_per_s=100 * _GBIT,
)
H100 = Cluster(
    name="DGX H100",
    peak_flops=989e12,
    inside_bytes_per_s=450e9,
    uplinks=8,
    uplink_bytes_per_s=400 * _GBIT,
)
CLUSTERS = (P3DN, P4D, H100)

GPT_MOE_L = Layer(
    name="GPT-MoE-L",
    d_model=1536,
    num_experts=64,
    top_k=2,
    expert_parameters=2 * 1536 * 3072,
    dense_parameters=4 * 1536 * 1536,
    score_width=2 * 1536,
    seq_len=2048,
    sequences=4,
    micro_steps=1,
)
"""Of 2502.02581, on 32 ranks there; two matrices an expert."""

_DEEPSEEK_ATTENTION = (
    7168 * 1536  # to the latent of queries
    + 1536 * 128 * (128 + 64)
    + 7168 * (512 + 64)  # to that of keys and values
    + 512 * 128 * (128 + 128)
    + 128 * 128 * 7168
)
_DEEPSEEK_EXPERT = 3 * 7168 * 2048
DEEPSEEK_V3 = Layer(
    name="DeepSeek-V3",
    d_model=7168,
    num_experts=256,
    top_k=8,
    expert_parameters=_DEEPSEEK_EXPERT,
    dense_parameters=_DEEPSEEK_ATTENTION + _DEEPSEEK_EXPERT,
    score_width=128 * (128 + 64 + 128),
    seq_len=4096,
    sequences=1,
    micro_steps=8,
)
"""Of 2412.19437, with one shared expert; 15360 sequences a step on 2048 GPUs there, 7.5 each. Each row travels by itself, in
16 bits."""
LAYERS = (GPT_MOE_L, DEEPSEEK_V3)
