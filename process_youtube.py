"""Turn subtitles into the personal voice of stage 3: clean text, every spoken word exactly once.

    python process_youtube.py                      data/youtube/ -> data/personal/
    python process_youtube.py talk.vtt more/ --language de --out data/voices

Reads .vtt and .srt files and plain .txt transcripts. A channel's own captions come from

    yt-dlp --skip-download --write-auto-sub --sub-langs "en.*" -P data/youtube CHANNEL

The captions that YouTube makes roll: they show each line twice. What is shown again because it was
still on the screen is left out; what was said twice stays (how: subtitles.py). Of each video the
best track is used, and a video that is there twice, under two names, once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hamner.errors import UserError, first_line, run
from hamner.files import write_json_lines, write_text_whole
from subtitles import CJK, CLOSING, END_MARKS, INVISIBLE, LONG_PAUSE, Word, read_speech

FOLDER = "data/youtube"
SAMPLES, TRANSCRIPTS, STATISTICS = "training_samples.jsonl", "all_transcripts.txt", "stats.json"
ENDINGS = (".vtt", ".srt", ".txt")  # the best track of a video first
OTHER_ENDINGS = {".ass", ".ssa", ".sbv", ".ttml", ".dfxp", ".json3", ".srv1", ".srv2", ".srv3"}

SHORT_PARAGRAPH, MEAN_PARAGRAPH, LONG_PARAGRAPH = 30, 80, 120  # words
MEAN_SAMPLE, LONG_SAMPLE = 275, 400  # words; no sentence may be longer than a sample
WORDS_PER_END_MARK = 50  # more words than that to each full stop: a file without punctuation
SHINGLE = 5  # words in a row
SAME = 0.8  # of a video's shingles stand in another: it is the same video

Passage = list[Word]  # a sentence, or a single word where there is no punctuation


# --------------------------------------------------------------------------- words to paragraphs

NEVER_AN_END = re.compile(r"[\W_]*(?:mr|mrs|ms|dr|prof|st|[^\W\d_])\.", re.IGNORECASE)
MAYBE_AN_END = re.compile(r".*(?:\.\.|…|\.[^\W\d_]\.)|(?:etc|vs|approx|inc)\.", re.IGNORECASE)


def ends_sentence(text: str, following: str) -> bool:
    """Whether a word is the last of its sentence, seen from the word that follows."""
    bare = text.rstrip(CLOSING)
    if not bare.endswith(tuple(END_MARKS)) or NEVER_AN_END.fullmatch(bare):
        return False
    return not (following[:1].islower() and MAYBE_AN_END.fullmatch(bare))


def passages(words: list[Word]) -> list[Passage]:
    """Sentences with a capital at their beginning; single words where there is no punctuation."""
    nexts = [*(word.text for word in words[1:]), ""]
    ends = [ends_sentence(word.text, after) for word, after in zip(words, nexts, strict=True)]
    if sum(ends) * WORDS_PER_END_MARK < len(words):
        return [[word] for word in words]
    sentences: list[Passage] = []
    for word, begins in zip(words, [True, *ends[:-1]], strict=True):
        if begins or word.turn:
            sentences.append([])
        sentences[-1].append(word)
    found: list[Passage] = []
    for sentence in sentences:
        sentence[0].text = capitalised(sentence[0].text)
        # a part of the file may have no punctuation
        found += [sentence] if size([sentence]) <= LONG_SAMPLE else [[word] for word in sentence]
    return found


def capitalised(text: str) -> str:
    """A word with a capital first letter, unless it has capitals already or gets longer by it."""
    letter = re.search(r"[^\W\d_]", text)
    if letter is None or text != text.lower() or len(letter[0].upper()) > 1:
        return text
    if re.search(r"\d", text[: letter.start()]):  # 3pm
        return text
    return text[: letter.start()] + letter[0].upper() + text[letter.end() :]


def size(passages: Iterable[Passage]) -> int:
    """In words."""
    return sum(word.size for passage in passages for word in passage)


def paragraphs(passages: list[Passage]) -> list[list[Passage]]:
    """Passages in groups: cut where the speaker changes, at long pauses, and if too long."""
    found: list[list[Passage]] = [[]]
    words = 0
    for passage in passages:
        pause = passage[0].pause >= LONG_PAUSE and words >= SHORT_PARAGRAPH
        if found[-1] and (passage[0].turn or pause):
            found.append([])
            words = 0
        found[-1].append(passage)
        words += size([passage])
    return [part for paragraph in found for part in shortened(paragraph)]


def shortened(paragraph: list[Passage]) -> Iterator[list[Passage]]:
    """Parts of at most LONG_PARAGRAPH words, cut at the longest pauses, each of whole passages."""
    begin, left = 0, size(paragraph)
    while left > LONG_PARAGRAPH and begin + 1 < len(paragraph):
        end, words = _best_cut(paragraph, begin, left)
        yield paragraph[begin:end]
        begin, left = end, left - words
    yield paragraph[begin:]


def _best_cut(paragraph: list[Passage], begin: int, left: int) -> tuple[int, int]:
    """Where a part that begins at passage `begin`, `left` words before the end, ends; its words."""
    longest = min(LONG_PARAGRAPH, left - SHORT_PARAGRAPH)
    words = size(paragraph[begin : begin + 1])
    best = (-math.inf, 0.0, begin + 1, words)
    for end in range(begin + 1, len(paragraph)):
        if words > longest:
            break
        if words >= SHORT_PARAGRAPH:
            pause = paragraph[end][0].pause
            best = max(best, (pause, -abs(words - MEAN_PARAGRAPH), end, words))
        words += size(paragraph[end : end + 1])
    return best[2:]


def written(paragraph: list[Passage]) -> str:
    words = [word for passage in paragraph for word in passage]
    return "".join(" " * word.spaced + word.text for word in words).strip()


def samples(texts: list[str], sizes: list[int]) -> list[str]:
    """Paragraphs joined to documents of MEAN_SAMPLE words: the least squares of what they differ.

    Every paragraph is in exactly one. A text that is shorter than one document makes one.
    """
    best, begins = [0.0], [0]
    for end in range(1, len(texts) + 1):
        words, choices = 0, []
        for begin in range(end - 1, -1, -1):
            words += sizes[begin]
            choices.append((best[begin] + (words - MEAN_SAMPLE) ** 2, begin))
            if words > LONG_SAMPLE + LONG_PARAGRAPH:
                break
        cost, begin = min(choices)
        best.append(cost)
        begins.append(begin)
    ends = [len(texts)]
    while ends[-1]:
        ends.append(begins[ends[-1]])
    ends.reverse()
    return ["\n\n".join(texts[a:b]) for a, b in pairwise(ends)]


# --------------------------------------------------------------------------- files to videos

LANGUAGE = re.compile(r"[a-z]{2,3}(?:-\w{2,})*")
TRANSLATED = re.compile(r"-[a-z]{2,3}(?:-[A-Z]\w+)?")  # en-de: English, made of German
# Eleven characters, and not a word such as [Walkthrough] that is part of the title.
VIDEO_ID = re.compile(r"\s*\[((?=[^]]*(?:[0-9_-]|[a-z][A-Z]))[A-Za-z0-9_-]{11})\]$")


@dataclass
class Track:
    """A file and what its name says: `Title [videoid].en.vtt`; the language may be missing."""

    path: Path
    title: str
    video: str
    language: str

    @property
    def name(self) -> str:
        return shown(self.path.name)


@dataclass
class Video:
    """What was said in one video; minutes of speech where the file has times."""

    track: Track
    paragraphs: list[str]
    samples: list[str]
    words: int
    minutes: float | None


@dataclass
class Skipped:
    """A file that isn't used: `reason` in a word or two for the table, `line` for the reader."""

    path: Path
    reason: str
    line: str


