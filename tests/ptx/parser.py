"""PTX text -> Module: kernels, their parameters and variables, and a flat list of instructions.

The subset is what NVRTC emits for kernels without function calls. Syntax: PTX ISA 8.8, chapters 4 to 6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from .dtypes import SIZES, PtxError


@dataclass(frozen=True)
class Register:
    """A declared register, or a special one such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bit pattern of a float (0f3F800000, 0d...)."""

    value: int
    is_bits: bool = False


@dataclass(frozen=True)
class Symbol:
    """A variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: tuple[Register | Immediate, ...]


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode.modifiers operands;` A `second` result is the q of `p|q`."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[object, ...]
    guard: str | None
    guard_negated: bool
    line: int
    text: str

    @property
    def types(self) -> tuple[str, ...]:
        """The operand types among the modifiers, in order."""
        return tuple(m for m in self.modifiers if m in SIZES)


@dataclass(frozen=True)
class Variable:
    """A parameter, or a .shared, .local, .const or .global variable. `offset` is where it lies in its state space."""

    name: str
    space: str
    size: int
    align: int
    offset: int
    initial: bytes = b""


@dataclass
class Kernel:
    """An .entry: what a launch needs, and its instructions with labels resolved to indices into them."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: int = 1024

    def space_size(self, space: str) -> int:
        """Bytes of the variables declared in this state space."""
        return max((v.offset + v.size for v in self.variables.values() if v.space == space), default=0)


@dataclass
class Module:
    """A parsed .ptx file."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PREAMBLE = re.compile(r"\s*(?:\.version\s+\S+|\.target\s+[^\n]+|\.address_size\s+\d+)\s*")
_TOKEN = re.compile(r"[{}();]|[^{}();]+")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(?P<space>param|shared|local|const|global)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.(?P<vector>v[24])\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<initial>.+))?$",
    re.DOTALL,
)
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.+)$", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*(?P<base>[\w$%.]+)\s*(?:\+\s*(?P<offset>-?\d+))?\s*\]$")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(text: str) -> Module:
    """The module of a .ptx file. Raises PtxError with the line where it is not understood."""
    return _Parser(text).module


class _Parser:
    def __init__(self, text: str) -> None:
        self.module = Module()
        text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), text)
        self.kernel: Kernel | None = None
        header = ""
        depth = 0
        scopes: list[dict[str, str]] = []  # inline assembly may declare registers in a block of its own
        self.scope_count = 0
        for piece, line in _statements(text):
            if piece == "{":
                if depth == 0:
                    self.kernel = self._entry(header, line)
                    header = ""
                else:
                    scopes.append({})
                depth += 1
            elif piece == "}":
                depth -= 1
                if depth == 0:
                    self._finish()
                else:
                    scopes.pop()
            elif depth == 0:
                header = self._outside(piece, line)
            else:
                self._inside(piece, line, scopes)

    def _outside(self, piece: str, line: int) -> str:
        """Handles what stands outside kernels; returns the text that belongs to the next block."""
        piece = _PREAMBLE.sub("", piece).strip()
        match = _VARIABLE.match(piece)
        if match and ".entry" not in piece:
            variable = _variable(match, self.module.variables, line)
            self.module.variables[variable.name] = variable
            return ""
        return piece

    def _entry(self, header: str, line: int) -> Kernel:
        match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)$", header, re.DOTALL)
        if match is None:
            raise PtxError(f"line {line}: only kernels (.entry) are understood, not {header.strip()[:60]!r}")
        kernel = Kernel(match.group(1))
        offset = 0
        for declaration in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
            found = _VARIABLE.match(declaration)
            if found is None:
                raise PtxError(f"line {line}: parameter {declaration!r}")
            parameter = _variable(found, {}, line)
            offset = -(-offset // parameter.align) * parameter.align
            parameter = Variable(parameter.name, "param", parameter.size, parameter.align, offset)
            offset += parameter.size
            kernel.parameters.append(parameter)
            kernel.variables[parameter.name] = parameter
        threads = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", match.group(3))
        if threads:
            kernel.max_threads = 1
            for part in threads.group(1).split(","):
                kernel.max_threads *= int(part)
        return kernel

    def _inside(self, piece: str, line: int, scopes: list[dict[str, str]]) -> None:
        while label := re.match(r"\s*([$\w]+)\s*:(?!:)", piece):
            self.kernel.labels[label.group(1)] = len(self.kernel.instructions)
            line += piece[: label.end()].count("\n")
            piece = piece[label.end() :]
        stripped = piece.strip()
        line += len(piece[: len(piece) - len(piece.lstrip())].splitlines()) - 1 if stripped else 0
        if not stripped or stripped.startswith((".loc ", ".pragma ", ".file ")):
            return
        if registers := _REGISTERS.match(stripped):
            self._declare(registers.group("type"), registers.group("names"), scopes)
        elif variable := _VARIABLE.match(stripped):
            found = _variable(variable, self.kernel.variables, line)
            self.kernel.variables[found.name] = found
        elif stripped.startswith("."):
            raise PtxError(f"line {line}: directive {stripped[:40]!r} is not understood")
        else:
            self.kernel.instructions.append(self._instruction(stripped, line, scopes))

    def _declare(self, dtype: str, names: str, scopes: list[dict[str, str]]) -> None:
        for name in (part.strip() for part in names.split(",")):
            many = re.match(r"(.+)<(\d+)>$", name)
            for declared in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                unique = declared
                if scopes:
                    self.scope_count += 1
                    unique = scopes[-1][declared] = f"{declared}@{self.scope_count}"
                self.kernel.registers[unique] = dtype

    def _instruction(self, text: str, line: int, scopes: list[dict[str, str]]) -> Instruction:
        match = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)$", text, re.DOTALL)
        if match is None:
            raise PtxError(f"line {line}: {text!r} is not an instruction")
        negated, guard, name, rest = match.groups()
        opcode, *modifiers = name.replace("::", "_").split(".")
        operands = []
        for part in _split(rest):
            pieces = part.split("|")  # d|p of shfl, p|q of setp
            operands += [self._operand(piece.strip(), line, scopes) for piece in pieces]
        guard = self._resolve(guard, scopes) if guard else None
        return Instruction(
            opcode, tuple(modifiers), tuple(operands), guard, negated == "!", line, " ".join(text.split())
        )

    def _resolve(self, name: str, scopes: list[dict[str, str]]) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str, line: int, scopes: list[dict[str, str]]) -> object:
        if text.startswith("{"):
            return Vector(tuple(self._operand(item, line, scopes) for item in _split(text[1:-1])))
        if address := _ADDRESS.match(text):
            return Address(self._operand(address.group("base"), line, scopes), int(address.group("offset") or 0))
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), is_bits=True)
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if text.startswith("!"):
            raise PtxError(f"line {line}: negated operand {text!r} is not understood")
        name = self._resolve(text, scopes)
        if name in self.kernel.registers or name.startswith("%") or name in ("WARP_SZ", "_"):
            return Register(name)
        if re.match(r"[$\w]+$", name):
            return Symbol(name)
        raise PtxError(f"line {line}: operand {text!r} is not understood")

    def _finish(self) -> None:
        assert self.kernel is not None
        for variable in self.module.variables.values():  # shared memory of the module: after the kernel's own
            if variable.space == "shared":
                offset = -(-self.kernel.space_size("shared") // 16) * 16
                self.kernel.variables[variable.name] = replace(variable, offset=offset)
        self.module.kernels[self.kernel.name] = self.kernel
        self.kernel = None


def _statements(text: str) -> list[tuple[str, int]]:
    """(text, line) of statements and of the braces of blocks. Braces of a vector operand stay inside its statement."""
    found: list[tuple[str, int]] = []
    line, current, current_line, in_vector = 1, "", 1, False
    for token in _TOKEN.findall(text):
        if not current.strip():
            current_line = line
        block = not current.strip() or current.rstrip().endswith(":") or ".entry" in current or ".func" in current
        if token == ";":
            found.append((current, current_line))
            current = ""
        elif (token == "{" and block) or (token == "}" and not in_vector):
            if current.strip():
                found.append((current, current_line))
            found.append((token, line))
            current = ""
        else:
            in_vector = token == "{" or (in_vector and token != "}")
            current += token
        line += token.count("\n")
    return found


def _split(text: str) -> list[str]:
    """Splits at commas that are not inside {} or []."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _variable(match: re.Match[str], others: dict[str, Variable], line: int) -> Variable:
    space, dtype = match.group("space"), match.group("type")
    if dtype not in SIZES:
        raise PtxError(f"line {line}: type .{dtype} of {match.group('name')} is not understood")
    element = SIZES[dtype] * int((match.group("vector") or "v1")[1:])
    count = match.group("count")
    size = element * (int(count) if count else 0 if count == "" else 1)
    align = int(match.group("align") or element)
    offset = max((v.offset + v.size for v in others.values() if v.space == space), default=0)
    offset = -(-offset // align) * align
    initial = _initial(match.group("initial"), SIZES[dtype]).ljust(size, b"\0") if match.group("initial") else b""
    return Variable(match.group("name"), space, size, align, offset, initial)


def _initial(text: str, size: int) -> bytes:
    values = [part.strip() for part in text.strip().strip("{}").split(",")]
    numbers = [int(v[2:], 16) if re.match(r"0[fFdD]", v) else int(v, 0) for v in values]
    return b"".join((n % (1 << 8 * size)).to_bytes(size, "little") for n in numbers)
