"""What the demo renders and trains: the same commands that a user gives, in order."""

from dataclasses import dataclass
from pathlib import Path

SIZE = 48  # pixels


@dataclass(frozen=True)
class Plan:
    """One kind of demo.

    Attributes:
        objects: of a scene.
        samples: training images.
        held_out: scenes of the novel and of the compositional split.
        steps: {run: optimizer steps}.
        changes: further overrides of all runs.
    """

    objects: int
    samples: int
    held_out: int
    steps: dict[str, int]
    changes: tuple[str, ...] = ()


PLANS = {
    "": Plan(1, 30_000, 500, {"clip": 1000, "lm": 600, "stage1": 900, "stage2": 800}),
    # Learns next to nothing: it shows that everything runs.
    "quick": Plan(
        1,
        1024,
        64,
        {"clip": 12, "lm": 12, "stage1": 8, "stage2": 8},
        ("checkpoint.every=4", "trainer.log_every=4"),
    ),
    "long": Plan(2, 120_000, 500, {"clip": 4000, "lm": 800, "stage1": 4000, "stage2": 1000}),
}
WITHOUT = "stage2_without_stage1"
# Runs in order: name, what it is for.
RUNS = {
    "clip": "an image tower learns by contrast with texts, from random weights",
    "lm": "a small OPT learns to write captions without seeing an image",
    "stage1": "the Q-Former learns contrast, matching and captioning on the frozen tower",
    "stage2": "its queries become a soft prompt of the frozen language model",
    WITHOUT: "the same from a random Q-Former, for comparison",
}


def render_command(plan: Plan, shards: Path, seed: int) -> list[str]:
    """Arguments of blip2-prepare."""
    return [
        "synthetic",
        f"--out={shards}",
        f"--samples={plan.samples}",
        f"--held-out={plan.held_out}",
        f"--objects={plan.objects}",
        f"--size={SIZE}",
        "--quality=95",
        f"--seed={seed}",
        "--samples-per-shard=128",  # a batch of clip
        "--tokenizer=400",
    ]


def train_command(plan: Plan, run: str, out: Path, seed: int) -> list[str]:
    """Arguments of blip2-train.

    Args:
        plan: of the demo.
        run: one of `RUNS`.
        out: folder of the demo.
        seed: of everything random.
    """
    kind = run.split("_")[0]
    steps = plan.steps[kind]
    command = [
        f"experiment=demo_{kind}",
        f"run.dir={out}",
        f"run.name={run}",
        f"data.root={out / 'data'}",
        f"seed={seed}",
        f"trainer.max_steps={steps}",
        f"validation.every={(steps + 1) // 2}",
        "wandb.mode=disabled",
        *plan.changes,
    ]
    if kind.startswith("stage"):
        command.append(f"vision.weights={out / 'clip' / 'tower.safetensors'}")
    if kind == "stage2":
        command.append(f"language_model.name={out / 'lm' / 'model'}")
    if run == "stage2":
        checkpoint = out / "stage1" / "checkpoints" / f"step-{plan.steps['stage1']:08d}.ckpt"
        command.append(f"init_from={checkpoint}")
    elif run == WITHOUT:
        command.append("init=random")
    return command
