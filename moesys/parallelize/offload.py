"""A share of what blocks keep for their backward waits in host memory (selective activation offload: ByteScale, 2502.21231,
section 5.2; plan/offload.py has the formula for the share).

    forward of block i      what block i - 1 keeps leaves; when i is done, its share is no longer on the device
    backward of block i     what block i - 1 keeps comes back, in the place of block 0 what the next micro-batch's last block keeps

What no block follows before its backward does not leave. Autograd gets a note in the place of each tensor; all that a note says is
of its storage, which leaves once however many tensors of it are saved, and comes back as it was, byte by byte.

Not taken: parameters, what is cast from them, and views of both; what a block is handed beside its input, which others have too;
what a pipeline's stage received, which the pipeline holds; small storages.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from moesys.models.attention import Within
from moesys.models.transformer import Transformer
from moesys.parallelize.host_pages import HostPages, Lane, Stack

LEAST_BYTES = 1024
"""Smaller storages stay."""
RatioOf = Callable[[Within | None], float]
"""The share of a micro-batch, from 0 to 1, by what its attention stays within."""
_CASTS_AND_VIEWS = frozenset(
    f"{name}Backward"
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split"),
        *("SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView"),
        *("Unsqueeze", "View", "_ToTorchTensor"),
    )
)
"""Nodes of autograd, without a version, that hand on their input in another form."""


@dataclass(eq=False)
class _Storage:
    """One that autograd keeps: on the device, or its first bytes on the host and the others on the device."""

    parcel: "_Parcel"
    here: torch.UntypedStorage | None
    """All of it."""
    num_bytes: int
    rest: Tensor | None = None
    """What is not on the host, if it is not here."""
    away: list[Tensor] = field(default_factory=list)
    """What is: slices of pages."""


class _Note(NamedTuple):
    """What autograd keeps in the place of a tensor."""

    of: _Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Parcel:
    """What one block keeps of one micro-batch."""

    ratio: float
    host: Stack
    not_taken: frozenset[int]
    """Addresses of storages."""
    then: "_Parcel | None"
    """That of the block whose backward follows."""
    storages: "WeakValueDictionary[tuple[int, int], _Storage]" = field(
        default_factory=WeakValueDictionary
    )
    """By address and version, as long as autograd keeps a note of them."""
    is_read: bool = False
    """Whether the block's backward has begun."""

    def __del__(self) -> None:
        self.host.clear()


@dataclass
class _Forwards:
    """Of one micro-batch after the other through the blocks of one part of the model."""

    ratio: float = 0.0
    last: _Parcel | None = None
    """Of the block before."""
    first: "ReferenceType[_Parcel] | None" = None
    first_before: "ReferenceType[_Parcel] | None" = None
    """Of the first block, and of it and the micro-batch before."""

    def begin(self, ratio: float) -> None:
        """With the first block."""
        self.ratio, self.last = ratio, None
        self.first, self.first_before = None, self.first

    def parcel(self, host: Stack, not_taken: frozenset[int]) -> _Parcel:
        """Of the next block."""
        self.last = _Parcel(self.ratio, host, not_taken, self.last)
        if self.first is None:
            self.first = ref(self.last)
        return self.last

    def end(self) -> None:
        """With the last block. Backwards follow in the order of forwards, or what one reads is not on its way."""
        if (first := _alive(self.first_before)) is not None:
            first.then = self.last
        self.last = None


def _alive(parcel: "ReferenceType[_Parcel] | None") -> _Parcel | None:
    return None if parcel is None else parcel()


