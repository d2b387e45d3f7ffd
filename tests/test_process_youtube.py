"""Tests of the way from words to the personal voice: tracks, paragraphs, samples, files.

That each word of a file is read, and once, is what test_subtitles.py tests.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_subtitles import Style, many, rolling, told_by_tags, vtt, written

from hamner.errors import UserError
from process_youtube import (
    LONG_SAMPLE,
    Skipped,
    Video,
    describe,
    ends_sentence,
    find_files,
    language_rank,
    main,
    read_video,
    read_videos,
    without_copies,
)
from subtitles import MARKS

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "vtt_samples"
SHORT_SAMPLE = 150  # words
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subtitles")


def video(folder: Path, text: str | bytes, name: str = "talk.vtt") -> Video:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_video(describe(path))


def paragraphs(folder: Path, text: str | bytes, name: str = "talk.vtt") -> list[str]:
    return video(folder, text, name).paragraphs


def said(folder: Path, text: str | bytes, name: str = "talk.vtt") -> str:
    return " ".join(paragraphs(folder, text, name))


# --------------------------------------------------------------------------- paragraphs, samples


def test_capitals_only_where_there_is_punctuation(folder: Path) -> None:
    assert said(folder, vtt("hello you. how are you?", "'fine. 3pm is ok.")) == (
        "Hello you. How are you? 'Fine. 3pm is ok."
    )
    assert said(folder, vtt("hello you", "iPhone and u.s. law")) == "hello you iPhone and u.s. law"
    assert said(folder, vtt("iPhone. eBay. \u00dfeta.")) == "iPhone. eBay. \u00dfeta."


SENTENCE_ENDS = [
    ("well.", "So", True), ("well.", "so", True), ("well", "So", False), ("why?", "so", True),
    ("Mr.", "Hamner", False), ("J.", "Smith", False), ("a.m.", "the", False),
    ("a.m.", "The", True), ("etc.", "and", False), ("hm...", "so", False), ("hm...", "So", True),
    ('yes."', "So", True), ("\u597d\u3002", "\u6211", True), ("3.5", "So", False),
]  # fmt: skip


@pytest.mark.parametrize(("word", "following", "ends"), SENTENCE_ENDS)
def test_ends_of_sentences(word: str, following: str, ends: bool) -> None:
    assert ends_sentence(word, following) is ends


def test_a_speaker_begins_a_paragraph(folder: Path) -> None:
    assert paragraphs(folder, vtt("I was &gt;&gt; what? No. &gt;&gt; Yes.")) == [
        "I was", "What? No.", "Yes."
    ]  # fmt: skip
    assert paragraphs(folder, vtt("one", "&gt;&gt; two")) == ["one", "two"]


def test_paragraphs_end_at_long_pauses(folder: Path) -> None:
    lines = [[f"w{line}-{n}" for n in range(5)] for line in range(20)]
    expected = written(lines)
    parts = paragraphs(folder, rolling(lines, {7}, Style()))
    assert [part.split() for part in parts] == [expected[:40], expected[40:]]
    assert len(paragraphs(folder, rolling(lines, {1}, Style()))) == 1  # ten words are too few


def sizes_with_pause(folder: Path, lines: int, paused: int) -> list[int]:
    """Words of the paragraphs of lines of five, of which one is followed by about two seconds."""
    script = [["word"] * 5 for _ in range(lines)]
    script[paused] += ["um"] * 9
    text = re.sub(r"<[0-9:.]+><c> um</c>", "", rolling(script, set(), Style())).replace(" um", "")
    return [len(part.split()) for part in paragraphs(folder, text)]


def test_paragraphs_that_are_too_long_are_cut_at_their_longest_pause(folder: Path) -> None:
    even = rolling([["word"] * 5] * 30, set(), Style())
    assert [len(part.split()) for part in paragraphs(folder, even)] == [80, 70]
    assert sizes_with_pause(folder, lines=30, paused=10) == [55, 95]
    assert sizes_with_pause(folder, lines=25, paused=22) == [80, 45]  # and not to leave ten words
    assert sizes_with_pause(folder, lines=25, paused=3) == [80, 45]


def test_sentences_are_kept_whole(folder: Path) -> None:
    rng = random.Random(3)
    sentences = [" ".join(["Word"] + ["word"] * rng.randrange(1, 40)) + "." for _ in range(100)]
    result = video(folder, vtt(*" ".join(sentences).split()))
    joined = [sentence + "." for part in result.paragraphs for sentence in part[:-1].split(". ")]
    assert joined == sentences
    assert all(len(part.split()) <= 120 for part in result.paragraphs)


def test_a_part_without_punctuation_is_cut_all_the_same(folder: Path) -> None:
    text = "Yes. " * 60 + "word " * 2000
    assert max(len(part.split()) for part in video(folder, text, "talk.txt").samples) <= LONG_SAMPLE


def test_a_long_text_without_spaces_is_cut_into_samples(folder: Path) -> None:
    text = "".join(chr(0x4E00 + n) for n in range(2000))
    result = video(folder, text, "talk.txt")
    assert "".join(result.paragraphs) == text and result.words == 2000
    assert all(SHORT_SAMPLE <= len(sample) <= LONG_SAMPLE for sample in result.samples)


def test_each_spoken_word_is_in_exactly_one_sample(folder: Path) -> None:
    rng = random.Random(5)
    words = [f"w{n}" for n in range(6000)]
    lines, cleared = [], set()
    while len(written(lines)) < len(words):
        at = len(written(lines))
        lines.append(words[at : at + rng.randrange(1, 9)])
        if rng.random() < 0.1:
            cleared.add(len(lines) - 1)
    result = video(folder, rolling(lines, cleared, Style()))
    assert [word for sample in result.samples for word in sample.split()] == words
    assert result.words == len(words)
    sizes = [len(sample.split()) for sample in result.samples]
    assert all(SHORT_SAMPLE <= size <= LONG_SAMPLE for size in sizes), sizes
    ends = [part.split()[-1] for part in result.paragraphs]
    assert all(sample.split()[-1] in ends for sample in result.samples)


def test_minutes_of_speech_leave_long_pauses_out(folder: Path) -> None:
    lines = [["word"] * 10] * 60
    spoken = video(folder, rolling(lines, set(), Style())).minutes
    paused = video(folder, rolling(lines, {3, 20, 40}, Style())).minutes
    assert spoken == pytest.approx(60 * 2.31 / 60, rel=0.02)
    assert paused == pytest.approx(spoken, rel=0.05)  # each pause is four seconds
    assert video(folder, "some words", "talk.txt").minutes is None


# --------------------------------------------------------------------------- files

NAMES = {
    "A Title [dQw4w9WgXcQ].en.vtt": ("A Title", "dQw4w9WgXcQ", "en"),
    "A Title [dQw4w9WgXcQ].en-orig.vtt": ("A Title", "dQw4w9WgXcQ", "en-orig"),
    "A. B [dQw4w9WgXcQ].fil.srt": ("A. B", "dQw4w9WgXcQ", "fil"),
    "[Live] Show [-154CWGhuAI].zh-Hans.vtt": ("[Live] Show", "-154CWGhuAI", "zh-Hans"),
    "talk.de.vtt": ("talk", "talk", "de"),
    "Kit [Walkthrough].txt": ("Kit [Walkthrough]", "Kit [Walkthrough]", ""),
    "part.two.txt": ("part.two", "part.two", ""),
    "dr. who.VTT": ("dr. who", "dr. who", ""),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_says(name: str) -> None:
    track = describe(Path(name))
    assert (track.title, track.video, track.language) == NAMES[name]


def test_languages_are_ranked() -> None:
    ranked = ["en-orig", "en", "en-GB", "", "en-de"]
    ranks = [language_rank(language, "en") for language in ranked]
    assert ranks == sorted(ranks, key=lambda rank: -1 if rank is None else rank) == [0, 1, 2, 3, 4]
    assert [language_rank(language, "en") for language in ("de", "enm", "de-en")] == [None] * 3
    assert language_rank("zh-Hans", "zh-Hans") == 1


def files(folder: Path, **texts: str) -> list[Path]:
    """Files of these texts; two underscores in a name stand for a dot, one for a space."""
    paths = []
    for name, text in texts.items():
        paths.append(folder / f"{name.replace('__', '.').replace('_', ' ')}")
        paths[-1].write_text(text, encoding="utf-8")
    return sorted(paths)


def reasons(skipped: list[Skipped]) -> dict[str, str]:
    return {skip.path.name: skip.reason for skip in skipped}


def test_one_track_a_video(tmp_path: Path) -> None:
    paths = files(
        tmp_path, one__en__vtt=vtt("automatic"), **{"one__en-orig__vtt": vtt("original")},
        one__de__vtt=vtt("deutsch"), two__en__srt=vtt("srt"), two__en__vtt=vtt("vtt"),
        three__txt=vtt("text"), four__de__vtt=vtt("nur deutsch"),
    )  # fmt: skip
    videos, skipped = read_videos(paths, "en")
    assert [v.paragraphs for v in videos] == [["original"], ["text"], ["vtt"]]
    assert reasons(skipped) == {
        "one.en.vtt": "another track", "one.de.vtt": "another language",
        "two.en.srt": "another track", "four.de.vtt": "another language",
    }  # fmt: skip
    videos, _ = read_videos(paths, "de")
    assert [v.paragraphs for v in videos] == [["nur deutsch"], ["deutsch"], ["text"]]


def test_the_spoken_language_counts_for_more_than_the_kind_of_file(tmp_path: Path) -> None:
    original = {"one__en-orig__srt": vtt("original")}
    paths = files(tmp_path, one__en__vtt=vtt("translated"), **original)
    assert [v.paragraphs for v in read_videos(paths, "en")[0]] == [["original"]]


def test_the_next_best_track_serves_where_the_best_is_broken(tmp_path: Path) -> None:
    files(tmp_path, one__en__vtt=vtt("automatic"))
    (tmp_path / "one.en-orig.vtt").write_bytes(b"WEBVTT\n\n\xff\xfe\xfd")
    videos, skipped = read_videos(sorted(tmp_path.iterdir()), "en")
    assert [v.paragraphs for v in videos] == [["automatic"]]
    assert reasons(skipped) == {"one.en-orig.vtt": "unusable"}


def test_a_video_under_two_names_is_used_once(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(200)]
    lines = [words[n : n + 5] for n in range(0, 200, 5)]
    other = [[f"x{n}" for n in range(40)]]
    paths = files(
        tmp_path, a_cut__vtt=rolling(lines[:30], set(), Style()),
        b_whole__vtt=rolling(lines, set(), Style()), c_text__txt=" ".join(words).upper(),
        d_other__vtt=rolling(other + lines[:3], set(), Style()),
    )  # fmt: skip
    videos, skipped = without_copies(read_videos(paths, "en")[0])
    assert [v.track.name for v in videos] == ["b whole.vtt", "d other.vtt"]
    assert reasons(skipped) == {"a cut.vtt": "copy", "c text.txt": "copy"}


def test_files_are_found_once_and_other_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    names = ["a.vtt", "deep/b.SRT", "c.txt", ".d.vtt", "e.ass", "f.mp4", "out/all_transcripts.txt"]
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "z.vtt").symlink_to(tmp_path / "a.vtt")
    again = tmp_path / "deep" / ".." / "a.vtt"
    paths = [tmp_path, again, tmp_path / "deep", tmp_path / "f.mp4", tmp_path / "g"]
    found, skipped = find_files(paths, tmp_path / "out")
    assert found == [tmp_path / "a.vtt", tmp_path / "c.txt", tmp_path / "deep" / "b.SRT"]
    assert reasons(skipped) == {
        "e.ass": "unknown ending", "f.mp4": "unknown ending", "g": "not found"
    }  # fmt: skip


# --------------------------------------------------------------------------- the whole program


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_program(tmp_path: Path) -> None:
    inside = tmp_path / "data" / "youtube"
    inside.mkdir(parents=True)
    words = [f"w{n}" for n in range(1000)]
    lines = [words[n : n + 8] for n in range(0, 1000, 8)]
    files(inside, **{"A_Talk_[dQw4w9WgXcQ]__en__vtt": rolling(lines, {30}, Style(tags="colour"))},
          text__txt="a few words only", bad__srt="nothing")  # fmt: skip
    (inside / "empty.vtt").touch()
    command = [sys.executable, str(ROOT / "process_youtube.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"videos\W+2\b", done.stdout) and "1,004" in done.stdout
    assert "unusable 2" in done.stdout and "en 1, not stated 1" in done.stdout
    assert len(done.stderr.splitlines()) == 2 and "empty.vtt: empty" in done.stderr
    out = tmp_path / "data" / "personal"
    samples = rows(out / "training_samples.jsonl")
    assert all(list(row) == ["text", "source", "title"] for row in samples)
    first = [row for row in samples if row["title"] == "A Talk"]
    assert [word for row in first for word in row["text"].split()] == words
    assert {row["source"] for row in first} == {"A Talk [dQw4w9WgXcQ].en.vtt"}
    text = (out / "all_transcripts.txt").read_text(encoding="utf-8")
    assert text.startswith("A Talk\n\nw0 w1 ") and "\n\n\ntext\n\na few words only\n" in text
    counts = json.loads((out / "stats.json").read_text(encoding="utf-8"))
    assert counts["words"] == 1004 and counts["samples"] == len(samples) == 1 + len(first)
    assert counts["skipped"] == {"unusable": 2} and len(counts["each_skipped"]) == 2
    assert counts["words_per_minute"] == pytest.approx(1000 / counts["minutes_of_speech"], rel=0.05)
    assert counts["minutes_of_speech"] == round(counts["each_video"][0]["minutes_of_speech"], 1) > 2


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["process_youtube.py", *map(str, arguments)])
    return main()


def test_it_writes_the_same_again_and_leaves_the_old_where_nothing_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = files(tmp_path, good__vtt=vtt("one", "two"), bad__vtt="")
    out = tmp_path / "out"
    run_main(monkeypatch, *good, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["all_transcripts.txt", "stats.json", "training_samples.jsonl"]
    run_main(monkeypatch, *reversed(good), "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"bad\.vtt: empty"):
        run_main(monkeypatch, tmp_path / "bad.vtt", "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_files_and_arguments_it_says_once_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "process_youtube.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: data/youtube: no such file or folder; put subtitles there or name files or folders"
        "\n"
    )


def test_nothing_to_read_and_nowhere_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/youtube: no such file or folder"):
        run_main(monkeypatch)
    with pytest.raises(UserError, match=r"no file that ends in \.vtt or .* in "):
        run_main(monkeypatch, tmp_path)
    path, other = files(tmp_path, a__de__vtt=vtt("eins"), b__ass="x")
    with pytest.raises(UserError, match=r"none of 2 files is usable; .*b\.ass: can't read this"):
        run_main(monkeypatch, path, other)
    with pytest.raises(UserError, match=r"can't write to .*b\.ass"):
        run_main(monkeypatch, path, "--language", "de", "--out", other)


# --------------------------------------------------------------------------- real files


@needs_real
def test_the_words_of_the_first_real_file_are_counted_right() -> None:
    """380 words of it have a time of their own, 61 stand before one, two lines are a word each.

    The holding cues, which show every line once more, have as many words.
    """
    path = REAL / "sample_01.en.vtt"
    text = path.read_text(encoding="utf-8")
    timed = re.findall(r"<[\d:.]+>", text)
    begun = [line for line in text.split("\n") if re.search(r"<[\d:.]+>", line)]
    alone = re.findall(r"^(now|cinematics)</c>$", text, re.MULTILINE)
    assert (len(timed), len(begun), len(alone)) == (380, 61, 2)
    result = read_video(describe(path))
    assert result.words == 380 + 61 + 2
    assert " ".join(result.paragraphs).startswith(
        "today's fire income will tell details survivor rumor meets your explosion up many experts "
        "say the bright light in the sky is heading to earth speculation have come from visual "
    )
    assert result.paragraphs[0].endswith("beloved tour in towers now")
    assert result.paragraphs[-1].endswith("and I'll see you punks in the next video goodbye")


@needs_real
@pytest.mark.parametrize("number", range(1, 7))
def test_real_files_come_out_clean_and_complete(number: int) -> None:
    path = REAL / f"sample_0{number}.en.vtt"
    result = read_video(describe(path))
    text = "\n".join(result.samples)
    assert not re.search(r"[<>\[\]&]|\d\d:\d\d:\d\d|align:|WEBVTT|__", text)
    told, got = told_by_tags(path.read_text(encoding="utf-8")), " ".join(result.paragraphs).split()
    assert [word.lower() for word in got] == [word.lower() for word in told]
    assert " ".join(result.samples).split() == got
    assert result.minutes is not None and 80 < result.words / result.minutes < 220
    for at in range(len(got) - 8):  # what is said twice in a row was said twice by the tags
        if got[at : at + 4] == got[at + 4 : at + 8]:
            assert told[at : at + 4] == told[at + 4 : at + 8]


# --------------------------------------------------------------------------- anything at all

FRAGMENTS = [
    "WEBVTT\n\n", "\n", "\n\n", "\r\n", "1\n", "NOTE x\n", "STYLE\n", "00:00:01.000 --> ",
    "00:00:02.500\n", "00:00:01.000 --> 00:00:02.000 align:start position:0%\n", "99:99:99,999 -->",
    " -->", "00:00:00.000 --> 00:00:00.010\n", "hello there", " you", "no. ", "<c>", "</c>",
    "<00:00:01.500>", "<c.colorCCCCCC>", "<", ">", "<v Bob>", "<rt>", "[", "]", "[Music]", "(", ")",
    "(laughs)", "&nbsp;", "&gt;&gt; ", "&#0;", "&#xD800;", "&#99999999;", "&", "- ", "\u266a",
    "...", "{\\an8}", "\u4f60\u597d", "\u0e2a\u0e31", "\x00", "\x01", "\x02", "\ufeff", "\u200b",
    "\x85", "\U000e0041", "\u2028", "0:05\n", "\uff08", "\uff09", "'", "\u00df",
]  # fmt: skip
pieces = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS).map(str.encode), st.binary(max_size=6),
        st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ),
    max_size=30,
)  # fmt: skip


@settings(many, max_examples=1200)
@given(parts=pieces, ending=st.sampled_from(["vtt", "srt", "txt"]), wide=st.booleans())
def test_anything_gives_clean_text_or_a_sentence(
    folder: Path, parts: list[bytes], ending: str, wide: bool
) -> None:
    data = b"".join(parts)
    if wide:
        data = data.decode("utf-8", "replace").encode("utf-16")
    try:
        result = video(folder, data, f"any.{ending}")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    text = "\n\n".join(result.paragraphs)
    assert result.words > 0 and all(result.paragraphs)
    assert not set(text) & set(MARKS) and not re.search(r"[\x00-\x08\x0b-\x1f\ufeff\ud800]", text)
    assert "\n\n".join(result.samples) == text
    assert "[Music]" not in text
    json.dumps(text).encode()


def test_huge_files_take_seconds(folder: Path) -> None:
    for text in (
        "word " * 20_000, "(" * 50_000, " " * 50_000, "a [" * 10_000, "1" * 50_000,
        "(x) " * 10_000, "- a\n" * 10_000, ".a" * 20_000, "<c" * 20_000, ".\n" * 10_000,
    ):  # fmt: skip
        assert video(folder, text + "a", "talk.txt").words
    assert video(folder, vtt(*["a b"] * 5000)).words == 10_000
