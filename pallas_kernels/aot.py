"""Compile for chips that are not there, down to machine code, and report what the compiler knows.

`pip install 'dsv4-jax[aot]'` brings libtpu and the two CUDA plugin wheels; no TPU, GPU or driver is needed. Compiling
belongs in a child process: vendor flags are read once per process, and libtpu aborts the process on some errors.

A case is a function `make(chip, **arguments) -> (fn, args)` of an importable module or a file: fn is a function or a
`jax.jit` object, args are ShapeDtypeStructs. From Python, `run_cases([Case("tests/x.py:make", {"T": 1})], "v6e")`; by
hand, `python -m pallas_kernels.aot tests/x.py:make v6e --arguments '{"T": 1}' --profile`.

What can be believed (static cycles ignore contention for HBM) is said in `roofline_seconds`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, chip

MARK = "AOT_REPORT "  # starts the lines a child prints for its parent
NEEDS = {
    "tpu": ("libtpu", "libtpu"),
    "cuda": ("jax_plugins.xla_cuda13", "jax-cuda13-plugin and jax-cuda13-pjrt"),
}  # platform -> module to look for, wheels that bring it
TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
GPU_EXTRAS = {"A100": (40, 64), "H100": (50, 128), "H200": (50, 128), "B200": (126, 128)}  # L2 MiB, fp32 lanes a core
# A valid accelerator and host keep libtpu from asking a metadata server; the topology's name decides what is compiled.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",  # what ends the process; a profile that stops early writes gibibytes of lesser complaints
}
_HLO_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float8_e4m3fn": "f8e4m3fn", "bool": "pred"} | {
    f"{long}{bits}": f"{short}{bits}" for long, short in (("int", "s"), ("uint", "u")) for bits in (8, 16, 32)
}
PROFILE = ("cycles", "bundles")  # of a TPU program: simulated cycles, and the slots of its instructions


class AotUnavailable(RuntimeError):
    """The vendor's compiler is not installed."""


@dataclass(frozen=True)
class Case:
    """What to compile: "package.module:make" or "path/file.py:make", called as make(chip, **arguments).

    kernels_alone: compile a program that only calls the Pallas kernels of fn, with none of the operations around them.
    kernel: of its different kernels, only the one of this number, and that once.
    spaces: with `kernels_alone`: what a report on all of fn says of where its kernels' operands and results lie.
    """

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    kernels_alone: bool = False
    kernel: int | None = None
    spaces: dict[str, list[bool]] = field(default_factory=dict)


def available(platform: str) -> bool:
    """Whether the compiler for "tpu" or "cuda" is installed."""
    module = NEEDS[platform][0]
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def require_compiler(platform: str) -> None:
    """Raise AotUnavailable, naming what to install, unless the compiler for `platform` is there."""
    if not available(platform):
        raise AotUnavailable(
            f"compiling for {platform} without hardware needs {NEEDS[platform][1]}: pip install 'dsv4-jax[aot]'"
        )


def tpu_devices(target: Chip, topology: str | None = None) -> list[jax.Device]:
    """Devices of a TPU that is not there; `topology` as libtpu writes it ("v6e:16x16"), one host's by default."""
    require_compiler("tpu")
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = topology or TPU_TOPOLOGIES[target.name]
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def gpu_devices(target: Chip, count: int = 1) -> list[jax.Device]:
    """Devices of one host with `count` GPUs that are not there."""
    require_compiler("cuda")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=_gpu_target_config(target)
    )
    return list(found.devices)


def _gpu_target_config(target: Chip) -> str:
    """The chip as the text form of XLA's GpuTargetConfigProto."""
    l2_mib, lanes = GPU_EXTRAS[target.name]
    major, minor = divmod(target.generation, 10)
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": target.smem_bytes,
        "shared_memory_per_core": target.smem_bytes + (1 << 10),
        "registers_per_block_limit": 1 << 16,
        "registers_per_core_limit": 1 << 16,
        "core_count": target.cores,
        "fpus_per_core": lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(target.hbm_bytes_per_s),
        "l2_cache_size": l2_mib << 20,
        "clock_rate_ghz": target.clock_hz / 1e9,
        "device_memory_size": target.hbm_bytes,
    }
    extension = "feature_extension: ACCELERATED_FEATURES" if target.cuda_arch.endswith("a") else ""
    lines = [f"  {name}: {value}" for name, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}")
    return "\n".join(
        ["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 10 patch: 0 }",
         "runtime_version { major: 13 minor: 0 patch: 0 }", f'device_description_str: "NVIDIA {target.name}"']
    )  # fmt: skip


