"""Wrong configurations and environments, each with what must be said of it: the key, the rule with both values, a fix.

`refusals` tries them with the real command, one by one. A row is

    what is changed | the key as the message names it | the rule | the fix

and `<DATA>`, `<FOLDER>`, `<FREE>` and `<TAKEN>` are a data folder, a folder and two ports of its scene. Changes are words of
the command; NAME=value in capitals is a variable, and -NAME is one taken away.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One thing wrong with a run that could start."""

    name: str
    command: tuple[str, ...]
    """Of moesys, with its options."""
    words: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    """All that a launcher would set."""
    key: str
    rule: str
    fix: str


# Of two ranks, unless the row says another number.
_CONFIGURATIONS = r"""
# Keys, groups and folders.
train.stepz=3 | train.stepz=3 | is not a configuration key | did you mean train.steps?
scheduel=wsd | scheduel='wsd' | is not a configuration key | did you mean schedule=...
model.num_experts=8 | model.num_experts=8 | is not a configuration key | model.moe.num_experts
optim.lr.peak=1 | optim.lr.peak=1 | is not a configuration key | optim.lr is a single value
zzz=1 | zzz=1 | is not a configuration key | the sections are run, model
experiment=quikstart | experiment='quikstart' | must be one of compare, quickstart | did you mean quickstart?
hydra.run.dir=x | hydra.run.dir | has no effect | set run.dir
~data.path | data.path | is required, or data.sources | set it to a folder of moesys prep
--config-dir <FOLDER>/nowhere | --config-dir | is not a folder | give one that holds YAML groups
--config-dir <FOLDER>/yaml experiment=mine | experiment | is a config group that belongs elsewhere | begin its file with '# @package _global_'
# Types.
train.steps=many | train.steps='many' | must be an integer | give an integer
train.steps=1e3 | train.steps=1000.0 | must be an integer | write 1000
train.steps=null | train.steps=null | must be an integer | give an integer
optim.lr=nan | optim.lr=nan | must be a finite number | give a finite number
optim.lr=1e-3,1e-4 | optim.lr | must be one value | one run for each value
data.shuffle=1 | data.shuffle=1 | must be true or false | write true or false
dispatch.wire.combine_forward=int16 | dispatch.wire.combine_forward='int16' | must be one of none, int8, int4, e4m3, e5m2 | did you mean int8 or int4?
train.dtype=fp16 | train.dtype='fp16' | must be one of fp32, bf16 | did you mean
train=3 | train=3 | must be a section | steps, global_batch_tokens
train.steps | train.steps | is not a key=value override | write section.key=value
run.name=${now:%H} | run.name | must be the same on every rank | write the value itself
run.name=${oc.env:NOT_SET_ANYWHERE} | run.name | could not be resolved | refer to an existing key
# Bounds.
optim.lr=0 | optim.lr=0.0 | must be above 0 | use a value above 0
train.offload_ratio=1.5 | train.offload_ratio=1.5 | must be at least 0.0 and at most 1.0 | at most 1.0
optim.beta2=1 | optim.beta2=1.0 | must be at least 0.0 and below 1.0 | below 1.0
train.grace_s=-1 | train.grace_s=-1.0 | must be | use a value
train.start_timeout_s=0 | train.start_timeout_s=0.0 | must be above 0 | above 0
run.seed=-1 | run.seed=-1 | must be at least 0 | use a value at least 0
checkpoint.keep_last=0 | checkpoint.keep_last=0 | must be at least 1 | at least 1
anomaly.sigma=2 | anomaly.sigma=2.0 | must be at least 3.0 | at least 3.0
dispatch.warmup_steps=-1 | dispatch.warmup_steps=-1 | must be at least 0 | use a value at least 0
dispatch.ranks_per_node=0 | dispatch.ranks_per_node=0 | must be at least 1 | use a value at least 1
dispatch.exchange=flatt | dispatch.exchange='flatt' | must be one of flat, hierarchical, deduplicated | did you mean flat?
dispatch.wire.block=-1 | dispatch.wire.block=-1 | must be at least 0 | use a value at least 0
codec=int4 parallel.ep=2 dispatch.wire.block=7 | dispatch.wire.block=7 | must be even with int4 | use 8
parallel.tp=0 | parallel.tp=0 | must be at least 1 | at least 1
model.head_dim=15 | model.head_dim=15 | must be even | use 14 or 16
--nproc 0 | --nproc 0 | must be at least 1 | it is the number of ranks to start
schedule=power schedule.power_b=0.5 | schedule.power_b=0.5 | must be at most 0 | use -0.51
# Keys that cannot go together.
model.moe.top_k=9 | model.moe.top_k=9 | must be at most model.moe.num_experts=8 | use 1 to 8
model.mtp_depth=-1 | model.mtp_depth=-1 | must be at least 0 | use a value at least 0
parallel.pp=2 parallel.pp_schedule=zbv model.num_layers=4 model.mtp_depth=1 parallel.zero=1 | model.mtp_depth=1 | puts on one rank, which parallel.zero=1 cannot share out | use model.mtp_depth=0
parallel.pp=2 parallel.pp_schedule=zbv model.num_layers=4 model.mtp_depth=1 model.tie_embeddings=true | model.mtp_depth=1 | cannot split a backward of | use model.tie_embeddings=false
model.num_dense_layers=3 | model.num_dense_layers=3 | must be at most model.num_layers=2 | use 0 to 2
schedule.warmup_steps=101 | schedule | warmup_steps=101 make 101 steps, which must fit in train.steps=100 | use at least train.steps=101
anomaly.policy=roll_back | anomaly.policy='roll_back' | checkpoint.every_steps=0 | set checkpoint.every_steps
parallel.dp_shard=2 | parallel.dp_shard=2 | must be null with parallel.zero=0 | use parallel.dp_shard=null, or parallel.zero=1, 2 or 3
--nproc 4 parallel.pp=4 | parallel.pp=4 | makes 4 * 1 = 4 stages with parallel.pp_schedule=1f1b, which must be at most model.num_layers=2 | use 2
parallel.pp=2 parallel.tp=2 | parallel.pp=2 | pp=2 * cp=1 * tp=2 = 4 must divide world_size=2 | start 4 ranks
model.moe.experts_by_layer=[4,8] | model.moe.experts_by_layer=[4, 8] | must have a number for each of the 1 MoE layers | write 1 numbers, or null
model.moe.experts_by_layer=[8] model.share_depth=moe | model.moe.experts_by_layer=[8] | makes layers differ, and model.share_depth=moe gives them one set | use model.moe.experts_by_layer=null
model.moe.experts_by_layer=[16] | model.moe.num_experts=8 | must be the largest of model.moe.experts_by_layer=[16] | use 16
model.moe.expert_widths=[32,64] | model.moe.d_expert=64 | must be the mean of model.moe.expert_widths=[32, 64], 48 | use 48
model.moe.balance.width_loss_coef=0.1 | model.moe.balance.width_loss_coef=0.1 | model.moe.expert_widths=null | set model.moe.expert_widths
optim.frozen_experts=8 | optim.frozen_experts=8 | must be below model.moe.num_experts=8 | use 0 to 7, or null
model.memory_layers.layers=[0] | model.memory_layers.layers=[0] | that are not dense, 1 to 1, in order | use some of [1]
model.memory_layers.layers=[1] model.memory_layers.top_k=65 | model.memory_layers.top_k=65 | must be at most model.memory_layers.num_keys=64 | use 1 to 64
parallel.etp=2 parallel.ep=1 model.memory_layers.layers=[1] | parallel.etp=2 | must be 1 with model.memory_layers.layers=[1] | use parallel.etp=1
# Sizes that do not divide.
parallel.ep=2 model.memory_layers.layers=[1] model.memory_layers.heads=3 | model.memory_layers.d_value=128 | must be a multiple of model.memory_layers.heads=3 * parallel.ep=2 = 6 | use 126 or 132
parallel.ep=4 | parallel.ep=4 | must divide the world size 2 | use parallel.ep=2, or start 4 ranks
--nproc 4 parallel.ep=4 model.moe.num_experts=6 | model.moe.num_experts=6 | must be a multiple of parallel.ep=4 | use 4 or 8
--nproc 4 parallel.ep=4 model.num_layers=3 model.moe.experts_by_layer=[6,8] | model.moe.experts_by_layer=6 | must be a multiple of parallel.ep=4 | use 4 or 8, or parallel.ep=2
parallel.ep=2 model.moe.expert_widths=[32,64,96] model.moe.num_experts=9 | model.moe.num_experts=9 | must be a multiple of 3 * parallel.ep=2 = 6 | use 6 or 12
--nproc 4 parallel.tp=4 | model.num_kv_heads=2 | must be a multiple of parallel.tp=4 | use 4, or parallel.tp=2
parallel.tp=2 model.vocab_size=4097 | model.vocab_size=4097 | must be a multiple of parallel.tp=2 | use 4098
parallel.tp=2 model.d_ffn=255 | model.d_ffn=255 | must be a multiple of parallel.tp=2 | use 254 or 256
model.num_kv_heads=3 | model.num_kv_heads=3 | must divide model.num_heads=4 | use 2 or 4
parallel.pp=2 parallel.pp_schedule=zbv model.num_layers=8 model.share_depth=all | model.share_depth='all' | layers of a stage one set of parameters | use parallel.pp_schedule=1f1b or interleaved
parallel.pp=2 parallel.pp_schedule=zbv model.num_layers=8 train.offload_ratio=0.5 | train.offload_ratio=0.5 | does half of it much later | use parallel.pp_schedule=1f1b, interleaved or gpipe
parallel.pp=2 parallel.pp_schedule=dualpipev model.num_layers=8 router=rmoe | model.moe.router._target_='moesys.moe.routers.RecurrentRouter' | layers of a stage one set of parameters | use parallel.pp_schedule=1f1b or interleaved
parallel.pp=2 parallel.pp_schedule=zbv parallel.zero=1 model.num_layers=4 router=rmoe | model.moe.router._target_='moesys.moe.routers.RecurrentRouter' | which parallel.zero=1 cannot share out | use parallel.zero=0
router=hash model.share_depth=moe | model.moe.router._target_='moesys.moe.routers.HashRouter' | is another router in each layer | use model.share_depth=none
model.attention_experts=0 | model.attention_experts=0 | must be at least 1 | at least 1
model.d_model=60 | model.d_model=60 | must be an even multiple of model.num_heads=4 | use 56 or 64
train.micro_batch_tokens=1000 | train.micro_batch_tokens=1000 | must be a multiple of data.seq_len=256 | use 768 or 1024
train.global_batch_tokens=5000 | train.global_batch_tokens=5000 | train.micro_batch_tokens=1024 * dp=2 = 2048 | use 4096 or 6144
parallel.cp=2 data.seq_len=255 train.micro_batch_tokens=1020 train.global_batch_tokens=4080 | data.seq_len=255 | must be a multiple of 2 * parallel.cp=2 = 4 | use 252 or 256
# Files and folders.
data.path=<FOLDER>/nowhere | data.path= | must be a folder that moesys prep made | run moesys prep --input
data.path=<FOLDER>/empty | data.path= | it holds no manifest.json | run moesys prep --input
data.path=<FOLDER>/damaged | data.path= | its manifest.json is damaged | run moesys prep --input
data.path=<FOLDER>/short | train.global_batch_tokens=4096 | must be at most the 768 tokens of whole samples of data.seq_len=256 | prepare more text, or use a smaller batch
data.path=<FOLDER>/no_val | data.path= | must hold at least 2 validation tokens, and it holds 1 | raise --val-fraction
data.sources={a:{path:<DATA>,weight:1}} | data.sources='a' | must not be set beside data.path= | set data.path=null
data.path=null data.sources={a:{path:<DATA>}} | data.sources.a.weight | is required | set it to a finite number
data.path=null data.sources={a:{path:<DATA>,weight:0}} | data.sources.a.weight=0.0 | must be above 0 | above 0
data.path=null data.sources={a:{path:<DATA>,weights:1}} | data.sources.a.weights=1 | is not a configuration key | did you mean weight?
data.path=null data.sources={a:{path:<DATA>,weight:1},b:{path:<FOLDER>/nowhere,weight:1}} | data.sources.b.path= | must be a folder that moesys prep made | run moesys prep --input
data.path=null data.sources={a:{path:<DATA>,weight:1},b:{path:<FOLDER>/other,weight:1}} | data.sources.b.path= | must have the tokenizer of data.sources.a.path=<DATA>, of 2048 tokens, and has one of 2000 tokens | prepare it again with --tokenizer <DATA>/tokenizer.json
data.path=null data.sources={a:{path:<DATA>,weight:1},b:{path:<FOLDER>/short,weight:1}} | train.global_batch_tokens=4096 | reads 2048 tokens a step from <FOLDER>/short, which must be at most the 768 tokens | prepare more text
data.mixing.policy=router_load | data.mixing.policy='router_load' | needs two sources or more, and data.sources has 0 | add sources, or use fixed
data.mixing.smoothing=1 | data.mixing.smoothing=1.0 | must be above 0.0 and below 1.0 | use a value
data.mixing.every_steps=0 | data.mixing.every_steps=0 | must be at least 1 | use a value
model.vocab_size=2000 | model.vocab_size=2000 | must be at least the 2048 tokens of the tokenizer | use model.vocab_size=2048
run.dir=<FOLDER>/locked/run | run.dir= | must be writable, and | choose another run.dir or correct the permissions
run.dir=<DATA>/manifest.json/run | run.dir= | must be a folder, and | choose another run.dir
checkpoint.init_from=<FOLDER>/empty | checkpoint.init_from= | must be a checkpoint or a run with one, and | name a run folder
run.dir=<FOLDER>/begun checkpoint.resume=false | checkpoint.resume=false | needs a run folder without checkpoints, and | set another run.dir
# Routers.
router=topk | router='topk' | must be one of base_sigmoid, device_limited | topk_softmax
model.moe.router._target_=moesys.moe.routers.TopkRouter | model.moe.router._target_='moesys.moe.routers.TopkRouter' | must name a class of moesys.moe.routers | did you mean TopKRouter?
dispatch.codec._target_=moesys.moe.codecs.LshCoder | dispatch.codec._target_='moesys.moe.codecs.LshCoder' | must name a class of moesys.moe.codecs | did you mean LshCodec?
parallel.ep=2 codec=lsh dispatch.codec.hashez=3 | dispatch.codec.hashez=3 | is not an option of moesys.moe.codecs.LshCodec | did you mean hashes?
parallel.ep=2 codec=lsh dispatch.codec.hashes=20 | dispatch.codec | is refused: hashes=20 of dimensions=8 make codes of 80 bits | correct the options
--nproc 4 parallel.ep=4 dispatch.exchange=hierarchical dispatch.ranks_per_node=3 | dispatch.exchange='hierarchical' | cuts the groups of parallel.ep=4 by nodes | use dispatch.exchange=flat
--nproc 4 parallel.ep=4 dispatch.exchange=deduplicated dispatch.ranks_per_node=2 model.moe.num_experts=131072 | dispatch.exchange='deduplicated' | tells a node's experts in 16 bits, at most 32768, and a node has 65536 | use dispatch.exchange=hierarchical
parallel.ep=2 dispatch.exchange=deduplicated model.moe.capacity_factor=1.0 model.moe.capacity_policy=pad | model.moe.capacity_policy='pad' | and dispatch.exchange=deduplicated one to every node | use model.moe.capacity_policy=drop
parallel.ep=2 codec=lsh dispatch.codec.error_bound=0.2 dispatch.codec.most_rows=0.5 | dispatch.codec | both say how many hashes count: add error_bound=null | correct the options
parallel.ep=2 codec=lsh dispatch.codec.compensation=slopes | dispatch.codec.compensation='slopes' | must be one of residual, none, slope | did you mean slope?
codec=auto parallel.ep=2 dispatch.byte_budget=0.1 | dispatch.byte_budget=0.1 | and dispatch.error_budget=0.2: layers choose by one of them | add dispatch.error_budget=null
codec=auto parallel.ep=2 dispatch.error_budget=null | dispatch.error_budget | or dispatch.byte_budget must be given with dispatch.candidates | use e.g. 0.2
codec=auto parallel.ep=2 dispatch.error_budget=0 | dispatch.error_budget=0.0 | must be above 0 | use a value above 0
codec=auto parallel.ep=2 dispatch.error_budget=null dispatch.byte_budget=1.5 | dispatch.byte_budget=1.5 | must be above 0 and at most 1 | use a value
codec=auto parallel.ep=2 dispatch.warmup_steps=0 | dispatch.warmup_steps=0 | must be at least 1 with dispatch.candidates | use e.g. 20
codec=auto parallel.ep=2 +dispatch.wire.dispatch_forward=int8 | dispatch.wire | must not be set beside dispatch.candidates | make it one of them
codec=auto parallel.ep=2 +dispatch.candidates.none={wire:{dispatch_forward:int8}} | dispatch.candidates.none | is the name of leaving rows as they are | give it another name
codec=auto parallel.ep=2 +dispatch.candidates.same={codec:null} | dispatch.candidates.same | has neither codec nor wire | give it one, or remove it
codec=auto parallel.ep=2 +dispatch.candidates.int8.wire.block=-1 | dispatch.candidates.int8.wire.block=-1 | must be at least 0 | use a value
codec=auto parallel.ep=2 +dispatch.candidates.tree_int8.codec.dimensions=0 | dispatch.candidates.tree_int8.codec | is refused: dimensions=0 must be at least 1 | correct the options
codec=lsh parallel.ep=2 dispatch.codec.hashes=20 | dispatch.codec | is refused: hashes=20 of dimensions=8 make codes of 80 bits | correct the options
codec=auto parallel.ep=2 +dispatch.candidates.int8.wires=1 | dispatch.candidates.int8.wires=1 | is not a configuration key | did you mean wire?
placement.policy=balance | placement.policy='balance' | must be one of fixed, balanced, hecate, everywhere, eplb | did you mean balanced?
placement=balanced parallel.ep=2 placement.speeds=measure | placement.speeds='measure' | must be one of even, measured | did you mean measured?
placement=balanced parallel.ep=2 placement.calibrate=often | placement.calibrate='often' | must be true or false | write true or false
placement=balanced parallel.ep=2 placement.copies=0 | placement.copies=0 | must be at least 1 | use a value at least 1
placement=balanced parallel.ep=2 placement.copies=null train.device=cpu | placement.copies=null | is as many as the memory of a GPU allows, and train.device=cpu uses none | use a number
placement=balanced parallel.ep=2 placement.reshard_every_steps=-1 | placement.reshard_every_steps=-1 | must be at least 0 | use a value at least 0
placement=balanced parallel.ep=2 placement.every_steps=4 placement.reshard_every_steps=10 | placement.reshard_every_steps=10 | must be a multiple of placement.every_steps=4 | use 8 or 12
placement=balanced parallel.ep=2 placement.tolerance=-0.1 | placement.tolerance=-0.1 | must be at least 0 | use a value at least 0
placement=balanced parallel.ep=2 placement.spare=3 | placement.spare=3 | must be at most placement.copies=2 | use 2, or placement.copies=3
placement=hecate parallel.ep=2 placement.overlap_degree=0 | placement.overlap_degree=0 | must be at least 1 | use a value at least 1
placement=balanced parallel.ep=2 placement.every_steps=0 | placement.every_steps=0 | must be at least 1 | use a value at least 1
placement=balanced parallel.ep=2 placement.window_steps=0 | placement.window_steps=0 | must be at least 1 | use a value at least 1
placement=balanced parallel.ep=2 model.moe.capacity_factor=1.0 model.moe.capacity_policy=pad | placement.policy='balanced' | model.moe.capacity_policy=pad sends a fixed number of rows to every expert | use model.moe.capacity_policy=drop
placement=balanced parallel.ep=2 dispatch.exchange=deduplicated | placement.policy='balanced' | dispatch.exchange=deduplicated sends them to a node at once | use dispatch.exchange=flat or hierarchical
placement=balanced parallel.ep=2 model.moe.expert_widths=[32,96] | placement.policy='balanced' | model.moe.expert_widths=[32, 96] has several | use model.moe.expert_widths=null
placement=balanced parallel.ep=2 model.share_depth=all | placement.policy='balanced' | model.share_depth=all gives several layers the same experts | use model.share_depth=none
--nproc 4 placement=balanced parallel.ep=2 parallel.zero=1 | placement.policy='balanced' | parallel.zero=1 shards it over the ranks that have the same | use parallel.zero=0
--nproc 4 placement=balanced parallel.ep=2 parallel.pp=2 parallel.pp_schedule=zbv | placement.policy='balanced' | parallel.pp_schedule=zbv splits in two | use parallel.pp_schedule=1f1b or interleaved
--nproc 4 placement=balanced parallel.ep=4 dispatch.ranks_per_node=3 | placement.policy='balanced' | plans for nodes with as many ranks of parallel.ep=4 each | use another parallel.ep
codec=lsh model.moe.capacity_factor=1.0 model.moe.capacity_policy=pad | model.moe.capacity_policy='pad' | sends a fixed number of rows | use model.moe.capacity_policy=drop
model.moe.router._target_=no_such_package.Router | model.moe.router._target_='no_such_package.Router' | must be importable (No module named 'no_such_package') | check the spelling
model.moe.router._target_=os.path.join | model.moe.router._target_='os.path.join' | must be a subclass of torch.nn.Module | name a router
model.moe.router.scaling=2.5 | model.moe.router.scaling=2.5 | is not an option of moesys.moe.routers.TopKRouter | did you mean scaling_factor
model.moe.router.score_function=softmx | model.moe.router.score_function='softmx' | must be one of softmax, sigmoid | did you mean softmax
"""

