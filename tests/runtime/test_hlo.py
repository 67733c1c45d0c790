from shortcut_jax.runtime.hlo import collectives, count_kinds

TEXT = """
  %ag = bf16[32,8]{1,0} all-gather(%p), dimensions={0}
  %ar = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(%p2), dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %add.1 = f32[4]{0} add(%ar, %all-reduce.2)
"""


SIX = (
    "  %ar.2 = (f32[1]{0}, f32[2]{0}, f32[3]{0}, bf16[4,4]{1,0:T(8,128)}, f32[5]{0}, /*index=5*/f32[6]{0}) "
    "all-reduce(%a, %b, %c, %d, %e, /*index=5*/%f), to_apply=%add"
)


def test_a_tuple_of_more_than_five_arrays_is_read_whole():
    (found,) = collectives(SIX)
    assert found.kind == "all-reduce"
    assert found.arrays == tuple(("bf16", (4, 4)) if n == 4 else ("f32", (n,)) for n in range(1, 7))


def test_collectives_are_read_with_dtypes_and_shapes_and_pairs_count_once():
    found = collectives(TEXT)
    assert [c.kind for c in found] == ["all-gather", "all-reduce", "all-gather"]
    assert found[0].arrays == (("bf16", (32, 8)),)
    assert found[1].arrays == (("f32", (4,)), ("f32", (2, 3)))
    assert count_kinds(TEXT) == {"all-gather": 2, "all-reduce": 1}
