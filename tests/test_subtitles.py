"""Tests of reading subtitles: each spoken word once, each real repeat kept.

The rolling captions of these tests come from `rolling`, which draws a screen of two lines as
YouTube does: so what should come out is known word for word.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.errors import UserError
from subtitles import LONG_PAUSE, Word, read_speech

many = settings(max_examples=300, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subtitles")


def words(folder: Path, text: str | bytes, name: str = "talk.vtt") -> list[Word]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_speech(path)[0]


def said(folder: Path, text: str | bytes, name: str = "talk.vtt") -> str:
    return " ".join(parts(folder, text, name))


def parts(
    folder: Path, text: str | bytes, name: str = "talk.vtt", pause: float = math.inf
) -> list[str]:
    """What is said, cut where a speaker begins, and at silences of `pause` seconds."""
    found: list[str] = [""]
    for word in words(folder, text, name):
        if word.turn or word.pause >= pause:
            found.append("")
        found[-1] += " " * word.spaced + word.text
    return [part.strip() for part in found if part]


def vtt(*cues: str, header: str = "WEBVTT\n\n") -> str:
    """Cues of three seconds, one every four, each of the text given."""
    parts = [f"{stamp(4 * n)} --> {stamp(4 * n + 3)}\n{cue}\n" for n, cue in enumerate(cues)]
    return header + "\n".join(parts)


def stamp(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


# --------------------------------------------------------------------------- YouTube's captions


@dataclass
class Style:
    """How a rolling file is drawn; the later fields are what other tools make of it."""

    tags: str = "plain"  # plain, colour or none
    holds: bool = True
    blanks: bool = True  # the screen's blank lines, as a line with a space
    trimmed: bool = False  # those are empty instead
    joined: bool = False  # both lines of the screen in one line of text
    numbered: bool = False  # as in SubRip
    newline: str = "\n"


def tagged(words: list[str], start: float, style: Style) -> str:
    """A new line: each word but the first with its time."""
    text = words[0]
    for number, word in enumerate(words[1:], 1):
        time = f"<{stamp(start + 0.2 * number)}>"
        if style.tags == "none":
            text += f" {word}"
        elif style.tags == "colour" and number % 2:
            text += f"<c.colorE5E5E5>{time}<c> {word}</c></c>"
        else:
            text += f"{time}<c> {word}</c>"
    return text


def old(words: list[str], style: Style) -> str:
    """A line that was there before."""
    if style.tags == "colour" and len(words) > 1:
        return f"{words[0]}<c.colorCCCCCC> {' '.join(words[1:])}</c>"
    return " ".join(words)


def screens(
    lines: list[list[str]], cleared: set[int], style: Style
) -> Iterable[tuple[float, float, list[str]]]:
    """Start, end and lines of each cue; after the lines in `cleared` the screen goes blank."""
    clock, above = 1.0, " "
    for number, words in enumerate(lines):
        length = 0.2 * len(words) + (4 if number in cleared else 0.3)
        yield clock, clock + length, [above, tagged(words, clock, style)]
        above = " " if number in cleared else old(words, style)
        if style.holds or above == " ":
            yield clock + length, clock + length + 0.01, [above, " "]
        clock += length + 0.01


def rolling(lines: list[list[str]], cleared: set[int], style: Style) -> str:
    cues = []
    for start, end, screen in screens(lines, cleared, style):
        if not style.blanks:
            screen = [line for line in screen if line.strip()]
        if style.trimmed:
            screen = [line.rstrip() for line in screen]
        if style.joined:
            screen = [" ".join(line for line in screen if line.strip())]
        if screen:
            number = [str(len(cues) + 1)] if style.numbered else []
            settings = "" if style.numbered else " align:start position:0%"
            timing = f"{stamp(start)} --> {stamp(end)}{settings}"
            cues.append(style.newline.join([*number, timing, *screen, ""]))
    header = "" if style.numbered else "WEBVTT\nKind: captions\nLanguage: en\n\n"
    return header.replace("\n", style.newline) + style.newline.join(cues)


STYLES = {
    "as downloaded": Style(),
    "with colours": Style(tags="colour"),
    "without tags": Style(tags="none"),
    "without holding cues": Style(tags="none", holds=False),
    "without blank lines": Style(tags="none", blanks=False),
    "without blank lines and holding cues": Style(tags="none", blanks=False, holds=False),
    "blank lines trimmed": Style(trimmed=True),
    "lines joined": Style(tags="none", joined=True),
    "lines joined, without holding cues": Style(tags="none", joined=True, holds=False),
    "as SubRip": Style(tags="none", numbered=True, newline="\r\n"),
    "as SubRip, trimmed": Style(tags="none", numbered=True, trimmed=True),
}
scripts = st.lists(
    st.lists(st.sampled_from("no yes for real so it's and then".split()), min_size=1, max_size=5),
    min_size=1,
    max_size=10,
)


def told_by_tags(text: str) -> list[str]:
    """The words of a rolling file, read another way: the last line of each cue that lasts."""
    words: list[str] = []
    for block in text.split("\n\n"):
        match = re.search(r"(\d+):(\d+):([\d.]+) --> (\d+):(\d+):([\d.]+).*\n([\s\S]*)", block)
        if match is None:
            continue
        start, end = (
            int(match[n]) * 3600 + int(match[n + 1]) * 60 + float(match[n + 2]) for n in (1, 4)
        )
        lines = match[7].rstrip("\n").split("\n")
        line = lines[-1] if end - start > 0.05 else lines[0] if not words else ""
        line = re.sub(r"<[^>]*>", "", line).replace("&nbsp;", " ").replace("&gt;", ">")
        words += re.sub(r"\[[^]]*\]|>>", "", line).split()
    return words


def written(lines: list[list[str]]) -> list[str]:
    return [word for line in lines for word in line]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@settings(many, max_examples=120)
@given(script=scripts, cleared=st.sets(st.integers(0, 9), max_size=4))
def test_rolling_captions_come_back_word_for_word(
    folder: Path, style: Style, script: list[list[str]], cleared: set[int]
) -> None:
    if style.joined:  # a few lines, or lines of a word each, could be anything
        cleared = cleared.intersection(range(len(script)))
        script = [[*words, "well"] for words in script + [["and", "so", "on"]] * 4]
    assert said(folder, rolling(script, cleared, style)).split() == written(script)


@many
@given(
    script=scripts, cleared=st.sets(st.integers(0, 9), max_size=4), share=st.floats(0, 1),
    colours=st.booleans(),
)  # fmt: skip
def test_a_rolling_file_that_breaks_off_loses_and_doubles_nothing(
    folder: Path, script: list[list[str]], cleared: set[int], share: float, colours: bool
) -> None:
    whole = rolling(script, cleared, Style(tags="colour" if colours else "plain"))
    cut = whole[: round(share * len(whole))]
    try:
        got = said(folder, cut).split()
    except UserError:
        got = []
    *complete, last = got or [""]
    assert complete == written(script)[: len(complete)]
    assert "".join(written(script)[len(complete) : len(got)]).startswith(last)
    assert len(got) >= len(told_by_tags(cut.rpartition("\n\n")[0]))


@many
@given(script=scripts, cleared=st.sets(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
def test_the_order_of_the_cues_in_the_file_does_not_matter(
    folder: Path, script: list[list[str]], cleared: set[int], seed: int
) -> None:
    header, *cues = rolling(script, cleared, Style()).rstrip("\n").split("\n\n")
    random.Random(seed).shuffle(cues)
    assert said(folder, "\n\n".join([header, *cues, ""])).split() == written(script)


@many
@given(script=scripts, cleared=st.sets(st.integers(0, 9), max_size=4), at=st.integers(0, 40))
def test_one_wrong_time_in_a_rolling_file_does_no_harm(
    folder: Path, script: list[list[str]], cleared: set[int], at: int
) -> None:
    script = [*script, *[["and", "so", "on"]] * 6]
    header, *cues = rolling(script, cleared, Style()).rstrip("\n").split("\n\n")
    at = at * 2 % len(cues)  # a cue with a new line, every other one
    cues[at] = re.sub(r"^\S+ --> \S+", "77:00:00.000 --> 77:00:01.000", cues[at])
    got = said(folder, "\n\n".join([header, *cues, ""])).split()
    assert sorted(got) == sorted(written(script))


def test_a_line_said_twice_is_kept_and_a_line_shown_twice_is_not(folder: Path) -> None:
    text = """WEBVTT