# Of `moesys launch`.
_CLUSTERS = r"""
cluster=locl nodes=2 | cluster='locl' | must be one of apptainer_ib, h100_pyxis, local | did you mean local?
nodes=2 | cluster= | is missing | name a file of configs/cluster
cluster=local nodes=0 | nodes=0 | must be a number of nodes, at least 1 | write nodes=16
cluster=local+local nodes=2 | nodes=2 | for each of cluster=local+local | cluster=a+b nodes=1+16
cluster=local nodes=2 train.global_batch_tokens=4096 cluster.partitoin=p | cluster.partitoin='p' | is not a configuration key | did you mean cluster.partition
cluster=local nodes=2 train.global_batch_tokens=4096 cluster.grace_s=1 | cluster.grace_s=1 | must be at least 10 | use a value at least 10
cluster=local nodes=2 train.global_batch_tokens=4096 cluster.time_limit=soon | cluster.time_limit='soon' | must be a time of sbatch | for two days
cluster=h100_pyxis nodes=1 cluster.ranks_per_node=9 | cluster.ranks_per_node=9 | must be at most cluster.gpus_per_node=8 | use 8
cluster=local nodes=2 train.global_batch_tokens=4096 cluster.sbatch=[--mem=4G] | cluster.sbatch='--mem=4G' | is in the batch script already | cluster.memory_gib_per_node decides it
cluster=local nodes=2 train.global_batch_tokens=4096 cluster.container.image=a.sif | cluster.container.image='a.sif' | has no effect with cluster.container.runtime=none | set runtime to pyxis or apptainer
--config-dir <FOLDER>/yaml cluster=broken nodes=1 | broken.yaml | is not readable as YAML | correct the file
--config-dir <FOLDER>/yaml cluster=other nodes=1 | cluster.nmae='mine' | is not a configuration key | did you mean cluster.name
cluster=local nodes=2 train.global_batch_tokens=4096 parallel.ep=8 | parallel.ep=8 | must divide the world size 4 | use parallel.ep=4
cluster=local nodes=2 train.global_batch_tokens=4096 --sweep optim.lr=1e-3,0 | optim.lr=0.0 | must be above 0 | use a value above 0
cluster=h100_pyxis nodes=64 model=qwen3_30b_a3b data.path=<FOLDER>/large data.seq_len=4096 train.micro_batch_tokens=4096 train.global_batch_tokens=2097152 parallel.ep=8 | memory | which must be at most the 79.6 GiB of a GPU | use parallel.zero=
"""

