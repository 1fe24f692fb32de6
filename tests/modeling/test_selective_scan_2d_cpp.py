"""The compiled backend: when it is built, what is logged, and what runs where it cannot be built."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_selective_scan_2d import make_inputs

from ssm_vlm.modeling.ops import scan_backends
from ssm_vlm.modeling.ops.selective_scan_2d import cpp, selective_scan_2d

SMALL = (1, 3, 3, 4, 1, 1)
LARGE = (1, 1, cpp.MIN_WORK // (16 * 4), 4, 16, 1)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler (c++)")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been built, chosen or logged."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("SSM_VLM_SCAN_BACKEND", raising=False)
    for cached in (cpp.library, scan_backends.log_once):
        cached.cache_clear()
    yield tmp_path / "extensions"
    for cached in (cpp.library, scan_backends.log_once):
        cached.cache_clear()


@pytest.fixture
def log(caplog):
    with (
        caplog.at_level(logging.INFO, logger=scan_backends.logger.name),
        caplog.at_level(logging.INFO, logger=cpp.logger.name),
    ):
        yield caplog


def test_small_maps_build_nothing(fresh, log):
    selective_scan_2d(*make_inputs(*SMALL))
    assert not fresh.exists()
    (message,) = log.messages
    assert message.startswith("selective_scan_2d: backend chunked, because it is the fastest that fits; ")
    assert message.endswith("not cpp: this is too little work.")


def test_without_a_compiler_the_scan_runs_and_says_why(fresh, log, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    inputs = make_inputs(*LARGE, torch.float32)
    expected = selective_scan_2d(*inputs, backend="chunked")
    log.clear()
    assert torch.equal(selective_scan_2d(*inputs), expected) and not fresh.exists()
    (message,) = log.messages
    assert message.startswith("selective_scan_2d: backend chunked, because it is the fastest that fits; ")
    assert message.endswith("not cpp: there is no C++ compiler (/nonexistent/c++).")
    with pytest.raises(
        RuntimeError, match=r"backend cpp cannot run here \(the backend argument asks for it\): there is no C\+\+ comp"
    ):
        selective_scan_2d(*make_inputs(*SMALL), backend="cpp")


def test_a_failing_compiler_is_told_once_and_the_scan_runs(fresh, log, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    inputs = make_inputs(*LARGE, torch.float32)
    expected = selective_scan_2d(*inputs, backend="chunked")
    for _ in range(2):
        assert torch.equal(selective_scan_2d(*inputs), expected)
    told = [message for message in log.messages if "cannot be used" in message]
    assert len(told) == 1 and "false -std=c++17" in told[0] and "failed" in told[0]
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("compiler", ["true", 'c++ "unbalanced', sys.executable, "cp -r"])
def test_nonsense_in_place_of_a_compiler_is_told_once(compiler, fresh, log, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    for _ in range(2):
        assert selective_scan_2d(*make_inputs(*LARGE, torch.float32)).isfinite().all()
    (told,) = (message for message in log.messages if "cannot be used" in message)
    assert "The variable CXX names the compiler" in told


def test_an_empty_name_of_a_compiler_is_none(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert all(command[0] == "c++" for command in cpp._compile_commands("source", "built"))


def test_threads_are_those_of_the_runtime_that_torch_brings(monkeypatch, tmp_path):
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    runtime = package / "lib" / "libgomp-a34b3233.so.1"
    runtime.touch()
    monkeypatch.setenv("CXX", "ccache clang++ -O2")
    monkeypatch.setattr(torch, "__file__", str(package / "__init__.py"))
    torchs, compilers, none = cpp._compile_commands("source", "built")
    assert torchs[:3] == ["ccache", "clang++", "-O2"] and torchs[-2:] == ["-DWITH_THREADS", str(runtime)]
    assert compilers == [*none, "-DWITH_THREADS", "-fopenmp"] and "-fopenmp" not in torchs + none
    (tmp_path / "torch.libs").mkdir()
    runtime.rename(tmp_path / "torch.libs" / runtime.name)  # as other wheels have it
    (moved,) = (tmp_path / "torch.libs").iterdir()
    assert cpp._compile_commands("source", "built")[0][-1] == str(moved)
    moved.unlink()
    assert cpp._compile_commands("source", "built") == [compilers, none]


def test_a_folder_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch):
    fresh.write_text("a file where the folder would be")
    monkeypatch.setenv("CXX", sys.executable)
    assert selective_scan_2d(*make_inputs(*LARGE, torch.float32)).isfinite().all()


def test_a_broken_library_is_built_anew(fresh, log, monkeypatch):
    fresh.mkdir()
    monkeypatch.setenv("CXX", "false")
    cpp._library_path().write_bytes(b"half of a file")
    assert selective_scan_2d(*make_inputs(*LARGE, torch.float32)).isfinite().all()
    assert any("false -std=c++17" in message for message in log.messages)


def test_the_environment_keeps_the_compiler_away(fresh, monkeypatch):
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", "chunked")
    selective_scan_2d(*make_inputs(*LARGE, torch.float32))
    assert not fresh.exists()


@needs_compiler
@pytest.mark.slow
def test_large_maps_build_once_even_from_several_processes(fresh, log):
    program = (
        "import torch; from ssm_vlm.modeling.ops.selective_scan_2d import cpp; found = cpp.library();"
        "assert not isinstance(found, str), found"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    (built,) = fresh.iterdir()
    modified = built.stat().st_mtime_ns
    selective_scan_2d(*make_inputs(*LARGE, torch.float32))
    assert [m for m in log.messages if m.startswith("selective_scan_2d: backend cpp, because it is the fastest that")]
    assert not any("compiling" in message for message in log.messages)
    assert built.stat().st_mtime_ns == modified


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_worker_scans_after_its_parent_did():
    """As in a DataLoader: OpenMP's threads do not survive a fork, so that workers have one."""
    program = f"""
import os, sys, signal, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_selective_scan_2d import make_inputs
from ssm_vlm.modeling.ops.selective_scan_2d import selective_scan_2d
inputs = make_inputs(2, 8, 8, 128, 2, 1, torch.float32)
torch.set_num_threads(2)
expected = selective_scan_2d(*inputs, backend="cpp")
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(selective_scan_2d(*inputs, backend="cpp"), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_importing_the_library_builds_nothing(tmp_path):
    program = (
        "import sys, ssm_vlm; from ssm_vlm.modeling.ops.selective_scan_2d import cpp;"
        "assert cpp.library.cache_info().currsize == 0; assert 'torch.utils.cpp_extension' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
