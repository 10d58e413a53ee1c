"""Which pictures are kept: one pair for each picture, none of an evaluation set or a list.

First each picture is looked at, once: its perceptual hash, the scores that the user asks for. Then
hashes are compared, with each other and with evaluation sets. At last one task decides, in a fixed
order of reasons (`REASONS`), and brings every query back to its cap. The verdicts depend neither on
the order of the downloads nor on how the work was cut into tasks.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dataset_build import functions, lists
from pipeline.config import Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


class ScoreSettings(Settings):
    """A score of every picture, and which values keep it."""

    function: str
    """`package.module:function`, importable from the folder that the build is started in. It takes
    a list of pictures (uint8 [height, width, 3], RGB) and a list of their captions, and returns a
    float32 array; `dataset_build.screen.measures` has some."""
    at_least: float | None = None
    """Pictures with a smaller score are dropped, as `score:NAME`; by default none is."""
    at_most: float | None = None
    """Pictures with a larger score are dropped, as `score:NAME`; by default none is."""


class ScreenSettings(Settings):
    """Which pictures are kept."""

    pairs_per_picture: int | None = Field(1, ge=1)
    """Pairs that may have the same picture, those with the smallest uids; null for any number."""
    near_distance: int | None = Field(31, ge=0, le=31)
    """Bits of 256 up to which two perceptual hashes are of the same picture; null: pictures are the
    same if their files are. Not all that are so near are found: of pictures that share a part of
    their hash, each is compared with the first 64. PDQ's authors advise 31: photos in another size
    or quality differ in less, unlike ones in 90 and more. The hash is blind to colour: of a shirt
    in red and in blue on the same hanger one is kept."""
    captions_per_picture: int = Field(10, ge=1)
    """Different captions that a kept pair takes over from those dropped for the same picture, its
    own included."""
    drop_placeholders: bool = True
    """Drop a picture that too many addresses share: it says "not available", whatever its text."""
    placeholder_pairs: int = Field(100, gt=1)
    """A file that more addresses than this share is a placeholder."""
    evaluation: dict[Name, tuple[str, ...]] = Field(default_factory=dict)
    """Pictures that must not be in the dataset, by the name of their set: folders, patterns of
    picture files, tars (WebDataset's too), parquet files with columns of encoded pictures."""
    evaluation_distance: int = Field(31, ge=0, le=31)
    """Bits of 256 up to which a picture counts as one of an evaluation set; see `near_distance`."""
    listed_distance: int = Field(31, ge=0, le=31)
    """Bits of 256 up to which a picture counts as one of `lists.….perceptual`."""
    scores: dict[Name, ScoreSettings] = Field(default_factory=dict)
    """Scores of every picture, by name: `{sharp: {function: "package.module:name", at_least: 9}}`.
    A function is given a list of pictures (uint8 [height, width, 3], RGB) and a list of their
    captions, and returns a number for each; pictures below `at_least` or above `at_most` are
    dropped."""

    @model_validator(mode="after")
    def _some_limit(self) -> ScreenSettings:
        for name, score in self.scores.items():
            low, high = score.at_least, score.at_most
            if low is not None and high is not None and low > high:
                raise ValueError(f"scores.{name}: no score is at least {low} and at most {high}")
        return self


REASONS: dict[str, str] = {
    "removed": "it was removed from the run after its download",
    "blocked": "`lists.blocked` has its address, domain, file, picture or uid",
    "opted_out": "`lists.opted_out` has",
    "evaluation": "a picture of an evaluation set, or nearly one",
    "score:NAME": "the score NAME is outside its limits",
    "placeholder": "more than placeholder_pairs addresses have this very file",
    "duplicate_picture": "pairs with smaller uids have the same file",
    "near_duplicate": "pairs with smaller uids have nearly the same picture",
    "over_cap": "its queries have cap other pairs",
}
"""Why a pair is dropped: the first that holds, in this order."""

_FILES_A_TASK = 10_000  # pictures of an evaluation set that are files of their own
# Pictures that a task compares with others, times these: some minutes. A set of 50,000 takes 4
# million pictures a task, ImageNet's 1.3 million 150,000.
_COMPARED_A_TASK = 2 * 10**11
_ROWS_A_TASK = 4_000_000, 1 << 17  # at most, at least
_DISTANCES = ("evaluation_distance", "listed_distance")
_ALL = tuple(ScreenSettings.model_fields)


def compares(run: Run) -> bool:
    """Whether perceptual hashes are wanted."""
    settings: ScreenSettings = run.settings("screen")
    return settings.near_distance is not None or _compares_with_some(run)


def _compares_with_some(run: Run) -> bool:
    """Whether pictures are compared with others than those of the pool."""
    named: lists.ListsSettings = run.settings("lists")
    listed = named.blocked.perceptual or named.opted_out.perceptual
    return bool(run.settings("screen").evaluation or listed)


def plan(run: Run) -> list[Task]:
    """Look at the pictures of every `fetched-*.parquet`, and at those of evaluation sets."""
    from dataset_build.screen import scores, staged

    settings: ScreenSettings = run.settings("screen")
    tasks: list[Task] = []
    if compares(run) or settings.scores:
        chosen: dict[str, list[str]] = {
            name: [score.function, functions.identity(scores.setting(name), score.function)]
            for name, score in settings.scores.items()
        }
        tars = staged.tars(run)
        for fetched in run.find("download:fetched-*.parquet"):
            params = {"phase": "look", "scores": chosen}
            reads = (fetched, *tars[fetched])
            tasks.append(Task("screen", len(tasks), reads, params, _ALL))
    for part, (name, reads) in enumerate(_evaluation_files(run, settings)):
        about = {"phase": "evaluation", "set": name, "part": part, "download": _resizing(run)}
        tasks.append(Task("screen", len(tasks), reads, about, _ALL))
    return tasks


def _evaluation_files(run: Run, settings: ScreenSettings) -> list[tuple[str, tuple[str, ...]]]:
    """(set, files) of every task that hashes evaluation pictures: an archive, or many pictures."""
    from dataset_build.screen import evaluation

    found: list[tuple[str, tuple[str, ...]]] = []
    for name, patterns in settings.evaluation.items():
        names = evaluation.find(run, name, patterns)
        found += [(name, (file,)) for file in names if evaluation.is_archive(file)]
        pictures = [file for file in names if not evaluation.is_archive(file)]
        for start in range(0, len(pictures), _FILES_A_TASK):
            found.append((name, tuple(pictures[start : start + _FILES_A_TASK])))
    return found


def _resizing(run: Run) -> dict[str, object]:
    """What of the download's settings decides how a picture is stored."""
    names = {"image_size", "resize_mode", "resize_only_if_bigger", "encode_quality"}
    found: dict[str, object] = run.settings("download").model_dump(mode="json", include=names)
    return found


def _plan_collect(run: Run) -> list[Task]:
    """Bring all hashes together."""
    if not compares(run):
        return []
    reads = tuple(run.find("screen:looked-*.parquet"))
    return [Task("screen", len(run.plan("screen")), reads, {"phase": "collect"}, _ALL)]


def _plan_compare(run: Run) -> list[Task]:
    """Find near pictures of the pool, a task for some of the keys to sort; and near ones of
    evaluation sets, a task for some of the pictures."""
    from dataset_build.screen import near

    settings: ScreenSettings = run.settings("screen")
    tasks: list[Task] = []
    if not compares(run):
        return tasks
    first = len(run.plan("screen"))
    outputs = (output for manifest in run.manifests("screen") for output in manifest.outputs)
    rows = sum(output.rows or 0 for output in outputs if output.name.startswith("looked-"))
    if settings.near_distance is not None:
        ignores = tuple(name for name in _ALL if name != "near_distance")
        for part, slots in enumerate(near.slots_of_tasks(rows)):
            params = {"phase": "near", "part": part, "slots": slots}
            arrays = ("screen:hashes.npy", "screen:weak.npy", "screen:classes.npy")
            tasks.append(Task("screen", first + len(tasks), arrays, params, ignores))
    if _compares_with_some(run):
        ignores = tuple(name for name in _ALL if name not in _DISTANCES)
        sets = run.find("screen:evaluation-*.parquet") if settings.evaluation else []
        reads = ("screen:hashes.npy", "screen:classes.npy", *sets)
        others = sum(
            output.rows or 0
            for manifest in run.manifests("screen")
            for output in manifest.outputs
            if output.name.startswith("evaluation-")
        )
        most, least = _ROWS_A_TASK
        step = min(most, max(least, _COMPARED_A_TASK // max(others, 1)))
        for part, start in enumerate(range(0, rows, step)):
            bounds = (start, min(start + step, rows))
            params = {"phase": "compare", "part": part, "rows": bounds, "sets": len(sets)}
            task = Task("screen", first + len(tasks), reads, params, ignores)
            tasks += lists.reading(run, [task], "perceptual")
    return tasks


def _plan_decide(run: Run) -> list[Task]:
    """One task: which pair is the first shows only over all pairs."""
    reads = ["balance:counts.npy", *run.find("download:fetched-*.parquet")]
    reads += run.find("balance:selected-*.parquet")
    outputs = [output.name for done in run.manifests("screen") for output in done.outputs]
    wanted = ("looked-", "evaluation-", "edges-", "hits-", "classes.npy")
    reads += [f"screen:{name}" for name in sorted(outputs) if name.startswith(wanted)]
    balance = run.settings("balance").identity()
    params = {"phase": "decide", "balance": balance}
    # What has been found with them is read.
    ignores = ("evaluation", "near_distance", *_DISTANCES)
    task = Task("screen", len(run.plan("screen")), tuple(reads), params, ignores)
    return lists.reading(run, [task], "addresses", "domains", "sha256", "uids")


def work(attempt: Attempt) -> Stats:
    """Do one task of the phase that its parameters name."""
    phase = attempt.task.params["phase"]
    if phase == "look":
        from dataset_build.screen.look import look

        return look(attempt)
    if phase == "evaluation":
        from dataset_build.screen.evaluation import hash_set

        return hash_set(attempt)
    if phase == "compare":
        from dataset_build.screen.compare import compare

        return compare(attempt)
    if phase in ("collect", "near"):
        from dataset_build.screen import near

        return {"collect": near.collect, "near": near.find}[phase](attempt)
    from dataset_build.screen.decide import decide

    return decide(attempt)


STAGE = Stage(
    "screen",
    ("balance", "download"),
    plan,
    work,
    then=(_plan_collect, _plan_compare, _plan_decide),
    unit="pairs",
    version=4,
)
