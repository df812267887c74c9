"""Real builds and installs, as a user's pip makes them, in temporary copies of the tree.

One wheel is built in isolation, from the source archive. The others take the build tools of this
environment, which is much faster, and every install sees this environment's torch instead of a
second one. No compiler optimises: that takes most of a build's time, and the install that these
tests run in has done it. What that wheel has compiled is not compiled again.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import cmake
import ninja
import pytest
from setuptools import Distribution

from tests.shared import once

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *("mokd_fast", "kernels", "csrc", "bench", "tests", "setup.py", "CMakeLists.txt"),
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("Makefile", "constraints.txt"),
]
NATIVE = f"mokd_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
BENCH = ("bench", "bench/baseline")  # what of bench/ is installed
WITHOUT = "mokd_fast is built without native kernels: no C++ compiler was found"
WITHOUT_CUDA = "mokd_fast is built without CUDA kernels: the CUDA build failed"

COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native code is for Linux only")
needs_compiler = pytest.mark.skipif(
    not (COMPILER and HEADERS), reason="needs a C++ compiler and Python's headers"
)


def run(*command, **env):
    """Exit status and output, stderr included; an environment variable set to None is removed."""
    env = {**os.environ, "MOKD_FAST_BUILD": None, **env}
    process = subprocess.run(
        list(map(str, command)),
        env={name: value for name, value in env.items() if value is not None},
        cwd="/",  # not the tree, whose mokd_fast would be imported
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # no terminal: what a build says then lands in the output
    )
    return process.returncode, process.stdout


def succeed(*command, **env):
    code, output = run(*command, **env)
    assert code == 0, output
    return output


def pip(*arguments, **env):
    return run(sys.executable, "-m", "pip", *arguments, **env)


def build_wheel(source, out, *options, **env):
    code, log = pip("wheel", "-v", "--no-deps", *options, "-w", out, source, **env)
    assert code == 0, log
    (wheel,) = out.glob("*.whl")
    return wheel, log


def contents(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def pure_contents():
    """What a wheel holds besides native code, read off the tree."""
    python = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mokd_fast").rglob("*.py")}
    recipes = {f"mokd_fast/recipes/{p.name}" for p in (ROOT / "mokd_fast/recipes").glob("*.yaml")}
    page = {f"mokd_fast/report/{p.name}" for p in (ROOT / "mokd_fast/report").glob("*.html")}
    kernels = {f"mokd_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    bench = {p.relative_to(ROOT).as_posix() for d in BENCH for p in (ROOT / d).glob("*.py")}
    bench = {f"mokd_fast/benchmarks/scripts/{name}" for name in bench}
    info = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE")
    info = {f"mokd_fast-0.1.0.dist-info/{name}" for name in info}
    return python | recipes | page | kernels | bench | info | {"mokd_fast/py.typed"}


def copy_tree(folder):
    """The sources alone, without what an earlier build left among them."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree").mkdir()
    return copy_tree(tmp_path / "tree")


def unpacked_archive(tree, folder):
    """The tree, as the source archive that is made of it holds it."""
    code = "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b"
    succeed(sys.executable, "-c", f"{code}; b.build_sdist(sys.argv[2])", tree, folder)
    with tarfile.open(folder / "mokd_fast-0.1.0.tar.gz") as archive:
        archive.extractall(folder)
    return folder / "mokd_fast-0.1.0"


# A C++ compiler that keeps the objects of the CPU kernels under the options that they were made by.
PLAIN = r"""#!/bin/sh
case "$*" in *" -c "*/csrc/cpu/*) ;; *) exec {compiler} "$@" -O0 ;; esac
for word; do test "$last" = -o && object=$word; last=$word; done
kept={objects}/$(printf '%s\n' "$@" | sed 's#^/.*/csrc/#csrc/#' | cksum | tr ' ' -)
{reuse} && test -e "$kept" && exec cp "$kept" "$object"
{compiler} "$@" -O0 && cp "$object" "$kept"
"""


