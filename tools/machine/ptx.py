"""PTX text → a :class:`Program`: the emulator's operations, whose operands are numbers.

``Program.unknown`` has the unknown instructions with a line of each; a program with any isn't run.
Not supported: atomics, clusters, products of fp8 or unsigned integers, local memory, calls.
"""

import re
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field

# Bits of a type in a register.
BITS = {"pred": 32, "e4m3x2": 16, "e5m2x2": 16, "f16x2": 32, "bf16x2": 32, "bf16": 16}
BITS |= {"f32x2": 64}
BITS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}

SPECIAL = {
    f"%{name}.{axis}": 3 * i + j
    for i, name in enumerate(("tid", "ntid", "ctaid", "nctaid"))
    for j, axis in enumerate("xyz")
}
SPECIAL |= {"%laneid": 12, "%warpid": 13, "%cluster_ctarank": 14}
SPECIAL |= {f"%cluster_ctaid.{axis}": 14 for axis in "xyz"}

SPACES = {"param": 0, "global": 1, "shared": 2, "shared::cta": 2}
SHARED_START = 1024  # in the emulator's addresses

# Words of opcodes as numbers.  A comparison is the sum of the cases in its favor: less 1, equal 2,
# greater 4, unordered 8.
NUMBERS = {
    "lt": 1, "eq": 2, "le": 3, "gt": 4, "ne": 5, "ge": 6, "lo": 1, "ls": 3, "hi": 4, "hs": 6,
    "num": 7, "nan": 8, "ltu": 9, "equ": 10, "leu": 11, "gtu": 12, "neu": 13, "geu": 14,
    "rni": 0, "rzi": 1, "rmi": 2, "rpi": 3, "": 0, ".trans": 1,
    "32x32b": 0, "16x32bx2": 1, "16x256b": 2,
    "idx": 0, "up": 1, "down": 2, "bfly": 3, "u": 0, "s": 1, "f16": 0, "bf16": 1, "tf32": 2,
    "s8": 3, "i8": 3,
}  # fmt: skip

