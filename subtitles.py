"""Read subtitles (.vtt, .srt) and transcripts (.txt): every spoken word, exactly once.

The captions that YouTube makes roll: each cue shows the line before once more, above the new one,
and a cue of 10 ms holds that line while the screen scrolls. What a cue shows again because it was
still on the screen is left out; what was said twice stays. The cues' structure decides that (see
`new_lines`), never whether a line was seen before.

`read_speech` does it all: bytes -> characters -> cues -> the new lines of each -> words.
"""

from __future__ import annotations

import codecs
import html
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from hamner.errors import UserError, first_line

HOLD = 0.05  # seconds; YouTube's holding cues last 0.01, its other cues 0.5 and more
FEW = 3  # times that cues of one line may begin alike by chance
SPLICE = 0.1  # seconds at most between two cues that follow each other on the screen
WORD = 0.4  # seconds that a word is taken to last where only its beginning is known
SLOW_WORD = 1.0  # the same at most, where a person has set the cue's end
LONG_PAUSE = 2.0  # seconds; such a silence ends a paragraph
WRAPPED = 90  # characters; the lines of a transcript that is wrapped by hand are shorter

# Put into the text where a word's time is known, a speaker begins, a paragraph ends. The control
# characters of the files themselves are gone by then.
TIME, TURN, BREAK = "\x00", "\x01", "\x02"
MARKS = TIME + TURN + BREAK

# Scripts without spaces between words. Chinese and Japanese characters count as a word each; for
# those of South-East Asia only a dictionary could tell.
CJK = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
SOUTH_EAST_ASIAN = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f"
LETTERS_PER_WORD = 5  # of the latter, roughly
LETTER, LETTER_IN_SOUTH_EAST_ASIA = re.compile(r"\w"), re.compile(f"[{SOUTH_EAST_ASIAN}]")
WIDE_SIGNS = "\u3001-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20"
UNSPACED = re.compile(f"[{CJK}{SOUTH_EAST_ASIAN}{WIDE_SIGNS}]")

END_MARKS = ".!?…\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965"
CLOSING = "\"'\u201d\u2019\u00bb)\\]\u300d\u300f"  # what may stand between them and a space


@dataclass
class Word:
    """A word as it is written, signs included; one character in Chinese and Japanese."""

    text: str
    spaced: bool  # after a space
    pause: float  # seconds of silence before it
    turn: bool  # a speaker's first

    @property
    def size(self) -> int:
        """Words that it counts as: none if it is a sign only."""
        letters = len(LETTER_IN_SOUTH_EAST_ASIA.findall(self.text))
        return max(round(letters / LETTERS_PER_WORD), int(bool(LETTER.search(self.text))))


def read_speech(path: Path) -> tuple[list[Word], float]:
    """The words of a file, and the seconds it took to say them, long pauses left out.

    A transcript has no times: no seconds, and pauses between its paragraphs alone.

    Raises:
        UserError: a file that can't be read, isn't text, or in which nothing is said.
    """
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror or first_line(error)})") from None
    except UnicodeDecodeError:
        raise UserError("not text in UTF-8 or UTF-16; convert it first") from None
    if not text.strip():
        raise UserError("empty")
    cues = parse_cues(text)
    if path.suffix.lower() == ".txt" and not any(cue.lines for cue in cues):
        words, spoken = read_words(transcript_text(text))
    elif cues:  # subtitles that are named .txt are subtitles
        words, spoken = read_words(*caption_text(cues))
    else:
        raise UserError("no line of the form 00:00:01.000 --> 00:00:02.000 in it")
    if not any(word.size for word in words):
        raise UserError("nothing is said in it")
    return words, spoken


# --------------------------------------------------------------------------- bytes to characters

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"
}  # fmt: skip
# Control characters, writing direction, characters of no width. The joiners are spelling, and stay.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


def decode(data: bytes) -> str:
    """Text of UTF-8 or UTF-16 bytes without invisible characters.

    A character that the file's end cuts in two is left out. Raises UnicodeDecodeError.
    """
    marked = (name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark))
    decoder = codecs.getincrementaldecoder(next(marked, _encoding(data)))()
    return INVISIBLE.sub("", decoder.decode(data))


