"""What the compiler made of the CPU kernels: each x86-64 level has its own vectors, and no more."""

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
# The fp32 loops of each file; which function one ends up in is the compiler's choice.
LOOPS = {
    "distill.cpp": {
        "teachers": r"exponentials<float",
        "forward": r"forward_(item|student|teacher)<float|student_block<.*float",
        "backward": r"backward_(item|student)<float|gradient(_block)?<.*float",
    },
    "search.cpp": {
        "scores": r"product(_columns)?<.*\bfalse, float, float>",
        "rows": r"(attend|add_rows|exponentials)<float>|product(_columns)?<.*\btrue, float, float>",
        "merge": r"(forward_tile|merge_(tokens|queries)|shares)<float>",
    },
    "search_backward.cpp": {
        "scores": r"product(_columns)?<.*\bfalse, float, float>",
        "sums": r"product(_columns)?<.*\btrue, float, float>",
        "backward": r"(backward_tile|unmerge|unmix|shares)<float>|each<float, .*\bbackward<float>",
    },
}
PRODUCTS = {"scores", "sums"}  # without an exponential
FILES = (
    *LOOPS,
    "augment.cpp",
    "batch_norm.cpp",
    "block.cpp",
    "clip.cpp",
    "prototype_linear_fp32.cpp",
    "prototypes.cpp",
    "update.cpp",
)


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
def functions():
    """Level -> {(file, function): instructions}. The levels' objects are linked in this order."""
    code = {}
    for block in re.split(r"\n\n(?=[0-9a-f]+ <)", objdump("-d", "-j", ".text"))[1:]:
        head, _, body = block.partition("\n")
        code[int(head.split()[0], 16)] = body
    symbols = objdump("-t")
    objects = re.split(r"df \*ABS\*\s+0+\s*(\S*)", symbols)
    line = re.compile(r"^([0-9a-f]+) [lg] +F \.text\s+[0-9a-f]+ +(.*)$", re.MULTILINE)
    found = {level: {} for level in cpu.LEVELS}
    for file in FILES:
        parts = [part for name, part in zip(objects[1::2], objects[2::2], strict=True)
                 if name == file and "mokd::cpu::" in part]  # fmt: skip
        for level, part in zip(cpu.LEVELS, parts, strict=True):
            found[level] |= {(file, name): code[int(at, 16)] for at, name in line.findall(part)}
    for at, name in line.findall(symbols):  # of another file's use, so under no file's name
        if match := re.search(r"search_backward_(\w+)\(", name):
            found[match[1]]["search_backward.cpp", name] = code[int(at, 16)]
    return found


def loops(functions, level):
    for file, patterns in LOOPS.items():
        mine = {name: code for (of, name), code in functions[level].items() if of == file}
        for loop, pattern in patterns.items():
            code = [code for name, code in mine.items() if re.search(pattern, name)]
            assert code, (file, loop, list(mine))
            yield file, loop, "\n".join(code)


def test_v4_multiplies_and_scales_512_bits_at_once(functions):
    for file, loop, code in loops(functions, "v4"):
        assert re.search(r"vfn?m(add|sub)\d+ps .*%zmm", code), (file, loop)
        if loop not in PRODUCTS:
            assert re.search(r"vscalefps .*%zmm", code), (file, loop)  # the exponential


def test_v3_multiplies_256_bits_at_once(functions):
    for file, loop, code in loops(functions, "v3"):
        assert re.search(r"vfn?m(add|sub)\d+ps .*%ymm", code), (file, loop)
        if loop not in PRODUCTS:
            assert re.search(r"vpslld .*%ymm", code), (file, loop)  # the exponential's exponent


def test_baseline_runs_on_every_processor(functions):
    for file, loop, code in loops(functions, "baseline"):
        assert re.search(r"\bmulps .*%xmm", code), (file, loop)