Kind: captions

00:00:01.000 --> 00:00:02.000 align:start position:0%
 
for<00:00:01.200><c> real</c>

00:00:02.000 --> 00:00:02.010 align:start position:0%
for real
 

00:00:02.010 --> 00:00:03.000 align:start position:0%
for real
for<00:00:02.300><c> real</c>

00:00:03.000 --> 00:00:03.010 align:start position:0%
for real
 

00:00:03.010 --> 00:00:04.000 align:start position:0%
for real
yes

00:00:04.000 --> 00:00:04.010 align:start position:0%
yes
 

00:00:04.010 --> 00:00:09.000 align:start position:0%
yes
yes

00:00:09.000 --> 00:00:09.010 align:start position:0%
 
 

00:00:09.010 --> 00:00:10.000 align:start position:0%
 
yes
"""
    assert said(folder, text) == "for real for real yes yes yes"


def test_a_new_screen_may_begin_with_the_words_of_the_last(folder: Path) -> None:
    script = [["a", "b"], ["c", "d"], ["c", "d", "e"], ["f", "g"]]
    text = rolling(script, {1}, STYLES["without blank lines and holding cues"])
    assert said(folder, text).split() == written(script)
    held = ""
    for n, line in enumerate(["a b", "a b c", "d e", "f g"]):
        for start, end in ((n, n + 0.99), (n + 0.99, n + 1)):
            held += f"\n{stamp(start)} --> {stamp(end)}\n{line}\n"
    assert said(folder, "WEBVTT\n" + held) == "a b a b c d e f g"


def test_a_file_that_begins_in_the_middle_of_the_talk_keeps_its_first_line(folder: Path) -> None:
    text = """WEBVTT

