"""What waits in host memory changes nothing but where bytes are, and these to the byte.

Shapes: B sequences, S positions.
"""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesys.config.batch_schema import BatchConfig
from moesys.config.schema import MemoryLayersConfig, ModelConfig, ParallelConfig, RunConfig
from moesys.models.transformer import Transformer
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.parallelize.offload import LEAST_BYTES, Offload, _Parcel
from moesys.parallelize.recompute import apply_recompute
from moesys.plan.activations import ActivationCase, block_bytes
from moesys.testing.layouts import BASE
from moesys.testing.live_bytes import LiveBytes
from moesys.testing.parity import whole
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, small_model, with_micro_steps

CPU = torch.device("cpu")
RATIOS = (0.3, 1.0)
MODES = ("none", "attention", "layer")


# --- The same numbers


def trained(rank: int, world_size: int, config: RunConfig) -> tuple[list[Any], list[Any], int]:
    """What each step returned, its gradients, and pages that left."""
    run = SmallRun(config, world_size)
    gradients: list[dict[str, Tensor]] = []

    def keep_gradients(*_: object) -> None:
        named = run.model.named_parameters()
        gradients.append({n: whole(p.grad, p) for n, p in named if p.grad is not None})

    run.optimizer.register_step_pre_hook(keep_gradients)
    steps = [run.step() for _ in range(config.train.steps)]
    told = [(s.loss, s.balance_loss, s.z_loss, s.grad_norm, s.expert_load_ME) for s in steps]
    offload = run.train_step.parallel.offload
    assert offload is None or offload.pages.in_use == 0
    return told, gradients, 0 if offload is None else offload.pages.made


def trained_in_all_ways(rank: int, world_size: int, config: RunConfig, modes: list[Any]) -> dict:
    """By (recompute, ratio)."""
    trains = {
        (mode, ratio): replace(config.train, recompute=mode, offload_ratio=ratio)
        for mode in modes
        for ratio in (0.0, *RATIOS)
    }
    return {
        key: trained(rank, world_size, replace(config, train=train))
        for key, train in trains.items()
    }


STEPS = replace(BASE, train=replace(BASE.train, steps=2))
PIECES = replace(
    STEPS,
    batch=BatchConfig(policy="hdp"),
    data=replace(BASE.data, seq_len=96),
    train=replace(STEPS.train, global_batch_tokens=512),
)
BF16 = replace(STEPS, train=replace(STEPS.train, dtype="bf16"))
COMPILED = replace(STEPS, train=replace(STEPS.train, compile=True))
MEMORY = MemoryLayersConfig(layers=(2,), num_keys=8, top_k=3, d_key=8, d_value=16, d_pre=4, heads=2)
LAYOUTS: dict[str, tuple[int, RunConfig, dict[str, Any]]] = {
    "one process": (1, STEPS, {}),
    "pp": (2, STEPS, {"pp": 2}),
    "gpipe": (2, STEPS, {"pp": 2, "pp_schedule": "gpipe"}),
    "interleaved": (2, STEPS, {"pp": 2, "pp_schedule": "interleaved"}),
    "tp+ep": (2, STEPS, {"tp": 2, "ep": 2}),
    "cp": (2, STEPS, {"cp": 2}),
    "etp": (2, STEPS, {"etp": 2}),
    "zero 2+ep": (2, STEPS, {"zero": 2, "ep": 2}),
    "zero 3": (2, STEPS, {"zero": 3}),
    "pp+zero": (4, STEPS, {"pp": 2, "zero": 3}),
    "bf16, ep": (2, BF16, {"ep": 2}),
    "compiled": (1, COMPILED, {}),
    "pieces, ep": (2, PIECES, {"ep": 2}),
    "pieces, pp+tp": (8, PIECES, {"pp": 2, "tp": 2}),
    "memory": (1, replace(STEPS, model=replace(STEPS.model, memory_layers=MEMORY)), {}),
    "multi-token prediction, pp": (
        2,
        replace(STEPS, model=replace(STEPS.model, mtp_depth=2)),
        {"pp": 2},
    ),
}
QUICK = ("one process", "pp")


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.parity) for name in LAYOUTS],
)
def test_the_same_numbers_bit_for_bit(layout: str) -> None:
    world_size, config, degrees = LAYOUTS[layout]
    config = replace(config, parallel=ParallelConfig(**degrees))
    config = with_micro_steps(config, world_size, 4)
    ranks = run_ranks(trained_in_all_ways, world_size, config, [*MODES, "moe"])
    for found in ranks:
        for (mode, ratio), (told, gradients, _) in found.items():
            plain_told, plain_gradients, _ = found[mode, 0.0]
            assert told == plain_told, (mode, ratio)
            for ours, theirs in zip(gradients, plain_gradients, strict=True):
                assert ours.keys() == theirs.keys()
                for name in theirs:
                    assert torch.equal(ours[name], theirs[name]), (mode, ratio, name)
    for mode, ratio in ranks[0]:
        # Of the last stage's last block nothing, where its backward follows.
        pages = sum(found[mode, ratio][2] for found in ranks)
        assert (pages > 0) == (ratio > 0), (mode, ratio)


