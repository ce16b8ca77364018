"""Sources: every format on a mounted volume, tar shards and what they try, and lines that cannot be used."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from attune.contract.job import ChannelUse, PrepareSource, PrepareVolume, SourceFormat, SplitBy
from attune_trainer.data import shards
from attune_trainer.data.audio import Span
from attune_trainer.data.files import SourceFile, VolumeOrigin
from attune_trainer.data.rejections import Rejections
from attune_trainer.data.sources import ListedUtterance, list_utterances, open_source, read_text
from attune_trainer.failures import AccessDenied, NotFound, RecipeFailure
from attune_trainer.store import Store

STORE = Store("http://127.0.0.1:9", "attune")  # never asked: these sources are on a volume


class Listing:
    """What a source lists, and what of it is left out."""

    def __init__(self, folder: Path, source_format: str, by: str = "Speaker", slices: Any = (), **fields: Any) -> None:
        source = PrepareSource(
            uri="pvc://calls/2026",
            volume=PrepareVolume(mount=str(folder.parent), path=folder.name),
            format=SourceFormat(source_format),
            **fields,
        )
        rejections = Rejections()
        scratch = folder.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        opened = open_source(0, source, STORE)
        self.found: list[ListedUtterance] = list(
            list_utterances(opened, SplitBy(by), tuple(slices), scratch, rejections)
        )
        self.rejected = {place: reason for reason, place in rejections.places()}
        self.count = rejections.count

    @property
    def texts(self) -> list[str]:
        return [read_text(one) for one in self.found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "volume" / "data"
    path.mkdir(parents=True)
    return path


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*entries: Any) -> str:
    return "\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries)


class TestManifest:
    def test_times_channels_and_labels_are_read(self, folder: Path) -> None:
        call = {"audio": "call.wav", "speaker": "anna", "group": "call 1"}
        write(
            folder,
            {
                "call.wav": b"audio",
                "list.jsonl": lines(
                    call
                    | {"text": "good  morning", "start": 0.5, "end": 2, "channel": 1, "accent": "scots", "vip": True},
                    call | {"text": "bye", "start": 7, "channel": 0, "line": 3},
                ),
            },
        )
        listing = Listing(
            folder, "Manifest", manifest="list.jsonl", slices=["accent", "vip", "line"], channels=ChannelUse.PER_SPEAKER
        )
        assert [(one.span, one.labels) for one in listing.found] == [
            (Span(0.5, 2.0, 1), ("scots", "true", "")),
            (Span(7.0, None, 0), ("", "", "3")),
        ]
        assert listing.texts == ["good morning", "bye"]
        mixed = Listing(folder, "Manifest", manifest="list.jsonl")
        assert [one.span.channel for one in mixed.found] == [None, None]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"start": "1"}, "TimesNotNumbers"),
            ({"start": -1}, "TimesNotNumbers"),
            ({"end": float("nan")}, "TimesNotNumbers"),
            ({"end": 10**400}, "TimesNotNumbers"),
            ({"start": True}, "TimesNotNumbers"),
            ({"start": 2, "end": 2}, "TimesNotOrdered"),
            ({"channel": -1}, "ChannelNotNumber"),
            ({"channel": "left"}, "ChannelNotNumber"),
            ({"channel": None}, "LacksChannel"),
            ({"accent": ["a"]}, "LabelNotText"),
            ({"accent": "x" * 300}, "LabelNotText"),
            ({"accent": "a\u0007b"}, "ControlCharacters"),
            ({"speaker": "a\u0000b"}, "ControlCharacters"),
            ({"text": "a\u001bb"}, "ControlCharacters"),
        ],
    )
    def test_a_field_that_cannot_be_used_is_named(self, folder: Path, change: dict[str, Any], reason: str) -> None:
        good = {"audio": "a.wav", "text": "t", "speaker": "s", "channel": 0}
        write(folder, {"a.wav": b"audio", "list.jsonl": lines(good, good | change)})
        listing = Listing(folder, "Manifest", manifest="list.jsonl", slices=["accent"], channels=ChannelUse.PER_SPEAKER)
        assert len(listing.found) == 1
        assert listing.rejected == {"list.jsonl:2": reason}

    def test_lines_of_any_length_and_ending_keep_their_numbers(self, folder: Path) -> None:
        def entry(text: str) -> str:
            return json.dumps({"audio": "a.wav", "text": text, "speaker": "s"})

        text = "\ufeff" + "\r\n".join([entry("one"), "", "x" * 20_000_000, entry("four"), "y" * 70_000, entry("six")])
        write(folder, {"a.wav": b"audio", "list.jsonl": text})
        listing = Listing(folder, "Manifest", manifest="list.jsonl")
        assert [(one.number, one.text) for one in listing.found] == [(1, "one"), (4, "four"), (6, "six")]
        assert listing.rejected == {"list.jsonl:3": "LineTooLong", "list.jsonl:5": "LineTooLong"}


class TestDirectory:
    def test_a_json_beside_the_audio_says_what_a_manifest_would(self, folder: Path) -> None:
        write(
            folder,
            {
                "anna/1.wav": b"audio",
                "anna/1.txt": "plain\ntext",
                "anna/2.flac": b"audio",
                "anna/2.json": json.dumps({"text": "described", "speaker": "Anna K.", "accent": "scots"}),
                "calls/3.m4a": b"audio",
                "calls/3.json": json.dumps(
                    [
                        {"text": "hello", "channel": 0, "start": 0, "end": 1.5},
                        {"text": "hi", "channel": 1, "start": 1, "end": 2},
                        {"text": "no times", "start": "x"},
                        "no object",
                    ]
                ),
                "ben/4.wav": b"audio",
                "ben/4.txt": "text beside",
                "ben/4.json": json.dumps({"speaker": "Ben", "accent": "irish", "text": "another"}),
                "calls/4.wav": b"audio",
                "calls/5.wav": b"audio",
                "calls/5.json": "[]",
                "calls/6.wav": b"audio",
                "calls/6.json": "{",
            },
        )
        listing = Listing(folder, "Directory", slices=["accent"])
        assert [(one.speaker, one.group, one.labels, read_text(one)) for one in listing.found] == [
            ("anna", "anna", ("",), "plain text"),
            ("Anna K.", "anna", ("scots",), "described"),
            ("Ben", "ben", ("irish",), "text beside"),
            ("calls", "calls", ("",), "hello"),
            ("calls", "calls", ("",), "hi"),
        ]
        assert listing.rejected == {
            "calls/3.m4a[2]": "TimesNotNumbers",
            "calls/3.m4a[3]": "NotJson",
            "calls/4.wav": "LacksText",
            "calls/5.wav": "LacksText",
            "calls/6.wav": "NotJson",
        }
        parties = Listing(folder, "Directory", channels=ChannelUse.PER_SPEAKER)
        assert [(one.speaker, one.group, one.span.channel) for one in parties.found] == [
            ("calls/3.m4a#0", "calls/3.m4a", 0),
            ("calls/3.m4a#1", "calls/3.m4a", 1),
        ]
        assert parties.rejected["anna/1.wav"] == parties.rejected["anna/2.flac"] == "LacksChannel"

    def test_names_that_no_report_could_show_are_rejected_and_shown_all_the_same(self, folder: Path) -> None:
        write(folder, {"good.wav": b"audio", "good.txt": "fine", "new\nline.wav": b"audio"})
        (folder / b"caf\xe9.wav".decode("utf-8", "surrogateescape")).write_bytes(b"audio")
        listing = Listing(folder, "Directory")
        assert listing.texts == ["fine"]
        assert listing.rejected == {"caf?.wav": "NameNotPrintable", "new?line.wav": "NameNotPrintable"}


class TestKaldi:
    FILES = {
        "wav.scp": "call1 audio/1.wav\ncall2 sox audio/2.sph -t wav - |\ncall3 /etc/passwd\ncall4 gone.wav\n",
        "text": (
            "u1 good morning\nu2 my card\nu3 a pipe\nu4 a path\nu5 not there\nu6\nu7 nobody\nu8 nowhere\nu1 again\n"
            "u9 to the end\n"
        ),
        "utt2spk": "u1 anna\nu2 ben\nu3 ben\nu4 ben\nu5 ben\nu6 ben\nu8 ben\nu9 ben\n",
        "segments": (
            "u1 call1 0.5 2.25\nu2 call1 3 4\nu3 call2 0 1\nu4 call3 0 1\nu5 call4 0 1\nu6 call1 0 1\nu7 call1 0 1\n"
            "u9 call1 5.0 -1\n"
        ),
        "spk2accent": "anna scots\n",
        "utt2channel": "u2 mobile\n",
        "reco2file_and_channel": "call1 1 B\n",
        "audio/1.wav": "audio",
    }

    def test_a_data_directory_is_read_and_commands_are_not_run(self, folder: Path) -> None:
        write(folder, dict(self.FILES))
        listing = Listing(folder, "Kaldi", slices=["accent", "channel"])
        assert [(one.text, one.speaker, one.group, one.span, one.labels) for one in listing.found] == [
            ("good morning", "anna", "call1", Span(0.5, 2.25), ("scots", "")),
            ("my card", "ben", "call1", Span(3.0, 4.0), ("", "mobile")),
            ("to the end", "ben", "call1", Span(5.0, None), ("", "")),
        ]
        assert listing.rejected == {
            "text:3": "CommandNotRun",
            "text:4": "PathLeavesSource",
            "text:5": "AudioNotFound",
            "text:6": "LacksText",
            "text:7": "LacksSpeaker",
            "text:8": "LacksSegment",
            "text:9": "RepeatedId",
        }
        assert Listing(folder, "Kaldi", channels=ChannelUse.PER_SPEAKER).found[0].span.channel == 1

    def test_without_segments_a_recording_is_an_utterance(self, folder: Path) -> None:
        write(folder, {"wav.scp": "u1 1.wav\n", "text": "u1 hello\n", "utt2spk": "u1 anna\n", "1.wav": b"audio"})
        (one,) = Listing(folder, "Kaldi").found
        assert (one.span, one.speaker, one.group) == (Span(), "anna", "anna")

    def test_a_file_that_is_missing_is_named(self, folder: Path) -> None:
        write(folder, {"wav.scp": "u1 1.wav\n"})
        with pytest.raises(NotFound, match="no text and no utt2spk below pvc://calls/2026"):
            Listing(folder, "Kaldi")


def test_segment_time_marks_find_their_recordings_beside_them(folder: Path) -> None:
    write(
        folder,
        {
            "eval/call.stm": (
                ";; comment\n"
                "call A agent 0.00 1.50 <o,f0,male> good morning\n"
                "call B customer 1.5 3.25 my card\n"
                "call A agent 3.25 4.0 <o> IGNORE_TIME_SEGMENT_IN_SCORING\n"
                "call A agent 5.0\n"
                "call A agent five 6.0 text\n"
                "call A agent 7.0 6.0 text\n"
                "call A agent 7.0 8.0\n"
                "other A agent 7.0 8.0 text\n"
                "../../call A agent 7.0 8.0 text\n"
                "call left agent 7.0 8.0 text\n"
            ),
            "eval/call.wav": b"audio",
        },
    )
    listing = Listing(folder, "Stm", channels=ChannelUse.PER_SPEAKER)
    assert [(one.text, one.speaker, one.group, one.span) for one in listing.found] == [
        ("good morning", "agent", "eval/call.wav", Span(0.0, 1.5, 0)),
        ("my card", "customer", "eval/call.wav", Span(1.5, 3.25, 1)),
    ]
    assert [listing.rejected[f"eval/call.stm:{number}"] for number in range(4, 12)] == [
        "Ignored", "MalformedLine", "TimesNotNumbers", "TimesNotOrdered", "LacksText", "AudioNotFound",
        "PathLeavesSource", "ChannelNotNumber",
    ]  # fmt: skip


def test_subtitles_are_utterances_of_the_recording_beside_them(folder: Path) -> None:
    write(
        folder,
        {
            "talk.mp3": b"audio",
            "talk.vtt": (
                "WEBVTT - a talk\n\nNOTE 00:00 --> in a note\n\nSTYLE\n::cue { color: red }\n\n"
                "intro\n00:01.000 --> 00:02.500 align:start\n<v Anna K.>Good <i>morning</i> &amp; welcome</v>\n\n"
                "01:00:03.250 --> 01:00:05.000\nto <00:00:04.000>all\nof you\n\n"
                "00:06.000 --> 00:07.000\n<v Anna>Yes.</v> <v Ben>No.</v>\n\n"
                "00:99.000 --> 01:40.000\nwrong\n\n"
                "00:09.000 --> 00:08.000\nbackwards\n\n"
                "00:10.000 --> 00:11.000\n\n"
            ),
            "film.m4a": b"audio",
            "film.srt": (
                "1\r\n00:00:01,500 --> 00:00:02,000\r\n<i>Run!</i>\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nNow."
            ),
            "silent.wav": b"audio",
            "latin.wav": b"audio",
            "latin.vtt": "WEBVTT\n\n00:01.000 --> 00:02.000\ncaf\u00e9".encode("latin-1"),
        },
    )
    listing = Listing(folder, "WebVtt")
    assert [(one.place, one.text, one.speaker, one.group, one.span) for one in listing.found] == [
        ("film.srt:1", "Run!", "film.m4a", "film.m4a", Span(1.5, 2.0)),
        ("film.srt:5", "Now.", "film.m4a", "film.m4a", Span(3.0, 4.0)),
        ("talk.vtt:8", "Good morning & welcome", "Anna K.", "talk.mp3", Span(1.0, 2.5)),
        ("talk.vtt:12", "to all of you", "talk.mp3", "talk.mp3", Span(3603.25, 3605.0)),
    ]
    assert listing.rejected == {
        "talk.vtt:16": "SeveralSpeakers",
        "talk.vtt:19": "TimesNotNumbers",
        "talk.vtt:22": "TimesNotOrdered",
        "talk.vtt:25": "LacksText",
        "silent.wav": "LacksText",
        "latin.wav": "NotUtf8",
    }


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], archive_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=archive_format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class TestShards:
    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
    @pytest.mark.parametrize("archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_members_are_files_below_the_shard(self, folder: Path, suffix: str, archive_format: int) -> None:
        long = "/".join(["folder-with-a-name"] * 8)
        names = ["a/1", "b\u00fc/2", *([f"{long}/3"] if archive_format != tarfile.USTAR_FORMAT else [])]
        members = [member("a", type=tarfile.DIRTYPE)]
        for name in names:
            members += [member(f"{name}.wav", name.encode() * 9000), member(f"{name}.txt", f"text of {name}".encode())]
        content = tar(*members, archive_format=archive_format)
        write(folder, {f"shard-0{suffix}": content if suffix == ".tar" else gzip.compress(content)})
        listing = Listing(folder, "Directory", tar_shards=True)
        assert not listing.rejected
        assert listing.texts == [f"text of {name}" for name in names]
        for one, name in zip(listing.found, names, strict=True):
            assert one.audio.name == f"shard-0{suffix}/{name}.wav"
            one.audio.download(folder.parent / "copy")
            assert (folder.parent / "copy").read_bytes() == name.encode() * 9000
        write(folder, {"list.jsonl": lines({"audio": f"shard-0{suffix}/a/1.wav", "text": "t", "speaker": "s"})})
        assert Listing(folder, "Manifest", manifest="list.jsonl", tar_shards=True).texts == ["t"]
        assert Listing(folder, "Manifest", manifest="list.jsonl").rejected == {"list.jsonl:1": "AudioNotFound"}

    def test_what_leads_out_or_is_no_file_is_rejected_by_name(self, folder: Path) -> None:
        write(folder, {"../secret.wav": b"secret"})
        write(
            folder,
            {
                "s.tar": tar(
                    member("good.wav", b"good"),
                    member("good.txt", b"text"),
                    member("/etc/absolute.wav", b"x"),
                    member("../../climbs.wav", b"x"),
                    member("link.wav", type=tarfile.SYMTYPE, linkname="../../secret.wav"),
                    member("hard.wav", type=tarfile.LNKTYPE, linkname="good.wav"),
                    member("device.wav", type=tarfile.CHRTYPE),
                    member("fifo.wav", type=tarfile.FIFOTYPE),
                    member("good.wav", b"twice"),
                )
            },
        )
        listing = Listing(folder, "Directory", tar_shards=True)
        assert listing.texts == ["text"]
        assert listing.found[0].audio.read(100) == b"good"
        assert listing.rejected == {
            "s.tar//etc/absolute.wav": "PathLeavesSource",
            "s.tar/../../climbs.wav": "PathLeavesSource",
            "s.tar/link.wav": "LinkInArchive",
            "s.tar/hard.wav": "LinkInArchive",
            "s.tar/device.wav": "SpecialFileInArchive",
            "s.tar/fifo.wav": "SpecialFileInArchive",
            "s.tar/good.wav": "RepeatedInArchive",
        }
        assert not (folder.parent.parent / "climbs.wav").exists()

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_of_a_damaged_archive_what_is_whole_is_kept(self, folder: Path, suffix: str) -> None:
        content = tar(
            member("1.wav", b"a" * 600), member("1.txt", b"one"), member("2.wav", b"b" * 4000), member("2.txt", b"two")
        )
        cut_off = content[: 512 * 6 + 100]
        write(folder, {f"s{suffix}": cut_off if suffix == ".tar" else gzip.compress(cut_off)})
        listing = Listing(folder, "Directory", tar_shards=True)
        assert listing.texts == ["one"]
        assert listing.rejected == {f"s{suffix}": "ArchiveDamaged"}

    @pytest.mark.parametrize("harm", ["checksum", "gzip", "gzip cut off", "extension", "size"])
    def test_damage_of_other_kinds_is_said_once(self, folder: Path, harm: str) -> None:
        content = bytearray(tar(member("1.wav", b"a" * 600), member("\u00fc" * 100, b"b")))
        packed = gzip.compress(bytes(content))
        files: dict[str, bytes | str] = {
            "checksum": {"s.tar": bytes(content[:100]) + b"?" + bytes(content[101:])},
            "gzip": {"s.tgz": packed[:20] + b"?????" + packed[25:]},
            "gzip cut off": {"s.tgz": packed[: len(packed) // 2]},
            "extension": {"s.tar": bytes(content).replace(b" path=", b" xath=").replace(b"x", b"y", 1)},
            "size": {"s.tar": tar(member("1.wav", b"a" * 600))[:600]},
        }[harm]
        write(folder, {"ok.wav": b"audio", "ok.txt": "fine", **files})
        listing = Listing(folder, "Directory", tar_shards=True)
        assert "fine" in listing.texts
        assert set(listing.rejected.values()) <= {"ArchiveDamaged", "LacksText"}
        assert "ArchiveDamaged" in listing.rejected.values() or harm == "extension"

    def test_a_bomb_is_refused_before_it_fills_the_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(folder, {"bomb.tgz": gzip.compress(tar(member("1.wav", b"\0" * 40_000_000), member("1.txt", b"x")))})
        write(folder, {"ok.wav": b"audio", "ok.txt": "fine"})
        listing = Listing(folder, "Directory", tar_shards=True)
        assert listing.texts == ["fine"]
        assert listing.rejected == {"bomb.tgz": "ArchiveTooLarge"}
        assert not list((folder.parent / "scratch").iterdir())
        monkeypatch.setattr(shards, "_MEMBERS", 3)
        write(folder, {"many.tar": tar(*(member(f"{number}.wav") for number in range(5)))})
        assert Listing(folder, "Directory", tar_shards=True).rejected["many.tar"] == "ArchiveTooLarge"


class TestVolume:
    def test_links_are_not_followed(self, folder: Path) -> None:
        outside = folder.parent.parent / "outside"
        write(outside, {"secret.wav": b"secret", "secret.txt": "secret"})
        write(folder, {"good.wav": b"audio", "good.txt": "fine", "linked.wav": b"audio"})
        (folder / "out").symlink_to(outside)
        (folder / "linked.txt").symlink_to(outside / "secret.txt")
        listing = Listing(folder, "Directory")
        assert listing.texts == ["fine"]
        assert listing.rejected == {"linked.wav": "LacksText"}
        good = next(file for file in VolumeOrigin(folder, "", "calls").list_files() if file.name == "good.txt")
        (folder / "good.txt").unlink()
        (folder / "good.txt").symlink_to(outside / "secret.txt")
        with pytest.raises(RecipeFailure):
            good.read(100)

    def test_a_path_that_is_not_there_or_leads_out_is_named(self, folder: Path) -> None:
        (folder / "link").symlink_to("/etc")
        for path, words in (("none", "correct the source's path"), ("link", "no folder link on claim calls")):
            with pytest.raises(NotFound, match=words):
                VolumeOrigin(folder, path, "calls")

    def test_a_volume_that_may_not_be_read_says_whose_right_is_missing(self, folder: Path) -> None:
        failure = VolumeOrigin(folder, "", "calls")._failure(PermissionError(13, "Permission denied"))
        assert isinstance(failure, AccessDenied)
        assert "user 65532" in failure.message

    def test_a_file_that_grew_too_large_is_not_read_whole(self, folder: Path) -> None:
        file = SourceFile("a", 10**12, VolumeOrigin(folder, "", "calls"))
        with pytest.raises(Exception, match="FileTooLarge"):
            file.read(64)