00:30:02.470 --> 00:30:02.480
we were not

00:30:02.480 --> 00:30:05.830
we were not
there<00:30:02.960><c> at</c><00:30:04.159><c> all</c>
"""
    assert said(folder, text) == "we were not there at all"


def test_cues_that_grow_word_by_word_are_said_once(folder: Path) -> None:
    words = "now the whole line grows".split()
    cues = [
        f"{stamp(n)} --> {stamp(n + 1)}\n{' '.join(words[: n + 1])}\n" for n in range(len(words))
    ]
    assert said(folder, "WEBVTT\n\n" + "\n".join(cues)) == " ".join(words)


@pytest.mark.parametrize("tags", ["plain", "none"])
def test_a_rolling_file_that_breaks_off_after_a_line(folder: Path, tags: str) -> None:
    script = [["no", "no"], ["no"], ["yes"], ["yes", "no"], ["no"], ["no"], ["so"]]
    text = rolling(script, {3}, Style(tags=tags)).split("\n")
    for count in range(7, len(text)):
        cut = "\n".join(text[:count]) + "\n"
        got = said(folder, cut).split()
        assert got == written(script)[: len(got)]
        assert len(got) >= len(told_by_tags(cut.rpartition("\n\n")[0]))


# --------------------------------------------------------------------------- made by hand


def at_once(*cues: str) -> str:
    """Cues of a second that follow each other without a gap."""
    parts = [f"{stamp(n)} --> {stamp(n + 1)}\n{cue}\n" for n, cue in enumerate(cues)]
    return "WEBVTT\n\n" + "\n".join(parts)


BY_HAND = {
    "a few lines that begin alike": ["no wait", "no wait what"],
    "a word taken up again and again": ["a b", "b c", "c d", "d e", "e f", "f g"],
    "first words said again": ["no", "no a", "yes", "yes b", "so", "so c", "it", "it d"],
    "some lines taken up": ["a\nb", "b\nc", "d\ne", "f\ng", "h\ni"],
    "some words taken up": ["a b", "a b c", "d e", "d e f", "g h", "g h i", "j k", "l m", "n o"],
    "timed lines": ["a<00:00:00.5> b\nc<00:00:00.7> d", "c<00:00:01.5> d\na<00:00:01.7> b"],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_taken_up_without_rolling_is_speech(folder: Path, name: str) -> None:
    cues = BY_HAND[name]
    words = re.sub(r"<[^>]*>", "", " ".join(cues)).split()
    assert said(folder, at_once(*cues)).split() == words


def test_repeats_in_a_file_made_by_hand_are_speech(folder: Path) -> None:
    chorus = "let it go\nlet it go"
    text = vtt(chorus, chorus, "No.", "No.", "no, no", "no")
    once = "let it go let it go"
    assert said(folder, text) == f"{once} {once} No. No. no, no no"


def test_cues_of_two_speakers_may_overlap(folder: Path) -> None:
    text = """WEBVTT