# Of one process.
_SURROUNDINGS = r"""
OMP_NUM_THREADS=many | OMP_NUM_THREADS=many | must be a whole number, at least 1 | unset it
OMP_NUM_THREADS=0 | OMP_NUM_THREADS=0 | must be a whole number, at least 1 | unset it
GLOO_SOCKET_IFNAME=nosuch0 | GLOO_SOCKET_IFNAME=nosuch0 | must name an interface of this machine, and they are | unset it, or set it to one of those
CUDA_VISIBLE_DEVICES= train.device=cuda | train.device=cuda | this node shows 0 | set train.device=cpu
'MOESYS_CHAOS=kil rank=0 step=1' | MOESYS_CHAOS='kil rank=0 step=1' | 'kil' is no kind of fault | did you mean kill?
"""

# Of rank 1 of 2, as is the next.
_TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "<FREE>",
}
_UNDER_TORCHRUN = r"""
-WORLD_SIZE | WORLD_SIZE | is not set | torchrun sets it
-RANK | WORLD_SIZE=2 | without RANK | export both
RANK=2 | RANK=2 | must be below WORLD_SIZE=2 | torchrun sets it
RANK=one | RANK=one | must be a whole number, at least 0 | torchrun sets it
WORLD_SIZE=0 | WORLD_SIZE=0 | must be at least 1 | torchrun sets it
-LOCAL_RANK | LOCAL_RANK | is not set | torchrun sets it
LOCAL_RANK=2 | LOCAL_RANK=2 | must be below LOCAL_WORLD_SIZE=2 | torchrun sets it
LOCAL_RANK=0 | LOCAL_RANK=0 | is not RANK=1 modulo LOCAL_WORLD_SIZE=2 | consecutive numbers
LOCAL_WORLD_SIZE=3 | LOCAL_WORLD_SIZE=3 | must be at most WORLD_SIZE=2 | torchrun sets it
-MASTER_ADDR | MASTER_ADDR | is not set | torchrun sets it
MASTER_ADDR=tcp://n1 | MASTER_ADDR=tcp://n1 | must be a name or an address | name the machine of rank 0
MASTER_ADDR=nosuch.invalid | rank 1 | cannot resolve 'nosuch.invalid' | set MASTER_ADDR to its address
RANK=0 LOCAL_RANK=0 MASTER_ADDR=nosuch.invalid | rank 0 | cannot resolve 'nosuch.invalid' | set MASTER_ADDR to its address
-MASTER_PORT | MASTER_PORT | is not set | torchrun sets it
MASTER_PORT=http | MASTER_PORT=http | must be a whole number, at least 1 | choose a free one
MASTER_PORT=70000 | MASTER_PORT=70000 | must be below the number of ports=65536 | choose a free one
RANK=0 LOCAL_RANK=0 MASTER_PORT=<TAKEN> | port <TAKEN> | another program listens there | set MASTER_PORT to a free port
"""

_SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "3",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
_UNDER_SRUN = r"""
-SLURM_PROCID | SLURM_PROCID | is not set | start the ranks with srun
SLURM_PROCID=2 | SLURM_PROCID=2 | must be below SLURM_STEP_NUM_TASKS=2 | start the ranks with srun
SLURM_NTASKS=4 | SLURM_NTASKS=4 | is not SLURM_STEP_NUM_TASKS=2 | start the ranks with srun
SLURM_NODEID=1 | SLURM_NODEID=1 | must be below SLURM_STEP_NUM_NODES=1 | start the ranks with srun
SLURM_STEP_NODELIST=n[1- | SLURM_STEP_NODELIST=n[1- | its brackets do not pair | start the ranks with srun
SLURM_STEP_NODELIST=n[1-3] | SLURM_STEP_NODELIST=n[1-3] | lists 3 hosts, SLURM_STEP_NUM_NODES=1 | start the ranks with srun
SLURM_STEP_TASKS_PER_NODE=4 | SLURM_STEP_TASKS_PER_NODE=4 | makes 4 tasks on 1 nodes, SLURM_STEP_NUM_TASKS=2 | start the ranks with srun
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=<FREE> | RANK | of WORLD_SIZE=2 contradicts SLURM_PROCID=1 of SLURM_STEP_NUM_TASKS=2 | srun alone with RANK unset
"""

_MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-vm-1@1",
}
_UNDER_MPIRUN = r"""
OMPI_COMM_WORLD_RANK=2 | OMPI_COMM_WORLD_RANK=2 | must be below OMPI_COMM_WORLD_SIZE=2 | start the ranks with mpirun
MOESYS_MASTER_PORT=x | MOESYS_MASTER_PORT=x | must be a whole number | unset it
"""

_VARIABLE = re.compile(r"[A-Z][A-Z_]*")


def _rows(
    text: str, command: tuple[str, ...], launcher: Mapping[str, str] | None = None
) -> Iterator[Mutation]:
    for line in text.splitlines():
        if not line or line.startswith("# "):
            continue
        changes, key, rule, fix = line.split(" | ")
        words, environ = list[str](), dict(launcher or {})
        for change in shlex.split(changes):
            name, equals, value = change.partition("=")
            if equals and _VARIABLE.fullmatch(name):
                environ[name] = value
            elif _VARIABLE.fullmatch(change.removeprefix("-")):
                del environ[change.removeprefix("-")]
            else:
                words.append(change)
        yield Mutation(
            name=f"{command[0]} {changes}" if command[0] != "train" else changes,
            command=command,
            words=tuple(words),
            environ=environ,
            key=key,
            rule=rule,
            fix=fix,
        )


_ALONE = ("train", "train.start_timeout_s=1")
MUTATIONS: tuple[Mutation, ...] = (
    *_rows(_CONFIGURATIONS, ("train", "--nproc", "2")),
    *_rows(_CLUSTERS, ("launch", "--dry-run")),
    *_rows(_SURROUNDINGS, _ALONE),
    *_rows(_UNDER_TORCHRUN, _ALONE, _TORCHRUN),
    *_rows(_UNDER_SRUN, _ALONE, _SRUN),
    *_rows(_UNDER_MPIRUN, _ALONE, _MPIRUN),
)
