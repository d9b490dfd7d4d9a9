"""Personal data in a text: found, and masked by placeholders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from math import log2
from typing import Literal, get_args

Kind = Literal["credentials", "key", "password", "email", "id_card", "bank_card", "phone", "ip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Where two findings overlap, the one whose kind comes first wins."""


@dataclass(frozen=True, slots=True)
class PersonalData:
    """A place in a text that says something personal: ``text[start:end] == value``."""

    kind: Kind
    start: int
    end: int
    value: str


def find_personal_data(text: str, *, kinds: Sequence[Kind] = KINDS) -> list[PersonalData]:
    """Personal data of these kinds, in the text's order, none overlapping.

    Precision comes before recall: numbers must be well-formed (checksums, dates, allotted prefixes) and stand alone,
    not in a sum or price, nor be called an order number or a version.

    - ``credentials``: user and password in a URL.
    - ``key``: API keys of known shape (OpenAI, Anthropic, AWS, GitHub, GitLab, Google, Slack, Stripe, Hugging Face,
      npm, Alibaba and Tencent Cloud), JSON web tokens, PEM private keys, and ``api_key=…`` whose value looks like one.
    - ``password``: the same after password, pwd or 密码.
    - ``email``.
    - ``id_card``: the Chinese identity number of 18 characters (GB 11643-1999).
    - ``bank_card``: 14 to 19 digits with a known prefix and a right check digit (ISO/IEC 7812).
    - ``phone``: Chinese mobile and fixed lines, North American numbers, and those with + and a country code.
    - ``ip``: IPv4 and IPv6 but for loopback, masks and four single digits, which mostly are section numbers.
    """
    found: list[PersonalData] = []
    for kind in KINDS:
        if kind in kinds and _MAY_HOLD[kind](text):
            for start, end in _FINDERS[kind](text):
                if not any(start < f.end and f.start < end for f in found):
                    found.append(PersonalData(kind, start, end, text[start:end]))
    return sorted(found, key=lambda f: f.start) if len(found) > 1 else found


class Masker:
    """Puts placeholders in place of personal data; the same value gets the same one in all texts it is given.

    Args:
        kinds: what is masked.
        numbered: tell values apart, as in [PHONE_1] and [PHONE_2].
    """

    def __init__(self, kinds: Sequence[Kind] = KINDS, numbered: bool = False) -> None:
        self.kinds = kinds
        self.numbered = numbered
        self.counts: dict[str, int] = {}
        """How often each kind was masked."""
        self._seen: dict[tuple[Kind, str], int] = {}
        self._last: dict[Kind, int] = {}

    def __call__(self, text: str) -> str:
        """The text with placeholders."""
        found = find_personal_data(text, kinds=self.kinds)
        while found:
            parts: list[str] = []
            at = 0
            for item in found:
                parts += (text[at : item.start], self._placeholder(item, text))
                at = item.end
                self.counts[item.kind] = self.counts.get(item.kind, 0) + 1
            text = "".join((*parts, text[at:]))
            # Taking one out may leave another standing alone.
            found = find_personal_data(text, kinds=self.kinds)
        return text

    def _placeholder(self, item: PersonalData, text: str) -> str:
        if not self.numbered:
            return f"[{item.kind.upper()}]"
        plain = item.value if item.kind == "key" else re.sub(r"[^\w@.:+]|_", "", item.value).lower()
        key = (item.kind, plain.removeprefix("+86").removeprefix("0086") if item.kind == "phone" else plain)
        if key not in self._seen:
            # Numbers that the text itself came with are taken.
            taken = (int(n) for n in re.findall(rf"\[{item.kind.upper()}_(\d{{1,6}})\]", text))
            self._last[item.kind] = self._seen[key] = max(self._last.get(item.kind, 0), *taken, 0) + 1
        return f"[{item.kind.upper()}_{self._seen[key]}]"


