import pytest

from emokernels.audit import sass


def listing(*lines, name="kernel"):
    """A `cuobjdump -sass` listing; every instruction has an address 16 after the one before."""
    code = "".join(
        f"        /*{16 * n:04x}*/ {line:>40} ;  /* 0x000fe20000000f00 */\n{'':50}/* 0x000fe40000000f00 */\n"
        for n, line in enumerate(lines)
    )
    return f'\n\tcode for sm_90a\n\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM90"\n{code}\t\t..........\n'


def code(*lines):
    return sass.parse(listing(*lines))["kernel"]


def test_parse_reads_opcodes_guards_and_targets():
    text = "\tcode for sm_100a\n\t\tFunction : other\n        /*0000*/                   EXIT ;  /* 0x00 */\n"
    functions = sass.parse(
        listing("MOV R1, c[0x0][0x28]", "@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]", "@P1 BRA 0x0", "BRA 0x30", "NOP")
        + text
    )
    assert [one.opcode for one in functions["kernel"]] == ["MOV", "LDG.E.128", "BRA"], "padding is no code"
    assert [one.guarded for one in functions["kernel"]] == [False, True, True]
    assert [one.target for one in functions["kernel"]] == [None, None, 0]
    assert [one.opcode for one in functions["other"]] == ["EXIT"]


@pytest.mark.parametrize(
    ("line", "falls_through", "target"),
    [
        ("BRA 0x40", False, 0x40),
        ("@P0 BRA 0x40", True, 0x40),
        ("BRA P1, 0x40", True, 0x40),
        ("BRA.U UP0, 0x40", True, 0x40),
        ("@!UP1 BRA `(.L_x_3)", True, None),
        ("BRA.DIV UR4, 0x40", True, None),
        ("EXIT", False, None),
        ("@P0 EXIT", True, None),
        ("FADD R1, R2, R3", True, None),
    ],
)
def test_where_an_instruction_leads(line, falls_through, target):
    (one,) = code(line)
    assert (one.falls_through, one.target) == (falls_through, target)


def test_counts_wide_loads_and_matrix_instructions():
    found = code(
        "LDG.E R1, [R2.64]", "LDG.E.128 R4, [R2.64]", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "UTMALDG.2D [UR8]",
        "STG.E.64 [R2.64], R4", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]", "FADD2 R2, R2.F32x2, R4",
    )  # fmt: skip
    assert sass.wide(found) == (3, 4)
    assert sass.wide(found, sass.STORES) == (1, 2)
    assert sass.matrix(found) == {"HGMMA": 1}
    assert sass.work(found)["arithmetic"] == 2, "FADD2 adds twice"


LOOPS = (
    "MOV R1, R2",  # 00
    "IADD3 R0, R0, 0x1, RZ",  # 10  outer loop
    "FADD R1, R1, R2",  # 20  inner loop
    "@!P2 BRA 0x80",  # 30  to waiting code behind the end
    "HMMA.16816.F32 R4, R8, R12, R4",  # 40
    "@P0 BRA 0x20",  # 50
    "@P1 BRA 0x10",  # 60
    "EXIT",  # 70
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3], R4",  # 80
    "@!P2 BRA 0x80",  # 90
    "BRA 0x40",  # a0
)


def test_loops_are_natural_loops():
    found = {loop.head: loop for loop in sass.loops(code(*LOOPS))}
    assert sorted(found) == [0x10, 0x20, 0x80], "the jump back from the end closes no loop"
    assert [one.address for one in found[0x20].instructions] == [0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xA0]
    assert found[0x10].size == 9
    assert found[0x80].size == 2


def test_main_loop_is_the_innermost_with_products():
    main = sass.main_loop(code(*LOOPS))
    assert main is not None
    assert main.head == 0x20


def test_main_loop_of_two_with_the_same_products_is_the_leaner():
    mask = ("FSEL R1, R1, R2, P0", "FADD R1, R1, R2", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x0")
    lean = ("FADD R1, R1, R2", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x40")
    more = ("HMMA.16816.F32 R4, R8, R12, R4", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x70", "EXIT")
    assert sass.main_loop(code(*mask, *lean, "EXIT")).head == 0x40
    assert sass.main_loop(code(*mask, *lean, *more)).head == 0x70, "a pass with more products is a full pass"


def test_no_loop():
    assert sass.main_loop(code("FADD R1, R1, R2", "EXIT")) is None
    assert sass.loops([]) == []