def _encoding(data: bytes) -> str:
    """Without a byte order mark: zeros in every other place are the high bytes of UTF-16."""
    first, second = data[0::2].count(0), data[1::2].count(0)
    if max(first, second) * 8 < len(data) or min(first, second) * 4 > max(first, second):
        return "utf-8"
    return "utf-16-be" if first > second else "utf-16-le"


# --------------------------------------------------------------------------- characters to cues

LINE_END = re.compile(r"\r\n|\r|\n")
STAMP = r"(?:[0-9]{1,6}:)?[0-9]{1,3}:[0-9]{1,3}(?:[.,][0-9]{1,9})?"
TIMING = re.compile(rf"\s*({STAMP})\s*-->\s*({STAMP})(?!\S)")
BLOCK = re.compile(r"(?:NOTE|STYLE|REGION)(?:\s|$)")
# What is left of a timing, and of a tag or an entity, where the file ends in the middle of it.
CUT_TIMING = re.compile(r"[0-9]{1,2}(?::[0-9:.,]*)?\s*-{0,2}")
CUT_MARKUP = re.compile(
    r"(?:<(?:[0-9:.]*|/?(?:[a-z][\w.]*)?)|&(?:a(?:mp?)?|[lg]t?|n(?:b(?:sp?)?)?|[lr](?:rm?)?)?)\Z"
)
TIME_TAG = re.compile(rf"<({STAMP})>")
VOICE = re.compile(r"<v(?:\.[^\s<>]*)?(?:\s+([^<>]*))?>")
READING = re.compile(r"<rt>[^<]*(?:</rt>)?")  # how the character beside it is read
LINE_BREAK = re.compile(r"<br\s*/?>|\\N")
TAG = re.compile(
    r"</?(?:c|i|b|u|s|em|strong|ruby|rt)(?:\.[^\s<>]*)?\s*>"
    r"|</?(?:v|lang|font|span)(?=[\s.>])[^<>]*>|<[0-9:.,]+>|\{\\[^{}]*\}",
    re.IGNORECASE,
)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


@dataclass
class Line:
    """A line of a cue without its markup, but with a TIME mark for each of `times` (seconds)."""

    text: str
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plain = " ".join(re.sub(f"[{MARKS}]", "", self.text).split())


@dataclass
class Cue:
    """What the screen showed from `start` to `end` (seconds): lines that are not blank."""

    start: float
    end: float
    lines: list[Line]
    cut: bool = False  # may be unfinished, because the file ends in it

    @property
    def holds(self) -> bool:
        return 0 <= self.end - self.start <= HOLD


def parse_cues(text: str) -> list[Cue]:
    """The cues of a WebVTT or SubRip file, in the file's order; its header and notes left out.

    A blank line doesn't end a cue here: editors that strip spaces make one of the blank line of
    the screen. Neither does a timing that makes no sense: its words are taken to come next.
    """
    open_end = not text.endswith(("\n", "\r"))
    lines = _mark_voices(LINE_END.split(CUT_MARKUP.sub("", text) if open_end else text))
    places = [number for number, line in enumerate(lines) if is_timing(line)]
    cues: list[Cue] = []
    for count, (place, following) in enumerate(zip_longest(places, places[1:]), 1):
        without_other = _without_next_name if following else _without_cut_cue
        body = without_other(lines[place + 1 : following], str(count + 1))
        shown = [read_line(line) for line in _without_blocks(body)]
        start, end = _times(lines[place], cues[-1].end if cues else 0.0)
        cues.append(Cue(start, end, [line for line in shown if line.plain]))
    if cues:
        # Tags and blank top lines tell of a screen, which shows two lines: one may be unfinished.
        blank_tops = [not "".join(lines[place + 1 : place + 2]).strip() for place in places]
        tagged = any(line.times for cue in cues for line in cue.lines)
        cues[-1].cut = not blank_tops[-1] and (open_end or tagged or any(blank_tops))
    return _without_copies(cues)


def is_timing(line: str) -> bool:
    """Whether a line times a cue, be it wrongly, as "5:xx -->" does; "a word --> b" is text."""
    before, arrow, _ = line.partition("-->")
    return bool(arrow) and len(before.split()) < 2 and bool(re.search(r"[0-9:]|^\s*$", before))


def _times(timing: str, otherwise: float) -> tuple[float, float]:
    match = TIMING.match(timing)
    return (seconds(match[1]), seconds(match[2])) if match else (otherwise, otherwise)


