r"""Numbers in text: read whole, as exact fractions, or refused. No floats, no evaluation, linear time.

    parse_number   "1,080" -> 1080    "10\,000" -> 10000    "3 1/2" -> 7/2    "\frac{1}{2}" -> 1/2    "1.5e-06"
    only_number    the number of an answer: "18 eggs", "x = 18", "$18"; not "5 million", "not 5", "5 or 6"
    last_number    the last number of a text

A decimal comma ("3,14") cannot be told from a thousands separator in every case, and is refused.
"""

import itertools
import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 40
"""Longer numbers are not answers, and converting a million digits to an integer takes long."""
MAX_CHARACTERS = 4 * MAX_DIGITS
"""Of one number, with its separators and LaTeX commands."""

_COMMAS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}"  # the second: lakhs, 1,00,000
_WHOLE = rf"(?:{_COMMAS}|[0-9]{{1,3}}(?:_[0-9]{{3}})+|[0-9]+)"
_SPACED = r"[0-9]{1,3}(?: [0-9]{3})+"
_CURRENCY = r"[$\u00a2-\u00a5\u20a0-\u20c0]"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:{_CURRENCY} ?(?P<inner_sign>[-+]?) ?)?"
    rf"(?:(?:(?P<whole>{_WHOLE}) )?(?P<numerator>{_WHOLE}) ?/ ?(?P<denominator>{_WHOLE})"
    rf"|(?P<decimal>(?:{_SPACED}|{_WHOLE})(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}})| ?[*x\u00d7\u22c5\u00b7] ?10\^\(?(?P<power>[-+]?[0-9]{{1,3}})\)?)?)"
    rf"(?P<percent> ?%)?(?: ?{_CURRENCY})?\.?"
)
# A number in running text, well-formed or not: what is attached to its digits belongs to it ("2nd", "5-10", "10:30").
_OTHER_NUMERALS = (
    "\u00b2\u00b3\u00b9\u2070-\u2079\u2080-\u2089\u2150-\u218b\u2460-\u249b"  # superscripts, Roman, circled
    "\u5341\u767e\u5343\u4e07\u842c\u5104\u4ebf"  # ten, hundred, thousand, ten thousand, hundred million in Chinese
)
_IN_TEXT = re.compile(
    rf"(?<![A-Za-z0-9])(?:\.(?=[0-9]))?[0-9](?:[0-9A-Za-z.,_/:^*\u00d7'{_OTHER_NUMERALS}-]|(?<=[0-9]) (?=[0-9]))*"
    r"(?: ?[*x\u00d7\u22c5\u00b7] ?10\^\(?[-+]?[0-9]+\)?)?(?: ?%)?"
)
_MINUS = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
_SIGNS = _MINUS | str.maketrans("\uff0b\uff0c\uff0e\uff0f\uff05\u2044\u2215\u066b\u066c", "+,./%//.,")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+"
)
_GLUED_LETTERS, _SINGLE_LETTERS = set("glshLC"), set("mglshLCFaAVWNJ")
"""Units of one letter directly after a number (5m could be a million), and after a space."""
_SUFFIXES = {"st", "nd", "rd", "th", "bn", "mn", "tn", "mio", "mrd", "er", "ers"}
_SCALE_WORDS = """
hundred thousand million billion trillion quadrillion dozen score lakh crore milliard millon millón mill mio mrd bn mn
tn k tausend hundert mille mil mila milione milioni milhão milhões тысяч тысячи тысяча миллион миллиона
tysiąc tysiące tysięcy milion milionów mln bin milyon milyar ribu juta nghìn ngàn triệu tỷ elfu laki milioni ألف الف
مليون مليار 만 억 천 백 조
"""
_OTHER_WORDS = """
not no never nor or and to minus negative plus half third quarter squared cubed power factorial than under over least
most tenth fifth sixth seventh eighth ninth halve about around approximately wrong incorrect false is are was isn't
aren't wasn't if else but except between nicht nie kein keine pas non ni ne oder ou o und et y halb th st nd rd
"""
_UNITS_WHERE_LAST = {"times", "point"}
"""Units unless another word follows, "per" and the like apart: "5 times", "5 times a day"; not "5 point five"."""
_SCALES, _CHANGES = set(_SCALE_WORDS.split()), set(_OTHER_WORDS.split())
"""Words beside a number that make it another one."""
_CODES = (
    r"(?:(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|NZD|KRW|BRL|MXN|RUB|TRY|SEK|NOK|DKK|PLN|SGD|HKD|ZAR|NGN|KES|PHP)\b"
    r"|US\b|(?:Rs|kr)\b\.?) ?"
)
_LABEL = re.compile(
    rf"(?:#{{2,4}} ?)?(?:(?:so |thus |therefore |hence )?(?:the )?(?:final |correct |total )?"
    rf"(?:answer|total|result|sum)(?: is)? ?[:=]? ?)?"
    rf"(?:(?P<name>[^\W\d_]+(?: [^\W\d_]+){{0,3}})(?:_(?:\w|\{{\w+\}}))? ?[:=] ?)?=? ?"
    rf"(?:(?:[A-Z]{{1,2}}(?=\$))?{_CURRENCY})? ?(?:{_CODES})?",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"[-+]? ?[0-9.][0-9.,_/ ]*(?:[eE][-+]?[0-9]+\b|(?<=[0-9]) ?[*x\u00d7] ?10\^\(?[-+]?[0-9]+\)?)?(?: ?%)?"
)
_QUOTES = [("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("__", "__"), ("*", "*")]
_QUOTES += [("`", "`"), ('"', '"')]
_LENGTHS = (
    r"(?:[mcdk]?m|in|inch(?:es)?|ft|foot|feet|yd|yards?|mi|miles?|units?|s|sec|seconds?"
    r"|(?:kilo|centi|milli)?met(?:er|re)s?)"
)
_POWER_OF_UNIT = re.compile(rf"(?<![^\W\d_]){_LENGTHS}(?:\^?\(?[23]\)?(?![\w^])|[\u00b2\u00b3]| (?:squared|cubed)\b)")
"""m^2, cm³, "feet squared": a unit, where "5^2" and "5 squared" are other numbers."""
_MEASURE = (
    r"(?:[mck]?g|[mck]?l|[cmk]?m|lb|oz|gram|kilogram|lit(?:er|re)|met(?:er|re)|pound|ounce|gallon|inch|foot|watt|page)"
)
_COUNTED_MEASURE = re.compile(rf"-[A-Za-z]|[ -]?{_MEASURE} (?!of\b|per\b|in\b|a\b|and\b|each\b|for\b|long\b)[A-Za-z]")
"""After "12 300": twelve 300-gram bags, or 12,300 grams? Such a number is refused."""

_CHANGED_BEFORE = re.compile(
    r"(?:\b(?:not|never|minus|negative)|n't) $|\{$|(?:[\^\u221a\u00b1\u2213]|\\pm|\\mp) ?$", re.IGNORECASE
)
"""Before a number, it makes it another one: "not 5", "10 ^ 5", "3 \u00b1 5"."""


def parse_number(text: str) -> Fraction | None:
    r"""Return the value of a text that is one number and nothing else, or None.

    "1,080" -> 1080    "-3" -> -3    "3.0" -> 3    "$5" -> 5    "50%" -> 50    "3/4" -> 3/4    "18." -> 18
    "10 000", "10{,}000", "10'000" -> 10000    "3 1/2" -> 7/2    "1.5e3" -> 1500    "\dfrac{1}{2}" -> 1/2
    None for "", "1,0,8", "3,14", "nan", "²", "③", "1/0", "3 apples", and more than 40 digits.
    """
    if len(text) > 2 * MAX_CHARACTERS:
        return None
    return _value(_unwrapped(_plain(text)))


def tidy_number(text: str) -> str | None:
    r"""Return a number without currency and separators ("$1,080" -> "1080", "− 7" -> "-7"), None for other text.

    Fractions and powers of ten stay as they are written.
    """
    if len(text) > 2 * MAX_CHARACTERS:
        return None
    plain = _unwrapped(_plain(text))
    match = _NUMBER.fullmatch(plain)
    if match is None or _value(plain) is None:
        return None
    if match["decimal"] is None or match["exponent"] or match["power"]:
        return text.strip()
    sign = "-" if "-" in (match["sign"], match["inner_sign"]) else ""
    return sign + re.sub("[,_ ]", "", match["decimal"]) + ("%" if match["percent"] else "")


def numbers_in(text: str) -> list[str]:
    """Return everything in the text that starts like a number: "from 3, to $1,080." -> ["3", "$1,080"].

    `parse_number` returns None for one that is not a number by itself: "2nd", "5-10", "5 million".
    """
    plain = _plain(text)
    return [_with_context(plain, match) for match in _IN_TEXT.finditer(plain)]


def last_number(text: str) -> Fraction | None:
    """Return the value of the last number in the text, for scoring that ignores the format; None without one."""
    numbers = numbers_in(text)
    return parse_number(numbers[-1]) if numbers else None


def only_number(text: str) -> Fraction | None:
    """Return the value of an answer that is one number, with its unit or its name: "18 eggs", "x = 18", "$18".

    None for any other word: "5 million", "not 5" and "at least 5" are not 5.
    """
    if len(text) > 2 * MAX_CHARACTERS:
        return None
    plain = _unwrapped(_plain(text))
    value = _value(plain)
    if value is not None:
        return value
    label = _LABEL.match(plain)
    if label is None or any(map(_is_change, (label["name"] or "").lower().split())):
        return None
    rest = plain[label.end() :]
    number = _ANSWER.match(rest)
    if number is None or not _is_unit(rest[number.end() :], attached=number.group()[-1:].isdigit()):
        return None
    return _value(number.group().strip())


def without_notation(text: str) -> str:
    r"""Return a text with one spelling of its numbers, and without LaTeX, quotes and spaces: "5\text{ cm}" -> "5cm"."""
    return text if len(text) > 2 * MAX_CHARACTERS else re.sub(r"\s", "", _unwrapped(_plain(text)))


def _value(plain: str) -> Fraction | None:
    """Return the value of a number in plain characters."""
    if len(plain) > MAX_CHARACTERS or sum(character.isdigit() for character in plain) > MAX_DIGITS:
        return None
    match = _NUMBER.fullmatch(plain)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    if match["decimal"] is not None:
        exponent = int(match["exponent"] or match["power"] or 0)
        if abs(exponent) > MAX_DIGITS:
            return None
        value = Fraction(re.sub("[,_ ]", "", match["decimal"])) * Fraction(10) ** exponent
    else:
        parts = [re.sub("[,_]", "", match[name] or "0") for name in ("whole", "numerator", "denominator")]
        whole, numerator, denominator = map(int, parts)
        if denominator == 0 or (match["whole"] and numerator >= denominator):
            return None
        if any(part.startswith("0") and part != "0" for part in parts):  # a date, or the groups of a number
            return None
        value = whole + Fraction(numerator, denominator)
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _plain(text: str) -> str:
    r"""Return the text with one spelling of digits, signs, separators and fractions.

    "− 7" -> "- 7"    "10{,}000" -> "10,000"    "10\,000" -> "10_000"    "3\frac{1}{2}" -> "3 1/2"    "3½" -> "3 1/2"
    """
    text = text.translate(_SIGNS)
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f]", _plain_character, text)
        text = re.sub(
            r"([*x\u00d7\u22c5\u00b7] ?10)([\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+)",
            lambda found: f"{found[1]}^{found[2].translate(_SUPERSCRIPTS)}",
            text,
        )
        text = re.sub("(?<=[0-9])['\u2019\u02bc\u00a0\u2007\u2009\u202f\u200a](?=[0-9])", "_", text)
        text = re.sub("[\u00a0\u2007\u2009\u202f\u200a]", " ", text)
    text = re.sub(r"(?<=[0-9])'(?=[0-9]{3})", "_", text)
    if re.search(r"[\\{~]", text):
        text = _without_latex(text)
    return text


def _plain_character(match: re.Match[str]) -> str:
    character = match.group()
    if character.isdecimal():
        return str(unicodedata.digit(character))
    parts = unicodedata.normalize("NFKC", character).split("\u2044") if character.isnumeric() else []
    if len(parts) == 2 and all(part.isdecimal() for part in parts):  # "½"
        before = match.string[match.start() - 1 : match.start()]
        after = match.string[match.end() : match.end() + 1]
        if not after.isdecimal():
            return f"{' ' if before.isdecimal() else ''}{parts[0]}/{parts[1]}"
    return character


def _without_latex(text: str) -> str:
    text = re.sub(r",\\!(?=[0-9])|\{,\}", ",", text)
    text = re.sub(r"(?<=[0-9])(?:\\[,!;: ]|~)(?=[0-9])", "_", text)
    text = text.replace("\\\\", " ")
    for _ in range(2):  # \boxed{\text{5}}
        text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dtc]?frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))", _plain_fraction, text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "\u00d7", text)
    text = re.sub(r"\^\{([-+]?[0-9]+)\}", r"^\1", text)
    text = re.sub(r"\^ ?\{?\\circ\}?|\\degree\b", "\u00b0", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    return re.sub(r"\\[,!;: ]|\\(?:left|right|displaystyle)\b|~", " ", text)


def _plain_fraction(match: re.Match[str]) -> str:
    top, bottom = ((match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip())
    parts = [re.fullmatch(rf"([-+]?) ?({_WHOLE})", part) for part in (top, bottom)]
    if parts[0] is None or parts[1] is None:
        return match.group()
    before = match.string[max(0, match.start() - 1) : match.start()]
    negative = (parts[0][1] == "-") != (parts[1][1] == "-")
    if negative and before.isdecimal():  # 3\frac{-1}{2}
        return match.group()
    return f"{' ' if before.isdecimal() else ''}{'-' if negative else ''}{parts[0][2]}/{parts[1][2]}"


def _unwrapped(text: str) -> str:
    r"""Return the text without the signs around it: $18$, \(18\), **18**, `18`, "18"."""
    text = text.strip()
    for opening, closing in _QUOTES:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def _with_context(text: str, match: re.Match[str]) -> str:
    """Return a number of the text with its sign and currency, and whatever around it changes its value."""
    found = match.group().rstrip(",./:*'-_^ ")
    start, end = match.start(), match.start() + len(found)
    suffix = re.search(r"[-/]?[A-Za-z][A-Za-z/]*$", found)
    number = found[: suffix.start()] if suffix else found
    if (
        suffix
        and not re.fullmatch(r".*[0-9][eE]", found)
        and _is_unit(suffix.group().lstrip("-/"), attached=suffix.group()[0].isalpha())
    ):
        found = number
    after = text[end : end + 40]
    if re.fullmatch(_SPACED, number) and _COUNTED_MEASURE.match(text[start + len(number) : start + len(number) + 40]):
        return text[start : end + 40]
    word = re.match(r"[ -]?([^\W\d_]+)", after)
    if word and _is_scale(word[1].lower()):
        return found + word.group()
    if re.match(r" (?:and|and a|and one) half\b|\\[a-z]|\^", after):
        return found + after[:8]
    before = text[max(0, start - 40) : start]
    currency = re.search(rf"{_CURRENCY} ?$", before)
    if currency:
        before, found = before[: currency.start()], currency.group().strip() + found
    sign = re.search(r"([-+])( *)$", before)
    if sign:
        ahead, before = before[: sign.start()], before[: sign.start()]
        last = ahead.rstrip(" ")[-1:]
        if not sign[2]:
            is_sign = not re.search(r"[\w)\]}%]$", ahead)
        elif not ahead.strip(" ") and start < 40 or re.match(r"[=:(<>\u2248\u2264\u2265]", last):
            is_sign = True
        elif re.match(r"[0-9)\]}%]", last):
            is_sign = False
        else:  # a dash between words, or the mark of a list
            return f"{sign[1]}?{found}"
        if is_sign:
            found = sign[1] + found
    if _CHANGED_BEFORE.search(before):
        return f"?{found}"
    return found


def _is_unit(text: str, attached: bool) -> bool:
    """Return whether the text after a number is at most four words of a unit, none of which changes the value.

    Args:
        text: "eggs", "km/h", " dollars per hour.".
        attached: The number ends in a digit, so that letters directly after it belong to it: "5k", "2nd".
    """
    text = _POWER_OF_UNIT.sub("meter", re.sub(r"[.!]$", "", text))
    if not text or text in ("'", '"', "\u2032", "\u2033"):  # feet and inches
        return True
    attached = attached and text[:1].isalpha()
    if attached and (letters := re.match(r"[^\W\d_]+", text)):
        glued = letters.group()
        if glued.lower() in _SUFFIXES or (len(glued) == 1 and glued < "\u2e80" and glued not in _GLUED_LETTERS):
            return False
    words = re.findall(r"[^\s/.,!()\u00b0\u00b7%-]+", text)
    if len(words) > 4 or "!" in text or any(character.isnumeric() for character in text):
        return False
    if any(len(word) == 1 and word.isascii() and word not in _SINGLE_LETTERS for word in words[attached:]):
        return False  # a variable
    for word, following in itertools.pairwise(words):
        if word.lower() in _UNITS_WHERE_LAST and following.lower() not in {"a", "an", "per", "each", "every", "in"}:
            return False
    return all(
        re.fullmatch(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", word) and not _is_change(word.lower().replace("\u2019", "'"))
        for word in words
    )


def _is_change(word: str) -> bool:
    return (
        word in _CHANGES
        or (word != "quarters" and word.rstrip("s") in _CHANGES)
        or word.endswith("n't")
        or _is_scale(word)
    )


def _is_scale(word: str) -> bool:
    singular = word.rstrip("s").removesuffix("th")
    return bool({word, singular} & _SCALES) or bool(re.search(r"(?:illion|illiard)(?:en|e|s|es)?$", word))
