"""NVIDIA's machine code read for what its compiler gets wrong.

ptxas 12.8, which Triton 3.6 and 3.7 bring along, now and then loses the instruction that begins a chain of matrix
descriptors: two products read shared memory from the same place on, and the second chain counts on from a uniform
register that nothing wrote. The kernel then reads what happens to be there, or ends with an illegal access.
"""

import re
from typing import NamedTuple

__all__ = ["unwritten"]

_REGISTER = re.compile(r"\bUR(\d+)\b")
_PREDICATE = re.compile(r"@!?U?P\w+\s+")
_INTO_UNIFORM = re.compile(r"U[A-Z]|R2UR|S2UR|CS2UR|VOTEU|REDUX")
_LABEL = re.compile(r"(\.?L\w+)$")
_WIDTHS = {".64": 2, ".128": 4, ".WIDE": 2}


class _Instruction(NamedTuple):
    name: str
    writes: frozenset[int]
    reads: frozenset[int]
    perhaps: bool  # depends on a predicate
    target: str | None


def unwritten(sass: str) -> list[str]:
    """The instructions that read a uniform register which no instruction on any way there has written.

    A lost instruction is often not seen, since most registers were written before, for something else: of 959 that
    write one in eight kernels for sm_90, each taken out in turn, the loss of 167 is seen.

    ``sass`` is a listing as Triton prints it (``compiled.asm["sass"]``): a tab before each instruction, ``LBB1:`` for
    what is jumped to.
    """
    texts, labels = _listing(sass)
    code = [_instruction(text) for text in texts]
    written: list[frozenset[int] | None] = [None] * len(code)
    work = [0] if code else []
    written[:1] = [frozenset()] * bool(code)
    while work:
        i = work.pop()
        after = written[i] | code[i].writes
        for following in _following(i, code, labels):
            seen = after if written[following] is None else written[following] | after
            if seen != written[following]:
                written[following] = seen
                work.append(following)
    reached = (i for i, before in enumerate(written) if before is not None)
    return [texts[i] for i in reached if code[i].reads - written[i]]


def _listing(sass: str) -> tuple[list[str], dict[str, int]]:
    texts, labels = [], {}
    for line in map(str.strip, sass.splitlines()):
        if line.endswith(":") and _LABEL.fullmatch(line[:-1]):
            labels[line[:-1]] = len(texts)
        elif "\t" in line:
            texts.append(line.split("\t", 1)[1].rstrip(";").strip())
    return texts, labels


def _instruction(text: str) -> _Instruction:
    predicate = _PREDICATE.match(text)
    name, _, rest = (text[predicate.end() :] if predicate else text).partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    first = _REGISTER.fullmatch(operands[0]) if _INTO_UNIFORM.match(name) else None
    width = next((n for suffix, n in _WIDTHS.items() if suffix in name), 1)
    writes = range(int(first[1]), int(first[1]) + width) if first else ()
    reads: set[int] = set()
    for i, operand in enumerate(operands[1:] if first else operands):
        reads |= {int(number) + ahead for number in _REGISTER.findall(operand) for ahead in _words(operand, i)}
    label = _LABEL.search(text)
    perhaps = bool(predicate) or (name.startswith("BRA") and len(operands) > 1)
    return _Instruction(name, frozenset(writes), frozenset(reads), perhaps, label and label[1])


def _words(operand: str, place: int) -> tuple[int, ...]:
    """Which registers from the named one on are read. A product names four for the descriptors of both operands; the
    first one's are not read where it comes from registers, which then stand before."""
    if "gdesc" in operand:
        return (0, 1, 2, 3) if place == 1 else (2, 3)
    return (0, 1) if "desc" in operand else (0,)


def _following(i: int, code: list[_Instruction], labels: dict[str, int]) -> list[int]:
    instruction, following = code[i], []
    ends = instruction.name.startswith(("BRA", "BRX", "JMP", "EXIT", "RET"))
    if instruction.name.startswith(("BRA", "JMP", "CALL", "BSSY")) and instruction.target in labels:
        following.append(labels[instruction.target])
    if not ends or instruction.perhaps:
        following.append(i + 1)
    return [j for j in following if j < len(code)]
