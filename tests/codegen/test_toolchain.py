import ctypes
import warnings

import pytest

from tilewright.codegen.c import elf
from tilewright.codegen.c.toolchain import (
    Compiler,
    Source,
    available_compilers,
    check_portable,
    compile_objects,
    find_compiler,
    link_shared,
)
from tilewright.codegen.cache import Cache
from tilewright.codegen.targets import GLIBC_FLOOR, parse
from tilewright.runtime.errors import CompileError

V3 = parse("cpu:x86-64-v3", ())
V4 = parse("cpu:x86-64-v4+vnni+bf16", ())
EXPORT = '__attribute__((visibility("default"))) '
CLOCK = Source("clock", EXPORT + "const char *built(void) { return __DATE__; }")
SEMAPHORE = Source(
    "semaphore", EXPORT + "int sem_clockwait(void *, int, void *);\nint f(void) { return sem_clockwait(0, 0, 0); }"
)
ABSENT = Source("absent", "int absent_one(void);\n" + EXPORT + "int f(void) { return absent_one(); }")
ADD = Source("add", EXPORT + "int add(int a, int b) { return a + b; }")
NEWER = Source(
    "newer",
    "#include <math.h>\n#include <pthread.h>\n"
    "static void *body(void *p) { *(double *)p = exp(*(double *)p); return p; }\n" + EXPORT + "double run(double x) {\n"
    "  pthread_t t; if (pthread_create(&t, 0, body, &x)) return -1; pthread_join(t, 0);\n"
    "  return x + pow(x, 2.5) + log2(x); }",
)


@pytest.fixture(scope="module", params=["cc", "zig"])
def compiler(request):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TILEWRIGHT_CC", request.param)
        if request.param == "cc" and not any(c.kind != "zig" for c in available_compilers()):
            pytest.skip("no system compiler")
        return find_compiler()


def test_compiles_links_and_runs(compiler, tmp_path):
    names = []
    objects = compile_objects(compiler, [NEWER, ADD], V3, progress=names.append)
    library = link_shared(compiler, objects, V3)
    assert sorted(names) == ["add", "newer"]
    path = tmp_path / "model.so"
    path.write_bytes(library)
    loaded = ctypes.CDLL(str(path))
    loaded.run.restype, loaded.run.argtypes = ctypes.c_double, [ctypes.c_double]
    assert loaded.add(2, 3) == 5
    assert loaded.run(0.0) == 1.0 + 1.0 + 0.0
    assert elf.newest_glibc(library) <= GLIBC_FLOOR
    assert "libpthread.so.0" in elf.needed_libraries(library)
    assert set(elf.required_versions(library)) <= set(elf.needed_libraries(library))


def test_the_same_input_gives_the_same_bytes(compiler, tmp_path, monkeypatch):
    source = Source("where", EXPORT + "const char *where(void) { return __FILE__; }")
    first = compile_objects(compiler, [source, ADD], V4)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    second = compile_objects(compiler, [source, ADD], V4)
    assert first == second
    assert str(tmp_path).encode() not in second[0] and b"/tmp" not in second[0]
    assert link_shared(compiler, first, V4) == link_shared(compiler, second, V4)


def test_a_target_s_instructions_are_there(compiler):
    guard = "#if !defined(__AVX512VNNI__) || !defined(__AVX512BF16__) || !defined(__FMA__)\n#error missing\n#endif\n"
    compile_objects(compiler, [Source("v4", guard)], V4)
    compile_objects(compiler, [Source("v3", "#if defined(__AVX512F__) || !defined(__AVX2__)\n#error\n#endif\n")], V3)


def test_an_error_names_the_kernel_and_the_line(compiler):
    bad = Source("matmul_7x9", "int x;\nint f(void) { return undeclared_thing; }\n")
    with pytest.raises(CompileError, match=r"(?s)'matmul_7x9'.*matmul_7x9\.c:2:.*undeclared_thing"):
        compile_objects(compiler, [ADD, bad], V3)


def test_a_build_date_is_refused(compiler):
    with pytest.raises(CompileError, match="clock"):
        compile_objects(compiler, [CLOCK], V3)


def test_an_undefined_symbol_fails_the_link(compiler):
    objects = compile_objects(compiler, [ABSENT], V3)
    with pytest.raises(CompileError, match="absent_one"):
        link_shared(compiler, objects, V3)


def test_a_newer_c_library_is_refused(monkeypatch):
    if compiler := next((c for c in available_compilers() if c.kind == "gcc"), None):
        objects = compile_objects(compiler, [SEMAPHORE], V3)
        with pytest.raises(CompileError, match=r"glibc 2\.3\d.*2\.28"):
            link_shared(compiler, objects, V3)
    else:
        pytest.skip("no gcc")


def test_foreign_libraries_and_damaged_files_are_refused(compiler):
    with pytest.raises(CompileError, match="ELF"):
        check_portable(b"MZ not a library")
    library = link_shared(compiler, compile_objects(compiler, [NEWER], V3), V3)
    with pytest.raises(CompileError, match=r"libn\.so\.6"):
        check_portable(library.replace(b"libm.so.6", b"libn.so.6"))


def test_cache_skips_the_compiler(tmp_path):
    """A second compilation never runs the compiler; another flag, target, header or version does."""
    cache = Cache(tmp_path / "cache")
    include = tmp_path / "include"
    include.mkdir()
    (include / "value.h").write_text("#define VALUE 1\n")
    source = Source("value", '#include "value.h"\n' + EXPORT + "int value(void) { return VALUE; }")
    good = find_compiler()
    broken = Compiler(good.command, good.kind, good.version)
    first = compile_objects(good, [source], V3, cache=cache, include=include)

    def entries():
        return len(list(cache.directory.glob("??/*")))

    assert entries() == 1
    assert compile_objects(broken, [source], V3, cache=cache, include=include) == first and entries() == 1
    compile_objects(good, [source], V3, cache=cache, include=include, flags=("-DX",))
    compile_objects(good, [source], V4, cache=cache, include=include)
    (include / "value.h").write_text("#define VALUE 2\n")
    assert compile_objects(good, [source], V3, cache=cache, include=include) != first
    assert entries() == 4


def test_an_unusable_cache_warns_and_compiles(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="TILEWRIGHT_CACHE"):
        assert compile_objects(find_compiler(), [ADD], V3, cache=Cache(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_objects(find_compiler(), [ADD], V3)


def test_no_compiler_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("TILEWRIGHT_CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError, match="pip install ziglang"):
        find_compiler()
    monkeypatch.setenv("TILEWRIGHT_CC", "no-such-cc -m64")
    with pytest.raises(CompileError, match=r"TILEWRIGHT_CC='no-such-cc -m64'"):
        find_compiler()


def test_without_a_system_compiler_ziglang_is_used(monkeypatch, tmp_path):
    pytest.importorskip("ziglang")
    monkeypatch.delenv("TILEWRIGHT_CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler().kind == "zig"