def seconds(stamp: str) -> float:
    """Of a time such as 01:02:03.450 or 02:03,450."""
    *larger, smallest = stamp.replace(",", ".").split(":")
    return sum(int(part) * 60**n for n, part in enumerate(reversed(larger), 1)) + float(smallest)


def _mark_voices(lines: list[str]) -> list[str]:
    """A TURN mark in place of `<v Name>` wherever another name speaks."""
    speaker: str | None = None

    def mark(match: re.Match[str]) -> str:
        nonlocal speaker
        before, speaker = speaker, match[1]
        return "" if speaker == before else TURN

    return [VOICE.sub(mark, line) for line in lines]


def _without_next_name(body: list[str], number: str) -> list[str]:
    """Without the line that names the cue after this one: below a blank line, or its number."""
    if not body or not body[-1].strip():
        return body
    named = body[-1].strip() == number or (len(body) > 1 and not body[-2].strip())
    return body[:-1] if named else body


def _without_cut_cue(body: list[str], number: str) -> list[str]:
    """Without the number or the half timing of a cue that the file's end cuts off."""
    *said, last = "\n".join(body).rstrip().split("\n")
    begun = last.strip() == number or CUT_TIMING.fullmatch(last.strip())
    below_blank = len(said) > 1 and not said[-1].strip()
    return said if begun and below_blank else body


def _without_blocks(body: list[str]) -> Iterator[str]:
    """Without comments and style sheets, which begin after a blank line and end at the next."""
    inside = False
    for above, line in zip(["-", *body], body, strict=False):
        inside = bool(line.strip()) and (inside or (not above.strip() and bool(BLOCK.match(line))))
        if not inside:
            yield line


def _without_copies(cues: list[Cue]) -> list[Cue]:
    """Without cues that say the same at the very same time as an earlier one."""
    first: dict[tuple[object, ...], Cue] = {}
    for cue in cues:
        key = (cue.start, cue.end, *(line.plain for line in cue.lines))
        first.setdefault(key if cue.end > cue.start else (id(cue),), cue)
    return list(first.values())


def read_line(raw: str) -> Line:
    """A line of a cue, or of a transcript, without tags and entities."""
    text, *rest = TIME_TAG.split(LINE_BREAK.sub(" ", READING.sub("", raw)))
    pieces = [text, *rest[1::2]]
    return Line(
        TIME.join(ENTITY.sub(_character, TAG.sub("", piece)) for piece in pieces),
        [seconds(stamp) for stamp in rest[0::2]],
    )


def _character(entity: re.Match[str]) -> str:
    return INVISIBLE.sub("", html.unescape(entity[0]))


# --------------------------------------------------------------------------- cues to new lines


@dataclass
class Unrolled:
    """The new lines of each cue, and how sure it is that the others are old."""

    new: list[tuple[Cue, list[Line]]] = field(default_factory=list)
    carrying: int = 0  # cues with old lines
    chances: int = 0  # cues that follow another at once, and are long enough to show its last line
    repeats: int = 0  # those of them that do

    @property
    def share(self) -> float:
        return self.repeats / self.chances if self.chances else 0.0


Carried = Callable[[list[str], int, Cue], int]


def new_lines(cues: list[Cue]) -> tuple[list[tuple[Cue, list[Line]]], bool]:
    """What each cue brings that the cue before didn't show, and whether the file rolls at all.

    It rolls if of the cues that could begin with what was on the screen more than half do: nearly
    all in a rolling file, next to none in one made by hand, where repeats are therefore speech.
    The order by time and that of the file are tried; words are compared, too, where no cue has
    two lines, for the screen's lines may have been joined. The most regular reading counts.
    """
    in_time = sorted(cues, key=lambda cue: cue.start)
    readings = [unroll(order, carried_lines) for order in (in_time, cues)]
    if all(len(cue.lines) < 2 for cue in cues):
        readings += [unroll_words(order) for order in (in_time, cues)]
    best = max(readings, key=lambda reading: (reading.share, reading.carrying))
    if best.share <= 0.5:
        return [(cue, cue.lines) for cue in in_time], False
    return best.new, True