# --- To the byte

MODEL = small_model(
    vocab_size=32,
    num_layers=5,
    num_dense_layers=2,
    memory_layers=MemoryLayersConfig(
        layers=(3,), num_keys=12, top_k=4, d_key=24, d_value=48, d_pre=16, rank=2, heads=2
    ),
    d_model=64,
    num_heads=8,
    d_ffn=176,
    num_experts=12,
    top_k=3,
    d_expert=48,
    attention_experts=3,
    d_latent=40,
    shared_gate="softmax",
    num_shared_experts=2,
)
IDS_BS = torch.arange(4 * 131).reshape(4, 131) % 32
"""524 tokens: no weight has as many numbers as something of a token each."""


def built(model: ModelConfig, mode: Any, backend: Any) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(model)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    apply_recompute(made, mode)
    set_expert_backend(made, backend)
    return made


def kept_by_blocks(part: Transformer, forward: Callable[[], object]) -> list[dict[int, int]]:
    """Bytes by address of what each block's nodes keep, without weights, their casts and what several blocks keep."""
    weights = {p.untyped_storage().data_ptr() for p in part.parameters()}
    numels = {p.numel() for p in part.parameters()}
    held: list[Tensor] = []  # so that no address is another's later
    found: list[dict[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        address, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        is_cast = tensor.dtype == torch.bfloat16 and tensor.numel() in numels
        is_weight = address in weights or is_cast
        if not is_weight and nbytes >= LEAST_BYTES:
            found[-1][address] = nbytes
            held.append(tensor.detach())
        return tensor.detach()

    def watched(block: torch.nn.Module) -> Callable[..., Any]:
        plain = block.forward

        def run(*args: Any) -> Any:
            found.append({})
            with saved_tensors_hooks(pack, lambda packed: packed):
                return plain(*args)

        return run

    for block in part.blocks():
        block.forward = watched(block)
    result = forward()
    del result
    times = Counter(address for of_block in found for address in of_block)
    return [{a: n for a, n in of_block.items() if times[a] == 1} for of_block in found]


def live_after(part: Transformer, known: list[Tensor]) -> int:
    with LiveBytes([*part.parameters(), *part.buffers(), IDS_BS, *known]) as live:
        result = part(IDS_BS)
        gc.collect()
        total = live.total
        del result
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_leaves_is_the_share_of_what_all_blocks_but_the_last_keep(mode: Any, dtype) -> None:
    backend = "loop" if dtype == torch.float32 else "grouped_mm"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = live_after(built(MODEL, mode, backend), [])
        watched = built(MODEL, mode, backend)
        kept = kept_by_blocks(watched, lambda: watched(IDS_BS))
        assert all(kept)
        for ratio in RATIOS:
            part = built(MODEL, mode, backend)
            offload = Offload(CPU, lambda _, ratio=ratio: ratio)
            offload.pages.page_bytes = 4096
            offload.wrap(part)
            pages = [offload.pages.take() for _ in range(10_000)]
            offload.pages.give(pages)
            in_use: list[int] = []
            part.norm.register_forward_hook(  # type: ignore[union-attr]
                lambda *_, of=offload.pages, in_use=in_use: in_use.append(of.in_use)
            )
            away = plain - live_after(part, pages)
            assert offload.pages.made == 10_000
            assert away == sum(int(ratio * n) for block in kept[:-1] for n in block.values())
            # On the host as many, in pages of which each block may have one that is not full.
            of_blocks = [sum(int(ratio * n) for n in block.values()) for block in kept[:-1]]
            assert in_use == [sum(-(-num_bytes // 4096) for num_bytes in of_blocks)]
            if mode != "layer":
                expected = ratio * sum(_formula(layer, mode, dtype) for layer in range(4))
                assert away == pytest.approx(expected, rel=0.03)


def _formula(layer: int, mode: Any, dtype: torch.dtype) -> float:
    case = ActivationCase(
        model=MODEL,
        tokens=IDS_BS.numel(),
        activation_bytes=4 if dtype == torch.float32 else 2,
        recompute=mode,
    )
    return block_bytes(case, layer)


def test_all_that_a_recomputed_layer_lets_go_is_its_input() -> None:
    """Decisions stay: 4 bytes of each number of four blocks' inputs."""
    plain = live_after(built(MODEL, "layer", "loop"), [])
    part = built(MODEL, "layer", "loop")
    offload = Offload(CPU, lambda _: 1.0)
    offload.wrap(part)
    pages = [offload.pages.take() for _ in range(8)]
    offload.pages.give(pages)
    assert plain - live_after(part, pages) == 4 * 4 * IDS_BS.numel() * MODEL.d_model


# --- Pages and order


def test_pages_are_used_again_over_steps_of_any_size() -> None:
    part = built(small_model(num_layers=4), "none", "loop")
    offload = Offload(CPU, lambda _: 1.0)
    offload.pages.page_bytes = 4096
    offload.wrap(part)
    made = []
    for length in (50, 7, 50, 31, 50):
        part(torch.zeros(4, length, dtype=torch.int64))[0].sum().backward()
        assert offload.pages.in_use == 0
        made.append(offload.pages.made)
    assert made == made[:1] * 5
    assert made[0] > 10


class Watching(Offload):
    """Sees which blocks' backwards find what they read on the host still, and what is on its way when one begins."""

    def __init__(self) -> None:
        super().__init__(CPU, lambda _: 0.5)
        self.found_away = 0
        self.reads = 0

    def _read(self, parcel: _Parcel) -> None:
        is_first = not parcel.is_read
        self.reads += is_first
        self.found_away += is_first and is_away(parcel)
        super()._read(parcel)
        assert not is_away(parcel)
        assert all(storage.rest is None for storage in parcel.storages.values())
        if is_first and parcel.then is not None:
            assert not is_away(parcel.then)


def is_away(parcel: _Parcel) -> bool:
    return any(storage.here is None for storage in parcel.storages.values())


@pytest.mark.parametrize(("in_flight", "found_away"), [(1, 0), (2, 1), (4, 1)])
def test_what_is_read_next_is_on_its_way(in_flight: int, found_away: int) -> None:
    """Backwards in the order of forwards, as 1F1B and GPipe have them: only the very first block's finds it away, where a
    forward came between."""
    part = built(small_model(num_layers=4), "none", "loop")
    offload = Watching()
    offload.wrap(part)
    results = [part(IDS_BS % 7 + i)[0].sum() for i in range(in_flight)]
    while results:
        results.pop(0).backward()
    assert offload.reads == 4 * in_flight
    assert offload.found_away == found_away


def test_in_another_order_all_is_found() -> None:
    """The last forward's backward first, and once more."""
    gradients = []
    for offload in (None, Offload(CPU, lambda _: 0.5)):
        part = built(small_model(num_layers=4), "none", "loop")
        if offload is not None:
            offload.wrap(part)
        results = [part(IDS_BS % 7 + i)[0].square().sum() for i in range(3)]
        for result in reversed(results):
            result.backward(retain_graph=True)
        part(IDS_BS)  # what has been read stays
        results[-1].backward()
        gradients.append([p.grad for p in part.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


class OfViews(torch.nn.Module):
    """Keeps two views of one storage, at offsets of their own and with strides that are not its own."""

    def forward(self, x_BS: Tensor) -> Tensor:
        both_2BS = torch.stack((x_BS.cos(), x_BS))
        return (both_2BS[1].T.sin() * both_2BS[0].T).T


def test_views_come_back_as_they_were() -> None:
    gradients = []
    for ratio in (None, *RATIOS):
        blocks = [OfViews() for _ in range(4)]
        part: Any = SimpleNamespace(blocks=lambda blocks=blocks: blocks)
        if ratio is not None:
            offload = Offload(CPU, lambda _, ratio=ratio: ratio)
            offload.wrap(part)
        start_BS = torch.linspace(-1, 1, 3000).view(20, 150).requires_grad_()
        x_BS = start_BS
        for block in blocks:
            x_BS = block(x_BS)
        assert ratio is None or offload.pages.in_use == 3
        x_BS.sum().backward()
        gradients.append(start_BS.grad)
    for found in gradients[1:]:
        assert torch.equal(found, gradients[0])


def test_a_forward_without_a_backward_gives_its_pages_back() -> None:
    part = built(small_model(num_layers=4), "none", "loop")
    offload = Offload(CPU, lambda _: 1.0)
    offload.wrap(part)
    for _ in range(2):
        result = part(IDS_BS)
        assert offload.pages.in_use == 3
        del result
        gc.collect()
        assert offload.pages.in_use == 0
    with torch.no_grad():
        part(IDS_BS)
    assert offload.pages.in_use == 0
    assert offload.pages.made == 3


def test_each_micro_batch_has_a_ratio_of_its_own() -> None:
    part = built(small_model(num_layers=4), "none", "loop")
    ratios = iter([1.0, 0.0, 0.25])
    asked = []

    def ratio_of(within: object) -> float:
        asked.append(within)
        return next(ratios)

    offload = Offload(CPU, ratio_of)
    offload.pages.page_bytes = 1024
    offload.wrap(part)
    in_use = []
    documents = torch.zeros(4, 131, dtype=torch.int64)
    for _ in range(3):
        result = part(IDS_BS, documents=documents)[0].sum()
        in_use.append(offload.pages.in_use)
        result.backward()
        del result
    assert in_use[1] == 0
    assert in_use[2] == pytest.approx(in_use[0] / 4, rel=0.01)
    assert asked == [((131,),) * 4] * 3


# --- On a GPU


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gpu_step(part: Transformer, ids_BS: Tensor) -> tuple[float, int]:
    """The loss, and the most bytes beside those that were there before."""
    part.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        loss = part(ids_BS)[0].logsumexp(-1).sum()
        loss.backward()
    torch.cuda.synchronize()
    return loss.item(), torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_computes_the_same_with_less_memory(mode: Any, deterministic: None) -> None:
    """Long enough for copies to be under way when what they read would be overwritten, were they not waited for."""
    device, tokens = torch.device("cuda"), 8192
    model = small_model(
        num_layers=8, num_dense_layers=8, d_model=512, num_heads=8, num_kv_heads=8, d_ffn=2048
    )
    ids_BS = torch.arange(tokens, device=device).remainder(64).view(1, -1)
    found = {}
    for ratio in (0.0, *RATIOS):
        part = built(model, mode, "loop").to(device)
        offload = Offload(device, lambda _, ratio=ratio: ratio)
        offload.wrap(part)
        steps, made = [], []
        for _ in range(3):
            steps.append(gpu_step(part, ids_BS))
            made.append(offload.pages.made)
        assert offload.pages.in_use == 0
        assert made == made[:1] * 3
        assert (made[0] > 0) == (ratio > 0)
        gradients = {
            name: p.grad.cpu() for name, p in part.named_parameters() if p.grad is not None
        }
        found[ratio] = steps[-1], gradients
    (loss, peak), gradients = found[0.0]
    case = ActivationCase(model=model, tokens=tokens, recompute=mode)
    of_block = 4 * tokens * model.d_model if mode == "layer" else block_bytes(case, 0)
    for ratio in RATIOS:
        (ours, lower), our_gradients = found[ratio]
        assert ours == loss
        for name, gradient in gradients.items():
            assert torch.equal(our_gradients[name], gradient), (ratio, name)
        assert peak - lower > 0.8 * ratio * (model.num_layers - 2) * of_block
