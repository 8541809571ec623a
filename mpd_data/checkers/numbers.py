r"""Read numbers as people and models write them.

Read are integers, decimals (`.5`, `5.`), powers of ten (`1e3`, `1.5*10^3`), fractions, mixed
numbers (`1 1/2`), thousands (`1,234`, `1 234`, `1'234`, `1.234.567`, `1.234,5`), per cent, scale
words (`5 million`), and all of these with a sign, a currency, a unit or a name (`x = 5`), in LaTeX
or Unicode. What may mean two things is not read: `1,5` (a decimal or a list), `5 or 6`, `3:4`,
`5 feet 3`, `(5)` (an accountant's minus). `1.234` has a decimal point.

Every repetition is bounded, so reading takes time in proportion to the text's length.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = (
    # With a decimal comma: only where points between the thousands show it.
    r"(?P<continental>[1-9]\d{0,2}(?:\.\d{3}){1,12},\d{1,40}|[1-9]\d{0,2}(?:\.\d{3}){2,12})"
    r"|(?P<whole>[1-9]\d{0,2}(?:(?:,\d{3}){1,12}|(?:[ '\u2019]\d{3}){1,12}(?!\s?/))(?!\d)"
    r"|\d{1,40}(?!\d))?(?P<decimals>\.\d{1,40})?"
)
_CURRENCY = (
    r"(?:(?:US|A|C|HK|NZ)?\$|[\u20ac\u00a3\u00a5\u20b9\u20a9]"
    r"|(?:USD|EUR|GBP|INR|CNY|JPY|Rs\.?)\s)\s?"
)
_END = r"(?![\d.,/]\d|\d|\s?/)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]\s?)?(?:{_CURRENCY})?(?P<inner>[-+])?"
    rf"(?:10\s?\^\s?\{{?(?P<power>[-+]?\d{{1,4}})\}}?(?!\d)"
    rf"|(?:{_DIGITS})(?!\d|[,'\u2019]\d)"
    r"(?:[eE](?P<e>[-+]?\d{1,4})(?!\d)"
    r"|\s?[\u00d7xX*\u00b7]\s?10\s?\^\s?\{?(?P<times>[-+]?\d{1,4})\}?(?!\d)"
    rf"|\s?/\s?(?P<denominator>\d{{1,40}}){_END}"
    rf"|\s{{1,2}}(?P<over>\d{{1,9}})\s?/\s?(?P<under>\d{{1,9}}){_END})?)"
    r"(?P<scale>\s{0,4}(?i:hundred|thousand|million|billion|trillion)s?\b)?"
    r"(?P<percent>\s?(?:%|(?i:per\s?cent)\b))?"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGEST_POWER = 400

_NAME = re.compile(
    r"(?:\\?[A-Za-z]{1,20}(?:_\{?\w{1,3}\}?)?(?:\(\w\))?\s{0,4})?(?:=|\\approx\b|\u2248)\s{0,4}"
    r"(?=[-+$\d.\u20ac\u00a3])"
)
# What may follow a number: its unit or the rest of the sentence, but no more mathematics.
_UNIT_NAME = (
    r"(?:[kcmdn\u03bc]?m|in|ft|yd|mi|h|hr|min|m?s|sec|[kmM]?g|lb|[mkc]?[lL]|units?|inch|inches|foot"
    r"|feet|met(?:er|re)s?|miles?|hours?|seconds?)"
)
_POWER = r"(?:\s?\^\s?\{?-?[123]\}?|[23]\b)"
_UNIT = re.compile(
    rf"(?:\s{{1,4}}|(?=[A-Za-z]{{2}})){_UNIT_NAME}{_POWER}?(?:\s?/\s?{_UNIT_NAME}{_POWER}?)?"
    r"[.;:!)]?\s{0,4}$"
    r"|\s{0,4}(?:$|\u00b0\s?[CFK]?(?:\s{0,4}$|[.;:!)](?:\s|$)|\s[^\W\d])"
    r"|[\u20ac$\u00a3\u00a5\u20b9](?:\s|[.;:!)]|$)"
    r"|[.;:!)](?:\s|$)|,\s(?!\s?[-+$]?\d|[A-Za-z]{1,20}\s?=))"
)
# A word after a number; a single letter, or two, only where they are no variables.
_WORD = re.compile(
    r"(?:\s{1,4}|(?=[A-Za-z]{2}|[mgshL]\b))"
    r"(?!(?i:and|or|to|plus|minus|times|over|out|squared|cubed|mod|pi|sqrt|sin|cos|tan|log|ln|exp"
    r"|remainder|rem|choose|factorial|dozens?|lakhs?|crores?|hundred|thousand|[mbtr]+illions?|half|halves|thirds?|fourths?"
    r"|(?:fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?"
    r"|ab|abc|bc|ac|cd|xy|yz|xz|xyz|pq|mn|rs|uv)\b)"
    r"(?P<word>[aAI](?=\s{1,4}[A-Za-z]{2})|[mgshlLNJWVAKCFd](?![\w^(])|(?:[^\W\d]|\.){2,40})"
)
# A calculation that goes on after a word, and a second number.
_GOES_ON = re.compile(r"\s{0,4}(?:[+*=^<>\u00d7\u00f7\u00b1\\]|-(?![A-Za-z])|/\s?\d)")
_SECOND = re.compile(
    r"\s{0,4}(?:,?\s{0,4}and\s{1,4}(?:[A-Za-z]{1,20}\s?=\s?)?|,\s{0,4})?[(\[]?[-+$]?\d"
)
_PREPOSITIONS = frozenset(
    ("because", "since", "as", "in", "for", "after", "with", "from", "at", "on", "if", "when")
)

_LATEX_FRACTION = re.compile(
    r"(?P<before>\d\s?)?\\[dtc]?frac\s?(?:\{\s?(?P<sign>-?)\s?(?P<a>[\d,]{1,40})\s?\}|(?P<a1>\d))"
    r"\s?(?:\{\s?(?P<b>[\d,]{1,40})\s?\}|(?P<b1>\d))"
)
_REPEATING = re.compile(
    r"(?<![\d.])(?P<whole>\d{1,12})\.(?P<first>\d{0,12})"
    r"\\overline\s?\{(?P<again>\d{1,12})\}(?!\d)"
)
_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf"
    r"|boldsymbol|bm|underline|emph|mbox|operatorname|boxed|fbox|(?:text)?color\s?\{\w{1,20}\})"
    r"\s?\{([^{}]{0,500})\}"
)
_LATEX_FORM = re.compile(
    r"\\(?:displaystyle|large|Large|LARGE|huge|Huge|color\s?\{\w{1,20}\}(?!\s?\{))(?![A-Za-z])"
)
_LATEX = {
    "\\$": "$", "{,}": ",", "{.}": ".", "\\!": "", "\\,": " ", "\\;": " ", "\\:": " ", "\\ ": " ",
    "~": " ", "\\quad": " ", "\\%": "%", "\\left": "", "\\right": "", "\\times": "\u00d7",
    "\\cdot": "\u00b7", "^{\\circ}": "\u00b0", "^\\circ": "\u00b0", "^{\\degree}": "\u00b0",
    "\\circ": "\u00b0", "\\degree": "\u00b0", "\\euro": "\u20ac", "\\pounds": "\u00a3",
    "\\dots": "\u2026", "\\ldots": "\u2026",
}  # fmt: skip
_LATEX_ANY = re.compile("|".join(re.escape(old) for old in sorted(_LATEX, key=len, reverse=True)))
_MINUS = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
_SUPERSCRIPTS = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,4}")
_WRAPPINGS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("{", "}"), ('"', '"'))
# Markdown's bold, italics and code. `2**3` and `a_1` are none.
_MARKED = re.compile(
    r"(?<![\w*`])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*_`])([^*`]{0,499}?[^\s*_`])\1(?![\w*`])"
)


@dataclass(frozen=True)
class Number:
    """A number in a text. `text`: as it stands there, without currency's or unit's words but with
    per cent and scale, in plain Unicode; `end`: where it ends in the plain text."""

    value: Fraction
    is_percent: bool
    text: str
    end: int

    def same(self, other: "Number") -> bool:
        """Return whether both mean the same. 50% is 0.5, and also 50, since a problem may ask for
        the number of per cent."""
        if self.value == other.value:
            return True
        if self.is_percent == other.is_percent:
            return False
        return (
            self.value == other.value * 100 if self.is_percent else self.value * 100 == other.value
        )


def plain_unicode(text: str) -> str:
    """Return the text with all digits, fractions, minus signs, superscripts and spaces in one
    spelling: `１½` is `1 1/2`, `10³` is `10^3`."""
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    plain: list[str] = []
    for char in text:
        if unicodedata.decomposition(char).startswith("<fraction>"):
            fraction = unicodedata.normalize("NFKC", char).replace("\u2044", "/")
            plain.append(f" {fraction}" if plain and plain[-1][-1:].isdigit() else fraction)
        elif char.isdecimal():
            plain.append(str(unicodedata.decimal(char)))
        else:
            plain.append(unicodedata.normalize("NFKC", char))
    return "".join(plain).translate(_MINUS).replace("\u2044", "/")


def unmarked(text: str) -> str:
    """Return the text without Markdown's marks of bold, italics and code."""
    return _MARKED.sub(r"\2", text)


