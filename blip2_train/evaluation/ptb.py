"""Words of a caption as the captioning benchmarks count them, where there is no Java.

Their tokenizer is the Penn Treebank one of Stanford CoreNLP 3.4.1, lower-cased, with punctuation
dropped afterwards. This is a scanner with its rules, found by trying it: at each place the rule
that reaches furthest wins, the earlier one of two that reach equally far, and what no rule knows
(emoji, control characters) is dropped. Its odd corners are kept, since published scores have them:
brackets stay as `-lrb-`, pounds become `#` and euros `$`, `man.a` without a space is one word.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

# What the benchmarks drop after tokenising. Brackets are upper-case here and lower-case there.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def tokenize(caption: str) -> str:
    """A caption's words, separated by single spaces; "" where there are none.

    The original reads across line ends, so a caption that ends with an initial ("vitamin C.") may
    come out otherwise when the next one begins with "The"; here each stands alone.
    """
    return " ".join(word for word in scan(one_line(caption)) if word not in PUNCTUATION)


def one_line(caption: str) -> str:
    r"""The caption with every run of white space as one space, for tools that read lines.

    Line ends are those of Java's tools, too: `\x0b`, `\x0c`, and Unicode's separators; `\x85` is
    an ellipsis there.
    """
    return re.sub(r"[ \t\n\r\x0b\x0c\u2028\u2029]+", " ", caption).strip(" ")


def scan(line: str) -> list[str]:
    """The tokens of one line, punctuation included."""
    tokens: list[str] = []
    end, at = len(line), 0
    line += "\n"  # many rules ask what follows
    while at < end:
        if plain := _PLAIN.match(line, at):  # most words; the rules would find the same
            tokens.append(plain[1].lower())
            at = plain.end()
            continue
        best, reach = None, at
        for rule in _rules():
            match = rule.pattern.match(line, at)
            if match and match.end() > reach:
                best, reach, found = rule, match.end(), match.end(1)
        if best is None:
            at += 1
            continue
        found -= best.give_back
        # Spaces within a token (a telephone number, 1 1/2) do not divide it.
        token = best.write(line[at:found]).replace("\u00ad", "").replace(" ", "\u00a0").lower()
        if token:
            tokens.append(token)
        at = found
    return tokens


class _Rule(NamedTuple):
    pattern: re.Pattern[str]  # group 1 is the token, what is behind it must follow
    give_back: int  # characters at the token's end that begin the next one
    write: Callable[[str], str]


# A common word between spaces that no rule divides or keeps together with what follows.
_PLAIN = re.compile(r"((?!(?:cannot|gonna|gotta|lemme|gimme|wanna) )[a-z]+) +(?=[a-z])")

_STARTERS = """A About According Additionally After An As At But Earlier He Her Here However If In
It Last Many More Now Once One Other Our She Since So Some Such That The Their Then There These
They This We What When While Yet You"""
# Abbreviations that keep their full stop: before anything, ...
_ABBREVIATIONS = """jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
ala ariz calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn
va vt wis wisc wyo inc co cos corp pty ptys pte ptes ltd plc bancorp dept bhd assn univ intl sys
tel est ext sq jr sr bros ed.d ph.d blvd rd esq etc al seq bldg"""
_STATES = "Az Ark Del Ill La Mass Miss Ore Pa Tex Wash"  # with a capital letter only
# ... unless a letter follows without a space, ...
_TITLES = """alex wm jos cie cf a.k.a vs treas mr mrs ms dr drs prof profs sen sens rep reps atty
attys lt col gen messrs gov govs adm rev maj sgt cpl pvt capt st ste ave pres lieut hon brig cmdr
comdr pfc spc supt supts det mt ft adj adv asst assoc ens insp mlle mme msgr sfc natl ph"""
_NUMBERED = "ca fig figs prop no nos art op pp"  # ... and before a number.
_FILES = """3gp avi bat bmp bz2 c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg
mov mp3 mp4 pdf php pl png ppt ps py sql tar txt wav x xml zip"""
# Characters that are a token of their own; those that are neither here nor letters are dropped.
_SYMBOLS = """0024-0027 002A-002C 003A-003E 005C 005E 0060 007C 007E 00A1 00A5-00A9 00AC 00AE-00B4
00B6-00B9 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-05F4 0600-0603 0606-060C 0614 061B
061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E3F 0E4F 1FBD 2016-2017 201A 201E-2023
2030-2038 203B 203E-2042 2044 2070 2074-207E 2080-208E 20A4 2100-2101 2103-2106 2108-2109 2114
2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-24B5
24D0-2BFF 3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6"""

_QUOTES = {
    **dict.fromkeys("‘‹\x91‛", "`"),
    **dict.fromkeys("’›\x92", "'"),
    **dict.fromkeys("“«\x93", "``"),
    **dict.fromkeys("”»\x94", "''"),
}
_BRACKETS = dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True))
_ROUND = {bracket: _BRACKETS[bracket] for bracket in "()"}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_MONEY = {"¢": "cents", "£": "#", **dict.fromkeys("¤\x80₠€", "$")}


def _as_is(token: str) -> str:
    return token


def _written(by: Mapping[str, str]) -> Callable[[str], str]:
    """Replaces characters."""
    table = {ord(character): text for character, text in by.items()}
    return lambda token: token.translate(table)


def _always(token: str) -> Callable[[str], str]:
    return lambda _: token


def _quoted(token: str) -> str:
    return _written(_QUOTES)(token.replace("&apos;", "'"))


def _one_of(words: str) -> str:
    """A pattern of some words, the longest first, so that none hides another."""
    return "|".join(map(re.escape, sorted(words.split(), key=len, reverse=True)))


def _ranges(text: str) -> str:
    return "".join("-".join(f"\\u{code}" for code in part.split("-")) for part in text.split())


def _of_kind(kinds: tuple[str, ...], end: int) -> str:
    """The characters below `end` of some Unicode categories, as what stands within []."""
    parts, start = [], None
    for code in range(end + 1):
        inside = code < end and unicodedata.category(chr(code)).startswith(kinds)
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            parts.append(f"\\u{start:04x}-\\u{code - 1:04x}")
            start = None
    return "".join(parts)


@functools.cache
def _rules() -> list[_Rule]:
    """All rules, in order; built when first needed."""
    rules: list[_Rule] = []

    def rule(
        token: str, write: Callable[[str], str] = _as_is, *, before: str = "", give_back: int = 0
    ) -> None:
        rules.append(_Rule(re.compile(f"({token})(?:{before})"), give_back, write))

    space = r"[ \t\xa0\u2000-\u200a\u3000]"
    alpha = f"[{_of_kind(('L',), 0x10000)}]"  # nothing beyond 16 bits is known
    alnum = f"{alpha[:-1]}\\d]"
    # Words may hold accents that are characters of their own, and hyphens that do not show.
    marks = rf"\xad\u0300-\u036f{_of_kind(('Mn', 'Mc'), 0x0ED0)}"
    entity = "&[aeiouAEIOU](?:acute|grave|uml);"
    letter = f"(?:{alpha[:-1]}{marks}]|{entity})"
    tail = f"(?:{alnum[:-1]}{marks}]|{entity})*"
    word = rf"{letter}{tail}(?:[.!?]{letter}{tail})*"
    apostrophe, any_apostrophe = r"(?:['\x92’]|&apos;)", r"(?:['`\x91\x92‘’‛]|&apos;)"
    ending = rf"{apostrophe}(?i:[msd]|re|ve|ll)"
    negation = rf"n{any_apostrophe}t"
    joint = r"[\-_\u058a\u2010\u2011]"
    initials = r"[A-Za-z](?:\.[A-Za-z])*"
    prefix = rf"(?:[dDoOlL]{any_apostrophe}{alnum})?"
    compound = rf"{prefix}{alnum}+(?:{joint}{prefix}{alnum}+)*"
    followers = r"[,;:\u3001]"

    # Words
    rule("(?i:cannot)", give_back=3)
    rule("(?i:gonna|gotta|lemme|gimme|wanna)", give_back=2)
    rule("(?i:'tis)", give_back=2)
    rule("(?i:'twas)", give_back=3)
    name, value = (
        r"[A-Za-z][A-Za-z0-9:._\-]*",
        r"""(?:'[^'\n]*'|"[^"\n]*"|[A-Za-z][A-Za-z0-9:.\-]*)""",
    )
    rule(rf"<(?:[!?][A-Za-z\-][^>\n]*|/?{name}(?: +{name}(?: *= *{value})?)* */?) *>")
    rule(r"&(?:MD|mdash|ndash);|[\x96\x97–—―]", _always("--"))
    rule("(?i:&amp;)", _always("&"))
    rule("(?i:&nbsp;)", _always(""))
    rule("&#[0-9]+;")
    abbreviations = rf"(?:(?i:{_one_of(_ABBREVIATIONS)})|{_one_of(_STATES)})\."
    rule(abbreviations, before=".")
    starters = _one_of(f"{_STARTERS} {_STARTERS.upper()}")
    rule(r"[A-Za-z]\.", before=rf"{space}+(?:{starters})(?:{space}|\n)", give_back=1)
    rule(word, before=ending)
    rule(r"[A-Za-z]*[A-MO-Za-mo-z]", before=f"(?i:{negation})")
    rule(word)
    rule(
        rf"{apostrophe}[nN]{apostrophe}?|[lLdDjJ]{apostrophe}|[Dd]unkin{apostrophe}"
        rf"|somethin{apostrophe}|ol{apostrophe}|{apostrophe}(?i:em|[2-9]0s|till?|cause)"
        rf"|[Cc]{apostrophe}mon|cap{apostrophe}n|[Ee]{apostrophe}er"
        rf"|[dlnoA-HJ-XZ]{any_apostrophe}{letter}{{2,}}"
        rf"|{alpha}+[aeiouyAEIOUY]{any_apostrophe}[aeiouA-Z]{alpha}*"
    )
    rule(rf"[yY]{apostrophe}", before=letter)
    # Addresses and tags
    within, last = r'[^ \t\n"<>|(){}]', r'[^ \t\n"<>|.!?(){},\-]'
    rule(rf"(?i:https?)://{within}+{last}")
    host, known_host = r'[^ \t\n"<>|.!?(){},]', r"""[^ \t\n"`'<>|.!?(){},-_$]"""
    rule(
        rf"(?:[wW]{{3}}\.(?:{host}+\.)+[a-zA-Z]{{2,4}}|(?:{known_host}+\.)+(?:com|net|org|edu))"
        rf'(?:/[^ \t\n"<>|()]+{last})?'
    )
    label = r'[^ \t\n"<>|(){}.\xa0]+'
    rule(rf"(?:&lt;|<)?[a-zA-Z0-9]{within}*@(?:{label}\.)*{label}(?:&gt;|>)?")
    rule(rf"[@＠][a-zA-Z_][a-zA-Z_0-9]*|[#＃]{letter}+")
    rule(ending, _quoted, before="[^A-Za-z]")
    rule(f"(?i:{negation})", _quoted)
    # Numbers
    rule(r"\d{1,2}[\-/]\d{1,2}[\-/]\d{2,4}")
    rule(r"[\-+]?(?:\d*(?:[.:,\xad\u066b\u066c]\d+)+|\d+)")
    rule(r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)")
    rule(r"(?:\d{1,4}[\- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4}")
    rule("[¼½¾⅓-⅞]", _written(_FRACTIONS))
    rule(rf"{apostrophe}[0-9][0-9]", before=rf"{space}|\n")
    part = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    rule(rf"{part}(?:\\?/{part}){{1,2}}")
    rule(r"[A-Z]*\$|#")
    rule("[¢£¤¥\x80₠€\u060b\u0e3f₤￠￡￥￦]", _written(_MONEY))
    # Abbreviations
    rule(abbreviations)
    rule(rf"(?:(?i:{_one_of(_TITLES)})|{initials})\.")
    rule(rf"(?i:{_one_of(_NUMBERED)})\.", before=rf"{space}?\d")
    rule(rf"{word}\.", before=followers)
    rule(rf"{alnum}+(?:{joint}{alnum}+)*\.", before=followers)
    area = r"\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \xa0])?[0-9]{2,4}[\- \xa0]"
    rule(rf"(?:{area})[0-9]{{3,4}}[\- \xa0]?[0-9]{{3,5}}", _written(_ROUND))
    # Marks
    rule('"|(?i:&quot;)', _always("``"), before="[A-Za-z0-9$]")
    rule('"|(?i:&quot;)', _always("''"))
    rule(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", _written(_ROUND), before="[^A-Za-z0-9]")
    eye = r"[\^=~<>'x\-]"
    rule(rf"{eye}_{eye}|\({eye}[_.]?{eye}\)", _written(_ROUND))
    rule(r"<<|>>|[<>\[\](){}]", _written(_BRACKETS))
    rule("&lt;", _always("<"))
    rule("&gt;", _always(">"))
    rule("---?-?", _always("--"))
    rule("-+")
    rule(r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|[\x85…]", _always("..."))
    rule(r"@+|#+|_+|\*+|[,;:\u3001]|[?!]+|[.=+/]")
    # Compounds
    rule(compound)
    rule(r"[A-Z]+(?:(?:&amp;|[+&])[A-Z]+)+")
    rule(r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\xad]+))+")
    rule(rf"{alnum}+(?:\.{alnum}+)*\.(?i:{_one_of(_FILES)})", before=rf"{space}|\n|[.?!,]")
    rule(r"[cCfF]#|[cC]\+\+")
    # Quotation marks
    rule("'", _always("`"), before=r"[A-Za-z][^ \t\n\xa0]")
    rule(ending, _quoted)
    rule("''|'|&apos;|[`\x82\x84\x91-\x94\u2018-\u201f‹›«»]{1,2}", _quoted)
    rule(f"[{_ranges(_SYMBOLS)}]")
    return rules