def mask_personal_data(text: str, *, kinds: Sequence[Kind] = KINDS, numbered: bool = False) -> str:
    """Put [PHONE], [ID_CARD], [EMAIL], [BANK_CARD], [IP], [KEY], … in place of what is personal.

    Numbers are masked where they are well-formed (checksum, date, allotted prefix) and stand alone, not in sums, prices
    or order numbers. It's a filter, not a guarantee: names and addresses stay.

    Args:
        text: any text.
        kinds: what is masked: phone, id_card, email, bank_card, ip, key, password, credentials (those in a URL).
        numbered: tell values apart: the same value is [PHONE_1] in prompt and answer, another one [PHONE_2].
    """
    return Masker(kinds, numbered)(text)


Spans = Iterator[tuple[int, int]]

# Every telephone, identity and card number has nine digits, with little between them.
_LONG_NUMBER = re.compile(r"[0-9][0-9 .()-]{8,}")
_LONG_NUMBER_WIDE = re.compile(r"[0-9][0-9 .()（）-]{8,}")


@lru_cache(maxsize=1)
def _holds_long_number(text: str) -> bool:
    found = (_LONG_NUMBER if text.isascii() else _LONG_NUMBER_WIDE).findall(text)
    return bool(found) and any(sum(map(str.isdigit, number)) >= 9 for number in found)


@lru_cache(maxsize=1)
def _lower(text: str) -> str:
    """In small letters, each at the place it had."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if c.isascii() else c for c in text)


def _holds_any(text: str, parts: Sequence[str]) -> bool:
    for part in parts:  # noqa: SIM110 - any() of a generator takes twice the time, and this runs for every text
        if part in text:
            return True
    return False


_CREDENTIALS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,20}://([^\s/@:\[\]\"'<>{}]{1,64}:[^\s/@\[\]\"'<>{}$]{1,128})@(?=[\w\[])"
)


def _credentials(text: str) -> Spans:
    for match in _CREDENTIALS.finditer(text):
        yield match.span(1)


# Beginnings and shapes as their issuers publish them (GitHub's secret scanning lists most).
_KEYS = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:
      sk-(?:proj-|ant-|svcacct-|or-v1-)?(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,200}
    | (?:AKIA|ASIA)[A-Z2-7]{16}
    | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_[A-Za-z0-9_]{60,255} | glpat-[A-Za-z0-9_-]{20,64}
    | AIza[A-Za-z0-9_-]{35} | xox[abprs]-[A-Za-z0-9-]{10,250} | [sr]k_(?:live|test)_[A-Za-z0-9]{16,250}
    | hf_[A-Za-z]{34} | LTAI[A-Za-z0-9]{12,20} | AKID[A-Za-z0-9]{32} | npm_[A-Za-z0-9]{36}
    | eyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{10,2000}
    )(?![A-Za-z0-9_-])""",
    re.VERBOSE,
)
# AKIA, ASIA, AKID, AIza and LTAI.
_KEY_START = re.compile("A[KSI]")
_KEY_STARTS_BY = {
    "_": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "k_live_", "k_test_", "hf_", "npm_"),
    "-": ("sk-", "glpat-", "xox", "-----BEGIN"),
}
_PEM = re.compile(
    r"-----BEGIN ((?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?)-----[A-Za-z0-9+/=\s:,\\.-]{1,20000}?-----END \1-----"
)
# The value after a key's or a password's name.
_VALUE = re.compile(
    r"""(?:[_\- ]?(?:access[_\- ]?)?key)?["']?[ \t]{0,3}(?:=>|:=|[=:：]|is\b|是|为)[ \t]{0,3}["'`]?
    (?P<value>[^\s"'`,;，。；、<>(){}\[\]]{6,512})(?<![.!?:])""",
    re.VERBOSE | re.IGNORECASE,
)
_KEY_NAMES = ("key", "token", "secret", "密钥", "令牌")
_WHOSE_KEY = re.compile(r"(?:api|access|secret|private|auth)[_\- ]?\Z", re.IGNORECASE)
_PASSWORD_NAMES = ("password", "passwd", "pwd", "密码", "口令")
_STAND_INS = re.compile(r"your|example|placeholder|dummy|xxx|\*\*\*|\.\.\.|…|<|changeme|redacted|^\$|^%", re.IGNORECASE)