def unroll(cues: list[Cue], carried: Carried, least: int = 1) -> Unrolled:
    """The new lines by `carried`; a cue repeats if at least `least` lines of it are old."""
    result = Unrolled()
    screen: list[str] = []
    newest, end = 0, -math.inf  # lines that came last; when the cue before ended
    for cue in cues:
        kept = carried(screen, newest, cue)
        could = len(cue.lines) > 1 or (cue.holds and bool(cue.lines))
        if screen and could and cue.start <= end + SPLICE:
            result.chances += 1
            result.repeats += kept >= least
        result.carrying += kept > 0
        result.new.append((cue, cue.lines[kept:]))
        newest = len(cue.lines) - kept or min(newest, len(cue.lines))
        screen, end = [line.plain for line in cue.lines], cue.end
    return result


def unroll_words(cues: list[Cue]) -> Unrolled:
    """The same by words. One word is no sign of rolling, and neither are a few repeats."""
    words = [[Line(word) for line in cue.lines for word in line.plain.split()] for cue in cues]
    taken_apart = [replace(cue, lines=parts) for cue, parts in zip(cues, words, strict=True)]
    result = unroll(taken_apart, carried_words, least=2)
    joined = [(cue, " ".join(word.text for word in new)) for cue, new in result.new]
    result.new = [(cue, [Line(text)] if text else []) for cue, text in joined]
    result.repeats *= result.repeats >= FEW
    return result


def _most_old(cue: Cue) -> int:
    """How many lines of a cue can be old: all if it only holds, else the last one is new.

    A word's own time shows that its line is new, too, but a line of one word has none.
    """
    timed = (number for number, line in enumerate(cue.lines) if line.times)
    return next(timed, len(cue.lines) - (not cue.holds))


def carried_lines(screen: list[str], newest: int, cue: Cue) -> int:
    """How many lines at the top of a cue are the bottom ones of the screen before it.

    The file may end inside such a line, before the new one: a lone line that the screen showed.
    """
    shown = [line.plain for line in cue.lines]
    for count in range(min(_most_old(cue), len(screen)), 0, -1):
        if screen[-count:] == shown[:count]:
            return count
    unfinished = cue.cut and len(shown) == 1 and bool(screen) and not cue.lines[0].times
    return int(unfinished and screen[-1].startswith(shown[0]))


def carried_words(screen: list[str], newest: int, cue: Cue) -> int:
    """The same for files whose lines are joined: how many of a cue's first words are old.

    They are the line that came last, or the whole screen if cues grow word by word. Where the
    screen's lines can't be told apart, after a cue that was all new, the longest match counts.
    """
    shown = [line.plain for line in cue.lines]
    most = min(_most_old(cue), len(screen))
    guesses = [newest, len(screen), *(range(most, 1, -1) if newest == len(screen) else ())]
    matches = (n for n in guesses if 0 < n <= most and screen[-n:] == shown[:n])
    return next(matches, 0)


# --------------------------------------------------------------------------- lines to words

NOTES = re.compile("[\u2669-\u266c\U0001f3b5\U0001f3b6\U0001f3bc]\ufe0f?")
# Square and lenticular brackets and wide round ones always hold noise; see ASIDE for (laughs).
NOISE = re.compile(
    r"\s{0,3}(?:[\[\uff3b\u3010][^][\uff3b\uff3d\u3010\u3011]{0,100}[]\uff3d\u3011]"
    r"|\uff08[^\uff08\uff09]{0,100}\uff09)([.,;:!?…]*)"
)
ASIDE = re.compile(r"\([^()]{0,100}\)")
SPEAKER = re.compile(rf"(?<![^\s{MARKS}])>{{2,}}")
DASH = rf"[ \t{MARKS}]*(?:[-\u2013\u2014](?=[ \t{MARKS}]|$)|-(?=[^\W\d_]))"
LINE_DASH = re.compile(rf"^{DASH}", re.MULTILINE)
# Where lines are wrapped, a dash at the beginning of one may belong to the sentence.
SENTENCE_DASH = re.compile(
    rf"(?:\A|(?:(?<=[{END_MARKS}])|(?<=[{END_MARKS}][{CLOSING}])|(?<={BREAK}))[\s{MARKS}]*\n){DASH}",
    re.MULTILINE,
)
WRAPPED_UNSPACED = re.compile(rf"(?<={UNSPACED.pattern})\n(?=[{MARKS}]*{UNSPACED.pattern})")
TOKEN = re.compile(rf"[{MARKS}]|\s+|[{CJK}][^\w\s{MARKS}]*|[^\s{CJK}{MARKS}]+")
STAMP_LINE = re.compile(rf"[\[(]?{STAMP}[\])]?")  # as copied from the site