def describe(path: Path) -> Track:
    stem = path.name.removesuffix(path.suffix)
    body, _, language = stem.rpartition(".")
    known_form = LANGUAGE.fullmatch(language) and (
        VIDEO_ID.search(body) or len(language.split("-")[0]) == 2
    )
    if not (body and known_form):
        body, language = stem, ""
    match = VIDEO_ID.search(body)
    title = shown(VIDEO_ID.sub("", body)) or "untitled"
    return Track(path, title, match[1] if match else str(path.parent / body), language)


def language_rank(language: str, wanted: str) -> int | None:
    """0 for the track that was really spoken; then exact, regional, not stated, translated.

    None for another language. yt-dlp names the captions of the spoken language `en-orig`.
    """
    rest = language.removeprefix(wanted)
    if not language:
        return 3
    if rest and not rest.startswith("-"):
        return None
    if rest.endswith("-orig"):
        return 0
    return 1 if not rest else 4 if TRANSLATED.fullmatch(rest) else 2


def find_files(paths: list[Path], output: Path) -> tuple[list[Path], list[Skipped]]:
    """Files of the known endings, those of folders included, each once and sorted.

    The transcripts that a run writes itself are left out.
    """
    found: dict[str, Path] = {}
    skipped = []
    for path in paths:
        if not os.path.exists(path):
            skipped.append(Skipped(path, "not found", "no such file or folder"))
        for file in sorted(_files_in(path)) if os.path.isdir(path) else [path]:
            if file.suffix.lower() in ENDINGS and os.path.isfile(file):
                found.setdefault(os.path.realpath(file), file)
            elif os.path.isfile(file):
                line = f"can't read this kind of file; known are {', '.join(ENDINGS)}"
                skipped.append(Skipped(file, "unknown ending", line))
    found.pop(os.path.realpath(output / TRANSCRIPTS), None)
    return sorted(found.values()), skipped


