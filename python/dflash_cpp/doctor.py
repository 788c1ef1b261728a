"""What this machine and this build offer, and why something is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from . import _core
from .inspect_gguf import human_bytes

# Processor flags that each instruction set needs, as Linux names them.
ISA_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    "amx": ("avx512_vnni", "amx_tile", "amx_int8"),
    "avxvnni": ("avx2", "fma", "f16c", "avx_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon_i8mm": ("asimddp", "i8mm"),
    "neon_dotprod": ("asimddp",),
    "neon": ("asimd",),
    "plain": (),
}
_PACKAGES: Final = ("numpy", "gguf", "safetensors", "tokenizers", "jinja2", "rich")
_KFD: Final = Path("/dev/kfd")


@dataclass(frozen=True)
class Report:
    """What `dflash-cpp doctor` shows.

    backends, instruction_sets: name -> "" when usable, else why not.
    devices: AMD devices with name, architecture and bytes of memory; devices_note says why there are none.
    """

    version: str
    python: str
    platform: str
    build: dict[str, str]
    backends: dict[str, str]
    instruction_sets: dict[str, str]
    threads: dict[str, int]
    numa: str
    memory: dict[str, int]
    devices: list[dict[str, Any]]
    devices_note: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _cpu_flags() -> set[str] | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return None


def instruction_sets() -> dict[str, str]:
    """Every instruction set the kernels know for this architecture -> "" when usable, else why not."""
    usable, flags = _core.cpu_isas(), _cpu_flags()
    out = dict.fromkeys(usable, "")
    arm = platform.machine() in ("aarch64", "arm64")
    for isa, needed in ISA_FLAGS.items():
        if isa in out or isa.startswith("neon") != arm:
            continue
        missing = [f for f in needed if flags is not None and f not in flags]
        out[isa] = f"this CPU has no {', '.join(missing)}" if missing else "not compiled into this build"
    return out


def _threads() -> dict[str, int]:
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "logical cores": cores,
        "usable by this process": allowed,
        "used unless told otherwise": _core.default_threads(),
    }


def _memory() -> dict[str, int]:
    names = {"MemTotal": "total", "MemAvailable": "available", "SwapTotal": "swap"}
    out: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in names:
                out[names[key]] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return out


def _hip_result(answer: Any) -> Any:
    """hip-python returns (error, value, ...): the values, or RuntimeError."""
    error, *values = answer if isinstance(answer, tuple) else (answer,)
    if int(error) != 0:
        raise RuntimeError(str(error))
    return values[0] if len(values) == 1 else tuple(values)


def amd_devices() -> tuple[list[dict[str, Any]], str]:
    """AMD devices through hip-python, and why there are none (or nothing more is known)."""
    try:
        hip = importlib.import_module("hip.hip")
    except ImportError as e:
        return (
            [],
            f"hip-python is not usable ({e}); pip install 'dflash-cpp[hip]' on a machine with ROCm to list devices",
        )
    except Exception as e:  # it loads vendor libraries, which fail in their own ways
        return [], f"hip-python does not load: {e}"
    devices: list[dict[str, Any]] = []
    try:
        for index in range(int(_hip_result(hip.hipGetDeviceCount()))):
            properties = hip.hipDeviceProp_t()
            _hip_result(hip.hipGetDeviceProperties(properties, index))
            _hip_result(hip.hipSetDevice(index))
            free, total = _hip_result(hip.hipMemGetInfo())
            devices.append(
                {
                    "name": _text(properties.name),
                    "architecture": _text(properties.gcnArchName),
                    "compute_units": int(properties.multiProcessorCount),
                    "memory_total": int(total),
                    "memory_free": int(free),
                }
            )
    except Exception as e:
        return devices, f"HIP: {e}{_kfd_hint()}"
    return devices, "" if devices else "HIP finds no AMD device" + _kfd_hint()


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _kfd_hint() -> str:
    if not _KFD.exists():
        return f" ({_KFD} is missing: the amdgpu kernel driver is not loaded)"
    if not os.access(_KFD, os.R_OK | os.W_OK):
        return f" ({_KFD} may not be opened: add this user to the render group)"
    return ""


def examine() -> Report:
    """Looks at everything. Never raises for something missing."""
    devices, note = amd_devices()
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing"
    return Report(
        version=_core.__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        build=_core.build_info(),
        backends=_core.backends(),
        instruction_sets=instruction_sets(),
        threads=_threads(),
        numa=_core.describe_numa(),
        memory=_memory(),
        devices=devices,
        devices_note=note,
        packages=packages,
    )


def _state_table(title: str, states: Mapping[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column()
    for name, why in states.items():
        table.add_row(name, "[green]yes[/green]" if not why else f"[yellow]no[/yellow]: {escape(why)}")
    return table


def render(report: Report) -> RenderableType:
    """Rich tables for people."""
    machine = Table(title=f"dflash_cpp {report.version}", show_header=False)
    machine.add_column()
    machine.add_column()
    machine.add_row("python", report.python)
    machine.add_row("platform", report.platform)
    for key, value in report.build.items():
        machine.add_row(f"build: {key}", value)
    for key, n in report.threads.items():
        machine.add_row(f"threads: {key}", str(n))
    machine.add_row("numa", escape(report.numa))
    for key, n in report.memory.items():
        machine.add_row(f"memory: {key}", human_bytes(n))
    for key, value in report.packages.items():
        machine.add_row(f"package: {key}", value)
    devices = Table(title="AMD devices", show_header=False)
    devices.add_column()
    devices.add_column()
    for d in report.devices:
        memory = f"{human_bytes(d['memory_free'])} free of {human_bytes(d['memory_total'])}"
        devices.add_row(escape(d["name"]), f"{d['architecture']}, {d['compute_units']} compute units, {memory}")
    if report.devices_note:
        devices.add_row("note", escape(report.devices_note))
    return Group(
        machine,
        _state_table("backends", report.backends),
        _state_table("CPU instruction sets, best first", report.instruction_sets),
        devices,
    )
