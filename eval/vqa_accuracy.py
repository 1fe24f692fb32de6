"""Soft accuracy against ten human answers: VQA v2's official rule and TextVQA's.

Both count a prediction as right to the degree that people gave it: for each set of nine of the ten answers it earns
min(1, matches / 3), and the score is the mean of these ten. They differ in how answers are normalised, and the odd
corners of both are kept, because published scores have them: see `vqa_accuracy` and `textvqa_accuracy`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

NUMBER_OF_ANSWERS = 10

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluators' pattern reads like "not after a digit" but only looks ahead, and their third argument to `sub`, meant
# as a flag, is the number of periods to remove.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32

# Words that get their apostrophes back when one of them is missing: "dont", "couldn'tve", "couldnt've".
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2 accuracy of one prediction, in [0, 1] (github.com/GT-Vision-Lab/VQA).

    Among its odd corners: when the ten answers are the same, nothing is normalised, so that "Yes." is then wrong for
    "yes"; a mark of punctuation becomes a space, but vanishes where it touches a space or the text holds a number like
    1,000; case and articles do not count, but only after normalisation.

    Args:
        prediction: what the model said.
        answers: the ten human answers.

    Raises:
        ValueError: there are not ten answers.
    """
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in _ten(answers)]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    return _leave_one_out(prediction, answers)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA accuracy of one prediction, in [0, 1]: the rule of M4C and EvalAI.

    Everything is normalised, also ten answers that are the same; before that case, commas and question marks go, and
    "'s" becomes a word of its own.

    Args:
        prediction: what the model said.
        answers: the ten human answers.

    Raises:
        ValueError: there are not ten answers.
    """
    return _leave_one_out(_normalize_like_m4c(prediction), [_normalize_like_m4c(answer) for answer in _ten(answers)])


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """VQA v2's normal form of an answer: no punctuation, lower case, numbers as digits, no articles, apostrophes."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    words = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if touches_space or in_number else " ")
    words = _PERIOD.sub("", words, count=_MOST_PERIODS)
    numbered = (_NUMBERS.get(word, word) for word in words.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def _normalize_like_m4c(text: str) -> str:
    return normalize_answer(_one_line(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _ten(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or len(answers) != NUMBER_OF_ANSWERS:
        given = f"the text {answers!r}" if isinstance(answers, str) else f"{len(answers)} answers"
        raise ValueError(f"VQA accuracy is defined on {NUMBER_OF_ANSWERS} human answers, but got {given}.")
    return answers


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean of min(1, matches / 3) over the sets that leave one answer out."""
    matches, total = sum(answer == prediction for answer in answers), len(answers)
    left_out_match = min(1.0, max(matches - 1, 0) / 3)
    left_out_other = min(1.0, matches / 3)
    return (matches * left_out_match + (total - matches) * left_out_other) / total