@pytest.mark.parametrize(
    ("level", "multiply"),
    [("v4", r"vfn?m(add|sub)\d+ss "), ("v3", r"vfn?m(add|sub)\d+ss "), ("baseline", r"\bmulss ")],
)
def test_products_of_the_search_have_no_scalar_loop(level, multiply, functions):
    for file, loop, code in loops(functions, level):
        if loop in PRODUCTS:
            assert not re.search(multiply, code), (file, loop)


@pytest.mark.parametrize(
    ("level", "more"),
    [
        ("baseline", r"%[yz]mm|\sv[a-z]+[0-9a-z]* .*%xmm"),
        ("v3", r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|[23][0-9])"),
    ],
)
def test_no_instruction_of_a_higher_level(level, more, functions):
    for name, code in functions[level].items():
        assert not re.search(more, code), name


@pytest.mark.parametrize(
    ("level", "register", "multiply_add", "divide"),
    [
        ("v4", "zmm", r"vfn?m(add|sub)\d+ps", "vdivps"),
        ("v3", "ymm", r"vfn?m(add|sub)\d+ps", "vdivps"),
        ("baseline", "xmm", r"\bmulps", r"\bdivps"),
    ],
)
def test_crops_are_augmented_a_register_at_a_time(level, register, multiply_add, divide, functions):
    found = functions[level].items()
    code = "\n".join(code for (file, _), code in found if file == "augment.cpp")
    for instruction in (multiply_add, divide):  # the blur, the hue
        assert re.search(rf"{instruction} .*%{register}", code), instruction


@pytest.mark.parametrize(
    ("level", "register", "multiply_add"),
    [
        ("v4", "zmm", r"vfn?m(add|sub)\d+ps"),
        ("v3", "ymm", r"vfn?m(add|sub)\d+ps"),
        ("baseline", "xmm", r"\bmulps"),
    ],
)
def test_prototypes_gradients_and_maps_are_taken_a_register_at_a_time(
    level, register, multiply_add, functions
):
    made = "prototype_linear_fp32.cpp", "prototypes.cpp"
    files = "batch_norm.cpp", "clip.cpp", "update.cpp", *made
    code = dict.fromkeys(files, "")
    for (file, _), found in functions[level].items():
        code[file] = code.get(file, "") + found
    for file in files:
        assert re.search(rf"{multiply_add} .*%{register}", code[file]), file
    assert re.search(rf"\bv?mulps .*%{register}", code["clip.cpp"])  # the scaling
    # Written past the caches:
    for file in made:
        assert re.search(rf"movnt\w+ .*%{register}", code[file]), file


@pytest.mark.skipif(
    cpu.native is not None and not cpu.native.has_bf16(), reason="no bf16 products here"
)
def test_products_of_bf16_keep_their_sums_in_registers():
    """24 of them in the widest loop, which loads no sum and stores none."""
    loops = [
        loop
        for loop in re.split(r"\tj[a-z]+ ", objdump("-d", "-j", ".text"))
        if len(re.findall(r"vdpbf16ps .*%zmm", loop)) == 24
    ]
    assert loops
    for loop in loops:
        inner = loop[loop.index("vdpbf16ps") : loop.rindex("vdpbf16ps")]
        assert not re.search(r"vmov\w+ +%zmm|%zmm\d+,.*\(%rsp", inner)


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_the_exponential_of_fp32_is_no_call(level, functions):
    for file, loop, code in loops(functions, level):
        called = set(re.findall(r"call .*<(\w+)@plt>", code))
        # Merges of blocks and the coefficients take exp, in fp64; no loop over columns does.
        allowed = {"exp"} if file == "distill.cpp" and loop != "teachers" else set()
        wrong = {name for name in called if re.match("exp|log", name)} - allowed
        assert not wrong, (file, loop, called)


@pytest.mark.parametrize(
    ("level", "store"),
    [("v4", "vmovntdq .*%zmm"), ("v3", "vmovntdq .*%ymm"), ("baseline", "movnt[a-z]+ .*%xmm")],
)
def test_gradients_are_written_past_the_caches(level, store, functions):
    found = {(file, loop): code for file, loop, code in loops(functions, level)}
    assert re.search(store, found["distill.cpp", "backward"])
