"""Configurations: what the files say, and what is refused before anything is built.

Proven: every experiment composes, validates and builds its parts; each key is documented once; the
recipe of the paper is the paper's, the recipe of LAVIS changes all that LAVIS does differently;
unknown keys, experiments, choices and values that cannot be are refused, several at once; a batch
that cannot be cut names the sizes that can; torchrun and Slurm are understood; on resume, what may
change may, and what may not is named.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2_train.config import (
    BatchPlan,
    Launch,
    conf_dir,
    flatten,
    launch,
    plan_batch,
    to_plain,
    validate,
    without_checkpoint,
)
from blip2_train.errors import UserError
from blip2_train.models.freezing import count_parameters
from blip2_train.rules import CHOICES, COUNTS, NUMBERS, SWITCHES, TEXTS
from blip2_train.train import compose, run
from blip2_train.training.checkpointing import trained_state
from blip2_train.training.fit import STAGES
from blip2_train.training.optimizer import learning_rate
from blip2_train.training.resume import compare_for_resume
from blip2_train.training.stage2 import Stage2

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
VISIONS = sorted(path.stem for path in (conf_dir() / "vision").glob("*.yaml"))
EVALUATED = {"nocaps"}  # has no train split
DATA = sorted({path.stem for path in (conf_dir() / "data").glob("*.yaml")} - EVALUATED)


def plain(experiment: str, *overrides: str) -> dict[str, Any]:
    return to_plain(compose([f"experiment={experiment}", *overrides]))


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return plain("stage1_vitg")


# -- the files -------------------------------------------------------------------------------------


# What stands in for files that other commands make.
STAND_INS = {
    "clip_flickr8k_tiny": ["text.vocab_size=200"],
    "lm_flickr8k_tiny": ["+causal_lm.config.vocab_size=200"],
    "stage1_flickr8k_tiny": ["text.vocab_size=200"],
    "stage2_flickr8k_tiny": ["language_model=opt2_7b"],
}
STAND_INS |= {
    "finetune_retrieval_tiny": ["text.vocab_size=200"],
    "finetune_caption_tiny": ["+language_model.config.vocab_size=200"],
    "finetune_vqa_tiny": ["+language_model.config.vocab_size=200", "model.vocab_size=200"],
}
STAND_INS |= {f"demo_{name.split('_')[0]}": stand_ins for name, stand_ins in STAND_INS.items()}


def on_meta(cfg: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return STAGES[cfg["stage"]](cfg).build_model(shapes_only=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str) -> None:
    words = [f"experiment={name}", *STAND_INS.get(name, [])]
    cfg = without_checkpoint(to_plain(compose(words)))
    validate(cfg)
    assert cfg["run"]["name"] == name
    tuned = {"finetune_retrieval": "stage1", "finetune_caption": "stage2", "finetune_vqa": "stage2"}
    for prefix, stage in tuned.items():
        name = name.replace(prefix, stage)
    assert name.removeprefix("demo_").startswith(cfg["stage"])
    model = on_meta(cfg)
    if "vision" in cfg:
        assert model.qformer.vision_width == model.vision.width
        trained = count_parameters(model.vision.parameters(), trainable=True)
        assert (trained > 0) is cfg["vision"]["trainable"]
        assert cfg["vision"]["trainable"] is cfg["run"]["name"].startswith("finetune_")
    if "language_model" in cfg:
        assert count_parameters(model.language_model.parameters(), trainable=True) == 0
    assert count_parameters(model.parameters(), trainable=True) > 0


def test_the_papers_experiment_has_the_published_size(paper: dict[str, Any]) -> None:
    assert paper["vision"]["weights"] == "pretrained"
    assert paper["qformer"]["init"] == "bert-base-uncased"
    assert count_parameters(on_meta(paper).parameters(), trainable=True) == 186_705_470


@pytest.mark.parametrize(
    ("name", "trained", "frozen"),
    [  # the paper's table 2, in millions; the first is exact in public logs
        ("stage2_vitg_opt2_7b", 107.133696, 3.8e3 - 107),
        ("stage2_vitg_opt6_7b", 108, 7.8e3 - 108),
        ("stage2_vitg_flant5xl", 107, 4.1e3 - 107),
        ("stage2_vitg_flant5xxl", 108, 12.1e3 - 108),
        ("stage2_vitl_opt2_7b", 104, 3.1e3 - 104),
    ],
)
def test_stage_2_has_the_published_sizes(name: str, trained: float, frozen: float) -> None:
    model = on_meta(plain(name))
    count = count_parameters(model.parameters(), trainable=True)
    if isinstance(trained, float):
        assert count == round(trained * 1e6)
    assert count / 1e6 == pytest.approx(trained, abs=1)
    others = count_parameters(model.parameters(), trainable=False) / 1e6
    assert others == pytest.approx(frozen, rel=0.05)
    # float32 weights and two moments are what its checkpoint holds
    stored = sum(v.numel() for k, v in trained_state(model, Stage2.frozen_prefixes).items())
    assert stored == count and 3 * 4 * stored < 1.4e9


def test_the_recipes_of_stage_2() -> None:
    paper = plain("stage2_vitg_opt2_7b")
    assert paper["trainer"]["max_steps"] == 80_000 and paper["batch"]["size"] == 1920
    assert (paper["optimizer"]["lr"], paper["schedule"]["min_lr"]) == (1e-4, 5e-5)
    assert paper["schedule"]["warmup_steps"] == 2000 and paper["text"]["prefix"] == "none"
    t5 = plain("stage2_vitg_flant5xl")
    assert t5["batch"]["size"] == 1520 and t5["text"]["prefix"] == "random_split"
    ours, theirs = flatten(paper), flatten(plain("stage2_vitg_opt2_7b", "recipe=lavis"))
    changed = {k: theirs[k] for k in theirs if k in ours and theirs[k] != ours[k]}
    assert changed == {
        "trainer.max_steps": 13_600,
        "batch.size": 1024,
        "schedule.min_lr": 1e-5,
        "schedule.steps_per_epoch": 1360,
        "optimizer.betas": [0.9, 0.999],
        "loss.normalise": "rank",
        "data.sources.vg.randaugment": True,
    }
    assert plain("stage2_vitg_flant5xl", "recipe=lavis")["text"]["prefix"] == "none"


def finetuning(name: str, *overrides: str) -> dict[str, Any]:
    return plain(f"finetune_{name}", "init_from=some.ckpt", *overrides)


@pytest.mark.parametrize(
    ("name", "trained"),  # millions, of the paper's tables 3 and 5
    [("retrieval_coco_vitg", 1.2e3), ("retrieval_coco_vitl", 474), ("caption_coco_opt2_7b", 1.1e3)],
)
def test_fine_tuning_has_the_published_sizes(name: str, trained: float) -> None:
    model = on_meta(finetuning(name))
    assert model.vision.num_tokens == 26**2 + 1  # 364 pixels
    count = count_parameters(model.parameters(), trainable=True) / 1e6
    assert count == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize(
    ("name", "decay", "prompt_tokens"),
    [("vqa_opt2_7b", 0.95, 64), ("vqa_opt6_7b", 0.9, 64), ("vqa_flant5xl", 0.95, 64)],
)
def test_the_papers_question_answering(name: str, decay: float, prompt_tokens: int) -> None:
    """Table 4 and the appendix; 1.2 billion parameters are trained."""
    cfg = finetuning(name)
    validate(cfg, world_size=16)
    assert cfg["optimizer"] == {
        "lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05, "grad_clip": None,
        "layer_decay": decay,
    }  # fmt: skip
    assert cfg["batch"]["size"] == 128 and cfg["schedule"]["warmup_steps"] == 1000
    questions = 443_757 + 214_354  # of VQAv2's train and val
    assert cfg["trainer"]["max_steps"] == 5 * (questions // 128)
    assert cfg["data"]["text"] == "questions" and cfg["data"]["prompt"] == "Question: {} Answer:"
    assert cfg["text"]["max_tokens"] == prompt_tokens and cfg["text"]["prefix"] == "none"
    splits = {name: source["split"] for name, source in cfg["data"]["sources"].items()}
    assert splits == {"vqav2": "train", "vqav2_val": "val"}
    model = on_meta(cfg)
    assert model.vision.num_tokens == 35**2 + 1  # 490 pixels
    count = count_parameters(model.parameters(), trainable=True) / 1e9
    assert count == pytest.approx(1.2, abs=0.05)


CAPTIONS = 566_747  # of the 113,287 images of COCO's Karpathy training split


@pytest.mark.parametrize(
    ("name", "lr", "beta2", "decay", "size"),
    [
        ("retrieval_coco_vitg", 1e-5, 0.999, 0.95, 224),
        ("retrieval_coco_vitl", 5e-6, 0.98, 1.0, 224),
        ("caption_coco_opt2_7b", 1e-5, 0.999, 1.0, 256),
        ("caption_coco_opt6_7b", 1e-5, 0.999, 0.95, 256),
        ("caption_coco_flant5xl", 1e-5, 0.999, 1.0, 256),
    ],
)
def test_the_papers_fine_tuning(
    name: str, lr: float, beta2: float, decay: float, size: int
) -> None:
    cfg = finetuning(name)
    validate(cfg, world_size=16)
    assert cfg["optimizer"] == {
        "lr": lr, "betas": [0.9, beta2], "eps": 1e-8, "weight_decay": 0.05, "grad_clip": None,
        "layer_decay": decay,
    }  # fmt: skip
    assert cfg["batch"]["size"] == size and cfg["schedule"]["warmup_steps"] == 1000
    assert cfg["trainer"]["max_steps"] == 5 * (CAPTIONS // size)
    assert cfg["vision"]["image_size"] == 364 and cfg["trainer"]["precision"] == "bf16-mixed"
    assert set(cfg["data"]["sources"]) == {"coco"}
    if name.startswith("caption"):
        assert cfg["data"]["prompt"] == "a photo of " and cfg["text"]["prefix"] == "none"
    else:
        assert all(cfg["loss"]["weights"].values())  # table 6: captioning helps retrieval


def test_fine_tuning_as_lavis_does_it() -> None:
    for name, changes in {
        "retrieval_coco_vitg": {"optimizer.layer_decay": 1.0},  # theirs has no effect
        "caption_coco_opt2_7b": {"data.sources.coco.randaugment": True},
    }.items():
        ours, theirs = flatten(finetuning(name)), flatten(finetuning(name, "recipe=lavis"))
        epoch = CAPTIONS // ours["batch.size"]
        always = {"loss.normalise": "rank", "schedule.steps_per_epoch": epoch}
        assert {k: v for k, v in theirs.items() if v != ours[k]} == changes | always
        assert theirs["trainer.max_steps"] == 5 * epoch


def test_fine_tuning_begins_with_a_checkpoint() -> None:
    assert "init_from=PATH" in refused("experiment=finetune_retrieval_coco_vitg")
    assert "init_from=PATH" in refused("experiment=finetune_caption_coco_opt2_7b")
    validate(plain("finetune_retrieval_coco_vitg", "qformer.init=random"))


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("recipe", ["paper", "lavis"])
def test_groups_combine(vision: str, recipe: str) -> None:
    validate(plain("stage1_vitg", f"vision={vision}", f"recipe={recipe}", "qformer=tiny"))


@pytest.mark.parametrize("data", DATA)
def test_every_data_file_composes(data: str) -> None:
    cfg = plain("stage1_vitg", f"data={data}", "data.root=/somewhere")
    if "validation" not in cfg["data"]:
        with pytest.raises(UserError, match=r"validation\.every=null"):
            validate(cfg)
        cfg["validation"]["every"] = None
    validate(cfg)
    for source in cfg["data"]["sources"].values():
        assert source.keys() == {"shards", "split", "weight", "randaugment"}
        assert source["shards"].startswith("/somewhere/")


RULES = sorted([*CHOICES, *COUNTS, *NUMBERS, *TEXTS, *SWITCHES])


def composed_stages() -> dict[str, dict[str, Any]]:
    names = ("stage1_vitg", "stage2_vitg_opt2_7b", "clip_flickr8k_tiny", "lm_flickr8k_tiny")
    return {name: plain(name) for name in names}


def test_every_rule_is_about_a_key_that_exists() -> None:
    keys = {key for cfg in composed_stages().values() for key in flatten(cfg)}
    assert [key for key in RULES if key not in keys] == []


STAGE_FILES = sorted((conf_dir() / "stage").glob("*.yaml"))


@pytest.mark.parametrize("path", [conf_dir() / "train.yaml", *STAGE_FILES], ids=lambda p: p.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    text = path.read_text().split("\nhydra:")[0].split("these are its own:")[0]
    lines = [line for line in text.splitlines() if not line.startswith("stage:")]
    bare = [
        line
        for line in lines
        if line.strip()
        and not line.strip().startswith(("#", "-"))
        and not line.rstrip().endswith(":")
        and "#" not in line
    ]
    assert bare == []


def test_the_recipe_of_the_paper(paper: dict[str, Any]) -> None:
    assert paper["trainer"]["max_steps"] == 250_000
    assert paper["batch"] == {"size": 1680, "accumulate": 1}
    assert plain("stage1_vitl")["batch"]["size"] == 2320
    assert paper["optimizer"]["betas"] == [0.9, 0.98]
    assert paper["optimizer"]["weight_decay"] == 0.05
    assert paper["schedule"]["warmup_steps"] == 2000
    assert paper["schedule"]["steps_per_epoch"] is None
    assert (paper["optimizer"]["lr"], paper["schedule"]["min_lr"]) == (1e-4, 1e-5)
    assert paper["text"]["max_tokens"] == 32 and paper["loss"]["normalise"] == "global"
    assert set(paper["data"]["sources"]) == {"coco", "vg", "cc3m", "cc12m", "sbu", "laion115m"}
    assert not any(source["randaugment"] for source in paper["data"]["sources"].values())
    assert paper["vision"]["image_size"] == 224 and paper["data"]["flip"] == 0.5


def test_the_recipe_of_lavis_changes_what_lavis_does(paper: dict[str, Any]) -> None:
    ours, theirs = flatten(paper), flatten(plain("stage1_vitg", "recipe=lavis"))
    changed = {k: theirs[k] for k in theirs if k in ours and theirs[k] != ours[k]}
    assert changed == {
        "trainer.max_steps": 8700,  # ten epochs
        "batch.size": 1600,
        "schedule.warmup_steps": 5000,
        "schedule.steps_per_epoch": 870,  # the staircase
        "optimizer.betas": [0.9, 0.999],
        "loss.normalise": "rank",
        "data.sources.vg.randaugment": True,
    }
    sources = {k.split(".")[2] for k in theirs if k.startswith("data.sources.")}
    assert sources == {"coco", "vg"}
    assert not theirs["data.sources.coco.randaugment"]
    gone = {k.split(".")[2] for k in ours.keys() - theirs.keys()}
    assert gone == {"cc3m", "cc12m", "sbu", "laion115m"} and not theirs.keys() - ours.keys()
    assert 10 * theirs["schedule.steps_per_epoch"] == theirs["trainer.max_steps"]


def rate(cfg: dict[str, Any], step: int) -> float:
    lr, max_steps = cfg["optimizer"]["lr"], cfg["trainer"]["max_steps"]
    return learning_rate(step, lr=lr, max_steps=max_steps, **cfg["schedule"])


def test_the_papers_learning_rate(paper: dict[str, Any]) -> None:
    assert rate(paper, 0) == 1e-6
    assert rate(paper, 1000) == pytest.approx((1e-6 + 1e-4) / 2)
    assert rate(paper, 1999) < rate(paper, 2000) == 1e-4 > rate(paper, 2001)
    assert rate(paper, 126_000) == pytest.approx((1e-4 + 1e-5) / 2)  # half of the cosine
    assert rate(paper, 249_999) == pytest.approx(1e-5, rel=1e-6)
    assert rate(paper, 250_000) == rate(paper, 300_000) == pytest.approx(1e-5, rel=1e-12)
    rates = [rate(paper, step) for step in range(2000, 250_001, 500)]
    assert rates == sorted(rates, reverse=True)


def test_laviss_staircase() -> None:
    cfg = plain("stage1_vitg", "recipe=lavis")
    assert rate(cfg, 869) == pytest.approx(1.8e-5, rel=0.03)  # the warm-up is cut short
    assert rate(cfg, 870) == rate(cfg, 1739) == pytest.approx(9.8e-5, rel=0.01)
    assert rate(cfg, 8699) == pytest.approx(1.2e-5, rel=0.03)  # never 1e-5


def test_a_schedule_without_warmup() -> None:
    settings = {"lr": 2.0, "min_lr": 1.0, "warmup_lr": 0.5, "warmup_steps": 0, "max_steps": 4}
    assert [learning_rate(step, **settings) for step in (0, 2, 4)] == [2.0, 1.5, 1.0]
    settings |= {"warmup_steps": 4}  # as long as the run
    assert learning_rate(3, **settings) < 2.0 and learning_rate(4, **settings) == 2.0


# -- command lines ---------------------------------------------------------------------------------


def refused(*overrides: str, dirs: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as error:
        validate(to_plain(compose(list(overrides), dirs)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_keys_are_refused_all_at_once() -> None:
    said = refused("experiment=stage1_vitg", "optimizer.learning_rate=1", "batchsize=4", "lr=3")
    assert "unknown key optimizer.learning_rate" in said
    assert "unknown key batchsize; did you mean batch.size?" in said
    assert "unknown key lr; did you mean optimizer.lr?" in said


@pytest.mark.parametrize("key", ["+optimizer.momentum", "++optimizer.momentum", "+trainer.a.b"])
def test_keys_that_nothing_reads_cannot_be_added(key: str) -> None:
    said = refused("experiment=stage1_vitg", f"{key}=0.9")
    assert f"nothing reads {key.lstrip('+').rsplit('.b')[0]}" in said


def test_experiments_are_listed() -> None:
    for overrides, said in (
        ([], "none is given"),
        (["experiment=stage1_vitgg"], "experiment=stage1_vitgg is none of them"),
        (["experiment=stage1_vitg", "experiment=stage1_vitl"], "is none of them"),
    ):
        message = refused(*overrides)
        assert said in message and all(name in message for name in EXPERIMENTS)


@pytest.mark.parametrize("group", ["vision", "qformer", "data", "recipe"])
def test_unknown_choices_list_the_known_ones(group: str) -> None:
    said = refused("experiment=stage1_vitg", f"{group}=nothing")
    known = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
    assert "nothing" in said and all(name in said for name in known)


@pytest.mark.parametrize("override", ["optimizer.betas=[0.9", "run.name={a", "text.max_tokens=${a"])
def test_values_that_cannot_be_parsed(override: str) -> None:
    refused("experiment=stage1_vitg", override)


def test_interpolations_must_lead_somewhere() -> None:
    assert "trainer.max_stepz" in refused(
        "experiment=stage1_vitg", "trainer.max_steps=${trainer.max_stepz}"
    )
    assert "stage9" in refused("experiment=stage1_vitg", "kind=stage9")


def own_experiment(folder: Path, text: str) -> tuple[str, ...]:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return (str(folder),)


def test_experiments_of_the_user(tmp_path: Path) -> None:
    text = "kind: stage1_vitl\nrun:\n  name: mine\noptimizer:\n  lr: 0.5\n"
    dirs = own_experiment(tmp_path, text)
    cfg = to_plain(compose(["experiment=mine", "seed=3"], dirs))
    assert (cfg["optimizer"]["lr"], cfg["batch"]["size"], cfg["seed"]) == (0.5, 2320, 3)
    own_experiment(tmp_path, text + "  lrate: 1\nextra: 5\n")
    said = refused("experiment=mine", dirs=dirs)
    assert "nothing reads extra, optimizer.lrate" in said
    assert "kind" in refused("experiment=mine", dirs=own_experiment(tmp_path, "seed: 1\n"))


def test_sources_may_be_added() -> None:
    source = "{shards: x, split: train, weight: null, randaugment: false}"
    cfg = plain("stage1_vitg", "data=coco", f"+data.sources.mine={source}")
    assert set(cfg["data"]["sources"]) == {"coco", "mine"}


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, "much", True])
def test_a_weight_is_a_positive_number_or_null(paper: dict[str, Any], weight: Any) -> None:
    cfg = copy.deepcopy(paper)
    for source in cfg["data"]["sources"].values():
        source["weight"] = weight
    with pytest.raises(UserError, match=r"data\.sources\.coco\.weight=.* above 0, or null"):
        validate(cfg)


def test_weights_are_given_for_all_sources_or_none(paper: dict[str, Any]) -> None:
    cfg = copy.deepcopy(paper)
    cfg["data"]["sources"]["coco"]["weight"] = 2.0
    with pytest.raises(UserError, match=r"data\.sources\.\*\.weight.*'coco': 2\.0.*all of them"):
        validate(cfg)
    for source in cfg["data"]["sources"].values():
        source["weight"] = 0.5
    validate(cfg)


BAD = {
    "trainer.max_steps": "-5",
    "trainer.precision": "16-mixed",
    "batch.accumulate": "0",
    "batch.size": "12.5",
    "text.max_tokens": "many",
    "loss.itc.smoothing": "1.0",
    "loss.weights.itm": "-1",
    "optimizer.lr": "high",
    "optimizer.betas": "[0.9,1.5]",
    "data.crop_scale": "0.5",
    "data.decode": "quick",
    "data.num_workers": "true",
    "validation.every": ".nan",
    "run.name": "a/b",
    "seed": "42",  # a good one
}


def test_every_bad_value_is_named_in_one_message() -> None:
    said = refused("experiment=stage1_vitg", *(f"{k}={v}" for k, v in BAD.items()))
    assert [key for key in BAD if f"{key}=" not in said] == ["seed"]
    assert "trainer.precision=16-mixed must be one of 32-true, 64-true, bf16-mixed" in said
    assert "batch.size=12.5 must be a whole number of at least 1" in said
    assert "loss.weights.itm=-1 must be a number of at least 0" in said
    assert "optimizer.betas=[0.9, 1.5] must be two numbers from 0 to 1" in said


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, Any]]:
    return composed_stages()


@pytest.mark.parametrize("key", sorted([*CHOICES, *COUNTS, *NUMBERS]))
@pytest.mark.parametrize("value", ["nonsense", True, -1, [], {"a": 1}, float("nan")])
def test_no_value_is_a_traceback(stages: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    cfg = copy.deepcopy(next(cfg for cfg in stages.values() if key in flatten(cfg)))
    *parents, last = key.split(".")
    place = cfg
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(UserError, match=rf"{key}[=.]"):
        validate(cfg)


TRAINED = ["vision.trainable=true", "vision.dtype=float32"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.weights={itc:0,itm:0,lm:0}"], "at least one must be above 0"),
        (["text.max_tokens=600"], "text.max_tokens=600 exceeds qformer.max_positions=512"),
        (["data.sources={}"], "data.sources"),
        (["run.name=.."], "run.name=.. must be a plain folder name"),
        (["batch.size=1681", "batch.accumulate=4"], "set batch.size=1680 or 1684"),
        (["vision.trainable=true"], "vision.dtype=bfloat16 (its weights are trained in float32)"),
        ([*TRAINED, "vision.precision=float8"], "set vision.precision=native"),
        ([*TRAINED, "data.features=cached"], "set data.features=computed"),
        ([*TRAINED, "trainer.overlap=true"], "set trainer.overlap=false"),
        (["vision.gradient_checkpointing=true"], "set vision.trainable=true, or vision.grad"),
        (["optimizer.layer_decay=0.9"], "set vision.trainable=true, or optimizer.layer_decay=1"),
        ([*TRAINED, "optimizer.layer_decay=0"], "optimizer.layer_decay=0 must be a number from"),
        ([*TRAINED, "optimizer.layer_decay=1.1"], "layer_decay=1.1 must be a number from"),
    ],
)
def test_rules_across_keys(paper: dict[str, Any], overrides: list[str], said: str) -> None:
    if overrides == ["data.sources={}"]:  # a mapping cannot be emptied on the command line
        cfg = copy.deepcopy(paper)
        cfg["data"]["sources"] = {}
        with pytest.raises(UserError, match=r"data.sources is empty"):
            validate(cfg)
    else:
        assert said in refused("experiment=stage1_vitg", *overrides)


def test_the_command_answers_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["experiment=stage1_vitg", "lr=3"],
        ["experiment=stage1_vitg", "--nonsense"],
        ["experiment=stage1_vitg", "nonsense"],
        ["experiment=stage1_vitg", "--config-dir", "/nowhere"],
        ["experiment=stage1_vitg", "--config-dir"],
        [],
    ):
        assert run(arguments) == 2, arguments
        captured = capsys.readouterr().err
        assert captured.startswith("error: ") and captured.count("\n") == 1


# -- batches ---------------------------------------------------------------------------------------


def test_a_batch_is_cut() -> None:
    assert plan_batch(1680, 1, 16) == BatchPlan(1680, 1, 1680, 105, 16)
    plan = plan_batch(24, 3, 4)
    assert (plan.contrastive, plan.per_device) == (8, 2)
    assert str(plan) == (
        "batch 24 = 3 part(s) of 8 = 2 x 4 device(s) each; contrast compares 8 samples at a time"
    )
    cached = plan_batch(24, 3, 4, cache=True)
    assert (cached.accumulate, cached.contrastive, cached.per_device) == (1, 24, 6)
    assert (cached.parts, cached.at_a_time) == (3, 2)
    assert str(cached) == str(plan).replace("compares 8", "compares 24")


@pytest.mark.parametrize(
    ("size", "accumulate", "world", "near"),
    [
        (100, 3, 8, "batch.size=96 or 120"),
        (10, 2, 3, "batch.size=6 or 12"),
        (5, 2, 3, "batch.size=6"),  # nothing below
        (0, 2, 3, "batch.size=6"),
        (-7, 1, 4, "batch.size=4"),
    ],
)
def test_the_nearest_sizes_are_named(size: int, accumulate: int, world: int, near: str) -> None:
    with pytest.raises(UserError) as error:
        plan_batch(size, accumulate, world)
    assert str(error.value).endswith(f"set {near}")
    for fitting in near.removeprefix("batch.size=").split(" or "):
        plan_batch(int(fitting), accumulate, world)


def test_accumulation_is_at_least_one() -> None:
    with pytest.raises(UserError, match=r"batch.accumulate=0 must be at least 1"):
        plan_batch(8, 0, 1)


# -- launchers -------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NNODES": "4",
}


def test_launchers_are_understood() -> None:
    assert launch({}) == Launch(0, 0, 1, 1, "")
    assert launch(TORCHRUN) == Launch(5, 1, 8, 4, "torchrun")
    assert launch(SRUN) == Launch(5, 1, 8, 4, "slurm")
    assert launch(SRUN | TORCHRUN).launcher == "torchrun"  # torchrun started by srun


def test_a_shell_in_an_allocation_is_one_process() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}
    assert launch(shell) == Launch()
    assert launch(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == Launch()


# -- resume ----------------------------------------------------------------------------------------


def changed(cfg: dict[str, Any], **values: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        *parents, last = key.split("__")
        place = cfg
        for parent in parents:
            place = place[parent]
        place[last] = value
    return cfg


def test_what_may_change_on_resume(paper: dict[str, Any]) -> None:
    assert compare_for_resume(paper, copy.deepcopy(paper), []) == []
    other = changed(
        paper,
        batch__size=840,
        trainer__devices=4,
        data__num_workers=0,
        wandb__mode="offline",
        validation__every=7,
        checkpoint__keep_last=9,
    )
    assert compare_for_resume(paper, other, []) == [
        "batch.size: 1680 -> 840",
        "checkpoint.keep_last: 3 -> 9",
        "data.num_workers: 8 -> 0",
        "trainer.devices: None -> 4",
        "validation.every: 5000 -> 7",
        "wandb.mode: auto -> offline",
    ]


def test_a_trained_tower_on_resume() -> None:
    ours = finetuning("retrieval_coco_vitg")
    free = finetuning("retrieval_coco_vitg", "vision.gradient_checkpointing=false")
    line = "vision.gradient_checkpointing: True -> False"
    assert compare_for_resume(ours, free, []) == [line]
    key = "optimizer.layer_decay"
    other = finetuning("retrieval_coco_vitg", f"{key}=0.9")
    assert compare_for_resume(ours, other, [key]) == [f"{key}: 0.95 -> 0.9"]
    without = finetuning("retrieval_coco_vitg", f"{key}=1")
    with pytest.raises(UserError, match="other groups"):
        compare_for_resume(ours, without, [key])
    frozen = changed(ours, vision__trainable=False)
    with pytest.raises(UserError, match=r"vision\.trainable: True -> False .* another run"):
        compare_for_resume(ours, frozen, ["vision"])


def test_shards_and_tokenizer_may_move() -> None:
    """What they hold is compared by its digest."""
    name = "stage1_flickr8k_tiny"
    lines = compare_for_resume(plain(name), plain(name, "data.root=/elsewhere"), [])
    assert [line.split(":")[0] for line in lines] == [
        "data.root",
        "data.sources.flickr8k.shards",
        "data.validation.shards",
        "text.tokenizer",
    ]


@pytest.mark.parametrize(
    ("values", "allow"),
    [
        ({"optimizer__lr": 2e-4}, "optimizer.lr"),
        ({"optimizer__lr": 2e-4, "optimizer__grad_clip": 1.0}, "optimizer"),
        ({"schedule__warmup_steps": 5}, "schedule.warmup_steps"),
        ({"trainer__max_steps": 5}, "trainer.max_steps"),
        ({"loss__normalise": "rank"}, "loss"),
        ({"trainer__precision": "32-true"}, "trainer.precision"),
    ],
)
def test_what_needs_permission(paper: dict[str, Any], values: dict[str, Any], allow: str) -> None:
    other = changed(paper, **values)
    with pytest.raises(UserError) as error:
        compare_for_resume(paper, other, [])
    for key in values:
        assert f"resume.allow=[{key.replace('__', '.')}]" in str(error.value)
    assert len(compare_for_resume(paper, other, [allow])) == len(values)
    with pytest.raises(UserError):  # a similar name is not enough
        compare_for_resume(paper, other, [allow[:-1]])


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"kind": "stage1_vitl"},
        {"qformer__num_layers": 6},
        {"vision__name": "vit_tiny_patch16_224"},
        {"model__embed_dim": 64},
        {"text__max_tokens": 16},
        {"data__flip": 0.0},
        {"data__sources__coco__weight": 2.0},
    ],
)
def test_what_is_another_run(paper: dict[str, Any], values: dict[str, Any]) -> None:
    (key,) = (k.replace("__", ".") for k in values)
    with pytest.raises(UserError, match=rf"{key}: .* is another run.*run\.name"):
        compare_for_resume(paper, changed(paper, **values), [key, key.split(".")[0]])


def test_all_changes_are_named(paper: dict[str, Any]) -> None:
    other = changed(paper, seed=1, optimizer__lr=1.0)
    del other["data"]["sources"]["sbu"]
    with pytest.raises(UserError) as error:
        compare_for_resume(paper, other, [])
    for said in ("seed: 42 -> 1", "optimizer.lr: 0.0001 -> 1.0", "data.sources.sbu.split: train"):
        assert said in str(error.value)
