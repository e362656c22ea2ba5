"""The vault: nothing readable on the disk, nothing changed is opened, nothing half."""
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="needs the extra 'serve'")
from pftsleep.apps import vault as module
from pftsleep.apps.vault import Keyring, Vault, activate_key, add_key, read_private, remove_key, write_private
from pftsleep.errors import ConfigError, PFTSleepError, StoreError


@pytest.fixture
def vault(tmp_path) -> Vault: return Vault(tmp_path / "vault", Keyring.create(tmp_path / "keys.json"))

@pytest.fixture
def small_chunks(monkeypatch): monkeypatch.setattr(module, "_CHUNK", 64)

def path_of(vault: Vault, name: str) -> Path: return vault.folder / f"{name}.vault"
def parts(vault: Vault) -> list: return list((vault.folder / ".parts").iterdir())
def refused(vault: Vault, name: str = "a", context: str = "x") -> bool:
    with pytest.raises(StoreError): vault.get(name, context)
    with pytest.raises(StoreError): next(vault.reader(name, context)) # not even a first chunk
    return True

def run(code: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True)

def pieces(vault: Vault, name: str) -> tuple[bytes, list[bytes]]: # header, chunks
    data = path_of(vault, name).read_bytes()
    at = 10 + 1 + data[10] + 12
    at += 2 + int.from_bytes(data[at:at + 2], "big")
    step = module._CHUNK + 16
    return data[:at], [data[i:i + step] for i in range(at, len(data), step)]


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
def test_every_length_comes_back(vault, small_chunks, n):
    data = random.Random(n).randbytes(n)
    vault.put("a", data, "x")
    assert vault.get("a", "x") == data
    with vault.writer("b", "x") as f:
        for i in range(0, n, 7): f.write(data[i:i + 7])
    assert vault.get("b", "x") == data and f.size == n
    assert len(path_of(vault, "a").read_bytes()) == len(pieces(vault, "a")[0]) + n + 16 * max(1, -(-n // 64))


def test_every_flipped_byte_and_every_cut_is_refused(vault, small_chunks):
    vault.put("a", random.Random(0).randbytes(150), "x")
    path = path_of(vault, "a"); good = path.read_bytes()
    for i in range(len(good)):
        for bit in (1, 128):
            path.write_bytes(good[:i] + bytes([good[i] ^ bit]) + good[i + 1:])
            with pytest.raises(StoreError): vault.get("a", "x")
        path.write_bytes(good[:i])
        assert refused(vault)
    for more in (b"\0", bytes(16), bytes(80), good[-80:]):
        path.write_bytes(good + more)
        assert refused(vault)
    path.write_bytes(good)
    assert len(vault.get("a", "x")) == 150


def test_chunks_that_are_moved_or_borrowed_are_refused(vault, small_chunks):
    vault.put("a", bytes(64 * 4), "x"); vault.put("b", bytes(64 * 4), "x")
    head, a = pieces(vault, "a"); other, b = pieces(vault, "b")
    assert len(a) == 4
    wrong = [a[1:], a[:3], a[:2] + a[3:], [a[1], a[0], *a[2:]], [a[0], a[0], *a[2:]], [*a, a[3]], [*a[:3], a[2]], [*a[:3], a[3], a[3]], [b[0], *a[1:]], [*a[:3], b[3]], b, []]
    for chunks in wrong:
        path_of(vault, "a").write_bytes(head + b"".join(chunks))
        with pytest.raises(StoreError): vault.get("a", "x")
    path_of(vault, "a").write_bytes(other + b"".join(a))
    assert refused(vault)
    path_of(vault, "a").write_bytes(head + b"".join(a))
    assert vault.get("a", "x") == bytes(64 * 4)


def test_a_record_opens_in_its_place_only(vault):
    vault.put("a", b"of a", "x"); vault.put("b", b"of b", "x"); vault.put("c", b"of c", "y")
    a, b = path_of(vault, "a").read_bytes(), path_of(vault, "b").read_bytes()
    path_of(vault, "a").write_bytes(b); path_of(vault, "b").write_bytes(a)
    assert refused(vault, "a") and refused(vault, "b")
    for context in ("", "x", "y\0", "Y", "yy"): assert refused(vault, "c", context)
    assert vault.get("c", "y") == b"of c"
    other = Vault(vault.folder, Keyring.create(vault.folder.parent / "other.json"))
    with pytest.raises(StoreError, match="doesn't have"): other.get("c", "y")


def test_no_plaintext_on_the_disk(vault, tmp_path):
    secret = b"a very private night of somebody "
    vault.put("a", secret * 1000, "tenant-very-private")
    with pytest.raises(ZeroDivisionError), vault.writer("b", "x") as f:
        f.write(secret * 100_000)
        assert not any(secret in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        raise ZeroDivisionError
    add_key(vault.keyring); vault.rotate()
    for p in tmp_path.rglob("*"):
        if p.is_file(): assert secret not in (data := p.read_bytes()) and b"very-private" not in data
    for p in (vault.folder, path_of(vault, "a")): assert p.stat().st_mode & 0o077 == 0
    assert vault.names() == ["a"] and parts(vault) == []


def test_the_same_bytes_look_different_each_time(vault):
    vault.put("a", bytes(1000), "x"); first = path_of(vault, "a").read_bytes()
    vault.put("a", bytes(1000), "x"); second = path_of(vault, "a").read_bytes()
    assert sum(p == q for p, q in zip(first[60:], second[60:], strict=True)) < 50


@given(data=st.binary(max_size=300))
def test_garbage_only_raises_our_error(data):
    import tempfile
    with tempfile.TemporaryDirectory() as tmp:
        vault = Vault(Path(tmp) / "v", Keyring.create(Path(tmp) / "k"))
        for start in (b"", module._MAGIC, module._MAGIC + bytes([len(vault.keyring.active)]) + vault.keyring.active.encode()):
            path_of(vault, "a").write_bytes(start + data)
            with pytest.raises(PFTSleepError): vault.get("a", "x")
            with pytest.raises(PFTSleepError): list(vault.reader("a", "x"))


@given(data=st.one_of(st.binary(max_size=100), st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda s: st.dictionaries(st.sampled_from(["active", "keys", "k"]), s, max_size=3)).map(lambda x: json.dumps(x).encode())))
def test_a_garbled_keyring_only_raises_our_error(data):
    with pytest.raises(ConfigError): module._parse_keyring(data, "keys.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "a\0b", "a\nb", "a b", "ä", "a.vault/b", "a" * 101, "a/b/c/d/e/f", "a\\b", ".parts/a", "a."])
def test_names_stay_in_the_folder(vault, name):
    for call in (lambda: vault.put(name, b"", ""), lambda: vault.get(name, ""), lambda: vault.delete(name), lambda: name in vault):
        with pytest.raises(StoreError, match="no name"): call()
    assert [p.name for p in vault.folder.parent.iterdir() if p.name not in ("vault", "keys.json")] == []


def test_a_link_in_the_folder_gives_nothing_away(vault, tmp_path):
    (tmp_path / "outside").write_bytes(b"secret of the system")
    path_of(vault, "a").symlink_to(tmp_path / "outside")
    assert refused(vault)
    vault.put("a", b"mine", "x") # replaces the link, not its target
    assert (tmp_path / "outside").read_bytes() == b"secret of the system" and vault.get("a", "x") == b"mine"


# --- keys

@pytest.mark.parametrize("mode", [0o644, 0o604, 0o640, 0o660, 0o606, 0o610, 0o622, 0o666])
def test_open_keyrings_are_refused(tmp_path, mode):
    Keyring.create(path := tmp_path / "keys.json"); path.chmod(mode)
    with pytest.raises(ConfigError, match="others may read"): Keyring.from_file(path)
    path.chmod(0o400)
    assert Keyring.from_file(path).ids


def test_a_mounted_secret_is_taken_and_a_strangers_not(tmp_path, monkeypatch):
    Keyring.create(path := tmp_path / "keys.json")
    if path.stat().st_uid != 0: pytest.skip("needs a file of root")
    path.chmod(0o440)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Keyring.from_file(path).ids # of root, for the group of the process
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="others"): Keyring.from_file(path)
    os.chown(path, 1234, 1234); path.chmod(0o400)
    with pytest.raises(ConfigError, match="another user"): Keyring.from_file(path)


def test_keys_are_private_from_the_first_moment_and_never_shown(tmp_path):
    old = os.umask(0)
    try: ring = Keyring.create(path := tmp_path / "keys.json"); add_key(ring)
    finally: os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    texts = [t for t in json.loads(path.read_text())["keys"].values()]
    assert len(set(texts)) == 2 and not any(t in f"{ring!r} {ring} {vars(ring).keys()}" for t in texts)
    path.write_text(path.read_text().replace(texts[0], "not base64 " + texts[0]))
    with pytest.raises(ConfigError) as e: Keyring.from_file(path)
    assert texts[0] not in str(e.value) and e.value.__cause__ is None
    import pickle
    with pytest.raises(ConfigError): pickle.dumps(ring)


def test_a_program_may_give_the_keys(tmp_path):
    Keyring.create(path := tmp_path / "keys.json")
    ring = Keyring.from_command([sys.executable, "-c", "import sys, pathlib; print(pathlib.Path(sys.argv[1]).read_text())", str(path)])
    Vault(tmp_path / "v", ring).put("a", b"1", "x")
    assert Vault(tmp_path / "v", Keyring.from_file(path)).get("a", "x") == b"1"
    for argv in (["/nowhere/program"], ["false"], [sys.executable, "-c", "print('no json')"], []):
        with pytest.raises(ConfigError): Keyring.from_command(argv)


def test_rotation_old_and_new_readable_then_old_key_gone(vault, tmp_path):
    old, data = vault.keyring.active, {f"r{i}": bytes([i]) * 1000 for i in range(6)}
    for name, value in data.items(): vault.put(name, value, f"context {name}")
    backup = path_of(vault, "r0").read_bytes()
    server = Vault(vault.folder, Keyring.from_file(tmp_path / "keys.json")) # another process, which isn't told anything
    new = add_key(vault.keyring)
    vault.put("later", b"", "x")
    assert server.get("later", "x") == b"" # it finds the new key by itself
    server.put("from-server", b"", "x")
    assert vault.keys_in_use() == {old: 6, new: 2}
    with pytest.raises(StoreError, match="6 records still need"): vault.retire(old)
    with pytest.raises(ConfigError, match="active"): vault.delete("later"), vault.delete("from-server"), vault.retire(new)
    seen = []
    assert vault.rotate(lambda done, total: seen.append((done, total))) == 6 and seen[-1] == (6, 6)
    assert vault.rotate() == 0
    vault.retire(old)
    assert server.keyring.fresh().ids == [new]
    assert {n: server.get(n, f"context {n}") for n in data} == data
    path_of(vault, "r0").write_bytes(backup)
    with pytest.raises(StoreError, match="doesn't have"): vault.get("r0", "context r0")


def test_a_rotation_that_is_killed_is_finished_by_the_next(vault, tmp_path):
    for i in range(30): vault.put(f"r{i:02}", bytes([i]) * 300_000, "x")
    old, new = vault.keyring.active, add_key(vault.keyring)
    done = run("""
        import os, signal, sys
        from pftsleep.apps.vault import Keyring, Vault, VaultWriter
        vault = Vault(sys.argv[1], Keyring.from_file(sys.argv[2]))
        write = VaultWriter.write
        def killed(self, data):
            if self.name == "r11": write(self, data); os.kill(os.getpid(), signal.SIGKILL)
            return write(self, data)
        VaultWriter.write = killed
        vault.rotate()
        """, vault.folder, tmp_path / "keys.json")
    assert done.returncode == -9, done.stderr
    assert len(parts(vault)) == 1 and vault.keys_in_use() == {old: 19, new: 12} # one of them half
    assert all(vault.get(f"r{i:02}", "x") == bytes([i]) * 300_000 for i in range(30))
    again = Vault(vault.folder, vault.keyring)
    assert parts(again) == []
    assert again.rotate() == 19 and again.keys_in_use() == {new: 30}
    assert all(again.get(f"r{i:02}", "x") == bytes([i]) * 300_000 for i in range(30))


def test_rotation_goes_on_after_a_damaged_record_and_says_so(vault):
    for n in "abc": vault.put(n, bytes(100), "x")
    path_of(vault, "b").write_bytes(path_of(vault, "b").read_bytes()[:-1])
    new = add_key(vault.keyring)
    with pytest.raises(StoreError, match="1 records still have an old key: b "): vault.rotate()
    assert vault.keys_in_use()[new] == 2 and vault.get("c", "x") == bytes(100)


def test_rotation_brings_nothing_back(vault, monkeypatch):
    for n in "abc": vault.put(n, bytes(100), "x")
    add_key(vault.keyring)
    commit = module._commit
    def meanwhile(v, writer): # after b was read and before it is replaced
        if writer.name == "b" and writer.only_over: v.delete("b")
        if writer.name == "c" and writer.only_over: v.put("c", b"newer", "x")
        return commit(v, writer)
    monkeypatch.setattr(module, "_commit", meanwhile)
    assert vault.rotate() == 1
    assert vault.names() == ["a", "c"] and vault.get("c", "x") == b"newer" and parts(vault) == []


def test_a_key_that_a_writer_uses_stays(vault):
    old = vault.keyring.active
    with vault.writer("slow", "x") as f:
        f.write(b"1")
        add_key(vault.keyring)
        with pytest.raises(StoreError, match="still need"): vault.retire(old)
        assert vault.sweep() == 0 # it is alive
    assert vault.get("slow", "x") == b"1"
    with pytest.raises(StoreError, match="removed meanwhile"), vault.writer("slow", "x") as f: # somebody removes the key by hand
        activate_key(vault.keyring, add_key(vault.keyring, activate=False))
        remove_key(vault.keyring, f._header.key_id)
    assert parts(vault) == []


# --- streams, full disks, many at once

def test_streams_need_constant_memory(vault, tmp_path):
    code = """
        import hashlib, resource, sys
        from pftsleep.apps.vault import Keyring, Vault
        vault = Vault(sys.argv[1], Keyring.from_file(sys.argv[2]))
        block, n = bytes(range(256)) * 1024, int(sys.argv[3]) * 4 # 256 kB
        def go(n):
            with vault.writer("big", "x") as f:
                for i in range(n): f.write(block)
            size = 0
            for chunk in vault.reader("big", "x"): size += len(chunk)
            assert size == n * len(block)
        go(32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        go(n)
        vault.decrypt_to("big", "x", sys.argv[4])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    done = run(code, vault.folder, tmp_path / "keys.json", 64, tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain").stat().st_size == 64 << 20
    assert int(done.stdout) < 6_000, f"{done.stdout} kB more for 64 MB than for 8 MB"


def test_a_full_disk_leaves_nothing_and_the_old_record(vault, tmp_path):
    vault.put("a", b"old", "x")
    done = run("""
        import resource, sys
        from pathlib import Path
        from pftsleep.apps.vault import Keyring, Vault
        from pftsleep.errors import StoreError
        vault = Vault(sys.argv[1], Keyring.from_file(sys.argv[2]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))
        for name in ("a", "b"):
            try: vault.put(name, bytes(5 << 20), "x")
            except StoreError as e: print(e.problem)
            f = vault.writer(name, "x")
            try:
                for _ in range(50): f.write(bytes(1 << 18))
                f.close()
            except StoreError: print("refused")
            try: f.write(b"1")
            except StoreError as e: print(e.problem)
        vault.put("plain", bytes(2 << 20), "x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        try: vault.decrypt_to("plain", "x", sys.argv[3])
        except StoreError as e: print(e.problem)
        """, vault.folder, tmp_path / "keys.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can't be written") == 2 and done.stdout.count("refused") == 2 and done.stdout.count("is closed") == 2 and "decrypted" in done.stdout
    assert vault.names() == ["a", "plain"] and vault.get("a", "x") == b"old" and parts(vault) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys.json", "vault"]


def test_killed_while_writing(vault, tmp_path):
    vault.put("a", b"old", "x")
    done = run("""
        import os, signal, sys
        from pftsleep.apps.vault import Keyring, Vault
        f = Vault(sys.argv[1], Keyring.from_file(sys.argv[2])).writer("a", "x")
        f.write(bytes(5 << 20)); os.kill(os.getpid(), signal.SIGKILL)
        """, vault.folder, tmp_path / "keys.json")
    assert done.returncode == -9 and len(parts(vault)) == 1
    assert vault.get("a", "x") == b"old" and vault.sweep() == 1 and parts(vault) == []


def test_many_threads_one_name(vault):
    values, wrong = [bytes([i]) * 200_000 for i in range(8)], []
    vault.put("a", values[0], "x")
    def write(v):
        for _ in range(5): vault.put("a", v, "x")
    def read():
        for _ in range(30):
            try: wrong.extend([1] if vault.get("a", "x") not in values else [])
            except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=write, args=(v,)) for v in values] + [threading.Thread(target=read) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert wrong == [] and vault.get("a", "x") in values and parts(vault) == [] and vault.names() == ["a"]


def test_a_writer_that_is_forgotten_leaves_nothing(vault):
    f = vault.writer("a", "x"); f.write(bytes(10)); del f
    assert vault.names() == [] and parts(vault) == []


def test_private_files(tmp_path):
    write_private(tmp_path / "a", b"1"); write_private(tmp_path / "a", b"2")
    assert read_private(tmp_path / "a") == b"2" and (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="larger"): read_private(tmp_path / "a", limit=0)
    with pytest.raises(StoreError): write_private(tmp_path / "no/a", b"")
    with pytest.raises(ConfigError): read_private(tmp_path)
    with pytest.raises(StoreError): Vault(tmp_path / "a", Keyring.create(tmp_path / "k")) # a file is no vault


@pytest.mark.slow
def test_a_gigabyte(vault, tmp_path):
    done = run("""
        import resource, sys
        from pftsleep.apps.vault import Keyring, Vault
        vault = Vault(sys.argv[1], Keyring.from_file(sys.argv[2]))
        before, block = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, bytes(1 << 20)
        with vault.writer("big", "x") as f:
            for i in range(1024): f.write(block)
        assert sum(len(c) for c in vault.reader("big", "x")) == 1 << 30
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """, vault.folder, tmp_path / "keys.json")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000
