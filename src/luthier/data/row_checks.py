"""What `luthier data lint` looks for in a single row. Each check holds its tongue where it is not sure.

Where a cleaner mends what a check finds, the check asks that cleaner what it would change, so that the remedy it names
always works.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from luthier.data.cleaning.code import blank_code
from luthier.data.cleaning.filters import repeated_share
from luthier.data.cleaning.language import detect_language
from luthier.data.cleaning.markup import strip_html
from luthier.data.cleaning.mojibake import fix_mojibake
from luthier.data.cleaning.personal import find_personal_data
from luthier.data.cleaning.rows import Text, texts_of
from luthier.data.examples import TrainingExample
from luthier.data.findings import Severity
from luthier.errors import shorten


@dataclass(frozen=True)
class Look:
    """A row as the checks look at it."""

    example: TrainingExample

    @cached_property
    def texts(self) -> list[Text]:
        return texts_of(self.example)

    @cached_property
    def answers(self) -> list[str]:
        """What the model is to say, in words: not the names of classes, not plain texts."""
        if self.example.is_plain_text:
            return []
        return [t.text for t in self.texts if t.side == "answer" and not t.place.startswith("references")]

    @cached_property
    def prompt(self) -> str:
        """What the last answer is an answer to."""
        asked = [m for m in self.example.to_chat_format() if m["role"] == "user"]
        return str(asked[-1].get("content") or "") if asked else ""

    @cached_property
    def asked(self) -> str:
        """All that is said to the model."""
        return "\n".join(t.text for t in self.texts if t.side == "prompt")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look for."""

    code: str
    severity: Severity
    message: str
    """Follows "N of M rows (…%): "."""
    remedy: str
    find: Callable[[Look], str | None]
    """What was found in a row, for the reader; None: nothing."""
    slow: bool = False
    """Takes a millisecond a row or more: of a large set, done for a part."""
    usual: float = 1.0
    """Above this share of the rows it is how these rows are, and nothing is said."""


def _empty_answer(look: Look) -> str | None:
    example = look.example
    if example.is_plain_text:
        return None if example.input.strip() else "''"
    for message in example.to_chat_format():
        if message["role"] == "assistant" and not message.get("tool_calls") and not str(message["content"]).strip():
            return repr(message["content"])
    return None


def _begins_blank(look: Look) -> str | None:
    return next((repr(answer[:40]) for answer in look.answers if answer[:1].isspace() and answer.strip()), None)


_PLACEHOLDER = re.compile(
    r"\W*(?:n/?a|none|null|nan|nil|undefined|todo|tbd|fixme|\[?(?:insert|your) answer(?: here)?\]?|answer here|"
    r"no ?output|<?no ?input>?|lorem ipsum.*|待补充|待定|暂无|暂无(?:答案|回答|数据)|此处填写.*|略)?\W*",
    re.IGNORECASE | re.DOTALL,
)


def _placeholder(look: Look) -> str | None:
    for answer in look.answers:
        # A symbol alone ("+", "🙂") answers many a question.
        if answer.strip() and _PLACEHOLDER.fullmatch(answer) and not re.fullmatch(r"\s*[^\w\s.。?？_-]+\s*", answer):
            return shorten(answer)
    return None


_LIST_ITEM = re.compile(r"\s*(?:[-*•·+|>#]|\d+[.)、]|[a-zA-Z][.)]|[（(]?[一二三四五六七八九十]+[)）、])")
# A last line of so many characters is a sentence: of letters, and of Chinese.
_SENTENCE, _CHINESE_SENTENCE = 100, 40


def is_finished(answer: str) -> bool | None:
    """Whether an answer in prose ends like one; None where it is no prose, or too short to tell."""
    if answer.count("```") % 2:
        return False
    text = answer.rstrip()
    last = text.rpartition("\n")[2]
    chinese = len(re.findall(r"[\u4e00-\u9fff]", last))
    if _LIST_ITEM.match(last) or not (chinese >= _CHINESE_SENTENCE or len(last) >= _SENTENCE):
        return None
    # An address, a hashtag or who said it may well stand last.
    if "```" in answer or re.search(r"(?:https?://|[#@])\S+$|[-–—~]\s*(?:[A-Z]\S*\s*){1,5}$", text):
        return None
    return not (text[-1].isalpha() or text[-1] in ",，、(（")


