"""The `dsv4` command: one function per verb, no model logic. The top floor, and alone in importing `checkpoints`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

app = typer.Typer(
    name="dsv4",
    help="DeepSeek-V4 in JAX: convert checkpoints, look into them, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
stderr = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point: bad input ends in one or two lines on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="Directory in the official format.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write.")],
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert an official checkpoint to Orbax, in its own number formats.

    Example: `dsv4 convert DeepSeek-V4-Flash flash-orbax`
    """
    import checkpoints

    with _progress_in_bytes("converting") as update:
        checkpoints.convert(src, dst, force=force, progress=update)
    _report({"converted": str(src), "written": str(dst)}, as_json)


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

    checkpoints.export(src, dst, force=force)
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
    console = Console()
    console.print(f"[bold]{found.model}[/]\n{found.path} ({found.format}, {found.files} files, draft: {found.draft})")
    console.print(f"{found.parameters:,} parameters, {found.tensors:,} tensors, {_size(found.bytes)}\n")
    console.print(_table("part", {k: [f"{v['parameters']:,}", _size(v["bytes"])] for k, v in found.by_part.items()}))
    console.print(_table("dtype", {k: [f"{v['tensors']:,}", _size(v["bytes"])] for k, v in found.by_dtype.items()}))


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
    from dsv4_jax.presets import PRESETS

    if config not in PRESETS and not Path(config).is_file():
        raise ValueError(f"--config {config}: neither a file nor one of {', '.join(PRESETS)}")
    fields = PRESETS[config] if config in PRESETS else json.loads(Path(config).read_text())
    fields = fields if layers is None else with_layers(fields, layers)
    with _progress_in_bytes("writing", "tensors") as update:
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
    stop: Annotated[list[int] | None, typer.Option(help="Token id that ends a row; may be repeated.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the cache, prompt included.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    kernels: Annotated[str, typer.Option(help="Platform strategy.")] = "auto",
    numerics: Annotated[str, typer.Option(help="auto or exact.")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt. Text streams to stdout; statistics go to stderr.

    Examples: `dsv4 generate --prompt "Once upon a time"`,
    `dsv4 generate flash-orbax --prompt-file question.txt --temperature 0.7 --top-p 0.95`,
    `dsv4 generate flash-orbax --tokens prompts.npy --json`
    """
    import checkpoints
    import dsv4_jax

    path = checkpoints.bundled_path() if path is None else path
    sampler = _sampler(temperature, top_k, top_p, min_p)
    tokenizer = checkpoints.load_tokenizer(path) if path.is_dir() else None
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        with stderr.status("loading") if stderr.is_terminal else _nothing():
            model = checkpoints.load(path, max_tokens=max_tokens, dtype=dtype, kernels=kernels, numerics=numerics)
    for note in notes:
        stderr.print(f"note: {note.message}", highlight=False)
    ids, lengths = _prompt_ids(prompt, prompt_file, tokens, tokenizer, model.config.bos_token_id)
    stop_ids = [model.config.eos_token_id] if stop is None and model.config.eos_token_id is not None else stop or []
    request: dict[str, Any] = {
        "lengths": lengths,
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "seed": seed,
        "stop_ids": stop_ids,
        "drafts": drafts,
    }
    if as_json:
        out = dsv4_jax.generate(model, ids, **request)
        rows = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]
        text = [tokenizer.decode(row, skip_special_tokens=True) for row in rows] if tokenizer else None
        print(json.dumps({"tokens": rows, "text": text, "stats": out.stats.to_json()}))
        return
    if len(ids) > 1:
        raise ValueError(f"{len(ids)} rows cannot stream to one terminal; use --json")
    _stream_text(dsv4_jax.stream(model, ids, **request), tokenizer)


def _stream_text(events: Iterator, tokenizer) -> None:
    """Print a row as it comes, holding back bytes that do not make a character yet; then its statistics."""
    import time

    began = first = time.perf_counter()
    ids: list[int] = []
    shown = ""
    for event in events:
        if not ids:
            first = time.perf_counter()
        ids.append(int(event.tokens[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else " ".join(map(str, ids))
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else shown
    print(text[len(shown) :])
    decode = time.perf_counter() - first
    rate = f", {(len(ids) - 1) / decode:.1f} tokens/s after it" if len(ids) > 1 and decode else ""
    stderr.print(f"{len(ids)} tokens; first after {first - began:.2f} s{rate}", highlight=False)


def _prompt_ids(prompt: str | None, prompt_file: Path | None, tokens: Path | None, tokenizer, bos: int | None):
    """Token ids [B, T] and lengths [B] (or None) from whichever of the three sources was given."""
    import numpy as np

    given = [
        name for name, v in (("prompt", prompt), ("prompt-file", prompt_file), ("tokens", tokens)) if v is not None
    ]
    if len(given) != 1:
        raise ValueError(f"give one of --prompt, --prompt-file and --tokens (got {', '.join(given) or 'none'})")
    if tokens is not None:
        ids = np.load(tokens, allow_pickle=False)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{tokens}: must hold integers [T] or [B, T], got {ids.dtype} {list(ids.shape)}")
        return np.maximum(ids, 0), (ids >= 0).sum(1)
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json; give the prompt as ids with --tokens FILE.npy")
    text = prompt if prompt is not None else Path(str(prompt_file)).read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.asarray([([] if bos is None else [bos]) + ids]), None


def _sampler(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):
    import dsv4_jax

    if temperature < 0:
        raise ValueError(f"--temperature {temperature} must be 0 (greedy) or more")
    if temperature == 0:
        if (top_k, top_p, min_p) != (None, None, None):
            raise ValueError("--top-k, --top-p and --min-p need a --temperature above 0")
        return dsv4_jax.Greedy()
    return dsv4_jax.Sample(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


class _progress_in_bytes:
    """A progress bar on stderr whose update takes (done, total)."""

    def __init__(self, title: str, unit: str = "bytes"):
        speed = [TransferSpeedColumn()] if unit == "bytes" else [TextColumn("{task.completed:,.0f} " + unit)]
        columns = [TextColumn(title), BarColumn(), *speed, TimeRemainingColumn()]
        self.progress = Progress(*columns, console=stderr, transient=True)

    def __enter__(self):
        self.progress.start()
        task = self.progress.add_task("", total=None)
        return lambda done, total: self.progress.update(task, completed=done, total=total)

    def __exit__(self, *_):
        self.progress.stop()


def _report(fields: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(fields) if as_json else "\n".join(f"{key}: {value}" for key, value in fields.items()))


def _table(first: str, rows: dict[str, list[str]]) -> Table:
    table = Table(first, *([("parameters" if first == "part" else "tensors")]), "size")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _size(nbytes: int) -> str:
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:,.1f} {unit}"


if __name__ == "__main__":
    main()