def plain_compiler(folder, objects, reuse):
    """The C++ compiler, whatever the build type says without optimisation; to `reuse` objects is
    for sources that are those of the build that kept them."""
    script = folder / "c++"
    values = {"compiler": COMPILER, "objects": objects, "reuse": str(reuse).lower()}
    script.write_text(PLAIN.format(**values))
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="session")
def isolated(tmp_path_factory):
    """(wheel, log, objects) of a build of the source archive in isolation, pip's default; one for
    all processes of the tests. Without CUDA, which takes longer: test_a_tree_with_cuda has it."""

    def make(folder):
        source = unpacked_archive(copy_tree(folder / "tree"), folder)
        (folder / "objects").mkdir()
        compiler = plain_compiler(folder, folder / "objects", reuse=False)
        env = {"CXX": compiler, "MOKD_FAST_BUILD": "cpu"}
        (folder / "log.txt").write_text(build_wheel(source, folder, **env)[1])

    folder = once(tmp_path_factory, "isolated", make)
    (wheel,) = folder.glob("*.whl")
    return wheel, (folder / "log.txt").read_text(), folder / "objects"


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """A folder for PATH with CMake and ninja, and no compiler."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "cmake").symlink_to(Path(cmake.CMAKE_BIN_DIR, "cmake"))
    # A reused ninja stands beside the Python it belongs to, and BIN_DIR is this Python's folder.
    places = f"{ninja.BIN_DIR}:{Path(ninja.__file__).parents[4] / 'bin'}:{os.environ['PATH']}"
    (folder / "ninja").symlink_to(shutil.which("ninja", path=places))
    return str(folder)


@pytest.fixture
def here(tools):
    """Options and variables for a quick build: the tools of this environment, no CUDA, and a
    compiler that does not optimise, which takes a fifth of the time."""
    path = f"{tools}:{os.environ['PATH']}"
    variables = {"PATH": path, "MOKD_FAST_BUILD": "cpu", "CMAKE_BUILD_TYPE": "Debug"}
    return ["--no-build-isolation"], variables


@pytest.fixture
def broken_nvcc(tmp_path):
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho nvcc: out of order >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def fresh_python(tmp_path):
    """A new environment's Python. It sees the packages of this one through a .pth file, but not its
    editable installs: a .pth file in a folder named by another is not read."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    packages = (path for path in sys.path if path.endswith("-packages"))
    (site / "outer.pth").write_text("\n".join(packages))
    return tmp_path / "venv/bin/python"


def build_info(wheel, folder):
    """What the module says when Python knows no site-packages (`-I -S`): it needs no torch, nor
    anything else, and with CUDA neither a GPU nor a driver."""
    module = zipfile.ZipFile(wheel).extract(NATIVE, folder)
    code = """if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("mokd_fast._C", sys.argv[1])
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        print(native.build_info())
        """
    return ast.literal_eval(succeed(sys.executable, "-I", "-S", "-c", code, module))


@needs_compiler
def test_isolated_wheel(isolated, tmp_path):
    wheel, log, _ = isolated
    installed = re.findall(r"Successfully installed (.*)", log)[0].split()
    names = {word.rsplit("-", 1)[0] for word in installed}
    assert names == {"setuptools", "cmake", "ninja", "pybind11"}
    assert contents(wheel) == pure_contents() | {NATIVE}
    version = sysconfig.get_config_var("py_version_nodot")
    assert f"-cp{version}-cp{version}-linux_" in wheel.name

    info = build_info(wheel, tmp_path)
    assert info.pop("compiler") in ("gcc", "clang") and info.pop("compiler_version")
    assert isinstance(info.pop("openmp"), bool)
    assert info == {"cxx_standard": 17, "build_type": "Release", "cuda_archs": []}, log


def check_install(python, home):
    """What an installed package must do, from the folder `home`; the module's build_info()."""
    code = "import torch, mokd_fast, mokd_fast.kernels as k, mokd_fast._C as c"
    output = succeed(python, "-c", f"{code}; print(k.__file__, c.__file__); print(c.build_info())")
    assert output.count(str(home)) == 2, output
    assert "pretrain" in succeed(python.with_name("mokd-fast"), "--help")
    code = "import mokd_fast.benchmarks as b; print(b.folder())"
    scripts = Path(succeed(python, "-c", code).strip())
    assert scripts.is_relative_to(home)
    assert "--quick" in succeed(python, scripts / "distill.py", "--help")
    return ast.literal_eval(output.splitlines()[-1]), scripts


def install(python, *what, **env):
    command = ("-m", "pip", "--python", python, "install", "-v", "--no-deps", "--force-reinstall")
    return succeed(sys.executable, *command, *what, **env)


@needs_compiler
def test_install(isolated, fresh_python):
    home = fresh_python.parents[1]
    install(fresh_python, isolated[0])
    _, scripts = check_install(fresh_python, home)
    assert scripts.is_relative_to(home)


@needs_compiler
def test_editable_install_where_nvcc_is_broken(
    tree, here, isolated, tmp_path, fresh_python, broken_nvcc
):
    """The sources where they lie; without CUDA, and one sentence."""
    options, env = here
    compiler = plain_compiler(tmp_path, isolated[2], reuse=True)
    env = {**env, "CXX": compiler, "CMAKE_BUILD_TYPE": "Release"}
    env = {**env, "MOKD_FAST_BUILD": "auto", "CUDACXX": broken_nvcc}
    log = install(fresh_python, *options, "-e", tree, **env)
    assert log.count(WITHOUT_CUDA) == log.count("mokd_fast is built without") == 1
    info, scripts = check_install(fresh_python, tree)
    assert info["cuda_archs"] == [] and scripts == tree / "bench"


