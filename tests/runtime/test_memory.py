"""Memory that is left within the control groups of a process, of version 2 and 1."""

import pytest

from vqmoe_ds.runtime import memory
from vqmoe_ds.runtime.memory import GIB, free_bytes, total_bytes


@pytest.mark.parametrize(
    ("line", "folder", "limit", "use"),
    [
        ("0::/job/step", "job", "memory.max", "anon"),
        ("9:cpuset:/\n4:cpu,memory:/job/step\n0::/", "memory/job", "memory.limit_in_bytes", "total_rss"),
        ("4:memory:/of/the/host\n0::/", "memory", "memory.limit_in_bytes", "total_rss"),
    ],
    ids=["version 2", "version 1", "container of version 1"],
)
def test_a_control_group_leaves_its_limit_less_what_is_in_use(tmp_path, monkeypatch, line, folder, limit, use):
    group, read = tmp_path / folder, memory._read
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text(f"{GIB}\n")
    (group / "memory.stat").write_text(f"cache 7\nrss 5\ninactive_anon 3\n{use} {GIB - 4096}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_read", lambda path: line if path == "/proc/self/cgroup" else read(path))
    assert (total_bytes(), free_bytes()) == (GIB, 4096)