00:00:01.000 --> 00:00:05.000
one two three

00:00:02.000 --> 00:00:03.000
no wait

00:00:02.000 --> 00:00:06.000
one two three
four
"""
    assert said(folder, text) == "one two three no wait one two three four"


def test_a_cue_that_stands_in_the_file_twice_is_one_cue(folder: Path) -> None:
    text = vtt("hello you", "how are you")
    assert said(folder, text + "\n" + text.removeprefix("WEBVTT\n\n")) == "hello you how are you"


def test_cues_are_put_in_the_order_of_time(folder: Path) -> None:
    header, *cues = vtt("one", "two", "three").rstrip("\n").split("\n\n")
    assert said(folder, "\n\n".join([header, cues[2], cues[0], cues[1]])) == "one two three"


def test_notes_styles_identifiers_and_the_header_are_not_speech(folder: Path) -> None:
    text = """WEBVTT - made by hand
Kind: captions
Style:
::cue(c.colorCCCCCC) { color: rgb(204,204,204);
 }
##

NOTE
a remark of
two lines

STYLE
::cue { color: white }

REGION
id:fred width:40%

intro
00:01.000 --> 00:02.000 align:start position:0% line:5%
one

NOTE and another
of two lines, too

2
00:02.000 --> 00:03.000
NOTE this is said

00:03.000 --> 00:04.000