class Offload:
    """Of one rank: what its blocks keep leaves for the host and comes back."""

    def __init__(self, device: torch.device, ratio_of: RatioOf) -> None:
        self.ratio_of = ratio_of
        """Asked once for each micro-batch and part of the model."""
        self.pages = HostPages(device)
        self._device = device
        self._out, self._back = Lane(device), Lane(device)
        self._kept: ReferenceType[_Parcel] | None = None
        """By the last block, whole."""
        self._leaving: list[_Storage] = []
        """Held until they have."""
        self._arriving: list[_Storage] = []
        """Held until they are there."""

    def wrap(self, part: Transformer) -> None:
        """After recomputation has wrapped the blocks, of which then what it keeps is taken, and before data is sharded."""
        forwards, blocks = _Forwards(), part.blocks()
        for block in blocks:
            is_first, is_last = block is blocks[0], block is blocks[-1]
            block.forward = self._wrapped(block.forward, forwards, is_first, is_last)

    def _wrapped(
        self, forward: Callable[..., Any], forwards: _Forwards, is_first: bool, is_last: bool
    ) -> Callable[..., Any]:
        def run(x_TD: Tensor, *others: Any) -> Any:
            """As blocks take it: x, rotary tables, what attention stays within, and more."""
            if not torch.is_grad_enabled():
                return forward(x_TD, *others)
            if is_first:
                forwards.begin(self.ratio_of(others[1] if len(others) > 1 else None))
            self._send()
            if not forwards.ratio:
                result = forward(x_TD, *others)
                self._let_go()
                return result
            handed = frozenset(_address(x) for x in tree_leaves(others) if _is_plain(x))
            parcel = forwards.parcel(Stack(self.pages), handed)
            with saved_tensors_hooks(partial(self._pack, parcel), self._unpack):
                result = forward(x_TD, *others)
            self._let_go()
            self._kept = ref(parcel)
            if is_last:
                forwards.end()
            return result

        return run

    def _pack(self, parcel: _Parcel, tensor: Tensor) -> Tensor | _Note:
        if not self._takes(parcel, tensor):
            return tensor.detach()  # a node that held its own output would keep itself alive
        key = _address(tensor), tensor._version
        storage = parcel.storages.get(key)
        if storage is None:
            here = tensor.untyped_storage()
            storage = parcel.storages[key] = _Storage(parcel, here, here.nbytes())
        offset = int(tensor.storage_offset())
        return _Note(storage, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def _takes(self, parcel: _Parcel, tensor: Tensor) -> bool:
        return (
            _is_plain(tensor)
            and tensor.device.type == self._device.type
            and tensor.untyped_storage().nbytes() >= LEAST_BYTES
            and _address(tensor) not in parcel.not_taken
            and not _is_given(tensor)
        )

    def _unpack(self, packed: Tensor | _Note) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._read(packed.of.parcel)
        here = packed.of.here
        assert here is not None, "what is read is here"
        empty = torch.empty(0, dtype=packed.dtype, device=here.device)
        return empty.set_(here, packed.offset, packed.shape, packed.stride)  # type: ignore[call-overload]

    def _read(self, parcel: _Parcel) -> None:
        """The block's backward begins: all that it keeps is here, and what is read next sets out."""
        if parcel.is_read:
            return
        parcel.is_read = True
        self._bring(parcel)
        self._settle()
        if parcel.then is not None:
            self._bring(parcel.then)

    def _send(self) -> None:
        """What the last block keeps sets out, if its backward has not begun."""
        self._let_go()
        parcel, self._kept = _alive(self._kept), None
        if parcel is None or parcel.is_read:
            return
        self._leaving = [s for s in parcel.storages.values() if int(parcel.ratio * s.num_bytes)]
        with self._out.copying():
            for storage in self._leaving:
                storage.away = parcel.host.room_for(int(parcel.ratio * storage.num_bytes))
                for page, part in _places(storage):
                    page.copy_(part, non_blocking=True)

    def _let_go(self) -> None:
        """What has set out is on the host: only the rest of it stays."""
        self._out.wait()
        while self._leaving:
            storage = self._leaving.pop()
            begin = sum(map(len, storage.away))
            if begin < storage.num_bytes:
                storage.rest = _bytes(storage)[begin:].clone()
            storage.here = None

    def _bring(self, parcel: _Parcel) -> None:
        """What is not here sets out for it."""
        coming = [storage for storage in parcel.storages.values() if storage.here is None]
        if not coming:
            return
        self._settle()
        for storage in coming:
            room = torch.empty(storage.num_bytes, dtype=torch.uint8, device=self._device)
            storage.here = room.untyped_storage()
            if storage.rest is not None:
                room[-len(storage.rest) :] = storage.rest
                storage.rest = None
        with self._back.copying():
            for storage in coming:
                for page, part in _places(storage):
                    part.copy_(page, non_blocking=True)
        self._arriving = coming

    def _settle(self) -> None:
        """What has set out for the device is there."""
        self._back.wait()
        self._arriving = []


def _bytes(storage: _Storage) -> Tensor:
    """uint8, all of it."""
    assert storage.here is not None
    return torch.empty(0, dtype=torch.uint8, device=storage.here.device).set_(storage.here)


def _places(storage: _Storage) -> list[tuple[Tensor, Tensor]]:
    """Each slice of a page, and what of the storage it is for."""
    parts = _bytes(storage)[: sum(map(len, storage.away))].split([len(x) for x in storage.away])
    return list(zip(storage.away, parts, strict=True))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(x: object) -> bool:
    """A tensor with a storage of its own, no parameter and no part of a distributed tensor."""
    return type(x) is Tensor and x.layout is torch.strided


def _is_given(tensor: Tensor) -> bool:
    """A leaf that has a gradient, or what is cast from one, or a view of either: weights, and a stage's input."""
    node = tensor.grad_fn
    if node is None:
        return tensor.requires_grad
    while node is not None and node.name().rstrip("0123456789") in _CASTS_AND_VIEWS:
        node = node.next_functions[0][0]
    return hasattr(node, "variable")
