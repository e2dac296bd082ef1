"""The wheel holds the configuration files, and the README names what exists."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.network  # pip fetches the build backend
@pytest.mark.slow
def test_the_wheel_holds_every_configuration_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {f"blip2_train/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert len(wanted) > 10 and wanted <= names
    assert "blip2_train/py.typed" in names


DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "docs/evaluation.md",
    *(f"launch/{p.name}" for p in (ROOT / "launch").glob("*.md")),
]  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_what_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"
    for path in re.findall(r"`((?:blip2_train|conf|data|launch|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{name} names {path}"
    experiments = {p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml")}
    for experiment in re.findall(r"experiment=(\w+)", text):
        assert experiment in experiments | {"NAME"}, f"{name} names experiment={experiment}"


def test_readme_commands_are_real() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make (\w[\w-]*)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    scripts = re.search(
        r"\[project.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S
    )
    assert scripts is not None
    for command in re.findall(r"^(blip2-\w+)", text, flags=re.MULTILINE):
        assert command in scripts[1], command


def test_nothing_names_a_registry_or_this_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    options = ("-".join(("index", "url")), "-".join(("find", "links")))
    places = (str(ROOT), f"{Path.home()}/")
    bad = re.compile("|".join(re.escape(text) for text in (*options, *places)))
    for name in listed.stdout.split():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        assert not bad.search(path.read_text(errors="ignore")), name