def plain_text(text: str) -> str:
    """Return the text without Markdown's marks and LaTeX's of text, space, currency, fractions."""
    text = _unwrapped(unmarked(plain_unicode(text)).strip())
    text = _LATEX_ANY.sub(lambda match: _LATEX[match[0]], _LATEX_FORM.sub("", text))
    for _ in range(3):  # \boxed{\textbf{5}}
        text, count = _LATEX_TEXT.subn(r"\1", text)
        if not count:
            break
    text = _LATEX_FRACTION.sub(_fraction, _unwrapped(text.strip()))
    return _REPEATING.sub(_repeating, text)


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPINGS:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip():
            text = inner.strip()
    return text


def _repeating(match: re.Match[str]) -> str:
    first, again = match["first"], match["again"]
    numerator = int(match["whole"] + first + again) - int(match["whole"] + first)
    return f"{numerator}/{10 ** len(first) * (10 ** len(again) - 1)}"


def _fraction(match: re.Match[str]) -> str:
    numerator, denominator = match["a"] or match["a1"], match["b"] or match["b1"]
    text = f"{match['sign'] or ''}{numerator}/{denominator}".replace(",", "")
    if match["before"] is None:
        return text
    return f"{match['before'].strip()} {text}"


def find_number(text: str, alone: bool = False) -> Number | None:
    """Return the number that a plain text states; None if it states none, or more than one. With
    `alone` nothing may stand beside it, not even a unit."""
    start = 0
    if not alone and (named := _NAME.match(text)):
        start = named.end()
    bracketed = re.match(r"\(\s?-[^()]{1,60}\)", text[start : start + 64])
    if bracketed and not alone:
        inner = bracketed[0][1:-1].strip()
        text = f"{text[:start]}{inner}{text[start + bracketed.end() :]}"
    match = _NUMBER.match(text, start)
    if match is None or (value := _value(match)) is None:
        return None
    end = match.end()
    fits = not text[end:].strip(" .") if alone else _may_follow(text, end)
    return Number(value, match["percent"] is not None, match[0].strip(), end) if fits else None


