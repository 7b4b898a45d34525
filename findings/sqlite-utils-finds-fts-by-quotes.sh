#!/usr/bin/env bash
# sqlite-utils finds the full-text table of a table by the text of its definition: content="t" and content=[t] count, while
# content='t' and content=t, which SQLite takes as the same and searches as well, are not seen. So `sqlite-utils search`
# refuses a database that has a working full-text index, and nothing about the index itself is wrong.
# Source: Table.detect_fts and Table.search of sqlite_utils.db.
# sqlite-utils 4.2.1, Python 3.11; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sqlite-utils==4.2.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sqlite3

found = {}
for spelling in ('"notes"', "[notes]", "'notes'", "notes"):
    name = f"{len(found)}.db"
    db = sqlite3.connect(name)
    db.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
    db.execute(f"CREATE VIRTUAL TABLE notes_fts USING fts5 (text, content={spelling}, content_rowid='id')")
    db.execute("INSERT INTO notes VALUES (1, 'a quiet harbour')")
    db.execute("INSERT INTO notes_fts (notes_fts) VALUES ('rebuild')")
    assert db.execute("SELECT rowid FROM notes_fts WHERE notes_fts MATCH 'harbour'").fetchall() == [(1,)]
    db.commit()
    db.close()

    import sqlite_utils

    opened = sqlite_utils.Database(name)
    found[spelling] = opened["notes"].detect_fts()
    print(f"content={spelling}: SQLite finds the row, detect_fts says {found[spelling]}")
    opened.close()
assert found == {'"notes"': "notes_fts", "[notes]": "notes_fts", "'notes'": None, "notes": None}
PYTHON
for name in 0 2; do
    "$work/venv/bin/sqlite-utils" search "$name.db" notes harbour > "$name.out" 2>&1 && code=0 || code=$?
    echo "sqlite-utils search of $name.db ends with $code: $(head -c 120 "$name.out" | tr '\n' ' ')"
    echo "$code" > "$name.code"
done
[ "$(cat 0.code)" -eq 0 ] && [ "$(cat 2.code)" -ne 0 ]
