"""The C example gives the runtime's numbers bit for bit, and one clear line for everything that is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tilewright
from tilewright.codegen.c.description import text
from tilewright.codegen.c.toolchain import INCLUDE_DIRECTORY, available_compilers
from tilewright.compiler.options import Entry
from tilewright.models.initialize import initialize

SOURCE = Path(tilewright.__file__).parent / "examples" / "c" / "run_model.c"
STRICT = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror")


class Everything(nn.Module):
    """Several inputs and outputs, an index, a check, a size with a factor, and state that starts as stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.words = nn.Linear(6, 8), nn.Linear(8, 3), nn.Embedding(10, 8)
        self.register_buffer("total", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, word: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Scores, what was scored so far, a softmax, a count and a flag."""
        if x.shape[0] == 13:
            return {"scores": x}
        scores = torch.softmax(self.second(torch.relu(self.first(x)) + self.words(word)), -1)
        self.total.add_(scores.sum(0))
        self.calls.add_(1)
        return {
            "scores": scores, "total": self.total.clone(), "soft": row.softmax(-1), "calls": self.calls.clone(),
            "large": row > 0,
        }  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """The second entry point."""
        return self.first(x)

    def gather(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The third: over a state whose size is chosen."""
        kept = kept + x.sum(0)
        return x + kept[-1:], kept


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """An artifact of all that an entry point can have."""
    torch.manual_seed(0)
    args = (torch.randn(2, 6), torch.tensor([3, 9]), torch.randn(2, 24))
    shapes = {"x": "batch:1..32,6", "word": "batch", "row": "2,8*blocks:1..80"}
    path = tmp_path_factory.mktemp("everything") / "everything.tw"
    entries = {
        "main": Entry("forward", args, dynamic_shapes=shapes),
        "encode": Entry("encode", args[:1], dynamic_shapes={"x": "batch:1..32,6"}),
        "gather": Entry(
            "gather", (args[0], torch.zeros(4, 6)), states=("kept",),
            dynamic_shapes={"x": "count+1:1..8,6", "kept": "slots:2..1000,6"},
        ),
    }  # fmt: skip
    tilewright.compile(initialize(Everything(), 0), output=path, entries=entries, verify="off")
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The trained convolutional network."""
    path = tmp_path_factory.mktemp("digits") / "digits.tw"
    tilewright.compile("digits", output=path, verify="off")
    return path


@pytest.fixture(scope="module")
def bytelm(tmp_path_factory) -> Path:
    """The trained language model."""
    path = tmp_path_factory.mktemp("bytelm") / "bytelm.tw"
    tilewright.compile("bytelm", output=path, verify="off")
    return path


def library_of(artifact: Path) -> Path:
    (library,) = artifact.glob("kernels/*/model.so")
    return library


def compile_example(folder: Path, command: tuple[str, ...], *flags: str) -> Path:
    program = folder / "run_model"
    done = subprocess.run([*command, *STRICT, str(SOURCE), "-o", str(program), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module", params=available_compilers(), ids=lambda compiler: compiler.kind)
def program(request, tmp_path_factory) -> Path:
    """The example, built by every compiler; gcc adds its sanitizers, which also report leaks."""
    flags = ["-I", str(INCLUDE_DIRECTORY), "-ldl"]
    if request.param.kind == "gcc":
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_example(tmp_path_factory.mktemp("program"), request.param.command, *flags)


def call(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def refusal(program: Path, *arguments: object) -> list[str]:
    """What the program says to standard error; it says nothing else and fails."""
    done = call(program, *arguments)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    return done.stderr.splitlines()


def store(folder: Path, **arrays: np.ndarray) -> list[Path]:
    """Input files, as the example's users write them."""
    for name, array in arrays.items():
        array.tofile(folder / f"{name}.bin")
    return [folder / f"{name}.bin" for name in arrays]


@pytest.mark.parametrize("threads", [1, 3])
def test_digits(digits, program, tmp_path, threads):
    images = np.random.default_rng(0).random((37, 1, 8, 8), dtype=np.float32)
    done = call(
        program, "-t", threads, "-o", tmp_path, library_of(digits), digits / "weights.safetensors", "batch=37",
        *store(tmp_path, image=images),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with tilewright.load(digits, threads=2) as model:
        expected = model(images)
    name = "output"
    assert (tmp_path / f"{name}.bin").read_bytes() == expected.tobytes()
    first, *rows = done.stdout.splitlines()
    assert first == f"{name}: float32[37, 10]"
    for line, row in zip(rows, expected, strict=False):
        assert line.split()[-3:] == [f"[{row.argmax()}]", "=", f"{row.max():.9g}"]


def test_states_whose_size_varies(everything, program, tmp_path):
    x = np.random.default_rng(0).random((4, 6), dtype=np.float32)
    given = ("-e", "gather", "-o", tmp_path, library_of(everything), everything / "weights.safetensors")
    done = call(program, *given, "count=3", "slots=900", *store(tmp_path, x=x))
    assert (done.returncode, done.stderr) == (0, "")
    with tilewright.load(everything, threads=2, entry="gather") as model:
        assert (tmp_path / "output.bin").read_bytes() == model.session({"slots": 900})(x).tobytes()
    assert refusal(program, *given, "slots=1001") == ["slots must be 2 to 1000"]


@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (2, 3), (31, 80)])
def test_inputs_outputs_and_states_of_all_kinds(everything, program, tmp_path, batch, blocks):
    random = np.random.default_rng(batch)
    x, row = (random.standard_normal(shape).astype(np.float32) for shape in ((batch, 6), (2, 8 * blocks)))
    word = random.integers(0, 10, batch)
    paths = (library_of(everything), everything / "weights.safetensors")
    files = store(tmp_path, x=x, word=word, row=row)
    done = call(program, "-o", tmp_path, *paths, *files, f"blocks={blocks}", f"batch={batch}")
    assert (done.returncode, done.stderr) == (0, "")
    with tilewright.load(everything, threads=2) as model:
        expected, outputs = model(x, word, row), model.outputs
        encoded, (encoded_spec,) = model.entry("encode")(x), model.entry("encode").outputs
    assert expected["calls"] == 1
    assert [spec.dtype for spec in outputs] == ["float32", "float32", "float32", "int64", "bool"]
    for spec, array in zip(outputs, expected.values(), strict=True):
        assert (tmp_path / f"{spec.name}.bin").read_bytes() == array.tobytes(), spec.name
        assert f"{spec.name}: {spec.dtype}{list(array.shape)}" in done.stdout
    done = call(program, "-e", "encode", "-o", tmp_path, *paths, f"batch={batch}", files[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / f"{encoded_spec.name}.bin").read_bytes() == encoded.tobytes()


def test_bad_inputs(everything, program, tmp_path):
    paths = (library_of(everything), everything / "weights.safetensors")
    x, row = np.zeros((2, 6), np.float32), np.zeros((2, 8), np.float32)
    good = store(tmp_path, x=x, word=np.array([0, 9]), row=row)
    assert call(program, *paths, "batch=2", *good).returncode == 0
    bad = store(tmp_path, out_of_range=np.array([0, 10]))
    (line,) = refusal(program, *paths, "batch=2", good[0], *bad, good[2])
    assert line.endswith("an input holds an index that the model's tables do not have") and line.startswith("step ")
    (line,) = refusal(program, *paths, "batch=1", *good)
    assert line == f"{good[0]}: has 48 bytes, input x takes 24 with these sizes"
    (line,) = refusal(program, *paths, "batch=2", *good[:2], tmp_path / "none.bin")
    assert line == f"{tmp_path}/none.bin: cannot be read"
    assert refusal(program, *paths, "batch=33", *good) == ["batch must be 1 to 32"]
    assert refusal(program, *paths, "batch=0", *good) == ["batch must be 1 to 32"]
    assert refusal(program, *paths, "batch=9" + "9" * 30, *good) == ["batch must be 1 to 32"]
    (line,) = refusal(program, *paths, "batch=13", *good)
    assert "13" in line
    for value in ("batch=", "batch=two", "batch=2x"):
        assert refusal(program, *paths, value, *good) == [f"{value}: expected a number"]
    assert refusal(program, *paths, "batch=2", good[0]) == [
        "batch=2 (1 to 32)", "blocks=1 (1 to 80)", "x: float32[2, 6]", "word: int64[2]", "row: float32[2, 8]",
        "expected 3 input files, got 1",
    ]  # fmt: skip
    done = call(program, "-o", tmp_path / "none", *paths, "batch=2", *good)
    assert done.returncode == 1 and done.stderr.endswith(".bin: cannot be written\n")


def test_bad_artifacts(everything, digits, program, tmp_path):
    library, weights = library_of(digits), digits / "weights.safetensors"
    other = everything / "weights.safetensors"
    (line,) = refusal(program, library, other)
    assert line == f"{other}: has {other.stat().st_size} bytes, the library's weights have {weights.stat().st_size}"
    blank = tmp_path / "blank.safetensors"
    blank.write_bytes(b"\xff" * weights.stat().st_size)
    assert refusal(program, library, blank) == [f"{blank}: has no header of aligned safetensors"]
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    assert refusal(program, library, empty) == [f"{empty}: is no file, or empty"]
    assert refusal(program, library, tmp_path) == [f"{tmp_path}: is no file, or empty"]
    assert refusal(program, library, tmp_path / "none") == [f"{tmp_path}/none: cannot be read"]
    assert refusal(program, tmp_path / "none.so", weights) == [f"{tmp_path}/none.so: cannot be opened"]
    assert "none.so" not in refusal(program, weights, weights)[0]
    assert refusal(program, "-e", "decode", library, weights) == [f"{library}: does not export tw_entry_decode"]
    assert refusal(program) == ["expected LIBRARY WEIGHTS [SIZE=VALUE]... [INPUT]..."]
    assert refusal(program, library) == ["expected LIBRARY WEIGHTS [SIZE=VALUE]... [INPUT]..."]
    (line,) = refusal(program, "-x", library, weights)
    assert "'x'" in line


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ("const int tw_abi = 2;", "the library has interface 2, this program knows 1"),
        (
            'const int tw_abi = 1; const long long tw_weights_size = 64; const char tw_features[] = "fpu mind_reading";'
            "const long tw_entry_main[16]; void tw_pool_create(void) {} void tw_pool_destroy(void) {}",
            "this processor lacks mind_reading, which the library needs",
        ),
    ],
    ids=["newer interface", "other processor"],
)
def test_libraries_that_do_not_fit(program, tmp_path, constants, message):
    (tmp_path / "model.c").write_text(constants)
    command = available_compilers()[0].command
    subprocess.run([*command, "-shared", "-fPIC", "model.c", "-o", "model.so"], cwd=tmp_path, check=True)
    assert refusal(program, tmp_path / "model.so", tmp_path / "weights") == [message]


