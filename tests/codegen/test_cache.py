import os
import subprocess
import sys
import time

import pytest

from tilewright.codegen.cache import Cache, key_of, parse_size, user_cache
from tilewright.runtime.errors import UsageError

KEY = key_of(["a"])


def entry(cache, key):
    return cache.directory / key[:2] / key


def test_returns_what_was_stored(tmp_path):
    cache = Cache(tmp_path / "not" / "there")
    assert cache.get(KEY) is None
    cache.put(KEY, b"object")
    cache.put(key_of(["b"]), b"")
    assert cache.get(KEY) == b"object"
    assert cache.get(key_of(["b"])) == b""


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:10], lambda d: b"", lambda d: d[:-1] + b"\0"])
def test_a_damaged_entry_is_absent_and_removed(tmp_path, damage):
    cache = Cache(tmp_path)
    cache.put(KEY, b"object")
    path = entry(cache, KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(KEY) is None
    assert not path.exists()


def test_trim_removes_the_longest_unused(tmp_path):
    cache = Cache(tmp_path, limit=3 * 1032)
    keys = [key_of([str(i)]) for i in range(5)]
    for age, key in enumerate(keys):
        cache.put(key, bytes(1000))
        os.utime(entry(cache, key), (1000 + age, 1000 + age))
    assert cache.get(keys[0]) == bytes(1000)  # now the most recently used
    cache.trim()
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True, True]


def test_trim_removes_only_abandoned_partial_files(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, b"object")
    old, new = (entry(cache, KEY).parent / f"partial-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.trim()
    assert not old.exists() and new.exists() and cache.get(KEY) == b"object"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    cache = Cache(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        cache.put(KEY, b"object")
    assert list(tmp_path.glob("??/*")) == []


def test_key_keeps_parts_apart():
    assert key_of(["ab", "c"]) != key_of(["a", "bc"]) != key_of(["abc"])


def test_processes_share_it(tmp_path):
    """Writers and trimmers of the same few entries: every read gives the whole content or nothing."""
    program = (
        "import sys; from pathlib import Path; from tilewright.codegen.cache import Cache, key_of\n"
        "cache = Cache(Path(sys.argv[1]), limit=50_000)\n"
        "for i in range(150):\n"
        "    key = key_of([str(i % 7)])\n"
        "    found = cache.get(key)\n"
        "    assert found in (None, bytes([i % 7]) * 20_000)\n"
        "    cache.put(key, bytes([i % 7]) * 20_000)\n"
        "    cache.trim()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", "off")
    assert user_cache() is None
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", "1.5 MiB")
    assert user_cache() == Cache(tmp_path, 3 << 19)
    monkeypatch.delenv("TILEWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache().directory == tmp_path / "tilewright"


def test_size():
    assert parse_size("123") == 123 and parse_size("2GiB") == 2 << 30
    for text in ("", "2 GB", "-1", "lots"):
        with pytest.raises(UsageError, match="TILEWRIGHT_CACHE_SIZE"):
            parse_size(text)
