"""Whether a rewritten text is a variant of the one it was made from, or something else that a model said."""

from __future__ import annotations

import re
import unicodedata

from luthier.data.augmentation.text import Field, dominant_language

REASONS = {
    "empty": "nothing came back",
    "unchanged": "the text came back as it was",
    "meta": "the model talks about its answer (Here is the paraphrase: …)",
    "refusal": "the model declines",
    "language": "it is in another language",
    "length": "it is far longer or shorter",
    "numbers": "a number is lost, changed or new",
    "fixed": "code, a link, a placeholder or a quote is lost",
    "answer": "the answer stands in the prompt and no longer in the variant",
    "repeated": "another variant of the row says the same",
}

_THINKING = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_WRAPPED = re.compile(r"\A\s*<text>(.*?)</text>\s*\Z", re.DOTALL)
_META = re.compile(
    r"""\A\W*(?:here(?:'s|’s|\ is|\ are)\b.{0,80}?:|sure\b[,!.]|certainly[,!.]|of\ course[,!.]|okay[,!.]
    |(?:re(?:written|phrased)|paraphrased?|translation|translated)\b.{0,40}?:
    |(?:以下|下面)(?:是|为).{0,30}?[:：]|好的[，,。！]|当然[，,。！可]|(?:改写|译文|翻译|重写)(?:后|如下|结果)?.{0,12}?[:：])""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_REFUSAL = re.compile(
    r"""\A\W*(?:i'?m\ sorry|i\ am\ sorry|sorry,|i\ (?:can(?:no|')t|am\ (?:not\ able|unable)|won't)\b
    |as\ an?\ (?:ai|language\ model)
    |很?抱歉|对不起|我(?:不能|无法)|作为(?:一个|一名)?(?:ai|人工智能|语言模型))""",
    re.IGNORECASE | re.VERBOSE,
)
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


def cleaned(answer: str) -> str:
    """A model's answer without its thinking, the tags that the text was sent in, and the space around it."""
    answer = _THINKING.sub("", answer)
    match = _WRAPPED.match(answer)
    return (match.group(1) if match else answer).strip()


def talks_about_itself(text: str) -> bool:
    """Whether a text is what a model says about its answer, or in place of one."""
    return bool(_META.match(text)) or declines(text)


def declines(text: str) -> bool:
    """Whether a text is a refusal to answer."""
    return bool(_REFUSAL.match(text))


def fault(
    text: str,
    variant: str,
    answer: str = "",
    *,
    shortest: float = 0.4,
    longest: float = 2.5,
    same_language: bool = True,
) -> str | None:
    """Why a text is no variant of another one, a key of :data:`REASONS`; None where it is one.

    Args:
        text: the text that was rewritten.
        variant: what it became.
        answer: the example's answer; where it is short and stands in the text, it must stand in the variant.
        shortest: least length, as a share of the text's.
        longest: greatest length.
        same_language: whether both must be in one language.
    """
    if not variant.strip():
        return "empty"
    if _bare(variant) == _bare(text):
        return "unchanged"
    if _META.match(variant) and not _META.match(text):
        return "meta"
    if declines(variant) and not declines(text):
        return "refusal"
    if same_language and dominant_language(variant) != dominant_language(text):
        return "language"
    # A few characters more or less are no measure of a text of ten.
    if len(variant) < shortest * len(text) - 10 or len(variant) > longest * len(text) + 20:
        return "length"
    if _numbers(text) != _numbers(variant):
        return "numbers"
    if any(span not in variant for span in Field(text).fixed_texts()):
        return "fixed"
    short = answer.strip()
    if 0 < len(short) <= 60 and short.lower() in text.lower() and short.lower() not in variant.lower():
        return "answer"
    return None


def _numbers(text: str) -> set[str]:
    """The numbers of a text, whatever their digits' width and thousands' commas."""
    plain = unicodedata.normalize("NFKC", text)
    return {re.sub(r",(?=\d{3}\b)", "", number) for number in _NUMBER.findall(plain)}


def _bare(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())
