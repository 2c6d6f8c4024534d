"""Lines of metrics.jsonl read without their loads."""

import json

from moesys.report.records import without_load


def test_leaving_out_the_loads_changes_nothing_else() -> None:
    for record in (
        {"kind": "train", "step": 1, "expert_load": [[1, 2], [3, 4]]},
        {"kind": "train", "step": 1, "expert_load": []},
        {"kind": "stop", "reason": ', "expert_load": [1]}', "notes": [1]},
        {"kind": "stop", "reason": 'x, "expert_load": ]}'},
        {"kind": "start", "notes": ["a", "b"]},
    ):
        short = json.loads(without_load(json.dumps(record).encode() + b"\n"))
        assert short == {name: value for name, value in record.items() if name != "expert_load"}
    torn = b'{"kind": "train", "step": 1, "expert_load": [[1, 2]'
    assert without_load(torn) == torn
