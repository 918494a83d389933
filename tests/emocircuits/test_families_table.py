"""docs/families.md says what happens."""

import families_table


def test_the_table_of_families_and_edits_is_up_to_date():
    assert families_table.page() == families_table.PAGE.read_text(), (
        "docs/families.md differs from what the edits do; run python tests/emocircuits/families_table.py"
    )