def _keys(text: str) -> Spans:
    for pattern in (_PEM, _KEYS):
        for match in pattern.finditer(text):
            yield match.span()
    for name, end in _names(text, _KEY_NAMES):
        if name != "key" or _WHOSE_KEY.search(text[max(0, end - 12) : end - 3]):
            yield from _secret_after(text, end)


def _may_hold_key(text: str) -> bool:
    return (
        "eyJ" in text
        or _KEY_START.search(text) is not None
        or ("_" in text and _holds_any(text, _KEY_STARTS_BY["_"]))
        or ("-" in text and _holds_any(text, _KEY_STARTS_BY["-"]))
        or _holds_any(_lower(text), _KEY_NAMES)
    )


def _passwords(text: str) -> Spans:
    for _, end in _names(text, _PASSWORD_NAMES):
        yield from _secret_after(text, end)


def _names(text: str, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Where these names end in a text, in capitals or not."""
    lower = _lower(text)
    for name in names:
        at = lower.find(name)
        while at >= 0:
            yield name, at + len(name)
            at = lower.find(name, at + 1)


def _secret_after(text: str, at: int) -> Spans:
    match = _VALUE.match(text, at)
    if match and _looks_secret(match["value"]):
        yield match.span("value")


def _looks_secret(value: str) -> bool:
    """Letters and digits mixed, no code (os.environ, f(x)), no stand-in for a key."""
    if _STAND_INS.search(value) or not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    if re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", value) or "://" in value or not value.isascii():
        return False
    return len(value) >= 8 and _bits(value) >= 2.5


def _bits(value: str) -> float:
    """Entropy of the characters, in bits a character."""
    size = len(value)
    return -sum(n / size * log2(n / size) for n in map(value.count, set(value)))


_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/=-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?"
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}([A-Za-z]{2,24}))(?![A-Za-z0-9_-]|\.[A-Za-z0-9])"
)
_FILE_ENDINGS = frozenset(("png", "jpg", "jpeg", "gif", "webp", "svg", "css", "js", "py", "json", "html", "xml", "txt"))


def _emails(text: str) -> Spans:
    for match in _EMAIL.finditer(text):
        # git@github.com:owner/name is an address of a repository, logo@2x.png a file.
        repository = match.group().startswith("git@") and text[match.end() : match.end() + 1] == ":"
        if match[2].lower() not in _FILE_ENDINGS and not repository:
            yield match.span()


# A number stands alone: no digit, letter, decimal point, currency or sign of arithmetic at its ends.
_ALONE = r"(?<![0-9A-Za-z_$¥￥€£%#=*×/^<>])(?<![0-9][.,+\-*/×÷:])(?<![=+*×÷<>] )"
_ENDS = r"(?![0-9A-Za-z_%=*×÷^<>$€])(?![.,:\-/][0-9])(?! [=+*/×÷<>])"
_CALLED = re.compile(
    r"(?:订单|单号|运单|流水号|编号|序列号|货号|快递|工单|发票|order|invoice|tracking|isbn|issn|serial|ticket|reference|ref|sku|no\.|id)"
    r"[^\n。，,;；]{0,12}\Z",
    re.IGNORECASE,
)
_MEASURED = re.compile(
    r"\s?(?:元|块|万|亿|个|人|次|米|千米|公里|千克|吨|年|字节|美元|dollars?|people|years?|miles?|meters?|bytes|times|users)(?![A-Za-z])"
)


def _stands_for_a_count(text: str, start: int, end: int) -> bool:
    """Whether the words around a number say that it is an order's number or an amount."""
    return bool(_CALLED.search(text[max(0, start - 24) : start]) or _MEASURED.match(text, end))


_ID_CARD = re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])")
_PROVINCES = frozenset(
    (*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83)
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def _id_cards(text: str) -> Spans:
    for match in _ID_CARD.finditer(text):
        if is_id_card(match.group()):
            yield match.span()


def is_id_card(number: str) -> bool:
    """Whether 18 characters are a Chinese identity number: province, date of birth, check digit (GB 11643-1999)."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    if int(number[:2]) not in _PROVINCES or not 1850 <= born.year <= date.today().year:
        return False
    check = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number, strict=False)) % 11
    return "10X98765432"[check] == number[17].upper()


_CARD = re.compile(rf"{_ALONE}[3-69](?:[0-9]{{13,18}}|[0-9]{{3}}(?:[ -][0-9]{{4}}){{3}}(?:[ -]?[0-9]{{3}})?){_ENDS}")
_AMEX = re.compile(rf"{_ALONE}3[47][0-9]{{2}}[ -][0-9]{{6}}[ -][0-9]{{5}}{_ENDS}")
# Prefix and lengths by network, as ISO/IEC 7812's issuer numbers are in use; 9558 is ICBC's before UnionPay's 62.
_NETWORKS = (
    (re.compile("4"), (16, 19)),
    (re.compile("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),
    (re.compile("3[47]"), (15,)),
    (re.compile("62"), (16, 17, 18, 19)),
    (re.compile("6011|64[4-9]|65"), (16, 19)),
    (re.compile("35(?:2[89]|[3-8])"), (16, 19)),
    (re.compile("30[0-5]|3[689]"), (14,)),
    (re.compile("9558"), (19,)),
)


def _bank_cards(text: str) -> Spans:
    for pattern in (_CARD, _AMEX):
        for match in pattern.finditer(text):
            if is_bank_card(match.group()) and not _stands_for_a_count(text, *match.span()):
                yield match.span()


def is_bank_card(number: str) -> bool:
    """Whether digits, with or without blanks and hyphens, are a payment card's: prefix, length and check digit."""
    digits = re.sub("[ -]", "", number)
    if not any(prefix.match(digits) and len(digits) in lengths for prefix, lengths in _NETWORKS):
        return False
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0 and len(set(digits)) > 2


_MOBILE = re.compile(
    rf"(?:(?<![0-9A-Za-z])(?:\+|00)86[ -]?|{_ALONE})(?:13[0-9]|14[5-9]|15[0-35-9]|16[2567]|17[0-8]|18[0-9]|19[0-35-9])"
    rf"(?:[0-9]{{8}}|([ -])[0-9]{{4}}\1[0-9]{{4}}){_ENDS}"
)
# Area codes of one's own are 010, 02x, 03xx to 09xx; a hyphen, a blank or brackets set them apart.
_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z.+\-/])(?:(?:\+|00)86[ -]?)?"
    r"(?:\((?:010|02[0-9]|0[3-9][0-9]{2})\) ?|（(?:010|02[0-9]|0[3-9][0-9]{2})）|(?:010|02[0-9]|0[3-9][0-9]{2})[- ])"
    rf"[2-8](?:[0-9]{{6,7}}|[0-9]{{2,3}}[ -][0-9]{{4}}){_ENDS}"
)
# +, a country code and the rest in groups (ITU-T E.164: 15 digits at most).
# After a number or a lone letter, + adds.
_INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z+)=*/^\]}])(?<![0-9)\]}] )(?<![\s(=][A-Za-z] )\+([1-9][0-9]{0,2})"
    rf"(?:[ -]?\([0-9]{{1,4}}\)[ -]?|[ .-])?[0-9]{{1,14}}(?:[ .-][0-9]{{2,8}}){{0,5}}{_ENDS}"
)
# Not 400 and 800 and the like, which are firms' lines, in China too.
_AREA = "(?!400|8(?:00|33|44|55|66|77|88))[2-9][0-9]{2}"
_NORTH_AMERICAN = re.compile(
    rf"(?:(?<![0-9A-Za-z(.\-/+])(?:1[ .-])?\({_AREA}\) ?|{_ALONE}(?<![0-9][ .\-])(?:1[ .-])?{_AREA}([.-]))"
    rf"[2-9][0-9]{{2}}(?(1)\1|[-. ])[0-9]{{4}}{_ENDS}"
)
# Country codes in use, by their beginnings (ITU-T E.164 list of assigned codes).
_COUNTRY = re.compile(
    "1|20|21[1-368]|2[2-6]|27|29[0179]|3[0-469]|35|37[0-8]|38[0-35-79]|4[013-9]|42[013]|5[1-8]|50|59|6[0-6]|67[02-9]|68"
    "|69[0-2]|7|8[1246]|85[02356]|88[06]|9[0-58]|96[0-8]|97[0-7]|99[2-68]"
)


