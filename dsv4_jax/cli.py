"""The `dsv4` command: one function per verb, no model logic. The top floor, and alone in importing `checkpoints`."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    import checkpoints
    from dsv4_jax import DeepseekV4, Sampler, Stats, StreamEvent

app = typer.Typer(
    name="dsv4",
    help="DeepSeek-V4 in JAX: convert checkpoints, look into them, generate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
stderr = Console(stderr=True, soft_wrap=True)
# typer has moved its exceptions between releases; the base of BadParameter is the usage error in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")]
STOP_HELP = "Token id that ends a row; may be repeated. Default: the config's eos_token_id for text, none for --tokens."
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
COMPILED_SECONDS = 0.2  # what took the compiler less is not kept
CACHE_HELP = "Keep compiled programs here for the next run; off keeps none. Default: the user's cache directory."
CompilationCache = Annotated[str | None, typer.Option(help=CACHE_HELP)]
MESH_HELP = (
    "latency, throughput, or sizes: data=2,expert=4,model=1; default one device, throughput where processes join."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 bad input or files, 2 usage, 130 interrupted.

    Errors are one or two lines on stderr; `--debug` raises them instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = app(args=argv, prog_name="dsv4", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        return _explain(error)
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> int:
    """Say what went wrong, in at most two lines of text; returns the exit status."""
    if isinstance(error, UsageError):
        message, status = f"{error.format_message()}\ndsv4 --help and dsv4 COMMAND --help say what is possible", 2
    elif isinstance(error, (ValueError, OSError)):
        message, status = str(error), 1
    else:
        message, status = f"{type(error).__name__}: {error}\nnot foreseen; --debug shows where", 1
    lines = message.splitlines()
    shown = lines if len(lines) <= 2 else [lines[0], lines[-1] if status == 2 else "--debug shows more"]
    stderr.print(Text.assemble(("error:", "bold red"), " ", "\n".join(shown)))
    return status


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="Directory in the official format, or a hub id.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write.")],
    max_memory: Annotated[str, typer.Option(help="Most memory to work in, besides the page cache.")] = "2GiB",
    workers: Annotated[int | None, typer.Option(help="Files written at a time; default two a core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert an official checkpoint to Orbax, in its own number formats.

    Interrupted, whatever the cause, the same command finishes the work. Ends with what it held at most.

    Examples: `dsv4 convert DeepSeek-V4-Flash flash-orbax`,
    `dsv4 convert DeepSeek-V4-Flash flash-orbax --dry-run`,
    `dsv4 convert deepseek-ai/DeepSeek-V4-Flash flash-orbax --max-memory 1GiB --workers 4`
    """
    import checkpoints

    limit = _bytes(max_memory, "--max-memory")
    if dry_run:
        _show_plan(checkpoints.plan(src, dst), as_json)
        return
    with _progress("converting", *_bytes_columns()) as update:
        memory = _PeakMemory(update)
        checkpoints.convert(src, dst, max_memory=limit, workers=workers, force=force, progress=memory)
    _report({"converted": str(src), "written": str(dst), "peak_memory_bytes": memory.peak}, as_json)