def _unfinished(look: Look) -> str | None:
    for answer in look.answers:
        if is_finished(answer) is False:
            return f"… {answer.rstrip()[-60:]!r}"
    return None


def _echo(look: Look) -> str | None:
    """Short prompts ("The sky is") are often begun sentences, which an answer may well repeat."""
    prompt = look.prompt.strip()
    if len(prompt) < 60 or not look.answers:
        return None
    answer = look.answers[-1].strip()
    return shorten(answer) if answer.startswith(prompt) else None


_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"(?! (?:engineer|researcher|developer|student|expert|company|startup))"
    r"|作为(?:一个|一名|一款|个)?(?:人工智能|AI|大?语言模型|大模型|聊天机器人)(?:语言模型|助手|模型|程序|机器人|系统|，|,)"
    r"|\bI(?:'m| am) (?:just |only )?an? (?:ai|language model)\b|我(?:只)?是(?:一个|一名)?(?:AI|人工智能|语言模型)",
    re.IGNORECASE,
)


def _boilerplate(look: Look) -> str | None:
    for answer in look.answers:
        # Later on it may be talk about language models.
        if found := _REFUSAL.search(answer[:200]):
            return shorten(answer[max(0, found.start() - 20) :])
    return None


_ABOUT_LANGUAGE = re.compile(
    r"translat|翻译|译[成为]|translit|拼音|pinyin|pronounc|发音|\b(?:in|into|to|from|of|speak|write|learn|say|means?)\s+"
    r"(?:english|chinese|mandarin|french|spanish|german|italian|portuguese|dutch|russian|japanese|korean|arabic|latin|"
    r"hindi|greek|swedish|turkish|vietnamese|thai)\b|languages?\b|英文|英语|中文|汉语|语言|法语|法文|德语|西班牙语|日语|"
    r"日文|韩语|俄语|单词|句子|语法|代码|code|python|javascript|sql|程序|函数|编写|网址|公式|缩写|名称|标题|口号",
    re.IGNORECASE,
)


def _language(look: Look) -> str | None:
    if not look.answers or _ABOUT_LANGUAGE.search(look.asked):
        return None
    asked, answered = detect_language(look.prompt), detect_language(blank_code(look.answers[-1]))
    if asked is None or answered is None or asked[0] == answered[0] or min(asked[1], answered[1]) < 0.9:
        return None
    return f"asked in {asked[0]}, answered in {answered[0]}: {shorten(look.answers[-1])}"


def _mojibake(look: Look) -> str | None:
    for text in look.texts:
        if not text.text.isascii() and (mended := fix_mojibake(text.text)) != text.text:
            at = next((i for i, (a, b) in enumerate(zip(text.text, mended, strict=False)) if a != b), 0)
            return f"{text.text[at : at + 30]!r} for {mended[at : at + 20]!r}"
    return None


_LOST = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯")


def _lost(look: Look) -> str | None:
    for text in look.texts:
        if not text.text.isascii() and (found := _LOST.search(text.text)):
            return _around(found)
    return None


def _around(found: re.Match[str]) -> str:
    return repr(found.string[max(0, found.start() - 20) : found.end() + 20])


_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|&(?:nbsp|amp|lt|gt|quot|#\d{2,5});")
_ABOUT_HTML = re.compile(
    r"html|css|xml|svg|web ?(?:page|site)|\btags?\b|javascript|react|angular|\bvue\b|\bphp\b|jsx|markup|browser"
    r"|网页|网站|标签|前端|浏览器",
    re.IGNORECASE,
)


def _html(look: Look) -> str | None:
    """Tags are what is asked for where the row is about web pages."""
    for text in look.texts:
        if "<" not in text.text and "&" not in text.text:
            continue
        outside = blank_code(text.text)
        found = _TAG.search(outside)
        if found and not _ABOUT_HTML.search(look.asked) and strip_html(text.text) != text.text.strip():
            return repr(text.text[max(0, found.start() - 20) : found.end() + 20])
    return None


# Addresses that belong to nobody: RFC 2606's, and those that texts make up.
_NOBODYS = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|domain|company|email|yourcompany|mail)\b|^(?:your|my|user|name|john|jane)"
    r"[\w.+-]*@|@.*\.example$",
    re.IGNORECASE,
)


