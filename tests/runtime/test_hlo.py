from shortcut_jax.runtime.hlo import collectives, count_kinds

TEXT = """
  %ag = bf16[32,8]{1,0} all-gather(%p), dimensions={0}
  %ar = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(%p2), dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %add.1 = f32[4]{0} add(%ar, %all-reduce.2)
"""


def test_collectives_are_read_with_dtypes_and_shapes_and_pairs_count_once():
    found = collectives(TEXT)
    assert [c.kind for c in found] == ["all-gather", "all-reduce", "all-gather"]
    assert found[0].arrays == (("bf16", (32, 8)),)
    assert found[1].arrays == (("f32", (4,)), ("f32", (2, 3)))
    assert count_kinds(TEXT) == {"all-gather": 2, "all-reduce": 1}