def _files_in(folder: Path) -> Iterator[Path]:
    """Subtitles of any kind below a folder; videos, descriptions and hidden files may lie there."""
    for file in folder.rglob("*"):
        if file.suffix.lower() in OTHER_ENDINGS.union(ENDINGS) and not file.name.startswith("."):
            yield file


def read_video(track: Track) -> Video:
    """The words of a file, in paragraphs and samples. Raises UserError where `read_speech` does."""
    words, spoken = read_speech(track.path)
    parts = paragraphs(passages(words))
    texts, sizes = [written(part) for part in parts], [size(part) for part in parts]
    return Video(track, texts, samples(texts, sizes), sum(sizes), spoken / 60 or None)


def read_videos(files: list[Path], wanted: str) -> tuple[list[Video], list[Skipped]]:
    """One track a video: the best one that can be read; and why each other file is left out."""
    choices: dict[str, list[tuple[int, int, Track]]] = defaultdict(list)
    videos: list[Video] = []
    skipped: list[Skipped] = []
    for track in map(describe, files):
        rank = language_rank(track.language, wanted)
        if rank is None:
            line = f"in another language ({track.language}), see --language"
            skipped.append(Skipped(track.path, "another language", line))
        else:
            ending = ENDINGS.index(track.path.suffix.lower())
            choices[track.video].append((rank, ending, track))
    for tracks in choices.values():
        best_first = sorted(tracks, key=lambda choice: choice[:2])
        found, unused = _first_readable([track for _, _, track in best_first])
        videos += found
        skipped += unused
    return videos, skipped


def _first_readable(tracks: list[Track]) -> tuple[list[Video], list[Skipped]]:
    """The video of the first track that can be read, if any; and why the others are left out."""
    videos: list[Video] = []
    skipped = []
    for track in tracks:
        if videos:
            line = f"another track of the same video as {videos[0].track.name}"
            skipped.append(Skipped(track.path, "another track", line))
            continue
        try:
            videos.append(read_video(track))
        except UserError as error:
            skipped.append(Skipped(track.path, "unusable", str(error)))
    return videos, skipped


def without_copies(videos: list[Video]) -> tuple[list[Video], list[Skipped]]:
    """Without videos nearly all of whose runs of words stand in one that is as long or longer."""
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    kept, skipped = set(), []
    for number, video in sorted(enumerate(videos), key=lambda pair: (-pair[1].words, pair[0])):
        runs = shingles(video)
        shared = Counter(owner for shingle in runs for owner in owners.get(shingle, ()))
        owner = min(shared, key=lambda one: (-shared[one], one), default=number)
        if shared[owner] >= SAME * len(runs):
            line = f"says the same as {videos[owner].track.name}"
            skipped.append(Skipped(video.track.path, "copy", line))
            continue
        kept.add(number)
        for shingle in runs:
            owners[shingle].add(number)
    return [video for number, video in enumerate(videos) if number in kept], skipped


def shingles(video: Video) -> set[tuple[str, ...]]:
    """Runs of SHINGLE words, without signs and capitals; a shorter text is one run."""
    text = " ".join(video.paragraphs).lower()
    words = re.findall(rf"[{CJK}]|[^\W{CJK}]+", text)
    return {tuple(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1))}


# --------------------------------------------------------------------------- videos to files