def _phones(text: str) -> Spans:
    for match in _MOBILE.finditer(text):
        if not match.group().endswith("0000000") and not _stands_for_a_count(text, *match.span()):
            yield match.span()
    for match in _LANDLINE.finditer(text):
        yield match.span()
    if "+" in text:
        for match in _INTERNATIONAL.finditer(text):
            digits = re.sub("[^0-9]", "", match.group())
            if 9 <= len(digits) <= 15 and _COUNTRY.match(digits) and not digits.endswith("00000"):
                yield match.span()
    for match in _NORTH_AMERICAN.finditer(text):
        if not _stands_for_a_count(text, *match.span()):
            yield match.span()


_IPV4 = re.compile(r"(?<![0-9A-Za-z.=_-])(?<![A-Za-z]/)[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_-]|\.[0-9])")
_VERSION = re.compile(
    r"(?:version|release|build|firmware|ver\.?|\bv|版本号?|固件|第|章|节|section|chapter|§)[\s:：]{0,3}\Z",
    re.IGNORECASE,
)
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:]|\.[0-9])")


def _ips(text: str) -> Spans:
    for match in _IPV4.finditer(text):
        if _is_address(match.group()) and not _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
            yield match.span()
    for match in _IPV6.finditer(text):
        groups = [g for g in match.group().split(":") if g]
        # dead::beef may be a name in C++ or Rust, 12:30:45 is a time.
        if len(groups) >= 3 and any(c.isdigit() for c in match.group()) and _is_address_6(match.group()):
            yield match.span()