def compile_tpu(fn, args, chip_name: str, *, options: dict[str, str] | None = None) -> jax.stages.Compiled:
    """Compile fn(*args) for one device of a TPU generation.

    Args:
      fn: a function or a `jax.jit` object.
      args: a sequence of pytrees of ShapeDtypeStructs; those without a sharding go to one device.
      chip_name: of `chips.CHIPS`.
      options: XLA compile options.
    Raises:
      ValueError: the chip is not a TPU. AotUnavailable: libtpu is not installed.
    """
    target = _chip_of_platform(chip_name, "tpu")
    return _compile(fn, args, tpu_devices(target)[:1], "tpu", options)


def compile_gpu(fn, args, chip_name: str, *, options: dict[str, str] | None = None) -> jax.stages.Compiled:
    """As `compile_tpu`, for one GPU; JAX_PLATFORMS must be "cpu" before jax is imported, as `run_cases` sees to."""
    target = _chip_of_platform(chip_name, "cuda")
    return _compile(fn, args, gpu_devices(target), "cuda", options)


def _chip_of_platform(name: str, platform: str) -> Chip:
    target = chip(name)
    if target.platform != platform:
        raise ValueError(f"{name} is compiled for by platform {target.platform!r}, not {platform!r}")
    return target


def _lower(fn, args, devices: list[jax.Device], platform: str) -> jax.stages.Lowered:
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(x):
        placed = getattr(x, "sharding", None) is not None
        return x if placed else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas helpers that ask which chip they are on see this
        return jitted.trace(*jax.tree.map(place, tuple(args))).lower(lowering_platforms=(platform,))


def _kernels_alone(fn, args, devices: list[jax.Device], case: Case):
    """A function that calls Pallas kernels of fn(*args) on arguments of their own, those arguments, and `calls`."""
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        every = list(_pallas_calls(jax.make_jaxpr(fn)(*args).jaxpr))
    same = collections.defaultdict(list)
    for call in every:
        same[str(call.params), str([v.aval for v in call.invars])].append(call)
    different = list(same.values())
    calls = every if case.kernel is None else different[case.kernel][:1]
    shapes = [[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars] for call in calls]
    bound = [_in_spaces(call, case.spaces) for call in calls]
    free = Format(Layout.AUTO)  # a kernel's operands lie as it wants them, with no copy before it
    run = jax.jit(
        lambda *args: [call(*a) for call, a in zip(bound, args, strict=True)], in_shardings=free, out_shardings=free
    )
    return run, shapes, [(str(group[0].params.get("name")), len(group)) for group in different]


def _in_spaces(call, spaces: dict[str, list[bool]]):
    """A function of a kernel's operands that has them, and its results, in vector memory where `spaces` says so."""
    name, operands, results = str(call.params.get("name")), [v.aval for v in call.invars], call.params["out_avals"]
    shape = lambda aval: f"{_HLO_DTYPES.get(aval.dtype.name, aval.dtype.name)}[{','.join(map(str, aval.shape))}]"
    found = spaces.get(_signature(name, map(shape, operands)), [False] * (len(operands) + len(results)))
    taken, given = found[: len(operands)], found[len(operands) :]
    placed = [aval.update(memory_space=pltpu.VMEM) if v else aval for aval, v in zip(results, given, strict=True)]
    params = call.params | {"out_avals": tuple(placed)}

    def run(*args):
        pin = pltpu.with_memory_space_constraint
        return call.primitive.bind(
            *(pin(x, pltpu.VMEM) if v else x for x, v in zip(args, taken, strict=True)), **params
        )

    return jax.named_call(run, name=name)


def _signature(name: str, shapes: Iterable[str]) -> str:
    return f"{name}({', '.join(shapes)})"


