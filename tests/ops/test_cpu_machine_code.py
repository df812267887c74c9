"""What the compiler made of the CPU kernel: each x86-64 level uses its own vectors, and no more."""

import platform
import re
import shutil
import subprocess

import pytest

from mokd_fast.ops import cpu

pytestmark = [
    pytest.mark.skipif(cpu.native is None, reason="the native module was not built"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]
# The fp32 loops over columns; which function one ends up in is the compiler's choice.
LOOPS = {
    "teachers": r"exponentials<float",
    "forward": r"forward_(item|student|teacher)<float|student_block<.*float",
    "backward": r"backward_(item|student)<float|gradient(_block)?<.*float",
}


def objdump(*options: str) -> str:
    command = [
        "objdump",
        "--demangle",
        "--wide",
        "--no-show-raw-insn",
        *options,
        cpu.native.__file__,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def objects():
    """Source -> level -> {function: instructions}. The levels' objects are linked in this order."""
    code = {}
    for block in re.split(r"\n\n(?=[0-9a-f]+ <)", objdump("-d", "-j", ".text"))[1:]:
        head, _, body = block.partition("\n")
        code[int(head.split()[0], 16)] = body
    objects = re.split(r"df \*ABS\*\s+0+\s*(\S*)", objdump("-t"))
    line = re.compile(r"^([0-9a-f]+) l +F \.text\s+[0-9a-f]+ +(.*)$", re.MULTILINE)
    found = {}
    for source, sign in (("distill.cpp", "run_forward"), ("augment.cpp", "take_apart|augment<")):
        parts = [symbols for name, symbols in zip(objects[1::2], objects[2::2], strict=True)
                 if name == source and re.search(sign, symbols)]  # fmt: skip
        levels = [{name: code[int(at, 16)] for at, name in line.findall(part)} for part in parts]
        found[source] = dict(zip(cpu.LEVELS, levels, strict=True))
    return found


@pytest.fixture(scope="module")
def functions(objects):
    return objects["distill.cpp"]


def loops(functions, level):
    for loop, pattern in LOOPS.items():
        code = [code for name, code in functions[level].items() if re.search(pattern, name)]
        assert code, functions[level].keys()
        yield loop, "\n".join(code)


def test_v4_multiplies_and_scales_512_bits_at_once(functions):
    for name, code in loops(functions, "v4"):
        assert re.search(r"vfn?m(add|sub)\d+ps .*%zmm", code), name
        assert re.search(r"vscalefps .*%zmm", code), name  # the exponential


def test_v3_multiplies_256_bits_at_once(functions):
    for name, code in loops(functions, "v3"):
        assert re.search(r"vfn?m(add|sub)\d+ps .*%ymm", code), name
        assert re.search(r"vpslld .*%ymm", code), name  # the exponential's exponent


def test_baseline_runs_on_every_processor(functions):
    for name, code in loops(functions, "baseline"):
        assert re.search(r"\bmulps .*%xmm", code), name


@pytest.mark.parametrize(
    ("level", "more"),
    [
        ("baseline", r"%[yz]mm|\sv[a-z]+[0-9a-z]* .*%xmm"),
        ("v3", r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|[23][0-9])"),
    ],
)
def test_no_instruction_of_a_higher_level(level, more, objects):
    for levels in objects.values():
        for name, code in levels[level].items():
            assert not re.search(more, code), name


@pytest.mark.parametrize(
    ("level", "register", "multiply_add", "divide"),
    [
        ("v4", "zmm", r"vfn?m(add|sub)\d+ps", "vdivps"),
        ("v3", "ymm", r"vfn?m(add|sub)\d+ps", "vdivps"),
        ("baseline", "xmm", r"\bmulps", r"\bdivps"),
    ],
)
def test_crops_are_augmented_a_register_at_a_time(level, register, multiply_add, divide, objects):
    code = "\n".join(objects["augment.cpp"][level].values())
    for instruction in (multiply_add, divide):  # the blur, the hue
        assert re.search(rf"{instruction} .*%{register}", code), instruction


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_the_exponential_of_fp32_is_no_call(level, functions):
    for loop, code in loops(functions, level):
        called = set(re.findall(r"call .*<(\w+)@plt>", code))
        # Merges of blocks and the coefficients take exp, in fp64; no loop over columns does.
        assert not {name for name in called if re.match("exp2|expf|log", name)}, (loop, called)
        assert loop != "teachers" or "exp" not in called


@pytest.mark.parametrize(
    ("level", "store"),
    [("v4", "vmovntdq .*%zmm"), ("v3", "vmovntdq .*%ymm"), ("baseline", "movnt[a-z]+ .*%xmm")],
)
def test_gradients_are_written_past_the_caches(level, store, functions):
    assert re.search(store, dict(loops(functions, level))["backward"])