second - part
00:04.000 --> 00:05.000
three
"""
    assert said(folder, text) == "one NOTE this is said three"


def test_subrip_is_read(folder: Path) -> None:
    text = (
        "\ufeff1\r\n00:00:01,000 --> 00:00:02,500 X1:100 Y1:20\r\n{\\an8}<i>Twenty-five\r\n"
        "years.</i>\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,500\r\n42\r\n"
        '3\r\n00:00:05,000 --> 00:00:06,000\r\n<font color="#fff">It\'s</font>\\Ntrue.\r\n\r\n4'
    )
    assert said(folder, text, "talk.srt") == "Twenty-five years. 42 It's true."


@pytest.mark.parametrize("end", ["", "4", "4\n", "00:00:1", "00:00:12.000 -", "00:00:12.000 -->"])
def test_a_cue_that_is_only_begun_says_nothing(folder: Path, end: str) -> None:
    assert said(folder, vtt("one", "two", "three") + "\n" + end) == "one two three"


@pytest.mark.parametrize("end", ["<", "</", "</c", "<c.color", "<00:00:", "&", "&nb", "&amp"])
def test_markup_that_the_end_of_the_file_cuts_off_goes(folder: Path, end: str) -> None:
    assert said(folder, vtt("one", "two").rstrip("\n") + end) == "one two"


def test_blank_lines_within_a_cue_lose_nothing(folder: Path) -> None:
    assert said(folder, vtt("one\n\ntwo", "\nthree", "four")) == "one two three four"


@pytest.mark.parametrize("timing", ["00:0x:05.000 --> 00:00:06.000", "99 --> 98", "-->"])
def test_words_of_a_cue_with_an_impossible_time_are_kept_in_place(
    folder: Path, timing: str
) -> None:
    text = vtt("one", "two", "three", "four").replace(f"{stamp(8)} --> {stamp(11)}", timing)
    assert timing in text
    assert said(folder, text) == "one two three four"


def test_an_arrow_in_the_text_is_text(folder: Path) -> None:
    assert said(folder, vtt("at 5 or a --> to b", "one")) == "at 5 or a --> to b one"


# --------------------------------------------------------------------------- lines to words

MARKUP = {
    "<i>a</i> <b>b</b> <u.loud>c</u>": "a b c",
    "<c.colorE5E5E5>a</c><00:00:01.500><c> b</c>": "a b",
    "<lang en-GB>a</lang> b": "a b",
    "&lt;b&gt; &amp;nbsp; R&amp;D": "<b> &nbsp; R&D",
    "a&nbsp;b&#39;s &quot;c&quot; &unknown; Q&A": 'a b\'s "c" &unknown; Q&A',
    "a &lt; b, a<b and c>d, 1 <3": "a < b, a<b and c>d, 1 <3",
    "<ruby>base<rt>read so</rt></ruby> b": "base b",
    "a<br>b<br/>c": "a b c",
    "a\tb\u00a0\u3000c": "a b c",
    "so\u200bft\u00adly \u200ehi\u202c": "softly hi",
    "a &lrm;b&#0; &zwnj;c": "a b\ufffd \u200cc",
}


@pytest.mark.parametrize("cue", MARKUP)
def test_markup_and_entities(folder: Path, cue: str) -> None:
    assert said(folder, vtt(cue)) == MARKUP[cue]


NOISES = {
    "[Music] a": "a",
    "a [&nbsp;__&nbsp;] b": "a b",
    "a [laughter], b [applause]. c": "a, b. c",
    "a. [music]. b": "a. b",
    "[[nested] noise] a": "a",
    "[\u97f3\u697d] \u3010\u62cd\u624b\u3011 [\u041c\u0443\u0437\u044b\u043a\u0430] a": "a",
    "\u305d\u3046\uff08\u7b11\uff09\u3067\u3059": "\u305d\u3046 \u3067\u3059",
    "\u266a la la \u266b": "la la",
    "(sighs) a": "a",
    "- (lacht) a": "a",
    "a. (laughs) b": "a. b",
    "a\n(door slams)\nb": "a b",
    "the agency (nasa) said": "the agency (nasa) said",
    "a [ b": "a [ b",
}


@pytest.mark.parametrize("cue", NOISES)
def test_noise_goes_and_speech_stays(folder: Path, cue: str) -> None:
    assert said(folder, vtt("first", cue)) == f"first {NOISES[cue]}"


def test_a_speaker_is_known_by_a_dash_by_arrows_or_by_name(folder: Path) -> None:
    assert parts(folder, vtt("&gt;&gt; Hi you. &gt;&gt; Hello.", "&gt;&gt;&gt; News.")) == [
        "Hi you.", "Hello.", "News."
    ]  # fmt: skip
    assert parts(folder, vtt("- Hi you.\n- Hello.", "-Well - no.\n\u2013 Why?")) == [
        "Hi you.", "Hello.", "Well - no.", "Why?"
    ]  # fmt: skip
    assert parts(folder, vtt("<v Ann>one", "<v Ann>two", "<v.loud Bob>three</v>")) == [
        "one two", "three"
    ]  # fmt: skip
    assert parts(folder, vtt("one", "&gt;&gt; [laughs]", "two")) == ["one", "two"]
    assert parts(folder, vtt("I was &gt;&gt; what? No.")) == ["I was", "what? No."]


def test_words_know_the_silence_before_them(folder: Path) -> None:
    found = words(folder, vtt("one two", "three", "&gt;&gt; four"))
    told = [(word.text, word.pause, word.turn) for word in found]
    assert told == [("one", 0, False), ("two", 0, False), ("three", 2, False), ("four", 3, True)]


def test_a_dash_that_is_no_speaker_stays(folder: Path) -> None:
    assert said(folder, vtt("it is", "-5 degrees", "--force it")) == "it is -5 degrees --force it"
    lines = [["type", "rm"], ["-", "rf", "now."], ["-", "Why?"]]
    assert parts(folder, rolling(lines, set(), Style())) == ["type rm - rf now.", "Why?"]


def test_text_without_spaces_survives(folder: Path) -> None:
    chinese = "\u6211\u4eec\u4eca\u5929 \u53bb\u5546\u5e97\u3002\n\u597d"
    assert parts(folder, vtt(chinese)) == [chinese.replace("\n", "")]
    thai = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e04\u0e23\u0e31\u0e1a"
    lines = [[thai[:6]], [thai[7:]]]
    assert said(folder, rolling(lines, set(), Style())) == thai.replace(" ", "")
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0628\u0631\u0648\u0645"
    assert said(folder, vtt(persian)) == persian


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]
)  # fmt: skip
def test_encodings(folder: Path, encoding: str, newline: str) -> None:
    text = vtt("na\u00efve caf\u00e9", "two").replace("\n", newline)
    assert said(folder, text.encode(encoding)) == "na\u00efve caf\u00e9 two"


def test_a_character_cut_in_two_and_control_characters_go(folder: Path) -> None:
    assert said(folder, vtt("one \u00e9").encode().rstrip(b"\n")[:-1]) == "one"
    text = said(folder, vtt("a\x00b \x01\x02c\x1b[0m d\x7f"))
    assert text == "ab c[0m d"


# --------------------------------------------------------------------------- transcripts


def test_line_ends_of_a_wrapped_transcript_are_no_paragraphs(folder: Path) -> None:
    text = "so this is\nwrapped by hand\nand [Music] goes on &gt;&gt; yes\n- no\n"
    assert parts(folder, text, "talk.txt", LONG_PAUSE) == [
        "so this is wrapped by hand and goes on", "yes - no"
    ]  # fmt: skip


def test_blank_lines_and_long_lines_of_a_transcript_are_paragraphs(folder: Path) -> None:
    one, two = ("word " * 40).strip(), ("term " * 40).strip()
    assert parts(folder, f"{one}\n{two}\n", "talk.txt", LONG_PAUSE) == [one, two]
    wrapped = "word word word\n" * 15 + "\n" + "term term term\n" * 15
    assert parts(folder, wrapped, "talk.txt", LONG_PAUSE) == [
        ("word " * 45).strip(), ("term " * 45).strip()
    ]  # fmt: skip


def test_times_between_the_lines_of_a_transcript_go(folder: Path) -> None:
    assert said(folder, "0:05\nhello at 5:30\n1:02:07\nyou\n", "talk.txt") == "hello at 5:30 you"


def test_subtitles_that_are_called_txt_are_subtitles(folder: Path) -> None:
    text = rolling([["one", "two"], ["three"]], set(), Style())
    assert said(folder, text, "talk.txt") == "one two three"


# --------------------------------------------------------------------------- files

UNUSABLE = {
    "empty.vtt": b"", "blank.txt": b" \r\n\n", "latin.srt": "caf\u00e9".encode("latin-1") + b" x",
    "picture.vtt": b"\x89PNG\r\n\x1a\n\x00\xff", "noise.vtt": vtt("[Music]", "\u266a").encode(),
    "header.vtt": b"WEBVTT\n\nhello", "signs.txt": b"-- ...",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_refused_in_one_line(folder: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        words(folder, UNUSABLE[name], name)
    assert len(str(caught.value)) > 4 and "\n" not in str(caught.value)
