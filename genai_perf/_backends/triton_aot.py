"""Compiling Triton kernels for chips that are not here, and reading what came of it."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """A compilation target, the shared memory a program may take, its matrix instruction."""

    arch: str
    shared_limit: int
    matrix_instruction: str

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


CHIPS = {
    "sm_80": Chip("sm_80", 163 * KIB, r"\bmma\.sync[\w.:]*"),
    "sm_90": Chip("sm_90", 227 * KIB, r"\bwgmma\.mma_async[\w.:]*"),
    "sm_100": Chip("sm_100", 227 * KIB, r"\btcgen05\.mma[\w.:]*"),
    "gfx942": Chip("gfx942", 64 * KIB, r"\bv_mfma_\w+"),
}
ANY_MATRIX = "|".join(chip.matrix_instruction for chip in CHIPS.values())


@dataclass(frozen=True)
class Source:
    """A kernel as one launch would specialise it.

    Args:
        name: what the report calls it.
        kernel: the jit function.
        constants: its constexprs; a pointer that is absent is None here.
        pointers: element type of the pointer arguments, by name; `default_pointer` for the others.
        floats: the float arguments. Every other argument is a 32-bit integer; strides are taken to
            be multiples of 16, pointers to be aligned to 16 bytes.
        options: num_warps and num_stages.
        matrix: whether the chip's own matrix instruction must be found ("own"), any ("any"), or
            none is needed ("none").
    """

    name: str
    kernel: object
    constants: Mapping[str, object]
    default_pointer: str
    pointers: Mapping[str, str] = field(default_factory=dict)
    floats: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)
    matrix: str = "own"


@dataclass
class Compiled:
    """What one compilation gave; `problems` is empty if it may ship."""

    name: str
    arch: str
    options: dict[str, int]
    registers: int
    spills: int
    shared: int
    instructions: list[str]
    problems: list[str]


def compile_for(source: Source, arch: str) -> Compiled:
    """Compile, read registers, spilled bytes, shared memory and matrix instructions, and judge."""
    compiler = import_module("triton.compiler")
    target = import_module("triton.backends.compiler").GPUTarget
    errors = import_module("triton.runtime.errors")
    chip = CHIPS[arch]
    kernel = source.kernel
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in source.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + source.pointers.get(name, source.default_pointer)
            attributes[index,] = [["tt.divisibility", 16]]
        elif name in source.floats:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") and name not in kernel.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    gpu = target("hip", arch, 64) if chip.amd else target("cuda", int(arch.removeprefix("sm_")), 32)
    ast = compiler.ASTSource(kernel, signature, dict(source.constants), attributes)
    try:
        made = import_module("triton").compile(ast, target=gpu, options=dict(source.options))
    except (RuntimeError, errors.TritonError) as error:
        reason = f"does not compile: {str(error).splitlines()[0] if str(error) else error!r}"
        return Compiled(source.name, arch, dict(source.options), 0, 0, 0, [], [reason])
    if chip.amd:
        registers, spills = _amd_resources(made.asm["amdgcn"])
        text = made.asm["amdgcn"]
    else:
        registers, spills = _nvidia_resources(made.asm["cubin"])
        text = made.asm["ptx"]
    instructions = sorted(set(re.findall(ANY_MATRIX, text)))
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    if made.metadata.shared > chip.shared_limit:
        problems.append(f"takes {made.metadata.shared} bytes of shared memory, "
                        f"the chip has {chip.shared_limit}")  # fmt: skip
    needed = {"own": chip.matrix_instruction, "any": ANY_MATRIX, "none": ""}[source.matrix]
    if not re.search(needed, text):
        problems.append(f"has no {needed} instruction")
    return Compiled(source.name, arch, dict(source.options), registers, spills,
                    made.metadata.shared, instructions, problems)  # fmt: skip


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) by cuobjdump, which Triton brings."""
    tool = Path(import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True,
                                 check=True).stdout  # fmt: skip
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, bytes of scratch memory a thread) from the kernel's metadata."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    spilled = 4 * number("vgpr_spill_count")
    return number("vgpr_count"), max(number("private_segment_fixed_size"), spilled)
