"""Rules of the repository that no linter knows."""

import operator
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_operator_folder_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert operator.itemgetter(1)("ab") == "b"


def test_locked_requirements_have_hashes_and_name_no_registry() -> None:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert {file.name for file in files} >= {"bootstrap.txt", "dev.txt", "operator.txt", "trainer.txt"}
    for file in files:
        text = file.read_text()
        assert "://" not in text, file
        for block in re.split(r"\n(?=\S)", text):
            if "==" in block and not block.startswith("#"):
                assert "--hash=sha256:" in block, f"{file.name}: {block.splitlines()[0]}"


def test_tracked_files_name_no_path_of_one_machine() -> None:
    # Bracketed letters keep the pattern from being what it looks for.
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.-])/(w[o]rk|f[a]rm)/|/r[o]ot/", "--", ".", ":!*.sum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