def _is_address(found: str) -> bool:
    try:
        address = IPv4Address(found)
    except AddressValueError:
        return False
    octets = found.split(".")
    if all(len(octet) == 1 for octet in octets) or octets[0] in ("0", "255"):
        return False
    return not (address.is_loopback or address.is_multicast or octets[1:] == ["0", "0", "0"])


def _is_address_6(found: str) -> bool:
    try:
        address = IPv6Address(found)
    except AddressValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


_FINDERS: dict[Kind, Callable[[str], Spans]] = {
    "credentials": _credentials,
    "key": _keys,
    "password": _passwords,
    "email": _emails,
    "id_card": _id_cards,
    "bank_card": _bank_cards,
    "phone": _phones,
    "ip": _ips,
}
_THREE_OCTETS = re.compile(r"\.[0-9]{1,3}\.[0-9]")
# Quick looks: most texts hold nothing of the kind, and a million of them are looked at.
_MAY_HOLD: dict[Kind, Callable[[str], bool]] = {
    "credentials": lambda text: "@" in text and "://" in text,
    "key": _may_hold_key,
    "password": lambda text: _holds_any(_lower(text), _PASSWORD_NAMES),
    "email": lambda text: "@" in text,
    "id_card": _holds_long_number,
    "bank_card": _holds_long_number,
    "phone": _holds_long_number,
    "ip": lambda text: _THREE_OCTETS.search(text) is not None or text.count(":") >= 2,
}


def veil(text: str, kinds: Sequence[Kind] = KINDS) -> str:
    """The text with stars for all but the ends of what is personal, to be shown in a report: 13*******78."""
    for item in find_personal_data(text, kinds=kinds):
        ends = 2 if len(item.value) >= 10 else 1
        starred = item.value[:ends] + "*" * (len(item.value) - 2 * ends) + item.value[-ends:]
        text = text[: item.start] + starred + text[item.end :]
    return text
