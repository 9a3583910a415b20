"""Claim: of a listing of machine code it is told which uniform registers are read though nothing wrote them, on any way
through loops and branches, and of those alone that were not."""

import pytest

pytest.importorskip("triton")
from macaron_ops.kernels.machine_code import unwritten

LOST = "UIADD3 UR22, UP0, UR22, 0x20, URZ"


def listing(*lines):
    return "Function:kernel\n" + "\n".join(line if line.endswith(":") else f"--:-:-:-:1\t{line};" for line in lines)


def test_a_chain_that_nothing_begins():
    code = ("UMOV UR18, 0x1", LOST, "HGMMA.64x16x16.F32.BF16 R88, R100, gdesc[UR20].tnspB, R88", "EXIT")
    assert unwritten(listing(*code)) == [LOST, code[2]]  # its high half was never written either
    begun = ("ULDC.64 UR22, c[0x0][0x208]", *code)
    assert unwritten(listing(*begun)) == []


def test_descriptors_of_both_operands():
    """Four registers where the first one is in shared memory too; of memory's, two."""
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    begun = ("ULDC.64 UR8, c[0x0][0x208]", "ULDC.64 UR10, c[0x0][0x210]")
    assert unwritten(listing(*begun, product, "EXIT")) == []
    for one in begun:
        assert unwritten(listing(one, product, "EXIT")) == [product]
    load = "LDG.E.128 R12, desc[UR6][R52.64]"
    assert unwritten(listing("UMOV UR6, 0x1", load, "EXIT")) == [load]


def test_each_way_is_followed():
    """One that writes is enough: the compiler knows when it is taken. What a loop writes is there in its next turn."""
    one = ("@P0 BRA LBB0", "UMOV UR4, 0x1", "LBB0:", "IADD3 R0, R0, UR4, RZ", "EXIT")
    assert unwritten(listing(*one)) == []
    loop = ("LBB1:", "IADD3 R0, R0, UR4, RZ", "R2UR UR4, R1", "@!P1 BRA LBB1", "EXIT")
    assert unwritten(listing(*loop)) == []
    over = ("BRA LBB2", "UMOV UR4, 0x1", "LBB2:", "IADD3 R0, R0, UR4, RZ", "EXIT")
    assert unwritten(listing(*over)) == ["IADD3 R0, R0, UR4, RZ"]
    asked = ("BRA UP0, LBB3", "UMOV UR4, 0x1", "LBB3:", "IADD3 R0, R0, UR4, RZ", "EXIT")
    assert unwritten(listing(*asked)) == []
    behind = ("@!P2 EXIT", "UMOV UR7, URZ", "EXIT", "MOV R0, UR9")
    assert unwritten(listing(*behind)) == []  # never reached
    assert unwritten("") == []
