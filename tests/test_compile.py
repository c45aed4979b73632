# SPDX-License-Identifier: Apache-2.0
"""Every CORE specialisation compiles, within its registers and with the meant instructions: for sm_90a and, in turns,
for every other GPU generation; `-m full` takes all of them."""

import importlib
import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import cupy
import nvrtc
import pytest

from cupyattn import ops
from cupyattn.runtime import cuda, source

ARCHS = ("sm_75", "sm_80", "sm_90a", "sm_100a", "sm_120a")


MODULES = [importlib.import_module(f"cupyattn.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
CORE = list(dict.fromkeys(spec for module in MODULES for spec in module.CORE))
ALL = list(dict.fromkeys([*CORE, *(spec for module in MODULES if hasattr(module, "more_specs")
                                   for spec in module.more_specs())]))


def _archs(spec):
    return [arch for arch in ARCHS if int(arch[3:].rstrip("a")) >= spec.min_sm]


def _every_arch(specs):
    return [pytest.param(spec, arch, id=f"{spec}-{arch}") for spec in specs for arch in _archs(spec)]


def _two_archs(specs):
    """sm_90a and one of the others, by turns."""
    chosen = ((spec, arch) for i, spec in enumerate(specs) for others in [[a for a in _archs(spec) if a != "sm_90a"]]
              for arch in ("sm_90a", others[i % len(others)]))
    return [pytest.param(spec, arch, id=f"{spec}-{arch}") for spec, arch in chosen]


def _one_arch_each(specs):
    chosen = ((spec, _archs(spec)[i % len(_archs(spec))]) for i, spec in enumerate(specs))
    return [pytest.param(spec, arch, id=f"{spec}-{arch}") for spec, arch in chosen]


def _compile(spec, arch):
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, arch), arch)
    found = nvrtc.opcodes(compiled.cubin, spec.kernel) if spec.expects else {}
    return nvrtc.resources(compiled, spec.kernel), found


@pytest.fixture(scope="module")
def compiled(request):
    """Future of (Resources, opcodes) per selected (spec, arch): all compile in parallel from the first test on."""
    wanted = [item.callspec.params for item in request.session.items
              if item.path == request.path and "spec" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(p["spec"], p["arch"]): pool.submit(_compile, p["spec"], p["arch"]) for p in wanted}
        pool.shutdown(cancel_futures=True)


def _check(spec, arch, compiled):
    resources, found = compiled[spec, arch].result()
    assert resources.spill_bytes <= spec.spill_bytes, resources
    # ptxas may pick one of a few values through the stack; an array that lives there was meant for registers
    assert resources.stack_bytes <= max(32, spec.spill_bytes), resources
    missing = set(spec.expects) - set(found)
    assert not missing, f"{missing} not in {sorted(found)}"


@pytest.mark.parametrize("spec, arch", _two_archs(CORE))
def test_core(spec, arch, compiled):
    _check(spec, arch, compiled)


@pytest.mark.full
@pytest.mark.parametrize("spec, arch", _every_arch(CORE))
def test_core_everywhere(spec, arch, compiled):
    _check(spec, arch, compiled)


@pytest.mark.full
@pytest.mark.parametrize("spec, arch", _one_arch_each(ALL))
def test_all(spec, arch, compiled):
    _check(spec, arch, compiled)


def _prefill(q, tag, head_dim):
    """Specialisation of attention_mma.cuh for 128 rows without biases."""
    wanted = {"KF": tag, "VF": tag, "ROWS": 128, "HEAD_DIM": head_dim, "BIAS": 0, "T": q}
    return next(spec for spec in ALL if spec.kernel == "attention_mma" and wanted.items() <=
                dict(spec.constants).items())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("spec, most", [(_prefill("float16", "KvPlain<__half>", 128), 0.4),
                                        (_prefill("bfloat16", "KvPlain<__nv_bfloat16>", 64), 0.35),
                                        (_prefill("float16", "KvInt8<__half>", 64), 0.2)], ids=str)
def test_prefill_uses_fragments_twice(spec, most, arch, compiled):
    """A fragment of K or V serves two products of its warp; otherwise the loop would wait for shared memory."""
    resources, found = compiled[spec, arch].result()
    assert found["LDSM"] <= most * found["HMMA"], found
    assert resources.spill_bytes == 0


def test_every_kernel_file_is_listed():
    assert {spec.source for spec in CORE} == {file.stem for file in source.root().glob("*.cu")}


def test_compiled_as_by_rawmodule():
    """CuPy's own compile function, its module loading replaced, passes the same options and makes the same code."""
    spec = CORE[0]
    options = cuda.options(spec, "sm_90a")
    compiler = cupy.cuda.compiler
    seen, module = [], mock.Mock()
    compile_program = compiler.nvrtc.compileProgram

    def record(program, options):
        seen.append(options)
        return compile_program(program, options)

    with mock.patch.object(compiler.nvrtc, "compileProgram", record), \
            mock.patch.object(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: ("-arch=sm_90", "cubin")), \
            mock.patch.object(compiler, "_kernel_cache_backend", mock.Mock(load=lambda name: None)), \
            mock.patch.object(compiler.function, "Module", lambda: module):
        assembled = cupy._core.core.assemble_cupy_compiler_options(options)
        compiler._compile_with_cache_cuda(cuda.code(spec), assembled, "90")
    assert seen[-1] == nvrtc.full_options(options, "sm_90a")
    cubin, = module.load.call_args.args
    ours = nvrtc.compile_code(cuda.code(spec), options, "sm_90a").cubin
    text = f".text.{spec.kernel}"
    assert nvrtc.sections(cubin)[text] == nvrtc.sections(ours)[text]


@pytest.mark.parametrize("number", [90, 100, 120])
def test_architecture_specific_target_survives_cupys_own(number):
    """`-arch=sm_90a` before CuPy's `-arch=sm_90` wins; wgmma and its successors need it."""
    code = f"#ifndef __CUDA_ARCH_FEAT_SM{number}_ALL\n#error plain target\n#endif\n"
    nvrtc.compile_code(code, (f"-arch=sm_{number}a",), f"sm_{number}a")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="plain target"):
        nvrtc.compile_code(code, (), f"sm_{number}")


def test_spills_and_instructions_are_seen():
    """The gates can fail: a kernel that must spill, and an instruction that is not there."""
    code = """extern "C" __global__ void __launch_bounds__(1024, 2) hungry(float* x) {
      float v[64];
      for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
      for (int k = 0; k < 8; ++k)
        for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + 1.0f;
      for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];
    }"""
    compiled = nvrtc.compile_code(code, (), "sm_80")
    resources = nvrtc.resources(compiled, "hungry")
    assert resources.spill_bytes > 0 and resources.registers <= 32 and resources.max_threads == 1024
    found = nvrtc.opcodes(compiled.cubin, "hungry")
    assert {"FFMA", "LDG", "STL"} <= set(found) and "HMMA" not in found and found["STL"] > 8
