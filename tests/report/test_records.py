"""Lines of metrics.jsonl read without their numbers of each expert."""

import json
from pathlib import Path

from moesys.report.records import read_records, without_experts


def test_leaving_out_loads_and_holders_changes_nothing_else() -> None:
    for record in (
        {"kind": "train", "step": 1, "expert_load": [[1, 2], [3, 4]]},
        {"kind": "train", "step": 1, "expert_load": []},
        {"kind": "train", "step": 1, "expert_holders": [[1, 2]], "expert_load": [[1, 2], [3, 4]]},
        {"kind": "train", "step": 1, "notes": ["a"], "expert_holders": [[1, 2]]},
        {"kind": "stop", "reason": ', "expert_load": [1]}', "notes": [1]},
        {"kind": "stop", "reason": 'x, "expert_load": ]}'},
        {"kind": "start", "notes": ["a", "b"]},
    ):
        short = json.loads(without_experts(json.dumps(record).encode() + b"\n"))
        left_out = ("expert_holders", "expert_load")
        assert short == {name: value for name, value in record.items() if name not in left_out}
    for torn in (
        b'{"kind": "train", "step": 1, "expert_load": [[1, 2]',
        b'{"kind": "train", "step": 1, "expert_holders": [[1, 2]], "expert_lo',
    ):
        assert without_experts(torn) == torn


def test_one_line_in_a_few_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    each = {"expert_holders": [[1, 2]], "expert_load": [[3, 4]]}
    lines = [json.dumps({"kind": "train", "step": step, **each}) for step in range(1, 13)]
    path.write_text("\n".join(lines) + "\n")
    records = list(read_records(path, expert_stride=5))
    assert [record["step"] for record in records] == list(range(1, 13))
    for key in each:
        assert [record["step"] for record in records if key in record] == [5, 10, 12]