def _personal(look: Look) -> str | None:
    for text in look.texts:
        for found in find_personal_data(text.text):
            value = found.value
            if found.kind == "email" and _NOBODYS.search(value):
                continue
            if found.kind == "ip" and not ipaddress.ip_address(value).is_global:
                continue
            # A report that is passed on must not spread what it warns of.
            return f"{found.kind}: {value[:2]}{'*' * min(8, len(value) - 2)}"
    return None


def _repetitive(look: Look) -> str | None:
    for answer in look.answers:
        if len(answer) >= 100 and repeated_share(answer) > 0.5:
            return shorten(answer)
    return None


_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|end_header_id|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜(?:User|Assistant|end▁of▁sentence)｜>"
    r"|^\s*###\s*(?:Instruction|Response|Human|Assistant)\s*:",
    re.MULTILINE,
)


def _markup(look: Look) -> str | None:
    for text in look.texts:
        if found := _MARKUP.search(text.text):
            return _around(found)
    return None


_REASONING = ("think", "thinking", "thought", "reasoning", "reflection", "answer")


def _reasoning(look: Look) -> str | None:
    for answer in look.answers:
        for tag in _REASONING if "</" in answer or "<think" in answer else ():
            opened, closed = answer.count(f"<{tag}>"), answer.count(f"</{tag}>")
            if opened != closed:
                return f"{opened} <{tag}>, {closed} </{tag}>: {shorten(answer)}"
        if answer.rstrip().endswith("</think>"):
            return f"nothing after </think>: … {answer.rstrip()[-40:]!r}"
    return None


CHECKS = (
    Check(
        "empty_answer", "error", "an answer is empty, so the model would learn to say nothing",
        "give the rows answers, or take them out", _empty_answer,
    ),
    Check(
        "answer_begins_blank", "info",
        "an answer begins with white space, which the model learns to say and which may join the chat template's own "
        "before it in one token, so that training reads other tokens than serving would (`luthier check` looks)",
        "set data.clean: [normalize_whitespace: {on: answer}], unless it is meant, as indentation may be",
        _begins_blank,
    ),
    Check(
        "placeholder_answer", "warning", "an answer is a placeholder",
        "write the answers, or take the rows out", _placeholder,
    ),
    Check(
        "answer_unfinished", "warning", "an answer breaks off in mid-sentence or in open code, and most do not",
        "complete them or take them out: the model would learn to stop there", _unfinished, usual=0.2,
    ),
    Check(
        "prompt_repeated", "warning", "an answer begins by repeating the whole prompt",
        "cut the prompt from the answers", _echo, usual=0.9,
    ),
    Check(
        "boilerplate", "warning", "an answer says \"as an AI language model\" (作为一个人工智能) or the like",
        "rewrite or take out the ones you would not want to hear from the tuned model", _boilerplate,
    ),
    Check(
        "language_differs", "warning", "an answer is in another language than its prompt",
        "check them; where it is meant, let the prompt ask for it", _language, slow=True, usual=0.5,
    ),
    Check(
        "mojibake", "error", "a text was decoded by the wrong encoding",
        "set data.clean: [fix_mojibake]", _mojibake,
    ),
    Check(
        "characters_lost", "error", "a text has replacement characters (U+FFFD, 锟斤拷): what stood there is lost",
        "read the source again in its own encoding, or take the rows out", _lost,
    ),
    Check(
        "html", "warning", "a text has HTML in it",
        "set data.clean: [strip_html]", _html,
    ),
    Check(
        "personal_data", "warning", "a text holds personal data or secrets, which the model may learn by heart",
        "set data.clean: [mask_personal_data]", _personal,
    ),
    Check(
        "repetitive", "warning", "an answer says the same over and over",
        "set data.clean: [filter_repetition], or mend the answers", _repetitive,
    ),
    Check(
        "chat_markup", "warning", "a text holds the control tokens or headings of a chat template",
        "take them out, or split such texts into turns (data.columns.messages)", _markup,
    ),
    Check(
        "reasoning_tags", "error", "reasoning tags do not pair, or nothing follows the reasoning",
        "close each tag that is opened, and answer after it", _reasoning,
    ),
)  # fmt: skip
