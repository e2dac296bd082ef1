"""Words of captions without Java are those of the benchmarks' tokenizer.

- hard cases: what the Java program made of them stands here
- where Java is: the same for every caption of the real data, and for ones put together at random
- one caption is one line, whatever it holds; nothing takes long; no text raises
"""

import csv
import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_train.evaluation import java
from blip2_train.evaluation.ptb import PUNCTUATION, one_line, tokenize

# (caption, what Stanford CoreNLP 3.4.1 made of it, each on a line between others, less punctuation)
CASES = [
    (
        "A man's hat isn't here, they're gone; I'd say we've won.",
        "a man 's hat is n't here they 're gone i 'd say we 've won",
    ),
    ("Dogs' bones and the players' bench", "dogs bones and the players bench"),
    (
        "Can't you see? He won't! She cannot. They're gonna wanna go.",
        "ca n't you see he wo n't she can not they 're gon na wan na go",
    ),
    ("Rock 'n' roll at five o'clock with O'Brien", "rock 'n' roll at five o'clock with o'brien"),
    (
        "y'all come see 'em in the '90s, class of '99",
        "y' all come see 'em in the '90s class of '99",
    ),
    ("A \"quoted\" sign that says 'stop' and ``go''", "a quoted sign that says stop and go"),
    (
        "“Curly” quotes, it’s ‘fine’ and can’t hurt… really",
        "curly quotes it 's fine and ca n't hurt really",
    ),
    (
        "A black-and-white t-shirt, a 10-year-old boy - and a dog -- running",
        "a black-and-white t-shirt a 10-year-old boy and a dog running",
    ),
    ("Rain—snow–sun", "rain snow sun"),
    (
        "Salt and/or pepper w/ a 1/2 cup, 2 1/2 cups, ½ cup",
        "salt and/or pepper w / a 1/2 cup 2\xa01/2 cups 1/2 cup",
    ),
    (
        "5'10\" tall at 10:30am, 3.5mm lens, 1,000.50 meters, 1950s cars",
        "5 10 tall at 10:30 am 3.5 mm lens 1,000.50 meters 1950s cars",
    ),
    (
        "$5.00 or £5 or €5 or 5¢ each, 50% off, #1 team",
        "$ 5.00 or # 5 or $ 5 or 5 cents each 50 % off # 1 team",
    ),
    (
        "A man (left) holds a [red] {ball}",
        "a man -lrb- left -rrb- holds a -lsb- red -rsb- -lcb- ball -rcb-",
    ),
    (
        "Mr. Smith and Dr. Jones of St. Louis in the U.S. at 5 p.m. etc.",
        "mr. smith and dr. jones of st. louis in the u.s. at 5 p.m. etc.",
    ),
    (
        "Oak Ave. and No. 5, vs. the Jets. In the water. Jr. high",
        "oak ave. and no. 5 vs. the jets in the water jr. high",
    ),
    ("A man.A woman, dog.The end", "a man.a woman dog.the end"),
    ("Wait... what?! Yes!! ok.. done....", "wait what ?! yes !! ok done"),
    ("R&B at AT&T or H&M with M&M's & friends", "r&b at at&t or h&m with m&m 's & friends"),
    (
        "a+b=c 5*3 <3 a_b a/b @user #tag foo@bar.com www.getty.com http://a.com/b?c=d",
        "a + b = c 5 * 3 < 3 a_b a/b @user #tag foo@bar.com www.getty.com http://a.com/b?c=d",
    ),
    (
        "A café, a piñata, señor Muñoz's naïve résumé",
        "a café a piñata señor muñoz 's naïve résumé",
    ),
    ("日本語 русский ελληνικά", "日本語 русский ελληνικά"),
    ("emoji 😀 and tm™ 98.6° • dot", "emoji and tm ™ 98.6 ° • dot"),
    (
        "3-D glasses, mp3 player, B-52, 7-Eleven, 24/7, 12/25/2014",
        "3-d glasses mp3 player b-52 7-eleven 24/7 12/25/2014",
    ),
    ("call 555-1234 or (555) 555-1234", "call 555-1234 or -lrb-555-rrb-\xa0555-1234"),
    (":) :-( ;) :D smile", ":-rrb- :--lrb- ;-rrb- :d smile"),
    ("&amp; &quot;x&quot; don&apos;t", "& x do n't"),
    ("<b>bold</b> a < b", "<b> bold </b> a < b"),
    ("Vitamin C. The jar", "vitamin c the jar"),
    (
        "'twas 'tis 'cause c'mon rock'n'roll d'oh ma'am",
        "'t was 't is 'cause c'mon rock 'n' roll d'oh ma'am",
    ),
    ('"', ""),
    (" ", ""),
    ("zero\u200bwidth and soft\xadhyphen non breaking", "zero width and softhyphen non breaking"),
    ("twelve o' clock, 6' 2\" man, 8\" pan", "twelve o clock 6 2 man 8 pan"),
    ("A STOP sign; a WOMAN'S hat; DON'T WALK", "a stop sign a woman 's hat do n't walk"),
    ("two dogs,one cat.three birds!four fish?", "two dogs one cat.three birds!four fish"),
    ('a sign reading "NO PARKING 8AM-6PM" .', "a sign reading no parking 8am-6pm"),
    ("The end .", "the end"),
]


