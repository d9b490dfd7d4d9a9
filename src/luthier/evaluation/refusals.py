"""Answers that refuse, by what they say at their beginning, in English and Chinese."""

from __future__ import annotations

import re
from functools import cache

# What opens a sentence, then what refuses. Each is looked for where an answer, or a sentence of its beginning, begins.
_CANNOT = r"(?:can(?:no|['’])t|can not|could not|couldn['’]t|(?:am|['’]m) (?:not able|unable)|won['’]t|will not)"
_SORRY = r"(?:(?:i['’]m|i am)(?: very| so| really)? sorry|sorry|my apologies|i apologi[sz]e|unfortunately|regrettably)"
_HELP = (
    r"(?:help(?! but| myself| it\b)|assist|answer|provide|comply|fulfil+|engage|participate|generate|create|write|"
    r"discuss|share|support|offer|give (?:you|advice|information)|do that|tell you|respond|recommend)"
)
_NOT_ABLE = "(?:无法|不能|没办法|没有办法|不可以|不便|拒绝|没有能力|不具备)"
_ACT = (
    "(?:提供|回答|协助|帮助|帮你|帮您|满足|完成这|执行这|执行该|生成|讨论|参与|"
    "告诉|透露|处理|给出|继续|支持|为您|为你|给您|给你)"
)

PATTERNS: dict[str, tuple[str, ...]] = {
    "en": (
        # "I'm sorry, but I can't", "Unfortunately, as an AI, I am unable"
        rf"{_SORRY}[,.!;:]?(?: but| however)?,? (?:as an? [\w ]{{2,30}}, )?i ?{_CANNOT}\b",
        rf"{_SORRY}[,.!;:]? (?:but )?(?:that['’]s|this is|that is) (?:not )?something i ?{_CANNOT}\b",
        # "As an AI language model, I don't have opinions"; not "As an AI model, I can help"
        r"as an? (?:ai|artificial intelligence|large language model|language model)\b[^.!?\n]{0,60}?,? i ?"
        rf"(?:{_CANNOT}|do not|don['’]t|am not|['’]m not)\b",
        rf"i['’]?m (?:just|only) an? (?:ai|language model)\b[^.!?\n]{{0,60}}?\b(?:{_CANNOT}|do not|don['’]t)\b",
        # "I cannot help with that", "I'm not able to provide"
        rf"(?:but |however, )?i ?{_CANNOT}(?: to)? {_HELP}\b",
        r"i (?:must|have to|need to|will have to|would have to) (?:respectfully |politely )?(?:decline|refuse)\b",
        rf"i (?:respectfully |politely )?(?:decline|refuse) to {_HELP}\b",
        r"i (?:do not|don['’]t) (?:feel )?comfortable (?:with )?\w+ing\b",
        r"i(?:['’]m| am) not comfortable (?:with )?\w+ing\b",
        r"i (?:do not|don['’]t) have (?:the (?:ability|capability|capacity)|access) to\b",
        r"it (?:is|would be|['’]s) (?:not appropriate|inappropriate|unethical|illegal) for me to\b",
    ),
    "zh": (
        # 抱歉，我无法…；很遗憾，作为一个语言模型，我不能…
        rf"(?:非常|很|十分|真的)?(?:抱歉|对不起|不好意思|遗憾)[，,。！!：:\s]*[^。！？\n]{{0,24}}?"
        rf"(?:我|本模型|本助手)(?:还|暂时|目前)?{_NOT_ABLE}",
        # 作为一个人工智能，我没有…
        r"(?:我)?(?:作为|只是)(?:一个|一名|一款|一种)?(?:AI|人工智能|大型语言模型|大语言模型|语言模型|智能助手|虚拟助手)"
        rf"[^。！？\n]{{0,24}}?(?:{_NOT_ABLE}|不会提供|没有个人|没有权限)",
        rf"(?:但是?|恕|请原谅)?[，,]?我(?:还|暂时|目前|现在)?{_NOT_ABLE}(?:直接|继续)?{_ACT}",
        rf"(?:这个|该|此|您的|你的)(?:问题|请求|要求)[，,]?(?:恕)?我?{_NOT_ABLE}{_ACT}",
        rf"恕(?:我)?{_NOT_ABLE}",
        r"(?:无可奉告|恕难从命|我必须拒绝|我不得不拒绝)",
    ),
}
"""What a refusal says, by language: expressions that follow the beginning of a sentence, small and capital alike."""

# Of an answer, so much is read: who answers and then speaks of what could not be done does not refuse.
_BEGINNING = 160


def refuses(answer: str) -> bool:
    """Whether an answer turns its question down, by :data:`PATTERNS`: precise rather than greedy."""
    return _expression().search(answer.strip()[:_BEGINNING].replace("\n", " \n")) is not None


@cache
def _expression() -> re.Pattern[str]:
    every = "|".join(pattern for patterns in PATTERNS.values() for pattern in patterns)
    return re.compile(rf"(?:^|(?<=[.!?。！？\n])|(?<=[.!?,] )|(?<=[，；]))\W{{0,3}}(?:{every})", re.IGNORECASE)
