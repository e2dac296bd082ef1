"""The demo, in its quick form: it learns next to nothing, but everything runs.

- it leaves a report with every number beside its chance level, and a page that needs no network
- killed at random moments and started again, it leaves the same report, times aside
- another demo in its folder is refused in one sentence
"""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from blip2_train.data.synthetic import WORLDS
from blip2_train.demo.page import table
from blip2_train.demo.plan import PLANS, RUNS, train_command
from blip2_train.demo.run import main

PARTS = ["shards", *RUNS, "evaluation"]


def blip2_demo(arguments: list[str]) -> int:
    """Of a process of its own."""
    sys.argv[1:] = arguments
    main()
    return 0


def start(out: Path) -> Forked:
    return Forked(blip2_demo, ["--quick", "--out", str(out)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "whole"
    said = start(out).finish()
    assert all(f"[{i + 1}/7] {part}" in said for i, part in enumerate(PARTS))
    assert "chance" in said and "report.html" in said
    return out


def numbers(out: Path) -> dict[str, Any]:
    content = json.loads((out / "report.json").read_text())
    assert set(content.pop("seconds")) == {*PARTS, "threads"}
    return content


def page(out: Path) -> str:
    return re.sub(r"in \d+ minutes? on", "", (out / "report.html").read_text())


def test_report_has_everything(undisturbed: Path) -> None:
    content = numbers(undisturbed)
    assert content["images"] == {"novel": 64, "compositional": 64}
    world = WORLDS[content["settings"]["objects"]]
    for split in content["splits"].values():
        for name in ("stage1", "stage2", "stage2_without_stage1"):
            assert {*world.attributes, "everything"} <= set(split[f"{name}_captions"])
            assert "grounding_gap" in split[name]
        assert {"itm_accuracy", "i2t_r1", "itm_t2i_r1"} <= set(split["stage1"])
        loss = split["stage2"]
        assert loss["seeing"] < loss["blind"] < loss["lm_alone"]
    rows = table(world, content).rows
    assert len(rows) > 40 and all(len(row) == 4 for row in rows)
    numbers_of = [row for row in rows if row[0].startswith("\u2003")]
    assert len(numbers_of) > 40 and all(row[2] for row in numbers_of), "a number is missing"
    # no novel scene has an unseen pair
    assert all(bool(row[1]) == ("(with" not in row[0]) for row in numbers_of)


def test_page_is_one_file(undisturbed: Path) -> None:
    text = page(undisturbed)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) > 40 and all(s.startswith(("data:image/", "#")) for s in sources)
    assert not re.search(r"<script|@import|<link", text)
    for title in ("Captions", "Losses", "All numbers", "Where the queries look", "Hard negatives"):
        assert f">{title}" in text, title
    assert text.count("hard negative image") > 3 and text.count("<svg") >= 7
    assert (undisturbed / "stage1.png").exists() and (undisturbed / "stage2.png").exists()
    for name in RUNS:
        assert (undisturbed / name / "report.html").exists(), name


def interrupted(out: Path, parts: list[str], rng: random.Random) -> int:
    """Runs the demo, killed once in each of some parts; returns how often it was killed."""
    kills = 0
    for part in parts:
        demo = start(out)
        demo.wait_for(f"/7] {part}:")
        time.sleep(rng.uniform(0, 6))
        kills += demo.is_alive()
        demo.kill()
    return kills


def test_killed_it_leaves_the_same_report(undisturbed: Path) -> None:
    """In one part, after the others were done."""
    before = numbers(undisturbed), page(undisturbed)
    part = random.choice([*RUNS])  # in the last part it might be over before it is killed
    for later in PARTS[PARTS.index(part) : -1]:
        shutil.rmtree(undisturbed / later)
    for name in ("report.json", "report.html"):
        (undisturbed / name).unlink()
    assert interrupted(undisturbed, [part], random.Random()), part
    start(undisturbed).finish()
    assert (numbers(undisturbed), page(undisturbed)) == before, part


@pytest.mark.slow
def test_killed_in_every_part_it_leaves_the_same_report(undisturbed: Path, tmp_path: Path) -> None:
    assert interrupted(tmp_path / "killed", PARTS, random.Random()) >= 4
    start(tmp_path / "killed").finish()
    assert numbers(tmp_path / "killed") == numbers(undisturbed)
    assert page(tmp_path / "killed") == page(undisturbed)


def test_another_demo_in_the_folder_is_refused(undisturbed: Path) -> None:
    """The real command."""
    words = [sys.executable, "-m", "blip2_train.demo.run", "--quick", "--seed", "1"]
    done = subprocess.run(
        [*words, "--out", str(undisturbed)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "holds other data" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", RUNS)
def test_commands_compose(kind: str, name: str, tmp_path: Path) -> None:
    from blip2_train.config import to_plain, validate
    from blip2_train.train import compose

    plan = PLANS[kind]
    cfg = to_plain(compose(train_command(plan, name, tmp_path, seed=3)))
    validate(cfg)
    assert cfg["seed"] == 3 and cfg["run"]["name"] == name
    assert cfg["trainer"]["max_steps"] == plan.steps[cfg["stage"]]