def _may_follow(text: str, end: int) -> bool:
    if _UNIT.match(text, end):
        return True
    word = _WORD.match(text, end)
    if word is None or _GOES_ON.match(text, word.end()):
        return False
    return word["word"] in _PREPOSITIONS or not _SECOND.match(text, word.end())


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of _NUMBER; None if it is none (1/0, a power beyond all use)."""
    if match["sign"] and match["inner"]:
        return None
    if match["power"]:
        value: Fraction | None = _power_of_ten(match["power"])
    elif match["continental"]:
        value = Fraction(match["continental"].replace(".", "").replace(",", "."))
    else:
        whole, decimals = match["whole"] or "", match["decimals"] or ""
        if not whole and not decimals:
            return None
        value = Fraction(f"{re.sub(r'[^0-9]', '', whole) or 0}{decimals}")
        value = _continued(match, value)
    if value is None:
        return None
    if match["scale"]:
        value *= 10 ** _SCALES[match["scale"].strip().lower().removesuffix("s")]
    return -value if "-" in (match["sign"] or match["inner"] or "") else value


def _continued(match: re.Match[str], value: Fraction) -> Fraction | None:
    """Return the value with the power or fraction that follows its digits."""
    power = match["e"] or match["times"]
    if power:
        factor = _power_of_ten(power)
        return None if factor is None else value * factor
    if match["denominator"]:
        denominator = int(match["denominator"])
        return value / denominator if denominator else None
    if match["over"]:
        over, under = int(match["over"]), int(match["under"])
        if over >= under or match["decimals"]:
            return None  # 2 10/3 is no mixed number
        return value + Fraction(over, under)
    return value


def _power_of_ten(power: str) -> Fraction | None:
    exponent = int(power)
    return Fraction(10) ** exponent if abs(exponent) <= _LARGEST_POWER else None
