"""VQA accuracy on cases whose results were worked out by hand from the authors' formula.

- leave-one-out averages: 0.3, 0.6, 0.9, 1 for one to four people of ten who agree
- marks, full stops, commas in numbers, number words, articles, contractions, and their quirks
- nothing is normalised where all annotators agree; means by kind of question
"""

import pytest

from blip2_train.evaluation.vqa_metrics import (
    CONTRACTIONS,
    Scored,
    by_kind,
    gqa_accuracy,
    mean_accuracy,
    normalise,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_ten_people(agree: int, accuracy: float) -> None:
    """One agrees: left out himself he finds 0 others, each of the 9 others finds 1 of 3: 9/10/3.

    Three: each of them finds 2 others, each of the 7 others 3: (3 * 2/3 + 7) / 10 = 0.9.
    """
    answers = ["red"] * agree + [f"colour {k}" for k in range(10 - agree)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy, abs=1e-12)
    assert vqa_accuracy("red", answers[::-1]) == pytest.approx(accuracy, abs=1e-12)


def test_other_numbers_of_people() -> None:
    """Five who all agree leave four: 1. Three leave two: 2/3. One leaves nobody: 0."""
    assert vqa_accuracy("yes", ["yes"] * 5) == 1
    assert vqa_accuracy("yes", ["yes"] * 3) == pytest.approx(2 / 3)
    assert vqa_accuracy("yes", ["yes"]) == 0
    assert vqa_accuracy("yes", ["yes", "no"]) == pytest.approx(1 / 6)  # (0 + 1/3) / 2
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        # full stops: deleted but in front of a digit
        ("Yes.", "yes"),
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("no.5", "no.5"),
        ("." * 40, "." * 8),
        # commas between digits: then every mark of the text is deleted, else spaces stand in
        ("1,000", "1000"),
        ("1,000-mile", "1000mile"),
        ("10-mile", "10 mile"),
        ("1, 2", "1 2"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        # a space beside a mark deletes all such marks, also those that have none beside them
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),
        ("is it?", "is it"),
        ("what?!", "what"),
        ("(left)", "left"),
        ('"a_b"/[c]{d}=e+f\\g>h<i@j`k;l', "b c d e f g h i j k l"),
        # what is no mark
        ("7:30", "7:30"),
        ("dog's", "dog's"),
        ("$5 & 10%", "$5 & 10%"),
        # case, number words, articles
        ("A Dog and THE Cat", "dog and cat"),
        ("two", "2"),
        ("Ten", "10"),
        ("None", "0"),
        ("twenty one", "twenty 1"),
        ("eleven", "eleven"),
        ("the", ""),
        ("one-a-day", "1 day"),
        # contractions
        ("dont", "don't"),
        ("Dont know", "don't know"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),  # both missing: not in the list
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # the wrong way round
        ("Im", "im"),  # its entry has a capital, which nothing has by then
        ("its", "its"),
        # spaces, other scripts, nothing
        ("  two\n\tdogs ", "2 dogs"),
        ("Ça va?", "ça va"),
        ("猫。", "猫。"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_normalisation(answer: str, result: str) -> None:
    assert normalise(answer) == result


def test_the_list_of_contractions_is_whole() -> None:
    """The authors' has 120 entries; 4 have capitals and never match, 2 change nothing."""
    assert len(CONTRACTIONS) == 114
    assert all(wrong != right for wrong, right in CONTRACTIONS.items())


def test_both_sides_are_normalised_where_annotators_differ() -> None:
    answers = ["The cat."] * 3 + ["a cat"] * 2 + ["dog"] * 5
    assert vqa_accuracy("Cat", answers) == 1  # five say "cat"
    assert vqa_accuracy("two", ["2"] * 2 + ["3"] * 8) == pytest.approx(0.6)
    # "none" of one annotator and "0" of another are one answer
    assert vqa_accuracy("none", ["0", "none", *["1"] * 8]) == pytest.approx(0.6)


def test_nothing_is_normalised_where_all_annotators_agree() -> None:
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("the", ["the"] * 10) == 1  # text in the image
    # outer spaces and line breaks are dropped before, on both sides
    assert vqa_accuracy("\tyes\n", ["yes "] * 5 + [" yes"] * 5) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_gqa_is_right_or_wrong() -> None:
    assert gqa_accuracy("Yes.", ["yes"]) == 1
    assert gqa_accuracy("t-shirt", ["t-shirt"]) == gqa_accuracy("t shirt", ["t-shirt"]) == 1
    assert gqa_accuracy("two", ["2"]) == 1
    assert gqa_accuracy("yes it is", ["yes"]) == gqa_accuracy("", ["yes"]) == 0


def test_means_by_kind() -> None:
    scored = [
        Scored(1.0, "yes/no", "is the"),
        Scored(0.3, "yes/no", "are"),
        Scored(0.6, "other", ""),
        Scored(0.0, "", "are"),
    ]
    assert mean_accuracy(scored) == pytest.approx(47.5)
    assert by_kind(scored, "answer_type") == pytest.approx({"other": 60, "yes/no": 65})
    assert by_kind(scored, "question_type") == pytest.approx({"are": 15, "is the": 100})
    with pytest.raises(ValueError, match="no question"):
        mean_accuracy([])