def test_linked(digits, tmp_path):
    """Another build of the example: one model's library linked, with the headers that lie beside it."""
    folder = library_of(digits).parent
    flags = ["-DLINKED_ENTRY=main", "-I", str(folder), "-L", str(folder), "-l:model.so", f"-Wl,-rpath,{folder}"]
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc's linker, which takes a library by its file name")
    program = compile_example(tmp_path, (gcc,), *flags, "-lpthread", "-lm")
    images = np.random.default_rng(1).random((3, 1, 8, 8), dtype=np.float32)
    arguments = ("-o", tmp_path, digits / "weights.safetensors", "batch=3", *store(tmp_path, image=images))
    done = call(program, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    with tilewright.load(digits, threads=2) as model:
        assert (tmp_path / "output.bin").read_bytes() == model(images).tobytes()
    assert refusal(program) == ["expected WEIGHTS [SIZE=VALUE]... [INPUT]..."]


def test_a_language_model(bytelm, program, tmp_path):
    line = np.frombuffer(b"for name, value in self.items():\n", np.uint8).astype(np.int64)[None]
    paths = (library_of(bytelm), bytelm / "weights.safetensors")
    done = call(program, "-o", tmp_path, *paths, "batch=1", f"seq={line.size}", *store(tmp_path, ids=line))
    assert (done.returncode, done.stderr) == (0, "")
    with tilewright.load(bytelm, threads=2) as model:
        assert (tmp_path / f"{model.outputs[0].name}.bin").read_bytes() == model(line).tobytes()
    wrong = store(tmp_path, ids=np.where(np.arange(line.size) == 7, 256, line))
    (message,) = refusal(program, *paths, f"seq={line.size}", *wrong)
    assert message.endswith("an input holds an index that the model's tables do not have")


def test_texts_become_c_strings(tmp_path):
    """Messages and names hold whatever users wrote."""
    value = 'a "b" \\ ??/ %s é \n1'
    (tmp_path / "show.c").write_text(
        f"#include <stdio.h>\nint main(void) {{ fputs({text(value)}, stdout); return 0; }}"
    )
    command = available_compilers()[0].command
    subprocess.run([*command, "-std=c11", "show.c", "-o", "show"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "show"], capture_output=True, check=True).stdout == value.encode()
