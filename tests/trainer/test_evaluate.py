"""evaluate with the mini model: figures, verdicts, report, and models that cannot be judged."""

import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attune
import jiwer
import pyarrow.parquet as pq
import pytest
import torch
from attune.contract.environment import endpoint_variable
from attune.contract.exitcode import ExitCode
from attune.contract.job import DatasetInput, EvaluateRecipe, PrepareRecipe, Split
from attune.contract.measures import Decision
from attune.contract.result import EvaluateResult, PrepareResult
from attune_trainer.data.dataset import Utterance, load_split, read_audio
from attune_trainer.failures import RecipeFailure, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.recipes import evaluate, prepare
from attune_trainer.scoring import hearing
from attune_trainer.store import Store, digest_directory
from safetensors.torch import load_file, save_file

from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model
from tests.trainer.conftest import S3Server, free_port
from tests.trainer.server_process import start_server

MakeContext = Callable[..., RecipeContext]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uploaded(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The mini model, and one that is worse by noise on its weights; names -> URIs."""
    store: Store = s3_server.store()
    model = ensure_mini_model()
    worse = tmp_path_factory.mktemp("worse")
    for file in model.iterdir():
        (worse / file.name).write_bytes(file.read_bytes())
    weights = load_file(worse / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim == 2 and "positions" not in name:
            weights[name] = tensor + 0.35 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(weights, worse / "model.safetensors", metadata={"format": "pt"})
    store.upload_directory(ensure_mini_corpus("old"), "evaluate/corpus")
    return {
        "mini": store.upload_directory(model, "evaluate/mini"),
        "worse": store.upload_directory(worse, "evaluate/worse"),
    }


@pytest.fixture
def corpus(uploaded: dict[str, str], make_context: MakeContext) -> DatasetInput:
    """The prepared corpus, a quarter of it held out; the second test and on find its audio in the store."""
    context = make_context(
        {
            "recipe": "prepare",
            "sources": [{"uri": "s3://attune/evaluate/corpus/", "format": "Manifest", "manifest": "transcripts.jsonl"}],
            "language": "en",
            "splits": {"by": "Group", "validation": "0.1", "holdout": "0.3", "seed": 7},
            "maxRejectedShare": "0",
            "outputPrefix": "evaluate/dataset",
        }
    )
    assert isinstance(context.spec.recipe, PrepareRecipe)
    result: PrepareResult = prepare.run(context.spec.recipe, context)
    assert result.splits.holdout.utterances == 60
    return DatasetInput(name="commands", revision=result.revision, uri=result.uri)


def recipe(corpus: DatasetInput, uris: dict[str, str], key_prefix: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "recipe": "evaluate",
        "dataset": corpus.model_dump(by_alias=True),
        "split": "Holdout",
        "candidates": [{"name": name, "model": {"uri": uri}} for name, uri in uris.items()],
        "baseline": next(iter(uris)),
        "metrics": ["Wer", "Cer", "SentenceAccuracy", "RealTimeFactor"],
        "outputPrefix": f"{key_prefix}/evaluation",
    }
    return fields | changes


def run(context: RecipeContext) -> EvaluateResult:
    assert isinstance(context.spec.recipe, EvaluateRecipe)
    return evaluate.run(context.spec.recipe, context)


def transcribe(store: Store, utterances: list[Utterance], folder: Path) -> list[str]:
    recognizer = load_recognizer(ensure_mini_model())
    return recognizer.transcribe([read_audio(store, one, folder) for one in utterances])


def test_figures_are_those_of_the_model_on_the_split(
    s3_store: Store,
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    uris = {"tuned": uploaded["mini"], "worse": uploaded["worse"]}
    context = make_context(recipe(corpus, uris, key_prefix, baseline="worse"))
    result = run(context)
    tuned, worse = result.leaderboard
    assert (tuned.candidate, tuned.rank, worse.candidate, worse.rank) == ("tuned", 1, "worse", 2)
    holdout = load_split(s3_store, corpus, Split.HOLDOUT)
    # Reference and hypothesis are lower-case words without punctuation, so nothing needs to be normalised here.
    heard = transcribe(s3_store, holdout, tmp_path / "audio")
    measured = jiwer.process_words([one.text for one in holdout], heard)
    assert (tuned.substitutions, tuned.deletions, tuned.insertions, tuned.hits) == (
        measured.substitutions,
        measured.deletions,
        measured.insertions,
        measured.hits,
    )
    assert float(tuned.wer) == pytest.approx(measured.wer, abs=1e-4)
    assert float(tuned.cer or "nan") == pytest.approx(jiwer.cer([one.text for one in holdout], heard), abs=1e-4)
    right = sum(one.text == text for one, text in zip(holdout, heard, strict=True))
    assert float(tuned.sentence_accuracy or "nan") == pytest.approx(right / len(holdout), abs=1e-4)
    assert float(tuned.real_time_factor or "nan") > 0
    assert tuned.model_digest == digest_directory(ensure_mini_model())
    assert tuned.padding is load_recognizer(ensure_mini_model()).padding
    assert (worse.change_from_baseline, worse.change_low) == (None, None)
    assert float(tuned.wer_low) <= float(tuned.wer) <= float(tuned.wer_high) < float(worse.wer_low)
    assert (result.verdict.decision, result.winner) == (Decision.PROMOTE, "tuned")
    assert float(tuned.change_high or "nan") < 0
    assert f"on {tuned.words} words" in result.verdict.reason
    assert context.reporter.snapshot().percent >= 97


def test_a_worse_candidate_is_not_promoted_and_alone_it_asks_for_training(
    uploaded: dict[str, str], corpus: DatasetInput, key_prefix: str, make_context: MakeContext
) -> None:
    uris = {"base": uploaded["mini"], "new": uploaded["worse"]}
    kept = run(make_context(recipe(corpus, uris, key_prefix, gates=[{"metric": "Wer", "max": "0.5"}])))
    assert (kept.verdict.decision, kept.winner) == (Decision.KEEP, "base")
    alone = {"base": uploaded["worse"]}
    gates = [{"metric": "Wer", "max": "0.02"}]
    judged = run(make_context(recipe(corpus, alone, key_prefix, gates=gates)))
    assert (judged.verdict.decision, judged.winner) == (Decision.FINE_TUNE, None)
    assert re.fullmatch(r"Wer [0-9.]+ % is above 2 %", judged.leaderboard[0].failed_gates[0])


def test_what_was_heard_before_is_not_heard_again(
    s3_store: Store,
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attune, "__version__", key_prefix)  # other tests have heard the same models
    uris = {"base": uploaded["worse"], "missing": s3_store.uri(f"{key_prefix}/later")}
    first_try = run(make_context(recipe(corpus, uris, key_prefix)))
    assert [(one.candidate, one.reason) for one in first_try.failed] == [("missing", "ModelNotFound")]
    s3_store.upload_directory(ensure_mini_model(), f"{key_prefix}/later")
    loaded: list[Path] = []
    load = hearing.load_recognizer
    monkeypatch.setattr(hearing, "load_recognizer", lambda folder: loaded.append(folder) or load(folder))
    result = run(make_context(recipe(corpus, uris, key_prefix)))
    assert [folder.name for folder in loaded] == ["1"]  # the base was measured by the first attempt
    assert result.winner == "missing"
    assert run(make_context(recipe(corpus, uris, key_prefix))) == result
    other = {"new": uris["base"], "tuned": uploaded["mini"]}
    again = run(make_context(recipe(corpus, other, f"{key_prefix}/other")))
    assert len(loaded) == 1  # another Evaluation, another name, another place: the same models on the same split
    assert [(row.candidate, row.wer) for row in again.leaderboard] == [
        ({"missing": "tuned", "base": "new"}[row.candidate], row.wer) for row in result.leaderboard
    ]
    s3_store.upload_directory(ensure_mini_model(), f"{key_prefix}/changing")
    changing = {"base": s3_store.uri(f"{key_prefix}/changing")}
    first = run(make_context(recipe(corpus, changing, f"{key_prefix}/first")))
    for file in s3_store.list(uploaded["worse"].removeprefix("s3://attune/") + "/"):
        s3_store.write_bytes(f"{key_prefix}/changing/{file.rpartition('/')[2]}", s3_store.read_bytes(file))
    second = run(make_context(recipe(corpus, changing, f"{key_prefix}/second")))
    assert float(second.leaderboard[0].wer) > float(first.leaderboard[0].wer)  # same address, another model


def test_a_model_of_known_digest_that_was_heard_before_is_not_even_fetched(
    s3_store: Store,
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attune, "__version__", key_prefix)
    model = {"uri": s3_store.upload_directory(ensure_mini_model(), f"{key_prefix}/model")}
    model["digest"] = digest_directory(ensure_mini_model())
    asked = recipe(corpus, {"base": model["uri"]}, key_prefix, candidates=[{"name": "base", "model": model}])
    result = run(make_context(asked))
    for key in s3_store.list(f"{key_prefix}/model/"):
        s3_store.delete(key)
    assert run(make_context(asked)) == result
    # One that was not heard before has to be there, and to be what it is said to be.
    model["digest"] = f"sha256:{'0' * 64}"
    with pytest.raises(RecipeFailure, match="candidate base: there is no model"):
        run(make_context(asked))
    s3_store.upload_directory(ensure_mini_model(), f"{key_prefix}/model")
    with pytest.raises(RecipeFailure, match=r"candidate base: the files of .* were changed"):
        run(make_context(asked))


def test_the_report_holds_figures_and_no_transcript(
    s3_store: Store,
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    uris = {"base": uploaded["mini"], "ne$w": uploaded["worse"], "x<script>": uploaded["worse"]}
    gates = [{"metric": "Wer", "max": "0.5"}, {"metric": "Wer", "maxChangeFromBaseline": "-0.05"}]
    result = run(make_context(recipe(corpus, uris, key_prefix, gates=gates)))
    prefix = f"s3://attune/{key_prefix}/evaluation"
    assert result.report_uri == f"{prefix}/report.html"
    html = s3_store.read_bytes(result.report_uri).decode()
    assert result.verdict.reason in html
    assert "<svg" in html
    assert "<script" not in html
    assert "x&lt;script&gt;" in html
    assert "src=" not in html
    assert corpus.revision in html
    full = json.loads(s3_store.read_bytes(f"{prefix}/results.json"))
    for row, counted in zip(result.leaderboard, full["candidates"], strict=True):
        sums = [sum(column) for column in zip(*counted["counts"], strict=True)]
        assert sums == [row.hits, row.substitutions, row.deletions, row.insertions]
        assert sum(counted["utterancesByErrors"]) == row.utterances == len(full["utterances"])
        assert sum(counted["confusions"]) == row.substitutions
    holdout = load_split(s3_store, corpus, Split.HOLDOUT)
    for text in (html, json.dumps(full)):
        assert not [one.text for one in holdout if one.text in text]
        heard = transcribe(s3_store, holdout, tmp_path / "audio")
        # A word alone may be a confusion that several utterances share.
        assert not [one for one in heard if len(one.split()) > 1 and one in text]
    table = pq.read_table(io.BytesIO(s3_store.read_bytes(f"{prefix}/utterances.parquet")))
    assert table.num_rows == len(uris) * len(holdout)
    by_candidate = table.group_by("candidate").aggregate([(name, "sum") for name in ("words", "hits", "insertions")])
    for one in by_candidate.to_pylist():
        (line,) = (row for row in result.leaderboard if row.candidate == one["candidate"])
        assert (one["words_sum"], one["hits_sum"], one["insertions_sum"]) == (line.words, line.hits, line.insertions)
    assert not {name for name in table.column_names if "text" in name}
    said = {word for one in holdout for word in one.text.split()}
    for candidate in full["candidates"]:
        assert candidate["figures"]["Wer"]["n"] == result.leaderboard[0].words
    files = [key.rpartition("/")[2] for key in s3_store.list(f"{key_prefix}/evaluation/")]
    assert sorted(files) == ["report.html", "results.json", "utterances.parquet"]
    assert set(re.findall(r"<tr><td>([a-z]+)</td><td>[a-z]+</td><td>[0-9]+</td><td>", html)) <= said


def test_a_model_that_cannot_be_judged_is_named(
    s3_store: Store, uploaded: dict[str, str], corpus: DatasetInput, key_prefix: str, make_context: MakeContext
) -> None:
    model = ensure_mini_model()
    config = json.loads((model / "config.json").read_text())
    for file in model.iterdir():
        s3_store.upload_file(file, f"{key_prefix}/unknown/{file.name}")
    config |= {"architectures": ["SomethingForUnheardOf"], "model_type": "something"}
    s3_store.write_bytes(f"{key_prefix}/unknown/config.json", json.dumps(config).encode())
    unknown = {"base": uploaded["mini"], "strange": s3_store.uri(f"{key_prefix}/unknown")}
    result = run(make_context(recipe(corpus, unknown, key_prefix)))
    assert [row.candidate for row in result.leaderboard] == ["base"]
    (failed,) = result.failed
    assert (failed.candidate, failed.reason) == ("strange", "UnsupportedModel")
    assert "Whisper" in failed.message
    assert result.verdict.reason.endswith("Not judged: strange.")
    html = s3_store.read_bytes(result.report_uri).decode()
    assert "UnsupportedModel" in html
    with pytest.raises(RecipeFailure) as caught:
        run(make_context(recipe(corpus, {"strange": unknown["strange"]}, key_prefix)))
    assert caught.value.code is ExitCode.UNSUPPORTED_MODEL
    assert caught.value.message.startswith("candidate strange: ")
    missing = {"base": s3_store.uri(f"{key_prefix}/nothing")}
    with pytest.raises(RecipeFailure, match="candidate base: there is no model") as caught:
        run(make_context(recipe(corpus, missing, key_prefix)))
    assert caught.value.code is ExitCode.NOT_FOUND


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"baseline": "other"}, "none of the candidates", id="unknown baseline"),
        pytest.param({"gates": [{"metric": "Wer"}]}, "exactly one", id="a gate without a bound"),
        pytest.param({"gates": [{"metric": "SentenceAccuracy", "max": "1"}]}, "better when larger", id="wrong way"),
        pytest.param({"gates": [{"metric": "Wer", "max": "1", "slice": "accent"}]}, "needs a slice", id="no slice"),
        pytest.param({"metrics": ["EntityAccuracy"]}, "belong together", id="no entities"),
        pytest.param({"entities": {"numbers": True}}, "belong together", id="entities for nothing"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    changes: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(RecipeFailure, match=says) as caught:
        run(make_context(recipe(corpus, {"base": uploaded["mini"]}, key_prefix, **changes)))
    assert caught.value.reason == "InvalidEvaluation"


def test_metrics_slices_and_entities_are_those_of_the_split(
    s3_store: Store,
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    uris = {"base": uploaded["worse"], "tuned": uploaded["mini"]}
    s3_store.write_bytes(f"{key_prefix}/terms.txt", b"\xef\xbb\xbfred\n\nlights on\n")
    asked = {
        "metrics": ["Wer", "Cer", "SentenceAccuracy", "EntityAccuracy", "Latency"],
        "slices": ["speaker", "duration"],
        "entities": {"terms": ["Blue!"], "termsUri": s3_store.uri(f"{key_prefix}/terms.txt"), "numbers": True},
        "gates": [{"metric": "Wer", "maxChangeFromBaseline": "0.02", "slice": "speaker"}],
    }
    result = run(make_context(recipe(corpus, uris, key_prefix, **asked)))
    tuned = next(row for row in result.leaderboard if row.candidate == "tuned")
    assert result.normaliser == "attune-unicode-1"
    for name in ("cer", "sentence_accuracy", "entity_accuracy"):
        low, value, high = (float(getattr(tuned, f"{name}{end}")) for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert float(tuned.latency_seconds or "0") > 0
    assert float(tuned.p_value or "1") < 0.01
    assert 0 < float(tuned.detectable_change or "0") < 1
    holdout = load_split(s3_store, corpus, Split.HOLDOUT)
    full = json.loads(s3_store.read_bytes(f"s3://attune/{key_prefix}/evaluation/results.json"))
    counted = next(one for one in full["candidates"] if one["candidate"] == "tuned")
    speakers = {one.speaker for one in holdout}
    by_speaker = [one for one in counted["slices"] if one["label"] == "speaker"]
    assert {one["value"] for one in by_speaker} == speakers
    for one in by_speaker:
        places = [place for place, utterance in enumerate(holdout) if utterance.speaker == one["value"]]
        words = sum(len(holdout[place].text.split()) for place in places)
        errors = sum(sum(counted["counts"][place][1:]) for place in places)
        assert (one["utterances"], one["words"]) == (len(places), words)
        assert one["wer"]["value"] == pytest.approx(errors / words)
        assert one["tooSmall"] == (words < 100 or len(places) < 10)
    # Entities by another way: none overlaps, so each is right where the alignment has no error between its words.
    heard = transcribe(s3_store, holdout, tmp_path / "audio")
    terms = [("blue",), ("red",), ("lights", "on")]
    of = sum(
        tuple(words[place : place + len(term)]) == term
        for words in (one.text.split() for one in holdout)
        for term in terms
        for place in range(len(words))
    )
    assert (tuned.entities or 0) >= of
    assert len(heard) == len(holdout)


def test_a_slice_and_a_term_that_nobody_has_are_said(
    s3_store: Store, uploaded: dict[str, str], corpus: DatasetInput, key_prefix: str, make_context: MakeContext
) -> None:
    uris = {"base": uploaded["mini"]}
    with pytest.raises(RecipeFailure, match="no utterance of the Holdout split has a label accent") as caught:
        run(make_context(recipe(corpus, uris, key_prefix, slices=["accent"])))
    assert caught.value.reason == "UnknownSlice"
    assert "duration, group, speaker" in caught.value.message
    entities = {"metrics": ["EntityAccuracy"], "entities": {"terms": ["metformin"]}}
    with pytest.raises(RecipeFailure, match="none of the terms") as caught:
        run(make_context(recipe(corpus, uris, key_prefix, **entities)))
    assert caught.value.reason == "NoEntities"
    entities["entities"] = {"termsUri": s3_store.uri(f"{key_prefix}/nothing.txt")}
    with pytest.raises(RecipeFailure, match=r"there is no s3://.*nothing\.txt"):
        run(make_context(recipe(corpus, uris, key_prefix, **entities)))
    s3_store.write_bytes(f"{key_prefix}/nothing.txt", b"\xff\xfe\x00")
    with pytest.raises(RecipeFailure, match="is not UTF-8"):
        run(make_context(recipe(corpus, uris, key_prefix, **entities)))


def test_an_endpoint_is_judged_beside_models_and_hears_as_its_model_does(
    s3_server: S3Server,
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(endpoint_variable(1), "no one asks for it")
    with start_server(s3_server, tmp_path / "server", uploaded["mini"]) as server:
        candidates = [
            {"name": "base", "model": {"uri": uploaded["worse"]}},
            {"name": "served", "endpoint": {"url": f"{server.url}/v1", "keyIndex": 1}},
            {"name": "tuned", "model": {"uri": uploaded["mini"]}},
            {"name": "down", "endpoint": {"url": f"http://127.0.0.1:{free_port()}/v1", "maxAttempts": 1}},
        ]
        asked = recipe(corpus, {"base": ""}, key_prefix, candidates=candidates)
        result = run(make_context(asked))
    rows = {row.candidate: row for row in result.leaderboard}
    served, tuned = rows["served"], rows["tuned"]
    assert (served.wer, served.hits, served.insertions) == (tuned.wer, tuned.hits, tuned.insertions)
    assert (served.model_digest, served.padding) == (None, None)
    assert float(served.real_time_factor or "0") > 0
    assert (result.verdict.decision, result.winner) == (Decision.PROMOTE, "served")
    assert [(one.candidate, one.reason) for one in result.failed] == [("down", "EndpointUnreachable")]
    # The server is gone, and what it has answered in this run is known.
    again = run(make_context(asked))
    assert {row.candidate: row.wer for row in again.leaderboard} == {name: row.wer for name, row in rows.items()}


def test_an_evaluation_that_was_cut_off_goes_on_where_it_was(
    uploaded: dict[str, str],
    corpus: DatasetInput,
    key_prefix: str,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attune, "__version__", key_prefix)
    monkeypatch.setattr(hearing, "_CHUNK", 16)
    whole = run(make_context(recipe(corpus, {"base": uploaded["worse"]}, f"{key_prefix}/whole")))
    monkeypatch.setattr(attune, "__version__", f"{key_prefix}-again")
    stop = threading.Event()
    heard: list[int] = []
    load = hearing.load_recognizer

    def load_watched(folder: Path) -> Any:
        recognizer = load(folder)
        transcribe_clips = recognizer.transcribe

        def transcribe_and_stop(clips: list[Any], **options: Any) -> list[str]:
            heard.append(len(clips))
            if len(heard) == 2:
                stop.set()
            return transcribe_clips(clips, **options)

        monkeypatch.setattr(recognizer, "transcribe", transcribe_and_stop)
        return recognizer

    monkeypatch.setattr(hearing, "load_recognizer", load_watched)
    asked = recipe(corpus, {"base": uploaded["worse"]}, key_prefix)
    with pytest.raises(Terminated):
        run(make_context(asked, stop=stop))
    assert heard == [16, 16]
    result = run(make_context(asked))
    assert heard == [16, 16, 16, 12]  # 60 utterances, none of them twice
    assert result.leaderboard[0].wer == whole.leaderboard[0].wer
    assert result.leaderboard[0].hits == whole.leaderboard[0].hits


def test_a_model_whose_files_are_damaged_costs_the_others_nothing(
    s3_store: Store, uploaded: dict[str, str], corpus: DatasetInput, key_prefix: str, make_context: MakeContext
) -> None:
    for file in ensure_mini_model().iterdir():
        content = file.read_bytes()
        cut = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        s3_store.write_bytes(f"{key_prefix}/cut/{file.name}", cut)
    uris = {"cut": s3_store.uri(f"{key_prefix}/cut"), "base": uploaded["worse"], "tuned": uploaded["mini"]}
    result = run(make_context(recipe(corpus, uris, key_prefix, baseline="base")))
    assert (result.verdict.decision, result.winner) == (Decision.PROMOTE, "tuned")
    (failed,) = result.failed
    assert failed.candidate == "cut"
    assert failed.reason
    assert not failed.message.startswith("candidate")  # its name stands beside it
    # Without the baseline the others keep their figures, and none is called better.
    result = run(make_context(recipe(corpus, uris, f"{key_prefix}/again", baseline="cut")))
    assert result.verdict.decision is Decision.INCONCLUSIVE
    assert [row.candidate for row in result.leaderboard] == ["tuned", "base"]
    assert all(row.change_from_baseline is None for row in result.leaderboard)