def sample_rows(videos: list[Video]) -> Iterator[dict[str, str]]:
    for video in videos:
        for text in video.samples:
            yield {"text": text, "source": video.track.name, "title": video.track.title}


def statistics(videos: list[Video], skipped: list[Skipped]) -> dict[str, Any]:
    """Counts of everything; minutes and words a minute of the videos whose times are known."""
    timed = [(video.words, video.minutes) for video in videos if video.minutes]
    minutes = sum(length for _, length in timed)
    words, texts = sum(video.words for video in videos), sum(len(v.samples) for v in videos)
    return {
        "videos": len(videos),
        "words": words,
        "minutes_of_speech": round(minutes, 1) if timed else None,
        "words_per_minute": round(sum(w for w, _ in timed) / minutes, 1) if timed else None,
        "samples": texts,
        "mean_words_per_sample": round(words / texts, 1),
        "languages": dict(Counter(v.track.language or "not stated" for v in videos)),
        "skipped": dict(Counter(skip.reason for skip in skipped)),
    }


def details(videos: list[Video], skipped: list[Skipped]) -> dict[str, Any]:
    used = [
        {
            "source": video.track.name, "title": video.track.title,
            "language": video.track.language or None, "words": video.words,
            "minutes_of_speech": video.minutes and round(video.minutes, 2),
            "samples": len(video.samples),
        }
        for video in videos
    ]  # fmt: skip
    unused = [{"file": shown(skip.path), "why": skip.line} for skip in skipped]
    return {"each_video": used, "each_skipped": unused}


def shown(path: Path | str) -> str:
    """A path as a line of text, whatever bytes the file system has in it."""
    return " ".join(INVISIBLE.sub("?", str(path)).split())


def table(counts: dict[str, Any]) -> Table:
    result = Table(title="The personal voice", show_header=False)
    for name, value in counts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{what} {count:,}" for what, count in value.items()) or "none"
        label = "files skipped" if name == "skipped" else name.replace("_", " ")
        plain = "not known" if value is None else value if isinstance(value, str) else f"{value:,}"
        result.add_row(label, plain)
    return result


def write(folder: Path, videos: list[Video], counts: dict[str, Any]) -> None:
    """Raises UserError if the folder can't be written to."""
    transcripts = ("\n\n".join([v.track.title, *v.paragraphs]) + "\n\n\n" for v in videos)
    numbers = json.dumps(counts, ensure_ascii=False, indent=2) + "\n"
    try:
        write_json_lines(folder / SAMPLES, sample_rows(videos))
        write_text_whole(folder / TRANSCRIPTS, transcripts)
        write_text_whole(folder / STATISTICS, [numbers])
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"can't write to {shown(folder)}: {reason}; name a folder") from None


def nothing_usable(paths: list[Path], skipped: list[Skipped]) -> str:
    places = " or ".join(map(shown, paths))
    if not skipped:
        return f"no file that ends in {' or '.join(ENDINGS)} in {places}; put one there or name it"
    first = f"{shown(skipped[0].path)}: {skipped[0].line}"
    return first if len(skipped) == 1 else f"none of {len(skipped)} files is usable; {first}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help=f"files or folders ({FOLDER})")
    parser.add_argument("--language", default="en", help="the one that you speak (default: en)")
    parser.add_argument("--out", type=Path, default=Path("data/personal"), metavar="FOLDER")
    arguments = parser.parse_args()
    paths = arguments.paths or [Path(FOLDER)]
    if not arguments.paths and not os.path.exists(FOLDER):
        advice = "put subtitles there or name files or folders"
        raise UserError(f"{FOLDER}: no such file or folder; {advice}")
    files, unknown = find_files(paths, arguments.out)
    videos, unused = read_videos(files, arguments.language)
    videos, copies = without_copies(videos)
    skipped = unknown + unused + copies
    for skip in skipped:
        if skip.reason in ("not found", "unknown ending", "unusable"):
            print(f"skipped {shown(skip.path)}: {skip.line}", file=sys.stderr)
    if not videos:
        raise UserError(nothing_usable(paths, skipped))
    counts = statistics(videos, skipped)
    write(arguments.out, videos, {**counts, **details(videos, skipped)})
    Console(markup=False, highlight=False).print(table(counts))
    print(f"written to {shown(arguments.out)}/: {SAMPLES}, {TRANSCRIPTS}, {STATISTICS}")
    return 0


if __name__ == "__main__":
    run(main)
