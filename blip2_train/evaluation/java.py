"""The two programs of `pycocoevalcap` that need Java: the Penn Treebank tokenizer, and METEOR.

They are started here as the library starts them, but for three things: nothing is written into the
library's folder, which may be read-only; a caption always stays one line, whatever it holds; and
neither encoding nor decimal point depend on the locale. Nothing is left running.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2_train.evaluation.ptb import one_line

JAVA = "java"
# Behind whatever the user has set, so these count.
OPTIONS = "-Dfile.encoding=UTF-8 -Duser.language=en -Duser.country=US"


class JavaError(RuntimeError):
    """A program could not be run, or did not answer as it should; the message says why."""


def problem() -> str | None:
    """Why Java cannot be used here, None where it can.

    A file of that name is not enough: some systems have one that only says where to get Java.
    """
    if shutil.which(JAVA) is None:
        return "there is no java on the PATH"
    try:
        started = subprocess.run([JAVA, "-version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"java cannot be started: {error}"
    if started.returncode:
        lines = started.stderr.strip().splitlines() or [f"exit code {started.returncode}"]
        return f"java does not work: {lines[0]}"
    return None


def tokenize(captions: Sequence[str]) -> list[str]:
    """The captions' words as the tokenizer of the benchmarks gives them, punctuation dropped.

    Args:
        captions: any text.

    Returns:
        As many strings of words with single spaces between them.

    Raises:
        JavaError: it failed, or answered with another number of lines.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    program = "edu.stanford.nlp.process.PTBTokenizer"
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(one_line(caption) + "\n" for caption in captions)
    try:
        ended = subprocess.run(
            [JAVA, "-cp", str(jar), program, *options],
            input=text.encode("utf-8", "replace"),
            capture_output=True,
            env=_environment(),
            check=False,
        )
    except OSError as error:
        raise JavaError(f"the Penn Treebank tokenizer cannot be started: {error}") from error
    lines = ended.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if ended.returncode or len(lines) != len(captions):
        raise JavaError(
            f"the Penn Treebank tokenizer ended with exit code {ended.returncode} and "
            f"{len(lines)} lines for {len(captions)} captions{_last_words(ended.stderr)}"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.rstrip().split(" ") if w not in dropped) for line in lines]


@contextlib.contextmanager
def meteor() -> Iterator[Any]:
    """METEOR's scorer, which loads for some ten seconds and needs 2 GB; ended at the end.

    Yields:
        An object with `compute_score(references, captions)`, see `meteor_score`.

    Raises:
        JavaError: it cannot be started.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = _environment()["JAVA_TOOL_OPTIONS"]
    try:
        scorer = Meteor()
    except OSError as error:
        raise JavaError(f"METEOR cannot be started: {error}") from error
    finally:
        del os.environ["JAVA_TOOL_OPTIONS"]
        if before is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = before
    try:
        yield scorer
    finally:
        # After an error its lock is still taken, and its destructor would wait for it for ever.
        if scorer.lock.locked():
            scorer.lock.release()
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
        for pipe in (scorer.meteor_p.stdin, scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def meteor_score(
    scorer: Any, references: dict[int, list[str]], captions: dict[int, list[str]]
) -> float:
    """METEOR of tokenised captions, over all of them.

    Args:
        scorer: from `meteor`.
        references: of each image, at least one.
        captions: one of each image.

    Raises:
        JavaError: the program has ended, for want of memory for example.
    """
    try:
        return float(scorer.compute_score(references, captions)[0])
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        raise JavaError(f"METEOR failed{_last_words(scorer.meteor_p.stderr.read())}") from error


def _environment() -> dict[str, str]:
    given = os.environ.get("JAVA_TOOL_OPTIONS", "")
    return os.environ | {"JAVA_TOOL_OPTIONS": f"{given} {OPTIONS}".strip()}


def _last_words(stderr: bytes) -> str:
    """What a program complained of last, but for the line that repeats our options."""
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    lines = [line for line in lines if "JAVA_TOOL_OPTIONS" not in line]
    return f": {lines[-1].strip()}" if lines else ""