def test_no_compiler_is_a_pure_python_wheel_and_one_sentence(tree, tmp_path, tools):
    env = {"PATH": tools, "CXX": None}
    wheel, log = build_wheel(tree, tmp_path, "--no-build-isolation", **env)
    assert wheel.name == "mokd_fast-0.1.0-py3-none-any.whl"
    assert contents(wheel) == pure_contents()
    assert log.count(WITHOUT) == log.count("native kernels") == 1


def test_off_is_a_pure_python_wheel_without_a_word(tree, tmp_path, here):
    options, env = here
    wheel, log = build_wheel(tree, tmp_path, *options, **{**env, "MOKD_FAST_BUILD": "off"})
    assert contents(wheel) == pure_contents()
    assert "native kernels" not in log


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cpu", "MOKD_FAST_BUILD=cpu: no C++ compiler was found (install g++, or set CXX)."),
        (
            "cuda",
            "MOKD_FAST_BUILD=cuda: nvcc was not found (install the CUDA toolkit, or set CUDACX",
        ),
        ("fast", "MOKD_FAST_BUILD=fast: choose auto, cpu, cuda or off."),
    ],
)
def test_refusals(tree, tmp_path, tools, mode, message):
    env = {"PATH": tools, "CXX": None, "MOKD_FAST_BUILD": mode, "CUDA_HOME": "/nowhere"}
    code, log = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, **env)
    assert code != 0
    assert message in log
    assert "Traceback" not in log


@needs_compiler
@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("80", "MOKD_FAST_BUILD=cuda: the CUDA build failed (`pip install -v` shows why)."),
        ("80,hopper", "MOKD_FAST_CUDA_ARCHS=80,hopper: give architectures like 80;90a;100."),
    ],
)
def test_cuda_that_cannot_be_built_is_an_error(tree, tmp_path, here, broken_nvcc, archs, message):
    options, env = here
    env = {**env, "MOKD_FAST_BUILD": "cuda", "CUDACXX": broken_nvcc, "MOKD_FAST_CUDA_ARCHS": archs}
    code, log = pip("wheel", "--no-deps", *options, "-w", tmp_path, tree, **env)
    assert code != 0
    assert message in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("variables", "found", "archs"),
    [
        ({}, True, "80;90a;100"),
        ({}, False, None),
        ({"MOKD_FAST_BUILD": "cpu"}, True, None),
        ({"MOKD_FAST_BUILD": "cuda", "MOKD_FAST_CUDA_ARCHS": "75;120"}, True, "75;120"),
    ],
)
def test_what_cmake_is_told_of_cuda(tmp_path, monkeypatch, variables, found, archs):
    """From the variables, and whether there is nvcc."""
    for name in ("MOKD_FAST_BUILD", "MOKD_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("setup_of_mokd_fast", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    said = []
    monkeypatch.setattr(setup, "run", lambda *command, failure: said.append(command))
    monkeypatch.setattr(setup, "tool", lambda name: name)
    monkeypatch.setattr(setup, "nvcc", lambda: "/a/nvcc" if found else None)
    module = setup.Extension("mokd_fast._C", sources=[])
    build = setup.BuildExt(Distribution({"name": "mokd_fast", "ext_modules": [module]}))
    build.build_lib = build.build_temp = str(tmp_path)
    (tmp_path / NATIVE).parent.mkdir()
    (tmp_path / NATIVE).touch()  # what the build would make
    build.build_extension(module)
    configure, make = said
    cuda = [word for word in configure if "CUDA" in word]
    assert make[:2] == ("cmake", "--build") and cuda == (
        ["-DMOKD_FAST_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/a/nvcc", f"-DMOKD_FAST_CUDA_ARCHS={archs}"]
        if archs
        else []
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_tree_with_cuda(tree, tmp_path, here):
    """For the architectures that nobody chose."""
    options, env = here
    wheel, log = build_wheel(tree, tmp_path, *options, **{**env, "MOKD_FAST_BUILD": "cuda"})
    said = re.search(r"\.(cu|h)\(\d+\): (warning|remark)|ptxas +(warning|error)", log)
    assert said is None, log
    assert contents(wheel) == pure_contents() | {NATIVE}
    archs = ["sm_80", "sm_90a", "sm_100", "compute_80"]
    assert build_info(wheel, tmp_path)["cuda_archs"] == archs


@pytest.mark.slow
@needs_compiler
def test_leftovers_of_another_build_do_no_harm(tree, tmp_path, here):
    options, env = here
    platform = f"linux-x86_64-{sys.implementation.cache_tag}"
    cache = tree / f"build/temp.{platform}/mokd_fast._C/CMakeCache.txt"
    ghost = tree / f"build/lib.{platform}/mokd_fast/ghost.py"
    for path in (cache, ghost, tree / "build/lib/mokd_fast/ghost.py", tree / NATIVE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("CMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja\n")
    wheel, _ = build_wheel(tree, tmp_path, *options, **env)
    assert contents(wheel) == pure_contents() | {NATIVE}
    assert len(zipfile.ZipFile(wheel).read(NATIVE)) > 1000  # not the leftover
