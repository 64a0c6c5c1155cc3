"""The notebooks: stored without outputs, and each runs from its first cell to its last without a network."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOBODY = "http://127.0.0.1:9"
"""A proxy that is not there, so that whatever asks the network fails."""


def cells(book: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(book.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_nothing_but_words_and_code_is_stored(book: Path) -> None:
    made = [cell for cell in cells(book) if cell["cell_type"] == "code"]
    assert [cell for cell in made if cell["outputs"] or cell["execution_count"]] == []
    text = book.read_text(encoding="utf-8")
    assert "file://" not in text
    assert [page for page in re.findall(r"docs/[\w-]+\.md", text) if not (ROOT / page).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_it_runs(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, NOBODY)
    # the kernel is this interpreter, whatever kernels the user has
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}), encoding="utf-8"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = nbformat.read(book, as_version=4)
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(work)}}).execute()
    shown = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)