def _show_plan(plan: checkpoints.Plan, as_json: bool) -> None:
    """What a conversion would write, layers alike in one line; an error where the disk is too small."""
    found = plan.to_json()
    if as_json:
        print(json.dumps(found))
    else:
        rows: dict[str, list[Any]] = {}
        for path, leaf in found["leaves"].items():
            name = re.sub(r"\.\d+\.", ".*.", path)
            shape, splits = (" x ".join(map(str, leaf[key])) for key in ("shape", "splits"))
            row = rows.setdefault(f"{name} {leaf['dtype']} [{shape}]", [0, 0, 0, splits])
            row[:3] = [n + m for n, m in zip(row, (1, leaf["files"], leaf["bytes"]), strict=False)]
        cells = {k: [f"{n:,}", f"{files:,}", _size(size), splits] for k, (n, files, size, splits) in rows.items()}
        console = Console()
        console.print(_table("array", cells, "arrays", "files", "bytes", "may be sharded"))
        console.print(f"{len(found['leaves']):,} arrays, {found['files']:,} files, {_size(found['bytes'])}")
        console.print(f"disk: {_size(found['disk_bytes'])} to be written, {_size(found['disk_free'])} free")
    if not found["fits"]:
        raise ValueError(
            f"{plan.dst}: needs {_size(found['disk_bytes'])} of disk, {_size(found['disk_free'])} are free"
        )


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory, converted or official.")],
    against: Annotated[Path | None, typer.Option(help="Compare every tensor's bits with this checkpoint's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Arrays checked at a time; default by cores.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a checkpoint whole: digests, shapes, dtypes, scales in range, nothing missing, nothing unknown.

    Examples: `dsv4 verify flash-orbax`, `dsv4 verify flash-orbax --against DeepSeek-V4-Flash`
    """
    import checkpoints

    try:
        with _progress("verifying", *_bytes_columns()) as update:
            found = checkpoints.verify(path, against, workers=workers, progress=update)
    except checkpoints.VerificationError as error:
        if as_json:
            print(json.dumps({"ok": False, "path": str(path), "problems": error.problems}))
        else:
            print("\n".join(error.problems))
        raise
    _report({"ok": True} | found.to_json(), as_json)


@app.command()
def export(
    src: Annotated[Path, typer.Argument(help="Directory that `dsv4 convert` wrote.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write.")],
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give back the official files of a converted checkpoint, bit for bit.

    Example: `dsv4 export flash-orbax DeepSeek-V4-Flash-again`
    """
    import checkpoints

    with _progress("exporting", *_bytes_columns()) as update:
        checkpoints.export(src, dst, force=force, progress=update)
    _report({"exported": str(src), "written": str(dst)}, as_json)


@app.command()
def inspect(
    path: Annotated[Path | None, typer.Argument(help="Checkpoint directory; default the bundled one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint, after checking it against its config.

    Example: `dsv4 inspect flash-orbax --json`
    """
    import checkpoints

    found = checkpoints.inspect(path or checkpoints.bundled_path())
    if as_json:
        print(json.dumps(found.to_json()))
        return
    parts = {k: [f"{v['parameters']:,}", _size(v["bytes"])] for k, v in found.by_part.items()}
    dtypes = {k: [f"{v['tensors']:,}", _size(v["bytes"])] for k, v in found.by_dtype.items()}
    caches = {k: [_size(v["fixed"]), f"{v['per_token']:,.2f} B"] for k, v in found.cache.items()}
    console = Console()
    console.print(f"[bold]{found.model}[/]\n{found.path} ({found.format}, {found.files} files, draft: {found.draft})")
    console.print(f"{found.parameters:,} parameters, {found.tensors:,} tensors, {_size(found.bytes)}\n")
    console.print(_table("part", parts, "parameters", "size"))
    console.print(_table("dtype", dtypes, "tensors", "size"))
    console.print(_table("cache of one sequence", caches, "fixed", "per token"))


@app.command()
def synth(
    config: Annotated[str, typer.Option(help="A preset (flash, pro, flash-base, pro-base, tiny) or a config.json.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    layers: Annotated[int | None, typer.Option(help="Keep only the first N layers.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a random checkpoint in the official format.

    Example: `dsv4 synth --config flash --layers 4 --out flash-4-layers`
    """
    from checkpoints.synth import synth as write
    from checkpoints.synth import with_layers

    fields = _config_fields(config)
    fields = fields if layers is None else with_layers(fields, layers)
    with _progress("writing", TextColumn("{task.completed:,.0f} tensors")) as update:
        write(fields, out, seed=seed, force=force, progress=update)
    _report({"config": config, "written": str(out)}, as_json)


@app.command()
def generate(
    path: Annotated[Path | None, typer.Argument(help="Checkpoint directory; default the bundled one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    tokens: Annotated[Path | None, typer.Option(help=".npy of int [T] or [B, T]; -1 pads a row at its end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens per row.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Keep the fewest tokens that reach this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this fraction as probable as the best.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    drafts: Annotated[int, typer.Option(help="Speculative drafts per step.")] = 0,
    stop: Annotated[list[int] | None, typer.Option(help=STOP_HELP)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the cache, prompt included.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    kernels: Annotated[str, typer.Option(help="Platform strategy.")] = "auto",
    numerics: Annotated[str, typer.Option(help="auto, official or exact.")] = "auto",
    cache_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or fp8; default the dtype.")] = None,
    compilation_cache: CompilationCache = None,
    mesh: Annotated[str | None, typer.Option(help=MESH_HELP)] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Join a detected cluster's processes.")] = False,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0, to join several processes.")] = None,
    processes: Annotated[int | None, typer.Option(help="How many processes join.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt. Text streams to stdout; statistics go to stderr. Of several processes, the first prints.

    Examples: `dsv4 generate --prompt "Once upon a time"`,
    `dsv4 generate flash-orbax --prompt-file question.txt --temperature 0.7 --top-p 0.95`,
    `dsv4 generate flash-orbax --tokens prompts.npy --mesh throughput --json`,
    `dsv4 generate flash-orbax --prompt "..." --coordinator 10.0.0.1:9000 --processes 2 --process-id 0`
    """
    if distributed or coordinator or processes is not None or process_id is not None:
        _join(coordinator, processes, process_id)
        mesh = mesh or "throughput"
    _keep_compiled(compilation_cache)
    import checkpoints
    import dsv4_jax
    from checkpoints.source import open_source
    from dsv4_jax.sharding import parse_mesh
    from dsv4_jax.watch import WatchedStream

    path = checkpoints.bundled_path() if path is None else path
    sampler = _sampler(temperature, top_k, top_p, min_p)
    text, ids = _read_prompt(prompt, prompt_file, tokens)
    lengths = None
    if ids is not None:
        ids, lengths = _strip_padding(ids, tokens)
    tokenizer = checkpoints.load_tokenizer(path)
    if text is not None and tokenizer is None and path.is_dir():  # before the weights, which may take long
        raise ValueError(f"{path}: has no tokenizer.json; give the prompt as ids with --tokens FILE.npy")
    options: dict[str, Any] = {"dtype": dtype, "kernels": kernels, "numerics": numerics, "cache_dtype": cache_dtype}
    if mesh is not None:
        options["mesh"] = parse_mesh(mesh, open_source(path).config)
    model = _load(path, max_tokens=max_tokens, **options)
    if ids is None:
        assert text is not None and tokenizer is not None
        ids = _encode(text, tokenizer, model)
        eos = model.config.eos_token_id
        stop = [eos] if stop is None and eos is not None else stop
    request: dict[str, Any] = {
        "lengths": lengths,
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "seed": seed,
        "stop_ids": stop or (),
        "drafts": drafts,
    }
    if len(ids) > 1:
        out = dsv4_jax.generate(model, ids, **request)
        rows, stats = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)], out.stats
        _print_rows(rows, stats, tokenizer, as_json)
        return
    stream = WatchedStream(model, ids, **request)
    if as_json:
        rows = [[int(event.tokens[0]) for event in stream]]
        _print_rows(rows, stream.stats, tokenizer, as_json)
    else:
        _stream_text(stream, tokenizer)
        stderr.print(_statistics(stream.stats), highlight=False)


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several; all but the first are silent from then on, errors apart."""
    from dsv4_jax.processes import is_speaker, join

    join(coordinator, processes, process)
    if not is_speaker():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        stderr.quiet = True


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="flash, pro, flash-base, pro-base, or a checkpoint or config.json.")],
    topology: Annotated[str, typer.Option(help="v6e:4x4 (shape) or v6e-16 (chips) for TPUs, H200x8 for GPUs.")],
    mesh: Annotated[str, typer.Option(help="latency, throughput, or sizes: data=1,expert=8,model=2.")] = "throughput",
    batch: Annotated[int, typer.Option(help="Sequences in all.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens that each may hold.")] = 131072,
    drafts: Annotated[int, typer.Option(help="Speculative drafts per step.")] = 0,
    cache_dtype: Annotated[str, typer.Option(help="fp8 or bfloat16.")] = "fp8",
    prefill_tokens: Annotated[int, typer.Option(help="Of a chunk of each sequence's prompt.")] = 2048,
    layers: Annotated[int | None, typer.Option(help="Keep only the first N layers.")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Sizes and bounds alone, in seconds.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Tabulate batches and contexts up to those given.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the sweep as a PNG.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a model needs on devices that are not here: the real steps compiled for them, memory, collectives, bounds.

    Examples: `dsv4 plan flash --topology v6e:4x4 --batch 64 --context 131072`,
    `dsv4 plan pro --topology v7x-16 --mesh latency --batch 1 --no-compile`,
    `dsv4 plan flash --topology H200x8 --sweep --chart flash-h200.png`
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # the compilers for accelerators would be taken for accelerators
    from checkpoints.synth import with_layers
    from dsv4_jax.plan import parse_topology, show
    from dsv4_jax.plan import plan as make_plan

    where = parse_topology(topology)
    fields = _config_fields(config)
    fields = fields if layers is None else with_layers(fields, layers)
    options: dict[str, Any] = {"mesh": mesh, "drafts": drafts, "cache_dtype": cache_dtype}
    compiled: dict[str, Any] = {"compiled": not no_compile, "prefill_tokens": prefill_tokens}
    with _busy(f"compiling for {where.name}") if not no_compile else nullcontext():
        found = make_plan(fields, where, batch=batch, context=context, **options, **compiled)
    rows = show.sweep_rows(fields, where, batch, context, found, **options) if sweep or chart else []
    if chart:
        show.draw(rows, found, f"{config} on {where.name}", chart)
    if as_json:
        print(json.dumps(found.to_json() | ({"sweep": rows} if rows else {})))
    else:
        console = Console()
        show.print_plan(found, config, console)
        show.print_sweep(rows, console)
    if not found.fits:
        raise typer.Exit(1)


def _config_fields(name: str) -> dict[str, Any]:
    """A preset's, a config.json's or a checkpoint's fields."""
    from dsv4_jax.presets import PRESETS

    if name in PRESETS:
        return PRESETS[name]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise ValueError(f"{name}: neither a file, nor a checkpoint, nor one of {', '.join(PRESETS)}")
    return _read_json(file)


@app.command()
def chat(
    path: Annotated[Path | None, typer.Argument(help="Checkpoint directory; default the bundled one.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model reason before it answers.")] = False,
    effort: Annotated[str | None, typer.Option(help="How hard it thinks: an effort of the release.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens per reply.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float | None, typer.Option(help="Keep the fewest tokens that reach this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and same words, same replies.")] = 0,
    drafts: Annotated[int, typer.Option(help="Speculative drafts per step.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the cache: of the conversation.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    kernels: Annotated[str, typer.Option(help="Platform strategy.")] = "auto",
    numerics: Annotated[str, typer.Option(help="auto, official or exact.")] = "auto",
    compilation_cache: CompilationCache = None,
    debug: Debug = False,
) -> None:
    """Talk with a model in the terminal, in the official chat format; /help lists the commands.

    Examples: `dsv4 chat flash-orbax`, `dsv4 chat flash-orbax --think --effort high --drafts 1`
    """
    _keep_compiled(compilation_cache)
    import checkpoints
    from dsv4_jax.chat import ChatFormat
    from dsv4_jax.chat.session import Session
    from dsv4_jax.chat.terminal import converse

    path = checkpoints.bundled_path() if path is None else path
    tokenizer = checkpoints.load_tokenizer(path)
    if tokenizer is None and path.is_dir():
        raise ValueError(f"{path}: has no tokenizer.json; chat needs one")
    sampler, chat_format = _sampler(temperature, top_k, top_p, None), ChatFormat.of_checkpoint(path)
    model = _load(path, max_tokens=max_tokens, dtype=dtype, kernels=kernels, numerics=numerics)
    assert tokenizer is not None
    settings: dict[str, Any] = {"system": system, "thinking": think, "effort": effort, "drafts": drafts}
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "sampler": sampler}
    converse(Session(model, tokenizer, chat_format, **settings, **limits))


def _keep_compiled(asked: str | None) -> None:
    """Compiled programs go to a directory and come from it: `asked`, or what JAX was told, or the user's cache."""
    import jax

    if asked == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = asked or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not directory:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = str(base / "dsv4-jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_SECONDS)


def _load(path: Path, **options: Any) -> DeepseekV4:
    """checkpoints.load, its warnings as notes on stderr."""
    import checkpoints
    from dsv4_jax.cache import cache_bytes

    with warnings.catch_warnings(record=True) as notes, _busy("loading"):
        warnings.simplefilter("always", UserWarning)
        model = checkpoints.load(path, **options)
    for note in notes:
        stderr.print(Text(f"note: {note.message}"))
    cache = cache_bytes(model.config, model.cache_format)
    whole = cache.fixed + cache.per_token * model.max_tokens
    parts = f"{_size(cache.fixed)} + {cache.per_token:,.2f} B a token, {_size(whole)} for {model.max_tokens:,} tokens"
    stderr.print(f"{model.numerics.name} numerics; cache of a sequence: {parts}", highlight=False)
    return model


def _print_rows(rows: list[list[int]], stats: Stats, tokenizer: Tokenizer | None, as_json: bool) -> None:
    """All rows at once: one JSON object, or a line each and statistics."""
    from dsv4_jax.watch import peak_memory_bytes

    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows] if tokenizer else None
    if as_json:
        figures = stats.to_json() | {"peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps({"tokens": rows, "text": texts, "stats": figures}))
        return
    for number, row in enumerate(texts or [" ".join(map(str, row)) for row in rows]):
        _write(f"[{number}] {row}\n")
    stderr.print(_statistics(stats), highlight=False)


def _stream_text(events: Iterable[StreamEvent], tokenizer: Tokenizer | None) -> None:
    """Print a row as it comes."""
    pieces = _Detokenizer(tokenizer) if tokenizer else None
    for event in events:
        token = int(event.tokens[0])
        _write(pieces.add(token) if pieces else f"{token} ")
    _write(f"{pieces.rest()}\n" if pieces else "\n")


def _statistics(stats: Stats) -> str:
    """A run in one line: its tokens and their rate, its steps and drafts, its memory."""
    from dsv4_jax.watch import StreamStats, peak_memory_bytes

    parts = [f"{stats.new_tokens} tokens"]
    if isinstance(stats, StreamStats):
        parts.append(f"first after {stats.first_seconds:.1f} s, compilation included")
        parts += [f"then {stats.warm_tokens_per_second:,.1f} tokens/s"] if stats.warm_tokens else []
    else:
        parts.append(f"{stats.seconds:.2f} s, compilation included")
    parts.append(f"{stats.steps} steps")
    if stats.accepted:
        shares = " ".join(f"{share:.2f}" for share in stats.acceptance)
        parts[-1] += f" of {stats.tokens_per_step:.2f} tokens"
        parts.append(f"drafts accepted {shares}")
    return "; ".join((*parts, f"peak memory {_size(peak_memory_bytes())}"))


def _write(text: str) -> None:
    """Print generated text now; a terminal gets no control characters, which could do anything to it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    print(text, end="", flush=True)


class _Detokenizer:
    """Text of a byte-level tokenizer, id by id, holding back bytes that do not make a character yet."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # since the text last ended on a whole character
        self.shown = 0  # characters of these printed already

    def add(self, token: int) -> str:
        """What this id completes. An unfinished character decodes as one U+FFFD at the very end."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        whole = text.removesuffix("\ufffd")
        new, self.shown = whole[self.shown :], len(whole)
        if whole == text:
            self.ids, self.shown = [], 0
        return new

    def rest(self) -> str:
        """What is still held back when no more ids come."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.shown :]


def _read_prompt(
    prompt: str | None, prompt_file: Path | None, tokens: Path | None
) -> tuple[str | None, np.ndarray | None]:
    """(text, None), or (None, integers [B, T]), from the one source that was given."""
    import numpy as np

    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--tokens": tokens}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"give one of {', '.join(sources)} (got {' and '.join(given) or 'none'})")
    if tokens is None:
        text = _read_text(prompt_file) if prompt_file else prompt
        if not text:
            raise ValueError(f"empty prompt: {given[0]} has no text; give at least one character")
        return text, None
    try:
        ids = np.load(tokens, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{tokens}: not a .npy file of integers ({error})") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of several arrays"
        raise ValueError(f"{tokens}: must be a .npy file of integers [T] or [B, T], found {found}")
    return None, np.atleast_2d(ids)


def _strip_padding(ids: np.ndarray, file: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """[B, T] padded with -1 at the end of a row -> the same padded with 0, and lengths [B]."""
    import numpy as np

    lengths = (np.cumsum(ids == -1, axis=1) == 0).sum(1)
    row, column = np.nonzero((np.arange(ids.shape[1]) >= lengths[:, None]) & (ids != -1))
    if row.size:
        raise ValueError(f"{file}: row {row[0]} has {ids[row[0], column[0]]} after a -1; -1 may only end a row")
    return np.where(ids == -1, 0, ids), lengths


def _encode(text: str, tokenizer: Tokenizer, model: DeepseekV4) -> np.ndarray:
    """Token ids [1, T]; the config's BOS comes first, whether or not the text spells it out."""
    import numpy as np

    ids, bos = tokenizer.encode(text, add_special_tokens=False).ids, model.config.bos_token_id
    return np.asarray([ids if bos is None or ids[:1] == [bos] else [bos, *ids]], np.int32)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: must hold a JSON object, the fields of a config.json")
    return fields


def _sampler(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Sampler:
    import dsv4_jax

    if temperature < 0:
        raise ValueError(f"--temperature {temperature} must be 0 (greedy) or more")
    if temperature == 0:
        if (top_k, top_p, min_p) != (None, None, None):
            raise ValueError("--top-k, --top-p and --min-p need a --temperature above 0")
        return dsv4_jax.Greedy()
    return dsv4_jax.Sample(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def _busy(what: str):
    """A spinner on stderr where a person looks on."""
    return stderr.status(what) if stderr.is_terminal else nullcontext()


@contextmanager
def _progress(title: str, *amounts: ProgressColumn) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives a function of (done, total) and what else its columns show."""
    columns = (TextColumn(title), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=None, memory="")
        yield lambda done, total, **fields: progress.update(task, completed=done, total=total, **fields)


def _bytes_columns() -> tuple[ProgressColumn, ...]:
    return DownloadColumn(binary_units=True), TransferSpeedColumn(), TextColumn("{task.fields[memory]}")


class _PeakMemory:
    """A progress function that also shows the most anonymous memory seen so far."""

    def __init__(self, update: Callable[..., None]):
        self.update, self.peak = update, 0

    def __call__(self, done: int, total: int) -> None:
        from checkpoints.memory import anonymous_bytes

        self.peak = max(self.peak, anonymous_bytes())
        self.update(done, total, memory=f"peak {_size(self.peak)}")


def _bytes(text: str, option: str) -> int:
    """ "512MiB", "2G", "1.5GB" or a plain number, in bytes; K, M, G, T are powers of 1024, KB, MB, GB, TB of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{option} {text}: not a size; write 2GiB, 512MiB or a number of bytes")
    base = 1000 if (found[3] or "").upper() == "B" else 1024
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def _report(fields: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(fields) if as_json else "\n".join(f"{key}: {value}" for key, value in fields.items()))


def _table(first: str, rows: dict[str, list[str]], *columns: str) -> Table:
    table = Table(first, *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _size(nbytes: float) -> str:
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:,.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