def clean(text: str) -> str:
    """Text with its marks, without musical notes and bracketed noise."""
    text, found = NOTES.sub(" ", text), 1
    while found:  # brackets in brackets
        text, found = NOISE.subn(_after_noise, text)
    return ASIDE.sub(_after_aside, text)


def _marks_in(text: str) -> str:
    return "".join(character for character in text if character in MARKS)


def mark_turns(text: str, dash: re.Pattern[str]) -> str:
    """A TURN mark in place of the dashes and >> that speakers begin with."""

    def turn(match: re.Match[str]) -> str:
        return _marks_in(match[0]) + TURN

    return SPEAKER.sub(turn, dash.sub(turn, text))


def _after_noise(match: re.Match[str]) -> str:
    """Full stops and commas go to the word before the noise, if there is one without."""
    before = match.string[max(0, match.start() - 9) : match.start()]
    after_word = before.rstrip(MARKS)[-1:].isalnum()
    line = "\n" if "\n" in match[0] else " "
    return (match[1] if after_word else "") + _marks_in(match[0]) + line


def _after_aside(match: re.Match[str]) -> str:
    """Nothing if round brackets stand for themselves, as (laughs) does: noise. Else the text.

    They do if they begin what is said, follow a sentence's end or fill a line.
    """
    before = match.string[max(0, match.start() - 99) : match.start()].rstrip(
        f" \t>-\u2013\u2014{MARKS}"
    )
    after = match.string[match.end() : match.end() + 99].lstrip(f" \t{MARKS}")
    fills_line = before[-1:] in ("", "\n") and after[:1] in ("", "\n")
    if fills_line or not before.strip() or before.endswith(tuple(END_MARKS)):
        return _marks_in(match[0]) + " "
    return match[0]


def caption_text(cues: list[Cue]) -> tuple[str, list[tuple[float, float]]]:
    """The text of all new lines, with marks, and for each TIME mark the time and a word's length.

    Both in seconds. A newline after each line; spaces, too, after cues that a person made.
    """
    pieces, rolls = new_lines(cues)
    parts, times = [], []
    for cue, lines in pieces:
        if not lines:
            continue
        text = clean("\n".join(line.text for line in lines))
        count = sum(not token.isspace() for token in TOKEN.findall(text))
        word = (cue.end - cue.start) / max(1, count)
        times.append((cue.start, max(0.0, min(word, WORD if rolls else SLOW_WORD))))
        times += [(time, WORD) for line in lines for time in line.times]
        parts.append(TIME + text)
    if rolls:
        return mark_turns("\n".join(parts), SENTENCE_DASH), times
    return mark_turns(" \n ".join(parts), LINE_DASH), times


def transcript_text(text: str) -> str:
    """The text of a transcript, with marks. Its line ends mean nothing if it is wrapped."""
    lines = [read_line(line).plain for line in LINE_END.split(text)]
    lines = [line for line in lines if not STAMP_LINE.fullmatch(line)]
    lengths = sorted(len(line) for line in lines if line)
    wrapped = not lengths or lengths[len(lengths) // 2] < WRAPPED
    text = clean("\n".join(line + ("" if line and wrapped else BREAK) for line in lines))
    return mark_turns(text, SENTENCE_DASH if wrapped else LINE_DASH)


def read_words(text: str, times: Iterable[tuple[float, float]] = ()) -> tuple[list[Word], float]:
    """The words of a text with marks, and the seconds it took to say them, long pauses left out."""
    words: list[Word] = []
    clock = iter(times)
    start = end = before = length = spoken = pause = 0.0
    spaced = turn = False
    for token in TOKEN.findall(WRAPPED_UNSPACED.sub("", text)):
        if token == TIME:
            start, length = next(clock)
        elif token == TURN:
            spaced = turn = True
        elif token == BREAK:
            pause = LONG_PAUSE
        elif token.isspace():
            spaced = True
        else:
            if words and not spaced and not UNSPACED.search(words[-1].text[-1] + token[0]):
                words[-1].text += token  # a word of two syllables with a time each
            else:
                pause = max(pause, start - end) if words else 0.0
                words.append(Word(token, spaced, pause, turn))
            passed = start - before
            spoken += passed if 0 <= passed < LONG_PAUSE + length else length
            before, end, pause = start, start + length, 0.0
            start, spaced, turn = end, False, False
    return words, spoken
