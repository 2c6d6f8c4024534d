"""What ranks of a fabric do in its tests: one word names it."""

import os
import socket
import statistics
import sys
import time

PORT = 5000


def send(num_bytes: int) -> None:
    """The last rank sends so many bytes to rank 0."""
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    if rank == 0:
        connection, _ = socket.create_server(("", PORT)).accept()
        got = 0
        while data := connection.recv(1 << 20):
            got += len(data)
        print(f"got {got}")
    elif rank == last:
        with _connected() as connection:
            began = time.perf_counter()
            connection.sendall(bytes(num_bytes))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # the end
        print(f"seconds {time.perf_counter() - began:.4f}")


def round_trip() -> None:
    """Between rank 0 and the last, the median of 20."""
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    if rank == 0:
        connection, _ = socket.create_server(("", PORT)).accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while byte := connection.recv(1):
            connection.sendall(byte)
    elif rank == last:
        times = []
        with _connected() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(20):
                began = time.perf_counter()
                connection.sendall(b"x")
                connection.recv(1)
                times.append(time.perf_counter() - began)
        print(f"seconds {statistics.median(times):.6f}")


def exchange(d: int) -> None:
    """Tokens of width `d` to experts on all ranks and back, forward and backward, once to a node; rank r's routing is
    that of `tests.moe.test_dispatch.make_routing`."""
    import torch
    import torch.distributed as dist

    from tests.moe.test_deduplicated import make_dispatcher
    from tests.moe.test_dispatch import make_routing

    dist.init_process_group("gloo")
    _, routing, num_experts = make_routing(dist.get_rank(), "random")
    dispatcher = make_dispatcher(
        "deduplicated", num_experts, int(os.environ["LOCAL_WORLD_SIZE"]), 1
    )
    ids_TK = routing.topk_ids_TK
    x_TD = torch.ones(ids_TK.shape[0], d, requires_grad=True)
    plan = dispatcher.plan(ids_TK)
    rows_RD, _ = dispatcher.dispatch(x_TD, plan)
    dispatcher.combine(rows_RD, routing.topk_weights_TK, plan).sum().backward()
    dist.barrier()
    dist.destroy_process_group()


WAYS = ("flat", "hierarchical", "deduplicated")
NUM_CODES = 3


def coded(d: int, way: int) -> None:
    """The same in eight bits, by WAYS[way], each expert's tokens as NUM_CODES rows."""
    import torch
    import torch.distributed as dist

    from moesys.config.dispatch_schema import WireConfig
    from moesys.moe.codecs.clusters import ClusterCode
    from moesys.moe.compression import WireFormats
    from moesys.ops.clusters import cluster_order
    from tests.moe.test_deduplicated import make_dispatcher
    from tests.moe.test_dispatch import make_routing

    dist.init_process_group("gloo")
    _, routing, num_experts = make_routing(dist.get_rank(), "random")
    dispatcher = make_dispatcher(WAYS[way], num_experts, int(os.environ["LOCAL_WORLD_SIZE"]), 1)
    ids_TK = routing.topk_ids_TK
    codes_T = torch.arange(len(ids_TK)) % NUM_CODES
    order = cluster_order(ids_TK, codes_T[:, None].expand_as(ids_TK), num_experts)
    order = order.trimmed(int(order.rows_per_expert_E.sum()), int(order.num_members))
    ids_C1 = torch.arange(num_experts).repeat_interleave(order.rows_per_expert_E)[:, None]
    code = ClusterCode(order=order, ids_C1=ids_C1, compensation="residual", is_detached=False)
    int8 = WireConfig(
        dispatch_forward="int8",
        dispatch_backward="int8",
        combine_forward="int8",
        combine_backward="int8",
    )
    x_TD = torch.ones(len(ids_TK), d, requires_grad=True)
    plan = dispatcher.plan(ids_C1, formats=WireFormats.of(int8))
    rows_CD = code.encode(x_TD)
    rows_RD, _ = dispatcher.dispatch(rows_CD, plan)
    out_CD = dispatcher.combine(rows_RD, torch.ones(ids_C1.shape), plan)
    code.decode(out_CD, rows_CD, x_TD, routing.topk_weights_TK).sum().backward()
    dist.barrier()
    dist.destroy_process_group()


def fail_on_1() -> None:
    if os.environ["RANK"] == "1":
        sys.exit(7)
    time.sleep(600)


def _connected() -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection((os.environ["MASTER_ADDR"], PORT))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("rank 0 does not listen")


if __name__ == "__main__":
    act, *numbers = sys.argv[1:]
    globals()[act](*map(int, numbers))