@pytest.mark.parametrize(("caption", "words"), CASES, ids=range(len(CASES)))
def test_hard_cases(caption: str, words: str) -> None:
    assert tokenize(caption) == words


@pytest.fixture(scope="module")
def needs_java() -> None:
    pytest.importorskip("pycocoevalcap", reason="pip install 'blip2-train[captions]'")
    if reason := java.problem():
        pytest.skip(f"nothing to compare with: {reason}")


def disagreements(captions: list[str]) -> list[tuple[str, str, str]]:
    """(caption, ours, theirs); each between lines that begin in lower case: theirs looks ahead."""
    theirs = java.tokenize([line for caption in captions for line in (caption, "zz")])[::2]
    ours = [tokenize(caption) for caption in captions]
    return [row for row in zip(captions, ours, theirs, strict=True) if row[1] != row[2]]


def test_cases_are_what_java_gives(needs_java: None) -> None:
    assert disagreements([caption for caption, _ in CASES]) == []


def real_captions(realdata: Path) -> list[str]:
    found = set()
    for path in [*realdata.glob("coco/annotations/*.json"), *realdata.glob("hard/captions*.json")]:
        found |= {entry["caption"] for entry in json.loads(path.read_text())["annotations"]}
    for path in [*realdata.glob("flickr8k/*token*"), *realdata.glob("hard/Flickr8k*.txt")]:
        found |= {line.split("\t")[-1] for line in path.read_text().splitlines()}
    with (realdata / "hard" / "captions_awkward.txt").open(newline="") as file:
        found |= {row[-1] for row in csv.reader(file) if row}
    return sorted(found)


def test_all_real_captions(needs_java: None, realdata: Path) -> None:
    captions = real_captions(realdata)
    assert len(captions) > 4000
    wrong = disagreements(captions)
    print(f"{len(wrong)} of {len(captions)} captions differ")
    assert wrong == []


def test_random_captions(needs_java: None) -> None:
    rng = random.Random(0)
    words = [word for caption, _ in CASES for word in caption.split() if ";" not in word]
    marks = [
        *".,!?;:'\"()[]{}-/&%$#@*+=<>_~`^|\\",
        "...",
        "--",
        "’",
        "‘",
        "“",
        "”",
        "…",
        "–",
        "—",
        "",
    ]
    captions = []
    for _ in range(3000):
        pieces = []
        for _ in range(rng.randint(2, 8)):
            word = rng.choice(words)
            word = rng.choice([word, word, word.lower(), word.upper(), word.capitalize()])
            pieces.append(word + rng.choice([" ", " ", " ", f"{rng.choice(marks)} ", "", " . "]))
        captions.append("".join(pieces))
    wrong = disagreements(captions)
    print(f"{len(wrong)} of {len(captions)} captions differ")
    assert len(wrong) <= 6, "\n".join(map(str, wrong))  # marks within words that no one writes


def test_punctuation_is_the_librarys() -> None:
    library = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    assert set(library.PUNCTUATIONS) == PUNCTUATION


def test_a_caption_is_one_line() -> None:
    text = " a\ncat\r\nsits\x0bon\x0ca\u2028mat\u2029 "
    assert one_line(text) == "a cat sits on a mat"
    assert tokenize(text) == "a cat sits on a mat"
    assert tokenize("") == tokenize(" \n ") == tokenize("?!\x00🐻".replace("?!", "")) == ""


@given(st.text(max_size=60))
def test_any_text_has_words(text: str) -> None:
    words = tokenize(text)
    assert "\n" not in words and "  " not in words and words == words.strip(" ")


@pytest.mark.parametrize(
    "piece", ["a", "a'", "a.", "a-", "<a ", "x@y.", "1/", "😀", "A&", "(5", "@"]
)
def test_nothing_takes_for_ever(piece: str) -> None:
    start = time.process_time()
    tokenize(piece * (4000 // len(piece)))
    assert time.process_time() - start < 20  # seconds; a fraction of one, unless it grows too fast