def operand_spaces(text: str) -> dict[str, list[bool]]:
    """{kernel and its operands' shapes: whether each operand, then each result, lies in vector memory}, by HLO.

    Calls that look alike decide by majority.
    """
    types = dict(re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) [\w\-]+\(", text, re.MULTILINE))
    call = re.compile(
        r"^\s*(?:ROOT )?%([\w.\-]+?)(?:\.\d+)* = (.*?) custom-call\((.*?)\), custom_call_target=.tpu_custom_call.",
        re.MULTILINE,
    )
    votes = collections.defaultdict(list)
    for name, results, operands in call.findall(text):
        given = [types[x] for x in re.findall(r"%([\w.\-]+)", operands)]
        shapes = [re.match(r"\w+\[[\d,]*\]", x) for x in given]
        if all(shapes):
            places = [*given, *re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", results)]
            votes[_signature(name, (x[0] for x in shapes if x))].append(["S(1)" in x for x in places])
    return {name: [2 * sum(v) > len(v) for v in zip(*cast, strict=True)] for name, cast in votes.items()}


def _pallas_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)


def _compile(fn, args, devices, platform: str, options) -> jax.stages.Compiled:
    return _lower(fn, args, devices, platform).compile(compiler_options=options)


def run_cases(
    cases: Iterable[Case],
    chip_name: str,
    *,
    profile: bool | tuple[str, ...] = False,
    timeout: float = 300,
    keep: str | None = None,
) -> list[dict[str, Any]]:
    """Compile cases in child processes, one process for as many as it survives, and report on each, in order.

    Args:
      profile: TPU only: also static cycles and spills, which takes longer (the schedule is simulated); a tuple says
        which of PROFILE.
      timeout: seconds for one process; the case it dies in, by time or by abort, gets an error and the rest another
        process.
      keep: a directory that the compiler's dumps stay in; a temporary one otherwise.
    Returns:
      One dict a case: chip, target, arguments and either `error` (str) or
        lower_s, compile_s: seconds.
        bytes: argument, output, alias, temp and code, per device.
        custom_calls: {target: how many}, the kernels of the program among them.
        kernels: {name: facts}. TPU with `profile`: static_cycles, static_s, vmem_bytes, vmem_spills and slots
          ({unit: (used, capacity)} of issue slots). GPU: registers, spill_bytes, stack_bytes, smem_bytes, threads.
        xla_cycles: TPU: the sum of XLA's own estimates for its fusions.
        spaces: TPU: see `operand_spaces`; in a whole program XLA keeps much in vector memory, or brings it beforehand.
        calls: with `kernels_alone`: [name, how often it is called] of each different kernel.
        notes: what could not be measured, and why.
    Raises:
      AotUnavailable: the compiler is not installed.
    """
    target, cases = chip(chip_name), list(cases)
    dumps = profile if isinstance(profile, tuple) else PROFILE if profile else ()
    require_compiler(target.platform)
    reports: list[dict[str, Any]] = []
    while len(reports) < len(cases):
        run = _run_child(cases[len(reports) :], target, dumps, timeout, keep)
        reports += run.reports
        if run.failure is not None and len(reports) < len(cases):
            reports.append(_after_death(cases[len(reports)], target, dumps, timeout, keep, run))
    return reports


def run_in_child(
    target: str, chip_name: str, arguments: dict[str, Any] | None = None, *, profile: bool = False, timeout: float = 300
) -> dict[str, Any]:
    """`run_cases` for one case; raises RuntimeError where its report is an error."""
    report = run_cases([Case(target, arguments or {})], chip_name, profile=profile, timeout=timeout)[0]
    if "error" in report:
        raise RuntimeError(f"{target} {arguments or {}} does not compile for {chip_name}: {report['error']}")
    return report


@dataclass(frozen=True)
class _Run:
    """The reports a child printed, why it ended if it did not end well, and what the case it died in left behind."""

    reports: list[dict[str, Any]]
    failure: str | None
    remains: dict[str, dict[str, Any]]


def _after_death(case: Case, target: Chip, profile: tuple[str, ...], timeout: float, keep, run: _Run) -> dict[str, Any]:
    """The profiler aborts on some of XLA's own fusions: then it is given the kernels alone, and the rest without it."""
    if len(profile) == 1 and case.kernels_alone and run.remains:
        notes = [f"the profiler stopped early: {run.failure}"]
        return _heading(case, target) | {"kernels": run.remains, "notes": notes}
    if profile:
        whole = _run_child([case], target, (), timeout, keep)
        if whole.reports:
            kernels: dict[str, dict[str, Any]] = {}
            for dumps in profile:  # one at a time: what writes the cycles may still abort afterwards
                alone = _run_child([dataclasses.replace(case, kernels_alone=True)], target, (dumps,), timeout, keep)
                found = alone.reports[0].get("kernels", {}) if alone.reports else alone.remains
                kernels = {name: kernels.get(name, {}) | found.get(name, {}) for name in kernels | found}
            notes = [f"kernels profiled by themselves, for the profiler stopped early: {run.failure}"]
            return whole.reports[0] | {"kernels": kernels, "notes": notes}
    return _heading(case, target) | {"error": run.failure}


def _heading(case: Case, target: Chip) -> dict[str, Any]:
    return {"chip": target.name, **dataclasses.asdict(case)}


def _run_child(cases: list[Case], target: Chip, profile: tuple[str, ...], timeout: float, keep: str | None) -> _Run:
    with tempfile.TemporaryDirectory(prefix="aot_") as scratch, tempfile.TemporaryDirectory(prefix="aot_") as logs:
        dumps = keep or scratch
        before = _stamps(Path(dumps))
        job = json.dumps({"chip": target.name, "dumps": dumps, "cases": [dataclasses.asdict(c) for c in cases]})
        command = [sys.executable, "-m", "pallas_kernels.aot", "--child"]
        environment = os.environ | _child_environment(target, dumps, profile) | {"TPU_LOG_DIR": logs}
        try:
            done = subprocess.run(
                command, input=job, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
            )
            out, err, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            out, err, code = _text(late.stdout), f"no result after {timeout} s", 1
        reports = [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
        ends = [report.pop("ended_ns") for report in reports]
        reported = {p: at for p, at in _stamps(Path(dumps)).items() if ends and at <= ends[-1]}
        remains = tpu_kernels(_texts(Path(dumps), before | reported), target) if profile and code else {}
    return _Run(reports, None if code == 0 else _reason(err, code), remains)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _reason(stderr: str, code: int) -> str:
    """The telling line of a dead child's log."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Check failed|CHECK failure|Error:|profiling of .* failed", line)]
    return (telling or lines or [f"exit status {code}"])[-1].strip()[:600]


def _child_environment(target: Chip, dumps: str, profile: tuple[str, ...]) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    common = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths), "JAX_COMPILATION_CACHE_DIR": ""}
    if target.platform == "cuda":
        mosaic = Path(dumps) / "mosaic"
        mosaic.mkdir(parents=True, exist_ok=True)
        return common | {
            "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",  # its tiles are chosen by timing, which is not to be had
            "MOSAIC_GPU_DUMP_TO": str(mosaic),
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_MLIR_PASSES": "1",
        }
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    for name in profile:
        (Path(dumps) / name).mkdir(parents=True, exist_ok=True)  # libtpu does not make them
    if "bundles" in profile:
        flags += (
            f" --xla_jf_dump_to={dumps}/bundles --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=.*hlo-static-bundle-profile.*"
        )
    if "cycles" in profile:
        flags += f" --xla_jf_dump_static_llo_profile_to={dumps}/cycles"
    return common | TPU_ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags, "XLA_FLAGS": ""}


def _child() -> None:
    """Compile the cases given on stdin, printing each report as soon as it is there."""
    job = json.loads(sys.stdin.read())
    target, dumps = chip(job["chip"]), Path(job["dumps"])
    devices = (tpu_devices if target.platform == "tpu" else gpu_devices)(target)[:1]
    for case in (Case(**c) for c in job["cases"]):
        try:
            report = _compile_case(case, target, devices, dumps)
        except Exception as error:  # reported to the parent, by whom it is raised or printed
            report = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(MARK + json.dumps(_heading(case, target) | report | {"ended_ns": time.time_ns()}), flush=True)


def load_target(target: str):
    """The function that "package.module:name" or "path/file.py:name" names."""
    module_name, _, name = target.rpartition(":")
    if not module_name or not name:
        raise ValueError(f"target {target!r} is not MODULE:FUNCTION or FILE.py:FUNCTION")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).exists():
            raise ValueError(f"target {target!r}: there is no file {module_name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses of the file look themselves up there
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    return getattr(module, name)


def _compile_case(case: Case, target: Chip, devices: list[jax.Device], dumps: Path) -> dict[str, Any]:
    before = _stamps(dumps)
    fn, args = load_target(case.target)(target, **case.arguments)
    report: dict[str, Any] = {}
    if case.kernels_alone:
        fn, args, report["calls"] = _kernels_alone(fn, args, devices, case)
    start = time.perf_counter()
    lowered = _lower(fn, args, devices, target.platform)
    lower_end = time.perf_counter()
    compiled = lowered.compile()
    report |= {"lower_s": lower_end - start, "compile_s": time.perf_counter() - lower_end}
    memory: Any = compiled.memory_analysis()
    sizes = ("argument", "output", "alias", "temp")
    report["bytes"] = {name: getattr(memory, f"{name}_size_in_bytes") for name in sizes}
    report["bytes"]["code"] = memory.generated_code_size_in_bytes
    text = compiled.as_text() or ""
    report["custom_calls"] = dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text)))
    files = _texts(dumps, before)
    if target.platform == "tpu":
        report["xla_cycles"], report["spaces"] = _xla_cycles(text), operand_spaces(text)
        report["kernels"] = tpu_kernels(files, target)
    else:
        report["kernels"] = gpu_kernels(files)
    return report


def _stamps(dumps: Path) -> dict[Path, int]:
    """When each dump that is read was written; kernels of two cases may share a name."""
    kinds = (".txt", ".textproto", ".ptx", ".ptxas", ".log")
    return {p: p.stat().st_mtime_ns for p in sorted(dumps.rglob("*")) if p.suffix in kinds}


def _texts(dumps: Path, before: dict[Path, int]) -> dict[str, str]:
    """{name: text} of the dumps written since `before`."""
    return {p.name: p.read_text(errors="replace") for p, at in _stamps(dumps).items() if before.get(p) != at}


def _xla_cycles(text: str) -> int:
    """Estimates above 2^62 stand for "unknown"."""
    return sum(c for c in map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)) if c < 2**62)


def tpu_kernels(files: dict[str, str], target: Chip) -> dict[str, dict[str, Any]]:
    """Per HLO op, what libtpu's static profile and bundle profile say."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, text in files.items():
        if name.endswith("static_llo_profile.textproto"):
            op, cycles = re.search(r'hlo_op_name: "([^"]+)"', text), re.search(r"estimated_cycles: (\d+)", text)
            count = int(cycles[1]) if cycles else 0  # 0 stands for a kernel that it could not schedule
            if op and count:
                kernels.setdefault(op[1], {}).update(static_cycles=count, static_s=count / target.clock_hz)
        elif name.endswith("hlo-static-bundle-profile.txt"):
            for block in text.split("HLO: ")[1:]:
                op = re.match(r"%(\S+) = ", block)
                if op:
                    kernels.setdefault(op[1], {}).update(_bundle_facts(block))
    return kernels


def _bundle_facts(block: str) -> dict[str, Any]:
    slots = {unit: (int(used), int(of)) for unit, used, of in re.findall(r" - (\S+(?: \S+)*): \((\d+)/(\d+)\)", block)}
    spills = re.search(r"VMEM_SPILL_COUNT: \(?(\d+)", block)
    vmem = re.search(r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', block)
    return {
        "vmem_spills": int(spills[1]) if spills else 0,
        "vmem_bytes": int(vmem[1]) if vmem else None,
        "slots": {unit: pair for unit, pair in slots.items() if pair[0] and not unit.endswith("SPILL_COUNT")},
    }


def gpu_kernels(files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Per Mosaic GPU kernel, what ptxas and the launch say; the dumps of one kernel share a stem."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, text in files.items():
        if not name.endswith(".ptxas"):
            continue
        stem = name.removesuffix(".ptxas")
        used, stack = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes stack frame", text)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
        passes = next((t for n, t in files.items() if n.startswith(stem + ".mlir-passes")), "")
        smem = re.search(r"gpu\.launch.*dynamic_shared_memory_size %c(\d+)", passes)
        threads = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+), (\d+))?", files.get(stem + ".ptx", ""))
        kernels[stem] = {
            "registers": int(used[1]) if used else None,
            "spill_bytes": sum(spills) if spills else None,
            "stack_bytes": int(stack[1]) if stack else None,
            "smem_bytes": int(smem[1]) if smem else None,
            "threads": int(np.prod([int(n or 1) for n in threads.groups()])) if threads else None,
        }
    return kernels


def roofline_seconds(target: Chip, *, hbm_bytes: float, flops: float, fp8: bool = False) -> float:
    """The least time any implementation needs: its bytes at peak bandwidth or its flops at peak rate.

    A kernel is expected to take max(static_s, bytes / bandwidth): static cycles see issue slots, latencies and DMA
    starts, but neither contention for HBM nor, on v5p, two cores that share it.
    """
    return max(hbm_bytes / target.hbm_bytes_per_s, flops / (target.fp8_flops if fp8 else target.bf16_flops))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description="Compile one case; print JSON.")
    parser.add_argument("target", nargs="?", help="MODULE:FUNCTION or FILE.py:FUNCTION")
    parser.add_argument("chip", nargs="?", help="of pallas_kernels.chips.CHIPS")
    parser.add_argument("--arguments", default="{}", help="keyword arguments of the function, as JSON")
    parser.add_argument("--profile", action="store_true", help="TPU: static cycles and spills, too")
    parser.add_argument("--keep", help="directory for the compiler's dumps")
    parser.add_argument("--timeout", type=float, default=300, help="seconds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return _child()
    if not given.target or not given.chip:
        parser.error("a target and a chip are needed")
    case = Case(given.target, json.loads(given.arguments))
    report = run_cases([case], given.chip, profile=given.profile, timeout=given.timeout, keep=given.keep)[0]
    print(json.dumps(report, indent=1))
    sys.exit("error" in report)


if __name__ == "__main__":
    main()