# Opcode, operation ({1} is the pattern's first group), operands of the operation.  An operand is a
# letter and the position of PTX's operand:
#   d destination, s source (:64 has 64 bits, :1 the bits of the type in the first group),
#   p both of d|p, D and S registers in braces, R a register and its bits, a [address],
#   m and c the map and the coordinates of [map, {coordinates}],
#   t a flag and an [address] of tensor memory, or a descriptor,
#   n a number, l a label, # a group of the opcode as a number,
#   - nothing, which is -1; a word with ? is also -1 if its operand is missing.
_SHARED = r"\.shared(?:::cta)?"
_NUMBER = r"([suf]\d+|bf16)"
_MMA = r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32"
_MMA_INT8 = r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.satfinite)?\.s32\.(s8)\.s8\.s32"
_BULK_LOAD = r"\.shared::(?:cta|cluster)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes"
_COMMIT = r"\.mbarrier::arrive::one(?:\.shared::(?:cluster|cta))?\.b64"
TABLE = [
    (r"ret|exit", "ret", ""),
    (r"trap", "trap", ""),
    (r"bra(?:\.uni)?", "bra", "l0"),
    (r"fence\.proxy\.async.*", "fence.proxy.async", ""),
    (r"(?:griddepcontrol|setmaxnreg|prefetchu?|nanosleep|fence|membar)\b.*", "nop", ""),
    (r"bar\.warp\.sync", "bar.warp.sync", ""),
    (r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?", "bar.sync", "n0 n1?"),
    (r"shfl\.sync\.(idx|up|down|bfly)\.b32", "shfl", "d0 s1 s2 s3 #1"),
    (r"elect\.sync", "elect", "p0"),
    (r"redux\.sync\.(add|and|or|xor)\.[usb]32", "redux.{1}", "d0 s1"),
    (r"redux\.sync\.((?:min|max)(?:\.NaN)?)\.([usf]32)", "redux.{1}.{2}", "d0 s1"),
    (r"setp\.(\w+)\.(b?f16x2)", "setp.{2}", "p0 s1 s2 #1"),
    (r"setp\.(\w+)\.(\w+)", "setp.{2}", "d0 - s1:2 s2:2 #1"),
    (r"cvt\.([us])(\d+)\.([us])(\d+)", "cvt.integer", "R0 R1 #4 #3 #2 #1"),
    (r"cvt\.rn\.(bf16x2|f16x2)\.f32", "cvt.{1}.f32", "d0 s1 s2"),
    (r"cvt\.rn\.f16x2\.(e4m3x2)", "cvt.f16x2.{1}", "d0 s1"),
    (r"cvt\.rna\.tf32\.f32", "cvt.rna.tf32.f32", "d0 s1"),
    (rf"cvt(?:\.(r[nzmp]i)|\.rn)?\.{_NUMBER}\.{_NUMBER}", "cvt.{2}.{3}", "d0:2 s1:3 #1?"),
    (r"cvta(?:\.to)?\.global\.u64", "mov.u64", "d0:64 s1:64"),
    (r"cvta\.(param)\.u64", "cvta.{1}", "d0:64 s1:64"),
    (rf"ldmatrix\.sync\.aligned\.m8n8\.x\d(\.trans)?{_SHARED}\.b16", "ldmatrix", "#1 a1 D0"),
    (rf"stmatrix\.sync\.aligned\.m8n8\.x\d(\.trans)?{_SHARED}\.b16", "stmatrix", "#1 a0 S1"),
    (_MMA, "mma", "#2 #1 D0 S1 S2 S3"),
    (_MMA_INT8, "mma", "#2 #1 D0 S1 S2 S3"),
    (r"wgmma\.(fence|commit_group)\.sync\.aligned", "wgmma.{1}", ""),
    (r"wgmma\.wait_group\.sync\.aligned", "wgmma.wait_group", "n0"),
    (rf"cp\.async\.c[ag]{_SHARED}\.global", "cp.async", "n2 s3? a0 a1"),
    (r"cp\.async\.commit_group", "cp.async.commit_group", ""),
    (r"cp\.async\.wait_group", "cp.async.wait_group", "n0"),
    (rf"cp\.async\.bulk\.tensor\.\dd{_BULK_LOAD}", "bulk.load", "m1 a0 a2 c1"),
    (rf"cp\.async\.bulk\.tensor\.\dd\.global{_SHARED}\.bulk_group", "bulk.store", "m0 a1 c0"),
    (rf"tcgen05\.alloc\.cta_group::1\.sync\.aligned{_SHARED}\.b32", "tcgen05.alloc", "a0 n1"),
    (r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32", "tcgen05.dealloc", "s0 n1"),
    (r"(tcgen05\.relinquish_alloc_permit)\.cta_group::1\.sync\.aligned", "{1}", ""),
    (r"tcgen05\.ld\.sync\.aligned\.(\d+x\d+bx?2?)\.x\d+\.b32", "tcgen05.ld", "#1 a1 n2? D0"),
    (r"tcgen05\.st\.sync\.aligned\.(\d+x\d+bx2)\.x\d+\.b32", "tcgen05.st", "#1 a0 n1 S2"),
    (r"tcgen05\.st\.sync\.aligned\.(\d+x\d+b)\.x\d+\.b32", "tcgen05.st", "#1 a0 - S1"),
    (r"(tcgen05\.wait::(?:ld|st))\.sync\.aligned", "{1}", ""),
    (r"tcgen05\.fence::.*", "nop", ""),
    (r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32|i8)", "tcgen05.mma", "#1 a0 t1 s2:64 s3 s4"),
    (rf"tcgen05\.commit\.cta_group::1{_COMMIT}", "tcgen05.commit", "a0"),
    (r"cp\.async\.bulk\.commit_group", "bulk.commit_group", ""),
    (r"cp\.async\.bulk\.wait_group(?:\.read)?", "bulk.wait_group", "n0"),
    (rf"mbarrier\.init{_SHARED}\.b64", "mbarrier.init", "s1 a0"),
    (rf"mbarrier\.inval{_SHARED}\.b64", "mbarrier.inval", "a0"),
    (rf"mbarrier\.arrive\.expect_tx{_SHARED}\.b64", "mbarrier.arrive", "s2 a1"),
    (rf"mbarrier\.arrive{_SHARED}\.b64", "mbarrier.arrive", "- a1"),
    (rf"mbarrier\.(?:try|test)_wait\.parity{_SHARED}\.b64", "mbarrier.wait", "d0 s2 a1"),
]  # fmt: skip
_WGMMA = (
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)"
    r"(?:\.satfinite)?\.(?:f32|s32)\.(f16|bf16|tf32|s8)\.\3"
)

# Arithmetic: operands whose bits differ from the type's.  The emulator's names use an unsigned type
# if the sign doesn't matter, and an integer type if only bits are moved.
_OTHER_BITS = {"shl": {2: 32}, "shr": {2: 32}, "bfe": {2: 32, 3: 32}, "selp": {3: 32}}
_SIGNLESS = {"add", "sub", "mul.lo", "mad.lo", "neg"}
_MOVES = {"mov", "selp"}


@dataclass
class Parameter:
    name: str
    size: int
    offset: int


@dataclass
class Program:
    name: str
    parameters: list[Parameter]
    threads: int = 0
    text: list[str] = field(default_factory=list)  # one entry for each instruction, here and below
    operations: list[str] = field(default_factory=list)
    guards: list[tuple[int, int]] = field(
        default_factory=list
    )  # slot or -1, and whether it is negated
    operands: list[list[int]] = field(default_factory=list)
    registers: list[list[int]] = field(default_factory=list)  # slots, without sums of a wgmma
    slots: int = 0
    constants: dict[tuple[int, bool], int] = field(default_factory=dict)  # (value, wide) → slot
    specials: dict[int, int] = field(default_factory=dict)  # slot → special register
    unknown: dict[str, str] = field(default_factory=dict)  # opcode → a line of it
    granule: int = 16  # bytes of the narrowest access to shared memory

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


class UnknownError(Exception):
    """An instruction or operand."""


def parse(source: str) -> Program:
    source = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", source, re.DOTALL)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    program = Program(head[1], list(_parameters(head[2])), int(threads[1]) if threads else 0)
    decoder = _Decoder(program)
    decoder.declare_shared(source[: head.start()])
    decoder.decode(source[head.end() : source.rindex("}")])
    return program


def _parameters(text: str) -> Iterator[Parameter]:
    rest = r"(?:\s+\.\w+(?:\s+\d+)?)*\s+([\w$]+)(?:\[(\d+)\])?"
    end = 0
    for align, kind, name, count in re.findall(
        rf"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+){rest}", text
    ):
        size = BITS[kind] // 8 * int(count or 1)
        start = -(-end // int(align or size)) * int(align or size)
        end = start + size
        yield Parameter(name, size, start)


def _split(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:[\[{][^\]]*?[\]}]+|[^,\[{])+", text)]


def _in_braces(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


class _Decoder:
    """Reads statements into a program.  Scopes in braces have their own registers and labels."""

    def __init__(self, program: Program):
        self.program = program
        self.symbols = {p.name: p.offset for p in program.parameters}
        self.registers: ChainMap[str, tuple[int, int]] = ChainMap()  # name → slot, bits
        self.labels: ChainMap[str, int] = ChainMap()
        self.jumps: list[tuple[int, ChainMap[str, int], str]] = []
        self.sinks = {bits: self.new_slot(bits) for bits in (32, 64)}
        self.touched: list[int] = []

    def decode(self, body: str) -> None:
        text = r"([^;{}]+(?:\{[^}]*\}[^;{}]*)*);"
        end = 0
        for found in re.finditer(
            rf"\s*(?:\.loc[^\n]*|\.pragma[^;]*;|([$\w]+):|([{{}}])|{text})", body
        ):
            if body[end : found.start()].strip():
                break
            end = found.end()
            label, brace, statement = found.groups()
            if label:
                self.labels[label] = len(self.program.text)
            elif brace == "{":
                self.registers, self.labels = self.registers.new_child(), self.labels.new_child()
            elif brace == "}":
                self.registers, self.labels = self.registers.parents, self.labels.parents
            elif statement and statement.strip().startswith(".reg"):
                self.declare_registers(statement.strip())
            elif statement and not self.declare_shared(statement):
                self.instruction(statement.strip())
        if body[end:].strip():
            raise ValueError(f"unknown PTX: {body[end:].strip()[:200]!r}")
        for pc, labels, label in self.jumps:
            self.program.operands[pc][0] = labels[label]

    # Names

    def new_slot(self, bits: int) -> int:
        self.program.slots += 2 if bits == 64 else 1
        return self.program.slots - (2 if bits == 64 else 1)

    def declare_registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for name in names.split(","):
            stem, count = re.match(r"\s*([\w$%]+)(?:<(\d+)>)?", name).groups()
            for each in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                self.registers[each] = self.new_slot(BITS[kind]), BITS[kind]

    def declare_shared(self, text: str) -> bool:
        """Declare shared memory, which Triton does with one array without a size."""
        found = re.findall(r"\.shared\s[^;]*?([\w$]+)\[\]", text)
        self.symbols |= dict.fromkeys(found, SHARED_START)
        return bool(found)

    def constant(self, value: int, wide: bool = False) -> int:
        key = value & (2**64 - 1 if wide else 2**32 - 1), wide
        if key not in self.program.constants:
            self.program.constants[key] = self.new_slot(64 if wide else 32)
        return self.program.constants[key]

    def register(self, name: str, bits: int = 0) -> int:
        """The slot of a register, or -1 for an unknown name."""
        if name in SPECIAL and name not in self.registers:
            slot = self.registers.maps[-1].setdefault(name, (self.new_slot(32), 32))[0]
            self.program.specials[slot] = SPECIAL[name]
        if name not in self.registers:
            return -1
        slot, own = self.registers[name]
        if bits and (own == 64) != (bits == 64):
            raise UnknownError(f"{name} has {own} bits, not {bits}")
        self.touched.append(slot)
        return slot

    def source(self, text: str, bits: int = 32) -> int:
        slot = self.register(text, bits)
        if slot >= 0:
            return slot
        value = self.number(text)
        return self.constant(value & 0xFFFF if bits == 16 and value >= 0 else value, bits == 64)

    def destination(self, text: str, bits: int = 32) -> int:
        slot = self.sinks[64 if bits == 64 else 32] if text == "_" else self.register(text, bits)
        if slot < 0:
            raise UnknownError(f"destination {text}")
        return slot

    def number(self, text: str) -> int:
        """A literal, or the address of a symbol."""
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return int(text[2:], 16)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if text in self.symbols:
            return self.symbols[text]
        raise UnknownError(f"operand {text}")

    def address(self, text: str) -> list[int]:
        """[slot, bits of it, offset] of "[%r1+16]"."""
        found = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise UnknownError(f"address {text}")
        name, offset = found[1], int(found[2] or "0", 0)
        if name in self.registers:
            return [self.register(name), self.registers[name][1], offset]
        return [self.constant(self.number(name), True), 64, offset]

    def operand_a(self, text: str) -> list[int]:
        """A of a tcgen05.mma: a flag for tensor memory, and its address there or its descriptor."""
        return [1, *self.address(text)] if text[0] == "[" else [0, self.source(text, 64), 64, 0]

    # Instructions

    def instruction(self, text: str) -> None:
        pattern = r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)"
        negated, guard, opcode, rest = re.fullmatch(pattern, text, re.DOTALL).groups()
        program, self.touched = self.program, []
        try:
            name, operands = self.operation(opcode, _split(rest))
        except UnknownError as error:
            program.unknown.setdefault(opcode, f"{text} ({error})")
            name, operands = "nop", []
        program.text.append(" ".join(text.split()))
        program.operations.append(name)
        program.operands.append(operands)
        program.registers.append(self.touched)
        program.guards.append((self.registers[guard][0] if guard else -1, int(bool(negated))))

    def operation(self, opcode: str, operands: list[str]) -> tuple[str, list[int]]:
        for pattern, name, words in TABLE:
            found = re.fullmatch(pattern, opcode)
            if found:
                groups = [re.sub(r"^b(?=\d)", "u", group or "") for group in found.groups()]
                numbers = [n for word in words.split() for n in self.word(word, operands, found)]
                if name == "cp.async":
                    self.program.granule = min(self.program.granule, numbers[0])
                return name.format(opcode, *groups), numbers
        found = re.fullmatch(_WGMMA, opcode)
        if found:
            return "wgmma.mma_async", self.wgmma(found, operands)
        kind, *modifiers = opcode.split(".")
        if kind in ("ld", "st"):
            return kind, self.access(modifiers, operands, kind == "st")
        if kind == "mov" and "{" in operands[0] + operands[1]:
            return self.move_parts(BITS[modifiers[-1]], *operands)
        return self.arithmetic(kind, modifiers, operands)

    def word(self, word: str, operands: list[str], found: re.Match) -> list[int]:
        """The numbers for a word of the table."""
        kind, place, optional, bits = re.fullmatch(r"(.)(\d?)(\??)(?::(\d+))?", word).groups()
        index = int(place or "0")
        missing = found[index] is None if kind == "#" else index >= len(operands)
        if kind == "-" or (missing and optional):
            return [-1]
        if kind == "#":
            group = found[index] or ""
            if not group.isdigit() and group not in NUMBERS:
                raise UnknownError(f".{group}")
            return [int(group) if group.isdigit() else NUMBERS[group]]
        text = operands[index]
        size = int(bits or "32")
        if bits and size < 10:
            size = BITS[found[size]]
        first, _, second = text.replace(" ", "").partition("|")
        inside, _, coordinates = text.strip("[]").partition(",")
        return {
            "d": lambda: [self.destination(text, size)],
            "s": lambda: [self.source(text, size)],
            "p": lambda: [self.destination(first), self.destination(second)],
            "D": lambda: [self.destination(each) for each in _in_braces(text)],
            "S": lambda: [self.source(each) for each in _in_braces(text)],
            "R": lambda: [self.register(text), self.registers[text][1]],
            "a": lambda: self.address(text),
            "m": lambda: [self.source(inside.strip(), 64)],
            "c": lambda: [self.source(each) for each in _in_braces(coordinates.strip())],
            "t": lambda: self.operand_a(text),
            "n": lambda: [self.number(text)],
            "l": lambda: self.jump(text),
        }[kind]()

    def jump(self, label: str) -> list[int]:
        """A jump, whose target is known only at the end."""
        self.jumps.append((len(self.program.text), self.labels, label))
        return [-1]

    def access(self, modifiers: list[str], operands: list[str], stores: bool) -> list[int]:
        """The numbers of ld and st; memory.h describes them."""
        address, data = operands if stores else reversed(operands)
        space = SPACES.get(modifiers[0])
        if space is None or modifiers[-1] not in BITS:
            raise UnknownError("space or type")
        size = BITS[modifiers[-1]] // 8
        if space == 2:
            self.program.granule = min(self.program.granule, size)
        parts = _in_braces(data)
        known = [self.registers[part][1] for part in parts if part in self.registers]
        bits = known[0] if known else 8 * size
        if stores:
            slots = [self.source(part, bits) for part in parts]
        else:
            slots = [-1 if part == "_" else self.destination(part, bits) for part in parts]
        is_signed = int(modifiers[-1][0] == "s")
        return [space, size, is_signed, bits, *self.address(address), *slots]

    def move_parts(self, bits: int, to: str, of: str) -> tuple[str, list[int]]:
        whole, parts = (to, _in_braces(of)) if "{" in of else (of, _in_braces(to))
        each = bits // len(parts)
        if whole is to:
            slots = [self.source(part, each) for part in parts]
            return "pack", [self.destination(whole, bits), bits, *slots]
        slots = [-1 if part == "_" else self.destination(part, each) for part in parts]
        return "unpack", [self.source(whole, bits), bits, *slots]

    def wgmma(self, found: re.Match, operands: list[str]) -> list[int]:
        """The numbers of wgmma; products.h describes them."""
        sums, a, b, adds, *rest = operands
        in_registers = "{" in a
        rest = rest or ["1", "1"]  # of integers: no signs, and only one order in memory
        sign_a, sign_b, *major = [self.number(each) for each in rest]
        if (sign_a, sign_b) != (1, 1):
            raise UnknownError("a negative operand")
        major = [*[0] * in_registers, *major, 0, 0][:2]
        slots = [self.source(each, 32 if in_registers else 64) for each in _in_braces(a)]
        sizes = NUMBERS[found[3]], int(found[1]), int(found[2])
        numbers = [*sizes, *major, int(in_registers), self.source(adds), *(slots + [0] * 3)[:4]]
        numbers += [self.source(b, 64)]
        touched = list(self.touched)
        numbers += [self.destination(each) for each in _in_braces(sums)]
        self.touched = touched
        return numbers

    def arithmetic(self, kind: str, modifiers: list[str], operands: list[str]):
        """An instruction whose operands have its last type, with few exceptions."""
        *modifiers, type_name = modifiers or [""]
        if type_name not in BITS:
            raise UnknownError("instruction")
        bits = BITS[type_name]
        kept = [each for each in modifiers if each not in ("rn", "approx", "full")]
        stem = ".".join([kind, *kept])
        widths = {n: bits for n in range(len(operands))} | _OTHER_BITS.get(kind, {})
        if "wide" in kept:
            widths |= {0: 2 * bits, 3: 2 * bits}
        if kept[-1:] == ["f32"]:  # halves added to a float32, with a float32 result
            widths |= {0: 32, len(operands) - 1: 32}
        if type_name == "pred":
            operands = ["1" if each == "-1" else each for each in operands]
            if kind in ("and", "or", "xor"):
                type_name = "u32"
        elif re.fullmatch(r"b\d+", type_name) or kind in _MOVES:
            type_name = f"u{bits}"
        elif stem in _SIGNLESS:
            type_name = type_name.replace("s", "u")
        slots = [self.destination(operands[0], widths[0])]
        slots += [self.source(each, widths[n]) for n, each in enumerate(operands[1:], 1)]
        return f"{stem}.{type_name}", slots
